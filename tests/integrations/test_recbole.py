"""RecBole's models train an epoch before and after their tables are compressed."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import dok_matrix

pytest.importorskip("recbole")

import recsys_embed as rse
from tests.integrations.models import with_shared_rows

USERS, ITEMS = 120, 160
# Names that numpy 2 has no more, and RecBole of before still asks for.
OLD_NUMPY = {"float_": "float64", "complex_": "complex128", "unicode_": "str_", "bool8": "bool_"}


@pytest.fixture(autouse=True)
def _as_recbole_knew_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ray", "ray.tune"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for old, new in OLD_NUMPY.items():
        monkeypatch.setattr(np, old, getattr(np, new), raising=False)
    # Of scipy's, which RecBole fills by a method that is no more.
    monkeypatch.setattr(dok_matrix, "_update", lambda self, new: self._dict.update(new), raising=False)
    monkeypatch.setattr(sys, "argv", ["recbole"])
    monkeypatch.chdir(tmp_path)
    logging.disable(logging.CRITICAL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Users that like a tenth of the items."""
    g = np.random.default_rng(0)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(USERS):
        taste = g.integers(0, 10)
        for time in range(15):
            item = int(g.random() ** 2 * (ITEMS // 10)) * 10 + taste if g.random() < 0.8 else g.integers(0, ITEMS)
            lines.append(f"{user}\t{item}\t{g.integers(1, 6)}\t{time}")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "tiny.inter").write_text("\n".join(lines) + "\n")
    return tmp_path


OPTIONS: dict[str, dict[str, Any]] = {
    "BPR": {},
    "LightGCN": {},
    "SASRec": {
        "MAX_ITEM_LIST_LENGTH": 8,
        "n_layers": 1,
        "n_heads": 2,
        "hidden_size": 16,
        "inner_size": 16,
        "hidden_dropout_prob": 0.0,
        "attn_dropout_prob": 0.0,
        "loss_type": "CE",
        "train_neg_sample_args": None,
    },
    "DeepFM": {
        "threshold": {"rating": 3},
        "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "mode": "labeled", "order": "RO", "group_by": "none"},
        "metrics": ["AUC", "LogLoss"],
        "valid_metric": "AUC",
        "train_neg_sample_args": None,
        "load_col": {"inter": ["user_id", "item_id", "rating"]},
        "dropout_prob": 0.0,
    },
}


def trained(folder: Path, name: str, kind: str) -> tuple[dict[str, float], float]:
    """Test metrics of a model after an epoch, and how many times smaller its tables are."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    options = {
        "data_path": str(folder),
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
        "epochs": 1,
        "train_batch_size": 256,
        "embedding_size": 16,
        "use_gpu": False,
        "gpu_id": "",
        "show_progress": False,
        "state": "ERROR",
        "learning_rate": 0.01,
        "metrics": ["Recall", "NDCG"],
        "topk": [10],
        "valid_metric": "NDCG@10",
        "metric_decimal_place": 8,
        "checkpoint_dir": str(folder / "saved"),
        "log_wandb": False,
        **OPTIONS[name],
    }
    config = Config(model=name, dataset="tiny", config_dict=options)
    init_seed(1, True)
    dataset = create_dataset(config)
    training, _, testing = data_preparation(config, dataset)
    init_seed(1, True)
    model, ratio = get_model(config["model"])(config, training.dataset), 1.0
    if kind != "plain":
        full, hashed = (rse.get_method(m).config_cls for m in ("full", "hash"))
        schema = rse.Schema.from_model(model)
        plan = {spec.name: full() if spec.num_ids < 100 else hashed(num_buckets=40) for spec in schema}
        ratio = rse.compress_(model, plan, init="fresh").ratio
    if kind == "torch":
        model = with_shared_rows(model)
    init_seed(1, True)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.fit(training, None, verbose=False, saved=False, show_progress=False)
    return dict(trainer.evaluate(testing, load_best_model=False, show_progress=False)), ratio


@pytest.mark.parametrize("name", OPTIONS)
def test_an_epoch(name: str, folder: Path) -> None:
    (plain, _), (ours, ratio), (torchs, _) = (trained(folder, name, kind) for kind in ("plain", "hash", "torch"))
    assert ratio > 1.2
    assert ours == pytest.approx(torchs, abs=1e-5)
    assert ours.keys() == plain.keys()
    assert ours != pytest.approx(plain, abs=1e-5)
