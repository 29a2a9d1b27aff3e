"""Reinforcement learning from rollouts: completions with their advantages, and the loss of :mod:`moe.objectives.grpo`.

Each completion is one segment, with its prompt before it and targets only in the completion. Besides the arrays of
:mod:`moe.data.pipeline` a batch has:

    log_probs   [B,T] float32      log-probability of each target when it was sampled
    advantages  [B,T] float32      advantage of each target's completion
    experts     [B,T,L,K] int16    experts of each token in the MoE layers; with policy.replay and MoE layers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.config import Config, ConfigError, DataConfig, ModelConfig, PolicyConfig, layer_kinds, sparse_layers
from moe.config.objectives import Ability, Arrays
from moe.data import rollouts
from moe.data.engines import ABSENT, read_experts
from moe.data.folders import FolderDocuments
from moe.data.tokenizer import Tokenizer
from moe.models.decoder import Output
from moe.models.factory import Model
from moe.objectives.grpo import token_terms, token_weights
from moe.objectives.text import NextToken
from moe.system.fields import require
from moe.system.foreign_files import first_sentence
from moe.training.batches import EXPERTS_KEY
from moe.training.losses import Sums, token_cross_entropy

#: Added to the deviation of a group's rewards, as TRL, verl and Tunix do.
_TINY = 1e-6

#: Largest number of experts that batches of rollouts, in int16, can name.
MOST_RECORDED = 2**15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(NextToken):
    """The loss of a batch of rollouts; a program's teacher is the reference model.

    Attributes:
        model: config of the model; its ids, layers and experts must be those of the rollouts.
        policy: settings.
        length: T, tokens of a row.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset()
    section: ClassVar[str] = "policy"
    has_reference: ClassVar[bool] = True
    holds_ids: ClassVar[bool] = True
    noise: ClassVar[bool] = False

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    length: int = 0

    # --- Config ------------------------------------------------------------------------------------------------------
    def bound(self, data: DataConfig, config: Config | None = None) -> Policy:
        """The objective of a run's model, settings and rows."""
        if config is None:
            return self
        return dataclasses.replace(self, model=config.model, policy=config.policy, length=data.sequence_length)

    def check(self, config: Config) -> None:
        """Check that the step can run the policy as it was sampled: without drops, and with the recorded experts; and
        that there is a reference model exactly if ``policy.kl`` is above 0."""
        teacher, moe = config.distill.teacher, config.model.moe
        allowed = "must name the reference model with policy.kl above 0, and be empty with 0"
        require(bool(teacher) == (config.policy.kl > 0), "distill.teacher", teacher, allowed)
        if moe.gate is None:
            return
        allowed = "must be 'dropless' with data.objective='policy': rollouts drop no tokens"
        require(moe.dispatch == "dropless", "model.moe.dispatch", moe.dispatch, allowed)
        for gate in moe.gates:
            allowed = "must choose the same experts in rollouts, whose prompts decide them, as in training"
            require(not gate.keeps_prompt, moe.field_of(gate), gate.name, allowed)
        numbered = not config.policy.replay or moe.num_experts + moe.null_experts <= MOST_RECORDED
        allowed = f"must be at most {MOST_RECORDED} with the experts without an FFN, or set policy.replay=False"
        require(numbered, "model.moe.num_experts", moe.num_experts, allowed)
        for gate in {kind.gate for kind in layer_kinds(config.model)} - {None} if config.policy.replay else ():
            assert gate is not None
            without = f"must be False with {moe.field_of(gate)}={gate.name!r}"
            allowed = f"{without}, which weighs only what it chooses"
            require(gate.reweighs, "policy.replay", True, allowed)
            # Where all experts are listed, K is a mean.
            fixed = not gate.lists_all or gate.sends_to_all
            allowed = f"{without}, whose tokens have any number of experts: rollouts record K"
            require(fixed, "policy.replay", True, allowed)

    def check_reference(self, config: Config, reference: ModelConfig) -> None:
        """Refuse a reference model that cannot replay the policy's experts."""
        sizes = [
            (sparse_layers(model), model.moe.num_experts, model.moe.experts_per_token)
            for model in (config.model, reference)
        ]
        if config.policy.replay and sizes[0] != sizes[1]:
            raise ConfigError(
                f"distill.teacher={config.distill.teacher!r}: must have the policy's MoE layers, experts and K, which "
                "it replays; set policy.replay=False for another model"
            )

    def about(self, config: Config) -> str:
        """The method, its mean and clipping, the reference model and the experts."""
        policy, over = config.policy, "tokens" if config.policy.mean == "tokens" else "completions"
        experts = f", experts of {'the rollouts' if policy.replay else 'its own router'}"
        reference = f", KL {policy.kl:g} against {config.distill.teacher}" if policy.kl else ""
        return (
            f"policy (GRPO), mean over {over}, ratios clipped to [{1 - policy.clip_low:g}, {1 + policy.clip_high:g}]"
            f"{reference}{experts if any(sparse_layers(config.model)) else ''}"
        )

    # --- Reading -----------------------------------------------------------------------------------------------------
    @property
    def replays(self) -> bool:
        """Whether examples have experts."""
        return self.policy.replay and any(sparse_layers(self.model))

    def check_documents(self, documents: Sequence[str]) -> None:
        """Refuse the first document that this model cannot be trained on; file and line are named."""
        for i, text in enumerate(documents):
            try:
                self.completions(text)
            except ConfigError as error:
                where = documents.where(i) if isinstance(documents, FolderDocuments) else f"document {i}"
                raise ConfigError(f"{where}: {error}") from error

    def lengths(self, data: DataConfig) -> dict[str, int]:
        """T of each array."""
        names = ("tokens", "targets", "log_probs", "advantages", *((EXPERTS_KEY,) if self.replays else ()))
        return dict.fromkeys(names, data.sequence_length)

    def examples(self, text: str, rng: np.random.Generator, data: DataConfig, tokenizer: Tokenizer) -> list[Arrays]:
        """An example for each completion (:meth:`completions`)."""
        del rng, data, tokenizer
        return self.completions(text)

    def completions(self, text: str) -> list[Arrays]:
        """An example for each completion of a document.

        Raises:
            ConfigError: the document holds no rollouts, or not of this model; the field is named.
        """
        try:
            group = rollouts.read(text)
        except ValueError as error:
            raise ConfigError(f"data.objective='policy': {first_sentence(error)}; see docs/finetuning.md") from error
        return self.of_group(group)

    def of_group(self, group: rollouts.Group) -> list[Arrays]:
        """An example for each completion of a group. Raises ConfigError; see :meth:`completions`."""
        if group.engine and self.policy.replay and not self.replays:
            raise ConfigError(f"engine={group.engine!r}: belongs to a model with MoE layers; set policy.replay=False")
        rewards = np.array([completion.reward for completion in group.completions])
        values = advantages(rewards, divide=self.policy.divide_by_deviation)
        parts = zip(group.completions, values, strict=True)
        return [self._example(group, i, completion, value) for i, (completion, value) in enumerate(parts)]

    def _example(self, group: rollouts.Group, number: int, completion: rollouts.Completion, advantage: float) -> Arrays:
        name = f"completions.{number}"
        ids, start = np.array(group.prompt_tokens + completion.tokens), len(group.prompt_tokens) - 1
        if len(ids) - 1 > self.length:
            allowed = f"data.sequence_length={self.length} holds at most {self.length + 1}"
            raise ConfigError(f"{name}.tokens: is {len(ids)} tokens with its prompt, and {allowed}")
        if ids.max() >= self.model.vocab_size:
            raise ConfigError(
                f"{name}.tokens: token {ids.max()} must be below model.vocab_size={self.model.vocab_size}"
            )

        def at_targets(values: Any, outside: float) -> np.ndarray:
            return np.concatenate([np.full(start, outside), values])

        count = len(completion.tokens)
        example = {
            "tokens": ids[:-1].astype(np.int32),
            "targets": at_targets(completion.tokens, -1).astype(np.int32),
            "log_probs": at_targets(completion.log_probs, 0).astype(np.float32),
            "advantages": at_targets(np.full(count, advantage), 0).astype(np.float32),
        }
        return example | ({EXPERTS_KEY: self._experts(group, completion, name)} if self.replays else {})

    def _experts(self, group: rollouts.Group, completion: rollouts.Completion, name: str) -> np.ndarray:
        """[tokens,L,K] int16."""
        if group.engine is None:
            raise ConfigError(f"{name}.experts: is missing; record them, or set policy.replay=False")
        length = len(group.prompt_tokens) + len(completion.tokens) - 1
        try:
            (experts,) = read_experts(group.engine, [completion.experts], self.model, length)
        except ConfigError as error:
            raise ConfigError(f"{name}.experts: {error}") from error
        absent = (experts == ABSENT).any((1, 2))
        if absent.any():
            raise ConfigError(f"{name}.experts: token {absent.argmax()} of {length} has none")
        return experts.astype(np.int16)

    def ids(self, tokenizer: Tokenizer) -> int:
        """V: a model may have sampled ids that its tokenizer does not use."""
        del tokenizer
        return self.model.vocab_size

    # --- Training ----------------------------------------------------------------------------------------------------
    def arrays(self, config: Config) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Log-probabilities, advantages and experts."""
        length, model = config.data.sequence_length, config.model
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "log_probs": ((length,), jnp.float32),
            "advantages": ((length,), jnp.float32),
        }
        if config.policy.replay and any(layers := sparse_layers(model)):
            shapes[EXPERTS_KEY] = (length, sum(layers), model.moe.experts_per_token), jnp.int16
        return shapes

    def count(self, batch: dict[str, Array]) -> Array:
        """Number of sampled tokens, or of completions."""
        if self.policy.mean == "tokens":
            return jnp.sum(batch["targets"] >= 0)
        return jnp.sum(jnp.max(batch["segment_ids"], axis=1))

    def sums(
        self,
        config: Config,
        model: Model,
        output: Output,
        batch: dict[str, Array],
        teacher: tuple[Model, Output] | None,
    ) -> Sums:
        """Losses of tokens, weighted as ``mean`` says, and under ``policy_``:

        ``ratio``: r. ``clipped``: tokens whose loss is clipped. ``extreme``: tokens with r above 2 or below 1/2.
        ``old_kl``, ``kl``: estimated KL(π_old ‖ π), without bias since π_old sampled the tokens, and KL(π ‖ reference),
        nats.
        """
        targets = batch["targets"]
        log_probs = -token_cross_entropy(output.hidden, model.output_matrix(), targets)
        reference = None
        if teacher is not None:
            reference = -token_cross_entropy(teacher[1].hidden, teacher[0].output_matrix(), targets)
            reference = jax.lax.stop_gradient(reference)
        terms = token_terms(self.policy, log_probs, batch["log_probs"], batch["advantages"], reference)
        weights = token_weights(targets >= 0, batch["segment_ids"], per_completion=self.policy.mean != "tokens")
        # Where the loss is divided by a constant, logged numbers are still means over completions of means over tokens.
        means = {f"policy_{name}": jnp.sum(weights * values) for name, values in terms.items()}
        loss = means.pop("policy_loss")
        if self.policy.mean == "constant":
            loss = jnp.sum(terms["loss"]) / config.data.sequence_length
        return Sums(loss, loss, means)

    def batch(self, examples: Sequence[Arrays]) -> Arrays:
        """A batch with one example in each row, padded with token 0."""

        def row_of(example: Arrays) -> Arrays:
            size = len(example["tokens"])

            def padded(values: np.ndarray) -> np.ndarray:
                return np.pad(values, [(0, self.length - size)] + [(0, 0)] * (values.ndim - 1))

            columns = np.arange(self.length)
            places = {"tokens_segment_ids": columns < size, "tokens_positions": np.where(columns < size, columns, 0)}
            return self.row({key: padded(values) for key, values in example.items()} | places, 0)

        rows = [row_of(example) for example in examples]
        return {key: np.stack([one[key] for one in rows]) for key in rows[0]}

    # --- Report ------------------------------------------------------------------------------------------------------
    def prompt(self, text: str, data: DataConfig, tokenizer: Tokenizer) -> Any:
        """The prompt of a group."""
        del data, tokenizer
        return np.array(rollouts.read(text).prompt_tokens, np.int32)


def advantages(rewards: np.ndarray, *, divide: bool) -> np.ndarray:
    """Advantages of a group's completions: rewards less their mean, over their deviation (DeepSeekMath, section 4.1.2).

    Args:
        rewards: [N].
        divide: by the deviation, of N - 1 degrees of freedom; False: as in Dr. GRPO (Liu et al. 2025, section 3.2).
    """
    centred = rewards - rewards.mean()
    return centred / (rewards.std(ddof=1) + _TINY) if divide else centred
