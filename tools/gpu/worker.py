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
from anyquant.runtime.cuda.linear import CodebookLinear, quantized_linear
from anyquant.runtime.cuda.machine import TYPES, machine
from anyquant.testing import affine_tensor, block_tensor, codebook_tensor, ggml_tensor
from gpu.material import as_json, check


def launches(device: torch.device) -> None:
    """Launch every kernel once or more, on odd shapes; raises where a result is far off."""
    tensors = [
        *(codebook_tensor((70, 300), axis, [2, 3, 4, 0], scaled=True, outliers=90) for axis in (0, 1)),
        block_tensor(ir.BlockSpec((70, 300), "bfp", 4, 32), exponents=(-3, 2)),
        affine_tensor(ir.AffineSpec((70, 300), 4, 64)),
        ggml_tensor(ir.GGMLSpec((70, 512), "Q4_K")),
        ggml_tensor(ir.GGMLSpec((70, 512), "IQ3_S")),
    ]
    for tensor in tensors:
        layer = quantized_linear(tensor, None).to(device)
        exact = torch.from_numpy(ir.dequantize(tensor)).double()
        kinds = TYPES if isinstance(layer, CodebookLinear) else [torch.float32]
        for dtype in kinds:
            for batch in (1, 3, 8, 17, 33):
                x = torch.randn(batch, tensor.spec.shape[1], generator=torch.Generator().manual_seed(batch)).to(dtype)
                y, wanted = layer(x.to(device)).cpu().double(), x.double() @ exact.T
                assert (y - wanted).norm() <= 1e-2 * wanted.norm(), (tensor.spec, dtype, batch)
    # Those that no layer uses.
    gpu, weight = machine(device), torch.empty(70, 300, device=device)
    stored = {
        name: torch.from_numpy(array.view("u1").copy()).to(device)
        for name, array in reference.stored_arrays(tensors[0]).items()
    }
    assert isinstance(tensors[0].spec, ir.CodebookSpec)
    reference.dequantize(gpu, tensors[0].spec, stored, weight)
    assert ir.digest(weight.cpu().numpy()) == ir.digest(ir.dequantize(tensors[0]))
    x, y = torch.ones(3, 300, device=device), torch.empty(3, 70, device=device)
    reference.multiply(gpu, (70, 300), weight, x, 3, y)


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
