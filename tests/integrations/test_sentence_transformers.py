"""Static embeddings of sentence-transformers: compressed, saved, loaded and turned back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recsys_embed as rse
from recsys_embed.errors import CheckpointError, ConfigError

pytest.importorskip("sentence_transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
WORDS = 400
TEXTS = ["w1 w2 w3", f"w5 w{WORDS - 1} w7 w8"]


def sentences() -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)} | {"[UNK]": WORDS}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=16)], device="cpu")


@pytest.mark.parametrize("method", [m.name for m in rse.list_methods() if m.name != "full"])
def test_a_compressed_model_is_saved_and_loaded(method: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = sentences()
    rse.compress_(model, rse.Plan.uniform(rse.Schema.from_model(model), method, budget="10KiB"))
    wanted = model.encode(TEXTS)
    model.save(str(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"(?s)recsys_embed.*trust_remote_code"):
        SentenceTransformer(str(tmp_path / "a"), device="cpu")
    again = SentenceTransformer(str(tmp_path / "a"), device="cpu", trust_remote_code=True)
    assert np.array_equal(again.encode(TEXTS), wanted)
    for compressed in (again, copy.deepcopy(model)):
        rse.materialize_(compressed)
        compressed.save(str(tmp_path / "b"))
        plain = SentenceTransformer(str(tmp_path / "b"), device="cpu")
        np.testing.assert_allclose(plain.encode(TEXTS), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"num_embeddings": 2**31 - 1, "config": {"method": "full"}},
        {"embedding_dim": 4096},
        {"options": 3},
        {"name": None},
    ],
)
def test_a_damaged_description_is_refused_before_memory_is_taken(change: dict[str, Any], tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = sentences()
    rse.compress_(model, rse.Plan.uniform(rse.Schema.from_model(model), "lowdim", budget="10KiB"))
    model.save(str(tmp_path / "a"))
    (file,) = (tmp_path / "a").rglob("recsys_embed.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"recsys_embed\.json is damaged"):
        SentenceTransformer(str(tmp_path / "a"), device="cpu", trust_remote_code=True)


def test_a_served_model_says_that_its_file_is_the_one_to_keep(tmp_path: Path) -> None:
    model = sentences()
    rse.compress_(model, rse.Plan.uniform(rse.Schema.from_model(model), "hash", budget="10KiB"))
    rse.export(model, tmp_path / "m", "int8")
    served: Any = rse.load(tmp_path / "m", into=sentences())
    np.testing.assert_allclose(served.encode(TEXTS), model.encode(TEXTS), atol=0.05)
    with pytest.raises(ConfigError, match="exported file"):
        served.save(str(tmp_path / "a"))
