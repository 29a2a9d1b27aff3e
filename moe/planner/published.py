"""Published measurements of train steps, and this project's programs to compare with them."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe.config import Config, load_python_file
from moe.config.parse import from_config_dict
from moe.models import flops
from moe.system import shipped


@dataclasses.dataclass(frozen=True)
class Published:
    """One measurement, and our program to compare with it.

    Attributes:
        config: file in configs/.
        topology: slice of the run.
        rows: of the batch, per device; length: tokens of a row; accumulation: microbatches.
        model, moe, mesh: fields of the config.
        source: of the measurement.
        differs: what our program does differently.
        step: seconds of that batch; or
        tokens_per_second: per chip, as published; or
        tflops: TFLOP/s per chip as published, attention counted over all T keys.
        first_look: logarithm of published over counted time when the step was first compared, before any price was
            changed for it; None: not noted.
    """

    config: str
    topology: str
    rows: int
    length: int
    source: str
    differs: str
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    moe: dict[str, Any] = dataclasses.field(default_factory=dict)
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    accumulation: int = 1
    step: float = 0.0
    tokens_per_second: float = 0.0
    tflops: float = 0.0
    first_look: float | None = None


def _llama(d: int, layers: int, heads: int, kv_heads: int, d_ff: int, vocab: int) -> dict[str, Any]:
    return {
        "d_model": d, "num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 128,
        "d_ff": d_ff, "vocab_size": vocab, "remat": "full", "dtype": "bfloat16", "attention": "blocked",
    }  # fmt: skip


_CONFIGS = "github.com/AI-Hypercomputer/maxtext, src/maxtext/configs/tpu"
_RECIPES = "github.com/AI-Hypercomputer/tpu-recipes, training"
_BRIDGE = "github.com/NVIDIA-NeMo/Megatron-Bridge"
_DENSE = {"gate": "none"}

#: Cheapest to compile first.
PUBLISHED = {
    "Mixtral-8x7B, 64 H100": Published(
        "mixtral_8x7b", "h100:8x8", 2, 4096, "Megatron-Core, README of its MoE: 468 TFLOP/s per GPU",
        "fsdp 8 x expert 8, 2 rows per GPU, weights gathered every layer; theirs: TP 1, EP 8, PP 4 of 8 virtual stages "
        "each, 1 row per microbatch, 256 per step, tabled for an earlier version",
        {"remat": "hidden"}, {"dispatch": "dropless"}, {"fsdp": 8, "expert": 8}, tflops=468,
        first_look=-0.350,
    ),
    "Llama 3.1 8B, v6e-8": Published(
        "base", "v6e:2x4", 3, 8192, f"{_RECIPES}/trillium/Llama3.1-8B-MaxText/v6e-8: 7138.89 tokens/s",
        "inputs of layers, queries, keys, values and attention outputs in the host's memory, as theirs; an eighth of "
        "the step is copies of activations to other layouts",
        _llama(4096, 32, 32, 8, 14336, 128256) | {"remat": "offload"}, _DENSE, tokens_per_second=7138.89,
        first_look=-0.263,
    ),
    "Mixtral-8x7B, v5p-128": Published(
        "mixtral_8x7b", "v5p:4x4x4", 36, 4096, "MaxText, Run_Mixtral.md: 251.94 TFLOP/s, 54.89 % (all keys)",
        "4 microbatches of 9 rows, float32 parameters, cast before they are gathered; theirs: bfloat16",
        {"remat": "full"}, {"dispatch": "dropless"}, {"fsdp": 64, "expert": 1}, 4, tflops=251.94,
        first_look=0.046,
    ),
    "Mixtral-8x7B, v6e-256": Published(
        "mixtral_8x7b", "v6e:16x16", 12, 4096, f"{_RECIPES}/trillium/Mixtral-8x7B-MaxText: 13.484 s",
        "2 microbatches of 6 rows; queries, keys, values and inputs in the host's memory as theirs; also outputs of "
        "attention",
        {"remat": "offload"}, {"dispatch": "gather", "capacity": {"train": 1.25}}, {"fsdp": 256, "expert": 1}, 2,
        step=13.484,
        first_look=-0.243,
    ),
    "Qwen3-30B-A3B, 16 H100": Published(
        "qwen3_30b_a3b", "h100:2x8", 64, 4096,
        f"{_BRIDGE}, skills on expert-parallel overlap: 41.25 s by plain all-to-all, not overlapped (45.65 s in "
        "another run with CUDA graphs)",
        "64 microbatches of one row, recomputation of all but attention",
        {"remat": "attention"}, {"dispatch": "dropless"}, {"fsdp": 1, "expert": 16}, 64, step=41.25,
        first_look=-0.119,
    ),
    "Qwen3-30B-A3B, 16 H100, by host": Published(
        "qwen3_30b_a3b", "h100:2x8", 64, 4096,
        f"{_BRIDGE}, skills on performance: 24.71 s by HybridEP, which sends a token to a host once for all its "
        "experts there, not overlapped",
        "exchange_hosts=2, 64 microbatches of one row, recomputation of all but attention",
        {"remat": "attention"}, {"dispatch": "dropless", "exchange_hosts": 2}, {"fsdp": 1, "expert": 16}, 64,
        step=24.71,
        first_look=-0.133,
    ),
    "gpt-oss-120b, 64 B200": Published(
        "gpt_oss_120b", "b200:8x8", 8, 4096, f"{_BRIDGE}, performance summary of 25.11: 8213 tokens/s per GPU",
        "2 microbatches of 4 rows, weights gathered every layer; theirs: the same microbatches, weights of attention "
        "on every GPU",
        {"remat": "hidden"}, {"dispatch": "dropless"}, {"fsdp": 8, "expert": 8}, 2, tokens_per_second=8213,
        first_look=-0.175,
    ),
    "gpt-oss-120b, 64 B200, by host": Published(
        "gpt_oss_120b", "b200:8x8", 8, 4096, f"{_BRIDGE}, performance summary of 26.02.01: 13722 tokens/s per GPU",
        "exchange_hosts=8, 2 microbatches of 4 rows, full recomputation (hidden needs 202 GiB); theirs: the same "
        "microbatches, exchanged by HybridEP, which sends "
        "a token to a host once",
        {"remat": "full"}, {"dispatch": "dropless", "exchange_hosts": 8}, {"fsdp": 1, "expert": 64}, 2,
        tokens_per_second=13722,
    ),
    "gpt-oss-120b, 64 GB200": Published(
        "gpt_oss_120b", "gb200:16x4", 20, 8192, f"{_BRIDGE}, performance summary of 25.11: 15876 tokens/s per GPU",
        "20 microbatches of one row; theirs: the same, exchanged by HybridEP",
        {"remat": "hidden"}, {"dispatch": "dropless"}, {"fsdp": 1, "expert": 64}, 20, tokens_per_second=15876,
        first_look=0.237,
    ),
    "Qwen3-235B-A22B, 256 H100": Published(
        "qwen3_30b_a3b", "h100:32x8", 8, 4096,
        "github.com/yanring/Megatron-MoE-ModelZoo, best_practice/Qwen3: 17.6 s, FSDP, 8 experts per host, DeepEP",
        "one batch of 8 rows per GPU, full recomputation; theirs: the same tokens over 2 GPUs by tensor parallelism",
        {"d_model": 4096, "num_layers": 94, "num_heads": 64, "remat": "full"},
        {"dispatch": "dropless", "d_ff": 1536}, {"fsdp": 32, "expert": 8}, step=17.6,
        first_look=-0.467,
    ),
    "Mixtral-8x22B, v6e-256": Published(
        "mixtral_8x22b", "v6e:16x16", 8, 4096, f"{_RECIPES}/trillium/Mixtral-8x22B-MaxText: 24.706 s",
        "4 microbatches of 2 rows, inputs, queries, keys, values and attention outputs in the host's memory, float32 "
        "parameters; theirs: one of 8 rows, which gathers weights a quarter as often",
        {"remat": "offload"}, {"dispatch": "gather", "capacity": {"train": 1.25}}, {"fsdp": 64, "expert": 4}, 4,
        step=24.706,
        first_look=-0.452,
    ),
    "dense 16B, v5e-256": Published(
        "base", "v5e:16x16", 6, 2048, f"{_CONFIGS}/v5e: 120 TFLOP/s, 61.10 % (16b.sh)",
        "the same batch and full recomputation", _llama(4096, 32, 64, 64, 28672, 32000), _DENSE, tflops=0.6110 * 197,
        first_look=-0.121,
    ),
    "Llama 2 70B, v5p-128": Published(
        "base", "v5p:4x4x4", 4, 4096, f"MaxText, run_llama2.md: 65 % ({_CONFIGS}/v5p/llama2_70b.sh)",
        "full recomputation (remat=attention needs 99 GiB); theirs repeats only the projections into the FFN",
        _llama(8192, 80, 64, 8, 28672, 32000), _DENSE, tflops=0.65 * 459,
        first_look=0.024,
    ),
    "DeepSeek-V3, v5p-1024": Published(
        "deepseek_v3", "v5p:8x8x8", 6, 8192, f"{_RECIPES}/v5p/DeepSeek3-671B-MaxText: 90.668 s",
        "2 microbatches of 3 rows; inputs, queries, keys, values and attention outputs in the host's memory",
        {"remat": "offload"}, {"dispatch": "dropless"}, {"fsdp": 512, "expert": 1}, 2, step=90.668,
    ),
    "DeepSeek-V3, 128 tpu7x": Published(
        "deepseek_v3", "tpu7x:4x4x8", 8, 4096, f"{_RECIPES}/ironwood: 27.02 s",
        "2 microbatches of 4 rows, inputs of layers in the host's memory as theirs, float32 first moment",
        {"remat": "offload_inputs"}, {"dispatch": "dropless"}, {"fsdp": 256, "expert": 1}, 2, step=27.02,
    ),
}  # fmt: skip


def config_of(row: Published, devices: int) -> Config:
    """The config of this project's program.

    Args:
        row: the measurement.
        devices: of its slice.
    """
    config: Any = load_python_file(shipped.CONFIGS / f"{row.config}.py").get_config()
    config.model.update(row.model)
    config.model.moe.update(row.moe)
    config.data.sequence_length = row.length
    config.train.batch_size = row.rows * devices
    config.train.accumulation_steps = row.accumulation
    config.mesh.update({"data": 1, "fsdp": devices, "expert": 1, **row.mesh})
    return from_config_dict(config)


def published_seconds(row: Published, config: Config, chips: int) -> float:
    """Seconds that the published rate takes for the batch of :func:`config_of`."""
    if row.step:
        return row.step
    model, length = config.model, row.length
    # 2 matmuls x 2 FLOPs x 3 passes for the T - (T+1)/2 keys that a causal query does not see.
    unseen = 12 * model.num_layers * model.num_heads * model.head_dim * (length - 1) / 2
    all_keys = flops.train_flops_per_token(model, length) + unseen
    rate = row.tokens_per_second or row.tflops * 1e12 / all_keys
    return config.train.batch_size * length / rate / chips
