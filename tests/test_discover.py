"""find_tables: every table once, with every place that reads it."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import recsys_embed as rse
from recsys_embed.discover import find_tables
from recsys_embed.errors import ConfigError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(100, 8)
        self.fields = nn.ModuleList([nn.Embedding(10, 4), nn.EmbeddingBag(20, 4, mode="sum")])
        self.tower = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"item": nn.Embedding(7, 8, padding_idx=0)}))
        self.again = self.user
        self.none = None


def test_tables_of_lists_dicts_and_attributes() -> None:
    model = Model()
    found = find_tables(model)
    assert [t.name for t in found] == ["user", "fields/0", "fields/1", "tower/1/item"]
    assert [t.paths for t in found] == [("user", "again"), ("fields.0",), ("fields.1",), ("tower.1.item",)]
    assert [(t.kind, t.rows, t.width, t.pooling) for t in found] == [
        ("embedding", 100, 8, None),
        ("embedding", 10, 4, None),
        ("embedding_bag", 20, 4, "sum"),
        ("embedding", 7, 8, None),
    ]
    for table in found:
        assert all(model.get_submodule(path) is module for path, module in zip(table.paths, table.modules, strict=True))
        assert table.weight is table.module.weight
        assert not table.obstacle
        assert not table.tied


@given(depth=st.integers(0, 4), shared=st.integers(1, 4), cycle=st.booleans())
def test_every_path_of_a_shared_module_once(depth: int, shared: int, cycle: bool) -> None:
    table = nn.Embedding(5, 2)
    model = nn.ModuleDict({str(i): table for i in range(shared)})
    for _ in range(depth):
        model = nn.ModuleDict({"a": model, "b": model})
    if cycle:
        model["self"] = model
    (found,) = find_tables(model)
    # The state dict names a shared module at each of its paths, and is torch's own account of them.
    expected = {} if cycle else {k.removesuffix(".weight") for k in model.state_dict()}
    assert len(found.paths) == len(set(found.paths)) == shared * 2**depth
    assert cycle or set(found.paths) == expected


def test_tied_weights_are_one_table_and_other_users_of_the_weight_are_named() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(6, 4), nn.EmbeddingBag(6, 4)
            self.b.weight = self.a.weight
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.a.weight
            self.left = nn.Embedding(6, 4)
            self.other = nn.Bilinear(4, 1, 6, bias=False)
            self.other.weight = self.left.weight
            self.alone = nn.Embedding(6, 4)
            self.view = nn.Embedding(6, 4, _weight=self.alone.weight.data)

    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Tied()
        a, left, alone = find_tables(model)
        assert a.paths == ("a", "b")
        assert a.tied == ("head.weight",)
        assert (a.output_layers, a.obstacle) == ((model.head,), "")
        assert left.obstacle == "its weight is also other.weight"
        assert left.output_layers == ()
        assert alone.paths == ("alone", "view")
        assert alone.tied == ()


def test_meta_tables_too_large_to_exist() -> None:
    with torch.device("meta"):
        model = nn.ModuleList([nn.Embedding(2**31 - 1, 4096, dtype=torch.bfloat16), nn.Embedding(2**31 - 1, 4096)])
    found = find_tables(model)
    assert [(t.rows, t.width, t.dtype) for t in found] == [
        (2**31 - 1, 4096, torch.bfloat16),
        (2**31 - 1, 4096, torch.float32),
    ]


class Scaled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def test_obstacles_are_named() -> None:
    model = nn.ModuleDict(
        {
            "scaled": Scaled(5, 4),
            "normed": torch.nn.utils.parametrizations.weight_norm(nn.Embedding(5, 4)),
            "patched": nn.Embedding(5, 4),
            "plain": nn.Embedding(5, 4),
        }
    )
    model["patched"].forward = lambda ids: ids
    text = {t.name: t.obstacle for t in find_tables(model)}
    assert "Scaled" in text["scaled"]
    assert "computed" in text["normed"]
    assert "forward" in text["patched"]
    assert text["plain"] == ""
    assert find_tables(model, subclasses=[Scaled])[0].obstacle == ""


def test_tables_in_plain_containers_are_named_unless_they_are_registered_too() -> None:
    model = nn.Module()
    model.hidden = {"a": nn.Embedding(5, 4)}
    model.known = nn.ModuleList([nn.Embedding(5, 4)])
    model.alias = list(model.known)
    hidden = {t.name: t.obstacle for t in find_tables(model)}
    assert list(hidden) == ["known/0", "hidden['a']"]
    assert "plain list" in hidden["hidden['a']"]
    assert hidden["known/0"] == ""


def test_a_schema_of_any_model() -> None:
    model = Model()
    schema = rse.Schema.from_model(model)
    assert [(f.name, f.num_embeddings, f.embedding_dim, f.pooling) for f in schema] == [
        ("user", 100, 8, "sum"),
        ("fields/0", 10, 4, "sum"),
        ("fields/1", 20, 4, "sum"),
        ("tower/1/item", 7, 8, "sum"),
    ]
    assert rse.Schema.from_model(model, include="fields.*", exclude=["fields/1"]).names == ("fields/0",)
    model.scaled = Scaled(5, 4)
    assert rse.Schema.from_model(model) == schema
    assert rse.Schema.from_model(model, subclasses={Scaled}).names == (*schema.names, "scaled")
    with pytest.raises(ConfigError, match=r"'nope\*' matches no table"):
        rse.Schema.from_model(model, exclude=["nope*"])
    with pytest.raises(ConfigError, match="no embedding table"):
        rse.Schema.from_model(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="Scaled"):
        rse.Schema.from_model(nn.ModuleList([Scaled(5, 4)]))


def test_frozen_tables_and_a_table_alone() -> None:
    (found,) = find_tables(nn.Embedding(5, 4).requires_grad_(False))
    assert (found.name, found.paths, found.requires_grad) == ("embedding", ("",), False)


def test_names_stay_unique_and_allowed_in_a_schema() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Embedding(3, 2)}), "a/b": nn.Embedding(3, 2)})
    model["x#y"] = nn.Embedding(3, 2)
    names = [t.name for t in find_tables(model)]
    assert names == ["a/b", "a/b_2", "x_y"]
    assert rse.Schema([rse.FeatureSpec(n, 3, 2) for n in names]).names == tuple(names)


@pytest.mark.parametrize("method", [m.name for m in rse.list_methods()])
def test_own_modules(method: str) -> None:
    options = {} if method == "full" else {"budget": "16KiB"}
    drop_in = rse.make_embedding(method, 1000, 8, mode="mean", **options)
    schema = rse.Schema([rse.FeatureSpec("C1", 1000, 8), rse.FeatureSpec("C2", 500, 8)])
    model = nn.ModuleDict({"one": drop_in, "all": rse.EmbeddingCollection(schema, optimizer=rse.SGD(lr=0.1))})
    model["two"] = drop_in
    found = find_tables(model)
    assert [(t.name, t.kind, t.rows, t.width, t.paths, t.pooling) for t in found] == [
        ("one", "compressed", 1000, 8, ("one", "two"), "mean"),
        ("all/C1", "collection", 1000, 8, ("all.C1",), "sum"),
        ("all/C2", "collection", 500, 8, ("all.C2",), "sum"),
    ]
    assert [t.table for t in found] == [None, "C1", "C2"]
    assert all(t.weight is None and t.requires_grad for t in found)


def test_torchrec_collections() -> None:
    torchrec = pytest.importorskip("torchrec")
    bags = torchrec.EmbeddingBagCollection(
        tables=[
            torchrec.EmbeddingBagConfig(name="t1", embedding_dim=4, num_embeddings=10, feature_names=["f1", "f2"]),
            torchrec.EmbeddingBagConfig(
                name="t2", embedding_dim=8, num_embeddings=20, feature_names=["f3"], pooling=torchrec.PoolingType.MEAN
            ),
        ]
    )
    one = torchrec.EmbeddingCollection(
        tables=[torchrec.EmbeddingConfig(name="t3", embedding_dim=4, num_embeddings=10, feature_names=["f1"])]
    )
    model = nn.ModuleDict({"bags": bags, "one": one})
    found = find_tables(model)
    assert [(t.kind, t.table, t.rows, t.width, t.pooling) for t in found] == [
        ("torchrec_ebc", "t1", 10, 4, "sum"),
        ("torchrec_ebc", "t2", 20, 8, "mean"),
        ("torchrec_ec", "t3", 10, 4, None),
    ]
    assert found[0].module is bags
    assert found[0].paths == ("bags.embedding_bags.t1",)
    assert found[0].weight is bags.embedding_bags["t1"].weight


def test_torchrec_is_not_imported() -> None:
    import subprocess

    code = (
        "import sys; from torch import nn; from recsys_embed.discover import find_tables;"
        "find_tables(nn.ModuleList([nn.Embedding(3, 2)])); sys.exit('torchrec' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_anything_but_a_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="Module"):
        find_tables({"a": nn.Embedding(3, 2)})  # type: ignore[arg-type]
