"""TorchRec's quantised collections with the rows of an export."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, EmbeddingConfig
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection
from torchrec.types import DataType

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.fbgemm import usable
from recsys_embed.optim import Adam
from recsys_embed.sharding.checkpoint_tensors import bundle_tensors
from recsys_embed.sharding.drop_in import CompressedEBC
from recsys_embed.sharding.physical_tables import PhysicalTable

_TYPES = {
    "fp32": DataType.FP32,
    "fp16": DataType.FP16,
    "int8": DataType.INT8,
    "int4": DataType.INT4,
    "int2": DataType.INT2,
}


def quantised(collection: EmbeddingCollection, *, weighted: bool = False) -> CompressedEBC:
    """The collection of a loaded export over TorchRec's QuantEmbeddingBagCollection and QuantEmbeddingCollection.

    Each table has the precision that it has in the file, and its stored rows, bit for bit. fp32, fp16, int8, int4 and
    int2 are TorchRec's types; of tables at fp8 or bf16, with rows or columns that the file leaves out, or narrower than
    8 and quantised, the decoded rows are stored as fp32.

    Args:
        collection: of :func:`recsys_embed.load`, on the CPU.
        weighted: ids bring weights.

    Returns:
        A module in eval mode whose vectors are those of ``collection``, for a KeyedJaggedTensor.

    Raises:
        ConfigError: the collection trains, or is not on the CPU.

    >>> import os, tempfile
    >>> import recsys_embed as rse
    >>> from torchrec import KeyedJaggedTensor
    >>> schema = rse.Schema([rse.FeatureSpec("C1", 1000, 16), rse.FeatureSpec("C2", 50_000, 16)])
    >>> plan = rse.Plan.uniform(schema, "hash", budget="200KiB", full_below=2000, precision="int4")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "tables.safetensors")
    ...     _ = rse.export(rse.EmbeddingCollection(schema, plan), path)
    ...     served = quantised(rse.load(path, mmap=False))
    >>> ids = KeyedJaggedTensor(["C1", "C2"], torch.tensor([7, 8, 3]), lengths=torch.tensor([1, 0, 1, 1]))
    >>> served(ids)["C2"].shape
    torch.Size([2, 16])
    """
    if not isinstance(collection, EmbeddingCollection) or collection.optimizer is not None:
        raise ConfigError(f"quantised() takes the EmbeddingCollection of a loaded export; got {collection!r:.80}")
    if any(t.device.type != "cpu" for t in (*collection.parameters(), *collection.buffers())):
        raise ConfigError("quantised() takes a collection on the CPU; move it there by .cpu()")
    # Of a rule for which every row is one of TorchRec's.
    configs = {name: config.rounded_at_export() for name, config in collection.plan.configs.items()}
    plan = replace(collection.plan, configs=configs)
    out = CompressedEBC(collection.schema, plan, Adam(), weighted=weighted, device="meta")
    ours = out.collection
    ours.optimizer = None
    device = torch.device("cpu")
    for reader in ours.readers.values():
        physical_tables: tuple[PhysicalTable, ...] = reader.physical_tables  # type: ignore[assignment]
        stored = [_stored(collection, physical) for physical in physical_tables]
        named = [
            EmbeddingConfig(
                name=p.name, num_embeddings=p.rows, embedding_dim=p.width, feature_names=[p.name], data_type=kind
            )
            for p, (kind, _) in zip(physical_tables, stored, strict=True)
        ]
        rows = QuantEmbeddingCollection(named, device, row_alignment=1)
        reader.ec = rows
        _fill(rows.embeddings, {p.name: held for p, (_, held) in zip(physical_tables, stored, strict=True)})
    if ours.by_bag is not None:
        held = {p.name: _stored(collection, p) for p in ours.by_bag.physical_tables.values()}
        before = {config.name: config for config in ours.by_bag.ebc.embedding_bag_configs()}
        bags = [
            EmbeddingBagConfig(
                name=p.name,
                num_embeddings=p.rows,
                embedding_dim=p.width,
                feature_names=before[p.name].feature_names,
                data_type=held[p.name][0],
            )
            for p in ours.by_bag.physical_tables.values()
        ]
        quantised_bags = QuantEmbeddingBagCollection(bags, weighted, device, row_alignment=1)
        _fill(quantised_bags.embedding_bags, {name: rows for name, (_, rows) in held.items()})
        ours.by_bag.ebc = quantised_bags
    given = {tensor.name: tensor.value for tensor in bundle_tensors("", collection.bundle)}
    with torch.no_grad():
        for bundle in ours.bundles():
            for tensor in bundle_tensors("", bundle):
                tensor.value.copy_(given[tensor.name])
                if tensor.put is not None:
                    tensor.put()
    return out.eval().requires_grad_(False)


def _stored(collection: EmbeddingCollection, physical: PhysicalTable) -> tuple[DataType, Tensor]:
    """TorchRec's type of a table, and its stored rows as bytes ``[rows, bytes of a row]``."""
    storage, offset = collection.places[physical.key]
    if collection.served is not None and storage in collection.served:
        stored = collection.served[storage]
        first = [0, *accumulate(part.rows for part in stored.parts)].index(offset)
        before, part = stored.parts[:first], stored.parts[first]
        layout = part.layout
        if usable(layout) and part.form == "all" and part.columns is None:
            base = sum(p.layout.stored_rows(p.count) * p.layout.items for p in before)
            rows = stored.data.reshape(-1)[base : base + part.rows * layout.items].view(part.rows, layout.items)
            return _TYPES[layout.kind], rows.contiguous().view(torch.uint8)
    rows = collection.table(physical.key).detach()
    if rows.dtype is torch.float16:
        return DataType.FP16, rows.contiguous().view(torch.uint8)
    return DataType.FP32, rows.float().contiguous().view(torch.uint8)


def _fill(tables: nn.ModuleDict, rows: dict[str, Tensor]) -> None:
    """Copy the bytes of rows into TorchRec's tables, which have them in the same layout on a CPU."""
    for name, values in rows.items():
        weight = cast("Any", tables[name]).weight
        held: Tensor = getattr(weight, "elem", weight)
        if held.shape != values.shape:
            raise ConfigError(f"this version of FBGEMM stores rows of {name!r} in {held.shape[1]} bytes, not in "
                              f"{values.shape[1]}; install the version of requirements")  # fmt: skip
        held.copy_(values)
