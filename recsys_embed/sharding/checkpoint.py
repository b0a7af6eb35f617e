"""Checkpoints of sharded models by torch.distributed.checkpoint: saved by N processes, read by any other number.

A folder holds one subfolder per save and the file ``latest``, which names the newest complete subfolder. ``latest`` is
replaced atomically, so it never names a save that a crash interrupted.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from recsys_embed.errors import CheckpointError
from recsys_embed.plan import Plan
from recsys_embed.registry import with_current_names
from recsys_embed.sharding.checkpoint_tensors import (
    CheckpointTensor,
    collections_in,
    counts_steps,
    physical_tables_of,
    state_tensors,
    weight_tensors,
)
from recsys_embed.sharding.optimizers import Optimizers
from recsys_embed.utils.files import write_json, write_text
from recsys_embed.utils.strict_json import own_json
from recsys_embed.utils.types import JSON

LATEST = "latest"
META = "run.json"
FORMAT = "recsys-embed-distributed-checkpoint"
VERSION = 1


def save(
    folder: str | Path,
    model: nn.Module,
    optimizers: Optimizers | None = None,
    *,
    extra: JSON | None = None,
    beside: Mapping[str, Tensor] | None = None,
    group: ProcessGroup | None = None,
) -> Path:
    """Save a sharded model, with the optimizers' state where given; every process of ``group`` calls it.

    The previous checkpoint of the folder is removed once this one is complete, and stays usable until then.

    Args:
        folder: of the run's checkpoints.
        model: of :func:`recsys_embed.sharding.shard`.
        optimizers: of the same model.
        extra: JSON values to keep beside the tensors; those of the first process count.
        beside: further tensors by name; each process may bring others.
        group: process group; the default one if None.

    Returns:
        The subfolder of this save.
    """
    tensors = [*weight_tensors(model), *(state_tensors(optimizers) if optimizers is not None else ())]
    tensors += [CheckpointTensor(f"beside/{name}", values) for name, values in (beside or {}).items()]
    meta = describe(model, 0 if optimizers is None else optimizers.steps, optimizers is not None)
    return write(folder, tensors, {**meta, "extra": extra or {}}, group)


def load(
    folder: str | Path,
    model: nn.Module,
    optimizers: Optimizers | None = None,
    *,
    beside: Mapping[str, Tensor] | None = None,
    group: ProcessGroup | None = None,
) -> JSON:
    """Read the newest complete checkpoint into a sharded model, however many processes wrote it; all call it.

    Args:
        folder, model, optimizers, group: as :func:`save` takes them.
        beside: tensors to fill from the checkpoint; those that it does not hold in this shape and dtype stay as they
            are.

    Returns:
        ``extra`` of the save.

    Raises:
        CheckpointError: there is none, it is damaged, of other features, plan or optimizers, or lacks their state.
    """
    at, meta = find(folder)
    check(at, meta, model, optimizers is not None)
    tensors = list(weight_tensors(model))
    if optimizers is not None:
        _make_dense_state(at, optimizers)
        tensors += state_tensors(optimizers)
    saved = tensors_in(at) if beside else {}
    wanted = {f"beside/{name}": values for name, values in (beside or {}).items()}
    tensors += [CheckpointTensor(k, v) for k, v in wanted.items() if saved.get(k) == (v.shape, v.dtype)]
    read(at, tensors, group)
    if optimizers is not None:
        _set_steps(optimizers, meta["steps"])
    return dict(meta["extra"])


def describe(model: nn.Module, steps: int, trained: bool) -> JSON:
    """What a checkpoint must agree on with the model that reads it."""
    colls = {
        path: {
            "schema": coll.schema.to_dict(),
            "plan": Plan(coll.plan.configs).to_dict(),
            # A resumed run may follow another learning rate.
            "rule": repr(coll.optimizer and replace(coll.optimizer, lr=0.0)),
            "per_row": {key: physical.per_row for key, physical in sorted(physical_tables_of(coll).items())},
        }
        for path, coll in collections_in(model).items()
    }
    # A round trip through JSON, so that it compares equal to what was saved.
    collections = json.loads(json.dumps(colls))
    return {"format": FORMAT, "version": VERSION, "collections": collections, "steps": steps, "trained": trained}


def check(at: Path, meta: JSON, model: nn.Module, trained: bool) -> None:
    """Raise unless a checkpoint is of such a model."""
    wanted = describe(model, 0, trained)["collections"]
    saved = with_current_names(meta["collections"])
    faults = [f"{p!r}" for p in sorted({*wanted, *saved}) if (p in wanted) != (p in saved)]
    if faults:
        raise CheckpointError(f"checkpoint {at} holds collections {sorted(saved)}; the model has {sorted(wanted)}")
    for path, mine in wanted.items():
        keys = ["schema", "plan", "per_row"] + (["rule"] if trained else [])
        differing = [k for k in keys if mine[k] != saved[path][k]]
        if differing:
            raise CheckpointError(
                f"checkpoint {at} differs from the model in {', '.join(differing)} of collection {path!r}; build the "
                "model with the settings of the run that saved it"
            )
    if trained and not meta["trained"]:
        raise CheckpointError(f"checkpoint {at} holds weights only, no optimizer state; load it without `optimizers`")


def find(folder: str | Path) -> tuple[Path, JSON]:
    """The newest complete checkpoint of a folder and its description."""
    folder = Path(folder)
    try:
        name = (folder / LATEST).read_text(encoding="utf-8").strip()
        meta = own_json((folder / name / META).read_text(encoding="utf-8"))
    except OSError as e:
        raise CheckpointError(f"no complete distributed checkpoint in {folder} ({e.filename} is missing)") from e
    except ValueError as e:
        raise CheckpointError(f"checkpoint {folder / name} is damaged: {META} is not valid JSON") from e
    if not isinstance(meta, dict) or (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(f"{folder / name} is no distributed checkpoint of format version {VERSION}")
    return folder / name, meta


def write(
    folder: str | Path,
    tensors: Iterable[CheckpointTensor],
    meta: JSON,
    group: ProcessGroup | None = None,
    *,
    alone: bool = False,
) -> Path:
    """Write tensors and their description; this process ``alone``, or together with those of ``group``."""
    folder = Path(folder)
    first = alone or dist.get_rank(group) == 0
    held = torch.zeros(1, dtype=torch.int64)
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdigit()]
        held.fill_(max(taken, default=0) + 1)
    held = held if alone else _from_first(held, group)
    at = folder / f"{int(held):08d}"
    state = {e.name: e.value for e in tensors}
    with _silent(alone):
        dcp.save(state, checkpoint_id=at, process_group=group, no_dist=alone)
    if first:
        write_json(at / META, meta)
        write_text(folder / LATEST, at.name + "\n")
        for old in folder.iterdir():
            if old.is_dir() and old.name.isdigit() and old != at:
                shutil.rmtree(old, ignore_errors=True)
    if not alone:
        dist.barrier(group)
    return at


def read(
    at: Path, tensors: Iterable[CheckpointTensor], group: ProcessGroup | None = None, *, alone: bool = False
) -> None:
    """Read a checkpoint into tensors, and these into their places.

    Raises:
        CheckpointError: damaged, or an item is missing or of another shape.
    """
    found = list(tensors)
    with _reading(at), _silent(alone):
        dcp.load({e.name: e.value for e in found}, checkpoint_id=at, process_group=group, no_dist=alone)
    for item in found:
        if item.put is not None:
            item.put()


@contextmanager
def _reading(at: Path) -> Iterator[None]:
    """Convert what torch raises for a damaged checkpoint into a CheckpointError that states the cause."""
    try:
        yield
    except dcp.api.CheckpointException as e:
        rank, (cause, _) = next(iter(e.failures.items()))
        raise CheckpointError(f"checkpoint {at} cannot be read (rank {rank}: {_line(cause)})") from e
    except Exception as e:  # what a damaged pickle raises may be anything
        raise CheckpointError(f"checkpoint {at} cannot be read ({_line(e)})") from e


def _line(error: BaseException) -> str:
    """The message of an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _silent(alone: bool) -> Iterator[None]:
    """Suppress torch's warning about the missing process group when ``alone`` asks for that."""
    with warnings.catch_warnings():
        if alone:
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def tensors_in(at: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor of a checkpoint; CheckpointError if it is damaged."""
    with _reading(at):
        stored = dcp.FileSystemReader(at).read_metadata().state_dict_metadata
    return {k: (m.size, m.properties.dtype) for k, m in stored.items() if isinstance(m, TensorStorageMetadata)}


def _make_dense_state(at: Path, optimizers: Optimizers) -> None:
    """Allocate the dense optimizer's state, which is otherwise created at the first step, for loading into it."""
    if optimizers.dense is None:
        return
    saved = tensors_in(at)
    for name, parameter in zip(optimizers.dense_names, optimizers.dense_parameters, strict=True):
        start = f"dense/{name}:"
        for key in (k for k in saved if k.startswith(start)):
            size, dtype = saved[key]
            device = torch.device("cpu") if size == torch.Size([]) else parameter.device
            optimizers.dense.state[parameter][key.removeprefix(start)] = torch.zeros(size, dtype=dtype, device=device)


def _set_steps(optimizers: Optimizers, steps: int) -> None:
    optimizers.steps = steps
    for optimizer in optimizers.tables:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state_of(parameter)["step"] = steps
    if any(counts_steps(rule) for rule in optimizers.rules):
        optimizers.fused.set_optimizer_step(steps)


def _from_first(values: Tensor, group: ProcessGroup | None) -> Tensor:
    values = values.to("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    dist.broadcast(values, 0 if group is None else dist.get_global_rank(group, 0), group=group)
    return values.cpu()
