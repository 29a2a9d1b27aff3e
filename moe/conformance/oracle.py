"""Layers of every gate, in every dispatch mode, against the per-token oracle and against themselves on meshes.

Part of ``scripts/conformance.py``: yields rows of its table. A :class:`moe.conformance.oracle_cases.Case` is one layer;
it is compiled once for each mode and precision, and run on several batches.

Letters: G groups, S tokens per group, E experts, K choices per token, C expert capacity, D model dim, F hidden dim.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from moe.config import Capacity, ConfigError, MeshConfig
from moe.config.registry import LAYERS, find_gate
from moe.conformance import reference, reference_gates, rounding
from moe.conformance.oracle_cases import LEAK, REFUSED_MODES, Case, null_of, refused
from moe.conformance.rows import FLOAT32, Row, close, error, spelled
from moe.dispatch.modes import CONFIG_MODES
from moe.interop.layers import single_layer
from moe.layers.moe_layer import MoELayer
from moe.parallel import partition_specs
from moe.parallel.mesh import make_mesh
from moe.routing.balancing_rules import Penalty

ORACLE = "Every gate in every mode = the oracle, in y and in the gradients of x, router, experts"
DEVICES = "Equal on 1, 2, 4 and 8 devices, in training: y, all gradients, all losses and metrics"


def weights_of(
    d: int,
    f: int,
    e: int,
    seed: int,
    slots: int = 0,
    null: tuple[int, ...] = (0, 0, 0, 0),
    latent_dim: int = 0,
    gate: str = "",
    latent_norm: bool = False,
) -> dict[str, np.ndarray]:
    """Random matrices, large enough that nothing is nearly uniform or nearly linear; further parameters of the gate's
    router are ``router_parts.`` and their names."""
    rng, parts = np.random.default_rng(seed), ROUTER_PARTS.get(gate)
    inner, columns = latent_dim or d, e + sum(null)
    _, _, constant, novice = null

    def draw(*shape: int, scale: float) -> np.ndarray:
        return (rng.normal(size=shape) * scale).astype(np.float32)

    weights = {
        "router": draw(ROUTER_DIM if parts else d, columns, *([slots] if slots else []), scale=2 / d**0.5),
        "up": draw(e, inner, f, scale=2 / inner**0.5),
        "gate_matrix": draw(e, inner, f, scale=2 / inner**0.5),
        "down": draw(e, f, inner, scale=2 / f**0.5),
        "noise": draw(d, e, scale=1 / d**0.5),
    }
    for name, shape in parts(d).items() if parts else ():
        base = 1.0 if name.endswith("scale") else 0.0
        weights[f"router_parts.{name}"] = np.float32(base) + draw(
            *shape, scale=2 / shape[0] ** 0.5 if len(shape) > 1 else 0.3
        )
    if gate == "k_means":
        weights["router_parts.bias.centroids"] = draw(columns, d, scale=1.0)
    if latent_dim:
        weights["latent_down"] = draw(d, latent_dim, scale=2 / d**0.5)
        weights["latent_up"] = draw(latent_dim, d, scale=1.0)
    if latent_norm:
        weights["latent_norm"] = np.float32(1) + draw(latent_dim, scale=0.3)
    if constant:
        weights |= {"null_vectors": draw(constant, d, scale=1.0), "null_mix": draw(constant, d, 2, scale=2 / d**0.5)}
    if novice:
        weights["novices"] = draw(novice, d, scale=1.0)
    return weights


#: Arrays of a router that have no gradient.
STATE = ("router_parts.bias.centroids",)
#: H, the inner dimension of routers that have one.
ROUTER_DIM = 3
#: Gate whose router has further parameters → D → their shapes by name.
ROUTER_PARTS: Mapping[str, Callable[[int], dict[str, tuple[int, ...]]]] = types.MappingProxyType(
    {
        "cosine": lambda d: {"project": (d, ROUTER_DIM), "log_scale": (1,)},
        "zaya": lambda d: {
            "down": (d, ROUTER_DIM),
            "first": (ROUTER_DIM, ROUTER_DIM),
            "second": (ROUTER_DIM, ROUTER_DIM),
            **dict.fromkeys(("down_bias", "first_bias", "second_bias", "carry_scale", "norm.scale"), (ROUTER_DIM,)),
        },
    }
)


def own_fields(gate: str) -> dict[str, Any]:
    """Fields of a gate that fit :func:`weights_of`, with its name."""
    return {"name": gate} | ({"router_dim": ROUTER_DIM} if gate in ROUTER_PARTS else {})


def arguments(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Weights as :func:`moe.interop.layers.single_layer` takes them."""
    parts = router_parts(weights)
    plain = {name: array for name, array in weights.items() if not name.startswith("router_parts.")}
    return plain | ({"router_parts": parts} if parts else {})


def router_parts(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Further parameters of a router among the weights, by their names."""
    prefix = "router_parts."
    return {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}


def read_by(gate: str, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Matrices that a layer of this gate has."""
    kind = find_gate(gate).router
    absent = ({"router"} if kind == "none" or gate == "k_means" else set()) | (set() if kind == "noisy" else {"noise"})
    return {name: array for name, array in weights.items() if name not in absent}


#: Where a layer keeps the matrices, by their names here.
GRADIENTS = {
    "router": ("router", "kernel"),
    "noise": ("router", "noise"),
    "up": ("experts", "up"),
    "gate_matrix": ("experts", "gate"),
    "down": ("experts", "down"),
    "latent_down": ("latent", "down"),
    "latent_up": ("latent", "up"),
    "latent_norm": ("latent", "norm", "scale"),
    "null_vectors": ("null", "vectors"),
    "null_mix": ("null", "mix"),
    "novices": ("null", "novices"),
}


def program(layer: MoELayer, *, train: bool = False) -> Callable[..., Any]:
    """(x, mask, cotangent, token_ids, rng) → y, gradients by name of sum(y·cotangent), and the report as one array.

    In training the auxiliary losses are added to the objective; otherwise the report is left out, half of the program.
    """
    graphdef, parameters, rest = nnx.split(layer, nnx.Param, ...)

    def loss(parameters: Any, x: jax.Array, mask: Any, cotangent: Any, token_ids: Any, rng: Any) -> Any:
        y, report, _ = nnx.merge(graphdef, parameters, rest)(x, mask, token_ids=token_ids, train=train, rng=rng)
        total = jnp.sum(y * cotangent)
        if not train:
            return total, (y, None)
        total += report.load_balancing_loss + report.device_balance_loss + report.router_z_loss
        total += report.importance_loss + report.load_loss + report.sparsity_penalty
        return total, (y, jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(report)]))

    differentiate = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    def run(x: jax.Array, mask: Any, cotangent: Any, token_ids: Any = None, rng: Any = None) -> Any:
        token_ids = jnp.zeros(x.shape[:2], jnp.int32) if token_ids is None else token_ids
        gradients, (y, report) = differentiate(parameters, x, jnp.asarray(mask), cotangent, token_ids, rng)
        of = nnx.to_pure_dict(gradients[0])
        flat = traverse_util.flatten_dict(of)
        named = {ours: flat[path] for ours, path in GRADIENTS.items() if path in flat}
        further = traverse_util.flatten_dict(of.get("router", {}), sep=".")
        named |= {
            f"router_parts.{name}": gradient for name, gradient in further.items() if name not in ("kernel", "noise")
        }
        return y, {"x": gradients[1], **named}, report

    return run


def drawn(case: Case, seed: int) -> tuple[jax.Array | None, dict[str, np.ndarray]]:
    """The layer's key, and for the oracle the numbers that the layer draws from it."""
    if not case.draws:
        return None, {}
    key = jax.random.key(seed)
    _, gate_key, drop_key, _ = jax.random.split(key, 4)  # as MoELayer does: jitter, gate, drops, dropout
    shape = (case.g, case.s)
    draws = {
        "noisy_topk": lambda: jax.random.normal(gate_key, (*shape, case.e)),
        "switch_sampled": lambda: jax.random.gumbel(gate_key, (*shape, case.e)),
        "gshard": lambda: jax.random.uniform(gate_key, shape),
        "matryoshka": lambda: jax.random.randint(gate_key, (), 1, case.k + 1),
        "st_moe": lambda: jax.random.uniform(gate_key, (*shape, case.k)),
        "random": lambda: jax.random.uniform(gate_key, (*shape, case.e)),
    }
    numbers = {"priorities": np.asarray(jax.random.uniform(drop_key, shape))}
    return key, numbers | ({"draws": np.asarray(draws[case.gate]())} if case.gate in draws else {})


def oracle(
    case: Case, rule: reference_gates.Rule, weights: Any, mask: np.ndarray, decisions: Any
) -> Callable[..., Any]:
    """(weights, x, cotangent) → y and the gradients of sum(y·cotangent).

    Not compiled: its loops are unrolled, and compiling them takes longer than running them once.
    """
    noise = rule.draws is not None and case.gate == "noisy_topk"

    def loss(weights: Any, x: jax.Array, cotangent: Any) -> Any:
        arrays = (x, weights["router"], weights["up"], weights["gate_matrix"], weights["down"])
        if case.gate == "soft_moe":
            y = reference.soft_output(*arrays, mask)
        else:
            given: dict[str, Any] = {"noise": weights["noise"]} if noise else {}
            if parts := router_parts(weights):
                given["router_parts"] = parts
            if "latent_down" in weights:
                names = ("latent_down", "latent_up", "latent_norm")
                given["latent"] = tuple(weights[name] for name in names if name in weights)
            y = reference.moe_output(*arrays, gate=case.gate, decisions=decisions, rule=rule, null=weights, **given)
        return jnp.sum(y * cotangent), y

    differentiate = jax.grad(loss, argnums=(0, 1), has_aux=True)
    names = [name for name in read_by(case.gate, weights) if (name != "noise" or noise) and name not in STATE]

    def run(x: jax.Array, cotangent: Any) -> dict[str, Any]:
        gradients, y = differentiate(jax.tree.map(jnp.asarray, weights), x, cotangent)
        return {"y": y, "x": gradients[1], **{name: gradients[0][name] for name in names}}

    return run


#: Largest probability in tests of float32 gradients. Of p_e (g_e − Σ p g) a part of about 2⁻²⁴ / (1 − p) is rounded
#: away: at most 6e-6 here, below the bound of 1e-5.
LARGEST_PROBABILITY = 0.99


def unsaturated(x: jax.Array, router: np.ndarray) -> jax.Array:
    """Divide tokens by 4 until no probability is above :data:`LARGEST_PROBABILITY`."""
    while (near_one := jax.nn.softmax(x @ router).max(axis=-1, keepdims=True) > LARGEST_PROBABILITY).any():
        x = jnp.where(near_one, x / 4, x)
    return x


def unsaturated_router(case: Case, x: np.ndarray, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Divide W_g by 4 until no probability is above :data:`LARGEST_PROBABILITY`: as :func:`unsaturated`, for a router
    that normalises x, so that smaller tokens have the same logits."""
    router = weights["router"]
    while jax.nn.softmax(logits_of(case, x, {**weights, "router": router}, case.rule)).max() > LARGEST_PROBABILITY:
        router = router / 4
    return router


def logits_of(case: Case, x: np.ndarray, weights: Mapping[str, np.ndarray], rule: reference_gates.Rule) -> np.ndarray:
    """Router logits [G,S,E] of tokens [G,S,D], one by one."""
    router, parts = weights["router"], router_parts(weights)
    if case.gate == "power_iteration":
        router = reference_gates.tied_router(router, weights["gate_matrix"])
    return np.stack([[reference_gates.router_logits(case.gate, token, router, parts, rule) for token in g] for g in x])


def against_oracle(case: Case, seed: int, d: int = 6, f: int = 5) -> Iterator[Row]:
    """Every mode against the per-token oracle, values and gradients."""
    rng = np.random.default_rng(seed)
    soft = case.gate == "soft_moe"
    gate = case.create_gate()
    tau = LAYERS[case.gate].losses.null
    section = own_fields(case.gate) | case.gate_fields
    slots = gate.slots_per_expert
    latent = {name: case.fields[name] for name in ("latent_dim", "latent_norm") if name in case.fields}
    weights = weights_of(d, f, case.e, seed, slots, case.rule.null, gate=case.gate, **latent)
    parts = router_parts(weights)
    # Numbers that are exact in bfloat16, so that both precisions route alike.
    x = jnp.asarray(rng.normal(size=(case.g, case.s, d)), jnp.bfloat16).astype(jnp.float32)
    x = x if soft or parts else unsaturated(x, weights["router"])
    wide = np.asarray(x, np.float64)
    if case.gate == "zaya":
        weights["router"] = unsaturated_router(case, wide, weights)
    mask = rng.random((case.g, case.s)) >= case.padding
    mask[:, rng.integers(case.s)] = True
    cotangent = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    tokens = rng.integers(0, 1000, (case.g, case.s)).astype(np.int32)
    key, numbers = drawn(case, seed)
    rule, given = dataclasses.replace(case.rule, token_ids=tokens, **numbers), arguments(read_by(case.gate, weights))
    if gate.balancing is not None and not isinstance(gate.balancing, Penalty):
        given["selection_bias"] = (rng.normal(size=case.e) * 0.3).astype(np.float32)
        rule = dataclasses.replace(rule, bias=given["selection_bias"])
    logits = np.zeros((case.g, case.s, case.e)) if soft else logits_of(case, wide, weights, rule)
    if case.gate == "noisy_topk" and rule.draws is not None:
        logits = reference_gates.noisy(logits, wide @ weights["noise"], rule.draws)
    masks = {"": mask}
    if case.full:
        alone = np.zeros_like(mask)
        alone[np.arange(case.g), mask.argmax(1)] = True
        masks |= {", one real token per group": alone, ", all padding": np.zeros_like(mask)}
    known: dict[bytes, dict[str, Any]] = {}  # the oracle's results, by batch and kept assignments
    for mode in CONFIG_MODES:
        # Those of latent experts are read off the arrays.
        fields = {name: value for name, value in case.fields.items() if name != "gate" and name not in latent}
        if not soft:  # its slots are its capacity
            fields["capacity"] = Capacity(eval=case.c * (case.e + sum(case.rule.null) / tau) / (case.k * case.s))
        try:
            layer = single_layer(section, **given, dispatch=mode, **fields)
        except ConfigError as reason:
            yield Row(ORACLE, f"{case.gate}, {mode}; {case}", "refused", str(reason), refused(case, mode))
            continue
        if refused(case, mode):
            yield Row(ORACLE, f"{case.gate}, {mode}; {case}", "refused", "accepted", False)
        run = program(layer)
        # Dropless has no capacity, but expert choice keeps its own C.
        capacity = case.s if mode == "dropless" and case.gate != "expert_choice" else case.c
        k = case.e if gate.lists_all else case.k  # every expert counts as a choice
        for batch, real in masks.items():
            decisions = None if soft else reference.decide(case.gate, logits, real, k, capacity, rule)
            at = real.tobytes() + (b"" if decisions is None else decisions.kept.tobytes())
            if at not in known:
                known[at] = oracle(case, rule, weights, real, decisions)(x, cotangent)
            exact, what = known[at], f"{case.gate}, {mode}, {{}}; {case}{batch}"
            y, gradients, _ = run(x, real, cotangent, jnp.asarray(tokens), key)
            ours = {"y": y, **gradients}
            worst = errors(ours, exact)
            yield _nearest(what.format("float32"), worst, dict.fromkeys(exact, FLOAT32))
            if batch or not case.full:
                continue
            arrays = {name: weights[name] for name in exact if name not in ("y", "x")} | {"router": weights["router"]}
            numpy_x, numpy_ct = np.asarray(x), np.asarray(cotangent)
            if decisions is None:
                model = rounding.soft(numpy_x, arrays, real, numpy_ct)
            else:
                model = rounding.sparse(case.gate, numpy_x, arrays, decisions, numpy_ct, rule)
            unrounded, bound = rounding.bounds(model)
            if error({name: unrounded[name] for name in exact}, exact) > FLOAT32:
                raise AssertionError(f"moe/conformance/rounding.py differs from the layer of {case.gate}: {case}")
            y, gradients, _ = run(x.astype(jnp.bfloat16), real, cotangent, jnp.asarray(tokens), key)
            ours = {"y": y, **gradients}
            worst = {name: rounding.norm_error(np.asarray(ours[name]), unrounded[name]) for name in exact}
            yield _nearest(what.format("bfloat16"), worst, bound)


def errors(ours: Mapping[str, Any], exact: Mapping[str, Any]) -> dict[str, float]:
    """Error of each array, relative to its largest value. A gradient of one number, such as a temperature's, is a sum
    over all tokens that may cancel: it is relative to the router's gradient where that is larger."""
    worst = {name: error(ours[name], exact[name]) for name in exact}
    for name in exact:
        if name.startswith("router_parts.") and np.size(exact[name]) == 1:
            worst[name] = error(np.append(exact["router"], ours[name]), np.append(exact["router"], exact[name]))
    return worst


def _nearest(what: str, worst: dict[str, float], bound: dict[str, float]) -> Row:
    """A row for several arrays that shows the one nearest its bound."""
    tight = max(worst, key=lambda name: worst[name] / max(bound[name], 1e-30))
    passes = all(worst[name] <= bound[name] for name in worst)
    return Row(ORACLE, what, f"oracle, to {bound[tight]:.2g} ({tight})", f"{worst[tight]:.2g}", passes)


def device_counts(gate: str, **latent: Any) -> Iterator[Row]:
    """A gate's layer, with its jitter, noise, draws and drops, on 1, 2, 4 and 8 devices; ``latent``: fields of latent
    experts."""
    rng = np.random.default_rng(11)
    x = jnp.asarray(rng.normal(size=(8, 6, 8)), jnp.float32)
    mask, cotangent = rng.random((8, 6)) >= 0.2, rng.normal(size=x.shape).astype(np.float32)
    tokens, key = rng.integers(0, 1000, (8, 6)).astype(np.int32), jax.random.key(3)
    rule = find_gate(gate)
    section = own_fields(gate)
    if rule.sets_k:
        section["k"] = 1 if gate.startswith("switch") else 3
    if rule.expert_groups > 1:
        section |= {"groups": 4, "kept_groups": 2}
    fields: dict[str, Any] = {"capacity": {"train": 1.0}} | (LEAK if rule.looks_ahead else {})
    if gate == "mixtral":
        fields |= LEAK | {"drop_policy": "random"}
    weights = weights_of(8, 8, 8, 11, rule.slots_per_expert, null_of(gate, {}), gate=gate, **latent)
    given = arguments(read_by(gate, weights))
    for mode in CONFIG_MODES:
        if (gate, mode) in REFUSED_MODES:
            continue
        run = program(single_layer(section, **given, dispatch=mode, **fields), train=True)
        alone = run(x, mask, cotangent, tokens, key)
        for count in (1, 2, 4, 8):
            fsdp = 2 if count == 8 else 1
            mesh = make_mesh(MeshConfig(data=1, fsdp=fsdp, expert=count // fsdp), jax.devices()[:count])
            with jax.set_mesh(mesh):
                placed = jax.device_put(x, partition_specs.shardings(mesh, partition_specs.BATCH))
                spread = run(placed, mask, cotangent, tokens, key)
            yield close(
                DEVICES,
                f"{gate}{spelled(latent)}, {mode}, {count} device{'s' if count > 1 else ''}",
                "without a mesh",
                error(spread, alone),
                FLOAT32,
            )
