"""Rounding or a fault: random rounding of a model, traces, verdicts."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from moe.config import Capacity, ConfigError
from moe.conformance.divergence import bounds, compare, rounded, trace
from moe.conformance.divergence.ranking import Ranking, highest
from moe.dispatch import backends
from moe.layers.router import Router
from tests.analysis_helpers import random_batch, tiny_program
from tests.helpers import tiny_model

VOCABULARY = 48
BATCH = random_batch(np.random.default_rng(0), VOCABULARY)


def opened(**fields):
    """Forward pass and variables of a model with two MoE layers."""
    program, variables = tiny_program(vocab_size=VOCABULARY, scan_layers=False, **fields)
    return trace.Routed(program), variables


@pytest.fixture(scope="module")
def float32():
    """A float32 model's forward pass, variables, experts, trace and rounding."""
    routed, variables = opened()
    replay, _ = trace.replayed(None, BATCH, 0, routed, variables)
    rounding = bounds.rounding(routed, jax.device_get(variables), BATCH, replay, draws=4)
    return routed, variables, replay, routed(variables, BATCH, replay), rounding


def test_a_product_is_rounded_to_its_dtype():
    """x·y in bfloat16: uniform in ± 2^-8 of it; in float64 nothing is rounded."""
    x, y = jnp.asarray([1.5], jnp.bfloat16), jnp.asarray([3.0], jnp.bfloat16)
    traced = jax.make_jaxpr(lambda x, y: x * y)(x, y)
    with jax.enable_x64(True):
        assert float(rounded.evaluate(traced, (x, y), rounded.exact)[0][0]) == 4.5
        seeds = jnp.arange(2000, dtype=jnp.uint32)
        draws = jax.vmap(lambda seed: rounded.evaluate(traced, (x, y), rounded.at_random(seed))[0][0])(seeds)
    errors = np.asarray(draws) / 4.5 - 1
    assert np.abs(errors).max() <= 2.0**-8
    assert errors.std() == pytest.approx(2.0**-8 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("name", ["scan", "cond", "remat", "matmul"])
def test_loops_branches_and_functions_are_evaluated(name):
    functions = {
        "scan": lambda x: jax.lax.scan(lambda c, r: (c * r, c + r), x[0], x)[1].sum(0),
        "cond": lambda x: jax.lax.cond(True, lambda x: x * 2, lambda x: x * 3, x).sum(0),
        "remat": lambda x: jax.checkpoint(jax.jit(jnp.exp))(x).sum(0),
        "matmul": lambda x: (x @ x.T).sum(0),
    }
    x = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    traced = jax.make_jaxpr(functions[name])(x)
    with jax.enable_x64(True):
        found = np.asarray(rounded.evaluate(traced, (x,), rounded.exact)[0])
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, functions[name](jnp.asarray(x, jnp.float64)), rtol=1e-12)


def test_a_loop_of_unknown_length_is_refused():
    traced = jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x < 1, lambda x: x + 0.1, x))(0.0)
    with jax.enable_x64(True), pytest.raises(ConfigError, match="'while'"):
        rounded.evaluate(traced, (0.0,), rounded.exact)


def test_float64_reference_is_within_the_rounding_of_float32(float32):
    """The bound holds, and is not a hundred times too large."""
    *_, one, rounding = float32
    exact = dataclasses.replace(one, router_logits=one.router_logits + rounding.logits[..., 0].astype(np.float32))
    assert compare.compare(one, exact, (rounding, rounding)).is_rounding
    relative = bounds.bound_each(rounding.logits) / np.abs(one.router_logits).mean()
    assert 1e-7 < relative.mean() < 1e-4


def test_a_router_names_its_input_in_its_own_dtype():
    """A trace tells by it in which dtype a layer rounded, though the router computes in float32."""
    model = tiny_model()
    traced = jax.make_jaxpr(Router(model, rngs=nnx.Rngs(0)))(jnp.zeros((1, 2, model.d_model), jnp.bfloat16))
    named = [equation.invars[0].aval.dtype for equation in traced.eqns if equation.primitive.name == "name"]
    assert named == [jnp.bfloat16]


@pytest.mark.slow
def test_bfloat16_is_called_rounding(float32, tmp_path):
    _, variables, replay, one, rounding = float32
    low, _ = opened(dtype="bfloat16")
    other = low(variables, BATCH, replay)
    # A trace says in which dtype each layer rounded, also when it comes from a file.
    assert one.dtype == "float32"
    other.write(tmp_path / "low.npz")
    other = trace.read(str(tmp_path / "low.npz"))
    assert other.dtype == "bfloat16"
    np.testing.assert_array_equal(other.precision, [7, 7])
    halved = other.router_input.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(halved, other.router_input)
    again = bounds.rounding(low, jax.device_get(variables), BATCH, replay, draws=4)
    found = compare.compare(one, other, (rounding, again))
    assert found.is_rounding, found
    assert found.undecided[1] > found.undecided[0]
    # Against the bound of float32 alone it is none.
    wrong = compare.compare(one, other, (rounding, rounding))
    assert not wrong.is_rounding
    assert wrong.wrong.endswith("of layer 0")


def changed(variables, path, layer, change):
    """The variables with one layer of one stacked parameter changed, by its path in ``jax.tree_util.keystr``."""
    flat, tree = jax.tree_util.tree_flatten_with_path(variables)
    values = [
        leaf.at[layer].set(change(leaf[layer])) if jax.tree_util.keystr(key) == path else leaf for key, leaf in flat
    ]
    return jax.tree_util.tree_unflatten(tree, values)


#: Fault of size ε → what it does to one layer's matrix or vector.
CHANGES = {
    "all of it scaled": lambda w, e: w * (1 + e),
    "one entry of eight scaled": lambda w, e: w.ravel().at[::8].multiply(1 + e).reshape(w.shape),
    "shifted": lambda w, e: w + e * jnp.abs(w).mean(),
}


def planted(variables):
    """(path, layer, change) of every fault that a router can see: before the router of the last layer."""
    flat = jax.tree_util.tree_leaves_with_path(variables)
    names = [jax.tree_util.keystr(path) for path, leaf in flat if leaf.ndim and leaf.shape[0] == 2]
    for name in names:
        for layer in (0, 1):
            behind = layer == 1 and ("experts" in name)
            for change in CHANGES if not behind else ():
                yield name, layer, change


def smallest(routed, variables, replay, one, rounding, fault):
    """Smallest of the sizes 1e-7, 1e-6, ..., 0.1 that is not called rounding; None: none."""
    path, layer, change = fault
    for size in 10.0 ** np.arange(-7, 0):
        faulty = changed(variables, path, layer, lambda w, size=size: CHANGES[change](w, size))
        if not compare.compare(one, routed(faulty, BATCH, replay), (rounding, rounding)).is_rounding:
            return size
    return None


def test_planted_faults_are_never_called_rounding(float32):
    """At a tenth of the parameter's size; most are seen at a millionth to a ten-thousandth."""
    routed, variables, replay, one, rounding = float32
    faults = list(planted(variables))
    assert len(faults) >= 30
    found = {fault: smallest(routed, variables, replay, one, rounding, fault) for fault in faults}
    for (path, layer, change), size in found.items():  # shown by pytest -rP
        print(f"smallest size found {'none' if size is None else f'{size:.0e}'}: {change}, layer {layer}, {path}")
    assert None not in found.values(), [fault for fault, size in found.items() if size is None]
    assert np.median(list(found.values())) <= 1e-4


def test_the_first_wrong_quantity_is_named(float32):
    """A router's matrix that is 1 % too large: its input is right, its logits are not."""
    routed, variables, replay, one, rounding = float32
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    (router,) = [path for path in paths if "router" in path and "kernel" in path]
    faulty = routed(changed(variables, router, 1, lambda w: w * 1.01), BATCH, replay)
    found = compare.compare(one, faulty, (rounding, rounding))
    assert found.wrong == "the router's logits of layer 1"
    assert found.size[0] > found.size[1] > 0
    assert "Not rounding; first wrong quantity: the router's logits of layer 1" in compare.page(
        ("a", "b"), found, ("float32", "float32")
    )


@pytest.mark.slow
def test_a_million_roundings_are_never_called_a_fault():
    """Products of a bfloat16 router beside float64: 250,000 tokens in four layers, each with its own matrix."""
    rng, bfloat16 = np.random.default_rng(1), ml_dtypes.bfloat16
    layers, tokens, d, experts = 4, 250_000, 8, 4
    x = rng.normal(size=(tokens, d)).astype(bfloat16)
    routers = rng.normal(size=(layers, d, experts)).astype(bfloat16)
    exact = np.stack([x.astype(np.float64) @ w.astype(np.float64) for w in routers])
    logits = exact.astype(bfloat16).astype(np.float64)
    u = 2.0**-8
    draws = [(exact * u * rng.uniform(-1, 1, exact.shape)).astype(np.float32) for _ in range(8)]
    errors = np.stack(draws, axis=-1)
    one, other = (
        trace.Trace(highest(array, 2), np.ones((layers, tokens, 2), bool), router_logits=array)
        for array in (exact, logits)
    )
    nothing = bounds.Rounding(np.zeros((layers, tokens)), np.zeros_like(errors))
    found = compare.compare(one, other, (nothing, bounds.Rounding(np.zeros((layers, tokens)), errors)))
    assert found.is_rounding, found.wrong
    assert found.choices == 1_000_000
    assert len(found.differ) > 500


def test_recorded_choices_alone(float32, tmp_path):
    """Experts of a serving engine: one token's last expert is exchanged for its worst."""
    *_, one, rounding = float32
    index = one.expert_index.copy()
    index[1, 3, -1] = np.argmin(one.router_logits[1, 3])
    np.savez(tmp_path / "served.npz", expert_index=index)
    found = compare.compare(one, trace.read(str(tmp_path / "served.npz")), (rounding, rounding))
    (choice,) = found.differ
    assert (choice.layer, choice.token, choice.other) == (1, 3, index[1, 3, -1])
    logits = np.sort(one.router_logits[1, 3])
    assert choice.margin == pytest.approx(logits[-index.shape[-1]] - logits[0], rel=1e-6)
    assert found.wrong == "the choice of layer 1"
    assert "not rounding" in str(choice)


@pytest.mark.slow
def test_experts_of_another_backend_are_called_rounding(float32, monkeypatch, tmp_path):
    """XLA's grouped products, as on TPUs, beside loops over row blocks; then its choices alone, as engines record."""
    *_, rounding = float32
    routed, variables = opened(dispatch="dropless")
    replay, _ = trace.replayed(None, BATCH, 0, routed, variables)
    one = routed(variables, BATCH, replay)
    monkeypatch.setitem(backends._BACKENDS, "cpu", backends.tpu)
    other = opened(dispatch="dropless")[0](variables, BATCH, replay)
    assert np.abs(one.router_logits - other.router_logits).max() > 0
    assert compare.compare(one, other, (rounding, rounding)).is_rounding
    np.savez(tmp_path / "served.npz", expert_index=other.expert_index)
    assert compare.compare(one, trace.read(str(tmp_path / "served.npz")), (rounding, rounding)).is_rounding
    scaled = jax.tree.map(lambda array: array * 1.01, variables)
    wrong = opened(dispatch="dropless")[0](scaled, BATCH, replay)
    assert not compare.compare(one, wrong, (rounding, rounding)).is_rounding


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"tokens": np.ones(3)}, "needs 'expert_index'"),
        ({"expert_index": np.ones((1, 2))}, "not integers"),
        ({"expert_index": np.ones((1, 2, 1), int), "router_logits": np.ones((1, 3, 4))}, "router_logits has the shape"),
        ({"expert_index": np.ones((1, 2, 1), int), "logits": np.ones(1)}, "has expert_index, logits"),
        ({"expert_index": np.ones((1, 2, 1), int), "precision": np.array([8])}, "precision has 8 bits"),
    ],
)
def test_bad_traces_are_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ConfigError, match=words):
        trace.read(str(tmp_path / "bad.npz"))


def test_one_rounding_bounds_models_that_compute_the_same_in_the_same_dtypes():
    """The router's dtype counts as that of the activations does; how rows move does not."""
    model = tiny_model(gate="mixtral", num_experts=4, capacity=Capacity(eval=3.0))
    assert trace.round_alike(
        model, tiny_model(gate="mixtral", num_experts=4, dispatch="einsum", capacity=Capacity(eval=3.0))
    )
    low = dataclasses.replace(model, moe=dataclasses.replace(model.moe, router_dtype="bfloat16"))
    assert not trace.round_alike(model, low)


@pytest.mark.parametrize(("mode", "capacity"), [("dropless", 2.0), ("gather", 3.0), ("einsum", 3.0)])  # E / K = 2
def test_a_model_is_followed_through_its_form_without_loops(mode, capacity):
    model = tiny_model(gate="mixtral", num_experts=4, dispatch=mode, capacity=Capacity(eval=3.0))
    found = trace.without_loops(model).moe
    assert (found.dispatch, found.capacity.eval) == ("einsum", capacity)


@pytest.mark.parametrize("gate", ["hash", "expert_choice", "none"])
def test_gates_that_do_not_take_the_highest_scores_are_refused(gate):
    with pytest.raises(ConfigError, match="K highest scores"):
        trace.ranking(tiny_model(gate=gate, accept_future_leak=gate == "expert_choice"))


GROUPED = {
    "gate": "deepseek_v3", "num_experts": 8, "experts_per_token": 2, "expert_groups": 4,
    "kept_expert_groups": 2, "scores_per_group": 2}  # fmt: skip


@pytest.fixture(scope="module")
def grouped():
    """A model of DeepSeek-V3's gate, with biases, as ``float32``."""
    routed, variables = opened(**GROUPED)
    replay, _ = trace.replayed(None, BATCH, 0, routed, variables)
    rounding = bounds.rounding(routed, jax.device_get(variables), BATCH, replay, draws=4)
    one = routed(variables, BATCH, replay)
    return routed, variables, replay, one, rounding, trace.ranking(routed.program.config.model)


@pytest.mark.slow
def test_a_bias_and_groups_are_ranked_as_the_gate_does(grouped):
    *_, one, rounding, ranking = grouped
    assert (ranking.groups, ranking.kept, ranking.scores_per_group) == (4, 2, 2)
    np.testing.assert_array_equal(ranking.choose(one.scores, 2), one.expert_index)
    assert (ranking.choose(one.scores, 2) != highest(one.router_logits, 2)).any()
    found = compare.compare(one, one, (rounding, rounding), ranking)
    assert found.is_rounding
    assert not found.differ
    assert 0 < rounding.scores.std() < 1e-5


@pytest.mark.slow
def test_a_wrong_selection_bias_is_named(grouped):
    """Its logits are right: without the scores nothing but the choices would show it."""
    routed, variables, replay, one, rounding, ranking = grouped
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    (bias,) = [path for path in paths if "['router']['bias']" in path]
    faulty = routed(changed(variables, bias, 1, lambda b: b.at[2].add(0.5)), BATCH, replay)
    found = compare.compare(one, faulty, (rounding, rounding), ranking)
    assert found.wrong == "the scores of layer 1"
    assert found.differ
    assert all(choice.layer == 1 for choice in found.differ)


def test_where_other_groups_are_kept_their_sums_decide():
    """Two groups of two experts, one kept by the sum of both: 1.0 + 0.2 beside 0.7 + 0.4; in the second run 0.15 more.

    The margin of the groups is 1.2 − 1.1 + (1.25 − 1.2) = 0.15; expert 0 stays 0.3 above expert 2 in both.
    """
    ranking = Ranking(groups=2, kept=1, scores_per_group=2)
    scores = np.array([[[1.0, 0.2, 0.7, 0.4]]])
    again = np.array([[[1.0, 0.2, 0.7, 0.55]]])
    logits = np.zeros((1, 1, 4))
    one, other = (
        trace.Trace(ranking.choose(s, 1), np.ones((1, 1, 1), bool), router_logits=logits, scores=s)
        for s in (scores, again)
    )
    errors = np.array([[[[0.0], [0.0], [0.0], [0.15]]]])
    rounding = bounds.Rounding(np.zeros((1, 1)), np.zeros((1, 1, 4, 1)), errors)
    (choice,) = compare.compare(one, other, (rounding, rounding), ranking).differ
    assert (choice.one, choice.other) == (0, 2)
    assert choice.margin == pytest.approx(0.15)
    assert choice.bound == pytest.approx(6 * 0.15 * 2**0.5)
    alone = dataclasses.replace(other, scores=None, router_logits=None)
    (choice,) = compare.compare(one, alone, (rounding, rounding), ranking).differ
    assert choice.margin == pytest.approx(0.1)


def test_a_bfloat16_router_product_changes_what_marin_published():
    """marin issue 8435: RMS error 0.0075 of the scores, another top-8 order for 80 of 324 tokens; logits about 4.5."""
    rng, bfloat16 = np.random.default_rng(0), ml_dtypes.bfloat16
    x = rng.normal(size=(324, 1024)).astype(bfloat16).astype(np.float64)
    router = (rng.normal(size=(1024, 384)) * 4.5 / 32).astype(bfloat16).astype(np.float64)
    exact = x @ router
    rounded_logits = exact.astype(bfloat16).astype(np.float64)
    assert np.sqrt(np.mean((rounded_logits - exact) ** 2)) == pytest.approx(0.0075, rel=0.1)
    changed = (highest(rounded_logits, 8) != highest(exact, 8)).any(-1).sum()
    assert 60 <= changed <= 100
    single = (x.astype(np.float32) @ router.astype(np.float32)).astype(np.float64)
    assert (highest(single, 8) == highest(exact, 8)).all()
