"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.config import Config
from moe.models.decoder import Output
from moe.models.factory import Model
from moe.training.losses import Sums, token_cross_entropy


class PreferenceObjective:
    """Mean over pairs of −log σ(beta · margin); pairs are those of :mod:`moe.data.preferences`.

    A program's teacher is the reference model.
    """

    noise = True

    def count(self, batch: dict[str, Array]) -> Array:
        """Number of pairs."""
        return jnp.sum(jnp.max(batch["segment_ids"], axis=1) // 2)

    def sums(
        self,
        config: Config,
        model: Model,
        output: Output,
        batch: dict[str, Array],
        teacher: tuple[Model, Output] | None,
    ) -> Sums:
        """Loss in nats; ``preference_accuracy``: pairs of positive margin; ``preference_margin``: margins, nats."""
        assert teacher is not None, "checked with the config"
        found = token_cross_entropy(output.hidden, model.output_matrix(), batch["targets"])
        reference = token_cross_entropy(teacher[1].hidden, teacher[0].output_matrix(), batch["targets"])
        margin = margins(jax.lax.stop_gradient(reference) - found, batch["segment_ids"])
        # In a row without a pair p the margin is 0, and the pair is not counted.
        number = 1 + jnp.arange(margin.shape[1])
        present = number <= jnp.max(batch["segment_ids"], axis=1, keepdims=True) // 2
        loss = jnp.sum(jnp.where(present, -jax.nn.log_sigmoid(config.preferences.beta * margin), 0.0))
        accuracy = jnp.sum((present & (margin > 0)).astype(jnp.float32))
        return Sums(loss, loss, {"preference_accuracy": accuracy, "preference_margin": jnp.sum(margin)})


def margins(log_ratio: Float[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B P"]:
    """log π/π_ref of the chosen conversation less that of the rejected one, for each pair of a row.

    Args:
        log_ratio: log π/π_ref of each target, 0 where there is none.
        segment_ids: 2p − 1 in the chosen conversation of pair p, 2p in the rejected one, 0 in padding.
    """
    signed = jnp.where(segment_ids % 2 == 1, log_ratio, -log_ratio)
    pair = (segment_ids + 1) // 2  # 0: padding
    most = segment_ids.shape[1] // 2  # pairs that fit: each has two tokens or more
    return jax.vmap(lambda values, index: jax.ops.segment_sum(values, index, most + 1)[1:])(signed, pair)
