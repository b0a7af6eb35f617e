"""Criteo rows as Python values, written as text by the plainest code there is."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import torch

from recsys_embed.data import Batch
from recsys_embed.data.criteo.explain import GoodRow

TAB = b"\t"


def line(row: GoodRow, separator: bytes = TAB) -> bytes:
    """One row as text without newline."""
    cells = [] if row.label is None else [str(row.label)]
    cells += ["" if v is None else str(v) for v in row.ints]
    cells += ["" if v is None else f"{v:08x}" for v in row.cats]
    return separator.join(c.encode() for c in cells)


def random_rows(count: int, seed: int, *, labels: bool = True, values: int = 20) -> list[GoodRow]:
    """Rows with few distinct values per field, blanks and negatives among them."""
    rng = random.Random(seed)
    pools = [[rng.getrandbits(32) for _ in range(1 + rng.randrange(values))] + [None] for _ in range(26)]
    return [
        GoodRow(
            rng.randrange(2) if labels else None,
            tuple(rng.choice([None, 0, 1, 2, 3, -1, -2, rng.randrange(10**6)]) for _ in range(13)),
            tuple(rng.choice(pool) for pool in pools),
        )
        for _ in range(count)
    ]


def write(path: Path, rows: list[GoodRow], *, header: bool = False, newline: bytes = b"\n", last: bool = True) -> Path:
    """Write rows as a Criteo file, gzipped if the name says so."""
    lines = [line(r) for r in rows]
    if header:
        names = (["label"] if rows[0].label is not None else []) + [f"I{i}" for i in range(1, 14)]
        lines.insert(0, TAB.join(n.encode() for n in names + [f"C{i}" for i in range(1, 27)]))
    text = newline.join(lines) + (newline if last else b"")
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def read_folder(out: Path) -> dict[str, list[dict[str, object]]]:
    """Rows of every split as dictionaries, in file order."""
    import polars as pl

    from recsys_embed.data.manifest import read_manifest

    splits = read_manifest(out).splits
    return {n: [r for s in v.shards for r in pl.read_parquet(out / s.file).to_dicts()] for n, v in splits.items()}


def contents(out: Path, *, schema: bool = True) -> dict[str, bytes]:
    """Bytes of all files of a data folder, the lock aside."""
    skip = {".lock"} | (set() if schema else {"schema.json"})
    return {
        str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name not in skip
    }


def table(batches: list[Batch]) -> torch.Tensor:
    """All columns of batches side by side, float64: ids are below 2**53."""
    parts = [torch.cat([b.dense.double(), b.ids.double(), b.label.double()[:, None]], dim=1) for b in batches]
    return torch.cat(parts)
