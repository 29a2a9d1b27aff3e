"""MiniMax-M2: every layer MoE, sigmoid scores with a selection bias, QK-norm over all heads, partial rotation."""

from typing import Literal

from moe.config import ModelConfig
from moe.interop.families.family import ATTENTION, ONE_GROUP, Family, Tensor
from moe.interop.families.mixtral import ALIASES, EXPERTS
from moe.interop.schema import Context, Count, Fraction, Json, NumLocalExperts, OpenConfig, Positive, RopeParameters


class MiniMaxM2Config(OpenConfig):
    """Fields of ``config.json`` with the library's defaults; ``rotary_dim`` is the older ``partial_rotary_factor``."""

    max_position_embeddings: Context = 196608
    num_key_value_heads: Count | None = 8
    rope_theta: Positive = 5e6
    head_dim: Count | None = 128
    rotary_dim: Count | None = None
    num_local_experts: NumLocalExperts = 256
    num_experts_per_tok: Count = 8
    router_jitter_noise: Fraction = 0.0
    scoring_func: Literal["sigmoid"] = "sigmoid"
    qk_norm_type: Literal["per_layer"] = "per_layer"

    @property
    def rope(self) -> RopeParameters:
        """Rotary positions; ``rotary_dim`` is read where no ``partial_rotary_factor`` is stated."""
        if self.rotary_dim is None or "partial_rotary_factor" in self.model_fields_set:
            return super().rope
        return self.model_copy(update={"partial_rotary_factor": self.rotary_dim / self.dim_of_head}).rope


def read(source: MiniMaxM2Config) -> tuple[Json, Json]:
    """See :class:`Family`."""
    model = {"rope_dim": int(source.dim_of_head * source.rope.partial_rotary_factor), "qk_norm": "full"}
    moe = {
        "gate": {"name": "deepseek_v3", **ONE_GROUP, "scale": 1.0},
        "num_experts": source.num_local_experts,
        "jitter": source.router_jitter_noise,
        "losses": {"scope": "batch"},
    }
    return model, moe


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    return {
        "intermediate_size": model.moe.d_ff,
        "num_local_experts": model.moe.num_experts,
        "partial_rotary_factor": (model.rope_dim or model.head_dim) / model.head_dim,
        "router_jitter_noise": model.moe.jitter,
        "scoring_func": "sigmoid",
    }


BIAS = {"moe.router.bias": Tensor("block_sparse_moe.e_score_correction_bias")}
FAMILY = Family(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    MiniMaxM2Config,
    read,
    write,
    ATTENTION | EXPERTS | BIAS,
    aliases=ALIASES,
)
