"""StableHLO exports in IREE, a compiler and runtime that isn't JAX, on a CPU (`make clients`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt
from tests.export import tiny

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

CPU = {
    "input_type": "stablehlo",
    "target_backends": ["llvm-cpu"],
    "extra_args": ["--iree-llvmcpu-target-cpu=host"],
}


@pytest.mark.parametrize("recipe", ["nvfp4_weight_only", "int8_weight_only"])
def test_iree_computes_our_logits(recipe, tmp_path):
    import iree.compiler as compiler
    import iree.runtime as runtime

    qm = tiny.quantized(tiny.make(tmp_path / "source", hidden_size=64, intermediate_size=128), recipe)
    inputs = jax.ShapeDtypeStruct(tiny.IDS.shape, jnp.int32)
    jqopt.export(qm, tmp_path / "out", "stablehlo", inputs=inputs, batch=2, length=12)
    artifact = jqopt.artifacts.load(tmp_path / "out")
    binary = compiler.compile_file(str(tmp_path / "out" / "cpu.stablehlo"), **CPU)
    module = runtime.load_vm_flatbuffer(binary, driver="local-sync")
    got = module.main(*map(np.asarray, artifact.weights), tiny.IDS).to_host()
    wanted = np.asarray(qm(tiny.IDS))
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
