"""full: the full table, as in torch; the baseline that every method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import Initializer, LookupProgram, MixedRadixDigit, RowLookup, Table, held_part
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.other_inputs import call_with_other_input
from recsys_embed.errors import ConfigError
from recsys_embed.features import FeatureSpec
from recsys_embed.kernels.data_parallel import prepare_data_parallel
from recsys_embed.kernels.derivatives import have_tangents, transformed
from recsys_embed.kernels.id_checks import bag_mode, check_id_dtype, check_offsets, given_ids
from recsys_embed.kernels.low_precision_table import LowPrecisionTable
from recsys_embed.kernels.pooling import pool_vectors
from recsys_embed.kernels.recording import recording
from recsys_embed.kernels.unseen_ids import with_unseen_row
from recsys_embed.utils.types import IdValues


@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodConfig):
    """One row per id.

    >>> FullConfig().footprint(FeatureSpec("C1", 1000, 16)).serve
    64000
    """

    method: ClassVar[str] = "full"

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        table = Table("weight", spec.num_ids, spec.embedding_dim, Initializer.plain(spec))
        return LookupProgram((table,), (RowLookup("weight", MixedRadixDigit()),))

    @classmethod
    def max_size(cls, spec: FeatureSpec, **params: Any) -> int:
        return 1

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        return cls.from_params(params)


class FullEmbedding(CompressedEmbedding):
    """``nn.Embedding`` (``mode=None``) or ``nn.EmbeddingBag``: same options, same numbers, same state-dict keys.

    >>> emb = FullEmbedding(10, 4, padding_idx=0)
    >>> _ = emb.load_state_dict(nn.Embedding(10, 4, padding_idx=0).state_dict())
    >>> emb(torch.tensor([[0, 3]])).shape
    torch.Size([1, 2, 4])
    """

    config_cls = FullConfig
    supports_torch_options = True
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def reset_parameters(self, seed: int | None = None) -> None:
        super().reset_parameters(seed)
        if self.padding_idx is not None and self._device().type != "meta":
            with torch.no_grad():
                held, first = held_part(self.table("weight"))
                row = self.padding_idx + first // self.embedding_dim
                if 0 <= row < len(held):
                    held[row : row + 1] = 0.0

    def forward(
        self, input: IdValues, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """As ``nn.Embedding.forward`` or ``nn.EmbeddingBag.forward``; see :meth:`CompressedEmbedding.forward`."""
        if type(input) is not Tensor or (input.dim() != 1 and input.is_nested):
            found = call_with_other_input(self, input, offsets, per_sample_weights)
            if found is not None:
                return found
        if self.sparse and not torch.compiler.is_compiling():
            prepare_data_parallel()
        policy = self._policy
        hashes = policy.actions[0] == "hash"
        narrow = isinstance(self._parameters.get("weight"), LowPrecisionTable) and self.max_norm is None
        if self.served is not None or policy.zeros[0] or (hashes and self.padding_idx is not None) or narrow:
            # Torch cannot represent a missing row, takes an unseen id that hashes to the padding row for padding, and
            # would decode a whole table of few bits.
            return super().forward(input, offsets, per_sample_weights)
        weight = self.table("weight")  # once: to compute it may change it, as a spectral norm's estimate does
        pools_alone = self.mode is not None and self.max_norm is None and not self.scale_grad_by_freq
        if pools_alone and (transformed() or have_tangents((weight, per_sample_weights))):
            # Torch's pooled lookups know neither forward mode nor torch.func.
            return super().forward(input, offsets, per_sample_weights)
        ids = check_id_dtype(given_ids(input, self.spec, False, self), self.spec.name)
        ids = self._resolve(ids.long() if policy.replaces else ids)
        options: dict[str, Any] = {
            "padding_idx": self.padding_idx,
            "max_norm": self.max_norm,
            "norm_type": self.norm_type,
            "scale_grad_by_freq": self.scale_grad_by_freq,
            "sparse": self.sparse,
        }
        if self.mode is None:
            if offsets is not None or per_sample_weights is not None:
                raise ConfigError("`offsets` and `per_sample_weights` need a module built with mode='sum'|'mean'|'max'")
            return F.embedding(ids, weight, **options)
        if offsets is not None:
            # Torch reads out of bounds where offsets decrease.
            offsets = check_offsets(offsets, ids.numel(), f"feature {self.spec.name!r}").to(ids.dtype)
        out = F.embedding_bag(
            ids,
            weight,
            offsets,
            mode=self.mode if offsets is None else bag_mode(self.mode, offsets),
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            **options,
        )
        if pools_alone and not self.sparse and not recording() and (node := out.grad_fn) is not None:
            node.register_hook(partial(self._gradients_with_graph, weight, ids, offsets, per_sample_weights))
        return out

    def _gradients_with_graph(
        self,
        weight: Tensor,
        ids: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        found: tuple[Tensor | None, ...],
        grads: tuple[Tensor, ...],
    ) -> tuple[Tensor | None, ...] | None:
        """With ``create_graph=True``, gradients that can be differentiated again, which torch's pooled lookup has not.

        Args:
            found: gradients of the table and of ``weights``, as far as they are wanted.
            grads: the first is that of the pooled vectors.
        """
        if self.mode is None or not torch.is_grad_enabled():
            return None
        values, starts = self._bags(ids, offsets)
        skipped = None if self.padding_idx is None else values == self.padding_idx
        flat, mode = None if weights is None else weights.reshape(-1), bag_mode(self.mode, starts)
        pooled = pool_vectors(F.embedding(values, weight), starts, mode, flat, skipped, self.include_last_offset)
        wanted = [
            t for t, gradient in zip((weight, flat), found, strict=True) if t is not None and gradient is not None
        ]
        gradients = iter(torch.autograd.grad(pooled, wanted, grads[0], create_graph=True))
        return tuple(None if gradient is None else next(gradients) for gradient in found)

    def _vectors(self, ids: Tensor, given: Tensor | None = None) -> Tensor:
        # The padding row is an ordinary stored row here, as in torch: it starts at zero and never gets a gradient.
        if self.served is not None:
            return self.lookup(ids)
        if self._policy.zeros[0] or given is not None:
            out = self.lookup(ids)
            if self.padding_idx is None:
                return out
            padding = (ids if given is None else given) == self.padding_idx
            return torch.where(padding.unsqueeze(-1), out.detach(), out)
        return F.embedding(ids, self.table("weight"), padding_idx=self.padding_idx, sparse=self.sparse)

    @classmethod
    def from_pretrained(cls, embeddings: Tensor, freeze: bool = True, **options: Any) -> Self:
        """A module over given weights ``[num_embeddings, embedding_dim]``, as ``nn.Embedding.from_pretrained``.

        With ``unseen="oov"`` the weights are copied and get a row more, their mean.
        """
        if embeddings.dim() != 2:
            raise ConfigError(f"`embeddings` must be [num_embeddings, dim]; got shape {tuple(embeddings.shape)}")
        cls._fit_codes(embeddings, options)
        module = cls(*embeddings.shape, device="meta", **options)
        weight, _ = with_unseen_row(module.spec, embeddings, None)
        own = cast("object", module._parameters["weight"])
        if isinstance(own, LowPrecisionTable):
            weight = own.encoded(weight)
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=not freeze))
        for part in (module.kernel, module.unseen):
            part.to_empty(device=embeddings.device)
        return module
