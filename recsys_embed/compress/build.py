"""Replacements for found tables: built and fitted beside the model, which stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from recsys_embed.compress.joint_fit import fit_jointly, relative_error
from recsys_embed.core.id_sets import members_of
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import Table
from recsys_embed.discover import FoundTable
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.shared_tables import SharedTables
from recsys_embed.errors import ConfigError
from recsys_embed.features import Unseen
from recsys_embed.kernels.unseen_ids import with_unseen_row
from recsys_embed.registry import get_method

Start = Literal["dense", "fresh"]
_OPTIONS = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse", "mode", "include_last_offset")


@dataclass
class Job:
    """One table to replace.

    Args:
        table: what was found.
        config: what stores it from now on.
        counts: how often each id occurs, where known.
        unseen: what ids outside the table become, see :class:`FeatureSpec`; None leaves it to the method.
        initializer: of the initial weights, see :class:`FeatureSpec`.
        held: what indexes hold, by name, as a plan has it: ids that a search chose to own rows, arrays.
        trial: the replacement without memory (on the meta device), once it is known to be possible.
        built: the replacement of each distinct module of the table.
    """

    table: FoundTable
    config: MethodConfig
    counts: Tensor | None = None
    unseen: Unseen | None = None
    initializer: str = "normal:1"
    held: Mapping[str, str | Tensor] = field(default_factory=dict)
    trial: CompressedEmbedding | None = None
    built: dict[nn.Module, nn.Module] = field(default_factory=dict)
    error: float | None = None

    @property
    def modules(self) -> list[nn.Module]:
        """The distinct modules that read the table."""
        return list(dict.fromkeys(self.table.modules))

    @property
    def plain(self) -> bool:
        """Whether what comes out is torch's own module."""
        return self.config.method == "full" and self.unseen is None

    def shared(self) -> list[Table]:
        """The program's tables that other features may read too."""
        return [t for t in self.trial.program.tables if t.shared] if self.trial is not None else []

    def own_bytes(self) -> int:
        """Bytes of what this table stores for itself: parameters and index buffers."""
        if self.trial is None:
            return self.table.rows * self.table.width * self.table.dtype.itemsize
        itemsize = self.table.dtype.itemsize
        shared = sum(t.rows * t.width for t in self.shared())
        own = sum(p.numel() for p in self.trial.parameters()) - shared
        return itemsize * own + self.config.footprint(self.trial.spec, itemsize).index


def call_options(module: nn.Module) -> dict[str, Any]:
    """How a plain or compressed embedding is called, as constructor arguments."""
    return {key: getattr(module, key) for key in _OPTIONS if hasattr(module, key)}


def dense_weight(module: nn.Module) -> Tensor:
    """The plain table ``[rows, width]`` of a plain or compressed module, without gradient."""
    if isinstance(module, CompressedEmbedding):
        return module.materialize()
    return cast("Tensor", module.weight).detach()


def make(job: Job, module: nn.Module, device: Any, shared: SharedTables | None = None) -> CompressedEmbedding:
    """The drop-in for one module of a table, with its initial weights."""
    cls = get_method(job.config.method).embedding_cls
    return cls(
        job.table.rows,
        job.table.width,
        config=job.config,
        name=job.table.name,
        init=job.initializer,
        unseen=job.unseen,
        shared=shared,
        device=device,
        dtype=job.table.dtype,
        **call_options(module),
    )


def try_out(job: Job) -> list[str]:
    """Build a job on the meta device; its faults, in words."""
    where = f"table {job.table.name!r}"
    if job.plain:
        return []
    try:
        for module in job.modules:
            trial = make(job, module, "meta")
            job.trial = job.trial or trial
    except ConfigError as e:
        return [f"{where}: {e}"]
    out = job.trial.output_dim if job.trial is not None else job.table.width
    if out != job.table.width:
        return [
            f"{where}: method {job.config.method!r} gives vectors of width {out}; the model reads {job.table.width}"
        ]
    return []


def components(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that share physical tables, directly or through others, in order; all others stand alone."""
    groups: list[tuple[set[str], list[Job]]] = []
    for job in jobs:
        names = {t.name for t in job.shared()}
        joined: tuple[set[str], list[Job]] = (names, [job])
        apart = []
        for group in groups:
            if names and group[0] & names:
                joined = (joined[0] | group[0], group[1] + joined[1])
            else:
                apart.append(group)
        groups = [*apart, joined]
    return [group for _, group in groups]


def shared_faults(group: Sequence[Job]) -> list[str]:
    """Why the tables of a group cannot share what the plan says."""
    faults: list[str] = []
    first: dict[str, tuple[Any, Any, str]] = {}
    for job in group:
        traits = (job.table.device, job.table.dtype, job.table.requires_grad)
        for table in job.shared():
            known, shape, other = first.setdefault(table.name, (traits, (table.rows, table.width), job.table.name))
            if shape != (table.rows, table.width):
                faults.append(
                    f"shared table {table.name!r} is {shape[0]} x {shape[1]} for {other!r} and {table.rows} x "
                    f"{table.width} for {job.table.name!r}; give both the same options"
                )
            elif known != traits:
                names = ("device", "dtype", "requires_grad")
                unlike = [f"{n} {a} and {b}" for n, a, b in zip(names, known, traits, strict=True) if a != b]
                faults.append(
                    f"{other!r} and {job.table.name!r} cannot share table {table.name!r}: {', '.join(unlike)}; "
                    "give one of them another `table` name"
                )
    return faults


def build(group: Sequence[Job], start: Start) -> None:
    """Build the modules of jobs that share tables, or of one alone; with ``"dense"`` fit them to the trained tables."""
    shared = {t.name: t for job in group for t in job.shared()}
    table = group[0].table
    holder = None
    if shared:
        holder = SharedTables(shared.values(), seed=group[0].config.seed, device=table.device, dtype=table.dtype)
    made: list[CompressedEmbedding] = []
    for job in group:
        first = job.modules[0]
        if job.plain:
            tables: dict[int | None, nn.Parameter] = {}
            job.built = {m: plain_module(m, tables) for m in job.modules}
            continue
        new = make(job, first, job.table.device, holder)
        if job.counts is not None:
            new.assign_(job.counts)
        if job.held:
            ids = new.spec.num_ids
            new.assign_({i: members_of(v, ids) if isinstance(v, str) else v for i, v in job.held.items()})
        job.built[first] = new
        made.append(new)
        for other in job.modules[1:]:
            job.built[other] = twin(job, other, new)
    if start == "dense" and made:
        fit(group, made)


def fit(group: Sequence[Job], made: Sequence[CompressedEmbedding]) -> None:
    """Fit the new modules of a group to the trained tables and measure what is left."""
    with torch.enable_grad():
        weights = [dense_weight(job.modules[0]) for job in group]
        stored = [with_unseen_row(m.spec, w, job.counts) for m, w, job in zip(made, weights, group, strict=True)]
        if group[0].config.method == "full":
            with torch.no_grad():
                made[0].table("weight").copy_(stored[0][0])
        elif len(made) == 1:
            made[0].fit_(*stored[0])
        else:
            fit_jointly(made, [w for w, _ in stored], [c for _, c in stored])
    for job, module, weight in zip(group, made, weights, strict=True):
        job.error = relative_error(module, weight, job.counts)


def twin(job: Job, module: nn.Module, first: CompressedEmbedding) -> CompressedEmbedding:
    """The drop-in of another module that reads the same table, over the very parameters and buffers of the first."""
    new = make(job, module, "meta")
    new._parameters.update(first._parameters)
    new._buffers.update(first._buffers)
    new._modules.update(first._modules)
    first.shared = new.shared = first.shared or SharedTables(())
    return new


def plain_module(module: nn.Module, tables: dict[int | None, nn.Parameter]) -> nn.Module:
    """The plain module that a drop-in stands for, with its table.

    ``tables`` keeps one by padding id, whose row is zero, for the other drop-ins that stand for the same.
    """
    drop_in = cast("CompressedEmbedding", module)
    options = call_options(drop_in)
    mode, last = options.pop("mode"), options.pop("include_last_offset")
    shape = (drop_in.num_embeddings, drop_in.output_dim)
    trained = any(p.requires_grad for p in drop_in.parameters())
    if drop_in.config.method == "full" and drop_in.spec.num_ids == drop_in.num_embeddings:
        values = cast("nn.Parameter", drop_in.table("weight"))
    else:
        if drop_in.padding_idx not in tables:
            tables[drop_in.padding_idx] = nn.Parameter(drop_in.materialize(), requires_grad=trained)
        values = tables[drop_in.padding_idx]
    new: nn.Module
    if mode is None:
        new = nn.Embedding(*shape, device="meta", **options)
    else:
        new = nn.EmbeddingBag(*shape, mode=mode, include_last_offset=last, device="meta", **options)
    new.weight = values
    return new
