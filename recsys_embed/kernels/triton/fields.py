"""Encodes lookup programs as integer tables for the GPU kernels.

A *job* is the work of one program of the forward kernel on a tile of samples: all row lookups of a feature that share
output columns. A *read* reads one row of one table per sample: the row of a row lookup, or its learned weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys_embed.kernels.native.records import TRANSFORM

JOB = (
    "ids",
    "feature",
    "first",
    "row_lookups",
    "limit",
    "optional",
    "out",
    "stride",
    "column",
    "span",
    "product",
    "plain",
)
# Divisors come with their reciprocals, because 64-bit division is slow on a GPU. `steps`: iterations of the binary
# search among `count` ids.
MAP = (*(TRANSFORM.names or ()), "div_inverse", "mod_inverse", "p_inverse", "size_inverse", "steps")
PLACE = ("storage", "base", "rows", "width", "num_rows", "repeat", "has_sign", "sign", "kept", "own", "read")
WEIGHT = ("weight_storage", "weight_base", "weight_rows", "weight_kept", "weight_own", "weight_read")
ROW_LOOKUP = (*PLACE, *WEIGHT, *(f"of_{name}" for name in MAP), *(f"weight_of_{name}" for name in MAP))
READ = ("storage", "base", "rows", "own", "at", "stride", "column", "num_rows", "path", "buffer")
SORTED, SMALL = 0, 1
_SMALL_BYTES = 1 << 17
_INVERTED = {"div_inverse": "div", "mod_inverse": "mod", "p_inverse": "p", "size_inverse": "size"}


def inverse(divisor: int) -> int:
    """``floor((2**64 - 1) / divisor)`` as int64 bits: its high product with x is the quotient, or one less.

    >>> [inverse(d) % 2**64 for d in (1, 2, 10)] == [2**64 - 1, 2**63 - 1, (2**64 - 1) // 10]
    True
    """
    value = (2**64 - 1) // max(divisor, 1)
    return value - 2**64 if value >= 2**63 else value


@dataclass(frozen=True)
class Tables:
    """The integers of a collection's programs.

    Args:
        jobs, row_lookups, reads: int64, a column per name of ``JOB``, ``ROW_LOOKUP`` and ``READ``.
        scales: float32, per row lookup.
        read_scales: float32, factor of the gradient per read.
        kept: elements per sample that forward saves for backward.
        own: floats per sample of gradients that are computed apart from those of the output.
    """

    jobs: NDArray[Any]
    row_lookups: NDArray[Any]
    scales: NDArray[Any]
    reads: NDArray[Any]
    read_scales: NDArray[Any]
    kept: int
    own: int

    def column(self, table: str, name: str) -> NDArray[Any]:
        """One column of ``jobs``, ``row_lookups`` or ``reads`` by name."""
        names = {"jobs": JOB, "row_lookups": ROW_LOOKUP, "reads": READ}[table]
        found: NDArray[Any] = getattr(self, table)[:, names.index(name)]
        return found


def _map(record: Any, prefix: str) -> dict[str, int]:
    fields = {name: int(record[name]) for name in TRANSFORM.names or ()}
    fields |= {name: inverse(fields[of]) for name, of in _INVERTED.items()} | {"steps": fields["count"].bit_length()}
    return {prefix + name: value for name, value in fields.items()}


def _give_buffers(reads: Sequence[dict[str, Any]]) -> None:
    """Set the offset of each small table in its storage's buffer of gradients."""
    starts: dict[tuple[int, int], int] = {}
    ends: dict[int, int] = {}
    for read in reads:
        storage, key = read["storage"], (read["storage"], read["base"])
        if read["path"] == SMALL and key not in starts:
            starts[key] = ends.get(storage, 0)
            ends[storage] = starts[key] + read["rows"]
        read["buffer"] = starts.get(key, -1)


class _Layout:
    """Builder of :class:`Tables`."""

    def __init__(self, widths: Sequence[int]) -> None:
        self.starts, self.widths = np.concatenate([[0], np.cumsum(widths)]), widths
        self.jobs: list[dict[str, int]] = []
        self.row_lookups: list[dict[str, int]] = []
        self.scales: list[float] = []
        self.reads: list[dict[str, Any]] = []
        self.kept = self.own = 0

    def add(self, number: int, feature: Any, row_lookups: NDArray[Any]) -> None:
        """Add a feature: a job per range of columns that row lookups share, and one for columns without any."""
        output = int(feature["output"])
        job = {"ids": int(feature["ids"]), "feature": number, "limit": int(feature["limit"])}
        job |= {"optional": int(feature["optional"]), "plain": int(feature["plain"])}
        job |= {"out": int(self.starts[output]), "stride": self.widths[output]}
        at = int(feature["column"])
        for column in sorted({int(p["column"]) for p in row_lookups}):
            joined = [p for p in row_lookups if p["column"] == column]
            place = {"column": at + column, "span": int(joined[0]["span"]), "product": int(joined[0]["product"])}
            self.jobs.append({**job, **place, "first": len(self.row_lookups), "row_lookups": len(joined)})
            for p in joined:
                self._add_row_lookup(self.jobs[-1], p)
        if feature["padding"]:
            place = {"column": at + int(feature["width"] - feature["padding"]), "span": int(feature["padding"])}
            self.jobs.append({**job, **place, "product": 0, "first": 0, "row_lookups": 0})

    def _add_row_lookup(self, job: Mapping[str, int], p: Any) -> None:
        width, elements = int(p["width"]), int(p["num_rows"] * p["width"])
        table = {"storage": int(p["storage"]), "base": int(p["base"]), "rows": int(p["rows"])}
        row_lookup = {**table, "width": width, "num_rows": int(p["num_rows"]), "repeat": int(p["span"] != elements)}
        row_lookup |= {"has_sign": int(p["has_sign"]), "sign": int(p["sign"]), "kept": self.kept, "own": self.own}
        row_lookup |= {name: int(p[name]) for name in ("weight_storage", "weight_base", "weight_rows")}
        row_lookup |= _map(p["of"], "of_") | _map(p["weight_of"], "weight_of_")
        if job["plain"]:
            gradient = {"own": 0, "at": job["out"], "stride": job["stride"], "column": job["column"]}
        else:
            gradient = {"own": 1, "at": self.own, "stride": elements, "column": 0}
            self.kept, self.own = self.kept + elements, self.own + elements
        read = {**table, **gradient, "num_rows": int(p["num_rows"]), "width": width, "of": (row_lookup, "read")}
        self.reads.append({**read, "scale": float(p["scale"]) if job["plain"] else 1.0})
        self.row_lookups.append(row_lookup)
        self.scales.append(float(p["scale"]))

    def add_weights(self) -> None:
        """Add the reads of learned weights after those of all rows, so that rows stay aligned."""
        for row_lookup in self.row_lookups:
            if row_lookup["weight_storage"] < 0:
                continue
            row_lookup["weight_kept"], row_lookup["weight_own"] = self.kept, self.own
            table = {name: row_lookup["weight_" + name] for name in ("storage", "base", "rows")}
            gradient = {"own": 1, "at": self.own, "stride": 1, "column": 0, "scale": 1.0}
            self.reads.append({**table, **gradient, "num_rows": 1, "width": 1, "of": (row_lookup, "weight_read")})
            self.kept, self.own = self.kept + 1, self.own + 1

    def order_reads(self) -> None:
        """Sort the reads by storage, and within it those of large tables first, so that both kinds are contiguous."""
        # All reads of a table are of one kind, because each row must be updated once.
        runs = {(read["storage"], read["base"]) for read in self.reads if read["num_rows"] > 1}
        for read in self.reads:
            small = 4 * read["rows"] * read["width"] <= _SMALL_BYTES or (read["storage"], read["base"]) in runs
            read["path"] = SMALL if small else SORTED
        self.reads.sort(key=lambda read: (read["storage"], read["path"], read["base"]))
        _give_buffers(self.reads)
        for i, read in enumerate(self.reads):
            row_lookup, name = read["of"]
            row_lookup[name] = i


def _integers(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> NDArray[Any]:
    return np.array([[r.get(n, -1) for n in names] for r in records], np.int64).reshape(len(records), len(names))


def lay_out(features: NDArray[Any], row_lookups: NDArray[Any], widths: Sequence[int]) -> Tables:
    """Jobs, row lookups and reads of encoded programs.

    Args:
        features, row_lookups: as :func:`recsys_embed.kernels.native.records.encode` returns them.
        widths: columns of each output.
    """
    layout = _Layout(widths)
    for number, feature in enumerate(features):
        layout.add(number, feature, row_lookups[feature["first"] : feature["first"] + feature["row_lookups"]])
    layout.add_weights()
    layout.order_reads()
    return Tables(
        _integers(layout.jobs, JOB),
        _integers(layout.row_lookups, ROW_LOOKUP),
        np.array(layout.scales, np.float32),
        _integers(layout.reads, READ),
        np.array([read["scale"] for read in layout.reads], np.float32),
        layout.kept,
        layout.own,
    )
