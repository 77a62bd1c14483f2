"""SmolLM2 as a GGUF file, from its text to its statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyquant.calibration import CalibrationSettings, calibrate
from anyquant.calibration.store import read_array
from anyquant.calibration.tokens import load_tokenizer
from anyquant.checkpoint import Checkpoint, open_checkpoint
from anyquant.validation.texts import read_text, token_ids

pytestmark = pytest.mark.slow


def test_moments_of_a_text(
    real_gguf: Path,
    real_text: Path,
    tmp_path: Path,
    linear_inputs: Callable[[Checkpoint, torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    checkpoint = open_checkpoint(str(real_gguf))
    names = [*checkpoint.matrices(), *checkpoint.embeddings()]
    settings = CalibrationSettings(str(real_text), windows=2, window=48, importance="gradient")
    statistics = calibrate(checkpoint, names, settings, tmp_path)
    assert statistics.notes == []
    ids = read_array(tmp_path / "tokens.safetensors", "ids").astype(np.int64)
    text = " ".join(map(str, token_ids(load_tokenizer(checkpoint), read_text(real_text))))
    assert all(" ".join(map(str, window)) in text for window in ids)
    inputs = linear_inputs(checkpoint, torch.from_numpy(ids))
    assert set(inputs) == set(names)
    for name, x in inputs.items():
        found = statistics.matrix(name)
        assert found is not None
        expected = (x.T @ x / len(x)).numpy()
        np.testing.assert_allclose(found.full(), expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)
        gradient = found.gradient()
        assert gradient is not None
        assert gradient.shape == (checkpoint.tensors[name].shape[0],)
        assert gradient.min() >= 0
        assert gradient.max() > 0


def test_text_of_its_own(real_gguf: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(real_gguf))
    settings = CalibrationSettings(windows=4, window=32, importance="activation")
    calibrate(checkpoint, checkpoint.matrices()[:1], settings, tmp_path)
    ids = read_array(tmp_path / "tokens.safetensors", "ids")
    tokenizer: Any = load_tokenizer(checkpoint)
    special = set(tokenizer.all_special_ids) - {2}
    assert not special & set(ids.flatten().tolist())
    # English, or at least mostly common letters; and windows that differ.
    texts = [tokenizer.decode(window) for window in ids]
    letters = sum(character.isascii() and (character.isalpha() or character.isspace()) for character in "".join(texts))
    assert letters > 0.7 * len("".join(texts))
    assert len(np.unique(ids)) > 64
