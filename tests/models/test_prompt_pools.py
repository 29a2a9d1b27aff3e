"""Generation of gates that keep something of the prompt: each layer has EMO's pool of a document from its prompt."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import Config, ConfigError
from moe.data.tokenizer import train_tokenizer
from moe.models import kv_cache, sampling, speculation
from moe.models.factory import abstract_model
from moe.models.sampling import Sampling
from moe.objectives.policy import Policy
from moe.routing import own_gates
from moe.routing.gates import TopK
from moe.routing.interface import GateInputs
from tests.helpers import gate_named, random_parameters, tiny_model
from tests.program_helpers import run_here
from tests.run_helpers import tiny, write_run

POOL = gate_named("emo", 2, pool=0.375)  # 3 of 8 experts
ROWS = np.array([[5, 9, 2, 30, 11, 7, 8, 21], [3, 40, 41, 2, 1, 17, 33, 6]], np.int32)
LENGTHS = (5, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfPrompts(TopK):
    """Top-K of the softmax within the three experts that have the largest sums of it over a row's first tokens."""

    lengths: tuple[int, ...] = LENGTHS
    looks_ahead = True

    def route(self, router_logits, inputs):
        counted = jnp.arange(router_logits.shape[1]) < jnp.asarray(self.lengths)[:, None]
        order = jnp.argsort(-jnp.sum(jax.nn.softmax(router_logits) * counted[..., None], axis=1))  # [G,E]
        inside = jnp.any(jnp.arange(router_logits.shape[-1]) == order[:, :3, None], axis=1)
        return self.select(jnp.where(inside[:, None], router_logits, -jnp.inf), inputs)


def _model(gate=POOL, **changes):
    sizes = {"num_experts": 8, "dispatch": "einsum", "eval_capacity_factor": 4.0, "accept_future_leak": True}
    model = tiny_model(gate="emo", **sizes | changes)
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, gate=gate))


@functools.cache
def _parameters(model):
    """Drawn as for the emo model, with logits far enough apart that layers and rows have different pools."""
    return jax.tree.map(lambda leaf: 2 * leaf, random_parameters(model)[1])


def _whole_forward(model):
    """Logits [B,T,V] and experts [L,B,T,K] of a pass over the whole rows."""
    gate = OfPrompts(name="of_prompts", k=POOL.k)
    graphdef = nnx.graphdef(abstract_model(dataclasses.replace(model, moe=dataclasses.replace(model.moe, gate=gate))))

    @jax.jit
    def run(variables):
        output = nnx.merge(graphdef, variables)(ROWS, return_routing=True)
        return output.logits, output.routing.expert_index

    return map(np.asarray, run(_parameters(model)))


def _by_cache(model):
    """Logits after the prompts and after each of three further tokens [4,B,V], the experts of these [3,L,B,K], and what
    is kept of the prompts."""
    graphdef = nnx.graphdef(abstract_model(sampling.without_drops(model)))
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    further = jnp.take_along_axis(ROWS, lengths[:, None] + jnp.arange(3), axis=1)

    @jax.jit
    def run(variables):
        built = nnx.merge(graphdef, variables)
        x, caches, _ = kv_cache.run_prompt(built, jnp.asarray(ROWS), lengths, kv_cache.empty(model, 2, 8))

        def step(caches, inputs):
            token_ids, n = inputs
            positions = (lengths + n)[:, None]
            x, caches, choices = kv_cache.extend(built, token_ids[:, None], positions, jnp.ones(2, bool), caches)
            return caches, (kv_cache.next_logits(built, x), choices.expert_index[:, :, 0])

        caches, (logits, experts) = jax.lax.scan(step, caches, (further.T, jnp.arange(3)))
        first = kv_cache.prompt_logits(built, x, lengths)
        return jnp.concatenate([first[None], logits]), experts, caches[0][0]["prompt"]

    return map(np.asarray, run(_parameters(model)))


def test_the_pool_of_a_prompt_by_hand():
    # Rows in twelfths: (6, 3, 1, 2) and (1, 2, 6, 3); their sum is 7, 5, 7, 5: with ties to the lower index, half of
    # the experts are (0, 2). The second prompt is its first token alone, whose pool is (0, 1): its second is padding.
    rows = np.log(np.array([[6, 3, 1, 2], [1, 2, 6, 3]]) / 12)
    logits, mask = jnp.asarray(np.stack([rows, rows]), jnp.float32), jnp.asarray([[True, True], [True, False]])
    gate = gate_named("emo", 2, pool=0.5)

    @jax.jit
    def run():
        kept = gate.of_prompt(logits, GateInputs(mask, segment_ids=mask.astype(jnp.int32)))
        return kept, gate.route(logits[:, 1:], GateInputs(jnp.ones((2, 1), bool), prompt=kept))

    kept, after = run()
    np.testing.assert_array_equal(kept, [[True, False, True, False], [True, True, False, False]])
    # The next token, (1, 2, 6, 3) in both: weights of the pool, 6/7 and 1/7, and 2/3 and 1/3.
    np.testing.assert_array_equal(after.expert_index, [[[2, 0]], [[1, 0]]])
    np.testing.assert_allclose(after.weights, [[[6 / 7, 1 / 7]], [[2 / 3, 1 / 3]]], rtol=1e-6)


def test_cached_logits_are_those_of_a_pass_with_the_prompts_pools():
    """Prompts of five and two tokens in one batch, each continued by three tokens."""
    model = _model()
    logits, experts, pools = _by_cache(model)
    expected, chosen = _whole_forward(model)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[:, row], expected[row, length - 1 : length + 3], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(experts[:, :, row], chosen[:, row, length : length + 3].swapaxes(0, 1))
    np.testing.assert_array_equal(pools.sum(-1), [[3, 3], [3, 3]])
    assert (pools[0] != pools[1]).any(), "each layer has its own pools"
    assert (pools[:, 0] != pools[:, 1]).any(), "each prompt has its own pools"


def test_other_gates_have_the_caches_that_they_had():
    """No leaf and no wrapper is added, so that no program changes."""
    kept, plain = (kv_cache.empty(_model(gate), 2, 8) for gate in (POOL, gate_named("mixtral", 2)))
    assert kept[0][0].keys() - plain[0][0].keys() == {"prompt"}
    assert jax.tree.structure(kept) == jax.tree.structure([[{**state, "prompt": None} for state in plain[0]]])


@pytest.mark.slow
def test_drafts_leave_the_text_as_it_is():
    model = _model(prediction_layers=1, every=2, num_layers=4)
    prompts = [row[:length] for row, length in zip(ROWS, LENGTHS, strict=True)]
    greedy = sampling.sample(model, _parameters(model), prompts, 5, Sampling(temperature=0))
    found = speculation.sample(model, _parameters(model), prompts, 5)
    np.testing.assert_array_equal(found.texts, greedy)


@pytest.mark.slow
def test_moe_generate_continues_a_prompt(tmp_path, monkeypatch):
    changes = {"gate": "emo", "num_experts": 8, "gate.k": 2, "dispatch": "dropless", "accept_future_leak": True}
    config = tiny(tmp_path, **{f"model.moe.{name}": value for name, value in changes.items()})
    write_run(tmp_path / "run", config, random_parameters(config.model)[1])
    tokenizer = train_tokenizer(iter(["one two three four five six seven eight"] * 40), 280)
    (tmp_path / "run" / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    arguments = [f"--workdir={tmp_path}/run", "--prompt=one two three", "--tokens=3", "--temperature=0"]
    ended = run_here("moe generate", arguments, monkeypatch)
    assert ended.code == 0, ended.errors
    assert ended.output.startswith("one two three")
    assert len(ended.output) > len("one two three\n")


def test_what_cannot_be_right_is_refused():
    model = _model()
    assert sampling.looks_ahead(model) == ""
    seq2seq = dataclasses.replace(model, encoder_layers=1)
    assert sampling.looks_ahead(seq2seq).startswith(
        "model.moe.gate='emo': chooses experts from the prompt, and a decoder"
    )
    with pytest.raises(ConfigError, match="gate='emo': must choose the same experts in rollouts"):
        Policy().check(Config(model=dataclasses.replace(model, moe=model.moe.with_dispatch("dropless"))))


class OfPadding(type(POOL)):
    def of_prompt(self, router_logits, inputs):
        return super().of_prompt(router_logits, GateInputs(jnp.ones_like(inputs.mask)))


class OfFirst(type(POOL)):
    def of_prompt(self, router_logits, inputs):
        return super().of_prompt(router_logits[:, :1], GateInputs(inputs.mask[:, :1]))


class OfOneRow(type(POOL)):
    def of_prompt(self, router_logits, inputs):
        return super().of_prompt(router_logits, inputs)[0]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (type(POOL), ""),
        (OfPadding, "gate OfPadding: of_prompt depends on other rows or on padding: read the tokens of inputs.mask"),
        (OfFirst, "evaluation: use the token's own numbers, inputs.positions and inputs.prompt"),
        (OfOneRow, r"of_prompt returns bool\[8\]: must be arrays whose first axis is the 2 rows"),
    ],
)
def test_a_users_gate_that_keeps_a_prompt_is_probed_in_generation(kind, message):
    gate = kind(name="mine", k=2, pool=0.375)
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        own_gates._probe_generation(gate, 8, 8)
