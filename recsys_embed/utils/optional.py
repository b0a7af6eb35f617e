"""Optional libraries load at first use, and a missing one says in one sentence how to get it."""

from __future__ import annotations

import importlib
from types import ModuleType

from recsys_embed.errors import MissingDependencyError
from recsys_embed.utils.versions import require_pair

_PAIRED = ("fbgemm_gpu", "torchrec")


def _reason(error: BaseException) -> str:
    """An error and what it was raised from: FBGEMM names the file that does not load, the error before the reason."""
    text = str(error) or type(error).__name__
    return text if error.__cause__ is None else f"{text} ({error.__cause__})"


def require(module: str, *, extra: str, purpose: str = "") -> ModuleType:
    """Import ``module`` or raise the sentence that names the fix.

    Args:
        module: dotted module name.
        extra: the extra of this distribution that installs it.
        purpose: what needs it, e.g. ``"reading Criteo files"``.

    Raises:
        MissingDependencyError: the library is not installed; or its version does not go with that of torch, which is
            checked before the import; or its import fails, on a machine without the driver of its build for instance.

    >>> require("math", extra="data").sqrt(4.0)
    2.0
    """
    top = module.partition(".")[0]
    if top in _PAIRED:
        require_pair()
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as e:
        if isinstance(e, MissingDependencyError):
            raise
        if not isinstance(e, ModuleNotFoundError) or (e.name or "").partition(".")[0] != top:
            raise MissingDependencyError(f"{top} is installed but cannot be imported: {_reason(e)}", name=top) from e
        who = f"{purpose} needs" if purpose else "this needs"
        raise MissingDependencyError(
            f"{who} {top}, which is not installed; run: pip install 'recsys-embed[{extra}]'", name=top
        ) from e
