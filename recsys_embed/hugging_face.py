"""Import this to load models with compressed tables by ``from_pretrained`` of Hugging Face's transformers.

Where a model of transformers has been compressed in the same process, it is imported already.
"""

from recsys_embed.compress.hugging_face import CompressedTablesConfig

__all__ = ["CompressedTablesConfig"]
