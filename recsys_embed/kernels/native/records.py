"""Lookup programs as records of 64-bit fields, the form in which the native kernels read them (ops/cpu/program.h)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recsys_embed.core.program import LookupProgram, RowLookup, Transform
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.kernels.kinds import KINDS, NAMES
from recsys_embed.kernels.places import Place


def _fields(names: str) -> list[tuple[str, str]]:
    return [(name, "i8") for name in names.split()]


TRANSFORM = np.dtype(_fields(" ".join(NAMES)))
ROW_LOOKUP = np.dtype(
    [
        *_fields("storage base rows width column span num_rows join product has_sign sign"),
        *_fields("weight_storage weight_base weight_rows kept"),
        ("scale", "f8"),
        ("of", TRANSFORM),
        ("weight_of", TRANSFORM),
    ]
)
FEATURE = np.dtype(_fields("ids first row_lookups limit optional output column width padding plain mean"))
STORE, ADD, MUL = 0, 1, 2


@dataclass(frozen=True)
class Slot:
    """Where one feature's vectors go: ``column`` of output number ``output``; whether bags are averaged, not summed."""

    output: int
    column: int
    mean: bool = False


def _transform(transform: Transform, index: IndexStore, program: int) -> dict[str, int]:
    """Fields of one transform; those not named are 0.

    Raises:
        TypeError: the kernels do not know the transform.
    """
    kind, fields = transform.encoded() or (None, {})
    if kind not in KINDS:
        raise TypeError(f"no kernel for transform {type(transform).__name__}")
    name = transform.reads
    return {**fields, "kind": KINDS.index(kind), "array": index.slot(program, name), "at": index.at(program, name)}


def _fill(record: np.void, fields: Mapping[str, int | float | bool]) -> None:
    for name, value in fields.items():
        record[name] = value


def supported(program: LookupProgram) -> bool:
    """Whether the kernels know every transform of a program."""
    return all((t.encoded() or ("",))[0] in KINDS for p in program.row_lookups for t in p.transforms)


def _join(program: LookupProgram, slot: int) -> int:
    """What the row lookup does with what row lookups before it left in its columns."""
    if program.spans[slot] not in program.spans[:slot]:
        return STORE
    return ADD if program.combine == "sum" else MUL


def _plain(program: LookupProgram) -> bool:
    """Whether gradients reach every row as they are, but for a constant factor."""
    alone = len(set(program.spans)) == len(program.spans)

    def plain(row_lookup: RowLookup) -> bool:
        return row_lookup.weight is None and row_lookup.sign is None and row_lookup.width is None

    return (program.combine == "sum" or alone) and all(plain(p) for p in program.row_lookups)


def encode(
    programs: Sequence[LookupProgram],
    places: Sequence[Mapping[str, Place]],
    storages: Sequence[str],
    index: IndexStore,
    slots: Sequence[Slot],
    columns: Sequence[int],
    limits: Sequence[int],
    optional: Sequence[bool],
) -> tuple[NDArray[np.void], NDArray[np.void], int]:
    """Records of features and row lookups, and how many numbers per sample backward needs of what forward read.

    Args:
        programs: one per feature.
        places: per feature, where its tables lie.
        storages: names in the order in which the kernels get them.
        index: of the programs.
        slots: per feature, where its vectors go.
        columns: per feature, its column in the matrix of ids.
        limits: per feature, the bound of its ids; -1 for any id.
        optional: per feature, whether the id -1 is none.
    """
    features = np.zeros(len(programs), FEATURE)
    row_lookups = np.zeros(sum(len(p.row_lookups) for p in programs), ROW_LOOKUP)
    number = {name: i for i, name in enumerate(storages)}
    at = kept = 0
    for i, (program, place) in enumerate(zip(programs, places, strict=True)):
        feature = {"ids": columns[i], "first": at, "row_lookups": len(program.row_lookups), "limit": limits[i]}
        feature |= {"optional": optional[i], "output": slots[i].output, "column": slots[i].column}
        feature["mean"] = slots[i].mean
        _fill(
            features[i],
            feature | {"width": program.combined_width, "padding": program.padding, "plain": _plain(program)},
        )

        def table(name: str, program: LookupProgram = program, place: Mapping[str, Place] = place) -> tuple[int, ...]:
            """Storage, first row and number of rows of a table."""
            return number[place[name].storage], place[name].offset, program.table(name).rows

        for slot, row_lookup in enumerate(program.row_lookups):
            record, (start, stop) = row_lookups[at], program.spans[slot]
            record["storage"], record["base"], record["rows"] = table(row_lookup.table)
            fields = {"width": program.table(row_lookup.table).width, "column": start, "span": stop - start}
            fields |= {
                "num_rows": row_lookup.num_rows,
                "join": _join(program, slot),
                "product": program.combine == "mul",
            }
            _fill(record, fields | {"has_sign": row_lookup.sign is not None, "sign": row_lookup.sign or 0})
            record["scale"], record["weight_storage"] = row_lookup.scale, -1
            _fill(record["of"], _transform(row_lookup.transform, index, i))
            if row_lookup.weight is not None:
                record["weight_storage"], record["weight_base"], record["weight_rows"] = table(row_lookup.weight.table)
                _fill(record["weight_of"], _transform(row_lookup.weight.transform, index, i))
            if not features[i]["plain"]:
                record["kept"] = kept
                kept += row_lookup.num_rows * program.table(row_lookup.table).width + (row_lookup.weight is not None)
            at += 1
    return features, row_lookups, kept
