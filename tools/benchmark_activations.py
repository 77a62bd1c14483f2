"""Where a model loses what block floating point costs its activations: which products, widths, blocks and axes.

    python tools/benchmark_activations.py --work W                      SmolLM2-135M as a float model ("dithered")
    python tools/benchmark_activations.py --work W --source stock       as it comes; or another language model's folder
    python tools/benchmark_activations.py --work W --windows 2 --rows 'W6*'

Zhang et al. (arXiv 2310.05079) find W6A6 nearly free. Here weights (W), activations (A) or both are rounded to BFP, in
blocks of 16 along the dimension that is summed over where a row says nothing else; of activations the inputs of linear
layers and both operands of Q K^T and A V. Intervals are 95 %, by bootstrap over windows, paired with the source.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accuracy.material import DITHERED, ENCODER, material
from accuracy.texts import WINDOW
from numpy.typing import NDArray

from anyquant.calibration.blocks import decoder_blocks
from anyquant.calibration.tokens import load_tokenizer
from anyquant.checkpoint import open_checkpoint
from anyquant.console import table
from anyquant.errors import AnyquantError, UsageError
from anyquant.reporting.words import number, with_error
from anyquant.runtime.model import model_of
from anyquant.validation.activation_formats import ActivationFormat
from anyquant.validation.activations import every_product, quantized_activations, round_to_bfp
from anyquant.validation.bootstrap import Bootstrap
from anyquant.validation.metrics import compare_logits, log_normalizers, token_losses
from anyquant.validation.texts import cut_text

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rounded:
    """What is rounded.

    Attributes:
        name: of the row.
        weights: bits of all linear layers' in decoder blocks, in blocks of 16; None leaves them.
        activations: their format; None leaves them.
        products: which products' operands are rounded, see :func:`quantized_activations`.
        axes: of operands of attention.
    """

    name: str
    weights: int | None = None
    activations: ActivationFormat | None = None
    products: Callable[[str], bool] = every_product
    axes: Literal["reduction", "last"] = "reduction"

    def logits(self, models: dict[int | None, Any], ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """What the model answers, float32 [n, vocabulary]."""
        model = models[self.weights]
        rounding = nullcontext() if self.activations is None else quantized_activations(
            model, self.activations, products=self.products, axes=self.axes
        )  # fmt: skip
        with torch.inference_mode(), rounding:
            result: NDArray[np.float32] = model(torch.from_numpy(ids[None]), use_cache=False).logits[0].numpy()
        return result


def of(*words: str) -> Callable[[str], bool]:
    """Products whose name holds one of these words."""
    return lambda name: any(word in name for word in words)


_SIX = ActivationFormat(6)
SOURCE = Rounded("source")
ROWS = (
    Rounded("W6", 6),
    Rounded("W6A8", 6, ActivationFormat(8)),
    Rounded("W6A7", 6, ActivationFormat(7)),
    Rounded("W6A6", 6, _SIX),
    Rounded("W6A6, K^T and V in blocks along their last dimension, as the authors simulate it", 6, _SIX, axes="last"),
    Rounded("A8", None, ActivationFormat(8)),
    Rounded("A6", None, _SIX),
    Rounded("A6 in blocks of 8", None, ActivationFormat(6, 8)),
    Rounded("A6 in blocks of 32", None, ActivationFormat(6, 32)),
    Rounded("A6 of the inputs of Q, K and V alone", None, _SIX, of("q_proj", "k_proj", "v_proj")),
    Rounded("A6 of Q K^T alone", None, _SIX, of("scores")),
    Rounded("A6 of K^T along tokens and Q alone", None, _SIX, of("scores"), "last"),
    Rounded("A6 of A V alone", None, _SIX, of("values")),
    Rounded("A6 of the inputs of the attention's output alone", None, _SIX, of("o_proj")),
    Rounded("A6 of the inputs of gate and up alone", None, _SIX, of("gate_proj", "up_proj")),
    Rounded("A6 of the inputs of down alone", None, _SIX, of("down_proj")),
)


@dataclass
class Answers:
    """Of one row: per window, nats of each token."""

    losses: list[Floats]
    kl: list[Floats]


def rounded_weights(model: Any, width: int) -> None:
    """Round the linear layers of all decoder blocks in place: what the method block makes of them."""
    for block in decoder_blocks(model, type(model).__name__)[1]:
        for layer in block.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.data = round_to_bfp(layer.weight.data, width)


def run(source: Path, text: Path, windows: int, window: int, rows: Sequence[Rounded]) -> Iterator[list[Answers]]:
    """Measure all rows on a window after the other; the source's answers come first."""
    checkpoint = open_checkpoint(str(source))

    models = {width: model_of(checkpoint) for width in {None, *(row.weights for row in rows)}}
    for width, model in models.items():
        if width is not None:
            rounded_weights(model, width)
    tokenizer = load_tokenizer(checkpoint)
    cut, notes = cut_text(text, tokenizer, checkpoint.config, window=window, windows=windows, seed=0)
    for note in notes:
        print(note, file=sys.stderr)
    found = [Answers([], []) for _ in (SOURCE, *rows)]
    for ids in cut.ids:
        exact = SOURCE.logits(models, ids)
        normalizers = log_normalizers(exact)
        for row, answers in zip((SOURCE, *rows), found, strict=True):
            logits = exact if row is SOURCE else row.logits(models, ids)
            own = log_normalizers(logits)
            answers.losses.append(token_losses(logits, ids, own))
            answers.kl.append(
                compare_logits(exact, logits, reference_normalizers=normalizers, candidate_normalizers=own).kl
            )
        yield found


def report(rows: Sequence[Rounded], found: Sequence[Answers]) -> str:
    """A table with a line for each row."""
    source, *others = found
    bootstrap = Bootstrap(len(source.losses))
    lines = [["source", with_error(bootstrap.mean(source.losses, np.exp)), "", ""]]
    for row, answers in zip(rows, others, strict=True):
        more = [mine - theirs for mine, theirs in zip(answers.losses, source.losses, strict=True)]
        ratio = bootstrap.mean(more, lambda x: 100 * np.expm1(x))
        interval = "" if ratio.low is None or ratio.high is None else f" [{ratio.low:.1f}, {ratio.high:.1f}]"
        lines.append([
            row.name, with_error(bootstrap.mean(answers.losses, np.exp)), f"{ratio.value:+.1f} %{interval}",
            number(bootstrap.mean(answers.kl).value),
        ])  # fmt: skip
    return table(["rounded", "perplexity", "against the source", "KL"], lines)


def main(arguments: list[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the model and the text, made where missing")
    parser.add_argument("--source", default=DITHERED, help=f"dithered, stock, or a language model [{DITHERED}]")
    parser.add_argument("--text", type=Path, help="to evaluate on [pages of Wikipedia]")
    parser.add_argument("--windows", type=int, default=8, help="[8]")
    parser.add_argument("--window", type=int, default=WINDOW, help=f"tokens in each [{WINDOW}]")
    parser.add_argument("--rows", default="*", help="pattern of names, such as 'W6*' [all]")
    chosen = parser.parse_args(arguments)
    rows = [row for row in ROWS if fnmatchcase(row.name, chosen.rows)]
    try:
        if not rows:
            raise UsageError(f"--rows {chosen.rows!r} matches none of: {'; '.join(row.name for row in ROWS)}.")
        if chosen.source == ENCODER:
            raise UsageError("--source encoder: it has no perplexity. Choose a language model.")
        made = material(chosen.source, "self", chosen.text, chosen.work)
        found: list[Answers] = []
        for found in run(made.model, made.evaluation, chosen.windows, chosen.window, rows):
            print(f"{len(found[0].losses)}/{chosen.windows} windows", file=sys.stderr, flush=True)
    except AnyquantError as error:
        print(f"benchmark_activations: {error}", file=sys.stderr)
        return error.exit_code
    print(report(rows, found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
