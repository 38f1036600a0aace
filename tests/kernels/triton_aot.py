"""Compiles a quantized block for Hopper with XLA's GPU compiler, on a machine without one; a process of its own.

    XLA_FLAGS=--xla_gpu_cuda_data_dir=... python -m tests.kernels.triton_aot BACKEND < /dev/null > facts.json

Needs the packages of `make cuda`: XLA's CUDA plugin, and ptxas and libdevice out of Triton's wheel (`cuda_folder`).
"""

import json
import pathlib
import re
import sys

HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""


def cuda_folder(where: pathlib.Path) -> pathlib.Path:
    """A folder laid out as a CUDA installation, of links to the tools in Triton's wheel."""
    import triton

    backend = pathlib.Path(triton.__file__).parent / "backends" / "nvidia"
    for folder, source in (("bin", backend / "bin"), ("nvvm/libdevice", backend / "lib")):
        (where / folder).mkdir(parents=True)
        for file in source.iterdir():
            (where / folder / file.name).symlink_to(file)
    return where


def facts(backend: str | None) -> dict:
    """Custom calls of the compiled program, and the bytes it needs beside arguments and results."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    import jqopt

    def model(params, x):
        def layer(x, w):
            return x + jax.nn.silu(x @ w["up"]) @ w["down"], None

        return jax.lax.scan(layer, x, params)[0]

    params = {"up": jnp.ones((2, 512, 1024)), "down": jnp.ones((2, 1024, 512))}
    x = jnp.ones((16, 512))
    recipe = {"schema": 1, "name": "t", "rules": [{"match": "*", "weight": "nvfp4"}]}
    quantized = jqopt.quantize_model(model, recipe, params=params, batches=[x])
    run = jqopt.apply(quantized.plan, backend=backend, device="cuda:90")
    topology = topologies.get_topology_desc(platform="cuda", target_config=HOPPER, topology="1x1x1")
    mesh = jax.sharding.Mesh(topology.devices[:1], ("x",))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), (quantized.params, x))
    compiled = jax.jit(lambda q, x: run(q, x)).lower(*arrays).compile()
    return {
        "calls": re.findall(r'custom_call_target="([^"]+)"', compiled.as_text()),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    json.dump(facts(sys.argv[1] if len(sys.argv) > 1 else None), sys.stdout)
