"""Compress the embedding tables inside a model that exists, and turn them back into plain ones."""

from recsys_embed.compress.counts import table_counts
from recsys_embed.compress.inplace import compress_, materialize_
from recsys_embed.compress.report import CompressedTable, CompressReport, SharedTable

__all__ = ["CompressReport", "CompressedTable", "SharedTable", "compress_", "materialize_", "table_counts"]
