"""Build serving modules from a file's manifest; only registered classes are built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import CheckpointError, ConfigError, RecsysEmbedError
from recsys_embed.features import FeatureSpec, Schema, spec_to_dict
from recsys_embed.kernels.constants import Constants
from recsys_embed.kernels.stored_tables import Stored, StoredTables
from recsys_embed.kernels.unseen_ids import UnseenIds
from recsys_embed.models import ModelSpec, get_model
from recsys_embed.models.base import CTRModel, make_params
from recsys_embed.plan import Plan
from recsys_embed.registry import config_from_dict, get_method

_META = torch.device("meta")


@dataclass(frozen=True)
class ModuleItem:
    """An embedding module: its kind, the paths at which it stands, its arguments as JSON values, its dtype."""

    kind: str
    paths: tuple[str, ...]
    build: Mapping[str, Any]
    dtype: torch.dtype


@contextmanager
def refusals(what: str) -> Any:
    """Convert any error while ``what`` is built from a file into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except (RecsysEmbedError, KeyError, TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as e:
        reason = str(e).splitlines()[0] if str(e) else ""
        raise CheckpointError(f"{what} cannot be built: {type(e).__name__}: {reason:.300}") from e


def build_module(item: ModuleItem) -> CompressedEmbedding | EmbeddingCollection:
    """The module without memory: all its tensors are on the meta device.

    Raises:
        CheckpointError: unknown names, arguments out of range.
    """
    build = item.build
    with refusals(f"the {item.kind} at {item.paths[0]!r}"):
        if item.kind == "collection":
            schema, plan = Schema.from_dict(build["schema"]), Plan.from_dict(build["plan"])
            return EmbeddingCollection(schema, plan, device=_META, dtype=item.dtype)
        (spec,) = Schema.from_dict({"features": [build["spec"]]})
        config = config_from_dict(build["config"])
        # What the module's constructor takes of a feature's specification.
        options = {k: v for k, v in spec_to_dict(spec).items() if k in _OPTIONS}
        module = get_method(config.method).embedding_cls(
            spec.num_embeddings,
            spec.embedding_dim,
            build["padding_idx"],
            mode=build["mode"],
            include_last_offset=build["include_last_offset"],
            config=config,
            device=_META,
            dtype=item.dtype,
            **options,
        )
        if module.spec != spec:
            raise CheckpointError(f"the embedding at {item.paths[0]!r} is of {spec}, which no module can be")
        module.stands_in = build["stands_in"]
        return module


_OPTIONS = {*inspect.signature(CompressedEmbedding).parameters} - {"num_embeddings", "embedding_dim"}


def build_model(build: Mapping[str, Any], collections: Mapping[str, ModuleItem], sizes: Mapping[str, Any]) -> CTRModel:
    """One of the library's models; its tables are on the meta device, its dense layers in memory.

    Args:
        build: ``key``, ``num_dense`` and ``params``.
        collections: its collections by attribute name.
        sizes: shape of every dense tensor by its key; nothing is allocated unless the model has these.
    """

    def parts(name: str) -> tuple[Schema, Plan] | None:
        if name not in collections:
            return None
        given = collections[name].build
        return Schema.from_dict(given["schema"]), Plan.from_dict(given["plan"])

    def make() -> CTRModel:
        cls = get_model(build["key"])
        vectors, linear = parts("embedding"), parts("linear")
        schema, plan = vectors or linear or (None, None)
        if schema is None:
            raise ConfigError("it has no collection")
        second = linear[1] if vectors is not None and linear is not None else None
        params = make_params(cls, build["params"])
        spec = ModelSpec(schema, plan, second, build["num_dense"], device=_META)
        with torch.random.fork_rng(devices=[]):
            return cls(spec, params)  # type: ignore[call-arg]

    with refusals(f"model {build.get('key')!r}"):
        with _META:
            tried = make()
        found = {k: tuple(v.shape) for k, v in tried.state_dict(keep_vars=True).items() if k in sizes}
        if found != {k: tuple(shape) for k, shape in sizes.items()}:
            odd = sorted(k for k in sizes if found.get(k) != tuple(sizes[k]))
            raise ConfigError(f"its tensors are of other shapes than those it is to be filled with: {odd[:5]}")
        model = make()
        model.params = make_params(get_model(build["key"]), build["params"])
        return model


def revive(module: nn.Module, device: torch.device) -> None:
    """Recreate on ``device`` the tensors that files do not hold: derived constants, counters, empty buffers."""
    for part in module.modules():
        if isinstance(part, Constants):
            for name, values in list(part._integers.items()):
                part.add_constant(name, values, device)
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta and (buffer.numel() == 0 or isinstance(part, UnseenIds)):
                # Not zeros_like: asked of a meta tensor, it loads all of torch's symbolic shapes.
                setattr(part, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))


def put_tables(module: nn.Module, tables: Mapping[str, nn.Parameter | Stored]) -> None:
    """Replace the row tables of one embedding module, by the names it reads them under."""
    served = {}
    for name, values in tables.items():
        if isinstance(values, Stored):
            del module._parameters[name]
            served[name] = values
        else:
            # Modules that shared a table in the source share one here.
            shared = isinstance(values, nn.Parameter)
            module._parameters[name] = values if shared else nn.Parameter(values, requires_grad=False)
    if served:
        cast("Any", module).served = StoredTables(served)


def row_tables(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Rows and width of each storage that one embedding module reads, by name; not those of modules within it."""
    if isinstance(module, EmbeddingCollection):
        names = list(module.storages)
    elif isinstance(module, CompressedEmbedding):
        names = [t.name for t in module.program.tables if not t.dense]
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        names = ["weight"]
    else:
        return {}
    # Not by attribute: `weight` of a module that stands in for a plain one is computed.
    held = {name: cast("Tensor", module._parameters[name]) for name in names}
    return {name: (values.shape[0], values.shape[1]) for name, values in held.items()}


def plain_spec(name: str, num_embeddings: int, embedding_dim: int, mode: str | None) -> dict[str, Any]:
    """The specification of a torch module as what serves in its place; ``name`` is what its errors call it."""
    pooling: Any = mode or "sum"
    return spec_to_dict(FeatureSpec(name, num_embeddings, embedding_dim, pooling=pooling, init="normal:1"))
