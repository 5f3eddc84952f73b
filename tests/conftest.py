"""Fixtures that several test files share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import config

# Tests run side by side, and tiny networks gain nothing from threads that wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts its background jobs with Ctrl-C ignored, and some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["worlds"]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real scans are not there (../shared/data beside the checkout)")
    return folder


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """For tests that pass arguments of a wrong shape, which the run-time checker would refuse before medgen does."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
