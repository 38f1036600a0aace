"""How the axes of a tensor become those of a parameter, as a pattern: `"(n h) d -> layer d n h"`.

Names are axes; a group in parentheses is one axis that is the product of its names, the first outermost. Both sides
have the same names, except those that only the parameter has: along these it holds several tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from jqopt.errors import UnsupportedError


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A parsed pattern: groups of names of the tensor's axes, and of the parameter's."""

    text: str
    tensor: tuple[tuple[str, ...], ...]
    parameter: tuple[tuple[str, ...], ...]

    @property
    def stacked(self) -> tuple[str, ...]:
        """Names that only the parameter has, in its order."""
        return tuple(n for n in self._names(self.parameter) if n not in self._names(self.tensor))

    @staticmethod
    def _names(groups: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
        return tuple(name for group in groups for name in group)

    def sizes(self, shape: tuple[int, ...], known: Mapping[str, int]) -> dict[str, int]:
        """The size of each name in a parameter of this shape.

        Raises:
            UnsupportedError: the shape isn't the pattern's, or two sizes of one group aren't known.
        """
        if len(shape) != len(self.parameter):
            raise UnsupportedError(
                f"{self.text!r} gives {len(self.parameter)} axes, and the parameter has shape {list(shape)}"
            )
        found: dict[str, int] = {}
        for group, size in zip(self.parameter, shape, strict=True):
            open_names = [n for n in group if n not in known]
            rest = math.prod(known[n] for n in group if n in known)
            if len(open_names) > 1 or size % rest or (not open_names and size != rest):
                says = ", ".join(f"{n} = {known.get(n, '?')}" for n in group)
                raise UnsupportedError(
                    f"{self.text!r}: an axis of size {size} (of the shape {list(shape)}) is not made of {says}; write "
                    "the sizes of its names into NameMap(sizes=...)"
                )
            found |= {n: known.get(n, size // rest) for n in group}
        return found

    def tensor_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of each tensor."""
        return tuple(math.prod(sizes[n] for n in group) for group in self.tensor)

    def view(self, parameter: np.ndarray, sizes: Mapping[str, int], at: Mapping[str, slice]) -> np.ndarray:
        """The part of a (contiguous) parameter that one tensor is: a view, its axes the tensor's names in their order.

        Args:
            at: where the tensor lies along the names that only the parameter has (one index), or that are joined.
        """
        names, alone = self._names(self.parameter), self.stacked
        index = tuple(at[n].start if n in alone else at.get(n, slice(None)) for n in names)
        left = [n for n in names if n not in alone]
        return parameter.reshape([sizes[n] for n in names])[index].transpose(
            [left.index(n) for n in self._names(self.tensor)]
        )

    def places(self, sizes: Mapping[str, int], at: Mapping[str, slice], axis: int, count: int) -> np.ndarray:
        """Flat places in the parameter of the tensor's indices 0 ... count - 1 along one axis, the others at 0.

        `at` is what `view` takes.
        """
        names = self._names(self.parameter)
        steps = np.cumprod([1, *(sizes[n] for n in reversed(names))])[:-1][::-1]
        stride = dict(zip(names, steps.tolist(), strict=True))
        flat = np.full(count, sum(stride[n] * part.start for n, part in at.items()), np.int64)
        rest = np.arange(count)
        for name in reversed(self.tensor[axis]):
            extent = at[name].stop - at[name].start if name in at else sizes[name]
            flat += rest % extent * stride[name]
            rest = rest // extent
        return flat


@functools.cache
def parse(text: str) -> Pattern:
    """A pattern. Raises UnsupportedError where it isn't one."""
    sides = text.split("->")
    groups = [_groups(side) for side in sides]
    if len(sides) != 2 or None in groups:
        raise UnsupportedError(f"axes {text!r}: expected two sides of names and groups, such as '(n h) d -> d n h'")
    found = Pattern(text, *groups)  # type: ignore[arg-type]
    left, right = (found._names(side) for side in (found.tensor, found.parameter))
    if len({*left}) < len(left) or len({*right}) < len(right) or not {*left} <= {*right}:
        raise UnsupportedError(
            f"axes {text!r}: each name stands once on a side, and all of the tensor's names are the parameter's too"
        )
    return found


def _groups(text: str) -> tuple[tuple[str, ...], ...] | None:
    parts = re.findall(r"\(([\w ]+)\)|(\w+)|(\S)", text)
    if any(wrong for _, _, wrong in parts):
        return None
    return tuple(tuple(group.split()) if group else (name,) for group, name, _ in parts)
