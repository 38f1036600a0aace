"""Compiles quantized models for an H100 on a machine without one, and prints what came out, as JSON; see test_aot.py.

A program of its own: XLA reads its flags once in a process. It needs jax-cuda13-plugin, jax-cuda13-pjrt and, for ptxas
and libdevice, triton; no driver and no GPU.
"""

import collections
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3350000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 80000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


CUBLAS = "--xla_gpu_enable_triton_gemm=false"
B200 = H100.replace("major: 9 minor: 0", "major: 10 minor: 0").replace("H100 80GB HBM3", "B200")


def tools(root: pathlib.Path) -> pathlib.Path:
    """A folder laid out as a CUDA installation, of the tools in triton's wheel; its ptxas."""
    import triton

    nvidia = pathlib.Path(triton.__file__).parent / "backends" / "nvidia"
    (root / "nvvm" / "libdevice").mkdir(parents=True)
    (root / "bin").symlink_to(nvidia / "bin")
    (root / "nvvm" / "libdevice" / "libdevice.10.bc").symlink_to(nvidia / "lib" / "libdevice.10.bc")
    return root / "bin" / "ptxas"


def main() -> None:
    root = pathlib.Path(tempfile.mkdtemp())
    ptxas, dump = tools(root / "cuda"), root / "dump"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = " ".join(
        [f"--xla_gpu_cuda_data_dir={root / 'cuda'}", "--xla_gpu_autotune_level=0", f"--xla_dump_to={dump}",
         CUBLAS]  # on a GPU XLA tries its own kernels and cuBLASLt; without one it would not take cuBLASLt
    )  # fmt: skip
    out = {name: report(*case) for name, case in cases().items()}
    out["kernels"] = [line for file in sorted(dump.glob("*.ptx")) for line in resources(file, ptxas)]
    json.dump(out, sys.stdout)


def report(compiled, copy: int) -> dict:
    """Calls, what cuBLASLt does after a product, bytes beside, and `copy`: bytes of the smallest weight decoded.

    fused: products in kernels of XLA's own; floats: how many numbers the float arrays of the program have.
    """
    targets = collections.Counter(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text()))
    after = re.findall(r'"epilogue":"(\w+)"', compiled.as_text())
    temp, text = compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()
    shapes = {tuple(map(int, sizes.split(","))) for sizes in re.findall(r"\b(?:bf16|f16|f32)\[([\d,]+)\]", text)}
    sizes = sorted({math.prod(shape) for shape in shapes})
    fused = len(re.findall(r'"kind":"__triton[a-z_]*gemm[a-z_]*"', text))
    return {"calls": targets, "epilogues": after, "temp": temp, "copy": copy, "fused": fused, "floats": sizes}


def resources(file: pathlib.Path, ptxas: pathlib.Path) -> list[dict]:
    """What ptxas says of each Pallas kernel in a file: registers, bytes spilled; and its tensor core instructions."""
    text = file.read_text()
    names = re.findall(r"\.entry (pallas_[a-z]+)", text)
    if not names:
        return []
    said = subprocess.run(
        [ptxas, "-v", "-arch=sm_90a", file, "-o", os.devnull], capture_output=True, text=True, check=True
    ).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
    wide = len(re.findall(r"ld\.global\S*\.v4|cp\.async\.\S+ \[[^;]*, 0x10|cp\.async\.cg", text))
    return [
        {"name": names[0], "registers": registers, "spilled": spilled, "wide": wide,
         "tensor": len(re.findall(r"wgmma\.mma_async|mma\.sync", text))}
    ]  # fmt: skip


def cases() -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    import jqopt
    import jqopt_kernels as kernels
    from jqopt import kv_cache

    def place(of: str):
        devices = topologies.get_topology_desc(platform="cuda", target_config=of, topology="1x1x1").devices
        mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    hopper = place(H100)

    def compiled(f, *args, at=hopper, by_default=False):
        """by_default: with XLA's default flags, so that it makes kernels of its own for products."""
        there = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), a.dtype, sharding=at), args)
        if not by_default:
            return jax.jit(f).lower(*there).compile()
        flags = os.environ["XLA_FLAGS"]
        os.environ["XLA_FLAGS"] = flags.replace(CUBLAS, "")
        jax.clear_caches()  # what was traced before holds what was chosen for those flags
        lowered = jax.jit(f).lower(*there)
        os.environ["XLA_FLAGS"] = flags
        jax.clear_caches()
        return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": True})

    def block(p, x):
        return x + jax.nn.silu(x @ p["up"]) @ p["down"]

    size, wide = 512, 1024
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=s) / 32, jnp.bfloat16) for k, s in
              {"up": (size, wide), "down": (wide, size)}.items()}  # fmt: skip
    out, copy = {}, size * wide * 2
    for name, rule, rows in (
        ("fp8", {"weight": "fp8", "input": "fp8"}, 64),
        (
            "fp8 token",
            {"weight": {"format": "fp8", "granularity": "channel"}, "input": {"format": "fp8", "granularity": "token"}},
            64,
        ),
        *((f"nvfp4 {m}", {"weight": "nvfp4"}, m) for m in (1, 16, 256)),
        ("nvfp4 inputs", {"weight": "nvfp4", "input": "nvfp4"}, 16),
    ):
        x = jnp.asarray(rng.normal(size=(rows, size)), jnp.bfloat16)
        recipe = {"schema": 1, "name": "aot", "rules": [{"match": "*", **rule}]}
        qm = jqopt.quantize_model(block, recipe, params=params, batches=[x])
        # where jax-triton is installed, its kernels come first
        backend = None if name.startswith("fp8") else "pallas"
        run = jqopt.apply(qm.plan, device="cuda:90", backend=backend)
        out[name] = compiled(run, qm.quant, x), copy
        if name.startswith("fp8"):
            out[f"{name} by default"] = compiled(run, qm.quant, x, by_default=True), copy

    fp8 = kernels.Operand("e4m3", None, "float32", "tensor")
    one = jnp.ones((1, 1), jnp.float32)
    left, right = (kernels.Packed(jnp.zeros((rows, size), jnp.uint8), one) for rows in (64, wide))
    for activation in (None, "relu", "gelu_tanh"):

        def product(x, w, bias, activation=activation):
            run = kernels.find("qdot", fp8, fp8, "cuda:90", kernels.Shapes(64, wide, size)).run
            after = kernels.Epilogue(bias, activation)
            return run(x, w, lhs_spec=fp8, rhs_spec=fp8, n=wide, k=size, epilogue=after)

        out[f"fp8 bias {activation}"] = compiled(product, left, right, jnp.zeros(wide, jnp.bfloat16)), copy

    for spec in ("nvfp4", "mxfp8"):
        x = jnp.asarray(rng.normal(size=(16, size)), jnp.bfloat16)
        recipe = {"schema": 1, "name": "aot", "rules": [{"match": "*", "weight": spec, "input": spec}]}
        qm = jqopt.quantize_model(block, recipe, params=params, batches=[x])
        run = jqopt.apply(qm.plan, device="cuda:100", backend="xla")
        out[f"blackwell {spec}"] = compiled(run, qm.quant, x, at=place(B200)), copy

    def experts(p, x):
        return jax.lax.ragged_dot(x, p["w"], jnp.asarray([10, 0, 20, 2], jnp.int32))

    x = jnp.asarray(rng.normal(size=(32, size)), jnp.bfloat16)
    recipe = {"schema": 1, "name": "aot", "rules": [{"match": "*", "weight": "nvfp4"}]}
    stack = {"w": jnp.asarray(rng.normal(size=(4, size, wide)) / 32, jnp.bfloat16)}
    qm = jqopt.quantize_model(experts, recipe, params=stack, inputs=(x,))
    out["experts"] = compiled(jqopt.apply(qm.plan, device="cuda:90"), qm.quant, x), 4 * copy

    q = jnp.zeros((2, 1, 16, 128), jnp.bfloat16)
    for spec in ("fp8", "nvfp4"):
        cache = kv_cache.init((2, 4096, 4, 128), {"format": spec, "scaling": "cast"})
        one = compiled(lambda c, q: kv_cache.attend(c, q, 100, device="cuda:90"), cache, q)
        out[f"cache {spec}"] = one, 2 * 4096 * 4 * 128 * 2
    return out


if __name__ == "__main__":
    main()
