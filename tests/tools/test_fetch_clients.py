"""Installing the clients in Node.js, with a stand-in for npm, and running models in them."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Npm = Callable[[str], Path]


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The fetcher, with nothing to fetch but clients, its own cache folder, and no npm on the path."""
    module = sys.modules["anyquant_tools_fetch"]  # loaded by conftest.py
    monkeypatch.setattr(module, "MATERIALS", {})
    monkeypatch.setattr(sys, "argv", ["fetch.py"])
    monkeypatch.setenv("ANYQUANT_TEST_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return module


@pytest.fixture
def npm(tmp_path: Path) -> Npm:
    """npm(shell commands) puts a program of that name on the path; it notes its arguments in the file calls."""

    def make(commands: str) -> Path:
        program = tmp_path / "bin" / "npm"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!{shutil.which("sh", path="/bin:/usr/bin")}\necho "$@" >>{tmp_path}/calls\n{commands}\n')
        program.chmod(0o755)
        return tmp_path / "calls"

    return make


BUILDS = "node_modules/onnxruntime-node/bin/napi-v6"
INSTALL = f"PATH=/bin:/usr/bin; mkdir -p {BUILDS}/linux/x64 {BUILDS}/linux/arm64 {BUILDS}/win32/x64 node_modules/other"


def test_installed_once_and_again_when_the_lock_file_changes(
    fetch: ModuleType, npm: Npm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = npm(INSTALL)
    assert fetch.find_clients() is None
    assert fetch.main() == 0
    modules = fetch.find_clients()
    assert modules == tmp_path / "cache" / "clients" / "node_modules"
    assert (modules / "other").is_dir()
    assert [path.parts[-2:] for path in (modules.parent / BUILDS).glob("*/*")] == [("linux", "x64")]
    assert calls.read_text() == "ci --ignore-scripts --omit=optional --no-audit --no-fund\n"
    assert fetch.fetch_clients() == modules
    assert len(calls.read_text().splitlines()) == 1
    (modules.parent / "package-lock.json").write_text("{}")
    assert fetch.find_clients() is None
    monkeypatch.setattr(sys, "argv", ["fetch.py", "--clients"])
    assert fetch.main() == 0
    assert fetch.find_clients() == modules
    assert len(calls.read_text().splitlines()) == 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["clients"]


def test_without_npm_the_rest_is_fetched_all_the_same(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch.main() == 0
    assert "npm is not installed" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["fetch.py", "--clients"])
    assert fetch.main() == 5
    assert "npm is not installed" in capsys.readouterr().err


def test_a_failing_npm_is_told_and_leaves_nothing(
    fetch: ModuleType, npm: Npm, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    npm("echo no such version >&2; exit 1")
    for arguments, code in (([], 0), (["--clients"], 6)):  # without the clients all but their tests can run
        monkeypatch.setattr("sys.argv", ["fetch.py", *arguments])
        assert fetch.main() == code
        assert "no such version" in capsys.readouterr().err
        assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_made_is_told(
    fetch: ModuleType, npm: Npm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm(INSTALL)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANYQUANT_TEST_DATA", str(tmp_path / "file"))
    with pytest.raises(fetch.FetchError, match="cannot write") as caught:
        fetch.fetch_clients()
    assert caught.value.exit_code == 6


def test_the_lock_file_pins_exactly_and_names_no_registry(repository: Path) -> None:
    folder = repository / "tools" / "clients"
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    lock = json.loads((folder / "package-lock.json").read_text())
    pinned = {"onnxruntime-node": "1.30.0", "node-llama-cpp": "3.22.1", "@node-llama-cpp/linux-x64": "3.22.1"}
    assert wanted == pinned
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    for name, version in pinned.items():
        assert packages[f"node_modules/{name}"]["version"] == version
        assert "optional" not in packages[f"node_modules/{name}"]
    assert all(entry["integrity"].startswith("sha512-") for entry in packages.values())
    hosts = {entry["resolved"].split("/")[2] for entry in packages.values() if "resolved" in entry}
    assert hosts <= {"registry.npmjs.org"}


def test_builds_for_gpus_and_other_systems_are_replaced(repository: Path) -> None:
    # npm refuses a lock file that lacks one of them, and wrote none where its registry has not all: so none is needed.
    lock = json.loads((repository / "tools" / "clients" / "package-lock.json").read_text())["packages"]
    builds = lock["node_modules/node-llama-cpp"]["optionalDependencies"].keys() - {"@node-llama-cpp/linux-x64"}
    assert len(builds) == 13
    for name in builds:
        assert lock[f"node_modules/{name}"]["name"] == "onnxruntime-common"
        assert lock[f"node_modules/{name}"]["optional"]


@pytest.fixture
def shared(request: pytest.FixtureRequest, repository: Path) -> ModuleType:
    """The conftest.py that all tests share."""
    module: ModuleType = request.config.pluginmanager.get_plugin(str(repository / "tests" / "conftest.py"))
    return module


@pytest.fixture
def node(tmp_path: Path) -> Callable[[str], None]:
    """node(version) puts a program of that name on the path, which tells its version."""

    def make(version: str) -> None:
        program = tmp_path / "bin" / "node"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!{shutil.which('sh', path='/bin:/usr/bin')}\necho {version}\n")
        program.chmod(0o755)

    return make


def test_without_node_or_the_package_a_test_is_skipped(
    fetch: ModuleType,
    shared: ModuleType,
    node: Callable[[str], None],
    npm: Npm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.skip.Exception, match=r"Node\.js is not installed"):
        shared._in_node("run_gguf.mjs", "node-llama-cpp", oldest=20)
    node("v18.19.1")
    with pytest.raises(pytest.skip.Exception, match=r"needs Node\.js 20, this is v18"):
        shared._in_node("run_gguf.mjs", "node-llama-cpp", oldest=20)
    node("v20.20.2")
    missing = "node-llama-cpp is not in .*fetch.py --clients"
    with pytest.raises(pytest.skip.Exception, match=missing):
        shared._in_node("run_gguf.mjs", "node-llama-cpp", oldest=20)
    npm(INSTALL)
    with pytest.raises(pytest.fail.Exception, match=missing):  # it could have been fetched
        shared._in_node("run_gguf.mjs", "node-llama-cpp", oldest=20)
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match=missing):
        shared._in_node("run_gguf.mjs", "node-llama-cpp", oldest=20)


STAND_IN = """
const LOGITS = Array.from({ length: 40 }, (_, id) => [id, id === 7 ? 2 : id === 9 ? 1 : -50]);
const seen = { fed: [], plugin: process.env.GGML_BACKEND_PATH };
const sequence = {
  async controlledEvaluate(input) {
    seen.fed.push(input);
    return input.map((item) => (Array.isArray(item) ? { next: { token: 7, logits: new Map(LOGITS) } } : undefined));
  },
};
const context = { getSequence: () => sequence };
const model = { createContext: async (options) => ((seen.context = options), context) };
export async function getLlama({ logger, ...options }) {
  seen.llama = options;
  return {
    loadModel: async (options) => ((seen.model = options), logger("info", "loaded"), model),
    dispose: async () => console.error(JSON.stringify(seen)),
  };
}
"""


@pytest.fixture
def run_gguf(repository: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_gguf(*arguments, **environment): tools/clients/run_gguf.mjs on a stand-in for node-llama-cpp."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("Node.js is not installed")
    package = tmp_path / "node_modules" / "node-llama-cpp"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"type": "module", "exports": {"import": "./no.js", "node": "./index.js"}}')
    (package / "index.js").write_text(STAND_IN)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, str(repository / "tools" / "clients" / "run_gguf.mjs"), *arguments],
            env={**os.environ, "NODE_PATH": str(package.parent), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_tokens_are_chosen_greedily_and_nothing_is_rounded_to_16_bits(
    run_gguf: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_gguf("model.gguf", "[3, 4, 5]", "2", "6", GGML_BACKEND_PATH="plugin.so")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["tokens"] == [7, 7]
    assert [len(top) for top in answer["top"]] == [32, 32]
    total = math.log(math.exp(2) + math.exp(1) + 38 * math.exp(-50))
    assert [token for token, _ in answer["top"][0][:4]] == [7, 9, 0, 1]
    assert [value for _, value in answer["top"][0][:3]] == pytest.approx([2 - total, 1 - total, -50 - total], rel=1e-14)

    told, seen = done.stderr.splitlines()
    assert told == "loaded"
    seen = json.loads(seen)
    asked = {"generateNext": {"token": True, "logits": True, "options": {"temperature": 0}}}
    assert seen == {
        "plugin": "plugin.so",
        "llama": {"gpu": False, "build": "never", "maxThreads": 6},
        "model": {"modelPath": "model.gguf"},
        "context": {
            "contextSize": 5,
            "threads": {"ideal": 6, "min": 6},
            "flashAttention": False,
            "experimentalKvCacheKeyType": "F32",
            "experimentalKvCacheValueType": "F32",
        },
        "fed": [[3, 4, [5, asked]], [[7, asked]]],
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "usage"),
        (("model.gguf", "[]", "1", "1"), "PROMPT"),
        (("model.gguf", "[1.5]", "1", "1"), "PROMPT"),
        (("model.gguf", "3, 4", "1", "1"), "JSON"),
        (("model.gguf", "[1]", "0", "1"), "COUNT"),
        (("model.gguf", "[1]", "1", "two"), "THREADS"),
    ],
)
def test_what_cannot_be_run_is_told_on_stderr(
    run_gguf: Callable[..., subprocess.CompletedProcess[str]], arguments: tuple[str, ...], told: str
) -> None:
    done = run_gguf(*arguments)
    assert done.returncode == 1
    assert told in done.stderr
    assert done.stdout == ""


def test_node_llama_cpp_starts_and_tells_of_a_plugin_and_a_model_that_are_not_there(
    run_in_node_llama: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=r"ENOENT.*no-model\.gguf") as caught:
        run_in_node_llama(tmp_path / "no-model.gguf", [1], 1, plugin=tmp_path / "no-plugin.so")
    assert "no-plugin.so: cannot open shared object file" in str(caught.value)
    with pytest.raises(AssertionError, match=r"ENOENT.*no-model\.gguf") as caught:
        run_in_node_llama(tmp_path / "no-model.gguf", [1], 1)
    assert "no-plugin.so" not in str(caught.value)
