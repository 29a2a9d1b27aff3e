"""Measurements on a trained model beside its loss, by name (:data:`PROBES`).

Each maps a run to quantity → value; a value of one MoE layer is named ``quantity@layer``, counted among MoE layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from moe.analysis import dependence, documents, measures, probes, repetition, syntax
from moe.analysis.record import Recorder, Records
from moe.checkpoints import manager, parameters
from moe.config import ConfigError
from moe.data import pipeline
from moe.lab.running.heldout import mixed_rows
from moe.training.evaluation import Heldout, load_heldout
from moe.training.step import Program

MIXED = "mixed"
SHUFFLES = 20  # permutations of a null distribution
EARLY = 0.25  # share of training after which saturation is measured
MASKED_SHARE = 1 / 8  # share of the experts that is masked, each token's most probable ones
EVAL_FACTORS = (0.75, 1.0, 1.25, 2.0, 4.0)
PYTHON_TOKENS = 20_000  # held-out source tokens whose syntax is analysed


class Model:
    """Compiled programs and held-out data that all runs of one arm share.

    Attributes:
        heldout: batches of one domain each, for statistics by domain.
        mixed: batches of the primary domains mixed as in training, for losses: under a capacity, a batch of one domain
            would overflow experts that training never overflows.
    """

    def __init__(self, program: Program, primary: tuple[str, ...], rows_per_domain: int):
        """``program`` may be of any run of the arm; ``primary`` are the domains of the loss."""
        self.program = program
        config = program.config
        self.prepared = pipeline.prepare(config.data, config.model.vocab_size, progress=lambda _: None)
        self.heldout: Heldout = load_heldout(program, self.prepared)
        mixed = mixed_rows(self.prepared, config, rows_per_domain, primary)
        self.mixed = Heldout({MIXED: mixed.batches}, self.heldout.token_bytes)
        self.probe = functools.cache(lambda make, *arguments: make(config, program.mesh, *arguments))
        self.recorder = functools.cache(lambda: Recorder(program))
        self.python = functools.cache(self._python)

    def _python(self) -> list[dict[str, np.ndarray]]:
        """Batches of whole held-out Python documents, the syntax class beside every token."""
        texts = self.prepared.heldout["python"]
        found = documents.first_documents(texts, self.prepared.tokenizer, PYTHON_TOKENS)
        classes = [(document, syntax.token_classes(document)) for document in found]
        kept = [(document, of_tokens) for document, of_tokens in classes if of_tokens is not None]
        return documents.document_batches(
            [document for document, _ in kept],
            {"syntax": [of_tokens for _, of_tokens in kept]},
            self.program.config.data.sequence_length,
            self.program.config.train.batch_size // self.program.config.train.accumulation_steps,
        )


class Trained:
    """One run's variables, by checkpoint."""

    def __init__(self, directory: Path, model: Model):
        """``directory`` is the run's workdir."""
        self.model = model
        self._directory = directory
        self.variables = functools.cache(self._read)

    @property
    def steps(self) -> list[int]:
        """Steps of the run's checkpoints."""
        return manager.complete_steps(epath.Path(self._directory))

    def _read(self, step: int | None = None) -> dict[str, Any]:
        program = self.model.program
        return parameters.read_variables(str(self._directory), program.config.model, mesh=program.mesh, step=step)

    def loss(self, make: Callable[..., probes.Probe], *arguments: Any) -> float:
        """Held-out loss of the primary domains under a probe of :mod:`moe.analysis.probes`."""
        return self.model.probe(make, *arguments)(self.variables(), self.model.mixed)[MIXED]


def eval_capacity(run: Trained) -> dict[str, float]:
    """Held-out loss at other evaluation capacity factors."""
    return {f"loss_{factor}": run.loss(probes.eval_capacity, factor) for factor in EVAL_FACTORS}


def mask_top(run: Trained) -> dict[str, float]:
    """Held-out loss without each token's most probable experts, an eighth of all, at every layer."""
    experts = round(MASKED_SHARE * run.model.program.config.model.moe.num_experts)
    return {"loss_full": run.loss(probes.masked, 0), "loss_masked": run.loss(probes.masked, experts)}


def shared_expert(run: Trained) -> dict[str, float]:
    """Held-out loss with the shared expert replaced by one more routed, and with one routed less."""
    return {
        "loss_full": run.loss(probes.masked, 0),
        "loss_without_shared": run.loss(probes.shared_for_routed),
        "loss_one_routed_less": run.loss(probes.fewer_routed, 1),
    }


def specialisation(run: Trained) -> dict[str, float]:
    """Repetition of first choices, and what explains them, per MoE layer."""
    rng = np.random.default_rng(0)
    recorder = run.model.recorder()
    records = recorder(run.variables(), run.model.heldout.batches)
    python = recorder(run.variables(), {"python": run.model.python()})
    python = python.select(python.marks["syntax"] >= 0)
    found: dict[str, float] = {}
    for layer, first in enumerate(records.first_choice):
        repeat = _repetition(records, first, rng)
        explained = {
            "token": dependence.dependence(first, records.tokens, shuffles=SHUFFLES, rng=rng),
            "domain": dependence.dependence(first, records.domain, shuffles=SHUFFLES, rng=rng, units=records.row),
            "syntax": dependence.dependence(
                python.first_choice[layer], python.marks["syntax"], shuffles=SHUFFLES, rng=rng
            ),
        }
        found |= {f"repeat_first{name}@{layer}": value for name, value in repeat.items()}
        found |= {f"explained_{label}@{layer}": result.explained for label, result in explained.items()}
        found |= {f"nmi_{label}@{layer}": result.nmi_debiased for label, result in explained.items()}
    return found


def _repetition(records: Records, first: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """Mean over domains, each with its own chance."""
    rows = []
    for domain in range(len(records.domains)):
        own = records.select(records.domain == domain)
        result = repetition.repetition(
            first[records.domain == domain][:, None], own.consecutive, own.num_experts, shuffles=SHUFFLES, rng=rng
        )
        rows.append((result.observed, result.load, result.shuffled_mean, result.uniform))
    means = np.mean(rows, axis=0).tolist()
    return dict(zip(("", "_load", "_shuffled", "_uniform"), means, strict=True))


def saturation(run: Trained) -> dict[str, float]:
    """Share of a token's final experts that it had after a quarter of training, and after each other checkpoint."""
    last = run.model.program.config.train.num_steps
    early = [step for step in run.steps if step >= EARLY * last]
    if len(early) < 2 or run.steps[-1] != last:
        raise ConfigError("the probe saturation needs checkpoints from a quarter of training on: keep more of them")

    def members(step: int) -> np.ndarray:
        records = run.model.recorder()(run.variables(step), run.model.heldout.batches)
        return measures.membership(records.expert_index, records.chosen, records.num_experts)

    final = members(last)
    found: dict[str, float] = {}
    for step in run.steps[:-1]:
        shares = measures.saturation(members(step), final)
        found |= {f"after_{step}@{layer}": float(share) for layer, share in enumerate(shares)}
        if step == early[0]:
            found |= {f"early@{layer}": float(share) for layer, share in enumerate(shares)}
    return found


PROBES: dict[str, Callable[[Trained], dict[str, float]]] = {
    "eval_capacity": eval_capacity,
    "mask_top": mask_top,
    "shared_expert": shared_expert,
    "specialisation": specialisation,
    "saturation": saturation,
}
