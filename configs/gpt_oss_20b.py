"""gpt-oss-20b: 32 experts, 4 a token, attention sinks, a window of 128 in every second layer.

Sizes: its published config.json. Plan it without a TPU, then run the same line on one:

    python scripts/plan_pod.py --config=configs/gpt_oss_20b.py --topology=v5p:4x4x4
    python main.py --config=configs/gpt_oss_20b.py --workdir=DIR

It was never trained here. Its published weights are quantised and not read; save them dequantised to import them.
"""

import ml_collections

from configs import base


def get_config(hardware: str = "") -> ml_collections.ConfigDict:
    """Overrides of the defaults; with the best settings known for a slice, such as ``v5p-128`` or ``h100:8x8``."""
    config = base.get_config()
    layers = 24
    config.model.update(
        vocab_size=201088,
        d_model=2880,
        num_layers=layers,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        activation="swiglu_clamped",
        rope_theta=150_000.0,
        sliding_window=128,
        sliding_window_layers=tuple(range(0, layers, 2)),
        attention_bias="all",
        attention_sinks=True,
        dtype="bfloat16",
        attention="blocked",
        remat="full",
    )
    config.model.rope_scaling.update(kind="yarn", factor=32.0, original_length=4096, truncate=False)
    config.model.moe.update(
        gate="mixtral",
        num_experts=32,
        experts_per_token=4,
        d_ff=2880,
        bias="all",
        load_balancing_weight=0.001 * 4 / layers,  # transformers' default; how it was trained is not published
    )
    config.data.sequence_length = 4096
    config.train.batch_size = 64
    config.mesh.update(data=1, fsdp=-1, expert=8)
    base.use_best_plan(config, "gpt_oss_20b", hardware)
    return config
