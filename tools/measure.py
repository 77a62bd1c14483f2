"""Run a command; write its seconds and its peak memory, all its processes together, as a line of text to a file.

python tools/measure.py RESULT COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

INTERVAL = 0.1  # seconds between two looks, at least
SHARE = 20  # and so many times what a look takes: it costs the machine a twentieth of its time at most


def descendants(root: int) -> list[int]:
    """Process numbers of a process and of all that it has started and they have started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The second field, the program's name, may hold spaces, but ends with the last parenthesis.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def memory(root: int) -> int:
    """KiB that the processes hold; a page that several share counts once (proportional set size)."""
    total = 0
    for process in descendants(root):
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return total


def main() -> int:
    """Run the command; its exit code is ours."""
    result, command = Path(sys.argv[1]), sys.argv[2:]
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        began = time.monotonic()
        peak = max(peak, memory(process.pid))
        time.sleep(max(INTERVAL, SHARE * (time.monotonic() - began)))
    seconds = time.monotonic() - start
    result.write_text(f"{seconds:7.1f} {peak / 1024:10.0f}  {' '.join(command[1:3])}", encoding="utf-8")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
