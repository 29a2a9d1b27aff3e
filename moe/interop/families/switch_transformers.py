"""Switch Transformers (Fedus et al. 2021) as Hugging Face keeps them: T5's blocks, top-1, capacity in tokens a row."""

from typing import Annotated, Any, Literal

import pydantic

from moe.config import ModelConfig, sparse_layers, stacks
from moe.interop.families import t5
from moe.interop.families.family import Family
from moe.interop.schema import Coefficient, Count, Experts, Fraction, Json, Layers, OptionalCount, Size

#: ``expert_capacity`` that means no capacity; the largest value that is read.
_NO_CAPACITY = 1 << 16


class SwitchConfig(t5.EncoderDecoderConfig):
    """Fields of ``config.json``. Hugging Face ignores ``router_ignore_padding_tokens``: padding is always routed.

    A router in another dtype is refused: in Hugging Face its bias, its softmax and the experts' weights have that dtype
    too, here only the product of tokens and router (``model.moe.router_dtype``).
    """

    hidden_size: Size = pydantic.Field(768, validation_alias="d_model")
    num_hidden_layers: Layers = pydantic.Field(12, validation_alias="num_decoder_layers")
    num_attention_heads: Count = pydantic.Field(12, validation_alias="num_heads")
    num_layers: Layers = 12
    num_experts: Experts = 8
    num_experts_per_tok: Annotated[int, pydantic.Field(ge=1, le=1)] = 1
    expert_capacity: Count = 64
    num_sparse_encoder_layers: OptionalCount = 3
    num_sparse_decoder_layers: OptionalCount = 3
    encoder_sparse_step: OptionalCount | None = None
    decoder_sparse_step: OptionalCount | None = None
    router_bias: bool = False
    router_jitter_noise: Fraction = 0.01
    router_dtype: Literal["float32"] = "float32"
    router_z_loss_coef: Coefficient = 0.001
    dense_act_fn: Literal["relu", "gelu_new"] | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _default_decoder_layers(cls, tree: Any) -> Any:
        """Default an absent field to 12; a null means the encoder's depth, as in T5."""
        return {"num_decoder_layers": 12} | tree if isinstance(tree, dict) else tree

    @pydantic.model_validator(mode="after")
    def _check_activation(self) -> "SwitchConfig":
        if self.activation not in ("relu", "gelu_new"):
            raise ValueError(f"feed_forward_proj={self.feed_forward_proj!r}: must be relu, gelu_new or gated-gelu")
        return self

    @property
    def activation(self) -> str:
        """Name of the activation: the library's FFN of Switch is never gated, whatever ``feed_forward_proj`` says."""
        named = "gelu_new" if self.feed_forward_proj == "gated-gelu" else self.feed_forward_proj.rpartition("-")[2]
        return self.dense_act_fn or named


def _sparse(num_layers: int, num_sparse: int, step: int | None) -> list[bool]:
    """Whether each layer of a stack is MoE, by the library's rule."""
    step = (num_layers // num_sparse if num_sparse else 0) if step is None else step
    return [step > 0 and (step == 1 or layer % step == 1) for layer in range(num_layers)]


def _stacks_per_layer(model: ModelConfig) -> float:
    """Stacks with MoE layers over MoE layers (1 without any): the library's losses are means over a stack's layers."""
    sparse = [any(kind.sparse for kind in kinds) for kinds in stacks(model).values()]
    return sum(sparse) / sum(sparse_layers(model)) if any(sparse) else 1.0


def read(source: SwitchConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    encoder = _sparse(source.num_layers, source.num_sparse_encoder_layers, source.encoder_sparse_step)
    decoder = _sparse(source.num_hidden_layers, source.num_sparse_decoder_layers, source.decoder_sparse_step)
    layers = tuple(layer for layer, sparse in enumerate(encoder + decoder) if sparse)
    changes: Json = {
        "activation": "relu" if source.activation == "relu" else "gelu",
        "scale_logits": source.tie_word_embeddings,
    }
    if not layers:
        return t5.read_shared(source) | changes, {"gate": "none"}
    capacity = source.expert_capacity
    per_layer = (any(encoder) + any(decoder)) / len(layers)
    moe = {
        "gate": "switch",
        "num_experts": source.num_experts,
        "layers": layers,
        **({} if capacity == _NO_CAPACITY else {"dispatch": "gather", "capacity": {"fixed": capacity}}),
        "route_padding": True,
        "losses": {"scope": "sequence", "z": source.router_z_loss_coef * per_layer},
        "jitter": source.router_jitter_noise,
        "bias": "router" if source.router_bias else "none",
        "expert_dropout": source.dropout_rate,
    }
    return t5.read_shared(source) | changes, moe


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    moe = model.moe
    result: dict[str, Any] = {
        "feed_forward_proj": "relu" if model.activation == "relu" else "gelu_new",
        "dense_act_fn": "relu" if model.activation == "relu" else "gelu_new",
        "num_experts": moe.num_experts,
        "expert_capacity": moe.capacity.fixed or _NO_CAPACITY,
        "router_jitter_noise": moe.jitter,
        "router_dtype": moe.router_dtype,
        "router_bias": moe.bias == "router",
        "router_ignore_padding_tokens": False,
        "router_z_loss_coef": round(moe.losses.z / _stacks_per_layer(model), 12),
    }
    for stack, kinds in stacks(model).items():
        sparse = [layer for layer, kind in enumerate(kinds) if kind.sparse]
        # The first MoE layer is number 1 unless all are; the second one gives the step.
        step = 0 if not sparse else 1 if sparse[0] == 0 else [*sparse, sparse[0] + len(kinds)][1] - sparse[0]
        result |= {f"num_sparse_{stack}_layers": len(sparse), f"{stack}_sparse_step": step}
    return t5.write_shared(model) | result


def tensors(model: ModelConfig, stack: str) -> dict[str, str]:
    """See :class:`Family`."""
    del model
    names = {"up": "wi", "down": "wo"}
    dense = {f"dense.{ours}": f"mlp.{name}.weight" for ours, name in names.items()}
    experts = {f"moe.experts.{ours}": f"mlp.experts.expert_{{expert}}.{name}.weight" for ours, name in names.items()}
    bias = {"moe.router.logit_bias": "mlp.router.classifier.bias"}
    return t5.block_tensors(stack, dense | experts | {"moe.router.kernel": "mlp.router.classifier.weight"} | bias)


FAMILY = Family(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    SwitchConfig,
    read,
    write,
    tensors,
    block="{stack}.block.{layer}.",
    outside=t5.outside,
    field_names=t5.NAMES,
    copies=t5.COPIES,
    unread=t5.UNREAD,
    balance_scale="per stack",
)
