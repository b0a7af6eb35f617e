"""What a backend must do."""

from __future__ import annotations

import torch

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.errors import BackendError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.plan import Plan
from recsys_embed.registry import list_methods
from recsys_embed.testing.helpers import poisoned_memory


def check_backend(backend: str, device: str = "cpu") -> None:
    """Compare a backend with the reference over every method, odd batch sizes, poolings and dtypes.

    What a backend refuses with a :class:`BackendError` is left out; full float32 tables it must run.

    Raises:
        AssertionError: names the method and case that differ.

    >>> check_backend("torch")
    """
    for info in list_methods():
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
            schema = Schema(
                [
                    FeatureSpec("f0", 1, 6),
                    FeatureSpec("f1", 301, 6, pooling="mean"),
                    FeatureSpec("f2", 97, 6, pooling="max"),
                ]
            )
            need = sum(info.config_cls.sized(s, 1).footprint(s).serve for s in schema)
            plan = Plan.uniform(schema, info.name, budget=max(need, 399 * 6 * 2), full_below=1)
            with poisoned_memory():
                try:
                    ours = EmbeddingCollection(schema, plan, backend=backend, device=device, dtype=dtype)
                except BackendError:
                    if info.name == "full" and dtype == torch.float32:
                        raise
                    continue
                oracle = EmbeddingCollection(schema, plan, backend="reference", device=device, dtype=dtype)
            sizes = torch.tensor([s.num_embeddings for s in schema], device=device)
            generator = torch.Generator(device).manual_seed(0)
            for batch in (1, 3, 65):
                where = f"method {info.name!r}, {dtype}, batch {batch}"
                ids = (torch.rand(batch, 3, generator=generator, device=device) * sizes).long()
                lengths = torch.randint(0, 4, (3 * batch,), generator=generator, device=device)
                offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
                owner = torch.repeat_interleave(torch.arange(3, device=device), lengths.view(3, batch).sum(1))
                values = (torch.rand(len(owner), generator=generator, device=device) * sizes[owner]).long()
                for arguments in ((ids,), (values, offsets)):
                    got, wanted = ours(*arguments), oracle(*arguments)
                    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, msg=f"{where}: output")
                    seen = torch.autograd.grad(got.square().sum(), list(ours.parameters()))
                    right = torch.autograd.grad(wanted.square().sum(), list(oracle.parameters()))
                    for a, b in zip(seen, right, strict=True):
                        torch.testing.assert_close(
                            a, b, rtol=100 * tolerance, atol=100 * tolerance, msg=f"{where}: grad"
                        )
