"""TransformerEngine's arrays, key by key: equal bit for bit under jit, or listed in docs/numerics.md.

Eagerly too for the inputs where rounding is hardest: odd shapes, and values at the boundaries between codes."""

import functools
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jqopt._numerics import encode
from jqopt.formats import E2M1, E4M3, E5M2
from jqopt.train import quantizers

ROOT = Path(__file__).parent
GOLDEN = np.load(ROOT / "golden" / "te_golden.npz")
KEYS = [key for key in GOLDEN.files if key.split("/")[0] in ("q", "fp8", "e2m1", "swizzle", "rht")]
KEYS = [key for key in KEYS if not key.startswith("fp8/in/")]
UNSIGNED = (1,) * 16


def array(key):
    """A golden array; what is stored as uint16 bits becomes bfloat16."""
    x = GOLDEN[key]
    return jnp.asarray(x.view(ml_dtypes.bfloat16) if x.dtype == np.uint16 else x)


def hadamard_matrix():
    """The matrix itself, row by row, from the transform of the unit vectors."""
    return quantizers.hadamard16(jnp.eye(16))


def nvfp4_options(variant):
    """What a variant's name in the golden file says, as arguments."""
    found = re.fullmatch(r"4over6_(MAE|MSE)_(448|256)_(1d|2d)", variant)
    if found:
        measure, largest, tile = found.groups()
        return {"four_over_six": measure.lower(), "e4m3_max": float(largest), "tile": tile_of(tile)}
    return {"row_scaled": True} if variant == "row_scaled" else {"tile": tile_of(variant[:2])}


def tile_of(name):
    return {"1d": (1, 16), "2d": (16, 16)}[name]


@functools.cache
def quantizer(variant, column):
    """x -> the quantized matrix of a golden variant; `column`: of the transpose, transformed if the variant is."""
    if variant.startswith(("current", "block", "mxfp8")):
        return functools.partial(fp8, variant, column)
    signs = {"1d_rht": quantizers.RHT_SIGNS, "1d_rht_nosign": UNSIGNED}.get(variant)

    def run(x):
        x = x.T if column and x.ndim == 2 else x
        x = quantizers.hadamard16(x, signs) if column and signs else x
        return quantizers.nvfp4(x, **nvfp4_options(variant))

    return run


def fp8(variant, column, x):
    x = x.T if column else x
    if variant == "mxfp8":
        return quantizers.mxfp8(x)
    kind, scales = variant.rsplit("_", 1)
    if kind.startswith("current"):
        element = {"current_e4m3": E4M3, "current_e5m2": E5M2}[kind]
        return quantizers.fp8_current(x, element, power_of_two=scales == "p2")
    tile = {"block1x128": (1, 128), "block128x128": (128, 128)}[kind]
    return quantizers.fp8_block(x, tile, power_of_two=scales == "p2")


@functools.cache
def quantized(family, name, variant, column, mode):
    run = quantizer(variant, column)
    x = array(f"in/{name}" if family == "q" else f"fp8/in/{name}")
    return jax.tree.map(np.asarray, (jax.jit(run) if mode == "jit" else run)(x))


def ours(key, mode):
    family, *rest = key.split("/")
    primitive = {
        "e2m1/x": lambda: array("e2m1/x"),
        "e2m1/rne_code": lambda: call(lambda x: encode(x, E2M1), mode)(array("e2m1/x")),
        "swizzle/linear": lambda: call(lambda s: quantizers.unswizzle(s, 256, 12), mode)(
            jnp.asarray(GOLDEN["swizzle/swizzled"])
        ),
        "swizzle/swizzled": lambda: call(quantizers.swizzle, mode)(jnp.asarray(GOLDEN["swizzle/linear"])),
        "rht/matrix_bf16": lambda: bf16_bits(call(hadamard_matrix, mode)()),
        "rht/randn_t": lambda: bf16_bits(call(quantizers.hadamard16, mode)(array("in/randn").T)),
    }
    if key in primitive:
        return np.asarray(primitive[key]())
    name, variant, leaf = rest
    column = leaf.endswith(("_t", "_col"))
    q = quantized(family, name, variant, column, mode)
    leaf = {"scale_inv": "scale", "scale_e8m0": "scale", "amax_row": "amax", "amax": "amax"}.get(
        leaf.removesuffix("_t").removesuffix("_col"), leaf.removesuffix("_t")
    )
    found = getattr(q, leaf)
    return gemm_layout(found, variant) if leaf == "scale" and variant.startswith("block") else found


def gemm_layout(scale, variant):
    """As cuBLAS reads them: transposed for 1x128, padded to four columns for 128x128."""
    return scale.T if variant.startswith("block1x128") else np.pad(scale, ((0, 0), (0, -scale.shape[1] % 4)))


def call(function, mode):
    return jax.jit(function) if mode == "jit" else function


def bf16_bits(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16).view(np.uint16)


def same_bits(a, b):
    a = a.reshape(b.shape) if b.size == 1 else a
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def listed(heading):
    """{key: reason} of a table in docs/numerics.md; `a/{b,c}/d` stands for `a/b/d` and `a/c/d`."""
    text = (ROOT.parent / "docs" / "numerics.md").read_text()
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    found = {}
    for reason, keys in re.findall(r"^\| ([^|]+?) \| (`[^|]+) \|", section, re.M):
        for pattern in re.findall(r"`([^`]+)`", keys):
            parts = [p.split(",") for p in re.split(r"[{}]", pattern)]
            found.update({"".join(choice): reason for choice in itertools.product(*parts)})
    return found


EAGERLY = [k for k in KEYS if k.split("/")[0] not in ("q", "fp8") or k.split("/")[1] in ("odd", "boundary")]


@pytest.mark.parametrize(
    ("key", "mode"), [*itertools.product(KEYS, ["jit"]), *itertools.product(EAGERLY, ["eager"])], ids=str
)
def test_equal_or_listed(key, mode):
    reason = listed("Where TransformerEngine differs").get(key)
    a, b = ours(key, mode), GOLDEN[key]
    assert same_bits(a, b) == (reason is None)


def test_every_listed_key_exists():
    """And belongs to a tensor whose amax is below 2^-100: nothing of ordinary size is listed."""
    names = {key.split("/")[1] for key in listed("Where TransformerEngine differs")}
    assert set(listed("Where TransformerEngine differs")) <= set(KEYS)
    assert all(np.abs(np.asarray(array(f"in/{name}"))).max() < 2.0**-100 for name in names)


@pytest.mark.parametrize("variant", ["1d", "2d"])
@pytest.mark.parametrize("name", ["tiny_amax", "denorm"])
def test_the_listed_ones_are_close(name, variant):
    """TransformerEngine's own codes dequantized, and jqopt's: both within a step of the input, or flushed to zero."""
    x = np.asarray(array(f"in/{name}")).astype(np.float64)
    q = quantized("q", name, variant, False, "jit")
    values = np.asarray(quantizers.nvfp4_values(q)).astype(np.float64) * q.global_scale.astype(np.float64)
    if name == "denorm":  # every number is subnormal and counts as zero
        assert not values.any()
    else:
        np.testing.assert_allclose(values, x, atol=np.abs(x).max() / 5)
