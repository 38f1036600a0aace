"""Runs launches in Triton's interpreter, on numpy alone; a process of its own, since a switch is set before the import.

    TRITON_INTERPRET=1 python -m tests.kernels.triton_interpret < jobs.json > errors.json

The interpreter gets three things wrong. Of two the kernels are told (WIDE) or the cases chosen so that they don't
matter: its bfloat16 dot reads bits as integers, so that dots are done in float32 here; and its e4m3 has no NaN and its
e5m2 no subnormals (the kernels read e5m2 as the upper half of a float16). The third is mended here: its `dot_scaled`
reads e4m3 scales (NVFP4's) as e8m0.
"""

import json
import sys
import warnings

import numpy as np


class Array:
    """As much of a tensor as the interpreter asks for: an address, a type by name, copies to and from a device."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype, self.shape = array, array.dtype.name, array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Array":
        return self

    def cpu(self) -> "Array":
        return self

    def copy_(self, other: "Array") -> None:
        assert other.array is self.array

    def new_empty(self, *_, **__) -> "Array":
        return Array(self.array)

    def set_(self, *_) -> "Array":
        return self

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def element_size(self) -> int:
        return self.array.itemsize


def read_scales_by_their_type() -> None:
    """Has the interpreter's `dot_scaled` decode e4m3 scales as e4m3, by ml_dtypes; Triton 3.9 reads all as e8m0."""
    import ml_dtypes
    from triton.runtime import interpreter

    as_e8m0 = getattr(interpreter, "_dot_scaled_scale_to_f32", None)
    if as_e8m0 is None:  # Triton before 3.9, whose interpreter has no `dot_scaled`
        return

    def decoded(handle, compute_type) -> np.ndarray:
        if str(handle.dtype) != "fp8e4nv":
            return as_e8m0(handle, compute_type)
        return handle.data.view(ml_dtypes.float8_e4m3fn).astype(np.float32)

    interpreter._dot_scaled_scale_to_f32 = decoded


def interpret(launch) -> np.ndarray:
    """What a launch writes; what it doesn't write is NaN."""
    from jqopt_kernels import triton_call

    out = np.full(launch.out.shape, np.nan, launch.out.dtype)
    operands = [o if isinstance(o, int) else Array(np.array(o)) for o in launch.operands]
    constants = launch.constants | ({"WIDE": True} if "WIDE" in launch.constants else {})
    triton_call.source(launch.kernel)[launch.grid](*operands, Array(out), **constants)
    return out


def run(
    name: str, c, epilogue=None, capability: int = 90, prepare: bool = True, out_dtype: str = "float32"
) -> np.ndarray:
    """One `cases.Case` by the kernel of that name."""
    import jax.numpy as jnp

    from jqopt_kernels import KERNELS, Epilogue, Shapes, triton_dot

    lhs_spec, rhs_spec, n, k = c.specs.values()
    m = c.y.shape[0]
    rhs = next(k for k in KERNELS if k.name == name).prepare(c.rhs) if prepare else c.rhs
    launch, after = triton_dot.launches()[name](
        c.lhs,
        rhs,
        lhs_spec,
        rhs_spec,
        Shapes(m, n, k),
        jnp.dtype(out_dtype),
        capability,
        epilogue=epilogue or Epilogue(),
    )
    return np.asarray(after(jnp.asarray(interpret(launch))), np.float64)


def followed(c, activation: str):
    """(a bias and the activation, the case with what they make of it), as in `test_epilogue`."""
    import jax.numpy as jnp

    from jqopt_kernels import Epilogue
    from tests.kernels import test_epilogue as by

    c = by.sized(c)
    bias, exact = by.biased(c)
    z = c.y + exact
    bound = by.STEEPEST * (c.bound + 2.0**-24 * np.abs(z)) + 2.0**-21 * np.abs(z)
    return Epilogue(jnp.asarray(bias), activation), c._replace(y=by.BY_DEFINITION[activation](z), bound=bound)


def job(what: dict) -> dict:
    """{"kernel", "pair", "shape": [m, n, k], "dtype", "activation", "capability", "prepare", "out_dtype"} -> largest
    error over the bound, and relative. Of bfloat16 results the bound is wider by one unit in the last
    place: where a GPU rounds, the interpreter cuts off.
    """
    import jax.numpy as jnp

    from tests.kernels.cases import PAIRS, case

    PAIRS.setdefault(what["pair"], tuple(what["pair"].split(" x ")))  # in a process of its own
    c = case(what["pair"], *what["shape"], float_dtype=jnp.dtype(what.get("dtype", "float32")))
    if "broken" in what:  # a byte of the weight's codes or scales, by row and column
        field, row, column, byte = what["broken"]
        arrays = c.rhs._asdict()
        arrays[field] = arrays[field].at[row, column].set(byte)
        c = c._replace(rhs=type(c.rhs)(**arrays))
    epilogue = None
    if "activation" in what:
        epilogue, c = followed(c, what["activation"])
    options = {key: what[key] for key in ("capability", "prepare", "out_dtype") if key in what}
    y = run(what["kernel"], c, epilogue, **options)
    if options.get("out_dtype") == "bfloat16":
        ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(c.y), 1e-30))) - 7)
        c = c._replace(bound=c.bound + ulp)
    error = np.abs(y - c.y)
    return {
        "shape": list(y.shape),
        "bound": float(np.max(error / np.maximum(c.bound, 1e-300))),
        "relative": float(error.max() / max(np.abs(c.y).max(), 1e-300)),
        "nan_rows": np.nonzero(np.isnan(y).any(0))[0].tolist(),
    }


if __name__ == "__main__":
    warnings.simplefilter("error")
    read_scales_by_their_type()
    json.dump([job(what) for what in json.load(sys.stdin)], sys.stdout)
