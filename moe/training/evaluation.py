"""Held-out loss, perplexity, bits per byte and routing metrics, per domain and over all domains."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from moe.config import ConfigError
from moe.data import pipeline
from moe.data.sentinels import sentinel_ids
from moe.parallel.mesh import local_rows
from moe.routing.balancing import PER_ASSIGNMENT, LayerReport
from moe.training.batches import place
from moe.training.step import Program

ALL = "all"  # the name under which the total over domains is reported


@dataclasses.dataclass(frozen=True)
class Heldout:
    """Batches per domain, [B,T] each, kept in memory: every evaluation sees the same tokens.

    Attributes:
        batches: domain → batches.
        token_bytes: [V] int32, UTF-8 bytes of each token's text.
    """

    batches: dict[str, list[dict[str, np.ndarray]]]
    token_bytes: np.ndarray


def check_domains(prepared: pipeline.Prepared) -> None:
    """Raise ConfigError if a domain is called "all"."""
    if ALL in prepared.domains:
        raise ConfigError(f"data.domains: no domain may be called {ALL!r}, which names all of them; rename the folder")


def load_heldout(program: Program, prepared: pipeline.Prepared) -> Heldout:
    """Load this process's rows of the held-out batches.

    Raises:
        moe.config.ConfigError: the held-out text is shorter than one row or has no target, or a domain is called
            "all".
    """
    check_domains(prepared)
    config = program.config
    rows = config.train.microbatch_rows * program.mesh.shape.get("pipeline", 1)
    local = local_rows(program.mesh, rows)
    batches = {}
    for domain in prepared.domains:
        whole = list(pipeline.heldout_batches(prepared, config.data, domain=domain, batch_size=rows))
        if not any((batch["targets"] >= 0).any() for batch in whole):
            raise ConfigError(f"held-out text of {domain}: no token is a target, so that it has no loss")
        batches[domain] = [{key: value[local] for key, value in batch.items()} for batch in whole]
    return Heldout(batches, token_bytes(program, prepared))


def token_bytes(program: Program, prepared: pipeline.Prepared) -> np.ndarray:
    """[V] int32, UTF-8 bytes of each token's text; 0 for rows of the embedding that the tokenizer does not use, and for
    the objective's sentinels, which stand for no text."""
    sizes = np.zeros(program.config.model.vocab_size, np.int32)
    sizes[: prepared.tokenizer.vocab_size] = prepared.tokenizer.token_bytes
    if count := program.config.objective.sentinels:
        sizes[sentinel_ids(prepared.tokenizer, count)] = 0
    return sizes


def evaluate(program: Program, variables: dict[str, Any], heldout: Heldout) -> dict[str, dict[str, Any]]:
    """Evaluate every domain, and all of them together under "all".

    Returns:
        domain → loss (nats per target), perplexity, bits_per_byte, targets, and with more than one row of targets
        standard_error (of the loss, with rows as the independent units); in a sparse model also, per MoE layer,
        expert_load, fraction_tokens_dropped, router_entropy, load_balancing_loss, router_z_loss.
    """
    results = {}
    sums, variances = np.zeros(3), []
    reports: list[LayerReport] = []
    for domain, batches in heldout.batches.items():
        # All batches are dispatched before a result is read.
        metrics = [program.eval_step(variables, place(b, program.mesh), heldout.token_bytes) for b in batches]
        nll, targets = (
            np.concatenate([np.asarray(getattr(m, name), np.float64) for m in metrics]) for name in ("nll", "targets")
        )
        domain_sums = np.asarray([nll.sum(), targets.sum(), sum(int(m.target_bytes) for m in metrics)])
        # Batches of only padding have no routing to report.
        domain_reports = [m.layers for m in metrics if m.layers is not None and int(m.targets.sum()) > 0]
        variances.append(sum_variance(nll, targets))
        results[domain] = _summary(domain_sums, variances[-1], domain_reports)
        sums += domain_sums
        reports += domain_reports
    # The domains are strata: differences between them are no sampling error of the loss over all.
    variance = None if None in variances else sum(filter(None, variances))
    return {ALL: _summary(sums, variance, reports), **results}


def sum_variance(nll: np.ndarray, targets: np.ndarray) -> float | None:
    """Variance of the summed nats of a sample of rows around the number of targets times their mean loss.

    The variance of a ratio estimator (Cochran 1977, section 6.4), times the squared number of targets.

    Args:
        nll: [rows] nats.
        targets: [rows] number of targets; rows without any are padding.

    Returns:
        None with fewer than two rows.
    """
    nll, targets = nll[targets > 0], targets[targets > 0]
    if len(nll) < 2:
        return None
    residuals = nll - targets * nll.sum() / targets.sum()
    return float(len(nll) / (len(nll) - 1) * np.sum(residuals**2))


def _summary(sums: np.ndarray, variance: float | None, reports: list[LayerReport]) -> dict[str, Any]:
    nll, targets, target_bytes = sums
    loss = nll / max(targets, 1)
    summary: dict[str, Any] = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nll / math.log(2) / max(target_bytes, 1),
        "targets": int(targets),
    }
    if variance is not None:
        summary["standard_error"] = math.sqrt(variance) / max(targets, 1)
    if reports:
        summary |= routing_metrics(reports)
    return summary


def routing_metrics(reports: list[LayerReport]) -> dict[str, Any]:
    """Metrics of several batches, as means over their tokens or assignments.

    So they are those of one batch of all tokens, except for the balance losses, which are products of two means over a
    batch: as in the objective of several microbatches, each batch has its own value.

    Args:
        reports: of each batch, stacked over layers.
    """
    tokens = np.stack([report.sums.tokens for report in reports])  # [batches,L]
    assignments = np.stack([report.sums.assignments for report in reports])

    def mean(name: str) -> list[Any]:
        values = np.stack([getattr(report, name) for report in reports])
        if name == "broken_tokens":
            return values.sum(axis=0).tolist()
        weights = assignments if name in PER_ASSIGNMENT else tokens
        shares = weights / np.maximum(weights.sum(axis=0), 1)
        return np.sum(values * shares.reshape(shares.shape + (1,) * (values.ndim - 2)), axis=0).tolist()

    return {name: mean(name) for name in reports[0].metrics()}
