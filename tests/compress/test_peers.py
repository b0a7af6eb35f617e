"""Models of other people, unchanged: they learn before compress_ and after it, and give outputs of the same shape.

Libraries that are not installed are skipped; tests/requirements-peers.txt names those that install lightly.
"""

import copy
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed.compress import compress_, materialize_
from recsys_embed.discover import find_tables

FIELDS = (200, 150, 40, 7)
ROWS = 512


@pytest.fixture(autouse=True)
def _their_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def clicks(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids ``[ROWS, fields]`` and labels that depend on every one of them."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.stack([(torch.rand(ROWS, generator=rng).pow(2) * n).long() for n in FIELDS], 1)
    taste = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in FIELDS]
    logits = sum(t[ids[:, i]] for i, t in enumerate(taste))
    return ids, (logits > 0).float()


def epoch(model: nn.Module, loss_of: Callable[[], Tensor], optimizer: Any, steps: int = 25) -> list[float]:
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def compressed(model: nn.Module, ratio: float = 3.0, **options: Any) -> Any:
    """Half of the tables hashed, half low-rank, at about a third of their bytes."""
    schema = rse.Schema.from_model(model)
    plan = {}
    for i, f in enumerate(schema):
        budget = max(4 * f.embedding_dim, int(4 * f.num_embeddings * f.embedding_dim / ratio))
        method = rse.HashConfig if i % 2 or f.embedding_dim < 4 else rse.LowdimConfig
        plan[f.name] = rse.get_method("full").config_cls() if f.num_embeddings < 20 else method.for_budget(f, budget)
    return compress_(model, rse.Plan(plan), **options)


def check(model: nn.Module, loss_of: Callable[[], Tensor], predict: Callable[[], Any], lr: float = 0.02) -> Any:
    """One epoch before and one after; the optimizer goes along."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    before = epoch(model, loss_of, optimizer)
    assert before[-1] < before[0]
    model.eval()
    wanted = predict()
    report = compressed(model, optimizer=optimizer)
    assert not model.training
    assert report.ratio > 1.5
    assert all(t.relative_error is not None and t.relative_error < 1 for t in report.replaced)
    assert predict().shape == wanted.shape
    after = epoch(model, loss_of, optimizer)
    assert after[-1] < after[0]
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}
    model.eval()
    out = predict()
    materialize_(model, optimizer=optimizer)
    torch.testing.assert_close(predict(), out, rtol=1e-4, atol=1e-5)
    return report


# -- torchfm ----------------------------------------------------------------------------------------------------------

TORCHFM = {
    "lr.LogisticRegressionModel": {},
    "fm.FactorizationMachineModel": {"embed_dim": 8},
    "dfm.DeepFactorizationMachineModel": {"embed_dim": 8, "mlp_dims": (16,), "dropout": 0.0},
    "wd.WideAndDeepModel": {"embed_dim": 8, "mlp_dims": (16,), "dropout": 0.0},
    "dcn.DeepCrossNetworkModel": {"embed_dim": 8, "num_layers": 2, "mlp_dims": (16,), "dropout": 0.0},
    "ffm.FieldAwareFactorizationMachineModel": {"embed_dim": 8},
    "afi.AutomaticFeatureInteractionModel": {
        "embed_dim": 8, "atten_embed_dim": 8, "num_heads": 2, "num_layers": 1, "mlp_dims": (16,), "dropouts": (0.0, 0.0)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TORCHFM)
def test_torchfm(name: str) -> None:
    pytest.importorskip("torchfm")
    module, cls = name.split(".")
    torch.manual_seed(0)
    build = getattr(__import__(f"torchfm.model.{module}", fromlist=[cls]), cls)
    model = build(FIELDS, **TORCHFM[name])
    ids, labels = clicks()
    check(model, lambda: nn.functional.binary_cross_entropy(model(ids), labels), lambda: model(ids).detach())


# -- DeepCTR-Torch ----------------------------------------------------------------------------------------------------


@pytest.fixture
def deepctr(monkeypatch: pytest.MonkeyPatch) -> Any:
    # At import it asks the package index for its newest version, in a thread.
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    models = pytest.importorskip("deepctr_torch.models")
    monkeypatch.undo()
    return models


@pytest.mark.parametrize("name", ["DeepFM", "WDL", "DCN", "AutoInt", "AFM", "FiBiNET"])
def test_deepctr_torch(deepctr: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat

    sparse = [SparseFeat(f"C{i}", n, embedding_dim=8) for i, n in enumerate(FIELDS)]
    tags = [VarLenSparseFeat(SparseFeat("tags", 60, embedding_dim=8), maxlen=3)] if name != "FiBiNET" else []
    columns = [*sparse, *tags, DenseFeat("I0", 1)] if name not in ("AFM",) else [*sparse, *tags]
    model = getattr(deepctr, name)(linear_feature_columns=columns, dnn_feature_columns=columns, l2_reg_embedding=1e-5)
    model.compile("adam", "binary_crossentropy")
    ids, labels = clicks()
    x: dict[str, Any] = {f"C{i}": ids[:, i].numpy() for i in range(len(FIELDS))}
    x["tags"] = torch.randint(0, 60, (ROWS, 3)).numpy()
    x["I0"] = torch.rand(ROWS).numpy()
    x = {k: v for k, v in x.items() if k in model.feature_index}

    def loss(data: dict[str, Any]) -> float:
        # fit() reshapes what it is given
        history = model.fit(dict(data), labels.unsqueeze(1).numpy(), batch_size=128, epochs=3, verbose=0)
        return history.history["loss"][0] - history.history["loss"][-1]

    assert loss(x) > 0
    wanted = model.predict(dict(x))
    regularised = model.regularization_weight[0][0]
    assert regularised[0] is model.embedding_dict["C0"].weight
    report = compressed(model, optimizer=model.optim)
    assert report.ratio > 1.5
    assert model.predict(dict(x)).shape == wanted.shape
    assert regularised[0] is model.embedding_dict["C0"].table("weight"), "it goes on regularising its own tables"
    gone = {id(p) for p in regularised} - {id(p) for p in model.parameters()}
    assert not gone
    assert loss(x) > 0
    assert {id(p) for g in model.optim.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("method", ["hash", "lowdim", "memcom"])
def test_histories_share_the_table_of_their_target_field(
    deepctr: Any, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat

    fields = {"item": 500, "category": 40}
    columns: list[Any] = [SparseFeat("user", 300, embedding_dim=8), DenseFeat("price", 1)]
    for name, size in fields.items():
        seen = SparseFeat(f"hist_{name}", size, embedding_dim=8, embedding_name=name)
        columns += [SparseFeat(name, size, embedding_dim=8), VarLenSparseFeat(seen, maxlen=4, length_name="length")]
    model = deepctr.DIN(columns, list(fields), att_weight_normalization=True, dnn_hidden_units=(16,))
    model.compile("adagrad", "binary_crossentropy")
    g = np.random.default_rng(0)
    x = {"user": g.integers(0, 300, 256), "price": g.random(256).astype("float32"), "length": g.integers(1, 5, 256)}
    for name, size in fields.items():
        x |= {name: g.integers(1, size, 256), f"hist_{name}": g.integers(1, size, (256, 4))}
    labels = (x["item"] % 2).astype("float32").reshape(-1, 1)

    def falls() -> bool:
        losses = model.fit(dict(x), labels, batch_size=64, epochs=2, verbose=0).history["loss"]
        return losses[-1] < losses[0]

    assert falls()
    schema = rse.Schema.from_model(model)
    small = [f.name for f in schema if f.num_embeddings < 100 or f.embedding_dim < 8]
    config = rse.get_method(method).config_cls
    plan = {
        f.name: rse.get_method("full").config_cls() if f.name in small else config.for_budget(f, 8 * f.num_embeddings)
        for f in schema
    }
    report = rse.compress_(model, plan, optimizer=model.optim)
    assert all("item" not in t.name or t.action == "replaced" for t in report.tables if t.width == 8)
    before = [p.detach().clone() for p in model.embedding_dict["item"].parameters()]
    assert falls()
    assert not any(map(torch.equal, before, model.embedding_dict["item"].parameters()))
    plain = copy.deepcopy(model)
    rse.materialize_(plain, optimizer=plain.optim)
    np.testing.assert_allclose(plain.predict(dict(x)), model.predict(dict(x)), atol=1e-5)


# -- FuxiCTR ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fuxictr(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("fuxictr")
    pytest.importorskip("h5py")
    if "ray" not in sys.modules:
        # Building data sets needs ray, which its import chain drags in; layers and models do not.
        for name in ("ray", "ray.data", "ray.data.datasource", "ray.data.datasource.filename_provider"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        data: Any = sys.modules["ray.data"]
        data.SaveMode = data.TaskPoolStrategy = object
        provider: Any = sys.modules["ray.data.datasource.filename_provider"]
        provider.FilenameProvider = object
    return pytest.importorskip("fuxictr.pytorch.models")


def test_fuxictr(fuxictr: Any) -> None:
    from fuxictr.pytorch.layers import MLP_Block, FactorizationMachine, FeatureEmbedding  # isort: skip

    features = {
        f"C{i}": {"type": "categorical", "source": "", "vocab_size": n, "padding_idx": 0} for i, n in enumerate(FIELDS)
    }
    features["C4"] = {"type": "categorical", "source": "", "vocab_size": 200, "padding_idx": 0, "share_embedding": "C0"}
    features["I0"] = {"type": "numeric", "source": ""}
    feature_map = types.SimpleNamespace(
        features=features, dataset_id="clicks", data_dir=".", num_fields=6, labels=["label"],
        sum_emb_out_dim=lambda: 48, get_num_fields=lambda *a: 6,
    )  # fmt: skip

    class DeepFM(fuxictr.BaseModel):
        """As FuxiCTR's own zoo builds it."""

        def __init__(self) -> None:
            super().__init__(
                feature_map, embedding_regularizer=1e-6, net_regularizer=1e-6, verbose=0, model_root="", metrics=["AUC"]
            )
            self.embedding_layer = FeatureEmbedding(feature_map, 8)
            self.fm = FactorizationMachine(feature_map)
            self.mlp = MLP_Block(48, output_dim=1, hidden_units=[16])
            self.compile("adam", "binary_crossentropy", 0.02)
            self.reset_parameters()

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            emb = self.embedding_layer(x)
            return torch.sigmoid(self.fm(x, emb) + self.mlp(emb.flatten(1))).squeeze(1)

    torch.manual_seed(0)
    model = DeepFM()
    ids, labels = clicks()
    x = {f"C{i}": ids[:, i] for i in range(len(FIELDS))}
    x |= {"C4": ids[:, 0].roll(1), "I0": torch.rand(ROWS)}
    (shared,) = [t for t in find_tables(model) if t.rows == 200 and t.width == 8]
    assert len(shared.paths) == 2

    def loss() -> Tensor:
        return nn.functional.binary_cross_entropy(model(x), labels) + model.regularization_loss()

    with pytest.warns(UserWarning, match=r"attribute 'optimizer' of the model"):
        check(model, loss, lambda: model(x).detach())


# -- Hugging Face transformers ----------------------------------------------------------------------------------------


def test_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(1, 500, (64, 8))
    labels = (ids[:, 0] % 2).long()

    def loss() -> Tensor:
        return model(input_ids=ids, labels=labels).loss

    check(model, loss, lambda: model(input_ids=ids).logits.detach(), lr=0.005)


# -- a library too heavy to install for the tests ---------------------------------------------------------------------


def test_recbole() -> None:
    pytest.importorskip("recbole")
    recommender = pytest.importorskip("recbole.model.sequential_recommender.sasrec")
    torch.manual_seed(0)
    config = {
        "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "length",
        "NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": 5, "device": torch.device("cpu"), "n_layers": 1, "n_heads": 2,
        "hidden_size": 16, "inner_size": 16, "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "initializer_range": 0.02, "loss_type": "CE",
    }  # fmt: skip
    model = recommender.SASRec(config, types.SimpleNamespace(num=lambda field: 300))
    items = torch.randint(1, 300, (128, 5))
    batch = {"item_list": items, "length": torch.full((128,), 5), "item": (items[:, -1] * 7) % 299 + 1}
    report = check(
        model, lambda: model.calculate_loss(batch), lambda: model.full_sort_predict(batch).detach(), lr=0.005
    )
    assert "padding row" in report["item_embedding"].note


def test_scoring_all_items_by_the_weight_as_recbole_does() -> None:
    class Sequential(nn.Module):
        """The shape of RecBole's sequential recommenders: the table is looked up and its weight scores all items."""

        def __init__(self) -> None:
            super().__init__()
            self.item_embedding = nn.Embedding(300, 16, padding_idx=0)
            self.gru = nn.GRU(16, 16, batch_first=True)

        def forward(self, items: Tensor) -> Tensor:
            out = self.gru(self.item_embedding(items))[0][:, -1]
            return out @ self.item_embedding.weight.transpose(0, 1)

    torch.manual_seed(0)
    model = Sequential()
    items = torch.randint(1, 300, (128, 5))
    following = (items[:, -1] * 7) % 300
    check(model, lambda: nn.functional.cross_entropy(model(items), following), lambda: model(items).detach())
