"""Run a command and write its seconds and peak memory, children included, as one line of text to a file.

python tools/measure.py RESULT COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    """Run the command; its exit code is ours."""
    result, command = Path(sys.argv[1]), sys.argv[2:]
    start = time.monotonic()
    code = subprocess.call(command)
    seconds = time.monotonic() - start
    # The largest process of the command's tree, as the kernel counts it, in KiB.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    result.write_text(f"{seconds:7.1f} {peak:10.0f}  {' '.join(command[1:3])}", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
