"""Quantized models as deployable artifacts: StableHLO programs of symbolic shapes, packed weights as arguments."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from jqopt import _apply
from jqopt.errors import CheckpointError, JqoptError, UnsupportedError
from jqopt.export import artifact
from jqopt.export.artifact import Array, Data, Input, Manifest, Program
from jqopt.export.calls import Bounds, Call, call_of, given, symbolic
from jqopt.export.manifest import writer

NAME = "stablehlo"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

STORED = {
    **{np.dtype(f"int{bits}"): f"I{bits}" for bits in (8, 16, 32, 64)},
    **{np.dtype(f"uint{bits}"): f"U{bits}" for bits in (8, 16, 32, 64)},
    **{np.dtype(f"float{bits}"): f"F{bits}" for bits in (16, 32, 64)},
    np.dtype(jnp.bfloat16): "BF16",
    np.dtype(bool): "BOOL",
}
"""How safetensors calls the dtypes that a weight may have."""


class Exported(NamedTuple):
    """What was written; `print` it."""

    directory: Path
    target: str
    platforms: tuple[str, ...]
    inputs: dict[str, str]
    tensors: int
    nbytes: int
    files: tuple[str, ...]

    def __str__(self) -> str:
        taken = ", ".join(f"{name} {shape}" for name, shape in self.inputs.items())
        size = f"{self.tensors} tensors, {self.nbytes / 1e6:.4g} MB"
        return f"{self.directory}: {self.target} for {', '.join(self.platforms)}, takes {taken}; {size}"

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {**self._asdict(), "directory": str(self.directory)}


def export(
    qm: Any,
    directory: str | Path,
    *,
    batch: Bounds | None = None,
    length: Bounds | None = None,
    dims: Mapping[str, Bounds] | None = None,
    axes: Mapping[str, Sequence[str | int | None]] | None = None,
    inputs: Any = None,
    platforms: Sequence[str] = ("cpu",),
    backend: str = "xla",
    overwrite: bool = False,
) -> Exported:
    """Writes a folder that runs with JAX alone: a program for each platform, the weights, and a manifest.

    Args:
        qm: a QuantizedModel.
        batch, length: bounds of the axes of those names: `(least, most)`, or one size, which is then fixed. Default
            (1, 8) and (1, 512).
        dims: bounds of further names that `axes` uses.
        axes: {input: a name, a size or None (as in `inputs`) for each axis}. Default: whole numbers of two axes are
            ("batch", "length"), the first axis of anything else is "batch", and the others are as in `inputs`.
        inputs: one batch of arrays or shapes, default those the model was quantized with. What is no array is fixed.
        platforms: of "cpu", "cuda", "rocm", "tpu": one program each, lowered on this machine.
        backend: a family of kernels or one kernel's name, for all sites and whatever the recipe says. Programs of
            others than "xla" and "reference" call code that a process with JAX alone does not have.
        overwrite: replace the artifact that is there.

    Raises:
        UnsupportedError: bounds, axes or platforms that don't fit, or a model that can't be traced with symbolic axes.
        CheckpointError: something is there already.
    """
    out = Path(directory).absolute()
    _check_target(out, overwrite)
    _check_platforms(platforms)
    call = call_of(qm, inputs, axes or {}, given(batch, length, dims or {}))
    names, leaves = _weights(qm.quant)
    lowered = {p: _lower(qm, p, call, backend) for p in platforms}
    fresh = out.with_name(f"{out.name}.jqopt-new-{uuid.uuid4().hex[:8]}")
    fresh.mkdir(parents=True)
    try:
        arrays = [Array(name=n, dtype=str(x.dtype), shape=list(x.shape)) for n, x in zip(names, leaves, strict=True)]
        save_safetensors(fresh / artifact.WEIGHTS, dict(zip(names, leaves, strict=True)))
        programs = {p: _write_program(fresh, p, exported) for p, (exported, _) in lowered.items()}
        first, output = lowered[platforms[0]]
        made = Manifest(
            format=artifact.FORMAT, version=artifact.VERSION, writer=writer(), jax=jax.__version__,
            model=qm.plan.function.name, dims={n: list(b) for n, b in call.dims.items()}, inputs=call.inputs,
            results=[_described(f"{i}", x) for i, x in enumerate(first.out_avals)], output=output,
            weights=_data(fresh / artifact.WEIGHTS), arrays=arrays, programs=programs, tokens=_tokens(qm.plan),
            plan=_summary(qm.plan),
        )  # fmt: skip
        (fresh / artifact.FILE).write_text(json.dumps(made.model_dump(), indent=1))
        _replace(fresh, out)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    files = sorted(out.iterdir())
    shapes = {x.name: f"{x.dtype}[{', '.join(map(str, x.shape))}]" for x in call.inputs}
    size = sum(f.stat().st_size for f in files)
    return Exported(out, NAME, tuple(platforms), shapes, len(arrays), size, tuple(f.name for f in files))


# ---------------------------------------------------------------------------------------------------- weights


def _weights(quant: Any) -> tuple[list[str], list[Any]]:
    """Names and arrays of all leaves, in the order in which a program takes them; random keys as their numbers."""
    flat, _ = jax.tree_util.tree_flatten_with_path(quant)
    names = [jax.tree_util.keystr(key, simple=True, separator="/").removeprefix("params/") for key, _ in flat]
    leaves = [_data_of(x) for _, x in flat]
    twice = [n for i, n in enumerate(names) if n in names[:i]]
    if twice:
        raise UnsupportedError(f"two weights are called {twice[0]!r}: a key holds '/'. Rename it")
    for name, x in zip(names, leaves, strict=True):
        if np.dtype(x.dtype) not in STORED:
            raise UnsupportedError(
                f"{name}: {x.dtype} isn't held by an artifact; there are {', '.join(map(str, STORED))}"
            )
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            raise UnsupportedError(f"{name}: the array spans several processes; artifacts are written by one process")
    return names, leaves


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _data_of(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x) else x if hasattr(x, "dtype") else np.asarray(x)


def save_safetensors(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays one after another, in the format that https://github.com/huggingface/safetensors describes."""
    header, start = {}, 0
    for name, x in arrays.items():
        size = x.size * np.dtype(x.dtype).itemsize
        header[name] = {
            "dtype": STORED[np.dtype(x.dtype)],
            "shape": list(x.shape),
            "data_offsets": [start, start + size],
        }
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in arrays.values():
            file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


# ---------------------------------------------------------------------------------------------------- programs


def _check_platforms(platforms: Sequence[str]) -> None:
    wrong = [p for p in platforms if p not in PLATFORMS]
    if isinstance(platforms, str) or wrong or not platforms or len(set(platforms)) < len(platforms):
        raise UnsupportedError(f"platforms={platforms!r}: expected some of {PLATFORMS}, each once")


def _lower(qm: Any, platform: str, call: Call, backend: str) -> tuple[Any, Any]:
    """(jax.export's Exported of a function of (weights, inputs), the outline of the model's output)."""
    run, leaves, treedef = _apply.apply(qm.plan, backend=backend, device=platform), *jax.tree.flatten(qm.quant)
    impls = [jax.random.key_impl(x) if _is_key(x) else None for x in leaves]
    outlines: list[Any] = []

    def serve(weights: list, inputs: list) -> list:
        back = [x if i is None else jax.random.wrap_key_data(x, impl=i) for x, i in zip(weights, impls, strict=True)]
        args, kwargs = call.rebuild(inputs)
        node, results = artifact.outline(run(jax.tree.unflatten(treedef, back), *args, **kwargs))
        outlines.append(node)
        return results

    weights = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(_data_of, leaves)]
    try:
        exported = jax_export.export(jax.jit(serve), platforms=(platform,))(weights, symbolic(call))
    except JqoptError:
        raise
    except Exception as error:
        named = ", ".join(f"{n} of {b[0]} to {b[1]}" for n, b in call.dims.items())
        hint = f" with a symbolic {named}. If it branches on a size, fix it, as in length=128" if named else ""
        what = next(iter(str(error).splitlines()), "")
        raise UnsupportedError(
            f"{qm.plan.function.name} can't be exported for {platform}{hint}. {type(error).__name__}: {what}"
        ) from error
    return exported, outlines[-1]


def _write_program(folder: Path, platform: str, exported: Any) -> Program:
    both = {"jax": exported.serialize(), "stablehlo": exported.mlir_module_serialized}
    for kind, data in both.items():
        (folder / f"{platform}.{kind}").write_bytes(data)
    return Program(**{kind: _data(folder / f"{platform}.{kind}") for kind in both})


def _data(path: Path) -> Data:
    return Data(file=path.name, sha256=artifact.sha256(path))


def _described(name: str, x: Any) -> Input:
    return Input(name=name, dtype=str(x.dtype), shape=[a if isinstance(a, int) else str(a) for a in x.shape])


def _tokens(plan: Any) -> int | None:
    """How many whole numbers every lookup in a table knows."""
    sizes = [plan.parameters[d.path].shape[0] for d in plan.decisions if d.op == "gather" and d.path is not None]
    return min(sizes, default=None)


def _summary(plan: Any) -> dict[str, Any]:
    packed = {
        path: {
            "format": d.format.name,
            "granularity": d.granularity,
            "input": None if d.input_format is None else d.input_format.format.name,
        }
        for path, d in plan.quantized.items()
    }
    return {"recipe": plan.recipe.name, "fingerprint": plan.recipe.fingerprint, "quantized": packed}


# ---------------------------------------------------------------------------------------------------- folders


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not _is_artifact(out):
        raise CheckpointError(f"{out} is there already and is no artifact: it stays. Write to another folder.")
    if not overwrite:
        raise CheckpointError(f"{out} holds an artifact already; write overwrite=True (--overwrite) to replace it.")


def _is_artifact(out: Path) -> bool:
    """Whether it was written here, even if it is damaged or of another version."""
    try:
        return json.loads((out / artifact.FILE).read_bytes()).get("format") == artifact.FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def _replace(fresh: Path, out: Path) -> None:
    """One rename; what was there goes last."""
    old = out.with_name(f"{fresh.name}-old")
    if out.exists() and any(out.iterdir()):
        out.rename(old)
    try:
        fresh.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
