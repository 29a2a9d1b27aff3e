"""Edge values of every field of the config, by its type, and plausible values for random combinations."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from moe.config import LARGEST, Config
from moe.config.objectives import OBJECTIVES
from moe.config.registry import LAYERS
from moe.routing.gates import TopK

INTEGERS = (-LARGEST, -2, 0, 1, 3, LARGEST, LARGEST + 1, 10**30, True, 1.5, "2", None, [2])
FLOATS = (-0.5, 0.0, 1e-45, 1.0, 3e38, 1e39, float("inf"), float("nan"), "1", None, True)
BOOLEANS = (True, False, 1, "no", None)
TEXTS = (
    *("", "x", "\0", "\ud800", "x" * 5000, "../x", "nowhere://x", "gs://", "/dev/zero", "/dev/null", "~nobody/x"),
    *("a,b,", " ", "x\ny", "/", "module:object", "os:path", ":", "tests:", None, 3, [], {}),
)
TUPLES = (
    *((), (0,), (1,), (0, 1), (1, 0), (0, 0), (-1,), (99,), (2**31,), tuple(range(10_001)), (1.5,), ("0",), ("x", "x")),
    *((True,), (None,), ((0,),), None, 3, "01", {}, (float("nan"),), (0.5, 3e38), ("router",), ("tiny_text/split",)),
)

#: Values that would train for hours, or index the whole disk.
LEFT_OUT = {("train.num_steps", LARGEST), ("data.dataset", "/")}


def fields(cls: Any = Config, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, type, default) of every field."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name == "gate":
            yield path + field.name, str, "mixtral"
            yield from fields(TopK, f"{path}{field.name}.")
        elif field.name == "mixer":
            yield path + field.name, str, "none"
        elif field.name == "objective":
            yield path + field.name, typing.Literal[tuple(OBJECTIVES)], field.default
        elif dataclasses.is_dataclass(hints[field.name]):
            yield from fields(hints[field.name], f"{path}{field.name}.")
        else:
            yield path + field.name, hints[field.name], field.default


def edges(hint: Any) -> tuple[Any, ...]:
    """Edge values of a type, including values of wrong types."""
    if typing.get_origin(hint) is typing.Literal:
        return (*typing.get_args(hint), "", "x", None, 3, [])
    if typing.get_origin(hint) is tuple:
        return TUPLES
    return {int: INTEGERS, float: FLOATS, bool: BOOLEANS, str: TEXTS}[hint]


def edge_cases() -> list[tuple[str, Any]]:
    """(field, value) of every field and edge value, except values that random combinations train anyway."""
    return [
        (name, value)
        for name, hint, _ in fields()
        for value in edges(hint)
        if not any(name == other and value == bad for other, bad in LEFT_OUT)
        and not any(type(value) is type(other) and value == other for other in PLAUSIBLE.get(name, ()))
    ]


#: Values of gates' fields; each gate gets those that it has.
GATE_FIELDS: dict[str, tuple[Any, ...]] = {
    "k": (1, 2, 4),
    "bias": ("none", "sign", "quantile", "momentum"),
    "bias_rate": (0.0, 1.0),
    "groups": (1, 2),
    "kept_groups": (1, 2),
    "scores_per_group": (1, 2),
    "renormalise": (True, False),
    "scale": (1.0, 2.5),
    "slots": (1, 2),
}

#: Values of fields that combine into runs of a few kilobytes; the fields' other values are edge cases.
PLAUSIBLE: dict[str, tuple[Any, ...]] = {
    "model.moe.gate": ("none", *LAYERS),
    "model.moe.num_experts": (1, 2, 4, 6, 8),
    "model.moe.d_ff": (0, 2, 8),
    "model.moe.shared_d_ff": (0, 8),
    "model.moe.every": (1, 2),
    "model.moe.layers": ((), (0,), (1,)),
    "model.moe.first_dense": (0, 1),
    "model.moe.shortcut": (True, False),
    "model.moe.group_size": (0, 8, 32, 128),
    "model.moe.dispatch": ("gather", "einsum", "dropless"),
    "model.moe.exchange": ("all_to_all", "all_gather"),
    "model.moe.exchange_chunks": (1, 2, 3),
    "model.moe.exchange_hosts": (1, 2),
    "model.moe.capacity.train": (0.01, 0.5, 1.0, 100.0),
    "model.moe.capacity.eval": (0.01, 2.0, 1e6),
    "model.moe.jitter": (0.0, 0.9),
    "model.moe.losses.z": (0.0, 1.0),
    "model.moe.losses.importance": (0.0, 0.1),
    "model.moe.losses.load": (0.0, 0.1),
    "model.moe.losses.device": (0.0, 0.1),
    "model.moe.losses.scope": ("batch", "group", "sequence"),
    "model.moe.drop_policy": ("position", "probability", "random"),
    "model.moe.overflow_to_next": (True,),
    "model.moe.expert_dropout": (0.0, 0.5),
    "model.moe.accept_future_leak": (True,),
    "model.moe.router_dtype": ("float32", "bfloat16"),
    "model.encoder_layers": (0, 1, 2),
    "model.relative_buckets": (0, 4),
    "model.dropout": (0.0, 0.5),
    "data.objective": ("causal", "prefix_lm", "span_corruption"),
    "data.input_length": (0, 8, 16),
    "model.d_model": (8, 24),
    "model.num_layers": (1, 2, 3),
    "model.num_heads": (1, 2, 4),
    "model.num_kv_heads": (1, 2),
    "model.head_dim": (2, 6, 8),
    "model.activation": ("swiglu", "geglu", "geglu_exact", "reglu", "gelu", "relu"),
    "model.rope_dim": (0, 2, 4),
    "model.rope_interleaved": (True, False),
    "model.pattern": ("", "attention", "delta", "delta attention", "sliding attention", "mixer attention"),
    "model.delta_net.key_heads": (1, 2),
    "model.delta_net.value_heads": (2, 4),
    "model.delta_net.key_dim": (2, 4),
    "model.delta_net.value_dim": (2, 6),
    "model.delta_net.conv_width": (1, 3),
    "model.memory.layers": ((), (0,), (1,)),
    "model.memory.orders": ((2,), (2, 3)),
    "model.memory.heads": (1, 2),
    "model.memory.dim": (2, 6),
    "model.memory.rows": (2, 37),
    "model.memory.conv_width": (1, 3),
    "model.memory.pad_id": (0, 3),
    "model.rope_scaling.kind": ("none", "linear", "yarn", "llama3"),
    "model.rope_scaling.factor": (1.0, 4.0),
    "model.rope_scaling.original_length": (1, 8),
    "model.kv_lora_rank": (0, 4),
    "model.q_lora_rank": (0, 4),
    "model.value_dim": (0, 6),
    "model.sliding_window": (0, 1, 5, 100),
    "model.window_rope_theta": (0.0, 100.0),
    "model.qk_norm": ("none", "head", "full", "rotated"),
    "model.norms": ("before", "after", "both"),
    "model.embedding_scale": (0.5, 12.0),
    "model.residual_scale": (0.22, 1.0),
    "model.attention_scale": (0.0, 0.01),
    "model.logit_scale": (0.125, 1.0),
    "model.attention": ("full", "blocked"),
    "model.attention_bias": ("none", "qkv", "all"),
    "model.clip_qkv": (0.0, 0.1),
    "model.tie_embeddings": (True, False),
    "model.dtype": ("float32", "bfloat16"),
    "model.low_precision": ("none", "int8", "float8", "mxfp8"),
    "model.low_precision_in": ("ffn", "all"),
    "model.scan_layers": (True, False),
    "model.scan_unroll": (1, 2, 3),
    "model.remat": ("none", "dots", "routes", "full"),
    "data.sequence_length": (2, 8, 16),
    "data.streams": (0, 1, 2),
    "data.shuffle_window": (1, 100),
    "data.heldout_rows": (1, 9),
    "mesh.data": (-1, 1, 2),
    "mesh.fsdp": (1, 2),
    "mesh.expert": (1, 2, 4),
    "mesh.tensor": (1, 2),
    "optimizer.name": ("adamw", "adafactor", "muon"),
    "optimizer.schedule": ("cosine", "constant", "wsd", "rsqrt"),
    "optimizer.warmup_steps": (0, 1),
    "optimizer.decay_steps": (0, 1),
    "optimizer.gradient_clip": (0.0, 1.0),
    "optimizer.moment_dtype": ("float32", "bfloat16"),
    "optimizer.memory": ("device", "host"),
    "optimizer.frozen": ((), ("router",), ("experts", "attention"), ("embedding", "unembedding", "dense", "shared")),
    "train.num_steps": (2, 3),
    "train.batch_size": (1, 4, 8),
    "train.accumulation_steps": (1, 2, 4),
    "train.log_every": (1, 2),
    "train.eval_every": (1, 2),
    "train.save_every": (1, 2),
    "train.sample_tokens": (0, 3),
    "train.writers": ((), ("tensorboard",)),
    "seed": (0, 2**31 - 1),
}
