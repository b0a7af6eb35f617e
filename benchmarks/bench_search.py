"""OptEmbed and DNIS on real Criteo rows, against full tables, hashing, narrow tables and magnitude pruning.

    .venv/bin/python -m benchmarks.bench_search --data FOLDER [--out runs/bench_search] [--seeds 3]

FOLDER is made from the sample as examples/criteo_sample.toml says. Every row is a training (or a search) of its own,
kept as a file in OUT, so a run that was stopped goes on; all share examples/criteo_search.toml. OptEmbed may take half
the full tables' bytes and DNIS a twentieth; the others are trained at the bytes that each of the two came to.
Magnitude pruning trains full tables, keeps their largest elements and trains on, as DNIS does without a search.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine
from benchmarks.resumed_rows import gains, resumed_row
from recsys_embed.data import open_dataset
from recsys_embed.errors import BudgetError
from recsys_embed.plan import Plan
from recsys_embed.search import DnisSettings, OptembedSearch, OptembedSettings, Search, run_search
from recsys_embed.search.dnis import DnisSearch
from recsys_embed.search.extract import make_plan
from recsys_embed.search.outcome import SearchOutcome
from recsys_embed.search.pruning import choose_elements, keep_elements
from recsys_embed.search.supernet import Supernet, as_model
from recsys_embed.train.config import TrainConfig, read_settings
from recsys_embed.train.loop import Trainer
from recsys_embed.train.run import run_training
from recsys_embed.utils.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"deepfm": {}, "dcnv2": {"dropout": 0.2}}
SEARCHES: dict[str, tuple[type[Search], Any, float]] = {
    "optembed": (OptembedSearch, OptembedSettings(), 2.0),
    "dnis": (DnisSearch, DnisSettings(), 20.0),
}
BASELINES = ("hash", "unified", "lowdim", "magnitude")


@dataclass
class MagnitudeSearch(Search):
    """Plain training, then the largest elements, then training on."""

    method = "magnitude"
    stages = ("warm", "retrain")

    def check(self) -> None:
        """Nothing to refuse."""

    @cached_property
    def net(self) -> Supernet:
        """Full tables, trained."""
        net = Supernet(self.full_model(), torch.nn.Identity())
        net.stand_in = lambda out: out
        self.run_stage("warm", self.trainer(Trainer, as_model(net), "warm"))
        net.catch_up_()
        return net

    @property
    def tables(self) -> dict[str, torch.Tensor]:
        """What was trained."""
        return {name: self.net.table(name).detach() for name in self.schema.names}

    def search(self) -> Plan:
        """The largest elements of all tables together."""
        masks = keep_elements(self.schema, list(self.tables.values()), "zero", budget=self.vector_budget, sparsity=0.0)
        chosen = {s.name: choose_elements(s, k, "zero") for s, k in zip(self.schema, masks, strict=True)}
        return make_plan(self.schema, chosen)

    def start_weights(self) -> dict[str, Any]:
        """What was trained."""
        return self.trained_weights(self.net, self.tables)


def searched(outcome: SearchOutcome) -> dict[str, Any]:
    """What a row keeps of a search."""
    found = outcome.to_dict()
    return {
        "test": found["test"], "valid": found["valid"], "bytes": outcome.footprint.serve,
        "full_bytes": outcome.full_bytes, "stage_seconds": outcome.seconds,
    }  # fmt: skip


def trained(config: TrainConfig, data: Any) -> dict[str, Any]:
    """One training over full tables, or why there is none."""
    try:
        out = run_training(config, data)
    except BudgetError as e:
        return {"infeasible": str(e)}
    found = out.result
    return {
        "test": found.to_dict()["test"], "valid": found.to_dict()["valid"], "bytes": out.footprint.serve,
        "full_bytes": out.full_bytes,
    }  # fmt: skip


def cases(data: Any, seeds: int, folder: Path, only: set[str]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every row by name, searches first, with what makes it."""
    settings = read_settings(ROOT / "examples" / "criteo_search.toml")

    def config(model: str, seed: int) -> TrainConfig:
        base = TrainConfig.from_dict(settings)
        return base.replace(model=model, seed=seed, threads=1, model_args={**base.model_args, **MODELS[model]})

    def search(kind: type[Search], own: Any, c: TrainConfig, name: str) -> dict[str, Any]:
        return searched(run_search(kind, c, data, own, folder=folder / "searches" / name))

    pairs = [(model, seed) for seed in range(seeds) for model in MODELS if not only or f"{model}-s{seed}" in only]
    for model, seed in pairs:
        c = config(model, seed)
        yield f"{model}-full-s{seed}", lambda c=c: trained(c, data)
        for name, (kind, own, ratio) in SEARCHES.items():
            run = f"{model}-{name}-s{seed}"
            yield run, lambda c=c, k=kind, o=own, r=ratio, n=run: search(k, o, c.replace(ratio=r), n)
    for model, seed in pairs:
        for name in SEARCHES:
            size = json.loads((folder / f"{model}-{name}-s{seed}.json").read_text())["bytes"]
            for method in BASELINES:
                run, c = f"{model}-{method}@{name}-s{seed}", config(model, seed).replace(budget=size)
                if method == "magnitude":
                    yield run, lambda c=c, n=run: search(MagnitudeSearch, DnisSettings(), c, n)
                else:
                    yield run, lambda c=c, m=method: trained(c.replace(method=m), data)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds as Markdown, gains against full tables of the same seed."""
    full = {(r["model"], r["seed"]): r for r in rows if r["method"] == "full"}
    lines = ["| model | method | compression | test AUC | against full | cost in trainings over full tables |",
             "| --- | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["model"], r["method"]), []).append(r)
    for (model, method), found in groups.items():
        good = [r for r in found if "test" in r]
        if not good:
            lines.append(f"| {model} | {method} | infeasible | | | |")
            continue
        gain, spread = gains(good, full)
        cost = statistics.mean(r["seconds"] / full[model, r["seed"]]["seconds"] for r in good)
        size = statistics.mean(r["full_bytes"] / r["bytes"] for r in good)
        auc = statistics.mean(r["test"]["auc"] for r in good)
        lines.append(f"| {model} | {method} | {size:.1f}x | {auc:.4f} | {gain:+.4f}{spread} | {cost:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_search"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", default="", help="e.g. deepfm-s0,dcnv2-s1: several processes share OUT, one ends without"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "criteo_search")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = open_dataset(args.data), []
    for name, run in cases(data, args.seeds, args.out, set(filter(None, args.only.split(",")))):
        model, method, seed = name.rsplit("-", 2)
        rows.append(resumed_row(args.out, name, {"model": model, "method": method, "seed": int(seed[1:])}, run))
    if args.only:
        return
    write_json(args.results.with_suffix(".json"), {"benchmark": "search", "machine": machine(), "rows": rows})
    write_text(args.results.with_suffix(".table.md"), table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
