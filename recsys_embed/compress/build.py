"""Builds and fits the replacements of found tables, without changing the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from recsys_embed.compress.joint_fit import fit_jointly, relative_error
from recsys_embed.core.id_sets import members_of_texts
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import Table
from recsys_embed.discover import FoundTable
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.shared_tables import SharedTables, described
from recsys_embed.errors import ConfigError
from recsys_embed.features import Unseen
from recsys_embed.kernels.low_precision_table import LowPrecisionTable
from recsys_embed.kernels.unseen_ids import with_unseen_row
from recsys_embed.registry import get_method

InitMode = Literal["dense", "fresh"]
OPTIONS = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse", "mode", "include_last_offset")


@dataclass
class TableReplacement:
    """One table to replace.

    Args:
        table: what was found.
        config: of the method that stores it afterwards.
        counts: how often each id occurs, where known.
        unseen: policy for ids outside the table, see :class:`FeatureSpec`; None means the method's default.
        initializer: distribution of the initial weights.
        index_contents: by index, what a plan stores for it: the ids chosen to own rows, or arrays.
        trial: the replacement on the meta device, once it is known to be possible.
        built: the replacement of each distinct module of the table.
    """

    table: FoundTable
    config: MethodConfig
    counts: Tensor | None = None
    unseen: Unseen | None = None
    initializer: str = "normal:1"
    index_contents: Mapping[str, str | Tensor] = field(default_factory=dict)
    trial: CompressedEmbedding | None = None
    built: dict[nn.Module, nn.Module] = field(default_factory=dict)
    error: float | None = None

    @property
    def modules(self) -> list[nn.Module]:
        """The distinct modules that read the table."""
        return list(dict.fromkeys(self.table.modules))

    def readers(self) -> list[nn.Module]:
        """The distinct modules that read the table, output layers with its weight last."""
        return [*self.modules, *dict.fromkeys(self.table.output_layers)]

    @property
    def plain(self) -> bool:
        """Whether the replacement is one of torch's modules."""
        return self.config.method == "full" and self.unseen is None and self.config.precision == "fp32"

    def shared(self) -> list[Table]:
        """The program's tables that other features may read too."""
        return [t for t in self.trial.program.tables if t.shared] if self.trial is not None else []

    def own_bytes(self) -> int:
        """Bytes that this table alone stores once it is served: parameters and index buffers."""
        if self.trial is None:
            return self.table.rows * self.table.width * self.table.dtype.itemsize
        itemsize = self.table.dtype.itemsize
        return self.config.footprint(self.trial.spec, itemsize).serve - sum(t.nbytes(itemsize) for t in self.shared())

    def held_bytes(self) -> int:
        """Bytes that this table alone holds while it trains."""
        if self.trial is None:
            return self.own_bytes()
        itemsize = self.table.dtype.itemsize
        whole = self.config.footprint(self.trial.spec, itemsize)
        return whole.serve + whole.unrounded - sum(t.trained_bytes(itemsize) for t in self.shared())


def call_options(module: nn.Module) -> dict[str, Any]:
    """Constructor arguments of torch's modules and of drop-ins that affect how they are called."""
    return {key: getattr(module, key) for key in OPTIONS if hasattr(module, key)}


def dense_weight(module: nn.Module) -> Tensor:
    """The full table ``[rows, width]`` of an ``nn.Embedding`` or a drop-in, without gradient."""
    if isinstance(module, CompressedEmbedding):
        return module.materialize()
    return cast("Tensor", module.weight).detach()


def make_drop_in(
    replacement: TableReplacement, module: nn.Module, device: Any, shared: SharedTables | None = None
) -> CompressedEmbedding:
    """The drop-in for one module of a table, with its initial weights."""
    cls = get_method(replacement.config.method).embedding_cls
    return cls(
        replacement.table.rows,
        replacement.table.width,
        config=replacement.config,
        name=replacement.table.name,
        init=replacement.initializer,
        unseen=replacement.unseen,
        shared=shared,
        device=device,
        dtype=replacement.table.dtype,
        **call_options(module),
    )


def check_on_meta(replacement: TableReplacement) -> list[str]:
    """Build a replacement on the meta device; returns its faults as sentences."""
    where = f"table {replacement.table.name!r}"
    if replacement.plain:
        return []
    try:
        for module in replacement.modules:
            trial = make_drop_in(replacement, module, "meta")
            replacement.trial = replacement.trial or trial
    except ConfigError as e:
        return [f"{where}: {e}"]
    out = replacement.trial.output_dim if replacement.trial is not None else replacement.table.width
    if out != replacement.table.width:
        return [
            f"{where}: method {replacement.config.method!r} gives vectors of width {out}; the model reads "
            f"{replacement.table.width}"
        ]
    return []


def sharing_groups(replacements: Sequence[TableReplacement]) -> list[list[TableReplacement]]:
    """Connected components of replacements that share physical tables, in order; all others stand alone."""
    groups: list[tuple[set[str], list[TableReplacement]]] = []
    for replacement in replacements:
        names = {t.name for t in replacement.shared()}
        joined: tuple[set[str], list[TableReplacement]] = (names, [replacement])
        apart = []
        for group in groups:
            if names and group[0] & names:
                joined = (joined[0] | group[0], group[1] + joined[1])
            else:
                apart.append(group)
        groups = [*apart, joined]
    return [group for _, group in groups]


def shared_faults(group: Sequence[TableReplacement]) -> list[str]:
    """Faults: why the tables of a group cannot share tables as planned."""
    faults: list[str] = []
    first: dict[str, tuple[Any, Any, str]] = {}
    formats: dict[str, str] = {}
    for replacement in group:
        traits = (replacement.table.device, replacement.table.dtype, replacement.table.requires_grad)
        for table in replacement.shared():
            known, shape, other = first.setdefault(
                table.name, (traits, (table.rows, table.width), replacement.table.name)
            )
            rows = formats.setdefault(table.name, described(table))
            if rows != described(table):
                faults.append(
                    f"shared table {table.name!r} has {rows} for {other!r} and {described(table)} for "
                    f"{replacement.table.name!r}; give both the same options"
                )
            if shape != (table.rows, table.width):
                faults.append(
                    f"shared table {table.name!r} is {shape[0]} x {shape[1]} for {other!r} and {table.rows} x "
                    f"{table.width} for {replacement.table.name!r}; give both the same options"
                )
            elif known != traits:
                names = ("device", "dtype", "requires_grad")
                unlike = [f"{n} {a} and {b}" for n, a, b in zip(names, known, traits, strict=True) if a != b]
                faults.append(
                    f"{other!r} and {replacement.table.name!r} cannot share table {table.name!r}: {', '.join(unlike)}; "
                    "give one of them another `table` name"
                )
    return faults


def build_group(group: Sequence[TableReplacement], start: InitMode) -> None:
    """Build the modules of a sharing group; ``"dense"`` also fits them to the trained tables."""
    shared = {t.name: t for replacement in group for t in replacement.shared()}
    table = group[0].table
    holder = None
    if shared:
        holder = SharedTables(shared.values(), seed=group[0].config.seed, device=table.device, dtype=table.dtype)
    made: list[CompressedEmbedding] = []
    for replacement in group:
        first = replacement.modules[0]
        if replacement.plain:
            values = plain_values(replacement.modules)
            replacement.built = {m: plain_module(m, values) for m in replacement.modules}
            continue
        new = make_drop_in(replacement, first, replacement.table.device, holder)
        if replacement.counts is not None:
            new.assign_(replacement.counts)
        if replacement.index_contents:
            indexes = {i.name: i for i in new.program.indexes}
            # Of a method that only goes by frequency the plan holds what earlier counts said.
            newer = replacement.counts is not None and replacement.config.plannable
            contents = {
                i: v
                for i, v in replacement.index_contents.items()
                if not (newer and i in indexes and indexes[i].by_frequency)
            }
            texts = {i: v for i, v in contents.items() if isinstance(v, str)}
            arrays = {i: v for i, v in contents.items() if not isinstance(v, str)}
            new.assign_({**arrays, **members_of_texts(texts, new.program.indexes, new.spec.num_ids)})
        replacement.built[first] = new
        made.append(new)
        for other in replacement.modules[1:]:
            replacement.built[other] = drop_in_over(replacement, other, new)
    if start == "dense" and made:
        fit_group(group, made)


def fit_group(group: Sequence[TableReplacement], made: Sequence[CompressedEmbedding]) -> None:
    """Fit the new modules of a group to the trained tables, and measure the relative errors."""
    with torch.enable_grad():
        weights = [dense_weight(replacement.modules[0]) for replacement in group]
        stored = [
            with_unseen_row(m.spec, w, replacement.counts)
            for m, w, replacement in zip(made, weights, group, strict=True)
        ]
        if group[0].config.method == "full":
            with torch.no_grad():
                made[0].table("weight").copy_(stored[0][0])
        elif len(made) == 1:
            made[0].fit_(*stored[0])
        else:
            fit_jointly(made, [w for w, _ in stored], [c for _, c in stored])
    for replacement, module, weight in zip(group, made, weights, strict=True):
        replacement.error = relative_error(module, weight, replacement.counts)


def drop_in_over(replacement: TableReplacement, module: nn.Module, first: CompressedEmbedding) -> CompressedEmbedding:
    """The drop-in of another module that reads the same table, with the parameters and buffers of the first."""
    new = make_drop_in(replacement, module, "meta")
    new._parameters.update(first._parameters)
    new._buffers.update(first._buffers)
    new._modules.update(first._modules)
    first.shared = new.shared = first.shared or SharedTables(())
    return new


def plain_values(modules: Sequence[nn.Module]) -> nn.Parameter:
    """The table of the torch modules that replace the drop-ins of one table; of a full one, its own.

    The row of a padding id is zero where every module pads with it, else what the others read there.
    """
    drop_ins = cast("Sequence[CompressedEmbedding]", modules)
    first = drop_ins[0]
    own = first._parameters.get("weight")
    # Rows of a loaded file, and those that train in few bits, may be stored otherwise: they are decoded as others are.
    stores_floats = own is not None and not isinstance(cast("object", own), LowPrecisionTable)
    if (
        own is not None
        and stores_floats
        and first.config.method == "full"
        and first.spec.num_ids == first.num_embeddings
    ):
        return own
    values, padding = first.materialize(), first.padding_idx
    other = next((m for m in drop_ins if m.padding_idx != padding), None)
    if padding is not None and other is not None:
        with torch.no_grad():
            values[padding] = other._vectors(torch.tensor([padding], device=values.device))[0]
    return nn.Parameter(values, requires_grad=any(p.requires_grad for p in first.parameters()))


def plain_module(module: nn.Module, values: nn.Parameter) -> nn.Module:
    """The torch module that replaces a drop-in, with the table ``values``."""
    drop_in = cast("CompressedEmbedding", module)
    options = call_options(drop_in)
    mode, last = options.pop("mode"), options.pop("include_last_offset")
    shape = (drop_in.num_embeddings, drop_in.output_dim)
    new: nn.Module
    if mode is None:
        new = nn.Embedding(*shape, device="meta", **options)
    else:
        new = nn.EmbeddingBag(*shape, mode=mode, include_last_offset=last, device="meta", **options)
    new.weight = values
    return new
