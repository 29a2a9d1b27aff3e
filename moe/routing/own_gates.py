"""Checks of a user's gate on random logits, before anything of a run is compiled or written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from moe.routing.carry import describe, first_carry, of_tokens
from moe.routing.gate_values import GateInputs
from moe.routing.guarded import check_output
from moe.routing.interface import Gate
from moe.routing.routing import Routing, assigned
from moe.system.fields import ConfigError, raised_as_errors

#: Inputs of the tokens of a probe: the logits, and fields of GateInputs.
_Tokens = dict[str, Any]


def probe(
    gate: Gate, num_experts: int, *, null_experts: int = 0, shapes: Iterable[tuple[int, int]] = ((2, 8),)
) -> None:
    """Run a user's gate on random logits, in training, evaluation and generation, and refuse it in one sentence if it
    cannot route them.

    Args:
        gate: of a user's module.
        num_experts: FFN experts.
        null_experts: further experts, without an FFN.
        shapes: numbers of groups and of tokens per group to try.

    Raises:
        ConfigError: the rule raises, returns something other than a GateOutput of the right shapes and types, an expert
            that does not exist or twice for one token, or a weight that is negative or not finite; or it is no pure
            function, reads other tokens without ``looks_ahead``, or is another rule in generation.
    """
    columns = num_experts + null_experts
    for groups, size in shapes:
        for train in (False, True):
            _probe(gate, num_experts, columns, groups, size, train=train)
    if gate.generates:
        _probe_generation(gate, num_experts, columns)


def one_device() -> Mesh:
    """A mesh of one device, on which code that reads the mesh computes something else than on a larger one."""
    return Mesh(np.asarray(jax.local_devices()[:1]), ("data",))


def _probe(gate: Gate, num_experts: int, columns: int, groups: int, size: int, *, train: bool) -> None:
    """Run a gate in training, with a key, or in evaluation."""
    name = f"gate {type(gate).__name__}"

    def traced() -> tuple[Any, _Tokens]:
        apply = jax.jit(_applied(gate, columns, jax.random.key(1) if train else None))
        return apply, _tokens(gate, columns, groups, size, noisy=train)

    with raised_as_errors(f"{name}: route"):
        compiled, tokens = traced()
        routing = compiled(tokens)
        with jax.set_mesh(one_device()):
            anew, same_tokens = traced()
            again = anew(same_tokens)  # a gate that keeps a tracer fails now
        others = []
        if not gate.looks_ahead or (gate.generates and not gate.keeps_prompt and not train):
            for kept, scale in ((_kept(groups, size, 0), 0.3), (_kept(groups, size, 1), 3.0)):
                others.append((kept, compiled(_with_others(gate, tokens, kept, scale))))
    _check_values(gate, num_experts, columns, routing, "training" if train else "evaluation")
    same = "other experts or weights when it is called again, or on one device: it must be a pure function that draws"
    _require_alike(
        f"{name}: route returns {same} from inputs.rng alone and does not read the mesh",
        routing,
        again,
        np.ones((groups, size), bool),
    )
    alone = "of a token depend on other tokens: read its own numbers alone, or set looks_ahead = True in the gate"
    for kept, other in others:
        _require_alike(f"{name}: the experts, weights or carry {alone}", routing, other, kept)


def _probe_generation(gate: Gate, num_experts: int, columns: int) -> None:
    """Compare what a gate gives whole texts and their tokens one by one, as generation calls it, with evaluation."""
    name, groups, size = f"gate {type(gate).__name__}", 2, 7
    tokens = _tokens(gate, columns, groups, size, noisy=False)
    tokens["segment_ids"] = jnp.ones_like(tokens["segment_ids"])
    placed = tokens | {"positions": jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (groups, size))}
    single = jax.tree.map(lambda leaf: leaf.reshape(-1, 1, *leaf.shape[2:])[::-1], placed)  # the last token first
    if gate.keeps_prompt:
        kept = _kept_of_prompt(gate, tokens)
        single["prompt"] = jax.tree.map(lambda leaf: jnp.repeat(leaf, size, axis=0)[::-1], kept)
    with raised_as_errors(f"{name}: route"):
        evaluated, prompt, steps = (
            jax.jit(_applied(gate, columns, None))(inputs) for inputs in (tokens, placed, single)
        )
    _check_values(gate, num_experts, columns, steps, "generation")
    if not gate.routes_by_logits:  # draws of a position, or experts in turn
        return
    by_row = jax.tree.map(lambda leaf: leaf[::-1].reshape(groups, size, *leaf.shape[2:]), steps)
    for routing in (prompt, by_row):
        _require_alike(
            f"{name}: route gives a token of a text that is generated other experts, weights or carry than in "
            "evaluation: use the token's own numbers, inputs.positions and inputs.prompt, or set looks_ahead = True in "
            "the gate",
            evaluated,
            routing,
            np.ones((groups, size), bool),
        )


def _kept_of_prompt(gate: Gate, tokens: _Tokens) -> Any:
    """What a gate keeps of these texts. Raises ConfigError if it is not one thing for each row, of its own tokens."""
    name, (groups, size) = f"gate {type(gate).__name__}: of_prompt", tokens["mask"].shape

    @jax.jit
    def of_prompt(logits: Array, mask: Array) -> Any:
        return gate.of_prompt(logits, GateInputs(mask, segment_ids=mask.astype(jnp.int32)))

    logits, mask = tokens["logits"], tokens["mask"]
    shorter = mask & (jnp.arange(size) < 4)
    first = shorter & (jnp.arange(groups) == 0)[:, None]  # the prompt of the first row
    other = jnp.where(first[..., None], logits, jax.random.normal(jax.random.key(3), logits.shape))
    with raised_as_errors(name):
        whole, one, two = of_prompt(logits, mask), of_prompt(logits, shorter), of_prompt(other, shorter)
    leaves = jax.tree.leaves(whole)
    if not leaves or any(jnp.shape(leaf)[:1] != (groups,) for leaf in leaves):
        raise ConfigError(f"{name} returns {describe(whole)}: must be arrays whose first axis is the {groups} rows")
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        if not np.allclose(a[0], b[0], rtol=1e-5, atol=1e-7, equal_nan=True):
            raise ConfigError(f"{name} depends on other rows or on padding: read the tokens of inputs.mask, row by row")
    return whole


def _tokens(gate: Gate, columns: int, groups: int, size: int, *, noisy: bool) -> _Tokens:
    """Random logits, and the other inputs of each token."""
    logits = jax.random.normal(jax.random.key(0), (groups, size, columns))
    return {
        "logits": logits,
        "mask": jnp.ones((groups, size), bool),
        "noise_logits": logits if noisy and gate.router == "noisy" else None,
        "token_ids": jnp.arange(groups * size, dtype=jnp.int32).reshape(groups, size),
        "segment_ids": jnp.broadcast_to(1 + jnp.arange(size, dtype=jnp.int32) // 4, (groups, size)),
        "carry": of_tokens(first_carry([gate], columns), (groups, size)),
    }


def _kept(groups: int, size: int, first: int) -> np.ndarray:
    """Tokens [G,S] to leave: every second one of the first group, with its first token or without."""
    kept = np.zeros((groups, size), bool)
    kept[0, first::2] = True
    return kept


def _with_others(gate: Gate, tokens: _Tokens, kept: np.ndarray, scale: float) -> _Tokens:
    """The inputs with those of tokens that are not kept replaced: other logits, ids and documents, some are padding."""
    shape = tokens["mask"].shape
    keys = iter(jax.random.split(jax.random.key(2), 2 + len(jax.tree.leaves(tokens["carry"]))))

    def drawn(like: Array) -> Array:
        return like + scale * jax.random.normal(next(keys), like.shape)

    other = {
        "logits": drawn(jnp.zeros_like(tokens["logits"])),
        "mask": (jnp.arange(shape[1]) % 4 < 2) & tokens["mask"] if gate.routes_by_logits else tokens["mask"],
        "noise_logits": None if tokens["noise_logits"] is None else drawn(tokens["noise_logits"]),
        "token_ids": tokens["token_ids"][::-1, ::-1],
        "segment_ids": tokens["segment_ids"] + 1,
        "carry": jax.tree.map(drawn, tokens["carry"]),
    }
    return jax.tree.map(lambda a, b: jnp.where(kept.reshape(*shape, *(1,) * (a.ndim - 2)), a, b), tokens, other)


def _applied(gate: Gate, columns: int, rng: Array | None) -> Any:
    """The routing as a function of the tokens."""
    rule = gate.balancing
    state = None if rule is None else rule.first_state(columns)
    bias = None if rule is None else rule.selection_bias(state)

    def apply(tokens: _Tokens) -> Routing:
        fields = {name: value for name, value in tokens.items() if name != "logits"}
        inputs = GateInputs(rng=rng, train=rng is not None, selection_bias=bias, state=state, **fields)
        logits, finite = tokens["logits"], jnp.ones_like(inputs.mask)
        # Not guarded: the guard would call tokens with wrong values broken, which are to be refused here.
        output = check_output(gate, type(gate).route(gate, logits, inputs), logits)
        return assigned(gate, output, logits, inputs.mask, finite, carry=inputs.carry)

    return apply


def _check_values(gate: Gate, num_experts: int, columns: int, routing: Routing, where: str) -> None:
    name, k = f"gate {type(gate).__name__}", columns if gate.lists_all else gate.experts_per_token(num_experts)
    index, weights = np.asarray(routing.expert_index), np.asarray(routing.combine_weights)
    if index.shape[-1] != k:
        raise ConfigError(f"{name}: route returns {index.shape[-1]} experts a token, must be K = {k}")
    ordered = np.sort(index, axis=-1)
    if index.min() < 0 or index.max() >= columns or (ordered[..., 1:] == ordered[..., :-1]).any():
        groups, size = index.shape[:2]
        raise ConfigError(
            f"{name}: expert_index must be different experts from 0 to {columns - 1} for each token; it is not for "
            f"{groups} groups of {size} tokens in {where}"
        )
    shares = {"weights": weights, "probs": routing.router_probs, "smooth_load": routing.smooth_load}
    for field, values in shares.items():
        if values is not None and not (np.isfinite(values).all() and np.min(values) >= 0):
            raise ConfigError(f"{name}: {field} must be finite and not negative")
    if routing.needed_bias is not None and np.isnan(routing.needed_bias).any():
        raise ConfigError(f"{name}: needed_bias must not be NaN")


def _require_alike(message: str, one: Routing, other: Routing, tokens: np.ndarray) -> None:
    """Raise a ConfigError with this message unless these tokens [G,S] have the same experts, weights and carry."""
    parts = [(routing.expert_index, routing.chosen, routing.combine_weights, routing.carry) for routing in (one, other)]
    for a, b in zip(*map(jax.tree.leaves, parts), strict=True):
        found, again = np.asarray(a)[tokens], np.asarray(b)[tokens]
        if not np.allclose(found, again, rtol=1e-5, atol=1e-7, equal_nan=True):
            raise ConfigError(message)
