"""The digest: SHA-256 of FP32 bytes in C order with one zero."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from anyquant import ir


def test_bytes_are_little_endian_in_c_order() -> None:
    values = np.array([[1, 2], [3, -4.5]], np.float32)
    expected = hashlib.sha256(struct.pack("<4f", 1, 2, 3, -4.5)).hexdigest()
    assert ir.digest(values) == expected
    assert ir.digest(np.asfortranarray(values)) == expected
    assert ir.digest(values.astype(">f4")) == expected


def test_known_value() -> None:
    # printf '\\x00\\x00\\x80\\x3f' | sha256sum
    assert ir.digest(np.ones((), np.float32)) == "e00e5eb9444182f352323374ef4e08ebcb784725fdd4fd612d7730540b3e0c8c"


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20))
def test_only_negative_zero_changes(values: list[float]) -> None:
    plain = [0.0 if v == 0 else v for v in values]
    array = np.array(values, np.float32)
    before = array.tobytes()
    assert ir.digest(array) == hashlib.sha256(struct.pack(f"<{len(plain)}f", *plain)).hexdigest()
    assert array.tobytes() == before  # the argument is left alone


def test_subnormals_survive() -> None:
    assert ir.digest(np.array([2.0**-149], np.float32)) != ir.digest(np.zeros(1, np.float32))
    assert ir.digest(np.array([-(2.0**-149)], np.float32)) != ir.digest(np.array([2.0**-149], np.float32))
