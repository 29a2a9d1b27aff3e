"""One MoE layer from given arrays, to compare it with another implementation or with a paper by hand.

:func:`run_reference` does so for npz files with Hugging Face's tensor names, as ``scripts/conformance.py`` takes them.
"""

from __future__ import annotations

import dataclasses
import operator
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe.config import Capacity, Config, ConfigError, ModelConfig, MoEConfig
from moe.config.model_section import Activation
from moe.config.parse import build
from moe.config.registry import find_gate
from moe.dispatch.buffers import make_plan
from moe.layers.moe_layer import MoELayer, create_layer
from moe.routing.balancing_rules import stored
from moe.routing.interface import Gate

Arrays = Mapping[str, np.ndarray]


def single_layer(
    gate: str | Gate | dict[str, Any],
    *,
    router: Any = None,
    up: Any,
    down: Any,
    gate_matrix: Any = None,
    shared_up: Any = None,
    shared_down: Any = None,
    shared_gate_matrix: Any = None,
    selection_bias: Any = None,
    noise: Any = None,
    router_parts: Mapping[str, Any] = types.MappingProxyType({}),
    latent_down: Any = None,
    latent_up: Any = None,
    latent_norm: Any = None,
    null_vectors: Any = None,
    null_mix: Any = None,
    novices: Any = None,
    activation: Activation = "swiglu",
    **fields: Any,
) -> MoELayer:
    """Build a float32 layer with these weights.

    Args:
        gate: a gate; or a paper's layer, by its name in moe.config.registry.LAYERS or by that ``name`` and fields of
            its gate.
        router: [D,E]; [D,E,P] for soft_moe; [P,E] for cosine, [P,E+1] for zaya; None for gates without a router.
        up: [E,D,F].
        down: [E,F,D].
        gate_matrix: [E,D,F] for swiglu and geglu.
        shared_up: [D,F'] of the shared expert, or None.
        shared_down: [F',D].
        shared_gate_matrix: [D,F'].
        selection_bias: [E] of a gate with one; None: zeros.
        noise: [D,E] of noisy_topk; None: zeros.
        router_parts: all further parameters of a router that has some, by their dotted names in it: ``project``, [D,P],
            and ``log_scale``, [1], of cosine; ``down``, ``norm.scale`` and so on of zaya; ``bias.centroids``, [E,D], of
            k_means, which has no ``router``.
        latent_down: [D,P] before the experts, whose matrices then have P in place of D.
        latent_up: [P,D] after them.
        latent_norm: [P], scale of the RMSNorm before latent_up; None: no norm.
        null_vectors: [n,D] of constant experts.
        null_mix: [n,D,2] of constant experts.
        novices: [n,D].
        activation: swiglu, geglu, gelu or relu.
        **fields: of :class:`moe.config.MoEConfig`; the layer's defaults for the others.

    Raises:
        ConfigError: impossible fields, or an array whose shape does not fit them and the other arrays.
    """
    num_experts, d_inner, d_ff = np.shape(up)
    d_model = d_inner if latent_down is None else np.shape(latent_down)[0]
    sizes = {
        "num_experts": num_experts,
        "d_ff": d_ff,
        "latent_dim": 0 if latent_down is None else d_inner,
        "latent_norm": latent_norm is not None,
        "shared_d_ff": 0 if shared_up is None else np.shape(shared_up)[1],
    }
    moe = build(MoEConfig, {"gate": gate, **sizes, **fields}, "model.moe.")
    # As a layer of a run, which is causal.
    config = Config(model=ModelConfig(d_model=d_model, activation=activation, moe=moe)).model
    layer = nnx.eval_shape(lambda: create_layer(config, rngs=nnx.Rngs(0)))  # nothing is drawn
    biases: Any = layer.router
    if layer.router is not None and isinstance(layer.router.bias, nnx.Dict):  # a rule with several arrays
        biases = layer.router.bias
        arrays: Any = stored(moe.gate.balancing.first_state(num_experts + moe.null_experts))
        for name, array in arrays.items():
            if biases[name].get_value().shape == array.shape:  # others are given, such as centroids
                biases[name].set_value(array)
    given: dict[str, tuple[Any, str, Any]] = {
        f"router_parts {name}": (operator.attrgetter(f"router.{owner}".rstrip("."))(layer), leaf, value)
        for name, value in router_parts.items()
        for owner, _, leaf in [name.rpartition(".")]
    }
    given |= {
        "router": (layer.router, "kernel", router),
        "selection_bias": (biases, "bias", selection_bias),
        "noise": (layer.router, "noise", noise),
        "up": (layer.experts, "up", up),
        "down": (layer.experts, "down", down),
        "gate_matrix": (layer.experts, "gate", gate_matrix),
        "latent_down": (layer.latent, "down", latent_down),
        "latent_up": (layer.latent, "up", latent_up),
        "latent_norm": (getattr(layer.latent, "norm", None), "scale", latent_norm),
        "null_vectors": (layer.null, "vectors", null_vectors),
        "null_mix": (layer.null, "mix", null_mix),
        "novices": (layer.null, "novices", novices),
    }
    if layer.shared is not None:
        given |= {
            "shared_up": (layer.shared.dense, "up", shared_up),
            "shared_down": (layer.shared.dense, "down", shared_down),
            "shared_gate_matrix": (layer.shared.dense, "gate", shared_gate_matrix),
        }
    for name, (module, attribute, value) in given.items():
        _assign(name, module, attribute, value, f"the gate {moe.gate_name!r} with {activation}")
    return layer


def _assign(name: str, module: Any, attribute: str, value: Any, asker: str) -> None:
    """Set a variable of a layer to a given array, after checking its shape."""
    variable = getattr(module, attribute, None)
    shape = None if variable is None else variable.get_value().shape
    if value is None and shape is not None:
        # A selection bias and noise start at zero; a missing matrix is a mistake.
        if name not in ("selection_bias", "noise"):
            raise ConfigError(f"{name}=None: {asker} needs {shape}")
        value = np.zeros(shape)
    given_shape = None if value is None else np.shape(value)
    if shape != given_shape:
        raise ConfigError(f"{name} of shape {given_shape}: must be {shape}")
    if variable is not None:
        variable.set_value(jnp.asarray(value, jnp.float32))


def run_reference(arrays: Arrays, dispatch_mode: str = "gather") -> dict[str, np.ndarray]:
    """Run a layer of another library here.

    Args:
        arrays: x [B,T,D] and, under ``weights/``, Hugging Face's tensors: of a Switch FFN (``router.classifier.weight``
            [E,D], ``experts.expert_i.wi.weight`` [F,D] and ``wo.weight`` [D,F]) with ``expert_capacity``, groups being
            rows; or of a DeepSeek-V3 MoE (``gate.weight`` [E,D], ``gate.e_score_correction_bias`` [E],
            ``experts.gate_up_proj`` [E,2F,D] with gate rows first, ``experts.down_proj`` [E,D,F], ``shared_experts.*``)
            with ``n_group``, ``topk_group``, ``num_experts_per_tok``, ``routed_scaling_factor``, ``norm_topk_prob``.
        dispatch_mode: a name in moe.dispatch.modes.CONFIG_MODES.

    Returns:
        Arrays under the names that such files use: y [B,T,D]; router_logits, [B,T,E] or [B·T,E]; for Switch dispatch
        [B,T,E], the kept one-hot, and gate [B,T,1]; for DeepSeek-V3 topk_weights and topk_index [B·T,K], best first.

    Raises:
        ConfigError: tensors of neither layer, or a tensor that the layer does not have, such as a router's bias.
    """
    weights = {name.removeprefix("weights/"): arrays[name] for name in arrays if name.startswith("weights/")}
    x = jnp.asarray(arrays["x"], jnp.float32)
    if "router.classifier.weight" in weights:
        return _run_switch(arrays, weights, x, dispatch_mode)
    if "gate.e_score_correction_bias" in weights:
        return _run_deepseek_v3(arrays, weights, x, dispatch_mode)
    raise ConfigError(f"weights {sorted(weights)}: neither Switch's router.classifier nor DeepSeek-V3's gate is there")


def _run(layer: MoELayer, x: jax.Array) -> tuple[Any, Any, Any]:
    return jax.jit(lambda x: layer(x, jnp.ones(x.shape[:2], bool)))(x)


def _all_read(weights: Arrays, *read: str) -> None:
    unread = sorted(set(weights) - set(read))
    if unread:
        raise ConfigError(f"weights {unread}: must be among {sorted(read)}")


def _run_switch(arrays: Arrays, weights: Arrays, x: jax.Array, mode: str) -> dict[str, np.ndarray]:
    num_experts, tokens = weights["router.classifier.weight"].shape[0], x.shape[1]
    capacity = min(int(arrays["expert_capacity"]), tokens)
    matrices = (f"experts.expert_{e}.{name}.weight" for e in range(num_experts) for name in ("wi", "wo"))
    _all_read(weights, "router.classifier.weight", *matrices)

    def stack(name: str) -> np.ndarray:  # E of [out,in] → [E,in,out]
        return np.stack([weights[f"experts.expert_{e}.{name}.weight"].T for e in range(num_experts)])

    layer = single_layer(
        "switch",
        router=weights["router.classifier.weight"].T,
        up=stack("wi"),
        down=stack("wo"),
        activation="relu",
        capacity=Capacity(eval=capacity * num_experts / tokens),  # C = ceil(factor·S/E)
        dispatch=mode,
    )
    y, _, routing = _run(layer, x)
    kept = make_plan(routing, capacity).kept
    return {
        "y": np.asarray(y),
        "router_logits": np.asarray(routing.router_logits),
        "gate": np.asarray(routing.combine_weights),
        # [B,T,1,E] → [B,T,E]
        "dispatch": np.asarray(jnp.sum(jax.nn.one_hot(routing.expert_index, num_experts) * kept[..., None], axis=2)),
    }


def _run_deepseek_v3(arrays: Arrays, weights: Arrays, x: jax.Array, mode: str) -> dict[str, np.ndarray]:
    shared_names = (f"shared_experts.{name}.weight" for name in ("up_proj", "down_proj", "gate_proj"))
    own = ("gate.weight", "gate.e_score_correction_bias", "experts.gate_up_proj", "experts.down_proj")
    _all_read(weights, *own, *shared_names)
    # [E,2F,D] → [E,D,2F] → two of [E,D,F]
    gate_matrix, up = np.split(weights["experts.gate_up_proj"].swapaxes(1, 2), 2, axis=2)
    num_experts, k = up.shape[0], int(arrays["num_experts_per_tok"])
    shared: dict[str, Any] = {
        ours: weights[f"shared_experts.{theirs}.weight"].T
        for ours, theirs in (
            ("shared_up", "up_proj"),
            ("shared_down", "down_proj"),
            ("shared_gate_matrix", "gate_proj"),
        )
        if f"shared_experts.{theirs}.weight" in weights
    }
    groups = int(arrays["n_group"])
    gate = dataclasses.replace(
        find_gate("deepseek_v3"),
        k=k,
        groups=groups,
        kept_groups=int(arrays["topk_group"]),
        scores_per_group=2 if groups > 1 else 1,
        renormalise=bool(arrays["norm_topk_prob"]),
        scale=float(arrays["routed_scaling_factor"]),
    )
    layer = single_layer(
        gate,
        router=weights["gate.weight"].T,
        selection_bias=weights["gate.e_score_correction_bias"],
        up=up,
        down=weights["experts.down_proj"].swapaxes(1, 2),
        gate_matrix=gate_matrix,
        capacity=Capacity(eval=num_experts / k),  # nothing is dropped there
        dispatch=mode,
        **shared,
    )
    y, _, routing = _run(layer, x)
    return {
        "y": np.asarray(y),
        "router_logits": np.asarray(routing.router_logits).reshape(-1, num_experts),
        "topk_weights": np.asarray(routing.combine_weights).reshape(-1, k),
        "topk_index": np.asarray(routing.expert_index).reshape(-1, k),
    }
