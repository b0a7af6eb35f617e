"""Samplers of a study: any of Optuna's by name, seeded per trial, and OptEmbed's evolution as one of them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from recsys_embed.errors import ConfigError, unknown_name
from recsys_embed.search.evolution import Candidate, Evolution, WidthSpace, next_generation

FLOAT_LEVELS = 16
"""Values that the evolution gives a continuous parameter."""
_GENERATION = "evolution:"
Distributions = Mapping[str, BaseDistribution]


def sampler_names() -> dict[str, str]:
    """Optuna's samplers by the names that ``--sampler`` takes; ``evolution`` is this module's.

    >>> sampler_names()["nsgaii"], sampler_names()["tpe"]
    ('NSGAIISampler', 'TPESampler')
    """
    found = [n for n in dir(optuna.samplers) if n.endswith("Sampler") and not n.startswith("Base")]
    return {n.removesuffix("Sampler").lower(): n for n in found}


def make_sampler(
    name: str, space: Distributions, seed: int, trials: int, args: Mapping[str, Any] | None = None
) -> optuna.samplers.BaseSampler:
    """A sampler whose draws depend only on the seed, the trial's number and earlier trials.

    Args:
        name: ``evolution`` or one of Optuna's, e.g. ``tpe``, ``nsgaii``, ``random``; ``NSGA-II`` means the same.
        space: distributions of all parameters.
        seed: of all draws.
        trials: of the whole study, from which the genetic ones take the size of a population.
        args: further arguments of the sampler.

    Raises:
        UnknownNameError: no such sampler.
        ConfigError: arguments that it does not take.
    """
    key, args = name.lower().replace("-", "").replace("_", ""), dict(args or {})
    known = sampler_names()
    if key == "evolution":
        return EvolutionSampler(space, Evolution(**{"population": _population(trials), **args}), seed=seed)
    if key not in known:
        raise unknown_name("sampler", name, {*known, "evolution"})
    cls = getattr(optuna.samplers, known[key])
    if key.startswith("nsga"):
        args = {"population_size": _population(trials), **args}

    def build(seed: int) -> optuna.samplers.BaseSampler:
        try:
            with warnings.catch_warnings():  # Optuna calls some of them experimental at every trial
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return _built(seed)
        except (TypeError, ValueError, ImportError) as e:
            raise ConfigError(f"sampler {name!r} cannot be made: {e}; give its arguments as search.sampler_args") from e

    def _built(seed: int) -> optuna.samplers.BaseSampler:
        made: optuna.samplers.BaseSampler = cls(**({"seed": seed} if key != "partialfixed" else {}), **args)
        return made

    build(seed)
    # A quasi-random sequence needs one seed; Optuna derives the position in it from the number of trials.
    return build(seed) if key == "qmc" else SeededPerTrial(build, seed)


def _population(trials: int) -> int:
    return max(4, min(50, trials // 4))


class SeededPerTrial(optuna.samplers.BaseSampler):
    """Wraps a sampler, which is rebuilt for each trial with a seed of its own.

    A resumed study therefore draws what an uninterrupted one would, and workers never draw the same points.

    Args:
        build: a sampler from a seed.
        seed: of all trials.
    """

    def __init__(self, build: Callable[[int], optuna.samplers.BaseSampler], seed: int) -> None:
        self._build, self._seed = build, seed
        self._inner = build(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        text = hashlib.sha256(f"{self._seed}/{trial.number}".encode()).digest()
        self._inner = self._build(int.from_bytes(text[:4], "little"))
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._inner.after_trial(study, trial, state, values)


class EvolutionSampler(optuna.samplers.BaseSampler):
    """OptEmbed's evolution (:func:`recsys_embed.search.evolve`) as a sampler, for widths or any other parameters.

    With integer parameters from 1 to one number, one objective and one worker it tries the candidates of ``evolve`` in
    the same order. Generations are kept with the study, so that stopped studies and several workers go on with them;
    a generation made while trials are running knows those that are finished. With several objectives a candidate's
    score is minus the number of trials that are better in all.

    Args:
        space: distributions of all parameters.
        options: of the evolution; its ``generations`` are as many as the study has trials for.
        seed: of all draws.

    >>> study = optuna.create_study(sampler=EvolutionSampler({"w": IntDistribution(1, 8)}), direction="maximize")
    >>> study.optimize(lambda trial: -abs(trial.suggest_int("w", 1, 8) - 5), 8)
    >>> study.best_params
    {'w': 5}
    """

    def __init__(self, space: Distributions, options: Evolution | None = None, *, seed: int = 0) -> None:
        self._dists = dict(space)
        self._options = options or Evolution()
        self._seed = seed
        self._levels = {name: _levels(name, d) for name, d in self._dists.items()}
        self._space = WidthSpace(len(self._dists), max(map(len, self._levels.values())))
        self._random = optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._dists)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        before = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        place = sum(not t.system_attrs.get("fixed_params") for t in before)
        attrs, made, number = study.user_attrs, 0, 0
        while True:
            kept = attrs.get(f"{_GENERATION}{number}")
            if kept is None:
                fresh = next_generation(
                    replace(self._options, keep=0), self._space, self._seed, number, self._scores(study, before)
                )
                kept = [list(c) for c in fresh]
                if not kept:  # every candidate that mutation and crossover reach has been tried
                    return {}
                study.set_user_attr(f"{_GENERATION}{number}", kept)
            if place < made + len(kept):
                return self._params(tuple(kept[place - made]))
            made, number = made + len(kept), number + 1

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def _params(self, candidate: Candidate) -> dict[str, Any]:
        most = self._space.most
        return {
            name: levels[(gene - 1) * len(levels) // most]
            for gene, (name, levels) in zip(candidate, self._levels.items(), strict=True)
        }

    def _candidate(self, params: Mapping[str, Any]) -> Candidate | None:
        """The first gene that stands for each value: the nearest level of a number."""
        if set(params) != set(self._levels):
            return None
        genes = []
        for name, levels in self._levels.items():
            value = params[name]
            if value not in levels:
                value = min(levels, key=lambda v: abs(v - value))
            genes.append(-(-levels.index(value) * self._space.most // len(levels)) + 1)
        return tuple(genes)

    def _scores(self, study: optuna.Study, trials: list[FrozenTrial]) -> dict[Candidate, float]:
        signs = [1.0 if d == optuna.study.StudyDirection.MAXIMIZE else -1.0 for d in study.directions]
        done = [t for t in trials if t.state == TrialState.COMPLETE]
        values = [tuple(s * v for s, v in zip(signs, t.values, strict=True)) for t in done]
        scores: dict[Candidate, float] = {}
        for trial, mine in zip(done, values, strict=True):
            candidate = self._candidate(trial.params)
            if candidate is None:
                continue
            better = sum(v != mine and all(a >= b for a, b in zip(v, mine, strict=True)) for v in values)
            scores[candidate] = mine[0] if len(mine) == 1 else -float(better)
        return scores


def _levels(name: str, distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution):
        low, high = distribution.low, distribution.high
        steps = [i / (FLOAT_LEVELS - 1) for i in range(FLOAT_LEVELS)]
        if distribution.log:
            return [low, *(low * (high / low) ** s for s in steps[1:-1]), high]
        return [low, *(low + (high - low) * s for s in steps[1:-1]), high]
    raise ConfigError(f"the evolution cannot vary {name!r}, a {type(distribution).__name__}")
