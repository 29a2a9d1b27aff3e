"""Rows and text of the table of conformance: every gate, loss and dispatch mode against something independent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.config import Capacity, ConfigError
from moe.config.registry import LAYERS, find_gate
from moe.conformance.oracle import (
    against_oracle,
    arguments,
    device_counts,
    own_fields,
    program,
    read_by,
    weights_of,
)
from moe.conformance.oracle_cases import CASES, LEAK, NOVICES, ONE_GROUP, edges, null_of
from moe.conformance.rows import FLOAT32, Row, close, error, spelled, value
from moe.dispatch.buffers import expert_capacity, make_plan
from moe.dispatch.modes import CONFIG_MODES
from moe.interop import load_balancing_loss as hugging_face_loss
from moe.interop.layers import run_reference, single_layer
from moe.routing import balancing
from moe.routing.gates import Random
from moe.routing.interface import GateInputs
from moe.routing.routing import Routing, route


def routing_of(gate: str, logits: np.ndarray, k: int) -> tuple[Routing, jax.Array]:
    """The routing of logits [G,S,E], all tokens real, and their mask."""
    mask = jnp.ones(logits.shape[:2], bool)
    return route(find_gate(gate).with_k(k), jnp.asarray(logits, jnp.float32), GateInputs(mask)), mask


def check_values() -> Iterator[Row]:
    """The balancing losses and metrics where their value is known."""
    section, e = "Check values, E = 8", 8
    # Token s prefers expert s, s+1, ...: every expert is equal. And: expert 0 takes all.
    even = np.stack([np.roll(-0.7 * np.arange(e), s) for s in range(e)])[None]
    collapsed = np.broadcast_to(np.where(np.arange(e) == 0, 200.0, -np.arange(e)), (1, 24, e))
    for name, logits, balance, aux, violation in (
        ("uniform", even, 1.0, 1 / e**2, 0.0),
        ("all to one", collapsed, float(e), 1 / e, e - 1.0),
    ):
        top1, mask = routing_of("switch", logits, 1)
        loss = balancing.load_balancing_loss(top1, mask)
        yield value(section, f"Switch E·Σ f P, {name}", balance, loss, 1e-5)
        top2, mask = routing_of("gshard", logits, 2)
        per_group = balancing.load_balancing_loss(top2, mask, counts="first_choice", parts=logits.shape[0])
        yield value(section, f"GShard ℓ_aux = ours / E², {name}", aux, per_group / e**2, 1e-6)
        load = balancing.report(top1, mask, top1.chosen).expert_load
        yield value(section, f"MaxVio, top-1, {name}", violation, balancing.max_violation(load), 1e-5)
        pairs = balancing.report(top2, mask, top2.chosen).expert_load
        top2_violation = 0.0 if name == "uniform" else e / 2 - 1
        yield value(section, f"MaxVio, top-2, {name}", top2_violation, balancing.max_violation(pairs), 1e-5)
    for k in (1, 2):
        routing, mask = routing_of("switch", even, k)
        stacked = jax.tree.map(lambda leaf: leaf[None], routing)
        yield value(section, f"Hugging Face's function, uniform, k = {k}", k, hugging_face_loss(stacked), 1e-5)
    z_loss = balancing.router_z_loss(jnp.zeros((1, 5, e)), jnp.ones((1, 5), bool))
    yield value(section, "z-loss at zero logits = (ln 8)²", np.log(8) ** 2, z_loss, 1e-5)


# tokens, capacity factor, published share of dropped tokens in percent
DROPPED = (
    (256, 1.0, 6.58),
    (256, 1.25, 0.54),
    (512, 0.75, 25.05),
    (512, 1.0, 4.66),
    (512, 1.25, 0.084),
    (2048, 1.0, 2.33),
)


def dropped_share() -> Iterator[Row]:
    """Top-1 routing that is uniform at random, E = 8, simulated."""
    plan = jax.jit(make_plan, static_argnames="capacity")
    for tokens, factor, percent in DROPPED:
        groups = 2**22 // tokens
        shape = (groups, tokens, 8)
        rng = jax.random.key(tokens + int(100 * factor))
        mask = jnp.ones(shape[:2], bool)
        routing = route(Random(), jnp.zeros(shape), GateInputs(mask, rng=rng))
        kept = plan(routing, capacity=expert_capacity(factor, 1, tokens, 8)).kept
        # Five standard errors of the mean over groups, plus the rounding error of the published number.
        shares = 100 * (1 - np.asarray(kept, np.float64).mean(axis=(1, 2)))
        bound = 5 * shares.std() / np.sqrt(groups) + 0.5 * 10.0 ** -(2 if percent >= 0.1 else 3)
        what = f"dropped, %, {tokens} tokens, capacity factor {factor}, {groups} groups, ± {bound:.2g}"
        yield value("Dropped share by chance, E = 8, top-1", what, percent, shares.mean(), bound)


def reference_layers(folder: Path) -> Iterator[Row]:
    """Layers of other libraries, run here with their weights."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        drops = "expert_capacity" in arrays
        for mode in CONFIG_MODES:
            if drops and mode == "dropless":
                continue  # has no capacity
            ours = run_reference(arrays, mode)
            if "topk_index" in ours:
                # Libraries may list the chosen experts in any order: compared as [T,E].
                num_experts = arrays["router_logits"].shape[-1]
                ours, theirs = ({**a, "topk": scattered(a, num_experts)} for a in (ours, arrays))
            else:
                theirs = arrays
            for name in ("y", "router_logits", "gate", "dispatch", "topk"):
                if name in ours:
                    what = f"{path.stem}, {mode}: {name}"
                    worst = error(ours[name], theirs[name])
                    yield close("Layers of other libraries", what, "Hugging Face", worst, FLOAT32)


def scattered(arrays: Any, num_experts: int) -> np.ndarray:
    """topk_weights and topk_index [T,K] as [T,E]."""
    dense = np.zeros((len(arrays["topk_index"]), num_experts))
    np.put_along_axis(dense, np.asarray(arrays["topk_index"]), arrays["topk_weights"], axis=1)
    return dense


def router_gradient() -> Iterator[Row]:
    """At K = 1 the output's gradient reaches the router where the paper keeps the probability as weight."""
    section = "The language-model gradient reaches the router at K = 1"
    x = jnp.asarray(np.random.default_rng(5).normal(size=(2, 6, 6)), jnp.float32)
    for gate in ("switch", "deepseek_moe", "deepseek_v3", "moe_plus_plus", "remoe", "expert_threshold"):
        weights = arguments(read_by(gate, weights_of(6, 5, 4, seed=5, null=null_of(gate, {}))))
        own: dict[str, Any] = {"name": gate, "k": 1}
        if gate == "deepseek_v3":
            own |= ONE_GROUP["gate"] | {"renormalise": False}
        leak: dict[str, Any] = LEAK if find_gate(gate).looks_ahead else {}
        layer = single_layer(own, **weights, capacity=Capacity(eval=4.0), **leak)
        _, gradients, _ = program(layer)(x, np.ones((2, 6), bool), np.ones(x.shape, np.float32))
        largest = float(jnp.abs(gradients["router"]).max())
        yield Row(section, gate, "> 1e-3", f"{largest:.3g}", largest > 1e-3)


#: Impossible settings, and the field that the error must name.
IMPOSSIBLE: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("mixtral", {"gate": {"k": 5}}, "gate.k"),
    ("mixtral", {"gate": {"k": 0}}, "gate.k"),
    ("mixtral", {"gate": {"k": 1}}, "gate.k"),
    ("switch", {"gate": {"renormalise": True}}, "renormalise"),
    ("gshard", {"gate": {"k": 3}}, "gate.k"),
    ("hash", {"gate": {"score": "sigmoid"}}, "gate.score"),
    ("remoe", {"gate": {"renormalise": True}}, "gate.renormalise"),
    ("mixtral", {"gate": {"bias": "penalty"}}, "gate.bias"),
    ("quantile_balancing", {"gate": {"k": 4}}, "gate.bias"),
    ("remoe", {"copy_experts": 1}, "copy"),
    ("mixtral", {"layer_gates": ("expert_choice",)}, "layer_gates"),
    ("expert_threshold", {}, "accept_future_leak"),
    ("switch", {"capacity": {"eval": 0.0}}, "capacity.eval"),
    ("deepseek_v3", {"gate": {"k": 2, "groups": 3, "kept_groups": 2}}, "gate.groups"),
    ("deepseek_v3", {"gate": {"k": 3, "groups": 4, "kept_groups": 2}}, "gate.k"),
    ("deepseek_v3", {"gate": {"k": 2, "groups": 2, "kept_groups": 3}}, "gate.kept_groups"),
    ("expert_choice", {}, "accept_future_leak"),
    ("soft_moe", {"dispatch": "einsum"}, "accept_future_leak"),
    ("mixtral", {"drop_policy": "luck"}, "drop_policy"),
    ("st_moe", {"drop_policy": "probability"}, "accept_future_leak"),
)


def bad_input() -> Iterator[Row]:
    """Impossible settings are refused; a token with NaN logits is counted, and acts as padding on all others."""
    section = "Bad input"
    for gate, fields, field in IMPOSSIBLE:
        slots = 1 if gate == "soft_moe" else 0
        weights = arguments(read_by(gate, weights_of(6, 5, 4, seed=5, slots=slots, null=null_of(gate, fields))))
        what = f"{gate}, E 4{spelled(fields)}"
        named: dict[str, Any] = fields | {"gate": {"name": gate, **fields.get("gate", {})}}
        try:
            single_layer(**weights, **named)
            yield Row(section, what, f"refused, naming {field}", "accepted", False)
        except ConfigError as reason:
            yield Row(section, what, f"refused, naming {field}", str(reason), field in str(reason))
    x = jnp.asarray(np.random.default_rng(6).normal(size=(2, 7, 6)), jnp.float32)
    mask = np.ones((2, 7), bool)
    without, tokens = mask.copy(), np.zeros((2, 7), np.int32)
    without[0, 2] = False
    for gate, rule in ((name, find_gate(name)) for name in LAYERS):
        if rule.router == "none":
            continue  # has no logits
        own = own_fields(gate) | ({"k": 2} if rule.sets_k else {})
        if getattr(rule, "groups", 1) > 1:
            own |= {"groups": 2, "kept_groups": 2}
        fields: dict[str, Any] = {"capacity": {"eval": 1.0}, "dispatch": "einsum"}
        fields |= LEAK if rule.looks_ahead else {}
        slots = rule.slots_per_expert
        weights = arguments(read_by(gate, weights_of(6, 5, 4, 5, slots, null_of(gate, {}), gate=gate)))
        layer = single_layer(own, **weights, **fields)
        call = jax.jit(lambda x, mask, layer=layer: layer(x, mask, token_ids=tokens)[:2])
        y, report = call(x.at[0, 2].set(jnp.nan), mask)
        expected, _ = call(x, without)
        worst = error(y, expected)
        what = f"{gate}: one token with NaN logits, {float(report.broken_tokens):.0f} counted"
        passes = worst <= FLOAT32 and float(report.broken_tokens) == 1
        yield Row(section, what, f"1 counted; y as if it were padding, to {FLOAT32:.2g}", f"{worst:.2g}", passes)


def run(layers: Path | None) -> Iterator[Row]:
    """All rows, in the order of the table; ``layers``: folder of layers of other libraries."""
    yield from check_values()
    yield from dropped_share()
    if layers:
        yield from reference_layers(layers)
    yield from router_gradient()
    yield from bad_input()
    for seed, case in enumerate((*CASES, *edges(), NOVICES)):
        yield from against_oracle(case, seed)
    for gate in LAYERS:
        yield from device_counts(gate)
    for latent in ({"latent_dim": 4}, {"latent_dim": 4, "latent_norm": True}):
        yield from device_counts("mixtral", **latent)


def summary(rows: list[Row]) -> list[str]:
    """Markdown table of the number of rows and failures of each section."""
    lines = ["| section | rows | failed |", "|---|---|---|"]
    for section in dict.fromkeys(row.section for row in rows):
        own = [row for row in rows if row.section == section]
        lines.append(f"| {section} | {len(own)} | {sum(not row.passes for row in own)} |")
    return lines


def page(rows: list[Row]) -> str:
    """The table as Markdown."""
    failed = sum(not row.passes for row in rows)
    lines = [
        "# Conformance: every row",
        "",
        "The [guide](../conform.md#is-this-library-right) explains the sections. `scripts/conformance.py` wrote it.",
        f"{len(rows)} rows, {failed} failed. JAX {jax.__version__} on {jax.default_backend()}.",
        "A float32 error is the largest difference over the largest expected value, a bfloat16 error the norm of the",
        "difference over the norm of the exact value. The bfloat16 bound is computed for each row from bfloat16's unit",
        "roundoff 2⁻⁸ alone: three times the root mean square error of the exact equations when every number that the",
        "layer stores gets an independent rounding error of that size (`moe/conformance/rounding.py`). A row that",
        "covers several arrays shows and names the one nearest its bound. Sizes: G groups of S tokens, E experts, K",
        "per token, C slots per expert and group. What is no gate has tests of its own: n-gram memory",
        "(`tests/layers/test_ngram_memory.py`), ring attention (`tests/layers/test_ring_attention.py`), shortcuts",
        "(`tests/models/test_shortcut.py`).",
    ]
    lines += ["", *summary(rows)]
    section = None
    for row in rows:
        if row.section != section:
            section = row.section
            lines += ["", f"## {section}", "", "| case | expected | measured | result |", "|---|---|---|---|"]
        lines.append(f"| {row.what} | {row.expected} | {row.measured} | {'ok' if row.passes else '**FAILS**'} |")
    return "\n".join(lines) + "\n"
