"""One table of a model you already have, made 10 times smaller: same task, same loop, one line changed.

    python examples/drop_in.py [--smoke]

Two hundred thousand users click or not by a hidden group of theirs, so the model must learn something about every id
that it sees. Each method is trained from the same start; the table shows what it reaches and what it weighs.
"""

import argparse
import time

import torch
from torch import nn

import recsys_embed as rse
from recsys_embed.errors import BudgetError

USERS, DIM = 200_000, 16


class Clicks(nn.Module):
    """A user embedding and a small head; the embedding is whatever module is handed in."""

    def __init__(self, users: nn.Module) -> None:
        super().__init__()
        self.users = users
        self.head = nn.Sequential(nn.Linear(DIM, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B]`` of the ids ``[B]``."""
        return self.head(self.users(ids)).squeeze(-1)


def batch(size: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids by a Zipf-like law and noisy clicks."""
    ids = (torch.rand(size, generator=rng).pow(6) * USERS).long()
    chance = torch.where((ids * 2654435761 >> 7) % 2 == 0, 0.8, 0.2)
    return ids, (torch.rand(size, generator=rng) < chance).float()


def train(users: nn.Module, steps: int) -> float:
    """Train for some steps and return the share of right guesses on fresh data."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(1)
    model = Clicks(users)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    loss_fn = nn.BCEWithLogitsLoss()
    for _ in range(steps):
        ids, clicks = batch(4096, rng)
        optimizer.zero_grad()
        loss_fn(model(ids), clicks).backward()
        optimizer.step()
    with torch.no_grad():
        ids, clicks = batch(50_000, torch.Generator().manual_seed(2))
        return ((model(ids) > 0) == (clicks > 0.5)).float().mean().item()


def main() -> None:
    """Compare a full table with every method at a twentieth of its bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    steps = 3 if parser.parse_args().smoke else 100
    full = USERS * DIM * 4
    print(f"{'method':<16}{'MiB':>8}{'right':>8}{'seconds':>9}   (the best possible is 0.80)")
    for method in rse.list_methods():
        options = {} if method.name == "full" else {"budget": full // 10}
        try:
            users = rse.make_embedding(method.name, USERS, DIM, **options)
        except BudgetError as e:  # rows for every id, in however few bits
            print(f"{method.name:<16}{e}".partition(";")[0])
            continue
        start = time.perf_counter()
        right = train(users, steps)
        seconds = time.perf_counter() - start
        print(f"{method.name:<16}{users.footprint().serve / 2**20:>8.2f}{right:>8.3f}{seconds:>9.1f}")


if __name__ == "__main__":
    main()
