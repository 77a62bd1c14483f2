"""Runners: one protocol over PyTorch, llama.cpp and ONNX Runtime."""

from __future__ import annotations

from anyquant.validation.runners.protocol import Runner, RunnerSpec, open_runner

__all__ = ["Runner", "RunnerSpec", "open_runner"]
