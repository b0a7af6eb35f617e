"""The index arrays of many programs, end to end: sets of frequent ids as buffers a lookup reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from recsys_embed.core.id_sets import Index, IndexArrays, bitmap, popcount, ranks_of, words_of
from recsys_embed.core.transforms import Transform
from recsys_embed.errors import CheckpointError, ConfigError, raise_faults

_ARRAYS = {"bitmap": ("words", "ranks"), "sorted": ("values",)}


class IndexStore(nn.Module):
    """Buffers of all indexes of a module; without any, it holds nothing.

    Args:
        indexes: per program. Each starts as if ids were numbered by falling frequency.
    """

    def __init__(self, indexes: Sequence[Sequence[Index]]) -> None:
        super().__init__()
        self.indexes = [{i.name: i for i in row if i.form != "range"} for row in indexes]
        length = dict.fromkeys(_ARRAYS, 0)
        self._places: list[dict[str, int]] = []
        for row in self.indexes:
            self._places.append({})
            for index in row.values():
                self._places[-1][index.name] = length[index.form]
                length[index.form] += index.length
        self.steps = max((i.count for row in self.indexes for i in row.values()), default=0).bit_length()
        for name, size, dtype in (
            ("words", length["bitmap"], torch.int64),
            ("ranks", length["bitmap"], torch.int32),
            ("values", length["sorted"], torch.int32),
        ):
            # What holds nothing stays out of the state dict, whose keys drop-ins share with torch's modules.
            self.register_buffer(name, torch.zeros(size, dtype=dtype), persistent=size > 0)
        self.reset()

    @property
    def arrays(self) -> IndexArrays:
        words: Any = self.words
        ranks: Any = self.ranks
        values: Any = self.values
        return IndexArrays(words, ranks, values, self.steps)

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
                device = self.arrays.words.device
                self._write(program, index, torch.arange(index.start, index.start + index.count, device=device))

    @torch.no_grad()
    def assign_(self, program: int, counts: Tensor | Mapping[str, Tensor]) -> None:
        """Fill the indexes of a program from ``counts [size]``; ties go to the smaller id.

        Args:
            program: its position.
            counts: or, by name of the index, the distinct ids that are its members.

        Raises:
            ConfigError: counts of another shape, or not all finite numbers >= 0; members that are not ids or not as
                many as the index holds.
        """
        if isinstance(counts, Mapping):
            self._assign_sets(program, counts)
            return
        for index in self.indexes[program].values():
            counts = torch.as_tensor(counts)
            if counts.shape != (index.size,):
                raise ConfigError(f"`counts` must be [{index.size}], one per id; got shape {tuple(counts.shape)}")
            if not (torch.isfinite(counts) & (counts >= 0)).all():
                raise ConfigError("`counts` must be finite numbers >= 0")
        if self.indexes[program]:
            order = torch.argsort(counts.to(self.arrays.words.device), descending=True, stable=True)
            for index in self.indexes[program].values():
                self._write(program, index, order[index.start : index.start + index.count].sort().values)

    def _assign_sets(self, program: int, sets: Mapping[str, Tensor]) -> None:
        faults = []
        known = self.indexes[program]
        sound = {}
        for name, given in sets.items():
            index, members = known.get(name), given.sort().values
            if index is None:
                faults.append(f"no index {name!r} holds a set of ids here; there are: {', '.join(known) or 'none'}")
            elif (
                members.shape != (index.count,)
                or not bool((members.diff() > 0).all())
                or not 0 <= int(members[0]) <= int(members[-1]) < index.size
            ):
                faults.append(
                    f"index {name!r} takes {index.count} distinct ids of [0, {index.size}); got {len(members)}"
                )
            else:
                sound[name] = members.to(self.arrays.words.device)
        raise_faults(faults, "sets of ids")
        for name, members in sound.items():
            self._write(program, known[name], members)

    def members(self, program: int, name: str) -> Tensor:
        """Ids of an index, ascending: int64 ``[count]``."""
        return self.indexes[program][name].members(self._places[program][name], self.arrays)

    def owners(self, program: int, transform: Transform, ids: int) -> Tensor | None:
        """Ids that have a row of a program's transform to themselves, see :meth:`Transform.owners`."""
        return transform.owners(ids, self.at(program, transform.reads), self.arrays)

    def _write(self, program: int, index: Index, members: Tensor) -> None:
        if members.is_meta or self.arrays.words.is_meta:
            return
        at = self._places[program][index.name]
        if index.form == "sorted":
            self.arrays.values[at : at + index.count] = members.to(torch.int32)
            return
        words, ranks = bitmap(members, index.size)
        self.arrays.words[at : at + index.length] = words
        self.arrays.ranks[at : at + index.length] = ranks

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_meta = self.arrays.words.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.arrays.words.is_meta:
            self.reset()
        return self

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = {name: state_dict.get(prefix + name) for name, held in self.named_buffers() if held.numel()}
        if all(isinstance(t, Tensor) and not t.is_meta and t.shape == getattr(self, n).shape for n, t in saved.items()):
            raise_faults(self._damage(saved), f"index at {prefix.rstrip('.')}", CheckpointError)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _damage(self, saved: Mapping[str, Any]) -> list[str]:
        """What keeps saved arrays from being sets of the right size: rows beyond the tables would be read."""
        faults = []
        for program, row in enumerate(self.indexes):
            for index in row.values():
                part = slice(self._places[program][index.name], self._places[program][index.name] + index.length)
                if index.form == "sorted":
                    values = saved["values"][part]
                    good = bool((values.diff() > 0).all()) and int(values[0]) >= 0 and int(values[-1]) < index.size
                else:
                    words, ranks = saved["words"][part], saved["ranks"][part]
                    rest = words_of(index.size) * 64 - index.size
                    beyond = int(words[-1]) >> (64 - rest) if rest else 0
                    whole = int(popcount(words).sum()) == index.count
                    good = whole and beyond == 0 and bool((ranks_of(words) == ranks).all())
                if not good:
                    faults.append(f"index {index.name!r} is damaged: not {index.count} ids of [0, {index.size})")
        return faults
