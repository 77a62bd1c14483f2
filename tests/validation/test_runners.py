"""Runners: logits from an empty cache, greedy text, clear errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant.errors import AnyquantError, CorruptFileError, InputError, MachineError, MissingDependency
from anyquant.runtime.onnx_session import model_file
from anyquant.validation.arithmetic import onnx_arithmetic
from anyquant.validation.metrics import compare_logits
from anyquant.validation.runners import Runner, RunnerSpec, llama_abi, open_runner
from anyquant.validation.sizes import onnx_bytes

IDS = np.array([5, 9, 300, 17, 200, 9, 41, 33, 2, 7], dtype=np.int64)


@pytest.fixture(scope="module")
def torch_runner(tiny_ir: Path) -> Runner:
    return open_runner(RunnerSpec("IR", "ir", str(tiny_ir), 64, 2))


@pytest.fixture(scope="module")
def llama_runner(tiny_gguf: Path) -> Iterator[Runner]:
    pytest.importorskip("xllamacpp")
    runner = open_runner(RunnerSpec("GGUF", "gguf", str(tiny_gguf), 64, 2))
    yield runner
    runner.close()


def causal_and_stateless(runner: Runner, ids: np.ndarray) -> None:
    """A window's logits do not depend on what was computed before, nor on the tokens that follow."""
    first = runner.logits(ids)
    assert first.dtype == np.float32
    assert first.shape[0] == len(ids)
    runner.generate([int(i) for i in ids[:3]], 2)
    np.testing.assert_array_equal(runner.logits(ids), first)
    np.testing.assert_allclose(runner.logits(ids[:4]), first[:4], atol=2e-5)


def greedy(runner: Runner, prompt: list[int], n: int) -> list[int]:
    """The slow way: the whole text again for every token."""
    answer: list[int] = []
    for _ in range(n):
        answer.append(int(runner.logits(np.array(prompt + answer))[-1].argmax()))
    return answer


def test_torch(torch_runner: Runner) -> None:
    causal_and_stateless(torch_runner, IDS)
    assert torch_runner.generate([5, 9, 300], 8) == greedy(torch_runner, [5, 9, 300], 8)
    assert torch_runner.runtime.startswith("PyTorch ")
    with pytest.raises(InputError, match="token id 389 at position 1, but the model has 389 tokens"):
        torch_runner.logits(np.array([3, 389]))


def test_torch_opens_a_source_folder(tiny_llama: Path, torch_runner: Runner) -> None:
    runner = open_runner(RunnerSpec("source", "checkpoint", str(tiny_llama), 64, 2))
    found = compare_logits(runner.logits(IDS), torch_runner.logits(IDS))
    assert 0 < found.kl.mean() < 1  # BFP4 is not the source, but near it
    runner.close()


def test_torch_refuses_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="transformers cannot load the source"):
        open_runner(RunnerSpec("source", "checkpoint", str(tmp_path), 64, 2))


def test_torch_reads_a_gguf_source(tiny_gguf: Path, torch_runner: Runner) -> None:
    runner = open_runner(RunnerSpec("source", "checkpoint", str(tiny_gguf), 64, 2))
    np.testing.assert_allclose(runner.logits(IDS), torch_runner.logits(IDS), atol=1e-5)


def test_torch_knows_a_gguf_source_by_its_content(tiny_gguf: Path, torch_runner: Runner, tmp_path: Path) -> None:
    bare = tmp_path / "model"
    bare.symlink_to(tiny_gguf)
    runner = open_runner(RunnerSpec("source", "checkpoint", str(bare), 64, 2))
    np.testing.assert_allclose(runner.logits(IDS), torch_runner.logits(IDS), atol=1e-5)
    (tmp_path / "text").write_text("no model")
    with pytest.raises(InputError, match="is a file, but no GGUF"):
        open_runner(RunnerSpec("source", "checkpoint", str(tmp_path / "text"), 64, 2))


def test_llamacpp_computes_what_torch_computes(llama_runner: Runner, torch_runner: Runner) -> None:
    causal_and_stateless(llama_runner, IDS)
    found = compare_logits(torch_runner.logits(IDS), llama_runner.logits(IDS))
    assert found.max_abs_logit < 1e-3
    assert found.kl.mean() < 3e-4
    prompt = [5, 9, 300]
    assert llama_runner.generate(prompt, 8) == torch_runner.generate(prompt, 8) == greedy(llama_runner, prompt, 8)
    assert llama_runner.runtime.startswith("llama.cpp (xllamacpp ")


def test_llamacpp_refuses_what_does_not_fit(llama_runner: Runner) -> None:
    with pytest.raises(InputError, match="65 tokens, and 0 to come, in a context of 64"):
        llama_runner.logits(np.zeros(65, dtype=np.int64))
    with pytest.raises(InputError, match="60 tokens, and 8 to come"):
        llama_runner.generate([1] * 60, 8)
    with pytest.raises(InputError, match="0 tokens"):
        llama_runner.logits(np.zeros(0, dtype=np.int64))
    with pytest.raises(InputError, match="token id -1 at position 0"):
        llama_runner.logits(np.array([-1]))


def test_llamacpp_with_missing_and_broken_files(tiny_gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    with pytest.raises(InputError, match="cannot read"):
        open_runner(RunnerSpec("GGUF", "gguf", str(tmp_path / "none.gguf"), 64, 2))
    data = tiny_gguf.read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(InputError, match=r"llama\.cpp cannot load .*: .*(bounds|corrupt|incomplete)"):
        open_runner(RunnerSpec("GGUF", "gguf", str(short), 64, 2))
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(InputError, match=r"llama\.cpp cannot load .*ffn_up"):
        open_runner(RunnerSpec("GGUF", "gguf", str(wrong), 64, 2))


def test_a_closed_llamacpp_runner_says_so(tiny_gguf: Path) -> None:
    pytest.importorskip("xllamacpp")
    runner = open_runner(RunnerSpec("GGUF", "gguf", str(tiny_gguf), 16, 1))
    runner.close()
    runner.close()
    with pytest.raises(MachineError, match="closed"):
        runner.logits(IDS)


@pytest.mark.slow
def test_real_llamacpp_against_torch_on_the_source(real_gguf: Path, real_text: Path) -> None:
    """The runner itself is proven on the real file: Q4_1 and Q8_0 blocks, dequantized exactly by PyTorch's side."""
    pytest.importorskip("xllamacpp")
    from transformers import AutoTokenizer

    from anyquant.validation.runners.process import ProcessRunner

    tokenizer = AutoTokenizer.from_pretrained(real_gguf.parent, gguf_file=real_gguf.name)
    ids = np.array(tokenizer(real_text.read_text(encoding="utf-8")[:2000])["input_ids"][:128])
    logits = {}
    for kind in ("checkpoint", "gguf"):
        runner = ProcessRunner(RunnerSpec(kind, kind, str(real_gguf), 128, 2))
        logits[kind] = runner.logits(ids)
        runner.close()
    found = compare_logits(logits["checkpoint"], logits["gguf"], tie_tolerance=0.05)
    assert found.kl.mean() < 0.01
    assert (~found.differs).mean() > 0.9
    assert found.logit_scale > 15


# --- the C interface


def test_every_known_default_is_what_this_build_says() -> None:
    pytest.importorskip("xllamacpp")
    library = llama_abi.library()
    assert library is llama_abi.library()
    params = library.c.llama_context_default_params()
    assert llama_abi.mismatches(params, llama_abi.CONTEXT_FIELDS) == []
    llama_abi.set_fields(params, llama_abi.CONTEXT_FIELDS, n_ctx=77, type_k=0)
    assert llama_abi.mismatches(params, llama_abi.CONTEXT_FIELDS) == [
        "n_ctx reads 77, not 512",
        "type_k reads 0, not 1",
    ]


def test_an_unknown_layout_is_refused_before_use(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    shifted = {name: f._replace(offset=f.offset + 4) for name, f in llama_abi.CONTEXT_FIELDS.items()}
    monkeypatch.setattr(llama_abi, "CONTEXT_FIELDS", shifted)
    with pytest.raises(MachineError, match=r"another layout: n_ctx reads 2048.*pip install 'xllamacpp=="):
        llama_abi.LlamaLibrary()


def test_a_missing_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setitem(llama_abi._SIGNATURES, "llama_no_such_function", (None, []))
    with pytest.raises(MachineError, match="exports no llama_no_such_function"):
        llama_abi.LlamaLibrary()


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(MachineError, match="x86-64"):
        llama_abi.LlamaLibrary()


@pytest.mark.parametrize(
    ("module", "kind", "extra"), [("xllamacpp", "gguf", "llamacpp"), ("onnxruntime", "onnx", "onnxruntime")]
)
def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, kind: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(llama_abi, "_library", None)
    with pytest.raises(MissingDependency, match=rf"anyquant\[{extra}\]"):
        open_runner(RunnerSpec("x", kind, str(tmp_path), 16, 1))


def test_unknown_kind() -> None:
    with pytest.raises(AnyquantError, match="none of checkpoint, ir, gguf, onnx"):
        open_runner(RunnerSpec("x", "tflite", "", 16))


@pytest.mark.parametrize(("variable", "threads", "expected"), [("3", 0, 3), ("3", 5, 5)])
def test_threads(monkeypatch: pytest.MonkeyPatch, variable: str, threads: int, expected: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert RunnerSpec("x", "ir", "", 16, threads).thread_count == expected


# --- ONNX Runtime

Make = Callable[..., Path]


def onnx_runner(path: Path) -> Any:
    pytest.importorskip("onnxruntime")
    return open_runner(RunnerSpec("ONNX", "onnx", str(path), 64, 1))


def test_onnx_logits_and_cache(cumulative_onnx: Make) -> None:
    path = cumulative_onnx()
    runner = onnx_runner(path)
    weights = np.load(path / "weights.npz")
    ids = np.array([3, 1, 16, 4, 3])
    expected = np.cumsum(weights["embedding"][ids], axis=0) @ weights["head"]
    np.testing.assert_allclose(runner.logits(ids), expected, rtol=1e-5, atol=1e-6)
    causal_and_stateless(runner, ids)
    assert runner.generate([3, 1], 6) == greedy(runner, [3, 1], 6)
    with pytest.raises(InputError, match="token id 17"):
        runner.logits(np.array([17]))
    assert onnx_bytes(path) == (path / "model.onnx").stat().st_size
    runner.close()


def test_onnx_wants_an_exported_folder(cumulative_onnx: Make) -> None:
    path = cumulative_onnx("renamed")
    assert model_file(path) == path / "model.onnx"
    (path / "model.onnx").rename(path / "other.onnx")
    for wrong in (path, path / "other.onnx"):
        with pytest.raises(CorruptFileError, match=r"holds no ONNX model: give the folder"):
            onnx_runner(wrong)


def test_onnx_refusals(cumulative_onnx: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no"):
        onnx_runner(tmp_path / "none")
    with pytest.raises(InputError, match="does not know mystery"):
        onnx_runner(cumulative_onnx("extra", extra_input="mystery"))
    (tmp_path / "model.onnx").write_bytes(b"not protobuf at all")
    with pytest.raises(InputError, match=r"ONNX Runtime .* cannot load"):
        onnx_runner(tmp_path)
    with pytest.raises(CorruptFileError, match="not an ONNX model"):
        onnx_arithmetic(tmp_path)


def test_onnx_failing_run_is_an_error(cumulative_onnx: Make) -> None:
    runner = onnx_runner(cumulative_onnx("fails"))
    with pytest.raises(InputError, match=r"ONNX Runtime failed on .* with 2 tokens"):
        runner.logits(np.array([3, 99]))  # no size of the vocabulary is known before the first run


def test_onnx_arithmetic(cumulative_onnx: Make) -> None:
    import onnx
    from onnx import helper

    path = cumulative_onnx("levels")
    assert onnx_arithmetic(path).kind == "fp32"
    assert onnx_arithmetic(cumulative_onnx("half", half=True)).kind == "rounded"
    model = onnx.load(path / "model.onnx")
    for level, kind in ((0, "fp32"), (1, "fp32"), (4, "rounded")):
        edited = onnx.ModelProto()
        edited.CopyFrom(model)
        edited.graph.node.append(
            helper.make_node("MatMulNBits", ["a"], ["b"], domain="com.microsoft", accuracy_level=level)
        )
        onnx.save(edited, path / "model.onnx")
        assert onnx_arithmetic(path).kind == kind
    function = helper.make_function(
        "anyquant", "Inner", ["a"], ["b"], [helper.make_node("MatMulNBits", ["a"], ["b"], accuracy_level=4)], []
    )
    model.functions.append(function)
    entry = model.metadata_props.add()
    entry.key, entry.value = "anyquant.layout", "f16"
    onnx.save(model, path / "model.onnx")
    found = onnx_arithmetic(path)
    assert (found.kind, found.rounding) == ("rounded", "")
    entry = model.metadata_props.add()
    entry.key, entry.value = "anyquant.allow_rounding", "true"
    onnx.save(model, path / "model.onnx")
    assert onnx_arithmetic(path).rounding == "written with --allow-rounding"
