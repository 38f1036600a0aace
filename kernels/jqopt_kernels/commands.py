"""The command `jqopt-kernels`: builds the C++ kernels, once on a machine, outside of any program."""

from __future__ import annotations

import argparse
import sys

from . import ffi_build


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 1 after an error, which it prints."""
    asked = _parser().parse_args(arguments)
    try:
        asked.run(asked)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jqopt-kernels", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    build = commands.add_parser("build", help="compile the C++ kernels for the CPU into the user's cache")
    build.add_argument("--force", action="store_true", help="also where they are there")
    build.set_defaults(run=_build)
    return parser


def _build(asked: argparse.Namespace) -> None:
    path = ffi_build.build(force=asked.force)
    found = ffi_build.library()
    if isinstance(found, str):
        raise RuntimeError(found)
    print(f"{path}\ninstruction sets of this processor: {', '.join(found.isas)}")
