"""Every family with a real vocabulary, or one trained by its rules: llama.cpp makes the tokens of the source."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_utils_base import generate_merges

from anyquant import Job, Target, ir, quantize
from anyquant.exporters.gguf import GGUFExporter
from anyquant.exporters.protocol import ExportOptions
from anyquant.gguf_container import parse
from anyquant.validation import texts, tokens
from anyquant.validation.runners import RunnerSpec, open_runner
from anyquant.validation.runners.llamacpp import LlamaCppRunner

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = "<s>{% for message in messages %}[INST] {{ message.content }} [/INST]{% endfor %}"
TURNS = (
    "<bos>{% for message in messages %}<start_of_turn>{{ message.role }}\n{{ message.content }}<end_of_turn>\n"
    "{% endfor %}<start_of_turn>model\n"
)
PHI = "{% for message in messages %}<|user|>\n{{ message.content }}<|end|>\n{% endfor %}<|assistant|>\n"
ROWS = {
    "mistral": 32003,
    "gpt2": 50257,
    "qwen2": 151646,
    "qwen3": 151936,  # some stand for no token, as in the real model
    "gemma": 800,
    "gemma2": 800,
    "phi3": 32064,
}
RUNS = tuple(white * count for white in ("\n", "▁") for count in range(2, 8))
PROBE = "".join(tokens.PROBE.values())


def _specials(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, normalized=False, special=True) for text in texts]


def _write(folder: Path, tokenizer: Tokenizer, template: str | None, **described: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


@lru_cache
def _qwen(file: Path) -> Tokenizer:
    """Qwen's tokenizer, of the ranks that tiktoken takes: the merge that makes a token is the last of its own."""
    letters = bytes_to_unicode()
    ranks = {base64.b64decode(text): int(rank) for text, rank in map(bytes.split, file.read_bytes().splitlines())}
    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            first = pairs.index(min(pairs))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append(tuple("".join(letters[byte] for byte in part) for part in parts))
    vocabulary = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_specials("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    return tokenizer


def _gpt2(folder: Path, vocabulary: Path, merges: Path) -> None:
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_specials("<|endoftext|>"))
    end = {f"{kind}_token": "<|endoftext|>" for kind in ("bos", "eos", "unk")}
    _write(folder, tokenizer, None, tokenizer_class="GPT2Tokenizer", **end)


def _sentence_pieces(
    folder: Path,
    model: Path,
    *,
    added: tuple[str, ...] = (),
    runs: tuple[str, ...] = (),
    prefix: bool = True,
    keep: bool = True,
) -> None:
    """tokenizer.json of a sentencepiece model as Llama 2, Mistral, Phi-3 and Gemma have it, and the model to keep."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = [pieces.id_to_piece(i) for i in range(len(pieces))]
    scores = {text: pieces.get_score(i) for i, text in enumerate(texts)}
    numbers = {text: i for i, text in enumerate(texts)}
    merges = generate_merges(numbers, scores)
    tokenizer = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    before = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    tokenizer.decoder = decoders.Sequence(steps)
    control = [text for i, text in enumerate(texts) if pieces.is_control(i) or pieces.is_unknown(i)]
    tokenizer.add_special_tokens(_specials(*control, *added))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in runs])
    bos, eos = pieces.id_to_piece(pieces.bos_id()), pieces.id_to_piece(pieces.eos_id())
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{bos} $A", f"{bos} $A {bos} $B", [(bos, pieces.bos_id())]
    )
    plain = tokenizer.encode(PROBE, add_special_tokens=False).ids
    assert plain == pieces.encode(PROBE)  # a third implementation
    template = PHI if added else INST if prefix else TURNS
    _write(folder, tokenizer, template, tokenizer_class="TokenizersBackend", bos_token=bos, eos_token=eos)
    if keep:
        shutil.copy(model, folder / "tokenizer.model")


@pytest.fixture(scope="module")
def gemma_pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of Gemma's kind: no space in front, digits apart, runs of white space as they are."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text(PROBE * 3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "gemma"),
        model_type="bpe",
        vocab_size=800,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        control_symbols=["<start_of_turn>", "<end_of_turn>"],
        user_defined_symbols=list(RUNS),
        minloglevel=9,
    )  # fmt: skip
    return folder / "gemma.model"


@pytest.fixture(scope="module")
def checkpoint(
    tiny_checkpoint: Callable[..., Path],
    with_smol_tokenizer: Callable[[Path], Path],
    real_file: Callable[[str], Path],
    gemma_pieces: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """checkpoint(kind) -> a tiny model of a family, its vocabulary as large as the real one or the trained one."""
    mistral = "mistral-vocabulary"

    def make(kind: str) -> Path:
        if kind == "llama, byte-level":
            return with_smol_tokenizer(tiny_checkpoint("llama", vocab_size=49152))
        family = kind.partition(",")[0]
        more = {"head_dim": 16} if family == "gemma" else {}
        folder = tmp_path_factory.mktemp("real") / "tiny"
        shutil.copytree(tiny_checkpoint(family, vocab_size=ROWS.get(family, 32000), **more), folder)
        if family == "gpt2":
            _gpt2(folder, real_file("gpt2-vocabulary"), real_file("gpt2-merges"))
        elif family in ("qwen2", "qwen3"):
            qwen = _qwen(real_file("qwen-vocabulary"))
            described = {"bos_token": None, "eos_token": "<|im_end|>", "unk_token": None, "pad_token": "<|endoftext|>"}
            _write(folder, qwen, CHATML, tokenizer_class="Qwen2Tokenizer", **described)
        elif family in ("gemma", "gemma2"):
            _sentence_pieces(folder, gemma_pieces, runs=RUNS, prefix=False)
        elif family == "phi3":
            _sentence_pieces(
                folder, real_file(mistral), added=("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>")
            )
        elif family == "mistral":
            _sentence_pieces(folder, real_file(mistral), added=("<|user|>", "<|end|>", "<|assistant|>"))
        else:
            _sentence_pieces(folder, real_file(mistral), keep=False)
        return folder

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pre"),
    [
        ("llama, byte-level", "smollm"),
        ("llama, no tokenizer.model", "default"),
        ("mistral", "default"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen2"),
        ("gemma", "default"),
        ("gemma2", "default"),
        ("phi3", "default"),
        ("gpt2", "gpt-2"),
    ],
)
def test_llama_cpp_makes_the_tokens_and_logits_of_the_source(
    kind: str, pre: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize(str(checkpoint(kind)), tmp_path / "ir", Job("block", Target(bits=4.25)))
    # Norms of Gemma are no short floats plus one.
    options = ExportOptions("f32", allow_rounding=kind.startswith("gemma"))
    GGUFExporter().export(ir.open_ir(tmp_path / "ir"), tmp_path / "x.gguf", options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ir")
    runner = LlamaCppRunner("GGUF", tmp_path / "x.gguf", context=64, threads=2)
    assert tokens.probe_notes(tokenizer, runner, texts.chat_text(tokenizer, "Γειά, what's new?")) == []
    ids = np.array(tokenizer(PROBE)["input_ids"][:64])
    expected = open_runner(RunnerSpec("IR", "ir", str(tmp_path / "ir"), 64, 2)).logits(ids)
    found = runner.logits(ids)
    runner.close()
    # llama.cpp takes the GELU of Gemma and GPT-2 from a table in FP16.
    assert np.abs(found - expected).max() < 5e-3 < np.abs(expected).max() / 500

    header = parse((tmp_path / "x.gguf").read_bytes(), "x")
    assert header.get("tokenizer.ggml.pre") == pre
    assert header.get("tokenizer.chat_template") == tokenizer.chat_template
    for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        number = getattr(tokenizer, f"{ours}_token_id")
        assert number is None or header.get(f"tokenizer.ggml.{theirs}_token_id") == number
