"""The plug-in that gives a running ggml the tensor types of anyquant's GGUF files (kernels/ggml).

Runners that load ggml's backends from shared libraries take it from the environment variable GGML_BACKEND_PATH; into
any other it is loaded by hand, here by :func:`register`. docs/gguf-format.md says what it does there.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from anyquant.errors import InputError, MachineError
from anyquant.runtime import native

LIBRARY = "libanyquant_ggml.so"
_NEEDED = b"ggml_get_type_traits_cpu"
_SECONDS = 60
# In a process of its own: a library that is no ggml may do anything when it is loaded.
_BY_ROWS = 3
_TRIAL = f"""
import ctypes, sys
plugin, *libraries = sys.argv[1:]
kept = []
for path in libraries:
    try:
        kept.append(ctypes.CDLL(path))
    except OSError as error:
        print(error, file=sys.stderr)
plugin = ctypes.CDLL(plugin)
done = plugin.anyquant_ggml_register()
sys.exit(({_BY_ROWS} if plugin.anyquant_ggml_whole() < done else 0) if done else 1)
"""


@dataclass(frozen=True)
class Trial:
    """What became of the plug-in in a runner's libraries.

    Attributes:
        why_not: it was not taken; "" if it was.
        whole: products are done at once, not row by row, which is slower.
    """

    why_not: str
    whole: bool = False


def path() -> Path:
    """Where the plug-in lies.

    Raises:
        MachineError: it was not built.
    """
    return native.required(LIBRARY, "the plug-in for ggml is")


def register() -> None:
    """Add the types to the ggml in this process; what cannot take them stays as it is.

    Raises:
        MachineError: the plug-in was not built, or there is no ggml that takes it.
    """
    plugin = ctypes.CDLL(str(path()))
    plugin.anyquant_ggml_message.restype = ctypes.c_char_p
    if not plugin.anyquant_ggml_register():
        message = plugin.anyquant_ggml_message().decode("utf-8", "replace")
        raise MachineError(
            f"the ggml in this process does not take anyquant's tensor types: {message}. "
            "Next: export with --layout f32 or f16, or quantize with --method ggml, whose types every build runs."
        )


def try_runner(runner: Path) -> Trial:
    """Whether a runner could take the plug-in.

    Args:
        runner: its library with ggml in it, or the folder where its libraries lie, at any depth.

    Raises:
        InputError: there is no such file or folder.
        MachineError: the plug-in was not built.
    """
    plugin = path()
    if not runner.exists():
        raise InputError(f"{runner} does not exist: give the runner's library, or the folder that holds its libraries")
    files = sorted(runner.rglob("*")) if runner.is_dir() else [runner]
    libraries = [file for file in files if _is_library(file)]
    if not any(_NEEDED in file.read_bytes() for file in libraries):
        return Trial(
            f"no library there exports {_NEEDED.decode()}: ggml is not there, or is linked in without its names"
        )
    # Of several builds for different processors a runner takes one: so does the trial, the last that loads.
    ordered = sorted(libraries, key=lambda file: ("ggml-base" not in file.name, file.name))
    command = [sys.executable, "-c", _TRIAL, str(plugin), *map(str, ordered)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Trial(f"its libraries were not loaded within {_SECONDS} seconds")
    if done.returncode in (0, _BY_ROWS):
        return Trial("", whole=done.returncode == 0)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return Trial(
        lines[-1].removeprefix("anyquant: ") if lines else f"its libraries end the process ({done.returncode})"
    )


def _is_library(file: Path) -> bool:
    if not file.is_file() or not (".so" in file.name or file.suffix == ".node"):
        return False
    with file.open("rb") as opened:
        return opened.read(4) == b"\x7fELF"
