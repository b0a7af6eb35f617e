"""Recall and NDCG of the items that a model finds, exact over the whole catalogue."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys_embed.core.hashing import EMPTY_ID
from recsys_embed.data.batch import Batch
from recsys_embed.data.data_source import BatchSource
from recsys_embed.errors import DataError
from recsys_embed.models import RetrievalModel
from recsys_embed.models.retrieval import BLOCK_SCORES, CatalogueVectors
from recsys_embed.train.catalogue import CHUNK_ROWS, positives_of

USER = "user"
"""The feature that tells users apart where rows have no group."""
TOP_K = (10, 20, 50)
EARLIER: dict[str, tuple[str, ...]] = {"train": (), "test": ("train", "valid")}
"""Splits whose items a user has seen before a split, where these are not the training rows alone."""

MAX_PAIRS = 1 << 25
"""Pairs of users and items of earlier rows that are held at once; of more, rows are read again for further users."""

Ints = NDArray[np.int64]
Pairs = tuple[Ints, Ints]
Seen = dict[str, tuple[Ints, Ints]]
"""By split its users, and the pairs of users and items of their earlier rows as single numbers, in order."""


@dataclass(frozen=True)
class RankingMetrics:
    """Recall and NDCG by k, means over the users who have a positive; empty where there is none."""

    recall: dict[int, float]
    ndcg: dict[int, float]


def recall_and_ndcg(ranks: Ints, users: Ints, positives: Ints, ks: Sequence[int]) -> RankingMetrics:
    """Means over users of recall@k, hits / positives, and of NDCG@k with gain 1, as RecBole defines them.

    Args:
        ranks: rank from 0 of every positive among the items, ``[m]``.
        users: whose it is, ``[m]`` numbers below U.
        positives: how many each user has, ``[U]``, at least 1 each.
        ks: lengths of the lists.

    >>> found = recall_and_ndcg(np.array([0, 5]), np.array([0, 0]), np.array([2]), (2,))
    >>> found.recall[2], round(found.ndcg[2], 4)  # (1 / log2(2)) / (1 / log2(2) + 1 / log2(3))
    (0.5, 0.6131)
    """
    recall, ndcg = {}, {}
    for k in ks:
        discounts = 1 / np.log2(np.arange(2, k + 2))
        ideal = np.cumsum(discounts)[np.minimum(positives, k) - 1]
        hit = ranks < k
        hits = np.bincount(users[hit], minlength=len(positives))
        gains = np.bincount(users[hit], discounts[ranks[hit]], minlength=len(positives))
        recall[int(k)], ndcg[int(k)] = float((hits / positives).mean()), float((gains / ideal).mean())
    return RankingMetrics(recall, ndcg)


@dataclass
class ItemRanking:
    """Accumulates the users of a split and their positives, then ranks these among all items.

    Held are the rows of the split (a user and an item each), a vector of each of its users, ``MAX_PAIRS`` earlier rows,
    a block of the catalogue's vectors (all of them up to ``KEPT_BYTES``), and ``BLOCK_SCORES`` scores.

    A user is told by the part ``group`` of rows, else by a feature named ``user``; else every row is a user of its own,
    and so is one whose user is missing or has no id. The user's vector is that of the first of its rows in the split.

    Args:
        model: finds the items.
        ks: lengths of the lists.
        exclude_seen: leave out items of the user's earlier rows (:data:`EARLIER`), unless they are positives here;
            None: where rows say whose they are.
        seen: by split what earlier rows hold, filled when first used.
        unknown: ids of the feature ``user`` that are no user's, see :meth:`recsys_embed.data.RowSource.unknown_ids`.
    """

    model: RetrievalModel
    ks: Sequence[int] = TOP_K
    exclude_seen: bool | None = None
    seen: Seen = field(default_factory=dict)
    unknown: Collection[int] = ()

    def __post_init__(self) -> None:
        self._vectors: list[Tensor] = []
        self._users: list[Ints] = []
        self._pairs: list[Pairs] = []
        self._known = np.zeros(0, np.int64)
        self._rows, self._identified = 0, True

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        users, items = self._who(batch)
        chosen = positives_of(batch.label).cpu().numpy()
        if users is None:
            self._identified = False
            users = np.arange(self._rows, self._rows + len(items))
        else:
            # Numbers next to the id of missing values, which no other id has.
            alone = EMPTY_ID[64] + 1 + self._rows + np.arange(len(items))
            users = np.where(np.isin(users, self._nobody(batch)), alone, users)
        self._rows += len(items)
        self._pairs.append((users[chosen], items[chosen]))
        fresh, first = np.unique(users, return_index=True)
        if self._identified:
            unknown = ~np.isin(fresh, self._known, assume_unique=True)
            fresh, first = fresh[unknown], first[unknown]
            self._known = np.union1d(self._known, fresh)
        else:
            fresh, first = users[chosen], np.flatnonzero(chosen)
        if len(fresh):
            rows = torch.from_numpy(first).to(batch.label.device)
            some = batch.map(lambda part: part.index_select(0, rows))
            self._vectors.append(self.model.users(some.dense, some.inputs).float())
            self._users.append(fresh)

    def compute(self, data: BatchSource, split: str) -> RankingMetrics | None:
        """Metrics of what was added; None where no user has a positive.

        Raises:
            ConfigError: ``exclude_seen`` is set, and nothing tells users apart.
            DataError: vectors that are not finite.
        """
        pairs = np.unique(np.stack([np.concatenate(part) for part in zip(*self._pairs, strict=True)]), axis=1)
        if not pairs.shape[1]:
            return None
        users, owners, positives = np.unique(pairs[0], return_inverse=True, return_counts=True)
        order = np.argsort(np.concatenate(self._users), kind="stable")
        rows = order[np.searchsorted(np.concatenate(self._users)[order], users)]
        vectors = torch.cat(self._vectors)[torch.from_numpy(rows).to(self._vectors[0].device)]
        _need_finite(vectors, "user vectors")
        catalogue, ranks = CatalogueVectors(self.model), np.empty(len(owners), np.int64)
        start = 0
        while start < len(users):
            stop, seen = self._seen(data, split, users, start)
            low, high = np.searchsorted(owners, (start, stop))
            ranks[low:high] = self._ranks(
                catalogue, vectors[start:stop], owners[low:high] - start, pairs[1, low:high], seen
            )
            start = stop
        return recall_and_ndcg(ranks, owners, positives, self.ks)

    def _who(self, batch: Batch) -> tuple[Ints | None, Ints]:
        """Users ``[B]``, or None, and candidates ``[B]``."""
        names = self.model.vectors.schema.names
        items = self.model.candidates(batch.inputs).cpu().numpy()
        if "group" in batch.extra:
            return batch.extra["group"].cpu().numpy().astype(np.int64), items
        if USER in names and names.index(USER) < batch.ids.shape[1]:
            return batch.ids[:, names.index(USER)].cpu().numpy().astype(np.int64), items
        return None, items

    def _nobody(self, batch: Batch) -> list[int]:
        """What :meth:`_who` gives for rows whose user is not known."""
        if "group" in batch.extra:
            return [*EMPTY_ID.values()]
        padding = self.model.vectors.schema[USER].padding_idx
        return [*EMPTY_ID.values(), *self.unknown, *([] if padding is None else [padding])]

    def _seen(self, data: BatchSource, split: str, users: Ints, start: int) -> tuple[int, Pairs]:
        """Users from ``start`` on whose earlier rows are held together: the end of these, and numbers of users from
        ``start`` and items of the rows, each pair once, by user."""
        none = np.zeros(0, np.int64)
        if not (self._identified if self.exclude_seen is None else self.exclude_seen):
            return len(users), (none, none)
        if not self._identified:
            raise DataError(
                "`exclude_seen` needs rows that say whose they are: a `group` column, or a feature named 'user'"
            )
        items, stop = len(self.model.in_catalogue), len(users)
        kept = self.seen.get(split)
        if kept is not None and np.array_equal(kept[0], users):
            return stop, (kept[1] // items, kept[1] % items)
        known, fresh, waiting = none, list[Ints](), 0
        for who, chosen in self._earlier(data, split):
            at = np.searchsorted(users, who).clip(max=len(users) - 1)
            ours = (users[at] == who) & (at >= start) & (at < stop)
            fresh.append(np.unique((at[ours] - start) * items + chosen[ours]))
            waiting += len(fresh[-1])
            if waiting > max(MAX_PAIRS // 4, CHUNK_ROWS):
                known, fresh, waiting = np.unique(np.concatenate([known, *fresh])), [], 0
                if len(known) > MAX_PAIRS:
                    # Half of them, so that not every further row cuts again; of one user all.
                    stop = start + max(1, int(known[MAX_PAIRS // 2] // items))
                    known = known[: np.searchsorted(known, (stop - start) * items)]
        known = np.unique(np.concatenate([known, *fresh]))
        known = known[: np.searchsorted(known, (stop - start) * items)]
        if start == 0 and stop == len(users):
            self.seen[split] = (users, known)
        return stop, (known // items, known % items)

    def _earlier(self, data: BatchSource, split: str) -> Iterator[Pairs]:
        """Users and items of the rows before a split."""
        for earlier in EARLIER.get(split, ("train",)):
            if earlier not in data.splits:
                continue
            for batch in data.batches(earlier, CHUNK_ROWS, shuffle=False):
                who, items = self._who(batch)
                if who is None:
                    raise DataError(f"rows of the split {earlier!r} do not say whose they are, as others do")
                yield who, items

    def _ranks(self, catalogue: CatalogueVectors, vectors: Tensor, owners: Ints, items: Ints, seen: Pairs) -> Ints:
        """Rank of each positive, by user; equal scores of other items come before it."""
        listed, device = self.model.in_catalogue, vectors.device
        mine, theirs = _Blocks(owners, items), _Blocks(*seen)
        ends = np.searchsorted(owners, np.arange(len(vectors) + 1))
        own, above = vectors.new_empty(len(items)), torch.zeros(len(items), dtype=torch.int64, device=device)
        # A positive is compared with scores of the same product of matrices, so that equal vectors have equal scores.
        for counting in (False, True):
            for first, block in catalogue:
                if not counting:
                    _need_finite(block[listed[first : first + len(block)]], "vectors of items")
                absent = ~listed[first : first + len(block)]
                size = max(1, BLOCK_SCORES // len(block))
                for start in range(0, len(vectors), size):
                    stop = min(start + size, len(vectors))
                    which, rows, columns = mine.within(first, first + len(block), start, stop, device)
                    if not counting and not len(which):
                        continue
                    scores = vectors[start:stop] @ block.float().T
                    scores.masked_fill_(absent, float("-inf"))
                    if not counting:
                        own[which] = scores[rows, columns]
                        continue
                    scores[rows, columns] = float("-inf")
                    _, rows, columns = theirs.within(first, first + len(block), start, stop, device)
                    scores[rows, columns] = float("-inf")
                    part = slice(ends[start], ends[stop])
                    whose = torch.from_numpy(owners[part] - start).to(device)
                    above[part] += _count_above(scores, whose, own[part])
        ranks = above.cpu().numpy() + _places(own.cpu().numpy(), owners)
        # What is not in the catalogue is never found, however long the list.
        ranks[np.isneginf(own.cpu().numpy())] = np.iinfo(np.int64).max
        return ranks


class _Blocks:
    """Pairs of users and items, by user, of which those of a range of both are found at once.

    Args:
        users: numbers ``[m]`` in order.
        items: ids ``[m]``.
    """

    def __init__(self, users: Ints, items: Ints) -> None:
        self.users, self.items = users, items
        self._range: tuple[int, int] | None = None

    def within(
        self, first: int, last: int, start: int, stop: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Places of the pairs of items ``first`` to ``last`` and users ``start`` to ``stop``, and their users and items
        counted from these."""
        if self._range != (first, last):
            self._range = first, last
            self._places = np.flatnonzero((self.items >= first) & (self.items < last))
            self._owners = self.users[self._places]
        low, high = np.searchsorted(self._owners, (start, stop))
        places = self._places[low:high]
        found = places, self.users[places] - start, self.items[places] - first
        return tuple(torch.from_numpy(part).to(device) for part in found)  # type: ignore[return-value]


def _count_above(scores: Tensor, rows: Tensor, own: Tensor) -> Tensor:
    """How many of a row's scores are not below each of ``own``, in the rows given: ``[m]``."""
    size = max(1, BLOCK_SCORES // scores.shape[1])
    pieces = zip(rows.split(size), own.split(size), strict=True)
    return torch.cat([(scores[some] >= ours.unsqueeze(1)).sum(1) for some, ours in pieces])


def _need_finite(vectors: Tensor, what: str) -> None:
    if not torch.isfinite(vectors).all():
        raise DataError(
            f"the model's {what} are not numbers (NaN or infinite); if it was trained just now, lower the learning "
            "rate or clip gradients"
        )


def _places(scores: NDArray[np.float32], owners: Ints) -> Ints:
    """Place of each score among those of its owner, the highest 0; owners ``[m]`` in order."""
    order = np.lexsort((-scores, owners))
    starts = np.searchsorted(owners, owners)
    places = np.empty(len(scores), np.int64)
    places[order] = np.arange(len(scores)) - starts
    return places
