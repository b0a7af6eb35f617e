"""The methods, one file each. A method registered here appears in every list, test, table and command."""

from recsys_embed.methods.adaptive import AdaptiveEmbedding
from recsys_embed.methods.compositional import CompositionalEmbedding
from recsys_embed.methods.dhe import DheEmbedding
from recsys_embed.methods.dnis import DnisEmbedding
from recsys_embed.methods.freqcut import FreqcutEmbedding
from recsys_embed.methods.full import FullEmbedding
from recsys_embed.methods.hash import HashEmbedding
from recsys_embed.methods.lowdim import LowdimEmbedding
from recsys_embed.methods.memcom import MemcomEmbedding
from recsys_embed.methods.mixeddim import MixeddimEmbedding
from recsys_embed.methods.multihash import MultihashEmbedding
from recsys_embed.methods.optembed import OptembedEmbedding
from recsys_embed.methods.pep import PepEmbedding
from recsys_embed.methods.robe import RobeEmbedding
from recsys_embed.methods.tiered import TieredEmbedding
from recsys_embed.methods.tt import TtEmbedding
from recsys_embed.methods.unified import UnifiedEmbedding
from recsys_embed.registry import register

register(FullEmbedding, paper="full table (torch.nn.Embedding)", tags=("baseline",))
register(HashEmbedding, paper="Weinberger et al., ICML 2009, arXiv 0902.2206", tags=("hashing",))
register(LowdimEmbedding, paper="low-rank factorisation; optimum by Eckart and Young 1936", tags=("baseline",))
register(MultihashEmbedding, paper="Svenstrup et al., NeurIPS 2017, arXiv 1709.03933", tags=("hashing",))
register(UnifiedEmbedding, paper="Coleman et al., NeurIPS 2023, arXiv 2305.12102", tags=("hashing", "shared"))
register(CompositionalEmbedding, paper="Shi et al., KDD 2020, arXiv 1909.02107", tags=("partition",))
register(MemcomEmbedding, paper="Pansare et al., MLSys 2022, arXiv 2203.10135", tags=("hashing", "per-id"))
register(RobeEmbedding, paper="Desai et al., MLSys 2022, arXiv 2108.02191", tags=("hashing", "shared"))
register(TtEmbedding, paper="Yin et al., MLSys 2021, arXiv 2101.11714", tags=("factorisation", "computed"))
register(DheEmbedding, paper="Kang et al., KDD 2021, arXiv 2010.10784", tags=("hashing", "computed"))
register(MixeddimEmbedding, paper="Ginart et al. 2019, arXiv 1909.11810", tags=("frequency", "projection"))
register(TieredEmbedding, paper="Zhang et al., CIKM 2023, arXiv 2308.09395", tags=("frequency", "precision"))
register(AdaptiveEmbedding, paper="AdaptEmb, as in DeepRec", tags=("hashing", "frequency"))
register(FreqcutEmbedding, paper="a smaller vocabulary with one row for the rest", tags=("baseline", "frequency"))
register(OptembedEmbedding, paper="Lyu et al., CIKM 2022, arXiv 2208.04482", tags=("pruning", "search"))
register(DnisEmbedding, paper="Cheng, Shen, Huang 2020, arXiv 2006.04466", tags=("pruning", "search"))
register(PepEmbedding, paper="Liu et al., ICLR 2021, arXiv 2101.07577", tags=("pruning", "search"))
