"""Stored tables of an exported file, from the manifest in its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys_embed.errors import CheckpointError
from recsys_embed.features import FeatureSpec
from recsys_embed.report.memory.arrays import ArrayRole, ArrayStorage, TableStorage
from recsys_embed.report.memory.plan import ModelStorage, spec_of

if TYPE_CHECKING:
    from recsys_embed.report.memory.file_tensors import FileTensor

KEY = "recsys_embed"
"""Key of the manifest in the metadata of a safetensors file."""
_INDEX = (".words", ".ranks", ".values")


@dataclass
class _Group:
    """Tensors of one feature, of one drop-in or full table, or of several features."""

    name: str
    method: str = "shared"
    spec: FeatureSpec | None = None
    config: dict[str, Any] | None = None
    arrays: list[ArrayStorage] = field(default_factory=list)


def export_storage(path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, FileTensor]) -> ModelStorage:
    """Storage of an exported file: tables with rows as stored, index arrays of kept rows, and all other tensors.

    Raises:
        CheckpointError: the manifest does not fit the tensors.
    """
    try:
        return _read_manifest(manifest, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        raise CheckpointError(f"{path} is damaged: its manifest does not fit its tensors ({e!r})") from e


def _read_manifest(manifest: Mapping[str, Any], tensors: Mapping[str, FileTensor]) -> ModelStorage:
    groups: dict[str, _Group] = {}
    prefixes = []
    for module in manifest["modules"]:
        path = module["paths"][0]
        prefixes.append((path, _features(module, path, groups)))
    taken: set[str] = set()
    for name, item in manifest["tables"].items():
        kept = [n for n in (f"{name}.rows{end}" for end in _INDEX) if n in tensors]
        taken |= {name, *kept}
        width = item["width"] if item["columns"] is None else len(item["columns"])
        table = ArrayStorage(name, item["count"], width, 4, trained=False, packed=_size(tensors[name]))
        arrays = [table, *(ArrayStorage(n, _size(tensors[n]), 1, 1, "index", trained=False) for n in kept)]
        reader = name.rpartition(".")[0]
        # A table that several features read is listed on its own.
        group = groups[reader] if reader in groups else groups.setdefault(name, _Group(name))
        group.arrays += arrays
    rest = []
    for name, tensor in tensors.items():
        if name in taken:
            continue
        owner = max((p for p, _ in prefixes if name.startswith(f"{p}." if p else "")), key=len, default=None)
        role: ArrayRole = "dense" if tensor.dtype.is_floating_point else "index"
        array = ArrayStorage(name, 1, prod(tensor.shape), tensor.dtype.itemsize, role, trained=False)
        if owner is None:
            rest.append(array)
        else:
            # Projections are stacked over features and index arrays are concatenated, so they count for the module.
            single = next((g for p, g in prefixes if p == owner and g is not None), None)
            label = (owner or "embedding") + " (projections, index arrays)"
            (single or groups.setdefault(label, _Group(label))).arrays.append(array)
    note = f"exported at {manifest['precision']} by recsys-embed {manifest['written_by'].get('recsys-embed')}"
    storages = [_storage_of_group(g) for g in groups.values() if g.arrays or g.spec is not None]
    return ModelStorage(tuple(storages), tuple(rest), (note,))


def _features(module: Mapping[str, Any], path: str, groups: dict[str, _Group]) -> _Group | None:
    """Add the groups of a module's features; returns the only one where the module is a single table."""
    at = f"{path}." if path else ""
    if module["kind"] == "collection":
        for spec in module["schema"]["features"]:
            config = module["plan"]["features"][spec["name"]]
            key = f"{at}{spec['name']}"
            feature = spec_of(spec["name"], spec["num_embeddings"], spec["embedding_dim"])
            groups[key] = _Group(key, config["method"], feature, dict(config))
        return None
    spec, config = module["spec"], module["config"]
    feature = spec_of(path or spec["name"], spec["num_embeddings"], spec["embedding_dim"])
    groups[path] = group = _Group(path or "embedding", config["method"], feature, dict(config))
    return group


def _size(tensor: FileTensor) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def _storage_of_group(group: _Group) -> TableStorage:
    spec = group.spec
    largest = max(group.arrays, key=lambda a: a.nbytes, default=None)
    return TableStorage(
        name=group.name.replace(".", "/"),
        kind="shared" if group.method == "shared" else "export",
        method=group.method,
        ids=spec.num_embeddings if spec is not None else 0,
        width=spec.embedding_dim if spec is not None else largest.width if largest is not None else 0,
        arrays=tuple(group.arrays),
        update="frozen",
        spec=spec,
        config=group.config,
    )
