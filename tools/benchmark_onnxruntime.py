"""Products in ONNX Runtime: CodebookMatMul by our library beside MatMulNBits and MatMul, in one run.

    python tools/benchmark_onnxruntime.py [--side 4096] [--threads 2] [--repeats 11]

A model is a chain of square matrices that fill --rotate bytes, so that weights come from memory and not from a cache,
and what ONNX Runtime does for a run is shared by them, as in a language model. Medians of interleaved runs. Codes are
random: time does not depend on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from benchmark_kernels import Contender, medians, random_matrix
from onnx import helper, numpy_helper

from anyquant import ir
from anyquant.exporters.onnx.codebook import NEUTRAL, STORED, stored_arrays
from anyquant.exporters.onnx.functions import DOMAIN, MATMUL, matmul_function, steps_for
from anyquant.runtime.onnx_session import operators

BLOCK = 32


@dataclass(frozen=True)
class Product:
    """A way to hold a square matrix.

    Attributes:
        name: of its row.
        side: of the matrix.
        operator: and its domain.
        arrays: constant inputs after the first, in order.
        attributes: of the node.
        functions: that the model needs.
    """

    name: str
    side: int
    operator: tuple[str, str]
    arrays: Sequence[np.ndarray]
    attributes: dict[str, int]
    functions: Sequence[onnx.FunctionProto] = ()

    @property
    def nbytes(self) -> int:
        """Of the constants."""
        return sum(array.nbytes for array in self.arrays)


def codebook(name: str, side: int, axis: int, widths: Sequence[int], outliers: float = 0.0) -> Product:
    """Our operator; arguments as of random_matrix."""
    tensor = random_matrix((side, side), axis, widths, outliers)
    assert isinstance(tensor.spec, ir.CodebookSpec)
    arrays = NEUTRAL | stored_arrays(tensor)
    stored = [*(arrays[suffix] for suffix in STORED), np.zeros(1, np.float32)]
    sizes = {"K": side, "N": side, "transB": 1 - axis}
    return Product(name, side, (MATMUL, DOMAIN), stored, sizes, [matmul_function(21, "fold", steps_for([tensor.spec]))])


def affine(name: str, side: int, level: int) -> Product:
    """ONNX Runtime's operator with 4 bits and a scale for each block."""
    rng, blocks = np.random.default_rng(0), side // BLOCK
    codes = rng.integers(0, 256, (side, blocks, BLOCK // 2), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.002, side * blocks).astype(np.float32)
    sizes = {"K": side, "N": side, "bits": 4, "block_size": BLOCK, "accuracy_level": level}
    return Product(name, side, ("MatMulNBits", "com.microsoft"), [codes, scales], sizes)


def dense(side: int) -> Product:
    """ONNX Runtime's product in FP32."""
    weights = np.random.default_rng(0).standard_normal((side, side), np.float32) / np.float32(side**0.5)
    return Product("MatMul, FP32", side, ("MatMul", ""), [weights], {})


def chain(product: Product, copies: int) -> onnx.ModelProto:
    """So many of these products, each of the result of the one before it."""
    nodes, stored = [], []
    codes = max(range(len(product.arrays)), key=lambda j: product.arrays[j].nbytes)
    for i in range(copies):
        names = [f"{i}.{j}" for j in range(len(product.arrays))]
        arrays = list(product.arrays)
        # ONNX Runtime keeps but one of equal matrices.
        arrays[codes] = np.roll(arrays[codes].reshape(-1), i).reshape(arrays[codes].shape)
        stored += [numpy_helper.from_array(array, name) for array, name in zip(arrays, names, strict=True)]
        operator, domain = product.operator
        node = helper.make_node(operator, [f"x{i}", *names], [f"x{i + 1}"], domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in product.attributes.items())
        nodes.append(node)
    shape: list[str | int | None] = ["rows", product.side]
    given, result = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x0", f"x{copies}")
    )
    graph = helper.make_graph(nodes, "chain", [given], [result], stored)
    imports = [helper.make_opsetid(domain, 21 if not domain else 1) for domain in ("", "com.microsoft", DOMAIN)]
    return helper.make_model(graph, functions=product.functions, opset_imports=imports, ir_version=10)


def session_of(product: Product, copies: int) -> ort.InferenceSession:
    """The chain in ONNX Runtime, with our library, in the threads that all sessions share."""
    options = ort.SessionOptions()
    options.use_per_session_threads = False  # those of one session would wait for work while another one is timed
    options.register_custom_ops_library(str(operators()))
    return ort.InferenceSession(chain(product, copies).SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--rows", default="1,128", help="rows of activations")
    parser.add_argument("--rotate", type=float, default=256e6, help="bytes of copies of each matrix")
    arguments = parser.parse_args()
    ort.set_global_thread_pool_sizes(arguments.threads, 1)
    side = arguments.side
    products = [
        *(codebook(f"CodebookMatMul, rows, {bits} bits", side, 0, [bits]) for bits in (4, 3, 2)),
        *(codebook(f"CodebookMatMul, columns, {bits} bits", side, 1, [bits]) for bits in (4, 2)),
        codebook("CodebookMatMul, rows, 2, 3 and 4 bits, .5 % outliers", side, 0, [2, 3, 4], 0.005),
        affine("MatMulNBits, 4 bits, level 0", side, 0),
        affine("MatMulNBits, 4 bits, level 4", side, 4),
        dense(side),
    ]
    print(f"ONNX Runtime {ort.__version__}, {arguments.threads} threads\n")
    print("| product | rows of activations | MB | ms | times as fast as level 0 | as level 4 | as FP32 |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    copies = {product.name: max(2, int(arguments.rotate // product.nbytes)) for product in products}
    sessions = {product.name: session_of(product, copies[product.name]) for product in products}
    for rows in map(int, arguments.rows.split(",")):
        x = np.random.default_rng(1).standard_normal((rows, side)).astype(np.float32)
        contenders = [Contender(p.name, p.nbytes, [_run(sessions[p.name], x)]) for p in products]
        found = medians(contenders, arguments.repeats if rows == 1 else max(3, arguments.repeats // 3))
        times = {name: 1e3 * seconds / copies[name] for name, seconds in found.items()}
        for product in products:
            ratios = (times[peer.name] / times[product.name] for peer in products[-3:])
            cells = [product.name, f"{rows}", f"{product.nbytes / 1e6:.2f}", f"{times[product.name]:.3f}"]
            print(f"| {' | '.join([*cells, *(f'{ratio:.2f}' for ratio in ratios)])} |", flush=True)


def _run(session: ort.InferenceSession, x: np.ndarray) -> Callable[[], object]:
    return lambda: session.run(None, {"x0": x})


if __name__ == "__main__":
    main()
