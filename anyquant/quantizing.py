"""From a checkpoint to an IR folder in one call: what ``anyquant quantize`` does, for Python."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from anyquant import ir
from anyquant.checkpoint import open_checkpoint
from anyquant.job import Job
from anyquant.pipeline import run
from anyquant.planning import plan
from anyquant.runtime import native
from anyquant.workfolder import beside, work_folder


def quantize(
    model: str | Path,
    output: str | Path,
    job: Job,
    *,
    work_dir: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: ir.Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> ir.Model:
    """Quantize a model into a new folder, from which exports are made; the bytes are those of the command line.

    Args:
        model: a folder in Hugging Face's layout, a hub id, or a .gguf file.
        output: the folder to make.
        job: the method, the target, and how it is to be met.
        work_dir: keeps statistics and errors there, for any later target; else they are in OUTPUT.work, which is
            removed at the end, and stays after an error.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: let transformers run code shipped with the model.
        progress: called with (what, done, all) as things advance.
        note: told what a user should know: how long it will take, what the calibration found.

    Returns:
        What was written; see :func:`anyquant.load` to run it.

    Raises:
        AnyquantError: the target is out of reach (InfeasibleTarget), the model, the text or an option cannot be used,
            the folder exists (UsageError), or the machine does not suffice; nothing is left under the final name.
    """
    ir.refuse_existing(Path(output))
    native.install()
    checkpoint = open_checkpoint(str(model), revision=revision, trust_remote_code=trust_remote_code)
    with ExitStack() as stack:
        work = None
        if work_dir is not None or job.needs_statistics:
            folder = beside(Path(output)) if work_dir is None else Path(work_dir)
            kept = work_folder(folder, job.identity(checkpoint), resume=False, keep=work_dir is not None)
            work = stack.enter_context(kept)
        made = run(plan(checkpoint, job, work, progress, note), output, work, progress)
        if work and note:
            for words in work.notes():
                note(f"calibration: {words}")
        return made
