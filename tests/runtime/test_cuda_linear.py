"""Layers for GPUs, whose kernels run in the emulator here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from anyquant import ir
from anyquant.errors import UsageError
from anyquant.runtime.cuda import linear
from anyquant.runtime.linear import replace_linears
from anyquant.testing import affine_tensor, block_tensor, codebook_tensor, ggml_tensor
from tests.kernels.cuda.machine import TorchOnEmulator

TENSORS = [
    codebook_tensor((70, 200), 0, [2, 3, 4], scaled=True, outliers=90),
    codebook_tensor((70, 200), 1, [2, 4], outliers=90),
    block_tensor(ir.BlockSpec((70, 200), "bfp", 4, 32), exponents=(-3, 2)),
    affine_tensor(ir.AffineSpec((70, 200), 4, 64)),
    ggml_tensor(ir.GGMLSpec((70, 224), "Q4_1")),
]
LIMIT = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture
def emulated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> TorchOnEmulator:
    gpu = TorchOnEmulator(tmp_path_factory.mktemp("kernels"))
    monkeypatch.setattr(linear, "machine", lambda device: gpu)
    return gpu


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: tensor.spec.kind + str(tensor.spec.shape))
def test_products(emulated: TorchOnEmulator, tensor: ir.Tensor, dtype: torch.dtype) -> None:
    bias = torch.linspace(-1, 1, 70)
    layer = linear.quantized_linear(tensor, bias).to(dtype)
    weight = torch.from_numpy(ir.dequantize(tensor)).double()
    for shape in [(1,), (3, 4), (17,), (40,), (0,)]:
        x = torch.randn(*shape, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        exact = x.double() @ weight.T + bias.to(dtype).double()
        y = layer(x)
        assert y.shape == exact.shape
        assert y.dtype == dtype
        assert (y.double() - exact).norm() <= LIMIT[dtype] * exact.norm()


def test_how_many_rows_go_where(emulated: TorchOnEmulator) -> None:
    layer = linear.CodebookLinear(TENSORS[0], None)
    for rows, dtype, kernels in [
        (4, torch.float16, ["gemv_rows"]),
        (5, torch.float16, ["half_activations", "gemm_rows"]),
        (32, torch.bfloat16, ["half_activations", "gemm_rows"]),
        (33, torch.float16, ["expand_rows", "expand_outliers"]),
        (20, torch.float32, ["gemv_rows"] * 3),
        (33, torch.float32, ["expand_rows", "expand_outliers"]),
    ]:
        emulated.launched.clear()
        layer(torch.ones(rows, 200, dtype=dtype))
        assert emulated.launched == kernels, (rows, dtype)


def test_a_model(emulated: TorchOnEmulator) -> None:
    """Grouped heads and a tied head; another dtype leaves the packed matrices as they are."""
    settings = LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(settings).eval()
    tensors = {}
    for number, (name, module) in enumerate(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            shape = (module.out_features, module.in_features)
            tensor = codebook_tensor(shape, number % 2, [2, 3, 4], outliers=20, seed=number)
            tensor.arrays[".codebook"] = (tensor.arrays[".codebook"] / 8).astype(np.float16)
            module.weight.data = torch.from_numpy(ir.dequantize(tensor))
            tensors[f"model.layers.{name}.weight"] = tensor
    ids = torch.arange(7)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        replace_linears(model, tensors, tensors.__getitem__, linear.quantized_linear)
        assert (model(ids).logits - expected).abs().max() < 1e-4
        halves = model.to(torch.bfloat16)(ids).logits
    assert (halves.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_activations_that_are_refused(emulated: TorchOnEmulator) -> None:
    layer = linear.CodebookLinear(TENSORS[0], None)
    assert "in_features=200, out_features=70, bits=" in repr(layer)
    for x in (torch.zeros(1, 7), torch.zeros(1, 200, dtype=torch.float64), torch.zeros(1, 200, device="meta")):
        with pytest.raises(UsageError, match="this layer takes float32, float16 or bfloat16"):
            layer(x)


def test_a_layer_that_is_on_no_gpu() -> None:
    with pytest.raises(UsageError, match="move the model to 'cuda'"):
        linear.CodebookLinear(TENSORS[0], None)(torch.zeros(1, 200))
