"""calibrate: from start to finish, interrupted anywhere and gone on with, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import anyquant.calibration.run
from anyquant.calibration import CalibrationSettings, Statistics, calibrate, open_statistics
from anyquant.checkpoint import Checkpoint, open_checkpoint
from anyquant.errors import CorruptFileError, InputError, MachineError, UnknownArchitecture, UsageError

SMALL = CalibrationSettings(windows=3, window=12)


class Interrupted(Exception):
    """Stands for a kill."""


@pytest.fixture
def checkpoint(tiny_llama: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_llama))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_of(checkpoint: Checkpoint) -> list[str]:
    return [*checkpoint.matrices(), *checkpoint.embeddings()]


def test_all_that_is_promised(checkpoint: Checkpoint, tmp_path: Path) -> None:
    names = names_of(checkpoint)
    steps: list[tuple[str, int, int]] = []
    statistics = calibrate(checkpoint, names, SMALL, tmp_path / "c", lambda *step: steps.append(step))
    assert statistics.tokens == 36
    assert statistics.threads == torch.get_num_threads()
    assert len(statistics.fingerprint) == 64
    assert statistics.identity["model"] == checkpoint.fingerprint()
    assert statistics.identity["windows"] == 3
    assert [step for step in steps if step[0] == "moments"] == [("moments", 1, 2), ("moments", 2, 2)]
    assert [step for step in steps if step[0] == "sampling"] == [("sampling", n, 6) for n in range(2, 7)]
    for name in names:
        found = statistics.matrix(name)
        assert found is not None
        columns = checkpoint.tensors[name].shape[1]
        assert found.tokens == 36
        assert found.diagonal.shape == (columns,)
        assert found.full().shape == (columns, columns)
        assert np.linalg.eigvalsh(found.full().astype(np.float64)).min() > -1e-5 * found.diagonal.max()
    assert statistics.matrix("no such matrix") is None


def test_a_complete_folder_is_just_opened(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = calibrate(checkpoint, checkpoint.matrices(), SMALL, tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(anyquant.calibration.run, "_run", None)
    for statistics in (
        calibrate(checkpoint, checkpoint.matrices(), SMALL, tmp_path, lambda *step: pytest.fail("it works")),
        open_statistics(tmp_path),
    ):
        assert statistics.fingerprint == first.fingerprint
        assert statistics.identity == first.identity
        name = checkpoint.matrices()[0]
        a, b = first.matrix(name), statistics.matrix(name)
        assert a is not None
        assert b is not None
        np.testing.assert_array_equal(a.full(), b.full())
    assert contents(tmp_path) == before


def stop_after(count: int) -> Callable[[str, int, int], None]:
    calls = iter(range(1, 10**6))

    def progress(name: str, done: int, whole: int) -> None:
        if next(calls) == count:
            raise Interrupted

    return progress


@pytest.mark.parametrize("importance", ["norms", "activation", "gradient", "fisher"])
def test_interrupted_anywhere_the_bytes_are_the_same(
    checkpoint: Checkpoint, tmp_path: Path, importance: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = CalibrationSettings(windows=3, window=12, importance=importance)
    names = names_of(checkpoint)
    steps: list[str] = []
    calibrate(checkpoint, names, settings, tmp_path / "whole", lambda name, done, whole: steps.append(name))
    expected = contents(tmp_path / "whole")
    assert len(steps) == 5 + 2 * (1 + (importance in ("gradient", "fisher")))
    for count in range(1, len(steps) + 1):
        folder = tmp_path / f"after-{count}"
        with pytest.raises(Interrupted):
            calibrate(checkpoint, names, settings, folder, stop_after(count))
        with pytest.raises(InputError, match="was interrupted"):
            open_statistics(folder)
        (folder / ".tokens.safetensors.partial").write_bytes(b"half a file")
        before = torch.get_num_threads()
        torch.set_num_threads(3 - before if before < 3 else 1)  # as on another machine
        statistics = calibrate(checkpoint, names, settings, folder)
        torch.set_num_threads(before)
        assert contents(folder) == expected
        assert statistics.threads == json.loads(expected["about.json"])["threads"]


def test_norms_are_those_of_the_moments(checkpoint: Checkpoint, tmp_path: Path) -> None:
    settings = CalibrationSettings(windows=40, window=16)  # more tokens than go through a block at once
    names = names_of(checkpoint)
    norms, moments = (
        calibrate(checkpoint, names, replace(settings, importance=importance), tmp_path / importance)
        for importance in ("norms", "activation")
    )
    assert norms.norms_alone
    assert not moments.norms_alone
    for name in names:
        few, much = norms.matrix(name), moments.matrix(name)
        assert few is not None
        assert much is not None
        assert few.tokens == much.tokens
        np.testing.assert_allclose(few.diagonal, much.diagonal, rtol=1e-5)
        assert much.has_moment
        assert not few.has_moment
        with pytest.raises(InputError, match="recorded the norms of inputs, not how they go together"):
            few.full()
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / kind).glob("moments*")) for kind in ("norms", "activation")
    ]
    assert sizes[0] < sizes[1] / 4


def test_states_that_find_no_room_on_the_disk(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def full(descriptor: int, offset: int, length: int) -> None:
        asked.append(length)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    settings = CalibrationSettings(windows=3, window=12)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(MachineError, match=f"hidden states in {tmp_path}.*No space left.*will be used again"):
            calibrate(checkpoint, names_of(checkpoint), settings, tmp_path / "c")
    assert asked == [4 * 3 * 12 * checkpoint.config["hidden_size"]]
    calibrate(checkpoint, names_of(checkpoint), settings, tmp_path / "c")
    assert not list((tmp_path / "c").glob(".*"))


def test_interrupted_again_and_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    settings = CalibrationSettings(windows=2, window=8, importance="fisher")
    calibrate(checkpoint, checkpoint.matrices(), settings, tmp_path / "whole")
    for _ in range(20):
        try:
            calibrate(checkpoint, checkpoint.matrices(), settings, tmp_path / "c", stop_after(4))
            break
        except Interrupted:
            continue  # the last block's gradients were stored before
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_the_threads_are_put_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    with pytest.raises(Interrupted):
        calibrate(checkpoint, checkpoint.matrices(), SMALL, tmp_path, stop_after(1))
    torch.set_num_threads(1)
    seen = []
    statistics = calibrate(
        checkpoint, checkpoint.matrices(), SMALL, tmp_path, lambda *step: seen.append(torch.get_num_threads())
    )
    assert set(seen) == {2}
    assert statistics.threads == 2
    assert torch.get_num_threads() == 1


def test_seeds_and_windows_give_other_tokens(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from anyquant.calibration.store import read_array

    runs = [SMALL, CalibrationSettings(windows=3, window=12, seed=1), CalibrationSettings(windows=2, window=13)]
    found = []
    for number, settings in enumerate(runs):
        statistics = calibrate(checkpoint, checkpoint.matrices()[:1], settings, tmp_path / str(number))
        found.append(
            (statistics.fingerprint, read_array(tmp_path / str(number) / "tokens.safetensors", "ids").tolist())
        )
    assert len({fingerprint for fingerprint, _ in found}) == 3
    assert found[0][1] != found[1][1]
    assert np.shape(found[2][1]) == (2, 13)


@pytest.mark.parametrize("complete", [True, False])
def test_the_folder_of_another_calibration(
    checkpoint: Checkpoint, tiny_checkpoint: Callable[..., Path], tmp_path: Path, complete: bool
) -> None:
    names = checkpoint.matrices()
    if complete:
        calibrate(checkpoint, names, SMALL, tmp_path / "c")
    else:
        with pytest.raises(Interrupted):
            calibrate(checkpoint, names, SMALL, tmp_path / "c", stop_after(1))
    before = contents(tmp_path / "c")
    text = tmp_path / "text.txt"
    text.write_text("The time is now. " * 100)
    other = open_checkpoint(str(tiny_checkpoint("llama", seed=1)))
    for arguments, message in (
        ((checkpoint, names, CalibrationSettings(windows=3, window=12, seed=7)), r"\(seed: 0 there, 7 now\)"),
        (
            (checkpoint, names, CalibrationSettings(windows=4, window=10)),
            "windows: 3 there, 4 now; window: 12 there, 10",
        ),
        (
            (checkpoint, names, CalibrationSettings(str(text), 3, 12)),
            "kind of source: self there, text now; content of",
        ),
        ((checkpoint, names[1:], SMALL), "set of matrices: "),
        ((other, names, SMALL), "model: "),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            calibrate(*arguments, tmp_path / "c")
        assert caught.value.exit_code == 2
        assert "another work folder" in str(caught.value)
    assert contents(tmp_path / "c") == before


def test_an_interrupted_one_of_other_versions(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        calibrate(checkpoint, checkpoint.matrices(), SMALL, tmp_path, stop_after(6))
    about = json.loads((tmp_path / "about.json").read_text())
    about["versions"]["torch"] = "1.13"
    (tmp_path / "about.json").write_text(json.dumps(about))
    with pytest.raises(UsageError, match=r"torch: 1\.13 there, "):
        calibrate(checkpoint, checkpoint.matrices(), SMALL, tmp_path)


def test_damage_is_noticed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    statistics = calibrate(checkpoint, checkpoint.matrices(), SMALL, tmp_path)
    name = checkpoint.matrices()[0]
    found = statistics.matrix(name)
    assert found is not None
    path = tmp_path / "moments-0000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorruptFileError, match=r"moments-0000\.safetensors"):
        found.full()
    path.unlink()
    with pytest.raises(InputError, match=r"moments-0000\.safetensors is missing"):
        statistics.matrix(name)
    about = json.loads((tmp_path / "about.json").read_text())
    for change, error, message in (
        ({"inputs": None}, CorruptFileError, r"about\.json in .* no proper 'inputs'"),
        ({"threads": "2"}, CorruptFileError, "no proper 'threads'"),
        ({"format": 1}, InputError, "has the format 1; this version reads 2"),
    ):
        (tmp_path / "about.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(error, match=message):
            open_statistics(tmp_path)
        with pytest.raises(error, match=message):
            calibrate(checkpoint, checkpoint.matrices(), SMALL, tmp_path)


def test_a_folder_that_cannot_be_made(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot write"):
        calibrate(checkpoint, checkpoint.matrices(), SMALL, tmp_path / "file")


def test_a_name_that_the_model_does_not_have(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no tensor 'model\.nothing'"):
        calibrate(checkpoint, ["model.nothing"], SMALL, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_tokenizer_of_another_model(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama", vocab_size=200), folder)
    (tmp_path / "text.txt").write_text("The quick brown fox is over the lazy dog. " * 20)
    settings = CalibrationSettings(str(tmp_path / "text.txt"), 3, 12)
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(InputError, match=r"gives the token 3\d\d, but its embedding has only 200 rows"):
        calibrate(checkpoint, checkpoint.matrices(), settings, tmp_path / "c")


def test_an_unknown_architecture(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "abacus"}))
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(UnknownArchitecture, match="abacus"):
        calibrate(checkpoint, checkpoint.matrices(), SMALL, tmp_path / "c")


def test_importing_it_is_light() -> None:
    code = "import sys, anyquant.calibration; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_statistics_can_go_to_another_process(checkpoint: Checkpoint, tmp_path: Path) -> None:
    import pickle

    statistics = calibrate(checkpoint, checkpoint.matrices(), SMALL, tmp_path)
    copy: Any = pickle.loads(pickle.dumps(statistics))
    assert isinstance(copy, Statistics)
    name = checkpoint.matrices()[-1]
    np.testing.assert_array_equal(copy.matrix(name).full(), statistics.matrix(name).full())  # type: ignore[union-attr]
