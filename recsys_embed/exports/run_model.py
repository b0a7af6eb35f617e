"""The model of a training run, from its folder alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recsys_embed.data.manifest import Manifest, read_manifest
from recsys_embed.data.serving.stored import Output
from recsys_embed.errors import CheckpointError, ConfigError, DataError
from recsys_embed.exports.served_modules import ModuleItem, build_model, refusals
from recsys_embed.kernels.derived_tensors import recreate_derived_tensors
from recsys_embed.train.checkpoint import load_checkpoint
from recsys_embed.utils.strict_json import own_json, read_object

if TYPE_CHECKING:
    from recsys_embed.data.loader import Dataset


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


def run_output(path: str | Path) -> Output:
    """What the scores of a run's model are."""
    config = load_checkpoint(_files(path)[1])["config"]
    return "probability" if config.get("loss", "logloss") == "logloss" else "value"


def run_data(path: str | Path, notes: list[str]) -> Path | None:
    """The data folder that a run was trained on, where it is still that; None where it is not known or not there.

    Args:
        path: of the run folder, or of its ``model.pt``.
        notes: filled with why not.
    """
    known = _trained_on(path)
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


def check_run_data(path: str | Path, given: Dataset | str | Path) -> None:
    """Refuse a data folder, opened or its path, that encodes rows in another way than the one of a run.

    Raises:
        ConfigError: it does, whatever its features and sizes; names the way out.
        DataError: the folder is damaged.
    """
    known = _trained_on(path)
    if known is None or not isinstance(known.get("encoding"), str):
        return
    manifest = read_manifest(given) if isinstance(given, str | Path) else getattr(given, "manifest", None)
    if isinstance(manifest, Manifest) and manifest.fingerprint != known["encoding"]:
        raise ConfigError(
            f"{given if isinstance(given, str | Path) else getattr(given, 'path', 'the data')} is another conversion "
            f"than the one that the run was trained on ({known['folder']}), so that its ids mean other values: name "
            "that folder, or one that `recsys-embed data ... --like` made by it"
        )


def _trained_on(path: str | Path) -> dict[str, Any] | None:
    """What a run says of the data folder that it was trained on."""
    file = _files(path)[0] / "run.json"
    known = (read_object(file) if file.exists() else {}).get("data")
    return known if isinstance(known, dict) and isinstance(known.get("folder"), str) else None


def _files(path: str | Path) -> tuple[Path, Path]:
    """The folder and the ``model.pt`` of a run by the path of either."""
    path = Path(path)
    return (path, path / "model.pt") if os.path.isdir(path) else (path.parent, path)
