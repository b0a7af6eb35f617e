"""Planned bits at equal bytes on real Criteo rows: plans that choose precisions beside plans at fp32 and baselines.

    .venv/bin/python -m benchmarks.planned_bits --data FOLDER [--out runs/planned_bits] [--seeds 3] [--only TEXT ...]

FOLDER is made from the sample as examples/criteo_sample.toml says. Every row is a training of its own, kept as a file
in OUT, so a run that was stopped goes on. Metrics are those of the rows as they are served, rounded after training.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine
from benchmarks.resumed_rows import gains, resumed_row
from recsys_embed.data import open_dataset
from recsys_embed.errors import BudgetError
from recsys_embed.train.config import TrainConfig, read_settings
from recsys_embed.train.run import run_training
from recsys_embed.utils.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"deepfm": "criteo_sample.toml", "dcnv2": "criteo_sample_dcnv2.toml"}
RATIOS = (4, 10, 20, 50, 100, 200)
PLANS = {"plan at fp32": "fp32", "plan with bits": "auto"}
FIXED: dict[str, dict[str, Any]] = {
    "full": {},
    "full at int8": {"method_args": {"precision": "int8"}},
    "full at int4": {"method_args": {"precision": "int4"}},
}
TAIL_RATIO = 6
"""Compression of the baseline whose rare ids have int2 rows and as many of the others as fit int8 rows."""
COMPUTED = {"tt": (10, 50), "dhe": (10, 50)}


def cases(seeds: int) -> Iterator[tuple[str, str, float | None, int, dict[str, Any]]]:
    """Model, what it is, compression asked for, seed, settings; seed by seed."""
    for seed in range(seeds):
        for model in SETTINGS:
            for what, given in FIXED.items():
                yield model, what, None, seed, given
            tail = {"method": "tiered", "method_args": {"precisions": ["int8", "int2"]}}
            yield model, "int8, int2 tail", TAIL_RATIO, seed, tail
            for ratio in RATIOS:
                for what, precision in PLANS.items():
                    yield model, what, ratio, seed, {"method": "planned", "method_args": {"precision": precision}}
            for method, ratios in COMPUTED.items():
                for ratio in ratios:
                    yield model, method, ratio, seed, {"method": method}


def trained(model: str, ratio: float | None, seed: int, given: dict[str, Any], data: Any) -> dict[str, Any]:
    """One training, or why there is none."""
    settings = read_settings(ROOT / "examples" / SETTINGS[model])
    settings.pop("compare", None)
    base = TrainConfig.from_dict(settings)
    try:
        out = run_training(base.replace(model=model, seed=seed, ratio=ratio, threads=1, **given), data)
    except BudgetError as e:
        return {"infeasible": str(e)}
    found = out.result.to_dict()
    chosen: dict[str, int] = {}
    for config in out.model.embedding.plan.configs.values():
        tiers = getattr(config, "precisions", (config.precision,))
        name = f"{config.method} {'/'.join(tiers)}"
        chosen[name] = chosen.get(name, 0) + 1
    return {
        "test": found["test"], "valid": found["valid"], "bytes": out.footprint.serve, "full_bytes": out.full_bytes,
        "chosen": chosen,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds as Markdown, gains against full tables of the same seed."""
    full = {(r["model"], r["seed"]): r for r in rows if r["what"] == "full"}
    lines = ["| model | rows | budget | compression | test AUC | against full | seeds | features by storage |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"]  # fmt: skip
    groups: dict[tuple[str, str, float | None], list[dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["model"], r["what"], r["ratio"]), []).append(r)
    order = list(SETTINGS)
    for (model, what, ratio), found in sorted(groups.items(), key=lambda g: (order.index(g[0][0]), g[0][2] or 0)):
        budget = "" if ratio is None else f"1/{ratio:g}"
        good = [r for r in found if "test" in r]
        if not good:
            lines.append(f"| {model} | {what} | {budget} | infeasible | | | | |")
            continue
        mean, spread = gains(good, full)
        size = statistics.mean(r["full_bytes"] / r["bytes"] for r in good)
        auc = statistics.mean(r["test"]["auc"] for r in good)
        gain = "" if what == "full" else f"{mean:+.4f}{spread}"
        chosen = ", ".join(f"{n} {name}" for name, n in sorted(good[0]["chosen"].items()))
        lines.append(f"| {model} | {what} | {budget} | {size:.1f}x | {auc:.4f} | {gain} | {len(good)} | {chosen} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/planned_bits"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="texts of which a row's name must hold one")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "planned_bits")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = open_dataset(args.data), []
    for model, what, ratio, seed, given in cases(args.seeds):
        name = "-".join(str(p).replace(" ", "_") for p in (model, what, ratio or "", f"s{seed}") if p != "")
        if args.only and not any(text in name for text in args.only):
            continue
        facts = {"model": model, "what": what, "ratio": ratio, "seed": seed}
        run = partial(trained, model, ratio, seed, given, data)
        rows.append(resumed_row(args.out, name, facts, run))
    if args.only:
        return
    write_json(args.results.with_suffix(".json"), {"benchmark": "planned_bits", "machine": machine(), "rows": rows})
    write_text(args.results.with_suffix(".table.md"), table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
