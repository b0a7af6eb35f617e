"""``plan --world-size``: placement on a cluster, of the compressed plan and of full tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from recsys_embed.core.footprint import format_bytes
from recsys_embed.features import Schema
from recsys_embed.optim import make_rule
from recsys_embed.plan import Plan
from recsys_embed.sharding.placement import Cluster, Placement, place

RANKS_SHOWN, TABLES_SHOWN = 16, 40


@dataclass(frozen=True)
class Placements:
    """Placements of the compressed plan and of full tables on one cluster."""

    cluster: Cluster
    optimizer: str | None
    compressed: Placement
    full: Placement

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        c = self.cluster
        return {
            "world_size": c.world_size,
            "hosts": c.hosts,
            "hbm": c.hbm,
            "batch_size": c.batch_size,
            "reserved": c.reserved,
            "optimizer": self.optimizer,
            "compressed": self.compressed.to_dict(),
            "full": self.full.to_dict(),
        }


def place_both(features: Schema, plan: Plan, machines: Cluster, optimizer: str | None) -> Placements:
    """Placements by TorchRec's planner of the tables of ``plan`` and of full tables."""
    # Tables without a fused optimizer would all be replicated; SGD has no state either.
    rule = make_rule(optimizer or "sgd")
    # Raw ids have no full table; the plan is compared with one of their estimated number.
    plain = Schema([replace(spec, ids="index", unseen=None) for spec in features])
    return Placements(
        machines,
        optimizer,
        place(features, plan, machines, optimizer=rule),
        place(plain, None, machines, optimizer=rule),
    )


def show(found: Placements) -> None:
    """Print both placements side by side, then the tables of the compressed one."""
    c = found.cluster
    print(
        f"\n{c.world_size} devices of {format_bytes(int(c.hbm))} on {c.hosts} hosts, {c.reserved:.0%} of each "
        f"reserved; {c.batch_size:,} samples per device and step; state of {found.optimizer or 'no optimizer'} included"
    )
    for line in _columns([("", "compressed", "full tables"), *_rows(found.compressed, found.full, c)]):
        print(line)
    for name, one in (("the compressed plan", found.compressed), ("full tables", found.full)):
        if not one.fits:
            print(f"{name}: {one.why}")
    if found.compressed.fits:
        print("placement of the compressed tables:")
        shown = found.compressed.tables[:TABLES_SHOWN]
        for line in _columns([(t.table, format_bytes(t.bytes), t.kind, ranks(t.ranks, c.world_size)) for t in shown]):
            print(f"  {line}")
        if len(found.compressed.tables) > len(shown):
            print(f"  and {len(found.compressed.tables) - len(shown)} smaller tables (--json has all)")


def _rows(one: Placement, other: Placement, c: Cluster) -> list[tuple[str, ...]]:
    def cell(found: Placement, text: Any) -> str:
        return text(found) if found.fits else "-"

    def line(name: str, text: Any) -> tuple[str, ...]:
        return (name, cell(one, text), cell(other, text))

    rows = [
        ("fits", *("yes" if p.fits else "no" for p in (one, other))),
        ("tables and state, one copy", format_bytes(one.total), format_bytes(other.total)),
        line("largest rank", lambda p: format_bytes(max(p.weights))),
        line("largest rank, inputs and outputs too", lambda p: format_bytes(max(p.memory))),
        line("sent per rank and step: ids", lambda p: format_bytes(int(p.sent["ids"]))),
        line("  vectors forward", lambda p: format_bytes(int(p.sent["vectors"]))),
        line("  gradients backward", lambda p: format_bytes(int(p.sent["gradients"]))),
        line("embedding part of a step (TorchRec's estimate)", lambda p: f"{p.step_ms:.2f} ms"),
    ]
    if c.world_size <= RANKS_SHOWN:
        rows += [line(f"rank {r}", lambda p, r=r: format_bytes(p.weights[r])) for r in range(c.world_size)]
    else:
        rows.append(line("smallest rank", lambda p: format_bytes(min(p.weights))))
    return rows


def ranks(held: tuple[int, ...], world: int) -> str:
    """Ranks as a short text.

    >>> ranks((0, 1, 2, 3), 4), ranks((0,), 4), ranks((1, 2, 3), 4), ranks((0, 2), 4)
    ('all ranks', 'rank 0', 'ranks 1 to 3', 'ranks 0, 2')
    """
    if len(held) == world:
        return "all ranks"
    if len(held) == 1:
        return f"rank {held[0]}"
    if held == tuple(range(held[0], held[-1] + 1)):
        return f"ranks {held[0]} to {held[-1]}"
    return "ranks " + ", ".join(map(str, held))


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as aligned lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows]  # fmt: skip
