"""Build serving modules from a file's manifest; only registered classes are built."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.collection.optimizer_state import weights_of
from recsys_embed.discover import find_tables
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import CheckpointError, ConfigError, RecsysEmbedError
from recsys_embed.features import FeatureSpec, Schema, spec_to_dict
from recsys_embed.kernels.stored_tables import Stored, StoredTables
from recsys_embed.models import ModelSpec, get_model
from recsys_embed.models.base import CTRModel, make_params
from recsys_embed.plan import Plan
from recsys_embed.registry import config_from_dict, get_method

_REFUSED = (
    RecsysEmbedError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
    MemoryError,
)  # fmt: skip
ADDED = "added"  # tensors that a user gave an embedding, by name
_META = torch.device("meta")
_MOST_PARAMETERS = 1000  # and modules, of a model whose file has no tensor


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
    except _REFUSED as e:
        reason = str(e).splitlines()[0] if str(e) else ""
        raise CheckpointError(f"{what} cannot be built: {type(e).__name__}: {reason:.300}") from e


def build_module(item: ModuleItem, backend: str = "auto") -> CompressedEmbedding | EmbeddingCollection:
    """The module without memory: all its tensors are on the meta device.

    Args:
        item: its description.
        backend: ``"torch"`` leaves the compiled kernels out.

    Raises:
        CheckpointError: unknown names, arguments out of range.
    """
    build = item.build
    with refusals(f"the {item.kind} at {item.paths[0]!r}"):
        if item.kind == "collection":
            schema, plan = Schema.from_dict(build["schema"]), Plan.from_dict(build["plan"])
            return EmbeddingCollection(schema, plan, device=_META, dtype=item.dtype, backend=backend)
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
        if backend == "torch":
            module._native = None
        return module.stand_in() if build["stands_in"] else module


_OPTIONS = {*inspect.signature(CompressedEmbedding).parameters} - {"num_embeddings", "embedding_dim"}


def build_model(
    build: Mapping[str, Any],
    collections: Mapping[str, ModuleItem],
    sizes: Mapping[str, Any],
    backend: str = "auto",
) -> CTRModel:
    """One of the library's models; its tables are on the meta device, its dense layers in memory.

    Args:
        build: ``key``, ``num_dense`` and ``params``.
        collections: its collections by attribute name.
        sizes: shape of every dense tensor by its key; nothing is allocated unless the model has these and, beside its
            collections, no others.
        backend: ``"torch"`` leaves the compiled kernels out.
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
        if not isinstance(build["params"], dict):
            raise ConfigError(f"`params` must be an object; got {type(build['params']).__name__}")
        params = make_params(cls, build["params"])
        spec = ModelSpec(schema, plan, second, build["num_dense"], backend=backend, device=_META)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a model warns of was said when it was trained
            return cls(spec, params)  # type: ignore[call-arg]

    with refusals(f"model {build.get('key')!r}"):
        features = sum(len(item.build["schema"]["features"]) for item in collections.values())
        with _META, _parameters_at_most(_MOST_PARAMETERS + 16 * (len(sizes) + features)):
            tried = make()
        state = weights_of(tried, keep_vars=True)
        apart = tuple(f"{name}." for name in collections)
        found = {k: tuple(v.shape) for k, v in state.items() if k in sizes or not k.startswith(apart)}
        if found != {k: tuple(shape) for k, shape in sizes.items()}:
            odd = sorted(k for k in {*found, *sizes} if found.get(k) != tuple(sizes.get(k, ())))
            raise ConfigError(f"its tensors are of other shapes than those it is to be filled with: {odd[:5]}")
        model = make()
        model.params = make_params(get_model(build["key"]), build["params"])
        return model


def count_row_lookups(item: ModuleItem) -> int:
    """Rows that a module reads for one id of each feature, which is what building it takes time and memory for."""
    with refusals(f"the {item.kind} at {item.paths[0]!r}"):
        if item.kind == "collection":
            programs = Plan.from_dict(item.build["plan"]).gathered(Schema.from_dict(item.build["schema"]))
            return sum(len(program.row_lookups) for program in programs.values())
        (spec,) = Schema.from_dict({"features": [item.build["spec"]]})
        config = config_from_dict(item.build["config"])
        return 0 if config.computes else len(config.program(spec).row_lookups)


@contextmanager
def _parameters_at_most(limit: int) -> Iterator[None]:
    """Stop building a model that registers more parameters, or modules, than what fills it can have.

    Raises:
        ConfigError: it does.
    """
    thread, count = threading.get_ident(), 0

    def registered(module: nn.Module, name: str, value: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > limit:
            raise ConfigError(f"its parameters describe more layers than the file has tensors for ({limit} and more)")

    hooks = (
        register_module_parameter_registration_hook(registered),
        register_module_module_registration_hook(registered),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def put_tables(module: nn.Module, tables: Mapping[str, nn.Parameter | Stored]) -> None:
    """Replace the row tables of one embedding module, by the names it reads them under."""
    served = {}
    cast("Any", module).from_file = True
    for name, values in tables.items():
        key = parameter_name(module, name)
        if isinstance(values, Stored):
            del module._parameters[key]
            served[name] = values
        else:
            # Modules that shared a table in the source share one here.
            shared = isinstance(values, nn.Parameter)
            module._parameters[key] = values if shared else nn.Parameter(values, requires_grad=False)
    if served:
        cast("Any", module).served = StoredTables(served)


def name_backends(root: nn.Module) -> None:
    """Set the ``backend`` of loaded collections to what reads their rows."""
    for module in root.modules():
        if isinstance(module, EmbeddingCollection) and module.served is not None:
            tables = [t for t in module.served.modules() if isinstance(t, Stored)]
            if any(t.direct is None for t in tables):
                module.backend = "fbgemm" if any(t.read_by_fbgemm for t in tables) else "torch"


def parameter_name(module: nn.Module, table: str) -> str:
    """The name of the parameter that stores a row table of an embedding module."""
    return module.parameter_name(table) if isinstance(module, CompressedEmbedding) else table


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
    held = {name: cast("Tensor", module._parameters[parameter_name(module, name)]) for name in names}
    return {name: (values.shape[0], values.shape[1]) for name, values in held.items()}


def plain_spec(name: str, num_embeddings: int, embedding_dim: int, mode: str | None) -> dict[str, Any]:
    """The specification of a torch module as what serves in its place; ``name`` is what its errors call it."""
    pooling: Any = mode or "sum"
    return spec_to_dict(FeatureSpec(name, num_embeddings, embedding_dim, pooling=pooling, init="normal:1"))


def output_layers(
    model: nn.Module, here: Mapping[str, nn.Module], by_path: Mapping[str, int], given: Mapping[str, Any]
) -> dict[nn.Module, int]:
    """Layers of ``model`` that score by a table of the file, which has no weight for them; indexes of the tables.

    ``here`` gives modules by path, ``by_path`` the indexes of the file's embeddings.
    """
    found: dict[nn.Module, int] = {}
    paths = {module: path for path, module in here.items()}
    for table in find_tables(model):
        at = next((by_path[path] for path in table.paths if path in by_path), None)
        for layer in table.output_layers:
            if at is not None and f"{paths[layer]}.weight" not in given:
                found[layer] = at
    return found
