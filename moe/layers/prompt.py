"""Gates that keep something of a prompt for the tokens after it (:meth:`moe.routing.interface.Gate.of_prompt`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from moe.layers.call import Call, Report
from moe.routing.interface import GateInputs

#: Name of the state in generation.
STATE = "prompt"


@dataclasses.dataclass(frozen=True)
class KeepsPrompt:
    """Runs an MoE layer whose gate reads what it keeps of the prompt; the first call, on the prompt, makes it."""

    run: Callable[[Any, Array, Call], tuple[Array, Report]]

    def __call__(self, layer: Any, x: Array, call: Call) -> tuple[Array, Report]:
        """Apply the layer."""
        if STATE not in call.state:
            return self.run(layer, x, call)
        kept = call.state[STATE]
        if kept is not None:
            y, report = self.run(layer, x, call.replace(gate={**call.gate, "prompt": kept}))
            return y, report.replace(state=report.state | {STATE: kept})
        y, report = self.run(layer, x, call)
        routing, segment_ids = report.signals["routing"], call.rows.segment_ids
        inputs = GateInputs((segment_ids > 0) & ~routing.broken, segment_ids=segment_ids)
        kept = layer.gate.of_prompt(routing.router_logits, inputs)
        return y, report.replace(state=report.state | {STATE: kept})
