"""Drop-in modules: the base of every method's module."""

from recsys_embed.embedding.compressed_embedding import CompressedEmbedding

__all__ = ["CompressedEmbedding"]
