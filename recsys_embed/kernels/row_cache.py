"""Rows that are computed, kept for the ids that are looked up most, within stated bytes; for serving."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from recsys_embed.errors import ConfigError
from recsys_embed.kernels.recording import hidden

_WAYS = 8
_FREE = torch.iinfo(torch.int64).min  # no id: those of hashing methods are any others
_ROUNDS = 4
_ODD = (-7046029254386353131, -4417276706812531889)  # 64-bit constants of a multiplicative hash
_FIRST, _EVERY = 64, 4  # lookups that are all learned from, and which of later ones: learning takes longer than reading
_AGE = 16  # lookups per place after which counts are halved


class CacheCounts(NamedTuple):
    """Lookups of distinct ids so far, and rows now held."""

    hits: int
    misses: int
    rows: int


class RowCache:
    """The least frequently used row makes way (LFU), as TinyLFU (Einziger et al. 2017) counts.

    A row may stand in one of 8 places, which its id's hash tells. How often ids were asked for is counted in two arrays
    by hash, of which the lower count holds; counts are halved as lookups go on, so that what was frequent long ago
    makes way. A row that was computed takes a free place, or that of a row which was asked for less often. All of it
    are operations on whole batches, and it may be used by several threads.

    Args:
        width: of a row, in numbers of 4 bytes.
        size: bytes that rows, ids and counts may take.
        ids: how many there are; a cache has no more than two places for each, since sets fill unevenly.

    Raises:
        ConfigError: they do not hold 8 rows.

    >>> cache, asked = RowCache(2, 10_000), []
    >>> def compute(ids):
    ...     asked.append(ids.tolist())
    ...     return torch.stack([ids, -ids], 1).float()
    >>> cache(torch.tensor([3, 5, 3]), compute).tolist(), cache(torch.tensor([5, 7]), compute).tolist()
    ([[3.0, -3.0], [5.0, -5.0], [3.0, -3.0]], [[5.0, -5.0], [7.0, -7.0]])
    >>> asked, cache.counts()
    ([[3, 5], [7]], CacheCounts(hits=1, misses=3, rows=3))
    """

    def __init__(self, width: int, size: int, ids: int | None = None) -> None:
        self.width, self.size, self._most_ids = width, size, ids
        self._sets = size // (_WAYS * (4 * width + 8 + 4 + 2 * 4))
        if ids is not None:
            self._sets = min(self._sets, -(-2 * max(ids, 1) // _WAYS))
        if self._sets < 1:
            least = _WAYS * (4 * width + 20)
            raise ConfigError(f"a cache of rows of {width} columns takes {least} bytes or more; got {size}")
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._rows: Tensor | None = None
            self._hits = self._misses = self._asked = self._calls = 0

    @property
    def most_bytes(self) -> int:
        """Bytes that it takes from its first lookup on."""
        return self._sets * _WAYS * (4 * self.width + 8 + 4 + 2 * 4)

    @property
    def nbytes(self) -> int:
        """Bytes held; none before the first lookup."""
        held = () if self._rows is None else (self._rows, self._ids, self._uses, self._seen)
        return sum(t.nbytes for t in held)

    def counts(self) -> CacheCounts:
        """What it did so far."""
        with self._lock:
            rows = 0 if self._rows is None else int((self._ids != _FREE).sum())
            return CacheCounts(self._hits, self._misses, rows)

    def serves(self, ids: Tensor) -> bool:
        """Whether rows of these ids may be looked up: no program is recorded, and they have values."""
        return type(ids) is Tensor and not hidden(ids) and not ids.is_meta

    def __call__(self, ids: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows ``[n, width]`` of int64 ``ids [n]``.

        Args:
            compute: rows ``[m, width]`` of distinct ids ``[m]``, a function of each id alone.
        """
        found, places, times = torch.unique(ids, return_inverse=True, return_counts=True)
        with self._lock:
            learns = self._calls < _FIRST or self._calls % _EVERY == 0
            self._calls += 1
            if self._rows is None or self._rows.device != found.device:
                hit, held = torch.zeros_like(found, dtype=torch.bool), None
            else:
                slots, hit = self._find(found)
                slots = slots[hit]
                held = self._rows.index_select(0, slots)
                if learns:
                    self._count(found, times)
                    self._uses[slots] += times[hit].int()
            known = int(hit.sum())
            self._hits, self._misses = self._hits + known, self._misses + found.numel() - known
        if held is not None and known == found.numel():
            return held.index_select(0, places)
        missing = found if known == 0 else found[~hit]
        rows = compute(missing)
        if learns and not rows.requires_grad and rows.dtype == torch.float32:
            with self._lock:
                self._keep(missing, rows, times[~hit])
        if held is not None and known:
            both = rows.new_empty(found.numel(), rows.shape[1])
            both[hit], both[~hit] = held, rows
            rows = both
        return rows.index_select(0, places)

    def _hash(self, ids: Tensor, number: int) -> Tensor:
        mixed = ids * _ODD[number]
        return (mixed ^ (mixed >> 32)) & torch.iinfo(torch.int64).max

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Place of each id, where it has one."""
        sets = self._hash(ids, 0) % self._sets
        same = self._ids.view(-1, _WAYS).index_select(0, sets) == ids.unsqueeze(1)
        return sets * _WAYS + same.int().argmax(1), same.any(1)

    def _count(self, ids: Tensor, times: Tensor) -> None:
        for number, seen in enumerate(self._seen):
            seen.index_add_(0, self._hash(ids, number) % seen.numel(), times.int())
        self._asked += int(times.sum())
        if self._asked > _AGE * self._ids.numel():
            self._asked //= 2
            self._seen >>= 1
            self._uses >>= 1

    def _keep(self, ids: Tensor, rows: Tensor, times: Tensor) -> None:
        """Give computed rows a place, where one is free or its row is asked for less often."""
        if self._rows is None or self._rows.device != rows.device:
            number = self._sets * _WAYS
            with torch.inference_mode(False):  # whatever the mode of this lookup, later ones write to them
                self._rows = torch.empty(number, self.width, device=rows.device)
                self._ids = torch.full((number,), _FREE, device=rows.device)
                self._uses = torch.full((number,), -1, dtype=torch.int32, device=rows.device)
                self._seen = torch.zeros(2, number, dtype=torch.int32, device=rows.device)
            self._count(ids, times)
        asked = torch.minimum(*(s.index_select(0, self._hash(ids, n) % s.numel()) for n, s in enumerate(self._seen)))
        new = (~self._find(ids)[1] & (ids != _FREE)).nonzero().squeeze(1)
        # The most frequent first; in a round each set takes one row.
        new = new[asked[new].argsort(descending=True, stable=True)]
        for _ in range(_ROUNDS):
            if not new.numel():
                return
            sets = self._hash(ids[new], 0) % self._sets
            order = sets.argsort(stable=True)
            first = torch.ones_like(order, dtype=torch.bool)
            first[1:] = sets[order[1:]] != sets[order[:-1]]
            taken, new = new[order[first]], new[order[~first].sort().values]
            sets = self._hash(ids[taken], 0) % self._sets
            least, way = self._uses.view(-1, _WAYS).index_select(0, sets).min(1)
            worth = asked[taken] > least
            slots, taken = (sets * _WAYS + way)[worth], taken[worth]
            self._ids[slots], self._uses[slots], self._rows[slots] = ids[taken], asked[taken], rows[taken]

    def __deepcopy__(self, memo: object) -> RowCache:
        return RowCache(self.width, self.size, self._most_ids)

    def __reduce__(self) -> tuple[type[RowCache], tuple[int, int, int | None]]:
        return RowCache, (self.width, self.size, self._most_ids)


class RowCaches(nn.Module):
    """The caches of a module in evaluation mode, by position of the feature; other weights make them forget.

    Args:
        owner: whose parameters the rows are computed from; whatever writes to them counts up their versions.
    """

    def __init__(self, caches: Mapping[int, RowCache], owner: nn.Module) -> None:
        super().__init__()
        self.by_feature = dict(caches)
        self._owner = [owner]  # in a list, since a module that holds its owner as a part would be its own part
        self._watched: list[Tensor] | None = None
        self._versions: list[int] = []

    def rows(self, feature: int, ids: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor | None:
        """As a call of the feature's cache; None where rows have to be computed."""
        cache = self.by_feature.get(feature)
        if cache is None or self.training or not cache.serves(ids) or self._learns():
            return None
        return cache(ids, compute)

    def _learns(self) -> bool:
        """Whether gradients are asked for; forgets rows of weights that were written to since."""
        watched = self._watched
        if watched is None:
            watched = self._watched = [p for p in self._owner[0].parameters() if not p.is_inference()]
        versions = [p._version for p in watched]
        if versions != self._versions:
            self.clear()
            self._watched, self._versions = watched, versions
        return torch.is_grad_enabled() and any(p.requires_grad for p in watched)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(cache.nbytes for cache in self.by_feature.values())

    def clear(self) -> None:
        """Forget all rows."""
        self._watched = None
        for cache in self.by_feature.values():
            cache.clear()

    def train(self, mode: bool = True) -> Self:
        """As of any module; rows are forgotten."""
        self.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        self.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: object, **options: object) -> None:
        self.clear()
