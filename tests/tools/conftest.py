"""The package tools/accuracy, which is not installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
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
