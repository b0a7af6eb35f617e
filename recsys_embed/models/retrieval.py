"""Base of retrieval models: a vector of the user and one of each item, scored by dot product."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from recsys_embed.collection.bags import to_bags
from recsys_embed.errors import ConfigError, raise_faults, unknown_name
from recsys_embed.features import Schema
from recsys_embed.models.base import CTRModel, ModelSpec
from recsys_embed.utils.evaluation_mode import evaluation_mode
from recsys_embed.utils.types import JSON, BagIds, Ids, RowsLike

BLOCK_ITEMS = 1 << 16
"""Items whose vectors are computed together when a whole catalogue is scored."""
BLOCK_SCORES = 1 << 24
"""Scores that are held together when a whole catalogue is scored."""
KEPT_BYTES = 256 << 20
"""Vectors of a whole catalogue that are computed once for all users; of larger ones they are computed again."""

_MOST_PLACES = 1 << 20


class Queries(NamedTuple):
    """What losses over items compare: users, or prefixes of their histories, each with the item that followed.

    Args:
        vectors: ``[n, K]``.
        targets: ids of the items, int64 ``[n]``.
        rows: the row of the batch that each belongs to, int64 ``[n]``.
    """

    vectors: Tensor
    targets: Tensor
    rows: Tensor


class RetrievalModel(CTRModel):
    """Base of retrieval models (candidate generation), which find items for a user among all of them.

    A subclass defines :meth:`user_vectors`, into which nothing of the candidate may enter, and :meth:`items`. The score
    of an item is the dot product of the two, which is also what :meth:`logits` gives for the row's own candidate.

    Attributes:
        item: the feature of the candidate.
        item_counts: how often each item is a target (:meth:`targets`) of a positive training row, int64
            ``[num_embeddings]``.
        in_catalogue: the items that can be found, bool ``[num_embeddings]``: those that are a target of a training
            row, without padding and what stands for unknown items; before training all but padding.
        uses_network: no other feature tells two items apart whose vectors are equal, so plans may not count on it.
    """

    uses_network: ClassVar[bool] = False
    must_define: ClassVar[Mapping[str, str]] = {
        "user_vectors": "user_vectors(dense, ids)`, which returns [B, K],",
        "items": "items(item_ids)`, which returns [n, K],",
    }

    item_counts: Tensor
    in_catalogue: Tensor

    def __init__(self, spec: ModelSpec, item: str | None) -> None:
        super().__init__(spec)
        self.item = candidate_of(spec.schema, item, self.key)
        self.place = spec.schema.names.index(self.item)
        feature = spec.schema[self.item]
        if feature.ids == "raw":
            raise ConfigError(
                f"model {self.key!r} finds items by their number, and feature {self.item!r} has raw 64-bit ids, which "
                "cannot be listed; convert the data with a vocabulary for it"
            )
        self.register_buffer("item_counts", torch.zeros(feature.num_embeddings, dtype=torch.int64))
        listed = torch.ones(feature.num_embeddings, dtype=torch.bool)
        if feature.padding_idx is not None:
            listed[feature.padding_idx] = False
        self.register_buffer("in_catalogue", listed)

    # -- what a subclass defines ----------------------------------------------------------------------------------

    def user_vectors(self, dense: Tensor, ids: Ids) -> Tensor:
        """Vectors ``[B, K]`` of users from standardised numeric values; every such model defines this."""
        raise TypeError(f"{type(self).__name__} does not define user_vectors(dense, ids)")

    def items(self, item_ids: Tensor) -> Tensor:
        """Vectors ``[n, K]`` of items ``[n]``; every such model defines this."""
        raise TypeError(f"{type(self).__name__} does not define items(item_ids)")

    @property
    def user_features(self) -> Sequence[str]:
        """Features that enter the user's vector, which must not say what the candidate is; all but the candidate."""
        return [name for name in self.vectors.schema.names if name != self.item]

    @property
    def user_numeric(self) -> Sequence[int]:
        """Numeric columns, counted from 0, that enter the user's vector."""
        return range(self.num_dense)

    # -- vectors and scores ---------------------------------------------------------------------------------------

    def users(self, dense: Tensor, ids: Ids) -> Tensor:
        """Vectors ``[B, K]`` of users: of raw numeric values ``[B, num_dense]``, and of ids whose candidates are not
        looked at."""
        return self.user_vectors(self.standardised(dense), ids)

    def logits(self, dense: Tensor, ids: Ids) -> Tensor:
        return (self.user_vectors(dense, ids) * self.items(self.candidates(ids))).sum(1)

    def queries(self, dense: Tensor, ids: Ids) -> Queries:
        """What losses over items learn from a batch of positive rows: by default its users and their candidates."""
        vectors = self.users(dense, ids)
        return Queries(vectors, self.candidates(ids), torch.arange(len(vectors), device=vectors.device))

    def targets(self, ids: Ids) -> tuple[Tensor, Tensor]:
        """Items that :meth:`queries` has as targets, and the row of the batch of each: int64 ``[n]`` both; by default
        the candidates."""
        found = self.candidates(ids)
        return found, torch.arange(len(found), device=found.device)

    def candidates(self, ids: Ids) -> Tensor:
        """The candidate of each row: int64 ``[B]``.

        Raises:
            ConfigError: rows that have none, or several.
        """
        if isinstance(ids, Tensor) and ids.dim() == 2:
            return ids[:, self.place].long()
        bags = self.bags(ids)
        batch = (bags.offsets.numel() - 1) // len(self.vectors.schema)
        offsets = bags.offsets[self.place * batch : (self.place + 1) * batch + 1]
        if not torch.compiler.is_compiling() and bool((offsets.diff() != 1).any()):
            raise ConfigError(f"each row must have one id of feature {self.item!r}, the candidate (model {self.key!r})")
        return bags.values.index_select(0, offsets[:-1]).long()

    def bags(self, ids: Ids) -> BagIds:
        """Ids of all features as bags, of whatever form they are given in."""
        coll = self.vectors
        if isinstance(ids, Tensor) and ids.dim() == 2:
            return BagIds(ids.T.reshape(-1), torch.arange(ids.numel() + 1, device=ids.device))
        if isinstance(ids, tuple):
            return BagIds(*ids)
        given = to_bags(coll.schema, coll.bundle.given(ids, coll) if isinstance(ids, dict) else ids, None, None)
        return BagIds(given.values, given.offsets)

    def only(self, ids: Ids, places: Sequence[int]) -> BagIds:
        """Bags of all features that are empty but for those at the given places of the schema, so that no row of
        another is read, or moved by an optimizer."""
        count = len(self.vectors.schema)
        keep = torch.zeros(count, 1, dtype=torch.int64)
        keep[list(places)] = 1
        if isinstance(ids, Tensor) and ids.dim() == 2:
            values = ids[:, list(places)].T.reshape(-1)
            lengths = keep.to(ids.device).expand(count, len(ids))
        else:
            bags = self.bags(ids)
            lengths = bags.offsets.diff().view(count, -1)
            ends = [0, *lengths.sum(1).cumsum(0).tolist()]
            values = torch.cat([bags.values[ends[f] : ends[f + 1]] for f in places] or [bags.values[:0]])
            lengths = lengths * keep.to(lengths.device)
        return BagIds(values, torch.cat([lengths.new_zeros(1), lengths.reshape(-1).cumsum(0)]))

    # -- the catalogue --------------------------------------------------------------------------------------------

    def item_blocks(self, size: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Vectors of all ids in blocks: the first id, and ``[n, K]``."""
        size = BLOCK_ITEMS if size is None else size
        for start in range(0, len(self.in_catalogue), size):
            stop = min(start + size, len(self.in_catalogue))
            yield start, self.items(torch.arange(start, stop, device=self.in_catalogue.device))

    @overload
    def recommend(
        self, dense: Tensor, ids: Ids, k: int = 10, exclude: Tensor | BagIds | None = None
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def recommend(
        self, rows: RowsLike, /, *, k: int = 10, exclude: str | Sequence[str] | None = None, batch_size: int = 8192
    ) -> Recommendations: ...

    def recommend(
        self,
        dense: Tensor | RowsLike,
        ids: Ids | None = None,
        k: int = 10,
        exclude: Tensor | BagIds | str | Sequence[str] | None = None,
        *,
        batch_size: int = 8192,
    ) -> tuple[Tensor, Tensor] | Recommendations:
        """The k items of the highest scores for each row, of the whole catalogue and exact, in bounded memory.

        Of ids, or of raw rows by a model that :func:`recsys_embed.load` read from a file with encoders.

        Args:
            dense: raw numeric values, ``[B, num_dense]``; or raw rows, as :meth:`predict` takes them, without ``ids``.
                Of raw rows only the columns that tell the user are read; values that training did not have are treated
                as by :meth:`predict`.
            ids: as for the model; candidates are not looked at.
            k: items per row; may be more than there are to be found, up to a million.
            exclude: items to leave out of each row's, such as those that the user knows: int64 ``[B, L]`` padded with
                -1, or :class:`recsys_embed.typing.BagIds` of ``B`` bags. Of raw rows the names of the columns that hold
                them, any number per row; they need not be columns of the model.
            batch_size: raw rows that go through the model at once.

        Returns:
            Item ids, int64 ``[B, k]``, best first, and their scores ``[B, k]``. Where ``k`` is beyond the catalogue,
            or beyond what ``exclude`` leaves of it, the last places hold id -1 and score minus infinity. Of equal
            scores any may come first. Of raw rows :class:`Recommendations`, with the items themselves for ids and
            None for -1.

        Raises:
            ConfigError: k below 1, or beyond both a million and the catalogue; ``exclude`` of another form; raw rows
                and a model without encoders, or columns that are absent or of another type, all of them named.
            DataError: values of raw rows that cannot be used, with row, column and reason.
        """
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ConfigError(f"`k` must be an integer of at least 1; got {k!r}")
        if k > max(_MOST_PLACES, len(self.in_catalogue)):
            size = len(self.in_catalogue)
            raise ConfigError(
                f"`k` is {k}, and every row would have as many places: k={size} finds all items there are"
            )
        if not isinstance(dense, Tensor):
            if ids is not None:
                raise ConfigError("raw rows come without ids: `recommend(rows, k=10)`, or `recommend(dense, ids, k)`")
            named: Any = [] if exclude is None else [exclude] if isinstance(exclude, str) else exclude
            if not isinstance(named, list | tuple) or not all(isinstance(name, str) for name in named):
                raise ConfigError(f"`exclude` of raw rows must name columns of theirs; got {type(exclude).__name__}")
            found: Recommendations = self._scorer().recommend(self, dense, k, named, batch_size)
            return found
        if ids is None:
            raise ConfigError("numeric values need ids: `recommend(dense, ids, k)`")
        left_out: Any = exclude
        with evaluation_mode(self), torch.no_grad():
            return self.best_items(self.users(dense, ids), k, left_out)

    @torch.no_grad()
    def best_items(
        self,
        users: Tensor,
        k: int,
        exclude: Tensor | BagIds | None = None,
        *,
        catalogue: CatalogueVectors | None = None,
        listed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`recommend`; of vectors of users ``[B, K]``.

        Args:
            users: vectors.
            k: items per row.
            exclude: items to leave out.
            catalogue: vectors of all items, of this model; None: computed.
            listed: the items that can be found, bool ``[num_embeddings]``; None: those of the catalogue.
        """
        rows, items = excluded_pairs(exclude, len(users), users.device)
        listed = self.in_catalogue if listed is None else listed
        # Places beyond the catalogue are filled at the end.
        beyond = max(0, k - len(self.in_catalogue))
        k -= beyond
        best = users.new_full((len(users), k), float("-inf"))
        found = torch.full(best.shape, -1, dtype=torch.int64, device=users.device)
        size = max(1, min(BLOCK_ITEMS, BLOCK_SCORES // max(1, len(users))))
        for first, block in CatalogueVectors(self) if catalogue is None else catalogue:
            for start, vectors in zip(range(first, first + len(block), size), block.split(size), strict=True):
                scores = users @ vectors.T
                scores.masked_fill_(~listed[start : start + len(vectors)], float("-inf"))
                here = (items >= start) & (items < start + len(vectors))
                scores[rows[here], items[here] - start] = float("-inf")
                ends = torch.arange(start, start + len(vectors), device=users.device).expand_as(scores)
                best, at = torch.cat([best, scores], 1).topk(k)
                found = torch.cat([found, ends], 1).gather(1, at)
        found = found.masked_fill(best == float("-inf"), -1)
        return F.pad(found, (0, beyond), value=-1), F.pad(best, (0, beyond), value=float("-inf"))


class Recommendations(NamedTuple):
    """What is found for rows.

    Args:
        items: the values of the item's column, Python objects ``[n, k]``, best first; None where there is none left.
        scores: float32 ``[n, k]``, minus infinity there.
    """

    items: NDArray[np.object_]
    scores: NDArray[np.float32]


class CatalogueVectors:
    """Vectors of all ids of a model's items in blocks, which are kept for the next time where they take little.

    Args:
        model: whose they are, in evaluation mode and not changed meanwhile.
    """

    def __init__(self, model: RetrievalModel) -> None:
        self.model = model
        self._kept: list[tuple[int, Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[int, Tensor]] = []
        total, small = len(self.model.in_catalogue), False
        for start, vectors in self.model.item_blocks():
            small = vectors[:1].nbytes * total <= KEPT_BYTES
            if small:
                kept.append((start, vectors))
            yield start, vectors
        if small:
            self._kept = kept


def excluded_pairs(exclude: Tensor | BagIds | None, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and items, int64 ``[m]`` each, that are left out; see :meth:`RetrievalModel.recommend`.

    Raises:
        ConfigError: neither of the forms.
    """
    if exclude is None:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return none, none
    if isinstance(exclude, BagIds) and exclude.offsets.numel() == rows + 1:
        owners = torch.arange(rows, device=device)
        return torch.repeat_interleave(owners, exclude.offsets.diff().to(device)), exclude.values.long().to(device)
    if isinstance(exclude, Tensor) and exclude.dim() == 2 and len(exclude) == rows and not exclude.is_floating_point():
        listed = exclude.long().to(device)
        at, _ = where = (listed >= 0).nonzero(as_tuple=True)
        return at, listed[where]
    got = f"{type(exclude).__name__} {list(exclude.shape)}" if isinstance(exclude, Tensor) else type(exclude).__name__
    raise ConfigError(
        f"`exclude` must be item ids [{rows}, L] padded with -1, or BagIds(values, offsets [{rows + 1}]); got {got}"
    )


def candidate_of(schema: Schema, given: str | None, key: str) -> str:
    """The feature of the candidate: as given, or the one whose table others read, or the one named ``item``.

    Raises:
        ConfigError: none or several could be it.
        UnknownNameError: no such feature.
    """
    if given is not None:
        if given not in schema.names:
            raise unknown_name("feature", given, schema.names)
        return given
    readers: dict[str, list[str]] = {}
    for feature in schema:
        readers.setdefault(feature.table_name, []).append(feature.name)
    shared = [names[0] for names in readers.values() if len(names) > 1]
    if len(shared) == 1:
        return shared[0]
    if "item" in schema.names:
        return "item"
    raise ConfigError(
        f"model {key!r} finds items, and which feature is the item is not told by a table that features share, nor by "
        f"the name 'item'; say so with the hyperparameter `item`, one of {', '.join(schema.names)}"
    )


def check_names(key: str, schema: Schema, given: Mapping[str, Collection[str]], taken: Collection[str] = ()) -> None:
    """Refuse names of features, by hyperparameter, that are none, are ``taken``, or come twice.

    Raises:
        ConfigError: names all of them.
    """
    faults, seen = [], set(taken)
    for hyperparameter, names in given.items():
        for name in names:
            if name not in schema.names:
                faults.append(f"`{hyperparameter}`: {unknown_name('feature', str(name), schema.names)}")
            elif name in seen:
                faults.append(f"`{hyperparameter}`: feature {name!r} is named already, or the candidate")
            seen.add(name)
    raise_faults(faults, f"model {key!r}")


def warn_of_unread(key: str, names: Sequence[str], read: Sequence[str]) -> None:
    """Warn of features that a model does not read; called by the model's ``__init__``."""
    unread = [name for name in names if name not in read]
    if unread:
        warnings.warn(
            f"model {key!r} reads {', '.join(read)}, not {', '.join(unread)}; tables that these alone have stay as "
            "they were drawn and take bytes for nothing: leave these features out of the data",
            stacklevel=4,
        )


def longest_lists(given: JSON) -> dict[str, int]:
    """By name of a feature how many ids an item has at most.

    Raises:
        ConfigError: numbers below 1.
    """
    wrong = {name: n for name, n in given.items() if not isinstance(n, int) or isinstance(n, bool) or n < 1}
    if wrong:
        raise ConfigError(f"`item_lists` must map features to numbers of ids, at least 1 each; got {wrong!r:.200}")
    return {str(name): int(n) for name, n in given.items()}
