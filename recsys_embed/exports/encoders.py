"""The encoders of raw rows in an exported file, and the scores that they and the model give."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recsys_embed.data.batch import Batch
from recsys_embed.data.serving.stored import PREFIX, Output, StoredEncoders
from recsys_embed.errors import ConfigError
from recsys_embed.exports.file_format import ExportFile
from recsys_embed.models import RetrievalModel
from recsys_embed.models.base import CTRModel
from recsys_embed.models.retrieval import CatalogueVectors, Recommendations
from recsys_embed.utils.evaluation_mode import evaluation_mode
from recsys_embed.utils.files import write_text
from recsys_embed.utils.types import BagIds, RowsLike

if TYPE_CHECKING:
    from recsys_embed.data.serving.recommend import Find, UserEncoder
    from recsys_embed.data.serving.row_encoder import RowEncoder


class FileScorer:
    """Scores of raw rows by the encoders of a file; what they need is built at first use.

    Args:
        stored: the encoders.
    """

    def __init__(self, stored: StoredEncoders) -> None:
        self.stored = stored
        self._user_encoders: dict[tuple[object, ...], UserEncoder] = {}  # the last, as it knows where names are

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    @cached_property
    def encoder(self) -> RowEncoder:
        """The encoder of rows."""
        from recsys_embed.data import read_row_encoder

        return read_row_encoder(self.stored)

    @property
    def lists(self) -> list[str]:
        """Features with any number of ids per row."""
        return [f["name"] for f in self.stored.about["features"] if f["form"] != "single"]

    @property
    def output(self) -> Output:
        """What a score is."""
        found: Output = self.stored.about["output"]
        return found

    def score(self, model: nn.Module) -> Callable[[Batch], NDArray[np.float32]]:
        """A function from batches to scores float32 ``[n]``."""
        device = next(chain(model.parameters(), model.buffers())).device

        @torch.inference_mode()
        def scores(batch: Batch) -> NDArray[np.float32]:
            with evaluation_mode(model):
                moved = batch.to(device)
                logits: Tensor = model(moved.dense, moved.inputs).float()
            found: Tensor = (torch.sigmoid(logits) if self.output == "probability" else logits).cpu()
            return found.numpy()

        return scores

    def predict(self, model: nn.Module, rows: RowsLike, batch_size: int) -> NDArray[np.float32]:
        """See :meth:`recsys_embed.models.CTRModel.predict`."""
        encoder = self.encoder
        from recsys_embed.data import score_rows

        return score_rows(encoder, self.score(model), rows, batch_size)

    def user_encoder(self, model: RetrievalModel, exclude: Sequence[str] = ()) -> UserEncoder:
        """The encoder of rows that items are recommended to.

        Args:
            model: finds the items.
            exclude: columns of the rows that hold items to leave out.

        Raises:
            ConfigError: the items have no names.
        """
        if self.stored.about["kind"] == "criteo":
            raise ConfigError(
                "Criteo's columns have no names of items to recommend: recommend by ids, `recommend(dense, ids, k)`, "
                "or convert the data as a table of your own (`recsys-embed data table`)"
            )
        from recsys_embed.data import UserEncoder

        names = [f.name for f in model.vectors.schema]
        numbers = self.stored.about.get("dense", ())
        unread = {n for n in names if n not in model.user_features}
        unread |= {n for i, n in enumerate(numbers) if i not in model.user_numeric}
        key = (model.item, frozenset(unread), *exclude)
        if key not in self._user_encoders:
            self._user_encoders = {key: UserEncoder(self.stored, model.item, unread, exclude)}
        return self._user_encoders[key]

    def find(self, model: RetrievalModel, encoder: UserEncoder, k: int) -> Find:
        """A function from batches, and items to leave out, to ids of items and their scores ``[B, k]``."""
        device = model.in_catalogue.device
        listed = model.in_catalogue & torch.from_numpy(encoder.named(len(model.in_catalogue))).to(device)
        catalogue = CatalogueVectors(model)

        @torch.inference_mode()
        def find(batch: Batch, excluded: BagIds | None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
            with evaluation_mode(model):
                moved = batch.to(device)
                users = model.users(moved.dense, moved.inputs)
                ids, scores = model.best_items(users, k, excluded, catalogue=catalogue, listed=listed)
            return ids.cpu().numpy(), scores.float().cpu().numpy()

        return find

    def recommend(
        self, model: RetrievalModel, rows: RowsLike, k: int, exclude: Sequence[str], batch_size: int
    ) -> Recommendations:
        """See :meth:`recsys_embed.models.RetrievalModel.recommend`."""
        encoder = self.user_encoder(model, exclude)
        from recsys_embed.data import recommend_rows

        return Recommendations(*recommend_rows(encoder, self.find(model, encoder, k), rows, k, batch_size))


def scorer_of(file: ExportFile, about: Mapping[str, Any]) -> FileScorer:
    """The scorer of an opened file, whose arrays stay in it."""
    arrays = {name: file.tensor(name).numpy() for name in file.entries if name.startswith(PREFIX)}
    return FileScorer(StoredEncoders(about, arrays))


def encoders_for(model: nn.Module, given: Any, output: Output | None) -> StoredEncoders | None:
    """The encoders to store with a model: those of a data folder, or those that it was loaded with.

    Args:
        model: to be exported.
        given: a data folder, opened or its path; None: the model's own; False: none.
        output: what a score is; None: as the folder's labels have it, and of retrieval models a value.

    Raises:
        ConfigError: the model is none that gives scores, or the folder is that of another model.
    """
    if given is False:
        return None
    if given is None:
        scorer = getattr(model, "scorer", None)
        if not isinstance(scorer, FileScorer):
            return None
        return scorer.stored if output is None else scorer.stored.replace(output=output)
    if not isinstance(model, CTRModel):
        raise ConfigError(
            f"`encoders` go with a model that gives scores, one of recsys_embed.models; got {type(model).__name__}: "
            "leave them out, and encode rows with `recsys-embed data table --like`"
        )
    from recsys_embed.data import encoders_of

    if output is None and isinstance(model, RetrievalModel):
        output = "value"  # dot products are log odds after training by logloss alone
    schema = next(iter(model.collections().values())).schema
    return encoders_of(Path(given) if isinstance(given, str) else given, output, schema, model.num_dense)


def rows_json(graph: Path) -> Path:
    """The file beside a graph that says how to make its inputs of raw rows."""
    return graph.with_name(f"{graph.name}.json")


def write_rows_json(file: Path, stored: StoredEncoders, graph: Any) -> Path:
    """Write what a client needs to make the inputs of an ONNX graph of raw rows.

    Args:
        file: of the graph.
        stored: the encoders.
        graph: what :func:`recsys_embed.exports.onnx_file.translate` returned.
    """
    from recsys_embed.data import describe_encoders

    about = describe_encoders(stored)
    bags = ("values", "offsets") if about["lists"] else ("ids",)
    names = [value.name for value in graph.model.graph.inputs]
    # The graph leaves out what it does not read, as numbers where there are none.
    wanted = ["dense", *bags]
    roles = wanted if len(names) == len(wanted) else list(bags)
    inputs = [{"name": name, "holds": role} for name, role in zip(names, roles, strict=True)]
    written = rows_json(file)
    write_text(written, json.dumps({**about, "inputs": inputs}, indent=1, ensure_ascii=False) + "\n")
    return written
