"""What a finished run says of itself: its weights, and the data folder that it was trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys_embed.data.manifest import Manifest, read_manifest
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.train.checkpoint import load_checkpoint
from recsys_embed.utils.strict_json import own_json, read_object
from recsys_embed.utils.types import JSON

if TYPE_CHECKING:
    from recsys_embed.data.loader import Dataset

MODEL_FILE = "model.pt"


def run_files(path: str | Path) -> tuple[Path, Path]:
    """The folder and the ``model.pt`` of a run by the path of either."""
    path = Path(path)
    return (path, path / MODEL_FILE) if os.path.isdir(path) else (path.parent, path)


def read_weights(path: str | Path) -> tuple[Path, JSON, dict[str, Any]]:
    """The ``model.pt`` of a run folder, or the file itself: its path, settings and weights.

    Raises:
        ConfigError: no such file or folder.
        CheckpointError: not a finished run, or damaged.
    """
    path = Path(path)
    # os.path says no, where the methods of a path raise, of what cannot be the name of a file.
    _, file = run_files(path)
    if not os.path.exists(file):
        what = "holds no model.pt; is it the folder of a finished run?" if os.path.isdir(path) else "does not exist"
        raise ConfigError(f"{path} {what}")
    payload = load_checkpoint(file)
    config, state = payload["config"], payload.get("model")
    if not isinstance(state, dict) or not isinstance(config.get("model"), str):
        raise CheckpointError(f"{file} holds no trained model; name the model.pt of a finished run, or its folder")
    return file, config, state


def carried(state: dict[str, Any], name: str) -> JSON:
    """Schema and plan that the state of a collection carries, features in the order of their columns."""
    found = own_json(bytes(state[f"{name}._extra_state"].numpy()))
    features = [found["schema"][feature] for feature in found["order"]]
    # What its indexes hold is among the state's tensors.
    plan = {key: found["plan"][key] for key in ("version", "features")}
    return {"schema": {"features": features}, "plan": plan}


def trained_on(path: str | Path) -> JSON | None:
    """What a run says of the data folder that it was trained on: ``folder`` and ``encoding``; None: nothing."""
    file = run_files(path)[0] / "run.json"
    known = (read_object(file) if file.exists() else {}).get("data")
    return known if isinstance(known, dict) and isinstance(known.get("folder"), str) else None


def check_run_data(path: str | Path, given: Dataset | str | Path) -> None:
    """Refuse a data folder, opened or its path, that encodes rows in another way than the one of a run.

    Raises:
        ConfigError: it does, whatever its features and sizes; names the way out.
        DataError: the folder is damaged.
    """
    known = trained_on(path)
    if known is None or not isinstance(known.get("encoding"), str):
        return
    manifest = read_manifest(given) if isinstance(given, str | Path) else getattr(given, "manifest", None)
    if isinstance(manifest, Manifest) and manifest.fingerprint != known["encoding"]:
        raise ConfigError(
            f"{given if isinstance(given, str | Path) else getattr(given, 'path', 'the data')} is another conversion "
            f"than the one that the run was trained on ({known['folder']}), so that its ids mean other values: name "
            "that folder, or one that `recsys-embed data ... --like` made by it"
        )
