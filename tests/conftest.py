"""What all tests share: tiers, GPU tests only where there is a GPU, and hypothesis never fails for being slow."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import HealthCheck, settings

from tests import tiers

settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# In CI the same examples every time: a change that lands must not fail for an example that another change found.
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True, print_blob=True)
PROFILE = "ci" if os.environ.get("CI") else "dev"
settings.load_profile(PROFILE)


@pytest.fixture(autouse=True)
def _random_numbers_of_its_own() -> None:
    """A test begins at one state of torch's generator: what it draws depends on no test before it."""
    import torch

    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", choices=tiers.TIERS, default="fast", help="which tests to run (see tests/tiers.py)")
    parser.addoption("--seconds", type=float, default=0, help="skip tests that would begin later than this")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("tier") == "fast":
        # Properties that ask for no number of examples have a quarter of hypothesis's; `make test-all` runs them all.
        settings.register_profile("fast", parent=settings.get_profile(PROFILE), max_examples=25)
        settings.load_profile("fast")
    if config.getoption("seconds"):
        config.pluginmanager.register(tiers.Deadline(config.getoption("seconds")))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests of the tier; skip what is marked ``gpu`` where torch sees no CUDA device."""
    tiers.choose(config, items)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what is collected out of garbage collection, which would walk ten thousand tests each time."""
    gc.collect()
    gc.freeze()
