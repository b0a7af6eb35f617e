"""Other people's training stacks: ``make test-integrations`` runs these tests, in an environment of their own."""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = [] if os.environ.get("RECSYS_EMBED_INTEGRATIONS") else ["*.py"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
