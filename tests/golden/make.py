"""Writes tests/golden/files: what version 0.1.0 of the library, at commit a69b6be, wrote and computed.

Run by that commit alone, never by a later one, since the files show that later versions read what it wrote:

    git worktree add ../old a69b6be && cd ../old && python -m pip install -e . && cd -
    PYTHONPATH=../old OMP_NUM_THREADS=1 python tests/golden/make.py tests/golden/files

All rows are synthetic. ``values-*.npz`` hold what the old code computed; ``test_old_files.py`` compares.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import shutil
import sys
import tarfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_training import SEARCHES, data, runs, searches, study  # beside this script
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed import optim
from recsys_embed.members import set_text
from recsys_embed.models import build_model

VALUES: dict[str, np.ndarray] = {}
SIZES = {"a": 40, "b": 77, "c": 30, "d": 51}
POOLS = {"b": "mean", "d": "max"}


def keep(name: str, value: Tensor) -> None:
    VALUES[name] = value.detach().cpu().numpy()


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


# -- plans ------------------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("lowdim", {"dim": 3}),
    ("hash", {"num_buckets": 9, "sign": True}),
    ("hash", {"num_buckets": 9, "hash": "mod", "seed": 5}),
    ("multihash", {"num_buckets": 9, "preset": "thinc"}),
    ("multihash", {"num_buckets": 9, "preset": "svenstrup"}),
    ("multihash", {"num_buckets": 9, "preset": "bloom"}),
    ("multihash", {"num_buckets": 9, "preset": "cce"}),
    ("unified", {"num_rows": 11, "num_probes": 3, "chunk_dim": 4}),
    ("unified", {"num_rows": 11, "table": "mine", "first_chunk": 1, "num_tables": 2}),
    ("robe", {"num_elements": 23, "table": "mine"}),
    ("compositional", {"moduli": [9, 10]}),
    ("compositional", {"num_collisions": 6, "threshold": 35}),
    ("compositional", {"num_collisions": 6, "bag": "pooled"}),
    ("compositional", {"num_collisions": 6, "combine": "path", "hidden": 3}),
    ("compositional", {"num_collisions": 6, "init": "dlrm_bug"}),
    ("compositional", {"num_collisions": 6, "init": "xavier"}),
    ("mixeddim", {"dims": [8, 2], "blocks": [5], "law": "xavier"}),
]
OPTIONS += [
    ("multihash", {"num_buckets": 9, "combine": c, "separate": separate, "sign": not separate})
    for c, separate in product(("sum", "mean", "concat"), (False, True))
]
OPTIONS += [
    ("multihash", {"num_buckets": 9, "num_weights": 13, "weights": form, "append_weights": append})
    for form, append in product(("original", "indep", "flat"), (None, "inside", "outside"))
]
OPTIONS += [
    ("multihash", {"num_buckets": 9, "head": 5, "combine": combine, "separate": separate, "law": law})
    for combine, separate, law in (("sum", False, "plain"), ("sum", True, "svenstrup"), ("concat", True, "thinc"))
]
OPTIONS += [
    ("compositional", {"num_collisions": 6, "partition": p, "num_partitions": k, "combine": combine, "affine": k == 2})
    for (p, k), combine in product(
        (("quotient_remainder", 2), ("generalized", 3), ("chinese_remainder", 2)), ("mul", "add", "concat", "feature")
    )
]
OPTIONS += [("memcom", {"num_buckets": 9, "hash": h, "bias": h == "mod"}) for h in ("mod", "splitmix64")]
OPTIONS += [
    ("robe", {"num_elements": 23, "block_size": block, "wrap": wrap, "sign": not wrap})
    for block, wrap in product((1, 3, 8), (True, False))
]
OPTIONS += [
    ("mixeddim", {"dims": list(dims), "blocks": [5, 20][: len(dims) - 1] or None, "order": order})
    for dims, order in product(((8,), (3,), (8, 3, 1), (5, 2, 1)), ("ids", "counts"))
]
OPTIONS += [
    ("adaptive", {"num_hot": hot, "num_buckets": 7, "order": o})
    for hot, o in ((0, "ids"), (9, "ids"), (3, "counts"), (20, "counts"))
]
OPTIONS += [("freqcut", {"num_kept": kept, "order": o}) for kept, o in ((0, "ids"), (9, "ids"), (25, "counts"))]
OPTIONS += [
    ("optembed", {"num_kept": 9, "dim": 3, "pruned": "zero", "order": "counts"}),
    ("optembed", {"num_kept": 20, "pruned": "oov"}),
    ("dnis", {"columns": [7, 240], "blocks": [6], "pruned": "oov", "order": "counts"}),
    ("dnis", {"columns": [255, 1, 18], "blocks": [6, 9], "pruned": "zero"}),
    ("pep", {"kept": [30, 20, 5, 0, 1, 2, 3, 4], "pruned": "oov", "order": "counts"}),
    ("pep", {"kept": [30, 20, 5, 0, 1, 2, 3, 4], "pruned": "zero", "order": "ids"}),
]


def schema(width: int = 8, **options: Any) -> rse.Schema:
    return rse.Schema([rse.FeatureSpec(n, r, width, pooling=POOLS.get(n, "sum"), **options) for n, r in SIZES.items()])


def counts(of: rse.Schema) -> dict[str, Tensor]:
    return {s.name: torch.randperm(s.num_embeddings, generator=torch.Generator().manual_seed(1)) for s in of}


def batches() -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One id per sample and feature, and bags of 0 to 3 ids."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(list(SIZES.values()))
    single = (torch.rand(6, 4, generator=generator) * sizes).long()
    lengths = torch.randint(0, 4, (4, 3), generator=generator)
    owner = torch.repeat_interleave(torch.arange(4), lengths.sum(1))
    values = (torch.rand(len(owner), generator=generator) * sizes[owner]).long()
    return single, (values, torch.nn.functional.pad(lengths.reshape(-1).cumsum(0), (1, 0)))


def looked_up(name: str, coll: nn.Module) -> None:
    single, bags = batches()
    keep(f"{name}/single", coll(single))
    keep(f"{name}/bags", coll(*bags))


def plans(out: Path) -> None:
    (out / "plans").mkdir()
    single, bags = batches()
    keep("plans/ids", single)
    keep("plans/values", bags[0])
    keep("plans/offsets", bags[1])
    of, cases = schema(), {}
    for name, values in counts(of).items():
        keep(f"plans/counts/{name}", values)
    for i, (method, options) in enumerate(OPTIONS):
        key = f"{i:02}-{method}"
        plan = rse.Plan.uniform(of, method, **options)
        coll = rse.EmbeddingCollection(of, plan, seed=3, backend="torch").assign_(counts(of))
        looked_up(f"plans/{key}", coll)
        cases[key] = {"options": options, "plan": json.loads(plan.to_json())}
    text = json.dumps({"schema": of.to_dict(), "seed": 3, "cases": cases}, separators=(",", ":"))
    (out / "plans" / "options.json").write_text(text.replace('},"', '},\n"') + "\n")
    # Sets of ids that a search chose, and a planner's plan with reasons and notes.
    kept = torch.tensor([1, 5, 6, 29])
    configs = {
        "a": rse.get_method("optembed").config_cls(num_kept=4, dim=5, pruned="zero", order="counts"),
        "b": rse.get_method("pep").config_cls(kept=(2, 0, 1, 0, 0, 0, 0, 0), pruned="zero", order="sets"),
        "c": rse.get_method("adaptive").config_cls(num_hot=4, num_buckets=3, order="counts"),
        "d": rse.get_method("full").config_cls(),
    }
    index = {n: [i.name for i in c.program(of[n]).indexes] for n, c in configs.items()}
    sizes = {n: [i.count for i in c.program(of[n]).indexes] for n, c in configs.items()}
    sets = {
        n: {i: set_text(kept[:k] + j, SIZES[n]) for j, (i, k) in enumerate(zip(index[n], sizes[n], strict=True))}
        for n in configs
        if index[n]
    }
    chosen = rse.Plan(configs, sets=sets)
    (out / "plans" / "sets.json").write_text(chosen.to_json() + "\n")
    looked_up("plans/sets", rse.EmbeddingCollection(of, chosen, backend="torch"))
    large = rse.Schema([rse.FeatureSpec(f"C{i}", n, 16) for i, n in enumerate((7, 900, 60_000, 200_000))])
    planned = rse.plan_for_budget(large, "300KiB")
    (out / "plans" / "planned.json").write_text(planned.to_json() + "\n")
    write(out / "plans" / "planned.schema.json", large.to_dict())
    ids = torch.arange(60)[:, None] % torch.tensor([s.num_embeddings for s in large])
    keep("plans/planned", rse.EmbeddingCollection(large, planned, backend="torch")(ids))
    keep("plans/planned/bytes", torch.tensor(planned.footprint(large).serve))


# -- one feature per method -------------------------------------------------------------------------------------------

ROWS, WIDTH = 24, 4
OF_METHOD: dict[str, dict[str, Any]] = {
    "full": {},
    "hash": {"num_buckets": 10, "sign": True},
    "lowdim": {"dim": 3},
    "multihash": {"num_buckets": 8, "weights": "indep", "num_weights": 9},
    "unified": {"num_rows": 15, "num_probes": 2},
    "compositional": {"num_collisions": 4},
    "memcom": {"num_buckets": 8, "bias": True},
    "robe": {"num_elements": 31, "block_size": 3},
    "mixeddim": {"dims": (4, 2), "blocks": (6,), "order": "counts"},
    "adaptive": {"num_hot": 6, "num_buckets": 7, "order": "counts"},
    "freqcut": {"num_kept": 12, "order": "counts"},
    "optembed": {"num_kept": 13, "dim": 3, "order": "counts"},
    "dnis": {"columns": (7, 8), "blocks": (9,), "order": "counts"},
    "pep": {"kept": (20, 9, 0, 3), "order": "counts"},
}
POLICIES = ("oov", "zero", "hash", None)


def method_schema() -> rse.Schema:
    names = [m.name for m in rse.list_methods()]
    assert set(names) == set(OF_METHOD)
    return rse.Schema([rse.FeatureSpec(n, ROWS - i % 3, WIDTH, unseen=POLICIES[i % 4]) for i, n in enumerate(names)])


def method_plan() -> rse.Plan:
    return rse.Plan({n: rse.get_method(n).config_cls(**options) for n, options in OF_METHOD.items()})


def method_ids(of: rse.Schema, unseen: bool = True) -> Tensor:
    """Every id of every feature, and unseen ones where a feature takes them."""
    sizes = torch.tensor([s.num_embeddings for s in of])
    ids = torch.arange(ROWS)[:, None] % sizes
    if unseen:
        takes = torch.tensor([s.unseen is not None for s in of])
        ids[3] = torch.where(takes, sizes + 5, ids[3])
        ids[4] = torch.where(takes, -7, ids[4])
    return ids


RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "adagrad": ("Adagrad", {"lr": 0.1, "eps": 1e-8, "initial_accumulator_value": 0.1}),
    "rowwise_adagrad": ("RowwiseAdagrad", {"lr": 0.1, "eps": 1e-6}),
    "adam": ("Adam", {"lr": 0.02, "betas": [0.8, 0.95], "eps": 1e-7}),
    "adam_per_row": ("Adam", {"lr": 0.02, "bias_correction": "row"}),
    "sgd_all": ("SGD", {"lr": 0.1, "weight_decay": 0.01, "rows": "all"}),
    "adagrad_all": ("Adagrad", {"lr": 0.1, "weight_decay": 0.01, "rows": "all"}),
    "rowwise_adagrad_all": ("RowwiseAdagrad", {"lr": 0.1, "weight_decay": 0.01, "rows": "all"}),
    "adam_all": ("Adam", {"lr": 0.02, "weight_decay": 0.01, "rows": "all"}),
}


def rule(name: str) -> Any:
    cls, args = RULES[name]
    return getattr(optim, cls)(**{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})


def checkpoints(out: Path) -> None:
    """Collections after three steps, what they give, and what they give after a fourth."""
    folder, of = out / "checkpoints", method_schema()
    folder.mkdir()
    ids = method_ids(of)
    keep("checkpoints/ids", ids)
    write(folder / "about.json", {"schema": of.to_dict(), "plan": method_plan().to_dict(), "rules": RULES})
    for name in (None, *RULES):
        coll = rse.EmbeddingCollection(of, method_plan(), None if name is None else rule(name), backend="torch")
        coll.assign_(counts(of))
        for step in range(3 if name is not None else 0):
            coll(ids[step::2]).square().sum().backward()
        key = name or "none"
        state = {"model": coll.eval().state_dict()}
        torch.save(state | ({"optimizer": coll.optimizer_state_dict()} if name else {}), folder / f"{key}.pt")
        keep(f"checkpoints/{key}/before", coll(ids))
        coll.train()
        coll(ids[1::3]).square().sum().backward()
        if name is None:
            with torch.no_grad():
                for p in coll.parameters():
                    p -= 0.1 * p.grad
        keep(f"checkpoints/{key}/after", coll.eval()(ids))


def drop_ins(out: Path) -> None:
    states, about = {}, {}
    ids = torch.arange(ROWS)
    keep("drop_ins/ids", ids)
    for i, (method, options) in enumerate(OF_METHOD.items()):
        given = {"unseen": POLICIES[i % 4], "padding_idx": 5, **options}
        module = rse.make_embedding(method, ROWS, WIDTH, **given)
        if options.get("order") == "counts":
            module.assign_(torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)))
        states[method], about[method] = module.state_dict(), given
        keep(f"drop_ins/{method}", module(ids))
        bag = rse.make_embedding(method, ROWS, WIDTH, mode="mean", config=module.config, unseen=given["unseen"])
        bag.load_state_dict(module.state_dict())
        keep(f"drop_ins/{method}/bags", bag(ids, torch.tensor([0, 0, 7, 9])))
        if module.config.accepts_raw and given["unseen"] in (None, "hash"):
            keep(f"drop_ins/{method}/strings", module(["68fd1e64", "Zürich", ""]))
    torch.save(states, out / "drop_ins.pt")
    write(out / "drop_ins.json", {"rows": ROWS, "width": WIDTH, "options": about})


# -- models of others, exports ----------------------------------------------------------------------------------------


class Ranker(nn.Module):
    """Somebody else's model; the test has the same."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(700, 8), nn.Embedding(300, 8)
        self.tags = nn.EmbeddingBag(60, 8, mode="mean")
        self.head = nn.Linear(24, 1)

    def forward(self, users: Tensor, items: Tensor, tags: Tensor) -> Tensor:
        return self.head(torch.cat([self.user(users), self.item(items), self.tags(tags)], 1))


def ranker(out: Path) -> None:
    torch.manual_seed(0)
    model = Ranker()
    inputs = (torch.arange(9) * 70, torch.arange(9) * 30, torch.arange(18).view(9, 2))
    for name, value in zip(("users", "items", "tags"), inputs, strict=True):
        keep(f"ranker/{name}", value)
    plan = rse.plan_for_budget(model, "12KiB")
    (out / "ranker.plan.json").write_text(plan.to_json() + "\n")
    rse.compress_(model, plan)
    torch.save(model.state_dict(), out / "ranker.pt")
    keep("ranker/out", model(*inputs))
    report = rse.export(model, out / "exports" / "ranker.int8.safetensors", "int8")
    write(out / "exports.ranker.report.json", {k: v for k, v in report.to_dict().items() if k != "path"})
    keep("ranker/int8", rse.load(out / "exports" / "ranker.int8.safetensors", into=Ranker(), backend="torch")(*inputs))
    write(out / "memory_report.json", rse.memory_report(model, optimizer="adam").to_dict())


def exports(out: Path) -> None:
    folder = out / "exports"
    folder.mkdir()
    ranker(out)
    of = method_schema()
    ids = method_ids(of)
    # Rows of a collection that trained, since initial ones are too alike for a coarse precision to matter.
    coll = rse.EmbeddingCollection(of, method_plan(), optim.Adagrad(lr=0.3), backend="torch").assign_(counts(of))
    for step in range(3):
        (coll(ids[step::2]) - 1).square().sum().backward()
    coll.eval()
    for precision in ("fp32", "fp16", "bf16", "int8", "int4"):
        rse.export(coll, folder / f"methods.{precision}.safetensors", precision)
        keep(
            f"exports/methods.{precision}", rse.load(folder / f"methods.{precision}.safetensors", backend="torch")(ids)
        )
    wide = rse.Schema([rse.FeatureSpec(n, 200, 8, pooling="mean") for n in ("range", "bitmap", "sorted", "hash")])
    plan = rse.Plan({s.name: rse.get_method("full").config_cls() for s in wide})
    pruned = rse.EmbeddingCollection(wide, plan)
    with torch.no_grad():
        pruned.table("range.weight")[90:] = 0
        pruned.table("bitmap.weight")[::2] = 0
        pruned.table("bitmap.weight")[:, 3] = 0
        row = pruned.table("sorted.weight")[[7, 100, 199]].clone()
        pruned.table("sorted.weight").zero_()[[7, 100, 199]] = row
    every = torch.arange(200)[:, None].expand(200, 4)
    for precision in ("fp32", "fp16", "int8", "int4"):
        path = folder / f"pruned.{precision}.safetensors"
        rse.export(pruned, path, precision)
        keep(f"exports/pruned.{precision}", rse.load(path, backend="torch")(every[::3]))
    for method, options in OF_METHOD.items():
        given = {"order": "ids"} if "order" in options else {}
        module = rse.make_embedding(method, ROWS, WIDTH, mode="sum", **{**options, **given})
        rse.export(module, folder / f"bag-{method}.safetensors", "fp16")
        bags = (torch.arange(ROWS), torch.tensor([0, 3, 3, 20]))
        keep(f"exports/bag-{method}", rse.load(folder / f"bag-{method}.safetensors", backend="torch")(*bags))
    keep("exports/strings", rse.load(folder / "bag-hash.safetensors")(["68fd1e64", "Zürich"], torch.tensor([0, 1])))
    dense, columns = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)), method_ids(of)[:5]
    keep("exports/dense", dense)
    for name in ("deepfm", "lr"):
        features, plan = (of, method_plan()) if name == "deepfm" else (of.with_dim(1), rse.Plan.full(of.with_dim(1)))
        more = {"hidden": [8]} if name == "deepfm" else {}
        model = build_model(name, features, plan, num_dense=3, seed=1, backend="torch", **more).eval()
        rse.export(model, folder / f"{name}.int8.safetensors", "int8")
        keep(f"exports/{name}", rse.load(folder / f"{name}.int8.safetensors", backend="torch")(dense, columns))


# -- names ------------------------------------------------------------------------------------------------------------

AUTHORS = ("config", "embedding", "errors", "features", "hashing", "members", "memory")
AUTHORS += ("optim", "plan", "program", "registry")
"""Modules that authors of methods import from; of the others, what packages list in ``__all__`` is public."""


def names(out: Path) -> None:
    found: dict[str, list[str]] = {}
    for module in pkgutil.walk_packages(rse.__path__, "recsys_embed."):
        if any(part.startswith("_") for part in module.name.split(".")) or ".triton" in module.name:
            continue
        try:
            own = importlib.import_module(module.name)
        except ImportError:  # an optional library is absent
            continue
        if module.ispkg or module.name == "recsys_embed.testing":
            found[module.name] = sorted(getattr(own, "__all__", ()))
        elif module.name.removeprefix("recsys_embed.") in AUTHORS or ".methods." in module.name:
            defined = [n for n, v in vars(own).items() if getattr(v, "__module__", None) == module.name]
            ends = ("Config", "Embedding") if ".methods." in module.name else ""
            found[module.name] = sorted(n for n in defined if not n.startswith("_") and n.endswith(ends))
    found["recsys_embed"] = sorted(rse.__all__)
    write(out / "names.json", {k: v for k, v in sorted(found.items()) if v})


def settings(out: Path) -> None:
    """The settings files that users write, as the examples of that version had them."""
    examples = Path(rse.__file__).parents[1] / "examples"
    (out / "settings").mkdir()
    for path in sorted(examples.glob("*.toml")):
        shutil.copy(path, out / "settings" / path.name)


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    torch.set_num_threads(1)
    plans(out)
    checkpoints(out)
    drop_ins(out)
    exports(out)
    folder = data(out, keep)
    runs(out, folder, keep)
    searches(out, folder)
    study(out, folder)
    names(out)
    settings(out)
    for part in ("plans", "others"):
        mine = {k: v for k, v in VALUES.items() if k.startswith("plans/") == (part == "plans")}
        np.savez_compressed(out / f"values-{part}.npz", **mine)
    for path in out.rglob(".lock"):
        path.unlink()
    for folder in ("checkpoints", "data", "exports", "run", "study", *(f"search-{name}" for name in SEARCHES)):
        with tarfile.open(out / f"{folder}.tar.xz", "w:xz") as archive:
            archive.add(out / folder, folder)
        shutil.rmtree(out / folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
