"""Fixtures that several test files share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real scans are not there (../shared/data beside the checkout)")
    return folder


@pytest.fixture
def unchecked_types(request: pytest.FixtureRequest) -> None:
    """For tests that pass arguments of a wrong shape: with --jaxtyping-packages the checker refuses them first."""
    if request.config.getoption("--jaxtyping-packages", default=None):
        pytest.skip("run-time type checking is on, and refuses these arguments before medgen does")
