"""TorchRec's quantised collections follow a plan's precisions: vectors of a loaded export, rows bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.core.precision import head_to_tail
from recsys_embed.errors import ConfigError
from tests.kernels.cases import plan_of

torchrec = pytest.importorskip("torchrec", exc_type=ImportError)
from torchrec import KeyedJaggedTensor  # noqa: E402
from torchrec.types import DataType  # noqa: E402

from recsys_embed.sharding import quantised  # noqa: E402

PRECISIONS = ("int8", "int4", "int2", "fp16", "fp32", "bf16", "fp8")
SCHEMA = Schema([FeatureSpec(f"C{i}", 60 + 9 * i, 16, pooling="mean" if i == 1 else "sum") for i in range(7)])


def loaded(plan: Plan, tmp_path: Path) -> EmbeddingCollection:
    coll = EmbeddingCollection(SCHEMA, plan, backend="torch")
    rse.export(coll, tmp_path / "tables.safetensors")
    return rse.load(tmp_path / "tables.safetensors", backend="torch")  # type: ignore[return-value]


def jagged() -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 4, (len(SCHEMA) * 5,), generator=generator)
    values = torch.randint(0, 60, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor(list(SCHEMA.names), values, lengths=lengths)


@pytest.mark.parametrize("method", ["full", "hash", "unified", "compositional", "memcom", "tt", "lowdim"])
def test_vectors_are_those_of_the_loaded_file(method: str, tmp_path: Path) -> None:
    """Each feature at a precision of its own; those that share a table at one."""
    configs = plan_of(next(m for m in rse.list_methods() if m.name == method), SCHEMA).configs
    precisions = {"unified": ["int4"] * 7, "tt": ["fp32"] * 7}.get(method, PRECISIONS)
    configs = {n: replace(c, precision=p) for (n, c), p in zip(configs.items(), precisions, strict=True)}
    coll = loaded(Plan(configs), tmp_path)
    found = quantised(coll)(jagged())
    torch.testing.assert_close(found.values(), coll(jagged()).flatten(1), rtol=1e-5, atol=1e-5)


def test_rows_are_copied_bit_for_bit(tmp_path: Path) -> None:
    full = Plan.full(SCHEMA).configs.items()
    coll = loaded(Plan({n: replace(c, precision=p) for (n, c), p in zip(full, PRECISIONS, strict=True)}), tmp_path)
    ebc = quantised(coll).collection.by_bag.ebc  # type: ignore[union-attr]
    assert type(ebc) is torchrec.quant.EmbeddingBagCollection
    kinds = {config.name: config.data_type for config in ebc.embedding_bag_configs()}
    wanted = (DataType.INT8, DataType.INT4, DataType.INT2, DataType.FP16, *[DataType.FP32] * 3)
    assert kinds == {f"C{i}%2Eweight": kind for i, kind in enumerate(wanted)}
    for i, bits in ((0, 8), (1, 4), (2, 2)):
        weight = ebc.embedding_bags[f"C{i}%2Eweight"].weight
        rows = getattr(weight, "elem", weight)
        # FBGEMM's own operator decodes what its tables hold.
        tail = head_to_tail(rows, bits)
        name = "Fused8BitRowwiseQuantizedToFloat" if bits == 8 else "FusedNBitRowwiseQuantizedSBHalfToFloat"
        decoded = getattr(torch.ops.fbgemm, name)(*((tail,) if bits == 8 else (tail, bits)))
        torch.testing.assert_close(decoded, coll.table(f"C{i}.weight"), rtol=1e-6, atol=1e-6)


def test_it_takes_what_is_served() -> None:
    with pytest.raises(ConfigError, match="loaded export"):
        quantised(EmbeddingCollection(SCHEMA, optimizer=rse.SGD()))
    with pytest.raises(ConfigError, match="loaded export"):
        quantised(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
