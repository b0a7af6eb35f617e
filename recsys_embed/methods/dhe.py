"""dhe: a network computes each vector from many hashes of the id (Kang et al., DHE, KDD 2021, arXiv 2010.10784).

Where this differs from the paper: hashes are splitmix64, which take any 64-bit id, and not linear modulo a prime; and
there is no batch normalisation, with which a vector would depend on the other ids of the batch. Instead, encodings are
centred, and activations are shifted and scaled by constants, so that every layer starts with mean 0 and variance 1.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor

from recsys_embed.core import hashing
from recsys_embed.core.hash_network import HashNetwork
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.program import Initializer, LookupProgram, Table
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.fit import importance_of
from recsys_embed.features import FeatureSpec

_FIT_STEPS, _FIT_BATCH, _FIT_RATE = 300, 4096, 0.01


@dataclass(frozen=True, kw_only=True)
class DheConfig(MethodConfig):
    """``num_hashes`` hashes of the id, then ``num_layers`` hidden layers of width ``hidden``, then a linear one.

    Nothing is stored per id, and nothing is read: each distinct id of a batch costs a pass through the network. The
    paper has 1024 hashes and 5 hidden layers; fewer hashes leave more of a small budget to the layers.

    >>> DheConfig(hidden=64).footprint(FeatureSpec("C1", 1_000_000, 16)).serve
    53824
    """

    method: ClassVar[str] = "dhe"
    accepts_raw: ClassVar[bool] = True

    hidden: int = param(MISSING, "width of the hidden layers", low=1, high=65536)
    num_hashes: int = param(128, "hashes of an id (k)", low=1, high=65536)
    num_layers: int = param(2, "hidden layers", low=1, high=16)
    encoding: Literal["uniform", "normal"] = param("uniform", "distribution of the encoded hashes")
    activation: Literal["mish", "relu"] = param("mish", "of the hidden layers")

    @property
    def computes(self) -> bool:
        """True: no rows are read."""
        return True

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec)
        if self.encoding == "normal" and self.num_hashes % 2:
            faults.append(f"`num_hashes` must be even for encoding 'normal', which is of pairs; got {self.num_hashes}")
        return faults

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        distribution, scale = spec.initial_distribution()
        std = scale / 3**0.5 if distribution == "uniform" else scale
        widths = [self.num_hashes, *[self.hidden] * self.num_layers, spec.embedding_dim]
        tables, names = [], []
        for k, (given, wide) in enumerate(pairwise(widths)):
            last = k == self.num_layers
            start = Initializer("normal", (std if last else 1.0) * given**-0.5)
            names.append((f"weight{k}", f"bias{k}"))
            tables.append(Table(f"weight{k}", given, wide, start, dense=True))
            tables.append(Table(f"bias{k}", 1, wide, Initializer("constant"), dense=True))
        salt = hashing.salt(self.seed, spec.table_name, "encoding", 0)
        head = HashNetwork(tuple(names), self.num_hashes, salt, self.encoding, self.activation)
        return LookupProgram(tuple(tables), (), head=head)

    @classmethod
    def max_size(cls, spec: FeatureSpec, **params: Any) -> int:
        low, high, whole = 1, 65536, spec.num_ids * spec.embedding_dim
        while low < high:
            middle = (low + high + 1) // 2
            tables = cls.sized(spec, middle, **params).build_program(spec).tables
            low, high = (middle, high) if sum(t.elements for t in tables) < whole else (low, middle - 1)
        return low

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        return cls.from_params({**params, "hidden": size})


class DheEmbedding(CompressedEmbedding):
    """Drop-in over a network of many hashes of an id; takes any int64 id.

    >>> emb = DheEmbedding(1_000_000, 16, hidden=64)
    >>> emb(torch.tensor([1, 2**40])).shape, emb.footprint().serve
    (torch.Size([2, 16]), 53824)
    """

    config_cls = DheConfig
    config: DheConfig

    @torch.no_grad()
    def fit_(self, weight: Tensor, counts: Tensor | None = None) -> None:
        """Approximate ``weight [spec.num_ids, embedding_dim]``: some steps of Adam, then the best last layer.

        Given the other layers, weighted least squares have one solution.
        """
        importance, head = importance_of(self, weight, counts), cast("HashNetwork", self.program.head)
        tables = [self.table(name) for name in head.tables]
        self._solve_last_layer(head, tables, weight, importance)
        with torch.enable_grad():
            trained = [t.detach().float().clone().requires_grad_(True) for t in tables]
            self._train(head, trained, weight, importance)
        for table, values in zip(tables, trained, strict=True):
            table.copy_(values)
        self._solve_last_layer(head, tables, weight, importance)

    def _train(self, head: HashNetwork, tables: list[Tensor], weight: Tensor, importance: Tensor) -> None:
        """Steps of Adam on ids drawn by their importance."""
        generator = torch.Generator().manual_seed(self.config.seed)
        ends, scale = importance.cumsum(0), weight[importance > 0].float().square().mean().sqrt().clamp_min(1e-12)
        optimizer = torch.optim.Adam(tables, lr=_FIT_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _FIT_STEPS)
        # The last layer in units of the target, whose steps are those of the others.
        last = tables[-2:]
        with torch.no_grad():
            for t in last:
                t.div_(scale)
        for _ in range(_FIT_STEPS):
            drawn = torch.rand(min(_FIT_BATCH, 4 * len(weight)), generator=generator, dtype=torch.float64).to(ends)
            ids = torch.searchsorted(ends, drawn * ends[-1], right=True).clamp_max(len(weight) - 1)
            out = head.apply(tables[0][:0], tables, ids)
            loss = (out - weight[ids].float() / scale).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            for t in last:
                t.mul_(scale)

    def _solve_last_layer(self, head: HashNetwork, tables: list[Tensor], weight: Tensor, importance: Tensor) -> None:
        size = tables[-2].shape[0] + 1
        gram = weight.new_zeros(size, size, dtype=torch.float64)
        right = weight.new_zeros(size, weight.shape[1], dtype=torch.float64)
        for ids in self._chunks(len(weight), 1 << 14):
            features = head.hidden(ids, tables).double()
            features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
            weighted = features * importance[ids].unsqueeze(1)
            gram += weighted.T @ features
            right += weighted.T @ weight[ids].double()
        # The least ridge that keeps the solution finite where features outnumber ids.
        gram += 1e-8 * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype, device=gram.device)
        solution = torch.linalg.solve(gram, right)
        tables[-2].copy_(solution[:-1])
        tables[-1].copy_(solution[-1:])
