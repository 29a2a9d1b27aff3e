"""The expert interface, and experts applied to capacity buffers over the mesh."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jax import Array

from moe.dispatch.grouped_matmul.cpu import Chunks
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain


@runtime_checkable
class Experts(Protocol):
    """What a mode asks of the experts: the same FFNs over either layout of rows."""

    def batched(self, rows: Array) -> Array:
        """[E,R,D] → [E,R,D]: expert e over its R rows."""
        ...

    def matrices(self, dtype: Any) -> Any:
        """All weights in that dtype, [E,·,·] each, split by ``partition_specs.EXPERT_MATRICES``."""
        ...

    def grouped(self, matrices: Any, rows: Array, sizes: Array, pieces: Chunks) -> Array:
        """[R,D], [E] int32 → [R,D]: the first sizes[0] rows by expert 0, the next by expert 1, and so on."""
        ...


def apply_experts(expert_inputs: Array, experts: Experts) -> Array:
    """[E,G,C,D] group-sharded → experts, expert-sharded → [E,G,C,D] group-sharded."""
    expert_inputs = constrain(expert_inputs, partition_specs.GROUPED_SLOTS)
    expert_inputs = constrain(expert_inputs, partition_specs.EXPERT_SLOTS)
    num_experts, groups, capacity, model_dim = expert_inputs.shape
    # [E,G,C,D] → [E,G·C,D] and back
    outputs = experts.batched(expert_inputs.reshape(num_experts, groups * capacity, model_dim))
    outputs = outputs.reshape(num_experts, groups, capacity, model_dim)
    outputs = constrain(outputs, partition_specs.EXPERT_SLOTS)
    return constrain(outputs, partition_specs.GROUPED_SLOTS)
