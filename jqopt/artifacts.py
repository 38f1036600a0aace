"""Deployable artifacts, which `jqopt.export(qm, dir, "stablehlo")` writes: loaded and run without the model's code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as _jax_export

from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.export import artifact as _artifact
from jqopt.export.artifact import Input as _Input
from jqopt.export.artifact import Manifest as _Manifest
from jqopt.hf import safetensors as _safetensors

__all__ = ["Artifact", "load"]

_GPUS = ("cuda", "rocm")  # what jax.default_backend() calls "gpu"


class Artifact:
    """A loaded program with its weights: call it as the model. `manifest` says what it takes, `program` is JAX's
    `Exported` of a function of (`weights`, inputs).

    `artifact(*inputs, **named)` takes the model's arrays in their order or by name, also inside of `jax.jit`.
    """

    def __init__(self, directory: Path, manifest: _Manifest, platform: str, program: Any, weights: list[jax.Array]):
        self.directory, self.manifest, self.platform, self.weights = directory, manifest, platform, weights
        self.program = program
        self._run = jax.jit(program.call)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model's output.

        Raises:
            UnsupportedError: an input is missing, or of another rank, dtype or size; which, and what would do.
        """
        values = self._values(inputs, named)
        sizes: dict[str, tuple[str, int]] = {}
        for taken, value in zip(self.manifest.inputs, values, strict=True):
            _check(taken, value, self.manifest.dims, sizes)
        return _artifact.rebuild(self.manifest.output, self._run(self.weights, values))

    def _values(self, inputs: tuple, named: Mapping[str, Any]) -> list[Any]:
        names = [x.name for x in self.manifest.inputs]
        given = {**dict(zip(names, inputs)), **named}
        if len(given) != len(inputs) + len(named) or set(given) != set(names):
            found = [*(f"{len(inputs)} in order" for _ in inputs[:1]), *named] or ["none"]
            raise UnsupportedError(
                f"inputs: found {', '.join(found)}; expected {', '.join(map(_said, self.manifest.inputs))}"
            )
        return [given[name] for name in names]

    def __repr__(self) -> str:
        m = self.manifest
        return f"Artifact({m.model} for {self.platform}: {', '.join(map(_said, m.inputs))}; {_bounds(m.dims)})"


def _check(taken: _Input, value: Any, dims: Mapping[str, list[int]], sizes: dict[str, tuple[str, int]]) -> None:
    """One input against what the manifest says; `sizes` remembers which input gave an axis its size."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise UnsupportedError(
            f"{taken.name}: found a {type(value).__name__}; expected an array: np.asarray(x, np.{taken.dtype})"
        )
    if str(value.dtype) != taken.dtype:
        raise UnsupportedError(f"{taken.name}: found {value.dtype}; expected {taken.dtype}: .astype(np.{taken.dtype})")
    if len(value.shape) != len(taken.shape):
        raise UnsupportedError(f"{taken.name}: found shape {tuple(value.shape)}; expected {_said(taken)}")
    for axis, (found, wanted) in enumerate(zip(value.shape, taken.shape, strict=True)):
        where = f"{taken.name}: axis {axis}"
        if isinstance(wanted, int):
            if found != wanted:
                raise UnsupportedError(f"{where} has size {found}; this artifact was exported for {wanted} alone")
            continue
        least, most = dims[wanted]
        if not least <= found <= most:
            raise UnsupportedError(
                f"{where} ({wanted}) has size {found}; allowed are {least} to {most}. Cut or pad the input, or export "
                f"with other bounds: {wanted}=({max(1, min(least, found))}, {max(most, found)})"
            )
        other, size = sizes.setdefault(wanted, (where, found))
        if size != found:
            raise UnsupportedError(f"{where} ({wanted}) has size {found}, but {other} has {size}; they must be equal")


def _said(x: _Input) -> str:
    return f"{x.name} {x.dtype}[{', '.join(map(str, x.shape))}]"


def _bounds(dims: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} {least} to {most}" for name, (least, most) in dims.items()) or "fixed sizes"


def load(directory: str | Path, *, platform: str | None = None, verify: bool = True) -> Artifact:
    """Reads an artifact; neither Flax nor the code of the model is used.

    Args:
        directory: what `jqopt.export(qm, directory, "stablehlo")` wrote.
        platform: whose program to take ("cpu", "cuda", "rocm", "tpu"); default: that of JAX's default device.
        verify: compare the weights with their sha256, which reads every byte once more (programs always are).

    Raises:
        CheckpointError: nothing there; damaged, incomplete, or of a newer version. The message names the file.
        UnsupportedError: it has no program for the platform.
    """
    folder = Path(directory)
    manifest = _artifact.read(folder)
    chosen = _platform(folder, manifest, platform)
    data = _artifact.check(folder, manifest.programs[chosen].jax).read_bytes()
    try:
        program = _jax_export.deserialize(bytearray(data))
    except Exception as error:
        raise CheckpointError(
            f"{folder}: a program of JAX {manifest.jax}, which JAX {jax.__version__} can't read: {error}"
        ) from error
    return Artifact(folder, manifest, chosen, program, _weights(folder, manifest, verify))


def _platform(folder: Path, manifest: _Manifest, asked: str | None) -> str:
    here = asked or jax.default_backend()
    named = [p for p in manifest.programs if p == here or (here == "gpu" and p in _GPUS)]
    if not named:
        raise UnsupportedError(
            f"{folder}: it has programs for {', '.join(manifest.programs)}, and none for {here}. Export it with "
            f"platforms=({'cuda' if here == 'gpu' else here!r},)"
        )
    return named[0]


def _weights(folder: Path, manifest: _Manifest, verify: bool) -> list[jax.Array]:
    """The arrays in the order of the programs' arguments, on the default device."""
    path = _artifact.check(folder, manifest.weights) if verify else folder / manifest.weights.file
    if not path.is_file():
        raise CheckpointError(f"{folder}: {path.name} is missing; export it again")
    entries, wanted = _safetensors.open_file(path), {x.name: x for x in manifest.arrays}
    if set(entries) != set(wanted):
        raise CheckpointError(f"{path}: it doesn't hold the arrays that {_artifact.FILE} lists")
    for name, x in wanted.items():
        if list(entries[name].shape) != x.shape or entries[name].dtype != np.dtype(x.dtype):
            found = f"{entries[name].dtype}{list(entries[name].shape)}"
            raise CheckpointError(f"{path}: {name} is {found}; {_artifact.FILE} says {x.dtype}{x.shape}")
    return [jax.device_put(entries[x.name].read()) for x in manifest.arrays]
