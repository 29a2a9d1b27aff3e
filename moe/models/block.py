"""One Transformer block."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from moe.config import ModelConfig
from moe.config.layer_kinds import LayerKind
from moe.config.mixers import GroupedQuery
from moe.layers.ffn import DenseFFN
from moe.layers.inputs import KEEP_ALL, Dropout, Rows, Site
from moe.layers.mixers.attention import Attention
from moe.layers.mixers.interface import MixerLayer
from moe.layers.mixers.table import layer_class
from moe.layers.moe_layer import create_layer
from moe.layers.ngram_memory import NgramMemory
from moe.layers.norms import RMSNorm
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.parameters import times
from moe.routing.balancing import LayerReport
from moe.routing.carry import regrouped
from moe.routing.routing import Choices, Routing


class Record(NamedTuple):
    """Reports of a block: of its MoE layer with the layer's routing, of a token mixer that has experts, and the largest
    attention score of each head [N] where training reads it; and what the block hands on (:class:`Stream`)."""

    report: LayerReport | None = None
    routing: Routing | None = None
    mixer: LayerReport | None = None
    scores: Array | None = None
    late: Array | None = None


class Stream(NamedTuple):
    """Activations and carry that pass from layer to layer.

    Attributes:
        x: [B,T,D] activations.
        carry: pytree of [B,T,...] float32 that each MoE layer's router hands on to that of the next; None: nothing.
        late: [B,T,D] output of the experts of the layer below, which is added after this one; 0 if that layer was
            dense; None in a model without shortcuts. The dense path runs while rows travel (shortcut-connected MoE: Cai
            et al. 2024, arXiv 2404.05019), as LongCat-Flash arranges it (2025, arXiv 2509.01322, section 2): with n of
            the norms, a_i of attention and f_i of dense FFNs, f_1 the shared expert,

                h = x + a_1(n x)    u = h + f_1(n h)    v = u + a_2(n u)    y = v + f_2(n v) + experts(n h)
    """

    x: Array
    carry: Any = None
    late: Array | None = None

    def after(self, x: Array, record: Record) -> tuple[Stream, Record]:
        """The stream after a layer, and the layer's record without what it handed on. A dense layer, and one that
        replays a whole routing, leave the carry as it is."""
        routing, late = record.routing, record.late
        if self.late is not None and late is None:
            x, late = x + self.late, jnp.zeros_like(self.late)
        record = record._replace(late=None)
        if routing is None:
            return Stream(x, self.carry, late), record
        carry = self.carry if routing.carry is None else regrouped(routing.carry, x.shape[:2])
        carry = jax.tree.map(lambda leaf: constrain(leaf, partition_specs.BATCH), carry)
        return Stream(x, carry, late), record._replace(routing=dataclasses.replace(routing, carry=None))


class CrossAttention(nnx.Module):
    """Attention from the decoder to the encoder's output, and its norm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.norm = RMSNorm.of(config)
        self.attention = Attention(config, GroupedQuery.of(config, causal=False), rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], rows: Rows, drop: Dropout) -> Float[Array, "B T D"]:
        """Output for x before the residual is added."""
        assert rows.encoded is not None
        assert rows.encoded_segment_ids is not None
        documents = rows.segment_ids, rows.encoded_segment_ids
        x = self.norm(x)
        heads = self.attention.attend_to(x, rows.encoded, *documents, drop.at(Site.CROSS_WEIGHTS))
        return drop.at(Site.CROSS_OUTPUT)(self.attention.join(heads, x))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + FFN(norm(x)), the FFN dense or MoE; between them, in the decoder of an
    encoder-decoder, x + cross-attention(norm(x)). With ``model.norms="after"``, x + norm(attention(x)) (OLMo 2); with
    both, x + norm'(attention(norm(x))) (Trinity). A layer with a memory of n-grams adds what it reads there first."""

    def __init__(self, config: ModelConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        if kind.memory is not None:
            self.memory = NgramMemory(config, kind.memory, rngs=rngs)
        self.attention_norm = RMSNorm.of(config)
        setattr(self, kind.mixer.path, layer_class(kind.mixer)(config, kind.mixer, rngs=rngs))
        if kind.role == "cross":
            self.cross = CrossAttention(config, rngs=rngs)
        self.ffn_norm = RMSNorm.of(config)
        if config.norms == "both":
            self.attention_output_norm = RMSNorm.of(config)
            self.ffn_output_norm = RMSNorm.of(config)
        self.kind = kind
        self.dropout = config.dropout
        self.route_padding = config.moe.route_padding
        self.shortcut = config.moe.shortcut
        self.norms = config.norms
        self.residual_scale = config.residual_scale
        self.reports_scores = False
        if kind.sparse:
            self.moe = create_layer(config, gate=kind.gate, rngs=rngs)
        else:
            self.dense = DenseFFN(config, config.d_ff, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Rows,
        *,
        carry: Any = None,
        routing: Routing | Choices | None = None,
        train: bool = False,
        rng: PRNGKeyArray | None = None,
        generating: bool = False,
    ) -> tuple[Float[Array, "B T D"], Record]:
        """Apply all parts.

        Args:
            carry: of the layer's :class:`Stream`; what the layer hands on is in the routing of its record.
            routing: see :meth:`moe.models.stack.Stack.run`, as ``train``.
            rng: key of this layer.
            generating: see :meth:`feed_forward`.
        """
        x = checkpoint_name(x, partition_specs.LAYER_INPUT)
        drop = Dropout(self.dropout, rng if train else None)
        # The scopes name the parts of a layer in profiles and in plans.
        if self.kind.memory is not None:
            with jax.named_scope("memory"):
                x = self.recall(x, rows, drop)
        with jax.named_scope("attention"):
            mixer = self.mixer_report(x, rows)
            scores = (
                self.token_mixer.largest_scores(self.mixer_input(x), rows) if train and self.reports_scores else None
            )
            x = self.mix(x, rows, drop)
        if self.kind.role == "cross":
            with jax.named_scope("cross_attention"):
                x = x + self.cross(x, rows, drop)
        with jax.named_scope("moe" if self.kind.sparse else "ffn"):
            settings: dict[str, Any] = {"routing": routing, "train": train, "rng": rng}
            x, record = self.feed_forward(x, rows, carry=carry, generating=generating, **settings)
        return x, record._replace(mixer=mixer, scores=scores)

    def recall(self, x: Float[Array, "B T D"], rows: Rows, drop: Dropout = KEEP_ALL) -> Float[Array, "B T D"]:
        """x, and what the memory of n-grams adds, if the layer has one."""
        if self.kind.memory is None:
            return x
        return self.add_recalled(x, self.memory.prefill(x, rows, drop.at(Site.MEMORY_OUTPUT))[0])

    def add_recalled(self, x: Float[Array, "B T D"], y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Add the output of the memory to x."""
        return x + times(y, self.residual_scale)

    def mix(self, x: Float[Array, "B T D"], rows: Rows, drop: Dropout = KEEP_ALL) -> Float[Array, "B T D"]:
        """x + mixer(norm(x))."""
        h = self.mixer_input(x)
        heads, _ = self.token_mixer.prefill(h, rows, drop.at(Site.ATTENTION_WEIGHTS))
        return self.add_mixed(x, self.token_mixer.join(heads, h), drop.at(Site.ATTENTION_OUTPUT))

    def mixer_report(self, x: Float[Array, "B T D"], rows: Rows) -> LayerReport | None:
        """Report of the mixer's routers; None for one without experts."""
        if not self.kind.mixer.reports:
            return None
        return self.token_mixer.report(self.mixer_input(x), rows)

    @property
    def token_mixer(self) -> MixerLayer:
        """The token mixer."""
        return getattr(self, self.kind.mixer.path)

    def mixer_input(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Input of the token mixer: x, normalised unless norms come after alone."""
        return x if self.norms == "after" else self.attention_norm(x)

    def ffn_input(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Input of the FFN: x, normalised unless norms come after alone."""
        return x if self.norms == "after" else self.ffn_norm(x)

    def add_mixed(self, x: Float[Array, "B T D"], y: Float[Array, "B T D"], drop: Dropout) -> Float[Array, "B T D"]:
        """Add the output of the token mixer to x, normalised if norms come after."""
        norm = self.attention_output_norm if self.norms == "both" else self.attention_norm
        return self._add(norm, x, y, drop)

    def _add_ffn(self, x: Array, y: Array, drop: Dropout) -> Array:
        return self._add(self.ffn_output_norm if self.norms == "both" else self.ffn_norm, x, y, drop)

    def _add(self, norm: RMSNorm, x: Array, y: Array, drop: Dropout) -> Array:
        return x + times(drop(y if self.norms == "before" else norm(y)), self.residual_scale)

    def feed_forward(
        self,
        x: Float[Array, "B T D"],
        rows: Rows,
        *,
        carry: Any = None,
        prompt: Any = None,
        generating: bool = False,
        routing: Routing | Choices | None = None,
        train: bool = False,
        rng: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], Record]:
        """The last part: x + FFN(norm(x)), without the experts' output where there is a shortcut; ``generating``: gates
        that draw or count tokens do so by a token's position, so that no row depends on the others; ``prompt``: what
        the gate keeps of the prompt."""
        h, drop = self.ffn_input(x), Dropout(self.dropout, rng if train else None)
        if not self.kind.sparse:
            y = self.dense(h, drop.at(Site.FFN_HIDDEN))
            return constrain(self._add_ffn(x, y, drop.at(Site.FFN_OUTPUT)), partition_specs.BATCH), Record()
        mask = None if self.route_padding else rows.as_keys > 0
        y, report, routing = self.moe(
            h,
            mask,
            token_ids=rows.token_ids,
            positions=rows.positions if generating else None,
            segment_ids=rows.segment_ids,
            **({} if carry is None else {"carry": carry}),
            **({} if prompt is None else {"prompt": prompt}),
            routing=routing,
            train=train,
            rng=rng,
        )
        late = None
        if self.shortcut:
            late, y = times(drop.at(Site.SHORTCUT)(y), self.residual_scale), self.moe.beside(h, mask)
            late = constrain(late, partition_specs.BATCH)
        x = x if y is None else self._add_ffn(x, y, drop.at(Site.FFN_OUTPUT))
        return constrain(x, partition_specs.BATCH), Record(report, routing, late=late)


def report_scores(model: nnx.Module) -> None:
    """Let every layer of a model that computes attention scores report the largest ones in training."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Block) and module.kind.mixer.score_dims:
            module.reports_scores = True
