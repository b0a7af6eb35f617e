"""Data tests need polars."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("polars", reason="data folders need polars")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 500 rows in several shards of uneven size."""
    from helpers import random_rows, write

    from recsys_embed.data import CriteoOptions, convert_criteo
    from recsys_embed.data import text_blocks as source
    from recsys_embed.data.criteo import ingest

    base = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "BLOCK_BYTES", 16_000)
        patch.setattr(ingest, "part_blocks", lambda options: 1)
        convert_criteo(write(base / "a.tsv", random_rows(500, 6, values=200)), base / "out", CriteoOptions(min_count=1))
    return base / "out"
