"""Quantizing holds at most one float parameter beside the model: peak resident memory of a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SIZE, COUNT = 4096, 8
SLACK_MB = 40  # compiling the solver, Python objects; one weight is 64 MB

PROBE = """
import gc, os, resource, sys
import jax, jax.numpy as jnp, numpy as np
import jqopt

size, count, recipe, donate = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
rng = np.random.default_rng(0)
params = {f"w{i}": jnp.asarray(rng.standard_normal((size, size), dtype=np.float32)) for i in range(count)}

def model(p, x):
    for i in range(count):
        x = jnp.tanh(x @ p[f"w{i}"])
    return x

plan = jqopt.plan(recipe, jqopt.trace(model, params, jnp.ones((1, size))))
gc.collect()
before = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
quant = jax.block_until_ready(jqopt.quantize(plan, params, donate=donate))
status = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
packed = sum(leaf.nbytes for leaf in jax.tree.leaves(quant)) / 2**20
print(before, float(status["VmHWM"].split()[0]) / 2**10, packed)
"""


@pytest.mark.memory
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc to reset the peak")
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("recipe", ["int8_weight_only", "nvfp4_weight_only"])
def test_peak_memory(recipe, donate):
    command = [sys.executable, "-c", PROBE, str(SIZE), str(COUNT), recipe, str(donate)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "XLA_FLAGS": ""})
    before, peak, packed = map(float, done.stdout.split())
    one = SIZE * SIZE * 4 / 2**20
    beside = peak - before - (0 if donate else packed)
    assert beside <= one + SLACK_MB, f"{recipe}: {beside:.0f} MB beside model and result; one weight is {one:.0f} MB"
