"""The model of a training run, from its folder alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from recsys_embed.data.manifest import read_manifest
from recsys_embed.data.serving.stored import Output
from recsys_embed.errors import ConfigError, DataError
from recsys_embed.exports.served_modules import ModuleItem, build_model, refusals
from recsys_embed.kernels.derived_tensors import recreate_derived_tensors
from recsys_embed.train.checkpoint import load_checkpoint
from recsys_embed.train.run_folder import carried, check_run_data, read_weights, run_files, trained_on

__all__ = ["check_run_data", "model_of_run", "run_data", "run_output"]


def model_of_run(path: str | Path) -> nn.Module:
    """The trained model of a run folder, or of its ``model.pt``, in evaluation mode.

    Features and plans are those that the model's collections carry with their state, so the data is not needed.

    Raises:
        ConfigError: no such file or folder.
        CheckpointError: not a finished run, or damaged.
    """
    file, config, state = read_weights(path)
    with refusals(f"the model of {file}"):
        collections = {
            name: ModuleItem("collection", (name,), carried(state, name), torch.float32)
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


def run_output(path: str | Path) -> Output:
    """What the scores of a run's model are."""
    config = load_checkpoint(run_files(path)[1])["config"]
    return "probability" if config.get("loss", "logloss") == "logloss" else "value"


def run_data(path: str | Path, notes: list[str]) -> Path | None:
    """The data folder that a run was trained on, where it is still that; None where it is not known or not there.

    Args:
        path: of the run folder, or of its ``model.pt``.
        notes: filled with why not.
    """
    known = trained_on(path)
    if known is None:
        return None
    try:
        if read_manifest(known["folder"]).fingerprint == known.get("encoding"):
            return Path(known["folder"])
    except (DataError, ConfigError):
        pass
    notes.append(
        f"without encoders of raw rows: {known['folder']} is no longer the data that the run was trained on; name the "
        "folder with `--data` or `encoders=`"
    )
    return None
