"""The kernels on a GPU: what the emulator cannot say, as graphs, streams, and that results are the same each time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anyquant import ir
from anyquant.runtime.cuda import layout, products, reference
from anyquant.runtime.cuda.linear import quantized_linear
from anyquant.runtime.cuda.machine import TYPES, machine
from anyquant.testing import affine_tensor, block_tensor, codebook_tensor, ggml_tensor

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU"),
]

MIXED = [4, 0, 2, 3, 1, 8, 5, 7, 6]
SHAPES = [(1, 1), (1, 300), (33, 129), (70, 128), (300, 40), (576, 1536), (4096, 4096)]
BATCHES = [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 256]
LIMIT = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}  # results of 16 bits are rounded themselves


def assert_products(tensor: ir.Tensor, batches: list[int] = BATCHES) -> None:
    layer = quantized_linear(tensor, None).cuda()
    weight = torch.from_numpy(ir.dequantize(tensor)).cuda().double()
    for dtype, limit in LIMIT.items():
        for batch in batches:
            generator = torch.Generator("cuda").manual_seed(batch)
            x = torch.randn(batch, weight.shape[1], generator=generator, device="cuda").to(dtype)
            y, exact = layer(x).double(), x.double() @ weight.T
            # Of a few results, all may be small by chance: not what rounding goes by.
            sizes = ((x.double() ** 2) @ (weight.T**2)).sqrt().maximum(exact.abs())
            assert (y - exact).norm() <= limit * sizes.norm(), (tensor.spec, dtype, batch)
            for _ in range(3):
                assert torch.equal(layer(x).double(), y)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_widths_and_outliers(shape: tuple[int, int], axis: int) -> None:
    assert_products(codebook_tensor(shape, axis, MIXED, scaled=True, outliers=1 + shape[0] * shape[1] // 200))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", range(9))
def test_one_width(bits: int, axis: int) -> None:
    assert_products(codebook_tensor((200, 700), axis, bits), [1, 7, 32, 100])


@pytest.mark.parametrize("axis", [0, 1])
def test_more_columns_than_16_bits_count(axis: int) -> None:
    assert_products(codebook_tensor((40, 70000), axis, [2, 4], outliers=900), [1, 6, 40])


@pytest.mark.parametrize(
    "tensor",
    [
        block_tensor(ir.BlockSpec((70, 300), "bfp", 4, 32), exponents=(-3, 2)),
        block_tensor(ir.BlockSpec((70, 300), "minifloat", 6, 16, 3), exponents=(-3, 2)),
        block_tensor(ir.BlockSpec((70, 300), "log", 4, 32), exponents=(-3, 2)),
        affine_tensor(ir.AffineSpec((70, 300), 4, 64)),
        *(ggml_tensor(ir.GGMLSpec((70, 512), name)) for name in ir.GGML_TYPES),
    ],
    ids=lambda tensor: f"{tensor.spec}",
)
def test_blocks(tensor: ir.Tensor) -> None:
    assert_products(tensor, [1, 17, 64])


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_the_oracles(axis: int) -> None:
    """By the reference kernels from what is stored, and from what is packed."""
    tensor, gpu = codebook_tensor((300, 700), axis, MIXED, scaled=True, outliers=500), machine(torch.device("cuda"))
    assert isinstance(tensor.spec, ir.CodebookSpec)
    about, packed = layout.pack_codebook(tensor)
    stored = {
        name: torch.from_numpy(np.ascontiguousarray(array).view(np.uint8)).cuda()
        for name, array in reference.stored_arrays(tensor).items()
    }
    plain, expanded = (torch.empty(tensor.spec.shape, device="cuda") for _ in range(2))
    reference.dequantize(gpu, tensor.spec, stored, plain)
    products.expand(gpu, about, torch.from_numpy(packed).cuda(), TYPES[torch.float32], expanded)
    assert ir.digest(plain.cpu().numpy()) == ir.digest(expanded.cpu().numpy()) == ir.digest(ir.dequantize(tensor))
    x, y = torch.randn(3, 700, device="cuda"), torch.empty(3, 300, device="cuda")
    reference.multiply(gpu, tensor.spec.shape, plain, x, 3, y)
    assert torch.allclose(y.double(), x.double() @ plain.double().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("batch", [1, 16])
def test_graphs_and_other_streams(axis: int, batch: int) -> None:
    layer = quantized_linear(codebook_tensor((500, 900), axis, [3, 4], outliers=300), None).cuda()
    x = torch.randn(batch, 900, device="cuda", dtype=torch.float16)
    expected = layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(elsewhere, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    assert torch.equal(y, expected)
    x.mul_(2)
    graph.replay()
    assert torch.equal(y, layer(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["codebook", "block"])
def test_logits_of_the_real_model(kind: str, request: pytest.FixtureRequest) -> None:
    """SmolLM2, with codebooks and outliers and with blocks, against torch on dequantized weights on the CPU."""
    import anyquant

    folder = request.getfixturevalue("real_ir") if kind == "block" else request.getfixturevalue("real_skim").folder
    tokens = torch.randint(0, 49152, (1, 48), generator=torch.Generator().manual_seed(0))
    expected = anyquant.load(folder, dequantize=True)
    model = anyquant.load(folder, device="cuda")
    with torch.inference_mode():
        for length in (1, 7, 48):
            logits = model(tokens[:, :length].cuda()).logits.cpu()
            assert (logits - expected(tokens[:, :length]).logits).abs().max() <= 1e-3
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(tokens.cuda(), **settings).cpu(), expected.generate(tokens, **settings))
