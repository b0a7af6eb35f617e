"""Encodes lookup programs as records of 64-bit fields for the native kernels (ops/cpu/program.h)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recsys_embed.core.program import LookupProgram, RowLookup, Transform
from recsys_embed.errors import ConfigError
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
    """Destination of a feature's vectors: ``column`` of output ``output``; ``mean``: bags are averaged, not summed."""

    output: int
    column: int
    mean: bool = False


def _transform(transform: Transform, index: IndexStore, program: int) -> dict[str, int]:
    """Fields of one transform; fields that are left out are 0.

    Raises:
        TypeError: the kernels do not know the transform.
        ConfigError: fields that no transform has.
    """
    kind, fields = transform.encoded() or (None, {})
    if kind not in KINDS:
        raise TypeError(f"no kernel for transform {type(transform).__name__}")
    wrong = {f: v for f, v in fields.items() if f not in NAMES or not -(2**63) <= int(v) < 2**63}
    if wrong:
        raise ConfigError(
            f"`encoded` of {type(transform).__name__} must name fields of recsys_embed.kernels.kinds.FIELDS "
            f"({', '.join(NAMES)}) with 64-bit integers; got {wrong}"
        )
    name = transform.reads
    return {**fields, "kind": KINDS.index(kind), "array": index.slot(program, name), "at": index.at(program, name)}


def _fill(record: np.void, fields: Mapping[str, int | float | bool]) -> None:
    for name, value in fields.items():
        record[name] = value


def supported(program: LookupProgram) -> bool:
    """Whether the kernels know every transform of a program."""
    return all((t.encoded() or ("",))[0] in KINDS for p in program.row_lookups for t in p.transforms)


def _joins(program: LookupProgram) -> list[int]:
    """How each row lookup combines with those before it in the same columns."""
    first: dict[tuple[int, int], int] = {}
    again = ADD if program.combine == "sum" else MUL
    return [STORE if first.setdefault(span, slot) == slot else again for slot, span in enumerate(program.spans)]


def _plain(program: LookupProgram) -> bool:
    """Whether the gradient of every row is that of the vector times a constant."""
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
    """Records of features and row lookups, and the number of floats per sample that forward saves for backward.

    Args:
        programs: one per feature.
        places: per feature, the places of its tables.
        storages: their names, in the order that the kernels receive them.
        index: of the programs.
        slots: per feature, the destination of its vectors.
        columns: per feature, its column in the matrix of ids.
        limits: per feature, the bound of its ids; -1 for any id.
        optional: per feature, whether an id of -1 means no id.
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

        joins = _joins(program)
        for slot, row_lookup in enumerate(program.row_lookups):
            record, (start, stop) = row_lookups[at], program.spans[slot]
            record["storage"], record["base"], record["rows"] = table(row_lookup.table)
            fields = {"width": program.table(row_lookup.table).width, "column": start, "span": stop - start}
            fields |= {
                "num_rows": row_lookup.num_rows,
                "join": joins[slot],
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
