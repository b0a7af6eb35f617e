"""Planned bits where an id's vector is all there is: matrix factorisation on MovieLens-100K, recall@20 by bytes.

    .venv/bin/python -m benchmarks.movielens_bits --data FOLDER [--out runs/movielens_bits] [--seeds 3]

FOLDER holds u.data.gz. Ratings of 4 and 5 (a random 80 % train), BPR with a uniform negative, width 64, Adam at 0.01,
20 passes. Fresh tables of each plan train in float32; metrics are those of the rows as they are served, rounded and
read from an exported file. Narrow tables are models of that width, the simplest rows of as many bytes.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import recsys_embed as rse
from benchmarks.measure import machine
from benchmarks.resumed_rows import Row, gains, resumed_row
from recsys_embed.methods.full import FullConfig
from recsys_embed.methods.lowdim import LowdimConfig
from recsys_embed.utils.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
USERS, ITEMS, WIDTH = 943, 1682, 64
WHOLE = (USERS + ITEMS) * WIDTH * 4


class Ratings(NamedTuple):
    """Users and items of the ratings that train and test: int64."""

    users: Tensor
    items: Tensor
    test_users: Tensor
    test_items: Tensor


def ratings(folder: Path) -> Ratings:
    """Ratings of 4 and 5, split at random."""
    with gzip.open(folder / "u.data.gz", "rt") as file:
        rows = np.array([[int(v) for v in line.split()] for line in file])
    rows = rows[rows[:, 2] >= 4, :2] - 1
    train = np.random.default_rng(0).random(len(rows)) < 0.8
    users, items = torch.from_numpy(rows.T.copy())
    mask = torch.from_numpy(train)
    return Ratings(users[mask], items[mask], users[~mask], items[~mask])


class Factors(nn.Module):
    """Matrix factorisation."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(USERS, width), nn.Embedding(ITEMS, width)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)


@torch.no_grad()
def recall(model: Any, data: Ratings) -> float:
    """Recall@20 on the test part, among items that the user did not rate in the train part."""
    scores = model.user(torch.arange(USERS)) @ model.item(torch.arange(ITEMS)).T
    scores[data.users, data.items] = -torch.inf
    wanted = torch.zeros_like(scores).index_put_((data.test_users, data.test_items), torch.ones(()))
    hits = wanted.gather(1, scores.topk(20).indices).sum(1)
    some = (wanted.sum(1) > 0) & (torch.bincount(data.users, minlength=USERS) > 0)
    return float((hits[some] / wanted.sum(1)[some]).mean())


def train(model: Any, data: Ratings, passes: int = 20) -> None:
    """Training by BPR (Rendle et al. 2009)."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(passes):
        for at in torch.randperm(len(data.users)).split(1024):
            u, p, n = model.user(data.users[at]), model.item(data.items[at]), model.item(torch.randint(ITEMS, at.shape))
            loss = F.softplus((u * (n - p)).sum(1)).mean() + 1e-3 * sum(e.square().sum() for e in (u, p, n)) / len(at)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def cases() -> Iterator[tuple[str, float | None, dict[str, Any]]]:
    """What it is, compression asked for, and what :func:`trained` does about it."""
    yield "full", None, {}
    for ratio in (20, 45):
        yield "plan at fp32", ratio, {"precision": "fp32"}
    for ratio in (20, 45, 100):
        yield "plan with bits", ratio, {"precision": "auto"}
    yield "narrow tables, 16 columns at int4", None, {"width": 16, "config": FullConfig(precision="int4")}
    for projection in ("frozen", "learned"):
        config = LowdimConfig(dim=14, precision="int4", projection=projection)
        yield f"lowdim, 14 columns at int4, {projection}", None, {"config": config}


def trained(
    data: Ratings,
    ratio: float | None,
    seed: int,
    precision: str | None = None,
    width: int = WIDTH,
    config: Any = None,
) -> Row:
    """Recall of one training, as served and before rounding, and bytes of the tables in the file."""
    torch.manual_seed(seed)
    model = Factors(width)
    counts = {"user": data.users.bincount(minlength=USERS), "item": data.items.bincount(minlength=ITEMS)}
    plan = None if config is None else rse.Plan({"user": config, "item": config})
    if ratio is not None:
        plan = rse.plan_for_budget(model, int(WHOLE / ratio), stats=counts, precision=precision or "fp32")
    if plan is not None:
        rse.compress_(model, plan, init="fresh", counts=counts)
    train(model, data)
    with tempfile.TemporaryDirectory() as folder:
        report = rse.export(model, f"{folder}/model")
        served = recall(rse.load(f"{folder}/model", into=Factors(width)), data)
    chosen = {} if plan is None else {n: c.to_dict() for n, c in plan.configs.items()}
    return {
        "test": {"recall": served, "unrounded": recall(model, data)}, "bytes": report.embedding_bytes,
        "full_bytes": WHOLE, "chosen": chosen,
    }  # fmt: skip


def _in_words(config: dict[str, Any]) -> str:
    width = config.get("dim") or "/".join(map(str, config.get("dims", ())))
    return " ".join(str(p) for p in (config["method"], width, config.get("precision", "fp32")) if p)


def table(rows: list[Row]) -> str:
    """Means over seeds as Markdown."""
    full = {(r["model"], r["seed"]): r for r in rows if r["what"] == "full"}
    lines = ["| rows | budget | compression | recall@20 | least, most | against full | seeds | user; item |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]  # fmt: skip
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for r in rows:
        groups.setdefault((r["what"], r["ratio"]), []).append(r)
    for (what, ratio), found in groups.items():
        values = [r["test"]["recall"] for r in found]
        mean, spread = gains(found, full, "recall")
        gain = "" if what == "full" else f"{mean:+.3f}{spread}"
        size = statistics.mean(r["full_bytes"] / r["bytes"] for r in found)
        chosen = "; ".join(_in_words(c) for c in found[0]["chosen"].values())
        budget = "" if ratio is None else f"1/{ratio:g}"
        lines.append(
            f"| {what} | {budget} | {size:.1f}x | {statistics.mean(values):.3f} | {min(values):.3f}, {max(values):.3f} "
            f"| {gain} | {len(values)} | {chosen} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/movielens_bits"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="texts of which a row's name must hold one")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "movielens_bits")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = ratings(args.data), []
    for what, ratio, given in cases():
        for seed in range(args.seeds):
            name = "-".join(str(p).replace(" ", "_") for p in (what, ratio or "", f"s{seed}") if p != "")
            if args.only and not any(text in name for text in args.only):
                continue
            facts = {"model": "mf", "what": what, "ratio": ratio, "seed": seed}
            rows.append(resumed_row(args.out, name, facts, partial(trained, data, ratio, seed, **given), "recall"))
    if args.only:
        return
    write_json(args.results.with_suffix(".json"), {"benchmark": "movielens_bits", "machine": machine(), "rows": rows})
    write_text(args.results.with_suffix(".table.md"), table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
