"""The part of make.py that trains: a data folder, a run that was stopped, searches, a study; for the same commit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from recsys_embed.data import CriteoOptions, SplitRule, make_synthetic, open_dataset
from recsys_embed.search import DnisSearch, DnisSettings, OptembedSearch, OptembedSettings, run_search
from recsys_embed.search.study import MethodStudy
from recsys_embed.search.study_results import rows_of
from recsys_embed.search.study_settings import StudySettings
from recsys_embed.train import Interrupted, TrainConfig, run_training

Keep = Callable[[str, Tensor], None]


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


CONFIG = TrainConfig(
    model="deepfm",
    model_args={"hidden": [8], "dropout": 0.1},
    method="unified",
    ratio=4.0,
    embedding_dim=4,
    epochs=3,
    batch_size=64,
    learning_rate=5e-3,
    eval_every=7,
    checkpoint_every=2,
    embedding_weight_decay=1e-3,
    threads=1,
)


class Stopping:
    """An opened data set that interrupts this process at the n-th batch of a split."""

    def __init__(self, data: Any, at: int, split: str = "train") -> None:
        self._data, self._left, self._split = data, at, split

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def held_out(self, share: float) -> Any:
        return Stopping(self._data.held_out(share), self._left, self._split)

    def batches(self, split: str, *args: Any, **options: Any) -> Any:
        inner = self._data.batches(split, *args, **options)
        return _Stopping(self, inner) if split == self._split else inner


class _Stopping:
    def __init__(self, owner: Stopping, inner: Any) -> None:
        self._owner, self._inner = owner, inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Any:
        for batch in self._inner:
            self._owner._left -= 1
            if self._owner._left == 0:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


def interrupted(run: Any) -> None:
    try:
        run()
    except (Interrupted, KeyboardInterrupt):
        return
    raise AssertionError("it was to be stopped")


def data(out: Path, keep: Keep) -> Path:
    folder = out / "data"
    options = CriteoOptions(workers=1, split=SplitRule(valid=1 / 4, test=1 / 6))
    make_synthetic(folder, 1000, 0, scale=1e-5, options=options)
    opened = open_dataset(folder)
    batch = next(iter(opened.batches("train", 16, shuffle=True, seed=2)))
    for name in ("dense", "ids", "label"):
        keep(f"data/{name}", getattr(batch, name))
    write(out / "data.json", {"digest": opened.digest, "schema": opened.schema(4).to_dict()})
    (folder / "synthetic.tsv").unlink()
    (folder / ".lock").unlink(missing_ok=True)
    return folder


def runs(out: Path, folder: Path, keep: Keep) -> None:
    """A training that was stopped, and what it comes to."""
    run = out / "run"
    interrupted(lambda: run_training(CONFIG, Stopping(open_dataset(folder), 9), folder=run, show_progress=False))
    about = json.loads((run / "run.json").read_text())
    write(run / "run.json", about | {"command": ["make.py"]})
    whole = Path(tempfile.mkdtemp()) / "run"
    shutil.copytree(run, whole)
    done = run_training(CONFIG, open_dataset(folder), folder=whole, resume=True, show_progress=False)
    shutil.copy(whole / "model.pt", out / "run.model.pt")
    shutil.copy(whole / "config.json", out / "run.config.json")
    shutil.copy(whole / "result.json", out / "run.result.json")
    batch = next(iter(open_dataset(folder).batches("test", 32, shuffle=False)))
    keep("run/logits", done.model.eval()(batch.dense, batch.ids))


SEARCHES = {
    "optembed": (OptembedSearch, OptembedSettings(generations=2, population=3, mutations=1, crossovers=1), {}, 3),
    "dnis": (DnisSearch, DnisSettings(blocks=2, held_out=0.0), {"ratio": 4.0}, 25),
}


def searches(out: Path, folder: Path) -> None:
    for name, (cls, settings, changes, at) in SEARCHES.items():
        config = CONFIG.replace(method="full", ratio=None).replace(
            embedding_dim=2, epochs=2, model="dnn", model_args={"hidden": [4]}, **changes
        )
        where = out / f"search-{name}"
        split = "valid" if name == "optembed" else "train"
        stopping = Stopping(open_dataset(folder), at, split)
        interrupted(lambda: run_search(cls, config, stopping, settings, folder=where, show_progress=False))  # noqa: B023
        print(name, sorted(str(p.relative_to(where)) for p in where.rglob("*") if p.is_file()))
        whole = Path(tempfile.mkdtemp()) / "search"
        shutil.copytree(where, whole)
        run_search(cls, config, open_dataset(folder), settings, folder=whole, show_progress=False)
        shutil.copy(whole / "plan.json", out / f"search-{name}.plan.json")
        report = json.loads((whole / "report.json").read_text())
        write(out / f"search-{name}.json", {
            "config": config.to_dict(), "settings": settings.to_dict(),
            "report": {k: report[k] for k in ("test", "valid", "footprint")},
        })  # fmt: skip


STUDY = StudySettings(
    trials=3, budgets=("20%", "50%"), methods=("hash", "optembed", "robe"), groups=2, sampler="random", prune=False
)


def study(out: Path, folder: Path) -> None:
    where = out / "study"
    where.mkdir()
    config = CONFIG.replace(method="full", ratio=None).replace(epochs=1, embedding_weight_decay=0.0)
    made = MethodStudy(config, open_dataset(folder), STUDY, str(where / "study.journal"), folder=where)
    made.work(None)
    with made.guarded():
        rows = rows_of(made)
    asked = {"train": config.to_dict(), "study": STUDY.to_dict(), "storage": "study.journal", "device": "cpu"}
    write(where / "study.json", {"data": "data", **asked})
    write(out / "study.rows.json", rows)
    for path in where.iterdir():
        if path.suffix == ".lock":
            path.unlink()
