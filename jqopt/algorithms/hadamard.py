"""hadamard: rotates blocks of input channels at run time, so that an outlier is spread over its block."""

from __future__ import annotations

from jqopt import _hadamard
from jqopt.algorithms._base import Algorithm, Problem, Task, tensor_amax
from jqopt.errors import PlanError


def hadamard(block: int = 32) -> Algorithm:
    """Multiplies each block of the input, and of the weights, by an orthonormal Hadamard matrix: the same product.

    The input is rotated online, before it is quantized; statistics are of the rotated input. Blocks of the size that
    shares a scale suit mx formats; for nvfp4, whose 16 already isolate outliers, it seldom helps.
    `[{name: hadamard, block: 32}, gptq]` is MR-GPTQ. With the whole width as the block, on the input of a down
    projection, it is QuaRot's R4.

    Args:
        block: channels that are rotated together; it must divide k. 0: all of them.

    Sources: Egiazarian et al., arXiv 2509.23202 (MR-GPTQ); Ashkboos et al., QuaRot, arXiv 2404.00456.

    Raises:
        PlanError: the block isn't a whole number, or there is no Hadamard matrix of its order.
    """
    if isinstance(block, bool) or not isinstance(block, int) or block < 0:
        raise PlanError(f"hadamard: block is {block!r}; write a number of channels such as 32, or 0 for all")
    if block:
        _hadamard.check(block, block)

    def refuses(problem: Problem, n: int, k: int) -> str:
        try:
            _hadamard.check(k, block or k)
        except PlanError as e:
            return str(e)
        return ""

    def solve(task: Task) -> Task:
        weights = tuple(_hadamard.transform(w, block or task.k) for w in task.weights)
        return task.replace(weights=weights, amax=tensor_amax(weights, task.problem))

    return Algorithm("hadamard", solve, "rotation", rotation=block or -1, refuses=refuses)
