"""Sparse upcycling (Komatsuzaki et al. 2023): every FFN of a dense checkpoint becomes 8 experts, with a fresh router.

    python main.py --config=configs/dense.py --workdir=/tmp/dense
    python main.py --config=configs/upcycle.py --config.start.checkpoint=/tmp/dense --workdir=/tmp/upcycled

With top-2 weights that sum to 1, the first step's loss is the dense model's. --config.start.expert_noise=0.01 breaks
the experts' symmetry; --config.start.optimizer=carry goes on with Adam's moments and the schedule's count. For an
import, set config.model to what its config.json says, and config.data.tokenizer to its tokenizer.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Overrides of the defaults."""
    config = base.get_config()
    config.model.moe.update(gate="mixtral", num_experts=8, dispatch="dropless")
    config.optimizer.learning_rate = 1e-3
    return config
