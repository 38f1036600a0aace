"""What a calibration algorithm is: a tuple of pure functions over matrices, as optax's transformations are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jqopt._numerics import Codes
from jqopt.formats import Format


class Problem(NamedTuple):
    """What `solve` may use beside the weight and the statistics.

    `tensor_amax` [] float32: largest absolute weight of the group that must share a tensor-level scale, or None where
    the format has none. `input` is the activation's quantizer (None: not quantized).
    """

    format: Format
    granularity: str
    tensor_amax: jax.Array | None
    input: Any


class Algorithm(NamedTuple):
    """A calibration algorithm.

    init(k) -> state: statistics before any data, for k input channels.
    update(state, x [tokens, k]) -> state: after more tokens; any split of the data must give the same state.
    solve(w [n, k], state or None, problem) -> Codes: the packed weight. It is vmapped over layers and experts.
    input_amax(state) -> []: the largest absolute activation, from which the static input scale is made.
    allreduce(before, after, axes) -> state: one state from those that the devices along the mesh axes have updated,
        each on its own tokens, inside a shard_map.
    """

    name: str
    init: Callable[[int], Any]
    update: Callable[[Any, jax.Array], Any]
    solve: Callable[[jax.Array, Any, Problem], Codes]
    input_amax: Callable[[Any], jax.Array]
    allreduce: Callable[[Any, Any, tuple[str, ...]], Any]
    uses_data: bool = False  # does `solve` need the statistics, whatever the activation's format?
