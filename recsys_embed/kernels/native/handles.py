"""Integer handles for Python objects, because torch operators only take tensors and numbers."""

from __future__ import annotations

from itertools import count
from weakref import WeakValueDictionary

KNOWN: WeakValueDictionary[int, object] = WeakValueDictionary()
_NUMBERS = count()


def handle_of(thing: object) -> int:
    """A number by which :data:`KNOWN` holds ``thing`` while it is alive."""
    number = next(_NUMBERS)
    KNOWN[number] = thing
    return number
