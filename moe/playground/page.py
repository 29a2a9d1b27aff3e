"""The page: its HTML, style and scripts in one file with the weights, to open in any browser without a network."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from moe.analysis.passages import colours
from moe.config import ConfigError
from moe.config.layer_kinds import layer_kinds
from moe.playground import supported
from moe.playground.packed import Packed
from moe.system.escaping import terminal

_HERE = Path(__file__).parent
_SCRIPTS = ("tokenizer.js", "model.js", "page.js")
#: Largest page, bytes.
LARGEST = 8_000_000
#: Fields of the model that model.js reads.
_FIELDS = (
    "d_model", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "activation", "norm_eps", "rope_theta",
    "attention_scale", "embedding_scale", "residual_scale",
)  # fmt: skip


def render(packed: Packed) -> str:
    """The page of a model.

    Raises:
        ConfigError: it would be larger than :data:`LARGEST`, or model.js does not compute the model.
    """
    model = packed.model
    gate = supported.check(model)
    places, weights = _joined(packed.arrays)
    moe = model.moe
    config = {name: getattr(model, name) for name in _FIELDS}
    config |= {
        "layers": [kind.sparse for kind in layer_kinds(model)],
        "num_experts": moe.num_experts,
        "k": moe.experts_per_token,
        "capacity": 0 if moe.dispatch == "dropless" else moe.capacity.eval * moe.ffn_share,
        "logit_scale": model.logit_scale * (model.d_model**-0.5 if model.scale_logits else 1.0),
    }
    data = {name: value for name, value in packed.header.items() if name != "model"}
    data |= {"config": config, "tensors": places, "rules": supported.rules(gate), "colours": colours(moe.num_experts)}
    parts = {
        "TITLE": html.escape(terminal(packed.header["title"])),
        "STYLE": (_HERE / "page.css").read_text(),
        "DATA": json.dumps(data).replace("<", "\\u003c"),  # in a script element only "<" could end the data
        "WEIGHTS": base64.b64encode(weights).decode(),
        "SCRIPTS": "".join(f"<script>\n{(_HERE / name).read_text()}</script>\n" for name in _SCRIPTS),
    }
    text = re.sub(r"__([A-Z]+)__", lambda found: parts[found[1]], (_HERE / "page.html").read_text())
    if len(text.encode()) > LARGEST:
        raise ConfigError(
            f"the page would have {len(text.encode()) / 1e6:.1f} MB; at most {LARGEST / 1e6:.0f} MB are allowed, about "
            f"{0.7 * LARGEST / 1e6:.1f}M parameters"
        )
    return text


def _joined(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """Offsets and shapes of the tensors, and their bytes: the scales of an int8 one, then its rows; 4-byte aligned."""
    places = {}
    parts = []
    offset = 0
    for name, array in arrays.items():
        if name.endswith(".scales"):
            continue
        int8 = array.dtype == np.int8
        content = (arrays[f"{name}.scales"].astype("<f4").tobytes() if int8 else b"") + (
            array.tobytes() if int8 else array.astype("<f4").tobytes()
        )
        places[name] = {"offset": offset, "rows": array.shape[0], "columns": array.shape[1], "int8": int8}
        parts.append(content + b"\0" * (-len(content) % 4))
        offset += len(parts[-1])
    return places, b"".join(parts)
