"""The model of a training run, from its folder alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.exports.served_modules import ModuleItem, build_model, refusals
from recsys_embed.kernels.derived_tensors import recreate_derived_tensors
from recsys_embed.train.checkpoint import load_checkpoint
from recsys_embed.utils.strict_json import own_json


def model_of_run(path: str | Path) -> nn.Module:
    """The trained model of a run folder, or of its ``model.pt``, in evaluation mode.

    Features and plans are those that the model's collections carry with their state, so the data is not needed.

    Raises:
        ConfigError: no such file or folder.
        CheckpointError: not a finished run, or damaged.
    """
    path = Path(path)
    # os.path says no, where the methods of a path raise, of what cannot be the name of a file.
    folder = os.path.isdir(path)
    file = path / "model.pt" if folder else path
    if not os.path.exists(file):
        what = "holds no model.pt; is it the folder of a finished run?" if folder else "does not exist"
        raise ConfigError(f"{path} {what}")
    payload = load_checkpoint(file)
    config, state = payload["config"], payload.get("model")
    if not isinstance(state, dict) or not isinstance(config.get("model"), str):
        raise CheckpointError(f"{file} holds no trained model; export the model.pt of a finished run")
    with refusals(f"the model of {file}"):
        collections = {
            name: ModuleItem("collection", (name,), _carried(state, name), torch.float32)
            for name in ("embedding", "linear")
            if f"{name}._extra_state" in state
        }
        build = {
            "key": config["model"],
            "num_dense": len(state["numeric_mean"]),
            "params": config.get("model_args", {}),
        }
        apart = tuple(f"{name}." for name in collections)
        sizes = {k: v.shape for k, v in state.items() if isinstance(v, Tensor) and not k.startswith(apart)}
        model = build_model(build, collections, sizes)
        model.load_state_dict(state, assign=True)
    recreate_derived_tensors(model, torch.device("cpu"))
    return model.eval().requires_grad_(False)


def _carried(state: dict[str, Any], name: str) -> dict[str, Any]:
    """Schema and plan that a collection's state carries, features in the order of their columns."""
    carried = own_json(bytes(state[f"{name}._extra_state"].numpy()))
    features = [carried["schema"][feature] for feature in carried["order"]]
    # What its indexes hold is among the state's tensors.
    plan = {key: carried["plan"][key] for key in ("version", "features")}
    return {"schema": {"features": features}, "plan": plan}
