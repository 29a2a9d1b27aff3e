"""A small Switch encoder-decoder, pre-trained by span corruption on real text (T5's blocks and objective).

    python main.py --config=configs/switch_t5.py --workdir=/tmp/switch_t5

Two encoder and two decoder layers, the second of each with 8 experts, top-1; 15 % of the tokens removed in spans of 3.
The report ends with blanks that the model filled. For a dense T5 of equal FLOPs add --config.model.moe.gate=none.
"""

from moe.config import Changes
from moe.configs import base


def get_config() -> Changes:
    """T5 1.0's attention, norms and logits, Switch's layer in every second block."""
    config = base.get_config()
    config.model.update(
        vocab_size=2048, d_model=64, num_layers=2, encoder_layers=2, num_heads=4, num_kv_heads=4, head_dim=16,
        d_ff=256, activation="relu", relative_buckets=32, tie_embeddings=True, scale_logits=True, norm_eps=1e-6,
        scan_layers=False,
    )  # fmt: skip
    # Inputs of 128 tokens have targets of 29 (moe.objectives.spans.span_lengths); groups are of whole rows of either.
    config.data.update(objective="span_corruption", input_length=128, sequence_length=32)
    config.model.moe.update(gate="switch", num_experts=8, every=2, group_size=512)
    config.train.update(batch_size=16, num_steps=400, eval_every=100, save_every=100)
    config.optimizer.warmup_steps = 40
    return config
