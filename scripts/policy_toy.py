"""Reinforcement learning with and without replay of the rollouts' experts: python scripts/policy_toy.py [--seeds=5].

The task is to count upwards: a completion's reward is the share of its tokens that follow the token before them. A tiny
MoE model is trained from scratch on its own samples, by GRPO; the engine that samples computes in --engine_dtype, and
with --router_noise its routers have normal noise of that many standard deviations of their weights, drawn anew in each
round. Prints, for each seed and as means with 95 % intervals, the mean reward over all rounds and over the last tenth,
and how far the policy is from its rollouts at the first step on them; docs/finetuning.md explains the numbers.
"""

from moe.system import process

if __name__ == "__main__":
    process.prepare()

import functools
import tempfile
from typing import Any

from absl import flags

from moe.programs import cli

_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds, each with and without replay.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 120, "Train steps.", lower_bound=10)
_UPDATES = flags.DEFINE_integer("updates", 2, "Train steps on the rollouts of a round.", lower_bound=1)
_RATE = flags.DEFINE_float("rate", 1e-2, "Peak learning rate.", lower_bound=0.0)
_DTYPE = flags.DEFINE_enum("engine_dtype", "bfloat16", ["float32", "bfloat16"], "Dtype in which the engine computes.")
_NOISE = flags.DEFINE_float(
    "router_noise", 0.0, "Noise on the engine's routers, in standard deviations of their weights.", lower_bound=0.0
)

#: Ids: 0 is padding, the others are counted upwards in a circle.
DIGITS = 12
PROMPT, COMPLETION, PROMPTS, GROUP = 2, 6, 8, 4
MEASURES = ("reward", "last reward", "policy_old_kl", "policy_extreme", "policy_clipped")


class Counting:
    """Prompts are random digits; every token of a completion should follow the token before it."""

    def prompts(self, rng: Any, count: int) -> list[Any]:
        """Random digits."""
        return list(rng.integers(1, DIGITS + 1, (count, PROMPT)))

    def reward(self, prompt: Any, completion: Any) -> float:
        """Share of the tokens that follow the token before them."""
        before = [prompt[-1], *completion[:-1]]
        return float(sum(int(b) % DIGITS + 1 == int(c) for b, c in zip(before, completion, strict=True)) / COMPLETION)


def make_config(seed: int, replay: bool) -> Any:
    """The run of a seed."""
    from moe.config import Config, DataConfig, ModelConfig, OptimizerConfig, PolicyConfig, TrainConfig
    from moe.config.parse import build

    moe = {"gate": "mixtral", "num_experts": 8, "d_ff": 32, "dispatch": "dropless"}
    heads = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 16}
    return Config(
        seed=seed,
        model=build(ModelConfig, {"vocab_size": DIGITS + 1, "d_model": 32, "num_layers": 2, "moe": moe} | heads, ""),
        data=DataConfig(objective="policy", sequence_length=PROMPT + COMPLETION - 1),
        optimizer=OptimizerConfig(learning_rate=float(_RATE.value or 0), warmup_steps=5, schedule="constant"),
        train=TrainConfig(num_steps=int(_STEPS.value or 0), batch_size=PROMPTS * GROUP, keep_checkpoints=1),
        policy=PolicyConfig(clip_high=0.28, replay=replay),
    )


def perturbed(variables: dict[str, Any], key: Any, *, noise: float) -> dict[str, Any]:
    """The variables with noise on every router's weights."""
    import jax
    import jax.numpy as jnp

    def change(path: Any, leaf: Any) -> Any:
        names = [part.key for part in path]
        if not noise or names[-2:] != ["router", "kernel"]:
            return leaf
        return leaf + noise * jnp.std(leaf) * jax.random.normal(key, leaf.shape)

    return jax.tree_util.tree_map_with_path(change, variables)


def interval(values: list[float]) -> str:
    """Mean and half width of the 95 % interval of the mean."""
    from moe.lab.inference import effect

    found = effect(values)
    return f"{found.mean:.3g} ± {(found.high - found.low) / 2:.2g}"


def main() -> None:
    """Train all runs and print the table."""
    import dataclasses

    import jax
    import numpy as np

    from moe.models.sampling import make_sampler
    from moe.objectives.online import Engine, Rounds, train_online
    from moe.parallel.mesh import make_mesh
    from moe.system.escaping import markdown_table
    from moe.training.step import build

    mesh = make_mesh(make_config(0, True).mesh)
    served = dataclasses.replace(make_config(0, True).model, dtype=str(_DTYPE.value))
    load = functools.partial(perturbed, noise=float(_NOISE.value or 0.0))
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    with jax.set_mesh(mesh):
        engine = Engine(make_sampler(served, COMPLETION), load)
        programs = {replay: build(make_config(0, replay), mesh) for replay in found}
        for seed in range(int(_SEEDS.value or 0)):
            for replay, program in programs.items():
                program = dataclasses.replace(program, config=make_config(seed, replay))
                with tempfile.TemporaryDirectory() as folder:
                    sizes = Rounds(GROUP, int(_UPDATES.value or 1), save_every=10**6)
                    rows = train_online(program, folder, Counting(), engine, sizes)
                means = {name: float(np.mean([row[name] for row in rows])) for name in MEASURES if name in rows[0]}
                means["last reward"] = float(np.mean([row["reward"] for row in rows[-max(len(rows) // 10, 1) :]]))
                found[replay].append(means)
                print(f"seed {seed}, {'with' if replay else 'without'} replay: {means}", flush=True)
    table = []
    for name in MEASURES:
        own, other = ([means[name] for means in found[replay]] for replay in (True, False))
        difference = [a - b for a, b in zip(own, other, strict=True)]
        table.append((name, interval(own), interval(other), interval(difference)))
    print("\n" + markdown_table(("mean over rounds", "with replay", "without", "difference by seed"), table))


if __name__ == "__main__":
    cli.run(
        main,
        examples=(
            "python scripts/policy_toy.py --seeds=5 --steps=100",
            "python scripts/policy_toy.py --engine_dtype=float32 --router_noise=0.3",
        ),
    )
