"""The tokenizer among the key-values of llama.cpp's converter, beside the source's own files.

What the converter leaves to llama.cpp's defaults, or gets wrong, is said here in key-values, so that llama.cpp makes
the tokens of the source; what would be lost refuses the export. How texts are split cannot be told from key-values:
``anyquant validate`` lets llama.cpp read some.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from anyquant.errors import CorruptFileError, ExportRefused
from anyquant.exporters.gguf import container
from anyquant.exporters.gguf.converter import NEWER
from anyquant.gguf_container import Header, parse
from anyquant.ir.json_io import read_json

CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_FLOAT, _STRING, _INT = 6, 8, 5  # GGUF's numbers of value types
_UNUSED = 5  # the type of a token that stands for nothing
_ALSO_EOS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def settled(made: bytes, files: Mapping[str, Path], vocabulary: int | None) -> dict[str, bytes]:
    """Compare the converter's tokenizer with the source's, and return the key-values to add or replace.

    Args:
        made: the converter's file.
        files: that lie beside the source's weights.
        vocabulary: rows of the embedding, where they are known.

    Raises:
        ExportRefused: tokens or a chat template would be lost, or some tokens have no embedding.
        CorruptFileError: a file of the tokenizer cannot be read.
    """
    return _settled(made, tuple(sorted(files.items())), vocabulary)


@lru_cache(maxsize=2)  # planning asks for the same model again and again
def _settled(made: bytes, listed: tuple[tuple[str, Path], ...], vocabulary: int | None) -> dict[str, bytes]:
    header, files = parse(made, "the converter's output"), dict(listed)
    tokens: list[str] = header.get("tokenizer.ggml.tokens", list, [])
    if not tokens:
        raise ExportRefused("llama.cpp's converter wrote no vocabulary. Check the tokenizer files of the model.")
    if vocabulary is not None and len(tokens) > vocabulary:
        raise ExportRefused(
            f"the tokenizer has {len(tokens):,} tokens and the model embeddings for {vocabulary:,}: llama.cpp cannot "
            f"load such a file. Next: take the tokens from {tokens[vocabulary]!r} on out of {TOKENIZER}."
        )
    _check_templates(header, templates(files))
    config = read_json(files[CONFIG]) if CONFIG in files else {}
    if TOKENIZER not in files:
        return _special_ids(header, config, {token: number for number, token in enumerate(tokens)})
    try:
        tokenizer = Tokenizer.from_file(str(files[TOKENIZER]))
    except Exception as error:  # the library raises nothing more special
        raise CorruptFileError(f"{files[TOKENIZER]} holds no tokenizer ({error}). Copy it again.") from None
    _check_tokens(tokens, tokenizer)
    numbers = tokenizer.get_vocab(with_added_tokens=True)
    changes = _special_ids(header, config, numbers)
    changes["tokenizer.ggml.add_bos_token"] = container.bool_value(_adds_bos(tokenizer, config, numbers))
    if header.get("tokenizer.ggml.model") == "llama":
        changes |= _sentence_pieces(header, tokens, tokenizer, files[TOKENIZER], vocabulary or 0)
    return changes


def _text(config: Mapping[str, Any], kind: str) -> str | None:
    """The text of a special token, as a tokenizer_config.json gives it."""
    found = config.get(f"{kind}_token")
    found = found.get("content") if isinstance(found, dict) else found
    return found if isinstance(found, str) else None


def _special_ids(header: Header, config: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, bytes]:
    """Ids of special tokens that the converter did not find, or took from config.json instead of the tokenizer."""
    changes = {}
    for kind, name in _IDS.items():
        number = numbers.get(_text(config, kind) or "")
        key = f"tokenizer.ggml.{name}_token_id"
        # The end of a turn may have a key of its own, where another token ends texts.
        known = [header.get(k) for k in (key, *(_ALSO_EOS if kind == "eos" else ()))]
        if number is not None and number not in known:
            changes[key] = container.uint32_value(number)
    return changes


def _adds_bos(tokenizer: Tokenizer, config: Mapping[str, Any], numbers: Mapping[str, int]) -> bool:
    bos = numbers.get(_text(config, "bos") or "")
    if bos is None or isinstance(config.get("add_bos_token"), bool):
        return bos is not None and config["add_bos_token"]
    return tokenizer.encode("a").ids[:1] == [bos]


def _sentence_pieces(
    header: Header, tokens: list[str], tokenizer: Tokenizer, path: Path, vocabulary: int
) -> dict[str, bytes]:
    """What the converter leaves out where there is no tokenizer.model: the order of merges, rows that have no token."""
    first = tokenizer.encode("a", add_special_tokens=False).tokens[:1]
    prefix = bool(first) and first[0].startswith("▁")
    changes = {"tokenizer.ggml.add_space_prefix": container.bool_value(prefix)}
    scores: list[float] = header.get("tokenizer.ggml.scores", list, [])
    if len(set(scores)) > 1:
        return changes
    # llama.cpp merges to the piece of the highest score first, tokenizers by the first merge that applies.
    ranks: dict[str, int] = {}
    merges = read_json(path)["model"].get("merges", [])
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), rank)
    types = header.get("tokenizer.ggml.token_type", list, [])
    missing = range(len(tokens), vocabulary)
    changes["tokenizer.ggml.scores"] = container.array_value(
        _FLOAT, [-float(ranks.get(token, len(merges))) for token in tokens] + [-float(len(merges))] * len(missing)
    )
    if missing:
        changes["tokenizer.ggml.tokens"] = container.array_value(_STRING, [*tokens, *(f"[PAD{i}]" for i in missing)])
        changes["tokenizer.ggml.token_type"] = container.array_value(_INT, types + [_UNUSED] * len(missing))
    return changes


def _check_tokens(tokens: list[str], tokenizer: Tokenizer) -> None:
    """Every token of tokenizer.json that has a row must be at its place."""
    numbers = tokenizer.get_vocab(with_added_tokens=True)
    wrong = [
        number
        for text, number in sorted(numbers.items(), key=lambda item: item[1])
        if number < len(tokens) and tokens[number] != text and not _same(tokens[number], text, tokenizer, number)
    ]
    if wrong:
        names = {number: text for text, number in numbers.items()}
        raise ExportRefused(
            f"llama.cpp's converter writes {len(wrong):,} tokens that are others in {TOKENIZER}: the first is "
            f"{wrong[0]}, {tokens[wrong[0]]!r} instead of {names[wrong[0]]!r}. Next: if tokenizer.model beside it is "
            "of another model, remove it; else take both from the original model."
        )


def _same(made: str, text: str, tokenizer: Tokenizer, number: int) -> bool:
    """Say whether the converter's text is one of the forms that it gives added tokens, or that of a byte."""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", made):
        return text == chr(int(byte[1], 16))
    return made in (text.replace("▁", " "), tokenizer.decode([number], skip_special_tokens=False))


def templates(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the chat templates of a source by name, as transformers finds them.

    Raises:
        CorruptFileError: a file that may hold one is not readable.
    """
    if "chat_template.jinja" in files:
        try:
            return {"default": files["chat_template.jinja"].read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise CorruptFileError(f"{files['chat_template.jinja']} is not UTF-8 ({error})") from None
    for name in (CONFIG, "chat_template.json"):
        found = read_json(files[name]).get("chat_template") if name in files else None
        if isinstance(found, list):
            return {str(entry.get("name")): str(entry.get("template")) for entry in found if isinstance(entry, dict)}
        if found:
            return found if isinstance(found, dict) else {"default": str(found)}
    return {}


def _check_templates(header: Header, expected: Mapping[str, str]) -> None:
    if expected and "default" not in expected:
        raise ExportRefused(
            f"the model has chat templates ({', '.join(sorted(expected))}), but none is called default, and chats "
            f"would go wrong silently. Next: save one as chat_template.jinja in the model's folder."
        )
    for name, text in expected.items():
        plain = re.sub("[^A-Za-z0-9]", "_", name)
        found = header.get("tokenizer.chat_template" + ("" if name == "default" else f".{plain}"))
        if found != text:
            which = "a chat template" if name == "default" else f"a chat template {name!r}"
            raise ExportRefused(
                f"the model has {which}, but llama.cpp's converter "
                f"{'lost it' if found is None else 'wrote another'}, and chats would go wrong silently. Next: put it "
                f"into {CONFIG}, as text under the key chat_template. {NEWER}"
            )
