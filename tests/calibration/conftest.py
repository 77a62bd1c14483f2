"""Ways to record statistics, and oracles for them: a plain transformers model, sums in FP64 in the obvious way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from anyquant.calibration.backward import FisherPass
from anyquant.calibration.blocks import StreamedModel
from anyquant.calibration.folder import CalibrationFolder
from anyquant.calibration.passes import ForwardPass
from anyquant.calibration.store import Statistics
from anyquant.checkpoint import Checkpoint
from anyquant.runtime.model import as_stored, model_from_state


@pytest.fixture(scope="session")
def token_ids() -> Callable[..., torch.Tensor]:
    """Function that gives random ids [windows, window] of the tiny vocabulary."""

    def make(windows: int, window: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, 389, (windows, window), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Statistics]:
    """Function that runs a pass over some matrices of a checkpoint: record(checkpoint, names, ids, importance)."""

    def run(
        checkpoint: Checkpoint,
        names: Sequence[str],
        ids: torch.Tensor,
        importance: str = "activation",
        row_groups: int = 0,
    ) -> Statistics:
        folder = CalibrationFolder(tmp_path / f"calibration-{len(list(tmp_path.iterdir()))}")
        folder.begin({"importance": importance}, {}, torch.get_num_threads())
        folder.save_tokens(ids.numpy(), [])
        arguments = (StreamedModel(checkpoint), ids, set(names), folder, lambda name, done, whole: None)
        if importance in ("norms", "activation"):
            ForwardPass(*arguments, diagonals_alone=importance == "norms").run()
        else:
            FisherPass(*arguments, rows_alone=importance == "gradient", row_groups=row_groups).run()
        return folder.finish(names)

    return run


@pytest.fixture(scope="session")
def plain_model() -> Callable[[Checkpoint], Any]:
    """Function that gives the whole model, as transformers loads it."""

    def load(checkpoint: Checkpoint) -> Any:
        tensors = as_stored(checkpoint.tensors, checkpoint.read, checkpoint.transposed)
        model = model_from_state(checkpoint.config, tensors, checkpoint.aliases, checkpoint.name)
        return model.requires_grad_(False)

    return load


@pytest.fixture(scope="session")
def linear_inputs(plain_model: Callable[[Checkpoint], Any]) -> Callable[..., dict[str, torch.Tensor]]:
    """Function that gives the inputs float64 [tokens, in] of every linear layer, under the names of the weights."""

    def run(checkpoint: Checkpoint, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        model, inputs = plain_model(checkpoint), {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
                inputs[name] = args[0].flatten(0, -2).double()

            return hook

        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                weight = f"{name}.weight"
                module.register_forward_hook(keep(checkpoint.aliases.get(weight, weight)))
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        return inputs

    return run
