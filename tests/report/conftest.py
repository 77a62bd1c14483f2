"""Small IR folders made by hand, and sources to go with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.checkpoint import TensorInfo
from anyquant.reporting.estimate import Estimate
from anyquant.sweep import Point, Sweep
from anyquant.testing import codebook_tensor

HOSTILE = '<script src="https://evil.example/x.js">&$\\frac{_[bold]'


@dataclass
class Weights:
    """A source: what a report asks of a checkpoint."""

    values: dict[str, np.ndarray]
    name: str = "source"
    mark: str = "f" * 64
    tensors: dict[str, TensorInfo] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = {n: TensorInfo(n, v.shape, "F32", v.nbytes) for n, v in self.values.items()}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self.values[name][rows or slice(None)].copy()

    def fingerprint(self) -> str:
        return self.mark


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ir.Model]:
    """write(tensors, losses=None, **fields): an IR folder in which all but dense tensors are quantized.

    ``losses`` are name -> (error, output_error); 0.01 and 0.02 for others.
    """

    def make(
        tensors: dict[str, ir.Tensor], losses: dict[str, tuple[float, float]] | None = None, **fields: Any
    ) -> ir.Model:
        dense = {name for name, tensor in tensors.items() if isinstance(tensor.spec, ir.DenseSpec)}
        model = ir.Model(
            path=None,
            config={"model_type": "llama"},
            method="skim",
            settings={"outliers": 0.0, "target": {"bits": 3.0}},
            source={"kind": "huggingface", "name": "tiny", "fingerprint": "f" * 64},
            entries={name: ir.Entry(tensor.spec, quantized=name not in dense) for name, tensor in tensors.items()},
            aliases={},
            anyquant_version="0.1.0",
            calibration=fields.pop("calibration", {"source": "self", "fingerprint": "c" * 64}),
        )
        lost = {name: ir.Loss(0.01, 0.02) for name in tensors} | {n: ir.Loss(*v) for n, v in (losses or {}).items()}
        folder = tmp_path_factory.mktemp("ir") / fields.pop("name", "small")
        return ir.write_ir(folder, model, lambda name: (tensors[name], None if name in dense else lost[name]))

    return make


@pytest.fixture(scope="session")
def source_of() -> Callable[..., Weights]:
    """source_of(model, seed=0, scale=0.1): what the model may have been made of: its values with noise."""

    def make(model: ir.Model, seed: int = 0, scale: float = 0.1) -> Weights:
        rng = np.random.default_rng(seed)
        return Weights(
            {
                name: (model.dequantize(name) + scale * rng.normal(size=entry.spec.shape)).astype(np.float32)
                for name, entry in model.entries.items()
            }
        )

    return make


@pytest.fixture(scope="session")
def llama(write: Callable[..., ir.Model]) -> ir.Model:
    """Three layers of two kinds with rows of 0 to 8 bits, a norm, outliers in one matrix; errors differ."""
    rng = np.random.default_rng(7)
    tensors: dict[str, ir.Tensor] = {}
    losses = {}
    for layer in range(3):
        for place, (kind, shape) in enumerate((("self_attn.q_proj", (12, 20)), ("mlp.down_proj", (7, 33)))):
            name = f"model.layers.{layer}.{kind}.weight"
            bits = rng.integers(0, 6, shape[0])
            bits[layer] = 8 if place else 7
            tensors[name] = codebook_tensor(shape, 0, bits, seed=layer, outliers=5 if (layer, place) == (1, 0) else 0)
            losses[name] = (0.01 * (layer + 1), 0.1 / (1 + layer + place))
    norm = ir.DenseSpec((20,), "F32")
    tensors["model.norm.weight"] = ir.Tensor(norm, {".dense": np.ones(20, np.float32)})
    return write(tensors, losses)


@pytest.fixture(scope="session")
def sweep_found() -> Sweep:
    """Two allocations at two sizes, and a target that cannot be met."""
    points = [
        Point(
            {"bits": bits, "allocation": allocation}, "", bits, bits + 1, int(bits * 1e7), 0.3 / bits,
            Estimate(1 / bits, 900, 0.01, 1 / bits - 0.02, 1 / bits + 0.02),
            Estimate(20 + 9 / bits, 900, 1.0, 19.0, 25.0), Estimate(9 / bits, 900, 0.1), Estimate(0.9, 900, 0.01),
            (1 / bits, 1 / bits), 9.0,
        )
        for allocation in ("model", "uniform") for bits in (2.5, 4.0)
    ]  # fmt: skip
    return Sweep(
        {"name": f"smol {HOSTILE}", "kind": "gguf", "fingerprint": "f" * 64, "bytes": 10**8,
         "perplexity": Estimate(19.0, 900, 1.0, 17.0, 21.0)},
        "skim", {"outliers": 0.0}, "nats", None,
        {"text": f"news {HOSTILE}", "windows": 2, "window": 450, "seed": 0, "resamples": 100},
        {"packages": {"numpy": "2.4"}, "cpu": "A CPU", "cores": 2, "threads": 2},
        (*points, Point({"bits": 99.0, "allocation": "model"}, f"too many {HOSTILE}")),
        (f"a note {HOSTILE}",), 60.0,
    )  # fmt: skip
