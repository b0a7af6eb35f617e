"""FBGEMM's and TorchRec's ways to look up and train the tables of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from contender import EPS, RATE, Contender
from torch import Tensor
from workload import Case

from recsys_embed import EmbeddingCollection
from recsys_embed.core.program import Hash
from recsys_embed.plan import table_key


def _tables(specs: list[tuple[int, int]], rule: str, owners: list[int] | None = None) -> Any:
    """FBGEMM's module over tables of rows and widths; ``owners`` say which table each feature reads."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    return SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, width in specs],
        feature_table_map=owners,
        optimizer=EmbOptimType[rule],
        learning_rate=RATE,
        eps=EPS,
        pooling_mode=PoolingMode.SUM,
    )


def _copy(like: EmbeddingCollection, tables: list[Tensor]) -> None:
    for spec, table in zip(like.schema, tables, strict=True):
        table.detach().copy_(like.table(f"{spec.name}.weight"))


def tbe(case: Case, ids: list[Tensor], like: EmbeddingCollection) -> Contender:
    """FBGEMM's module for full tables, ids ordered as it wants them beforehand."""
    tables = _tables([(n, case.dim) for n in case.sizes], "EXACT_ROWWISE_ADAGRAD")
    _copy(like, tables.split_embedding_weights())
    flat = [i.T.contiguous().view(-1) for i in ids]
    offsets = [torch.arange(len(f) + 1) for f in flat]
    return Contender(lambda turn: tables(flat[turn], offsets[turn]))


def fused_ebc(case: Case, ids: list[Tensor], like: EmbeddingCollection) -> Contender:
    """TorchRec's fused collection for full tables."""
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    keys = [f"C{i}" for i in range(1, len(case.sizes) + 1)]
    tables = FusedEmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=k, embedding_dim=case.dim, num_embeddings=n, feature_names=[k])
            for k, n in zip(keys, case.sizes, strict=True)
        ],
        optimizer_type=RowWiseAdagrad,
        optimizer_kwargs={"lr": RATE, "eps": EPS},
        device=torch.device("cpu"),
    )
    _copy(like, list(tables.state_dict().values()))
    flat = [i.T.contiguous().view(-1) for i in ids]
    ones, offsets = [torch.ones_like(f) for f in flat], [torch.arange(len(f) + 1) for f in flat]

    def forward(turn: int) -> Tensor:
        given = KeyedJaggedTensor(keys=keys, values=flat[turn], lengths=ones[turn], offsets=offsets[turn])
        return tables(given).values()

    return Contender(forward)


class _Block(NamedTuple):
    """Rows that FBGEMM adds up: some reads of a group of features whose lookups look alike."""

    group: int
    reads: list[tuple[int, list[int]]]
    """Which of the group's sets of row lookups, and which row lookups of each."""
    spans: tuple[int, int]
    ranges: list[tuple[int, int]]
    """Per feature, the rows of the storage that it may read."""


def divide(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The table of each feature, as a range of rows: it holds what the feature reads, overlaps no other table, and
    features of one table are neighbours. Rows of two tables would be updated twice.

    >>> divide([(0, 5), (5, 9), (7, 12)])
    [(0, 5), (5, 12), (5, 12)]
    """
    table = list(range(len(ranges)))
    spans = {t: (*r, i, i) for i, (t, r) in enumerate(zip(table, ranges, strict=True))}
    while True:
        count = len(spans)
        # By rows, then by the order of the features: what overlaps becomes one.
        for low, high in ((0, 1), (2, 3)):
            merged: dict[int, tuple[int, int, int, int]] = {}
            names: dict[int, int] = {}
            last = -1
            for t, s in sorted(spans.items(), key=lambda item: item[1][low]):
                if merged and s[low] < merged[last][high] + (low == 2):
                    m = merged[last]
                    merged[last] = (min(m[0], s[0]), max(m[1], s[1]), min(m[2], s[2]), max(m[3], s[3]))
                else:
                    merged[t], last = s, t
                names[t] = last
            spans, table = merged, [names[t] for t in table]
        if len(spans) == count:
            return [spans[t][:2] for t in table]


def _blocks(like: EmbeddingCollection) -> dict[str, list[_Block]]:
    """By storage. Products are read factor by factor: FBGEMM adds."""
    out: dict[str, list[_Block]] = {}
    for g, (part, group) in enumerate(zip(like.bundle.parts, like.bundle.kernel.groups, strict=True)):
        spans: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for r, row_lookups in enumerate(group.sets):
            for position, slot in enumerate(row_lookups.slots):
                span = group.template.spans[slot]
                found = spans.setdefault((*span, slot) if group.template.combine == "mul" else span, [])
                if not found or found[-1][0] != r:
                    found.append((r, []))
                found[-1][1].append(position)
        for span, reads in sorted(spans.items()):
            slots = {group.sets[r].slots[i] for r, at in reads for i in at}
            ranges = []
            for f in part:
                spec = like.schema.features[f]
                program = like.bundle.programs[spec.name]
                tables = [program.table(program.row_lookups[slot].table) for slot in slots]
                starts = [(like.places[table_key(spec, t)].offset, t.rows) for t in tables]
                ranges.append((min(a for a, _ in starts), max(a + n for a, n in starts)))
            storage = group.sets[reads[0][0]].read.storage
            out.setdefault(storage, []).append(_Block(g, reads, (span[0], span[1]), ranges))
    return out


def index_tbe(case: Case, ids: list[Tensor], like: EmbeddingCollection) -> Contender:
    """Rows computed in torch as the torch backend does, then summed by FBGEMM's tables; factors multiply in torch."""
    if case.method == "robe":
        return runs_tbe(case, ids, like)
    kernel, parts, blocks = like.bundle.kernel, like.bundle.parts, _blocks(like)
    tables, firsts, weighted = {}, {}, {}
    for storage, found in blocks.items():
        ranges = divide([r for b in found for r in b.ranges])
        distinct = list(dict.fromkeys(ranges))
        width = getattr(like, storage).shape[1]
        owners = [distinct.index(r) for r in ranges]
        tables[storage] = _tables([(stop - first, width) for first, stop in distinct], "EXACT_ROWWISE_ADAGRAD", owners)
        weights = tables[storage].split_embedding_weights()
        for (first, stop), table in zip(distinct, weights, strict=True):
            table.copy_(getattr(like, storage).detach()[first:stop])
        starts = torch.tensor([first for first, _ in ranges])
        firsts[storage] = starts.split([len(b.ranges) for b in found])
        row_lookups = [kernel.groups[b.group].sets[r] for b in found for r, _ in b.reads]
        weighted[storage] = any(p.scale != 1.0 or p.signs for p in row_lookups)

    def forward(turn: int) -> Tensor:
        batch = ids[turn]
        columns = [batch[:, list(part)] for part in parts]
        _, _, requests = kernel._requests(columns, None)
        out: list[list[tuple[tuple[int, int], Tensor]]] = [[] for _ in parts]
        for storage, found in blocks.items():
            rows, factors, ends = [], [], []
            for block, first in zip(found, firsts[storage], strict=True):
                group = kernel.groups[block.group]
                read = torch.cat([requests[block.group][r][1][..., at] for r, at in block.reads], -1)
                rows.append((read - first.unsqueeze(1)).transpose(0, 1).reshape(-1))
                ends.append(torch.full((len(first) * len(batch),), read.shape[-1]))
                if not weighted[storage]:
                    continue
                signed = []
                for r, at in block.reads:
                    row_lookups = group.sets[r]
                    shape = (*columns[block.group].shape, len(row_lookups.slots))
                    one = (
                        torch.ones(shape)
                        if row_lookups.signs is None
                        else group._signs(row_lookups, columns[block.group], None)
                    )
                    signed.append(one.view(shape).float()[..., at] * row_lookups.scale)
                factors.append(torch.cat(signed, -1).transpose(0, 1).reshape(-1))
            offsets = torch.nn.functional.pad(torch.cat(ends).cumsum(0), (1, 0))
            weights = torch.cat(factors) if factors else None
            sums = tables[storage](torch.cat(rows), offsets, weights)
            width = sums.shape[1] // sum(len(b.ranges) for b in found)
            for block, piece in zip(found, sums.split([len(b.ranges) * width for b in found], 1), strict=True):
                out[block.group].append((block.spans, piece.view(len(batch), len(block.ranges), width)))
        return torch.cat([_joined(pieces) for pieces in out], 1)

    return Contender(forward, order=[f for part in parts for f in part])


def _joined(pieces: list[tuple[tuple[int, int], Tensor]]) -> Tensor:
    """Columns side by side; those of one place are factors."""
    columns: dict[tuple[int, int], Tensor] = {}
    for span, piece in pieces:
        columns[span] = columns[span] * piece if span in columns else piece
    return torch.cat([columns[span] for span in sorted(columns)], -1)


def runs_tbe(case: Case, ids: list[Tensor], like: EmbeddingCollection) -> Contender:
    """Runs that begin anywhere in an array, out of FBGEMM's rows: the two that hold a run are read, and it is cut out.

    The array's elements have squares of their own, so its rows are for plain Adagrad. Private tables are a second call.
    """
    width = case.dim
    programs = [like.plan[s.name].program(s) for s in like.schema]
    shared = [j for j, p in enumerate(programs) if p.row_lookups[0].num_rows > 1]
    private = [j for j in range(len(programs)) if j not in shared]
    hashes = [programs[j].row_lookups[0].transform for j in shared]
    size = programs[shared[0]].tables[0].rows
    assert size % width == 0, f"an array of {size} elements is no number of rows of {width}"
    signature, places = (
        hashes[0].signature(),
        [torch.tensor(p) for p in zip(*(h.parameters() for h in hashes), strict=True)],
    )
    array = _tables([(size // width, width)], "EXACT_ADAGRAD", [0] * (2 * len(shared)))
    array.split_embedding_weights()[0].copy_(like.table("robe").detach().view(-1, width))
    own = _tables([(case.sizes[j], width) for j in private], "EXACT_ROWWISE_ADAGRAD")
    for j, table in zip(private, own.split_embedding_weights(), strict=True):
        table.copy_(like.table(f"{like.schema.names[j]}.weight").detach())
    along = torch.arange(width)

    def forward(turn: int) -> Tensor:
        batch = ids[turn]
        first = Hash.map(signature, batch[:, shared], places)
        row, aside = first // width, first % width
        rows = torch.stack([row, (row + 1) % (size // width)], -1)
        found = array(rows.view(len(batch), -1).T.reshape(-1), torch.arange(rows.numel() + 1))
        cut = found.view(len(batch), len(shared), 2 * width).gather(2, aside.unsqueeze(-1) + along)
        alone = own(batch[:, private].T.reshape(-1), torch.arange(len(batch) * len(private) + 1))
        return torch.cat([cut.flatten(1), alone], 1).view(len(batch), len(programs), width)

    return Contender(forward, order=shared + private)
