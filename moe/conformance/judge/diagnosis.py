"""Comparison of a layer's results with the oracle, and the deviation that explains what differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from . import equations
from .deviations import Deviation, deviations, factors
from .errors import InputError
from .rule import Layer, Rule, Variant, check_rule

#: Quantities in the order in which a layer computes them; the first that differs is where to look.
QUANTITIES = (
    *("expert_index", "combine_weights", "y", "balance_loss", "z_loss"),
    *("grad_router", "grad_gate", "grad_up", "grad_down", "grad_x"),
    *("grad_router_bias", "grad_gate_bias", "grad_up_bias", "grad_down_bias"),
)
Compute = Callable[[Rule, Variant, Layer], Mapping[str, np.ndarray]]
#: Largest number of deviations that are combined.
MOST = 3


@dataclasses.dataclass(frozen=True)
class Check:
    """One quantity beside the oracle's.

    Attributes:
        quantity: one of :data:`QUANTITIES`.
        error: largest difference over the largest value of the oracle; for expert_index the share of wrong tokens.
        passes: the error is within the tolerance.
        factor: constant c with result = c · oracle; None if there is none.
        text: where it differs, and by which factor.
    """

    quantity: str
    error: float
    passes: bool
    factor: float | None = None
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Checks against the rule as stated, and what explains those that fail.

    Attributes:
        checks: against the rule.
        explanations: groups of deviations that fit equally well; the layer has one of each group.
        unexplained: checks that still fail with the first deviation of each group applied, multiples included.
    """

    checks: list[Check]
    explanations: list[list[Deviation]]
    unexplained: list[Check]

    @property
    def conforms(self) -> bool:
        """Whether every quantity equals the oracle's."""
        return all(check.passes for check in self.checks)


def diagnose(
    rule: Rule,
    layer: Layer,
    results: Mapping[str, np.ndarray],
    *,
    devices: tuple[int, ...] = (2, 4, 8),
    tolerance: float = 1e-4,
    documented: Variant | None = None,
    compute: Compute = equations.compute,
) -> Diagnosis:
    """Compare results with the rule, and search for deviations under which the oracle reproduces them.

    Args:
        rule: what the layer is meant to compute.
        layer: weights and inputs.
        results: those of :data:`QUANTITIES` that were recorded.
        devices: numbers of devices by which a value may be multiplied or divided, or over which a loss be averaged.
        tolerance: relative error within which values are equal.
        documented: deviations that the layer's documentation states; default: none.
        compute: the oracle; one that remembers its results saves time where many layers have one rule.

    Raises:
        InputError: the rule does not fit E experts, or recorded choices are not among them.
    """
    check_rule(rule, layer.num_experts)
    results = _checked(results, layer)
    if not any(name.startswith("grad_") for name in results):
        layer = dataclasses.replace(layer, cotangent=None)  # the oracle then need not differentiate
    named = factors(rule, layer, devices)
    variant = documented or Variant()
    checks = _compare(compute(rule, variant, layer), layer, results, named, tolerance)
    left, explanations = checks, []
    while not all(check.passes for check in left) and len(explanations) < MOST:
        trials = []
        for deviation in deviations(rule, layer, devices):
            changed = deviation.apply(rule, variant)
            if changed != (rule, variant):
                found = _compare(compute(*changed, layer), layer, results, named, tolerance)
                trials.append((deviation, changed, found))
        best = min((_badness(trial) for _, _, trial in trials), default=np.inf)
        if best >= _badness(left):
            break
        fitting = [entry for entry in trials if _badness(entry[2]) == best]
        explanations.append([deviation for deviation, _, _ in fitting])
        _, (rule, variant), left = fitting[0]
    return Diagnosis(checks, explanations, [check for check in left if not check.passes])


def _checked(results: Mapping[str, np.ndarray], layer: Layer) -> dict[str, np.ndarray]:
    """Results with valid expert indices, those of padding set to 0. Raises InputError for invalid ones."""
    if "expert_index" not in results:
        return dict(results)
    index, tokens = np.asarray(results["expert_index"], np.float64), layer.mask.shape
    if index.ndim != 3 or index.shape[:2] != tokens:
        raise InputError(f"expert_index has the shape {index.shape}, for {tokens[0]} x {tokens[1]} tokens")
    index = np.where(layer.mask[..., None], index, 0)
    if not ((index == np.floor(index)) & (index >= 0) & (index < layer.num_experts)).all():
        raise InputError(f"expert_index must be whole numbers from 0 to {layer.num_experts - 1}")
    return {**results, "expert_index": index.astype(int)}


def _badness(checks: list[Check]) -> float:
    """Number of failing quantities; one that is off by a constant factor counts half."""
    return sum(0.0 if check.passes else 0.5 if check.factor is not None else 1.0 for check in checks)


def _compare(
    expected: Mapping[str, np.ndarray],
    layer: Layer,
    results: Mapping[str, np.ndarray],
    named: Mapping[str, float],
    tolerance: float,
) -> list[Check]:
    checks = []
    for quantity in QUANTITIES:
        if quantity not in results:
            continue
        theirs = np.asarray(results[quantity], np.float64)
        if quantity == "expert_index":
            checks.append(_choices(expected[quantity], theirs, layer))
            continue
        if quantity == "combine_weights":  # by expert, since the order of the choices does not matter
            choices = results.get("expert_index", expected["expert_index"])
            if theirs.shape != choices.shape:
                text = f"shape {theirs.shape} instead of {choices.shape}"
                checks.append(Check(quantity, np.inf, False, text=text))
                continue
            ours, theirs = _by_expert(expected, results, layer)
        else:
            ours = expected[quantity]
        checks.append(_values(quantity, ours, theirs, layer, named, tolerance, expected))
    return checks


def _choices(ours: np.ndarray, theirs: np.ndarray, layer: Layer) -> Check:
    """Experts of every real token, as sets."""
    if theirs.shape != ours.shape:
        text = f"{theirs.shape[-1]} experts per token instead of {ours.shape[-1]}"
        return Check("expert_index", 1.0, False, text=text)
    differ = (np.sort(ours, -1) != np.sort(theirs, -1)).any(-1) & layer.mask
    where = [
        f"token {_token(place)}: {_list(theirs[place])} instead of {_list(ours[place])}" for place in _first(differ)
    ]
    return Check("expert_index", float(differ.sum() / layer.mask.sum()), not differ.any(), text="; ".join(where))


def _by_expert(
    expected: Mapping[str, np.ndarray], results: Mapping[str, np.ndarray], layer: Layer
) -> tuple[np.ndarray, np.ndarray]:
    """[G,S,E] combine weights of the oracle and of the results, 0 where an expert is not applied."""
    index = np.asarray(results.get("expert_index", expected["expert_index"]), int)
    recorded = np.asarray(results["combine_weights"], np.float64)
    table = np.zeros((*layer.mask.shape, layer.num_experts))
    for g, s, choice in np.ndindex(*recorded.shape):
        table[g, s, index[g, s, choice]] += recorded[g, s, choice]
    # A library may record the weights before it drops assignments.
    dropped = (expected["combine"] == 0) & (table != 0) & (expected["kept"].sum(-1) < recorded.shape[-1])[..., None]
    return expected["combine"], np.where(dropped, 0.0, table)


def _values(
    quantity: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    layer: Layer,
    named: Mapping[str, float],
    tolerance: float,
    expected: Mapping[str, np.ndarray],
) -> Check:
    if theirs.shape != ours.shape:
        return Check(quantity, np.inf, False, text=f"shape {theirs.shape} instead of {ours.shape}")
    if quantity in ("y", "combine_weights"):
        ours, theirs = ours * layer.mask[..., None], theirs * layer.mask[..., None]
    error = relative_error(ours, theirs)
    natural = np.abs(expected.get("grad_x", 0.0)).max(initial=0.0)
    if quantity.startswith("grad_") and np.abs(ours).max(initial=0.0) < 1e-9 * natural:
        # The exact gradient is 0 up to rounding, as a router's at K = 1 with renormalised weights.
        error = float(np.abs(theirs).max(initial=0.0) / natural) if np.isfinite(theirs).all() else np.inf
    if error <= tolerance:
        return Check(quantity, error, True)
    factor = constant_factor(ours, theirs, tolerance)
    if factor is not None:
        return Check(quantity, error, False, factor, f"{factor:.4g} times the expected value{_name(factor, named)}")
    text = ""
    if quantity == "y":
        text = _tokens(ours, theirs, layer, expected, tolerance)
    elif quantity in ("grad_up", "grad_gate", "grad_down"):
        text = _experts(ours, theirs, expected["kept"], expected["expert_index"], named, tolerance)
    return Check(quantity, error, False, text=text)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest expected value; infinite where results are not finite."""
    if not np.isfinite(theirs).all():
        return np.inf
    return float(np.abs(ours - theirs).max(initial=0.0) / max(np.abs(ours).max(initial=0.0), 1e-30))


def constant_factor(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> float | None:
    """The constant c with theirs = c · ours; None: there is none, or c is 0 or 1."""
    square = float((ours * ours).sum())
    c = float((ours * theirs).sum()) / square if square else 0.0
    if abs(c) < 1e-9 or abs(c - 1) <= tolerance:
        return None
    return c if relative_error(c * ours, theirs) <= tolerance else None


def _name(factor: float, named: Mapping[str, float]) -> str:
    names = [name for name, value in named.items() if abs(factor / value - 1) < 1e-3]
    return f" = {' or '.join(names)}" if names else ""


def _tokens(
    ours: np.ndarray, theirs: np.ndarray, layer: Layer, expected: Mapping[str, np.ndarray], tolerance: float
) -> str:
    """The first tokens whose output differs, each with the experts and weights that its output is made of."""
    scale = np.abs(ours).max()
    differ = np.abs(ours - theirs).max(-1) > tolerance * scale
    lines = []
    for place in _first(differ):
        got = theirs[place]
        if not got.any():
            lines.append(f"token {_token(place)}: 0, as if dropped")
            continue
        weights, rest = _mixture(expected["outputs"][place], got)
        if rest > 100 * tolerance or layer.num_experts >= got.size:
            lines.append(f"token {_token(place)}: no mixture of its experts' outputs")
            continue
        exact = expected["combine"][place]
        parts = [
            f"expert {e} with weight {weights[e]:.4g} instead of {exact[e]:.4g}"
            for e in range(len(weights))
            if abs(weights[e] - exact[e]) > 10 * tolerance
        ]
        lines.append(f"token {_token(place)}: {', '.join(parts)}")
    return f"{differ.sum()} of {layer.mask.sum()} tokens; " + "; ".join(lines)


def _mixture(outputs: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """(weights [E] with Σ weight · output = y, relative residual), by least squares."""
    weights = np.linalg.lstsq(outputs.T, y, rcond=None)[0]
    return weights, float(np.abs(outputs.T @ weights - y).max() / max(np.abs(y).max(), 1e-30))


def _experts(
    ours: np.ndarray,
    theirs: np.ndarray,
    kept: np.ndarray,
    expert_index: np.ndarray,
    named: Mapping[str, float],
    tolerance: float,
) -> str:
    """Describe the experts whose gradients are wrong, and by which factor."""
    wrong = [e for e in range(len(ours)) if relative_error(ours[e], theirs[e]) > tolerance]
    factors = {e: constant_factor(ours[e], theirs[e], tolerance) for e in wrong}
    loads = np.bincount(expert_index[kept], minlength=len(ours))
    if all(factor is not None and abs(factor * loads[e] - 1) < 1e-3 for e, factor in factors.items()):
        return "the gradient of every expert is divided by its own number of rows"
    unused = [e for e in wrong if not theirs[e].any()]
    lines = [f"experts {', '.join(map(str, unused))}: 0, as if never applied"] if unused else []
    for e in [e for e in wrong if e not in unused][:3]:
        factor = factors[e]
        lines.append(f"expert {e}: " + (f"{factor:.4g} times{_name(factor, named)}" if factor else "other values"))
    return f"{len(wrong)} of {len(ours)} experts; " + "; ".join(lines)


def _first(differ: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(int(i) for i in place) for place in np.argwhere(differ)[:3]]


def _token(place: tuple[int, ...]) -> str:
    return f"{place[1]} of group {place[0]}"


def _list(experts: np.ndarray) -> str:
    return "experts " + ", ".join(str(int(expert)) for expert in experts)


def page(rule: Rule, diagnosis: Diagnosis) -> str:
    """A text that shows every check and names what explains the failing ones."""
    lines = [f"rule: {rule}", "", f"{'quantity':<16} {'error':>9}  verdict"]
    for check in diagnosis.checks:
        verdict = "equal" if check.passes else f"differs: {check.text or 'no constant factor'}"
        lines.append(f"{check.quantity:<16} {check.error:>9.2g}  {verdict}")
    for explanation in diagnosis.explanations:
        lines += [
            "",
            "the layer computes what the oracle computes if " + "\n  or ".join(d.sentence for d in explanation),
        ]
    multiples = [check.quantity for check in diagnosis.unexplained if check.factor is not None]
    others = [check.quantity for check in diagnosis.unexplained if check.factor is None]
    if multiples:
        lines += ["", f"off by a constant factor: {', '.join(multiples)}"]
    if others:
        known = "still differs" if diagnosis.explanations else "no known deviation explains"
        lines += ["", f"{known}: {', '.join(others)}"]
    return "\n".join([*lines, "", "conforms" if diagnosis.conforms else "does not conform"])
