"""Models of Hugging Face's transformers: compressed, trained, saved and loaded as transformers does it."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import recsys_embed as rse
from recsys_embed.discover import find_tables
from recsys_embed.errors import CheckpointError, ConfigError

transformers = pytest.importorskip("transformers", "5")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
WORDS = 500
IDS = torch.randint(3, WORDS, (4, 6), generator=torch.Generator().manual_seed(0))
SMALL = {"num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 16}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.modeling_utils.logging.disable_progress_bar()


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    if name.startswith("Bert"):
        config = transformers.BertConfig(vocab_size=WORDS, hidden_size=16, **SMALL, **options)
    elif name.startswith("GPT2"):
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 1}
        config = transformers.GPT2Config(vocab_size=WORDS, **sizes, **options)
    else:
        config = transformers.T5Config(vocab_size=WORDS, decoder_start_token_id=0, **T5, **options)
    return cls(config).eval()


def outputs(model: Any) -> torch.Tensor:
    decoded = {"decoder_input_ids": IDS[:, :3].contiguous()} if "T5For" in type(model).__name__ else {}
    out = model(input_ids=IDS, **decoded)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def compressed(name: str, method: str, **options: Any) -> Any:
    model = build(name, **options)
    schema = rse.Schema.from_model(model)
    rse.compress_(model, rse.Plan.uniform(schema, method, budget="14KiB", full_below=100))
    return model


MODELS = ["BertForSequenceClassification", "BertForMaskedLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"]
CASES: list[Any] = [
    pytest.param(name, "lowdim", marks=() if name == "T5ForConditionalGeneration" else pytest.mark.slow)
    for name in [*MODELS, "T5EncoderModel"]
]
CASES += [
    pytest.param("BertForMaskedLM", m.name, marks=() if m.name == "memcom" else pytest.mark.slow)
    for m in rse.list_methods()
    if m.name not in ("full", "lowdim")
]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_saved_models_come_back_and_tied_ones_stay_tied(name: str, method: str, tmp_path: Path) -> None:
    model = compressed(name, method)
    wanted = outputs(model).detach()
    plain = copy.deepcopy(model)
    rse.materialize_(plain)
    torch.testing.assert_close(outputs(plain), wanted, rtol=1e-4, atol=1e-5)
    model.tie_weights()
    assert torch.equal(outputs(model), wanted)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(outputs(again), wanted)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    # What was loaded trains, is saved and turned back like its source.
    outputs(again).square().sum().backward()
    assert all(p.grad is not None for n, p in again.named_parameters() if "embed" in n or "wte" in n or "shared" in n)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "again")), wanted)
    assert not any(hasattr(m.config, "quantization_config") for m in (model, again, again.from_pretrained(tmp_path)))
    type(model)(model.config).save_pretrained(tmp_path / "other")
    assert type(type(model).from_pretrained(tmp_path / "other").get_input_embeddings()) is nn.Embedding
    rse.materialize_(again)
    again.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    torch.testing.assert_close(outputs(type(model).from_pretrained(tmp_path / "plain")), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_tables_that_share_rows_are_saved_once_and_shared_again(tied: bool, tmp_path: Path) -> None:
    model = build("GPT2LMHeadModel", tie_word_embeddings=tied)
    plan = rse.Plan.uniform(rse.Schema.from_model(model), "unified", num_buckets=300)
    rse.compress_(model, plan)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    words, positions = again.transformer.wte, again.transformer.wpe
    assert words.table("unified") is positions.table("unified") is words.shared.values["unified"]
    assert torch.equal(outputs(again), outputs(model))


def test_heads_and_bases_load_each_others_tables(tmp_path: Path) -> None:
    model = compressed("BertForMaskedLM", "hash")
    model.save_pretrained(tmp_path / "head")
    base = transformers.BertModel.from_pretrained(tmp_path / "head", add_pooling_layer=False).eval()
    wanted = model.bert(input_ids=IDS).last_hidden_state
    assert torch.equal(base(input_ids=IDS).last_hidden_state, wanted)
    base.save_pretrained(tmp_path / "base")
    other = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(other.bert(input_ids=IDS).last_hidden_state, wanted)


@pytest.mark.slow  # starts two processes
def test_without_the_library_loading_stops_and_with_it_a_new_process_loads(tmp_path: Path) -> None:
    compressed("BertForMaskedLM", "hash").save_pretrained(tmp_path)
    load = f"import transformers; m = transformers.BertForMaskedLM.from_pretrained({str(tmp_path)!r}); print(type(m))"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    without = run(load)
    assert without.returncode != 0
    assert "got recsys_embed" in without.stderr
    assert "word_embeddings.weight" in without.stderr
    assert "BertForMaskedLM" in run("import recsys_embed.hugging_face;" + load).stdout


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = compressed("BertForMaskedLM", "hash")
    model.save_pretrained(tmp_path / "a")
    build("BertForMaskedLM").save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
    with pytest.raises(CheckpointError, match="quantization_config"):
        type(model).from_pretrained(tmp_path / "b")
    assert model.resize_token_embeddings(WORDS) is model.get_input_embeddings()
    for part in (model, model.bert, copy.deepcopy(model)):
        with pytest.raises(ConfigError, match="materialize_"):
            part.resize_token_embeddings(WORDS + 8)
        with pytest.raises(ConfigError, match="materialize_"):
            part.set_input_embeddings(nn.Embedding(WORDS, 16))
    rse.materialize_(model)
    model.set_input_embeddings(nn.Embedding(WORDS, 16))
    assert model.resize_token_embeddings(WORDS + 8).num_embeddings == WORDS + 8
    positions = build("BertForMaskedLM")
    rse.compress_(positions, {"bert/embeddings/position_embeddings": rse.LowdimConfig(dim=2)}, include=["*position*"])
    assert positions.resize_token_embeddings(WORDS + 8).num_embeddings == WORDS + 8
    rse.export(compressed("BertForMaskedLM", "hash"), tmp_path / "m", "int8")
    served = rse.load(tmp_path / "m", into=build("BertForMaskedLM"))
    with pytest.raises(ConfigError, match="exported file"):
        served.save_pretrained(tmp_path / "c")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("tables",), 5),
        (("tables",), [5]),
        (("tables",), []),
        (("tabels",), []),
        (("tables", 0, "paths"), None),
        (("tables", 0, "paths"), 3),
        (("tables", 0, "unseen"), "x"),
        (("tables", 0, "config"), {"method": "none"}),
    ],
    ids=str,
)
def test_a_damaged_description_is_refused(at: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    compressed("BertForMaskedLM", "hash").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    part = config["quantization_config"]
    for key in at[:-1]:
        part = part[key]
    part[at[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json, quantization_config is damaged"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path)


def test_the_page_keeps_its_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).resolve().parents[2] / "docs" / "other_libraries.md"
    blocks = re.findall(r"^```py\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), scope)
    assert len(blocks) == 2
    assert find_tables(scope["model"])[0].kind == "compressed"


def test_a_compressed_model_generates_what_its_plain_rows_do() -> None:
    model = compressed("GPT2LMHeadModel", "lowdim")
    plain = copy.deepcopy(model)
    rse.materialize_(plain)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options))
    assert isinstance(plain.lm_head, nn.Linear)


def test_low_precision_tables_are_refused_before_a_file_is_written(tmp_path: Path) -> None:
    model = build("BertModel")
    schema = rse.Schema.from_model(model)
    plan = rse.Plan.uniform(schema, "full", precision="int8", quantization="lpt")
    rse.compress_(model, plan)
    with pytest.raises(ConfigError, match=r"save them by torch\.save\(model\.state_dict\(\), path\)"):
        model.save_pretrained(tmp_path / "m")
    assert not list(tmp_path.rglob("*.safetensors"))
