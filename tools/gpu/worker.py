"""What tools/gpu_check runs in processes of their own, so that a GPU in disorder ends no more than one of them.

    python -m gpu.worker material FOLDER RESULT     check the layers in FOLDER; write a JSON list to RESULT
    python -m gpu.worker launches                   every kernel once, on small matrices, for compute-sanitizer

with the repository and its folder tools on PYTHONPATH.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from anyquant import ir
from anyquant.runtime.cuda import reference
from anyquant.runtime.cuda.linear import CodebookLinear
from anyquant.runtime.cuda.machine import TYPES, machine
from anyquant.testing import affine_tensor, block_tensor, codebook_tensor, ggml_tensor
from gpu.material import as_json, check


def launches(device: torch.device) -> None:
    """Launch every kernel of ours once or more, on odd shapes, and none of others, which compute-sanitizer would check.

    Raises:
        AssertionError: a result is far off.
    """
    gpu = machine(device)
    codebooks = [codebook_tensor((70, 300), axis, [2, 3, 4, 0], scaled=True, outliers=90) for axis in (0, 1)]
    for tensor in codebooks:
        layer = CodebookLinear(tensor, None).to(device)
        exact = torch.from_numpy(ir.dequantize(tensor))
        for dtype in TYPES:
            for batch in (1, 3, 8, 17):
                x = torch.randn(batch, 300, generator=torch.Generator().manual_seed(batch)).to(dtype)
                y, wanted = layer(x.to(device)).cpu().double(), x.double() @ exact.double().T
                assert (y - wanted).norm() <= 1e-2 * wanted.norm(), (tensor.spec, dtype, batch)
            assert torch.equal(layer.weights(dtype).cpu(), exact.to(dtype)), (tensor.spec, dtype)
    for tensor in [
        *codebooks,
        block_tensor(ir.BlockSpec((70, 300), "bfp", 4, 32), exponents=(-3, 2)),
        affine_tensor(ir.AffineSpec((70, 300), 4, 64)),
        ggml_tensor(ir.GGMLSpec((70, 512), "Q4_K")),
        ggml_tensor(ir.GGMLSpec((70, 512), "IQ3_S")),
    ]:
        assert isinstance(tensor.spec, reference.KINDS)
        arrays = reference.stored_arrays(tensor)
        stored = {name: torch.from_numpy(array.view("u1").copy()).to(device) for name, array in arrays.items()}
        weight = torch.empty(tensor.spec.shape, device=device)
        reference.dequantize(gpu, tensor.spec, stored, weight)
        assert ir.digest(weight.cpu().numpy()) == ir.digest(ir.dequantize(tensor)), tensor.spec
        x, y = torch.ones(3, tensor.spec.shape[1]), torch.empty(3, 70, device=device)
        reference.multiply(gpu, tensor.spec.shape, weight, x.to(device), 3, y)
        wanted = x.double() @ weight.cpu().double().T
        assert (y.cpu().double() - wanted).norm() <= 1e-5 * wanted.norm(), tensor.spec


def main() -> int:
    """Run one of them; exit code 4: a result is not what it should be."""
    what, *others = sys.argv[1:]
    if what == "launches":
        launches(torch.device("cuda"))
        torch.cuda.synchronize()
        return 0
    results = check(Path(others[0]), torch.device("cuda"))
    Path(others[1]).write_text(json.dumps(as_json(results)), encoding="utf-8")
    return 0 if all(result.ok for result in results) else 4


if __name__ == "__main__":
    sys.exit(main())
