"""Comparison of a trainer's steps with the oracle, and the deviation that explains what differs.

Deviations are those of reports against DeepSpeed (8475), NeMo Automodel (3816, 3359), Megatron-LM (7213, 5976, 5844),
KempnerForge (202), UniRL (158) and unsloth-zoo (1269).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .diagnosis import Check, constant_factor, relative_error
from .errors import InputError
from .step import KINDS, StepRule, Steps, StepVariant, compute, kind_of

#: Quantities of a step in the order of its computation; arrays of parameters are ``grad.NAME`` and so on.
NUMBERS = ("cross_entropy", "balance_loss", "z_loss")
ARRAYS = ("grad", "restored", "after")


@dataclasses.dataclass(frozen=True)
class StepDiagnosis:
    """Checks against the rule, and the sentences of deviations under which the oracle gives the same numbers."""

    checks: list[Check]
    explanations: list[str]

    @property
    def conforms(self) -> bool:
        """Whether every quantity equals the oracle's."""
        return all(check.passes for check in self.checks)


def deviations(rule: StepRule, steps: Steps, devices: tuple[int, ...]) -> Iterator[tuple[str, dict[str, Any], dict]]:
    """(Sentence, changes of the variant, changes of the rule) of everything that these steps can show."""
    several = steps.tokens.shape[1] > 1
    if several:
        yield "the loss is the mean of the microbatches' means", {"loss_mean": "microbatches"}, {}
    yield "padding counts in the loss's number of tokens", {"loss_mean": "positions"}, {}
    if several and rule.layer.balance_weight:
        if rule.balance_scope == "microbatch":
            yield "the balance loss is added over microbatches instead of averaged", {"balance_mean": "sum"}, {}
            yield "the microbatches' balance losses are weighed by their tokens", {"balance_mean": "tokens"}, {}
        other = "step" if rule.balance_scope == "microbatch" else "microbatch"
        yield f"f and P of the balance loss are taken over each {other}", {}, {"balance_scope": other}
    for count in devices:
        yield f"the gradient norm counts experts {count} times, once per rank", {"expert_norm": float(count)}, {}
        yield f"the gradient norm counts one of {count} ranks' experts' squares", {"expert_norm": 1 / count}, {}
    yield "the gradients are not clipped", {"clips": False}, {}
    yield "weight decay is added to the gradient", {"coupled_decay": True}, {}
    kinds = {kind_of(name) for name in steps.weights} & set(KINDS)
    for kind in sorted(kinds):
        yield f"the updates of {kind} are lost", {"lost": (kind,)}, {}
        changed = tuple(own for own in rule.decayed if own != kind)
        if kind in rule.decayed:
            yield f"{kind} has no weight decay", {}, {"decayed": changed}
        else:
            yield f"{kind} has weight decay", {}, {"decayed": (*changed, kind)}
    yield "the updates of all experts are lost", {"lost": ("down", "gate", "up")}, {}
    if rule.bias_rate:
        yield "the selection bias moves by the last microbatch's loads", {"bias_microbatch": True}, {}
        yield "the selection bias is not moved", {}, {"bias_rate": 0.0}
        yield "the selection bias moves away from balance", {}, {"bias_rate": -rule.bias_rate}
    if len(steps.tokens) > 1:
        for count in devices:
            everywhere = f"after a restart every rank of {count} has the first rank's experts"
            yield everywhere, {"restored": "first rank everywhere", "ranks": count}, {}
            missing = f"a checkpoint or conversion has the first 1/{count} of the experts, the others are zeros"
            yield missing, {"restored": "first rank only", "ranks": count}, {}
    if "up_a" in kinds:
        yield "adapters meet the wrong columns of the rank", {"adapter_columns": "reversed"}, {}
        yield "the adapters' scale is left out", {}, {"adapter_scale": 1.0}


def steps_from_arrays(arrays: Mapping[str, np.ndarray], path: str) -> tuple[Steps, dict[str, np.ndarray]]:
    """Steps and what a trainer recorded of them; ``path`` is the arrays' name in messages.

    Arrays: ``before.NAME`` for the weights of :class:`.step.Steps`, ``tokens`` and ``targets`` [steps,A,B,T], and
    any of the results of :func:`.step.compute`.

    Raises:
        InputError: an array that is missing or of a wrong shape.
    """
    weights = {name.removeprefix("before."): array for name, array in arrays.items() if name.startswith("before.")}
    for name in ("embedding", "unembedding", *(f"layers.0.{part}" for part in ("router", "up", "down"))):
        if name not in weights:
            raise InputError(f"{path}: the array 'before.{name}' is missing")
    for name in ("tokens", "targets"):
        if name not in arrays:
            raise InputError(f"{path}: the array {name!r} is missing")
        if arrays[name].ndim != 4 or arrays[name].shape != arrays["tokens"].shape:
            raise InputError(f"{path}: {name} has the shape {arrays[name].shape}, not [steps,A,B,T] as tokens")
        ids = np.asarray(arrays[name], np.float64)
        if (
            (ids != np.floor(ids)).any()
            or (ids < (0 if name == "tokens" else -1)).any()
            or (ids >= len(weights["embedding"])).any()
        ):
            raise InputError(f"{path}: {name} must be ids below V={len(weights['embedding'])}")
    if (arrays["targets"].max(axis=(2, 3)) < 0).any():
        raise InputError(f"{path}: every microbatch must have a target that is not -1")
    others = {name: array for name, array in arrays.items() if not name.startswith("before.")}
    tokens, targets = (np.asarray(others.pop(name), int) for name in ("tokens", "targets"))
    return Steps(weights, tokens, targets), others


def diagnose_steps(
    rule: StepRule,
    steps: Steps,
    results: Mapping[str, np.ndarray],
    *,
    devices: tuple[int, ...] = (2, 4, 8),
    tolerance: float = 1e-4,
) -> StepDiagnosis:
    """Compare results with the rule, and search for the deviation under which the oracle reproduces them.

    Raises:
        InputError: nothing to compare, or an unknown quantity.
    """
    expected = compute(rule, StepVariant(), steps)
    unknown = [name for name in results if name not in expected]
    if unknown or not results:
        what = f"unknown quantity {unknown[0]!r}" if unknown else "nothing to compare"
        raise InputError(f"{what}; known are {', '.join(expected)}")
    checks = compare(steps, expected, results, tolerance)
    failing = sum(not check.passes for check in checks)
    found: dict[int, list[str]] = {failing: []}
    for sentence, variant, changes in deviations(rule, steps, devices) if failing else ():
        ranks = variant.get("ranks", 1)
        if any(len(array) % ranks for name, array in steps.weights.items() if kind_of(name) == "up"):
            continue
        trial = compute(dataclasses.replace(rule, **changes), StepVariant(**variant), steps)
        left = sum(not check.passes for check in compare(steps, trial, results, tolerance))
        found.setdefault(left, []).append(sentence)
    fewest = min(found)
    return StepDiagnosis(checks, found[fewest] if fewest < failing else [])


def compare(
    steps: Steps, expected: Mapping[str, np.ndarray], results: Mapping[str, np.ndarray], tolerance: float
) -> list[Check]:
    """One check per recorded quantity; what a step changed in a weight is compared, not the weight."""
    checks = []
    order = [*NUMBERS, *(name for name in expected if name.startswith("grad.")), "gradient_norm"]
    order += [name for prefix in ARRAYS[1:] for name in expected if name.startswith(f"{prefix}.")]
    for name in (name for name in order if name in results):
        ours, theirs = np.asarray(expected[name]), np.asarray(results[name], np.float64)
        if ours.shape != theirs.shape:
            text = f"shape {theirs.shape} instead of {ours.shape}"
            checks.append(Check(name, np.inf, False, text=text))
            continue
        if name.split(".")[0] in ARRAYS[1:]:
            before = np.asarray(steps.weights[name.split(".", 1)[1]], np.float64)
            ours, theirs = ours - before, theirs - before
        error = relative_error(ours, theirs)
        error = float(np.abs(theirs).max()) if not np.abs(ours).any() else error
        factor = None if error <= tolerance else constant_factor(ours, theirs, tolerance)
        text = "" if factor is None else f"{factor:.4g} times the expected value"
        checks.append(Check(name, error, error <= tolerance, factor, text))
    return checks


def step_page(found: StepDiagnosis) -> str:
    """A text that shows every check and names what explains the failing ones."""
    width = max(len(check.quantity) for check in found.checks)
    lines = [f"{'quantity':<{width}} {'error':>9}  verdict"]
    for check in found.checks:
        verdict = "equal" if check.passes else f"differs: {check.text or 'no constant factor'}"
        lines.append(f"{check.quantity:<{width}} {check.error:>9.2g}  {verdict}")
    if found.explanations:
        lines += ["", "the trainer computes what the oracle computes if " + "\n  or ".join(found.explanations)]
    return "\n".join([*lines, "", "conforms" if found.conforms else "does not conform"])
