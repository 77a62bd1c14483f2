"""What open_checkpoint makes of paths, folders without a model, hub ids, and what it imports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anyquant.checkpoint import hub, open_checkpoint
from anyquant.errors import CorruptFileError, InputError, UsageError


def test_import_is_light() -> None:
    code = (
        "import sys, anyquant.checkpoint, anyquant.checkpoint.gguf, anyquant.checkpoint.huggingface\n"
        "print([m for m in ('torch', 'transformers', 'gguf', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "there is no config.json in this folder. Give a model's folder"),
        (["x.gguf"], "there is no config.json in this folder. Give the GGUF file itself: .*x.gguf"),
        (["config.json"], "there is no .safetensors file in this folder"),
        (["config.json", "pytorch_model.bin"], r"only pickled weights \(pytorch_model.bin\).*save_pretrained"),
        (["config.json", "a.safetensors", "b.safetensors"], "holds 2 .safetensors files but no model"),
    ],
)
def test_folders_without_a_model(files: list[str], message: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(str(tmp_path))
    assert error.value.exit_code == 3


def test_a_folder_with_nothing_in_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    with pytest.raises(InputError, match="hold no weights"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "config",
    ["{", "[" * 100_000, "\udc80", "3", '{"a": 1, "a": 2}', '{"a": "\\ud800"}', '{"a": ' + "[" * 70 + "]" * 70 + "}"],
)
def test_a_damaged_config(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    with pytest.raises(CorruptFileError, match=r"config\.json in"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "give the folder that holds it"),
        ("model.bin", "is a file, but no GGUF"),
        ("README", "is a file, but no GGUF"),
    ],
)
def test_files_that_are_no_model(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"something")
    with pytest.raises(InputError, match=message):
        open_checkpoint(str(tmp_path / file))


def test_a_gguf_file_by_any_name(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"GGUF")
    with pytest.raises(CorruptFileError, match="blob: truncated or damaged: the version"):
        open_checkpoint(str(tmp_path / "blob"))


@pytest.mark.parametrize("model", ["/no/such/folder", "./missing", "missing.gguf", "a/b/c", "owner/model.gguf"])
def test_what_is_neither_path_nor_hub_id(model: str) -> None:
    with pytest.raises(
        InputError, match=r"is neither a folder, a \.gguf file nor a reachable hub id: there is no such"
    ):
        open_checkpoint(model)


@pytest.mark.parametrize("model", ["\0", "x" * 5000])
def test_what_no_file_system_takes(model: str) -> None:
    with pytest.raises(InputError):
        open_checkpoint(model)


def test_an_unreachable_hub_id() -> None:
    # The whole test run is offline.
    with pytest.raises(
        InputError, match=r"'nobody/nothing' is neither .* nor a reachable hub id .*HF_HUB_OFFLINE"
    ) as e:
        open_checkpoint("nobody/nothing")
    assert e.value.exit_code == 3


@pytest.mark.parametrize(
    ("model", "revision", "trust", "called"),
    [
        ("owner/tiny", None, False, ("owner/tiny", None)),
        ("owner/tiny@v2", None, False, ("owner/tiny", "v2")),
        ("gpt2", "main", True, ("gpt2", "main")),
        ("owner/tiny@v2", "v2", False, ("owner/tiny", "v2")),
    ],
)
def test_a_hub_id(
    model: str, revision: str | None, trust: bool, called: tuple[str, str | None], tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import huggingface_hub

    calls: list[Any] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        calls.append((name, revision, allow_patterns))
        return str(tiny_llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint(model, revision=revision, trust_remote_code=trust)
    assert [call[:2] for call in calls] == [called, called]
    for _, _, patterns in calls:
        assert ("*.py" in patterns) is trust
        assert {"*.json", "*.jinja", "*.model", "*.txt"} <= set(patterns)
        assert not [p for p in patterns if p.endswith(("bin", "gguf", "pt")) or p == "*"]
    assert checkpoint.name == (f"{called[0]}@{called[1]}" if called[1] else called[0])
    assert checkpoint.config == json.loads((tiny_llama / "config.json").read_text())


@pytest.mark.parametrize(
    ("index", "weights"),
    [
        (None, {"model.safetensors"}),
        ({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}},
         {"m-1.safetensors", "m-2.safetensors", "model.safetensors.index.json"}),
    ],
)  # fmt: skip
def test_no_weight_is_downloaded_twice(
    index: dict[str, Any] | None, weights: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    stored, local = tmp_path / "stored", tmp_path / "local"
    plain = {"config.json", "tokenizer.json", "vocab.txt"}
    files = ["model.safetensors", "m-1.safetensors", "m-2.safetensors", "consolidated.safetensors", "model.bin"]
    files += ["fp32/model.safetensors", "fp32/config.json", "onnx/m-1.safetensors", "modeling.py", *plain]
    for file in files:
        (stored / file).parent.mkdir(parents=True, exist_ok=True)
        (stored / file).write_text("{}")
    if index is not None:
        (stored / "model.safetensors.index.json").write_text(json.dumps(index))

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        found = (str(path.relative_to(stored)) for path in stored.rglob("*") if path.is_file())
        for file in filter_repo_objects(found, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (local / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(stored / file, local / file)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.download("owner/model") == ("owner/model", local)
    assert {str(path.relative_to(local)) for path in local.rglob("*")} == plain | weights


def test_a_damaged_index_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CorruptFileError, match="not a plain file name"):
        open_checkpoint("owner/model")


def test_two_revisions() -> None:
    with pytest.raises(UsageError, match="names revision 'a', but --revision is 'b'"):
        open_checkpoint("owner/tiny@a", revision="b")
