"""Models given on the command line as ``package.module:function``."""

from __future__ import annotations

import importlib
import sys
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys_embed.errors import ConfigError, RecsysEmbedError

if TYPE_CHECKING:
    from torch import nn

FORM = "package.module:function, where function() returns a torch.nn.Module"


def _reason(error: BaseException) -> str:
    """Type and first line of an error's text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _missing(name: str) -> bool:
    """Whether no module of that name exists; imports its parents, which must exist."""
    parent, _, _ = name.rpartition(".")
    if name in sys.modules:
        return False
    return (parent != "" and not hasattr(importlib.import_module(parent), "__path__")) or find_spec(name) is None


def _import(name: str, text: str) -> Any:
    importlib.invalidate_caches()
    parts = name.split(".")
    try:
        # Part by part, to distinguish a missing module from one whose import fails.
        for part in (".".join(parts[: i + 1]) for i in range(len(parts))):
            if _missing(part):
                raise ConfigError(
                    f"--model-factory {text!r}: there is no module {part!r} in {Path.cwd()} or among "
                    "the installed packages"
                )
        return importlib.import_module(name)
    except RecsysEmbedError:
        raise
    except (Exception, SystemExit) as e:
        raise ConfigError(f"--model-factory {text!r}: importing {name!r} failed: {_reason(e)}") from e


def load_target(text: str) -> nn.Module:
    """Call the function that ``text`` names and return the model it makes.

    The working directory becomes the first place of imports, as with ``python -m``, and stays it: models import more
    when they run.

    Args:
        text: ``package.module:function``; ``function`` may be dotted (``Class.method``) and takes no arguments.

    Raises:
        ConfigError: no such module or attribute, not callable, it raised, or did not return a ``torch.nn.Module``.

    >>> load_target("torch.nn:Identity")
    Identity()
    >>> load_target("torch.nn:Identitty")
    Traceback (most recent call last):
    recsys_embed.errors.ConfigError: --model-factory 'torch.nn:Identitty': torch.nn has no 'Identitty'; did you mean ...
    """
    from torch import nn

    module_name, colon, attribute = text.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise ConfigError(f"--model-factory takes {FORM}; got {text!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    found, where = _import(module_name, text), module_name
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"--model-factory {text!r}: {where} has no {part!r}{hint}")
        found, where = getattr(found, part), f"{where}.{part}"
    if isinstance(found, nn.Module) or not callable(found):
        kind = "a model already" if isinstance(found, nn.Module) else f"of type {type(found).__name__}"
        raise ConfigError(f"--model-factory takes {FORM}; {where} is no function but {kind}")
    try:
        model = found()
    except RecsysEmbedError:
        raise
    except (Exception, SystemExit) as e:
        raise ConfigError(f"--model-factory {text!r}: {where}() failed: {_reason(e)}") from e
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model-factory takes {FORM}; {where}() returned a {type(model).__name__}")
    return model
