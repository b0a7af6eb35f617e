"""Compress the embedding tables of an existing model in place, and turn compressed tables back into dense ones."""

from recsys_embed.compress.counts import table_counts
from recsys_embed.compress.inplace import compress_, materialize_
from recsys_embed.compress.report import CompressedTable, CompressReport, SharedTable

__all__ = ["CompressReport", "CompressedTable", "SharedTable", "compress_", "materialize_", "table_counts"]
