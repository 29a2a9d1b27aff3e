"""Mixtral: every layer MoE, softmax over the K chosen logits."""

from moe.config import ModelConfig
from moe.interop.families.family import ATTENTION, Family, window_of
from moe.interop.schema import Context, Count, Fraction, Json, NumLocalExperts, OpenConfig, Positive, Window


class MixtralConfig(OpenConfig):
    """Fields of ``config.json`` with the library's defaults."""

    max_position_embeddings: Context = 131072
    num_key_value_heads: Count | None = 8
    rope_theta: Positive = 1e6
    rms_norm_eps: Positive = 1e-5
    sliding_window: Window = None
    num_local_experts: NumLocalExperts = 8
    router_jitter_noise: Fraction = 0.0


def read(source: MixtralConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    moe = {"gate": "mixtral", "num_experts": source.num_local_experts, "jitter": source.router_jitter_noise}
    return {"sliding_window": source.sliding_window or 0}, moe


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    return {
        "intermediate_size": model.moe.d_ff,
        "sliding_window": window_of(model) or None,
        "num_local_experts": model.moe.num_experts,
        "router_jitter_noise": model.moe.jitter,
    }


EXPERTS = {
    "moe.router.kernel": "block_sparse_moe.gate.weight",
    "moe.experts.gate": "block_sparse_moe.experts.{expert}.w1.weight",
    "moe.experts.up": "block_sparse_moe.experts.{expert}.w3.weight",
    "moe.experts.down": "block_sparse_moe.experts.{expert}.w2.weight",
}
#: The library renamed the block; files of its own fused layout have either name.
ALIASES = (("block_sparse_moe.", "mlp."),)
FAMILY = Family("mixtral", "MixtralForCausalLM", MixtralConfig, read, write, ATTENTION | EXPERTS, aliases=ALIASES)
