"""Tests run on CPU unless JAX_PLATFORMS says otherwise; what needs other hardware is counted as skipped."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest
from hypothesis import HealthCheck, settings

# Before jax is imported: a CUDA plugin or libtpu without its device would warn, and warnings are errors here.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The oracle's products are small: BLAS threads would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# No test may read, or change, the configs that the developer of this machine has tuned.
os.environ["RPA_CACHE_DIR"] = tempfile.mkdtemp(prefix="rpa-tests-")


# A machine under load is no fault of a test.
settings.register_profile("rpa", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rpa")


def pytest_configure() -> None:
    # A shell that starts the run in the background has SIGINT ignored, for us and our children: Ctrl-C is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def _missing(item: pytest.Item) -> str | None:
    """Why this machine cannot run `item`, or None."""
    if "slow" in item.keywords and not item.config.getoption("--slow"):
        return "minutes long: run with --slow"
    for chip in ("gpu", "tpu"):
        if chip in item.keywords:
            import jax

            if jax.default_backend() != chip:
                platform = "cuda" if chip == "gpu" else chip
                return f"needs a {chip.upper()}: run by hand on one with JAX_PLATFORMS={platform}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = _missing(item)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
