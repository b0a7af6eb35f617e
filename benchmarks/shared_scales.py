"""Squared rounding error by bytes of trained rows: one scale a row, for groups of columns, and for groups of rows.

    python -m benchmarks.shared_scales RUN/model.pt [...]

Prints, for each table of 8 columns or more, bytes per number, relative squared error, and the error over that of a
mixture of rows with one scale each at two precisions that takes the same bytes (as tiers do): what is below 1 pays.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from recsys_embed.core.precision import BITS, SEARCHES, Layout

COLUMNS = (16, 32, 64)
ROWS = (2, 4, 8)
MOST_ROWS = 40_000


def forms(width: int) -> Iterator[tuple[str, str, int, int]]:
    """Name, precision, numbers that share a scale, and rows that do."""
    for kind in BITS:
        yield f"{kind}, a row", kind, width, 1
        yield from ((f"{kind}, {c} columns", kind, c, 1) for c in COLUMNS if c < width and width % c == 0)
        yield from ((f"{kind}, {r} rows", kind, r * width, r) for r in ROWS)


def measured(rows: Tensor) -> list[tuple[float, float, str]]:
    """Bytes per number, relative squared error and name of each form."""
    found = []
    for name, kind, numbers, together in forms(rows.shape[1]):
        flat = rows[: len(rows) // together * together].reshape(-1, numbers)
        layout, lost = Layout(kind, numbers), 0.0
        for part in flat.split(1 << 14):
            lost += float((layout.decode(layout.encode(part, SEARCHES[kind])) - part).double().square().sum())
        found.append((layout.row_bytes / numbers, lost / float(flat.double().square().sum()), name))
    return sorted(found)


def of_mixture(size: float, plain: list[tuple[float, float, str]]) -> float | None:
    """Error of rows with a scale each, of the two precisions around a size; None beyond all sizes."""
    below, above = [p for p in plain if p[0] <= size], [p for p in plain if p[0] >= size]
    if not below or not above:
        return None
    (small, least, _), (large, most, _) = below[-1], above[0]
    part = 0.0 if large == small else (size - small) / (large - small)
    return least + part * (most - least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="state dicts, or model.pt of runs")
    torch.set_num_threads(1)
    for path in parser.parse_args().files:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, rows in state.get("model", state).items():
            if not isinstance(rows, Tensor) or rows.dim() != 2 or not rows.is_floating_point():
                continue
            if rows.shape[1] < 8 or len(rows) < 500:
                continue
            found = measured(rows[:MOST_ROWS].float())
            plain = [f for f in found if f[2].endswith("a row")]
            print(f"{path} {name} {tuple(rows.shape)}")
            for size, lost, what in found:
                mixed = of_mixture(size, plain)
                print(f"  {size:.4f} {lost:.2e} {what:18s} {'' if mixed is None else f'{lost / mixed:.2f}'}")


if __name__ == "__main__":
    main()
