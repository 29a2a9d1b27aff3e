"""Rematerialisation: named activations, and the policies of ``model.remat`` that keep some of them."""

from __future__ import annotations

from typing import Any

import jax

#: Names of ``jax.ad_checkpoint.checkpoint_name``: queries, keys, values and outputs of attention's heads; the experts'
#: outputs, on the devices of their tokens; results of the first matmuls of FFNs and experts, the largest of a layer.
ATTENTION, EXPERT_OUTPUTS, HIDDEN = "attention", "expert_outputs", "hidden"

_keep_only = jax.checkpoint_policies.save_only_these_names

#: Checkpoint policies: what the backward pass recomputes. "none": nothing; "full": the layer; "dots": all but matmuls
#: without a batch axis. Of the rest each keeps more than the one below it: "attention" the heads, so that neither they
#: nor their projections are recomputed; "outputs" also what experts return (their last matmul and exchange); "hidden"
#: also hidden activations, so that only cheap work is left to recompute.
REMAT_POLICIES: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "hidden": _keep_only(ATTENTION, EXPERT_OUTPUTS, HIDDEN),
    "outputs": _keep_only(ATTENTION, EXPERT_OUTPUTS),
    "attention": _keep_only(ATTENTION),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
