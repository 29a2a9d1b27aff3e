"""The load-balancing loss over all microbatches of a step, and the routers' states after a step."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import Changes, Config, ConfigError, TrainConfig
from moe.config.parse import from_config_dict
from moe.layers.call import Report
from moe.models.state import TrainState
from moe.parallel.mesh import make_mesh
from moe.routing.balancing import NeededBias, step_target
from moe.training import update
from moe.training.batches import place
from moe.training.rules import next_states
from moe.training.step import build
from tests.helpers import moe_config, random_state, set_moe, slow_case, step_gradients, tiny_model


def program(devices=1, mesh=None, accumulation=1, remat="none", weight=3.0, layers=2, rows=8, **moe):
    """A tiny model whose objective is dominated by the load-balancing loss."""
    tree = Changes()
    tree.model.update(vocab_size=48, d_model=16, num_layers=layers, num_heads=4, num_kv_heads=4, head_dim=4, d_ff=16)
    fields = {"gate": "switch", "num_experts": 4, "d_ff": 16, "jitter": 0.0, "load_balancing_weight": weight}
    set_moe(tree, **(fields | {"capacity_factor": 4.0} | moe))
    tree.model.remat = remat
    tree.data.sequence_length = 8
    tree.train.update(batch_size=rows, accumulation_steps=accumulation, num_steps=4)
    tree.optimizer.update(warmup_steps=0)
    tree.mesh.update(mesh or {"data": 1})
    config = from_config_dict(tree)
    return build(config, make_mesh(config.mesh, jax.devices()[:devices]))


def batch(program):
    """Rows, some of them mostly padding, so that microbatches differ in their number of tokens."""
    rng, count = np.random.default_rng(0), program.config.train.batch_size
    tokens = rng.integers(1, 48, (count, 9)).astype(np.int32)
    lengths = np.resize([8, 8, 3, 2, 8, 5, 1, 8], (count, 1))
    segments = (np.arange(8) < lengths).astype(np.int32)
    rows = {"tokens": tokens[:, :-1], "targets": np.where(segments > 0, tokens[:, 1:], -1), "segment_ids": segments}
    rows["positions"] = np.broadcast_to(np.arange(8, dtype=np.int32), (count, 8))
    return place(rows, program.mesh)


def gradients(program, state=None):
    """Loss, balance losses and gradients of a step's objective, from a given state or the initial one."""
    run = step_gradients(program, seed=0)

    @jax.jit
    def needed(state, batch):
        (loss, _, report), gradient = run(state, batch)
        return loss, report.signals["layers"].load_balancing_loss, gradient

    with jax.set_mesh(program.mesh):
        return needed(state or program.init(), batch(program))


@pytest.mark.parametrize(
    ("mesh", "remat", "moe"),
    [
        ({"data": 1}, "none", {"dispatch": "einsum"}),  # compiles fastest; the others use gather
        slow_case({"data": 1}, "full", {}),
        slow_case({"data": 2, "expert": 2}, "none", {"gate": "mixtral", "experts_per_token": 2}),
        slow_case(
            {"data": 1},
            "dots",
            {"gate": "moe_plus_plus", "experts_per_token": 2, "num_experts": 4},
        ),
        slow_case(
            {"data": 1},
            "none",
            {
                "gate": "deepseek_v3",
                "experts_per_token": 2,
                "expert_groups": 1,
                "kept_expert_groups": 1,
                "scores_per_group": 1,
            },
        ),
    ],
)
def test_microbatches_equal_one_batch_in_value_and_gradient(mesh, remat, moe):
    devices = int(np.prod(list(mesh.values())))
    given = {"mesh": mesh, "devices": devices, "layers": 1} | moe
    # The whole batch at once, and microbatches that use f of the whole step.
    count = 4 // max(devices // 2, 1)
    once = program(**given, balance_scope="batch")
    with jax.set_mesh(once.mesh):
        state = random_state(once)
    whole = gradients(once, state)
    steps = gradients(program(**given, balance_scope="step", accumulation=count, remat=remat), state)
    np.testing.assert_allclose(steps[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(steps[1], whole[1], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(steps[2]), jax.tree.leaves(whole[2]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-6)


@pytest.mark.slow
def test_the_mean_over_microbatches_is_a_different_loss_with_a_different_gradient():
    once = program(dispatch="einsum", balance_scope="batch")
    state = random_state(once)
    each = {"step": 4, "batch": 4}
    whole = gradients(once, state)
    steps, apart = (
        gradients(program(dispatch="einsum", balance_scope=scope, accumulation=count), state)
        for scope, count in each.items()
    )
    assert abs(float(apart[0] - whole[0])) > 1e-3
    router = [
        np.asarray(result[2]["segment_0"]["block_0"]["moe"]["router"]["kernel"]) for result in (steps, whole, apart)
    ]
    assert np.abs(router[2] - router[1]).max() > 20 * np.abs(router[0] - router[1]).max()


@pytest.mark.slow
def test_without_accumulation_the_scopes_step_and_batch_are_equal():
    one, other = (gradients(program(balance_scope=scope)) for scope in ("step", "batch"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_microbatches_draw_separately_and_the_balance_of_the_step_uses_the_same_draws(monkeypatch):
    def forward(model, batch, *, train, rng, signals=()):
        drawn = jax.random.uniform(rng)
        return SimpleNamespace(drawn=drawn, layers=SimpleNamespace(sums=drawn))

    def loss(parts, model, output, batch, count, teacher, totals):
        return totals, ((output.drawn, {}), Report())

    monkeypatch.setattr(update, "forward", forward)
    monkeypatch.setattr(update, "_loss", loss)
    monkeypatch.setattr(update.nnx, "merge", lambda *_: None)
    config = Config(model=tiny_model(balance_scope="step"), train=TrainConfig(batch_size=4, accumulation_steps=2))
    parts = update.Parts(config, None, None, None, None, SimpleNamespace(noise=True, count=lambda batch: 1))
    state, key = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones(())}, {}, None, None), jax.random.key(0)
    (totals, (nll, _), _), _ = update._gradients(parts, state, {"tokens": jnp.zeros((4, 8), jnp.int32)}, key, None)
    draws = [float(jax.random.uniform(jax.random.fold_in(key, i))) for i in (0, 1)]
    assert draws[0] != draws[1]
    np.testing.assert_allclose(nll, sum(draws), rtol=1e-6)
    np.testing.assert_allclose(totals, 2 * sum(draws), rtol=1e-6)  # each microbatch receives the sum over the step


def test_quantiles_over_microbatches_are_those_of_all_tokens(rng):
    """Two layers and three microbatches, of 2·4 tokens each, a quarter of them not routed; two of four experts: the
    value at which half of the tokens are below it."""
    values = rng.normal(size=(3, 2, 2, 4, 4)).astype(np.float32)
    routed = rng.random((3, 2, 2, 4)) < 0.75
    needed = NeededBias(jnp.asarray(np.where(routed[..., None], values, np.inf)), jnp.full((3, 2), 0.5))
    found = jax.jit(step_target)(needed, jnp.asarray(routed.sum((2, 3)), jnp.float32))
    for layer in range(2):
        alone = np.sort(values[:, layer][routed[:, layer]], axis=0)  # [tokens,E]
        np.testing.assert_allclose(found[layer], alone[len(alone) // 2], atol=1e-5)
    # A measured share is that of the tokens together: 8·(1/4) + 16·(1/2) of 24 are 10.
    values = jnp.arange(24.0).reshape(3, 1, 2, 4, 1)
    measured = NeededBias(values, jnp.asarray([[0.25], [0.5], [0.5]]))
    np.testing.assert_allclose(jax.jit(step_target)(measured, jnp.full((3, 1), 8.0)), [[10.0]], atol=1e-5)


@pytest.mark.parametrize(
    ("gate", "scope", "mesh", "dispatch"),
    [
        ("quantile_balancing", "step", {"data": 1}, "einsum"),  # compiles fastest
        slow_case("quantile_balancing", "step", {"data": 1}, "dropless"),
        slow_case("k_means", "batch", {"data": 1}, "dropless"),
        slow_case("running_thresholds", "step", {"data": 1}, "dropless"),
        slow_case("quantile_balancing", "step", {"data": 2, "fsdp": 2, "expert": 2}, "dropless"),
        slow_case("k_means", "batch", {"data": 2, "fsdp": 2, "expert": 2}, "dropless"),
    ],
)
def test_states_after_microbatches_are_those_after_one_batch(gate, scope, mesh, dispatch):
    """The state after a step of one batch on one device equals that of two microbatches, on eight devices too."""
    given = {"gate": gate, "experts_per_token": 2, "weight": 0.0, "layers": 1, "rows": 16, "dispatch": dispatch}
    once = program(**given)
    with jax.set_mesh(once.mesh):
        state = jax.tree.map(np.asarray, random_state(once))  # on no device, for both meshes
    runs = {"whole": once}
    size = int(np.prod(list(mesh.values())))
    apart = {"mesh": mesh, "devices": size, "accumulation": 2}
    runs["step"] = program(**given, **apart, balance_scope=scope)
    if (gate, size) == ("quantile_balancing", 1):
        runs["mean"] = program(**given, **apart)
    after = {}
    for name, run in runs.items():
        with jax.set_mesh(run.mesh):
            (_, _, report), _ = jax.jit(step_gradients(run, seed=0))(state, batch(run))
        assert report.signals["layers"].sums.needed is None
        biases, report = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), (state.biases, report))
        after[name] = jax.tree.map(np.asarray, next_states(run.config, biases, report))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), after["step"], after["whole"])
    changed = jax.tree.map(lambda new, old: np.abs(new - np.asarray(old)).max(), after["step"], state.biases)
    assert max(jax.tree.leaves(changed)) > 1e-4
    if "mean" in after:
        (whole,), (mean,) = jax.tree.leaves(after["whole"]), jax.tree.leaves(after["mean"])
        assert np.abs(whole - mean).max() > 1e-3


def test_layer_gates_without_quantiles_are_refused_over_a_step():
    fields = {"gate": "quantile_balancing", "experts_per_token": 2, "layer_gates": ("hash",)}
    assert moe_config(**fields).layer_gates
    with pytest.raises(
        ConfigError, match=r"layer_gates='hash': must have the model's balancing rule where losses\.scope"
    ):
        moe_config(**fields, balance_scope="step")


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.slow
def test_a_step_updates_the_state_of_the_gate(accumulation):
    """Quantile balancing evens out the load at once; thresholds follow their average; ReMoE's penalty grows."""
    states, loads = {}, {}
    for gate, more in (
        ("quantile_balancing", {"experts_per_token": 2}),
        ("expert_threshold", {"accept_future_leak": True}),
        ("remoe", {"dispatch": "dropless"}),
    ):
        run = program(accumulation=accumulation, weight=0.0, gate=gate, **more)
        with jax.set_mesh(run.mesh):
            state, rows = run.init(), batch(run)
            before = [np.asarray(leaf) for leaf in jax.tree.leaves(state.biases)]
            state, first = run.train_step(state, rows)
            states[gate] = [before, [np.asarray(leaf) for leaf in jax.tree.leaves(state.biases)]]
            frozen = dataclasses.replace(run.init(), biases=jax.tree.map(jnp.asarray, state.biases))
            _, second = run.train_step(frozen, rows)
            loads[gate] = [np.asarray(metrics.layers.expert_load) for metrics in (first, second)]
            if gate == "remoe":
                active = np.asarray(first.layers.active_experts)
    (before,), (after,) = states["quantile_balancing"]
    np.testing.assert_array_equal(before, np.zeros((2, 4)))
    np.testing.assert_allclose(after.mean(-1), 0, atol=1e-6)
    worst = [load.max(-1) for load in loads["quantile_balancing"]]
    assert (worst[1] < worst[0] + 0.02).all()
    assert worst[1].mean() < worst[0].mean()
    (before,), (after,) = states["expert_threshold"]
    assert (after < 0).all()  # minus a twentieth of a probability
    assert (after > -0.05).all()
    (before,), (after,) = states["remoe"]
    np.testing.assert_allclose(before, 1e-8)
    np.testing.assert_allclose(after, 1.2e-8 if active.mean() > 1 else 1e-8 / 1.2, rtol=1e-5)
