"""Sparse upcycling (Komatsuzaki et al. 2023): every FFN of a dense checkpoint becomes 8 experts, with a fresh router.

    python main.py --config=configs/dense.py --workdir=/tmp/dense
    python main.py --config=configs/upcycle.py --config.start.checkpoint=/tmp/dense --workdir=/tmp/upcycled

Works for a run and for an import: the rest of the model section and the tokenizer are the checkpoint's. With top-2
weights that sum to 1, the first step's loss is the dense model's. --config.start.expert_noise=0.01 breaks the symmetry
of the experts; --config.start.optimizer=carry takes over Adam's moments.
"""

from moe.config import Changes
from moe.configs import base


def get_config() -> Changes:
    """Overrides of the defaults."""
    config = base.get_config()
    config.model.moe.update(gate="mixtral", num_experts=8, dispatch="dropless")
    config.optimizer.learning_rate = 1e-3
    return config
