"""Data tests need polars."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("polars", reason="data folders need polars")
sys.path.insert(0, str(Path(__file__).parent))
