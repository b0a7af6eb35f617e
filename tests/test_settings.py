"""The engine that checks settings: what annotations and bounds allow, the sentences, and reading from plain values."""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed.errors import ConfigError, UnknownNameError
from recsys_embed.utils.settings import Settings, param, wrong_settings


@dataclass(frozen=True)
class Example(Settings):
    count: int = param(1, low=1, high=9)
    rate: float = param(0.5, above=0, below=1)
    limit: int | None = param(None, low=2)
    mode: Literal["fast", "slow"] = "fast"
    norm: Literal[1, 2] = 1
    maybe: Literal["a", "b"] | None = None
    flag: bool = False
    name: str = "x"
    sizes: tuple[int, ...] = param((4, 2), low=1)
    extra: tuple[float, ...] = param((), low=0)
    pair: tuple[float, float] = param((0.0, 0.5), low=0, below=1)
    modes: tuple[Literal["fast", "slow"], ...] = ("fast",)
    args: dict[str, Any] = field(default_factory=dict)
    budget: str | int | None = param(None, low=0)
    place: Path | None = None
    share: Fraction = param(Fraction(1, 2), low=0, high=1)

    def conflicts(self) -> list[str]:
        return ["`flag` needs a `limit`"] if self.flag and self.limit is None else []


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"count": 0}, "`count` must be an integer in [1, 9]; got 0"),
        ({"count": True}, "`count` must be an integer in [1, 9]; got True"),
        ({"count": 2.0}, "`count` must be an integer in [1, 9]; got 2.0"),
        ({"count": None}, "`count` must be an integer in [1, 9]; got None"),
        ({"rate": 0}, "`rate` must be a finite number in (0, 1); got 0"),
        ({"rate": 1.0}, "`rate` must be a finite number in (0, 1); got 1.0"),
        ({"rate": math.nan}, "`rate` must be a finite number in (0, 1); got nan"),
        ({"rate": "0.5"}, "`rate` must be a finite number in (0, 1); got '0.5'"),
        ({"limit": 1}, "`limit` must be an integer >= 2, or None; got 1"),
        ({"mode": "slov"}, "`mode` must be one of fast, slow; got 'slov'"),
        ({"mode": None}, "`mode` must be one of fast, slow; got None"),
        ({"mode": np.zeros(2)}, "`mode` must be one of fast, slow; got array([0., 0.])"),
        ({"norm": True}, "`norm` must be one of 1, 2; got True"),
        ({"maybe": "c"}, "`maybe` must be one of a, b, or None; got 'c'"),
        ({"flag": 1}, "`flag` must be true or false; got 1"),
        ({"name": b"x"}, "`name` must be text; got b'x'"),
        ({"sizes": ()}, "`sizes` must be a non-empty list of integers >= 1; got ()"),
        ({"sizes": (3, 0)}, "`sizes` must be a non-empty list of integers >= 1; got (3, 0)"),
        ({"sizes": "34"}, "`sizes` must be a non-empty list of integers >= 1; got '34'"),
        ({"extra": (math.inf,)}, "`extra` must be a list of finite numbers >= 0; got (inf,)"),
        ({"pair": (0.1,)}, "`pair` must be a list of 2 finite numbers in [0, 1); got (0.1,)"),
        ({"modes": ("fast", "x")}, "`modes` must be a non-empty list of values among fast, slow; got ('fast', 'x')"),
        ({"args": {1: 2}}, "`args` must be values by name; got {1: 2}"),
        ({"budget": 1.5}, "`budget` must be text or an integer >= 0, or None; got 1.5"),
        ({"place": "here"}, "`place` must be a path, or None; got 'here'"),
        ({"share": 0.5}, "`share` must be a Fraction in [0, 1]; got 0.5"),
        ({"share": Fraction(3, 2)}, "`share` must be a Fraction in [0, 1]; got Fraction(3, 2)"),
        ({"flag": True}, "`flag` needs a `limit`"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_sentence(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        Example(**wrong)
    assert str(error.value) == f"{sentence} (Example)"


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)3 faults in Example:.*`count`.*`rate`.*`mode`"):
        Example(count=0, rate=2.0, mode="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"(?s)2 faults in Example:.*`count` must.*`flag` needs"):
        Example(count=0, flag=True)
    with pytest.raises(ConfigError, match=r"^`limit` must"):
        Example(limit=0, flag=True)
    with pytest.raises(UnknownNameError, match=r"(?s)2 faults.*'cout'; did you mean 'count'.*'rat'; did you mean"):
        Example.from_dict({"cout": 1, "rat": 0.5})
    with pytest.raises(UnknownNameError, match="did you mean 'count'"):
        Example().replace(cont=1)


@given(st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(), st.lists(st.integers())))
def test_a_value_is_taken_or_refused_as_plain_comparisons_say(value: Any) -> None:
    taken = {f: f not in wrong_settings(_raw(**{f: value})) for f in _NAMES}
    whole = type(value) is int
    number = whole or (type(value) is float and math.isfinite(value))
    assert taken["count"] == (whole and value in range(1, 10))
    assert taken["rate"] == (number and 0 < value < 1)
    assert taken["limit"] == (value is None or (whole and value >= 2))
    assert taken["flag"] == (value is True or value is False)
    assert taken["budget"] == (value is None or isinstance(value, str) or (whole and value >= 0))
    assert taken["sizes"] == (isinstance(value, list) and len(value) > 0 and min(value) >= 1)


_NAMES = ("count", "rate", "limit", "flag", "budget", "sizes")


def _raw(**values: Any) -> Example:
    """An instance that nothing has checked."""
    one = object.__new__(Example)
    one.__dict__.update({**Example().__dict__, **values})
    return one


def test_lists_ranges_and_scalars_of_numpy_become_plain() -> None:
    one = Example(count=np.int64(3), sizes=[np.int32(5), 6])  # type: ignore[arg-type]
    assert (one.sizes, type(one.count), hash(one.sizes)) == ((5, 6), int, hash((5, 6)))
    two = Example(rate=np.float32(0.25), flag=np.bool_(True), limit=3, sizes=range(1, 4), extra=[np.float16(1.5)])  # type: ignore[arg-type]
    assert (two.rate, type(two.rate), two.flag, two.sizes, two.extra) == (0.25, float, True, (1, 2, 3), (1.5,))
    assert set(wrong_settings(_raw(count=np.float32(1), rate=np.bool_(True), flag=np.int64(1)))) == {
        "count",
        "rate",
        "flag",
    }
    read = Example.from_dict({"share": Fraction(0), "extra": [1, 2.5], "pair": [0, 0.5]})
    assert Example.from_dict({**read.to_dict()}) == read
