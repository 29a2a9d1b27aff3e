"""Sections of the page "Switch or Mixtral?" on its contrasts elsewhere: one factor at a time, on unseen text, from
another initial scale, and in tokens and processor time instead of nats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from moe.lab import inference
from moe.lab.claims.decide import Finding
from moe.lab.claims.registration import Part
from moe.lab.expressions import Term, parse, variants_of
from moe.lab.inference import Effect
from moe.lab.report.sections import share_of_steps
from moe.lab.step_seconds import StepSeconds
from moe.lab.table import MissingError, Table
from moe.system.escaping import markdown_table, markdown_text

#: Effects of one factor at each level of the other: label → value, as in claims.toml.
SIMPLE = {
    "loss, dropless − capacity factor 1.25, top-1": "loss[top1_free] - loss[top1_drop]",
    "loss, dropless − capacity factor 1.25, top-2": "loss[top2_free] - loss[top2_drop]",
    "loss, top-2 − top-1, capacity factor 1.25": "loss[top2_drop] - loss[top1_drop]",
    "loss, top-2 − top-1, dropless": "loss[top2_free] - loss[top1_free]",
    "training loss, dropless − capacity factor 1.25, top-1": "last_tenth_loss[top1_free] - last_tenth_loss[top1_drop]",
    "training loss, dropless − capacity factor 1.25, top-2": "last_tenth_loss[top2_free] - last_tenth_loss[top2_drop]",
    "price of the drops: trained top-1, evaluated at factor 1.25 − at 4.0": (
        "eval_capacity/loss_1.25[top1_drop] - eval_capacity/loss_4.0[top1_drop]"
    ),
    "training loss, dropless − capacity factor 1.25, top-1, the price of the drops taken off the latter": (
        "last_tenth_loss[top1_free] - last_tenth_loss[top1_drop] "
        "+ eval_capacity/loss_1.25[top1_drop] - eval_capacity/loss_4.0[top1_drop]"
    ),
}
_SIMPLE = """\
Where dropping acts differently on top-1 and top-2, the average over both says little: here is each factor at each level
of the other, exploratory. The training loss of an arm with a capacity contains what its drops cost, that of a dropless
arm does not; their difference is comparable only with the price of the drops taken off, which was measured on some of
the runs."""

#: Suite that trains three arms of the page from both initial scales.
SCALES = "initial_scale"
#: Effects in that suite.
SCALE = {
    "loss, Mixtral's arm − Switch's, both at 0.1": "loss[mixtral_0.1] - loss[switch_0.1]",
    "loss, Mixtral's arm at 1.0 − Switch's at its paper's 0.1": "loss[mixtral] - loss[switch_0.1]",
    "loss, Switch's arm − dense, both at 0.1": "loss[switch_0.1] - loss[dense_0.1]",
    "loss, 0.1 − 1.0, Mixtral's arm": "loss[mixtral_0.1] - loss[mixtral]",
    "loss, 0.1 − 1.0, Switch's arm": "loss[switch_0.1] - loss[switch]",
    "loss, 0.1 − 1.0, dense": "loss[dense_0.1] - loss[dense]",
}
_SCALE = """\
The contrasts above are between arms that all start from matrices of scale 1.0. Switch's paper prescribes 0.1 (section
2.4); Mixtral's does not say. Suite `{suite}`, exploratory."""

_SPEED_UP = """\
The share of its tokens after which an arm reaches the final loss of another one (median over seeds with its exact
interval, linear between evaluations), the same as a factor on tokens, and the factor on processor time with each arm's
measured step. An arm that does not reach it is left out. Within a run the learning rate has not decayed yet: a run of
that length with a schedule of its own would be further ahead, so the factors are lower bounds."""
#: Arms whose final loss is the mark.
_MARKS = ("dense", "switch")


def effects(found: Table | None, value: str) -> list[float]:
    """A combination on a suite's registered seeds at its longest horizon; empty without runs."""
    if found is None:
        return []
    try:
        return [*found.only(found.suite.registered_seeds).values(found.suite.longest, value).values()]
    except MissingError:
        return []


def simple_effects(first: Table, again: Table | None) -> list[str]:
    """The section on one factor at a time, on the first seeds, on others and on all; empty without runs."""
    rows = []
    for what, value in SIMPLE.items():
        own, other = effects(first, value), effects(again, value)
        if own or other:
            cells = [_shown(values) for values in (own, other, [*own, *other])]
            rows.append((markdown_text(what), *cells, f"`{value}`"))
    header = ("nats per token", "first seeds [95 %]", "other seeds [95 %]", "all seeds [95 %]", "value")
    return ["## One factor at a time", _SIMPLE.replace("\n", " "), markdown_table(header, rows)] if rows else []


def initial_scale(found: Table | None) -> list[str]:
    """The section on the initial scale; empty without runs."""
    rows = [
        (markdown_text(what), _shown(values), f"`{value}`")
        for what, value in SCALE.items()
        if (values := effects(found, value))
    ]
    text = _SCALE.replace("\n", " ").format(suite=SCALES)
    return (
        ["## Initial scale", text, markdown_table(("nats per token", "effect [95 %]", "value"), rows)] if rows else []
    )


def on_domain(found: Table, terms: Sequence[Term], domain: str) -> list[float]:
    """A combination of final losses on one domain, by registered seed; empty where it was not measured."""
    found = found.only(found.suite.registered_seeds)
    steps, values = found.suite.longest, []
    for seed in found.seeds(steps, *variants_of(terms)):
        curves = [(term.factor, found.curve(term.variant, steps, seed, "loss", domain)) for term in terms]
        if all(curve for _, curve in curves):
            values.append(sum(factor * curve[-1][1] for factor, curve in curves))
    return values


def bits_per_byte(found: Table, arm: str) -> str:
    """Mean over seeds of an arm's held-out bits per byte; a dash where the bytes of a token are not known."""
    size, domains = found.suite.token_bytes, found.suite.primary_domains
    if not domains or not all(domain in size for domain in domains):
        return "–"
    by_domain = [on_domain(found, parse(f"loss[{arm}]"), domain) for domain in domains]
    bits = [np.mean(values) / math.log(2) / size[d] for d, values in zip(domains, by_domain, strict=True) if values]
    return f"{np.mean(bits):.4f}" if len(bits) == len(domains) else "–"


def on_unseen(found: Table, value: str) -> list[float]:
    """A combination of final losses, mean over the unseen domains, by registered seed."""
    terms = parse(value)
    by_domain = [on_domain(found, terms, domain) for domain in found.suite.unseen]
    return [sum(values) / len(values) for values in zip(*by_domain, strict=False)]


def unseen_text(found: Table, findings: Sequence[Finding]) -> list[str]:
    """The section on text that no run was trained on; empty without such text."""
    rows = []
    for finding in findings:
        part = finding.claim.parts[0]
        own, unseen = effects(found, part.value), on_unseen(found, part.value)
        if not unseen or len(own) != len(unseen):
            continue
        share = inference.share(unseen, own)
        ends = f" [{share.low:.0%}, {share.high:.0%}]" if math.isfinite(share.low) else ", without bounds"
        by_domain = [_shown(on_domain(found, parse(part.value), domain)) for domain in found.suite.unseen]
        rows.append((markdown_text(part.what), *by_domain, _shown(unseen), f"{share.mean:.0%}{ends}"))
    if not rows:
        return []
    header = ("contrast", *found.suite.unseen, "mean of both", "share of the effect on held-out text")
    text = (
        "On a whole book and a whole package of which no run was trained on any part, without drops. Share: of the "
        "effect on the held-out text of the training domains, with Fieller's interval."
    )
    return ["## Unseen text", text, markdown_table(header, rows)]


def speed_up(found: Table, seconds: StepSeconds | None) -> list[str]:
    """The section on tokens and processor time; empty without curves."""
    rows, steps = [], found.suite.longest
    for mark in (name for name in _MARKS if name in found.variants):
        for arm in (name for name in found.variants if name != mark):
            share = share_of_steps(found, arm, mark, steps)
            if share is None or not math.isfinite(share.median):
                continue
            times = (seconds.arms.get(name) for name in (arm, mark)) if seconds else (None, None)
            own, other = times
            cost = f"{other[1] / (own[1] * share.median):.2f}" if own and other else "–"
            ends = [f"{end:.2f}" if math.isfinite(end) else "> 1" for end in (share.low, share.high)]
            cell = f"{share.median:.2f} [{ends[0]}, {ends[1]}], n = {share.n}"
            rows.append((arm, mark, cell, f"{1 / share.median:.2f}", cost))
    if not rows:
        return []
    header = ("arm", "reaches the final loss of", "after this share of its tokens", "× tokens", "× processor time")
    return ["## Speed-up", _SPEED_UP.replace("\n", " "), markdown_table(header, rows)]


def _shown(values: Sequence[float]) -> str:
    return str(inference.effect(values)) if values else "–"


def summary(found: Table, part: Part, curve: Mapping[float, Effect], scales: Table | None) -> str:
    """Sentences on one contrast: its trend over training, on unseen text, and at the scale of Switch's paper."""
    value = part.value
    sentences = []
    if trend := trend_of(curve):
        means = ", ".join(f"{e.mean:+.3f}" for e in trend.values())
        at = ", ".join(f"{x:.0f}" for x in trend)
        sentences.append(
            f"Along the runs, {markdown_text(part.what)} is {means} nats at {at} tokens per active parameter (before "
            "the end the learning rate has not decayed); at more tokens it is not known."
        )
    own, unseen = effects(found, value), on_unseen(found, value)
    if unseen and len(own) == len(unseen):
        of_unseen = inference.effect(unseen)
        sentences.append(
            f"On a book and a package that no run was trained on it is {of_unseen.mean:+.3f} "
            f"[{of_unseen.low:+.3f}, {of_unseen.high:+.3f}], "
            f"{inference.share(unseen, own).mean:.0%} of that on held-out text."
        )
    mixed, small = (
        effects(scales, SCALE[what])
        for what in ("loss, Mixtral's arm at 1.0 − Switch's at its paper's 0.1", "loss, 0.1 − 1.0, Switch's arm")
    )
    if mixed and small:
        mixed_effect, scale_effect = inference.effect(mixed), inference.effect(small)
        sentences.append(
            f"All arms start from matrices of scale 1.0. Switch's paper prescribes 0.1, which changes its arm by "
            f"{scale_effect.mean:+.3f} [{scale_effect.low:+.3f}, {scale_effect.high:+.3f}]: against Switch at that "
            f"scale, Mixtral's arm at 1.0 differs by {mixed_effect.mean:+.3f} [{mixed_effect.low:+.3f}, "
            f"{mixed_effect.high:+.3f}]."
        )
    return " ".join(sentences)


def trend_of(curve: Mapping[float, Effect]) -> dict[float, Effect]:
    """The evaluations after an eighth, a quarter, a half and all of the tokens; empty without two of them."""
    last = max(curve, default=0.0)
    ratios = (last / 8, last / 4, last / 2, last)
    found = {at: e for at in ratios for x, e in curve.items() if math.isclose(at, x)}
    return found if len(found) > 1 else {}
