"""Kinds, layers, widths and means against slow recounts from the stored arrays."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import CorruptFileError
from anyquant.losses import mean_error
from anyquant.report.matrices import (
    by_kind,
    by_layer,
    hardest,
    matrices,
    mean,
    parts,
    unit_of,
)
from anyquant.summary import mean_losses
from anyquant.testing import codebook_tensor


def test_kinds_and_layers(write: Callable[..., ir.Model]) -> None:
    names = {
        "model.layers.0.self_attn.q_proj.weight": ("q_proj", 0, "layer 0 q_proj"),
        "model.layers.11.mlp.gate_proj.weight": ("mlp.gate_proj", 11, "layer 11 mlp.gate_proj"),
        "model.layers.2.mlp.experts.13.gate_proj.weight": ("experts.gate_proj", 2, "layer 2 experts.gate_proj#13"),
        "model.layers.2.mlp.experts.9.gate_proj.weight": ("experts.gate_proj", 2, "layer 2 experts.gate_proj#9"),
        "model.layers.3.mlp.experts.down_proj#7": ("down_proj", 3, "layer 3 down_proj#7"),
        "model.layers.2.mlp.shared_expert.gate_proj.weight": (
            "shared_expert.gate_proj", 2, "layer 2 shared_expert.gate_proj",
        ),
        "transformer.h.4.attn.c_proj.weight": ("attn.c_proj", 4, "layer 4 attn.c_proj"),
        "transformer.h.4.mlp.c_proj.weight": ("mlp.c_proj", 4, "layer 4 mlp.c_proj"),
        "visual.blocks.5.attn.q_proj.weight": ("attn.q_proj", 5, "layer 5 attn.q_proj"),
        "lm_head.weight": ("lm_head", None, "lm_head.weight"),
    }  # fmt: skip
    found = matrices(write({name: codebook_tensor((3, 9), 0, [2, 2, 1]) for name in names}))
    # "q_proj" alone would name both the language model's and the vision tower's.
    names["model.layers.0.self_attn.q_proj.weight"] = ("self_attn.q_proj", 0, "layer 0 self_attn.q_proj")
    assert {m.name: (m.kind, m.layer, m.label) for m in found} == names
    experts = next(kind for kind in by_kind(found) if kind.name == "experts.gate_proj")
    assert [m.name for m in by_layer(experts)[2].matrices] == [m.name for m in experts.matrices]
    head = next(kind for kind in by_kind(found) if kind.name == "lm_head")
    assert by_layer(head) == {}


def test_widths_are_those_of_the_arrays(llama: ir.Model) -> None:
    found = matrices(llama)
    assert len(found) == 6
    assert unit_of(found) == "rows"
    for matrix in found:
        stored = llama.tensor(matrix.name).arrays[".bits"].tolist()
        assert matrix.widths.tolist() == [stored.count(width) for width in range(9)]
        assert matrix.to_json()["widths"] == matrix.widths.tolist()
    kind = by_kind(found)[0]
    bits = [int(b) for m in found if m.kind == "q_proj" for b in llama.tensor(m.name).arrays[".bits"]]
    assert kind.width.value == pytest.approx(statistics.fmean(bits))
    assert kind.width.error == pytest.approx(statistics.stdev(bits) / len(bits) ** 0.5)
    assert kind.width.n == len(bits) == 36
    assert kind.bits == pytest.approx(8 * sum(llama.entries[m.name].spec.nbytes for m in kind.matrices) / (3 * 12 * 20))


def test_every_kind_of_tensor_has_a_width(write: Callable[..., ir.Model]) -> None:
    def zeros(spec: ir.Spec) -> ir.Tensor:
        arrays = {suffix: np.zeros(shape, dtype) for suffix, (dtype, shape) in spec.arrays().items()}
        if isinstance(spec, ir.BlockSpec):
            arrays[".exponents"][:] = ir.ZERO_BLOCK
        return ir.Tensor(spec, arrays)

    widths: dict[str, tuple[ir.Tensor, str, list[int]]] = {
        "columns": (codebook_tensor((5, 3), 1, [3, 0, 8]), "column", [3, 0, 8]),
        "block": (zeros(ir.BlockSpec((4, 32), "bfp", 5, 32)), "matrix", [5]),
        "affine": (zeros(ir.AffineSpec((4, 32), 4, 32)), "matrix", [4]),
    }
    for name, width in {"Q4_1": 4, "Q5_1": 5, "Q8_0": 8, "Q6_K": 6, "IQ4_NL": 4, "Q2_K": 2}.items():
        widths[name] = (zeros(ir.GGMLSpec((4, 256), name)), "matrix", [width])
    found = matrices(write({name: tensor for name, (tensor, _, _) in widths.items()}))
    assert {m.name: (m.unit, m.bits.tolist()) for m in found} == {n: (u, b) for n, (_, u, b) in widths.items()}
    assert unit_of(found) == "units"
    assert unit_of(found[1:]) == "matrices"


def test_a_damaged_bit_map_is_named(llama: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ir.Model, "array", lambda self, name, suffix: np.array([3, 200, 1], np.uint8))
    with pytest.raises(CorruptFileError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight\.bits: 200 at \[1\]"):
        matrices(llama)


def test_means() -> None:
    values = [0.5, 2.0, 2.0, 7.0]
    found = mean([0.5, 2.0, 7.0], [1, 2, 1])
    assert found.value == pytest.approx(statistics.fmean(values))
    assert found.error == pytest.approx(statistics.stdev(values) / 2)
    assert (mean([3.0]).value, mean([3.0]).error) == (3.0, None)


def test_errors_count_by_weights(llama: ir.Model) -> None:
    found = matrices(llama)
    error = mean_error([m.entry for m in found], "output_error")
    assert error is not None
    numel = [m.entry.spec.numel for m in found]
    values = [m.entry.output_error or 0 for m in found]
    value = sum(n * v for n, v in zip(numel, values, strict=True)) / sum(numel)
    assert error.value == pytest.approx(value)
    # Of equal weights it is the standard error of a mean.
    equal = [m for m in found if m.kind == "q_proj"]
    alike = mean_error([m.entry for m in equal], "error")
    assert alike is not None
    assert alike.error == pytest.approx(statistics.stdev([0.01, 0.02, 0.03]) / 3**0.5)
    assert mean_error([], "error") is None


def test_an_expert_without_tokens_has_no_error_of_its_outputs(write: Callable[..., ir.Model]) -> None:
    names = [f"model.layers.0.mlp.experts.down_proj#{i}" for i in range(3)]
    losses = {names[0]: (0.1, 0.3), names[1]: (0.1, None), names[2]: (0.0, 0.0)}
    model = write({name: codebook_tensor((2, 9), 0, [1, 2]) for name in names}, losses)
    found = matrices(model)
    assert [m.output_error for m in found] == [0.3, None, 0.0]
    [kind] = by_kind(found)
    assert kind.output_error is not None
    assert kind.output_error.value == pytest.approx(0.15)
    error = mean_error([m.entry for m in found], "output_error")
    assert error is not None
    assert error.n == 2
    # What ``anyquant quantize`` says.
    assert mean_losses(model) == {"error": pytest.approx(0.2 / 3), "output_error": error.value}


@pytest.mark.parametrize("count", [1, 4, 20, 1000])
def test_hardest_rows_are_those_with_most_bits(llama: ir.Model, count: int) -> None:
    found = matrices(llama)
    everyone = [(m, row) for m in found for row in range(len(m.bits))]
    everyone.sort(key=lambda p: -(p[0].entry.output_error or 0.0))  # stable
    everyone.sort(key=lambda p: -int(p[0].bits[p[1]]))
    assert [(m.name, row) for m, row in hardest(found, count)] == [(m.name, row) for m, row in everyone[:count]]


def test_bytes_of_the_parts(llama: ir.Model) -> None:
    found = parts(llama)
    assert llama.path is not None
    assert sum(found.values()) == sum(file.stat().st_size for file in llama.path.iterdir())
    counted: Counter[str] = Counter()
    for name, entry in llama.entries.items():
        for suffix, array in llama.tensor(name).arrays.items():
            counted[suffix if entry.quantized else "dense"] += array.nbytes
    assert found["codes"] == counted[".codes"]
    assert found["codebooks"] == counted[".codebook"]
    assert found["bit map"] == counted[".bits"] == 3 * (12 + 7)
    assert found["outliers"] == counted[".outlier_indptr"] + counted[".outlier_index"] + counted[".outlier_value"]
    assert found["tensors not quantized"] == counted["dense"] == 80
    assert list(found.values()) == sorted(found.values(), reverse=True)
