"""Static embeddings of sentence-transformers with a compressed table, saved and loaded as that library does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self, cast

from torch import nn

from recsys_embed.compress.build import call_options
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import ConfigError
from recsys_embed.registry import config_from_dict, get_method
from recsys_embed.utils.files import write_text
from recsys_embed.utils.optional import require

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
            "name": table.spec.name,
            "config": table.config.to_dict(),
            "unseen": table.spec.unseen,
            "options": call_options(table),
        }
        write_text(Path(output_path) / FILE, json.dumps(described, indent=2))

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> Self:
        """The module of a folder that :meth:`save` wrote; arguments are those of ``StaticEmbedding.load``."""
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {name: kwargs[name] for name in names if name in kwargs}
        file = cls.load_file_path(model_name_or_path, filename=FILE, **where)
        described = json.loads(Path(cast("str", file)).read_text(encoding="utf-8"))
        config = config_from_dict(described["config"])
        table = get_method(config.method).embedding_cls(
            described["num_embeddings"],
            described["embedding_dim"],
            config=config,
            name=described["name"],
            unseen=described["unseen"],
            **described["options"],
        )
        weights = cls.load_torch_weights(model_name_or_path=model_name_or_path, **where)
        tokenizer = Tokenizer.from_file(cls.load_file_path(model_name_or_path, filename="tokenizer.json", **where))
        self = cls(tokenizer, embedding_dim=1)
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.embedding = table.stand_in()
        self.load_state_dict(weights)
        return self


def adapt(model: nn.Module) -> None:
    """Give each static embedding within ``model`` the class that saves its table as it is now."""
    for module in model.modules():
        if type(module) in (StaticEmbedding, CompressedStaticEmbedding):
            compressed = isinstance(module.embedding, CompressedEmbedding)
            module.__class__ = CompressedStaticEmbedding if compressed else StaticEmbedding
