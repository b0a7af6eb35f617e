"""Static embeddings of sentence-transformers with a compressed table, saved and loaded as that library does it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from recsys_embed.compress.build import OPTIONS, call_options
from recsys_embed.compress.saved_tables import SavedTable, damages, description
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.kernels.derived_tensors import recreate_derived_tensors
from recsys_embed.plan import Plan
from recsys_embed.registry import get_method
from recsys_embed.utils.files import write_text
from recsys_embed.utils.optional import require
from recsys_embed.utils.strict_json import strict_json

require("sentence_transformers", extra="transformers", purpose="loading a compressed StaticEmbedding")

from sentence_transformers.models import StaticEmbedding  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

FILE = "recsys_embed.json"


class CompressedStaticEmbedding(StaticEmbedding):
    """What a ``StaticEmbedding`` is once its table has been compressed.

    ``SentenceTransformer(path, trust_remote_code=True)`` loads it: sentence-transformers asks so of every class that is
    not its own.
    """

    embedding: CompressedEmbedding

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the state, the tokenizer and the configuration of the table into a folder."""
        table = self.embedding
        if table.served is not None:
            raise ConfigError(
                "the table is read from an exported file, which save cannot copy; keep that file, and load it into the "
                "same model: recsys_embed.load(path, into=model)"
            )
        super().save(output_path, *args, **kwargs)
        described = {
            "num_embeddings": table.num_embeddings,
            "embedding_dim": table.embedding_dim,
            **description(table),
            "options": call_options(table),
        }
        write_text(Path(output_path) / FILE, json.dumps(described, indent=2))

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> Self:
        """The module of a folder that :meth:`save` wrote; arguments are those of ``StaticEmbedding.load``."""
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {name: kwargs[name] for name in names if name in kwargs}
        file = cls.load_file_path(model_name_or_path, filename=FILE, **where)
        weights = cls.load_torch_weights(model_name_or_path=model_name_or_path, **where)
        with damages(str(file)):
            table = _table(_read(Path(cast("str", file))), weights)
        tokenizer = Tokenizer.from_file(cls.load_file_path(model_name_or_path, filename="tokenizer.json", **where))
        self = cls(tokenizer, embedding_dim=1)
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.embedding = table
        self.load_state_dict(weights, assign=True)
        recreate_derived_tensors(table, torch.device("cpu"))
        return self


@dataclass(frozen=True)
class _Table(SavedTable):
    num_embeddings: int
    embedding_dim: int
    options: Mapping[str, Any]


def _read(file: Path) -> _Table:
    try:
        return _Table.read(strict_json(file.read_bytes()), file.name)
    except ValueError as e:
        raise ConfigError(str(e)) from e


def _table(described: _Table, weights: Mapping[str, Any]) -> CompressedEmbedding:
    """The table without memory, once it is known that ``weights`` fill it."""
    config = described.method_config
    spec = FeatureSpec(described.name, described.num_embeddings, described.embedding_dim)
    Plan({described.name: config}).gathered(Schema([spec]))  # refuses what takes long to build
    strange = described.options.keys() - set(OPTIONS)
    raise_faults([f"{key!r} is no option of a table" for key in sorted(strange)], "options")
    table = get_method(config.method).embedding_cls(
        described.num_embeddings,
        described.embedding_dim,
        config=config,
        name=described.name,
        unseen=described.unseen,
        device="meta",
        **described.options,
    )
    table.stand_in()
    for key, value in table.state_dict(prefix="embedding.").items():
        found = weights.get(key)
        if not isinstance(found, Tensor) or (found.shape != value.shape and not key.endswith("_extra_state")):
            have = "nothing" if not isinstance(found, Tensor) else str(tuple(found.shape))
            raise ConfigError(f"it describes {key!r} of {tuple(value.shape)}; the weights beside it hold {have}")
    return table


def adapt(model: nn.Module) -> None:
    """Give each static embedding within ``model`` the class that saves its table as it is now."""
    for module in model.modules():
        if type(module) in (StaticEmbedding, CompressedStaticEmbedding):
            compressed = isinstance(module.embedding, CompressedEmbedding)
            module.__class__ = CompressedStaticEmbedding if compressed else StaticEmbedding
