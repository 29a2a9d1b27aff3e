"""The twenty claims of the papers that a small run can test, and the rule that decides each; fixed before the runs.

In: the :class:`moe.lab.results.Results` of a suite. Out: a :class:`Finding` per claim: an effect with its interval, and
supported, not supported or not testable.

Rules. An effect is a mean of paired differences over seeds with a 95 % t interval (:mod:`moe.lab.statistics`), in
nats per token of the suite's primary held-out text where it is a loss. "Lower" is supported if the whole interval is
below zero, "no worse" if it is below ``MARGIN``, "alike" if it is within ± ``MARGIN``. Everything else is not
supported: contradicted if the whole interval is on the other side, undecided otherwise. A claim of several parts is
supported if every part is, contradicted if one is. Without two seeds nothing is testable. No correction is made for
testing twenty claims: at 95 % one of them is expected to come out by chance, which the p-values let a reader judge.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from moe.lab import statistics
from moe.lab.results import PRIMARY, Results
from moe.lab.statistics import Effect, effect

#: Nats per token that count as nothing: a hundredth of what separates these models from the unigram baseline.
MARGIN = 0.02
SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "not supported (contradicted)", "not supported (undecided)"
NOT_TESTABLE = "not testable here"


@dataclasses.dataclass(frozen=True)
class Part:
    """One inequality of a claim.

    Attributes:
        what: the quantity, in words.
        effect: with its interval.
        verdict: of this part alone; empty: shown, and decides nothing.
    """

    what: str
    effect: Effect
    verdict: str = ""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a suite says of a claim."""

    verdict: str
    parts: tuple[Part, ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Claim:
    """One of papers.md's section 4.

    Attributes:
        number: there.
        text: the claim.
        paper: whose, and the published figure.
        suite: whose results decide it.
        rule: what must hold, in words.
        parts: Results → inequalities; raises :class:`Missing` where something was not run.
    """

    number: int
    text: str
    paper: str
    suite: str
    rule: str
    parts: Callable[[Results], Sequence[Part]]

    def test(self, results: Results | None) -> Finding:
        """Applies the rule."""
        if results is None:
            return Finding(NOT_TESTABLE, note=f"suite {self.suite} was not run")
        try:
            parts = tuple(self.parts(results))
        except Missing as error:
            return Finding(NOT_TESTABLE, note=str(error))
        if any(part.effect.n < 2 for part in parts if part.verdict):
            return Finding(NOT_TESTABLE, parts, "fewer than two seeds")
        verdicts = [part.verdict for part in parts if part.verdict]
        if all(verdict == SUPPORTED for verdict in verdicts):
            return Finding(SUPPORTED, parts)
        return Finding(CONTRADICTED if CONTRADICTED in verdicts else UNDECIDED, parts)


class Missing(LookupError):
    """A variant or quantity that the results do not hold."""


# --- Rules -----------------------------------------------------------------------------------------------------------
def lower(what: str, values: ArrayLike) -> Part:
    """Per-seed values that the claim says are below zero."""
    e = effect(values)
    return Part(what, e, SUPPORTED if e.high < 0 else CONTRADICTED if e.low > 0 else UNDECIDED)


def higher(what: str, values: ArrayLike) -> Part:
    """Per-seed values that the claim says are above zero."""
    e = effect(values)
    return Part(what, e, SUPPORTED if e.low > 0 else CONTRADICTED if e.high < 0 else UNDECIDED)


def no_worse(what: str, values: ArrayLike) -> Part:
    """Per-seed differences of losses that the claim says are not above zero, up to MARGIN."""
    e = effect(values)
    return Part(what, e, SUPPORTED if e.high < MARGIN else CONTRADICTED if e.low > MARGIN else UNDECIDED)


def alike(what: str, values: ArrayLike) -> Part:
    """Per-seed differences of losses that the claim says are zero, up to MARGIN."""
    e = effect(values)
    inside = e.low > -MARGIN and e.high < MARGIN
    outside = e.low > MARGIN or e.high < -MARGIN
    return Part(what, e, SUPPORTED if inside else CONTRADICTED if outside else UNDECIDED)


def shown(what: str, values: ArrayLike) -> Part:
    """Decides nothing."""
    return Part(what, effect(values))


# --- Values per seed -------------------------------------------------------------------------------------------------
Values = np.ndarray


def _loss(r: Results, variant: str, *, domain: str = PRIMARY, at: int | None = None) -> Values:
    return _values(r, variant, "loss", domain=domain, at=at)


def _values(
    r: Results, variant: str, quantity: str, *, domain: str = "", layer: str | int = "", at: int | None = None
) -> Values:
    found = np.asarray([r.last(variant, seed, quantity, domain, layer, at=at) for seed in r.seeds])
    if not np.isfinite(found).any():
        raise Missing(f"no {quantity} of {variant}")
    return found


def _over_layers(r: Results, variant: str, quantity: str) -> Values:
    found = np.asarray([r.over_layers(variant, seed, quantity) for seed in r.seeds])
    if not np.isfinite(found).any():
        raise Missing(f"no {quantity} of {variant}")
    return found


def _difference(r: Results, first: str, second: str, *, at: int | None = None) -> Values:
    """Loss of first − loss of second, seed by seed."""
    return _loss(r, first, at=at) - _loss(r, second, at=at)


def _first_evaluation(r: Results, variant: str) -> int:
    for seed in r.seeds:
        if curve := r.curve(variant, seed, "loss", PRIMARY):
            return curve[0][0]
    raise Missing(f"no loss of {variant}")


# --- The claims ------------------------------------------------------------------------------------------------------
def _switch_beats_dense(r: Results) -> list[Part]:
    parts = [lower("loss, switch − dense", _difference(r, "switch", "dense"))]
    if "eval_capacity/loss_4.0" in r.quantities("switch"):
        roomy = _values(r, "switch", "eval_capacity/loss_4.0") - _loss(r, "dense")
        parts.append(shown("the same, no token dropped in evaluation", roomy))
    return parts


def _more_experts(r: Results) -> list[Part]:
    l1, l8, l64 = (_loss(r, name) for name in ("experts_1", "experts_8", "experts_64"))
    return [
        lower("loss, 8 experts − dense", l8 - l1),
        lower("loss, 64 experts − 8", l64 - l8),
        higher("gain of 1 → 8 less gain of 8 → 64", (l1 - l8) - (l8 - l64)),
    ]


def _top2_against_top1(r: Results) -> list[Part]:
    return [
        lower(
            "loss, top-2 − top-1, capacity factor 1.25, equal active parameters",
            _difference(r, "top2_1.25", "top1_1.25"),
        ),
        lower(
            "loss, top-2 − top-1, capacity factor 1.25, same experts (twice the FLOPs)",
            _difference(r, "top2_same_experts_1.25", "top1_1.25"),
        ),
    ]


def _capacity_decides(r: Results) -> list[Part]:
    return [
        lower("loss, top-1 − top-2, capacity factor 0.75", _difference(r, "top1_0.75", "top2_0.75")),
        higher("loss, top-1 − top-2, capacity factor 2", _difference(r, "top1_2.0", "top2_2.0")),
    ]


def _drops_fall(r: Results) -> list[Part]:
    factors = ("0.75", "1.0", "1.25", "2.0")
    drops = {f: _over_layers(r, f"top1_{f}", "train_fraction_tokens_dropped") for f in factors}
    parts = [lower(f"dropped share, factor {b} − {a}", drops[b] - drops[a]) for a, b in itertools.pairwise(factors)]
    parts += [
        shown(f"dropped share − chance, factor {f}", drops[f] - chance_of_drop(2048, 8, float(f))) for f in factors
    ]
    return parts


def _eval_capacity(r: Results) -> list[Part]:
    small, large = (_values(r, "top1_1.0", f"eval_capacity/loss_{factor}") for factor in ("1.0", "2.0"))
    return [lower("loss of the model trained at 1.0, evaluated at 2.0 − at 1.0", large - small)]


def _collapse(r: Results) -> list[Part]:
    free, held = (_over_layers(r, name, "max_violation") for name in ("none", "aux_0.01"))
    dead = _over_layers(r, "none", "dead_experts") - _over_layers(r, "aux_0.01", "dead_experts")
    return [
        higher("max/mean load, none − twice that of the auxiliary loss", (free + 1) - 2 * (held + 1)),
        shown("max/mean load without a loss", free + 1),
        shown("max/mean load with it", held + 1),
        shown("dead experts per layer, none − auxiliary loss", dead),
    ]


def _balancing_helps(r: Results) -> list[Part]:
    return [lower("loss, auxiliary loss 0.01 − none", _difference(r, "aux_0.01", "none"))]


def _z_loss(r: Results) -> list[Part]:
    z = _over_layers(r, "aux_0.01_z", "router_z_loss") - _over_layers(r, "aux_0.01", "router_z_loss")
    return [
        lower("mean logsumexp², with z-loss − without", z),
        no_worse("loss, with z-loss − without", _difference(r, "aux_0.01_z", "aux_0.01")),
    ]


def _loss_free(r: Results) -> list[Part]:
    violation = _over_layers(r, "loss_free", "max_violation") - _over_layers(r, "sigmoid_aux", "max_violation")
    return [
        lower("MaxVio, loss-free − auxiliary loss", violation),
        no_worse("loss, loss-free − auxiliary loss", _difference(r, "loss_free", "sigmoid_aux")),
        shown("MaxVio, loss-free", _over_layers(r, "loss_free", "max_violation")),
        shown("MaxVio, auxiliary loss", _over_layers(r, "sigmoid_aux", "max_violation")),
    ]


def _fine_grained(r: Results) -> list[Part]:
    return [
        lower("loss, 7 of 63 fine-grained + 1 shared − GShard 2 of 16", _difference(r, "shared_63x7", "gshard_16x2"))
    ]


def _shared_expert(r: Results) -> list[Part]:
    full, without, fewer = (
        _values(r, "shared_63x7", f"shared_expert/loss_{name}")
        for name in ("full", "without_shared", "one_routed_less")
    )
    return [
        higher("loss, shared expert replaced by one more routed − untouched", without - full),
        higher("the same less what one routed expert less costs", (without - full) - (fewer - full)),
    ]


def _repetition(r: Results) -> list[Part]:
    layers = r.layers("mixtral", "specialisation/repeat_first")
    if not layers:
        raise Missing("no specialisation probe of mixtral")

    def excess(layer: int, chance: str) -> Values:
        observed = _values(r, "mixtral", "specialisation/repeat_first", layer=layer)
        return observed - _values(r, "mixtral", f"specialisation/repeat_first_{chance}", layer=layer)

    mean = np.mean([excess(layer, "load") for layer in layers], axis=0)
    return [
        higher("share of repeats − chance from the loads, mean over layers", mean),
        higher(
            "share of repeats − shuffled, mean over layers",
            np.mean([excess(layer, "shuffled") for layer in layers], axis=0),
        ),
        *(shown(f"layer {layer}, share − chance", excess(layer, "load")) for layer in layers),
    ]


def _syntax_before_topic(r: Results) -> list[Part]:
    token, syntax, domain = (
        _over_layers(r, "mixtral", f"specialisation/explained_{label}") for label in ("token", "syntax", "domain")
    )
    return [
        higher("share of the expert's entropy explained, token identity − domain", token - domain),
        higher("syntax class (python) − domain", syntax - domain),
    ]


def _saturation(r: Results) -> list[Part]:
    layers = r.layers("mixtral", "saturation/early")
    if len(layers) < 2:
        raise Missing("no saturation probe of mixtral")
    early = {layer: _values(r, "mixtral", "saturation/early", layer=layer) for layer in layers}
    mean = np.mean(list(early.values()), axis=0)
    others = np.mean([early[layer] for layer in layers[1:]], axis=0)
    return [
        higher("share of the final experts chosen after a quarter of training − 0.6", mean - 0.6),
        lower("the same, layer 0 − the other layers", early[layers[0]] - others),
    ]


def _init_scale(r: Results) -> list[Part]:
    early = _first_evaluation(r, "init_0.1")
    small, large = (_loss(r, name, at=early) for name in ("init_0.1", "init_1.0"))
    ratio, p = statistics.variance_ratio(small, large)
    n = len(r.seeds)
    verdict = SUPPORTED if p < 0.05 else CONTRADICTED if p > 0.95 else UNDECIDED
    return [
        lower(f"loss at step {early}, scale 0.1 − 1.0", small - large),
        Part(
            f"variance over seeds at step {early}, 0.1 over 1.0 (F test, one-sided p; no interval)",
            Effect(ratio, 0.0, float("inf"), p, n),
            verdict,
        ),
    ]


def _distilled(r: Results) -> list[Part]:
    dense, student, teacher = (_loss(r, name) for name in ("dense", "distilled", "teacher"))
    gain = effect(teacher - dense)
    if not gain.high < 0:  # added after the runs, against the claim: see docs/results/README.md
        raise Missing(
            f"the teacher has no gain to keep (loss, teacher − dense: {gain}); the student, which starts with its "
            f"weights, against dense: {effect(student - dense)}"
        )
    return [
        lower("loss, distilled dense − dense", student - dense),
        shown("share of the teacher's gain that is kept", (dense - student) / (dense - teacher)),
    ]


def _upcycled(r: Results) -> list[Part]:
    early = _first_evaluation(r, "upcycled")
    at_first, at_last = _difference(r, "upcycled", "scratch", at=early), _difference(r, "upcycled", "scratch")
    return [
        lower(f"loss at step {early}, upcycled − from scratch", at_first),
        higher("how far from scratch catches up by the end", at_last - at_first),
        shown("loss at the end, upcycled − from scratch", at_last),
    ]


def _masked(r: Results) -> list[Part]:
    def cost(variant: str) -> Values:
        return _values(r, variant, "mask_top/loss_masked") - _values(r, variant, "mask_top/loss_full")

    return [
        higher(
            "cost of masking an eighth of the experts, the token's best: fine-grained − GShard",
            cost("shared_63x7") - cost("gshard_16x2"),
        )
    ]


def _exploration(r: Results) -> list[Part]:
    return [
        alike("loss, jitter − argmax", _difference(r, "jitter", "argmax")),
        higher("loss, sampled − argmax", _difference(r, "sampled", "argmax")),
    ]


def chance_of_drop(tokens: int, num_experts: int, factor: float, k: int = 1) -> float:
    """Expected dropped share when each of ``tokens``·k choices is uniform over the experts: Σ E[(load − C)+] over all.

    Loads are binomial (k = 1): E·E[(X − C)+] / tokens, X ~ Binomial(tokens, 1/E).
    """
    pairs = tokens * k
    capacity = math.ceil(factor * pairs / num_experts)
    load = np.arange(capacity + 1, pairs + 1)
    return float(num_experts * ((load - capacity) * scipy.stats.binom.pmf(load, pairs, 1 / num_experts)).sum() / pairs)


CLAIMS = (
    Claim(
        1,
        "Switch at capacity factor 1.0 beats the FLOP-matched dense model.",
        "Switch, table 1: −1.561 against −1.731 (neg. log perplexity)",
        "switch_vs_mixtral",
        "lower",
        _switch_beats_dense,
    ),
    Claim(
        2,
        "More experts at equal FLOPs lower the loss, with diminishing returns.",
        "Switch, figure 4",
        "num_experts",
        "8 < 1, 64 < 8, and the first three doublings gain more than the next three",
        _more_experts,
    ),
    Claim(
        3,
        "Top-2 is ahead of top-1 at equal capacity factor, and at equal active parameters.",
        "ST-MoE: −1.375 against −1.378 at 1.25",
        "capacity_factor",
        "lower, both",
        _top2_against_top1,
    ),
    Claim(
        4,
        "Top-1 is ahead at a low capacity factor, top-2 at 2.",
        "Switch, table 1: 1.0: −1.561/−1.572; 2.0: −1.554/−1.547",
        "capacity_factor",
        "top-1 lower at 0.75, higher at 2",
        _capacity_decides,
    ),
    Claim(
        5,
        "The drop rate falls with the capacity factor.",
        "ST-MoE: 10.6 % at 0.75, 0.3 % at 1.25",
        "capacity_factor",
        "every step up drops less; beside it, the difference to chance",
        _drops_fall,
    ),
    Claim(
        6,
        "A larger evaluation capacity factor improves a frozen model.",
        "ST-MoE: −1.384 at 2.0 against −1.397 at 1.0",
        "capacity_factor",
        "lower",
        _eval_capacity,
    ),
    Claim(
        7,
        "Without balancing, routing collapses.",
        "Shazeer: max/mean load 17.8 against 1.14",
        "balancing",
        "max/mean load more than twice that with the loss",
        _collapse,
    ),
    Claim(
        8,
        "Balancing lowers the language-model loss too.",
        "Shazeer: perplexity 35.6 against 39.8",
        "balancing",
        "lower",
        _balancing_helps,
    ),
    Claim(
        9,
        "The z-loss shrinks the logits at no cost.",
        "ST-MoE: −1.741 against −1.755",
        "balancing",
        "logsumexp² lower, and the loss no worse",
        _z_loss,
    ),
    Claim(
        10,
        "Loss-free balancing: lower MaxVio, loss no worse.",
        "Wang et al.: MaxVio 0.04 against 0.72, perplexity 9.50/9.56",
        "balancing",
        "MaxVio lower, and the loss no worse",
        _loss_free,
    ),
    Claim(
        11,
        "Fine-grained and shared experts beat GShard at equal parameters.",
        "DeepSeekMoE: 1.808 against 1.867",
        "granularity",
        "lower",
        _fine_grained,
    ),
    Claim(
        12,
        "A shared expert is irreplaceable after training.",
        "DeepSeekMoE: 1.808 → 2.414",
        "granularity",
        "one more routed instead is worse, and by more than one routed less",
        _shared_expert,
    ),
    Claim(
        13,
        "Consecutive tokens repeat experts above chance.",
        "Mixtral, table 5: 14.0/27.9/22.7 % against 12.5 %",
        "switch_vs_mixtral",
        "above chance from the loads, and above shuffled tokens",
        _repetition,
    ),
    Claim(
        14,
        "Experts follow token identity and syntax more than domain.",
        "Mixtral, section 5",
        "switch_vs_mixtral",
        "token identity and syntax class each explain more of the expert's entropy than the domain does",
        _syntax_before_topic,
    ),
    Claim(
        15,
        "Routing saturates early, layer 0 last.",
        "OLMoE: about 60 % of the final top-8 after 1 % of training",
        "switch_vs_mixtral",
        "more than 60 % after a quarter of training, and layer 0 below the others",
        _saturation,
    ),
    Claim(
        16,
        "Initial scale 0.1 lowers the early loss and its variance.",
        "Switch, table 3: −2.72 ± 0.01 against −3.60 ± 0.68",
        "router_init_and_precision",
        "lower at the first evaluation, and F test p < 0.05",
        _init_scale,
    ),
    Claim(
        17,
        "A distilled dense student keeps part of the gain.",
        "Switch: about 30 %",
        "distillation",
        "lower",
        _distilled,
    ),
    Claim(
        18,
        "Upcycling leads early, from scratch catches up.",
        "Komatsuzaki et al. 2023",
        "upcycling",
        "lower at the first evaluation, and the lead shrinks",
        _upcycled,
    ),
    Claim(
        19,
        "Masking the top experts hurts fine-grained models more.",
        "DeepSeekMoE, figure 4",
        "granularity",
        "the cost is higher",
        _masked,
    ),
    Claim(
        20,
        "Jitter is like argmax, sampled routing is worse.",
        "Switch: argmax −1.471, jitter −1.468, sampled −1.570",
        "exploration",
        "jitter within the margin, sampled higher",
        _exploration,
    ),
)
