"""FLOPs that a run executed."""

from __future__ import annotations

from moe.config import Config, stacks
from moe.dispatch.buffers import layer_capacity
from moe.models import flops


def executed_flops(config: Config, dropped_share: float) -> float:
    """FLOPs of a run's training without the assignments that were dropped.

    Model FLOPs (:func:`moe.models.flops.train_flops_per_token`, which count the router) less what the experts would
    have computed for dropped assignments; with einsum dispatch, plus its two one-hot matmuls, which Soft MoE does not
    have. Padding of expert buffers is not counted.

    Args:
        config: of the run.
        dropped_share: share of assignments dropped in training, mean over MoE layers and steps.
    """
    model = config.model
    moe = config.model.moe
    data = config.data
    lengths = data.sequence_length, data.input_length
    tokens = config.tokens_until(config.train.num_steps)
    per_token = flops.train_flops_per_token(model, *lengths)
    per_token -= dropped_share * flops.expert_flops_per_token(model, *lengths)
    if moe.gate is not None and moe.dispatch == "einsum" and not moe.gate.slots_per_expert:
        for stack, kinds in stacks(model).items():
            kinds = (*kinds, *kinds[-1:] * model.prediction_layers)
            length = flops.row_lengths(*lengths)[stack]
            slots = moe.num_experts * layer_capacity(moe, moe.group_size or length) * length / data.sequence_length
            per_token += 3 * 2 * 2 * sum(kind.sparse for kind in kinds) * slots * model.expert_dim
    return per_token * tokens
