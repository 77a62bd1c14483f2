"""The command line: thin verbs over the library. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from anyquant import __version__
from anyquant.console import Group, Output, run
from anyquant.options import (
    FOLDER,
    MODEL,
    REMOTE,
    REVISION,
    job_of,
    job_options,
    open_model,
    refuse_unread,
    target_options,
    verb,
    work_of,
)


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
        data = inspect_checkpoint(open_model(model, revision, trust_remote_code))
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
    checkpoint, job = open_model(model, revision, trust_remote_code), job_of(**options)
    with work_of(checkpoint, job, work_dir, out) as work, out.progress("measuring") as progress:
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
        refuse_unread(["windows", "window"], "has no meaning without --text.")
    if report:
        prepare_sweep(report)
    checkpoint = open_model(model, revision, trust_remote_code)
    jobs = [job_of(bits=bits, size=None, size_of="ir", **options) for bits in targets]
    measured = TextSettings(text, windows, window, options["seed"]) if text else None
    with work_of(checkpoint, jobs[0], work_dir, out) as work, out.progress("sweeping") as progress:
        found = sweep_over(checkpoint, jobs, work, measured, progress=progress, note=out.note)
    if report:
        write_sweep(found, report)
    out.result(found.to_json(), lambda: sweep_text(found))


@cli.command()
@MODEL
@click.option(
    "-o", "--out", "output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="New folder."
)
@target_options
@click.option(
    "--sequential", is_flag=True, help="Quantize in order, each matrix for what the quantized ones before it make."
)
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
    from anyquant.runtime.memory import return_freed_memory
    from anyquant.summary import mean_losses, plan_data, quantized_text
    from anyquant.workfolder import beside

    if not resume:
        ir.refuse_existing(output)
    return_freed_memory()
    checkpoint, job = open_model(model, revision, trust_remote_code), job_of(**options)
    with ExitStack() as stack:
        work = None
        if work_dir or resume or job.needs_statistics:
            folder = work_dir or beside(output)
            work = stack.enter_context(work_of(checkpoint, job, folder, out, resume=resume, keep=work_dir is not None))
        with out.progress("measuring") as progress:
            planned = work_out(checkpoint, job, work, progress, out.note)
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
        refuse_unread(["revision", "trust_remote_code"], "has no meaning without --source.")
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
@click.option("--with-runtime", is_flag=True, help="ONNX: put that kernel, for the CPU, beside the model.")
@verb
def export(out: Output, exporter: str, folder: Path, output: Path, **options: Any) -> None:
    """Write a quantized DIR as FORMAT: gguf, onnx, or a plug-in's.

    \b
    Example: anyquant export gguf small -o small.gguf
             anyquant export onnx small -o small-onnx --with-runtime
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
@click.option("--activations", metavar="FORMAT", help="Also the IR with activations in bfp2 to bfp8, blocks of 16.")
@click.option("--device", default="cpu", metavar="cpu|cuda", help="cuda: also the IR on a GPU, by our kernels.")
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
@click.argument("name", required=False)
@verb
def methods(out: Output, name: str | None) -> None:
    """List the installed methods, or the options of one.

    \b
    Example: anyquant methods
             anyquant methods claq
    """
    if name is None:
        _list_plugins(out, "anyquant.methods")
        return
    from anyquant.summary import method_data, method_text

    data = method_data(name)
    out.result(data, lambda: method_text(data))


def _list_plugins(out: Output, group: str) -> None:
    from anyquant.plugins import plugins

    found = [
        {"name": p.name, "package": p.package, "error": p.error, "summary": getattr(p.value, "summary", "")}
        for p in plugins(group).values()
    ]
    lines = [f"{p['name']:<10} {p['error'] or p['summary']}  ({p['package']})" for p in found]
    out.result({group.rpartition(".")[2]: found}, lambda: "\n".join(lines))


@cli.command()
@click.argument("runner", type=click.Choice(["ggml"]))
@verb
def plugin(out: Output, runner: str) -> None:
    """Print where the plug-in lies that gives ggml the tensor types of our GGUF files.

    docs/gguf-format.md says which runners take it, and how.

    \b
    Example: anyquant plugin ggml
    """
    from anyquant.runtime import ggml_plugin

    found = str(ggml_plugin.path())
    out.result({runner: found}, lambda: found)


@cli.command()
@click.option("--runner", type=click.Path(path_type=Path), help="Try whether these libraries take the ggml plug-in.")
@verb
def doctor(out: Output, runner: Path | None) -> None:
    """What is installed here, and what it is good for.

    \b
    Example: anyquant doctor
             anyquant doctor --runner node_modules/@node-llama-cpp/linux-x64
    """
    from anyquant.doctor import diagnose, diagnosis_text

    data = diagnose(runner)
    out.result(data, lambda: diagnosis_text(data))


def main() -> None:
    """Entry point of the ``anyquant`` command."""
    run(cli)
