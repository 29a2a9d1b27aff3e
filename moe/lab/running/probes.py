"""Measurements on a trained model beside its loss, by name (:data:`PROBES`).

Each maps a run to quantity → value; a value of one MoE layer is named ``quantity@layer``, numbered among MoE layers.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe.analysis import probes
from moe.analysis.analyse import measure
from moe.analysis.measures import most_frequent_partner
from moe.analysis.record import Recorder
from moe.checkpoints import parameters
from moe.config import ConfigError
from moe.data import pipeline
from moe.lab.results import checkpoint_steps
from moe.lab.running.heldout import mixed_rows
from moe.training.evaluation import Heldout, token_bytes
from moe.training.step import Program

MIXED = "mixed"
SHUFFLES = 20  # permutations of a null distribution
EARLY = 0.25  # share of training after which saturation is measured
MASKED_SHARES = (0.0625, 0.125, 0.1875, 0.25)  # of the experts, each token's most probable ones
MASKED_SHARE = 0.125  # the one that a claim is about
EVAL_FACTORS = (0.75, 1.0, 1.25, 2.0, 4.0)
TOKENS = 20_000  # held-out tokens of each domain, and of whole Python documents, whose routing is measured


class Model:
    """Compiled programs and held-out data that all runs of one arm share.

    Attributes:
        mixed: held-out batches of the primary domains mixed as in training, for losses: under a capacity, a batch of
            one domain would overflow experts that training never overflows.
    """

    def __init__(self, program: Program, primary: tuple[str, ...], rows_per_domain: int):
        """``program`` may be of any run of the arm; ``primary`` are the domains of the loss."""
        self.program = program
        config = program.config
        self.prepared = pipeline.prepare_run(config, progress=lambda _: None)
        mixed = mixed_rows(self.prepared, config, rows_per_domain, primary)
        self.mixed = Heldout({MIXED: mixed.batches}, token_bytes(program, self.prepared))
        self.probe = functools.cache(lambda make, *arguments: make(config, program.mesh, *arguments))
        self.recorder = functools.cache(lambda: Recorder(program))


class Trained:
    """One run's variables, by checkpoint."""

    def __init__(self, directory: Path, model: Model):
        """``directory`` is the run's workdir."""
        self.model = model
        self._directory = directory
        self.variables = functools.cache(self._read)
        self.measured = functools.cache(self._measure)

    @property
    def steps(self) -> list[int]:
        """Steps of the run's checkpoints, without those saved at a stop."""
        return checkpoint_steps(self._directory, self.model.program.config.train.save_every)

    def _read(self, step: int | None = None) -> dict[str, Any]:
        program = self.model.program
        return parameters.read_variables(str(self._directory), program.config.model, mesh=program.mesh, step=step)

    def _measure(self) -> dict[str, Any]:
        """Summary of the routing over training (:func:`moe.analysis.analyse.measure`)."""
        earlier = {step: functools.partial(self._read, step) for step in self.steps[:-1]}
        return measure(
            self.model.recorder(),
            self.variables(),
            self.model.prepared,
            tokens=TOKENS,
            shuffles=SHUFFLES,
            seed=0,
            step=self.steps[-1],
            earlier=earlier,
        )

    def loss(self, make: Callable[..., probes.Probe], *arguments: Any) -> float:
        """Held-out loss of the primary domains under a probe of :mod:`moe.analysis.probes`."""
        return self.model.probe(make, *arguments)(self.variables(), self.model.mixed)[MIXED]


def eval_capacity(run: Trained) -> dict[str, float]:
    """Held-out loss at other evaluation capacity factors."""
    return {f"loss_{factor}": run.loss(probes.eval_capacity, factor) for factor in EVAL_FACTORS}


def mask_top(run: Trained) -> dict[str, float]:
    """Held-out loss without each token's most probable experts, up to a quarter of all, at every layer.

    ``loss_masked`` is the loss without an eighth of the experts. Shares that are not a whole number of experts, or
    leave fewer than K, are left out.
    """
    moe = run.model.program.config.model.moe
    counts = {share: share * moe.num_experts for share in MASKED_SHARES}
    most = moe.num_experts - moe.experts_per_token
    shares = {share: int(count) for share, count in counts.items() if count.is_integer() and count <= most}
    eighth = round(MASKED_SHARE * moe.num_experts)
    losses = {experts: run.loss(probes.masked, experts) for experts in {0, eighth, *shares.values()}}
    found = {f"loss_{share}": losses[experts] for share, experts in shares.items()}
    return {"loss_full": losses[0], "loss_masked": losses[eighth], **found}


def shared_expert(run: Trained) -> dict[str, float]:
    """Held-out loss with the shared expert replaced by routed experts of its size, and with one routed expert fewer."""
    return {
        "loss_full": run.loss(probes.masked, 0),
        "loss_without_shared": run.loss(probes.shared_for_routed),
        "loss_one_routed_less": run.loss(probes.fewer_routed, 1),
    }


def specialisation(run: Trained) -> dict[str, float]:
    """Repetition of first choices and their dependence on labels, per MoE layer, of the model and of two controls.

    Quantities of the controls begin with ``untrained_`` (the model with random routers) and ``hash_``
    (:mod:`moe.analysis.controls`).
    """
    found = run.measured()
    parts = {"": found} | {f"{name}_": part for name, part in found["controls"].items()}
    return {
        f"{prefix}{quantity}": value for prefix, part in parts.items() for quantity, value in _specialised(part).items()
    }


def _specialised(part: Mapping[str, Any]) -> dict[str, float]:
    """Repetition averaged over domains, each with its own chance values, and dependence on every label."""
    found: dict[str, float] = {}
    names = {
        "": "observed",
        "_load": "load",
        "_shuffled": "shuffled_mean",
        "_uniform": "uniform",
        "_token": "token_mean",
    }
    for layer, of_domains in enumerate(zip(*part["repetition"]["first"].values(), strict=True)):
        for name, field in names.items():
            found[f"repeat_first{name}@{layer}"] = statistics.fmean(values[field] for values in of_domains)
    for label, layers in part["dependence"].items():
        for layer, values in enumerate(layers):
            found[f"explained_{label}@{layer}"] = values["explained"]
            found[f"nmi_{label}@{layer}"] = values["nmi_debiased"]
    return found


def repetition(run: Trained) -> dict[str, float]:
    """Repetition of the first choice, and of the first two, per domain and MoE layer (Mixtral 2024, table 5).

    ``_load`` and ``_token`` are its chance values: given the loads, and with expert sets permuted among a token's
    occurrences.
    """
    names = {"": "observed", "_load": "load", "_token": "token_mean"}
    return {
        f"{choices}_{domain}{name}@{layer}": values[field]
        for choices, domains in run.measured()["repetition"].items()
        for domain, layers in domains.items()
        for layer, values in enumerate(layers)
        for name, field in names.items()
    }


def coactivation(run: Trained) -> dict[str, float]:
    """Share of an expert's tokens that its most frequent partner has too, per MoE layer, and as expected by load."""
    observed, by_load = most_frequent_partner(np.asarray(run.measured()["coactivation"]))
    found = {f"partner@{layer}": float(share) for layer, share in enumerate(observed)}
    return found | {f"partner_load@{layer}": float(share) for layer, share in enumerate(by_load)}


def saturation(run: Trained) -> dict[str, float]:
    """Share of a token's final experts that it had after a quarter of training, and after each other checkpoint.

    ``excess`` is the same above chance K/E: (share − K/E) / (1 − K/E); ``untrained`` is the share of random routers.
    """
    last = run.model.program.config.train.num_steps
    early = [step for step in run.steps if step >= EARLY * last]
    if len(early) < 2 or run.steps[-1] != last:
        raise ConfigError("the probe saturation needs checkpoints from a quarter of training on: keep more of them")
    measured = run.measured()["saturation"]
    found = {f"untrained@{layer}": share for layer, share in enumerate(measured.get("untrained_top_k", ()))}
    for step, shares, excesses in zip(measured["steps"], measured["top_k"], measured["excess_top_k"], strict=True):
        found |= {f"after_{step}@{layer}": share for layer, share in enumerate(shares)}
        if step == early[0]:
            found |= {f"early@{layer}": share for layer, share in enumerate(shares)}
            found |= {f"early_excess@{layer}": excess for layer, excess in enumerate(excesses)}
    return found


PROBES: dict[str, Callable[[Trained], dict[str, float]]] = {
    "eval_capacity": eval_capacity,
    "mask_top": mask_top,
    "shared_expert": shared_expert,
    "specialisation": specialisation,
    "repetition": repetition,
    "coactivation": coactivation,
    "saturation": saturation,
}
