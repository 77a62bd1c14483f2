"""What the command line shares: sizes in words, tables, progress, one JSON document on stdout."""

from __future__ import annotations

import difflib
import errno
import json
import re
import shlex
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from anyquant.errors import AnyquantError, InputError, Interrupted, MachineError, UsageError, ValidationFailed

if TYPE_CHECKING:
    from anyquant import ir

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Size(click.ParamType[int]):
    """A number of bytes: 75MiB, 1.5GB, 98362432."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse the text."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(value).upper())
        if not match or match[2] not in _UNITS:
            self.fail(f"{value!r} is not a size; write for example 75MiB, 1.5GB or a number of bytes.", param, ctx)
        size = int(float(match[1]) * _UNITS[match[2]])
        if size <= 0:
            self.fail(f"{value!r} is not a positive size.", param, ctx)
        return size


def _wrapped(line: str) -> str:
    """A line cut at words to the terminal's width; coloured lines are cut already."""
    width = shutil.get_terminal_size().columns
    if len(line) <= width or "\x1b" in line:
        return line
    return textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def mebibytes(nbytes: float) -> str:
    """Bytes in MiB with one decimal."""
    return f"{nbytes / 2**20:,.1f} MiB"


class Output:
    """Where a verb's results go: people read stderr and stdout, programs read one JSON document on stdout."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        """Remember the two switches."""
        self.as_json, self.quiet = as_json, quiet
        self._notes: list[str] = []

    def result(self, data: dict[str, Any], text: Callable[[], str]) -> None:
        """The verb's result: JSON, with the notes, or the text that ``text`` makes."""
        if self.as_json:
            data = {"notes": self._notes, **data} if self._notes else data
            click.echo(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))
        elif not self.quiet:
            click.echo("\n".join(map(_wrapped, text().splitlines())))

    def note(self, text: str) -> None:
        """Something to know beside the result, on stderr."""
        self._notes.append(text)
        if not self.quiet:
            click.echo(text, err=True)

    @contextmanager
    def progress(self, label: str) -> Iterator[ir.Progress | None]:
        """A progress bar on stderr; none where stderr is not a terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)

            def step(name: str, done: int, total: int) -> None:
                short = name if len(name) <= 32 else "..." + name[-29:]
                bar.update(task, description=f"{label} {short:<32}", completed=done, total=total)

            yield step


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in plain text: the first to the left, the others to the right; at most 80 wide where the cells are."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        parts = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return "  ".join(parts).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


class Group(click.Group):
    """A group whose verbs keep their order, and which suggests the right verb for a typo."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of definition: the order of work."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a suggestion."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            close = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else f" Verbs: {', '.join(self.commands)}."
            raise click.UsageError(f"there is no verb {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


def run(cli: click.Command) -> None:
    """Run the command line and exit: every outcome has its code (see :mod:`anyquant.errors`)."""
    as_json = "--json" in sys.argv[1:]

    def fail(message: str, code: int, *, document: bool = True) -> None:
        click.echo(f"anyquant: {message}", err=True)
        if as_json and document:
            click.echo(json.dumps({"error": message, "exit_code": code}, ensure_ascii=False))
        if code == Interrupted.exit_code:
            # CPython notes a Ctrl-C that came while source was executed, as dataclasses do when they are imported, and
            # `python -m` then ends by the signal instead of with the exit code. The next source makes it forget that.
            exec("")
        sys.exit(code)

    try:
        code = cli.main(prog_name="anyquant", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(UsageError.exit_code)
    except click.UsageError as error:
        usage = error.ctx.get_usage() + "\n" if error.ctx else ""
        hint = f"\nTry '{error.ctx.command_path} --help'." if error.ctx else ""
        fail(f"{error.format_message()}\n{usage}{hint.strip()}", UsageError.exit_code)
    except click.ClickException as error:
        fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        again = shlex.join(["anyquant", *sys.argv[1:]])
        fail(f"interrupted; nothing unfinished was left. To do it again: {again}", 130)
    except Interrupted as error:
        on = ["--resume"] if error.resume and "--resume" not in sys.argv else []
        fail(f"{error} To go on: {shlex.join(['anyquant', *sys.argv[1:], *on])}", error.exit_code)
    except ValidationFailed as error:
        fail(str(error), error.exit_code, document=False)  # the report is the document
    except AnyquantError as error:
        fail(str(error), error.exit_code)
    except MemoryError:
        fail("out of memory. 'anyquant plan' tells how much is needed; try --workers 1.", MachineError.exit_code)
    except OSError as error:
        machine = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM)
        where = f" {error.filename}" if error.filename else ""
        fail(f"{error.strerror or error}:{where}", (MachineError if machine else InputError).exit_code)
    except Exception:
        traceback.print_exc()
        fail("this is a fault of anyquant; please report it with the lines above.", AnyquantError.exit_code)
