"""DNIS fits its selection on rows that the weights have not seen, and leaves validation rows to choose when to stop."""

from __future__ import annotations

import pytest

from recsys_embed.errors import ConfigError
from recsys_embed.search import DnisSearch, DnisSettings, run_search
from tests.train.toy import ToyData, toy_config


class Watching(ToyData):
    """Notes by split how many rows of it were handed out, and whether any was held out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, int]] = []

    def batches(self, split, batch_size, **options):
        sizes = {name: len(part.label) for name, part in self.parts.items()}
        self.seen.append((split, batch_size, sizes[split]))
        return super().batches(split, batch_size, **options)


def test_dnis_fits_its_selection_on_training_rows_that_weights_have_not_seen() -> None:
    data, config = Watching(), toy_config(epochs=1, ratio=4.0, batch_size=100)
    run_search(DnisSearch, config, data, DnisSettings(blocks=2, held_out=0.25))
    steps = [(split, rows) for split, size, rows in data.seen if size == 100]
    searched = steps[: steps.index(("train", 2000))]
    assert {rows for split, rows in searched if split == "train"} == {1500}
    assert {rows for split, rows in searched if split == "held_out"} == {500}
    assert "valid" not in {split for split, _ in searched}, "validation rows choose when to stop, and nothing else"
    assert ("held_out", 500) not in steps[len(searched) :]
    data.seen.clear()
    run_search(DnisSearch, config, data, DnisSettings(blocks=2, held_out=0.25, search_epochs=0))
    assert {split for split, *_ in data.seen} == {"train", "valid", "test"}
    assert {rows for split, _, rows in data.seen if split == "train"} == {2000}, "nothing is fitted on rows held out"
    data.seen.clear()
    run_search(DnisSearch, config, data, DnisSettings(blocks=2, held_out=0.0))
    steps = [(split, rows) for split, size, rows in data.seen if size == 100]
    assert {split for split, _ in steps} == {"train", "valid"}
    assert {rows for split, rows in steps if split == "train"} == {2000}


def test_dnis_says_what_cannot_be_held_out() -> None:
    class Bare:
        def __init__(self) -> None:
            self._data = ToyData()

        def __getattr__(self, name):
            if name == "held_out":
                raise AttributeError(name)
            return getattr(self._data, name)

    config = toy_config(epochs=1, ratio=4.0)
    with pytest.raises(ConfigError, match=r"a method held_out\(share\).*; got Bare. With held_out=0 "):
        run_search(DnisSearch, config, Bare(), DnisSettings())
    with pytest.raises(
        ConfigError, match=r"'held_out' is too small to fit the selection on: .* Raise `held_out`, or set "
    ):
        run_search(DnisSearch, config, ToyData(), DnisSettings(held_out=0.02))
    with pytest.raises(ConfigError, match=r"'train' is too small to train on: .* Lower `held_out`, or set it to 0"):
        run_search(DnisSearch, config, ToyData(), DnisSettings(held_out=0.97))
    with pytest.raises(ConfigError, match=r"`held_out` must be a finite number in \[0, 1\); got 1.0"):
        DnisSettings(held_out=1.0)
