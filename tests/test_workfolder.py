"""Work folders: used again by the same job, refused to any other, and never half of anything in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import InfeasibleTarget, MachineError, UsageError
from anyquant.workfolder import WorkFolder, work_folder

JOB: dict[str, Any] = {"anyquant": "1", "method": "skim", "settings": {"outliers": 0.0}}
SPEC = ir.CodebookSpec.from_bits((2, 3), 0, np.array([1, 0], np.uint8))


def opened(path: Path, job: dict[str, Any] = JOB, *, resume: bool = False, keep: bool = True) -> Any:
    return work_folder(path, job, resume=resume, keep=keep)


def tensor() -> ir.Tensor:
    arrays = {
        ".bits": np.array([1, 0], np.uint8),
        ".codes": np.array([5], np.uint8),
        ".codebook": np.array([-1, 1, 3], np.float16),
    }
    return ir.Tensor(SPEC, arrays)


def test_what_was_saved_is_found_by_the_next(tmp_path: Path) -> None:
    errors = np.arange(6.0).reshape(2, 3)
    with opened(tmp_path / "w") as work:
        assert work.table(0, "a", (2, 3)) is None
        work.save_table(0, "a", errors)
        work.begin_tensors({"bits": 3.0}, resume=False)
        work.save_tensor(0, "a", tensor(), ir.Loss(0.25, None))
        work.save_tensor(1, "b", tensor(), ir.Loss(0.25, 0.125))
    with opened(tmp_path / "w", resume=True) as work:
        np.testing.assert_array_equal(work.table(0, "a", (2, 3)), errors)
        work.begin_tensors({"bits": 3.0}, resume=True)
        for index, name, loss in ((0, "a", ir.Loss(0.25, None)), (1, "b", ir.Loss(0.25, 0.125))):
            found = work.tensor(index, name, SPEC)
            assert found is not None
            np.testing.assert_array_equal(ir.dequantize(found[0]), ir.dequantize(tensor()))
            assert found[1] == loss


def test_tensors_are_those_of_one_target(tmp_path: Path) -> None:
    with opened(tmp_path / "w") as work:
        work.begin_tensors({"bits": 3.0}, resume=False)
        work.save_tensor(0, "a", tensor(), ir.Loss(0.0))
        with pytest.raises(UsageError, match=r"another target:\n  bits: 3\.0 there, 4\.0 asked for"):
            work.begin_tensors({"bits": 4.0}, resume=True)
        assert work.tensor(0, "a", SPEC) is not None
        work.begin_tensors({"bits": 4.0}, resume=False)
        assert work.tensor(0, "a", SPEC) is None


def test_another_job_is_refused_with_the_difference(tmp_path: Path) -> None:
    with opened(tmp_path / "w"):
        pass
    for change in ({"anyquant": "2"}, {"settings": {"outliers": 1.0}}, {"model": "abc"}):
        key = next(iter(change))
        with (
            pytest.raises(UsageError, match=f"belongs to another job:\n  {key}: ") as error,
            opened(tmp_path / "w", {**JOB, **change}),
        ):
            pass
        assert error.value.exit_code == 2


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to resume"), opened(tmp_path / "w", resume=True):
        pass
    assert not (tmp_path / "w").exists()


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match="not a work folder"), opened(tmp_path / "w"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a work folder"), opened(tmp_path / "file"):
        pass


def test_two_processes_do_not_share_one(tmp_path: Path) -> None:
    with opened(tmp_path / "w"), pytest.raises(UsageError, match="in use"), opened(tmp_path / "w"):
        pass
    with opened(tmp_path / "w"):
        pass


def test_a_temporary_one_ends_with_success_and_stays_after_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), opened(tmp_path / "w", keep=False):
        raise RuntimeError
    assert (tmp_path / "w" / "job.json").is_file()
    with opened(tmp_path / "w", keep=False):
        pass
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("last", ["tables", "tensors", "w"])
def test_killed_while_it_is_removed_it_is_still_a_work_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    remove = shutil.rmtree

    def killed(path: Path, ignore_errors: bool) -> None:
        if path.name == last:
            raise KeyboardInterrupt
        remove(path, ignore_errors=ignore_errors)

    with opened(tmp_path / "w") as work:
        work.save_table(0, "a", np.zeros((2, 3)))
        work.begin_tensors({"bits": 3.0}, resume=False)
        work.save_searched({"bits": 3.0}, [0])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt), opened(tmp_path / "w", keep=False):
        patched.setattr(shutil, "rmtree", killed)
    assert (tmp_path / "w").exists()
    for resume in (True, False):
        with opened(tmp_path / "w", resume=resume):
            pass
    with opened(tmp_path / "w", resume=True, keep=False):
        pass
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("keep", [True, False])
def test_a_refused_request_leaves_nothing_but_what_was_computed(tmp_path: Path, keep: bool) -> None:
    with pytest.raises(InfeasibleTarget), opened(tmp_path / "w", keep=keep):
        raise InfeasibleTarget("too small", (2.0, 8.0))
    assert not (tmp_path / "w").exists()
    with opened(tmp_path / "w") as work:
        work.save_table(0, "a", np.zeros((1, 1)))
    with pytest.raises(InfeasibleTarget), opened(tmp_path / "w", keep=keep):
        raise InfeasibleTarget("too small", (2.0, 8.0))
    assert (tmp_path / "w" / "job.json").is_file()


def test_killed_while_the_job_was_written(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "job.json.partial").write_text("{")
    (tmp_path / "w" / "lock").write_text("")
    with opened(tmp_path / "w") as work:
        assert work.notes() == []
    assert {path.name for path in (tmp_path / "w").iterdir()} == {"job.json", "lock"}


@pytest.mark.parametrize("damage", [b"", b"\0" * 400, None])
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: bytes | None) -> None:
    with opened(tmp_path / "w") as work:
        work.save_table(0, "a", np.zeros((2, 3)))
        path = tmp_path / "w" / "tables" / "00000.safetensors"
        path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
        assert work.table(0, "a", (2, 3)) is None
        work.save_table(0, "a", np.ones((2, 3)))
        assert work.table(0, "a", (2, 3)) is not None
        assert work.table(0, "b", (2, 3)) is None
        assert work.table(0, "a", (3, 2)) is None


def test_a_damaged_tensor_is_computed_again(tmp_path: Path) -> None:
    with opened(tmp_path / "w") as work:
        work.begin_tensors({}, resume=False)
        wrong = tensor()
        wrong.arrays[".bits"][:] = 9
        work.save_tensor(0, "a", wrong, ir.Loss(0.0))
        assert work.tensor(0, "a", SPEC) is None


def test_a_damaged_job_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path / "w"):
        pass
    (tmp_path / "w" / "job.json").write_text(json.dumps([1]))
    with pytest.raises(Exception, match=r"job\.json"), opened(tmp_path / "w"):
        pass


def test_a_full_disk_is_the_machines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(tmp_path / "w") as work:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(MachineError, match="No space left"):
            work.save_table(0, "a", np.zeros((1, 1)))
        assert work.table(0, "a", (1, 1)) is None
    assert isinstance(WorkFolder(tmp_path).calibration, Path)
