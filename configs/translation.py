"""English to German with GShard's layer, on user-interface strings (GShard 2020, section 4, in small).

    python main.py --config=configs/translation.py --workdir=/tmp/translation
    python scripts/translate.py --workdir=/tmp/translation

23,684 pairs of Home Assistant's translations, 1,246 held out.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Top-2 of 8 experts, the second sampled, in every second layer of both stacks."""
    config = base.get_config()
    config.model.update(
        vocab_size=4096, d_model=128, num_layers=2, encoder_layers=2, num_heads=4, num_kv_heads=4, head_dim=32,
        d_ff=512, activation="relu", relative_buckets=32, tie_embeddings=True, scale_logits=True, norm_eps=1e-6,
        scan_layers=False,
    )  # fmt: skip
    config.model.moe.update(gate="gshard", num_experts=8, every=2, group_size=1024)
    config.data.update(objective="pairs", domains=("english_german",), input_length=64, sequence_length=64)
    config.train.update(batch_size=32, num_steps=800, eval_every=200, save_every=200)
    config.optimizer.warmup_steps = 80
    return config
