"""A lookup that is built at its first call, so that modules with one can be pickled and loaded without triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from recsys_embed.core.program import LookupProgram
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.kernels.native.records import Slot
from recsys_embed.kernels.places import Place

if TYPE_CHECKING:
    from recsys_embed.kernels.triton.lookup import TritonLookup


class LazyLookup:
    """Builds a :class:`TritonLookup` at the first call; pickles only contain its arguments."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments
        self._made: TritonLookup | None = None

    @classmethod
    def single(cls, name: str, program: LookupProgram, index: IndexStore, optional: bool) -> Self:
        """A lookup of one program in its own tables, as drop-in modules use it.

        Args:
            name: of the feature.
            program: with transforms that the kernels know.
            index: of the program.
            optional: an id of -1 means no id.
        """
        tables = [t for t in program.tables if not t.dense]
        places = {t.name: Place(t.name, 0) for t in tables}
        shapes = {t.name: (t.rows, t.width) for t in tables}
        width = program.combined_width
        return cls([name], [program], [places], index, shapes, [Slot(0, 0)], [width], [0], [-1], [optional])

    def __reduce__(self) -> tuple[Any, ...]:
        return LazyLookup, self._arguments

    @property
    def lookup(self) -> TritonLookup:
        """The lookup, built at the first call."""
        if self._made is None:
            from recsys_embed.kernels.triton.lookup import TritonLookup

            self._made = TritonLookup(*self._arguments)
        return self._made

    def __call__(
        self, ids: Tensor, tables: Sequence[Tensor], *, step: Any = None, sparse: bool = False
    ) -> tuple[Tensor, ...]:
        """See :func:`recsys_embed.kernels.triton.autograd.look_up`."""
        from recsys_embed.kernels.triton.autograd import look_up

        return look_up(self.lookup, ids, tables, step=step, sparse=sparse)
