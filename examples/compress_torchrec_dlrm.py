"""TorchRec's DLRM with smaller tables: the same EmbeddingBagCollection, keyed tensors and training loop.

    python examples/compress_torchrec_dlrm.py [--smoke]

The tables inside an EmbeddingBagCollection are replaced one by one; whatever takes its KeyedTensor goes on unchanged.
A plan is a value: it is printed with the planner's reasons, could be edited, and is tried dry before anything changes.
Needs: pip install 'recsys-embed[torchrec]'
"""

import argparse
import sys
import warnings

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import recsys_embed as rse

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--smoke", action="store_true", help="few rows and steps")
smoke = parser.parse_args().smoke

warnings.filterwarnings("ignore", category=DeprecationWarning)
try:
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.models.dlrm import DLRM
except (ImportError, OSError) as e:
    print(f"skipped: {e}; pip install 'recsys-embed[torchrec]'")
    sys.exit(0)

ROWS = {"user": 2_000, "item": 1_000, "tags": 50} if smoke else {"user": 100_000, "item": 30_000, "tags": 500}
STEPS = 10 if smoke else 150
BATCH = 1024
rng = torch.Generator().manual_seed(0)
taste = {name: torch.randn(n, generator=rng) for name, n in ROWS.items()}


def batch() -> tuple[torch.Tensor, KeyedJaggedTensor, torch.Tensor]:
    """Numbers, bags of ids (up to 5 tags, none too) and clicks."""
    lengths = torch.cat([torch.ones(2 * BATCH, dtype=torch.int64), torch.randint(0, 6, (BATCH,), generator=rng)])
    counts = [BATCH, BATCH, int(lengths[2 * BATCH :].sum())]
    values = [
        (torch.rand(count, generator=rng).pow(3) * n).long() for count, n in zip(counts, ROWS.values(), strict=True)
    ]
    ids = KeyedJaggedTensor(list(ROWS), torch.cat(values), lengths=lengths)
    logits = 2 * (taste["user"][values[0]] + taste["item"][values[1]])
    clicks = (torch.rand(BATCH, generator=rng) < torch.sigmoid(logits)).float()
    return torch.rand(BATCH, 4, generator=rng), ids, clicks


def train(model: DLRM, optimizer: torch.optim.Optimizer) -> None:
    """Some steps, with the loss at the end."""
    losses = []
    for _ in range(STEPS):
        dense, ids, clicks = batch()
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(model(dense, ids).squeeze(1), clicks)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.4f} -> {sum(losses[-10:]) / len(losses[-10:]):.4f}")


torch.manual_seed(0)
tables = [
    EmbeddingBagConfig(name=f"t_{k}", embedding_dim=16, num_embeddings=n, feature_names=[k]) for k, n in ROWS.items()
]
model = DLRM(EmbeddingBagCollection(tables=tables), 4, [32, 16], [32, 1])
optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
train(model, optimizer)

plan = rse.plan_for_budget(model, sum(ROWS.values()) * 16 * 4 // 8)
for name, reason in plan.reasons.items():
    print(f"{name}: {plan[name].method} -- {reason}")
print(rse.compress_(model, plan, dry_run=True))
print(rse.compress_(model, plan, optimizer=optimizer))
train(model, optimizer)
