"""Numbers and settings as text, findings as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from anyquant.reporting.as_json import plain
from anyquant.reporting.estimate import Estimate
from anyquant.reporting.words import number, size, with_error, words

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (21.345, "21.3"),
        (0.0123456, "0.0123"),
        (1.7e-11, "1.70e-11"),
        (4e-4, "4.00e-4"),
        (NAN, "not finite"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_errors_cut_the_digits() -> None:
    assert with_error(Estimate(24.1357, 9, 0.412)) == "24.14 ± 0.41"
    assert with_error(Estimate(0.91234, 9, 0.0031), 100) == "91.23 ± 0.31"
    assert with_error(Estimate(1.6619e-11, 9, 2.2e-12)) == "1.66e-11 ± 2.2e-12"
    assert with_error(Estimate(24.1357, 9)) == "24.14"
    assert with_error(Estimate(0.0, 9, 0.0)) == "0.000 ± 0"


def test_sizes() -> None:
    assert [size(n) for n in (1_500, 91_727_360, 2_345_000_000)] == ["1.5 kB", "91.7 MB", "2.35 GB"]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "none"),
        ({"a": 1, "b": "x"}, "a: 1, b: x"),
        ({"a": {"b": {"c": 0.5}, "d": {}}, "e": True, "f": None}, "a b c: 0.5, a d: none, e: yes, f: none"),
        ({"a": [1, "x", {"b": False}], "c": ()}, "a: 1 x (b: no), c: none"),
        ("as it is", "as it is"),
    ],
)
def test_settings(values: object, text: str) -> None:
    assert words(values) == text
    assert words({"numpy": "2.4", "torch": "2.13"}, " ") == "numpy 2.4, torch 2.13"


def test_numpy_numbers_and_paths_become_json() -> None:
    found = plain({"a": np.float64(2.5), "b": np.int64(3), "c": (np.inf, None, True), "d": Path("x")})
    assert json.dumps(found) == '{"a": 2.5, "b": 3, "c": [null, null, true], "d": "x"}'
