"""What verbs of the command line share: their options, the job that these describe, its work folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from anyquant.console import Output, Size
from anyquant.errors import Interrupted, UsageError

MODEL = click.argument("model", metavar="MODEL")
FOLDER = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
REVISION = click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
REMOTE = click.option("--trust-remote-code", is_flag=True, help="Let transformers run code shipped with the model.")


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Add --json and --quiet, and hand the verb an Output as its first argument."""

    def call(as_json: bool, quiet: bool, **arguments: Any) -> None:
        function(Output(as_json, quiet), **arguments)

    call.__doc__, call.__name__ = function.__doc__, function.__name__
    call.__click_params__ = list(getattr(function, "__click_params__", []))  # type: ignore[attr-defined]
    call = click.option("--quiet", is_flag=True, help="Print errors only.")(call)
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, the rest on stderr.")(
        call
    )


def _with(function: Callable[..., None], options: Sequence[Any]) -> Callable[..., None]:
    """The function with options, in this order."""
    for option in reversed(options):
        function = option(function)
    return function


def target_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that ``plan`` and ``quantize`` share."""
    return _with(
        job_options(function),
        [
            click.option(
                "--bits", type=float, metavar="B", help="Bits per weight of the matrices, all overhead counted."
            ),
            click.option("--size", type=Size(), metavar="S", help="Most bytes of the model, such as 75MiB."),
            click.option(
                "--for",
                "size_of",
                default="ir",
                show_default=True,
                metavar="FORMAT",
                help="--size of the ir, gguf or onnx files.",
            ),
        ],
    )


def job_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that say how, but not how large: those of ``sweep`` too."""
    return _with(
        function,
        [
            click.option("--method", default="block", show_default=True, help="See 'anyquant methods'."),
            click.option(
                "--allocation",
                type=click.Choice(["model", "matrix", "uniform"]),
                help="Who shares a budget: the model, each matrix; or one width for all.  [model, or what the "
                "method wants]",
            ),
            click.option(
                "--search",
                type=click.Choice(["greedy", "tpe"]),
                default="greedy",
                show_default=True,
                help="How matrices share bits: by errors, or by trials after that (needs optuna).",
            ),
            click.option("--trials", type=click.IntRange(1), default=64, show_default=True, help="Of --search tpe."),
            click.option("--block", type=click.Choice(["16", "32"]), help="block: block length."),
            click.option("--outliers", type=float, metavar="PERCENT", help="skim, claq: weights kept in FP16.  [0]"),
            click.option(
                "--set",
                "set_options",
                multiple=True,
                metavar="KEY=VALUE",
                help="An option of the method; 'anyquant methods NAME' lists them.",
            ),
            click.option(
                "--profile",
                type=click.Choice(["best", "paper"]),
                help="What measures best, or what the method's paper says.  [best]",
            ),
            click.option(
                "--refine",
                is_flag=True,
                help="Better codes, with codebooks or scales, for what passes through; same size.",
            ),
            click.option(
                "--row-groups",
                type=click.IntRange(0),
                default=0,
                show_default=True,
                metavar="N",
                help="--refine: groups of rows with inputs weighted by gradients (GuidedQuant: 4).",
            ),
            click.option(
                "--calib",
                default="self",
                show_default=True,
                metavar="TEXT",
                help="Text to weight errors by: a file, a dataset id, or self.",
            ),
            click.option("--calib-windows", type=int, default=32, show_default=True, help="Windows of that text."),
            click.option("--calib-window", type=int, default=256, show_default=True, help="Tokens per window."),
            click.option(
                "--importance",
                type=click.Choice(["gradient", "norms", "activation", "fisher"]),
                help="What weights errors: gradients of rows and inputs, inputs alone (norms takes least memory), or "
                "gradients of each weight.  [gradient, or what the method wants]",
            ),
            click.option("--seed", type=int, default=0, show_default=True, help="Of all that is drawn by chance."),
            click.option(
                "--work-dir",
                type=click.Path(path_type=Path),
                metavar="W",
                help="Keep statistics and errors there, for any later target.",
            ),
            click.option("--quantize-embeddings", is_flag=True, help="Include embeddings and lm_head."),
            click.option(
                "--count",
                type=click.Choice(["all", "index"]),
                default="all",
                show_default=True,
                help="What --bits counts: all bytes, or codes alone.",
            ),
            click.option(
                "--workers", type=click.IntRange(1), metavar="N", help="Threads; any number gives the same bytes."
            ),
            REVISION,
            REMOTE,
        ],
    )


_CALIBRATION = ("calib", "calib_windows", "calib_window", "importance")


def refuse_unread(options: Iterable[str], why: str) -> None:
    """Refuse options that were given, but would change nothing.

    Raises:
        UsageError: the first of them.
    """
    context = click.get_current_context()
    for name in options:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name.replace('_', '-')} {why}")


def job_of(method: str, bits: float | None, size: int | None, size_of: str, **rest: Any) -> Any:
    """The job that the options describe.

    Raises:
        UsageError: they contradict each other.
    """
    from anyquant.calibration import CalibrationSettings
    from anyquant.job import Job, Target
    from anyquant.methods import get_method
    from anyquant.methods.options import parse
    from anyquant.workers import default_workers

    options: dict[str, Any] = {}
    if rest["block"]:
        options["block"] = int(rest["block"])
    if rest["outliers"] is not None:
        options["outliers"] = rest["outliers"]
    chosen = get_method(method)
    more = parse(method, chosen.options, rest["set_options"])
    for name in sorted(set(more) & set(options)):
        raise UsageError(f"--{name} and --set {name} both say what {name} is: leave one out.")
    options |= more
    if rest["profile"]:
        options["profile"] = rest["profile"]
    target = Target(bits=bits, size=size, size_of=size_of, count=rest["count"])
    settings = chosen.settings(options)
    if not (rest["refine"] or chosen.needs_statistics(settings)):
        refuse_unread(_CALIBRATION, f"has no meaning for the method {method} with these settings: it needs no text.")
    if rest["search"] == "greedy":
        refuse_unread(["trials"], "has no meaning without --search tpe.")
    if not rest["refine"]:
        refuse_unread(["row_groups"], "has no meaning without --refine.")
    calibration = CalibrationSettings(
        rest["calib"], rest["calib_windows"], rest["calib_window"], rest["seed"], rest["importance"], rest["row_groups"]
    )
    return Job(
        method,
        target,
        options,
        quantize_embeddings=rest["quantize_embeddings"],
        allocation=rest["allocation"],
        calibration=calibration,
        refine=rest["refine"],
        sequential=rest.get("sequential", False),
        search=rest["search"],
        trials=rest["trials"],
        workers=rest["workers"] or default_workers(),
    )


@contextmanager
def work_of(
    checkpoint: Any, job: Any, path: Path | None, out: Output, *, resume: bool | None = None, keep: bool = True
) -> Iterator[Any]:
    """The work folder of a job; a temporary one without a path. What the calibration found is told at the end.

    ``resume`` is None for verbs that go on by themselves when they are repeated.
    """
    from anyquant.workfolder import temporary_work_folder, work_folder

    identity = job.identity(checkpoint)
    folder = work_folder(path, identity, resume=bool(resume), keep=keep) if path else temporary_work_folder(identity)
    try:
        with folder as work:
            yield work
            for note in work.notes():
                out.note(f"calibration: {note}")
    except KeyboardInterrupt:
        if path is None:
            raise
        raise Interrupted(str(path), resume=resume is not None) from None


def open_model(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The checkpoint that MODEL names."""
    from anyquant.checkpoint import open_checkpoint
    from anyquant.runtime import native

    native.install()
    return open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
