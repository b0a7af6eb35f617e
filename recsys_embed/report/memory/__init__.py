"""Memory reports: bytes of embedding tables by cause, and alternatives."""

from recsys_embed.report.memory.report import memory_report

__all__ = ["memory_report"]
