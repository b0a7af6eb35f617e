"""The registry of methods: one key names a method in files, classes, configs, tests and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from recsys_embed.core.method_config import MethodConfig, accept_former_names
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.method_checks import faults_of, infer_declarations
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.utils.plugins import METHODS, load_plugins, unknown_plugin_name
from recsys_embed.utils.types import Option


class MethodInfo(NamedTuple):
    """One registered method."""

    name: str
    embedding_cls: type[CompressedEmbedding]
    config_cls: type[MethodConfig]
    paper: str
    tags: tuple[str, ...]


_METHODS: dict[str, MethodInfo] = {}


def register(embedding_cls: type[CompressedEmbedding], *, paper: str, tags: tuple[str, ...] = ()) -> None:
    """Add a method under its config's key.

    Args:
        embedding_cls: the module class, which names its configuration class.
        paper: the method's source.
        tags: words to list methods by.

    Raises:
        ConfigError: the key is taken by another class, or the classes do not declare what :class:`MethodConfig` asks
            for; all faults at once.
    """
    raise_faults(faults_of(embedding_cls), f"registering {getattr(embedding_cls, '__name__', embedding_cls)}")
    config_cls = embedding_cls.config_cls
    infer_declarations(config_cls, tuple(tags))
    accept_former_names(config_cls)
    known = _METHODS.setdefault(
        config_cls.method, MethodInfo(config_cls.method, embedding_cls, config_cls, paper, tuple(tags))
    )
    if known.embedding_cls is not embedding_cls:
        raise ConfigError(f"method {config_cls.method!r} is already registered by {known.embedding_cls.__name__}")


def get_method(name: str) -> MethodInfo:
    """The method of that key.

    Raises:
        UnknownNameError: no such method; names the nearest.

    >>> import recsys_embed as rse
    >>> rse.get_method("hash").embedding_cls.__name__
    'HashEmbedding'
    """
    if name not in _METHODS:
        load_plugins(METHODS)
    if name not in _METHODS:
        raise unknown_plugin_name("method", name, _METHODS, METHODS)
    return _METHODS[name]


def registered_methods() -> list[MethodInfo]:
    """What has been registered so far, without the plugins that were not needed yet."""
    return list(_METHODS.values())


def list_methods(tag: str | None = None) -> list[MethodInfo]:
    """All methods in order of registration, or those with a tag.

    >>> import recsys_embed as rse
    >>> rse.list_methods()[0].name
    'full'
    """
    load_plugins(METHODS)
    return [m for m in _METHODS.values() if tag is None or tag in m.tags]


def config_from_dict(data: Mapping[str, Any]) -> MethodConfig:
    """Inverse of :meth:`MethodConfig.to_dict`; unknown methods and options are errors."""
    params = dict(data) if isinstance(data, Mapping) else {}
    name = params.pop("method", None)
    if not isinstance(name, str):
        raise ConfigError(f"a method configuration is an object with a key 'method'; got {data!r:.80}")
    cls = get_method(name).config_cls
    return cls.from_params(cls.current_options(params, warn=False))


def with_current_names(data: Any) -> Any:
    """JSON values with the options of every method configuration in them under their present names.

    What was saved before an option was renamed compares equal to what it means now. Configurations are objects with a
    key ``"method"``, and training settings with ``"method"`` and ``"method_args"``.

    >>> with_current_names({"features": {"C1": {"method": "freqcut", "num_kept": 4}}})
    {'features': {'C1': {'method': 'freqcut', 'num_frequent': 4}}}
    """
    if isinstance(data, list):
        return [with_current_names(value) for value in data]
    if not isinstance(data, dict):
        return data
    now = {key: with_current_names(value) for key, value in data.items()}
    known = _METHODS.get(now["method"]) if isinstance(now.get("method"), str) else None
    if known is not None and isinstance(now.get("method_args"), dict):
        now["method_args"] = known.config_cls.current_options(now["method_args"], warn=False)
    elif known is not None:
        now = known.config_cls.current_options(now, warn=False)
    return now


def make_embedding(method: str, num_embeddings: int, embedding_dim: int, **options: Option) -> CompressedEmbedding:
    """A drop-in module of the named method.

    Args:
        method: its key, see :func:`list_methods`.
        num_embeddings: number of ids.
        embedding_dim: width of a vector.
        options: how large it is: ``budget`` (bytes, or text such as ``"4MiB"``), or ``config``, or options of the
            method's own, those of its configuration (``help(rse.HashConfig)`` for ``"hash"``); ``precision`` and
            ``seed`` are among these. Every method takes ``padding_idx``, ``sparse``, ``mode`` (``"sum"``, ``"mean"``
            or ``"max"``, to be called like ``nn.EmbeddingBag``), ``include_last_offset``, ``name``, ``init``,
            ``unseen``, ``device`` and ``dtype``.

    Returns:
        A module: ids ``[...]`` give vectors ``[..., embedding_dim]``, or with ``mode`` ``[bags, embedding_dim]``.

    Raises:
        UnknownNameError: there is no such method.
        BudgetError: the method cannot be as small.

    >>> import torch, recsys_embed as rse
    >>> emb = rse.make_embedding("hash", 1_000_000, 16, budget="1MiB")
    >>> emb(torch.tensor([3, 999_999])).shape, emb.footprint().serve
    (torch.Size([2, 16]), 1048576)
    """
    return get_method(method).embedding_cls(num_embeddings, embedding_dim, **options)
