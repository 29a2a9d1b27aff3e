"""Ways of balancing and routing of 2025 and 2026 beside Switch, Mixtral and a hash, at equal parameters, ten seeds.

    moe ablate --suite=configs/ablations/routers_2026.py --workdir=/tmp/lab --jobs=2

Sign biases without a loss, their gate with a balance loss instead, and quantile balancing; each with its own sweep of
three rates on two reserved seeds. Seventy compared runs and about 36 of the sweep, of ten to 17 minutes: 18 to 30
core-hours. All arms start at scale 0.1. Suite `balancing_2026` has momentum biases with a soft clamp (arXiv
2602.17004), thresholds in training (2603.11535), the coupling loss (2512.23447) and the cosine router (2604.14419).
"""

from typing import Any

from moe.configs.ablations import common, paper_scale, switch_vs_mixtral
from moe.lab.suite import Comparison, Suite, Sweep, Variant

#: DeepSeek-V3's sigmoid gate without groups and with weights that sum to one.
_SIGMOID: dict[str, Any] = {"gate.groups": 1, "gate.kept_groups": 1, "gate.scores_per_group": 1, "gate.scale": 1.0}


def get_suite(size: str) -> Suite:
    """Dense, Switch, Mixtral, a hash, and top-2 of 16 half as wide balanced in three ways, all but Switch dropless."""
    base = common.base(size)
    rate = float(base.optimizer.learning_rate)
    # The paper moves the bias by 0.001 a step over about 10^5 steps; a short run needs larger steps.
    bias_rate = 1e-3 if size == "pod" else 1e-2

    def top2(gate: str, balance: float, note: str, **fields: Any) -> Variant:
        moe = common.moe(size, gate, 16, 2, **{"losses.balance": balance, **fields}, **common.DROPLESS)
        return Variant(moe, note=note)

    arms = {
        **switch_vs_mixtral.with_arms(size, ("dense", "switch", "mixtral")).variants,
        "hash": Variant(common.moe(size, "hash", 8, 1, **common.DROPLESS), note="top-1 of 8 by a hash of the token"),
        "sign_bias": top2(
            "deepseek_v3",
            0.0,
            f"DeepSeek-V3's sigmoid gate without groups, top-2 of 16, sign biases of rate {bias_rate:g}, no loss",
            **_SIGMOID,
            **{"gate.bias_rate": bias_rate},
        ),
        "sigmoid_aux": top2(
            "deepseek_v3",
            0.01,
            "DeepSeek-V3's sigmoid gate without groups, top-2 of 16, no biases, balance weight 0.01",
            **_SIGMOID,
            **{"gate.bias_rate": 0.0},
        ),
        "quantile": top2(
            "quantile_balancing", 0.0, "sigmoid gate, top-2 of 16, quantile biases of rate 1, no balance loss"
        ),
    }
    sparse = tuple(name for name in arms if name != "dense")
    return common.suite(
        size,
        name="routers_2026",
        question="Which routers and ways of balancing of 2025 and 2026 differ from Switch and Mixtral at this size?",
        variants={
            name: Variant(arm.overrides, note=arm.note) for name, arm in paper_scale.at_papers_scale(arms).items()
        },
        seeds=tuple(range(60, 70)),
        sweep=Sweep((rate / 2, rate, 2 * rate), seeds=common.SWEPT_SEEDS),
        fixed_seeds=True,
        headline=("mixtral", "sign_bias", "sigmoid_aux", "quantile"),
        dropping_differs="Switch's layer has its paper's capacity, the others drop nothing",
        comparisons={
            "equal active and total parameters": Comparison(
                "mixtral",
                tuple(name for name in sparse if name != "mixtral"),
                ("steps", "active_parameters", "total_parameters"),
            ),
            "equal active FLOPs": Comparison("dense", sparse, ("steps", "flops")),
            "without a balance loss against with one": Comparison(
                "sigmoid_aux", ("sign_bias", "quantile"), common.FLOPS_AND_PARAMETERS
            ),
        },
    )
