"""Where the bytes of embedding tables are, and what they could be."""

from recsys_embed.report.memory.report import memory_report

__all__ = ["memory_report"]
