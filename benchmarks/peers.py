"""DeepFM as FuxiCTR and DeepCTR-Torch build and train it: their models and the body of their training loops."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor, Tensor]
HIDDEN = [400, 400, 400]


def fuxictr(sizes: list[int], dim: int, batches: list[Batch]) -> Callable[[int], float]:
    """A step of FuxiCTR: Adam on dense gradients, their norm clipped to 10, no regulariser."""
    if "ray" not in sys.modules:
        # Building data sets needs ray, which its import chain drags in; layers and models do not.
        for name in ("ray", "ray.data", "ray.data.datasource", "ray.data.datasource.filename_provider"):
            sys.modules[name] = types.ModuleType(name)
        data: Any = sys.modules["ray.data"]
        data.SaveMode = data.TaskPoolStrategy = object
        provider: Any = sys.modules["ray.data.datasource.filename_provider"]
        provider.FilenameProvider = object
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
    from fuxictr.pytorch.models import BaseModel

    count = batches[0][0].shape[1]
    fields = FeatureMap("bench", ".")
    fields.labels = ["label"]
    for i in range(count):
        fields.features[f"I{i}"] = {"source": "", "type": "numeric"}
    for i, n in enumerate(sizes):
        fields.features[f"C{i}"] = {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": n}
    fields.num_fields = fields.get_num_fields()
    fields.set_column_index()

    class DeepFM(BaseModel):  # type: ignore[misc]
        """As FuxiCTR's own zoo builds it."""

        def __init__(self) -> None:
            super().__init__(
                fields,
                gpu=-1,
                embedding_regularizer=None,
                net_regularizer=None,
                verbose=0,
                model_root="",
                metrics=["AUC"],
            )
            self.embedding_layer = FeatureEmbedding(fields, dim)
            self.fm = FactorizationMachine(fields)
            self.mlp = MLP_Block((count + len(sizes)) * dim, output_dim=1, hidden_units=HIDDEN)
            self.compile("adam", "binary_crossentropy", 1e-3)

        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            x = self.get_inputs(inputs)
            vectors = self.embedding_layer(x)
            return {"y_pred": self.output_activation(self.fm(x, vectors) + self.mlp(vectors.flatten(1)))}

    model = DeepFM()
    model.train()
    given = [
        {"label": label}
        | {f"I{i}": dense[:, i : i + 1] for i in range(count)}
        | {f"C{i}": ids[:, i] for i in range(len(sizes))}
        for dense, ids, label in batches
    ]

    def step(turn: int) -> float:
        data = given[turn % len(given)]
        model.optimizer.zero_grad()
        loss = model.compute_loss(model.forward(data), model.get_labels(data))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        model.optimizer.step()
        return float(loss)

    return step


def deepctr(sizes: list[int], dim: int, batches: list[Batch], l2: float = 1e-5) -> Callable[[int], float]:
    """A step of DeepCTR-Torch: Adam on dense gradients, a penalty ``l2`` on all tables (its own default)."""
    start = threading.Thread.start
    # At import it asks the package index for its newest version, in a thread.
    threading.Thread.start = lambda self: None  # type: ignore[method-assign]
    try:
        from deepctr_torch.inputs import DenseFeat, SparseFeat
        from deepctr_torch.models import DeepFM
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]
    count = batches[0][0].shape[1]
    columns = [SparseFeat(f"C{i}", n, embedding_dim=dim) for i, n in enumerate(sizes)]
    columns += [DenseFeat(f"I{i}", 1) for i in range(count)]
    model = DeepFM(columns, columns, dnn_hidden_units=tuple(HIDDEN), l2_reg_embedding=l2, l2_reg_linear=l2)
    model.compile("adam", "binary_crossentropy", metrics=[])
    model.train()
    given = [(torch.cat([ids.float(), dense], 1), label) for dense, ids, label in batches]

    def step(turn: int) -> float:
        x, label = given[turn % len(given)]
        predicted = model(x).squeeze()
        model.optim.zero_grad()
        loss = model.loss_func(predicted, label, reduction="sum")
        total = loss + model.get_regularization_loss() + model.aux_loss
        total.backward()
        model.optim.step()
        return float(loss) / len(label)

    return step
