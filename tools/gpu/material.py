"""Real layers for a machine without a network: the first four blocks of SmolLM2, each quantized into another kind, with
inputs that were recorded, what they are multiplied to in FP64, and the logits of those four blocks."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import anyquant
from anyquant import ir
from anyquant.calibration import CalibrationSettings
from anyquant.errors import InputError
from anyquant.job import Job, Target
from anyquant.runtime.cuda.linear import quantized_linear
from anyquant.runtime.cuda.reference import KINDS

MODEL, RECORDS, ABOUT, TOKENS, LOGITS = "model", "records.safetensors", "about.json", "tokens", "logits"
MOST_BYTES = 50_000_000
ROWS = 32  # tokens that are recorded
BATCHES = (1, 4, 8, 16, 32)
LIMIT = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # inputs and results of 16 bits are rounded
LOGIT = 1e-3


def jobs_of(text: Path) -> list[Job]:
    """How the first blocks are quantized, and at last the embedding: rows and columns with codebooks, blocks, grids."""
    calibration = CalibrationSettings(str(text), windows=4, window=128)
    return [
        Job("skim", Target(bits=3.25), {"outliers": 0.5}, calibration=calibration),
        Job("claq", Target(bits=3.25), {"outliers": 0.2}, calibration=calibration),
        Job("affine", Target(bits=4.5), calibration=calibration),
        Job("block", Target(bits=4.25), quantize_embeddings=True),
    ]


@dataclass(frozen=True)
class Result:
    """A check against what was recorded.

    Attributes:
        what: was checked.
        found: the error.
        limit: that it may have.
        ok: whether it is within, and the same each time.
    """

    what: str
    found: float
    limit: float
    ok: bool


def prepare(source: Path, text: Path, folder: Path, jobs: Sequence[Job] | None = None) -> int:
    """Make the folder, as many blocks as there are jobs.

    Args:
        source: a checkpoint.
        text: to calibrate on, and whose first tokens are recorded.
        folder: to make; one that was there is replaced.
        jobs: for the blocks in turn, instead of those of jobs_of.

    Returns:
        Its bytes.

    Raises:
        InputError: it is larger than 50 MB.
    """
    jobs = jobs_of(text) if jobs is None else jobs
    with tempfile.TemporaryDirectory(prefix="anyquant-gpu-") as temporary:
        work = Path(temporary)
        tokenizer = _cut(source, len(jobs), work / "cut")
        made = [anyquant.quantize(work / "cut", work / f"{i}", job) for i, job in enumerate(jobs)]
        new = work / "new"
        model = _merged(made, new / MODEL)
        ids = torch.tensor([tokenizer(text.read_text(encoding="utf-8")[: 20 * ROWS]).input_ids[:ROWS]])
        about = _record(model, ids, new)
        (new / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
        nbytes = sum(file.stat().st_size for file in new.rglob("*") if file.is_file())
        if nbytes > MOST_BYTES:
            raise InputError(f"the material of {source} takes {nbytes:,} bytes; at most {MOST_BYTES:,} are carried")
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(new, folder)
    return nbytes


def _cut(source: Path, blocks: int, folder: Path) -> Any:
    """Write the first blocks of a checkpoint as one of their own; returns the tokenizer."""
    from anyquant.calibration.tokens import load_tokenizer
    from anyquant.checkpoint import open_checkpoint
    from anyquant.runtime.model import model_of

    checkpoint = open_checkpoint(str(source))
    model: Any = model_of(checkpoint)
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = blocks
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:blocks]
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _merged(made: Sequence[ir.Model], folder: Path) -> ir.Model:
    """Block i of model i, and what is in no block of the last one."""

    def home(name: str) -> ir.Model:
        _, mark, rest = name.partition(".layers.")
        return made[int(rest.partition(".")[0])] if mark else made[-1]

    entries = {name: home(name).entries[name] for name in made[-1].entries}
    plan = ir.Model(
        path=None, config=made[-1].config, method=made[-1].method, settings=made[-1].settings, source=made[-1].source,
        entries={name: replace(entry, sha256="") for name, entry in entries.items()}, aliases=made[-1].aliases,
    )  # fmt: skip

    def tensor(name: str) -> tuple[ir.Tensor, ir.Loss | None]:
        error = entries[name].error
        return home(name).tensor(name), None if error is None else ir.Loss(error, entries[name].output_error)

    return ir.write_ir(folder, plan, tensor)


def _record(model: ir.Model, ids: torch.Tensor, folder: Path) -> dict[str, Any]:
    """Run the model on the CPU; write inputs, exact products and logits; say which input is whose."""
    assert model.path is not None
    loaded: Any = anyquant.load(model.path, dequantize=True)
    records: dict[str, torch.Tensor] = {TOKENS: ids}
    input_of: dict[str, str] = {}
    seen: dict[int, str] = {}
    kept = []  # so that no other tensor takes the address

    def hook(name: str) -> Callable[..., None]:
        def note(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            kept.append(given[0])
            if given[0].data_ptr() not in seen:
                seen[given[0].data_ptr()] = f"input.{name}"
                records[f"input.{name}"] = given[0].reshape(-1, given[0].shape[-1]).clone()
            input_of[name] = seen[given[0].data_ptr()]

        return note

    for name, module in loaded.named_modules():
        if f"{name}.weight" in model.entries and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.inference_mode():
        records[LOGITS] = loaded(ids).logits[0].clone()
    for name, key in input_of.items():
        weight = torch.from_numpy(ir.dequantize(model.tensor(f"{name}.weight")))
        records[f"output.{name}"] = records[key].double() @ weight.double().T
    save_file(records, folder / RECORDS)
    return {"inputs": input_of, "kinds": {name: model.entries[f"{name}.weight"].spec.kind for name in input_of}}


def check(folder: Path, device: torch.device) -> list[Result]:
    """Products and logits on a device against what was recorded.

    Raises:
        InputError: no material is there.
    """
    if not (folder / ABOUT).is_file():
        raise InputError(f"{folder} holds no material: make it by tools/gpu_check --prepare, where there is a network")
    model, records = ir.open_ir(folder / MODEL), load_file(folder / RECORDS)
    inputs: Mapping[str, str] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["inputs"]
    results = []
    for name, key in inputs.items():
        tensor = model.tensor(f"{name}.weight")
        if not isinstance(tensor.spec, KINDS):
            continue
        layer = quantized_linear(tensor, None).to(device)
        for dtype, limit in LIMIT.items():
            results.append(_checked(f"{name}, {dtype}", layer, records[key], records[f"output.{name}"], dtype, limit))
    with torch.inference_mode():
        logits: torch.Tensor = anyquant.load(folder / MODEL, device=device)(records[TOKENS].to(device)).logits[0].cpu()
    error = float((logits - records[LOGITS]).abs().max())
    results.append(Result("logits", error, LOGIT, error <= LOGIT))
    return results


def _checked(
    what: str, layer: torch.nn.Module, x: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, limit: float
) -> Result:
    """The largest relative error of all batches, each made twice."""
    home = next(layer.buffers()).device
    given, worst, same = x.to(home, dtype), 0.0, True
    for batch in BATCHES:
        y = layer(given[:batch])
        same &= torch.equal(y, layer(given[:batch]))
        wanted = exact[:batch]
        worst = max(worst, float((y.cpu().double() - wanted).norm() / wanted.norm()))
    return Result(what, worst, limit, same and worst <= limit)


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For the report."""
    return [asdict(result) for result in results]
