"""A torchfm model and its optimizer, compressed in the middle of training and turned back into full tables.

    python examples/compress_torchfm.py [--smoke]

torchfm keeps all fields in one table of sum(field_dims) rows, with offsets. Each method takes a tenth of its bytes: the
trained rows are fitted, the optimizer goes on with the new parameters, and materialize_ gives a plain torchfm model.
Needs: pip install --no-deps torchfm==0.7.0
"""

import argparse
import sys
import warnings

import torch
from torch.nn.functional import binary_cross_entropy

import recsys_embed as rse

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--smoke", action="store_true", help="few rows and steps")
smoke = parser.parse_args().smoke

try:
    from torchfm.model.dfm import DeepFactorizationMachineModel
except ImportError as e:
    print(f"skipped: {e}; pip install --no-deps torchfm==0.7.0")
    sys.exit(0)
warnings.filterwarnings("ignore", category=UserWarning, message=".*numpy.ndarrays.*")

FIELDS = (300, 200, 30) if smoke else (30_000, 20_000, 3_000)
STEPS, ROWS = (10, 512) if smoke else (300, 4096)
tastes = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in FIELDS]


def clicks(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[rows, fields]`` by a power law, and clicks that depend on all of them."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.stack([(torch.rand(ROWS, generator=rng).pow(3) * n).long() for n in FIELDS], 1)
    logits = 2 * sum(taste[ids[:, i]] for i, taste in enumerate(tastes))
    return ids, (torch.rand(ROWS, generator=rng) < torch.sigmoid(logits)).float()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Some steps on fresh clicks."""
    model.train()
    for step in range(steps):
        ids, labels = clicks(step)
        optimizer.zero_grad()
        binary_cross_entropy(model(ids), labels).backward()
        optimizer.step()


@torch.no_grad()
def loss(model: torch.nn.Module) -> float:
    """Log loss on clicks of its own."""
    ids, labels = clicks(-1)
    return binary_cross_entropy(model.eval()(ids), labels).item()


print(f"{'method':<14}{'KiB':>8}{'ratio':>7}{'error':>7}{'plain':>8}{'fitted':>8}{'trained':>9}   (log loss)")
for method in ("hash", "multihash", "compositional", "lowdim", "unified", "robe"):
    torch.manual_seed(0)
    model = DeepFactorizationMachineModel(FIELDS, embed_dim=16, mlp_dims=(64, 32), dropout=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, STEPS)
    plain = loss(model)

    tables = rse.Schema.from_model(model, include="embedding.*")  # the linear part's table is one number per id
    plan = rse.Plan.uniform(tables, method, budget=sum(FIELDS) * 16 * 4 // 10)
    report = rse.compress_(model, plan, include="embedding.*", optimizer=optimizer)

    fitted = loss(model)
    train(model, optimizer, STEPS)
    row = report["embedding.embedding"]
    size = sum(p.nbytes for p in model.embedding.parameters())
    print(
        f"{method:<14}{size / 1024:>8.1f}{row.bytes_before / size:>7.1f}{row.relative_error:>7.3f}"
        f"{plain:>8.4f}{fitted:>8.4f}{loss(model):>9.4f}"
    )
    rse.materialize_(model, optimizer=optimizer)  # torchfm's own modules again, with the rows the method gave
print(f"all of them as full tables again, e.g. the last: {model.embedding.embedding}, log loss {loss(model):.4f}")
