"""Raw rows to batches, with the encoders that a model was trained with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import torch

from recsys_embed.data.batch import Batch
from recsys_embed.data.frame_inputs import dense_sources, frame_inputs
from recsys_embed.data.manifest import vector_places
from recsys_embed.data.serving.stored import StoredEncoders
from recsys_embed.data.sources import Source
from recsys_embed.data.sources.base import BadRow, Chunk


@dataclass(frozen=True)
class EncodedRows:
    """A chunk of rows as a model takes them.

    Args:
        batch: the rows that could be encoded; labels are NaN.
        frame: their raw values.
        bad: the others.
        counts: what their values needed, by column, see :class:`recsys_embed.data.columns.Encoded`.
    """

    batch: Batch
    frame: pl.DataFrame
    bad: tuple[BadRow, ...]
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


class RowEncoder(ABC):
    """What turns raw rows into a model's inputs.

    Args:
        stored: encoders as a file holds them.

    Attributes:
        columns: of the raw rows that are needed.
        nested: those whose every value is a list.
        texts: those of which texts are known, which numbers are read as.
    """

    columns: tuple[str, ...]
    nested: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    def __init__(self, stored: StoredEncoders) -> None:
        about = stored.about
        self.single = [f["name"] for f in about["features"] if f["form"] == "single"]
        self.lists = [f["name"] for f in about["features"] if f["form"] != "single"]
        self.dense = list(about.get("dense", ()))
        self.vectors = vector_places(about.get("columns", ()), self.dense)

    @abstractmethod
    def open(self, table: Any, options: Mapping[str, Any] | None = None) -> Source:
        """The rows of a table as a user gives it, with the types that the encoders take.

        Raises:
            ConfigError: columns that are absent or of another type; names all of them.
        """

    @abstractmethod
    def encode(self, source: Source, chunk: Chunk) -> EncodedRows:
        """The rows of a chunk that has ``columns``."""

    def batch(self, frame: pl.DataFrame, rows: int) -> Batch:
        """Encoded columns as a batch."""
        dense, ids, lists = frame_inputs(frame, dense_sources(self.dense), frame.select(self.single), self.lists)
        label = torch.full((rows,), torch.nan)
        bags = None if lists is None else lists.long()
        return Batch(dense, ids.long(), label, lists=bags, vector_places=self.vectors)
