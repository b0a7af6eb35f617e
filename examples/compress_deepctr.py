"""A DeepFM of DeepCTR-Torch at a tenth of its embedding bytes: report, plan, compress, train, export, load.

    python examples/compress_deepctr.py [--smoke] [--data FOLDER]

FOLDER is one made by 'recsys-embed data criteo'; without it the clicks are made up. The model is somebody else's and
stays as it is: DeepCTR-Torch builds it, trains it and predicts with it, before and after.
Needs: pip install --no-deps deepctr-torch==0.3.0 && pip install requests scikit-learn tqdm
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import recsys_embed as rse

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--smoke", action="store_true", help="few rows")
parser.add_argument("--data", type=Path, help="folder made by 'recsys-embed data criteo'")
options = parser.parse_args()

try:
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models import DeepFM
    from sklearn.metrics import roc_auc_score
except ImportError as e:
    print(f"skipped: {e}; pip install --no-deps deepctr-torch==0.3.0 && pip install requests scikit-learn tqdm")
    sys.exit(0)

# -- clicks: ids by a power law, a hidden taste per id ----------------------------------------------------------------

if options.data:
    from recsys_embed.data import open_dataset

    data = open_dataset(options.data)
    sizes = [f.num_embeddings for f in data.schema(16)]
    train, test = ((s.ids.numpy(), s.dense.numpy(), s.label.numpy()) for s in map(data.load, ("train", "test")))
else:
    rng = np.random.default_rng(0)
    sizes = [int(n) for n in np.geomspace(10, 3_000 if options.smoke else 20_000, 26)]
    taste = [rng.normal(size=n) / 3 for n in sizes]
    rows = 4_000 if options.smoke else 60_000
    ids = np.stack([(rng.random(rows) ** 4 * n).astype(np.int64) for n in sizes], 1)
    dense = rng.random((rows, 13)).astype(np.float32)
    logits = sum(t[ids[:, i]] for i, t in enumerate(taste)) + dense.sum(1) - 6.5
    labels = (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    cut = rows * 5 // 6
    train, test = (ids[:cut], dense[:cut], labels[:cut]), (ids[cut:], dense[cut:], labels[cut:])

sparse = [f"C{i + 1}" for i in range(len(sizes))]
numeric = [f"I{i + 1}" for i in range(train[1].shape[1])]


def build() -> DeepFM:
    """DeepCTR-Torch's DeepFM over all columns: 26 tables of width 16 and 26 of width 1 for its linear part."""
    columns = [SparseFeat(name, n, embedding_dim=16) for name, n in zip(sparse, sizes, strict=True)]
    columns += [DenseFeat(name, 1) for name in numeric]
    model = DeepFM(columns, columns, dnn_hidden_units=(128, 64), l2_reg_embedding=1e-5, dnn_dropout=0.1)
    model.compile("adam", "binary_crossentropy")
    return model


def inputs(part: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
    """Columns by name, as DeepCTR-Torch wants them."""
    return dict(zip(sparse, part[0].T, strict=True)) | dict(zip(numeric, part[1].T, strict=True))


def fit(model: DeepFM) -> None:
    """One epoch."""
    model.fit(inputs(train), train[2][:, None], batch_size=512, epochs=1, verbose=0)


def auc(model: DeepFM) -> float:
    """AUC on the test rows."""
    return float(roc_auc_score(test[2], model.predict(inputs(test), batch_size=4096)))


def column(table: str) -> np.ndarray:
    """Training ids of a table; DeepCTR-Torch names it after its feature."""
    return train[0][:, sparse.index(table.rpartition("/")[2])]


file = Path(tempfile.mkdtemp()) / "deepfm.safetensors"
model = build()
fit(model)
before = auc(model)

# -- report, plan, compress, train, export ----------------------------------------------------------------------------

tables = rse.Schema.from_model(model)
counts = {t.name: torch.from_numpy(np.bincount(column(t.name), minlength=t.num_embeddings)) for t in tables}

report = rse.memory_report(model)
plan = rse.plan_for_budget(model, report.total("serve") // 10, stats=counts)
outcome = rse.compress_(model, plan, counts=counts, optimizer=model.optim)
warm = auc(model)
fit(model)
exported = rse.export(model, file, "int8")
served = rse.load(file, into=build())

print(outcome)
print(exported)
print(
    f"test AUC: {before:.4f} plain, {warm:.4f} compressed, {auc(model):.4f} after an epoch, {auc(served):.4f} exported"
)
