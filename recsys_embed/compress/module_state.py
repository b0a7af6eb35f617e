"""Transfers module state other than the table to a replacement: training mode, hooks, attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from recsys_embed.compress.build import call_options
from recsys_embed.compress.references import Place, hooks_of
from recsys_embed.embedding import CompressedEmbedding

# A RemovableHandle refers to these dictionary objects, so the new module takes the same objects.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_TORCH_OWN = frozenset(vars(nn.Module()))
_COMPILED = ("forward", "_compiled_call_impl")
_OURS = ("stands_in", "from_file", "_renamed")


def _bare(module: nn.Module) -> nn.Module:
    """A freshly constructed module of the same kind on the meta device."""
    if isinstance(module, CompressedEmbedding):
        own: dict[str, Any] = {
            "config": module.config,
            "name": module.spec.name,
            "unseen": module.spec.unseen,
            "device": "meta",
        }
        bare = type(module)(module.num_embeddings, module.embedding_dim, **own, **call_options(module))
        return bare.stand_in() if module.stands_in else bare
    return (nn.Embedding if isinstance(module, nn.Embedding) else nn.EmbeddingBag)(1, 1, device="meta")


def _extras(module: nn.Module) -> dict[str, list[str]]:
    """Names added to a module after construction: attributes, parameters, buffers, submodules."""
    bare = _bare(module)
    known = {*_TORCH_OWN, *_OURS, *vars(bare), *bare._parameters, *bare._buffers, *bare._modules}
    return {
        part: [name for name in where if name not in known]
        for part, where in (
            ("", vars(module)),
            ("_parameters", module._parameters),
            ("_buffers", module._buffers),
            ("_modules", module._modules),
        )
    }


def carried_over(module: nn.Module, path: str) -> Iterator[Place]:
    """The hooks and added attributes of a table, which its replacement takes over as they are."""
    yield from hooks_of(module, path)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag | CompressedEmbedding):
        for name in _extras(module)[""]:
            if name not in _COMPILED:
                yield Place(f"{path}.{name}", vars(module)[name], "as an attribute of the table itself")


def extra_faults(old: nn.Module, new: nn.Module, where: str) -> Iterator[str]:
    """Faults: attributes of ``old`` that would hide those of ``new``."""
    for names in _extras(old).values():
        for name in names:
            if name not in _COMPILED and hasattr(new, name):
                yield f"{where}: its attribute {name!r} has a name that {type(new).__name__} needs; rename it"


def transfer_module_state(old: nn.Module, new: nn.Module) -> None:
    """Copy training mode, ``requires_grad``, hooks and added attributes from ``old`` to ``new``."""
    new.requires_grad_(any(p.requires_grad for p in old.parameters()))
    if isinstance(new, CompressedEmbedding):
        for table in new.program.tables:
            if table.frozen:
                new.table(table.name).requires_grad_(False)
    for part, names in _extras(old).items():
        for name in names:
            if part:
                vars(new)[part][name] = vars(old)[part][name]
            else:
                vars(new)[name] = vars(old)[name]
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set & set(_extras(old)["_buffers"])
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    new.train(old.training)
    if isinstance(new, CompressedEmbedding):
        new.stand_in()
