"""What tests of kernels share: the C++ library, built once into a folder of the run; Triton with shipped tiles only."""

import pytest

from jqopt_kernels import ffi_build, triton_call


@pytest.fixture(scope="session")
def built_library(tmp_path_factory, worker_id) -> str:
    """The cache it was built into. The processes of a run share one: the second waits for the first."""
    base = tmp_path_factory.getbasetemp()
    cache = (base if worker_id == "master" else base.parent) / "jqopt-kernels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ffi_build.CACHE, str(cache))
        try:
            ffi_build.build()
        except ffi_build.BuildError as error:
            if "no C++ compiler" in str(error):
                pytest.skip(f"{error}: the kernels in C++ are not tested here")
            raise
    return str(cache)


@pytest.fixture
def library(built_library, monkeypatch) -> ffi_build.Library:
    """The library, found by the kernels for the time of one test."""
    monkeypatch.setenv(ffi_build.CACHE, built_library)
    found = ffi_build.library()
    assert not isinstance(found, str), found
    return found


@pytest.fixture(scope="module")
def shipped_tiles(tmp_path_factory):
    """Shipped tiles only, whatever this machine's user has tuned; and a folder for Triton, which jax-triton unsets."""
    assert triton_call.missing() is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield
