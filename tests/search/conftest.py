"""Searches write many checkpoints; waiting for the disk each time would only make the tests slow."""

from tests.train.conftest import _no_waiting_for_the_disk  # noqa: F401
