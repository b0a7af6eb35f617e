"""Rows that train in few bits: test AUC beside float32 on a data folder, training bytes, and the time of a step.

    python benchmarks/low_precision_training.py --data data/sample --out benchmarks/results/low_precision_training.json

AUC: DeepFM and DCNv2 with the settings of ``examples/criteo_sample*.toml`` but row-wise Adagrad, methods `full` and
`unified` (the float32 plan's rows at 20x), each at float32, int8, int4 and, for comparison, with rounding to nearest;
`full` with learned steps too.
Runs that the output has already are kept, so that seeds can be added. Time: a lookup and its fused step of one table of
a million rows, width 16, batch 4096, as the median of ratios of runs in turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, RowwiseAdagrad, Schema
from recsys_embed.methods.full import FullConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
SETTINGS = {"deepfm": "criteo_sample.toml", "dcnv2": "criteo_sample_dcnv2.toml"}
RATES = {"embedding_optimizer": "rowwise_adagrad", "embedding_learning_rate": 0.01, "embedding_weight_decay": 0.0}
FORMATS: dict[str, dict[str, str]] = {
    "fp32": {},
    "int8": {"precision": "int8", "quantization": "lpt"},
    "int4": {"precision": "int4", "quantization": "lpt"},
    "int8 alpt": {"precision": "int8", "quantization": "alpt"},
    "int4 alpt": {"precision": "int4", "quantization": "alpt"},
    "int8 lsq": {"precision": "int8", "quantization": "lsq"},
    "int4 lsq": {"precision": "int4", "quantization": "lsq"},
    "int8 nearest": {"precision": "int8", "quantization": "lpt", "rounding": "nearest"},
    "int4 nearest": {"precision": "int4", "quantization": "lpt", "rounding": "nearest"},
    "int8, state 8bit": {"precision": "int8", "quantization": "lpt"},
}
STATE = {"int8, state 8bit": "8bit"}
"""Precision of the state of the update rule, by format; float32 for the others."""
TIMED = ("fp32", "int8", "int4", "int8 alpt", "int4 alpt", "int4 lsq")


def train(data: Path, model: str, method: str, format: str, seed: int, buckets: int) -> dict[str, Any]:
    """Test AUC, and bytes of weights and state while training, of one run."""
    options: dict[str, Any] = {f"method_args.{k}": v for k, v in FORMATS[format].items()}
    if format in STATE:
        options["embedding_optimizer_args.state_precision"] = STATE[format]
    if method == "unified":
        options["method_args.num_buckets"] = buckets
    settings = [f"--set={k}={v}" for k, v in {**RATES, **options}.items()]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "recsys_embed", "train", f"--data={data}", f"--config={EXAMPLES / SETTINGS[model]}",
             f"--method={method}", f"--seed={seed}", f"--out={folder}/run", "--json", *settings],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    result = json.loads(done.stdout)
    return {"auc": result["test"]["auc"], "bytes": result.get("footprint", result.get("bytes"))}


def runs(seeds: list[int], only: dict[str, list[str]]) -> Iterator[tuple[str, str, str, int]]:
    for seed in seeds:
        for model, method, format in product(only["models"], only["methods"], only["formats"]):
            # The rows of `unified`, of 4 columns, have no step of their own.
            if method == "full" or FORMATS[format].get("quantization", "lpt") == "lpt":
                yield model, method, format, seed


def step_times(repeats: int = 15, steps: int = 20) -> dict[str, float]:
    """Time of a step in few bits divided by that of float32, by format and threads."""
    schema, out = Schema([FeatureSpec("id", 1_000_000, 16)]), {}
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        colls = {
            name: EmbeddingCollection(schema, Plan({"id": FullConfig(**FORMATS[name])}), RowwiseAdagrad(0.01))  # type: ignore[arg-type]
            for name in TIMED
        }
        ids, weights = torch.randint(1_000_000, (steps, 4096, 1)), torch.randn(4096, 1, 16)
        spent: dict[str, list[float]] = {name: [] for name in colls}
        for _ in range(repeats):
            for name, coll in colls.items():
                start = time.perf_counter()
                for batch in ids:
                    coll(batch).backward(weights)
                spent[name].append(time.perf_counter() - start)
        for name in TIMED[1:]:
            pairs = zip(spent[name], spent["fp32"], strict=True)
            out[f"{name}, {threads} threads"] = round(median(a / b for a, b in pairs), 3)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of recsys-embed data; without it, only steps are timed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--methods", nargs="+", default=["full", "unified"])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--no-times", action="store_true", help="only train, on a machine that does other work too")
    parser.add_argument("--buckets", type=int, default=2846, help="rows of `unified`: those of the float32 plan at 20x")
    arguments = parser.parse_args()
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"runs": {}}
    if not arguments.no_times:
        found["step_time_over_fp32"] = step_times()
    for model, method, format, seed in runs(arguments.seeds, vars(arguments)) if arguments.data else ():
        key = f"{model}, {method}, {format}, seed {seed}"
        if key not in found["runs"]:
            found["runs"][key] = train(arguments.data, model, method, format, seed, arguments.buckets)
            print(key, found["runs"][key], flush=True)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found.get("step_time_over_fp32")))


if __name__ == "__main__":
    main()
