"""Integer handles for Python objects, because torch operators only take tensors and numbers."""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from itertools import count
from pathlib import Path
from weakref import WeakValueDictionary

from recsys_embed._version import __version__

KNOWN: WeakValueDictionary[int, object] = WeakValueDictionary()
_NUMBERS = count()


def handle_of(thing: object, layout: object = None) -> int:
    """A number by which :data:`KNOWN` holds ``thing`` while it is alive.

    torch keeps compiled programs on disk by the text of the calls in them, without the operators' schemas, the shapes
    of what they return or their backward. Handles are constants in that text, so they name these: the operators' code
    and ``layout``. Else a program that another version of this package compiled, or one of another lookup, would run.

    Args:
        layout: what the number and shapes of an operator's results depend on, beside its arguments.
    """
    digest = blake2b(_operators() + repr(layout).encode(), digest_size=4).digest()
    number = int.from_bytes(digest, "little") >> 1 << 32 | next(_NUMBERS)
    KNOWN[number] = thing
    return number


@cache
def _operators() -> bytes:
    """The code of the operators that take handles."""
    here = Path(__file__).parent
    try:
        return (here / "ops.py").read_bytes() + (here.parent / "gather_ops.py").read_bytes()
    except OSError:  # installed without its sources
        return __version__.encode()
