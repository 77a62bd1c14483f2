"""The peer AutoRound, by its own package: the one peer that learns, block by block, and so needs the whole model.

Source: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent" (arXiv 2309.05516), package auto-round. It
sees the tokens of the calibration and takes as many steps for each block as it does by default (200 in 0.16). On a
processor that takes hours for what the others do in minutes, so it runs only where the package is installed.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accuracy.interface import Floats, Shape, WholeModel
from anyquant.calibration.tokens import load_tokenizer
from anyquant.checkpoint import Checkpoint
from anyquant.errors import MissingDependency
from anyquant.runtime.model import model_of

GROUP = 64
WIDTHS = (2, 3, 4)


def available() -> bool:
    """Whether the package is there; importing it would burden every other peer's process."""
    return find_spec("auto_round") is not None


def auto_round(bits: int, group: int = GROUP) -> WholeModel:
    """AutoRound with a zero point: per group a scale in FP16 and a zero of the width of a code, as GPTQ stores them.

    Args:
        bits: of a code.
        group: columns that share a scale.
    """

    def quantize(checkpoint: Checkpoint, ids: NDArray[np.int64], names: list[str]) -> dict[str, Floats]:
        import torch

        package = _package()
        model = model_of(checkpoint)
        model.name_or_path = model.config.name_or_path = ""  # which it would look up on the hub
        kept = set(names)
        others = {
            name: {"bits": 16}
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in kept
        }
        tuned, _ = package.AutoRound(
            model,
            tokenizer=load_tokenizer(checkpoint),
            alg_configs=package.SignRoundConfig(bits=bits, group_size=group, sym=False),
            dataset=[{"input_ids": torch.from_numpy(window[None])} for window in ids],
            layer_config=others,
            nsamples=len(ids),
            seqlen=ids.shape[1],
            device_map="cpu",
            enable_torch_compile=False,
            low_cpu_mem_usage=False,  # or it drops what it has quantized
        ).quantize()
        state = tuned.state_dict()
        return {name: state[name].detach().float().numpy() for name in names}

    def stored(shape: Shape) -> float:
        return bits + (16 + bits) / group

    return WholeModel(f"AutoRound {bits} bits, group {group}", stored, quantize)


def _package() -> Any:
    try:
        return importlib.import_module("auto_round")
    except ImportError as error:
        raise MissingDependency("auto-round", "", "the peer AutoRound") from error
