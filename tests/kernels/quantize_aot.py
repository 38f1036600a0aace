"""Compiles every quantizer kernel for Hopper with XLA, without a GPU, and prints what became of each as JSON.

A process of its own: XLA reads its flags once. Needs the packages of `make cuda`: jax-cuda13-pjrt, and Triton's ptxas
and libdevice.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

# What XLA wants to know of an H100 or H200: public figures of the chip (CUDA Programming Guide, table of limits).
HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def toolkit(folder: pathlib.Path) -> pathlib.Path:
    """A folder like CUDA's, of the tools in Triton's wheel."""
    found = importlib.util.find_spec("triton")
    assert found is not None and found.origin is not None
    nvidia = pathlib.Path(found.origin).parent / "backends" / "nvidia"
    (folder / "bin").mkdir()
    (folder / "nvvm" / "libdevice").mkdir(parents=True)
    for tool in (nvidia / "bin").iterdir():
        (folder / "bin" / tool.name).symlink_to(tool)
    (folder / "nvvm" / "libdevice" / "libdevice.10.bc").symlink_to(nvidia / "lib" / "libdevice.10.bc")
    return folder / "bin" / "ptxas"


def jobs() -> dict:
    """name -> (function, shapes and dtypes of its operands)."""
    import jax.numpy as jnp

    import jqopt_kernels as kernels
    from jqopt_kernels.quantize_way import SIGNS, Random, Way
    from tests.kernels.quantize_cases import FORMATS

    run = {k.op: k.run for k in kernels.KERNELS if k.backend == "pallas" and k.name.startswith("pallas_")}
    spec = {name: format[0] for name, format in FORMATS.items()}
    up = Way(encode=True, stochastic=True)
    column = Way(encode=True, hadamard=SIGNS, stochastic=True)
    x, scale, keys = ((4096, 5120), jnp.bfloat16), ((), jnp.float32), ((2, 2), jnp.uint32)

    def plain(name, way=Way()):  # noqa: B008
        return lambda x: run["quantize"](x, spec=spec[name], way=way)

    def given(name, way=Way()):  # noqa: B008
        return lambda x, s: run["quantize"](x, spec=spec[name], way=way, scale=s, packed=True)

    def random(x, s, keys):
        return run["quantize"](x, spec=spec["nvfp4"], way=up, scale=s, random=Random(keys[0]), packed=True)

    def both(x, s, keys):
        return run["quantize_both"](
            x, spec=spec["nvfp4"], way=up, column_way=column, scale=s, column_scale=s, packed=True,
            random=Random(keys[0]), column_random=Random(keys[1]))  # fmt: skip

    def normed(x, w, s):
        return run["norm_quantize"](x, w, spec=spec["nvfp4"], scale=s, packed=True)

    def gated(x, y, s):
        return run["swiglu_quantize"](x, y, spec=spec["nvfp4"], scale=s, packed=True)

    return {
        "nvfp4": (given("nvfp4"), [x, scale]),
        "nvfp4_hadamard": (given("nvfp4", Way(encode=True, hadamard=SIGNS)), [x, scale]),
        "nvfp4_stochastic": (random, [x, scale, keys]),
        "mxfp8": (plain("mxfp8"), [x]),
        "mxfp6": (plain("mxfp6"), [x]),
        "fp8": (given("fp8"), [x, scale]),
        "fp8_token": (plain("fp8_token"), [x]),
        "fp8_1x128": (plain("fp8_1x128", Way(encode=True, power_of_two=True)), [x]),
        "int8_token": (plain("int8_token"), [x]),
        "both": (both, [x, scale, keys]),
        "norm": (normed, [x, ((5120,), jnp.bfloat16), scale]),
        "swiglu": (gated, [x, x, scale]),
        "amax": (lambda x: run["amax"](x, spec=spec["nvfp4"]), [x]),
        "swizzle": (run["swizzle"], [((4096, 320), jnp.uint8)]),
        "unswizzle": (lambda x: run["unswizzle"](x, 4096, 320), [((4096, 320), jnp.uint8)]),
    }


def compiled(topology, dump: pathlib.Path, ptxas: pathlib.Path, name: str, function, operands: list) -> dict:
    import jax

    mesh = jax.sharding.Mesh(topology.devices[:1], ("x",))
    one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    function.__name__ = f"job_{name}"
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=one) for shape, dtype in operands]
    done = jax.jit(function).lower(*shapes).compile()
    text, memory = done.as_text(), done.memory_analysis()
    ptx = max(dump.glob(f"*jit_job_{name}.*ptx"), key=lambda path: path.stat().st_size)  # the others copy a scalar
    check = [ptxas, "-v", "--gpu-name", "sm_90a", "-o", os.devnull, ptx]
    says = subprocess.run(check, capture_output=True, text=True, check=True).stderr
    return {
        "calls": text.count('custom_call_target="__gpu$xla.gpu.triton"'),
        "temp": memory.temp_size_in_bytes,
        "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", says)),
        "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", says)),
        "instructions": sorted(set(re.findall(r"\b((?:ld|st)\.global[\w.]*|div\.[\w.]+)", ptx.read_text()))),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        ptxas, dump = toolkit(folder), folder / "dump"
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = (
            f"--xla_gpu_cuda_data_dir={folder} --xla_gpu_autotune_level=0 --xla_dump_to={dump} --xla_dump_hlo_as_text"
        )
        from jax.experimental import topologies

        topology = topologies.get_topology_desc(platform="cuda", target_config=HOPPER, topology="1x1x1")
        found = {job: compiled(topology, dump, ptxas, job, *what) for job, what in jobs().items()}
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
