"""The benchmark of rounded activations: its rows against the parts they are made of, its table, its refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from anyquant.errors import UsageError
from anyquant.validation.activations import quantized_activations, round_to_bfp
from anyquant.validation.metrics import token_losses
from anyquant.validation.runners import RunnerSpec
from anyquant.validation.runners.torch import open_checkpoint_runner


@pytest.fixture(scope="module")
def tool(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("benchmark_activations")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("A wall is 12 cm high, and light. " * 60, encoding="utf-8")
    return path


def test_rows_are_what_their_names_say(tool: ModuleType, tiny_llama: Path, text: Path) -> None:
    *_, found = tool.run(tiny_llama, text, 2, 40, tool.ROWS)
    rows = dict(zip(("source", *(row.name for row in tool.ROWS)), found, strict=True))
    assert not np.any(rows["source"].kl)
    assert all(len(answers.kl) == 2 and np.mean(answers.kl) > 0 for answers in found[1:])
    assert np.mean(rows["A8"].kl) < np.mean(rows["A6 in blocks of 8"].kl) < np.mean(rows["A6 in blocks of 32"].kl)
    for name, answers in rows.items():
        if name.endswith(" alone"):
            assert np.mean(answers.kl) < np.mean(rows["A6"].kl), name
    for window in range(2):
        # No row is another one under two names.
        assert len({answers.losses[window].tobytes() for answers in found}) == len(found)


def test_w6a6_by_hand(tool: ModuleType, tiny_llama: Path, text: Path) -> None:
    from anyquant.calibration.tokens import load_tokenizer
    from anyquant.checkpoint import open_checkpoint
    from anyquant.validation.texts import cut_text

    row = next(row for row in tool.ROWS if row.name == "W6A6")
    *_, found = tool.run(tiny_llama, text, 1, 40, [row])
    checkpoint = open_checkpoint(str(tiny_llama))
    cut, _ = cut_text(text, load_tokenizer(checkpoint), checkpoint.config, window=40, windows=1, seed=0)
    runner = open_checkpoint_runner(RunnerSpec("source", "checkpoint", str(tiny_llama), 40, 1))
    np.testing.assert_allclose(found[0].losses[0], token_losses(runner.logits(cut.ids[0]), cut.ids[0]), atol=1e-5)
    for name, layer in runner._model.named_modules():
        if isinstance(layer, nn.Linear) and "layers" in name:
            with torch.no_grad():
                layer.weight.copy_(round_to_bfp(layer.weight, 6))
    with quantized_activations(runner._model, "bfp6"):
        logits = runner.logits(cut.ids[0])
    np.testing.assert_allclose(found[1].losses[0], token_losses(logits, cut.ids[0]), atol=1e-5)


def test_the_table(tool: ModuleType, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = text.parent / "work"
    arguments = ["--work", work, "--source", tiny_llama, "--text", text, "--windows", 2, "--window", 40]
    assert tool.main([*map(str, arguments), "--rows", "A[68]"]) == 0
    head, rule, *lines = capsys.readouterr().out.rstrip().split("\n")
    assert head.split()[:2] == ["rounded", "perplexity"]
    assert [line.split()[0] for line in lines if not set(line) <= set("- ")] == ["source", "A8", "A6"], rule
    assert all("%" in line and "[" in line for line in lines[-2:])


@pytest.mark.parametrize("wrong", [["--rows", "W9"], ["--source", "encoder"], ["--source", "nothing/there"]])
def test_refusals(
    tool: ModuleType, wrong: list[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--work", str(tmp_path), "--text", str(text), *wrong]) == UsageError.exit_code
    assert wrong[0] in capsys.readouterr().err
