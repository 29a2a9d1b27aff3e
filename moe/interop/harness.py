"""Adapter of workdirs to EleutherAI's lm-evaluation-harness, an optional dependency (``pip install lm_eval``).

Importing this module imports lm_eval; ``moe downstream`` is its command.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from moe.checkpoints import parameters
from moe.checkpoints.workdir import read_config
from moe.config import ConfigError, MeshConfig
from moe.data.tokenizer_files import find_tokenizer
from moe.layers.call import Call
from moe.models import sampling
from moe.models.decoder import make_rows
from moe.models.factory import abstract_model
from moe.parallel.mesh import make_mesh

_SHORTEST = 16  # rows are padded to powers of two from here on, so that few programs are compiled

#: Names of the largest number of tokens to add; tasks use all of them, and the first one that is given counts.
_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
#: A request of the harness as tokens: its texts, the context, the continuation.
_Request = tuple[Any, list[int], list[int]]


class WorkdirLM(TemplateLM):
    """A run's or an import's newest checkpoint as a model of the harness. No assignment is dropped."""

    def __init__(
        self,
        workdir: str,
        *,
        step: int | None = None,
        batch_size: int = 8,
        max_length: int = 0,
        add_bos_token: bool | None = None,
    ):
        """
        Args:
            workdir: of a run or an import, with its tokenizer.
            step: of the checkpoint; None: the newest.
            batch_size: rows at once.
            max_length: T, longest row in tokens; 0: data.sequence_length, with which the model was trained.
            add_bos_token: whether texts begin with bos; None: special tokens are added as the tokenizer does it in the
                transformers library, so that scores are those of the harness's own ``hf`` models.

        Raises:
            ConfigError: a file is missing, or the model's gate routes by later tokens.
        """
        super().__init__()
        config = read_config(workdir)
        if config.model.encoder_layers:
            raise ConfigError(f"--workdir={workdir}: an encoder-decoder; the harness takes decoder-only models")
        sampling.check_prompts(config.model, [[0]])
        if kept := [gate for gate in config.model.moe.gates if gate.keeps_prompt]:
            raise ConfigError(
                f"--workdir={workdir}: {config.model.moe.field_of(kept[0])}={kept[0].name!r} chooses experts from the "
                "prompt, and the harness takes models whose texts it can score whole"
            )
        self._tokenizer = find_tokenizer(workdir)
        self._adds_bos = add_bos_token
        if add_bos_token and self._tokenizer.bos_id < 0:
            raise ConfigError("--add_bos_token: the tokenizer has no bos")
        self._rows, self._length = batch_size, max_length or config.data.sequence_length
        self._mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
        if batch_size % self._mesh.size or batch_size < 1:
            raise ConfigError(
                f"--batch_size={batch_size}: must be a positive multiple of the {self._mesh.size} devices"
            )
        self._variables = parameters.read_variables(workdir, config.model, mesh=self._mesh, step=step)
        self._model, self._prefix = sampling.without_drops(config.model), config.objective.prefix
        graphdef = nnx.graphdef(abstract_model(self._model))

        @jax.jit
        def score(variables: Any, tokens: Array, targets: Array) -> tuple[Array, Array]:
            """Log-likelihood of each row's targets, [B], and whether all are the likeliest tokens, [B].

            A row's positions, on which dynamic and LongRoPE scaling depend, are those of its own tokens. Gates that
            draw or count tokens do so by position, as when text is generated.
            """
            segments = (tokens >= 0).astype(jnp.int32)
            positions = jnp.where(tokens >= 0, jnp.arange(tokens.shape[1]), 0)
            # A prefix LM sees the context, up to the token that predicts the first target, in both directions.
            context = (jnp.cumsum(targets >= 0, axis=1) == 0) | (jnp.cumsum(targets >= 0, axis=1) * (targets >= 0) == 1)
            prefix = (context & (tokens >= 0)).astype(jnp.int32) if self._prefix else None
            model: Any = nnx.merge(graphdef, variables)
            rows = make_rows(jnp.maximum(tokens, 0), segments, positions, prefix=prefix)
            call = Call(rows, generating=True)
            x, report = model.run(model.embed(rows.token_ids), call)
            logits = model.output(x, report, call).logits
            log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
            chosen = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
            real = targets >= 0
            greedy = jnp.where(real, jnp.argmax(logits, axis=-1) == targets, True)
            return jnp.sum(jnp.where(real, chosen, 0.0), axis=-1), jnp.all(greedy, axis=-1)

        self._score = score

    @property
    def eot_token_id(self) -> int:
        """Id of the end of a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id before the first token of a text without context: bos, or eos where the tokenizer has none."""
        return self._tokenizer.bos_id if self._tokenizer.bos_id >= 0 else self._tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, whose special tokens are recognised as in the harness's ``hf`` models, with bos and eos where
        its tokenizer adds them: if ``add_special_tokens`` is None not where the text begins with the prefix token
        already, if False never."""
        ids = self._tokenizer.encode_with_special(string).tolist()
        added = ids[:1] != [self.prefix_token_id] if add_special_tokens is None else add_special_tokens
        if not added:
            return ids
        if self._adds_bos is None:
            return self._tokenizer.encode_with_special(string, added=True).tolist()
        return [self._tokenizer.bos_id] * self._adds_bos + ids

    def _loglikelihood_tokens(self, requests: list[_Request], **_: Any) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy) of each continuation; a context too long for a row loses its beginning."""
        results: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][1]) + len(requests[i][2]))
        for batch in itertools.batched(order, self._rows):
            ids = [((requests[i][1] or [self.prefix_token_id]) + requests[i][2])[-self._length - 1 :] for i in batch]
            length = _SHORTEST
            while length < max(map(len, ids)) - 1:
                length *= 2
            shape = (self._rows, min(length, self._length))
            tokens, targets = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
            for row, (i, text) in enumerate(zip(batch, ids, strict=True)):
                scored = min(len(requests[i][2]), len(text) - 1)
                tokens[row, : len(text) - 1] = text[:-1]
                targets[row, len(text) - 1 - scored : len(text) - 1] = text[len(text) - scored :]
            with jax.set_mesh(self._mesh):
                sums, greedy = self._score(self._variables, tokens, targets)
            for i, likelihood, is_greedy in zip(batch, np.asarray(sums), np.asarray(greedy), strict=False):
                results[i] = float(likelihood), bool(is_greedy)
        return [results[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of T tokens that are each predicted once.

        As in the harness's ``hf`` models, a bos with which the text begins is predicted too, after the prefix token.
        """
        del disable_tqdm
        windows: list[_Request] = []
        owners = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self._length, 1):
                windows.append(("", *make_disjoint_window(pair)))
                owners.append(number)
        sums = np.zeros(len(requests))
        np.add.at(sums, owners, [likelihood for likelihood, _ in self._loglikelihood_tokens(windows)])
        return sums.tolist()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, an end of text or ``max_gen_toks``; greedy unless ``do_sample``, each
        request with draws of its own, since a task may repeat it.

        Raises:
            ConfigError: a row has no room for a context before that many tokens.
        """
        del disable_tqdm
        return [self._generate(*request.args, seed=seed) for seed, request in enumerate(requests)]

    def _generate(self, context: str, options: dict[str, Any], seed: int) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        most = int(next((options[name] for name in _MOST if name in options), 256))
        if most >= self._length:
            raise ConfigError(
                f"{_MOST[0]}={most}: must be below the {self._length} tokens of a row, which also holds the context; "
                "set --max_length"
            )
        prompt = (self.tok_encode(context) or [self.prefix_token_id])[-(self._length - most) :]
        chosen = sampling.Sampling(
            temperature=float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0,
            top_k=int(options.get("top_k", 0)),
            top_p=float(options.get("top_p", 1.0)),
            stop_tokens=(self.eot_token_id,),
            prefix=self._prefix,
            seed=seed,
        )
        added: list[int] = []
        text, before = "", self._tokenizer.decode(prompt)
        with jax.set_mesh(self._mesh):
            for column in sampling.stream(self._model, self._variables, [prompt], most, chosen):
                added.append(int(column[0]))
                text = self._tokenizer.decode(prompt + added).removeprefix(before)
                if any(stop and stop in text for stop in until):
                    break
        ends = [text.index(stop) for stop in until if stop and stop in text]
        return text[: min(ends, default=len(text))]
