"""The benchmark of accuracy: a tiny run from end to end, and going on with it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from anyquant.errors import AnyquantError, InfeasibleTarget, InputError, UsageError
from anyquant.workfolder import held

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not care at all {}. "
PEER = "GPTQ 3 bits, group 64"
PATTERN = PEER.replace(",", "?")  # in a list of patterns with commas


class Setup:
    """A model, two texts and a work folder; the arguments of a small run over them."""

    def __init__(self, folder: Path, model: Path) -> None:
        for name, seed in (("calibration", 0), ("evaluation", 1)):
            words = np.random.default_rng(seed).integers(0, 1000, 60)
            (folder / f"{name}.txt").write_text("".join(TEXT.format(word) for word in words), encoding="utf-8")
        self.work, self.output = folder / "work", folder / "docs" / "benchmarks.md"
        self.arguments = [
            "--work", self.work, "--source", model, "--calib", folder / "calibration.txt", "--calib-windows", 4,
            "--calib-window", 32, "--text", folder / "evaluation.txt", "--windows", 3, "--window", 24,
        ]  # fmt: skip

    def __call__(self, tool: ModuleType, *more: object) -> int:
        code: int = tool.main([str(word) for word in (*self.arguments, *more)])
        return code


class InThisProcess:
    """In the place of :func:`accuracy.processes.worker`: the same steps, without starting Python for each.

    Attributes:
        steps: names of those that were run.
    """

    def __init__(self, accuracy: Callable[[str], Any]) -> None:
        self._known, self._finished = accuracy("worker").STEPS, accuracy("processes").Finished
        self.steps: list[str] = []

    def __call__(self, task: Path) -> Any:
        described = json.loads(task.read_text(encoding="utf-8"))
        self.steps.append(described["step"])
        try:
            answer = self._known[described["step"]](described)
        except AnyquantError as error:
            return self._finished(error.exit_code, 1.0, 1, "", str(error))
        return self._finished(0, 1.0, 1, json.dumps(answer), "")


@pytest.fixture
def steps(tool: ModuleType, accuracy: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that the test ran."""
    worker = InThisProcess(accuracy)
    monkeypatch.setattr(accuracy("processes"), "worker", worker)
    return worker.steps


@pytest.fixture(scope="module")
def measured(
    tool: ModuleType, accuracy: Callable[[str], Any], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Setup:
    """Two settings of anyquant at one target, one of them too small for it, and one peer."""
    setup = Setup(tmp_path_factory.mktemp("accuracy"), tiny_llama)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy("processes"), "worker", InThisProcess(accuracy))
        assert setup(tool, "--targets", 2, "--systems", f"skim @ 2,rounding @ 2,{PATTERN}") == 1
    return setup


def records(setup: Setup) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in setup.work.glob("*/*/made/*.json")]
    return {record["name"]: record for record in found}


def test_two_systems_and_a_peer_from_end_to_end(measured: Setup) -> None:
    found = records(measured)
    assert set(found) == {"skim @ 2", "rounding @ 2", PEER}
    skim, rtn, gptq = found["skim @ 2"], found["rounding @ 2"], found[PEER]
    assert 1.5 < skim["bits"] <= 2
    assert skim["calibrated"]
    assert skim["fresh"]
    assert skim["command"] == "anyquant quantize MODEL --method skim --bits 2"
    assert skim["seconds"] > 0.1
    assert skim["peak"] > 10e6
    assert rtn["infeasible"]
    assert 2 < rtn["feasible"][0] < rtn["feasible"][1]
    assert 3 < gptq["bits"] < 3.5
    assert not list(measured.work.glob("*/*/candidate"))


def test_losses_are_those_of_the_plain_way(measured: Setup, tiny_llama: Path, accuracy: Callable[[str], Any]) -> None:
    """GPTQ by hand on the same statistics, and transformers' own logits."""
    import torch
    from transformers import AutoModelForCausalLM

    from anyquant.calibration import open_statistics

    (statistics,) = {path.parent for path in measured.work.glob("*/*/calibrations/*/about.json")
                     if "activation" in path.read_text(encoding="utf-8")}  # fmt: skip
    known, peer = open_statistics(statistics), accuracy("grids").gptq(3)
    source, model = (AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layers" in name:
                values = peer.quantize(parameter.numpy().copy(), known.matrix(name).full())
                parameter.copy_(torch.from_numpy(values))
    (ids,) = measured.work.glob("*/*/ids.npy")
    tokens = torch.from_numpy(np.load(ids))
    with torch.no_grad():
        p, q = (m(tokens).logits.double().log_softmax(-1) for m in (source, model))
    digest = records(measured)[PEER]["digest"]
    lost = accuracy("evaluation").Lost.load(ids.parent / f"{digest[:24]}.npz")
    np.testing.assert_allclose(lost.kl, (p.exp() * (p - q)).sum(-1), rtol=1e-2, atol=1e-5)
    expected = -torch.gather(q[:, :-1], 2, tokens[:, 1:, None])[..., 0]
    np.testing.assert_allclose(lost.losses, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(lost.agrees, p.argmax(-1) == q.argmax(-1))
    about = json.loads((ids.parent / "about.json").read_text(encoding="utf-8"))
    assert 0 <= about["rounding_kl"] < 1e-5


def test_sequential_peers_see_what_quantized_matrices_make(
    measured: Setup, accuracy: Callable[[str], Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """The first matrices see what they saw before; the first of the second block, what GPTQ's first block makes."""
    import torch
    from transformers import AutoModelForCausalLM

    from anyquant.calibration import open_statistics

    worker, candidates = accuracy("worker"), accuracy("candidates")
    (statistics,) = {path.parent for path in measured.work.glob("*/*/calibrations/*/about.json")
                     if "activation" in path.read_text(encoding="utf-8")}  # fmt: skip
    task = {"model": str(tiny_llama), "statistics": str(statistics)}
    read = []
    for name in (f"{PEER}, clipped", f"{PEER}, clipped, sequential"):
        folder = tmp_path / f"{len(read)}"
        answer = worker.make_peer({**task, "name": name, "candidate": str(folder)})
        read.append(candidates.reader(folder, lambda name: pytest.fail(f"{name} was not quantized")))
        assert 3 < answer["bits"] < 3.5
    plain, sequential = read
    first, later = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    np.testing.assert_array_equal(plain(first), sequential(first))
    assert np.abs(plain(later) - sequential(later)).max() > 0

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    weight = model.get_parameter(later).detach().numpy().copy()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layers.0." in name:
                parameter.copy_(torch.from_numpy(np.array(sequential(name))))
        inputs: list[torch.Tensor] = []
        model.get_submodule(later.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, arguments: inputs.append(arguments[0])
        )
        model(torch.from_numpy(open_statistics(statistics).ids()))
    seen = inputs[0].reshape(-1, weight.shape[1]).double().numpy()
    expected = accuracy("grids").gptq(3, clipped=True).quantize(weight, (seen.T @ seen / len(seen)).astype(np.float32))
    assert (np.abs(expected - sequential(later)) > 1e-3 * np.abs(weight).max()).mean() < 0.01
    assert (np.abs(expected - plain(later)) > 1e-3 * np.abs(weight).max()).mean() > 0.01


def test_what_is_measured_is_not_measured_again(
    tool: ModuleType,
    measured: Setup,
    accuracy: Callable[[str], Any],
    steps: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accuracy("processes"), "anyquant", lambda *arguments: pytest.fail(f"ran anyquant {arguments}"))
    before = records(measured)
    everything = ["--targets", 2, "--systems", f"skim @ 2,rounding @ 2,{PATTERN}"]
    assert measured(tool, *everything) == 1
    assert steps == ["peers"]
    assert records(measured) == before
    # What was lost in between is measured again, and no more than that.
    (evaluation,) = {path.parent for path in measured.work.glob("*/*/source.npz")}
    (evaluation / f"{before[PEER]['digest'][:24]}.npz").unlink()
    steps.clear()
    assert measured(tool, *everything) == 1
    assert steps == ["peers", "peer", "measure"]
    assert records(measured) == before


def test_on_demand_a_system_is_measured_again(tool: ModuleType, measured: Setup, steps: list[str]) -> None:
    before = records(measured)
    assert measured(tool, "--targets", 2, "--systems", PATTERN, "--again") == 1
    assert steps == ["peers", "peer", "measure"]
    assert records(measured)[PEER]["digest"] == before[PEER]["digest"]


def test_a_failure_is_kept_and_tried_again(
    tool: ModuleType, measured: Setup, accuracy: Callable[[str], Any], steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes, name = accuracy("processes"), "block @ 4.5"
    with monkeypatch.context() as patch:
        patch.setattr(
            processes, "anyquant", lambda *arguments: processes.Finished(6, 1.0, 1, "", "no room\non the disk")
        )
        assert measured(tool, "--targets", 4.5, "--systems", name) == 1
    assert records(measured)[name]["failed"] == "anyquant quantize --method block --bits 4.5: on the disk"
    assert measured(tool, "--targets", 4.5, "--systems", name) == 1
    assert 4 < records(measured)[name]["bits"] <= 4.5


def test_processes_are_watched(accuracy: Callable[[str], Any], tool: ModuleType, tmp_path: Path) -> None:
    """Exit code, texts, seconds and the memory of a child of the command."""
    processes = accuracy("processes")
    child = "import time; held = bytearray(200_000_000); time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{child}']); print('out'); sys.exit('why')"
    found = processes.run([sys.executable, "-c", parent])
    assert (found.code, found.out, found.reason) == (1, "out\n", "why")
    assert found.seconds > 1
    assert 200e6 < found.peak < 400e6


def test_the_worker_is_a_process(
    accuracy: Callable[[str], Any], tool: ModuleType, tiny_llama: Path, tmp_path: Path
) -> None:
    task = tmp_path / "task.json"
    task.write_text(json.dumps({"step": "peer", "model": str(tiny_llama), "statistics": str(tmp_path), "name": "x"}))
    found = accuracy("processes").worker(task)
    assert found.code == InputError.exit_code
    assert "about.json" in found.reason


def test_the_report(tool: ModuleType, measured: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    measured.output.parent.mkdir(exist_ok=True)
    measured.output.write_text("# Benchmarks\n\nBefore.\n", encoding="utf-8")
    assert measured(tool, "--report", "--output", measured.output) == 1
    printed = capsys.readouterr().out
    assert f"KL below {PEER} at" in printed
    first = measured.output.read_text(encoding="utf-8")
    assert first.startswith("# Benchmarks\n\nBefore.\n\n<!-- accuracy: begin -->\n")
    assert first.endswith("<!-- accuracy: end -->\n")
    assert f"| {PEER} | peer | 3." in first
    assert "    python tools/benchmark_accuracy.py --source" in first
    tables = [block.splitlines() for block in first.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 3
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1
    # What follows the section stays, and a second report is the same.
    measured.output.write_text(first + "\nAfter.\n", encoding="utf-8")
    assert measured(tool, "--report", "--output", measured.output) == 1
    assert measured.output.read_text(encoding="utf-8") == first + "\nAfter.\n"
    measured.output.write_text("<!-- accuracy: end -->", encoding="utf-8")
    assert measured(tool, "--report", "--output", measured.output) == InputError.exit_code


def test_misuse_is_told(
    tool: ModuleType, measured: Setup, steps: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert measured(tool, "--systems", "nobody*") == UsageError.exit_code
    assert "'nobody*' matches none of: skim @ 2.3; " in capsys.readouterr().err
    assert measured(tool, "--source", tmp_path / "none") == UsageError.exit_code
    assert measured(tool, "--windows", 10_000) == InputError.exit_code
    assert "Ask for fewer --windows" in capsys.readouterr().err
    assert measured(tool, "--report", "--windows", 2) == InputError.exit_code
    assert "holds no measurement" in capsys.readouterr().err
    same = measured.arguments[measured.arguments.index("--text") + 1]
    assert measured(tool, "--calib", same) == UsageError.exit_code


def test_one_process_measures_at_a_time(
    tool: ModuleType, measured: Setup, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Two would take each other's model for the one that they have made."""
    with held(measured.work):
        assert measured(tool) == UsageError.exit_code
        assert "in use by another process" in capsys.readouterr().err
        assert measured(tool, "--report") == 1


def test_results_of_another_text_are_refused(
    tool: ModuleType, measured: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(measured.work, tmp_path / "work")
    text = Path(measured.arguments[measured.arguments.index("--text") + 1])
    other = tmp_path / text.name
    other.write_text(text.read_text(encoding="utf-8") + "More.", encoding="utf-8")
    assert measured(tool, "--work", tmp_path / "work", "--text", other) == UsageError.exit_code
    assert "another text. Choose another --work" in capsys.readouterr().err


def test_systems_have_names_and_files_of_their_own(systems: Any, accuracy: Callable[[str], Any], tool: Any) -> None:
    every = systems.ours()
    assert len({system.name for system in every}) == len({system.slug for system in every}) == len(every)
    names = [system.name for system in systems.chosen(every, ["skim @*", "rounding @ 3.3"])]
    assert names == [*(f"skim @ {bits:g}" for bits in systems.TARGETS), "rounding @ 3.3"]
    assert systems.at_bits_of(3.296875) == 3.2968
    assert systems.at_bits_of(4.25) == 4.25
    takes = accuracy("embeddings").takes
    assert takes(list(systems.method("claq --refine", 3).arguments))
    assert not takes(list(systems.method("skim --refine --sequential", 3).arguments))


def test_every_system_is_a_command_that_anyquant_takes(
    systems: Any, accuracy: Callable[[str], Any], tool: Any, tiny_llama: Path
) -> None:
    commands = accuracy("commands")
    calibration = commands.Calibration("self", 3, 40)
    jobs = {}
    for system in systems.ours():
        if system.label != "ggml" or importlib.util.find_spec("libggml"):
            arguments = commands.complete(str(tiny_llama), system.arguments, calibration)
            jobs[system.name] = commands.job_of(str(tiny_llama), arguments)
    assert not jobs["rounding @ 3.3"].needs_statistics
    assert jobs["skim --refine @ 3.3"].refine
    assert jobs["skim @ 3.3"].calibration.windows == 3
    paper = jobs[f"{systems.SKIM_PAPER} @ 3 of codes"]
    assert (paper.target.count, paper.calibration_settings.importance, paper.scope) == ("index", "fisher", "matrix")
    assert jobs[f"{systems.KMEANS} @ 3 of codes"].scope == "uniform"


@pytest.mark.parametrize("command", ["skim", "skim --refine", "affine --set feedback=no --set clip=no"])
def test_the_steps_of_an_encoder(
    command: str,
    accuracy: Callable[[str], Any],
    systems: Any,
    write_bert: Callable[[Path, list[str]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The source is at no distance from itself; a method and a peer are at some; more bits bring it nearer."""
    embeddings = accuracy("embeddings")
    words = sorted({word.strip(".,").lower() for word in TEXT.split()} - {"{}"})
    digits = [str(digit) for digit in range(10)]
    write_bert(tmp_path / "model", [*words, *digits, *(f"##{digit}" for digit in digits)])
    monkeypatch.setattr(embeddings, "CALIBRATION_SENTENCES", 20)
    for name in ("calibration", "evaluation"):
        words = "\n".join(TEXT.format(number) for number in range(40))
        (tmp_path / f"{name}.txt").write_text(words, encoding="utf-8")
    model = {"model": str(tmp_path / "model"), "seed": 0}
    statistics = {"statistics": str(tmp_path / "moments"), **model}
    embeddings.take_statistics(
        {"text": str(tmp_path / "calibration.txt"), "folder": str(tmp_path / "moments"), **model}
    )
    text = {"text": str(tmp_path / "evaluation.txt"), "folder": str(tmp_path / "evaluation"), "windows": 8, **model}
    embeddings.run_source({"result": str(tmp_path / "source.npz"), **text})
    source = accuracy("evaluation").Lost.load(tmp_path / "source.npz")
    assert source.losses.size == 0
    assert source.kl.shape == (8, 1)
    assert source.kl.max() < 1e-9

    def lost(step: Any, into: str, **task: Any) -> tuple[dict[str, Any], float]:
        made = step({"candidate": str(tmp_path / into), **statistics, **task})
        embeddings.measure({"candidate": str(tmp_path / into), "result": str(tmp_path / f"{into}.npz"), **text})
        return made, float(accuracy("evaluation").Lost.load(tmp_path / f"{into}.npz").kl.mean())

    few, much = (
        lost(embeddings.make_method, f"{bits}", arguments=list(systems.method(command, bits).arguments))
        for bits in (4.5, 8)
    )
    peer, away = lost(embeddings.make_peer, "peer", name=PEER)
    assert few[0]["bits"] <= 4.5 < much[0]["bits"] <= 8
    # GPTQ may be nearer with fewer bits: sentences that are so alike leave its feedback much freedom.
    assert 0 < much[1] < few[1] < 0.5
    assert 0 < away < 0.5
    assert 3 < peer["bits"] < 3.5
    assert PEER in embeddings.list_peers(model)["peers"]
    with pytest.raises(InfeasibleTarget):
        lost(embeddings.make_method, "none", arguments=["--method", "skim", "--bits", "0.001"])


def test_another_machine_goes_on_from_records(
    tool: ModuleType, measured: Setup, steps: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A work folder that begins with what another one wrote down has the same tables, and measures what is missing."""
    kept, tables = tmp_path / "records", [tmp_path / f"{number}.md" for number in range(3)]
    assert measured(tool, "--report", "--records", kept, "--output", tables[0]) == 1
    assert not kept.exists()  # nothing was measured
    assert measured(tool, "--targets", 2, "--systems", PATTERN, "--records", kept) == 1
    (file,) = kept.iterdir()
    assert file.name == f"{Path(measured.arguments[3]).name}.json"

    elsewhere = ["--work", tmp_path / "elsewhere", "--records", kept]
    assert measured(tool, *elsewhere, "--report", "--output", tables[1]) == 1
    assert tables[1].read_text(encoding="utf-8") == tables[0].read_text(encoding="utf-8")
    steps.clear()
    capsys.readouterr()
    assert measured(tool, *elsewhere, "--targets", 5.5, "--systems", f"{PATTERN},block @ 5.5") == 1
    assert steps == ["peers", "source", "measure"]  # not the peer again
    assert "block @ 5.5" in {system["name"] for system in json.loads(file.read_text(encoding="utf-8"))["systems"]}
    steps.clear()  # statistics were taken there, and are not here
    assert measured(tool, *elsewhere, "--targets", 2, "--systems", "GPTQ 4 bits? group 64") == 1
    assert steps == ["peers", "calibrate", "peer", "measure"]
    assert measured(tool, *elsewhere, "--report", "--output", tables[2]) == 1
    assert "block @ 5.5" in tables[2].read_text(encoding="utf-8")


def test_what_a_killed_run_left_of_the_source_is_not_taken_for_its_answers(
    tool: ModuleType, measured: Setup, steps: list[str], tmp_path: Path
) -> None:
    kept = ["--records", tmp_path / "records"]
    assert measured(tool, "--targets", 2, "--systems", PATTERN, *kept) == 1
    elsewhere = ["--work", tmp_path / "elsewhere", *kept]
    assert measured(tool, *elsewhere, "--report") == 1
    (evaluation,) = {path.parent for path in (tmp_path / "elsewhere").glob("*/*/source.npz")}
    (evaluation / "logprobs.npy").write_bytes(b"half of them")
    steps.clear()
    assert measured(tool, *elsewhere, "--targets", 5.5, "--systems", "block @ 5.5") == 1
    assert steps == ["peers", "source", "measure"]


def test_records_of_something_else_are_refused(
    tool: ModuleType, measured: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "records"
    assert measured(tool, "--targets", 2, "--systems", PATTERN, "--records", kept) == 1
    (file,) = kept.iterdir()
    elsewhere = ["--work", tmp_path / "elsewhere", "--records", kept, "--report"]
    assert measured(tool, *elsewhere, "--windows", 2) == UsageError.exit_code
    assert "Choose another --records." in capsys.readouterr().err
    for damaged in ("[]", "{}", '{"of": [], "calibration": 1, "evaluation": 2, "systems": 3}', file.read_text()[:-20]):
        file.write_text(damaged, encoding="utf-8")
        assert measured(tool, *elsewhere) in (InputError.exit_code, UsageError.exit_code), damaged
        assert file.name in capsys.readouterr().err


def test_records_keep_what_is_not_finite(accuracy: Callable[[str], Any], tmp_path: Path) -> None:
    store, lost = accuracy("store"), accuracy("evaluation").Lost
    kept = store.Store(tmp_path / "a", "calibration", "evaluation")
    kept.claim({"x": 1}, {"y": 2})
    kept.evaluated.mkdir(exist_ok=True)
    source = lost(np.ones((3, 4)), np.zeros((3, 5)), np.ones((3, 5), np.bool_))
    source.save(kept.evaluated / store.SOURCE)
    record = {"name": "broken", "role": "peer", "label": "broken", "activations": None, "digest": "f" * 64, "bits": 2.0}
    kept.add(record)
    lost(np.full((3, 4), np.nan), np.full((3, 5), np.inf), source.agrees).save(kept.lost(record))
    accuracy("records").write_records(tmp_path / "a.json", kept)
    again = store.Store(tmp_path / "b", "calibration", "evaluation")
    again.add({"name": "broken", "role": "peer", "failed": "here it found no memory"})  # what was measured goes before
    accuracy("records").read_records(tmp_path / "a.json", again)
    assert list(again.all_made()) == [record]
    found = lost.load(again.lost(record))
    assert found.kl.shape == found.losses.shape == (3, 1)
    assert np.isinf(found.kl).all()
    assert not np.isfinite(found.losses).any()
