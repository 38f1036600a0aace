"""Checkpoints on disk: what is saved comes back to the bit, and what is damaged or foreign is refused by name."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

import jqopt
from jqopt.export import checkpoint, manifest, orbax, tree
from jqopt.export.inputs import call_of, inputs_of
from tests import arrays

# When a read fails, Orbax leaves other reads running that end after its event loop is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = pathlib.Path(__file__).resolve().parents[2]
METADATA = checkpoint.METADATA
DOTS = {"match": {"path": "*", "op": "dot_general"}, "weight": "nvfp4"}
RECIPE = {"schema": 1, "name": "weights", "rules": [DOTS]}
STATIC = {"schema": 1, "name": "static", "rules": [{**DOTS, "input": "nvfp4"}]}
X = arrays.normal(0, (4, 32))


class Unrolled(nn.Module):
    names: tuple[str, ...] = ("layer_0", "layer_1")
    width: int = 64

    @nn.compact
    def __call__(self, x, train: bool = False):
        for name in self.names:
            x = x + nn.Dense(32, name=f"{name}_down")(nn.relu(nn.Dense(self.width, name=name)(x)))
        return nn.BatchNorm(use_running_average=not train, name="norm")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(32)(nn.relu(nn.Dense(64)(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


class Stateful(nnx.Module):
    def __init__(self, rngs, width=64):
        self.up = nnx.Linear(32, width, rngs=rngs, dtype=jnp.float32, param_dtype=jnp.bfloat16)
        self.norm = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.down = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.1, deterministic=True, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.up(x))
        for layer in self.down:
            x = layer(x)
        return self.dropout(x)


def plain(params, x):
    for w, b in params["layers"]:
        x = x @ w.astype(x.dtype)
        x = x if b is None else x + b
    return x * params["head"]["scale"].astype(x.dtype) + params["steps"][0][1].astype(x.dtype)


def matrix(seed, n, m, dtype=jnp.float32):
    return arrays.normal(seed, (n, m), dtype)


PARAMS = {
    "layers": [(matrix(1, 32, 64, jnp.bfloat16), None), (matrix(2, 64, 32), jnp.ones(32))],
    "head": {"scale": jnp.full((1, 1), 1.5, jnp.bfloat16)},
    "steps": (np.arange(3, dtype=np.int64), jnp.zeros((0, 4)), []),
}


def quantized(kind, recipe=RECIPE):
    """(model, quantized model) of one kind."""
    if kind == "nnx":
        model, params = Stateful(nnx.Rngs(0)), None
    elif kind == "function":
        model, params = plain, PARAMS
    else:
        model = {"unrolled": Unrolled, "scanned": Scanned}[kind]()
        params = model.init(jax.random.key(1), X)
    return model, jqopt.quantize_model(model, recipe, params=params, batches=[X])


@pytest.fixture(scope="module")
def linen(tmp_path_factory):
    """(model, quantized model, its checkpoint); the checkpoint stays as it is."""
    model, qm = quantized("unrolled")
    folder = tmp_path_factory.mktemp("linen") / "checkpoint"
    jqopt.save(folder, qm)
    return model, qm, folder


@pytest.fixture
def copy(linen, tmp_path):
    """The same checkpoint, to be damaged."""
    return shutil.copytree(linen[2], tmp_path / "copy")


def bits(x):
    raw = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return str(x.dtype), x.shape, np.asarray(raw).tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert list(map(bits, jax.tree.leaves(a))) == list(map(bits, jax.tree.leaves(b)))


def manifest_of(folder):
    return json.loads((folder / METADATA).read_text())["custom_metadata"]


def arrays_of(folder):
    """What Orbax itself loads, with neither jqopt nor a model."""
    here = SingleDeviceSharding(jax.devices()[0])
    shapes = ocp.metadata(str(folder)).metadata
    return ocp.load(str(folder), jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes))


def edit(folder, change, sign=True):
    """Changes the manifest, and signs it again as a writer would."""
    data = json.loads((folder / METADATA).read_text())
    change(data["custom_metadata"])
    if sign:
        data["custom_metadata"]["sha256"] = manifest.signature(data["custom_metadata"])
    (folder / METADATA).write_text(json.dumps(data))


# ---- what is saved comes back


@pytest.mark.parametrize("recipe", [RECIPE, STATIC], ids=lambda recipe: recipe["name"])
@pytest.mark.parametrize("kind", ["unrolled", "scanned", "nnx", "function"])
def test_round_trip(kind, recipe, tmp_path):
    model, qm = quantized(kind, recipe)
    jqopt.save(tmp_path / "c", qm)
    again = jqopt.load(tmp_path / "c", model)
    assert_same(again.params, qm.params)
    assert again.plan == qm.plan
    assert again.inputs == qm.inputs
    np.testing.assert_array_equal(again(X), qm(X))
    jqopt.save(tmp_path / "d", again)
    assert manifest_of(tmp_path / "c") == manifest_of(tmp_path / "d")


def test_nnx_needs_no_weights(tmp_path):
    """The model may be abstract; dropout's keys, batch statistics and bfloat16 come from the checkpoint."""
    _, qm = quantized("nnx")
    jqopt.save(tmp_path / "c", qm)
    again = jqopt.load(tmp_path / "c", nnx.eval_shape(lambda: Stateful(nnx.Rngs(0))))
    assert_same(again.params, qm.params)
    np.testing.assert_array_equal(again(X), qm(X))
    kinds = {t["kind"] for t in manifest_of(tmp_path / "c")["tensors"].values()}
    assert kinds == {"array", "key", "quantized"}


def test_other_collections_are_saved(linen):
    model, qm, folder = linen
    assert_same(jqopt.load(folder, model).variables["batch_stats"], qm.variables["batch_stats"])


def test_plain_containers_come_back(tmp_path):
    model, qm = quantized("function")
    jqopt.save(tmp_path / "c", qm)
    params = jqopt.load(tmp_path / "c", model).params
    layers, (steps, empty, nothing) = params["layers"], params["steps"]
    assert type(layers) is list
    assert type(layers[0]) is tuple
    assert layers[0][1] is None
    assert nothing == []
    assert empty.shape == (0, 4)
    assert type(steps) is np.ndarray
    assert steps.dtype == np.int64, "JAX has no int64 here; numpy's must not be cast"


def test_boxes_and_frozen_dicts_come_back(tmp_path):
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, ("data", "model")))
            return nn.Dense(32, kernel_init=init)(x)

    variables = FrozenDict(Boxed().init(jax.random.key(0), X))
    qm = jqopt.quantize_model(Boxed(), RECIPE, params=variables, batches=[X])
    jqopt.save(tmp_path / "c", qm)
    again = jqopt.load(tmp_path / "c", Boxed())
    assert_same(again.params, qm.params)
    assert type(again.params) is FrozenDict
    assert again.params["params"]["Dense_0"]["kernel"].names == (None, ("data", "model"))
    np.testing.assert_array_equal(again(X), qm(X))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    up: jax.Array
    down: jax.Array


def paired(params, x):
    return x @ params.up @ params.down


def test_other_containers_come_back_with_an_example(tmp_path):
    qm = jqopt.quantize_model(paired, RECIPE, params=Pair(matrix(1, 32, 64), matrix(2, 64, 32)), batches=[X])
    jqopt.save(tmp_path / "c", qm)
    with pytest.raises(jqopt.CheckpointError, match=r"holds a .*Pair.*params=example"):
        jqopt.load(tmp_path / "c", paired)
    shape = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    again = jqopt.load(tmp_path / "c", paired, params=Pair(shape, jax.ShapeDtypeStruct((64, 32), jnp.float32)))
    assert_same(again.params, qm.params)
    with pytest.raises(jqopt.CheckpointError, match=r"params/down.*another model"):
        jqopt.load(tmp_path / "c", paired, params=Pair(shape, shape))


def test_quantized_tensors_are_described_not_guessed(linen):
    tensor = manifest_of(linen[2])["tensors"]["params/layer_0/kernel"]
    assert tensor["parameter"] == "layer_0/kernel"
    packing = tensor["packing"]
    assert packing["layout"] == {"shape": [32, 64], "atoms": [32, 64], "stack": [], "rows": [1], "cols": [0]}
    assert {k: packing[k] for k in ("format", "element", "bits", "scale", "block", "dtype", "granularity")} == {
        "format": "nvfp4", "element": "e2m1", "bits": 4, "scale": "e4m3", "block": 16, "dtype": "float32",
        "granularity": "block",
    }  # fmt: skip


def test_plain_orbax_reads_it(linen):
    """The documented names, as nested dicts of arrays; the hash is of an array's bytes."""
    _, qm, folder = linen
    arrays = arrays_of(folder)
    kernel = qm.params["params"]["layer_0"]["kernel"]
    assert set(arrays) == {"params", "batch_stats"}
    assert set(arrays["params"]["layer_0"]["kernel"]) == {"data", "scale", "global_scale"}
    np.testing.assert_array_equal(arrays["params"]["layer_0"]["kernel"]["data"], kernel.data)
    np.testing.assert_array_equal(arrays["params"]["layer_0"]["bias"], qm.params["params"]["layer_0"]["bias"])
    listed = manifest_of(folder)["leaves"]["params/layer_0/kernel/data"]
    assert listed == {
        "dtype": "uint8",
        "shape": [64, 16],
        "sha256": hashlib.sha256(np.asarray(kernel.data).tobytes()).hexdigest(),
    }


# ---- parts of it


def test_subset_without_a_model(linen):
    _, qm, folder = linen
    part = jqopt.load(folder, only="layer_0/*")
    assert set(part) == {"layer_0/kernel", "layer_0/bias"}
    assert_same(part, {f"layer_0/{k}": v for k, v in qm.params["params"]["layer_0"].items()})
    assert set(jqopt.load(folder, only=["*/mean", "*_down/bias"])) == {
        *("layer_0_down/bias", "layer_1_down/bias"), "batch_stats/norm/mean",
    }  # fmt: skip
    assert len(orbax.load_params(folder)) == len(jax.tree.leaves(qm.params, is_leaf=tree.is_qtensor))
    with pytest.raises(jqopt.CheckpointError, match=r"only='layers_0/\*'.*layer_0/"):
        jqopt.load(folder, only="layers_0/*")
    with pytest.raises(jqopt.UnsupportedError, match="all its parameters"):
        jqopt.load(folder, Unrolled(), only="layer_0/*")


def test_subset_reads_nothing_else(linen, tmp_path):
    """Another leaf's bytes may be wrong: they aren't looked at."""
    folder = rewritten(linen, tmp_path, "params/layer_1/bias", lambda x: x + 1)
    jqopt.load(folder, only="layer_0/*")
    with pytest.raises(jqopt.CheckpointError, match="params/layer_1/bias: the bytes are damaged"):
        jqopt.load(folder, only="layer_1/*")


# ---- shardings


def by_rows(mesh):
    """Rows of packed weights over the mesh, everything else on every device."""

    def place(path, leaf, shape):
        rows = leaf in ("data", "scale") and shape.shape[-2] % 8 == 0
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape.shape) - 2), "d") if rows else PartitionSpec())

    return place


@pytest.mark.parametrize(
    ("kind", "axis_type"), [("scanned", jax.sharding.AxisType.Auto), ("nnx", jax.sharding.AxisType.Explicit)]
)
def test_one_device_to_eight_and_back(kind, axis_type, tmp_path):
    model, qm = quantized(kind)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    jqopt.save(tmp_path / "one", qm)
    eight = jqopt.load(tmp_path / "one", model, shardings=by_rows(mesh))
    assert_same(eight.params, qm.params)
    packed = [x for x in jax.tree.leaves(eight.params, is_leaf=tree.is_qtensor) if tree.is_qtensor(x)]
    assert packed
    for q in packed:
        assert q.data.sharding.shard_shape(q.data.shape)[-2] == q.data.shape[-2] // 8
        assert len(q.data.sharding.device_set) == 8
    if axis_type is jax.sharding.AxisType.Auto:
        np.testing.assert_allclose(eight(X), qm(X), rtol=1e-5, atol=1e-5)
    jqopt.save(tmp_path / "eight", eight)
    one = jqopt.load(tmp_path / "eight", model)
    assert_same(one.params, qm.params)
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(one.params))
    assert manifest_of(tmp_path / "one")["leaves"] == manifest_of(tmp_path / "eight")["leaves"]


def test_shardings_as_a_tree_or_one(linen):
    model, qm, folder = linen
    last = SingleDeviceSharding(jax.devices()[-1])
    one = jqopt.load(folder, model, shardings=last)
    assert {x.sharding for x in jax.tree.leaves(one.params)} == {last}
    wanted = jax.tree.map(lambda x: SingleDeviceSharding(jax.devices()[x.ndim]), qm.params)
    several = jqopt.load(folder, model, shardings=wanted)
    assert [x.sharding for x in jax.tree.leaves(several.params)] == jax.tree.leaves(wanted)
    assert_same(several.params, qm.params)
    del wanted["params"]["layer_0"]
    with pytest.raises(jqopt.UnsupportedError, match=r"params/layer_0/.*no Sharding"):
        jqopt.load(folder, model, shardings=wanted)


def test_sharding_that_does_not_fit(linen):
    model, _, folder = linen
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    cols = NamedSharding(mesh, PartitionSpec(None, "d"))
    with pytest.raises(jqopt.UnsupportedError, match=r"kernel/scale: the sharding .* doesn't fit uint8"):
        jqopt.load(
            folder,
            model,
            shardings=lambda p, leaf, s: cols if leaf == "scale" else NamedSharding(mesh, PartitionSpec()),
        )


# ---- damage


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def assert_refused_or_same(folder, linen):
    model, qm, _ = linen
    try:
        again = jqopt.load(folder, model)
    except jqopt.CheckpointError:
        return True
    assert_same(again.params, qm.params)
    assert again.plan == qm.plan
    return False


def flip(path, at=0.5):
    raw = bytearray(path.read_bytes())
    if raw:
        raw[int(len(raw) * at)] ^= 0x10
    path.write_bytes(raw)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("at", [0.02, 0.3, 0.5, 0.7, 0.98])
def test_flipped_byte_in_the_arrays(copy, linen, at):
    largest = max(files(copy), key=lambda p: p.stat().st_size if p.name != METADATA else 0)
    flip(largest, at)
    assert assert_refused_or_same(copy, linen), f"a flipped byte in {largest} went unnoticed"


@pytest.mark.parametrize("harm", [flip, truncate, pathlib.Path.unlink])
def test_no_harm_to_any_file_changes_a_value(harm, linen, tmp_path):
    """Some files matter to nobody (a marker, the old shardings); of the others each is missed."""
    refused = set()
    for number, path in enumerate(files(linen[2])):
        folder = shutil.copytree(linen[2], tmp_path / str(number))
        harm(folder / path.relative_to(linen[2]))
        if assert_refused_or_same(folder, linen):
            refused.add(path.relative_to(linen[2]).parts[0])
        shutil.rmtree(folder)
    assert refused >= {METADATA, "state"}


def rewritten(linen, tmp_path, name, change):
    """A sound Orbax checkpoint with the same manifest in which one array is another."""
    folder = tmp_path / "rewritten"
    arrays = jax.tree.map(np.asarray, arrays_of(linen[2]))
    *parts, last = name.split("/")
    node = arrays
    for part in parts:
        node = node[part]
    node[last] = change(node[last])
    if node[last] is None:
        del node[last]
    ocp.save(str(folder), jax.tree.map(jnp.asarray, arrays), custom_metadata=manifest_of(linen[2]))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: np.bitwise_xor(x, np.arange(x.size).reshape(x.shape) == 7), "the bytes are damaged"),
        (lambda x: x.astype(np.int8), r"found int8\[64, 16\], but the manifest says uint8\[64, 16\]"),
        (lambda x: x.astype(np.float32), "found float32.*says uint8"),
        (lambda x: x[:-1], r"found uint8\[63, 16\]"),
        (lambda x: None, "listed in the manifest but not stored"),
    ],
    ids=["bit", "dtype", "cast", "shape", "gone"],
)
def test_another_array(change, message, linen, tmp_path):
    """Orbax itself would load each of these without a word."""
    folder = rewritten(linen, tmp_path, "params/layer_0/kernel/data", change)
    with pytest.raises(jqopt.CheckpointError, match=f"params/layer_0/kernel/data: .*{message}"):
        jqopt.load(folder, linen[0])


def test_verify_can_be_left_out(linen, tmp_path):
    folder = rewritten(linen, tmp_path, "params/layer_0/bias", lambda x: x + 1)
    again = jqopt.load(folder, linen[0], verify=False)
    np.testing.assert_array_equal(again.params["params"]["layer_0"]["bias"], np.ones(64))


DATA = "params/layer_0/kernel/data"


def packing(data):
    return data["tensors"]["params/layer_0/kernel"]["packing"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["leaves"][DATA].update(sha256="0" * 64), f"{DATA}: the bytes are damaged"),
        (lambda m: m["leaves"][DATA].update(dtype="int8"), f"{DATA}: found uint8.*says int8"),
        (lambda m: m["leaves"][DATA].update(dtype="float7"), f"{DATA}: found uint8.*says float7"),
        (lambda m: m["leaves"][DATA].update(shape=[64, 15]), rf"{DATA}: found uint8\[64, 16\].*\[64, 15\]"),
        (lambda m: m["leaves"].pop(DATA), f"{DATA}: the manifest's lists"),
        (lambda m: m["leaves"].update(x=m["leaves"][DATA]), "x: the manifest's lists"),
        (lambda m: m["leaves"][DATA].update(sha256=3), "leaves.params/layer_0/kernel/data.sha256: .*string"),
        (lambda m: m.update(more=1), "more: .*found 1"),
        (lambda m: m.update(schema=3), "has schema 3.*reads is 2. Upgrade"),
        (lambda m: m.update(schema="1"), "no jqopt manifest"),
        (lambda m: packing(m).update(codes=2), "params/layer_0/kernel: packing version 2 is newer"),
        (lambda m: packing(m).update(format="nvfp5"), "params/layer_0/kernel: .*unknown format 'nvfp5'"),
        (lambda m: packing(m).update(element="e3m0"), "params/layer_0/kernel: .*element 'e3m0'.*'e2m1'"),
        (lambda m: packing(m).update(block=None), "params/layer_0/kernel: .*needs a block"),
        (lambda m: packing(m).update(dtype="float7"), "params/layer_0/kernel: .*float7"),
        (lambda m: packing(m)["layout"].update(rows=[0]), "params/layer_0/kernel: .*layout"),
        (lambda m: packing(m).update(leaves=["data", "scale"]), "global_scale: the manifest's lists"),
        (lambda m: packing(m).update(format="mxfp4", scale="e8m0", global_scale=False, block=32),
         "layer_0/kernel: found mxfp4, but the plan quantizes it to nvfp4"),
        (lambda m: m["plan"].update(version=99), "can't read the plan: .*version 99"),
        (lambda m: m["plan"].pop("decisions"), "can't read the plan: .*decisions"),
        (lambda m: m["tensors"]["params/layer_0/bias"].update(kind="key"), "params/layer_0/bias is said to be"),
        (lambda m: m.update(tree={"kind": "leaf", "name": "nowhere"}), "the manifest's tree and its list"),
        (lambda m: m["tree"]["items"].pop(), "tree: .*keys"),
        (lambda m: m.update(tree={"kind": "box", "name": "os.system"}), "tree: .*os.system"),
    ],
)  # fmt: skip
def test_manifest_that_lies(change, message, copy, linen):
    edit(copy, change)
    with pytest.raises(jqopt.CheckpointError, match=message):
        jqopt.load(copy, linen[0])


def test_manifest_changed_by_hand(copy, linen):
    edit(copy, lambda m: m["plan"].update(opaque=["nothing"]), sign=False)
    with pytest.raises(jqopt.CheckpointError, match=f"{METADATA}: the manifest is damaged"):
        jqopt.load(copy, linen[0])


def test_what_is_no_checkpoint(tmp_path, linen):
    with pytest.raises(jqopt.CheckpointError, match="is no checkpoint: it has no file"):
        jqopt.load(tmp_path / "nowhere", linen[0])
    ocp.save(str(tmp_path / "theirs"), {"a": jnp.ones(3)})
    with pytest.raises(jqopt.CheckpointError, match="holds no jqopt manifest"):
        jqopt.load(tmp_path / "theirs", linen[0])
    with pytest.raises(jqopt.UnsupportedError, match="local folders"):
        jqopt.load("gs://bucket/checkpoint", linen[0])


def test_wide_dtypes_are_not_cast(tmp_path):
    """An int64 that JAX saved with jax_enable_x64, read without it."""
    model, qm = quantized("function")
    jqopt.save(tmp_path / "c", qm)
    edit(tmp_path / "c", lambda m: m["leaves"]["params/steps/0"].pop("host"))
    with pytest.raises(jqopt.CheckpointError, match=r"params/steps/0: it is int64.*jax_enable_x64"):
        jqopt.load(tmp_path / "c", model)


# ---- another model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Unrolled(names=("layer_0", "renamed")), "lacks: renamed/bias.*model lacks: layer_1/bias"),
        (Unrolled(names=("layer_0",)), "model lacks: layer_1/bias"),
        (Unrolled(names=("layer_0", "layer_1", "layer_2")), "checkpoint lacks: layer_2/bias"),
        (Unrolled(width=48), r"layer_0/bias: .*another model.*\(64,\).*\(48,\)"),
        (Stateful(nnx.Rngs(0)), r"holds a Flax Linen module \(Unrolled\).*Flax NNX module \(Stateful\)"),
        (plain, r"holds a Flax Linen module \(Unrolled\).*a function"),
    ],
    ids=["renamed", "fewer", "more", "width", "nnx", "function"],
)
def test_another_model(model, message, linen):
    with pytest.raises(jqopt.CheckpointError, match=message):
        jqopt.load(linen[2], model)


def test_another_nnx_model(tmp_path):
    _, qm = quantized("nnx")
    jqopt.save(tmp_path / "c", qm)
    with pytest.raises(jqopt.CheckpointError, match=r"another model.*\(64,\).*48"):
        jqopt.load(tmp_path / "c", Stateful(nnx.Rngs(0), width=48))
    other = Stateful(nnx.Rngs(0))
    other.extra = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(jqopt.CheckpointError, match="checkpoint lacks: params/extra/bias"):
        jqopt.load(tmp_path / "c", other)


def test_another_function(tmp_path):
    _, qm = quantized("function")
    jqopt.save(tmp_path / "c", qm)
    with pytest.raises(jqopt.CheckpointError, match=r"another model.*first can't be traced.*weight"):
        jqopt.load(tmp_path / "c", lambda_named("first", lambda params, x: x @ params["weight"]))
    with pytest.raises(jqopt.CheckpointError, match=r"model lacks: layers/1/0 \(dot_general\)"):
        jqopt.load(tmp_path / "c", lambda params, x: x @ params["layers"][0][0].astype(x.dtype))


def lambda_named(name, fn):
    fn.__name__ = name
    return fn


def test_models_that_init_cannot_make(tmp_path):
    """Parameters that a method doesn't use are no difference; the sites are compared instead."""

    class Two(nn.Module):
        def setup(self):
            self.first, self.second = nn.Dense(32), nn.Dense(16)

        def __call__(self, x):
            return self.second(self.first(x))

        def encode(self, x):
            return self.first(x)

    variables = Two().init(jax.random.key(0), X)
    qm = jqopt.quantize_model(Two(), RECIPE, params=variables, batches=[X], method="encode")
    jqopt.save(tmp_path / "c", qm)
    again = jqopt.load(tmp_path / "c", Two())
    assert_same(again.params, qm.params)
    np.testing.assert_array_equal(again(X, method="encode"), qm(X, method="encode"))


def test_inputs_may_be_given(linen, copy):
    edit(copy, lambda m: m.pop("inputs"))
    other = Unrolled(width=48)
    jqopt.load(copy, other)  # nothing to trace with: the model's first call will tell
    with pytest.raises(jqopt.CheckpointError, match=r"layer_0/bias: .*another model"):
        jqopt.load(copy, other, inputs=X)
    assert jqopt.load(copy, linen[0], inputs=X).inputs == linen[1].inputs


def test_inputs_are_remembered_as_shapes():
    key = jax.random.key(0)
    call = ((X, {"mask": None, "more": [jnp.ones(3, jnp.bfloat16)]}), {"rngs": {"dropout": key}, "train": True})
    found = inputs_of(call)
    assert found is not None
    (x, tables), keywords = call_of(type(found).model_validate(found.model_dump()))
    assert (x.shape, x.dtype) == (X.shape, X.dtype)
    assert tables["mask"] is None
    assert tables["more"][0].dtype == jnp.bfloat16
    assert keywords["rngs"]["dropout"].dtype == key.dtype
    assert keywords["train"] is True
    assert inputs_of(((X,), {"method": plain})) is None, "a function is no data"


# ---- writing


def test_refuses_to_overwrite(linen, tmp_path):
    model, qm, _ = linen
    folder = tmp_path / "deep" / "c"
    jqopt.save(folder, qm)
    with pytest.raises(jqopt.CheckpointError, match="holds a checkpoint already; write overwrite=True"):
        jqopt.save(folder, qm)
    other = jqopt.quantize_model(model, {**RECIPE, "name": "other"}, params=float_of(model), batches=[X])
    jqopt.save(folder, other, overwrite=True)
    assert jqopt.load(folder, model).plan.recipe.name == "other"
    assert os.listdir(folder.parent) == ["c"]


def float_of(model):
    return model.init(jax.random.key(1), X)


def test_other_folders_stay(linen, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(jqopt.CheckpointError, match="no checkpoint: it stays"):
            jqopt.save(tmp_path, linen[1], overwrite=overwrite)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    jqopt.save(tmp_path / "empty", linen[1])
    jqopt.load(tmp_path / "empty", linen[0])


class Stop(Exception):
    """Power off."""


@pytest.mark.parametrize("step", ["save", "rename"])
def test_interrupted_saves_change_nothing(step, linen, tmp_path, monkeypatch):
    model, qm, _ = linen
    jqopt.save(tmp_path / "old", qm)

    if step == "save":
        real = ocp.save

        def save(path, *args, **kwargs):
            real(f"{path}.orbax-checkpoint-tmp", *args, **kwargs)
            raise Stop

        monkeypatch.setattr(orbax.ocp, "save", save)
    else:
        rename = pathlib.Path.rename

        def stop(path, target):
            if ".jqopt-new-" in path.name:
                raise Stop
            return rename(path, target)

        monkeypatch.setattr(pathlib.Path, "rename", stop)
    for name in ("old", "new"):
        with pytest.raises(Stop):
            jqopt.save(tmp_path / name, qm, overwrite=True)
    assert os.listdir(tmp_path) == ["old"]
    assert_same(jqopt.load(tmp_path / "old", model).params, qm.params)


WRITER = """
import hashlib, os, pathlib, signal, sys
import jax, jax.numpy as jnp, numpy as np
import jqopt

normal = lambda seed, shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
x, params = normal(0, (4, 32)), {"w": normal(1, (32, 32)), "b": jnp.zeros(32)}
recipe = {"schema": 1, "name": "r", "rules": [{"match": "w", "weight": "fp8", "input": "fp8"}]}
qm = jqopt.quantize_model(lambda p, x: x @ p["w"] + p["b"], recipe, params=params, batches=[x])
jqopt.save(sys.argv[1], qm)
print(hashlib.sha256(np.asarray(qm(x)).tobytes()).hexdigest(), flush=True)
pathlib.Path.rename = lambda path, target: os.kill(os.getpid(), signal.SIGKILL)
jqopt.save(sys.argv[1], qm, overwrite=True)
"""


def test_another_process_reads_what_a_killed_one_saved(tmp_path):
    """The writer calibrates, saves, and is killed while it overwrites; this process has neither data nor weights."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path / "c")],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    qm = jqopt.load(tmp_path / "c", lambda p, x: x @ p["w"] + p["b"])
    assert qm.params["w"].input_scale is not None
    assert hashlib.sha256(np.asarray(qm(X)).tobytes()).hexdigest() == done.stdout.strip()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w.a": X, "w": {"a": X}}, r"extra/w\.a and extra/w/a .* 'extra\.w\.a'"),
        ({"w/a": X, "w": {"a": X}}, r"would both be called 'extra/w/a'"),
        ({"w": jnp.ones(4, jnp.uint4)}, "w: Orbax can't store uint4"),
        ({"w": 1.5}, "w: expected an array, found float 1.5"),
        ({"w": nn.Partitioned(X, names=("a",), mesh=jax.make_mesh((8,), ("a",)))}, "w: .*holds a mesh"),
        ({"w": nn.LogicallyPartitioned(X, names=("a",), rules=(("a", None),))}, "w: .*rules"),
    ],
)
def test_what_cannot_be_stored(params, message, linen, tmp_path):
    """Orbax would save the first and load one array for both."""
    _, qm, _ = linen
    odd = dataclasses.replace(qm, quant=jqopt._apply.Quantized({**qm.params, "extra": params}))
    with pytest.raises(jqopt.UnsupportedError, match=message):
        jqopt.save(tmp_path / "c", odd)
    assert not (tmp_path / "c").exists()


def shapes_of(format):
    """A packed tensor of this format, with shapes for arrays."""
    return jax.eval_shape(lambda x: jqopt.QTensor.quantize(x, format), matrix(0, 8, 32))


def test_unknown_formats_are_not_written():
    format = dataclasses.replace(jqopt.formats.get("int8"), name="mine")
    with pytest.raises(jqopt.UnsupportedError, match="w: format 'mine' isn't one"):
        manifest.tensor_of("w", shapes_of(format), "w")


@pytest.mark.parametrize("name", jqopt.formats.names())
def test_every_format_is_described_whole(name):
    q = shapes_of(name)
    entry = manifest.tensor_of("w", q, "w")
    arrays = manifest.arrays_of("w", q)
    read = manifest.Tensor.model_validate(json.loads(json.dumps(entry.model_dump())))
    again = manifest.tensor_from("w", read, arrays)
    assert jax.tree.structure(again) == jax.tree.structure(q)
    assert jax.tree.leaves(again) == jax.tree.leaves(q)


def test_the_callers_orbax_settings_do_not_matter(linen, tmp_path):
    """A context that casts what it saves, pads what it loads, and lets 1 byte through at a time."""
    model, qm, _ = linen
    theirs = ocp.Context()
    theirs.array.saving.storage_options.dtype = jnp.bfloat16
    theirs.array.loading.enable_padding_and_truncation = True
    theirs.memory.write_concurrent_bytes = theirs.memory.read_concurrent_bytes = 1
    with theirs:
        jqopt.save(tmp_path / "c", qm)
        again = jqopt.load(tmp_path / "c", model)
    assert_same(again.params, qm.params)


def test_leaves_larger_than_what_may_be_in_flight(linen, tmp_path, monkeypatch):
    model, qm, _ = linen
    monkeypatch.setattr(checkpoint, "IN_FLIGHT", 100)
    jqopt.save(tmp_path / "c", qm)
    assert_same(jqopt.load(tmp_path / "c", model).params, qm.params)


def test_hashes_do_not_depend_on_shardings():
    x = jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    for spec in (PartitionSpec("a", "b"), PartitionSpec(None, "a"), PartitionSpec()):
        assert manifest.digest(jax.device_put(x, NamedSharding(mesh, spec))) == manifest.digest(np.asarray(x))
