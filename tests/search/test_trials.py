"""The search over matrices, from the command line: never worse than the greedy solution, within the target, kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from anyquant import ir
from anyquant.search import trials
from anyquant.search.tpe import SearchResult

pytest.importorskip("optuna")

if TYPE_CHECKING:
    from tests.conftest import Result

Invoke = Callable[..., "Result"]
LITTLE = ["--method", "block", "--set", "sensitivity=gradient", "--calib-windows", 4, "--calib-window", 32]
TPE = ["--search", "tpe", "--trials", 5]


def test_trials_are_within_the_target_and_kept(
    invoke: Invoke, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[SearchResult] = []
    search = trials.tpe_search

    def watched(*arguments: Any, **options: Any) -> SearchResult:
        found.append(search(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(trials, "tpe_search", watched)
    arguments = [*LITTLE, "--bits", 4.6, *TPE, "--work-dir", tmp_path / "work", "--json"]
    planned: Any = invoke("plan", tiny_llama, *arguments).data
    (result,) = found
    assert result.trials == 5
    assert result.loss <= result.start_loss
    assert result.cost <= 4.6 + 1e-9
    assert any("--search tpe: KL" in note for note in planned["notes"])

    made: Any = invoke("quantize", tiny_llama, "-o", tmp_path / "out", *arguments).data
    assert len(found) == 1  # it was in the work folder
    assert made["files"] == planned["files"]
    assert made["bits"] == pytest.approx(result.cost)
    model = ir.open_ir(tmp_path / "out")
    assert model.settings["target"]["search"] == "tpe"
    widths = [e.spec.width for e in model.entries.values() if isinstance(e.spec, ir.BlockSpec)]
    assert widths == [level + 2 for level in result.levels]

    # Another number of trials is another search.
    again = [str(text) if text != 5 else "2" for text in arguments]
    assert invoke("plan", tiny_llama, *again).code == 0
    assert len(found) == 2


def test_what_is_tried_is_what_is_made(
    invoke: Invoke, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --refine, too: every matrix of the folder is one that the search has tried."""
    tried: dict[tuple[str, int], ir.Tensor] = {}

    class Watched(trials._Trials):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._made = tried

    monkeypatch.setattr(trials, "_Trials", Watched)
    little = ["--calib-windows", 4, "--calib-window", 32, "--trials", 2]
    arguments = ["--method", "affine", "--refine", "--bits", 4.6, "--search", "tpe", *little]
    assert invoke("quantize", tiny_llama, "-o", tmp_path / "out", *arguments).code == 0
    model = ir.open_ir(tmp_path / "out")
    digests = {name: {ir.tensor_digest(each) for (of, _), each in tried.items() if of == name} for name, _ in tried}
    assert digests
    for name, known in digests.items():
        assert ir.tensor_digest(model.tensor(name)) in known


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "skim", "--bits", 3, *TPE], "chooses the bits of matrices as a whole"),
        (["--bits", 4.6, *TPE], "For block add --set sensitivity=gradient"),
        ([*LITTLE, "--bits", 4.25, "--allocation", "uniform", *TPE], "--allocation uniform"),
        ([*LITTLE, "--bits", 4.6, "--trials", 5], "--trials has no meaning without --search tpe"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    invoke: Invoke, tiny_llama: Path, arguments: list[object], words: str
) -> None:
    result = invoke("plan", tiny_llama, *arguments)
    assert result.code == 2
    assert words in result.err


def test_matrices_in_sequence_are_others_than_those_tried(invoke: Invoke, tiny_llama: Path, tmp_path: Path) -> None:
    result = invoke("quantize", tiny_llama, "-o", tmp_path / "out", *LITTLE, "--bits", 4.6, "--sequential", *TPE)
    assert result.code == 2
    assert "which is not what --sequential makes" in result.err
