"""A head that computes vectors from ids alone: hashes of the id go into a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_embed.core import hashing
from recsys_embed.core.heads import Head, Shapes

HASH_RANGE = 1_000_000
"""Values of a hash."""
# Mean and standard deviation of an activation of normal inputs.
_MOMENTS = {"mish": (0.2404039, 0.6281307), "relu": ((2 * pi) ** -0.5, (0.5 - 0.5 / pi) ** 0.5)}


@dataclass(frozen=True)
class HashNetwork(Head):
    """Hash encodings of an id through a network (DHE, Kang et al. 2021).

    ``num_hashes`` hashes of the id in [0, 1e6) become numbers of mean 0 and variance 1: uniform ones, or by pairs
    normal ones (Box and Muller 1958). Activations are shifted and scaled by constants such that they have mean 0 and
    variance 1 for normal inputs, which weights and biases of the next layer could undo.

    Args:
        layers: names of each layer's weights ``[in, out]`` and biases ``[1, out]``; the last one is linear.
        salt: of the hashes.
    """

    layers: tuple[tuple[str, str], ...]
    num_hashes: int
    salt: int
    encoding: Literal["uniform", "normal"] = "uniform"
    activation: Literal["mish", "relu"] = "mish"

    pools = "ids"
    keeps_zero = False
    reads_ids = True
    generates = True
    shares_all = True

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(name for names in self.layers for name in names)

    def width(self, columns: int, shapes: Shapes) -> int:
        return shapes[self.layers[-1][0]][-1]

    def faults(self, columns: int, shapes: Shapes) -> list[str]:
        faults, given = [], self.num_hashes
        if columns:
            faults.append(f"a network of hashes reads no columns; got {columns}")
        if self.encoding == "normal" and self.num_hashes % 2:
            faults.append(f"normal encodings are made of pairs of hashes; got {self.num_hashes}")
        for weight, bias in self.layers:
            wide, offset = shapes[weight], shapes[bias]
            if len(wide) != 2 or wide[0] != given or offset != (1, wide[1]):
                faults.append(
                    f"a layer of {given} inputs must have shapes [{given}, h] and [1, h]; got {wide}, {offset}"
                )
            given = wide[-1]
        return faults

    def encode(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Encodings ``[n, num_hashes]`` of int64 ``ids [n]``, of mean 0 and variance 1."""
        salts = hashing.sequence(self.salt, torch.arange(self.num_hashes, device=ids.device))
        values = hashing.hash_rows(ids.unsqueeze(-1), salts, HASH_RANGE)
        # The middles of equal parts of (0, 1), in single precision at least.
        uniform = (values.to(torch.promote_types(dtype, torch.float32)) + 0.5) / HASH_RANGE
        if self.encoding == "uniform":
            return ((uniform - 0.5) * 12**0.5).to(dtype)
        radius, angle = uniform.chunk(2, -1)
        radius, angle = (-2 * radius.log()).sqrt(), 2 * pi * angle
        return torch.cat([radius * angle.cos(), radius * angle.sin()], -1).to(dtype)

    def hidden(self, ids: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """What the last layer multiplies: ``[n, h]``."""
        out = self.encode(ids, tables[0].dtype)
        mean, std = _MOMENTS[self.activation]
        for weight, bias in zip(tables[:-2:2], tables[1:-2:2], strict=True):
            out = out @ weight + bias
            out = ((F.mish(out) if self.activation == "mish" else out.relu()) - mean) / std
        return out

    def apply(self, columns: Tensor, tables: Sequence[Tensor], ids: Tensor | None = None) -> Tensor:
        if ids is None:
            raise ValueError("a network of hashes needs the ids")
        return self.hidden(ids, tables) @ tables[-2] + tables[-1]

    def keys(self, ids: Tensor) -> list[Tensor]:
        return [ids]

    def made(self, shapes: Shapes) -> tuple[int, int]:
        # Each layer's product, its activation, and this one shifted and scaled.
        return self.num_hashes, self.num_hashes + 3 * sum(shapes[bias][-1] for _, bias in self.layers[:-1])

    def describe(self) -> str:
        return "computed from hashes by a network"
