"""Integer handles for Python objects: torch operators take tensors and numbers only."""

from __future__ import annotations

from itertools import count
from weakref import WeakValueDictionary

KNOWN: WeakValueDictionary[int, object] = WeakValueDictionary()
_NUMBERS = count()


def handle_of(thing: object) -> int:
    """A number under which :data:`KNOWN` has ``thing`` for as long as it lives."""
    number = next(_NUMBERS)
    KNOWN[number] = thing
    return number
