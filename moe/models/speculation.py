"""Greedy text by self-speculation: multi-token prediction drafts a token, which the model checks with the next one.

Each step runs the model on two tokens, the last one that is certain and the draft after it. Where the model itself
would have written the draft, both of its answers count, else the first one (DeepSeek-V3, section 2.2). So the text is
that of :mod:`moe.models.sampling` at temperature 0, in fewer steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe.config import ConfigError, ModelConfig, layer_kinds
from moe.config.layer_kinds import require_ability
from moe.layers.call import Call
from moe.models import kv_cache
from moe.models.decoder import Transformer
from moe.models.factory import abstract_model
from moe.models.kv_cache import Cache
from moe.models.prediction import PredictionLayer, shift
from moe.models.sampling import check_prompts, pad_prompts, without_drops
from moe.models.segments import LayerStates

#: Tokens that a step of the model reads beyond the certain one.
AHEAD = 1


@dataclasses.dataclass(frozen=True)
class Speculated:
    """Texts, and how many steps they took.

    Attributes:
        texts: B arrays of int32, stop tokens included.
        steps: of the model after the prompt.
        accepted: share of the drafts that the model confirmed.
    """

    texts: list[np.ndarray]
    steps: int
    accepted: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """State between steps; the certain token and its draft are not in the caches."""

    tokens: Int[Array, " B"]
    drafts: Int[Array, " B"]
    positions: Int[Array, " B"]
    caches: LayerStates
    prediction: Cache


def sample(
    config: ModelConfig,
    variables: dict[str, Any],
    prompts: Sequence[Sequence[int] | np.ndarray],
    num_tokens: int,
    stop_tokens: Sequence[int] = (),
    *,
    prefix: bool = False,
) -> Speculated:
    """Likeliest continuations, as :func:`moe.models.sampling.sample` at temperature 0 writes them.

    Args:
        config: of a model with ``prediction_layers``, whose first one drafts.
        prompts: B token sequences of any lengths from 1.
        num_tokens: maximum number of tokens to add to a row.
        stop_tokens: ids that end a row.
        prefix: the model sees prompts in both directions, as a prefix LM was trained; the drafting layer sees them
            causally, as in training.

    Raises:
        ConfigError: no prediction layers; or see :func:`moe.models.sampling.stream`.
    """
    if not config.prediction_layers:
        raise ConfigError("model.prediction_layers=0: must be at least 1 to draft tokens; import them, or train them")
    require_ability(config, "drafting", "to draft tokens, since the memory of its layers keeps rejected ones")
    if config.rope_scaling.follows_length:
        raise ConfigError(
            f"model.rope_scaling.kind={config.rope_scaling.kind!r}: must be another to draft tokens, since its angles "
            "depend on the length of the text"
        )
    check_prompts(config, prompts)
    token_ids, lengths = pad_prompts(prompts)
    if num_tokens < 1:  # the prefill below writes a token already
        return Speculated([np.zeros(0, np.int32) for _ in prompts], 0, 0.0)
    begin, step = _programs(config, len(lengths), token_ids.shape[1] + num_tokens + AHEAD, prefix)
    state = begin(variables, token_ids, lengths)
    texts: list[list[int]] = [[int(token)] for token in np.asarray(state.tokens)]
    steps = drafted = accepted = 0

    def active() -> np.ndarray:
        ended = [len(text) >= num_tokens or text[-1] in stop_tokens for text in texts]
        return ~np.asarray(ended) & (np.arange(len(texts)) < len(prompts))

    while (running := active()).any():
        state, written = step(variables, state, running)
        steps += 1
        for row, columns in enumerate(np.asarray(written)):
            if running[row]:
                drafted, accepted = drafted + 1, accepted + int(columns[1] >= 0)
                for token in columns[columns >= 0]:
                    if len(texts[row]) < num_tokens and texts[row][-1] not in stop_tokens:
                        texts[row].append(int(token))
    found = [np.asarray(text, np.int32) for text in texts[: len(prompts)]]
    return Speculated(found, steps, accepted / max(drafted, 1))


@functools.lru_cache(maxsize=8)
def _programs(
    config: ModelConfig, rows: int, length: int, prefix: bool
) -> tuple[Callable[..., _State], Callable[..., Any]]:
    """The prefill and the step for that many rows and positions, compiled once for all such texts."""
    graphdef = nnx.graphdef(abstract_model(without_drops(config)))
    kind = layer_kinds(config)[-1]

    def split(variables: Any) -> tuple[Transformer, PredictionLayer]:
        model: Any = nnx.merge(graphdef, variables)
        of_layers, stacked = nnx.split(model.prediction)
        return model, nnx.merge(of_layers, jax.tree.map(lambda leaf: leaf[0], stacked))

    @jax.jit
    def begin(variables: Any, token_ids: Array, lengths: Array) -> _State:
        model, layer = split(variables)
        caches = kv_cache.empty(config, rows, length, ahead=AHEAD)
        x, caches, _ = kv_cache.run_prompt(model, token_ids, lengths, caches, prefix=prefix)
        hidden = model.final_norm(x)
        last = lengths[:, None] - 1  # [B,1]
        of_last = jnp.take_along_axis(hidden, last[..., None], axis=1)
        tokens = _likeliest(model, of_last)[:, 0]
        # The prompt's tokens after the first, each with the hidden state that predicted it, fill the layer's cache.
        own = kv_cache.prompt_rows(shift(token_ids, 1, 0), lengths - 1)
        stacked = kv_cache.empty_layers(config, kind, 1, rows, length, ahead=AHEAD)
        cache = jax.tree.map(lambda leaf: leaf[0], stacked)
        _, cache = _predict(model, layer, hidden, kv_cache.prompt_call(own, lengths - 1), cache)
        drafts, cache = _draft(model, layer, of_last, tokens[:, None], last, cache)
        return _State(tokens, drafts[:, 0], lengths, caches, cache)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(variables: Any, state: _State, active: Bool[Array, " B"]) -> tuple[_State, Int[Array, "B 2"]]:
        model, layer = split(variables)
        token_ids = jnp.stack([state.tokens, state.drafts], axis=1)
        positions = jnp.stack([state.positions, state.positions + 1], axis=1)
        x, caches, _ = kv_cache.extend(model, token_ids, positions, active, state.caches)
        hidden = model.final_norm(x)
        answers = _likeliest(model, hidden)
        drafts, cache = _draft(model, layer, hidden, answers, positions, state.prediction)
        confirmed = answers[:, 0] == state.drafts
        tokens, drafts = (jnp.where(confirmed, values[:, 1], values[:, 0]) for values in (answers, drafts))
        written = jnp.stack([answers[:, 0], jnp.where(confirmed, answers[:, 1], -1)], axis=1)
        return _State(tokens, drafts, state.positions + 1 + confirmed, caches, cache), written

    return begin, step


def _likeliest(model: Transformer, hidden: Float[Array, "B T D"]) -> Int[Array, "B T"]:
    logits = (model.scaled(hidden) @ model.output_matrix()).astype(jnp.float32)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _draft(
    model: Transformer,
    layer: PredictionLayer,
    hidden: Float[Array, "B T D"],
    token_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
) -> tuple[Int[Array, "B T"], Cache]:
    """Draft the tokens after ``token_ids``, which the hidden states at ``positions`` predicted."""
    rows = kv_cache.next_rows(token_ids, positions, jnp.ones(len(token_ids), bool))
    x, cache = _predict(model, layer, hidden, kv_cache.next_call(rows), cache)
    return _likeliest(model, layer.output_norm(x)), cache


def _predict(
    model: Transformer, layer: PredictionLayer, hidden: Array, call: Call, cache: Cache
) -> tuple[Float[Array, "B T D"], Cache]:
    x, report = layer.apply(layer.join(hidden, model.embed(call.rows.token_ids)), call.replace(state=cache))
    return x, report.state
