"""Tile sizes of the Triton kernels, by device and class of shape: shipped ones, and those `jqopt-kernels tune` found.

A key says bits of a weight, bits of an activation and rows at most: "w4 x16 m64"; a tuned one also n and k:
"w4 x16 m64 n4096 k14336". The most precise key wins, and a tuned file beats the shipped one at each precision.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from typing import NamedTuple

from ._types import Shapes

CAPABILITIES = (90, 100, 120)  # for which there is a file; a device uses the last that is not newer than itself
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)  # bounds of the classes; above the last: "many"
FOLDER = pathlib.Path(__file__).parent / "configs"


class Tile(NamedTuple):
    """bn rows of the weight x bm rows of the activation x bk columns at a time.

    split: parts that k is cut into, 0 for as many as `programs` programs allow. halves: see `triton_code.product`.
    group: tiles of weights whose activations are gone through before the next ones.
    """

    bn: int
    bk: int
    warps: int
    stages: int
    bm: int = 16
    split: int = 1
    programs: int = 1
    halves: bool = True
    group: int = 8


def family(capability: int) -> int | None:
    """The capability whose shipped tiles a device uses: 103 -> 100; None for one that is too old."""
    return max((c for c in CAPABILITIES if c <= capability), default=None)


def rows_class(m: int) -> str:
    """Number of rows -> "m1" ... "m256", "many"."""
    return next((f"m{bound}" for bound in ROWS if m <= bound), "many")


def key(weight_bits: int, activation_bits: int, m: int) -> str:
    """The class of a product."""
    return f"w{weight_bits} x{activation_bits} {rows_class(m)}"


def exact_key(weight_bits: int, activation_bits: int, shapes: Shapes) -> str:
    """The class of a product with its n and k."""
    return f"{key(weight_bits, activation_bits, shapes.m)} n{shapes.n} k{shapes.k}"


def find(kernel: str, weight_bits: int, activation_bits: int, shapes: Shapes, capability: int) -> Tile:
    """The tile of a product. Raises KeyError if no file has one, and ValueError for a tuned file that is bad."""
    shipped, tuned = _read(FOLDER / f"sm_{family(capability)}.json"), _read(tuned_path(capability))
    for name in (exact_key(weight_bits, activation_bits, shapes), key(weight_bits, activation_bits, shapes.m)):
        for table in (tuned, shipped):
            if name in table.get(kernel, {}):
                return Tile(**table[kernel][name])
    raise KeyError(f"no tile for {kernel} {key(weight_bits, activation_bits, shapes.m)!r} on {capability}")


def tuned_path(capability: int) -> pathlib.Path:
    """Where tuned tiles of a device are kept: $XDG_CACHE_HOME/jqopt/kernels/sm_90.json, default ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "jqopt" / "kernels" / f"sm_{capability}.json"


@functools.cache
def _read(path: pathlib.Path) -> dict[str, dict[str, dict]]:
    """{kernel: {key: tile}} of one file, each once in a process; {} where there is no file."""
    if not path.exists():
        return {}
    try:
        tables = json.loads(path.read_text())["tiles"]
        for tiles in tables.values():
            for fields in tiles.values():
                Tile(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a file of tiles ({error}); delete it, or write it anew with: jqopt-kernels tune"
        ) from error
    return tables
