"""The command line: thin verbs over the library. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from anyquant import __version__
from anyquant.console import Group, Output, Size, run
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


def target_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that ``plan`` and ``quantize`` share."""
    function = job_options(function)
    for option in reversed(
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
        ]
    ):
        function = option(function)
    return function


def job_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that say how, but not how large: those of ``sweep`` too."""
    for option in reversed(
        [
            click.option("--method", default="block", show_default=True, help="See 'anyquant methods'."),
            click.option(
                "--allocation",
                type=click.Choice(["model", "matrix", "uniform"]),
                help="Who shares a budget: the model, each matrix; or one width for all.  [model; matrix with "
                "--importance activation]",
            ),
            click.option("--block", type=click.Choice(["16", "32"]), help="block: block length.  [32]"),
            click.option("--outliers", type=float, metavar="PERCENT", help="skim: weights kept in FP16.  [0]"),
            click.option(
                "--calib",
                default="self",
                show_default=True,
                metavar="TEXT",
                help="skim: text to weight errors by: a file, a dataset id, or self.",
            ),
            click.option("--calib-windows", type=int, default=32, show_default=True, help="Windows of that text."),
            click.option("--calib-window", type=int, default=256, show_default=True, help="Tokens per window."),
            click.option(
                "--importance",
                type=click.Choice(["gradient", "activation", "fisher"]),
                default="gradient",
                show_default=True,
                help="What weights errors: gradients of rows and inputs, inputs alone, or gradients of each weight.",
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
        ]
    ):
        function = option(function)
    return function


_CALIBRATION = ("calib", "calib_windows", "calib_window", "importance")


def _refuse(options: Iterable[str], why: str) -> None:
    """Refuse options that were given, but would change nothing.

    Raises:
        UsageError: the first of them.
    """
    context = click.get_current_context()
    for name in options:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name.replace('_', '-')} {why}")


def _job(method: str, bits: float | None, size: int | None, size_of: str, **rest: Any) -> Any:
    from anyquant.calibration import CalibrationSettings
    from anyquant.methods import get_method
    from anyquant.planning import Job, Target

    options: dict[str, Any] = {}
    if rest["block"]:
        options["block"] = int(rest["block"])
    if rest["outliers"] is not None:
        options["outliers"] = rest["outliers"]
    if not get_method(method).needs_statistics:
        _refuse(_CALIBRATION, f"has no meaning for the method {method}, which needs no text.")
    workers = rest["workers"] or min(8, len(os.sched_getaffinity(0)))
    target = Target(bits=bits, size=size, size_of=size_of, count=rest["count"])
    calibration = CalibrationSettings(
        rest["calib"], rest["calib_windows"], rest["calib_window"], rest["seed"], rest["importance"]
    )
    return Job(
        method,
        target,
        options,
        quantize_embeddings=rest["quantize_embeddings"],
        allocation=rest["allocation"],
        calibration=calibration,
        workers=workers,
    )


@contextmanager
def _work(
    checkpoint: Any, job: Any, path: Path | None, out: Output, *, resume: bool | None = None, keep: bool = True
) -> Iterator[Any]:
    """The work folder of a job; a temporary one without a path. What the calibration found is told at the end.

    ``resume`` is None for verbs that go on by themselves when they are repeated.
    """
    import tempfile

    from anyquant.workfolder import work_folder

    with ExitStack() as stack:
        kept = path or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="anyquant-"))) / "work"
        try:
            with work_folder(kept, job.identity(checkpoint), resume=bool(resume), keep=keep) as work:
                yield work
                for note in work.notes():
                    out.note(f"calibration: {note}")
        except KeyboardInterrupt:
            if path is None:
                raise
            raise Interrupted(str(path), resume=resume is not None) from None


def _open(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    from anyquant.checkpoint import open_checkpoint
    from anyquant.runtime import native

    native.install()
    return open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="anyquant %(version)s")
def cli() -> None:
    """Take a language model to any size, and run that one result everywhere.

    \b
    anyquant quantize SmolLM2.gguf -o small --method block --bits 4.25
    anyquant export gguf small -o small.gguf
    anyquant export onnx small -o small-onnx
    anyquant validate small --gguf small.gguf --onnx small-onnx --text t.txt

    MODEL is a folder in Hugging Face's layout, a hub id, or a .gguf file.
    """


@cli.command()
@MODEL
@REVISION
@REMOTE
@verb
def inspect(out: Output, model: str, revision: str | None, trust_remote_code: bool) -> None:
    """What is in MODEL, which exporters take it, feasible bits.

    \b
    Example: anyquant inspect SmolLM2-135M-Instruct.Q4_1.gguf
    """
    from anyquant import ir
    from anyquant.inspection import inspect_checkpoint, inspect_ir
    from anyquant.summary import inspection_text

    if (Path(model) / "anyquant.json").is_file():
        data = inspect_ir(ir.open_ir(model))
    else:
        data = inspect_checkpoint(_open(model, revision, trust_remote_code))
    out.result(data, lambda: inspection_text(data))


@cli.command()
@MODEL
@target_options
@verb
def plan(out: Output, model: str, revision: str | None, trust_remote_code: bool, **options: Any) -> None:
    """Sizes, memory and feasibility, before anything is done.

    \b
    Example: anyquant plan SmolLM2.gguf --bits 4.25
             anyquant plan SmolLM2.gguf --size 100MB --for gguf
             anyquant plan SmolLM2.gguf --method skim --bits 3.25
    """
    from anyquant.planning import plan as work_out
    from anyquant.summary import plan_data, plan_text

    work_dir = options.pop("work_dir")
    checkpoint, job = _open(model, revision, trust_remote_code), _job(**options)
    with _work(checkpoint, job, work_dir, out) as work, out.progress("measuring") as progress:
        planned = work_out(checkpoint, job, work, progress, out.note)
    data = plan_data(planned)
    out.result(data, lambda: plan_text(data))


def _targets(context: click.Context, option: click.Parameter, text: str) -> list[float]:
    try:
        return [float(target) for target in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of bits; write for example 2.3,3,3.25,4.", context) from None


@cli.command()
@MODEL
@click.option("--targets", required=True, callback=_targets, metavar="B,B,...", help="Bits per weight, like --bits.")
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE", help="UTF-8 text to measure losses on.")
@click.option("--report", type=click.Path(path_type=Path), metavar="DIR", help="Write sweep.json and sweep.html.")
@click.option("--windows", type=int, default=16, show_default=True, help="At most so many windows of --text.")
@click.option("--window", type=int, default=512, show_default=True, help="Tokens per window of --text.")
@job_options
@verb
def sweep(
    out: Output,
    model: str,
    targets: list[float],
    text: Path | None,
    report: Path | None,
    windows: int,
    window: int,
    revision: str | None,
    trust_remote_code: bool,
    work_dir: Path | None,
    **options: Any,
) -> None:
    """Bytes and loss of MODEL at many sizes.

    \b
    Example: anyquant sweep SmolLM2.gguf --method skim --targets 2.5,3,3.25,4
               --text text.txt --report sizes
    """
    from anyquant.report.sweeps import prepare_sweep, sweep_text, write_sweep
    from anyquant.sweep import TextSettings
    from anyquant.sweep import sweep as sweep_over

    if text is None:
        _refuse(["windows", "window"], "has no meaning without --text.")
    if report:
        prepare_sweep(report)
    checkpoint = _open(model, revision, trust_remote_code)
    jobs = [_job(bits=bits, size=None, size_of="ir", **options) for bits in targets]
    measured = TextSettings(text, windows, window, options["seed"]) if text else None
    with _work(checkpoint, jobs[0], work_dir, out) as work, out.progress("sweeping") as progress:
        found = sweep_over(
            checkpoint, jobs, work, measured, trust_remote_code=trust_remote_code, progress=progress, note=out.note
        )
    if report:
        write_sweep(found, report)
    out.result(found.to_json(), lambda: sweep_text(found))


@cli.command()
@MODEL
@click.option(
    "-o", "--out", "output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="New folder."
)
@target_options
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@verb
def quantize(
    out: Output,
    model: str,
    output: Path,
    revision: str | None,
    trust_remote_code: bool,
    work_dir: Path | None,
    resume: bool,
    **options: Any,
) -> None:
    """Quantize MODEL into a folder, from which exports are made.

    \b
    Example: anyquant quantize SmolLM2.gguf -o small --method skim --bits 3.25
             anyquant quantize SmolLM2.gguf -o small --size 90MB
    """
    from anyquant import ir
    from anyquant.pipeline import run as quantize_as
    from anyquant.planning import plan as work_out
    from anyquant.summary import mean_losses, plan_data, quantized_text

    if not resume:
        ir.refuse_existing(output)
    checkpoint, job = _open(model, revision, trust_remote_code), _job(**options)
    with ExitStack() as stack:
        work = None
        if work_dir or resume or job.needs_statistics:
            beside = output.with_name(output.name + ".work")
            folder = _work(checkpoint, job, work_dir or beside, out, resume=resume, keep=work_dir is not None)
            work = stack.enter_context(folder)
        with out.progress("measuring") as progress:
            planned = work_out(checkpoint, job, work, progress)
        with out.progress("quantizing") as progress:
            made = quantize_as(planned, output, work, progress, resume=resume)
    data = {**plan_data(planned, exports=False), "output": str(output), **mean_losses(made)}
    out.result(data, lambda: quantized_text(data))


@cli.command()
@FOLDER
@click.option(
    "-o", "--out", "output", required=True, type=click.Path(path_type=Path), metavar="REPORT", help="Folder to fill."
)
@click.option("--source", metavar="MODEL", help="The unquantized model: shows weights before, errors of rows.")
@click.option("--matrix", metavar="NAME", help="Shown in detail.  [the one whose outputs lose most]")
@click.option("--sweep", type=click.Path(path_type=Path), metavar="FILE", help="A sweep.json of the same model.")
@REVISION
@REMOTE
@verb
def report(out: Output, folder: Path, output: Path, **options: Any) -> None:
    """What the quantization made of a DIR, as a page with plots.

    \b
    Example: anyquant report small -o report --source SmolLM2.gguf
               --sweep sizes/sweep.json
    """
    from anyquant.report.run import ReportSettings, report_text
    from anyquant.report.run import report as write
    from anyquant.runtime import native

    if options["source"] is None:
        _refuse(["revision", "trust_remote_code"], "has no meaning without --source.")
    native.install()
    with out.progress("reading") as progress:
        facts = write(ReportSettings(folder, output, **options), progress)
    out.result(facts.to_json(), lambda: report_text(facts, output))


@cli.command()
@click.argument("exporter", metavar="FORMAT")
@FOLDER
@click.option(
    "-o", "--out", "output", required=True, type=click.Path(path_type=Path), metavar="PATH", help="New file or folder."
)
@click.option("--layout", type=click.Choice(["native", "f32", "f16"]), default="native", show_default=True)
@click.option("--allow-rounding", is_flag=True, help="Round what does not fit; recorded in the file.")
@click.option("--accuracy-level", type=click.IntRange(0, 4), default=0, show_default=True, help="ONNX: of MatMulNBits.")
@click.option(
    "--flavor", default="genai", show_default=True, help="ONNX: genai adds what onnxruntime-genai needs; or plain."
)
@click.option(
    "--fallback",
    type=click.Choice(["fold", "stream"]),
    default="fold",
    show_default=True,
    help="ONNX: codebook matrices without a kernel: FP32 once loaded, or packed and slow.",
)
@verb
def export(out: Output, exporter: str, folder: Path, output: Path, **options: Any) -> None:
    """Write a quantized DIR as FORMAT: gguf, onnx, or a plug-in's.

    \b
    Example: anyquant export gguf small -o small.gguf
             anyquant export onnx small -o small-onnx
             anyquant export gguf small -o exact.gguf --layout f32
    """
    from anyquant import ir
    from anyquant.exporters.protocol import ExportOptions
    from anyquant.exporters.registry import get_exporter
    from anyquant.runtime import native
    from anyquant.summary import export_data, export_text

    native.install()
    chosen = get_exporter(exporter)
    model = ir.open_ir(folder)
    with out.progress("exporting") as progress:
        done = chosen.export(model, output, ExportOptions(**options), progress)
    data = {"exporter": exporter, "output": str(output), **export_data(done)}
    out.result(data, lambda: export_text(data))


@cli.command()
@FOLDER
@click.option(
    "--text", required=True, type=click.Path(path_type=Path), metavar="FILE", help="UTF-8 text to measure on."
)
@click.option("--source", metavar="MODEL", help="The unquantized model: measures what was lost.")
@click.option("--gguf", type=click.Path(path_type=Path), metavar="FILE", help="Exported GGUF, run by llama.cpp.")
@click.option("--onnx", type=click.Path(path_type=Path), metavar="DIR2", help="Exported ONNX, run by ONNX Runtime.")
@click.option("--report", type=click.Path(path_type=Path), metavar="DIR", help="Write report.json and report.html.")
@click.option("--max-kl", type=float, metavar="X", help="Gate: mean KL to the source, in nats.")
@click.option("--min-top1", type=float, metavar="Y", help="Gate: top-1 agreement with the source, 0 to 1.")
@click.option("--windows", type=int, default=16, show_default=True, help="At most so many windows of text.")
@click.option("--window", type=int, default=512, show_default=True, help="Tokens per window.")
@click.option("--seed", type=int, default=0, show_default=True, help="For choosing windows, and the bootstrap.")
@click.option("--threads", type=int, metavar="N", help="Threads per runtime.  [all cores]")
@click.option("--prompt", metavar="TEXT", help="Sent through the chat template to each.")
@REVISION
@REMOTE
@verb
def validate(out: Output, folder: Path, prompt: str | None, **options: Any) -> None:
    """Prove that the files of DIR hold and compute the same; measure loss.

    \b
    Example: anyquant validate small --source SmolLM2.gguf --text text.txt
               --gguf small.gguf --onnx small-onnx --report validation
    """
    from anyquant.runtime import native
    from anyquant.validation import ValidationSettings, format_table
    from anyquant.validation import validate as prove
    from anyquant.validation.report import to_json

    native.install()
    if prompt is not None:
        options["prompt"] = prompt
    with out.progress("validating") as progress:
        report = prove(ValidationSettings(model=folder, **options), progress)
    out.result(
        to_json(report), lambda: format_table(report, color=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    )
    report.require()


@cli.command()
@verb
def exporters(out: Output) -> None:
    """List the installed exporters.

    \b
    Example: anyquant exporters
    """
    _list_plugins(out, "anyquant.exporters")


@cli.command()
@verb
def methods(out: Output) -> None:
    """List the installed quantization methods.

    \b
    Example: anyquant methods
    """
    _list_plugins(out, "anyquant.methods")


def _list_plugins(out: Output, group: str) -> None:
    from anyquant.plugins import plugins

    found = [
        {"name": p.name, "package": p.package, "error": p.error, "summary": getattr(p.value, "summary", "")}
        for p in plugins(group).values()
    ]
    lines = [f"{p['name']:<10} {p['error'] or p['summary']}  ({p['package']})" for p in found]
    out.result({group.rpartition(".")[2]: found}, lambda: "\n".join(lines))


@cli.command()
@verb
def doctor(out: Output) -> None:
    """What is installed here, and what it is good for.

    \b
    Example: anyquant doctor
    """
    from anyquant.doctor import diagnose, diagnosis_text

    data = diagnose()
    out.result(data, lambda: diagnosis_text(data))


def main() -> None:
    """Entry point of the ``anyquant`` command."""
    run(cli)
