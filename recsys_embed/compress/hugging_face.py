"""Compressed tables in models of Hugging Face's transformers: saved, loaded and tied as transformers does it.

``save_pretrained`` writes into ``config.json``, as a quantisation of method ``recsys_embed``, which tables are
compressed and how; ``from_pretrained`` then builds them before it loads the weights. Where this module has not been
imported, transformers stops at the shape of the tables' plain weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recsys_embed.compress.build import TableReplacement
from recsys_embed.compress.model_replacement import ModelReplacement
from recsys_embed.compress.saved_tables import SavedTable, damages, description
from recsys_embed.discover import FoundTable, find_tables
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.tied_linear import TiedLinear
from recsys_embed.errors import CheckpointError, ConfigError, raise_faults
from recsys_embed.kernels.derived_tensors import recreate_derived_tensors
from recsys_embed.kernels.low_precision_states import low_precision_tables
from recsys_embed.utils.optional import require
from recsys_embed.utils.settings import param

require("transformers", extra="transformers", purpose="loading compressed models by from_pretrained")

from safetensors import safe_open  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

METHOD = "recsys_embed"


@dataclass(frozen=True)
class _Entry(SavedTable):
    paths: tuple[str, ...]
    output_layers: tuple[str, ...] = param(MISSING, empty=True)


@register_quantization_config(METHOD)
class CompressedTablesConfig(QuantizationConfigMixin):
    """The compressed tables of a saved model.

    Args:
        tables: of each, ``paths`` in the model and those of its ``output_layers``, ``name``, ``config`` of its method
            and policy for ``unseen`` ids.
    """

    def __init__(self, tables: Any = (), **others: Any) -> None:
        self.quant_method: Any = METHOD
        self.tables = tables
        self._strange = sorted(others.keys() - {"quant_method"})

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        return {"quant_method": METHOD, "tables": self.tables}

    def entries(self) -> list[_Entry]:
        """The tables, checked.

        Raises:
            CheckpointError: they are none, or something else is described.
        """
        where = "config.json, quantization_config"
        with damages(where):
            raise_faults([f"{key!r} is no key of it" for key in self._strange], "expected: tables")
            if not isinstance(self.tables, list | tuple) or not self.tables:
                raise ConfigError(f"`tables` must be a non-empty list; got {self.tables!r:.80}")
            found = [_Entry.read(values, f"table {i}") for i, values in enumerate(self.tables)]
            for entry in found:
                _ = entry.method_config
        return found


@register_quantizer(METHOD)
class CompressedTablesQuantizer(HfQuantizer):
    """Builds compressed tables before weights are loaded, and describes them where a model is saved."""

    # What transformers asks of a quantizer.
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def preprocess_model(self, model: PreTrainedModel, checkpoint_files: Any = None, **_: Any) -> None:
        """Replace the tables; unlike other quantised models, this one trains as usual."""
        entries = self.quantization_config.entries()
        _check_files(entries, checkpoint_files or ())
        for entry in entries:
            _tie_output_layers(model, entry)  # transformers does so once the weights are there
        tables = find_tables(model)
        replacements, faults = [], []
        for entry in entries:
            table = _table_of(model, tables, entry.paths)
            if table is None:
                continue  # of a head that this class does not have; transformers tells what it leaves out
            if table.obstacle:
                faults.append(f"table {table.name!r} cannot be replaced: {table.obstacle}")
            # Names salt hashes, so a table keeps that of the class it was saved from.
            known = replace(table, name=entry.name)
            replacements.append(TableReplacement(known, entry.method_config, unseen=entry.unseen))
        exchange = ModelReplacement(model, replacements, [], {})
        raise_faults(faults or exchange.faults(), f"from_pretrained of {type(model).__name__}", CheckpointError)
        exchange.run("fresh")
        adapt(model)
        for module in (m for t in _compressed(model) for m in _drop_ins(t)):
            vars(module)["_is_hf_initialized"] = True
        paths = {path for t in _compressed(model) for path in t.paths}
        paths.update(path for entry in entries for path in entry.paths)
        markers = {re.escape(f"{path}.weight") + "$" for path in paths}
        model._keys_to_ignore_on_load_unexpected = markers.union(model._keys_to_ignore_on_load_unexpected or ())

    def postprocess_model(self, model: PreTrainedModel, **_: Any) -> None:
        """Bring back what no file holds, and tell every reader of a shared table which parameter it is now."""
        for table in _compressed(model):
            for module in _drop_ins(table):
                recreate_derived_tensors(module, module._device())
                vars(module).pop("_is_hf_initialized", None)
                if module.shared is not None:
                    held = {name: module._parameters.get(name) for name in module.shared.values}
                    module.shared.values.update({name: p for name, p in held.items() if p is not None})
        del model.config.quantization_config
        adapt(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *_: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict, each shared table once; ``config.json``, which is written next, describes the tables."""
        tables = _compressed(model)
        served = [t.name for t in tables for m in _drop_ins(t) if m.served is not None]
        if served:
            raise ConfigError(
                f"tables {served} are read from an exported file, which save_pretrained cannot copy; keep that file, "
                "and load it into the same class: recsys_embed.load(path, into=model)"
            )
        few = [t.name for t in tables for m in _drop_ins(t) if any(True for _ in low_precision_tables(m))]
        if few:
            raise ConfigError(
                f"low-precision tables {few} have no form in files of transformers; save them by "
                "torch.save(model.state_dict(), path), or export the model: recsys_embed.export(model, path)"
            )
        model.config.quantization_config = CompressedTablesConfig(list(_described(model, tables)))
        state = dict(model.state_dict())
        for key in _aliases(model):
            state.pop(key, None)
        for table in tables:
            # No plain table has this shape, so that transformers without this module refuses the file.
            state.setdefault(f"{table.paths[0]}.weight", torch.zeros(0, dtype=torch.uint8))
        return state, {}

    def _dequantize(self, model: PreTrainedModel, *_: Any, **__: Any) -> Any:
        raise ConfigError("turn compressed tables back into plain ones with recsys_embed.materialize_(model)")


def adapt(model: nn.Module) -> None:
    """Make saving, tying and resizing of each transformers model within ``model`` fit its tables as they are now."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _adapt(module)


def _adapt(model: PreTrainedModel) -> None:
    own = vars(model)
    for name in ("_tied_weights_keys", "resize_token_embeddings", "set_input_embeddings", "save_pretrained"):
        own.pop(name, None)
    compressed = _compressed(model)
    declared = getattr(type(model), "_tied_weights_keys", None)
    if compressed and isinstance(declared, Mapping):
        # Explicit names of weights that are computed now are tied by what computes them.
        gone = {name for name in {*declared, *declared.values()} if _is_computed(model, name)}
        model._tied_weights_keys = {a: b for a, b in declared.items() if a not in gone and b not in gone}
    if compressed:
        model.hf_quantizer = CompressedTablesQuantizer(CompressedTablesConfig())
        model.save_pretrained = partial(_save, model)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True) | _aliases(model)
        if any(isinstance(m, CompressedEmbedding | TiedLinear) for m in _ends(model)):
            model.resize_token_embeddings = partial(_resize, model)
            model.set_input_embeddings = partial(_set_input, model)
    elif isinstance(getattr(model, "hf_quantizer", None), CompressedTablesQuantizer):
        del model.hf_quantizer
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _ends(model: PreTrainedModel) -> Iterator[nn.Module | None]:
    """Input and output embeddings, where a model has such."""
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            yield get()
        except (NotImplementedError, AttributeError):
            continue


def _resize(model: PreTrainedModel, new_num_tokens: int | None = None, *_: Any, **__: Any) -> nn.Module:
    table: Any = model.get_input_embeddings()
    if new_num_tokens in (None, table.num_embeddings) and not __.get("pad_to_multiple_of"):
        return table
    raise ConfigError(
        f"a compressed table of {table.num_embeddings} tokens cannot be resized to {new_num_tokens}; turn it back "
        "first, recsys_embed.materialize_(model), then resize, plan and compress again"
    )


def _set_input(model: PreTrainedModel, value: nn.Module) -> None:
    if value is not model.get_input_embeddings():
        raise ConfigError(
            "the input embeddings are a compressed table, which output layers may score by; turn it back first, "
            "recsys_embed.materialize_(model), then set others, tie_weights(), plan and compress again"
        )


def _save(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """``save_pretrained``: the configuration says of tables for its file alone, since other models share it."""
    try:
        return type(model).save_pretrained(model, *args, **kwargs)
    finally:
        if isinstance(getattr(model.config, "quantization_config", None), CompressedTablesConfig):
            del model.config.quantization_config


def _compressed(model: nn.Module) -> list[FoundTable]:
    return [t for t in find_tables(model) if t.kind == "compressed"]


def _drop_ins(table: FoundTable) -> list[CompressedEmbedding]:
    return [m for m in table.modules if isinstance(m, CompressedEmbedding)]


def _described(model: nn.Module, tables: Sequence[FoundTable]) -> Iterator[dict[str, Any]]:
    where = {id(module): path for path, module in model.named_modules()}
    for table in tables:
        module = _drop_ins(table)[0]
        yield {
            "paths": list(table.paths),
            "output_layers": [where[id(layer)] for layer in table.output_layers],
            **description(module),
        }


def _is_computed(model: nn.Module, name: str) -> bool:
    """Whether a dotted name is the weight of a module that computes it."""
    path, _, weight = name.rpartition(".")
    try:
        holder = model.get_submodule(path)
    except AttributeError:
        return False  # a pattern
    return (
        isinstance(holder, CompressedEmbedding | TiedLinear)
        and weight not in holder._parameters
        and (weight == "weight")
    )


def _aliases(model: nn.Module) -> dict[str, str]:
    """Names of parameters of drop-ins that stand under another name before: the name that is saved."""
    first: dict[int, str] = {}
    out = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CompressedEmbedding):
            for name, parameter in module._parameters.items():
                key = f"{path}.{name}"
                known = first.setdefault(id(parameter), key)
                if known != key:
                    out[key] = known
    return out


def _places(model: PreTrainedModel, paths: Sequence[str]) -> set[str]:
    """Where saved paths may be in ``model``: those of a model with a head have the name of its base in front."""
    base = f"{model.base_model_prefix}."
    return {p for path in paths for p in (path, base + path, path.removeprefix(base))}


def _table_of(model: PreTrainedModel, tables: Sequence[FoundTable], paths: Sequence[str]) -> FoundTable | None:
    return next((t for t in tables if _places(model, paths).intersection(t.paths)), None)


def _tie_output_layers(model: PreTrainedModel, entry: _Entry) -> None:
    here = dict(model.named_modules(remove_duplicate=False))
    tables = [here[path] for path in _places(model, entry.paths) if path in here]
    layers = [here[path] for path in _places(model, entry.output_layers) if path in here]
    for module in [*tables[1:], *layers] if tables else ():
        module._parameters["weight"] = tables[0]._parameters["weight"]


def _check_files(tables: Sequence[_Entry], files: Sequence[str]) -> None:
    """The files hold what the configuration says; a plain model saved with the configuration of another does not."""
    keys: set[str] = set()
    for file in files:
        if not str(file).endswith(".safetensors"):
            return
        with safe_open(file, framework="pt") as f:
            keys.update(f.keys())
    plain = [t.name for t in tables if files and not any(f"{p}._extra_state" in keys for p in t.paths)]
    if plain:
        raise CheckpointError(
            f"config.json says that tables {plain} are compressed, which the weights beside it are not; remove its "
            "`quantization_config` to load them as they are"
        )
