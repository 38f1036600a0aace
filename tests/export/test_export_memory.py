"""Exporting a checkpoint holds one array of it: peak resident memory of a process of its own."""

import os
import subprocess
import sys

import pytest

SLACK_MB = 80  # of Orbax, JSON and Python
# layers, hidden size, inner size, heads, vocabulary, are layers stacked?; MB of the largest array
STACKED = (24, 1536, 4096, 16, 96, 1), 24 * 1536 * 4096 / 2 / 2**20  # the codes of gate_proj in all layers
LLAMA_7B = (
    (2, 4096, 11008, 32, 32000, 0),
    32000 * 4096 * 2 / 2**20,
)  # the embedding; 30 layers more hold no other shapes

MAKE = """
import json, sys, pathlib
import jax, jax.numpy as jnp, numpy as np
from flax import traverse_util
import jqopt
from jqopt._apply import Quantized
from jqopt._model import QuantizedModel
from jqopt.hf.folder import identity
from tests.export import tiny

root, layers, hidden, inner, heads, vocab, scan = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])
config = tiny.CONFIG | {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner,
    "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 128, "vocab_size": vocab}
(root / "source").mkdir()
(root / "source" / "config.json").write_text(json.dumps(config))
model = identity(root / "source")
module = model.family.build(model.parsed, bool(scan), jnp.bfloat16)
ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
shapes = jax.eval_shape(module.init, jax.random.key(0), ids)
plan = jqopt.plan(tiny.COMPRESSED_TENSORS["NVFP4A16"], jqopt.trace(module, shapes, ids))
flat = traverse_util.flatten_dict(shapes["params"], sep="/")
for path, x in flat.items():
    d = plan.quantized.get(path)
    rng, fused = np.random.default_rng(0), np.random.default_rng(1)
    flat[path] = jnp.zeros(x.shape, jnp.bfloat16) if d is None else tiny._random(d, rng, fused)
tree = {"params": traverse_util.unflatten_dict(flat, sep="/")}
jqopt.save(root / "ckpt", QuantizedModel(module, plan, Quantized(tree, {})))
"""

EXPORT = """
import os, sys
import jqopt
from jqopt.export.checkpoint import Checkpoint
from jqopt.export.parameters import OnDisk

root = sys.argv[1]
params = OnDisk(Checkpoint(f"{root}/ckpt"))  # what Orbax and JAX load once
params.read("norm/scale")
before = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
done = jqopt.export(f"{root}/ckpt", f"{root}/out", source=f"{root}/source")
status = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
print(before, float(status["VmHWM"].split()[0]) / 2**10, done.nbytes / 2**20)
"""


@pytest.mark.memory
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc to reset the peak")
@pytest.mark.parametrize(("sizes", "largest"), [STACKED, LLAMA_7B], ids=["stacked", "7B"])
def test_export_holds_one_array(sizes, largest, tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    path = os.pathsep.join([root, os.path.join(root, "kernels")])
    # freed memory goes back at once: what malloc keeps for later depends on how threads take turns, and isn't held
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    run = lambda code, *more: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code, str(tmp_path), *more], capture_output=True, text=True, check=True, env=environment
    )
    run(MAKE, *map(str, sizes))
    before, peak, whole = map(float, run(EXPORT).stdout.split())
    assert whole > 2.5 * largest, "the model must be larger than what may be held"
    # Orbax holds what it read from the file beside the array itself
    assert peak - before <= 2.5 * largest + SLACK_MB, f"{peak - before:.0f} MB; the largest array is {largest:.0f} MB"
    assert peak < 3000, "what a 7B model may take"
