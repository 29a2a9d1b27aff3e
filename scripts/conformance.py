"""Proves the MoE layer against the papers' equations and other implementations, and writes the table.

    python scripts/conformance.py [--layers=FOLDER] [--out=docs/conformance.md]

Takes some minutes on two CPU cores. Exits with 1 if a row fails. ``--layers`` names a folder of npz files, each one
layer of another library with its weights, input and output (see :func:`moe.interop.layers.run_reference`).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from moe import balancing, dispatch, sharding  # noqa: E402
from moe.config import MeshConfig  # noqa: E402
from moe.experts import MoELayer  # noqa: E402
from moe.interop.convert import load_balancing_loss as hugging_face_loss  # noqa: E402
from moe.interop.layers import run_reference, single_layer  # noqa: E402
from moe.routing import GATES, Routing, route  # noqa: E402
from tests import reference  # noqa: E402

FLOAT32 = 1e-5
BFLOAT16_ULP = 2**-8


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        section: heading it stands under.
        what: was measured.
        expected: the value or source.
        measured: the value, or the largest error.
        passes: whether it is close enough.
    """

    section: str
    what: str
    expected: str
    measured: str
    passes: bool


def value(section: str, what: str, expected: float, measured: Any, tolerance: float) -> Row:
    """A number against the number it must be; tolerance is absolute."""
    measured = float(measured)
    return Row(section, what, f"{expected:.6g}", f"{measured:.6g}", abs(measured - expected) <= tolerance)


def error(actual: Any, expected: Any) -> float:
    """Largest difference over the largest expected value, of two trees."""
    worst = 0.0
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        scale = np.abs(theirs).max(initial=0.0)
        difference = np.abs(ours - theirs).max(initial=0.0)
        worst = max(worst, float(difference / scale) if scale > 0 else float(difference))
    return worst


def norm_error(actual: Any, expected: Any) -> float:
    """Euclidean norm of the difference over that of the expected array: rounding in the mean, not its worst draw."""
    difference = np.asarray(actual, np.float64) - np.asarray(expected, np.float64)
    norm = float(np.linalg.norm(np.asarray(expected, np.float64)))
    return float(np.linalg.norm(difference)) / (norm or 1.0)


def close(section: str, what: str, source: str, worst: float, tolerance: float) -> Row:
    """An error against its bound."""
    return Row(section, what, f"{source}, to {tolerance:.2g}", f"{worst:.2g}", worst <= tolerance)


def routing_of(gate: str, logits: np.ndarray, k: int) -> tuple[Routing, jax.Array]:
    """The routing of logits [G,S,E], all tokens real, and their mask."""
    mask = jnp.ones(logits.shape[:2], bool)
    return route(GATES[gate], jnp.asarray(logits, jnp.float32), mask, experts_per_token=k), mask


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
        per_group = balancing.load_balancing_loss(top2, mask, first_choice=True, parts=logits.shape[0])
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
    plan = jax.jit(dispatch.make_plan, static_argnames="capacity")
    for tokens, factor, percent in DROPPED:
        groups = 2**22 // tokens
        shape = (groups, tokens, 8)
        rng = jax.random.key(tokens + int(100 * factor))
        mask = jnp.ones(shape[:2], bool)
        routing = route(GATES["random"], jnp.zeros(shape), mask, experts_per_token=1, rng=rng)
        kept = plan(routing, capacity=dispatch.expert_capacity(factor, 1, tokens, 8)).kept
        # Of one group's share: the error of the mean is its deviation over sqrt(groups); five of them, and the print's.
        shares = 100 * (1 - np.asarray(kept, np.float64).mean(axis=(1, 2)))
        bound = 5 * shares.std() / np.sqrt(groups) + 0.5 * 10.0 ** -(2 if percent >= 0.1 else 3)
        what = f"dropped, %, {tokens} tokens, capacity factor {factor}, {groups} groups, ± {bound:.2g}"
        yield value("Dropped share by chance, E = 8, top-1", what, percent, shares.mean(), bound)


def reference_layers(folder: Path) -> Iterator[Row]:
    """Layers of other libraries, by their own weights."""
    files = sorted(folder.glob("*.npz"))
    if not files:
        yield Row("Layers of other libraries", f"{folder}", "npz files", "none found", False)
    for path in files:
        with np.load(path) as archive:
            arrays = dict(archive)
        drops = "expert_capacity" in arrays
        for mode in dispatch.MODES:
            if drops and mode == "dropless":
                continue  # has no capacity
            ours = run_reference(arrays, mode)
            if "topk_index" in ours:
                # The order of the chosen is nobody's promise: compared as [T,E].
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


def weights_of(d: int, f: int, e: int, seed: int, slots: int = 0) -> dict[str, np.ndarray]:
    """Random matrices, large enough that nothing is nearly uniform or nearly linear."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, scale: float) -> np.ndarray:
        return (rng.normal(size=shape) * scale).astype(np.float32)

    return {
        "router": draw(d, e, *([slots] if slots else []), scale=2 / d**0.5),
        "up": draw(e, d, f, scale=2 / d**0.5),
        "gate_matrix": draw(e, d, f, scale=2 / d**0.5),
        "down": draw(e, f, d, scale=2 / f**0.5),
    }


def value_and_gradients(layer: MoELayer, x: jax.Array, mask: np.ndarray, cotangent: Any, **inputs: Any) -> Any:
    """y, and the gradients of sum(y·cotangent) for x and by parameter name."""
    graphdef, parameters, rest = nnx.split(layer, nnx.Param, ...)

    def loss(parameters: Any, x: jax.Array) -> Any:
        y, _, _ = nnx.merge(graphdef, parameters, rest)(x, jnp.asarray(mask), **inputs)
        return jnp.sum(y * cotangent), y

    gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(parameters, x)
    of = nnx.to_pure_dict(gradients[0])
    named = {"up": of["experts"]["up"], "gate_matrix": of["experts"]["gate"], "down": of["experts"]["down"]}
    if "router" in of:
        named["router"] = of["router"]["kernel"]
    return y, {"x": gradients[1], **named}


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer to hold against the oracle: G groups of S tokens, E experts, K choices, room for C.

    Attributes:
        fields: of MoEConfig.
        padding: share of tokens that are.
        rule: what the oracle is told.
    """

    gate: str
    g: int
    s: int
    e: int
    k: int
    c: int
    padding: float = 0.0
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    rule: reference.Rule = reference.PLAIN


GROUPED = {"expert_groups": 3, "kept_expert_groups": 2}
CASES = (
    Case("dense_mixture", 2, 5, 3, 3, 5, 0.3),
    Case("noisy_topk", 2, 6, 5, 3, 4, 0.3),
    Case("gshard", 2, 7, 3, 2, 3, 0.3),
    Case("switch", 2, 7, 3, 1, 2, 0.3),
    Case("switch_sampled", 2, 6, 5, 2, 1, 0.2),  # without a key: Switch's own
    Case("switch", 2, 6, 4, 2, 1, 0.0, {"renormalise": 1}, reference.Rule(renormalise=True)),
    Case("switch", 2, 7, 5, 1, 1, 0.2, {"overflow_to_next": True}, reference.Rule(overflow=True)),
    Case("mixtral", 2, 6, 5, 2, 2, 0.2, {"overflow_to_next": True}, reference.Rule(overflow=True)),
    Case("st_moe", 2, 7, 3, 2, 2, 0.3, {}, reference.Rule(policy="probability")),
    Case("mixtral", 1, 6, 5, 5, 6, 0.2),
    Case("mixtral", 2, 6, 7, 2, 3, 1.0),
    Case("deepseek_moe", 2, 6, 6, 3, 2, 0.2, {"routing_scale": 1.5, **GROUPED}, reference.Rule(3, 2, scale=1.5)),
    Case("deepseek_v3", 2, 6, 9, 3, 2, 0.2, GROUPED, reference.Rule(3, 2, True, 2.5)),
    Case("expert_choice", 2, 7, 3, 2, 5, 0.3, {"accept_future_leak": True}),
    Case("soft_moe", 2, 5, 3, 3, 5, 0.3, {"accept_future_leak": True, "slots_per_expert": 2}),
    Case("hash", 2, 6, 5, 2, 2, 0.2),
    Case("balanced", 2, 7, 3, 2, 3, 0.3),
)


def against_oracle(case: Case, seed: int, d: int = 6, f: int = 5) -> Iterator[Row]:
    """Every mode against the per-token oracle, values and gradients."""
    rng = np.random.default_rng(seed)
    soft = case.gate == "soft_moe"
    weights = weights_of(d, f, case.e, seed, slots=2 if soft else 0)
    # Numbers that bfloat16 holds exactly: both precisions route alike.
    x = jnp.asarray(rng.normal(size=(case.g, case.s, d)), jnp.bfloat16).astype(jnp.float32)
    mask = rng.random((case.g, case.s)) >= case.padding
    cotangent = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    tokens = rng.integers(0, 1000, (case.g, case.s)).astype(np.int32)
    rule = dataclasses.replace(case.rule, token_ids=tokens)
    given = {name: array for name, array in weights.items() if name != "router" or GATES[case.gate].router != "none"}
    if case.gate == "deepseek_v3":
        bias = (rng.normal(size=case.e) * 0.3).astype(np.float32)
        given["selection_bias"], rule = bias, dataclasses.replace(rule, bias=bias)
    logits = np.zeros((case.g, case.s, case.e)) if soft else np.asarray(x, np.float64) @ weights["router"]

    def oracle(weights: Any, x: jax.Array) -> Any:
        up, gate_matrix, down = (weights[name].astype(x.dtype) for name in ("up", "gate_matrix", "down"))
        arrays = (x, weights["router"], up, gate_matrix, down)
        if soft:
            y = reference.soft_output(*arrays, mask)
        else:
            y = reference.moe_output(*arrays, gate=case.gate, decisions=decisions, rule=rule)
        return jnp.sum(y * cotangent), y

    def expected(dtype: str) -> dict[str, Any]:
        gradients, y = jax.jit(jax.grad(oracle, argnums=(0, 1), has_aux=True))(device_weights, x.astype(dtype))
        of = {name: gradients[0][name] for name in given if name != "selection_bias"}
        return {"y": y, "x": gradients[1], **of}

    device_weights = jax.tree.map(jnp.asarray, weights)
    k = case.e if case.gate == "expert_choice" else case.k  # an expert's column is a choice
    before, exact, rounded = None, {}, {}
    for mode in dispatch.MODES:
        if (soft and mode != "einsum") or (mode == "dropless" and case.fields.get("overflow_to_next")):
            continue  # refused, with a reason
        # Dropless has room for all, but expert choice keeps its own C.
        capacity = case.s if mode == "dropless" and case.gate != "expert_choice" else case.c
        if not soft:
            decisions = reference.decide(case.gate, logits, mask, k, capacity, rule=rule)
        if before != capacity:
            exact, rounded, before = expected("float32"), expected("bfloat16"), capacity
        factor = case.c * case.e / (case.k * case.s)
        fields = {"experts_per_token": case.k, "eval_capacity_factor": factor, "dispatch": mode, **case.fields}
        layer = single_layer(case.gate, **given, **fields)
        for dtype in ("float32", "bfloat16"):
            y, gradients = value_and_gradients(layer, x.astype(dtype), mask, cotangent, token_ids=jnp.asarray(tokens))
            ours = {"y": y, **gradients}
            if dtype == "float32":
                worst, bound = {name: error(ours[name], exact[name]) for name in exact}, dict.fromkeys(exact, FLOAT32)
            else:
                # What bfloat16 costs is what it costs the oracle, computed in bfloat16 with the same routing; XLA may
                # leave other intermediate roundings out there than here.
                worst = {name: norm_error(ours[name], exact[name]) for name in exact}
                bound = {name: 3 * norm_error(rounded[name], exact[name]) + BFLOAT16_ULP for name in exact}
            tight = max(exact, key=lambda name: worst[name] / bound[name])
            extra = "".join(f", {name}={value}" for name, value in case.fields.items() if name != "accept_future_leak")
            shape = f"G {case.g} S {case.s} E {case.e} K {case.k} C {case.c}, padding {case.padding:.0%}{extra}"
            yield Row(
                "Every mode = the oracle, in y and in the gradients of x, router, experts",
                f"{case.gate}, {mode}, {dtype}; {shape}",
                f"oracle, to {bound[tight]:.2g} ({tight})",
                f"{worst[tight]:.2g}",
                all(worst[name] <= bound[name] for name in exact),
            )


def router_gradient() -> Iterator[Row]:
    """At K = 1 the output's gradient reaches the router where the paper keeps the probability as weight."""
    section = "The language-model gradient reaches the router at K = 1"
    x = jnp.asarray(np.random.default_rng(5).normal(size=(2, 6, 6)), jnp.float32)
    for gate, learns in (("switch", True), ("deepseek_moe", True), ("deepseek_v3", True), ("mixtral", False)):
        weights = weights_of(6, 5, 4, seed=5)
        fields: dict[str, Any] = {}
        if gate == "deepseek_v3":
            fields = {"expert_groups": 1, "kept_expert_groups": 1, "renormalise": 0}
        layer = single_layer(gate, **weights, experts_per_token=1, eval_capacity_factor=4.0, **fields)
        _, gradients = value_and_gradients(layer, x, np.ones((2, 6), bool), np.ones(x.shape, np.float32))
        largest = float(jnp.abs(gradients["router"]).max())
        expected = "> 1e-3" if learns else "0: a softmax over one logit is always 1"
        yield Row(section, gate, expected, f"{largest:.3g}", (largest > 1e-3) == learns)


def device_counts() -> Iterator[Row]:
    """The same layer on 1, 2, 4 and 8 devices."""
    section = "Equal on 1, 2, 4 and 8 devices, in y and in all gradients"
    rng = np.random.default_rng(11)
    x = jnp.asarray(rng.normal(size=(8, 6, 8)), jnp.float32)
    mask, cotangent = rng.random((8, 6)) >= 0.2, rng.normal(size=x.shape).astype(np.float32)
    grouped = {"experts_per_token": 3, "eval_capacity_factor": 1.0, "expert_groups": 4, "kept_expert_groups": 2}
    gates: dict[str, dict[str, Any]] = {
        "switch": {"eval_capacity_factor": 1.0},
        "deepseek_v3": grouped,
        "expert_choice": {"accept_future_leak": True},
    }
    for gate, fields in gates.items():
        for mode in dispatch.MODES:
            layer = single_layer(gate, **weights_of(8, 8, 8, seed=11), dispatch=mode, **fields)
            alone = value_and_gradients(layer, x, mask, cotangent)
            for count in (1, 2, 4, 8):
                mesh_config = MeshConfig(data=1, fsdp=2 if count == 8 else 1, expert=count // (2 if count == 8 else 1))
                mesh = sharding.make_mesh(mesh_config, jax.devices()[:count])
                with jax.set_mesh(mesh):
                    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, sharding.BATCH))
                    spread = value_and_gradients(layer, placed, mask, cotangent)
                worst = error(spread, alone)
                yield close(section, f"{gate}, {mode}, {count} devices", "without a mesh", worst, FLOAT32)


def run(layers: Path) -> Iterator[Row]:
    """All rows, in the order of the table."""
    yield from check_values()
    yield from dropped_share()
    yield from reference_layers(layers)
    yield from router_gradient()
    for seed, case in enumerate(CASES):
        yield from against_oracle(case, seed)
    yield from device_counts()


def table(rows: list[Row]) -> str:
    """Markdown."""
    failed = sum(not row.passes for row in rows)
    lines = [
        "# Conformance",
        "",
        "Written by `python scripts/conformance.py`; the oracle is `tests/reference.py`, plain loops over tokens.",
        f"{len(rows)} rows, {failed} failed. JAX {jax.__version__} on {jax.default_backend()}.",
        "A float32 error is the largest difference over the largest expected value. A bfloat16 error is the norm of",
        "the difference over that of the float32 oracle, its bound 2⁻⁸ plus three times the oracle's own in bfloat16",
        "(the three was chosen after seeing the errors: these rows show rounding, the float32 rows the formula). Where",
        "a row stands for several arrays, the one nearest its bound is shown and named.",
    ]
    section = None
    for row in rows:
        if row.section != section:
            section = row.section
            lines += ["", f"## {section}", "", "| what | expected | measured | |", "|---|---|---|---|"]
        lines.append(f"| {row.what} | {row.expected} | {row.measured} | {'ok' if row.passes else '**FAILS**'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Prints rows as they are measured, writes the table, and says by its exit status whether all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=Path, default=ROOT.parent / "shared" / "parity" / "layers")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "conformance.md")
    arguments = parser.parse_args()
    rows = []
    for row in run(arguments.layers):
        rows.append(row)
        print(f"{'ok   ' if row.passes else 'FAILS'} {row.what}: {row.measured}, expected {row.expected}", flush=True)
    arguments.out.write_text(table(rows))
    failed = sum(not row.passes for row in rows)
    print(f"{len(rows)} rows, {failed} failed; {arguments.out}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
