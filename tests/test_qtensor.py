"""QTensor as a pytree and as a stand-in for an array; Layout as a bijection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jqopt import formats
from jqopt._numerics import qdq_matrix, quantize_matrix
from jqopt._qtensor import Layout, QTensor
from jqopt.errors import JqoptError, UnsupportedError

ALL = formats.names()


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


quantize = jax.jit(QTensor.quantize, static_argnums=1, static_argnames=("axis", "stack", "granularity", "layout"))
qdq = jax.jit(qdq_matrix, static_argnums=1)


# Layout ---------------------------------------------------------------------------------------------------------------


def test_layout_of_a_dense_kernel():
    """Flax: kernel [in, out], contracted axis 0; the GEMM wants [n=out, k=in]."""
    layout = Layout.of((6, 4), axis=0)
    x = normal(6, 4)
    assert (layout.n, layout.k) == (4, 6)
    np.testing.assert_array_equal(layout.to_matrix(x), x.T)


def test_layout_of_attention_projections():
    """query [d, heads, dim] contracts d; out [heads, dim, d] contracts heads and dim, in that order."""
    x = normal(5, 2, 3)
    np.testing.assert_array_equal(Layout.of((5, 2, 3), axis=0).to_matrix(x), x.reshape(5, 6).T)
    x = normal(2, 3, 5)
    np.testing.assert_array_equal(Layout.of((2, 3, 5), axis=(0, 1)).to_matrix(x), x.reshape(6, 5).T)


def test_layout_with_a_split_axis():
    """A fused axis of 2*3 of which only the 3 is contracted: atoms refine the shape."""
    layout = Layout((6, 4), (2, 3, 4), stack=(0,), rows=(2,), cols=(1,))
    x = normal(6, 4)
    np.testing.assert_array_equal(layout.to_matrix(x), x.reshape(2, 3, 4).transpose(0, 2, 1))
    np.testing.assert_array_equal(layout.from_matrix(layout.to_matrix(x)), x)


@given(st.data())
def test_layout_is_a_bijection(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    atoms, groups = [], []
    for size in shape:
        parts = data.draw(st.sampled_from([(size,), *((a, size // a) for a in range(2, size) if size % a == 0)]))
        groups.append(parts)
        atoms.extend(parts)
    order = data.draw(st.permutations(range(len(atoms))))
    a = data.draw(st.integers(0, len(atoms)))
    b = data.draw(st.integers(a, len(atoms)))
    layout = Layout(shape, tuple(atoms), tuple(order[:a]), tuple(order[a:b]), tuple(order[b:]))
    x = np.arange(np.prod(shape)).reshape(shape)
    matrix = layout.to_matrix(x)
    assert matrix.shape == (*(atoms[i] for i in order[:a]), layout.n, layout.k)
    np.testing.assert_array_equal(layout.from_matrix(matrix), x)
    # Axes in front (vmap), and stack axes gone from the front (scan): the same for each slice.
    np.testing.assert_array_equal(layout.from_matrix(matrix[None, None]), x[None, None])
    np.testing.assert_array_equal(layout.to_matrix(x[None, None]), matrix[None, None])
    for count in range(1, a + 1):
        sliced = layout.sliced(count)
        part = matrix[(0,) * count]
        assert layout.from_matrix(part).shape == sliced.shape
        np.testing.assert_array_equal(sliced.to_matrix(layout.from_matrix(part)), part)


@pytest.mark.parametrize("axis", [2, -3, (0, 0), (0, -2)])
def test_layout_refuses_wrong_axes(axis):
    with pytest.raises(UnsupportedError, match="must name different axes"):
        Layout.of((3, 4), axis=axis)


def test_layout_refuses_what_does_not_fit():
    with pytest.raises(UnsupportedError, match="must name each of the atoms"):
        Layout((6,), (2, 3), (), (0,), (0,))
    with pytest.raises(UnsupportedError, match="in order"):
        Layout((4, 6), (6, 4), (), (0,), (1,))
    with pytest.raises(UnsupportedError, match="does not have the layout's shape"):
        Layout.of((3, 4)).to_matrix(normal(4, 3))


# QTensor --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_leaves_have_the_documented_layout(name):
    fmt, x = formats.get(name), normal(6, 70)
    q = quantize(x, name)
    codes = jax.jit(quantize_matrix, static_argnums=1)(x, fmt)
    for leaf, expected in zip((q.data, q.scale, q.global_scale, q.zero_point), codes, strict=True):
        assert (leaf is None) == (expected is None)
        if leaf is not None:
            assert leaf.dtype in (jnp.uint8, jnp.int8, jnp.float32)
            np.testing.assert_array_equal(leaf, expected)
    assert q.data.shape == (6, -(-70 * fmt.element.bits // 8))
    assert q.shape == x.shape
    assert q.dtype == "float32"
    assert q.ndim == 2
    assert q.size == x.size
    np.testing.assert_array_equal(q.dequantize(), qdq(x, fmt))
    np.testing.assert_array_equal(q.matrix(), qdq(x, fmt))


def test_sizes_are_those_of_the_leaves():
    q = QTensor.quantize(normal(128, 256), "nvfp4")
    assert q.nbytes == 128 * 128 + 128 * 16 + 4
    assert q.bits_per_value == pytest.approx(4.5 + 32 / (128 * 256))
    assert repr(q) == "QTensor(nvfp4, float32[128x256], block, 18436 bytes)"


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), (2, 0)])
def test_axis(axis):
    x = normal(4, 6, 32)
    q = quantize(x, "int8", axis=axis)
    layout = Layout.of(x.shape, axis)
    expected = layout.from_matrix(qdq(layout.to_matrix(x), formats.get("int8")))
    assert q.shape == x.shape
    np.testing.assert_array_equal(q.dequantize(), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_the_parameters(dtype):
    x = normal(4, 64).astype(dtype)
    q = quantize(x, "nvfp4")
    assert q.dtype == dtype
    assert q.dequantize().dtype == dtype
    same = quantize(x.astype(jnp.float32), "nvfp4")
    jax.tree.map(np.testing.assert_array_equal, q.matrix(), same.matrix())  # arithmetic is float32 in both


def test_stack_axes_are_independent():
    x = normal(3, 8, 32) * jnp.array([1.0, 10.0, 0.01])[:, None, None]
    q = quantize(x, "nvfp4", stack=(0,))
    assert q.data.shape == (3, 8, 16)
    assert q.global_scale.shape == (3,)
    for i in range(3):
        alone = quantize(x[i], "nvfp4")
        np.testing.assert_array_equal(q.dequantize()[i], alone.dequantize())


def test_scan_slices_it():
    x = normal(3, 32, 8)
    q = quantize(x, "nvfp4", axis=1, stack=(0,))

    def body(carry, layer):
        assert layer.shape == (32, 8)
        assert layer.layout == q.layout
        return carry + 1, layer.dequantize()

    _, y = lax.scan(body, 0, q)
    np.testing.assert_array_equal(y, q.dequantize())


def test_nested_scans_slice_it():
    x = normal(2, 3, 32, 8)
    q = quantize(x, "int8", axis=2, stack=(0, 1))
    outer = jax.tree.map(lambda leaf: leaf[1], q)
    inner = jax.tree.map(lambda leaf: leaf[2], outer)
    assert (outer.shape, inner.shape) == ((3, 32, 8), (32, 8))
    np.testing.assert_array_equal(inner.dequantize(), q.dequantize()[1, 2])


def test_vmap_stacks_it():
    x = normal(3, 8, 32)
    q = jax.vmap(lambda m: QTensor.quantize(m, "nvfp4"))(x)
    assert q.shape == (3, 8, 32)
    np.testing.assert_array_equal(q.dequantize(), QTensor.quantize(x, "nvfp4", stack=(0,)).dequantize())
    np.testing.assert_array_equal(jax.vmap(QTensor.dequantize)(q), q.dequantize())


def test_it_passes_through_jit_and_tree_functions():
    q = QTensor.quantize(normal(8, 32), "int4")
    again = jax.jit(lambda q: q)(q)
    assert (again.format, again.granularity, again.layout, again.dtype) == (q.format, "block", q.layout, "float32")
    leaves, tree = jax.tree.flatten(q)
    assert len(leaves) == 2  # None is no leaf
    np.testing.assert_array_equal(jax.tree.unflatten(tree, leaves).dequantize(), q.dequantize())
    assert "layout" in repr(jax.tree.unflatten(tree, [object(), object()]))
    shapes = jax.eval_shape(lambda x: QTensor.quantize(x, "int4"), jax.ShapeDtypeStruct((8, 32), jnp.float32))
    assert (shapes.shape, shapes.nbytes) == (q.shape, q.nbytes)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == [".data", ".scale"]


def test_pre_scale_belongs_to_the_parameter():
    """x * pre_scale meets the codes, so the parameter that the codes stand for has pre_scale in its rows."""
    x, s = normal(8, 32), jnp.linspace(0.5, 2, 32)
    q = quantize(x / s, "int8").replace(pre_scale=s)
    np.testing.assert_allclose(q.dequantize(), x, atol=0.05)
    np.testing.assert_array_equal(q.matrix() * s, q.dequantize())


def test_granularity_and_amax():
    x = normal(8, 32)
    assert quantize(x, "int8", granularity="tensor").scale.shape == (1, 1)
    assert quantize(x, "fp8", granularity="channel").scale.shape == (8, 1)
    shared = quantize(x, "nvfp4", tensor_amax=jnp.float32(8.0))
    assert float(shared.global_scale) == pytest.approx(8 / 2688)


def test_a_layout_instead_of_axes():
    layout = Layout((6, 4), (2, 3, 4), stack=(0,), rows=(2,), cols=(1,))
    x = normal(6, 4)
    np.testing.assert_allclose(quantize(x, "int8", layout=layout).dequantize(), x, atol=0.02)


@pytest.mark.parametrize(("bad", "found"), [(jnp.nan, "1 NaN"), (jnp.inf, "1 inf"), (-jnp.inf, "1 inf")])
def test_it_refuses_what_is_not_finite(bad, found):
    x = normal(4, 32).at[1, 2].set(bad)
    with pytest.raises(UnsupportedError, match=f"holds {found} among 128 values") as error:
        QTensor.quantize(x, "nvfp4")
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, JqoptError)
    jax.jit(lambda x: QTensor.quantize(x, "nvfp4"))(x)  # values are not known under a trace


@pytest.mark.parametrize("x", [jnp.arange(8), jnp.ones((2, 4), jnp.int8), jnp.ones((2, 4), bool)])
def test_it_refuses_what_is_not_floating_point(x):
    with pytest.raises(UnsupportedError, match="expected floating point"):
        QTensor.quantize(x, "int8")
    with pytest.raises(UnsupportedError, match="scalar"):
        QTensor.quantize(jnp.float32(1), "int8")


@pytest.mark.parametrize("spec", [("x", None), (None, "x"), ("x", "y")])
@pytest.mark.parametrize("name", ["nvfp4", "int8", "fp8_block", "mxfp6"])
def test_quantizing_a_sharded_array_gives_the_same_bits(name, spec):
    x = normal(256, 512)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    quantize = jax.jit(lambda x: QTensor.quantize(x, name))
    jax.tree.map(np.testing.assert_array_equal, quantize(sharded), quantize(x))
