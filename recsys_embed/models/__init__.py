"""Click-through-rate models over embedding collections; every model accepts any plan with suitable widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import nn

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.errors import ConfigError
from recsys_embed.features import Schema
from recsys_embed.models.base import MODELS, CTRModel, ModelSpec, make_params, register
from recsys_embed.models.criteo import former_default
from recsys_embed.models.dcn import DCN
from recsys_embed.models.dcnv2 import DCNv2
from recsys_embed.models.deepfm import DeepFM
from recsys_embed.models.din import DIN
from recsys_embed.models.dlrm import DLRM
from recsys_embed.models.dnn import DNN
from recsys_embed.models.fm import FM
from recsys_embed.models.ipnn import IPNN
from recsys_embed.models.lr import LR
from recsys_embed.models.retrieval import RetrievalModel
from recsys_embed.models.sasrec import SASRec
from recsys_embed.models.twotower import TwoTower
from recsys_embed.models.widedeep import WideDeep
from recsys_embed.optim import FusedOptimizer
from recsys_embed.plan import Plan
from recsys_embed.utils import plugins
from recsys_embed.utils.plugins import load_plugins, unknown_plugin_name
from recsys_embed.utils.types import Option

__all__ = [
    "DCN",
    "DIN",
    "DLRM",
    "DNN",
    "FM",
    "IPNN",
    "LR",
    "CTRModel",
    "DCNv2",
    "DeepFM",
    "ModelSpec",
    "RetrievalModel",
    "SASRec",
    "TwoTower",
    "WideDeep",
    "build_model",
    "get_model",
    "hyperparameters",
    "list_models",
    "register",
    "vector_models",
]


def list_models() -> list[str]:
    """Keys of all registered models, in order of registration.

    >>> "deepfm" in list_models()
    True
    """
    load_plugins(plugins.MODELS)
    return list(MODELS)


def vector_models() -> list[str]:
    """Keys of the models that have embedding vectors, which a plan can compress.

    >>> "lr" in vector_models(), "fm" in vector_models()
    (False, True)
    """
    return [key for key in list_models() if MODELS[key].uses_vectors]


def get_model(name: str) -> type[CTRModel]:
    """The model class of a key; an unknown key names the nearest one."""
    if name not in MODELS:
        load_plugins(plugins.MODELS)
    if name not in MODELS:
        raise unknown_plugin_name("model", name, MODELS, plugins.MODELS)
    return MODELS[name]


def hyperparameters(name: str) -> tuple[str, ...]:
    """Names of a model's hyperparameters.

    >>> hyperparameters("dnn")
    ('hidden', 'dropout', 'batch_norm')
    """
    return tuple(f.name for f in fields(get_model(name).params_cls))


def build_model(
    name: str,
    schema: Schema,
    plan: Plan | None,
    linear_plan: Plan | None = None,
    *,
    num_dense: int | None = None,
    optimizer: FusedOptimizer | None = None,
    seed: int = 0,
    backend: str = "auto",
    device: torch.device | str | None = None,
    collection: Callable[..., nn.Module] = EmbeddingCollection,
    **hparams: Option,
) -> CTRModel:
    """Build a model whose tables follow ``plan``.

    Args:
        name: model key, see :func:`list_models`.
        schema: categorical features, in the order of the columns of ``ids``.
        plan: storage of the vectors. ``lr``, which has none, stores its weights by it when ``linear_plan`` is None.
        linear_plan: storage of first-order weights (over ``schema.with_dim(1)``); None keeps them uncompressed.
        num_dense: numeric columns, ``data.num_dense`` of a data set; must be given (what is left out means Criteo's,
            for one more version).
        optimizer: fused optimizer of the tables (:mod:`recsys_embed.optim`), or None for ordinary ``.grad``.
        seed: same seed, same bits; dense layers start alike whatever the plan.
        backend: kernel backend of the collections.
        device: where the model lives.
        collection: makes the collections, of what :class:`recsys_embed.EmbeddingCollection` takes.
        **hparams: hyperparameters of the model's ``params_cls``, e.g. ``hidden=(400, 400)``.

    Returns:
        A :class:`CTRModel`: ``model(dense, ids) -> logits [B]``.

    Raises:
        UnknownNameError: unknown model or hyperparameter.
        ConfigError: impossible sizes, or a model that needs equal widths got several.

    >>> from recsys_embed.features import FeatureSpec
    >>> schema = Schema([FeatureSpec("C1", 10, 4), FeatureSpec("C2", 20, 4)])
    >>> model = build_model("deepfm", schema, Plan.full(schema), num_dense=3, hidden=(8,))
    >>> model(torch.zeros(2, 3), torch.tensor([[0, 1], [9, 19]])).shape
    torch.Size([2])
    """
    cls = get_model(name)
    params = make_params(cls, hparams)
    if num_dense is None:
        num_dense = former_default()
    if num_dense < 0:
        raise ConfigError(f"`num_dense` must be 0 or more; got {num_dense} (model {name!r})")
    spec = ModelSpec(schema, plan, linear_plan, num_dense, optimizer, seed, backend, device, collection)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(spec, params)  # type: ignore[call-arg]
    model.params = params
    return model if device is None else model.to(device)
