"""Texts to calibrate and to evaluate on, which share no sentence.

Calibration: the news articles of the tests, or pages of Wikipedia. Evaluation: other pages of Wikipedia. A page goes to
one of the two by a hash of its title, so a page that changes in the dump stays where it is.
"""

from __future__ import annotations

import bz2
import hashlib
import html
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from anyquant.errors import CorruptFileError, InputError, MachineError
from anyquant.validation.texts import read_text

WINDOW = 512
WINDOWS = 60
_SHARE = 4  # one page in so many is for calibration
_SHORT = 80  # characters; shorter lines are headings, captions, remains of tables
_NEVER = ("Media", "File", "Image", "Category")

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_WITH_CONTENT = re.compile(
    r"<(ref|math|gallery|timeline|score|code|source|syntaxhighlight|pre|chem|imagemap|table|div)\b[^>]*?(?<!/)>.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_OUTSIDE = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]+ ?([^\]]*)\]")
_MAGIC = re.compile(r"__[A-Z]+__")
_EMPTY = re.compile(r"\(\s*[,;:.\s]*\)")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


@dataclass(frozen=True)
class Page:
    """An article of a dump: its title, and its text in wiki markup."""

    title: str
    markup: str


@dataclass(frozen=True)
class Texts:
    """Files of plain text in UTF-8, a paragraph on a line.

    Attributes:
        news: calibration, news articles.
        wikipedia: calibration, of the kind that is evaluated.
        evaluation: other pages of Wikipedia.
    """

    news: Path
    wikipedia: Path
    evaluation: Path


def write_texts(news: Path, dump: Path, folder: Path) -> Texts:
    """Write the three texts into a folder.

    Args:
        news: UTF-8, an article on a line.
        dump: of Wikipedia, XML in bzip2.
        folder: made where it is missing.

    Raises:
        InputError: a file is missing, or has no article.
        CorruptFileError: the dump is damaged.
        MachineError: the folder cannot be written.
    """
    parts: dict[bool, list[str]] = {True: [], False: []}
    for page in pages(dump):
        text = plain(page.markup)
        if text:
            parts[for_calibration(page.title)].append(text)
    articles = "\n".join(line for line in read_text(news).splitlines() if line.strip())
    found = Texts(folder / "news.txt", folder / "wikipedia.txt", folder / "evaluation.txt")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (found.news, articles),
            (found.wikipedia, "\n".join(parts[True])),
            (found.evaluation, "\n".join(parts[False])),
        ):
            if not text:
                raise InputError(f"{news if path == found.news else dump} has no text for {path.name}.")
            path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise MachineError(f"cannot write texts to {folder}: {error.strerror or error}") from error
    return found


def pages(dump: Path) -> Iterator[Page]:
    """The articles of a Wikipedia dump in its order, without redirects.

    Raises:
        InputError: the file cannot be read.
        CorruptFileError: it is no bzip2 of XML, or ends early.
    """
    title, space, redirects, markup = "", "", False, ""
    try:
        with bz2.open(dump) as file:
            for event, element in ElementTree.iterparse(file, ("start", "end")):
                tag = element.tag.rpartition("}")[2]
                if event == "start":
                    if tag == "page":
                        title, space, redirects, markup = "", "", False, ""
                elif tag == "title":
                    title = element.text or ""
                elif tag == "ns":
                    space = element.text or ""
                elif tag == "redirect":
                    redirects = True
                elif tag == "text":
                    markup = element.text or ""
                elif tag == "page":
                    element.clear()
                    if space == "0" and not redirects:
                        yield Page(title, markup)
    except (EOFError, ElementTree.ParseError) as error:
        raise CorruptFileError(f"{dump} is damaged: {error}. Fetch it again.") from error
    except OSError as error:
        raise InputError(f"cannot read the dump {dump}: {error.strerror or error}") from error


def for_calibration(title: str) -> bool:
    """Whether a page is for calibration; else it is for evaluation."""
    return hashlib.sha256(title.encode()).digest()[0] % _SHARE == 0


def plain(markup: str) -> str:
    """The paragraphs of an article as plain text, one on a line.

    Templates, tables, references, formulas, files, lists and headings are left out; of links the visible text stays.
    """
    text = _COMMENT.sub("", markup)
    text = _until_stable(_TEMPLATE, "", _WITH_CONTENT.sub("", re.sub(r"<ref\b[^<>]*/>", "", text)))
    text = _until_stable(_TABLE, "", text)
    text = _until_stable(_LINK, _shown, text)
    text = _OUTSIDE.sub(r"\1", text)
    text = _TAG.sub("", text)
    text = _MAGIC.sub("", text).replace("'''", "").replace("''", "")
    text = html.unescape(text).replace("\u00a0", " ")
    return "\n".join(line for line in map(_tidy, text.splitlines()) if _is_prose(line))


def sentences(text: str, count: int, *, seed: int = 0, least: int = 40, most: int = 400) -> list[str]:
    """Sentences of a text, at most one from each of its lines, drawn at random and kept in order.

    Args:
        text: a paragraph on a line.
        count: wanted.
        seed: of the draw.
        least: characters.
        most: characters.

    Raises:
        InputError: there are too few.
    """
    generator = np.random.default_rng(seed)
    found = []
    for line in text.splitlines():
        fitting = [sentence for sentence in _SENTENCE.split(line) if least <= len(sentence) <= most]
        if fitting:
            found.append(fitting[int(generator.integers(len(fitting)))])
    found = list(dict.fromkeys(found))
    if len(found) < count:
        raise InputError(
            f"the text has {len(found):,} lines with a sentence of {least}..{most} characters, not {count:,}"
        )
    chosen = np.sort(generator.choice(len(found), count, replace=False))
    return [found[i] for i in chosen]


def shared_lines(first: Path, second: Path) -> set[str]:
    """Lines of prose that two texts have in common, but for white space: none, if they are disjoint.

    Short ones are headings and the like, which any two texts may share.

    Raises:
        InputError: one cannot be read.
    """
    one, other = ({line.strip() for line in read_text(path).splitlines()} for path in (first, second))
    return {line for line in one & other if len(line) >= _SHORT}


def _until_stable(pattern: re.Pattern[str], replacement: str | Callable[[re.Match[str]], str], text: str) -> str:
    """Substitute from the inside out, until nothing is left that matches."""
    while True:
        text, count = pattern.subn(replacement, text)
        if not count:
            return text


def _shown(link: re.Match[str]) -> str:
    """What a link [[target|shown]] shows; nothing of files and categories."""
    target, *rest = link[1].split("|")
    if target.strip().startswith(tuple(f"{space}:" for space in _NEVER)):
        return ""
    return rest[-1] if rest else target.lstrip(":")


def _tidy(line: str) -> str:
    return re.sub(r"\s+([,.;:)])", r"\1", re.sub(r"\s+", " ", _EMPTY.sub("", line))).strip()


def _is_prose(line: str) -> bool:
    """A paragraph: long, begins like a sentence, and holds no remains of markup."""
    if len(line) < _SHORT or not (line[0].isalnum() or line[0] in "\"'(\u201c\u2018"):
        return False
    return not any(mark in line for mark in ("{", "}", "[[", "]]", "||", "<", "|"))
