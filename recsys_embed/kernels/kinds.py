"""Transforms as records of 64-bit fields: the one table of their kinds and fields that all kernels go by.

Kernels in Triton read it where they are defined; for those in C++ ``python recsys_embed/kernels/kinds.py`` writes it to
``ops/cpu/transforms.h``, and a compiled library of another table is refused when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

KINDS = ("digit", "hash", "murmur", "range", "bitmap", "sorted", "identity", "codes")
FIELDS: Mapping[str, tuple[str, ...]] = {
    "one of Kind": ("kind",),
    "DIGIT: ((a x + b) % p) / div % mod; mod 0 keeps the quotient": ("div", "mod", "affine", "a", "b", "p"),
    "HASH: ids below num_frequent keep themselves, or have no row": (
        "salt",
        "size",
        "stride",
        "offset",
        "num_frequent",
        "absent",
    ),
    "MURMUR, with salt as its seed": ("word",),
    "RANGE, BITMAP, SORTED; others hash into `rest` rows behind the members": ("start", "count", "rest"),
    "CODES: number x * stride + offset of `bits` bits": ("bits",),
    "index: its first array among those of a call, and where it begins in each": ("array", "at"),
}
"""What is said of fields, and their names; a kind may use those of another."""
NAMES = tuple(name for names in FIELDS.values() for name in names)
LAYOUT = f"{' '.join(KINDS)}; {' '.join(NAMES)}"


def header() -> str:
    """The table as C++."""
    kinds = ", ".join(f"{kind.upper()} = {number}" for number, kind in enumerate(KINDS))
    fields = "\n".join(f"  i64 {', '.join(names)};  // {text}" for text, names in FIELDS.items())
    return f"""// Written by recsys_embed/kernels/kinds.py, which says how; do not edit.
#pragma once

enum Kind : i64 {{ {kinds} }};

// From ids to rows of one table; -1 where an id has none.
struct Transform {{
{fields}
}};

constexpr char TRANSFORM_LAYOUT[] = "{LAYOUT}";
"""


if __name__ == "__main__":
    top = next(p for p in Path(__file__).resolve().parents if (p / "ops/cpu").is_dir())
    (top / "ops/cpu/transforms.h").write_text(header())
