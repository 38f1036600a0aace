"""Running a plan: the model's jaxpr, re-evaluated with packed weights and quantized activations at its sites."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jqopt import _attention_ops, _hadamard, _jaxpr, _ops, _stage, _trace, _view
from jqopt._attention import Product, products
from jqopt._jaxpr import Address, QConcat, QView, State, layout_atoms
from jqopt._plan import Decision, Plan
from jqopt._qtensor import QTensor
from jqopt._trace import Site
from jqopt._view import Atom, View
from jqopt.errors import PlanError

Tracer = jax.core.Tracer  # pyright: ignore[reportAttributeAccessIssue] (public, but not in the stubs)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "attention"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A parameter tree in which QTensors stand where quantized arrays stood. A pytree: jit, shard and save it.

    `attention`: scales and biases of attention's operands, {attention: {"k_scale": [*layers], ...}}, float32.
    """

    params: Any
    attention: dict[str, Any] = dataclasses.field(default_factory=dict)


def is_qtensor(x: Any) -> bool:
    return isinstance(x, QTensor)


def apply(
    plan: Plan, *, simulate: bool = False, backend: str | None = None, device: str | None = None
) -> Callable[..., Any]:
    """`apply(plan)(quant, *inputs, **kwargs)` runs the quantized model. Pure: jit, grad, vmap and shard it.

    Args:
        simulate: float32 quantize-dequantize arithmetic at every site instead of packed kernels; both agree up to
            the order of accumulation.
        backend: a family of kernels (xla, triton, pallas, ffi, reference) or one kernel's name, instead of the best
            for the shapes and the device; before `jqopt_kernels.using` and what the recipe says.
        device: what to choose kernels for ("cpu", "cuda", "tpu"), to lower for another than JAX's default one.

    The model is traced again for each new set of shapes, inside the jit cache; the plan stays. Arguments that are not
    arrays (a method's name, `train=True`) are static. Gradients go straight through the quantizers.

    Raises:
        PlanError: the plan has no model, the tree isn't the one the plan was made for, or the model at these
            shapes has a site that the plan doesn't know.
    """
    if not isinstance(plan, Plan):
        raise PlanError(
            f"found {type(plan).__name__}, expected a plan: write jqopt.apply(plan)(quant, x); of a quantized model "
            "jqopt.apply(qm.plan)(qm.quant, x), or qm(x)"
        )
    if plan.function is None:
        raise PlanError("this plan was read from a file and has no model; load it with jqopt.load(dir, model)")
    return Static(functools.partial(_run, plan, simulate, backend, device))


class Static:
    """Splits arguments into arrays, which are traced, and everything else, which is static; jits the rest."""

    def __init__(self, run: Callable[..., Any]):
        self.run = run
        self.jitted: dict[Any, Callable] = {}

    def __call__(self, quant: Any, *inputs: Any, **kwargs: Any) -> Any:
        arrays, rebuild, key = _stage.split_static((inputs, kwargs))
        if key not in self.jitted:
            self.jitted[key] = jax.jit(functools.partial(self._call, rebuild))
        return self.jitted[key](quant, arrays)

    def _call(self, rebuild: Callable, quant: Any, arrays: list) -> Any:
        return self.run(quant, *rebuild(arrays))


def _run(
    plan: Plan, simulate: bool, backend: str | None, device: str | None, quant: Any, inputs: tuple, kwargs: dict
) -> Any:
    return run(plan, lambda sites: Executor(sites, simulate, backend, device), quant, inputs, kwargs)


def run(plan: Plan, rule_of: Callable[[list], Executor], quant: Any, inputs: tuple, kwargs: dict) -> Any:
    """The model's output with the rule that `rule_of` makes of the quantized sites; traced with these inputs."""
    params = quant.params if isinstance(quant, Quantized) else quant
    scales = quant.attention if isinstance(quant, Quantized) else {}
    leaves = check_params(plan, params)
    _attention_ops.check_scales(plan.attention, scales)
    shapes = jax.tree.map(_abstract, params, is_leaf=is_qtensor)
    closed, out, views = _stage.stage(plan.function, shapes, inputs, kwargs)
    rule = rule_of([*decided_sites(plan, closed, views), *products(plan.attention, closed, views)])
    values = [
        QView(leaf, view) if isinstance(leaf, QTensor) and view is not None else leaf
        for leaf, view in zip(leaves, views[: len(leaves)], strict=True)
    ]
    outs, _ = _jaxpr.evaluate(closed, [*values, *_stage.split_static((inputs, kwargs))[0]], rule, dict(scales))
    return jax.tree.unflatten(jax.tree.structure(out), [_jaxpr.dense(o) for o in outs])


def _abstract(leaf: Any) -> Any:
    if not hasattr(leaf, "dtype"):
        return leaf
    return jax.ShapeDtypeStruct(tuple(leaf.shape), np.dtype(leaf.dtype) if isinstance(leaf, QTensor) else leaf.dtype)


def check_params(plan: Plan, params: Any) -> list:
    """The leaves of a quantized tree, checked against the plan; the message names the parameter that differs."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    paths = {p: leaf for key, leaf in flat if (p := _stage.parameter_path(plan.function, key, leaf)) is not None}
    check_paths(plan, paths)
    done = plan.quantized
    for path, leaf in paths.items():
        wanted = done.get(path)
        if wanted is not None and not isinstance(leaf, QTensor):
            raise PlanError(
                f"{path}: found a plain {leaf.dtype} array, but the plan quantizes it to {wanted.format.name}. "
                "Pass the tree that jqopt.quantize(plan, params, stats) returned."
            )
        if wanted is None and isinstance(leaf, QTensor):
            raise PlanError(f"{path}: found a {leaf.format.name} tensor, but the plan leaves this parameter alone.")
        if wanted is not None and leaf.format != wanted.format:
            raise PlanError(f"{path}: found {leaf.format.name}, but the plan quantizes it to {wanted.format.name}.")
    return [leaf for _, leaf in flat]


def check_paths(plan: Plan, found: Mapping[str, Any]) -> None:
    """A tree of parameters must have the plan's paths and shapes.

    Raises:
        PlanError: naming what is missing, unexpected, or of another shape.
    """
    missing, extra = sorted(set(plan.parameters) - set(found)), sorted(set(found) - set(plan.parameters))
    if missing or extra:
        raise PlanError(
            f"these parameters aren't those the plan was made for. Missing: {missing[:6] or 'none'}; unexpected: "
            f"{extra[:6] or 'none'}. Pass the tree that was traced, or trace and plan again."
        )
    for path, leaf in found.items():
        if tuple(leaf.shape) != plan.parameters[path].shape:
            raise PlanError(
                f"{path}: found shape {tuple(leaf.shape)}, but the plan was made for {plan.parameters[path].shape}. "
                "Pass the tree that was traced, or trace and plan again."
            )


def check_values(found: Mapping[str, Any]) -> None:
    """Parameters that are read must be there.

    Raises:
        PlanError: naming one that is a shape only, or an array that was deleted.
    """
    for path, leaf in found.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise PlanError(
                f"{path}: found a shape without values. Tracing and planning need no weights; calibrating and "
                "quantizing do: pass the tree of arrays."
            )
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted():
            raise PlanError(
                f"{path}: the array has been deleted: it was donated, to a jitted function or to jqopt with "
                "`donate=True`. Load or make the parameters again."
            )


def decided_sites(plan: Plan, closed: Any, views: Sequence[View | None]) -> list[tuple[Site, Decision]]:
    """The quantized sites of this jaxpr with their decisions."""
    sites, _ = _trace.walk(closed, views, {})
    known = plan.by_key
    for s in sites:
        if s.path is not None and s.reason is None and s.key not in known:
            raise PlanError(
                f"site {s.key} ({s.op}) appeared that the plan doesn't know: the model runs differently at these "
                "inputs than at those it was traced with. Trace with inputs (and keywords) like the ones you run."
            )
    done = plan.quantized
    return [(s, known[s.key]) for s in sites if s.path in done and s.reason is None and s.key in known]


class Sited:
    """What the evaluator asks about addresses, from (site, decision) or (attention's product, decisions by role)."""

    unrolls = False

    def __init__(self, sites: Sequence[tuple[Any, Any]]):
        self.at: dict[Address, list[tuple[Any, Any]]] = {}
        self.below: dict[Address, list[Any]] = {}
        for site, decision in sites:
            self.at.setdefault(site.address, []).append((site, decision))
            for n in range(1, len(site.address)):
                self.below.setdefault(site.address[:n], []).append(site)

    def is_site(self, address: Address) -> bool:
        return address in self.at

    def sites_below(self, address: Address) -> bool:
        return address in self.below

    def state_below(self, address: Address) -> frozenset[str]:
        return frozenset(s.path for s in self.below.get(address, ()) if s.path is not None)

    def stacked_at(self, address: Address) -> frozenset[str]:
        below = self.below.get(address, ())
        return frozenset(s.path for s in below if s.path is not None and address in s.scans)

    def allreduce(self, before: State, after: State, axes: tuple[str, ...]) -> State:
        return after


class Executor(Sited):
    """The quantizing rule: at a site with a packed weight, run the quantized op.

    Rules that train override what a quantized op is made of: `quantized_input`, `product`, `grouped` and
    `rows`.
    """

    def __init__(
        self, sites: Sequence[tuple[Any, Any]], simulate: bool, backend: str | None, device: str | None = None
    ):
        super().__init__(sites)
        self.simulate, self.backend, self.device = simulate, backend, device
        self.values: dict[tuple, tuple[jax.Array, _ops.Activation]] = {}

    def __call__(self, address: Address, eqn: Any, values: Sequence[Any], state: State) -> tuple[list, State]:
        found: list[Any] = self.at[address]
        product, out = found[0][0], eqn.outvars[0].aval
        if isinstance(product, Product):
            run = functools.partial(_attention_ops.run, *found[0], eqn)
            return [placed(lambda *xs: run(xs, state.get(product.key, {})), out)(*values)], state
        weight, out = values[found[0][0].operand], eqn.outvars[0].aval
        if not _jaxpr.is_quantized(weight):
            return _jaxpr.bind(eqn, values), state

        def run(*values: Any) -> jax.Array:
            return self._site(eqn, values, found, out)

        return [placed(run, out)(*values)], state

    def _site(self, eqn: Any, values: Sequence[Any], found: list, out: Any) -> jax.Array:
        site, decision = found[0]
        weight = values[site.operand]
        if isinstance(weight, QConcat):
            return self._joined(eqn, values, found, weight)
        run = OPS[site.op] if isinstance(weight, QView) else DECODED[site.op]
        return run(self, eqn, values, site, decision, out)

    def activation(
        self, x: jax.Array, order: tuple, rows: jax.Array, decision: Decision, tensor: QTensor
    ) -> _ops.Activation:
        """The activation `rows` [*stack, m, k] of x as the site's product takes it.

        It is computed once for a group: its members read one activation and have one input scale.
        """
        spec = decision.input_format
        codes = _ops.takes_codes(spec, tensor, rows.shape[-2], self.simulate, self._backend(decision), self.device)
        static = tensor.input_scale if spec is not None and spec.static else None
        factors = feedback_of(tensor, decision)
        key = (id(x), order, spec, decision.group, codes, tensor.is_plain)
        if key not in self.values:
            taken = self._taken(prepared(rows, tensor), spec, static, codes, self._backend(decision), factors)
            self.values[key] = (x, taken)  # x is kept: its id stays its own
        return self.values[key][1]

    def _taken(
        self,
        rows: jax.Array,
        spec: _ops.InputFormat | None,
        scale: jax.Array | None,
        codes: bool,
        backend: str | None,
        factors: jax.Array | None,
    ) -> _ops.Activation:
        if spec is None or codes:
            return _ops.activation(rows, spec, scale, codes, backend, self.device, factors)
        return _ops.Activation(self.quantized_input(rows, spec, scale, factors))

    def quantized_input(
        self, x: jax.Array, spec: _ops.InputFormat, scale: jax.Array | None, factors: jax.Array | None = None
    ) -> jax.Array:
        """Activations [*stack, m, k], quantized and dequantized; with feedback by these factors."""
        return _ops.quantize_input(x, spec, scale, factors)

    def product(self, rows: jax.Array, taken: _ops.Activation, tensor: QTensor, decision: Decision) -> jax.Array:
        """float32 [*stack, m, n]: the activation `taken`, of which `rows` are the values before, times a weight."""
        spec, backend = decision.input_format, self._backend(decision)
        return _ops.matmul(taken, tensor, spec, simulate=self.simulate, backend=backend, device=self.device)

    def _backend(self, decision: Decision, op: str = "qdot") -> str | None:
        """What the caller of `apply` asked for, or the context the model is traced in, or the recipe."""
        return self.backend or _ops.asked(op) or decision.backend or None

    def grouped(
        self, rows: jax.Array, taken: jax.Array, tensor: QTensor, sizes: jax.Array, decision: Decision
    ) -> jax.Array:
        """float32 [m, n]: `taken`, of which `rows` are the values before, in groups, each times its expert."""
        return _ops.grouped(taken, tensor, sizes, backend=self._backend(decision, "ragged"), device=self.device)

    def rows(self, tensor: QTensor, index: jax.Array) -> jax.Array:
        """float32 [*index, k]: rows of a table."""
        return _ops.qtake(tensor, index)

    def _joined(self, eqn: Any, values: Sequence[Any], found: list, weight: QConcat) -> jax.Array:
        """A dot with concatenated weights: one dot for each part, concatenated along the output axis."""
        by_part = {site.part: (site, d) for site, d in found}
        site = found[0][0]
        out, axis = eqn.outvars[0].aval, _output_axis(eqn, site.operand, weight.axis)
        pieces = []
        for i, part in enumerate(weight.parts):
            width = (part.view if isinstance(part, QView) else part).shape[weight.axis]
            shape = (*out.shape[:axis], width, *out.shape[axis + 1 :])
            aval = jax.ShapeDtypeStruct(shape, out.dtype)
            operands = list(values)
            operands[site.operand] = part
            if isinstance(part, QView) and i in by_part:
                pieces.append(_dot(self, eqn, operands, *by_part[i], aval))
            else:
                pieces.append(_jaxpr.bind(eqn, operands)[0])
        return jax.lax.concatenate(pieces, axis)


def prepared(rows: jax.Array, tensor: QTensor) -> jax.Array:
    """Activations [*stack, m, k] as the quantizer sees them: rotated, then scaled."""
    if tensor.rotation:
        rows = _hadamard.transform(rows, tensor.rotation)
    return rows if tensor.pre_scale is None else rows * tensor.pre_scale[..., None, :].astype(rows.dtype)


def feedback_of(tensor: QTensor, decision: Decision) -> jax.Array | None:
    """The factors by which the site's activation is rounded with feedback; None where it is rounded plainly.

    Raises:
        PlanError: the plan says feedback, and the packed weight holds no factors.
    """
    if decision.input is None or not decision.input.feedback:
        return None
    if tensor.feedback is None:
        raise PlanError(
            f"{decision.key}: its input is rounded with feedback, and the packed weight holds no factors for that: it "
            "was made with QTensor.quantize, or by training. Use jqopt.quantize or jqopt.load, or a recipe without "
            "`feedback`"
        )
    return tensor.feedback


def low_rank(rows: jax.Array, tensor: QTensor) -> jax.Array | None:
    """The part [*stack, m, n] float32 of a product that the low-rank factors make; None without them."""
    if tensor.low_a is None or tensor.low_b is None:
        return None
    x = prepared(rows, tensor).astype(jnp.bfloat16)
    wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    down = wide("...mk,...rk->...mr", x, tensor.low_a)
    return wide("...mr,...nr->...mn", down.astype(jnp.bfloat16), tensor.low_b)


def placed(run: Callable[..., jax.Array], out: Any) -> Callable[..., Any]:
    """On a mesh with Explicit axes: `run` with the compiler placing what is inside, its result as the model's was."""
    if not on_explicit_axes(out):
        return run
    inside: Any = jax.sharding.auto_axes(run, out_sharding=out.sharding)
    return inside


def on_explicit_axes(out: Any) -> bool:
    """Is a value of this type on a mesh with Explicit axes?"""
    mesh = getattr(getattr(out, "sharding", None), "mesh", None)
    return mesh is not None and not mesh.empty and jax.sharding.AxisType.Explicit in mesh.axis_types


def _output_axis(eqn: Any, side: int, axis: int) -> int:
    """Where a free axis of one operand of a dot_general lands in its output."""
    contract, batch = eqn.params["dimension_numbers"]
    free = [[d for d in range(v.aval.ndim) if d not in (*contract[i], *batch[i])] for i, v in enumerate(eqn.invars[:2])]
    return len(batch[0]) + (len(free[0]) if side else 0) + free[side].index(axis)


# -------------------------------------------------------------------------------------------------- ops


def _dot(rule: Executor, eqn: Any, values: Sequence[Any], site: Site, decision: Decision, out: Any) -> jax.Array:
    """A dot_general with a packed operand: packed if its layout can serve this contraction, else decoded."""
    side = site.operand
    x, weight = values[1 - side], values[side]
    contract, batch = (tuple(map(int, dims[side])) for dims in eqn.params["dimension_numbers"])
    match = _match(weight, batch, contract)
    if match is None:
        return _decoded(rule, eqn, values, site, decision, out)
    x_contract, x_batch = (tuple(map(int, dims[1 - side])) for dims in eqn.params["dimension_numbers"])
    free = [i for i in range(x.ndim) if i not in (*x_contract, *x_batch)]
    free_shape = [x.shape[i] for i in free]
    fine = x.transpose([*x_batch, *free, *x_contract])
    fine = fine.reshape([*_sizes(match.batch), *free_shape, *_sizes(match.contract)])
    b, f = len(match.batch), len(free)
    order = [match.batch.index(a) for a in match.stack]
    order += [*range(b, b + f), *(b + f + match.contract.index(a) for a in match.cols)]
    lead = match.tensor.data.shape[:-2]
    rows = fine.transpose(order).reshape(*lead, math.prod(free_shape), match.tensor.layout.k)
    taken = rule.activation(x, (lead, *order), rows, decision, match.tensor)
    got = rule.product(rows, taken, match.tensor, decision)
    more = low_rank(rows, match.tensor)
    got = got if more is None else got + more
    got = got.reshape([*_sizes(match.stack), *free_shape, *_sizes(match.rows)])
    back = [match.stack.index(a) for a in match.batch]
    mine, theirs = [b + f + match.rows.index(a) for a in match.free], list(range(b, b + f))
    back += [*theirs, *mine] if side == 1 else [*mine, *theirs]
    return got.transpose(back).reshape(out.shape).astype(out.dtype)


def _sizes(atoms: Sequence[Atom]) -> list[int]:
    return [a.size for a in atoms]


class _Match(NamedTuple):
    """How an operand's axes and the packed layout meet, in atoms fine enough for both.

    `stack`, `rows`, `cols` in the order of the packed data; `batch`, `free`, `contract` in the operand's order.
    """

    tensor: QTensor
    stack: list[Atom]
    rows: list[Atom]
    cols: list[Atom]
    batch: list[Atom]
    free: list[Atom]
    contract: list[Atom]


def _match(weight: QView, batch: Sequence[int], contract: Sequence[int]) -> _Match | None:
    """None if the packed layout can't serve this contraction (it contracts other axes, or part of one)."""
    view, tensor = weight.view, weight.tensor
    atoms = layout_atoms(tensor.layout)
    refined = _view.common_refinement(atoms, view.atoms())
    if refined is None or tensor.layout.shape != view.origin:
        return None

    def fine(found: Iterable[Atom]) -> list[Atom]:
        return [p for a in found for p in (refined[a.whole] if a.is_whole else (a,))]

    roles = (tensor.layout.stack, tensor.layout.rows, tensor.layout.cols)
    stack, rows, cols = ([atoms[i] for i in part] for part in roles)
    free = [d for d in range(len(view.shape)) if d not in (*contract, *batch)]
    want_batch, want_free, want_contract = (
        fine(a for d in dims for a in view.axes[d]) for dims in (batch, free, contract)
    )
    scanned = set(fine(view.scanned)) | set(view.scanned)
    left = [a for a in stack if a not in scanned and not (fine([a]) and set(fine([a])) <= scanned)]
    fixed = {a.whole: a.start for a in view.fixed}
    if not set(fixed) <= set(left) or set(fine(cols)) != set(want_contract):
        return None
    if set(fine(a for a in left if a not in fixed)) != set(want_batch):
        return None
    for i in reversed([i for i, a in enumerate(left) if a in fixed]):
        tensor = _pick(tensor, i, fixed[left[i]])
    cut = {a.whole: a for a in want_free if not a.is_whole}
    fine_rows = fine(rows)
    if cut:
        if not set(cut) <= set(fine_rows):
            return None
        sliced = _cut_rows(tensor, fine_rows, cut)
        if sliced is None:
            return None
        tensor, fine_rows = sliced, [cut.get(a, a) for a in fine_rows]
    if set(fine_rows) != set(want_free):
        return None
    kept = fine(a for a in left if a not in fixed)
    return _Match(tensor, kept, fine_rows, fine(cols), want_batch, want_free, want_contract)


def _pick(tensor: QTensor, axis: int, index: int) -> QTensor:
    """Position `index` of one of the leading stack axes of every leaf that has it."""
    return jax.tree.map(
        lambda leaf: jax.lax.index_in_dim(leaf, index, axis, keepdims=False) if leaf.ndim > axis else leaf, tensor
    )


def _cut_rows(tensor: QTensor, rows: Sequence[Atom], cut: Mapping[Atom, Atom]) -> QTensor | None:
    """Some of the rows of a packed matrix; None if a scale belongs to rows on both sides of a cut."""
    n = tensor.data.shape[-2]

    def slice_rows(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None or leaf.shape[-2] == 1 != n:
            return leaf
        lead, last = leaf.shape[:-2], leaf.shape[-1]
        out = leaf.reshape(*lead, *_sizes(rows), last)
        for i, atom in enumerate(rows):
            if atom in cut:
                used = cut[atom]
                out = jax.lax.slice_in_dim(out, used.start, used.start + used.size, axis=len(lead) + i)
        return out.reshape(*lead, -1, last)

    if tensor.scale.shape[-2] not in (1, n):
        return None
    fields = {name: slice_rows(getattr(tensor, name)) for name in tensor.BY_ROW}
    return tensor.replace(**fields)


def _decoded(rule: Executor, eqn: Any, values: Sequence[Any], site: Site, decision: Decision, out: Any) -> jax.Array:
    """The op itself on the decoded weight; the activation is quantized along its contracted axes."""
    side = site.operand
    operands = [_jaxpr.dense(v) for v in values]
    axes = tuple(map(int, eqn.params["dimension_numbers"][0][1 - side]))
    operands[1 - side] = _input(rule, operands[1 - side], axes, decision, values[side])
    return _jaxpr.bind(eqn, operands)[0]


def _input(rule: Executor, x: jax.Array, axes: Sequence[int], decision: Decision, weight: Any) -> jax.Array:
    """Quantize-dequantize of activations along `axes`, in their own shape and dtype."""
    spec = decision.input_format
    if spec is None:
        return x
    if spec.feedback:
        raise PlanError(
            f"{decision.key}: the packed weight can't serve this product (it was rearranged on its way), so its input "
            "can't be rounded with feedback; write `input:` without `feedback` in a rule for this site"
        )
    scale: Any = None
    if spec.static:
        scale = weight.tensor.input_scale if isinstance(weight, QView) else weight.input_scale
        for atom in weight.view.fixed if isinstance(weight, QView) and scale.ndim else ():
            scale = scale[atom.start]
    keep = [i for i in range(x.ndim) if i not in axes]
    order = [*keep, *axes]
    moved = x.transpose(order)
    flat = moved.reshape(-1, math.prod(moved.shape[len(keep) :]))
    back = sorted(range(x.ndim), key=order.__getitem__)
    return rule.quantized_input(flat, spec, scale).reshape(moved.shape).transpose(back).astype(x.dtype)


def _conv(rule: Executor, eqn: Any, values: Sequence[Any], site: Site, decision: Decision, out: Any) -> jax.Array:
    """A convolution with the decoded kernel; activations are quantized along their feature axis."""
    x, weight = values
    feature = eqn.params["dimension_numbers"].lhs_spec[1]
    return _jaxpr.bind(eqn, [_input(rule, x, (feature,), decision, weight), weight.dense()])[0]


def _ragged(rule: Executor, eqn: Any, values: Sequence[Any], site: Site, decision: Decision, out: Any) -> jax.Array:
    """A ragged dot, by `_ops.grouped` where it can; all experts' input is rotated and scaled in the same way."""
    x, weight, *rest = values
    if not isinstance(weight, QView):
        return _jaxpr.bind(eqn, [_input(rule, x, (x.ndim - 1,), decision, weight), weight.dense(), *rest])[0]
    tensor = weight.tensor
    one = tensor.replace(pre_scale=None if tensor.pre_scale is None else tensor.pre_scale[0])
    y = x if tensor.is_plain else prepared(x, one).astype(x.dtype)
    taken, packed = _input(rule, y, (x.ndim - 1,), decision, weight), _experts(rule, eqn, weight)
    if packed is not None:
        got = rule.grouped(y, taken, packed, rest[0], decision).astype(out.dtype)
    elif tensor.is_plain:
        got = _jaxpr.bind(eqn, [taken, weight.dense(), *rest])[0]
    else:
        codes = weight.view.materialize(tensor.layout.from_matrix(tensor.matrix()).astype(tensor.dtype))
        got = _jaxpr.bind(eqn, [taken, codes, *rest])[0]
    if tensor.low_a is None or tensor.low_b is None:
        return got
    branch = jnp.matmul(tensor.low_b.astype(jnp.float32), tensor.low_a.astype(jnp.float32))
    dense = weight.view.materialize(tensor.layout.from_matrix(branch).astype(tensor.dtype))
    return got + _jaxpr.bind(eqn, [y, dense, *rest])[0]


def _experts(rule: Executor, eqn: Any, weight: QView) -> QTensor | None:
    """The packed experts [e, n, k] of a ragged dot [m, k] x [e, k, n] over groups of rows; None for any other.

    None too where weights are to be decoded: in simulation, in two formats in sequence, and for a symbolic m.
    """
    numbers, rows = eqn.params.get("ragged_dot_dimension_numbers"), eqn.invars[0].aval.shape
    if numbers is None or rule.simulate or weight.tensor.format.then is not None:
        return None
    contract, batch = (tuple(tuple(map(int, d)) for d in dims) for dims in numbers.dot_dimension_numbers)
    if (contract[0], batch, tuple(map(int, numbers.lhs_ragged_dimensions))) != ((1,), ((), ()), (0,)):
        return None
    if len(rows) != 2 or not isinstance(rows[0], int) or len(numbers.rhs_group_dimensions) != 1:
        return None
    match = _match(weight, tuple(map(int, numbers.rhs_group_dimensions)), contract[1])
    if match is None or (match.stack, match.rows, match.cols) != (match.batch, match.free, match.contract):
        return None
    return match.tensor if match.tensor.data.ndim == 3 else None


def _gather(rule: Executor, eqn: Any, values: Sequence[Any], site: Site, decision: Decision, out: Any) -> jax.Array:
    """A table lookup that decodes only the rows it picks."""
    table, indices = values
    numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    match = _match(table, (), tuple(range(1, len(table.view.shape))))
    trailing = tuple(range(out.ndim - len(numbers.offset_dims), out.ndim))
    if match is None or match.cols != match.contract or match.rows != match.free or numbers.offset_dims != trailing:
        return _jaxpr.bind(eqn, values)[0]
    index = indices[..., 0]
    rows = rule.rows(match.tensor, index).reshape(out.shape).astype(out.dtype)
    if "fill" not in str(mode).lower():
        return rows
    fill = eqn.params["fill_value"]
    fill = jnp.nan if fill is None else fill
    valid = (index >= 0) & (index < table.view.shape[0])
    return jnp.where(valid.reshape(*valid.shape, *([1] * len(trailing))), rows, jnp.asarray(fill, out.dtype))


def _lookup(rule: Executor, eqn: Any, values: Sequence[Any], site: Site, decision: Decision, out: Any) -> jax.Array:
    """A table lookup in a decoded table."""
    return _jaxpr.bind(eqn, values)[0]


OPS: Mapping[str, Callable[..., jax.Array]] = {
    "dot_general": _dot,
    "conv": _conv,
    "ragged_dot": _ragged,
    "gather": _gather,
}
"""What to do with a packed weight at each kind of site."""

DECODED: Mapping[str, Callable[..., jax.Array]] = {
    "dot_general": _decoded,
    "conv": _conv,
    "ragged_dot": _ragged,
    "gather": _lookup,
}
"""What to do where the weight had to be decoded before."""
