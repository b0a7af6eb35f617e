"""The interface of data sets that training, searches, sharding and reports use; it imports no data library."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from inspect import getattr_static
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from recsys_embed.data.batch import Batch
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.features import Schema
from recsys_embed.utils.types import JSONMapping

HELD_OUT = "held_out"
"""The split of training rows that are held out."""


class BatchStream(Protocol):
    """The batches of one epoch, and how many there are."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class BatchSource(Protocol):
    """The members of a data set that a :class:`recsys_embed.train.Trainer` uses."""

    @property
    def splits(self) -> Collection[str]:
        """Names of the splits: ``train``, and ``valid`` and ``test`` where there are such rows."""
        ...

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        shuffle: bool = ...,
        seed: int = ...,
        epoch: int = ...,
        device: torch.device | str | None = ...,
        start_batch: int = ...,
    ) -> BatchStream:
        """Batches of one epoch.

        The order depends on ``seed`` and ``epoch`` alone, and ``start_batch`` leaves out the batches before it, so that
        a resumed run gets exactly the batches that it had not seen.
        """
        ...


@runtime_checkable
class DataSource(BatchSource, Protocol):
    """A data set, whatever it is stored as; :class:`recsys_embed.data.RowSource` implements most of it.

    Training and most searches use ``splits``, ``num_dense``, ``schema``, ``digest``, ``numeric_moments`` and
    ``batches`` alone. ``counts`` and ``stats`` are for planners and reports, ``held_out`` is for searches that fit on
    rows the weights have not seen, ``portion`` and ``numeric_sums`` are for training on several processes.
    """

    @property
    def splits(self) -> Mapping[str, int]:
        """Rows of every split."""
        ...

    @property
    def num_dense(self) -> int:
        """Numeric columns."""
        ...

    @property
    def digest(self) -> str:
        """Hash of the rows of all splits: equal digests hold the same rows in the same order."""
        ...

    @property
    def stats(self) -> JSONMapping | None:
        """Statistics of the features, in the form of a data folder's ``stats.json``; None if there are only counts."""
        ...

    def schema(self, embedding_dim: int) -> Schema:
        """The categorical features in the order of the columns of ``ids``."""
        ...

    def rows(self, split: str) -> int:
        """Rows that :meth:`batches` gives."""
        ...

    def numeric_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the numeric columns in training: float32 ``[num_dense]`` each."""
        ...

    def numeric_sums(self) -> Tensor:
        """Number, sums and sums of squares of the numeric columns in training: float64 ``[1 + 2 * num_dense]``."""
        ...

    def counts(self, feature: str) -> Tensor | None:
        """How often each id of a feature occurs in training: int64 ``[num_embeddings]``; None where ids are no rows."""
        ...

    def held_out(self, share: float) -> DataSource:
        """This data set, the last ``share`` of its training rows moved from ``train`` to the split ``held_out``."""
        ...

    def portion(self, rank: int, world: int) -> DataSource:
        """The rows of one of ``world`` processes: every row of every split is in exactly one portion."""
        ...


TRAINING = ("splits", "num_dense", "digest", "schema", "batches")
"""Members that every run uses."""


def need_members(data: Any, purpose: str, members: Sequence[str] = TRAINING) -> None:
    """Refuse data that lacks members of a :class:`DataSource`.

    Args:
        data: what was given as a data set.
        purpose: what needs it, e.g. ``"training"``.
        members: names of those that are needed.

    Raises:
        ConfigError: names all that are missing.

    >>> need_members("criteo/", "training")
    Traceback (most recent call last):
    recsys_embed.errors.ConfigError: training needs a data set with splits, num_dense, ...; got str, which lacks ...
    """
    # A property may take long, so it is looked for before it is asked, and only those that are quick are asked.
    missing = [m for m in members if getattr_static(data, m, None) is None and not hasattr(data, m)]
    if missing:
        raise ConfigError(
            f"{purpose} needs a data set with {', '.join(members)}; got {type(data).__name__}, which lacks "
            f"{', '.join(missing)}; open a data folder with recsys_embed.data.open_dataset, or see "
            "recsys_embed.data.RowSource for one of your own"
        )
    raise_faults(wrong_members(data, members), f"data set {type(data).__name__}")


def wrong_members(data: Any, members: Sequence[str] = TRAINING) -> list[str]:
    """Members of a data set that are there and of another kind than :class:`DataSource` says."""
    faults = []
    if "splits" in members:
        splits = data.splits
        if not isinstance(splits, Collection) or isinstance(splits, str) or not all(isinstance(s, str) for s in splits):
            wanted = "`splits` must be a mapping from the names of the splits to their numbers of rows"
            faults.append(f"{wanted}; got {splits!r:.80}{'; make it a property' if callable(splits) else ''}")
        elif not isinstance(splits, Mapping):
            if hasattr(data, "read"):
                faults.append(f"`splits` must map the names of the splits to their numbers of rows; got {splits!r:.80}")
        else:
            odd = {s: n for s, n in splits.items() if n is not None and not (_is_count(n))}
            if odd:
                faults.append(f"`splits` must map to numbers of rows; got {odd!r:.80}")
        if not faults and "train" not in splits and "batches" in members:
            faults.append(
                f"`splits` must name a split 'train'; got {', '.join(splits) or 'none'} (a folder made with `--like` "
                "has one where a split is asked for, e.g. `--split order`)"
            )
    if "num_dense" in members and not _is_count(data.num_dense):
        cure = "; make it a property" if callable(data.num_dense) else ""
        faults.append(f"`num_dense` must be the number of numeric columns; got {data.num_dense!r:.80}{cure}")
    faults += [
        f"`{name}` must be a method; got {getattr(data, name)!r:.80}"
        for name in ("schema", "batches", "read", "rows", "numeric_moments")
        if name in members and not callable(getattr(data, name, None))
    ]
    return faults


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0
