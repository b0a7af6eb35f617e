"""The shape of one line of Criteo's text: what each field is called and which byte separates them."""

from __future__ import annotations

from dataclasses import dataclass

NUM_INTS = 13
NUM_CATS = 26
INT_NAMES = tuple(f"I{i}" for i in range(1, NUM_INTS + 1))
CAT_NAMES = tuple(f"C{i}" for i in range(1, NUM_CATS + 1))
MAX_LINE_BYTES = 64 * 1024
"""A longer line is a bad row: real rows have under 400 bytes, so such a line is binary junk or a lost newline."""

RESERVED_ID = 1 << 63
"""The one 64-bit category no row may contain: as a signed number it is the id of the empty field."""


@dataclass(frozen=True)
class LineLayout:
    """How the lines of a file are written.

    Args:
        labels: whether the first field is the click label; Kaggle's test file has none.
        separator: the byte between fields, tab in Criteo's own files.
        id_bits: 32 allows categories of up to 8 hex digits, 64 of up to 16.

    >>> LineLayout().num_fields, LineLayout(labels=False).names[0]
    (40, 'I1')
    """

    labels: bool = True
    separator: str = "\t"
    id_bits: int = 32

    @property
    def names(self) -> tuple[str, ...]:
        """Field names in file order."""
        return (("label",) if self.labels else ()) + INT_NAMES + CAT_NAMES

    @property
    def num_fields(self) -> int:
        return len(self.names)

    @property
    def hex_digits(self) -> int:
        """Most hex digits a category may have."""
        return self.id_bits // 4
