"""Methods whose rows are stored codes, as somebody outside the package writes them: with packed codes, which all
kernels read, and with an index of one's own, which torch reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema, registry
from recsys_embed.core.codes import Codes, CodesIndex
from recsys_embed.core.index import Index, IndexArray, IndexArrays
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.program import Initializer, LookupProgram, RowLookup, Table, Transform
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import ConfigError
from recsys_embed.exports.graph import to_onnx
from recsys_embed.testing import check_embedding

# -- product quantisation: a vector is the pieces that its codes name --------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CodedConfig(MethodConfig):
    """``num_codes`` pieces of each of the ``parts`` of a vector; every id stores which ones are its own.

    >>> CodedConfig(num_codes=16).footprint(FeatureSpec("C1", 1000, 16)).index
    1004
    """

    method: ClassVar[str] = "coded"
    num_codes: int = param(MISSING, "rows of each part's table", low=1)
    parts: int = param(2, "pieces side by side", low=1)

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec)
        if spec.embedding_dim % self.parts:
            faults.append(f"`parts` must divide the width {spec.embedding_dim}; got {self.parts}")
        return faults

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        index, width = CodesIndex("codes", spec.num_ids, self.parts, self.num_codes), spec.embedding_dim // self.parts
        tables = tuple(Table(f"part{j}", self.num_codes, width, Initializer.plain(spec)) for j in range(self.parts))
        return LookupProgram(tables, tuple(RowLookup(t.name, Codes(index, j), j * width) for j, t in enumerate(tables)))

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        return cls.from_params({"parts": 2 if spec.embedding_dim % 2 == 0 else 1, **params, "num_codes": size})


class CodedEmbedding(CompressedEmbedding):
    """Drop-in of coded.

    >>> CodedEmbedding(1000, 16, num_codes=16).footprint()
    Footprint(weights=1024, index=1004, optimizer=0, gradient=0, unrounded=0)
    """

    config_cls = CodedConfig


# -- an index of one's own: rows in any order ---------------------------------------------------------------------


@dataclass(frozen=True)
class PlacesIndex(Index):
    """A row for each id, in 2 bytes."""

    name: str
    size: int

    @property
    def arrays(self) -> tuple[IndexArray, ...]:
        return (IndexArray("places", torch.int16, self.size),)

    def faults(self) -> list[str]:
        return [] if self.size < 2**15 else [f"index {self.name!r} has places for 32,767 ids; got {self.size}"]

    def initial(self, device: torch.device) -> dict[str, Tensor]:
        return self.packed(torch.arange(self.size, device=device))

    def packed(self, value: Tensor) -> dict[str, Tensor]:
        if not torch.equal(value.sort().values, torch.arange(self.size, device=value.device)):
            raise ConfigError(f"index {self.name!r} takes an order of [0, {self.size})")
        return {"places": value.to(torch.int16)}

    def value(self, at: int = 0, arrays: IndexArrays | None = None) -> Tensor:
        return self._own("places", at, arrays).long()

    def damage(self, held: Mapping[str, Tensor]) -> str | None:
        good = 0 <= int(held["places"].min()) <= int(held["places"].max()) < self.size
        return None if good else f"index {self.name!r} is damaged"


@dataclass(frozen=True)
class Placed(Transform):
    """The row that an index has for an id."""

    index: PlacesIndex

    def signature(self) -> tuple[Any, ...]:
        return (Placed,)

    def parameters(self) -> tuple[int, ...]:
        return ()

    @staticmethod
    def map(
        signature: tuple[Any, ...], ids: Tensor, params: Sequence[Any], at: Any = 0, arrays: IndexArrays | None = None
    ) -> Tensor:
        assert arrays is not None
        return arrays.held["places"][ids + at].long()

    @property
    def needs(self) -> PlacesIndex:
        return self.index


@dataclass(frozen=True, kw_only=True)
class PlacedConfig(MethodConfig):
    """A full table whose rows stand in any order."""

    method: ClassVar[str] = "placed"
    shift: int = param(0, "nothing")

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        table = Table("weight", spec.num_ids, spec.embedding_dim, Initializer.plain(spec))
        return LookupProgram((table,), (RowLookup("weight", Placed(PlacesIndex("places", spec.num_ids))),))

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        return cls.from_params(params)

    @classmethod
    def max_size(cls, spec: FeatureSpec, **params: Any) -> int:
        return 1


class PlacedEmbedding(CompressedEmbedding):
    """Drop-in of placed."""

    config_cls = PlacedConfig


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register(CodedEmbedding, paper="none")
    registry.register(PlacedEmbedding, paper="none")


SCHEMA = Schema([FeatureSpec("C1", 300, 8), FeatureSpec("C2", 70, 8), FeatureSpec("C3", 40, 8)])
CODES = {f.name: torch.randint(0, 11, (f.num_ids, 2), generator=torch.Generator().manual_seed(1)) for f in SCHEMA}


def test_stored_codes_keep_the_contract() -> None:
    check_embedding("coded")


def trained(backend: str, ids: Tensor) -> EmbeddingCollection:
    plan = Plan.uniform(SCHEMA, "coded", num_codes=11).with_arrays({n: {"codes": c} for n, c in CODES.items()})
    coll = EmbeddingCollection(SCHEMA, plan, rse.RowwiseAdagrad(lr=0.1), backend=backend)
    for step in range(3):
        coll(ids).square().sum().backward()
        assert step < 3
    return coll


def test_codes_of_a_plan_are_what_every_backend_reads_and_trains(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randint(0, f.num_ids, (500,), generator=generator) for f in SCHEMA], 1)
    native, plain = trained("auto", ids), trained("torch", ids)
    for j, f in enumerate(SCHEMA):
        parts = [native.table(f"{f.name}.part{p}")[CODES[f.name][ids[:, j], p]] for p in range(2)]
        assert torch.equal(native(ids)[:, j], torch.cat(parts, 1))
    torch.testing.assert_close(native(ids), plain(ids), rtol=1e-5, atol=1e-6)
    held = native.state_dict()["bundle.kernel.index.codes"]
    assert held.nbytes == native.footprint().index == sum(-(-f.num_ids * 2 * 4 // 32) * 4 + 4 for f in SCHEMA)
    rse.export(native, tmp_path / "model.safetensors")
    served = rse.load(tmp_path / "model.safetensors")
    assert torch.equal(served(ids), native(ids))
    native.plan.save(tmp_path / "plan.json")
    again = EmbeddingCollection(SCHEMA, Plan.load(tmp_path / "plan.json"))
    again.load_state_dict(native.state_dict())
    assert torch.equal(again(ids), native(ids))
    report = rse.memory_report(native)
    assert report.total("serve") == native.footprint().serve


def test_graphs_for_servers_and_models_in_place_hold_the_codes_of_a_plan(tmp_path: Path) -> None:
    plan = Plan.uniform(SCHEMA, "coded", num_codes=11).with_arrays({n: {"codes": c} for n, c in CODES.items()})
    written = to_onnx(EmbeddingCollection(SCHEMA, plan), tmp_path / "codes.onnx")
    assert written.check is not None
    model = torch.nn.ModuleDict({f.name: torch.nn.Embedding(f.num_ids, f.embedding_dim) for f in SCHEMA})
    rse.compress_(model, plan, init="fresh")
    for f in SCHEMA:
        module: Any = model[f.name]
        assert torch.equal(module.kernel.index.value(0, "codes"), CODES[f.name])


def test_an_index_of_ones_own_on_torch(tmp_path: Path) -> None:
    orders = {f.name: torch.randperm(f.num_ids, generator=torch.Generator().manual_seed(2)) for f in SCHEMA}
    plan = Plan.uniform(SCHEMA, "placed").with_arrays({n: {"places": p} for n, p in orders.items()})
    coll = EmbeddingCollection(SCHEMA, plan, rse.SGD(lr=0.1), backend="torch")
    ids = torch.arange(40).unsqueeze(1).expand(40, 3)
    for j, f in enumerate(SCHEMA):
        assert torch.equal(coll(ids)[:, j], coll.table(f"{f.name}.weight")[orders[f.name][:40]])
    coll(ids).sum().backward()
    assert coll.footprint().index == 2 * sum(f.num_ids for f in SCHEMA)
    assert rse.memory_report(coll).total("serve") == coll.footprint().serve
    with pytest.raises(ConfigError, match="takes an order"):
        coll.assign_({"C1": {"places": torch.zeros(300).long()}})
