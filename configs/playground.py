"""The model of the playground page (docs/playground.md): small enough to run in a browser.

    python main.py --config=configs/playground.py --workdir=/tmp/playground
    moe playground --workdir=/tmp/playground --output=playground.html

4 layers of 128, 8 SwiGLU experts of 128, top-2, dropless; four domains of English text and code. 2,000 steps of 2,048
tokens, 4.1M in all: about nine minutes on one idle CPU core.
"""

from moe.config import Changes
from moe.configs import mixtral


def get_config() -> Changes:
    """Mixtral's layer, 128 wide, with tied embeddings."""
    config = mixtral.get_config()
    config.model.update(vocab_size=2048, d_model=128, num_heads=4, num_kv_heads=2, head_dim=32, d_ff=128)
    config.model.tie_embeddings = True
    config.model.moe.update(d_ff=128, dispatch="dropless")
    config.data.domains = ("literature", "definitions", "python", "technical")
    config.data.update(sequence_length=128, heldout_rows=64)
    config.optimizer.warmup_steps = 100
    config.train.update(batch_size=16, num_steps=2000, eval_every=500, save_every=500, log_every=50)
    return config
