"""Serving raw rows needs polars."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("polars", reason="raw rows need polars")
sys.path.insert(0, str(Path(__file__).parent))
