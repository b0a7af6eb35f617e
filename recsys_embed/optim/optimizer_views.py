"""What ``param_groups`` and ``state`` of a fused optimizer return: gathered anew, so that changes would be lost."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, cast

from torch import Tensor, nn

from recsys_embed.errors import ConfigError
from recsys_embed.utils.types import JSON


def _refuse(self: object, *_: object, **__: object) -> NoReturn:
    raise ConfigError(
        "param_groups and state of a fused_optimizer are gathered from the tables and the dense optimizer, so that a "
        "change of the list or the dict would be lost; use add_param_group(group), load_state_dict(), or "
        "`optimizer.state = {}` to start anew"
    )


_REFUSED = cast("Any", _refuse)


class ParamGroups(list[JSON]):
    """The groups; each is the optimizer's own dict, which may change."""

    append = extend = insert = pop = remove = clear = sort = reverse = _REFUSED
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _REFUSED

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return list, (list(self),)


# Modules that go through the parameters of an optimizer without reading their values.
_READ_NO_VALUES = (
    "torch.optim.", "torch.amp.", "torch.nn.utils.clip_grad", "torch.distributed.", "recsys_embed.", "lightning.",
    "pytorch_lightning.", "accelerate.", "transformers.",
)  # fmt: skip


class GroupTables(list[nn.Parameter]):
    """The tables of a param group, whose deferred steps are applied before somebody reads them.

    Args:
        tables: of some modules.
        catch_up: applies the deferred steps.
    """

    def __init__(self, tables: Iterable[nn.Parameter], catch_up: Callable[[], object]) -> None:
        super().__init__(tables)
        self._catch_up = catch_up

    def _before_reading(self) -> None:
        if not f"{sys._getframe(2).f_globals.get('__name__')}.".startswith(_READ_NO_VALUES):
            self._catch_up()

    def __iter__(self) -> Iterator[nn.Parameter]:
        self._before_reading()
        return super().__iter__()

    def __getitem__(self, at: Any) -> Any:
        self._before_reading()
        return super().__getitem__(at)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return list, (list(self),)


class OptimizerState(defaultdict[Tensor, JSON]):
    """By parameter, the tensors of its state; a parameter may be given tensors for those that it has.

    Args:
        state: by parameter.
        change: sets the state of a parameter.
    """

    def __init__(self, state: Mapping[Tensor, JSON], change: Callable[[Tensor, JSON], None]) -> None:
        super().__init__(dict, state)
        self._change = change

    pop = popitem = clear = update = setdefault = __delitem__ = __ior__ = _REFUSED

    def __missing__(self, key: Tensor) -> JSON:
        return {}

    def __setitem__(self, key: Tensor, value: JSON) -> None:
        # Trainers move states between devices so.
        self._change(key, value)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return dict, (dict(self),)
