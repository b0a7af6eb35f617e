"""A client of the JSON beside an ONNX graph, as somebody else would write it: the standard library and its keys."""

from __future__ import annotations

import datetime as dt
import hashlib
import math
import struct
from typing import Any
from zoneinfo import ZoneInfo

Row = dict[str, Any]
EPOCH = dt.datetime(1970, 1, 1)
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def encode(about: dict[str, Any], rows: list[Row]) -> tuple[list[list[float]], list[list[list[int]]]]:
    """Numbers ``[B][num_dense]`` and ids ``[B][F][any]`` of rows."""
    dense, ids = [], []
    for row in rows:
        numbers: dict[str, float] = {}
        found: dict[str, list[int]] = {}
        for column in about["columns"]:
            value = row[column["column"]]
            made = KINDS[column["kind"]](column, value, about["vocabularies"])
            if "feature" in column:
                found[column["feature"]] = made
            else:
                numbers.update(zip(column["dense"], made, strict=True))
        dense.append([single(numbers[name]) for name in about["dense"]])
        ids.append([found[name] for name in about["features"]])
    return dense, ids


def inputs(about: dict[str, Any], rows: list[Row]) -> dict[str, list[Any]]:
    """What the graph takes: ``dense``, and ``ids``, or ``values`` and ``offsets`` of bags feature after feature."""
    dense, ids = encode(about, rows)
    bags = [row[f] for f in range(len(about["features"])) for row in ids]
    offsets = [0]
    for bag in bags:
        offsets.append(offsets[-1] + len(bag))
    known = {
        "dense": dense,
        "ids": [[bag[0] for bag in row if bag] for row in ids],
        "values": [i for bag in bags for i in bag],
        "offsets": offsets,
    }
    return {item["name"]: known[item["holds"]] for item in about["inputs"]}


def single(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


def missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def text(kind: str, value: Any) -> str:
    """A value as the vocabularies' texts have it."""
    if kind == "string":
        return str(value)
    if kind == "date":
        return str((value - EPOCH.date()).days)
    if kind == "time":
        return str((value - EPOCH) // dt.timedelta(microseconds=1))
    return str(int(value))


def hashed(kind: str, value: Any) -> int:
    """The 64-bit id of a value without a vocabulary."""
    if kind != "string":
        number = int(text(kind, value))
        return number - 2**64 if number >= 2**63 else number
    if len(value) in (8, 16) and all(c in "0123456789abcdefABCDEF" for c in value):
        number = int(value, 16)
    else:
        number = int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")
    return number - 2**64 if number >= 2**63 else number


def one(column: Row, value: Any, vocabularies: Any) -> int:
    if column["ids"] == "hash":
        return hashed(column["type"], value)
    return int(vocabularies[column["vocabulary"]].get(text(column["type"], value), column["unknown_id"]))


def categorical(column: Row, value: Any, vocabularies: Any) -> list[int]:
    return [column["missing_id"] if missing(value) else one(column, value, vocabularies)]


def many(column: Row, value: Any, vocabularies: Any) -> list[int]:
    pieces = [] if value is None else value if column["separator"] is None else value.split(column["separator"])
    if column["separator"] is not None:
        pieces = [piece.strip() for piece in pieces]
    if column["reverse"]:
        pieces = pieces[::-1]
    most = column["max_length"]
    if most is not None:
        pieces = pieces[:most] if column["keep"] == "first" else pieces[-most:]
    return [one(column, piece, vocabularies) for piece in pieces if not missing(piece)]


def steps(column: Row, value: Any) -> float | None:
    if missing(value):
        return None
    x = float(value)
    if column["clip"] is not None:
        x = min(max(x, column["clip"][0]), column["clip"][1])
    return math.copysign(math.log1p(abs(x)), x) if column["transform"] == "log" else x


def numeric(column: Row, value: Any, _: Any) -> list[float]:
    x = steps(column, value)
    if x is not None and "shift" in column:
        x = (x - column["shift"]) / column["scale"]
    return [column["fill"] if x is None else x, float(x is None)][: len(column["dense"])]


def bucket(column: Row, value: Any, _: Any) -> list[int]:
    x = steps(column, value)
    return [0 if x is None else 1 + sum(edge <= x for edge in column["edges"])]


def time(column: Row, value: Any, _: Any) -> list[float]:
    if missing(value):
        return [column["fill"][part] for part in column["parts"]]
    seconds = (value - EPOCH) // dt.timedelta(seconds=1) if isinstance(value, dt.datetime) else math.floor(
        value / PER_SECOND[column["unit"]]
    )  # fmt: skip
    when = dt.datetime.fromtimestamp(seconds, ZoneInfo(column["time_zone"]))
    parts = {
        "hour": when.hour + when.minute / 60 + when.second / 3600, "weekday": when.isoweekday(), "day": when.day,
        "month": when.month, "age": (column["latest"] - seconds) / 86_400,
    }  # fmt: skip
    return [float(parts[part]) for part in column["parts"]]


def vector(column: Row, value: Any, _: Any) -> list[float]:
    return [0.0] * column["width"] if value is None else [float(x) for x in value]


def criteo_log(column: Row, value: Any, _: Any) -> list[float]:
    shift = column["shift"]
    return [column["fill"] if value is None else math.log(max(value, 1 - shift) + shift)]


def criteo_bucket(column: Row, value: Any, vocabularies: Any) -> list[int]:
    if value is None:
        return [column["missing_id"]]
    number = math.floor(math.log(value) ** 2) if value > 2 else value
    return [number if column["ids"] == "hash" else vocabularies[column["vocabulary"]].get(str(number), 0)]


def criteo_category(column: Row, value: Any, vocabularies: Any) -> list[int]:
    if value is None:
        return [column["missing_id"]]
    number = int(value, 16)
    if column["ids"] == "hash":
        return [number - 2**64 if number >= 2**63 else number]
    return [vocabularies[column["vocabulary"]].get(f"{number:x}", 0)]


KINDS = {
    "categorical": categorical, "list": many, "sequence": many, "numeric": numeric, "bucket": bucket, "time": time,
    "vector": vector, "criteo_log": criteo_log, "criteo_bucket": criteo_bucket, "criteo_category": criteo_category,
}  # fmt: skip
