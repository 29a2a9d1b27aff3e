"""Encoder and decoder side by side: which of the two specialises more (ST-MoE 2022, section 7: the encoder)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from moe.analysis.analyse import heldout_rows
from moe.analysis.controls import untrain_routers
from moe.analysis.record import Recorder
from moe.analysis.specialisation import AT_LEAST, token_dependence
from moe.config import ConfigError
from moe.data.pipeline import Prepared
from moe.data.sentinels import sentinel_ids
from moe.system.atomic_files import write_atomic
from moe.system.escaping import markdown_table

STACKS = ("encoder", "decoder")


def compare(
    recorders: Mapping[str, Recorder],
    variables: dict[str, Any],
    prepared: Prepared,
    *,
    tokens: int,
    shuffles: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures how much the token's identity tells about its first expert, in each stack.

    Both stacks are measured on the same number of tokens, drawn at random, and sentinels are left out: they are a
    quarter of a decoder's tokens.

    Args:
        recorders: of each of the model's :data:`STACKS`.
        variables: the model's variables.
        prepared: tokenizer and documents.
        tokens: the decoder's held-out tokens per domain, rounded up to rows.
        shuffles: permutations per null distribution.
        seed: of the draws, permutations and untrained routers.

    Returns:
        tokens: number measured in each stack; stacks → layers, and for "trained" and "untrained" routers the share of
        the expert's entropy that the token explains, per layer, less the share after permutations.

    Raises:
        ConfigError: too few tokens.
    """
    encoder, rng = recorders["encoder"], np.random.default_rng(seed)
    rows = heldout_rows(encoder, prepared, tokens)
    sets = {"trained": variables, "untrained": untrain_routers(variables, encoder.program.config.model, seed)}
    records = {stack: {name: recorders[stack](of, rows) for name, of in sets.items()} for stack in STACKS}
    sentinels = sentinel_ids(prepared.tokenizer)
    texts = {stack: np.flatnonzero(~np.isin(of["trained"].tokens, sentinels)) for stack, of in records.items()}
    count = min(map(len, texts.values()))
    found: dict[str, Any] = {}
    for stack, of in records.items():
        chosen = np.sort(rng.choice(texts[stack], count, replace=False))
        found[stack] = {"layers": list(of["trained"].layers)}
        for name, kind in of.items():
            measured = token_dependence(kind.select(chosen), shuffles, rng)
            found[stack][name] = [layer["explained"] for layer in measured]
            if not measured:
                raise ConfigError(f"tokens={tokens}: no token of the {stack} occurs {AT_LEAST} times; use more")
    return {"tokens": count, "stacks": found}


def markdown(found: dict[str, Any]) -> str:
    """A row per MoE layer of each stack, and the answer in a sentence."""
    rows = [
        [stack, layer, *(f"{100 * of[name][i]:.1f} %" for name in ("trained", "untrained"))]
        for stack, of in found["stacks"].items()
        for i, layer in enumerate(of["layers"])
    ]
    means = {
        stack: [float(np.mean(of[name])) for name in ("trained", "untrained")] for stack, of in found["stacks"].items()
    }
    (encoder, encoder_chance), (decoder, decoder_chance) = (means[stack] for stack in STACKS)
    more = "more" if encoder - encoder_chance > decoder - decoder_chance else "no more"
    return "\n".join(
        [
            "## Encoder and decoder",
            "",
            f"Share of the first expert's entropy that the token's identity explains, on {found['tokens']:,} tokens of "
            "each stack, sentinels left out, beside the same model with untrained routers.",
            "",
            markdown_table(["stack", "layer", "trained", "untrained"], rows),
            "",
            f"Over what an untrained router does, training added {100 * (encoder - encoder_chance):+.1f} points in the "
            f"encoder and {100 * (decoder - decoder_chance):+.1f} in the decoder: the encoder specialises {more} than "
            "the decoder by this measure.",
        ]
    )


def write(found: dict[str, Any], folder: epath.Path) -> str:
    """Write stacks.json, stacks.md and experts.html, which has the pages of both stacks side by side; return the
    text of stacks.md."""
    frames = "".join(
        f'<iframe src="{stack}/experts.html" title="{stack}" style="width:50%;height:99vh;border:0"></iframe>'
        for stack in STACKS
    )
    page = f'<!doctype html><meta charset="utf-8"><title>Encoder and decoder</title><body style="margin:0">{frames}'
    text = markdown(found)
    write_atomic(folder / "experts.html", page)
    write_atomic(folder / "stacks.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_atomic(folder / "stacks.md", text + "\n")
    return text
