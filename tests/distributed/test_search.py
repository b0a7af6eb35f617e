"""Several workers on one study, one of them a group of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recsys_embed.data import CriteoOptions, convert_criteo, make_synthetic, open_dataset
from recsys_embed.train import run_training
from recsys_embed.train.config import TrainConfig
from tests.distributed.cases import study_storage
from tests.distributed.workers import Workers

optuna = pytest.importorskip("optuna")


@pytest.mark.slow
def test_a_group_is_one_worker_of_a_study(workers: Workers, tmp_path: Path) -> None:
    """Four processes run three trials, one of which cannot be; a single process adds two to the same study."""
    make_synthetic(tmp_path / "raw", 600, seed=3, text_only=True)
    convert_criteo([tmp_path / "raw" / "synthetic.tsv"], tmp_path / "data", CriteoOptions(min_count=1))
    settings: dict[str, Any] = {"model": "fm", "method": "unified", "embedding_dim": 4, "batch_size": 100}
    settings |= {"embedding_optimizer": "rowwise_adagrad", "threads": 1}
    storage = study_storage(str(tmp_path / "study"))
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize")
    given = {"data": str(tmp_path / "data"), "settings": settings, "storage": str(tmp_path / "study")}
    assert workers.run("search_run", 4, **given) == [2, 2, 2, 2]

    def objective(trial: Any) -> float:
        rate = trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)
        config = TrainConfig.from_dict({**settings, "learning_rate": rate, "budget": "20KiB"})
        result = run_training(config, open_dataset(tmp_path / "data"), show_progress=False).result
        assert result.test is not None
        return result.test.auc

    study.optimize(objective, n_trials=2)
    states = [t.state.name for t in study.get_trials()]
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert 0.3 < study.best_value < 1
