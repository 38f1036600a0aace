"""How the command line speaks: a result on stdout as text or JSON; progress and faults on stderr; the exit status."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import typer

from jqopt.errors import JqoptError

FAILED = 1


class Shown(NamedTuple):
    """What a command found: `data` for `--json`, `text` for people; `failed` for exit status 1 in spite of it."""

    data: Any
    text: str
    failed: bool = False


def command(run: Callable[..., Shown]) -> Callable[..., None]:
    """A command that prints what `run(..., as_json, debug)` returns; errors become one message and exit status 1.

    While it works, what the user's own code prints goes to stderr: stdout holds the result and nothing else.
    """

    @functools.wraps(run)
    def call(*args: Any, as_json: bool, debug: bool, **kwargs: Any) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                shown = run(*args, as_json=as_json, debug=debug, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            _fault(error, as_json, debug)
            raise typer.Exit(FAILED) from None
        typer.echo(dumped(shown.data) if as_json else shown.text)
        if shown.failed:
            raise typer.Exit(FAILED)

    return call


def _fault(error: Exception, as_json: bool, debug: bool) -> None:
    kind = type(error).__name__
    text = _words(error)
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    expected = isinstance(error, JqoptError | OSError)
    note(f"error: {text}" if expected else f"error: {kind}: {text}")
    if not debug and not expected:
        note("This is no error that jqopt foresaw; --debug shows where it comes from.")
    if as_json:
        typer.echo(dumped({"error": {"type": kind, "message": text}}))


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def dumped(data: Any) -> str:
    """JSON text; numbers that JSON doesn't have (NaN, infinity) become null."""
    return json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple | set | frozenset):
        return [_plain(value) for value in (sorted(x) if isinstance(x, set | frozenset) else x)]
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    return x


def note(text: str) -> None:
    """A line on stderr."""
    typer.echo(text, err=True)


@contextlib.contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr if that is a terminal; call what it yields with how many are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
