"""What people do with a model once its tables are compressed: pickle, compile, export, ship it."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed.compress import compress_
from recsys_embed.errors import ConfigError


class Ranker(nn.Module):
    """Looks rows up, pools a bag and scores all items by the table's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(300, 16, padding_idx=0)
        self.user = nn.Embedding(200, 16)
        self.bag = nn.EmbeddingBag(100, 16, mode="sum")

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.item(ids) + self.user(ids) + self.bag(ids.unsqueeze(1))
        return rows @ self.item.weight.T


@pytest.fixture(params=["hash", "unified", "compositional"])
def ranker(request: pytest.FixtureRequest) -> Ranker:
    torch.manual_seed(0)
    model = Ranker()
    plan = rse.Plan.uniform(rse.Schema.from_model(model), request.param, budget="10KiB", full_below=0)
    compress_(model, plan, init="fresh")
    return model


IDS = torch.arange(100)


def test_pickle(ranker: Ranker) -> None:
    file = io.BytesIO()
    torch.save(ranker, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(IDS), ranker(IDS))
    assert len(list(again.parameters())) == len(list(ranker.parameters()))


def test_compile_and_export(ranker: Ranker) -> None:
    wanted = ranker(IDS)
    compiled: Any = torch.compile(ranker, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IDS), wanted)
    exported = torch.export.export(ranker, (IDS,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(exported.module()(IDS[:7]), wanted[:7])


def test_a_compiled_model_follows() -> None:
    model = Ranker()
    compiled: Any = torch.compile(model, backend="eager")
    compiled(IDS)
    compress_(compiled, rse.Plan.uniform(rse.Schema.from_model(compiled), "hash", budget="10KiB"))
    assert torch.equal(compiled(IDS), model(IDS))
    assert not isinstance(model.item, nn.Embedding)


def test_ship(ranker: Ranker, tmp_path: Path) -> None:
    rse.export(ranker, tmp_path / "ranker.safetensors")
    served = rse.load(tmp_path / "ranker.safetensors", into=Ranker())
    assert torch.equal(served(IDS), ranker(IDS))


def test_what_was_loaded_is_turned_back_and_compressed_anew(ranker: Ranker, tmp_path: Path) -> None:
    before, file = ranker(IDS), tmp_path / "ranker.safetensors"
    written = rse.export(ranker, file, precision="int8")
    plan = rse.Plan.uniform(rse.Schema.from_model(ranker), "hash", budget="8KiB", full_below=0)
    counts = {"item": torch.ones(300)}
    for act in (rse.materialize_, lambda model: compress_(model, plan, counts=counts)):
        served = rse.load(file, into=Ranker())
        report = act(served)
        assert report.bytes_before == written.embedding_bytes
        assert served(IDS).shape == before.shape
    served = rse.load(file, into=Ranker())
    expected = served(IDS)
    rse.materialize_(served)
    torch.testing.assert_close(served(IDS), expected)


def test_functional_calls_and_gradients(ranker: Ranker) -> None:
    parameters = {k: p.detach() for k, p in ranker.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(ranker, values, (IDS,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    ranker(IDS).square().sum().backward()
    for name, p in ranker.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)
    assert all(isinstance(p, nn.Parameter) for p in ranker.parameters())


def test_counts_find_their_tables() -> None:
    from recsys_embed.compress import table_counts

    model = nn.ModuleDict(
        {"deep": nn.ModuleDict({"C1": nn.Embedding(5, 4)}), "wide": nn.ModuleDict({"C1": nn.Embedding(4, 1)})}
    )
    found = table_counts(model, {"C1": [4, 2, 1, 0]})
    assert {k: v.tolist() for k, v in found.items()} == {"deep/C1": [4, 2, 1, 0, 0], "wide/C1": [4, 2, 1, 0]}
    with pytest.raises(
        rse.RecsysEmbedError, match="no table belongs to a feature: tables deep/C1, wide/C1; features C9"
    ):
        table_counts(model, {"C9": [1]})
    with pytest.raises(rse.RecsysEmbedError, match=r"'wide/C1' has 4 rows; feature 'C1' has \(5,\) ids"):
        table_counts(model, {"C1": [1] * 5})
    with pytest.raises(rse.RecsysEmbedError, match="expected counts by feature"):
        table_counts(model, 3)


@pytest.mark.parametrize("name", ["HashEmbedding", "EmbeddingCollection"])
def test_scripting_is_refused_in_one_sentence(name: str) -> None:
    schema = rse.Schema([rse.FeatureSpec("user", 50, 8)])
    tables = rse.HashEmbedding(50, 8, num_buckets=9) if name == "HashEmbedding" else rse.EmbeddingCollection(schema)
    with pytest.raises(ConfigError, match=rf"^torch.jit.script cannot compile {name}: use torch.jit.trace, torch.exp"):
        torch.jit.script(nn.Sequential(tables))
