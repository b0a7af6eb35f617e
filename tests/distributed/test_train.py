"""Training on several processes: the steps, metrics and files of one, and an end when one of them ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys_embed.data import CriteoOptions, convert_criteo, convert_table, make_synthetic, open_dataset
from recsys_embed.errors import ConfigError
from recsys_embed.sharding.trainer import batch_sizes
from recsys_embed.train import run_training
from recsys_embed.train.build import model_from_config
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.driver import should_resume
from recsys_embed.train.evaluation import evaluate
from recsys_embed.train.inputs import schema_of
from recsys_embed.train.metrics import BinaryMetrics
from tests.distributed.workers import Workers

ROWS = 1501
SETTINGS: dict[str, Any] = {
    "model": "deepfm",
    "model_args": {"hidden": [16]},
    "method": "unified",
    "ratio": 4,
    "embedding_optimizer": "rowwise_adagrad",
    "embedding_learning_rate": 0.05,
    "learning_rate": 0.01,
    "embedding_dim": 8,
    "threads": 1,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("data")
    make_synthetic(base / "raw", ROWS, seed=3, text_only=True)
    convert_criteo([base / "raw" / "synthetic.tsv"], base / "data", CriteoOptions(min_count=1))
    return base / "data"


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with tags, a history that reads the table of the item, a number and a weight."""
    rng = np.random.default_rng(0)
    item, seen = rng.integers(0, 40, 501), rng.integers(0, 40, (501, 4))
    lengths = rng.integers(0, 5, (2, 501))
    likely = ((seen % 5 == item[:, None] % 5) & (np.arange(4) < lengths[0][:, None])).any(1)
    table = {
        "click": rng.random(501) < np.where(likely, 0.8, 0.2),
        "item": item,
        "tags": [[f"t{i % 7}", f"u{i % 3}", f"v{i}"][:n] for i, n in zip(item, lengths[1] % 4, strict=True)],
        "seen": [row[:n].tolist() for row, n in zip(seen, lengths[0], strict=True)],
        "price": rng.random(501),
        "weight": 0.5 + rng.random(501),
    }
    columns = {
        "click": {"kind": "label"},
        "item": {"kind": "categorical", "vocab": "item"},
        "tags": {"kind": "list"},
        "seen": {"kind": "sequence", "vocab": "item", "max_length": 3},
        "price": {"kind": "numeric"},
        "weight": {"kind": "weight"},
    }
    folder = tmp_path_factory.mktemp("histories") / "data"
    convert_table(table, folder, {"columns": columns})
    return folder


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        ("data", {}),
        ("histories", {"model": "deepfm", "ratio": 2}),
        pytest.param("histories", {"model": "dnn", "method": "hash", "ratio": 2}, marks=pytest.mark.slow),
        pytest.param("histories", {"model": "dnn", "method": "compositional", "ratio": 2}, marks=pytest.mark.slow),
        ("histories", {"model": "din", "embedding_optimizer": "dense_adam", "ratio": 2}),
    ],
    ids=["single ids", "lists", "hash", "compositional", "din"],
)
def test_whole_batches_take_the_steps_of_one_process(
    workers: Workers, request: pytest.FixtureRequest, tmp_path: Path, rows: str, changes: dict[str, Any]
) -> None:
    """With all rows in every batch, both runs do the same mathematics; the rows do not divide by four."""
    folder: Path = request.getfixturevalue(rows)
    data = open_dataset(folder)
    batch = max(data.splits.values())
    settings = {**SETTINGS, "batch_size": batch, "epochs": 4, "shuffle": False, **changes}
    alone = run_training(TrainConfig.from_dict(settings), data, folder=tmp_path / "one").result
    for found in workers.run("train_run", 4, data=str(folder), settings=settings, folder=str(tmp_path / "four")):
        assert found["steps"] == alone.steps == 4
        for mine, known in zip(found["history"], alone.history, strict=True):
            assert mine["auc"] == pytest.approx(known["auc"], abs=1e-4)
            assert mine["logloss"] == pytest.approx(known["logloss"], abs=1e-5)
        assert found["test"]["samples"] == alone.test.samples  # type: ignore[union-attr]
    losses = [[json.loads(line)["loss"] for line in (tmp_path / run / "log.jsonl").read_text().splitlines()
               if '"train"' in line] for run in ("one", "four")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] - losses[0][-1] > 1e-3


def test_what_cannot_be_sharded_is_refused_before_anything_is_written(
    workers: Workers, histories: Path, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "model": "din"}
    with pytest.raises(AssertionError, match="set `embedding_optimizer` to 'dense_adam'"):
        workers.run("train_run", 4, data=str(histories), settings=settings, folder=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_files_of_a_run_are_those_of_one_process(workers: Workers, data: Path, tmp_path: Path) -> None:
    """The saved model, read by one process, gives the AUC that the four reported; resuming what ended changes none."""
    settings = {**SETTINGS, "batch_size": 100, "epochs": 2}
    options: dict[str, Any] = {"data": str(data), "settings": settings, "folder": str(tmp_path)}
    found = workers.run("train_run", 4, **options)[0]
    config = TrainConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    dataset = open_dataset(data)
    assert found["steps"] == 2 * -(-dataset.splits["train"] // 100)
    model = model_from_config(config, schema_of(dataset, config), dataset.num_dense)
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True)["model"])
    metrics = evaluate(model, dataset, "test")
    assert metrics is not None
    assert metrics.auc == pytest.approx(found["test"]["auc"], abs=1e-4)
    assert metrics.logloss == pytest.approx(found["test"]["logloss"], abs=1e-5)
    again = workers.run("train_run", 4, **options, resume=True)[0]
    assert again["steps"] == found["steps"]
    assert again["test"] == found["test"]
    with pytest.raises(ConfigError, match=r"a run under torchrun; go on with it so.*--nproc-per-node 1"):
        run_training(config, dataset, folder=tmp_path, resume=True)
    _, told = torchrun(data, tmp_path, "--resume", config=tmp_path / "config.json", processes=1).communicate(timeout=90)
    assert "recsys-embed: error" not in told
    alone = json.loads((tmp_path / "result.json").read_text())
    assert (alone["steps"], alone["test"]["auc"]) == (found["steps"], pytest.approx(found["test"]["auc"], abs=1e-6))
    with pytest.raises(AssertionError, match="already holds a run"):
        workers.run("train_run", 4, **options)


def test_a_folder_belongs_to_the_command_that_began_it(tmp_path: Path) -> None:
    """Either command would start from the beginning, over what the other has written."""
    assert not should_resume(None, False, torchrun=True)
    for name, torchrun in (("checkpoint.pt", False), ("checkpoints/latest", True)):
        folder = tmp_path / str(torchrun)
        (folder / name).parent.mkdir(parents=True)
        assert not should_resume(folder, False, torchrun=torchrun)
        (folder / name).touch()
        assert should_resume(folder, True, torchrun=torchrun)
        for either in (False, True):
            with pytest.raises(ConfigError, match="already holds a run"):
                should_resume(folder, False, torchrun=either)
        with pytest.raises(ConfigError, match=f"holds a run {'under' if torchrun else 'without'} torchrun"):
            should_resume(folder, True, torchrun=not torchrun)


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_nothing_had_been(workers: Workers, data: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "batch_size": 100, "epochs": 1, "method": "compositional", "ratio": 2}
    options: dict[str, Any] = {"data": str(data), "settings": settings}
    whole = workers.run("train_run", 4, **options, folder=str(tmp_path / "whole"))[0]
    told = workers.run("stop_in", 4, **options, folder=str(tmp_path / "stopped"))
    assert all("stopped at step 3 of" in text for text in told)
    rest = workers.run("train_run", 4, **options, folder=str(tmp_path / "stopped"), resume=True)[0]
    assert rest["steps"] == whole["steps"]
    # Sums over processes are added up in another order once torch has laid out its buckets anew.
    assert rest["test"] == pytest.approx(whole["test"], abs=1e-5)


def test_plain_gradients_and_the_best_weights(workers: Workers, data: Path) -> None:
    """``dense_adam`` replicates the tables; without a folder the best weights are kept in memory."""
    settings = {**SETTINGS, "embedding_optimizer": "dense_adam", "batch_size": 200, "epochs": 3, "patience": 3}
    found = workers.run("train_run", 4, data=str(data), settings=settings)[0]
    best = max(found["history"], key=lambda h: h["auc"])
    assert found["best_step"] == best["step"]
    assert found["valid"]["auc"] == pytest.approx(best["auc"], abs=1e-9)


def test_metrics_are_those_of_one_process(workers: Workers) -> None:
    """Bit for bit, ties, an empty part and uneven parts included."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 50, (1003,), generator=g).float() / 7
    labels = (torch.rand(1003, generator=g) < 0.3).float()
    whole = BinaryMetrics()
    whole.update(scores, labels)
    known = whole.compute()
    for found in workers.run("metrics_of_parts", 4, scores=scores, labels=labels, ends=[0, 17, 17, 900, 1003]):
        assert (found.auc, found.samples, found.positives) == (known.auc, known.samples, known.positives)
        assert found.logloss == pytest.approx(known.logloss, rel=1e-12)
        assert found.calibration == pytest.approx(known.calibration, rel=1e-12)


def test_shares_of_a_batch() -> None:
    for size in (4, 5, 100, 4097):
        for world in (1, 2, 3, 4):
            assert sum(batch_sizes(size, world)) == size
            assert max(batch_sizes(size, world)) - min(batch_sizes(size, world)) <= 1


def torchrun(
    data: Path, out: Path, *more: str, config: Path | None = None, processes: int = 2
) -> subprocess.Popen[str]:
    if config is None:
        config = out.parent / "settings.json"
        config.write_text(json.dumps({**SETTINGS, "batch_size": 50, "checkpoint_every": 5}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command += ["-m", "recsys_embed", "train", "--data", str(data), "--config", str(config), "--out", str(out), *more]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**kept, "OMP_NUM_THREADS": "1"}
    )


def workers_of(pid: int) -> list[int]:
    """Processes that a process started, in order."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_the_job_goes_on(workers: Workers, data: Path, tmp_path: Path) -> None:
    """One message, within a minute of the kill; four processes go on from the checkpoint of two."""
    out = tmp_path / "run"
    run = torchrun(data, out, "--epochs", "1000")
    end = time.monotonic() + 90
    while not (out / "checkpoints" / "latest").exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end, "no checkpoint within 90 s"
        time.sleep(0.2)
    os.kill(workers_of(run.pid)[1], signal.SIGKILL)
    started = time.monotonic()
    _, text = run.communicate(timeout=60)
    assert time.monotonic() - started < 60
    assert run.returncode != 0
    said = [line for line in text.splitlines() if "recsys-embed: error:" in line]
    assert len(said) == 1
    assert "a process of the job is gone" in said[0]
    assert "--resume" in said[0]
    settings = json.loads((out / "config.json").read_text())
    told = workers.run("stop_in", 4, data=str(data), settings=settings, folder=str(out), resume=True)
    steps = [int(text.split("stopped at step ")[1].split()[0]) for text in told]
    assert set(steps) == {steps[0]}
    assert steps[0] >= 8, "two processes took 5 steps before the checkpoint, four went on from it"


@pytest.mark.slow
def test_a_fault_of_one_process_is_said_once(data: Path, tmp_path: Path) -> None:
    run = torchrun(data, tmp_path / "run", "--set", "batch_size=1")
    _, text = run.communicate(timeout=90)
    assert run.returncode != 0
    said = [line for line in text.splitlines() if "recsys-embed: error:" in line]
    assert len(said) == 1
    assert "`batch_size` must be at least 2, the number of processes" in said[0]


def test_batches_that_no_process_can_normalise_are_refused_by_all(workers: Workers) -> None:
    settings = {"model_args": {"hidden": [8], "batch_norm": True}, "batch_size": 200}
    for rows, said in ((601, "last batches have 0, 0, 0, 1 rows"), (604, "have 1, 1, 1, 1 rows"), (700, "trained")):
        found = workers.run("refusal", 4, settings=settings, rows=rows, label=None)
        assert all(re.search(said, text) for text in found), found


def test_a_label_that_one_process_meets_is_told_by_all(workers: Workers) -> None:
    settings = {"model_args": {"hidden": [8]}, "batch_size": 600}
    for label, said in ((2.0, "labels must be 0 or 1; got 2"), (float("nan"), "1 of 150 labels are NaN")):
        found = workers.run("refusal", 4, settings=settings, rows=600, label=label)
        assert all(text.startswith("DataError: process 3: ") and said in text for text in found), found
