"""Texts, windows, prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant.errors import InputError, MissingDependency
from anyquant.validation import texts


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return texts.load_tokenizer(tiny_llama)


def test_windows_do_not_overlap_and_keep_their_order() -> None:
    found = texts.cut_windows(range(1000), 64, 5, seed=1)
    assert found.ids.shape == (5, 64)
    assert (found.tokens, found.available) == (1000, 15)
    assert (np.diff(found.ids, axis=1) == 1).all()
    starts = found.ids[:, 0]
    assert (starts % 64 == 0).all()
    assert (np.diff(starts) > 0).all()
    assert not np.array_equal(starts, texts.cut_windows(range(1000), 64, 5, seed=2).ids[:, 0])


def test_all_windows_where_the_text_has_no_more() -> None:
    found = texts.cut_windows(range(130), 64, 16)
    assert found.ids[:, 0].tolist() == [0, 64]


def test_a_leading_token_takes_one_place() -> None:
    found = texts.cut_windows(range(100, 200), 11, 16, leading=1)
    assert found.ids.shape == (10, 11)
    assert (found.ids[:, 0] == 1).all()
    assert found.ids[:, 1:].ravel().tolist() == list(range(100, 200))


def test_a_short_text_is_refused_with_the_numbers() -> None:
    with pytest.raises(InputError, match=r"notes\.txt has 300 tokens, but one window needs 512"):
        texts.cut_windows(range(300), 512, 16, name="notes.txt")


@pytest.mark.parametrize(
    ("window", "windows", "context", "length", "words"),
    [
        (600, 8, 4096, 600, []),
        (600, 8, 77, 77, ["77 tokens"]),
        (64, 8, None, 64, ["64 tokens"]),
        (64, 7, None, 64, ["64 tokens", "7 windows are rough"]),
        (600, 1, None, 600, ["single window"]),
    ],
)
def test_notes_say_how_far_errors_can_be_trusted(
    tmp_path: Path, window: int, windows: int, context: int | None, length: int, words: list[str]
) -> None:
    (tmp_path / "text").write_text("x" * 6000)
    config = {"max_position_embeddings": context} if context else {}
    found, notes = texts.cut_text(tmp_path / "text", Plain(), config, window=window, windows=windows, seed=1)
    assert found.ids.shape == (windows, length)
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


def test_read_text(tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_bytes("Größe\n".encode())
    assert texts.read_text(good) == "Größe\n"
    bad = tmp_path / "bad.txt"
    bad.write_bytes("Größe".encode("latin1"))
    with pytest.raises(InputError, match=r"not UTF-8: byte 2"):
        texts.read_text(bad)
    with pytest.raises(InputError, match="cannot read the text"):
        texts.read_text(tmp_path / "none.txt")


def test_tokens_round_trip_and_prompts(tokenizer: Any) -> None:
    ids = texts.token_ids(tokenizer, "what is the time?")
    assert tokenizer.decode(ids) == "what is the time?"
    assert texts.leading_token(tokenizer) is None
    prompt = texts.prompt_ids(tokenizer, "hello")
    assert prompt[0] == tokenizer.bos_token_id
    assert prompt.count(tokenizer.bos_token_id) == 2  # one for the question, one for the answer to come
    words = tokenizer.decode(prompt).split()
    assert [word for word in words if word[0] != "<"] == ["user", "hello</s>", "assistant"]


class Plain:
    """A tokenizer without a chat template that puts 1 before a text."""

    bos_token_id, eos_token_id, chat_template = 1, 2, None

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        ids = [ord(c) for c in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))


def test_a_tokenizer_that_leads_with_bos() -> None:
    assert texts.leading_token(Plain()) == 1
    assert texts.prompt_ids(Plain(), "ab") == [1, 97, 98]


def test_answers_end_at_an_end_token() -> None:
    stops = texts.stop_ids(Plain(), {"eos_token_id": [120, 121]})
    assert stops == {2, 120, 121}
    assert texts.decode(Plain(), [97, 98, 120, 97], stops) == "ab"
    assert texts.decode(Plain(), [97, 98], stops) == "ab"


def test_context_length() -> None:
    assert texts.context_length({"max_position_embeddings": 77}) == 77
    assert texts.context_length({"n_positions": 256}) == 256
    assert texts.context_length({"text_config": {"max_position_embeddings": 9}}) == 9
    assert texts.context_length({"hidden_size": 3}) is None


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer can be loaded"):
        texts.load_tokenizer(tmp_path)


def test_missing_transformers_names_no_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependency, match=r"pip install transformers$"):
        texts.load_tokenizer(tmp_path)
