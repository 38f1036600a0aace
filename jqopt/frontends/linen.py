"""Flax Linen: a module as a function of its variables, and native interception of its layers."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import errors as flax_errors
from flax import linen as nn

from jqopt._qtensor import QTensor
from jqopt._stage import Function
from jqopt.errors import PlanError, TraceError, UnsupportedError
from jqopt.frontends import _native, path_name


def function_of(model: nn.Module, variables: Any) -> Function:
    """A Linen module as `apply(variables, *inputs, **kwargs)`; only the collection `params` holds parameters.

    Raises:
        TraceError: `variables` isn't the whole dict that `model.init` returns.
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = list(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise TraceError(
            f"{type(model).__name__}: expected the whole variables dict that init returns, with a 'params' "
            f"collection; found {found}. Write {{'params': params}}."
        )

    def call(variables: Any, *inputs: Any, **kwargs: Any) -> Any:
        return model.apply(variables, *inputs, **kwargs)

    return Function(call, variables, path_of, watch, "linen", type(model).__name__)


def path_of(key: tuple) -> str | None:
    """`('params', 'q', 'kernel')` -> `q/kernel`; None for other collections. The box of `nn.Partitioned` is skipped."""
    collection, *rest = key
    if getattr(collection, "key", None) != "params":
        return None
    return path_name(_unboxed(tuple(rest)))


def _unboxed(key: tuple) -> tuple:
    return key[:-1] if key and isinstance(key[-1], jax.tree_util.GetAttrKey) else key


def sliceable(variables: Any) -> Any:
    """The same variables with the stacked axes of packed weights in front of every leaf: there Flax slices them."""
    return jax.tree.map(
        lambda x: _native.sliceable(x) if isinstance(x, QTensor) else x,
        variables,
        is_leaf=lambda x: isinstance(x, QTensor),
    )


@contextlib.contextmanager
def watch() -> Iterator[dict[str, str]]:
    """While active, notes the class of every module that is called: {module path: class name}."""
    modules: dict[str, str] = {}

    def note(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        modules.setdefault("/".join(context.module.path), type(context.module).__name__)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        yield modules


# --------------------------------------------------------------------------------------------- interception


LAYERS = (
    nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Embed, nn.OptimizedLSTMCell
)  # fmt: skip
"""Flax's layers that read parameters; attention and the other recurrent cells are made of them."""

_PASS = "pass `qm.variables` of the qm that jqopt.linen.intercept was given."

_active = jax.make_user_context(None)
"""Which interception is active: part of the key of every jit cache, so that no function traced without it is reused."""


@contextlib.contextmanager
def intercept(qm: Any, *, modules: Sequence[type[nn.Module]] = (), simulate: bool = False) -> Iterator[None]:
    """While active, `model.apply(qm.variables, ...)` runs on packed weights; in a jitted function write it inside.

    Each layer of Flax with packed weights is run by the evaluator behind `qm(...)`: under jit both give the same bits.

    Args:
        qm: a quantized Linen model (`jqopt.quantize_model`, `jqopt.load`).
        modules: further classes to run in this way, whose own code reads quantized parameters (`self.param`). A call of
            theirs runs with all that is below it as a pure function, and may not draw random numbers.
        simulate: float32 quantize-dequantize arithmetic instead of packed kernels.

    Raises:
        UnsupportedError: qm isn't a Linen model, or its recipe quantizes attention's operands; or, when the model
            runs: a packed weight is read by a module that is neither Flax's nor in `modules`, or a lifted scan or vmap
            can't slice it. The message names the parameter.
        PlanError: the variables aren't those of qm (at the end of the block, if all of them are float); or the model
            uses a packed weight in a way that the plan doesn't know.
    """
    _native.no_attention(qm.plan, "jqopt.linen.intercept")
    function = qm.plan.function
    if function is not None and function.kind != "linen":
        raise UnsupportedError(
            f"{function.name} is no Linen model: jqopt.linen.intercept works on Linen modules. Use `qm(...)`; for an "
            "NNX module jqopt.nnx.quantize(model, qm)."
        )
    run = _Interceptor(_native.decisions(qm.plan), (*LAYERS, *modules), simulate)
    with _active(run.key), nn.intercept_methods(run):
        yield
    if run.plain and not run.packed:
        raise PlanError(
            f"{run.plain} ran under jqopt.linen.intercept on float weights only, hence unquantized. Pass qm.variables "
            "to `model.apply`, and run float models outside of the `with`."
        )


class _Interceptor:
    """What happens at each method call of a Linen module."""

    def __init__(self, decisions: _native.Decisions, layers: tuple[type, ...], simulate: bool):
        self.decisions, self.layers, self.simulate = decisions, layers, simulate
        text = repr(sorted(decisions.items()))
        self.key = (hashlib.sha256(text.encode()).hexdigest(), layers, simulate)
        self.packed, self.plain = False, ""  # has a model run with packed weights; the last one that ran without

    def _check(self, module: nn.Module, packed: Mapping[str, QTensor]) -> None:
        """A whole model must have all the packed weights of the plan, or none of them."""
        self.packed = self.packed or bool(packed)
        if module.path or module.is_initializing():
            return
        if not packed:
            self.plain = type(module).__name__
            return
        missing = next((p for p, _ in self.decisions if p not in packed), None)
        if missing is not None and any(p in packed for p, _ in self.decisions):
            raise PlanError(f"{missing}: the plan quantizes it, but it isn't packed in these variables: {_PASS}")

    def __call__(self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module, method = context.module, context.method_name
        if module.scope is None:
            return call(*args, **kwargs)
        packed = _packed(module)
        self._check(module, packed)
        if not packed:
            return call(*args, **kwargs)
        if isinstance(module, self.layers):
            if method == "setup":  # it would check the shapes of float weights
                return _guard(module, packed)
            own = hasattr(type(module), method)  # else a function that nn.cond or nn.scan was given the module for
            return self._layer(module, method, packed, args, kwargs) if own else call(*args, **kwargs)
        raw = next((p for p in packed if p.rpartition("/")[0] == "/".join(module.path)), None)
        if raw is not None:
            raise UnsupportedError(_used_raw(raw, packed[raw], type(module)))
        try:
            return call(*args, **kwargs)
        except (ValueError, IndexError) as error:
            explained = _explained(error, packed, self.decisions)
            if explained is error:
                raise
            raise explained from error

    def _layer(self, module: nn.Module, method: str, packed: dict[str, QTensor], args: tuple, kwargs: dict) -> Any:
        """The method as a pure function of the module's weights, on the packed ones."""
        unknown = next((p for p in packed if not any(p == path for path, _ in self.decisions)), None)
        if unknown is not None:
            raise UnsupportedError(
                f"{unknown}: a packed weight of which the plan knows nothing. Apply the whole model that was "
                f"quantized, not a part of it; {_PASS}"
            )
        call = functools.partial(_unbound, module, method)
        try:
            out, written = _native.run(call, packed, self.decisions, args, kwargs, simulate=self.simulate)
        except flax_errors.InvalidRngError as error:
            raise UnsupportedError(
                f"{next(iter(packed))}: {type(module).__name__}.{method} draws random numbers, and "
                f"jqopt.linen.intercept runs it as a pure function. Draw them in another module, or {_native.INSTEAD}."
            ) from error
        for collection, tree in written.items():
            for name, value in tree.items() if collection != "params" else ():
                module.put_variable(collection, name, value)
        return out


def _packed(module: nn.Module) -> dict[str, QTensor]:
    """The quantized parameters of a module and of all below it, by path."""
    flat, _ = _flat(module)
    return {p: leaf for p, leaf in flat.items() if isinstance(leaf, QTensor)}


def _flat(module: nn.Module) -> tuple[dict[str, Any], Any]:
    """({path: leaf}, treedef) of a module's parameters."""
    tree = module.variables.get("params", {})
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, QTensor))
    own = "/".join(module.path)
    names = [path_name(_unboxed(key)) for key, _ in flat]
    return {f"{own}/{n}" if own else n: leaf for n, (_, leaf) in zip(names, flat, strict=True)}, treedef


def _unbound(module: nn.Module, method: str, weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """(output, changed variables) of a bound module's method, run outside its model with these weights."""
    flat, treedef = _flat(module)
    params = jax.tree.unflatten(treedef, [weights.get(path, leaf) for path, leaf in flat.items()])
    mutable = module.scope.mutable if module.scope is not None else False
    out = module.clone(parent=None).apply(
        {**module.variables, "params": params}, method=lambda m: getattr(m, method)(*args, **kwargs), mutable=mutable
    )
    return out if mutable is not False else (out, {})


# ------------------------------------------------------------------------------------------------- refusals


def _used_raw(path: str, tensor: QTensor, owner: type) -> str:
    instead = f"pass its class: `intercept(qm, modules=({owner.__name__},))`"
    return _native.used_raw(path, tensor.format.name, owner.__name__, instead)


def _explained(error: Exception, packed: Mapping[str, QTensor], decisions: _native.Decisions) -> Exception:
    """JAX's complaint that it can't slice a packed weight, in words that name the weight; other errors as they are."""
    scanned = {p: len(d.outer) for (p, _), d in decisions.items() if d.outer}
    deep = [p for p in packed if p in scanned and not _native.leads(packed[p].layout, scanned[p])]
    if str(error).startswith(("vmap ", "scan ")):
        deep += [p for p, t in packed.items() if len(t.layout.shape) > 2 and not _native.leads(t.layout, 1)]
    if not deep:
        return error
    return UnsupportedError(f"{_native.unsliceable(deep[0], packed[deep[0]].layout)} ({error})")


def _guard(module: nn.Module, packed: Mapping[str, QTensor]) -> None:
    """Stands in for `setup`: whoever reads the weight as an attribute (`embed.embedding`) learns why that fails."""
    for path, tensor in packed.items():
        owner, _, name = path.rpartition("/")
        if owner == "/".join(module.path) and not hasattr(type(module), name):
            object.__setattr__(module, name, _Guard(_used_raw(path, tensor, type(module))))


class _Guard:
    """An attribute that refuses any use."""

    def __init__(self, message: str):
        self._message = message

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(self._message)

    __getattr__ = __getitem__ = __jax_array__ = __array__ = _refuse
    __matmul__ = __rmatmul__ = __mul__ = __rmul__ = __add__ = __radd__ = _refuse
