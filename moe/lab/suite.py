"""A suite: arms of one base config, horizons, seeds, a learning-rate sweep, and what each comparison holds equal.

:func:`moe.lab.loading.load_suite` reads one from a file and checks it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
import pydantic.dataclasses

from moe.config import Changes, Config, ConfigError
from moe.config.parse import from_config_dict
from moe.lab import identity
from moe.lab.identity import Canonical
from moe.models import flops
from moe.system.fields import LARGEST, require

#: Sizes of a suite: minutes to hours on two CPU cores, or an accelerator pod.
SIZES = ("laptop", "pod")

#: Quantities that a comparison can hold equal, computed from the configs.
QUANTITIES = ("steps", "flops", "active_parameters", "total_parameters")

#: Evaluations and checkpoints of a run, evenly spaced; the last one is at the last step.
EVALUATIONS = 8
#: Largest difference between the shares of assignments that two arms drop in training, unless a suite explains it.
MAX_DROP_DIFFERENCE = 0.02
#: Logged training rows of a run, evenly spaced.
LOGGED = 40


#: Seed of a run's data order and initialisation.
Seed = Annotated[int, pydantic.Field(strict=True, ge=0, le=LARGEST)]
#: Fields must have their declared types; a file with others is refused with a one-sentence error.
_CONFIG = pydantic.ConfigDict(arbitrary_types_allowed=True, extra="forbid")

#: Names of arms, which are also used in file names.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}")


@pydantic.dataclasses.dataclass(frozen=True, config=_CONFIG)
class Variant:
    """One arm.

    Attributes:
        overrides: config field ("model.moe.gate") → value.
        starts_from: arm whose last checkpoint, of the same horizon and seed, initialises this one.
        teacher: arm whose last checkpoint, of the same horizon and seed, teaches this one.
        seed_offset: added to the seed, for other data and other draws than those of ``starts_from``.
        rate_scale: factor on the learning rate.
        rate_from: arm whose learning rate, and whose sweep, this one shares; empty: its own.
        probes: measurements on the model trained for the longest horizon (:data:`moe.lab.running.probes.PROBES`).
        note: one sentence for the report.
    """

    overrides: Mapping[str, Any]
    starts_from: str = ""
    teacher: str = ""
    seed_offset: int = 0
    rate_scale: float = 1.0
    rate_from: str = ""
    probes: tuple[str, ...] = ()
    note: str = ""


@pydantic.dataclasses.dataclass(frozen=True, config=_CONFIG)
class Comparison:
    """Arms against a baseline.

    Attributes:
        baseline: arm that is subtracted from the others.
        variants: the other arms.
        equal: names from :data:`QUANTITIES` that all arms share.
        tolerance: largest relative difference that counts as equal; a router adds a few parameters.
        whole: one of ``variants``: the other arms' differences are also given as a share of its difference to the
            baseline; empty: none.
    """

    baseline: str
    variants: tuple[str, ...]
    equal: tuple[str, ...]
    tolerance: float = 0.04
    whole: str = ""


@pydantic.dataclasses.dataclass(frozen=True, config=_CONFIG)
class Sweep:
    """Learning rates tried for every arm on seeds that no comparison uses, separately at each horizon.

    The best rate falls with the number of tokens (Bjorck et al. 2024, arXiv 2409.19913), so that the best rate of one
    horizon says little about another's. The base config's rate is tried first, then its neighbours, and so on until the
    best one has a worse one on both sides.

    Attributes:
        learning_rates: peak rates in ascending order; the base config's rate is one of them.
        seeds: reserved seeds.
        horizons: numbers of steps at which the sweep is run; empty: all of the suite.
    """

    learning_rates: tuple[float, ...]
    seeds: tuple[Seed, ...]
    horizons: tuple[int, ...] = ()

    def at(self, suite: Suite) -> tuple[int, ...]:
        """Horizons of the sweep."""
        return self.horizons or suite.steps


@pydantic.dataclasses.dataclass(frozen=True, config=_CONFIG)
class Suite:
    """A question and the runs that answer it.

    Attributes:
        name: file name of the suite.
        question: one sentence.
        base: config that every arm overrides.
        variants: arms by name.
        seeds: at least two; with fewer than three the report is marked as a trial.
        comparisons: by title.
        primary: domains whose mean held-out loss every comparison and claim is about; empty: all of the base config.
        horizons: numbers of steps, each a run with a full learning-rate schedule of its own; empty: the base config's.
        sweep: learning rates to try for every arm first.
        headline: arms that are run on all seeds before the other arms start; empty: all arms.
        experts: arm → number of experts, for a fitted law of loss against experts and tokens (:mod:`moe.lab.law`).
        sizes: arm → parameters of its model with one expert, which take the place of the tokens in that law.
        warmup_share: learning-rate warm-up as a share of the steps.
        heldout_rows: rows per domain whose losses are stored one by one, for the bootstrap over text; replaces the base
            config's ``data.heldout_rows``.
        dropping_differs: why arms that drop different shares of their assignments in training are compared; empty: the
            shares within a comparison may differ by at most :data:`MAX_DROP_DIFFERENCE`.
        domain_tokens: domain → tokens of its training text, for the number of epochs in the report.
        token_bytes: domain → bytes of a token of its held-out rows, for bits per byte in the report.
        reserved: seeds on which other suites chose something, such as a learning rate, or that a replication keeps for
            itself; no comparison uses them.
        unseen: embedded domains that no run is trained on, evaluated beside the others; never part of the primary loss.
        fixed_seeds: leave out other seeds, for which other suites may have run the same arms: adding seeds to the
            registered ones would be a choice made after seeing their results.
        whole_batch_groups: one routing group per batch, so that expert capacity is shared by all its tokens, unless
            the base config or an arm sets ``model.moe.group_size``; a mesh of several devices needs that.
        registered: the suite's own seeds, where :func:`moe.lab.loading.with_seeds` has replaced them; empty: ``seeds``.
    """

    name: str
    question: str
    base: Changes
    variants: Mapping[str, Variant]
    seeds: tuple[Seed, ...]
    comparisons: Mapping[str, Comparison]
    primary: tuple[str, ...] = ()
    horizons: tuple[int, ...] = ()
    sweep: Sweep | None = None
    headline: tuple[str, ...] = ()
    experts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    warmup_share: float = 0.1
    heldout_rows: Annotated[int, pydantic.Field(strict=True, ge=1)] = 256
    dropping_differs: str = ""
    domain_tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    token_bytes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reserved: tuple[Seed, ...] = ()
    unseen: tuple[str, ...] = ()
    fixed_seeds: bool = False
    whole_batch_groups: bool = True
    registered: tuple[Seed, ...] = ()

    @functools.cached_property
    def _forms(self) -> dict[tuple[str, int, float], Canonical]:
        """Cache of canonical forms at seed 0, which are needed many times."""
        return {}

    @functools.cached_property
    def _configs(self) -> dict[tuple[Any, ...], Config]:
        """Cache of configs by the arguments of :meth:`config`; each takes milliseconds and is needed many times."""
        return {}

    @property
    def steps(self) -> tuple[int, ...]:
        """Horizons in ascending order."""
        return tuple(sorted(self.horizons)) or (self.base.train.num_steps,)

    @property
    def registered_seeds(self) -> tuple[int, ...]:
        """Seeds that a verdict needs, whichever of them this command runs."""
        return self.registered or self.seeds

    @property
    def reserved_seeds(self) -> frozenset[int]:
        """Seeds that no comparison uses: those of the sweep too."""
        return frozenset((*self.reserved, *(self.sweep.seeds if self.sweep else ())))

    @property
    def longest(self) -> int:
        """Steps of the longest horizon, which the verdicts are about."""
        return self.steps[-1]

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the base config, used where no sweep has been run."""
        return float(self.base.optimizer.learning_rate)

    @property
    def primary_domains(self) -> tuple[str, ...]:
        """Domains of the primary loss; empty: all that the text has."""
        return self.primary or tuple(self.base.data.domains)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step of the base config."""
        return self.base.train.batch_size * self.base.data.sequence_length

    def _schedule(self, steps: int) -> dict[str, int]:
        """Fields of the base config that the suite sets itself, for one horizon."""
        interval = max(steps // EVALUATIONS, 1)
        return {
            "train.num_steps": steps,
            "train.eval_every": interval,
            "train.save_every": interval,
            "train.keep_every": interval,
            "train.log_every": max(steps // LOGGED, 1),
            "optimizer.warmup_steps": max(round(self.warmup_share * steps), 1),
        }

    def replaced(self) -> dict[str, tuple[Any, int]]:
        """Fields that the base config sets and the suite replaces: name → (the base's value, the suite's)."""
        own = self._schedule(self.longest) | {"data.heldout_rows": self.heldout_rows}
        usual = Changes()
        found = {}
        for name, value in own.items():
            section, field = name.split(".")
            given = self.base[section][field]
            if given not in (value, usual[section][field]):
                found[name] = (given, value)
        return found

    def config(
        self,
        variant: str,
        seed: int = 0,
        *,
        steps: int | None = None,
        learning_rate: float | None = None,
        starts_from: str = "",
        teacher: str = "",
    ) -> Config:
        """The config of one run.

        Args:
            variant: name of an arm.
            seed: data order and initialisation.
            steps: horizon; None: the longest.
            learning_rate: peak rate before the arm's ``rate_scale``; None: the base config's.
            starts_from: workdir of the run that the arm's ``starts_from`` names.
            teacher: workdir of the run that the arm's ``teacher`` names.

        Raises:
            ConfigError: the arm's config is impossible.
        """
        steps = steps or self.longest
        rate = self.learning_rate if learning_rate is None else learning_rate
        point = (variant, seed, steps, rate, starts_from, teacher)
        if point not in self._configs:
            self._configs[point] = self._build(*point)
        return self._configs[point]

    def _build(
        self, variant: str, seed: int, steps: int, learning_rate: float, starts_from: str, teacher: str
    ) -> Config:
        chosen = self.variants[variant]
        schedule = self._schedule(steps) | {"optimizer.learning_rate": chosen.rate_scale * learning_rate}
        # Adapters need a start; without its workdir the arm's name stands for it, as no file is read here.
        start = starts_from or (chosen.starts_from if "lora.rank" in chosen.overrides else "")
        own = {"seed": seed + chosen.seed_offset, "start.checkpoint": start, "distill.teacher": teacher}
        if taken := sorted(chosen.overrides.keys() & (schedule.keys() | own.keys())):
            raise ConfigError(
                f"suite {self.name!r}, variant {variant!r}: {taken[0]} is set by the suite, through horizons, "
                "warmup_share, rate_scale, seed_offset, starts_from and teacher"
            )
        changes = self.base.copy()
        try:
            changes.update_from_flattened_dict({**schedule, **chosen.overrides, **own})
            is_sparse = changes.model.moe.gate.name != "none"
            if self.whole_batch_groups and is_sparse and not changes.model.moe.group_size:
                rows = changes.train.batch_size // changes.train.accumulation_steps
                changes.model.moe.group_size = rows * changes.data.sequence_length
            config = from_config_dict(changes)
            rampup = config.train.rampup_rows
            require(not rampup, "train.rampup_rows", rampup, "must be () in a suite, where equal steps read equal text")
            return config
        except (ConfigError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"suite {self.name!r}, variant {variant!r}: {' '.join(str(error).split())}") from error

    def form(
        self, variant: str, seed: int, *, steps: int, learning_rate: float, parents: Mapping[str, str]
    ) -> Canonical:
        """Canonical form of a run: what decides its training (:mod:`moe.lab.identity`) and its evaluation.

        Args:
            variant: name of an arm.
            seed: one of the suite's seeds.
            steps: horizon.
            learning_rate: peak rate before the arm's ``rate_scale``.
            parents: "starts_from" and "teacher" → hash of that run.
        """
        point = (variant, steps, learning_rate)
        if point not in self._forms:
            # With its parents: without them, the settings of the start and of distillation would be left out.
            start, teacher = (parents.get(role, "") for role in ("starts_from", "teacher"))
            config = self.config(variant, steps=steps, learning_rate=learning_rate, starts_from=start, teacher=teacher)
            unseen = dataclasses.replace(config.data, dataset="embedded", domains=self.unseen)
            evaluation = {"rows": self.heldout_rows, "unseen": identity.text_versions(unseen)}
            evaluation |= {"primary": list(self.primary)} if self.primary else {}
            self._forms[point] = identity.canonical(config) | {"evaluation": evaluation}
        roles = {"start": parents.get("starts_from"), "teacher": parents.get("teacher")}
        own = {"seed": seed + self.variants[variant].seed_offset} | {role: run for role, run in roles.items() if run}
        return self._forms[point] | own

    def run(self, variant: str, seed: int, *, steps: int, learning_rate: float, parents: Mapping[str, str]) -> str:
        """Hash of :meth:`form`, by which a run and its record are found."""
        return identity.digest(self.form(variant, seed, steps=steps, learning_rate=learning_rate, parents=parents))

    def costs(self, variant: str, steps: int | None = None) -> dict[str, float]:
        """Cost of one run by :data:`QUANTITIES`, computed from its config; FLOPs as if no assignment were dropped."""
        config = self.config(variant, steps=steps)
        total, active = flops.count_parameters(config.model)
        return {
            "steps": config.train.num_steps,
            "flops": flops.train_flops(config, config.train.num_steps),
            "active_parameters": active,
            "total_parameters": total,
        }
