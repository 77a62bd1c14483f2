"""What is put right of the converter's tokenizer, and what refuses an export rather than be lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from anyquant import Job, Target, ir
from anyquant.checkpoint import open_checkpoint
from anyquant.errors import CorruptFileError, ExportRefused
from anyquant.exporters.gguf import GGUFExporter, container, metadata, tokenizer
from anyquant.exporters.protocol import ExportOptions
from anyquant.gguf_container import Header
from anyquant.planning import plan

PIECES = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "▁a", "ab"]
MERGES = [("a", "b"), ("▁", "a")]
Settle = Callable[..., Header]


def _pieces(**more: Any) -> Tokenizer:
    made = Tokenizer(models.BPE({text: i for i, text in enumerate(PIECES)}, MERGES, unk_token="<unk>", **more))
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in PIECES[:3]])
    return made


@pytest.fixture
def settle(raw_value: Callable[[object], bytes], tmp_path: Path) -> Settle:
    """settle(tokenizer, config, rows=None, files={}, **key-values) -> the header with what is put right."""

    def run(
        source: Tokenizer | None,
        config: dict[str, Any] | None = None,
        rows: int | None = None,
        files: dict[str, str] | None = None,
        **values: object,
    ) -> Header:
        texts = {"tokenizer_config.json": json.dumps(config or {}), **(files or {})}
        if source is not None:
            texts["tokenizer.json"] = source.to_str()
        paths = {name: tmp_path / name for name in texts}
        for name, path in paths.items():
            path.write_text(texts[name], encoding="utf-8")
        named = {"tokenizer__ggml__tokens": PIECES, **values}
        kept = {key.replace("__", "."): v if isinstance(v, bytes) else raw_value(v) for key, v in named.items()}
        made = container.header_bytes(kept, [])
        tokenizer._settled.cache_clear()
        return Header("x", kept | tokenizer.settled(made, paths, rows), {}, 32, 0, 0)

    return run


def test_special_tokens_are_those_of_the_tokenizer(settle: Settle) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "ab"}, "pad_token": "none such", "unk_token": None}
    for source in (_pieces(), None):  # by tokenizer.json, or by the texts in the file
        found = settle(source, config, tokenizer__ggml__eos_token_id=2)
        assert found.get("tokenizer.ggml.bos_token_id") == 1
        assert found.get("tokenizer.ggml.eos_token_id") == 8
        assert "tokenizer.ggml.padding_token_id" not in found.values
    turn = settle(_pieces(), config, tokenizer__ggml__eos_token_id=2, tokenizer__ggml__eot_token_id=8)
    assert turn.get("tokenizer.ggml.eos_token_id") == 2


def test_the_token_before_a_text_is_that_of_the_tokenizer(settle: Settle) -> None:
    """llama.cpp would put one before every text of sentence pieces."""
    key, adding = "tokenizer.ggml.add_bos_token", _pieces()
    adding.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    assert settle(_pieces(), {"bos_token": "<s>"}).get(key) is False
    assert settle(adding, {"bos_token": "<s>"}).get(key) is True
    assert settle(adding, {"bos_token": "<s>", "add_bos_token": False}).get(key) is False
    assert settle(_pieces(), {"bos_token": "<s>", "add_bos_token": True}).get(key) is True
    assert settle(_pieces(), {"add_bos_token": True}).get(key) is False


def test_merges_become_scores_where_the_converter_wrote_none(settle: Settle) -> None:
    llama = {
        "tokenizer__ggml__model": "llama",
        "tokenizer__ggml__scores": container.array_value(6, [-1000.0] * len(PIECES)),
        "tokenizer__ggml__token_type": container.array_value(5, [1] * len(PIECES)),
    }
    found = settle(_pieces(), rows=11, **llama)
    assert found.get("tokenizer.ggml.scores") == [-2.0] * 7 + [-1.0, 0.0] + [-2.0] * 2
    assert found.get("tokenizer.ggml.tokens") == [*PIECES, "[PAD9]", "[PAD10]"]
    assert found.get("tokenizer.ggml.token_type") == [1] * 9 + [5] * 2
    assert found.get("tokenizer.ggml.add_space_prefix") is False
    scores = container.array_value(6, [*range(len(PIECES))])
    spaced = _pieces()
    spaced.pre_tokenizer = pre_tokenizers.Metaspace()
    kept = settle(spaced, **{**llama, "tokenizer__ggml__scores": scores})
    assert kept.values["tokenizer.ggml.scores"] == scores
    assert kept.get("tokenizer.ggml.add_space_prefix") is True


def test_lost_tokens_are_refused(settle: Settle) -> None:
    source = _pieces()
    source.add_tokens(["<tool>"])
    settle(source)  # no embedding has this number
    with pytest.raises(ExportRefused, match=r"1 tokens .* 9, '\[PAD9\]' instead of '<tool>'.*tokenizer\.model"):
        settle(source, tokenizer__ggml__tokens=[*PIECES, "[PAD9]"])
    with pytest.raises(ExportRefused, match=r"9 tokens and the model embeddings for 8: .*'ab'"):
        settle(_pieces(), rows=8)
    with pytest.raises(CorruptFileError, match=r"tokenizer\.json holds no tokenizer"):
        settle(None, files={"tokenizer.json": "{}"})


def test_forms_that_the_converter_gives_tokens_are_no_loss(settle: Settle) -> None:
    source = _pieces()
    source.decoder = decoders.Replace("▁", " ")
    source.add_tokens(["▁▁"])
    settle(source, tokenizer__ggml__tokens=[*PIECES, "  "])
    newline = Tokenizer(models.BPE({"\n" if text == "<0x0A>" else text: i for i, text in enumerate(PIECES)}, MERGES))
    settle(newline)  # Gemma has a tab in the place of its byte


JINJA, CONFIG = "chat_template.jinja", "tokenizer_config.json"


@pytest.mark.parametrize(
    ("files", "config", "expected"),
    [
        ({JINJA: "x"}, {}, {"default": "x"}),
        ({JINJA: "x"}, {"chat_template": "y"}, {"default": "x"}),
        ({}, {"chat_template": "y"}, {"default": "y"}),
        ({"chat_template.json": '{"chat_template": "z"}'}, {}, {"default": "z"}),
        ({}, {"chat_template": [{"name": "default", "template": "d"}, {"name": "t", "template": "u"}]}, None),
        ({}, {}, {}),
    ],
)
def test_where_chat_templates_may_be(
    files: dict[str, str], config: dict[str, Any], expected: dict[str, str] | None, tmp_path: Path
) -> None:
    written = {**files, CONFIG: json.dumps(config)}
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    found = tokenizer.templates({name: tmp_path / name for name in written})
    assert found == ({"default": "d", "t": "u"} if expected is None else expected)
    assert tokenizer.templates({}) == {}


def test_lost_templates_are_refused(settle: Settle, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool-use", "template": "t"}]
    kept = {"tokenizer__chat_template": "d", "tokenizer__chat_template__tool_use": "t"}
    settle(_pieces(), {"chat_template": named}, **kept)
    with pytest.raises(ExportRefused, match=r"'tool-use', .* lost it, .*LLAMA_CPP_ROOT"):
        settle(_pieces(), {"chat_template": named}, tokenizer__chat_template="d")
    with pytest.raises(ExportRefused, match=r"wrote another, .*into tokenizer_config\.json"):
        settle(_pieces(), {"chat_template": "d"}, tokenizer__chat_template="other")
    with pytest.raises(ExportRefused, match=r"\(tool-use\), but none is called default.*chat_template\.jinja"):
        settle(_pieces(), {"chat_template": named[1:]}, **kept)
    (tmp_path / JINJA).write_bytes("ü".encode("latin-1"))
    with pytest.raises(CorruptFileError, match="not UTF-8"):
        tokenizer.templates({JINJA: tmp_path / JINJA})


def _planned(folder: Path) -> ir.Model:
    return plan(open_checkpoint(str(folder)), Job("block", Target(bits=4.25))).model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("llama", "BPE pre-tokenizer was not recognized"),
        ("qwen2", "BPE pre-tokenizer was not recognized"),
        ("gpt2", "BPE pre-tokenizer was not recognized"),
        ("gemma2", "tokenizer.model of the original model"),
        ("phi3", "tokenizer.model of the original model"),
    ],
)
def test_an_unknown_tokenizer_is_an_error_that_says_what_to_do(
    family: str, message: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_checkpoint(family), folder)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    unknown = Tokenizer(models.BPE(letters, []))
    unknown.pre_tokenizer = pre_tokenizers.ByteLevel(use_regex=False)
    unknown.save(str(folder / "tokenizer.json"))
    with pytest.raises(ExportRefused, match=rf"(?s){message}.*Or set LLAMA_CPP_ROOT"):
        GGUFExporter().check(_planned(folder), ExportOptions())


@pytest.mark.slow
@pytest.mark.parametrize("overridden", [False, True])
def test_chat_templates_arrive_as_transformers_reads_them(
    overridden: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    config = json.loads((folder / CONFIG).read_text())
    templates = {"default": "d", "tool_use": "t"}
    config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    (folder / CONFIG).write_text(json.dumps(config))
    if not overridden:
        (folder / JINJA).unlink()
    values = metadata.load(_planned(folder)).values
    found = AutoTokenizer.from_pretrained(folder).chat_template
    named = {"default": found} if isinstance(found, str) else found
    assert len(named) == 2 - overridden
    for name, text in named.items():
        key = "tokenizer.chat_template" + ("" if name == "default" else f".{name}")
        assert values[key] == container.string_value(text)


def test_templates_in_a_folder_are_said_to_be_left_behind(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, saved, out = tmp_path / "tiny", tmp_path / "saved", tmp_path / "out"
    shutil.copytree(tiny_llama, folder)
    made = AutoTokenizer.from_pretrained(folder)
    made.chat_template = {"default": "d", "tool_use": "t"}
    made.save_pretrained(folder)
    open_checkpoint(str(folder)).write_side_files(out)
    assert "additional_chat_templates" in caplog.text
    assert "save_jinja_files=False" in caplog.text
    # What it says to do keeps both.
    made.save_pretrained(saved, save_jinja_files=False)
    files = {path.name: path for path in saved.iterdir()}
    assert tokenizer.templates(files) == made.chat_template
