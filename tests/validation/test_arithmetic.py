"""What a header says of llama.cpp's arithmetic."""

from __future__ import annotations

import pytest

from anyquant.exporters.gguf.container import bool_value, string_value
from anyquant.gguf_container import Header, TensorInfo
from anyquant.validation.arithmetic import gguf_arithmetic


def header(metadata: dict[str, str | bool] | None = None, **types: int) -> Header:
    values = {k: bool_value(v) if isinstance(v, bool) else string_value(v) for k, v in (metadata or {}).items()}
    names = {name.replace("__", "."): kind for name, kind in types.items()}
    tensors = {name: TensorInfo(kind, (32,) if "norm" in name else (4, 32), 0) for name, kind in names.items()}
    return Header("x.gguf", values, tensors, 32, 0, 0)


def test_all_f32_is_an_fp32_path() -> None:
    found = gguf_arithmetic(header(token_embd__weight=0, blk__0__ffn_up__weight=0, output_norm__weight=0))
    assert found.kind == "fp32"


def test_a_private_type_with_a_float_head_is_an_fp32_path() -> None:
    assert gguf_arithmetic(header(token_embd__weight=0, blk__0__ffn_up__weight=36)).kind == "fp32"


@pytest.mark.parametrize("kind", [1, 2, 8, 14, 30, 39])
def test_stock_types_and_f16_round(kind: int) -> None:
    assert gguf_arithmetic(header(token_embd__weight=0, blk__0__ffn_up__weight=kind)).kind == "rounded"


def test_an_embedding_rounds_only_where_it_is_the_head() -> None:
    assert gguf_arithmetic(header(token_embd__weight=8, blk__0__ffn_up__weight=0)).kind == "rounded"
    assert gguf_arithmetic(header(token_embd__weight=8, output__weight=0)).kind == "fp32"


def test_recorded_rounding_relaxes_the_gate_and_is_said() -> None:
    types = {"token_embd__weight": 0}
    allowed = gguf_arithmetic(header({"anyquant.layout": "f16", "anyquant.allow_rounding": True}, **types))
    assert (allowed.kind, allowed.rounding) == ("rounded", "written with --allow-rounding")
    assert gguf_arithmetic(header({"anyquant.layout": "f32", "anyquant.allow_rounding": True}, **types)).rounding != ""
    assert gguf_arithmetic(header({"anyquant.layout": "f16"}, **types)).rounding == ""
    assert (
        gguf_arithmetic(header({"anyquant.layout": "native", "anyquant.allow_rounding": False}, **types)).rounding == ""
    )
