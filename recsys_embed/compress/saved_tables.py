"""What the files of other libraries say of a compressed table, beside its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.features import Unseen
from recsys_embed.registry import config_from_dict
from recsys_embed.utils.settings import FilePart


@dataclass(frozen=True)
class SavedTable(FilePart):
    """A table as a file describes it.

    Args:
        name: of the feature, which salts hashes.
        config: of the method, as its ``to_dict`` gives it.
        unseen: policy for unseen ids.
    """

    name: str
    config: Mapping[str, Any]
    unseen: Unseen | None

    @property
    def method_config(self) -> MethodConfig:
        return config_from_dict(self.config)


def description(module: CompressedEmbedding) -> dict[str, Any]:
    """JSON values of the fields of :class:`SavedTable`."""
    return {"name": module.spec.name, "config": module.config.to_dict(), "unseen": module.spec.unseen}


@contextmanager
def damages(where: str) -> Iterator[None]:
    """Turn what is wrong with a file's values into a CheckpointError that names the file."""
    try:
        yield
    except ConfigError as e:
        raise CheckpointError(f"{where} is damaged: {e}") from e
