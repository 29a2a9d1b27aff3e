"""A model that any CPU trains in seconds, for a first look at the programs: docs/walk.md walks through them.

    python main.py --config=configs/tiny.py --workdir=/tmp/walk/run --config.data.dataset=/tmp/walk/text

2 layers, 8 experts, top-2; 131,744 parameters, 94,880 active; 20 steps of 512 tokens.
"""

from moe.config import Changes
from moe.configs import mixtral


def get_config() -> Changes:
    """Mixtral's layer, 32 wide."""
    config = mixtral.get_config()
    config.model.update(d_model=32, num_layers=2, d_ff=64, vocab_size=512, scan_layers=True)
    config.model.moe.update(d_ff=32, dispatch="dropless")
    config.data.update(sequence_length=64, heldout_rows=8)
    config.optimizer.warmup_steps = 5
    config.train.update(batch_size=8, num_steps=20, eval_every=10, save_every=10, log_every=10, sample_tokens=8)
    return config
