"""One validation from beginning to end."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from anyquant import ir
from anyquant.errors import InputError
from anyquant.gguf_container import map_file, parse
from anyquant.reporting.environment import environment
from anyquant.reporting.notes import another_source
from anyquant.reporting.writing import prepare
from anyquant.validation import texts, tokens
from anyquant.validation.activation_formats import activation_format
from anyquant.validation.arithmetic import Arithmetic, gguf_arithmetic, onnx_arithmetic
from anyquant.validation.bootstrap import Bootstrap
from anyquant.validation.gates import all_gates
from anyquant.validation.measure import GPU, Pairs, Station, measure_window, perplexity, summarize
from anyquant.validation.report import JSON_NAME, write_report
from anyquant.validation.results import SCHEMA, Gate, ModelRow, TensorComparison, ValidationReport
from anyquant.validation.runners import RunnerSpec, open_runner
from anyquant.validation.runners.process import ProcessRunner
from anyquant.validation.runners.protocol import TextRunner
from anyquant.validation.settings import ValidationSettings
from anyquant.validation.sizes import ir_bytes, onnx_bytes
from anyquant.validation.tensors import compare_export, compare_ir


def validate(settings: ValidationSettings, progress: ir.Progress | None = None) -> ValidationReport:
    """Compare every file with PyTorch on the IR's weights, and all with the source; write the report.

    Gates that fail do not raise: call :meth:`ValidationReport.require` when the report has been shown.

    Args:
        settings: what to compare, on what text.
        progress: called with (what is being done, steps done, steps in all).

    Raises:
        UsageError: the settings contradict each other, or a report of another kind would be replaced.
        InputError: a file or the text cannot be used.
        MissingDependency: a runtime is not installed.
        MachineError: a runtime died, or the report cannot be written.
    """
    settings.check()
    if settings.report is not None:
        prepare(settings.report, JSON_NAME, SCHEMA)
    started = time.monotonic()
    run = _Validation(settings, progress or (lambda what, done, total: None))
    report = run.report(started)
    if settings.report is not None:
        write_report(report, settings.report)
    return report


class _Validation:
    """The steps share what they know here; cheap refusals come before the first model is loaded."""

    def __init__(self, settings: ValidationSettings, progress: ir.Progress) -> None:
        self.settings, self.progress = settings, progress
        self.model = ir.open_ir(settings.model)
        self.arithmetic: dict[str, Arithmetic] = {}
        if settings.gguf is not None:
            self.arithmetic["GGUF"] = gguf_arithmetic(parse(map_file(settings.gguf), str(settings.gguf)))
        if settings.onnx is not None:
            if not settings.onnx.exists():
                raise InputError(f"there is no {settings.onnx}")
            self.arithmetic["ONNX"] = onnx_arithmetic(settings.onnx)
        self.activations = activation_format(settings.activations) if settings.activations else None
        if self.activations is not None:
            self.arithmetic[self.activations.row] = Arithmetic("quantized", self.activations.reason)
        if settings.device != "cpu":
            import torch

            from anyquant.runtime.cuda.launcher import require_gpu

            require_gpu(torch.device(settings.device))
            self.arithmetic[GPU] = Arithmetic("fp32", "our kernels and torch compute in FP32")
        self.notes: list[str] = []
        self.tokenizer = texts.load_tokenizer(settings.model, settings.trust_remote_code)
        self._cut_text()
        self.specs = self._specs()
        self._source_bytes = self._look_at_source()

    def _cut_text(self) -> None:
        settings = self.settings
        self.windows, notes = texts.cut_text(
            settings.text,
            self.tokenizer,
            self.model.config,
            window=settings.window,
            windows=settings.windows,
            seed=settings.seed,
        )
        self.notes += notes
        prompt = texts.prompt_ids(self.tokenizer, settings.prompt) if settings.generate else []
        limit = texts.context_length(self.model.config) or len(prompt) + settings.generate
        room = limit - len(prompt)
        self.answer_length = min(settings.generate, max(room, 0))
        self.prompt = prompt
        self.context = max(self.windows.ids.shape[1], len(prompt) + self.answer_length)

    def _specs(self) -> list[RunnerSpec]:
        settings = self.settings
        threads = settings.threads or 0
        files = [("source", "checkpoint", settings.source), ("IR", "ir", settings.model)]
        files += [("GGUF", "gguf", settings.gguf), ("ONNX", "onnx", settings.onnx)]
        specs = [
            RunnerSpec(name, kind, str(path), self.context, threads, settings.revision, settings.trust_remote_code)
            for name, kind, path in files
            if path is not None
        ]
        after = next(number for number, spec in enumerate(specs, 1) if spec.name == "IR")
        ours = specs[after - 1]
        others = []
        if settings.device != "cpu":
            others.append(replace(ours, name=GPU, device=settings.device))
        if self.activations is not None:
            others.append(replace(ours, name=self.activations.row, activations=self.activations.name))
        return [*specs[:after], *others, *specs[after:]]

    def _look_at_source(self) -> int:
        """Bytes of the source's tensors; a note if it is not what the IR was made of."""
        settings = self.settings
        if settings.source is None:
            self.notes.append("No --source was given: nothing is said of the distance to the unquantized model.")
            return 0
        from anyquant.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(
            settings.source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
        self.notes += another_source(self.model, checkpoint)
        return sum(tensor.nbytes for tensor in checkpoint.tensors.values())

    def _tensors(self) -> tuple[TensorComparison, ...]:
        found = [compare_ir(self.model, self.progress)]
        for name, path in (("GGUF", self.settings.gguf), ("ONNX", self.settings.onnx)):
            if path is not None:
                rounding = self.arithmetic[name].rounding
                found.append(compare_export(self.model, name.lower(), path, rounding=rounding, progress=self.progress))
        return tuple(found)

    def _open(self, stack: ExitStack) -> list[Station]:
        stations = []
        for done, spec in enumerate(self.specs):
            self.progress(f"opening {spec.name}", done, len(self.specs))
            began = time.monotonic()
            runner = ProcessRunner(spec) if self.settings.isolate else open_runner(spec)
            stack.callback(runner.close)
            stations.append(Station(runner, load_seconds=time.monotonic() - began))
        self.progress("opening models", len(self.specs), len(self.specs))
        return stations

    def _tokens(self, stations: list[Station]) -> tuple[Gate, ...]:
        """What a GGUF file's own tokenizer makes of texts. Where the source is one, its tokenizer was taken over."""
        runner = next((station.runner for station in stations if station.name == "GGUF"), None)
        if self.model.source.get("kind") == "gguf" or not isinstance(runner, TextRunner):
            return ()
        self.notes += tokens.probe_notes(self.tokenizer, runner, texts.chat_text(self.tokenizer, self.settings.prompt))
        return (tokens.text_gate(self.tokenizer, runner, texts.read_text(self.settings.text)),)

    def _measure(self, stations: list[Station]) -> Pairs:
        pairs: Pairs = {}
        total, done = len(self.windows.ids) * len(stations), 0
        for number, ids in enumerate(self.windows.ids):
            for name in measure_window(stations, pairs, number, ids, self.settings.tie_tolerance):
                done += 1
                self.progress(f"window {number + 1} of {len(self.windows.ids)}: {name}", done, total)
        return pairs

    def report(self, started: float) -> ValidationReport:
        """Run everything."""
        settings = self.settings
        tensors = self._tensors()
        boot = Bootstrap(len(self.windows.ids), settings.resamples, settings.seed)
        with ExitStack() as stack:
            stations = self._open(stack)
            token_gates = self._tokens(stations)
            pairs = self._measure(stations)
            rows = tuple(self._row(station, boot) for station in stations)
        by_name = {station.name: station for station in stations}
        comparisons = tuple(summarize(by_name[a], by_name[b], found, boot) for (a, b), found in pairs.items())
        # Quantized activations are measured, not gated: no file is to compute like them, and no limit is set for them.
        gated = [c for c in comparisons if self.activations is None or c.candidate != self.activations.row]
        gates = all_gates(settings, tensors, gated, self.arithmetic, {s.name: s.nonfinite for s in stations})
        gates += token_gates
        return ValidationReport(
            model=self._about(),
            data={
                "text": settings.text.name,
                "tokens": self.windows.tokens,
                "windows": len(self.windows.ids),
                "windows_available": self.windows.available,
                "window": int(self.windows.ids.shape[1]),
                "leading_token": self.windows.leading,
                "seed": settings.seed,
                "resamples": settings.resamples,
                "tie_tolerance": settings.tie_tolerance,
            },
            environment=environment(self.specs[0].thread_count),
            rows=rows,
            comparisons=comparisons,
            tensors=tensors,
            gates=gates,
            notes=tuple(self.notes),
            prompt=settings.prompt,
            seconds=time.monotonic() - started,
        )

    def _about(self) -> dict[str, Any]:
        model = self.model
        return {
            "name": self.settings.model.resolve().name,
            "architecture": model.config.get("model_type"),
            "method": model.method,
            "settings": model.settings,
            "source": model.source.get("name"),
            "weights": sum(entry.spec.numel for entry in model.entries.values()),
            "quantized_bits": model.quantized_bits,
            "bits_per_weight": model.bits_per_weight,
        }

    def _row(self, station: Station, boot: Bootstrap) -> ModelRow:
        self.progress(f"text by {station.name}", 0, 1)
        answer = station.runner.generate(self.prompt, self.answer_length) if self.answer_length else []
        weights = sum(entry.spec.numel for entry in self.model.entries.values())
        nbytes = self._bytes(station.name)
        arithmetic = self.arithmetic.get(station.name) or Arithmetic("fp32", "PyTorch in float32")
        return ModelRow(
            name=station.name,
            runtime=station.runner.runtime,
            nbytes=nbytes,
            bits_per_weight=8 * nbytes / max(1, weights),
            arithmetic=arithmetic.kind,
            arithmetic_reason=arithmetic.reason,
            perplexity=perplexity(station, boot),
            text=texts.decode(self.tokenizer, answer, self._stops()),
            token_ids=tuple(answer),
            seconds=station.seconds,
            seconds_per_window=station.seconds / len(self.windows.ids),
            load_seconds=station.load_seconds,
            peak_memory=station.peak_memory(),
        )

    def _bytes(self, name: str) -> int:
        settings = self.settings
        if name == "GGUF" and settings.gguf is not None:
            return settings.gguf.stat().st_size
        if name == "ONNX" and settings.onnx is not None:
            return onnx_bytes(settings.onnx)
        return self._source_bytes if name == "source" else ir_bytes(self.model)

    def _stops(self) -> set[int]:
        generation: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            generation = json.loads((Path(self.settings.model) / "generation_config.json").read_text(encoding="utf-8"))
        return texts.stop_ids(self.tokenizer, generation if isinstance(generation, dict) else {})
