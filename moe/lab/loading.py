"""Suites from files, and checks before anything is trained: impossible arms, comparisons that are not equal."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from moe.config import Config, ConfigError, load_python_file
from moe.config.registry import find_gate
from moe.data.corpora import DOMAINS
from moe.lab.schedule import PlannedRuns
from moe.lab.suite import NAME, QUANTITIES, SIZES, Comparison, Suite, Sweep, Variant
from moe.system.fields import exits_as_errors
from moe.system.foreign_files import first_sentence

#: Settings of the data that change neither the tokens of a step nor the held-out rows, on which differences between
#: arms are paired.
_NOT_TEXT = {"directory", "weights", "streams", "shuffle_window", "heldout_rows"}


def load_suites(folder: Path, names: Sequence[str], size: str, given: Suite | None = None) -> dict[str, Suite]:
    """Suites of a folder by name, each in the file NAME.py.

    Args:
        given: a suite that has been read already, perhaps with an argument or from a file of another name.

    Raises:
        ConfigError: see :func:`load_suite`.
    """
    known = {given.name: given} if given else {}
    return {name: known.get(name) or load_suite(str(folder / f"{name}.py"), size) for name in names}


def load_suite(path: str, size: str) -> Suite:
    """Read and check the suite of a file.

    Args:
        path: of a file with ``get_suite(size)``; or FILE.py:ARGUMENT of one with ``get_suite(size, argument)``.
        size: one of :data:`moe.lab.suite.SIZES`.

    Raises:
        ConfigError: no such file, no ``get_suite``, an impossible arm, or a comparison whose arms differ in what it
            claims to hold equal.
    """
    path, separator, argument = path.partition(".py:")
    path += ".py" if separator else ""
    if size not in SIZES:
        raise ConfigError(f"--size={size!r}: must be one of {', '.join(SIZES)}")
    if not Path(path).is_file():
        raise ConfigError(f"--suite={path}: no such file; suites are in configs/ablations/")
    try:
        with exits_as_errors():
            module = load_python_file(path)
            if not hasattr(module, "get_suite"):
                raise ConfigError(f"--suite={path}: has no get_suite(size)")
            suite = module.get_suite(size, *[argument] * bool(separator))
    except ConfigError:
        raise
    except Exception as error:  # errors of the file's own code, and fields of a wrong type
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, pydantic.ValidationError):
            reason = f"{error.title}: {first_sentence(error)}"
        raise ConfigError(f"--suite={path}: get_suite({size!r}) failed ({reason})") from error
    if not isinstance(suite, Suite):
        raise ConfigError(f"--suite={path}: get_suite({size!r}) must return a moe.lab.suite.Suite")
    check(suite)
    return suite


def with_seeds(suite: Suite, seeds: Sequence[int]) -> Suite:
    """The suite on other seeds; one is enough, for instance to divide a suite between machines.

    Verdicts still need all seeds of the suite as given.

    Raises:
        ConfigError: a seed is repeated, or reserved.
    """
    if len(set(seeds)) < len(seeds) or suite.reserved_seeds & set(seeds):
        none = f", and none of the reserved {sorted(suite.reserved_seeds)}" if suite.reserved_seeds else ""
        raise ConfigError(f"--seeds={','.join(map(str, seeds))}: must be different{none}")
    return dataclasses.replace(suite, seeds=tuple(seeds), registered=suite.registered_seeds)


def with_gate(suite: Suite, gate: str) -> tuple[Suite, tuple[str, str]]:
    """The suite with one more arm, of another gate, and the names of the arm that it is compared with and of this one.

    The arm has the model, experts and K of the baseline of the first comparison at equal total parameters, the same
    learning rate and seeds; everything else of the layer is the gate's own (:func:`moe.config.registry.find_layer`).

    Args:
        gate: ``model.moe.gate``, as ``module:object``.

    Raises:
        ConfigError: no such gate, no such comparison, or an arm that is not equal to its baseline.
    """
    sets_k = find_gate(gate).sets_k
    kept = ("num_experts", "d_ff", "dispatch", *["gate.k"] * sets_k)
    layers = {
        title: suite.variants[comparison.baseline]
        for title, comparison in suite.comparisons.items()
        if "total_parameters" in comparison.equal
        and suite.variants[comparison.baseline].overrides.get("model.moe.gate", "none") != "none"
    }
    if not layers:
        raise ConfigError(f"--gate={gate}: suite {suite.name!r} compares no MoE layers at equal total parameters")
    title, baseline = next(iter(layers.items()))
    comparison = suite.comparisons[title]
    own = {
        name: value
        for name, value in baseline.overrides.items()
        if not name.startswith("model.moe.") or name.removeprefix("model.moe.") in kept
    }
    name = re.sub(r"[^A-Za-z0-9_.-]", ".", gate)
    if name in suite.variants:
        raise ConfigError(f"--gate={gate}: suite {suite.name!r} has an arm {name!r} already; train it with --arms")
    arm = Variant(
        {**own, "model.moe.gate": gate}, rate_from=baseline.rate_from or comparison.baseline, note=f"gate {gate}"
    )
    wider = dataclasses.replace(comparison, variants=(*comparison.variants, name))
    added = dataclasses.replace(
        suite,
        variants={**suite.variants, name: arm},
        comparisons={**suite.comparisons, title: wider},
        dropping_differs=suite.dropping_differs or "an arm was added by --gate",
    )
    check(added)
    return added, (comparison.baseline, name)


def check(suite: Suite) -> None:
    """Refuse a suite that cannot be run, or whose arms cannot be compared as it states.

    Raises:
        ConfigError: see :func:`load_suite`.
    """
    _check_names_and_steps(suite)
    for name in suite.headline:
        _known(suite, name, "headline")
    for name in suite.experts:
        _known(suite, name, "experts")
    for name in suite.variants:
        _check_parents(suite, name)
    if suite.sweep is not None:
        _check_sweep(suite, suite.sweep)
    costs = {name: suite.costs(name) for name in suite.variants}
    for name, comparison in suite.comparisons.items():
        _check_comparison(suite, name, comparison, costs)
    _check_different(suite)


def _check_names_and_steps(suite: Suite) -> None:
    where = f"suite {suite.name!r}"
    for name in suite.variants:
        if not NAME.fullmatch(name):
            raise ConfigError(f"{where}, variant {name!r}: must be at most 60 letters, digits, '_', '-' and '.'")
    if not NAME.fullmatch(suite.name):
        raise ConfigError(f"{where}: must be at most 60 letters, digits, '_', '-' and '.'")
    if unknown := sorted(set(suite.unseen) - {name for name, domain in DOMAINS.items() if domain.unseen}):
        raise ConfigError(f"{where}, unseen={unknown}: must be embedded domains that have only held-out text")
    domains = tuple(suite.base.data.domains)
    if domains and (unknown := sorted(set(suite.primary) - set(domains))):
        raise ConfigError(f"{where}, primary={unknown}: must be among data.domains {domains}")
    if len(suite.seeds) < 2 or len(set(suite.seeds)) < len(suite.seeds):
        raise ConfigError(f"{where}, seeds={suite.seeds}: must be at least two different seeds; a result needs five")
    if suite.reserved_seeds & set(suite.seeds):
        raise ConfigError(f"{where}, seeds={suite.seeds}: must be none of the reserved {sorted(suite.reserved_seeds)}")
    if any(steps < 1 for steps in suite.steps) or len(set(suite.steps)) < len(suite.steps):
        raise ConfigError(f"{where}, horizons={suite.horizons}: must be different positive numbers of steps")


def _check_parents(suite: Suite, name: str) -> None:
    """Refuse an arm that depends on an arm that is unknown, or that itself depends on another."""
    variant, where = suite.variants[name], f"variant {name!r}"
    for parent in filter(None, (variant.starts_from, variant.teacher)):
        _known(suite, parent, where)
        grandparent = suite.variants[parent]
        if grandparent.starts_from or grandparent.teacher:
            raise ConfigError(f"suite {suite.name!r}, {where}: {parent!r} itself starts from another run")
    if variant.rate_from:
        _known(suite, variant.rate_from, where)
        if suite.variants[variant.rate_from].rate_from:
            raise ConfigError(f"suite {suite.name!r}, {where}: {variant.rate_from!r} itself takes another arm's rate")


def _known(suite: Suite, name: str, where: str) -> None:
    if name not in suite.variants:
        raise ConfigError(f"suite {suite.name!r}, {where}: no variant {name!r}; there are {sorted(suite.variants)}")


def _check_sweep(suite: Suite, sweep: Sweep) -> None:
    where, rates = f"suite {suite.name!r}, sweep", sweep.learning_rates
    if len(rates) < 2 or list(rates) != sorted(set(rates)):
        raise ConfigError(f"{where}, learning_rates={rates}: must be at least two different rates in ascending order")
    if not rates[0] > 0:
        raise ConfigError(f"{where}, learning_rates={rates}: must be positive")
    if suite.learning_rate not in rates:
        raise ConfigError(f"{where}, learning_rates={rates}: must contain the base config's {suite.learning_rate}")
    if not sweep.seeds:
        raise ConfigError(f"{where}, seeds={sweep.seeds}: must be at least one")
    if other := sorted(set(sweep.horizons) - set(suite.steps)):
        raise ConfigError(f"{where}, horizons={other}: must be among the suite's {suite.steps}")


def _check_comparison(suite: Suite, name: str, comparison: Comparison, costs: dict[str, dict[str, float]]) -> None:
    where = f"comparison {name!r}"
    arms = (comparison.baseline, *comparison.variants)
    for arm in arms:
        _known(suite, arm, where)
    if len(arms) < 2 or len(set(arms)) < len(arms):
        raise ConfigError(
            f"suite {suite.name!r}, {where}, variants={comparison.variants}: must be at least one arm, all different, "
            f"and not the baseline {comparison.baseline!r}"
        )
    if comparison.whole and comparison.whole not in comparison.variants:
        raise ConfigError(f"suite {suite.name!r}, {where}, whole={comparison.whole!r}: must be one of its variants")
    _check_text(suite, where, arms)
    for quantity in comparison.equal:
        if quantity not in QUANTITIES:
            raise ConfigError(f"suite {suite.name!r}, {where}: {quantity!r} is not one of {QUANTITIES}")
        base = costs[comparison.baseline][quantity]
        for arm in comparison.variants:
            ratio = costs[arm][quantity] / base
            if abs(ratio - 1) > comparison.tolerance:
                raise ConfigError(
                    f"suite {suite.name!r}, {where}: {arm!r} has {ratio:.3f} times the {quantity} of "
                    f"{comparison.baseline!r}, which is not equal within {comparison.tolerance:.0%}"
                )


def _check_text(suite: Suite, where: str, arms: Sequence[str]) -> None:
    """Refuse to compare arms that read other tokens per step, or are evaluated on other rows."""
    base, *others = arms
    expected = _text_settings(suite.config(base))
    for arm in others:
        for name, value in _text_settings(suite.config(arm)).items():
            if value != expected[name]:
                raise ConfigError(
                    f"suite {suite.name!r}, {where}: {arm!r} has {name}={value!r} and {base!r} {expected[name]!r}; "
                    "compared arms must read, and be evaluated on, the same text"
                )


def _text_settings(config: Config) -> dict[str, Any]:
    data = {f"data.{name}": value for name, value in vars(config.data).items() if name not in _NOT_TEXT}
    return data | {"train.batch_size": config.train.batch_size, "model.vocab_size": config.model.vocab_size}


def _check_different(suite: Suite) -> None:
    """Refuse two arms that would be one run, whose difference would be reported as 0, or one rule under two names of a
    gate, whose difference would be that of rounding."""
    plan = PlannedRuns(suite, [])
    arms = {}
    rules = {}
    for name, variant in suite.variants.items():
        # Arms of equal settings still differ where their learning rates come from different sweeps.
        sources = (name, variant.rate_from or name) if suite.sweep else (name,)
        runs = tuple(plan.run(plan.key(arm, suite.longest, suite.seeds[0])) for arm in sources)
        if (other := arms.setdefault(runs, name)) != name:
            raise ConfigError(
                f"suite {suite.name!r}, variants {other!r} and {name!r}: differ in nothing that changes a result by "
                "more than rounding, so they would be one run"
            )
        rule = (_without_name(suite, name), sources[1:])
        if suite.config(name).model.moe.gate is not None and (other := rules.setdefault(rule, name)) != name:
            raise ConfigError(
                f"suite {suite.name!r}, variants {other!r} and {name!r}: are the same rule under two names of a gate, "
                "so they would differ by rounding alone"
            )


def _without_name(suite: Suite, name: str) -> str:
    """Identity of an arm with the gate's fields in the place of its name."""
    variant, gate = suite.variants[name], suite.config(name).model.moe.gate
    parents = {"starts_from": variant.starts_from, "teacher": variant.teacher}
    form = suite.form(
        name,
        suite.seeds[0],
        steps=suite.longest,
        learning_rate=suite.learning_rate,
        parents={role: arm for role, arm in parents.items() if arm},  # whose names stand for their runs
    )
    fields = gate and dataclasses.replace(gate, name="")
    return repr((fields, {**form, "gates": ""}))
