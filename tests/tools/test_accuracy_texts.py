"""Wiki markup to plain text, and the disjoint texts of the benchmark."""

from __future__ import annotations

import bz2
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anyquant.errors import CorruptFileError, InputError, UsageError

LONG = "This paragraph has to be long enough to count as prose, so it goes on and on for a while."


@pytest.fixture(scope="module")
def texts(accuracy: Callable[[str], Any]) -> Any:
    return accuracy("texts")


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("'''Bold''' and ''italic''.", "Bold and italic."),
        ("A [[link]], [[target|shown]], [[:Category:Named]].", "A link, shown, Category:Named."),
        ("A [[File:x.png|thumb|with [[inner]] text]]file.", "A file."),
        ("See [http://x.org the site] now [http://y.org].", "See the site now."),
        ("A{{cite|a={{b|c}}|d}} template.", "A template."),
        ("A fact.<ref>{{cite}} not this</ref> More.<ref name=\"x\" /> End.", "A fact. More. End."),
        ("Kept <!-- not\nthis --> text &amp; more", "Kept text & more"),
        ("Name (; {{lang|x}}) is short.", "Name is short."),
        ("x<sub>2</sub> and <math>\\frac{a}{b}</math> done", "x2 and done"),
    ],
)  # fmt: skip
def test_markup(texts: Any, markup: str, expected: str) -> None:
    assert texts.plain(f"{markup} {LONG}") == f"{expected} {LONG}"


def test_what_is_no_prose_is_left_out(texts: Any) -> None:
    table = f'{{| class="wikitable"\n|-\n| {LONG}\n{{|\n| nested\n|}}\n|}}'
    lines = [
        "{{Infobox\n| name = x\n}}", "== Heading ==", LONG, f"* {LONG}", f"# {LONG}", f": {LONG}", table, "short",
        f"[[Category:Things of {LONG}]]", f"Unbalanced {{{{template {LONG}", f"Second. {LONG}",
    ]  # fmt: skip
    assert texts.plain("\n".join(lines)) == f"{LONG}\nSecond. {LONG}"


def dump(tmp_path: Path, pages: list[tuple[str, str, str]]) -> Path:
    """A dump of (title, namespace, markup)."""
    inside = "".join(
        f"<page><title>{title}</title><ns>{space}</ns>"
        + ("<redirect title='x'/>" if markup.startswith("#") else "")
        + f"<revision><text>{markup}</text></revision></page>"
        for title, space, markup in pages
    )
    path = tmp_path / "dump.bz2"
    path.write_bytes(bz2.compress(f"<mediawiki xmlns='http://x/'>{inside}</mediawiki>".encode()))
    return path


def test_articles_alone_are_read(texts: Any, tmp_path: Path) -> None:
    path = dump(tmp_path, [("A", "0", "a"), ("Talk", "1", "b"), ("R", "0", "#REDIRECT"), ("C", "0", "")])
    assert [(page.title, page.markup) for page in texts.pages(path)] == [("A", "a"), ("C", "")]


def test_damaged_and_missing_dumps_are_told(texts: Any, tmp_path: Path) -> None:
    path = dump(tmp_path, [("A", "0", "a" * 5000)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptFileError, match="damaged"):
        list(texts.pages(path))
    with pytest.raises(InputError, match="cannot read"):
        list(texts.pages(tmp_path / "none"))


def test_a_dump_without_articles_is_told(texts: Any, tmp_path: Path) -> None:
    (tmp_path / "news").write_text("News.\n")
    with pytest.raises(InputError, match=r"no text for wikipedia\.txt"):
        texts.write_texts(tmp_path / "news", dump(tmp_path, [("R", "0", "#REDIRECT")]), tmp_path / "out")


def test_sentences_come_from_different_lines(texts: Any) -> None:
    lines = [f"Sentence number {i} is here, and it is long enough. " * 2 + "No." for i in range(30)]
    found = texts.sentences("\n".join(lines), 20, least=20, most=60)
    assert len({sentence.split()[2] for sentence in found}) == 20
    assert found == texts.sentences("\n".join(lines), 20, least=20, most=60)
    assert found != texts.sentences("\n".join(lines), 20, seed=1, least=20, most=60)
    with pytest.raises(InputError, match="30 lines"):
        texts.sentences("\n".join(lines), 31, least=20, most=60)


def test_prose_that_two_texts_share_is_seen_and_refused(
    texts: Any, accuracy: Callable[[str], Any], script: Callable[[str], Any], tiny_llama: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text(f"History\n{LONG}\nThis is said here alone.\n", encoding="utf-8")
    second.write_text(f"History\n  {LONG} \nThat is said there.\n", encoding="utf-8")
    assert texts.shared_lines(first, second) == {LONG}
    material = accuracy("material").material
    with pytest.raises(UsageError, match="have 1 lines in common, such as 'This paragraph"):
        material(str(tiny_llama), str(first), second, tmp_path)
    second.write_text("History\nThat is said there.\n", encoding="utf-8")
    assert not texts.shared_lines(first, second)  # headings are no prose
    assert material(str(tiny_llama), str(first), second, tmp_path).evaluation == second


@pytest.mark.slow
def test_the_real_texts_share_no_line_and_are_long_enough(
    texts: Any, real_text: Path, real_wiki: Path, real_gguf: Path, tmp_path: Path
) -> None:
    from anyquant.checkpoint import open_checkpoint
    from anyquant.validation.texts import load_tokenizer, read_text, token_ids

    found = texts.write_texts(real_text, real_wiki, tmp_path)
    files = (found.news, found.wikipedia, found.evaluation)
    lines = [path.read_text(encoding="utf-8").splitlines() for path in files]
    assert [len(part) for part in lines] == [300, 1377, 3452]
    for first, second in ((0, 2), (1, 2), (0, 1)):
        assert not texts.shared_lines(files[first], files[second])
    text = "\n".join(lines[1] + lines[2])
    assert not any(mark in text for mark in ("[[", "]]", "{{", "}}", "<ref", "'''", "&amp;", "&nbsp;"))
    assert "Anarchism is a political philosophy that advocates self-governed societies" in text
    open_checkpoint(str(real_gguf)).write_side_files(tmp_path / "model")
    tokens = token_ids(load_tokenizer(tmp_path / "model"), read_text(found.evaluation))
    assert len(tokens) > 10 * texts.WINDOWS * texts.WINDOW
    assert texts.WINDOWS * texts.WINDOW >= 30_000
