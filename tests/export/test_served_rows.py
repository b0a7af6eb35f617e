"""Served rows as the kernels read them: of every precision, at odd widths too, one by one and in bags."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Schema
from recsys_embed.errors import ConfigError, IdRangeError
from recsys_embed.exports import file_format
from recsys_embed.kernels.native.library import Library, library, loaded

ROWS = 3000


@pytest.fixture(params=["plain", "avx2", "avx512"])
def variant(request: pytest.FixtureRequest) -> Any:
    """Every instruction set that this processor has."""
    if not isinstance(library(), Library):
        pytest.skip("no kernels")
    select = loaded().handle.rse_select
    if not select(request.param.encode()):
        pytest.skip(f"no {request.param}")
    yield request.param
    select(None)


def _bags(generator: torch.Generator, count: int, batch: int) -> tuple[Tensor, Tensor]:
    """Empty bags, and some that are longer than what kernels find rows of at once."""
    lengths = torch.randint(0, 9, (count * batch,), generator=generator)
    lengths[:: batch // 2 + 1] = 0
    lengths[3], lengths[-1] = 1500, 1100
    ids = torch.randint(0, ROWS, (int(lengths.sum()),), generator=generator)
    return ids, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp8", "int8", "int4", "int2"])
@pytest.mark.parametrize("width", [8, 12, 16, 128])
def test_vectors_and_bags_are_those_of_the_decoded_rows(
    tmp_path: Path, variant: str, precision: str, width: int
) -> None:
    generator = torch.Generator().manual_seed(width)
    pooling = ("sum", "mean", "sum")
    schema = Schema([FeatureSpec(f"f{i}", ROWS, width, pooling=p) for i, p in enumerate(pooling)])
    rse.export(EmbeddingCollection(schema), tmp_path / "m", precision, prune=False)
    served = rse.load(tmp_path / "m")
    tables = [served.table(f"f{i}.weight") for i in range(3)]
    ids = torch.randint(0, ROWS, (77, 3), generator=generator)
    wanted = torch.stack([t[ids[:, i]] for i, t in enumerate(tables)], 1)
    for given in (ids, ids.int(), ids.T.contiguous().T):
        torch.testing.assert_close(served(given), wanted, rtol=0, atol=0)
    values, offsets = _bags(generator, 3, 10)
    found = served(values, offsets)
    ends = offsets.view(-1)
    for f, (table, mode) in enumerate(zip(tables, pooling, strict=True)):
        mine = ends[f * 10 : f * 10 + 11]
        pooled = torch.nn.functional.embedding_bag(
            values[mine[0] : mine[-1]], table.double(), mine - mine[0], mode=mode, include_last_offset=True
        )
        torch.testing.assert_close(found[:, f].double(), pooled, rtol=1e-5, atol=1e-4)


def test_bags_are_equal_bit_for_bit_on_every_number_of_threads(tmp_path: Path) -> None:
    schema = Schema([FeatureSpec(f"f{i}", ROWS, 16) for i in range(3)])
    rse.export(EmbeddingCollection(schema), tmp_path / "m", "int8", prune=False)
    served, bags = rse.load(tmp_path / "m"), _bags(torch.Generator().manual_seed(0), 3, 40)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(served(*bags))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_compiled_models_call_the_same_kernels(tmp_path: Path) -> None:
    schema = Schema([FeatureSpec("f", ROWS, 16), FeatureSpec("g", ROWS, 16, pooling="mean")])
    rse.export(EmbeddingCollection(schema), tmp_path / "m", "int4", prune=False)
    served = rse.load(tmp_path / "m")
    compiled = torch.compile(served, fullgraph=True, backend="eager")
    with torch.no_grad():
        ids = torch.randint(0, ROWS, (5, 2))
        assert torch.equal(compiled(ids), served(ids))
        bags = torch.randint(0, ROWS, (9,)), torch.tensor([0, 2, 2, 5, 9])
        assert torch.equal(compiled(*bags), served(*bags))


@pytest.mark.parametrize("wrong", [-1, ROWS, 1 << 40])
def test_ids_out_of_range_are_refused(tmp_path: Path, wrong: int) -> None:
    rse.export(EmbeddingCollection(Schema([FeatureSpec("f", ROWS, 16)])), tmp_path / "m", "int8")
    served = rse.load(tmp_path / "m")
    with pytest.raises(IdRangeError, match="'f'"):
        served(torch.tensor([[3], [wrong]]))
    with pytest.raises(IdRangeError, match="'f'"):
        served(torch.tensor([3, wrong]), torch.tensor([0, 2]))


@pytest.mark.parametrize("offsets", [[1, 3], [0, 2], [0, 3, 2, 3], [0, 4]])
def test_offsets_that_do_not_fit_are_refused(offsets: list[int]) -> None:
    module = EmbeddingCollection(Schema([FeatureSpec("f", 9, 8)]))
    with pytest.raises(ConfigError, match="offsets must rise from 0"):
        module(torch.tensor([1, 2, 3]), torch.tensor(offsets))


def test_files_are_written_in_large_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_format.LargeWrites, "_SIZE", 64)
    generator = torch.Generator().manual_seed(0)
    pieces = [bytes(torch.randint(0, 256, (n,), generator=generator).tolist()) for n in (0, 5, 60, 64, 1000, 1)]
    written: list[tuple[int, int]] = []
    with open(tmp_path / "f", "w+b", buffering=0) as file:
        file.seek(70)

        class Seen:
            def tell(self) -> int:
                return file.tell()

            def write(self, data: memoryview) -> int:
                written.append((file.tell(), len(data)))
                return int(file.write(data))

        large = file_format.LargeWrites(Seen())  # type: ignore[arg-type]
        assert sum(large.write(memoryview(p)) for p in pieces) == 1130
        large.flush()
    assert (tmp_path / "f").read_bytes()[70:] == b"".join(pieces)
    assert all((start + size) % 64 == 0 for start, size in written[:-1])
    assert all(size == 64 for _, size in written[1:-1])
