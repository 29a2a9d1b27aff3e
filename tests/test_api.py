"""The public names: a layer on its own, under JAX's and Flax's transformations, in Linen and in a user's mesh."""

import subprocess
import sys

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge
from jax.sharding import AxisType

import moe
from moe import ConfigError, MoELayer, SoftMoE
from moe.config import to_dict
from moe.config.parse import from_config_dict
from moe.routing import gates
from tests.helpers import outputs, slow_case

SIZES = {"d_model": 8, "d_ff": 12, "num_experts": 4}


def _layer(**settings):
    layer = SoftMoE if settings.get("gate") == "soft_moe" else MoELayer
    return layer(**{**SIZES, **settings}, rngs=nnx.Rngs(0))


def _x(*shape):
    return jax.random.normal(jax.random.key(1), (*shape, 8))


def test_importing_the_package_does_not_import_jax():
    code = "import moe, sys; assert 'jax' not in sys.modules; moe.Config; assert 'MoELayer' in dir(moe)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", moe.__all__)
def test_every_public_name_can_be_accessed(name):
    assert getattr(moe, name).__name__ == name


def test_an_unknown_name_is_refused_with_the_public_names():
    with pytest.raises(AttributeError, match="MoELayer"):
        _ = moe.MixtureLayer


@pytest.mark.parametrize("gate", [slow_case("mixtral"), slow_case("switch"), "soft_moe", "expert_choice"])
def test_the_layer_outside_a_model(gate):
    y, report, routing = jax.jit(_layer(gate=gate).__call__)(_x(2, 6))
    assert y.shape == (2, 6, 8)
    assert bool(jnp.any(y != 0))
    assert report.expert_load.shape == (4,)
    assert routing.expert_index.shape[:2] == (2, 6)


def test_soft_moe_has_a_separate_layer_class():
    assert isinstance(_layer(gate="soft_moe"), SoftMoE)
    assert SoftMoE(**SIZES, gate=gates.SoftMoE(slots=3), rngs=nnx.Rngs(0)).router.kernel.shape == (8, 4, 3)
    with pytest.raises(ConfigError, match=r"gate='soft_moe': needs a SoftMoE, not a MoELayer"):
        MoELayer(**SIZES, gate="soft_moe", dispatch="einsum", rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"gate='mixtral': needs a MoELayer, not a SoftMoE"):
        SoftMoE(**SIZES, gate="mixtral", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("gate", [gates.Hash(), gates.Random(), gates.DenseMixture()])
def test_gates_that_no_balance_loss_affects_get_no_loss_weights(gate):
    layer = MoELayer(**SIZES, gate=gate, rngs=nnx.Rngs(0))
    assert layer.config.losses == moe.Losses()


def test_a_soft_moe_gate_given_as_a_value_needs_no_capacity():
    layer = {"gate": gates.SoftMoE(slots=2), "dispatch": "einsum", "accept_future_leak": True}
    config = from_config_dict({"model": {"moe": layer}})
    assert config.model.moe.capacity == moe.Capacity(train=1.0, eval=1.0)
    assert from_config_dict(to_dict(config)) == config


def test_without_a_mask_all_tokens_are_real():
    run, x = outputs(_layer()), _x(2, 6)
    np.testing.assert_array_equal(run(x)[0], run(x, np.ones((2, 6), bool))[0])


def test_the_layer_under_grad_scan_and_vmap():
    layer, x = _layer(dispatch="dropless"), _x(3, 2, 6)
    graphdef, state = nnx.split(layer)
    run = outputs(layer)
    expected = np.stack([run(part)[0] for part in x])

    def apply(part):
        return nnx.merge(graphdef, state)(part)[0]

    np.testing.assert_allclose(jax.jit(jax.vmap(apply))(x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda x: jax.lax.map(apply, x))(x), expected, rtol=1e-4, atol=1e-5)
    gradients = nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(x[0])[0] ** 2)))(layer)
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradients))


def test_the_layer_in_a_linen_model():
    class Model(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            y, report, _ = bridge.to_linen(MoELayer, **SIZES)(flax.linen.LayerNorm()(x))
            return x + y, report.load_balancing_loss

    x, model = _x(2, 6), Model()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    y, loss = jax.jit(model.apply)(variables, x)
    assert y.shape == x.shape
    assert float(loss) > 0


@pytest.mark.parametrize("dispatch", [slow_case("gather"), "dropless"])
def test_the_layer_in_a_users_mesh(dispatch):
    """Axes without a role are ignored; with mesh_roles the experts are split over the user's axis."""
    layer, x = _layer(dispatch=dispatch, capacity=moe.Capacity(4.0, 4.0)), _x(8, 6)
    expected = outputs(layer)(x)[0]
    mesh = jax.make_mesh((4, 2), ("ep", "replica"), axis_types=(AxisType.Auto,) * 2)
    graphdef, state = nnx.split(layer)
    with jax.set_mesh(mesh):
        plain = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)[0]).lower(state, x).compile()
        np.testing.assert_allclose(plain(state, x), expected, rtol=1e-4, atol=1e-5)
        with moe.mesh_roles({"expert": "ep"}):
            split = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)[0]).lower(state, x).compile()
        np.testing.assert_allclose(split(state, x), expected, rtol=1e-4, atol=1e-5)
        assert "all-to-all" in split.as_text()
        assert "all-to-all" not in plain.as_text()


@pytest.mark.parametrize("dispatch", ["einsum", slow_case("dropless")])
def test_experts_over_an_axis_called_data(dispatch):
    """A user's axis ``data`` that has the role of the experts has no other role."""
    layer, x = _layer(dispatch=dispatch, capacity=moe.Capacity(4.0, 4.0)), _x(8, 6)
    expected = outputs(layer)(x)[0]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    graphdef, state = nnx.split(layer)
    with jax.set_mesh(mesh), moe.mesh_roles({"expert": "data"}):
        split = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)[0])(state, x)
    np.testing.assert_allclose(split, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="an axis has one role"), moe.mesh_roles({"expert": "a", "fsdp": "a"}):
        pass


@pytest.mark.parametrize("dispatch", ["einsum", "gather", "dropless", "slots"])
def test_contents_of_padding_reach_no_token(dispatch):
    layer = (
        SoftMoE(d_model=8, d_ff=12, num_experts=4, rngs=nnx.Rngs(0))
        if dispatch == "slots"
        else _layer(dispatch=dispatch)
    )
    x = _x(2, 6)
    mask = jnp.broadcast_to(jnp.arange(6) < 4, x.shape[:2])
    run = jax.jit(lambda fill: layer(jnp.where(mask[..., None], x, fill), mask)[0])
    np.testing.assert_allclose(run(jnp.nan)[:, :4], run(0.0)[:, :4], atol=1e-6)


@pytest.mark.parametrize("dispatch", ["dropless", "slots"])
def test_contents_of_padding_reach_no_gradient(dispatch):
    """Not even a NaN, which stays one when it is multiplied by a gradient of 0."""
    kind, settings = (SoftMoE, {}) if dispatch == "slots" else (MoELayer, {"dispatch": dispatch})
    layer = kind(d_model=8, d_ff=12, num_experts=4, shared_d_ff=4, **settings, rngs=nnx.Rngs(0))
    x, mask = _x(2, 6), jnp.broadcast_to(jnp.arange(6) < 4, (2, 6))

    @nnx.jit
    def gradients(layer, x):
        return nnx.grad(lambda layer, x: jnp.sum(layer(x, mask)[0] ** 2), argnums=(0, 1))(layer, x)

    clean, garbage = (gradients(layer, jnp.where(mask[..., None], x, fill)) for fill in (0, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, garbage, clean)
    assert jnp.any(clean[0]["router"]["kernel"][...])


def test_a_mesh_with_explicit_axes_is_refused():
    mesh = jax.make_mesh((8,), ("ep",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match="Explicit axes"):
        _layer()(_x(8, 6))


def test_unresolved_configs_are_resolved():
    config = moe.ModelConfig(d_model=8, num_layers=1, moe=moe.MoEConfig(num_experts=4, d_ff=12))
    assert MoELayer(config, rngs=nnx.Rngs(0)).config.experts_per_token == 2
    model = nnx.eval_shape(lambda: moe.Transformer(config, rngs=nnx.Rngs(0)))
    assert model.config.moe.capacity.train == 1.25


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"num_expert": 4}, "moe.num_expert: no such field; did you mean moe.num_experts"),
        ({"gate": "mixtrall"}, "did you mean 'mixtral'"),
        ({"d_model": "8"}, "d_model='8': must be int"),
        ({"gate": gates.TopK(k=9)}, "must be at most num_experts=4"),
        ({"experts_per_token": 2}, "moe.experts_per_token: no such field; did you mean moe.gate.k"),
        ({"top_k": 2}, "moe.top_k: no such field; did you mean moe.gate.k"),
        ({"dispatch": "scatter"}, "must be one of"),
        ({"config": moe.Config()}, "config must be a moe.ModelConfig"),
        ({"config": moe.ModelConfig()}, "not both"),
    ],
    ids=["name", "gate", "type", "value", "flat", "synonym", "choice", "config", "both"],
)
def test_wrong_settings_are_refused(settings, pattern):
    with pytest.raises(ConfigError, match=pattern):
        _layer(**settings)


def test_unknown_fields_of_a_section_are_refused():
    with pytest.raises(ConfigError, match=r"model\.vocab: no such field; did you mean model\.vocab_size\?"):
        moe.ModelConfig(**{"vocab": 3})
    with pytest.raises(ConfigError, match=r"^modell: no such field; did you mean model\?"):
        moe.Config(**{"modell": moe.ModelConfig()})


def test_missing_sizes_are_refused():
    with pytest.raises(ConfigError, match="needs d_model and d_ff"):
        MoELayer(rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("settings", "x", "pattern"),
    [
        ({}, jnp.zeros((2, 6, 7)), r"must be \[batch, sequence, d_model=8\]"),
        ({"group_size": 5}, jnp.zeros((2, 6, 8)), "group_size=5: must divide the 2 x 6 tokens"),
        ({"gate": "hash"}, jnp.zeros((2, 6, 8)), "needs token_ids"),
    ],
    ids=["dims", "groups", "token ids"],
)
def test_wrong_inputs_are_refused(settings, x, pattern):
    with pytest.raises(ValueError, match=pattern):
        _layer(**settings)(x)


def test_unknown_roles_are_refused():
    with (
        pytest.raises(ConfigError, match="roles are pipeline, data, fsdp, expert, tensor"),
        moe.mesh_roles({"experts": "ep"}),
    ):
        pass
