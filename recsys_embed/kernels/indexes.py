"""Index arrays of many programs, concatenated into the buffers that lookups read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast

import torch
from torch import Tensor, nn

from recsys_embed.core.index import INDEX_DTYPES, Index, IndexArrays
from recsys_embed.core.transforms import Transform
from recsys_embed.errors import CheckpointError, ConfigError, raise_faults
from recsys_embed.kernels.hidden_buffers import HiddenBuffers
from recsys_embed.kernels.pointers import address, check, checked_address

ArrayVersions: TypeAlias = "tuple[tuple[Tensor, int], ...]"
"""Index arrays that a lookup read, and how often each had been written."""
_CHANGED = "the index arrays that say which rows ids read have changed (assign_, load_state_dict)"


def _check_arrays(index: Index) -> None:
    """Refuse an index whose arrays could not stand side by side in buffers."""
    faults = []
    if len({a.length for a in index.arrays}) > 1:
        found = ", ".join(f"{a.name} {a.length}" for a in index.arrays)
        faults.append(f"all `arrays` must have one length, as they begin at one place; got {found}: pad the shorter")
    for a in index.arrays:
        if a.dtype not in INDEX_DTYPES:
            known = ", ".join(str(d).removeprefix("torch.") for d in INDEX_DTYPES)
            faults.append(f"array {a.name!r} must be one of {known}; got {a.dtype}")
    raise_faults(faults, f"index {index.name!r}, {type(index).__name__}")


def _content_faults(index: Index, arrays: Mapping[str, Tensor]) -> list[str]:
    """Why ``arrays`` are not those that the index declares; numbers that its types cannot hold would wrap around."""
    faults = []
    for a in index.arrays:
        got = arrays.get(a.name)
        if not isinstance(got, Tensor) or got.shape != (a.length,):
            found = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
            faults.append(f"array {a.name!r} must be a tensor [{a.length}]; got {found}")
        elif got.dtype != a.dtype and not torch.equal(got.to(a.dtype).to(got.dtype), got):
            faults.append(f"array {a.name!r} holds {got.dtype} numbers that {a.dtype} cannot")
    return faults


def first_of_equals(names: Sequence[str]) -> list[int]:
    """Per name the position of the first one that is equal: the owners of index arrays, given names of tables.

    >>> first_of_equals(["user", "item", "item"])
    [0, 1, 1]
    """
    first: dict[str, int] = {}
    return [first.setdefault(name, i) for i, name in enumerate(names)]


class IndexStore(nn.Module):
    """Arrays of all indexes of a module.

    State dicts contain them as if they were buffers. They are not, since averaging buffers would change integers that
    say which row an id reads.

    Args:
        indexes: per program. At first each is filled as if ids were numbered by descending frequency.
        owners: per program the first one that reads the same tables, whose arrays it reads; by default itself.
    """

    def __init__(self, indexes: Sequence[Sequence[Index]], owners: Sequence[int] | None = None) -> None:
        super().__init__()
        self.indexes = [{i.name: i for i in row if i.arrays} for row in indexes]
        owners = range(len(self.indexes)) if owners is None else owners
        # The indexes that have arrays of their own.
        self._owning = [row for i, row in enumerate(self.indexes) if owners[i] == i]
        lengths: dict[tuple[tuple[str, torch.dtype], ...], int] = {}
        self._places: list[dict[str, int]] = []
        for owner, row in zip(owners, self.indexes, strict=True):
            if owner < len(self._places):
                self._places.append(self._places[owner])
                continue
            self._places.append({})
            for index in row.values():
                _check_arrays(index)
                kind = tuple((a.name, a.dtype) for a in index.arrays)
                self._places[-1][index.name] = lengths.get(kind, 0)
                lengths[kind] = lengths.get(kind, 0) + index.arrays[0].length
        self._longest = max((i.searched for row in self.indexes for i in row.values()), default=0)
        # Arrays of one kind of index get consecutive numbers, so that kernels only need the first.
        self._slots: dict[str, int] = {}
        # What keeps kernels from reading a replaced array, by its name.
        self._unfit: dict[str, str] = {}
        self._held: dict[str, Tensor] = {}
        self._hide()
        for kind, length in lengths.items():
            for name, dtype in kind:
                if name in self._slots:
                    raise ConfigError(f"two kinds of indexes name an array {name!r}; rename it in one of them")
                self._slots[name] = len(self._slots)
                self._held[name] = torch.zeros(length, dtype=dtype)
        self.reset()

    if not TYPE_CHECKING:  # a checker would take any attribute for known

        def __getattr__(self, name: str) -> Any:
            """An array, by its name."""
            held = self.__dict__.get("_held", {})
            return held[name] if name in held else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Replace an array, or any attribute. Arrays keep the type that kernels read."""
        if name not in self.__dict__.get("_held", {}):
            super().__setattr__(name, value)
            return
        own = self._held[name]
        if not isinstance(value, Tensor) or (
            value.dtype != own.dtype and (value.is_meta or not torch.equal(value.to(own.dtype).to(value.dtype), value))
        ):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"index array {name!r} must be a tensor of {own.dtype}; got {kind}")
        length = sum(a.length for row in self._owning for i in row.values() for a in i.arrays if a.name == name)
        self._unfit.pop(name, None)
        if value.shape != (length,):
            self._unfit[name] = f"index array {name!r} must be [{length}]; got {list(value.shape)}"
        self._held[name] = value.to(own.dtype).contiguous()

    def pointers(self) -> list[int]:
        """Addresses of the arrays, in order, for kernels of the CPU.

        Raises:
            ConfigError: an array was replaced by one of another length, or is not on the CPU.
        """
        if self._unfit:
            raise_faults([*self._unfit.values()], "index arrays")
        found, kinds = [], self._kinds
        for name, held in self._held.items():
            if not held.is_cpu:
                raise ConfigError(f"index array {name!r} is on {held.device}, its tables on the CPU; move both")
            dtype, length = kinds[name]
            if held.dtype is dtype and held.is_contiguous() and held.numel() == length:
                found.append(checked_address(held))
            else:
                found.append(address(held, dtype, length, f"index array {name!r}"))
        return found

    @cached_property
    def _kinds(self) -> dict[str, tuple[torch.dtype, int]]:
        """Type and length of each array."""
        arrays = [a for row in self._owning for i in row.values() for a in i.arrays]
        return {a.name: (a.dtype, sum(b.length for b in arrays if b.name == a.name)) for a in arrays}

    @property
    def arrays(self) -> IndexArrays:
        return IndexArrays(self._held, self._longest)

    def versions(self) -> ArrayVersions:
        """The arrays as they are now, see :meth:`check_unchanged`."""
        try:
            return tuple([(a, a._version) for a in self._held.values()])
        except RuntimeError:  # tensors made in inference mode count no changes
            return tuple((a, -1 if a.is_inference() else a._version) for a in self._held.values())

    def check_unchanged(self, versions: ArrayVersions) -> None:
        """Refuse a backward that would read other rows than its lookup has.

        Args:
            versions: of the arrays when the lookup read them.

        Raises:
            ConfigError: arrays have been replaced or written since.
        """
        for (array, version), now in zip(versions, self._held.values(), strict=False):
            if array is not now or (version >= 0 and now._version != version):
                check([_CHANGED])

    def version_numbers(self) -> Tensor:
        """As :meth:`versions`, for compiled programs, which carry tensors alone: int64 ``[2 * arrays]``."""
        return torch.tensor([n for array, version in self.versions() for n in (id(array), version)], dtype=torch.int64)

    def check_version_numbers(self, numbers: Tensor) -> None:
        """As :meth:`check_unchanged`."""
        check(() if torch.equal(numbers, self.version_numbers()) else [_CHANGED])

    @property
    def device(self) -> torch.device:
        """Device of the arrays; the CPU if there are none."""
        return next((a.device for a in self._held.values()), torch.device("cpu"))

    def slot(self, program: int, name: str | None) -> int:
        """Position of an index's first array among the buffers; 0 for None."""
        return 0 if name is None else self._slots[self.indexes[program][name].arrays[0].name]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self._held.values())

    def places(self, program: int) -> Mapping[str, int]:
        """Offset of each index of a program in the arrays of its form."""
        return self._places[program]

    def at(self, program: int, name: str | None) -> int:
        """Offset of one index; 0 for None."""
        return 0 if name is None else self._places[program][name]

    def reset(self) -> None:
        """Fill all indexes as if ids were numbered by descending frequency."""
        for program, row in enumerate(self.indexes):
            for index in row.values():
                if self.device.type != "meta":
                    self._write(program, index, index.initial(self.device))

    @torch.no_grad()
    def assign_(self, program: int, counts: Tensor | Mapping[str, Tensor]) -> None:
        """Fill the indexes of a program from ``counts [size]``; of equal counts the smaller id ranks first.

        Args:
            program: its position.
            counts: or the values of each index by its name: distinct ids for a set, codes of all ids for codes.

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
        """Values of an index as ``assign_`` takes them; those of a set are its ids, ascending, int64 ``[count]``."""
        return self.indexes[program][name].value(self._places[program][name], self.arrays)

    def rows(self, program: int, transform: Transform, ids: Tensor) -> Tensor:
        """Rows of ids by a transform of a program, see :meth:`Transform.rows`."""
        return transform.rows(ids, self.at(program, transform.reads), self.arrays)

    def owners(self, program: int, transform: Transform, ids: int) -> Tensor | None:
        """Ids that share their row with no other id, see :meth:`Transform.owners`."""
        return transform.owners(ids, self.at(program, transform.reads), self.arrays)

    def _write(self, program: int, index: Index, arrays: Mapping[str, Tensor]) -> None:
        if self.device.type == "meta":
            return
        at = self._places[program][index.name]
        raise_faults(_content_faults(index, arrays), f"index {index.name!r}, {type(index).__name__}")
        for a in index.arrays:
            self._held[a.name][at : at + a.length] = arrays[a.name].to(self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_meta = self.device.type == "meta"
        before = dict(self._held)
        with self._as_buffers():
            super()._apply(fn, recurse)
        for name, held in before.items():
            if self._held[name].dtype != held.dtype:  # integers that say which row an id reads have one type
                self._held[name] = held.to(self._held[name].device)
        if was_meta and self.device.type != "meta":
            self.reset()
        return self

    def recreate_derived_tensors(self, device: torch.device) -> None:
        """Put arrays without elements, which no file holds, on a device."""
        for name, held in self._held.items():
            if held.is_meta and not held.numel():
                self._held[name] = torch.zeros(0, dtype=held.dtype, device=device)

    def _hide(self) -> None:
        """Let tools that set what a state dict names find the arrays, which loops over buffers do not."""
        check = partial(_check_set, (self.indexes, self._places), self._held, set())
        self.__dict__["_buffers"] = HiddenBuffers(self._held, check)

    @contextmanager
    def _as_buffers(self) -> Iterator[None]:
        """Inside, the arrays are buffers: what torch does to these is done to them."""
        hidden, held = self.__dict__["_buffers"], self._held
        self.__dict__.update(_buffers=dict(held), _held={})
        try:
            yield
        finally:
            held.update(self.__dict__["_buffers"])
            self.__dict__.update(_buffers=hidden, _held=held)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_unfit", {})
        self.__dict__.setdefault("_owning", self.indexes)
        if "_held" not in state:  # earlier versions had buffers
            self._held = cast("dict[str, Tensor]", dict(self._buffers))
            self._hide()

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = self._held
        saved = {name: state_dict.get(prefix + name) for name, held in own.items() if held.numel()}
        faults = [
            f"index array {name!r} is {t.dtype}, but its integers say which row an id reads and have no mean; take the "
            "array of one of the states"
            for name, t in saved.items()
            if isinstance(t, Tensor) and t.is_floating_point()
        ]
        raise_faults(faults, f"index at {prefix.rstrip('.')}", CheckpointError)
        if all(isinstance(t, Tensor) and not t.is_meta and t.shape == own[n].shape for n, t in saved.items()):
            faults = _damage((self.indexes, self._places), saved)
            raise_faults(faults, f"index at {prefix.rstrip('.')}", CheckpointError)
        before = dict(own)
        with self._as_buffers():
            super()._load_from_state_dict(state_dict, prefix, *args)
        assigned = {name: held for name, held in own.items() if held is not before[name]}
        own.update(before)
        for name, held in assigned.items():  # checked, as any array that takes the place of another
            setattr(self, name, held)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with self._as_buffers():
            super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:  # averages over state dicts write to what they are given
            destination.update({prefix + name: destination[prefix + name].clone() for name in self._held})


_Programs: TypeAlias = "tuple[list[dict[str, Index]], list[dict[str, int]]]"
"""Indexes of all programs, and where each begins."""


def _damage(programs: _Programs, saved: Mapping[str, Any]) -> list[str]:
    """Faults of saved arrays; loading them would make lookups read beyond the tables."""
    faults = []
    for row, places in zip(*programs, strict=True):
        for index in row.values():
            at = places[index.name]
            faults.append(index.damage({a.name: saved[a.name][at : at + a.length] for a in index.arrays}))
    return [fault for fault in faults if fault is not None]


def _check_set(programs: _Programs, held: Mapping[str, Tensor], pending: set[str], name: str, value: Tensor) -> None:
    """Check an array that is set by itself; with the last of all, what they hold together."""
    if value.shape != held[name].shape or value.dtype != held[name].dtype:
        ours = f"{held[name].dtype} {list(held[name].shape)}"
        raise CheckpointError(f"index array {name!r} must be {ours}; got {value.dtype} {list(value.shape)}")
    pending.add(name)
    if pending == held.keys():
        pending.clear()
        now = {**held, name: value}
        if not any(a.is_meta for a in now.values()):
            raise_faults(_damage(programs, now), "index", CheckpointError)
