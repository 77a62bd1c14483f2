"""From a checkpoint to an IR folder in one call: what ``anyquant quantize`` does, for Python."""

from __future__ import annotations

from pathlib import Path

from anyquant import ir
from anyquant.checkpoint import open_checkpoint
from anyquant.job import Job
from anyquant.pipeline import run
from anyquant.planning import plan
from anyquant.runtime import native
from anyquant.workfolder import temporary_work_folder, work_folder


def quantize(
    model: str | Path,
    output: str | Path,
    job: Job,
    *,
    work_dir: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: ir.Progress | None = None,
) -> ir.Model:
    """Quantize a model into a new folder, from which exports are made; the bytes are those of the command line.

    Args:
        model: a folder in Hugging Face's layout, a hub id, or a .gguf file.
        output: the folder to make.
        job: the method, the target, and how it is to be met.
        work_dir: keeps statistics and errors there, for any later target; else they are in a temporary folder.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: let transformers run code shipped with the model.
        progress: called with (what, done, all) as things advance.

    Returns:
        What was written; see :func:`anyquant.load` to run it.

    Raises:
        AnyquantError: the target is out of reach (InfeasibleTarget), the model, the text or an option cannot be used,
            the folder exists (UsageError), or the machine does not suffice; nothing is left under the final name.
    """
    ir.refuse_existing(Path(output))
    native.install()
    checkpoint = open_checkpoint(str(model), revision=revision, trust_remote_code=trust_remote_code)
    identity = job.identity(checkpoint)
    folder = (
        temporary_work_folder(identity)
        if work_dir is None
        else work_folder(Path(work_dir), identity, resume=False, keep=True)
    )
    with folder as work:
        return run(plan(checkpoint, job, work, progress), output, work, progress)
