"""A tiny quantized model and a text, shared by the tests of validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.checkpoint import open_checkpoint
from anyquant.job import Job, Target
from anyquant.pipeline import run
from anyquant.planning import plan
from anyquant.validation import ValidationSettings

SENTENCE = "The quick brown fox jumps over the lazy dog; number {0} said: what is the time? [x{0}] {1}\n"


@pytest.fixture(scope="session")
def tiny_ir(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama in BFP4; do not write there."""
    out = tmp_path_factory.mktemp("tiny-ir") / "ir"
    run(plan(open_checkpoint(str(tiny_llama)), Job("block", Target(bits=4.25))), out)
    return out


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand tokens of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(SENTENCE.format(i, i * i) for i in range(60)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_validation(tiny_ir: Path, tiny_text: Path, tiny_llama: Path) -> Callable[..., ValidationSettings]:
    """small_validation(**more): of the tiny IR against its source, in this process, on few resamples."""

    def settings(**more: Any) -> ValidationSettings:
        return ValidationSettings(
            model=tiny_ir,
            text=tiny_text,
            source=str(tiny_llama),
            window=64,
            resamples=50,
            threads=1,
            isolate=False,
            **more,
        )

    return settings


@pytest.fixture(scope="session")
def tiny_gguf(tiny_ir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny IR as a GGUF file whose matrices are all F32."""
    from anyquant.exporters.protocol import ExportOptions
    from anyquant.exporters.registry import get_exporter

    path = tmp_path_factory.mktemp("gguf") / "f32.gguf"
    get_exporter("gguf").export(ir.open_ir(tiny_ir), path, ExportOptions(layout="f32"))
    return path


@pytest.fixture(scope="session")
def cumulative_onnx(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function that writes an ONNX folder whose logits are W @ (sum of the embeddings so far).

    The key cache holds the embeddings, so that a cache that is lost or doubled changes every logit. Beside the folder
    the embedding and W lie in weights.npz.
    """

    def make(folder: str = "onnx", *, vocabulary: int = 17, extra_input: str = "", half: bool = False) -> Path:
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        path = tmp_path_factory.mktemp(folder)
        rng = np.random.default_rng(0)
        embedding = rng.normal(size=(vocabulary, 4)).astype(np.float32)
        head = rng.normal(size=(4, vocabulary)).astype(np.float32)
        np.savez(path / "weights.npz", embedding=embedding, head=head)
        kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        graph = helper.make_graph(
            [
                helper.make_node("Gather", ["embedding", "input_ids"], ["x"]),
                helper.make_node("Unsqueeze", ["x", "one"], ["k"]),
                helper.make_node("Concat", ["past_key_values.0.key", "k"], ["present.0.key"], axis=2),
                helper.make_node("Identity", ["past_key_values.0.value"], ["present.0.value"]),
                helper.make_node("CumSum", ["present.0.key", "two"], ["sums"]),
                helper.make_node("Shape", ["input_ids"], ["n"], start=1),
                helper.make_node("Neg", ["n"], ["begin"]),
                helper.make_node("Slice", ["sums", "begin", "end", "two_list"], ["last"]),
                helper.make_node("Squeeze", ["last", "one"], ["state"]),
                helper.make_node("MatMul", ["state", "head"], ["full"]),
                helper.make_node("Cast", ["full"], ["logits"], to=kind),
            ],
            "cumulative",
            [
                helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"]),
                *(
                    helper.make_tensor_value_info(f"past_key_values.0.{what}", TensorProto.FLOAT, ["batch", 1, "t", 4])
                    for what in ("key", "value")
                ),
                *([helper.make_tensor_value_info(extra_input, TensorProto.FLOAT, [1])] if extra_input else []),
            ],
            [
                helper.make_tensor_value_info("logits", kind, ["batch", "length", vocabulary]),
                *(
                    helper.make_tensor_value_info(f"present.0.{what}", TensorProto.FLOAT, ["batch", 1, None, 4])
                    for what in ("key", "value")
                ),
            ],
            [
                numpy_helper.from_array(embedding, "embedding"),
                numpy_helper.from_array(head, "head"),
                numpy_helper.from_array(np.array([1]), "one"),
                numpy_helper.from_array(np.array(2), "two"),
                numpy_helper.from_array(np.array([2]), "two_list"),
                numpy_helper.from_array(np.array([np.iinfo(np.int64).max]), "end"),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.save(model, path / "model.onnx")
        return path

    return make
