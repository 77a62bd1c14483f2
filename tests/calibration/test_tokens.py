"""Windows from text files and datasets."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anyquant.calibration import CalibrationSettings
from anyquant.calibration.tokens import from_dataset, from_text, load_tokenizer, require_context
from anyquant.checkpoint import open_checkpoint
from anyquant.errors import InputError, MissingDependency, UsageError
from anyquant.validation.texts import token_ids

SENTENCE = "The quick brown fox number {0} jumps over the lazy dog; what is the time? {1}\n"
TEXT = "".join(SENTENCE.format(i, i * i) for i in range(40))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(open_checkpoint(str(tiny_llama)))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def settings(source: object, windows: int = 4, window: int = 32, seed: int = 0) -> CalibrationSettings:
    return CalibrationSettings(str(source), windows, window, seed)


def test_windows_are_parts_of_the_text(tokenizer: Any, text: Path) -> None:
    whole = token_ids(tokenizer, TEXT)
    found = from_text(tokenizer, settings(text))
    assert found.ids.dtype == np.int64
    assert found.ids.shape == (4, 32)
    assert found.notes == []
    places = [next(i for i in range(0, len(whole), 32) if whole[i : i + 32] == row) for row in found.ids.tolist()]
    assert places == sorted(set(places))
    other = from_text(tokenizer, settings(text, seed=1))
    assert other.ids.tolist() != found.ids.tolist()
    assert from_text(tokenizer, settings(text)).ids.tolist() == found.ids.tolist()


def test_a_leading_token_as_the_tokenizer_puts_it(tiny_llama: Path, text: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    leading = load_tokenizer(open_checkpoint(str(tiny_llama)))
    leading.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found = from_text(leading, settings(text))
    assert found.ids.shape == (4, 32)
    assert (found.ids[:, 0] == 1).all()
    assert (found.ids[:, 1:] != 1).all()


def test_a_short_text_gives_fewer_windows_and_a_note(tokenizer: Any, text: Path) -> None:
    count = len(token_ids(tokenizer, TEXT))
    found = from_text(tokenizer, settings(text, windows=1000))
    assert len(found.ids) == count // 32
    assert found.notes == [
        f"text.txt has {count:,} tokens, enough for {count // 32} of the 1000 windows of 32 that were asked for"
    ]


def test_less_than_a_window(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The time is now.")
    with pytest.raises(InputError, match=r"short\.txt has \d+ tokens, but one window needs 200"):
        from_text(tokenizer, settings(tmp_path / "short.txt", window=200))


def test_a_text_that_is_not_utf8(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="byte 3"):
        from_text(tokenizer, settings(tmp_path / "latin.txt"))


def test_a_model_without_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tiny_llama / name, tmp_path / name)
    with pytest.raises(InputError, match=r"cannot load its tokenizer.*tokenizer\.json"):
        load_tokenizer(open_checkpoint(str(tmp_path)))


def test_a_window_beyond_the_context(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    require_context(checkpoint, settings("self", window=256))
    with pytest.raises(UsageError, match=r"257 tokens is longer than the context of tiny-llama\d*, 256"):
        require_context(checkpoint, settings("self", window=257))


class Stream:
    """A dataset as a stream of rows."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def shuffle(self, *, seed: int, buffer_size: int) -> Stream:
        assert buffer_size > 1
        return Stream([self.rows[i] for i in np.random.default_rng(seed).permutation(len(self.rows))])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, ...]]]:
    """Function that puts a package datasets in place, whose only dataset has these rows; returns the calls made."""

    def install(rows: list[dict[str, Any]] | Exception) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(name: str, configuration: str | None, *, split: str, streaming: bool) -> Stream:
            calls.append((name, configuration, split, streaming))
            if isinstance(rows, Exception):
                raise rows
            return Stream(rows)

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return calls

    return install


def test_a_dataset(tokenizer: Any, datasets: Callable[..., list[tuple[Any, ...]]]) -> None:
    rows = [{"text": letter * 200, "url": "x"} for letter in "abcdefghijklmnop"]
    calls = datasets(rows)
    found = from_dataset(tokenizer, settings("owner/name:english"))
    assert calls == [("owner/name", "english", "train", True)]
    assert found.ids.shape == (4, 32)
    assert found.notes == []
    again = from_dataset(tokenizer, settings("owner/name:english"))
    assert again.ids.tolist() == found.ids.tolist()
    assert from_dataset(tokenizer, settings("owner/name", seed=5)).ids.tolist() != found.ids.tolist()
    # Rows are longer than a window, so each window is of one row.
    letters = [set(tokenizer.decode(row).strip()) for row in found.ids]
    assert [len(each) for each in letters] == [1] * 4
    assert len(set.union(*letters)) == 4


def test_a_short_dataset(tokenizer: Any, datasets: Callable[..., Any]) -> None:
    datasets([{"text": ""}, {"text": TEXT}, {"text": "The time is now."}])
    found = from_dataset(tokenizer, settings("name"))
    assert found.ids.shape == (1, 32)
    assert "enough for 1 of the 4 windows" in found.notes[0]
    datasets([])
    with pytest.raises(InputError, match="the dataset name has 0 tokens, but one window needs 32"):
        from_dataset(tokenizer, settings("name"))


def test_a_dataset_without_text(tokenizer: Any, datasets: Callable[..., Any]) -> None:
    datasets([{"sentence": "x", "label": 1}])
    with pytest.raises(InputError, match="no column 'text' of strings, but label, sentence"):
        from_dataset(tokenizer, settings("name"))


def test_a_dataset_that_cannot_be_reached(tokenizer: Any, datasets: Callable[..., Any]) -> None:
    datasets(ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore"))
    with pytest.raises(InputError, match=r"'owner/name' cannot be read \(ConnectionError: Couldn't reach .* Hub\)"):
        from_dataset(tokenizer, settings("owner/name"))


def test_without_the_package(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependency, match=r"pip install 'anyquant\[datasets\]'") as caught:
        from_dataset(tokenizer, settings("owner/name"))
    assert caught.value.exit_code == 5


CONFIGURATION = """from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_a_model_ships_runs_if_it_is_trusted(
    tiny_llama: Path, tmp_path: Path, invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tmp_path / "own"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    kinds = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": kinds}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (model / "configuration_own.py").write_text(CONFIGURATION, encoding="utf-8")
    (model / "modeling_own.py").write_text(MODELING, encoding="utf-8")
    arguments = ["--method", "skim", "--bits", 3, "--calib-windows", 2, "--calib-window", 32]
    refused = invoke("quantize", model, "-o", tmp_path / "no", *arguments)
    assert refused.code == 3
    assert "--trust-remote-code" in refused.err
    made = invoke("quantize", model, "-o", tmp_path / "yes", *arguments, "--trust-remote-code", "--json")
    assert made.code == 0, made.err
    same = invoke("quantize", tiny_llama, "-o", tmp_path / "same", *arguments, "--json")
    assert made.data["bits"] == same.data["bits"]
    assert (tmp_path / "yes" / "modeling_own.py").is_file()
