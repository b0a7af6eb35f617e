"""Settings: types, ranges, unknown keys, files and command-line assignments."""

from __future__ import annotations

from pathlib import Path

import pytest

from recsys_embed.cli._settings import numbers, parse_assignment, split_settings, train_config
from recsys_embed.errors import ConfigError, UnknownNameError
from recsys_embed.train.config import TrainConfig, read_settings
from recsys_embed.train.schedule import Schedule


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'learning_rate'"):
        TrainConfig.from_dict({"learning_rat": 0.1})


def test_a_hyperparameter_says_where_it_belongs() -> None:
    with pytest.raises(UnknownNameError, match=r"model 'sasrec' has `model_args.every_position`"):
        TrainConfig.from_dict({"model": "sasrec", "every_position": True})


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)3 faults.*batch_size.*learning_rate.*exclude"):
        TrainConfig(batch_size=0, learning_rate=-1.0, ratio=2.0, budget="1MiB")


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", 1.5), ("epochs", True), ("shuffle", 1), ("schedule", "linear"), ("model_args", [1]), ("budget", 1.5)],
)
def test_wrong_types_say_what_is_expected(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` must be"):
        TrainConfig.from_dict({key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("final_factor", 1.1), ("min_delta", -0.1), ("patience", 0), ("clip_norm", 0.0), ("learning_rate", float("nan"))],
)
def test_values_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` must"):
        TrainConfig.from_dict({key: value})


def test_round_trip_and_defaults() -> None:
    config = TrainConfig.from_dict({"ratio": 20, "model_args": {"hidden": [4]}})
    assert isinstance(config.ratio, float)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert config.non_defaults() == {"ratio": 20.0, "model_args": {"hidden": [4]}}


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('epochs = 2\nmodel_args = {hidden = [8]}\n[compare]\nmodels = ["fm"]\n')
    settings, compare = split_settings(path)
    assert settings == {"epochs": 2, "model_args": {"hidden": [8]}}
    assert compare == {"models": ["fm"]}
    path.write_text("epochs = = 2")
    with pytest.raises(ConfigError, match=r"a\.toml is not valid TOML"):
        read_settings(path)
    other = tmp_path / "a.json"
    other.write_text("[1]")
    with pytest.raises(ConfigError, match="must hold an object"):
        read_settings(other)


def test_later_settings_win_and_tables_merge() -> None:
    config = train_config(
        {"epochs": 1, "model_args": {"hidden": [8], "dropout": 0.1}},
        {"epochs": 2, "seed": None},
        ["epochs=3", "model_args.dropout=0.2", "schedule=cosine"],
    )
    assert (config.epochs, config.seed, config.schedule) == (3, 0, "cosine")
    assert config.model_args == {"hidden": [8], "dropout": 0.2}


@pytest.mark.parametrize("text", ["epochs", "=3", "a b=1"])
def test_bad_assignments(text: str) -> None:
    with pytest.raises(ConfigError, match="--set takes key=value"):
        parse_assignment(text)


def test_bad_numbers() -> None:
    with pytest.raises(ConfigError, match="numbers separated by commas"):
        numbers("4,b")


def test_schedules() -> None:
    warm = Schedule(TrainConfig(warmup_steps=4), 10)
    assert [warm.factor(s) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = Schedule(TrainConfig(schedule="cosine", final_factor=0.1), 10)
    assert cosine.factor(0) == 1.0
    assert cosine.factor(5) == pytest.approx(0.55)
    assert cosine.factor(10) == cosine.factor(99) == pytest.approx(0.1)


def test_plateau_waits_then_multiplies_and_its_state_moves_over() -> None:
    config = TrainConfig(schedule="plateau", plateau_factor=0.5, plateau_patience=2, min_delta=0.01)
    a = Schedule(config, 100)
    seen = []
    for auc in (0.70, 0.705, 0.70, 0.72, 0.70, 0.71):
        a.on_validation(auc)
        b = Schedule(config, 100)
        b.load_state_dict(a.state_dict())
        assert b == a
        seen.append(a.factor(0))
    assert seen == [1.0, 1.0, 0.5, 0.5, 0.5, 0.25]


def test_a_seed_beyond_64_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match="`seed` must be an integer in"):
        TrainConfig(seed=2**63)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"a = 1 # \xff")
    with pytest.raises(ConfigError, match=r"c\.toml is not valid TOML"):
        read_settings(tmp_path / "c.toml")
