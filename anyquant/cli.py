"""The command line: thin verbs over the library. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from anyquant import __version__
from anyquant.console import Group, Output, Size, run

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
    for option in reversed(
        [
            click.option("--method", default="block", show_default=True, help="See 'anyquant methods'."),
            click.option(
                "--bits", type=float, metavar="B", help="Bits per weight of the matrices, all overhead counted."
            ),
            click.option("--size", type=Size(), metavar="S", help="Most bytes of the model, such as 75MiB."),
            click.option(
                "--for", "size_of", default="ir", show_default=True, help="--size of the ir, gguf or onnx files."
            ),
            click.option("--block", type=click.Choice(["16", "32"]), help="Block length of the method block.  [32]"),
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


def _job(method: str, bits: float | None, size: int | None, size_of: str, **rest: Any) -> Any:
    from anyquant.planning import Job, Target

    options: dict[str, Any] = {}
    if rest["block"]:
        options["block"] = int(rest["block"])
    workers = rest["workers"] or min(8, len(os.sched_getaffinity(0)))
    target = Target(bits=bits, size=size, size_of=size_of, count=rest["count"])
    return Job(method, target, options, rest["quantize_embeddings"], workers)


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
    """
    from anyquant.planning import plan as work_out
    from anyquant.summary import plan_data, plan_text

    checkpoint = _open(model, revision, trust_remote_code)
    with out.progress("measuring") as progress:
        planned = work_out(checkpoint, _job(**options), progress)
    data = plan_data(planned)
    out.result(data, lambda: plan_text(data))


@cli.command()
@MODEL
@click.option(
    "-o", "--out", "output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="New folder."
)
@target_options
@verb
def quantize(
    out: Output, model: str, output: Path, revision: str | None, trust_remote_code: bool, **options: Any
) -> None:
    """Quantize MODEL into a folder, from which exports are made.

    \b
    Example: anyquant quantize SmolLM2.gguf -o small --bits 4.25 --block 32
             anyquant quantize SmolLM2.gguf -o small --size 90MB
    """
    from anyquant import ir
    from anyquant.pipeline import run as work
    from anyquant.planning import plan as work_out
    from anyquant.summary import plan_data, quantized_text

    ir.refuse_existing(output)
    checkpoint = _open(model, revision, trust_remote_code)
    with out.progress("measuring") as progress:
        planned = work_out(checkpoint, _job(**options), progress)
    with out.progress("quantizing") as progress:
        made = work(planned, output, progress)
    data = {**plan_data(planned, exports=False), "output": str(output), "error": _mean_error(made)}
    out.result(data, lambda: quantized_text(data))


def _mean_error(model: Any) -> float:
    """Relative squared error over the quantized matrices, weighted by their sizes."""
    chosen = [entry for entry in model.entries.values() if entry.quantized]
    return float(sum(e.error * e.spec.numel for e in chosen) / sum(e.spec.numel for e in chosen))


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
               --gguf small.gguf --onnx small-onnx --report report
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
