"""Launches of the Triton kernels as data, and what Triton's compiler makes of one: registers, spills, instructions."""

import functools
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jqopt_kernels import KERNELS, Epilogue, Operand, Packed, Shapes, triton_call, triton_dot
from jqopt_kernels._tiles import Tile
from jqopt_kernels.triton_call import Launch
from tests.kernels.cases import BITS, OPERANDS, scale_shape

MORE = OPERANDS | {
    "int4_g128": Operand("int4", 128, "float32", "block"),
    "fp8_128": Operand("e4m3", (128, 128), "float32", "block"),
    "fp8_1x128": Operand("e4m3", (1, 128), "float32", "block"),
}
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "uint8": "*u8"}


def abstract(spec: Operand, rows: int, k: int, *, is_packed: bool, dtype=jnp.bfloat16):
    """What `cases.operand` makes, as shapes."""
    if spec.element == "float":
        return jax.ShapeDtypeStruct((rows, k), dtype)
    bits = BITS[spec.element] if is_packed else 8
    shape = scale_shape(spec, rows, k)
    kind = jnp.float32 if spec.scale == "float32" else jnp.uint8
    return Packed(
        jax.ShapeDtypeStruct((rows, -(-k * bits // 8)), jnp.int8 if spec.element == "int8" else jnp.uint8),
        None if spec.scale is None else jax.ShapeDtypeStruct(shape, kind),
        jax.ShapeDtypeStruct((), jnp.float32) if spec.global_scale else None,
        jax.ShapeDtypeStruct(shape, jnp.uint8) if spec.zero_point else None,
    )


def launch(
    name: str,
    lhs: Operand,
    rhs: Operand,
    shapes: Shapes,
    capability: int,
    *,
    dtype=jnp.bfloat16,
    tile: Tile | None = None,
    activation: str | None = None,
    prepare: bool = True,
) -> Launch:
    """The launch of a product, its operands as shapes. activation: with a bias before it."""
    kept: list[Launch] = []
    epilogue = Epilogue(None if activation is None else jnp.zeros(shapes.n), activation)

    def trace(x, w):
        if prepare:
            w = next(each for each in KERNELS if each.name == name).prepare(w)
        own = {"epilogue": epilogue} | ({} if tile is None else {"tile": tile})
        kept.append(triton_dot.launches()[name](x, w, lhs, rhs, shapes, jnp.float32, capability, **own)[0])
        return [o for o in kept[0].operands if not isinstance(o, int)]

    x = abstract(lhs, shapes.m, shapes.k, is_packed=False, dtype=dtype)
    arrays = iter(jax.eval_shape(trace, x, abstract(rhs, shapes.n, shapes.k, is_packed=True)))
    return kept[0]._replace(operands=tuple(o if isinstance(o, int) else next(arrays) for o in kept[0].operands))


class Compiled(NamedTuple):
    """What a kernel became. stack: bytes of spilled registers and arrays."""

    registers: int
    stack: int
    shared: int
    ttir: str
    ptx: str
    sass: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}", self.sass))

    def loop(self) -> list[str]:
        """The instructions of the longest loop: from the target of a branch back to that branch."""
        lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;/]+);", self.sass)]
        texts, index = [text for _, text in lines], {at: i for i, (at, _) in enumerate(lines)}
        loops = [[]]
        for i, text in enumerate(texts):
            back = re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", text)
            if back and (start := index[int(back[1], 16)]) < i:
                loops.append(texts[start : i + 1])
        return max(loops, key=len)


def compiled(one: Launch, capability: int) -> Compiled:
    """Compiles a launch as jax-triton does: pointers aligned to 16 bytes, nothing known of ints."""
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    backend = importlib.import_module("triton.backends.compiler")
    fn = triton_call.source(one.kernel)
    types = ["i32" if isinstance(o, int) else POINTERS[np.dtype(o.dtype).name] for o in (*one.operands, one.out)]
    runtime = [name for name in fn.arg_names if name not in one.constants]
    signature = dict.fromkeys(one.constants, "constexpr") | dict(zip(runtime, types, strict=True))
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(fn.arg_names) if signature[name][0] == "*"}
    source = compiler.ASTSource(
        fn=fn, signature={n: signature[n] for n in fn.arg_names}, constexprs=one.constants, attrs=aligned
    )
    options = {"num_warps": one.warps, "num_stages": one.stages, "enable_fp_fusion": True}
    out = triton.compile(source, target=backend.GPUTarget("cuda", capability, 32), options=options)
    usage, sass = _dump(out.asm["cubin"])
    registers, stack = (int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Compiled(registers, stack, out.metadata.shared, out.asm["ttir"], out.asm["ptx"], sass)


@functools.cache
def _tools() -> pathlib.Path:
    return pathlib.Path(importlib.import_module("triton").__file__).parent / "backends" / "nvidia" / "bin"


def _dump(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        return tuple(run([_tools() / "cuobjdump", what, file.name]).stdout for what in ("-res-usage", "-sass"))


def subprocess_json(module: str, text: str, **variables: str):
    """What a module prints, run as a program in a process of its own with this one's imports and no GPU."""
    path = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run(
        [sys.executable, "-m", module], input=text, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
