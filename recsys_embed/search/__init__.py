"""Embedding searches: which rows to keep and which width each field needs (OptEmbed, DNIS, PEP), and evolution.

>>> from recsys_embed.search import OptembedLayer  # between a lookup and a network, in any model
"""

from recsys_embed.search.base import Search
from recsys_embed.search.dnis import DnisSearch
from recsys_embed.search.evaluate import CandidateEvaluator
from recsys_embed.search.evolution import Evolution, WidthSpace, evolve
from recsys_embed.search.layers import DnisLayer, OptembedLayer
from recsys_embed.search.optembed import OptembedSearch
from recsys_embed.search.outcome import SearchOutcome
from recsys_embed.search.pep import PepSearch
from recsys_embed.search.registry import get_search, list_searches, register_search
from recsys_embed.search.run import run_search
from recsys_embed.search.settings import DnisSettings, OptembedSettings, PepSettings
from recsys_embed.search.supernet import Supernet
from recsys_embed.utils.deprecated import earlier_names

__all__ = [
    "CandidateEvaluator",
    "DnisLayer",
    "DnisSearch",
    "DnisSettings",
    "Evolution",
    "OptembedLayer",
    "OptembedSearch",
    "OptembedSettings",
    "PepSearch",
    "PepSettings",
    "Search",
    "SearchOutcome",
    "Supernet",
    "WidthSpace",
    "evolve",
    "get_search",
    "list_searches",
    "register_search",
    "run_search",
]

__getattr__ = earlier_names(__name__, {"Space": "search.evolution.WidthSpace"})
