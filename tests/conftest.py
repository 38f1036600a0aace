"""The ground all tests stand on: eight CPU devices, strict promotion, repeatable hypothesis runs.

The environment must be set before the first import of JAX, hence here, outside any function. A value that the
caller has set stays, so that a GPU machine can run `JAX_PLATFORMS=cuda pytest tests/kernels`.
"""

import functools
import gc
import os
from collections.abc import Iterator, Mapping
from typing import Any

import hypothesis
import pytest

DEVICES = "--xla_force_host_platform_device_count=8"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JQOPT_KERNELS_CACHE"] = os.devnull  # a library that someone built is not chosen; tests build their own
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()

# No deadline: the first example compiles, the next ones don't. Derandomized: a red run can be repeated.
hypothesis.settings.register_profile("jqopt", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("jqopt")


@pytest.fixture(scope="module", autouse=True)
def still_heap() -> Iterator[None]:
    """What a finished file leaves in JAX's caches is not searched for garbage again: gigabytes, by the end of a run."""
    yield
    gc.collect()
    gc.freeze()


# ------------------------------------------------------------------------------------------------------ compilation

# What makes XLA compile fast and its programs slow. Loops straight in LLVM and not by way of MLIR, which is half of the
# time of a quantizer; one object file; no optimization.
QUICK = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


# Tests of these kinds compute, or show what users get.
AS_USERS_DO = ("optimized", "slow", "long", "install", "memory", "thirdparty", "clients", "vllm", "cuda", "browser")


def _known(name: str, value: Any) -> bool:
    """Has this version of XLA the option? They come and go; without one, tests only take longer."""
    import jax

    try:
        jax.jit(lambda x: x + 1, compiler_options={name: value})(0)
    except jax.errors.JaxRuntimeError:
        return False
    return True


class Compiler:
    """XLA's options for what is compiled from now on: quick ones, or those that users have."""

    def __init__(self) -> None:
        import jax  # not above: see this file's first lines
        from jax._src import compiler

        self.quick = False
        self.mine = {name: value for name, value in QUICK.items() if _known(name, value)}
        self.clear = jax.clear_caches
        self.options = compiler.get_compile_options  # private: no setting of JAX holds for all programs of a while
        compiler.get_compile_options = self.given

    def given(self, *args: Any, env_options_overrides: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        mine = self.mine if self.quick else {}
        return self.options(*args, env_options_overrides={**mine, **(env_options_overrides or {})}, **kwargs)

    def turn(self, quick: bool) -> None:
        if self.quick and not quick:
            self.clear()
        self.quick = quick


@functools.cache
def compiler() -> Compiler:
    return Compiler()


def compiles_quickly(item: pytest.Item) -> bool:
    """Is this a test that compiles much and computes little, and doesn't ask for programs as users have them?

    `JQOPT_TESTS_OPTIMIZED=1` compiles all as users do; `make bits` does so for the files that compare bits.
    """
    if os.environ.get("JQOPT_TESTS_OPTIMIZED") or os.environ["JAX_PLATFORMS"] != "cpu":
        return False
    return item.get_closest_marker("quick") is not None or not any(map(item.get_closest_marker, AS_USERS_DO))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    compiler().turn(compiles_quickly(item))
    return (yield)
