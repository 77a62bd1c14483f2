"""The package tools/accuracy, which is not installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def accuracy(repository: Path) -> Callable[[str], Any]:
    """accuracy(name): a module of tools/accuracy."""

    def load(name: str) -> ModuleType:
        if "accuracy" not in sys.modules:
            folder = repository / "tools" / "accuracy"
            spec = importlib.util.spec_from_file_location(
                "accuracy", folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
            assert spec is not None
            assert spec.loader is not None
            package = importlib.util.module_from_spec(spec)
            sys.modules["accuracy"] = package
            spec.loader.exec_module(package)
        return importlib.import_module(f"accuracy.{name}")

    return load


@pytest.fixture(scope="session")
def write_bert() -> Callable[[Path, list[str]], None]:
    """write_bert(folder, words): a tiny random BERT with a tokenizer of whole words: hidden 64, 2 layers."""

    def write(folder: Path, words: list[str]) -> None:
        import torch
        from transformers import BertConfig, BertModel

        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", *words]
        config = BertConfig(
            vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=96, max_position_embeddings=64, initializer_range=0.2,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            BertModel(config).save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
        about = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 64}
        (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")

    return write


@pytest.fixture(scope="session")
def script(repository: Path, accuracy: Callable[[str], Any]) -> Iterator[Callable[[str], ModuleType]]:
    """script(name): a script of tools/; the scripts and the package beside it are found."""
    tools = repository / "tools"

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"anyquant_tools_{name}", tools / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tools))
        accuracy("systems")
        yield load


@pytest.fixture(scope="session")
def tool(script: Callable[[str], ModuleType]) -> ModuleType:
    """benchmark_accuracy.py."""
    return script("benchmark_accuracy")


@pytest.fixture(scope="session")
def verdicts(tool: ModuleType, accuracy: Callable[[str], Any]) -> Any:
    return accuracy("verdicts")


@pytest.fixture(scope="session")
def systems(tool: ModuleType, accuracy: Callable[[str], Any]) -> Any:
    return accuracy("systems")
