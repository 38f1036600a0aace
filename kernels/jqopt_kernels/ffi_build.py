"""The C++ library of the FFI kernels: built once by the system's compiler, kept in a cache, found again by later runs.

Nothing is compiled on import or on a kernel's first use: `build()`, or `jqopt-kernels build` in a shell, is a step that
someone takes. From then on every process of this user finds the library and the kernels in it are chosen like others.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

SOURCES = pathlib.Path(__file__).parent / "ffi"
CACHE = "JQOPT_KERNELS_CACHE"  # names another cache directory
COMPILERS = ("c++", "g++", "clang++")  # tried in this order, after $CXX
STANDARD = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-w")
X86 = ("x86_64", "AMD64")
FLAGS = {
    "gemm.cc": (),
    "rows_portable.cc": (),
    "rows_avx2.cc": ("-mavx2", "-mfma", "-mf16c"),
    "rows_avx512.cc": ("-mavx512f", "-mavx2", "-mfma", "-mf16c"),
}
TIMEOUT = 600.0  # seconds a compiler may take


class BuildError(RuntimeError):
    """The library could not be built; says why, in the compiler's words where it has some."""


class Library(NamedTuple):
    """A library that is loaded: the name of its custom call, and the instruction sets it can use here, best last."""

    path: pathlib.Path
    target: str
    isas: tuple[str, ...]


def cache_directory() -> pathlib.Path:
    """Where libraries are kept: $JQOPT_KERNELS_CACHE, or jqopt-kernels in the user's cache directory."""
    if named := os.environ.get(CACHE):
        return pathlib.Path(named)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jqopt-kernels"


def library() -> Library | str:
    """The library of this version, loaded; or the reason why there is none. Never compiles."""
    folder = _folder()
    built = sorted(folder.glob("gemm-*.so"), key=lambda p: p.stat().st_mtime_ns) if folder.is_dir() else []
    if built:
        return _load(built[-1])
    with contextlib.suppress(OSError):
        failed = (folder / "failed.txt").read_text().strip()
        return f"building its C++ library failed: {failed}; to try again: {HOW}"
    none = "" if _compiler() else f", and there is no compiler ({', '.join(COMPILERS)} or $CXX)"
    return f"its C++ library is not built{none}; to build it once: {HOW}"


HOW = "`jqopt-kernels build` in a shell, or jqopt_kernels.build()"


def build(*, force: bool = False) -> pathlib.Path:
    """Builds the library of the C++ kernels into the cache, unless it is there, and returns its path.

    Needs a C++17 compiler ($CXX, c++, g++ or clang++); takes some seconds. Safe in several processes at a time.

    Raises:
        BuildError: there is no compiler, it fails, or what it made cannot be loaded.
    """
    compiler = _compiler()
    if compiler is None:
        raise BuildError(f"no C++ compiler: found none of {', '.join(COMPILERS)}, and $CXX is not set to one")
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"gemm-{_digest(_said([compiler, '--version']))}.so"
    with _alone(folder):
        try:
            if force or not out.exists():
                _compile(compiler, folder, out)
            if isinstance(why := _load(out), str):
                raise BuildError(why)
        except BuildError as error:
            (folder / "failed.txt").write_text(f"{error}\n")
            raise
        (folder / "failed.txt").unlink(missing_ok=True)
    return out


def _compile(compiler: str, folder: pathlib.Path, out: pathlib.Path) -> None:
    """Every file of the sources to an object, at the same time; linked aside, then moved into place in one step."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        here = pathlib.Path(name)
        start = [compiler, *STANDARD, "-I", jax.ffi.include_dir()]
        objects = {source: here / f"{source}.o" for source in _sources()}
        steps = [[*start, *FLAGS[s], "-c", str(SOURCES / s), "-o", str(o)] for s, o in objects.items()]
        with concurrent.futures.ThreadPoolExecutor(len(steps)) as pool:
            list(pool.map(_said, steps))
        linked = here / "linked.so"
        _said([compiler, "-shared", "-pthread", "-o", str(linked), *map(str, objects.values())])
        os.replace(linked, out)


def _said(command: list[str]) -> str:
    """What a command printed. Raises BuildError, with the first line about an error, if it failed."""
    both: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(command, timeout=TIMEOUT, check=False, **both)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        lines = done.stdout.splitlines() or [f"{command[0]}: exit status {done.returncode}"]
        raise BuildError(next((line for line in lines if "error" in line), lines[0]))
    return done.stdout


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next((found for c in ((named,) if named else COMPILERS) if (found := shutil.which(c))), None)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """One builder at a time: a second process waits, and then finds what the first one built."""
    import fcntl  # Linux and macOS: what JAX runs on

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------------- the library


def _folder() -> pathlib.Path:
    return cache_directory() / _key()


@functools.cache
def _key() -> str:
    """Of all that decides what the library is, except the compiler, whose version is in the file's name."""
    headers = (pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api").glob("*.h")  # jaxlib's
    texts = [path.read_text() for path in sorted([*headers, *SOURCES.iterdir()])]
    return _digest(
        "\0".join([*texts, jax.__version__, str(STANDARD), str(FLAGS), platform.system(), platform.machine()])
    )


def _sources() -> list[str]:
    return [name for name, flags in FLAGS.items() if not flags or platform.machine() in X86]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _load(path: pathlib.Path) -> Library | str:
    """Loads a library and registers its custom call with JAX, once in a process; or says why not."""
    owner = path.stat().st_uid
    if owner not in (0, os.getuid()):
        return f"its C++ library {path} belongs to another user (id {owner}); remove it and build your own: {HOW}"
    try:
        loaded = ctypes.CDLL(str(path))
        handler = loaded.JqoptGemm
    except (OSError, AttributeError) as error:
        return f"its C++ library {path} cannot be loaded: {error}; to build it again: {HOW}"
    target = f"jqopt_gemm_{_digest(str(path))}"
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    loaded.jqopt_isa.restype = ctypes.c_char_p
    names = []
    while (name := loaded.jqopt_isa(len(names))) is not None:
        names.append(name.decode())
    return Library(path, target, tuple(names))
