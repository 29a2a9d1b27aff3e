"""FLOPs that a run executed."""

from __future__ import annotations

from moe.config import Config, sparse_layers
from moe.dispatch.buffers import layer_capacity
from moe.models import flops


def executed_flops(config: Config, dropped_share: float) -> float:
    """FLOPs of a run's training without the assignments that were dropped.

    Model FLOPs (:func:`moe.models.flops.train_flops_per_token`, which count the router) less 6 FLOPs for every
    parameter that a dropped assignment would have used; with einsum dispatch, plus its two one-hot matmuls. Padding of
    expert buffers is not counted.

    Args:
        config: of the run.
        dropped_share: share of assignments dropped in training, mean over MoE layers and steps.
    """
    model, moe = config.model, config.model.moe
    tokens = config.train.num_steps * config.train.batch_size * config.data.sequence_length
    per_token = flops.train_flops_per_token(model, config.data.sequence_length, config.data.input_length)
    if moe.gate is None:
        return per_token * tokens
    total, active = flops.count_parameters(model)
    inactive_share = 1 - moe.experts_per_token / moe.num_experts
    if inactive_share > 0:
        routed_active = (total - active) / inactive_share * (1 - inactive_share)
        per_token -= 6 * routed_active * dropped_share
    if moe.dispatch == "einsum":
        group = moe.group_size or config.data.sequence_length
        slots = moe.num_experts * layer_capacity(moe, group)
        per_token += 3 * 2 * 2 * sum(sparse_layers(model)) * slots * model.expert_dim
    return per_token * tokens
