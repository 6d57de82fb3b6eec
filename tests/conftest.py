"""Strict JAX for every test: it must be set before jax starts.

Programs that several tests need are compiled once: all processes of a test run share
one cache.
"""

import os
import shutil
import tempfile

# Several CPU devices in one process deadlock on few cores before jax 0.12 when
# collective steps are not blocked on; enough threads cure it.
os.environ["NPROC"] = "32"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Compiling takes most of the time.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
    ]
).strip()

import coverage
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


# The workers of pytest-xdist begin with the environment of the process that starts
# them, and so does every process that a test starts.
_STARTS = "PYTEST_XDIST_WORKER" not in os.environ
_CACHE = "JAX_COMPILATION_CACHE_DIR"


def pytest_configure():
    if _STARTS:
        os.environ[_CACHE] = tempfile.mkdtemp(prefix="boot_jax-tests-")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", os.environ[_CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_sessionfinish():
    """A worker has ten seconds to end before it is killed, and threads to wait for."""
    if measured := coverage.Coverage.current():
        measured.save()


def pytest_unconfigure():
    if _STARTS:
        shutil.rmtree(os.environ[_CACHE], ignore_errors=True)


def pytest_collection_modifyitems(items):
    """The longest first, so that no worker is left with them at the end."""
    items.sort(key=lambda item: "test_survival" not in item.nodeid)


@pytest.fixture
def without_cache():
    """For what looks at programs, of which a cache keeps only what runs."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it remembers whether it is used
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
