"""What an ablation compares: variants of one base config, seeds, and what is held equal between them.

In: a file of ``configs/ablations/`` with ``get_suite(size)``, or its path. Out: a :class:`Suite` whose configs are
resolved and valid, and whose comparisons are as equal as they say; anything else is a :class:`moe.config.ConfigError`
before a run starts.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from moe.config import Config, ConfigError
from moe.models import flops
from moe.routing.resolve import from_config_dict

#: How large a suite can be: for two CPU cores in minutes, or for an accelerator pod.
SIZES = ("laptop", "pod")

#: What a comparison can hold equal. ``wall_time`` is of the runs, not of the configs: every run of the comparison is
#: read at the longest time that all have reached.
QUANTITIES = ("steps", "flops", "active_parameters", "total_parameters", "wall_time")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One arm.

    Attributes:
        overrides: field of the config ("model.moe.gate") → value.
        starts_from: a variant whose last checkpoint, of the same seed, this one starts from.
        teacher: a variant whose last checkpoint, of the same seed, teaches this one.
        seed_offset: added to the seed: other data and other draws than those of the variant it starts from.
        probes: what is measured on the trained model (:data:`moe.lab.probes.PROBES`).
        note: a sentence for the report.
    """

    overrides: Mapping[str, Any]
    starts_from: str = ""
    teacher: str = ""
    seed_offset: int = 0
    probes: tuple[str, ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Arms beside a baseline.

    Attributes:
        baseline: the variant that the others are subtracted from.
        variants: the others.
        equal: of :data:`QUANTITIES`; checked for all but wall_time.
        tolerance: largest relative difference that counts as equal: a router is a few parameters more.
    """

    baseline: str
    variants: tuple[str, ...]
    equal: tuple[str, ...]
    tolerance: float = 0.04


@dataclasses.dataclass(frozen=True)
class Suite:
    """A question, and the runs that answer it.

    Attributes:
        question: in a sentence.
        base: the config that every variant overrides.
        variants: by name.
        seeds: of every variant; at least three, so that a difference has an interval.
        comparisons: by name.
        primary: domains whose mean held-out loss every comparison and claim is about; fixed before the runs.
    """

    name: str
    question: str
    base: ml_collections.ConfigDict
    variants: Mapping[str, Variant]
    seeds: tuple[int, ...]
    comparisons: Mapping[str, Comparison]
    primary: tuple[str, ...]

    def config(self, variant: str, seed: int = 0, *, starts_from: str = "", teacher: str = "") -> Config:
        """Of one run.

        Args:
            variant: a name in ``variants``.
            seed: of ``seeds``.
            starts_from: workdir of the run that the variant's ``starts_from`` names.
            teacher: the same, of its ``teacher``.

        Raises:
            ConfigError: the variant's config is impossible.
        """
        chosen = self.variants[variant]
        tree = self.base.copy_and_resolve_references()
        own = {"seed": seed + chosen.seed_offset, "start.checkpoint": starts_from, "distill.teacher": teacher}
        try:
            tree.update_from_flattened_dict({**chosen.overrides, **own})
            return from_config_dict(tree)
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"suite {self.name!r}, variant {variant!r}: {' '.join(str(error).split())}") from error

    def costs(self, variant: str) -> dict[str, float]:
        """What the variant's run costs, by :data:`QUANTITIES` without wall_time: computed from the model."""
        config = self.config(variant)
        total, active = flops.count_parameters(config.model)
        tokens = config.train.num_steps * config.train.batch_size * config.data.sequence_length
        per_token = flops.train_flops_per_token(config.model, config.data.sequence_length)
        return {
            "steps": config.train.num_steps,
            "flops": per_token * tokens,
            "active_parameters": active,
            "total_parameters": total,
        }


def load_suite(path: str, size: str) -> Suite:
    """Reads a suite and checks it.

    Raises:
        ConfigError: no such file, no ``get_suite``, an impossible variant, or a comparison that is not equal in what
            it claims to be.
    """
    if size not in SIZES:
        raise ConfigError(f"--size={size!r}: must be one of {', '.join(SIZES)}")
    if not Path(path).is_file():
        raise ConfigError(f"--suite={path}: no such file; suites are in configs/ablations/")
    spec = importlib.util.spec_from_file_location(f"suite_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_suite"):
        raise ConfigError(f"--suite={path}: has no get_suite(size)")
    suite = module.get_suite(size)
    check(suite)
    return suite


def check(suite: Suite) -> None:
    """Refuses a suite that cannot be run or compared as it says.

    Raises:
        ConfigError: as in :func:`load_suite`.
    """

    def known(name: str, where: str) -> None:
        if name not in suite.variants:
            raise ConfigError(f"suite {suite.name!r}, {where}: no variant {name!r}; there are {sorted(suite.variants)}")

    if len(suite.seeds) < 3 or len(set(suite.seeds)) < len(suite.seeds):
        raise ConfigError(f"suite {suite.name!r}, seeds={suite.seeds}: at least three different ones")
    for name, variant in suite.variants.items():
        for parent in filter(None, (variant.starts_from, variant.teacher)):
            known(parent, f"variant {name!r}")
            grandparent = suite.variants[parent]
            if grandparent.starts_from or grandparent.teacher:
                raise ConfigError(f"suite {suite.name!r}, variant {name!r}: {parent!r} itself starts from another run")
    costs = {name: suite.costs(name) for name in suite.variants}
    for name, comparison in suite.comparisons.items():
        where = f"comparison {name!r}"
        for arm in (comparison.baseline, *comparison.variants):
            known(arm, where)
        for quantity in comparison.equal:
            if quantity not in QUANTITIES:
                raise ConfigError(f"suite {suite.name!r}, {where}: {quantity!r} is not one of {QUANTITIES}")
            if quantity == "wall_time":
                continue
            base = costs[comparison.baseline][quantity]
            for arm in comparison.variants:
                ratio = costs[arm][quantity] / base
                if abs(ratio - 1) > comparison.tolerance:
                    raise ConfigError(
                        f"suite {suite.name!r}, {where}: {arm!r} has {ratio:.3f} times the {quantity} of "
                        f"{comparison.baseline!r}, which is not equal within {comparison.tolerance:.0%}"
                    )
