"""The kernels in C++: each instruction set, sizes that lie, and the way from no library to one that is chosen."""

import functools
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jqopt_kernels as kernels
from jqopt_kernels import Operand, Shapes, commands, ffi_build, ffi_gemm
from tests.kernels.cases import FLOAT, OPERANDS, case
from tests.kernels.test_contract import assert_within

NVFP4 = OPERANDS["nvfp4"]
EVERY_KIND = ["int8", "fp8_e5m2", "uint4", "uint4_channel", "nvfp4", "fp8_block", "mxfp4", "mxint8"]


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_each_instruction_set_equals_exact_numpy(library, isa):
    """m: in registers, one tile, tiles with a rest. k: groups of 64 with a rest, more than a chunk of 512."""
    if isa not in library.isas:
        pytest.skip(f"this processor has {', '.join(library.isas)} only")
    equals_exact_numpy(library.isas.index(isa))


def equals_exact_numpy(isa: int) -> None:
    run = functools.partial(ffi_gemm.ffi_gemm.run, isa=isa)
    for pair in EVERY_KIND:
        for m, n, k in ((1, 6, 600), (3, 5, 70), (8, 9, 600)):
            c = case(pair, m, n, k)
            assert_within(run(c.lhs, c.rhs, **c.specs), c.y, c.bound)


@pytest.mark.slow
def test_avx512_written_out_equals_exact_numpy(library, empty, monkeypatch):
    """What CI's processor may lack: the same source, its intrinsics replaced by loops over 16 lanes."""
    if "avx2" not in library.isas:
        pytest.skip("the rest of that file needs AVX2")
    sources = empty / "ffi"
    shutil.copytree(ffi_build.SOURCES, sources)
    shutil.copy(pathlib.Path(__file__).parent / "avx512.h", sources)
    for name, old, new in (
        ("rows_avx512.cc", "#include <immintrin.h>", '#include "avx512.h"'),
        ("gemm.cc", 'if (__builtin_cpu_supports("avx512f"))', ""),
    ):
        text = (sources / name).read_text()
        assert old in text
        (sources / name).write_text(text.replace(old, new))
    monkeypatch.setattr(ffi_build, "SOURCES", sources)
    monkeypatch.setattr(ffi_build, "STANDARD", (*ffi_build.STANDARD, "-O1"))
    monkeypatch.setitem(ffi_build.FLAGS, "rows_avx512.cc", ffi_build.FLAGS["rows_avx2.cc"])
    monkeypatch.setattr(ffi_build, "_key", lambda: "written-out")
    ffi_build.build()
    found = ffi_build.library()
    assert not isinstance(found, str) and found.isas[-1] == "avx512"
    equals_exact_numpy(found.isas.index("avx512"))


def call(target: str, x, codes, scale, n: int, **numbers) -> jax.Array:
    """The custom call of a 4-bit weight with NVFP4's scales; `numbers` replace what is right."""
    right = {"element": 0, "kind": 2, "rows": 1, "block": 16, "isa": -1} | numbers
    out = jax.ShapeDtypeStruct((x.shape[0], n), jnp.float32)
    attributes = {name: np.int64(number) for name, number in right.items()}
    return jax.ffi.ffi_call(target, out)(x, codes, scale, jnp.zeros((0, 0), jnp.float32), **attributes)


@pytest.mark.parametrize(
    ("x", "codes", "scale", "numbers", "said"),
    [
        ((2, 64), (4, 31), (4, 4), {}, r"codes \[4, 31\], expected \[..., 4, 32\] for k=64"),
        ((2, 64), (3, 32), (4, 4), {}, r"codes \[3, 32\]"),
        ((2, 64), (4, 32), (4, 3), {}, r"scales \[4, 3\], expected \[..., 4, 4\]"),
        ((2, 64), (4, 32), (1, 4), {"rows": 2}, r"scales \[1, 4\], expected \[..., 2, 4\]"),
        ((2, 65), (4, 32), (4, 5), {}, r"for k=65"),
        ((2, 64), (4, 32), (4, 4), {"block": 8}, "expected a multiple of 16"),
        ((2, 64), (4, 32), (4, 4), {"block": 1 << 62}, "expected a multiple of 16"),
        ((2, 64), (4, 32), (4, 4), {"element": 9}, "element 9 is unknown"),
        ((2, 64), (4, 32), (4, 4), {"kind": -1}, "kind of scale -1 is unknown"),
        ((2, 64), (4, 32), (4, 4), {"kind": 1}, "scales of an unexpected type"),
        ((2, 64), (4, 32), (4, 4), {"isa": 99}, "lacks instruction set 99"),
    ],
)
def test_sizes_that_lie_are_refused(library, x, codes, scale, numbers, said):
    arrays = (jnp.zeros(x), jnp.zeros(codes, jnp.uint8), jnp.zeros(scale, jnp.uint8))
    with pytest.raises(jax.errors.JaxRuntimeError, match=said):
        call(library.target, *arrays, 4, **numbers).block_until_ready()


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 64), (2, 0, 64), (2, 5, 0), (0, 0, 0)])
def test_nothing_to_do(library, m, n, k):
    c = case("nvfp4", max(m, 1), max(n, 1), max(k, 1))
    rhs = c.rhs._replace(data=c.rhs.data[:n, : k // 2], scale=c.rhs.scale[:n, : k // 16])
    y = ffi_gemm.ffi_gemm.run(c.lhs[:m, :k], rhs, lhs_spec=FLOAT, rhs_spec=NVFP4, n=n, k=k)
    np.testing.assert_array_equal(y, np.zeros((m, n)))


def test_what_is_not_a_number_stays_in_its_row(library):
    c = case("nvfp4", 2, 4, 70)
    run = functools.partial(ffi_gemm.ffi_gemm.run, **c.specs)
    broken = c.rhs._replace(scale=c.rhs.scale.at[2, 4].set(0x7F))  # the last, which covers 6 columns
    np.testing.assert_array_equal(np.isnan(run(c.lhs, broken)), [[False, False, True, False]] * 2)
    x = c.lhs.at[1, 69].set(jnp.nan)
    np.testing.assert_array_equal(np.isnan(run(x, c.rhs)), [[False] * 4, [True] * 4])


def test_every_axis_under_vmap(library):
    """Weights [a, 1, ...], activations [1, b, ...]: nested vmaps, each over one of the two."""
    one, two = case("nvfp4", 2, 5, 40, seed=1), case("nvfp4", 2, 5, 40, seed=2)
    run = functools.partial(ffi_gemm.ffi_gemm.run, **one.specs)
    x = jnp.stack([one.lhs, two.lhs, one.lhs])
    w = jax.tree.map(lambda *a: jnp.stack(a), one.rhs, two.rhs)
    y = jax.vmap(jax.vmap(run, (0, None)), (None, 0))(x, w)
    assert y.shape == (2, 3, 2, 5)
    for j, weight in enumerate((one.rhs, two.rhs)):
        for i, rows in enumerate((one.lhs, two.lhs, one.lhs)):
            np.testing.assert_array_equal(y[j, i], run(rows, weight))


def test_on_a_mesh(library):
    """Eight devices call it at the same time, on threads they share: by shard_map, and gathered by jit."""
    c = case("nvfp4", 5, 128, 64)
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = jax.tree.map(lambda a: P("a") if a.ndim else P(), c.rhs)
    part = functools.partial(ffi_gemm.ffi_gemm.run, **c.specs | {"n": 16})
    shared = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(P(), specs), out_specs=P(None, "a")))
    for _ in range(20):
        y = shared(c.lhs, c.rhs)
    assert_within(y, c.y, c.bound)
    placed = jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), c.rhs, specs)
    assert_within(jax.jit(functools.partial(ffi_gemm.ffi_gemm.run, **c.specs))(c.lhs, placed), c.y, c.bound)


# ---------------------------------------------------------------------------------------------------- the library


def why_not(device: str = "cpu", m: int = 1) -> str | None:
    return dict(kernels.explain("qdot", FLOAT, NVFP4, device, Shapes(m, 64, 64)))["ffi_gemm"]


def test_a_built_library_is_chosen(library):
    assert kernels.find("qdot", FLOAT, NVFP4, "cpu", Shapes(1, 64, 64)).name == "ffi_gemm"
    assert kernels.find("qdot", FLOAT, NVFP4, "cpu", Shapes(32, 64, 64), backend="ffi").name == "ffi_gemm"
    assert "not for cuda:90" in str(why_not("cuda:90"))
    assert "m=33" in str(why_not(m=33))
    five = Operand("e2m1", 5, "e4m3", "block")
    refused = dict(kernels.explain("qdot", FLOAT, five, "cpu", Shapes(1, 8, 40)))["ffi_gemm"]
    assert refused == "rhs block 5 is not a multiple of 16 columns"


@pytest.fixture
def empty(monkeypatch, tmp_path) -> pathlib.Path:
    monkeypatch.setenv(ffi_build.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def test_without_a_library_the_reason_says_how_to_build_one(empty, monkeypatch):
    assert "jqopt-kernels build" in str(why_not())
    assert kernels.find("qdot", FLOAT, NVFP4, "cpu", Shapes(1, 64, 64)).name == "xla_tiled"
    assert not (empty / "cache").exists()  # asking builds nothing
    monkeypatch.setenv("PATH", str(empty))
    assert "there is no compiler" in str(why_not())
    with pytest.raises(kernels.BuildError, match=r"no C\+\+ compiler"):
        kernels.build()


def compiler(folder: pathlib.Path, body: str) -> str:
    """A shell script in place of a compiler, which knows its version."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo test 1.0; exit 0; fi\n{body}\n')
    path.chmod(0o755)
    return str(path)


def test_a_failed_build_is_remembered_with_the_compilers_words(empty, monkeypatch, capsys):
    monkeypatch.setenv("CXX", compiler(empty, "echo note; echo 'gemm.cc:1:2: error: no such header'; exit 1"))
    with pytest.raises(kernels.BuildError, match="no such header"):
        kernels.build()
    assert "failed: gemm.cc:1:2: error: no such header" in str(why_not())
    assert commands.main(["build"]) == 1
    assert "no such header" in capsys.readouterr().err
    left = {path.name for path in (empty / "cache").rglob("*") if path.is_file()}
    assert left == {"failed.txt", "lock"}


def test_what_is_no_library_is_refused(empty, monkeypatch):
    monkeypatch.setenv("CXX", compiler(empty, 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"'))
    with pytest.raises(kernels.BuildError, match="cannot be loaded"):
        kernels.build()
    assert "cannot be loaded" in str(why_not())


def test_the_command_builds_once(library, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nonexistent")  # a second build would need it
    with pytest.raises(kernels.BuildError):
        kernels.build()
    monkeypatch.delenv("CXX")
    assert commands.main(["build"]) == 0
    assert str(library.path) in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_build_one_library(library, empty, monkeypatch):
    """The script in place of the compiler copies a library that is there, slowly, and counts."""
    body = f'while [ "$1" != -o ]; do shift; done; sleep 0.3; cp {library.path} "$2"; echo "$2" >> {empty}/log'
    environment = os.environ | {"CXX": compiler(empty, body), ffi_build.CACHE: str(empty / "cache")}
    code = "import jqopt_kernels as k; print(k.build())"
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    said = {process.communicate(timeout=120)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(said) == 1
    assert (empty / "log").read_text().count("linked.so") == 1
