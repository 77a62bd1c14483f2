"""SmolLM2 in codebooks of mixed widths, written as ONNX: values, and logits in ONNX Runtime and onnxruntime-node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import anyquant
from anyquant import ir
from anyquant.exporters.onnx import ONNXExporter
from anyquant.exporters.protocol import ExportOptions, ExportPlan
from anyquant.validation.gates import LOGIT_SCALE, MAX_ABS_LOGIT

if TYPE_CHECKING:
    from tests.conftest import RealSkim

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["fold", "stream"])
def exported(
    request: pytest.FixtureRequest, real_skim: RealSkim, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ExportPlan, Path]:
    path = tmp_path_factory.mktemp("onnx") / request.param
    return ONNXExporter().export(ir.open_ir(real_skim.folder), path, ExportOptions(fallback=request.param)), path


@pytest.fixture(scope="module")
def tokens(real_skim: RealSkim, real_text: Path) -> np.ndarray:
    """The first tokens of the text, int64 [1, 48]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_skim.folder)
    return np.array([tokenizer(real_text.read_text(encoding="utf-8")[:1000])["input_ids"][:48]])


@pytest.fixture(scope="module")
def expected(real_skim: RealSkim, tokens: np.ndarray) -> np.ndarray:
    """Logits of PyTorch on the dequantized weights."""
    import torch

    with torch.no_grad():
        logits: np.ndarray = anyquant.load(real_skim.folder, dequantize=True)(torch.from_numpy(tokens)).logits.numpy()
    return logits


def test_promised_bytes_are_written(real_skim: RealSkim, exported: tuple[ExportPlan, Path]) -> None:
    plan, path = exported
    promised = ONNXExporter().check(real_skim.plan.model, ExportOptions(fallback=path.name))
    assert promised == plan
    assert plan.files == {name: (path / name).stat().st_size for name in ("model.onnx", "model.onnx.data")}


def test_every_tensor_is_equal(real_skim: RealSkim, exported: tuple[ExportPlan, Path]) -> None:
    plan, path = exported
    model = ir.open_ir(real_skim.folder)
    assert Counter(plan.types.values())["CodebookMatMul"] == 210
    assert len(np.unique(np.concatenate([model.tensor(name).arrays[".bits"] for name in real_skim.plan.levels]))) >= 6
    found = {name: ir.digest(values) for name, values in ONNXExporter().read(path)}
    assert found == {name: entry.sha256 for name, entry in model.entries.items()}


@pytest.mark.parametrize("client", ["onnxruntime", "onnxruntime-node"])
def test_logits(
    client: str,
    real_skim: RealSkim,
    exported: tuple[ExportPlan, Path],
    tokens: np.ndarray,
    expected: np.ndarray,
    feeds_of: Callable[..., dict[str, np.ndarray]],
    run_in_onnxruntime: Callable[..., np.ndarray],
    request: pytest.FixtureRequest,
) -> None:
    folder = exported[1]
    feeds = feeds_of(folder, ir.open_ir(real_skim.folder).config, tokens)
    if client == "onnxruntime":
        found = run_in_onnxruntime(folder, feeds)
    else:
        run_in_node: Callable[..., dict[str, Any]] = request.getfixturevalue("run_in_node")
        found = run_in_node(folder / "model.onnx", feeds, ["logits"])["logits"]
    assert found.shape == expected.shape == (1, 48, 49152)
    limit = MAX_ABS_LOGIT * max(1.0, float(np.abs(expected).max()) / LOGIT_SCALE)
    assert np.abs(found - expected).max() <= limit
    assert (found.argmax(-1) == expected.argmax(-1)).all()
