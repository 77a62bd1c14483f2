"""SmolLM2 by every method in GGUF types of our own, in two prebuilt llama.cpps, against the same values in FP32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from anyquant import ir
from anyquant.exporters.gguf import GGUFExporter
from anyquant.exporters.protocol import ExportOptions
from anyquant.job import Job, Target
from anyquant.runtime import ggml_plugin, native
from anyquant.validation.metrics import compare_logits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.path_of(ggml_plugin.LIBRARY) is None, reason="the plug-in was not built"),
]

SETTINGS: dict[str, tuple[float, dict[str, Any]]] = {
    "skim": (3.25, {"scale": "closed", "outliers": 0.1}),
    "claq": (2.5, {}),
    "cmpq": (3.0, {"outliers_activation": 0.1, "outliers_error": 0.1}),
    "block": (4.5, {"format": "minifloat", "block": 16}),
}
MOST_KL = 3e-4
TOKENS = 64
NEAR_TIE = 0.02
"""Nats between the two likeliest tokens where another processor's order of sums may choose the other one."""


def in_common(one: list[int], other: list[int]) -> int:
    """How many tokens two texts share from their beginning; what follows the first other one has another context."""
    assert len(one) == len(other) == TOKENS
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), TOKENS)


class Files(NamedTuple):
    model: ir.Model
    own: Path
    f32: Path
    prompt: list[int]


@pytest.fixture(scope="module", params=list(SETTINGS))
def files(
    request: pytest.FixtureRequest, real_gguf: Path, real_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Files:
    from transformers import AutoTokenizer

    from anyquant.calibration import CalibrationSettings
    from anyquant.checkpoint import open_checkpoint
    from anyquant.pipeline import run
    from anyquant.planning import plan

    bits, settings = SETTINGS[request.param]
    calibration = CalibrationSettings(str(real_text), windows=4, window=64)
    job = Job(request.param, Target(bits=bits), settings, calibration=calibration, workers=2)
    folder = tmp_path_factory.mktemp(request.param)
    run(plan(open_checkpoint(str(real_gguf)), job), folder / "ir")
    model = ir.open_ir(folder / "ir")
    for layout in ("native", "f32"):
        GGUFExporter().export(model, folder / f"{layout}.gguf", ExportOptions(layout))
    tokenizer = AutoTokenizer.from_pretrained(folder / "ir")
    prompt = tokenizer(real_text.read_text(encoding="utf-8")[:800])["input_ids"][:96]
    return Files(model, folder / "native.gguf", folder / "f32.gguf", prompt)


def test_types_bytes_and_values(files: Files) -> None:
    plan = GGUFExporter().check(files.model, ExportOptions())
    assert files.own.stat().st_size == plan.bytes
    own = Counter(kind.startswith("ANYQUANT_") for kind in plan.types.values())
    assert own[True] == 210
    found = {name: ir.digest(values) for name, values in GGUFExporter().read(files.own)}
    assert found == {name: entry.sha256 for name, entry in files.model.entries.items()}


def test_logits_in_xllamacpp(files: Files) -> None:
    pytest.importorskip("xllamacpp")
    from anyquant.validation.runners import RunnerSpec
    from anyquant.validation.runners.process import ProcessRunner

    logits, texts = [], []
    for path in (files.f32, files.own):
        runner = ProcessRunner(RunnerSpec(path.name, "gguf", str(path), 256, 2))
        logits.append(runner.logits(np.array(files.prompt)))
        texts.append(runner.generate(files.prompt[:8], TOKENS))
        runner.close()
    compared = compare_logits(*logits, tie_tolerance=NEAR_TIE)
    assert compared.kl.mean() <= MOST_KL
    same = in_common(*texts)
    if same < TOKENS:
        runner = ProcessRunner(RunnerSpec("f32", "gguf", str(files.f32), 256, 2))
        last = runner.logits(np.array(files.prompt[:8] + texts[0][:same]))[-1]
        runner.close()
        first, second = (float(last[text[same]]) for text in texts)
        assert first - second < NEAR_TIE, f"token {same} is another one, and it was no near tie"


def test_text_in_node_llama_cpp(files: Files, run_in_node_llama: Callable[..., Any]) -> None:
    """The same through GGML_BACKEND_PATH: the likeliest tokens of each place, and the text."""
    plugin = ggml_plugin.path()
    expected, found = (
        run_in_node_llama(path, files.prompt[:8], TOKENS, plugin=plugin) for path in (files.f32, files.own)
    )
    same = in_common(expected["tokens"], found["tokens"])
    for place in range(min(same + 1, TOKENS)):
        likely, own = dict(expected["top"][place]), found["top"][place]
        both = [(likely[token], value) for token, value in own if token in likely]
        assert len(both) > len(own) // 2
        first, second = np.array(both).T
        # What these tokens add to the divergence, each more than nothing: p log(p / q) - p + q.
        assert (np.exp(first) * (first - second) - np.exp(first) + np.exp(second)).sum() <= MOST_KL
    if same < TOKENS:
        likely = dict(expected["top"][same])
        first, second = (likely[text["tokens"][same]] for text in (expected, found))
        assert first - second < NEAR_TIE, f"token {same} is another one, and it was no near tie"
