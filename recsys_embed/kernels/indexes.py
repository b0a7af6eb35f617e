"""The index arrays of many programs, end to end, as buffers that a lookup reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from recsys_embed.core.index import Index, IndexArrays
from recsys_embed.core.transforms import Transform
from recsys_embed.errors import CheckpointError, ConfigError, raise_faults


class IndexStore(nn.Module):
    """Buffers of all indexes of a module; without any, it holds nothing.

    Args:
        indexes: per program. Each starts as if ids were numbered by falling frequency.
    """

    def __init__(self, indexes: Sequence[Sequence[Index]]) -> None:
        super().__init__()
        self.indexes = [{i.name: i for i in row if i.arrays} for row in indexes]
        lengths: dict[tuple[tuple[str, torch.dtype], ...], int] = {}
        self._places: list[dict[str, int]] = []
        for row in self.indexes:
            self._places.append({})
            for index in row.values():
                kind = tuple((a.name, a.dtype) for a in index.arrays)
                self._places[-1][index.name] = lengths.get(kind, 0)
                lengths[kind] = lengths.get(kind, 0) + index.arrays[0].length
        self._longest = max((i.searched for row in self.indexes for i in row.values()), default=0)
        # The arrays of one kind of index stand side by side, so that kernels find all from the first.
        self._slots: dict[str, int] = {}
        for kind, length in lengths.items():
            for name, dtype in kind:
                if name in self._slots:
                    raise ConfigError(f"two kinds of indexes name an array {name!r}; rename it in one of them")
                self._slots[name] = len(self._slots)
                # By hand, for an array may have the name of a method here.
                self._buffers[name] = torch.zeros(length, dtype=dtype)
        self.reset()

    @property
    def arrays(self) -> IndexArrays:
        # Not by attribute, which torch finds last of all.
        return IndexArrays(cast("dict[str, Tensor]", self._buffers), self._longest)

    @property
    def device(self) -> torch.device:
        """Of the buffers; the CPU where there are none."""
        return next((b.device for b in self.buffers()), torch.device("cpu"))

    def slot(self, program: int, name: str | None) -> int:
        """Position of an index's first array among the buffers; 0 for None."""
        return 0 if name is None else self._slots[self.indexes[program][name].arrays[0].name]

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self.buffers())

    def places(self, program: int) -> Mapping[str, int]:
        """Where each index of a program begins in the arrays of its form."""
        return self._places[program]

    def at(self, program: int, name: str | None) -> int:
        """Where one index begins; 0 for None."""
        return 0 if name is None else self._places[program][name]

    def reset(self) -> None:
        """Ids are numbered by falling frequency."""
        for program, row in enumerate(self.indexes):
            for index in row.values():
                if self.device.type != "meta":
                    self._write(program, index, index.initial(self.device))

    @torch.no_grad()
    def assign_(self, program: int, counts: Tensor | Mapping[str, Tensor]) -> None:
        """Fill the indexes of a program from ``counts [size]``; ties go to the smaller id.

        Args:
            program: its position.
            counts: or, by name of the index, what it is to hold: the distinct ids of a set, the codes of all ids.

        Raises:
            ConfigError: counts of another shape, or not all finite numbers >= 0; values that do not
                fit their index.
        """
        if isinstance(counts, Mapping):
            self._assign_values(program, counts)
            return
        takers = [i for i in self.indexes[program].values() if i.by_frequency]
        for index in takers:
            counts = torch.as_tensor(counts)
            if counts.shape != (index.size,):
                raise ConfigError(f"`counts` must be [{index.size}], one per id; got shape {tuple(counts.shape)}")
            if not (torch.isfinite(counts) & (counts >= 0)).all():
                raise ConfigError("`counts` must be finite numbers >= 0")
        if takers:
            order = torch.argsort(counts.to(self.device), descending=True, stable=True)
            for index in takers:
                self._write(program, index, index.ranked(order))

    def _assign_values(self, program: int, values: Mapping[str, Tensor]) -> None:
        faults = []
        known = self.indexes[program]
        sound = {}
        for name, given in values.items():
            if name not in known:
                faults.append(f"no index {name!r} holds anything here; there are: {', '.join(known) or 'none'}")
                continue
            try:
                sound[name] = known[name].packed(given)
            except ConfigError as e:
                faults.append(str(e))
        raise_faults(faults, "values of indexes")
        for name, arrays in sound.items():
            self._write(program, known[name], arrays)

    def value(self, program: int, name: str) -> Tensor:
        """What an index holds, as ``assign_`` takes it: of a set its ids, ascending, int64 ``[count]``."""
        return self.indexes[program][name].value(self._places[program][name], self.arrays)

    def rows(self, program: int, transform: Transform, ids: Tensor) -> Tensor:
        """Rows of ids that a program's transform gives, see :meth:`Transform.rows`."""
        return transform.rows(ids, self.at(program, transform.reads), self.arrays)

    def owners(self, program: int, transform: Transform, ids: int) -> Tensor | None:
        """Ids that have a row of a program's transform to themselves, see :meth:`Transform.owners`."""
        return transform.owners(ids, self.at(program, transform.reads), self.arrays)

    def _write(self, program: int, index: Index, arrays: Mapping[str, Tensor]) -> None:
        if self.device.type == "meta":
            return
        at = self._places[program][index.name]
        for a in index.arrays:
            cast("Tensor", self._buffers[a.name])[at : at + a.length] = arrays[a.name].to(self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_meta = self.device.type == "meta"
        super()._apply(fn, recurse)
        if was_meta and self.device.type != "meta":
            self.reset()
        return self

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = {name: state_dict.get(prefix + name) for name, held in self.named_buffers() if held.numel()}
        own = self.arrays.held
        if all(isinstance(t, Tensor) and not t.is_meta and t.shape == own[n].shape for n, t in saved.items()):
            raise_faults(self._damage(saved), f"index at {prefix.rstrip('.')}", CheckpointError)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _damage(self, saved: Mapping[str, Any]) -> list[str]:
        """What keeps saved arrays from being those of the indexes: rows beyond the tables would be read."""
        faults = []
        for program, row in enumerate(self.indexes):
            for index in row.values():
                at = self._places[program][index.name]
                faults.append(index.damage({a.name: saved[a.name][at : at + a.length] for a in index.arrays}))
        return [fault for fault in faults if fault is not None]
