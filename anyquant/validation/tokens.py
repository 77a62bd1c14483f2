"""Whether a file's own tokenizer, in its runtime, makes the tokens of the source's tokenizer.

All runners get the same token ids, so that no other comparison shows a tokenizer that was lost on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anyquant.validation.results import Gate
from anyquant.validation.runners.protocol import TextRunner

# Composed characters only (NFC): llama.cpp composes none, where tokenizers such as Qwen's do.
PROBE = {
    "Latin": "Çok güzel, naïve façade, Straße, Łódź, señor, Ærøskøbing, tiếng Việt, ﬁnal\n",
    "Cyrillic": "Привет, мир! Съешь же ещё этих мягких булок; Їжак, џак.\n",
    "Greek": "Ελληνικά: καλημέρα κόσμε, ΐ ᾧ.\n",
    "Arabic": "مرحبا بالعالم، كيف الحال؟ السَّلامُ\n",
    "Hebrew": "שָׁלוֹם עולם\n",
    "Devanagari": "नमस्ते दुनिया। १२३ किताबें\n",
    "Thai": "สวัสดีชาวโลก น้ำ\n",
    "Chinese": "你好，世界！这是一个测试。2024年\n",  # noqa: RUF001
    "Japanese": "こんにちは世界、カタカナ。ｶﾞ\n",
    "Korean": "안녕하세요 세계\n",
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇯🇵 ❤️‍🔥 🚀🚀\n",
    "digits": "0 12 345 6789 12345678901234567890 3.14159 1,000,000.00 0x1F 1e-5 ½ ² Ⅷ ① ٣٤٥\n",
    "code": "def f(x):\n    if x:\n\t\treturn  {'a': [1, 2]}  # note\n\n\n    pass\r\n\r\nclass A:\n",
    "spaces": " a  b   c    d          e\t\tf  \n \n  \n",
    "contractions": "I'm sure they've said it's John's; WE'LL see, they'd GO, DON'T. 's 'S 'RE don’t\n",  # noqa: RUF001
    "combining marks": "q\u0303 x\u030c v\u0331w\n",
    "rare spaces": "a\u00a0b\u2003c\u200bd\u2009e\u3000f\u202fg\ufeffh\u2028i\n",
    "punctuation": "!!! ??? ... --- ''' \"\"\" ``` === <b>&amp;</b> http://a.b/c?d=e&f=g @x #y $5 €7 50% (a){b}[c]\n",
    "words": "camelCase snake_case SCREAMING ALLCaps iPhone12Pro \ufffd   ",
}
"""What tokenizers differ in: scripts, digits, code, white space; name -> text."""
_SEEN = 100_000  # characters of a text that are compared


def difference(tokenizer: Any, runner: TextRunner, text: str, *, chat: bool = False) -> str | None:
    """Say in words where a runtime's tokens of a text first differ from the source's; None where they never do.

    Args:
        tokenizer: of the source, from transformers.
        runner: that has the file.
        text: names of special tokens in it are no special tokens.
        chat: they are, and the text brings all of them, as a chat template makes it.
    """
    options = {"add_special_tokens": False} if chat else {"split_special_tokens": True}
    expected = list(tokenizer(text, verbose=False, **options)["input_ids"])
    found = runner.tokenize(text, chat)
    if expected == found:
        return None
    both = zip(expected, found, strict=False)
    place = next((i for i, (a, b) in enumerate(both) if a != b), min(len(expected), len(found)))

    def shown(ids: Sequence[int]) -> str:
        return " ".join(map(repr, tokenizer.convert_ids_to_tokens(ids[place : place + 3]))) or "nothing"

    return f"token {place} is {shown(found)}, of the source's tokenizer {shown(expected)}"


def text_gate(tokenizer: Any, runner: TextRunner, text: str) -> Gate:
    """The beginning of the text that is measured must be the same tokens in the runtime."""
    found = difference(tokenizer, runner, text[:_SEEN])
    detail = "the text is the same tokens in the source's tokenizer and in the file's"
    if found:
        detail = f"the file's tokenizer makes other tokens of the text than those measured: {found}"
    return Gate("same tokens", runner.name, float(found is not None), 0.0, found is None, detail)


def probe_notes(tokenizer: Any, runner: TextRunner, chat: str | None) -> list[str]:
    """A note on what the runtime reads otherwise of PROBE, and of a text that a chat template made, if there is any."""
    wrong = {name: difference(tokenizer, runner, text) for name, text in PROBE.items()}
    if chat is not None:
        wrong["chat"] = difference(tokenizer, runner, chat, chat=True)
    wrong = {name: found for name, found in wrong.items() if found}
    if not wrong:
        return []
    name, found = next(iter(wrong.items()))
    return [
        f"{runner.name}: in {len(wrong)} samples of text ({', '.join(wrong)}) {runner.runtime} makes other tokens than "
        f"the source's tokenizer. In {name}, {found}."
    ]
