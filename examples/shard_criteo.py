"""Criteo's sample on two processes: the same settings file, the same AUC.

    RECSYS_EMBED_DATA=/folder/with/criteo_kaggle python examples/shard_criteo.py [--seeds 3] [--smoke]

Trains DeepFM with tables ten times smaller on one process and, started by torchrun, on two that hold a part of every
table each. Both runs read one settings file and write the same kind of run folder; the AUC of two processes lies where
other seeds of one process lie. Without the sample, synthetic rows of the same shape are used.
Needs: pip install 'recsys-embed[train,torchrec]'
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

from recsys_embed.data import CriteoOptions, SplitRule, convert_criteo, make_synthetic

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
parser.add_argument("--out", type=Path, help="folder for data and runs; a temporary one by default")
parser.add_argument("--smoke", action="store_true", help="few rows and steps")
options = parser.parse_args()

if importlib.util.find_spec("torchrec") is None:
    print("skipped: torchrec is not installed; pip install 'recsys-embed[torchrec]'")
    sys.exit(0)

SETTINGS = """
model = "deepfm"
model_args = {hidden = [400, 400, 400]}
method = "unified"
ratio = 10.0
embedding_dim = 16
batch_size = 512
epochs = 3
eval_every = 86
patience = 2
learning_rate = 0.0003
embedding_optimizer = "rowwise_adagrad"   # one that runs inside backward on CPUs, so that tables are really divided
embedding_learning_rate = 0.02
threads = 1
"""
if options.smoke:
    SETTINGS = SETTINGS.replace("[400, 400, 400]", "[16]").replace("epochs = 3", "epochs = 1\nsteps = 10")


def prepare(folder: Path) -> Path:
    """The data folder."""
    sample = Path(os.environ.get("RECSYS_EMBED_DATA", "absent")) / "criteo_kaggle" / "criteo_days1to6.tsv.gz"
    if options.smoke or not sample.exists():
        make_synthetic(folder / "raw", 6000 if options.smoke else 100_000, text_only=True)
        sample = folder / "raw" / "synthetic.tsv"
    print(f"rows: {sample}")
    convert_criteo(sample, folder / "data", CriteoOptions(split=SplitRule(valid=Fraction(1, 12), test=Fraction(1, 6))))
    return folder / "data"


def train(folder: Path, name: str, processes: int, seed: int) -> dict:
    """One run by the command line; its result."""
    out = folder / f"{name}-s{seed}"
    start = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)
    ]  # fmt: skip
    command = [*start, "-m", "recsys_embed", "train", "--data", str(folder / "data"), "--config"]
    command += [str(folder / "settings.toml"), "--seed", str(seed), "--out", str(out), "--no-tensorboard"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads((out / "result.json").read_text())


def main() -> None:
    seeds = range(1 if options.smoke else options.seeds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
        (folder / "settings.toml").write_text(SETTINGS)
        aucs: dict[int, list[float]] = {2: []} if options.smoke else {1: [], 2: []}
        for seed in seeds:
            for processes in aucs:
                result = train(folder, f"{processes}-processes", processes, seed)
                aucs[processes].append(result["test"]["auc"])
                print(
                    f"seed {seed}, {processes} process(es): test AUC {result['test']['auc']:.4f} over "
                    f"{result['test']['samples']:,} rows, {result['samples_per_s']:,.0f} samples/s",
                    flush=True,
                )
        for processes, found in aucs.items():
            mean = sum(found) / len(found)
            print(f"{processes} process(es): mean {mean:.4f}, from {min(found):.4f} to {max(found):.4f}")


main()
