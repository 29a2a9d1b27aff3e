"""A page's weights, and its texts about them, from a trained run."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from moe.analysis.analyse import heldout_rows
from moe.analysis.difference import TokenLosses, places
from moe.analysis.record import Recorder
from moe.checkpoints import parameters as stored
from moe.config import Config, ConfigError
from moe.data.pipeline import Prepared
from moe.models.flops import count_parameters
from moe.models.state import join
from moe.playground import supported
from moe.playground.packed import LONGEST, Packed, pack, unpack
from moe.training.open_workdir import Workdir

#: Largest number of characters of an example.
_EXAMPLE = 160


def make(opened: Workdir, step: int, *, title: str, tokens: int) -> Packed:
    """Round a checkpoint to int8, and measure what that costs on held-out text.

    Args:
        opened: the run.
        step: of the checkpoint.
        title: of the page.
        tokens: held-out tokens per domain.

    Raises:
        ConfigError: the page does not support the model, its objective or its tokenizer.
    """
    config = opened.program.config
    supported.check(config.model)
    if "page" not in config.objective.abilities:
        raise ConfigError(f"data.objective={config.data.objective!r}: the page supports only 'causal'")
    words = supported.vocabulary(opened.prepared.tokenizer)
    if len(words["pieces"]) > config.model.vocab_size:
        raise ConfigError(f"tokenizer.model: has more than model.vocab_size={config.model.vocab_size} pieces")
    parameters = stored.read_parameters(opened.path, config.model, step=step, dtype=np.float32)
    biases = stored.read_biases(opened.path, config.model, step=step)
    header: dict[str, Any] = {
        "title": title,
        "length": min(config.data.sequence_length, LONGEST),
        "vocabulary": words,
        "examples": _examples(opened.prepared),
    }
    packed = pack(config.model, parameters, biases, header)
    losses, rows = TokenLosses(opened.program), heldout_rows(Recorder(opened.program), opened.prepared, tokens)
    domain, _ = places(rows)
    found = {"float32": losses(join(parameters, biases), rows), "int8": losses(join(*unpack(packed)), rows)}
    packed.header["losses"] = {
        kind: {
            "all": float(np.nanmean(of)),
            **{name: float(np.nanmean(of[domain == number])) for number, name in enumerate(rows)},
        }
        for kind, of in found.items()
    }
    total, active = count_parameters(config.model)
    packed.header["sizes"] = (
        f"{total:,} parameters in all, {active:,} of them active for a token at "
        f"K = {config.model.moe.experts_per_token}."
    )
    packed.header["about"] = _about(config, step, packed.header["losses"], len(domain))
    return packed


def _examples(prepared: Prepared) -> list[dict[str, str]]:
    """The beginning of the first held-out document of each domain, up to a word's end."""
    found = []
    for domain in prepared.domains:
        for text in itertools.islice(prepared.heldout[domain], 1):
            part = text.strip()[:_EXAMPLE]
            found.append({"name": domain, "text": part.rpartition(" ")[0] or part})
    return found


def _about(config: Config, step: int, losses: dict[str, dict[str, float]], tokens: int) -> str:
    read = config.tokens_until(step)
    domains = ", ".join(f"{name} {loss:.2f}" for name, loss in losses["int8"].items() if name != "all")
    return (
        f"Trained for {step:,} steps of {read // max(step, 1):,} tokens ({read / 1e6:.1f}M). Matrices are int8 with a "
        f"scale for each row; norms and routers are float32. Loss on {tokens:,} held-out tokens: "
        f"{losses['int8']['all']:.3f} nats per token, {losses['float32']['all']:.3f} before rounding ({domains})."
    )
