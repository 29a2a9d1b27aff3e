"""Losses of a gate that are functions of the router's and the experts' matrices
(:meth:`moe.routing.interface.Gate.parameter_loss`)."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array

from moe.routing.balancing import LayerReport
from moe.routing.interface import Gate


def has_parameter_loss(gate: Gate) -> bool:
    """Whether a gate has such a loss."""
    return type(gate).parameter_loss is not Gate.parameter_loss


def with_parameter_loss(layer: Any, report: LayerReport, rng: Array | None) -> LayerReport:
    """A layer's report with the loss; latent experts see W_g projected, and the columns of experts without an FFN,
    which have no matrices, are left out."""
    if layer.router is None:
        return report
    columns = layer.router.kernel[:, : layer.config.num_experts]
    columns = columns if layer.latent is None else layer.latent.down[...].T @ columns
    matrices = layer.experts.matrices("up" if layer.experts.gate is None else "gate")
    assert matrices is not None
    loss = layer.gate.parameter_loss(columns, matrices, rng)
    return report if loss is None else dataclasses.replace(report, sparsity_penalty=report.sparsity_penalty + loss)
