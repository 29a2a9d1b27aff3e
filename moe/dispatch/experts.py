"""The interface that dispatch modes ask of experts, and experts applied to capacity buffers over the mesh."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from moe.dispatch.grouped_matmul.row_blocks import RowBlocks
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.remat import EXPERT_OUTPUTS


@runtime_checkable
class Experts(Protocol):
    """Stacked FFNs, over either layout of rows."""

    def batched(self, rows: Float[Array, "E R D"]) -> Float[Array, "E R D"]:
        """Applies expert e to its R rows."""
        ...

    def matrices(self, dtype: Any, *, stored: bool = False) -> Any:
        """((matrices [E,D,F], their biases [E,1,F]), matrix [E,F,D]) in that dtype: gathered over ``fsdp``, or split
        over it as stored."""
        ...

    def grouped(
        self, matrices: Any, rows: Float[Array, "R D"], sizes: Int[Array, " E"], row_blocks: RowBlocks
    ) -> Float[Array, "R D"]:
        """Applies expert 0 to the first sizes[0] rows, expert 1 to the next sizes[1], and so on."""
        ...


def apply_experts(expert_inputs: Float[Array, "E G C D"], experts: Experts) -> Float[Array, "E G C D"]:
    """Moves slots from the devices of their tokens to those of their experts, applies the experts, moves them back."""
    expert_inputs = constrain(expert_inputs, partition_specs.GROUPED_SLOTS)
    expert_inputs = constrain(expert_inputs, partition_specs.EXPERT_SLOTS)
    num_experts, groups, capacity, model_dim = expert_inputs.shape
    # [E,G,C,D] → [E,G·C,D] and back
    outputs = experts.batched(expert_inputs.reshape(num_experts, groups * capacity, model_dim))
    outputs = outputs.reshape(num_experts, groups, capacity, model_dim)
    outputs = constrain(outputs, partition_specs.EXPERT_SLOTS)
    return checkpoint_name(constrain(outputs, partition_specs.GROUPED_SLOTS), EXPERT_OUTPUTS)
