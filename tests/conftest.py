"""Settings of the whole test run: small arrays, so CPU, and no folder of the user's."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX starts; set JAX_PLATFORMS=cuda to test there


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Tokens are cached in a folder of this run's, unless the caller has chosen one."""
    before = os.environ.get("DIFFRWKV_CACHE")
    if before is None:
        os.environ["DIFFRWKV_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["DIFFRWKV_CACHE"]
