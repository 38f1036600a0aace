"""The quantizer ops: every kernel, the oracle among them, gives the bits of jqopt's formats and training quantizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt_kernels as kernels
from jqopt import _numerics, formats
from jqopt.train import _dither
from jqopt.train._operand import ROWS, Quantizer, codes, measure, pinned
from jqopt.train.quantizers import RHT_SIGNS, encode_scale, fp8_scale
from jqopt_kernels.quantize_way import SIGNS, Random, Way, needs_scale
from tests.kernels.quantize_cases import FORMATS, hostile, matrix

FAMILIES = ("xla", "pallas", "reference")


def kernel_of(op: str, family: str) -> kernels.Kernel:
    return next(k for k in kernels.KERNELS if (k.op, k.backend) == (op, family))


@functools.cache
def quantizer(family: str, name: str, way: Way, packed: bool):
    run = kernel_of("quantize", family).run
    return jax.jit(lambda x, scale, random: run(
        x, spec=FORMATS[name][0], way=way, scale=scale, random=random, packed=packed))  # fmt: skip


@functools.cache
def expected(name: str, packed: bool):
    _, format, granularity = FORMATS[name]
    return jax.jit(lambda x, scale: _numerics.quantize_matrix(
        x, format, granularity=granularity, tensor_scale=scale, packed=packed))  # fmt: skip


def same(a, b) -> None:
    """All arrays, shapes, dtypes and bits; NaN equals NaN."""
    leaves = jax.tree.leaves(tuple(a)), jax.tree.leaves(tuple(b))
    assert len(leaves[0]) == len(leaves[1])
    for p, q in zip(*leaves, strict=True):
        assert p.dtype == q.dtype and p.shape == q.shape
        np.testing.assert_array_equal(p, q)


def scale_for(name: str):
    return jnp.float32(0.0123) if needs_scale(FORMATS[name][0]) else None


def finite(name: str, x):
    """x; for integers, which have no code for NaN, without it."""
    return jnp.nan_to_num(x, nan=1.0, posinf=3e38, neginf=-3e38) if name.startswith("int8") else x


# Without `slow`: the kernel on every format; the oracle and XLA's form (the kernel's arithmetic on one tile) on some.
OFTEN = {
    "pallas": {*FORMATS, "2d", "up", "fp8_block"},
    "reference": {"nvfp4", "mxfp8", "up"},
    "xla": {"nvfp4"},
}


def checks(names) -> list:
    return [
        pytest.param(name, family, marks=() if name in OFTEN[family] else pytest.mark.slow, id=f"{name}-{family}")
        for name in names
        for family in FAMILIES
    ]


@pytest.mark.parametrize(("name", "family"), checks(FORMATS))
def test_equals_the_formats(name, family):
    """Ragged rows and columns, zero blocks, ties, tiny and huge numbers, NaN and infinity."""
    x = finite(name, hostile(9, 150))
    found = quantizer(family, name, Way(), True)(x, scale_for(name), None)
    same(found, expected(name, True)(x, scale_for(name)))


@pytest.mark.parametrize(("name", "family"), [("nvfp4", "pallas"), ("mxfp6", "xla")])
def test_unpacked(name, family):
    x = matrix(3, 37)
    same(quantizer(family, name, Way(), False)(x, scale_for(name), None), expected(name, False)(x, scale_for(name)))


# ------------------------------------------------------------------------- training: TransformerEngine's arithmetic

X = matrix(40, 64, dtype=jnp.bfloat16)
KEY = jnp.asarray([0x12345678, 0x9ABCDEF0], jnp.uint32)
TRAINED = {
    "1d": (FORMATS["nvfp4"][0], Way(encode=True), Quantizer(formats.get("nvfp4"), (1, 16))),
    "2d": (
        FORMATS["nvfp4"][0]._replace(block=(16, 16)),
        Way(encode=True),
        Quantizer(formats.get("nvfp4"), (16, 16)),
    ),
    "up": (
        FORMATS["nvfp4"][0],
        Way(encode=True, scale_up=True, stochastic=True),
        Quantizer(formats.get("nvfp4"), (1, 16), scale_up=True, stochastic=True),
    ),
    "hadamard": (
        FORMATS["nvfp4"][0],
        Way(encode=True, hadamard=SIGNS, stochastic=True),
        Quantizer(formats.get("nvfp4"), (1, 16), hadamard=True, stochastic=True),
    ),
    "fp8_block": (
        FORMATS["fp8_8x16"][0],
        Way(encode=True, power_of_two=True),
        Quantizer(formats.get("fp8"), (8, 16), power_of_two=True),
    ),
    "mxfp8": (
        FORMATS["mxfp8"][0],
        Way(encode=True, stochastic=True),
        Quantizer(formats.get("mxfp8"), (1, 32), stochastic=True),
    ),
    "fp8": (
        FORMATS["fp8_e5m2"][0],
        Way(encode=True, stochastic=True),
        Quantizer(formats.get("fp8_e5m2"), None, stochastic=True),
    ),
}


@functools.cache
def trained(name: str):
    """(what training keeps of X, the encode scale of its whole)."""
    _, way, q = TRAINED[name]

    def run(x):
        measured = measure(pinned(x), q, ROWS)
        dither = _dither.uniform(KEY, measured.values.shape, 3, 8) if way.stochastic else None
        largest = q.format.element.max * (q.scale_max if q.format.global_scale else 1)
        find = encode_scale if q.format.global_scale else fp8_scale
        whole = find(measured.whole, largest if q.format.global_scale else q.format.element)[0, 0]
        return codes(measured, q, ROWS, None, dither), whole

    return jax.jit(run)(X)


@pytest.mark.parametrize(("name", "family"), checks(TRAINED))
def test_equals_training(name, family):
    """Codes and scales, stochastic rounding's bits from Philox at row 3, column 8 included."""
    spec, way, _ = TRAINED[name]
    want, whole = trained(name)
    random = Random(KEY, jnp.asarray([3, 8], jnp.uint32)) if way.stochastic else None
    scale = whole if needs_scale(spec) else None
    run = kernel_of("quantize", family).run
    got = jax.jit(lambda *a: run(a[0], spec=spec, way=way, scale=a[1], random=a[2], packed=True))(X, scale, random)
    np.testing.assert_array_equal(got.data, want.data)
    if want.scale is not None:
        np.testing.assert_array_equal(got.scale, want.scale)


def test_the_transforms_signs_are_trainings():
    assert SIGNS == RHT_SIGNS
