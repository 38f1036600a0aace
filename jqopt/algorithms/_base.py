"""What a calibration algorithm is: statistics of an activation, and a step of a task; steps chain as optax's do."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jqopt import _numerics
from jqopt._numerics import Codes, amax_of
from jqopt.errors import PlanError
from jqopt.formats import Format


class Statistic(NamedTuple):
    """Something gathered about an activation, by name; algorithms that ask for one name share it.

    init(k) -> state: before any data, for k channels.
    update(state, x [tokens, k]) -> state: after more tokens; any split of the data must give the same state.
    allreduce(before, after, axes) -> state: one state from those that the devices along the mesh axes have updated,
        each on its own tokens, inside a shard_map.
    """

    name: str
    init: Callable[[int], Any]
    update: Callable[[Any, Array], Any]
    allreduce: Callable[[Any, Any, tuple[str, ...]], Any]


class InputQuantizer(NamedTuple):
    """How an activation is quantized: its format, what shares a scale (tensor, token, block), and if it is static."""

    format: Format
    granularity: str
    static: bool


class Problem(NamedTuple):
    """What is fixed before any number is known.

    `fused`: for each weight of the group, a number; weights with the same one share a tensor-level scale, those with a
    negative one with weights of other groups. `powers`: must scales of the input be powers of two (they go into a
    parameter with too few digits for others)? `searched`: does a later step search the weights' scales, so that trials
    of rounding should too?
    """

    format: Format
    granularity: str
    input: InputQuantizer | None = None
    fused: tuple[int, ...] = (0,)
    powers: bool = False
    searched: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Task:
    """The weights that read one activation, on their way to codes. Steps take a task and give one.

    The activation x [tokens, k] is multiplied with `pre_scale`, then quantized; `weights` are what is to be rounded:
    they have taken up the inverse of that, and given up their low-rank parts.

    weights: each [e, n, k] float32, e matrices (experts) that share the activation.
    stats: states of the statistics, by name, of the activation as the first step sees it.
    amax: each [e] or None: the largest absolute weight that a tensor-level scale is made from, where there is one.
    ties: [k] int32 or None: channels with the same number must have the same `pre_scale`.
    tiles: each [e, rows, cols] or None: what each tile's scale is made from, in place of its largest value. With zero
        points [e, rows, cols, 2]: the ends of its range, at most 0 and at least 0.
    input_amax: [] or None: what the static input scale is made from, in place of the largest value seen.
    low_rank: each (a [e, r, k], b [e, n, r]) or None: y has a further part, (x * pre_scale) a^T b^T.
    codes: each None until a step has rounded.
    """

    weights: tuple[Array, ...]
    stats: dict[str, Any]
    amax: tuple[Array | None, ...]
    problem: Problem = dataclasses.field(metadata={"static": True})
    ties: Array | None = None
    pre_scale: Array | None = None
    input_amax: Array | None = None
    tiles: tuple[Array | None, ...] = ()
    low_rank: tuple[tuple[Array, Array] | None, ...] = ()
    codes: tuple[Codes | None, ...] = ()

    @property
    def k(self) -> int:
        return self.weights[0].shape[-1]

    def replace(self, **changes: Any) -> Task:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def task(
    weights: Sequence[Array],
    problem: Problem,
    stats: Mapping[str, Any] | None = None,
    amax: Sequence[Array | None] | None = None,
    ties: Array | None = None,
) -> Task:
    """The task of some weights, each [n, k] or [e, n, k]; `amax` is found from them unless given."""
    wide = tuple(jnp.asarray(w, jnp.float32).reshape(-1, *w.shape[-2:]) for w in weights)
    fused = problem.fused if len(problem.fused) == len(wide) else tuple(range(len(wide)))
    problem = problem._replace(fused=fused)
    nothing = (None,) * len(wide)
    found = tensor_amax(wide, problem) if amax is None else tuple(amax)
    return Task(wide, dict(stats or {}), found, problem, ties, tiles=nothing, low_rank=nothing, codes=nothing)


def tensor_amax(weights: Sequence[Array], problem: Problem) -> tuple[Array | None, ...]:
    """For each weight [e, n, k] the amax [e] of its tensor-level scale, or None where the format has none."""
    if not (problem.format.global_scale or problem.granularity == "tensor") or problem.format.zero_point:
        return (None,) * len(weights)
    own = [amax_of(w, (-2, -1)) for w in weights]
    out: list[Array | None] = []
    for i, amax in enumerate(own):
        mates = [o for o, f in zip(own, problem.fused, strict=True) if f == problem.fused[i] and o.shape == amax.shape]
        out.append(functools.reduce(jnp.maximum, mates))
    return tuple(out)


class Algorithm(NamedTuple):
    """A calibration algorithm: the statistics it needs, and a step `solve(task) -> task` that uses them.

    `stage` says what the step changes, and so in which order steps may stand: see `STAGES`. The step sees the matrices
    of one group of one layer; stacked layers are a map around it. `options` that the plan must know: `rotation` is the
    block of a Hadamard transform of the input, `rank` that of a low-rank part.
    """

    name: str
    solve: Callable[[Task], Task]
    stage: str = "rounding"
    statistics: tuple[Statistic, ...] = ()
    rotation: int = 0
    rank: int = 0
    scales_input: bool = False
    two_streams: bool = False  # does it compare the float model's activations with the quantized prefix'?
    refuses: Callable[[Problem, int, int], str] = lambda problem, n, k: ""  # why it can't be had for a weight [n, k]
    chained: tuple[Any, ...] = ()  # the algorithms of a chain
    training: Any = None  # how the whole model is trained once all its weights are solved (see `distill`)

    @property
    def parts(self) -> tuple[Algorithm, ...]:
        """The steps of a chain; of another algorithm itself."""
        return self.chained or (self,)

    @property
    def uses_data(self) -> bool:
        """Does the step need statistics, whatever the activation's format?"""
        return bool(self.statistics)

    def init(self, k: int) -> dict[str, Any]:
        """The states of its statistics before any data."""
        return {s.name: s.init(k) for s in self.statistics}

    def update(self, state: dict[str, Any], x: Array) -> dict[str, Any]:
        """The states after x [tokens, k]."""
        return {s.name: s.update(state[s.name], x) for s in self.statistics}

    def allreduce(self, before: dict, after: dict, axes: tuple[str, ...]) -> dict[str, Any]:
        """The states of all devices."""
        return {s.name: s.allreduce(before[s.name], after[s.name], axes) for s in self.statistics}


STAGES: Mapping[str, str] = {
    "rotation": "rotates the input",
    "scale": "scales the input's channels",
    "target": "changes the weights that are to be reached",
    "low_rank": "takes a low-rank part out of the weights",
    "range": "chooses the weights' scales",
    "rounding": "rounds the weights",
    "model": "trains the whole model",
}
"""What a step may change, in the order in which steps must stand."""

ONCE = ("rounding", "model")
"""Stages of which a list can have one step only."""


def chain(*algorithms: Algorithm) -> Algorithm:
    """Algorithms applied one after the other, as one: `chain(smoothquant(), gptq())`.

    Statistics of the same name are gathered once.

    Raises:
        PlanError: a step stands after one whose result it would undo.
    """
    if len(algorithms) == 1:
        return algorithms[0]
    algorithms = tuple(part for a in algorithms for part in a.parts)
    order = list(STAGES)
    for before, after in itertools.pairwise(algorithms):
        if order.index(after.stage) < order.index(before.stage) or before.stage == after.stage in ONCE:
            raise PlanError(
                f"{after.name} {STAGES[after.stage]}, so it can't follow {before.name}, which {STAGES[before.stage]}; "
                f"write [{', '.join(a.name for a in sorted(algorithms, key=lambda a: order.index(a.stage)))}]"
                + (f", with one that {STAGES[after.stage]}" if before.stage == after.stage else "")
            )
    statistics = {s.name: s for a in algorithms for s in a.statistics}

    def solve(task: Task) -> Task:
        return functools.reduce(lambda t, a: a.solve(t), algorithms, task)

    return Algorithm(
        "+".join(a.name for a in algorithms), solve, algorithms[-1].stage, tuple(statistics.values()),
        next((a.rotation for a in algorithms if a.rotation), 0), sum(a.rank for a in algorithms),
        any(a.scales_input for a in algorithms), any(a.two_streams for a in algorithms),
        chained=algorithms, training=next((a.training for a in algorithms if a.training is not None), None),
    )  # fmt: skip


# ------------------------------------------------------------------------------- what steps do with a task


def qdq(task: Task, i: int, w: Array | None = None, amax: Array | None = None, tile: Array | None = None) -> Array:
    """Weight i (or `w` in its place, with its own tensor-level amax) rounded to nearest, float32 [e, n, k]."""
    w = task.weights[i] if w is None else w
    amax = task.amax[i] if amax is None else amax
    tile = task.tiles[i] if tile is None else tile
    p = task.problem
    return _numerics.qdq_matrix(w, p.format, granularity=p.granularity, tensor_amax=amax, tile_amax=tile)


def rounded(task: Task) -> Task:
    """The task with codes: round to nearest where no step has rounded."""
    p = task.problem
    codes = tuple(
        _numerics.quantize_matrix(w, p.format, granularity=p.granularity, tensor_amax=amax, tile_amax=tile)
        if done is None
        else done
        for w, amax, tile, done in zip(task.weights, task.amax, task.tiles, task.codes, strict=True)
    )
    return task.replace(codes=codes)


def scaled(task: Task, pre_scale: Array) -> Task:
    """The task after the input [.., k] was multiplied with a scale and the weights divided by it."""
    weights = tuple(_numerics.divide(w, jnp.broadcast_to(pre_scale, w.shape)) for w in task.weights)
    before = task.pre_scale
    return task.replace(
        weights=weights,
        amax=tensor_amax(weights, task.problem),
        pre_scale=pre_scale if before is None else before * pre_scale,
        tiles=(None,) * len(weights),
    )


def tied(task: Task, pre_scale: Array) -> Array:
    """The nearest scale [k] that is allowed: equal over tied channels, a power of two where it must be one."""
    logs = jnp.log2(pre_scale)
    if task.ties is not None:
        one = jnp.ones_like(logs)
        total, count = (jnp.zeros_like(logs).at[task.ties].add(v) for v in (logs, one))
        logs = (total / jnp.maximum(count, one))[task.ties]
    return jnp.exp2(jnp.round(logs) if task.problem.powers else logs)


def input_qdq(task: Task, x: Array, amax: Array) -> Array:
    """Activations [tokens, k] (scaled already) as the products will see them; `amax` [] of all data, where static."""
    quantizer = task.problem.input
    if quantizer is None:
        return x
    granularity = "channel" if quantizer.granularity == "token" else quantizer.granularity
    scale = _numerics.scale_from_amax(amax, quantizer.format) if quantizer.static else None
    return _numerics.qdq_matrix(x, quantizer.format, granularity=granularity, tensor_scale=scale)


def rank_at(rank: int, n: int, k: int) -> int:
    """The rank of a low-rank part of a weight [n, k]: more than a sixteenth of k would cost too many bits."""
    return min(rank, n, k // 16)
