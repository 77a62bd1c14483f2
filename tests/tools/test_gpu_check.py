"""tools/gpu_check, where there is no GPU: what it says then, and what it makes of what its steps find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def check(script: Callable[[str], ModuleType]) -> Any:
    import gpu.check

    return gpu.check


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(repository: Path, tmp_path: Path) -> None:
    """From another folder, with nothing but the tree."""
    out = tmp_path / "found.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if "site-packages" in path)}
    done = subprocess.run(
        [sys.executable, "-S", str(repository / "tools" / "gpu_check"), "--out", str(out)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (6, "")
    assert done.stderr.startswith("error: ")
    assert "GPU" in done.stderr
    found = json.loads(out.read_text())
    assert (found["finished"], found["steps"]) == (False, {})
    assert "GPU" in found["machine"]["problem"]


def test_a_file_that_cannot_be_written(check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--out", str(tmp_path / "nowhere" / "found.json")]) == 6
    assert "nowhere" in capsys.readouterr().err


BENCHMARK = {
    "bandwidth": 3e12,
    "rows": [
        {"shape": [8192, 8192], "batch": 1, "name": "rows, 4 bits", "nbytes": 33_857_792, "seconds": 15e-6,
         "spread": 0.01, "relative_error": 3e-4, "same_bits": True, "problem": None},
    ],
}  # fmt: skip
XML = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure>far off</failure></testcase>
<testcase name="c"><skipped message="no model"/></testcase></testsuite></testsuites>"""


@pytest.fixture
def run_with(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """run_with(codes, xml): gpu_check whose commands end with these codes, by a word in them; what it leaves."""

    from gpu.report import Done

    def run(
        codes: dict[str, int | None], xml: str = XML, sanitizer: str | None = "/bin/compute-sanitizer"
    ) -> tuple[int, dict[str, Any], str]:
        def limited(command: Sequence[str], seconds: float, environment: dict[str, str], folder: Path) -> Any:
            assert 0 < seconds <= 460
            for word in command:
                if word.startswith("--junitxml="):
                    Path(word.partition("=")[2]).write_text(xml)
            if "--json" in command:
                Path(command[command.index("--json") + 1]).write_text(json.dumps(BENCHMARK))
            if "material" in command:
                Path(command[-1]).write_text('[{"what": "logits", "found": 1e-5, "limit": 1e-3, "ok": true}]')
            code = next((code for word, code in codes.items() if word in command), 0)
            return Done(code, "what was printed")

        monkeypatch.setattr(check, "limited", limited)
        monkeypatch.setattr(check, "require_gpu", lambda device: "sm_90")
        monkeypatch.setattr(check.shutil, "which", lambda name: sanitizer)
        monkeypatch.setattr(
            "torch.cuda.get_device_properties",
            lambda device: type("Properties", (), {"name": "Some GPU", "multi_processor_count": 132,
                                                   "L2_cache_size": 50 << 20, "total_memory": 80 << 30}),
        )  # fmt: skip
        (tmp_path / "material").mkdir(exist_ok=True)
        out = tmp_path / "found.json"
        code = check.main(["--out", str(out), "--material", str(tmp_path / "material")])
        return code, json.loads(out.read_text()), capsys.readouterr().out

    return run


def test_all_steps_succeed(run_with: Callable[..., tuple[int, dict[str, Any], str]]) -> None:
    code, found, printed = run_with({})
    assert code == 0
    assert found["finished"]
    assert found["machine"]["gpu"] == "Some GPU"
    assert [*found["steps"]] == [
        "tests", "material", "launches", "benchmark", "memcheck", "racecheck", "synccheck", "initcheck"
    ]  # fmt: skip
    assert {step["outcome"] for step in found["steps"].values()} == {"ok"}
    tests = found["steps"]["tests"]
    assert (tests["passed"], tests["failed"], tests["skipped"]) == (1, 1, 1)
    assert tests["failures"] == [{"test": "b", "message": "far off"}]
    assert tests["reasons_of_skipped"] == ["no model"]
    assert found["steps"]["material"]["results"][0]["what"] == "logits"
    assert "| 8192 x 8192, rows, 4 bits, batch 1: 0.65 of a copy's bandwidth | 0.75 | holds |" in printed
    assert "1 passed, 1 failed, 1 skipped" in printed


@pytest.mark.parametrize(("word", "step"), [("pytest", "tests"), ("material", "material"), ("racecheck", "racecheck")])
@pytest.mark.parametrize("how", [1, None])
def test_a_step_fails(
    run_with: Callable[..., tuple[int, dict[str, Any], str]], word: str, step: str, how: int | None
) -> None:
    code, found, _ = run_with({word: how})
    assert code == 4
    assert found["finished"]  # the others are run nevertheless
    assert [name for name, each in found["steps"].items() if each["outcome"] == "failed"] == [step]
    assert (found["steps"][step]["code"], found["steps"][step]["output"]) == (how, "what was printed")


def test_tests_that_all_skip_are_no_success(run_with: Callable[..., tuple[int, dict[str, Any], str]]) -> None:
    code, found, _ = run_with(
        {}, xml='<testsuites><testcase name="c"><skipped message="no GPU"/></testcase></testsuites>'
    )
    assert (code, found["steps"]["tests"]["outcome"]) == (4, "failed")


def test_without_a_sanitizer(run_with: Callable[..., tuple[int, dict[str, Any], str]]) -> None:
    code, found, printed = run_with({}, sanitizer=None)
    assert (code, found["steps"]["memcheck"]["outcome"]) == (0, "not run")
    assert "compute-sanitizer is not installed" in printed


def test_no_time_and_no_material(
    run_with: Callable[..., tuple[int, dict[str, Any], str]], check: Any, tmp_path: Path
) -> None:
    run_with({})
    report = check.Report(tmp_path / "late.json")
    check.Check(report, tmp_path / "no-material", 0.5, tmp_path).run()
    steps = json.loads((tmp_path / "late.json").read_text())["steps"]
    assert {step["outcome"] for step in steps.values()} == {"not run"}
    assert "--prepare" in steps["material"]["reason"]
    assert steps["benchmark"]["reason"] == "no time was left"


def test_a_report_of_what_was_found_before_a_crash(check: Any, tmp_path: Path) -> None:
    report = check.Report(tmp_path / "found.json")
    report.add("first", "ok", time.monotonic(), detail=3)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["steps"]["first"] | {"seconds": 0} == {"outcome": "ok", "seconds": 0, "detail": 3}
    assert not found["finished"]
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]


def test_commands_end_in_time_with_all_they_started(check: Any, tmp_path: Path) -> None:
    from gpu.report import limited

    mark = tmp_path / "mark"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    done = limited([sys.executable, "-c", parent], 1, {}, tmp_path)
    assert done.code is None
    assert done.output.startswith("begun")
    assert "stopped after 1 seconds" in done.output
    time.sleep(2.5)
    assert not mark.exists()
    command = [sys.executable, "-c", "import os; print(os.environ['WORD'], os.getcwd()); raise SystemExit(7)"]
    done = limited(command, 30, {"WORD": "said"}, tmp_path)
    assert (done.code, done.output.split()) == (7, ["said", str(tmp_path)])


@pytest.mark.slow
def test_material_of_the_real_model(
    check: Any, real_gguf: Path, real_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size, and that it is SmolLM2: the sizes of four layers, each of another kind."""
    assert check.main(["--prepare", "--material", str(tmp_path / "material")]) == 0
    about = json.loads((tmp_path / "material" / "about.json").read_text())
    assert len(about["inputs"]) == 28
    kinds = [about["kinds"][f"model.layers.{i}.mlp.up_proj"] for i in range(4)]
    assert kinds == ["codebook", "codebook", "affine", "block"]
    size = sum(file.stat().st_size for file in (tmp_path / "material").rglob("*") if file.is_file())
    assert 30e6 < size < 50e6
