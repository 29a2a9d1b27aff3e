"""The judge of a step: a plain trainer conforms, and each of eight faults in it is named."""

import dataclasses

import numpy as np
import pytest

from moe.conformance.judge.errors import InputError
from moe.conformance.judge.rule import Rule
from moe.conformance.judge.step import StepRule, Steps, StepVariant, compute
from moe.conformance.judge.step_diagnosis import diagnose_steps, step_page, steps_from_arrays
from tests.conformance import plain_trainer as trainer
from tests.helpers import slow_case

RULE = StepRule(
    layer=Rule(k=trainer.K, renormalise=True, balance_weight=trainer.BALANCE, z_weight=trainer.Z),
    clip=trainer.CLIP,
    learning_rate=trainer.LR,
    eps=trainer.EPS,
    bias_rate=trainer.BIAS,
    adapter_scale=trainer.SCALE,
)


def diagnosis(folder, fault, *, adapters=False):
    weights, (tokens, targets) = trainer.initial(adapters=adapters), trainer.batches()
    results = trainer.train(weights, tokens, targets, folder, fault)
    return diagnose_steps(RULE, Steps(weights, tokens, targets), results)


@pytest.mark.parametrize("adapters", [False, slow_case(True)])
def test_a_plain_trainer_conforms(tmp_path, adapters):
    found = diagnosis(tmp_path, "", adapters=adapters)
    assert found.conforms, step_page(found)


#: Report → (fault, sentence).
FAULTS = {
    "DeepSpeed 8475": ("experts once per rank", "the gradient norm counts experts 4 times, once per rank"),
    "Automodel 3816": ("experts of one rank", "the gradient norm counts one of 4 ranks' experts' squares"),
    "Megatron-LM 7213": ("balance loss by tokens", "the microbatches' balance losses are weighed by their tokens"),
    "Automodel 3359": ("balance loss added", "the balance loss is added over microbatches instead of averaged"),
    "Megatron-LM 5976": ("router update lost", "the updates of router are lost"),
    "KempnerForge 202, UniRL 158": (
        "checkpoint of one rank",
        "after a restart every rank of 4 has the first rank's experts",
    ),
    "Megatron-LM 5844": (
        "conversion drops experts",
        "a checkpoint or conversion has the first 1/4 of the experts, the others are zeros",
    ),
    "unsloth-zoo 1269": ("adapter columns", "adapters meet the wrong columns of the rank"),
}


@pytest.mark.slow
@pytest.mark.parametrize("report", FAULTS)
def test_a_planted_report_is_named(tmp_path, report):
    fault, sentence = FAULTS[report]
    found = diagnosis(tmp_path, fault, adapters=fault == "adapter columns")
    assert not found.conforms
    assert found.explanations == [sentence], step_page(found)


def test_recorded_steps_are_read_or_refused():
    weights, (tokens, targets) = trainer.initial(layers=1), trainer.batches()
    arrays = {f"before.{name}": array for name, array in weights.items()} | {"tokens": tokens, "targets": targets}
    steps, results = steps_from_arrays(arrays | {"z_loss": np.ones(2)}, "steps.npz")
    assert steps.layers == 1
    assert list(results) == ["z_loss"]
    for change, words in (
        ({"tokens": tokens[0]}, "tokens has the shape"),
        ({"targets": targets + trainer.V}, "targets must be ids below V=12"),
        ({"targets": np.full_like(targets, -1)}, "every microbatch must have a target"),
    ):
        with pytest.raises(InputError, match=words):
            steps_from_arrays(arrays | change, "steps.npz")
    with pytest.raises(InputError, match=r"'before\.layers\.0\.up' is missing"):
        steps_from_arrays({name: array for name, array in arrays.items() if not name.endswith("up")}, "steps.npz")


def test_hand_computed_step():
    """One token, two ids, D = 1, one expert that returns 0: logits (0, 0), a loss of ln 2, p - 1 = -1/2 for the target.

    With x = 2 the unembedding's gradient is 2·(1/2, -1/2) = (1, -1); of the embedding 0, since the unembedding is 0.
    The norm is √2; a clip of √2/2 halves it. AdamW moves by 0.5/(0.5 + 0.5) = 1/2 of the rate 0.1, without decay.
    """
    one = np.zeros((1, 1, 1))
    weights = {"embedding": np.array([[2.0], [0.0]]), "unembedding": np.zeros((1, 2))}
    weights |= {"layers.0.router": np.zeros((1, 1)), **{f"layers.0.{name}": one for name in ("up", "gate", "down")}}
    steps = Steps(weights, np.zeros((1, 1, 1, 1), int), np.ones((1, 1, 1, 1), int))
    rule = StepRule(layer=Rule(k=1), clip=0.5**0.5, learning_rate=0.1, eps=0.5, weight_decay=0.0)
    found = compute(rule, StepVariant(), steps)
    assert found["cross_entropy"] == pytest.approx([np.log(2)])
    assert found["gradient_norm"] == pytest.approx([2**0.5])
    np.testing.assert_allclose(found["grad.unembedding"], [[1, -1]])
    np.testing.assert_allclose(found["after.unembedding"], [[-0.05, 0.05]])
    with pytest.raises(InputError, match="nothing to compare"):
        diagnose_steps(rule, steps, {})
    decayed = compute(dataclasses.replace(rule, weight_decay=0.5), StepVariant(), steps)
    np.testing.assert_allclose(decayed["after.embedding"], [[2 - 0.1 * 0.5 * 2], [0]])
