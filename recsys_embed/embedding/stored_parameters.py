"""The parameters of a module whose ``weight`` is computed: what takes it for one of them is refused in words."""

from __future__ import annotations

from typing import Any

from recsys_embed.errors import ConfigError


class StoredParameters(dict[str, Any]):
    """The dictionary of a module's parameters, none of which is called ``weight``.

    Utilities of torch that put a computed tensor in the place of a parameter (``weight_norm``, ``spectral_norm``,
    parametrizations) read and delete the parameter here.
    """

    def __missing__(self, name: str) -> Any:
        if name == "weight":
            self.refuse()
        raise KeyError(name)

    def __delitem__(self, name: str) -> None:
        if name == "weight" and name not in self:
            self.refuse()
        super().__delitem__(name)

    def refuse(self) -> None:
        """Raise the error of taking ``weight`` for a parameter."""
        names = " or ".join(map(repr, self)) or "none"
        raise ConfigError(
            "`weight` of a compressed embedding is computed from smaller tables and is no parameter; name a stored "
            f"table instead ({names}), or turn it back into a plain table first: recsys_embed.materialize_(model)"
        )
