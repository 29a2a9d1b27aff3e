"""Text generation with a key/value cache, and sampling of completions with their probabilities and experts.

No assignment is dropped, so a row's text does not depend on the other rows of its batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moe.config import Config, ConfigError, MeshConfig, ModelConfig
from moe.models import kv_cache
from moe.models.factory import abstract_model
from moe.models.flops import count_parameters
from moe.parallel import target
from moe.parallel.mesh import ROW_AXES, axis_size


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: choose among this many likeliest tokens; 0: all.
        top_p: choose among the fewest likeliest tokens that together have this probability.
        stop_tokens: ids that end a row.
        start_token: first token of the decoder of an encoder-decoder; T5 takes the padding token.
        prefix: prompts are seen in both directions, as a prefix LM was trained (data.objective).
        seed: of the draws; the draws of row b do not depend on the other rows.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    start_token: int = 0
    prefix: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, holds, allowed in (
            ("temperature", 0 <= self.temperature < math.inf, "must be at least 0 and finite"),
            ("top_k", self.top_k >= 0, "must be at least 0"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("seed", 0 <= self.seed < 2**31, "must be in [0, 2^31)"),
            ("stop_tokens", all(0 <= token < 2**31 for token in self.stop_tokens), "must be in [0, 2^31)"),
        ):
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)!r}: {allowed}")


def choose(logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """Choose a token id for each row, with a key of its own."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Relative to the largest, so that none overflows; a temperature below the smallest normal number would be 0.
    temperature = max(sampling.temperature, float(np.finfo(np.float32).tiny))
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    # By rank, the lower id first among equals: in bfloat16 many of the likeliest tokens have equal logits.
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = _only(logits, jax.lax.top_k(logits, sampling.top_k)[1])
    if sampling.top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        logits = _only(logits, order, jnp.cumsum(probs, axis=-1) - probs < sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _only(logits: Float[Array, "B V"], ids: Int[Array, "B n"], kept: Bool[Array, "B n"] | bool = True) -> Array:
    """Logits with −∞ except for these ids, or for those of them that are kept."""
    mask = jnp.put_along_axis(jnp.zeros(logits.shape, bool), ids, kept, axis=-1, inplace=False)
    return jnp.where(mask, logits, -jnp.inf)


def without_drops(config: ModelConfig) -> ModelConfig:
    """The same model with capacity for every token and one group a row, so that no row depends on the others.

    A gate that looks ahead keeps its capacity, which is part of its function.
    """
    changed = one_group_a_row(config)
    if changed is config:
        return config
    capacity = dataclasses.replace(changed.moe.capacity, fixed=0)
    return dataclasses.replace(config, moe=dataclasses.replace(changed.moe, capacity=capacity))


def one_group_a_row(config: ModelConfig) -> ModelConfig:
    """Like :func:`without_drops`, but keeps a fixed ``expert_capacity``. Used for the encoder."""
    if config.moe.gate is None or not all(gate.generates for gate in config.moe.gates):
        return config
    rows = config.moe.experts_per_token * config.moe.ffn_share
    capacity = dataclasses.replace(config.moe.capacity, eval=config.moe.num_experts / rows)
    moe = dataclasses.replace(config.moe, group_size=0, capacity=capacity)
    return dataclasses.replace(config, moe=moe)


def for_generation(config: Config, num_devices: int) -> Config:
    """A run's config as generation uses it, to be checked against a mesh: one row a device, no microbatches, one group
    a row whatever the run's group size, and exchange settings that fit any row and mesh.

    Raises:
        ConfigError: a gate that needs later tokens, which keeps the run's groups.
    """
    if why := looks_ahead(config.model):
        raise ConfigError(why)
    train = config.train.of_rows(num_devices, 1)
    model, data = without_drops(config.model), dataclasses.replace(config.data, streams=0)
    model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, exchange_chunks=1, exchange_hosts=1))
    return dataclasses.replace(config, model=model, data=data, train=train)


def default_mesh(model: ModelConfig, devices: Sequence[Any]) -> MeshConfig:
    """A mesh to generate on: every device has all parameters, unless they would fill more than half of its memory in
    float32; then the devices split them, experts first, which then are not gathered for every token."""
    if 4 * count_parameters(model)[0] <= target.device_memory(devices[0]) / 2:
        return MeshConfig()
    experts = 1 if model.moe.gate is None else math.gcd(model.moe.num_experts, len(devices))
    return MeshConfig(data=1, expert=experts, fsdp=-1)


def stream(
    config: ModelConfig,
    variables: dict[str, Any],
    prompts: Sequence[Sequence[int] | np.ndarray],
    num_tokens: int,
    sampling: Sampling = Sampling(),
) -> Iterator[np.ndarray]:
    """Continue prompts, or write the targets of an encoder's inputs, one token a row at a time.

    Args:
        variables: nested dict of all of the model's variables, on the mesh in context if there is one.
        prompts: B token sequences of any lengths from 1; of an encoder-decoder, inputs of the encoder.
        num_tokens: maximum number of tokens to add to a row.

    Yields:
        [B] int32, the next token of each row, -1 after a row's stop token; ends when all rows have ended.

    Raises:
        ConfigError: no prompts, an empty one, a token outside the vocabulary, or a gate that needs later tokens.
    """
    check_prompts(config, prompts)
    token_ids, lengths = pad_prompts(prompts)
    token_ids = _of_few_widths(token_ids)
    active = np.arange(len(lengths)) < len(prompts)
    prompt_length = 1 if config.encoder_layers else token_ids.shape[1]
    unseeded = dataclasses.replace(sampling, seed=0)  # so that texts of other seeds share the programs
    begin, step = _programs(config, len(lengths), prompt_length + num_tokens, unseeded)
    seed = np.int32(sampling.seed)
    next_ids, positions, caches, encoded = begin(variables, seed, token_ids, lengths)
    for i in range(num_tokens):
        shown, shown_active = next_ids, active
        if i + 1 < num_tokens:  # started before the last token is read: the device never waits for the host
            next_ids, positions, active, caches = step(variables, seed, next_ids, positions, active, caches, encoded)
        column = np.where(np.asarray(shown_active), np.asarray(shown), -1)[: len(prompts)]
        if (column == -1).all():
            return
        yield column


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int] | np.ndarray]) -> None:
    """Refuse what cannot be continued. Raises ConfigError; see :func:`stream`."""
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError("prompts: give at least one, each of at least one token")
    check_tokens(config, prompts)
    if why := looks_ahead(config):
        raise ConfigError(why)


def check_tokens(config: ModelConfig, prompts: Sequence[Sequence[int] | np.ndarray]) -> None:
    """Refuse tokens outside the vocabulary of the prompts. Raises ConfigError."""
    vocab_size = config.encoder_vocab_size or config.vocab_size
    if any(not 0 <= int(token) < vocab_size for prompt in prompts for token in prompt):
        raise ConfigError(f"prompts: tokens must be from 0 to {vocab_size - 1}")


def looks_ahead(config: ModelConfig) -> str:
    """Why the model cannot generate, or ""."""
    for gate in config.moe.gates:
        where = f"{config.moe.field_of(gate)}={gate.name!r}"
        if not gate.generates:
            return f"{where}: routes by the other tokens of a group, which differ between generation and training"
        if gate.keeps_prompt and config.encoder_layers:
            return f"{where}: chooses experts from the prompt, and a decoder beside an encoder has none"
    return ""


def pad_prompts(prompts: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as token_ids [B,T] and lengths [B], with idle rows up to a multiple of the devices that rows are split
    over."""
    if axis_size("context") > 1:
        raise ConfigError(f"mesh.context={axis_size('context')}: must be 1 to generate")
    shards = axis_size(*ROW_AXES)
    rows = -(-len(prompts) // shards) * shards
    lengths = np.ones(rows, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    width = int(lengths.max())
    if width > 512:  # attention runs in blocks whose length divides the row's
        width = -(-width // 128) * 128
    token_ids = np.zeros((rows, width), np.int32)
    for row, prompt in zip(token_ids, prompts, strict=False):
        row[: len(prompt)] = prompt
    return token_ids, lengths


def _of_few_widths(token_ids: np.ndarray) -> np.ndarray:
    """Pad prompts to a power of two up to 512, else each length of the longest would have a program of its own."""
    width = token_ids.shape[1]
    return np.pad(token_ids, ((0, 0), (0, (1 << (width - 1).bit_length()) - width))) if width < 512 else token_ids


@functools.lru_cache(maxsize=8)
def _programs(
    config: ModelConfig, rows: int, length: int, sampling: Sampling
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The prefill and the decoding step for that many rows and positions, compiled once for all such texts."""
    graphdef = nnx.graphdef(abstract_model(without_drops(config)))
    encoder = nnx.graphdef(abstract_model(one_group_a_row(config))) if config.encoder_layers else None
    stops = np.asarray(sampling.stop_tokens, np.int32)

    def pick(logits: Array, seed: Array, positions: Array) -> Array:
        """Choose the token at each row's position."""
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(rows))
        return choose(logits, jax.vmap(jax.random.fold_in)(keys, positions), sampling)

    @jax.jit
    def begin(variables: Any, seed: Array, token_ids: Array, lengths: Array) -> Any:
        encoded, caches = None, kv_cache.empty(config, rows, length)
        if encoder is not None:
            encoded = kv_cache.encode(nnx.merge(encoder, variables), token_ids, lengths)
            token_ids, lengths = jnp.full((rows, 1), sampling.start_token, jnp.int32), jnp.ones(rows, jnp.int32)
        model = nnx.merge(graphdef, variables)
        x, caches, _ = kv_cache.run_prompt(model, token_ids, lengths, caches, encoded, prefix=sampling.prefix)
        return pick(kv_cache.prompt_logits(model, x, lengths), seed, lengths), lengths, caches, encoded

    @functools.partial(jax.jit, donate_argnames="caches")
    def step(
        variables: Any, seed: Array, token_ids: Array, positions: Array, active: Array, caches: Any, encoded: Any
    ) -> Any:
        active &= ~jnp.isin(token_ids, stops)
        model = nnx.merge(graphdef, variables)
        x, caches, _ = kv_cache.extend(model, token_ids[:, None], positions[:, None], active, caches, encoded)
        return pick(kv_cache.next_logits(model, x), seed, positions + 1), positions + 1, active, caches

    return begin, step


def sample(
    config: ModelConfig,
    variables: dict[str, Any],
    prompts: Sequence[Sequence[int] | np.ndarray],
    num_tokens: int,
    sampling: Sampling = Sampling(),
) -> list[np.ndarray]:
    """Whole continuations of :func:`stream`: B arrays of at most num_tokens int32, stop tokens included."""
    columns = list(stream(config, variables, prompts, num_tokens, sampling))
    table = np.stack(columns, axis=1) if columns else np.zeros((len(prompts), 0), np.int32)
    return [row[row >= 0] for row in table]


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One completion.

    Attributes:
        tokens: [n] int32, the stop token included.
        log_probs: [n] float32, of each token at temperature 1 over the whole vocabulary, nats.
        experts: [p + n - 1, L, K] int32, of all tokens of prompt and completion except the last, in the MoE layers;
            None in a dense model.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    experts: np.ndarray | None


#: (variables, prompts, key) → a rollout of each prompt.
Sampler = Callable[[dict[str, Any], Sequence[np.ndarray], Key[Array, ""]], list[Rollout]]


def make_sampler(config: ModelConfig, num_tokens: int, stop_tokens: Sequence[int] = ()) -> Sampler:
    """A sampler at temperature 1; it compiles once for each number of prompts and, up to 512 tokens, for each power of
    two that the longest fills, beyond for each multiple of 128.

    Args:
        config: of a decoder-only model.
        num_tokens: maximum number of tokens to add to a prompt.
        stop_tokens: ids that end a completion.

    Raises:
        ConfigError: an encoder-decoder; later, see :func:`check_prompts`.
    """
    if config.encoder_layers:
        raise ConfigError(f"model.encoder_layers={config.encoder_layers}: must be 0 to sample rollouts")
    graphdef = nnx.graphdef(abstract_model(without_drops(config)))
    stops = np.asarray(stop_tokens, np.int32)

    @jax.jit
    def run(variables: Any, token_ids: Int[Array, "B P"], lengths: Int[Array, " B"], key: Key[Array, ""]) -> Any:
        model, rows = nnx.merge(graphdef, variables), len(token_ids)
        caches = kv_cache.empty(config, rows, token_ids.shape[1] + num_tokens)
        x, caches, of_prompt = kv_cache.run_prompt(model, token_ids, lengths, caches)

        def step(carry: Any, key: Key[Array, ""]) -> Any:
            logits, positions, active, caches = carry
            tokens, log_probs = _draw(logits, key)
            going_on = active & ~jnp.isin(tokens, stops)
            x, caches, choices = kv_cache.extend(model, tokens[:, None], positions[:, None], going_on, caches)
            written = jnp.where(active, tokens, -1), log_probs, choices
            return (kv_cache.next_logits(model, x), positions + 1, going_on, caches), written

        active: Bool[Array, " B"] = jnp.ones(rows, bool)
        first = kv_cache.prompt_logits(model, x, lengths), lengths, active, caches
        _, (tokens, log_probs, written) = jax.lax.scan(step, first, jax.random.split(key, num_tokens))
        experts = None
        if of_prompt is not None:
            # [L,B,P,K], and [n,L,B,1,K] → [L,B,n,K]
            experts = of_prompt.expert_index, jnp.moveaxis(written.expert_index[:, :, :, 0], 0, 2)
        return tokens.T, log_probs.T, experts

    def sample(variables: dict[str, Any], prompts: Sequence[np.ndarray], key: Key[Array, ""]) -> list[Rollout]:
        check_prompts(config, prompts)
        token_ids, lengths = pad_prompts(prompts)
        token_ids = _of_few_widths(token_ids)
        tokens, log_probs, experts = jax.tree.map(np.asarray, run(variables, token_ids, lengths, key))
        found = []
        for row in range(len(prompts)):
            count, length = int((tokens[row] >= 0).sum()), int(lengths[row])
            of_row = None
            if experts is not None:
                parts = experts[0][:, row, :length], experts[1][:, row, : count - 1]
                of_row = np.concatenate(parts, axis=1).swapaxes(0, 1)  # [L,T,K] → [T,L,K]
            found.append(Rollout(tokens[row, :count], log_probs[row, :count], of_row))
        return found

    return sample


def _draw(logits: Float[Array, "B V"], key: Key[Array, ""]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token of each row and its log-probability."""
    tokens = jax.random.categorical(key, logits).astype(jnp.int32)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return tokens, jnp.take_along_axis(log_probs, tokens[:, None], axis=1)[:, 0]
