"""The families of open checkpoints: how each writes our settings in ``config.json``, and what it calls our parameters.

In: a parsed ``config.json``. Out: a :class:`moe.config.Config`, and the way back. Both generations of the file are
read: ``rope_theta`` and ``torch_dtype`` at the top level, or ``rope_parameters`` and ``dtype``.

A family is one entry of :data:`FAMILIES`. What a family's code computes and ours does not is refused by name, never
guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moe.config import Config, ConfigError, DataConfig, ModelConfig, MoEConfig, layer_kinds, sparse_layers, to_dict
from moe.routing.resolve import from_config_dict

Json = dict[str, Any]

#: hidden_act ↔ model.activation; the first name of an activation is the one that is written.
_ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
    "gelu": "geglu_exact",
    "relu": "reglu",
}


def _renormalised(moe: MoEConfig) -> bool | str:
    """norm_topk_prob: whether the chosen probabilities are divided by their sum; the gate's name if it is none of those
    two rules."""
    if moe.gate in ("mixtral", "gshard"):
        return True
    limited = moe.kept_expert_groups < moe.expert_groups or moe.routing_scale != 1.0
    return moe.renormalise == 1 if moe.gate in ("switch", "deepseek_moe") and not limited else moe.gate


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of open checkpoints.

    Attributes:
        architecture: class of that library, for ``architectures``.
        read: the fields of ``config.json`` that are this family's own → (changes of ModelConfig, changes of MoEConfig).
        write: the way back.
        layer: our parameter within a block → the tensor's name after ``model.layers.N.``; ``{expert}`` is a number.
        defaults: what the family's code takes for a field that the file leaves out.
    """

    architecture: str
    read: Callable[[Json], tuple[Json, Json]]
    write: Callable[[ModelConfig], Json]
    layer: Mapping[str, str]
    defaults: Mapping[str, Any]


# --- Names of tensors ------------------------------------------------------------------------------------------------
_ATTENTION = {
    "attention_norm.scale": "input_layernorm.weight",
    "ffn_norm.scale": "post_attention_layernorm.weight",
    "attention.query": "self_attn.q_proj.weight",
    "attention.key": "self_attn.k_proj.weight",
    "attention.value": "self_attn.v_proj.weight",
    "attention.out": "self_attn.o_proj.weight",
    "attention.query_bias": "self_attn.q_proj.bias",
    "attention.key_bias": "self_attn.k_proj.bias",
    "attention.value_bias": "self_attn.v_proj.bias",
    "attention.out_bias": "self_attn.o_proj.bias",
    "attention.query_norm.scale": "self_attn.q_norm.weight",
    "attention.key_norm.scale": "self_attn.k_norm.weight",
    "dense.gate": "mlp.gate_proj.weight",
    "dense.up": "mlp.up_proj.weight",
    "dense.down": "mlp.down_proj.weight",
}
_EXPERTS = {
    "moe.router.kernel": "mlp.gate.weight",
    "moe.experts.gate": "mlp.experts.{expert}.gate_proj.weight",
    "moe.experts.up": "mlp.experts.{expert}.up_proj.weight",
    "moe.experts.down": "mlp.experts.{expert}.down_proj.weight",
}
_SHARED = {
    "moe.shared.gate": "mlp.shared_expert_gate.weight",
    "moe.shared.dense.gate": "mlp.shared_expert.gate_proj.weight",
    "moe.shared.dense.up": "mlp.shared_expert.up_proj.weight",
    "moe.shared.dense.down": "mlp.shared_expert.down_proj.weight",
}
_DEEPSEEK_SHARED = {
    "moe.shared.dense.gate": "mlp.shared_experts.gate_proj.weight",
    "moe.shared.dense.up": "mlp.shared_experts.up_proj.weight",
    "moe.shared.dense.down": "mlp.shared_experts.down_proj.weight",
}
_MIXTRAL_EXPERTS = {
    "moe.router.kernel": "block_sparse_moe.gate.weight",
    "moe.experts.gate": "block_sparse_moe.experts.{expert}.w1.weight",
    "moe.experts.up": "block_sparse_moe.experts.{expert}.w3.weight",
    "moe.experts.down": "block_sparse_moe.experts.{expert}.w2.weight",
}
#: Our parameters outside the blocks → tensors.
OUTSIDE = {
    "embedding.table": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "unembedding.kernel": "lm_head.weight",
}


# --- Fields of config.json -------------------------------------------------------------------------------------------
def _need(source: Json, name: str) -> Any:
    if source.get(name) is None:
        raise ConfigError(f"config.json: has no {name}")
    return source[name]


def _count(source: Json, name: str) -> int:
    value = _need(source, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: {name}={value!r}: must be a positive whole number")
    return value


def _rope_theta(source: Json) -> float:
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"config.json: rope_type={kind!r}: scaled rotary positions are not supported, only 'default'")
    partial = rope.get("partial_rotary_factor", source.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ConfigError(
            f"config.json: partial_rotary_factor={partial}: all of a head is rotated here, only 1 will do"
        )
    return float(rope.get("rope_theta") or source["rope_theta"])


def _window(source: Json) -> int:
    return int(source.get("sliding_window") or 0)


def _bias(source: Json) -> str:
    return "all" if source.get("attention_bias") else "none"


def _one_window(model: ModelConfig) -> int:
    """The window of all layers; a family that cannot say more reads it back so, and the difference is reported."""
    return max(kind.window for kind in layer_kinds(model))


def _gate(source: Json) -> str:
    return "mixtral" if source.get("norm_topk_prob") else "switch"


def _sparse(layers: list[int], num_layers: int) -> Json:
    """Changes of MoEConfig that make exactly these layers MoE."""
    if not layers:
        return {"gate": "none"}
    return {} if len(layers) == num_layers else {"layers": tuple(layers)}


def _read_mistral(source: Json) -> tuple[Json, Json]:
    return {"sliding_window": _window(source)}, {"gate": "none"}


def _write_mistral(model: ModelConfig) -> Json:
    return {"sliding_window": _one_window(model) or None}


def _read_mixtral(source: Json) -> tuple[Json, Json]:
    return {"sliding_window": _window(source)}, {
        "num_experts": _count(source, "num_local_experts"),
        "jitter": float(source.get("router_jitter_noise") or 0.0),
    }


def _write_mixtral(model: ModelConfig) -> Json:
    return {
        "intermediate_size": model.moe.d_ff,
        "sliding_window": _one_window(model) or None,
        "num_local_experts": model.moe.num_experts,
        "router_jitter_noise": model.moe.jitter,
    }


def _read_olmoe(source: Json) -> tuple[Json, Json]:
    changes = {"qk_norm": "full", "attention_bias": _bias(source), "clip_qkv": float(source.get("clip_qkv") or 0.0)}
    return changes, {"gate": _gate(source), "num_experts": _count(source, "num_experts")}


def _write_olmoe(model: ModelConfig) -> Json:
    return {
        "intermediate_size": model.moe.d_ff,
        "attention_bias": model.attention_bias == "all",
        "clip_qkv": model.clip_qkv or None,
        "num_experts": model.moe.num_experts,
        "norm_topk_prob": _renormalised(model.moe) is True,
    }


def _read_qwen_experts(source: Json) -> Json:
    """What Qwen's two families share: some layers are dense."""
    num_experts = source.get("num_experts", source.get("num_local_experts")) or 0
    step, dense, num_layers = source["decoder_sparse_step"], source.get("mlp_only_layers") or (), _num_layers(source)
    sparse = [n for n in range(num_layers) if num_experts and n not in dense and (n + 1) % step == 0]
    moe = {"gate": _gate(source), "num_experts": num_experts, "d_ff": _count(source, "moe_intermediate_size")}
    return moe | _sparse(sparse, num_layers)


def _num_layers(source: Json) -> int:
    return _count(source, "num_hidden_layers")


def _write_qwen_experts(model: ModelConfig) -> Json:
    moe = model.moe
    return {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.d_ff,
        "norm_topk_prob": _renormalised(moe) is True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [n for n, sparse in enumerate(sparse_layers(model)) if not sparse],
    }


def _read_qwen2(source: Json) -> tuple[Json, Json]:
    # The newer generation always lists the kind of each layer; before, the layers from max_window_layers on had the
    # window, in name: the code of that library's own attention never read it but in odd layers.
    window, num_layers = _window(source) if source.get("use_sliding_window") else 0, _num_layers(source)
    kinds = source.get("layer_types") or [
        "sliding_attention" if n % 2 == 0 and n < source["max_window_layers"] else "full_attention"
        for n in range(num_layers)
    ]
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise ConfigError(f"config.json: layer_types: {sorted(unknown)} are not supported")
    windowed = [n for n, kind in enumerate(kinds) if window and kind == "sliding_attention"]
    changes: Json = {"attention_bias": "qkv" if source.get("qkv_bias") else "none"}
    if windowed:
        changes |= {"sliding_window": window, "sliding_window_layers": tuple(windowed)}
    if len(windowed) == num_layers:
        changes["sliding_window_layers"] = ()
    moe = _read_qwen_experts(source)
    moe |= {"shared_d_ff": _count(source, "shared_expert_intermediate_size"), "shared_gate": True}
    return changes, moe


def _write_qwen2(model: ModelConfig) -> Json:
    kinds = layer_kinds(model)
    window = _one_window(model)
    return _write_qwen_experts(model) | {
        "qkv_bias": model.attention_bias == "qkv",
        "shared_expert_intermediate_size": model.moe.shared_d_ff,
        "use_sliding_window": window > 0,
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if kind.window else "full_attention" for kind in kinds],
    }


def _read_deepseek(source: Json) -> tuple[Json, Json]:
    for name, value in (("scoring_func", "softmax"), ("topk_method", "greedy"), ("routed_scaling_factor", 1.0)):
        if source.get(name) not in (None, value):
            raise ConfigError(
                f"config.json: {name}={source[name]!r}: DeepSeekMoE v1 has {value!r}, nothing else is read"
            )
    if source.get("kv_lora_rank"):
        raise ConfigError("config.json: kv_lora_rank: latent attention (DeepSeek-V2) is not supported")
    num_experts, num_layers = source.get("n_routed_experts") or 0, _num_layers(source)
    first, step = source["first_k_dense_replace"], source["moe_layer_freq"]
    sparse = [n for n in range(num_layers) if num_experts and n >= first and n % step == 0]
    width = _count(source, "moe_intermediate_size")
    moe = {
        "gate": _gate(source),
        "num_experts": num_experts,
        "d_ff": width,
        "shared_d_ff": width * (source.get("n_shared_experts") or 0),
    }
    return {"attention_bias": _bias(source)}, moe | _sparse(sparse, num_layers)


def _write_deepseek(model: ModelConfig) -> Json:
    moe, sparse = model.moe, sparse_layers(model)
    return {
        "attention_bias": model.attention_bias == "all",
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_d_ff // moe.d_ff or None,
        "moe_intermediate_size": moe.d_ff,
        "norm_topk_prob": _renormalised(moe) is True,
        "scoring_func": "softmax",
        "first_k_dense_replace": sparse.index(True) if any(sparse) else model.num_layers,
        "moe_layer_freq": 1,
        # Its code is not part of that library: the checkpoint names where it is.
        "aux_loss_alpha": moe.load_balancing_weight,
    }


def _read_qwen3(source: Json) -> tuple[Json, Json]:
    window = _window(source) if source.get("use_sliding_window") else 0
    changes = {"qk_norm": "head", "attention_bias": _bias(source), "sliding_window": window}
    return changes, _read_qwen_experts(source)


def _write_qwen3(model: ModelConfig) -> Json:
    window = _one_window(model)
    return _write_qwen_experts(model) | {
        "attention_bias": model.attention_bias == "all",
        "use_sliding_window": window > 0,
        "sliding_window": window or None,
    }


FAMILIES: Mapping[str, Family] = {
    "mistral": Family(
        "MistralForCausalLM",
        _read_mistral,
        _write_mistral,
        _ATTENTION,
        {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "sliding_window": 4096},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _read_mixtral,
        _write_mixtral,
        _ATTENTION | _MIXTRAL_EXPERTS,
        {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        _read_olmoe,
        _write_olmoe,
        _ATTENTION | _EXPERTS,
        {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.01},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        _read_qwen2,
        _write_qwen2,
        _ATTENTION | _EXPERTS | _SHARED,
        {
            "rope_theta": 1e4,
            "rms_norm_eps": 1e-6,
            "decoder_sparse_step": 1,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "qkv_bias": True,
        },
    ),
    "deepseek": Family(
        "DeepseekForCausalLM",
        _read_deepseek,
        _write_deepseek,
        _ATTENTION | _EXPERTS | _DEEPSEEK_SHARED,
        {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "first_k_dense_replace": 0, "moe_layer_freq": 1},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _read_qwen3,
        _write_qwen3,
        _ATTENTION | _EXPERTS,
        {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "decoder_sparse_step": 1, "sliding_window": 4096},
    ),
}


def family_of(source: Json) -> Family:
    """The family of a ``config.json``.

    Raises:
        ConfigError: no such family here, or a quantised checkpoint.
    """
    kind = source.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(f"config.json: model_type={kind!r}: must be one of {', '.join(FAMILIES)}")
    if source.get("quantization_config"):
        raise ConfigError("config.json: quantization_config: quantised weights are not read; take the original ones")
    return FAMILIES[kind]


def read_config(source: Json) -> Config:
    """The config of a model that computes what that library computes from this ``config.json``: nothing is dropped.

    ``data.sequence_length`` becomes the longest context of the model. The load-balancing weight becomes the one at
    which our loss (the sum over layers of a loss that is 1 at balance) equals theirs (one over all layers, K at
    balance) when all experts are equally busy.

    Raises:
        ConfigError: a missing field, or a setting that is not supported.
    """
    family = family_of(source)
    source = {**family.defaults, **source}
    num_heads, d_model = _count(source, "num_attention_heads"), _count(source, "hidden_size")
    activation = source.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"config.json: hidden_act={activation!r}: must be one of {', '.join(_ACTIVATIONS)}")
    changes, moe_changes = family.read(source)
    model = ModelConfig(
        vocab_size=_count(source, "vocab_size"),
        d_model=d_model,
        num_layers=_num_layers(source),
        num_heads=num_heads,
        num_kv_heads=source.get("num_key_value_heads") or num_heads,
        head_dim=source.get("head_dim") or d_model // num_heads,
        d_ff=_count(source, "intermediate_size"),
        activation=_ACTIVATIONS[activation],
        norm_eps=float(source["rms_norm_eps"]),
        rope_theta=_rope_theta(source),
        tie_embeddings=bool(source.get("tie_word_embeddings", False)),
        moe=MoEConfig(jitter=0.0, z_loss_weight=0.0, dispatch="dropless"),
    )
    moe = dataclasses.replace(model.moe, **moe_changes)
    model = dataclasses.replace(model, **changes, moe=moe)
    if moe.gate != "none":
        choices = _count(source, "num_experts_per_tok")
        coefficient = float(source.get("router_aux_loss_coef", 0.001))
        weight = coefficient * choices / sum(sparse_layers(model))
        moe = dataclasses.replace(moe, experts_per_token=choices, load_balancing_weight=weight)
        model = dataclasses.replace(model, moe=moe)
    length = source.get("max_position_embeddings") or 2048
    return from_config_dict(to_dict(Config(model=model, data=DataConfig(sequence_length=length))))


def write_config(config: Config, model_type: str = "") -> Json:
    """A ``config.json`` from which that library builds the same model.

    Args:
        config: resolved.
        model_type: a key of :data:`FAMILIES`; empty: the first that can say it.

    Raises:
        ConfigError: no family can; for each, the settings that it has no words for.
    """
    if model_type and model_type not in FAMILIES:
        raise ConfigError(f"model_type={model_type!r}: must be one of {', '.join(FAMILIES)}")
    reasons = []
    for name in [model_type] if model_type else FAMILIES:
        result = _write_as(config, name)
        try:
            lost = _differences(config.model, read_config(result).model)
        except ConfigError as error:
            reasons.append(f"{name} cannot ({error})")
            continue
        if not lost:
            return result
        reasons.append(f"{name} lacks {', '.join(lost)}")
    raise ConfigError(f"no open architecture computes this model: {'; '.join(reasons)}")


def _write_as(config: Config, model_type: str) -> Json:
    model, moe, family = config.model, config.model.moe, FAMILIES[model_type]
    sparse = sum(sparse_layers(model))
    written = next((name for name, activation in _ACTIVATIONS.items() if activation == model.activation), "silu")
    result = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": written,
        "max_position_embeddings": config.data.sequence_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if sparse:
        result |= {
            "num_experts_per_tok": moe.experts_per_token,
            "router_aux_loss_coef": round(moe.load_balancing_weight * sparse / moe.experts_per_token, 12),
        }
    return result | family.write(model)


_MODEL_FACTS = (
    *("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "activation", "norm_eps"),
    *("rope_theta", "qk_norm", "attention_bias", "clip_qkv", "tie_embeddings"),
)
_MOE_FACTS = ("num_experts", "experts_per_token", "d_ff", "shared_d_ff", "shared_gate")


def _differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Settings that change what a model computes in evaluation and that did not survive."""

    def meaning(model: ModelConfig) -> Json:
        facts = {f"model.{name}": getattr(model, name) for name in _MODEL_FACTS}
        sparse, windows = sparse_layers(model), tuple(kind.window for kind in layer_kinds(model))
        facts |= {"model.moe.layers": sparse, "model.sliding_window": windows}
        if not all(sparse):
            facts["model.d_ff"] = model.d_ff
        if any(sparse):
            moe = model.moe
            facts |= {f"model.moe.{name}": getattr(moe, name) for name in _MOE_FACTS}
            facts["model.moe.gate"] = _renormalised(moe)
        return facts

    left, right = meaning(ours), meaning(theirs)
    return [name for name in left if left[name] != right.get(name)]
