"""Adapters of PEFT on models with compressed tables."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import recsys_embed as rse
from recsys_embed.errors import ConfigError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
IDS = torch.randint(3, 400, (4, 6), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1])
WORDS = {"bert.embeddings.word_embeddings": rse.HashConfig(num_buckets=50)}
OTHERS = ["*position*", "*token_type*"]


def bert(compressed: bool = True) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    if compressed:
        rse.compress_(model, WORDS, exclude=OTHERS)
    return model


def adapted(model: Any, **options: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="SEQ_CLS", **options))


def test_adapters_beside_a_compressed_table_train_are_saved_and_merged(tmp_path: Path) -> None:
    model = adapted(bert(), target_modules=["query", "value"])
    table = model.base_model.model.bert.embeddings.word_embeddings
    before = table.materialize()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(input_ids=IDS, labels=LABELS).loss.backward()
    optimizer.step()
    assert torch.equal(table.materialize(), before)
    model.save_pretrained(tmp_path)
    wanted = model.eval()(input_ids=IDS).logits
    again = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, wanted)
    torch.testing.assert_close(again.merge_and_unload()(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_compressed_table_is_trained_and_saved_beside_adapters(tmp_path: Path) -> None:
    model = adapted(bert(), target_modules=["query"], modules_to_save=["word_embeddings"])
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    before = model(input_ids=IDS, labels=LABELS).loss
    before.backward()
    optimizer.step()
    assert model(input_ids=IDS, labels=LABELS).loss < before
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_adapters_of_the_table_itself_are_refused_before_anything_changes() -> None:
    model = bert()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not supported"):
        adapted(model, target_modules=["word_embeddings"])
    model = adapted(bert(compressed=False), target_modules=["word_embeddings"])
    (name,) = [f.name for f in rse.Schema.from_model(model) if f.num_embeddings == 400 and f.embedding_dim == 16]
    rse.compress_(model, {name: rse.HashConfig(num_buckets=50)}, exclude=OTHERS)
    with pytest.raises(ConfigError, match="materialize_"):
        model.merge_and_unload()
    assert before.keys() == bert().state_dict().keys()
