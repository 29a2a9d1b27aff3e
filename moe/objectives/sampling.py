"""Rollouts from the command line: prompts of a file, rewards of a user's function, and the lines that are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe.config import ConfigError, ModelConfig
from moe.data.rollouts import Group
from moe.data.tokenizer import Tokenizer
from moe.models.sampling import Rollout, Sampler
from moe.objectives.online import make_groups
from moe.system.atomic_files import write_atomic
from moe.system.foreign_files import dumps, loads

#: Reward of a completion's text, given its prompt's.
Reward = Callable[[str, str], float]

#: Completions that are sampled at once.
ROWS = 32


class TextTask:
    """A reward of texts as one of token ids.

    Args:
        tokenizer: of the model.
        reward: of (prompt, completion).
        texts: prompts as given, by their token ids.
    """

    def __init__(self, tokenizer: Tokenizer, reward: Reward, texts: dict[tuple[int, ...], str]) -> None:
        self._tokenizer = tokenizer
        self._reward = reward
        self._texts = texts

    def prompts(self, rng: np.random.Generator, count: int) -> list[np.ndarray]:
        """Token ids of the prompts, in their order."""
        del rng
        return [np.asarray(ids) for ids in self._texts][:count]

    def reward(self, prompt: np.ndarray, completion: np.ndarray) -> float:
        """Reward of the completion's text; end-of-text tokens are no part of it."""
        return self._reward(self._texts[tuple(prompt.tolist())], self._tokenizer.decode(completion.tolist()))


def read_prompts(path: str) -> list[str]:
    """Prompts of a file: lines of JSON with a string ``prompt``, or plain lines where the name ends in .txt.

    Raises:
        ConfigError: no such file, no prompt, or a line of another form, which is named.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts={path}: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompts.append(line if path.endswith(".txt") else _prompt(line, f"{path}, line {number}"))
    if not prompts:
        raise ConfigError(f"--prompts={path}: holds no prompt")
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        prompt = loads(line)["prompt"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ConfigError(f'{where}: must be an object with a string "prompt"') from error
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f'{where}: must be an object with a string "prompt"')
    return prompt


def sample_groups(
    sampler: Sampler,
    variables: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    task: TextTask,
    samples: int,
    seed: int,
) -> Iterator[Group]:
    """Scored completions of each prompt, some prompts at a time.

    Args:
        sampler: of :func:`moe.models.sampling.make_sampler`.
        variables: of the model.
        prompts: token ids.
        task: rewards.
        samples: completions of a prompt, at least 2.
        seed: of the draws.

    Raises:
        ConfigError: a reward is no finite number, or the function raises.
    """
    at_once = max(ROWS // samples, 1)
    for begin in range(0, len(prompts), at_once):
        arrays = [np.asarray(prompt) for prompt in prompts[begin : begin + at_once]]
        key = jax.random.fold_in(jax.random.key(seed), begin)
        drawn = sampler(variables, [prompt for prompt in arrays for _ in range(samples)], key)
        yield from make_groups(arrays, [_with_lists(one) for one in drawn], task, samples)


def _with_lists(sample: Rollout) -> Rollout:
    """The sample with experts as lists, the form of files."""
    experts: Any = None if sample.experts is None else sample.experts.tolist()
    return Rollout(sample.tokens, sample.log_probs, experts)


def write_groups(path: str, groups: Sequence[Group]) -> None:
    """Write a line for each prompt, as data.objective=policy reads them."""
    lines = [dumps(group.model_dump(exclude_none=True), separators=(",", ":")) for group in groups]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(path), "\n".join([*lines, ""]))


def check(config: ModelConfig, path: str, samples: int) -> None:
    """Refuse what cannot be sampled or read again, before a model is read. Raises ConfigError."""
    if config.encoder_layers:
        raise ConfigError(f"model.encoder_layers={config.encoder_layers}: must be 0 to sample rollouts")
    if not path.endswith(".jsonl"):
        raise ConfigError(f"--rollouts={path}: must end in .jsonl, the suffix by which a folder of rollouts is read")
    if samples < 2:
        raise ConfigError(f"--samples={samples}: must be at least 2, completions whose rewards are compared")
