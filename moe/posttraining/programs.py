"""Programs by ``data.objective``: what :func:`moe.training.train.train` takes as ``make_program``."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from moe.config import Config, ConfigError, ModelConfig, PolicyConfig, PreferencesConfig, sparse_layers
from moe.posttraining.dpo import PreferenceObjective
from moe.posttraining.grpo import PolicyObjective
from moe.training.losses import describe_auxiliary
from moe.training.step import Program, Teacher, build


def make_program(config: Config, mesh: Mesh, teacher: Teacher | None = None) -> Program:
    """See :func:`moe.training.step.build`. Also raises ConfigError for settings of another objective."""
    for name, default in (("preferences", PreferencesConfig()), ("policy", PolicyConfig())):
        section = getattr(config, name)
        if section != default and config.data.objective != name:
            raise ConfigError(f"{section}: is read only with data.objective={name!r}, not {config.data.objective!r}")
    if config.data.is_posttraining and config.model.prediction_layers:
        raise ConfigError(
            f"model.prediction_layers={config.model.prediction_layers}: must be 0 with data.objective="
            f"{config.data.objective!r}, whose loss does not include them; start.checkpoint may have them"
        )
    if config.data.objective == "preferences":
        program = build(config, mesh, teacher, objective=PreferenceObjective())
        about = f"preferences (DPO), beta {config.preferences.beta:g}, against {config.distill.teacher}"
    elif config.data.objective == "policy":
        if teacher is not None and config.policy.replay:
            _check_same_experts(config, teacher[0])
        program = build(config, mesh, teacher, objective=PolicyObjective(config.policy))
        about = _about_policy(config)
    else:
        return build(config, mesh, teacher)
    auxiliary = describe_auxiliary(config.model.moe)
    return dataclasses.replace(program, about=f"objective: {about}; auxiliary losses: {auxiliary}")


def _about_policy(config: Config) -> str:
    policy, over = config.policy, "tokens" if config.policy.mean == "tokens" else "completions"
    experts = f", experts of {'the rollouts' if policy.replay else 'its own router'}"
    reference = f", KL {policy.kl:g} against {config.distill.teacher}" if policy.kl else ""
    return (
        f"policy (GRPO), mean over {over}, ratios clipped to [{1 - policy.clip_low:g}, {1 + policy.clip_high:g}]"
        f"{reference}{experts if any(sparse_layers(config.model)) else ''}"
    )


def _check_same_experts(config: Config, reference: ModelConfig) -> None:
    """Raise ConfigError for a reference model that cannot replay the policy's experts."""
    sizes = [
        (sparse_layers(model), model.moe.num_experts, model.moe.experts_per_token)
        for model in (config.model, reference)
    ]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"distill.teacher={config.distill.teacher!r}: must have the policy's MoE layers, experts and K, which it "
            "replays; set policy.replay=False for another model"
        )
