"""What the collections of a supernet look up for one batch, handed out to many candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from recsys_embed.search.layers import table_numbers
from recsys_embed.search.supernet import Supernet, replaced


class BatchLookups:
    """Lookups of a batch in the order in which the model makes them: done for the first candidate, known to the others.

    Candidates differ in the columns of tables alone, which are masked after pooling as well as before it.

    Args:
        net: a supernet in evaluation mode, whose layer keeps all columns.
    """

    def __init__(self, net: Supernet) -> None:
        self._net = net
        self._fields = table_numbers(net.vectors.schema)
        self._found: dict[str, list[Tensor]] = {key: [] for key in net.collections()}
        self._next = dict.fromkeys(self._found, 0)

    @contextmanager
    def with_columns(self, columns: Tensor) -> Iterator[None]:
        """Inside, the model sees vectors of some columns, of 0 and 1: ``[tables, D]``."""
        self._next = dict.fromkeys(self._found, 0)
        schema, vectors = self._net.vectors.schema, self._net.vectors
        of_features = columns[self._fields]

        def of_all(key: str, look_up: Callable[..., Tensor], own: bool, *args: Any, **options: Any) -> Tensor:
            out = self._once(key, look_up, *args, **options)
            return out * of_features if own else out

        def of_one(key: str, look_up: Callable[..., Tensor], own: bool, feature: str, *args: Any) -> Tensor:
            out = self._once(key, look_up, feature, *args)
            return out * of_features[schema.names.index(feature)] if own else out

        with ExitStack() as stack:
            for key, collection in self._net.collections().items():
                own = collection is vectors
                methods = {
                    "forward": partial(of_all, key, collection.forward, own),
                    "lookup": partial(of_one, key, collection.lookup, own),
                }
                stack.enter_context(replaced(collection, **methods))
            yield

    def _once(self, key: str, look_up: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        at, found = self._next[key], self._found[key]
        self._next[key] = at + 1
        if at == len(found):
            found.append(look_up(*args, **options))
        return found[at]
