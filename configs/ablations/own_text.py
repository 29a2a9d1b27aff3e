"""Which layer suits your own text: dense, Switch or Mixtral at equal FLOPs, each at its best learning rate.

moe ablate --suite=configs/ablations/own_text.py:/path/to/folder --workdir=/tmp/own --jobs=2

The folder holds .txt, .md, .jsonl, .parquet or other text files (docs/data.md); each folder in it is a domain. A
template: copy the file and change what follows. 3 arms of 4 layers of 64, 1,000 steps of 2,048 tokens: about 80 seconds
a run on one idle CPU core, about 20 runs with the sweep of learning rates.
"""

from moe.config import Changes, ConfigError
from moe.configs.ablations import common
from moe.lab.suite import Comparison, Suite, Sweep, Variant


def base(folder: str) -> Changes:
    """The dense model on a folder of text; arms override the gate."""
    config = common.base("laptop")
    config.data.dataset = folder
    config.data.domains = ()  # all that the folder has
    config.train.num_steps = 1000
    return config


def get_suite(size: str, folder: str = "") -> Suite:
    """Dense, Switch and Mixtral on a folder of text, in one size whatever ``size`` is."""
    if not folder:
        raise ConfigError("--suite=configs/ablations/own_text.py:FOLDER: name the folder of text after the colon")
    config = base(folder)
    rate = config.optimizer.learning_rate
    return Suite(
        name="own_text",
        question="Is an MoE layer better than a dense one on this text at equal FLOPs, and which one?",
        base=config,
        variants={
            "dense": Variant({}, note="one FFN"),
            "switch": Variant(common.moe(config, "switch", 8, 1), note="1 of 8 experts, with drops"),
            "mixtral": Variant(common.moe(config, "mixtral", 16, 2, dispatch="dropless"), note="2 of 16 half as wide"),
        },
        seeds=(0, 1, 2),
        sweep=Sweep((rate / 2, rate, 2 * rate, 4 * rate), seeds=(100,)),
        dropping_differs="Switch drops and Mixtral does not, as their papers have it",
        comparisons={"equal FLOPs": Comparison("dense", ("switch", "mixtral"), ("steps", "flops"))},
    )
