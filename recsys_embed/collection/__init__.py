"""All features of a model behind one call per step."""

from recsys_embed.collection.embedding_collection import EmbeddingCollection

__all__ = ["EmbeddingCollection"]
