"""Settings of the whole test run: small arrays, so CPU; little time for the compiler; and no folder of the user's.

They are environment variables, set before JAX starts, so that xdist's workers and the processes that tests start have
them too; what the caller has set stays.
"""

import os
import signal
import tempfile
import time
from importlib import metadata

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # set JAX_PLATFORMS=cuda to test there
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Compiling is most of what tests cost. The marker `optimised` is for those of the program as users run it.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if metadata.version("jaxlib").startswith("0.10."):
        # Three times faster at compiling than the emitters that followed them, which are all that later versions have.
        # And one module for LLVM, not 32: what the tests compile is small, and the worker next door wants the cores.
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ.setdefault("XLA_FLAGS", flags)
OPTIMISED = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "0") in ("0", "")


STARTED = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--minutes", type=float, metavar="M", help="skip tests that have not begun after M minutes")


def pytest_configure(config):
    """What one process has compiled, the others of this run need not; and the programs started here heed Ctrl-C."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background, and inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="diffrwkv-compiled-")
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    minutes = item.config.getoption("minutes")
    if minutes is not None and time.monotonic() - STARTED > 60 * minutes:
        pytest.skip(f"no time left of --minutes={minutes:g}")
    if not OPTIMISED:
        import jax

        jax.config.update("jax_disable_most_optimizations", item.get_closest_marker("optimised") is None)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Tokens are cached in a folder of this run's, unless the caller has chosen one."""
    before = os.environ.get("DIFFRWKV_CACHE")
    if before is None:
        os.environ["DIFFRWKV_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["DIFFRWKV_CACHE"]
