"""Collections: one lookup call for all features of a model."""

from recsys_embed.collection.embedding_collection import EmbeddingCollection

__all__ = ["EmbeddingCollection"]
