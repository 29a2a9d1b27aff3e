"""Transfer of learning rates: factors by hand, no change at the base's own sizes, and coordinate checks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe.config import Config, ConfigError, LoraConfig, OptimizerConfig, StartConfig, changes_of
from moe.config.parse import from_config_dict
from moe.models.factory import abstract_parameters
from moe.training.losses import cross_entropy
from moe.training.optimizer import make_optimizer
from moe.training.rates import gains, rates
from tests.helpers import random_parameters, tiny_model

#: Four times as wide, three times as deep and with experts of half the F.
GROWN = {"d_model": 64, "num_layers": 6, "num_heads": 16, "num_kv_heads": 8, "d_ff": 112, "moe_d_ff": 10}
BASE = {"base_d_model": 16, "base_num_layers": 2, "base_expert_d_ff": 20}
MOE = {"gate": "mixtral", "num_experts": 4, "experts_per_token": 2, "dispatch": "einsum", "eval_capacity_factor": 4.0}


def parameters(model):
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def factors(find, *args, model):
    shapes = nnx.to_pure_dict(abstract_parameters(model))
    return parameters(find(model, *args, shapes))


def test_factors_of_every_parameter_by_hand():
    """m = 4 for D and for F of dense FFNs, 1/2 for F of experts, 3 for L."""
    model = tiny_model(**GROWN, **BASE, **MOE, first_dense=1, shared_d_ff=112, shared_gate=True)
    assert (model.embedding_scale, model.logit_scale) == (2.0, 0.5)
    assert model.residual_scale == pytest.approx(1 / 3)
    assert model.attention_scale == 0  # more heads of the same size
    adam, muon = (factors(rates, name, model=model) for name in ("adamw", "muon"))
    layer = "segment_1/block_0/"
    for name, rate in (
        ("embedding/table", 1 / 2), ("unembedding/kernel", 1 / 2), ("final_norm/scale", 1),
        (f"{layer}attention/query", 1 / 4), (f"{layer}attention/out", 1 / 4), (f"{layer}ffn_norm/scale", 1),
        (f"{layer}moe/router/kernel", 1 / 4), (f"{layer}moe/experts/up", 1 / 4), (f"{layer}moe/experts/gate", 1 / 4),
        (f"{layer}moe/experts/down", 2), (f"{layer}moe/shared/dense/down", 1 / 4), (f"{layer}moe/shared/gate", 1 / 4),
        ("segment_0/block_0/dense/up", 1 / 4),
    ):  # fmt: skip
        assert adam[name] == pytest.approx(rate), name
    # f² = out/(in·max(in, out)): for up [64,10] 10/64², for the base's [16,20] 1/16; for down [10,64] 1/10, for [20,16]
    # 16/20². If all dimensions grow by 4, f is halved.
    for name, rate in (
        (f"{layer}moe/experts/up", (10 / 64**2 * 16) ** 0.5), (f"{layer}moe/experts/down", (20**2 / 10 / 16) ** 0.5),
        (f"{layer}attention/query", 1 / 2), (f"{layer}moe/router/kernel", 1 / 4), ("embedding/table", 1 / 2),
    ):  # fmt: skip
        assert muon[name] == pytest.approx(rate), name
    found = factors(gains, model=model)
    for name, gain in (
        ("embedding/table", 2), ("final_norm/scale", 4), (f"{layer}moe/router/kernel", 3),
        (f"{layer}moe/experts/up", 12), (f"{layer}attention_norm/scale", 12),
        (f"{layer}moe/shared/gate", 3), (f"{layer}moe/shared/dense/down", 12),
    ):  # fmt: skip
        assert found[name] == pytest.approx(gain), name


def test_gradients_outside_residual_branches_and_of_few_columns_have_their_own_gain():
    """A prediction layer's projection is added to nothing, so 1/L does not shrink its gradient; the mix of constant
    experts has 2 columns at any D, as a router has E."""
    sparse = MOE | {"gate": "moe_plus_plus", "prediction_layers": 1}
    found = factors(gains, model=tiny_model(**GROWN, **BASE, **sparse))
    for name, gain in (
        ("prediction/project", 4), ("prediction/hidden_norm/scale", 4), ("prediction/output_norm/scale", 4),
        ("prediction/block/ffn_norm/scale", 12), ("prediction/block/moe/experts/up", 12),
        ("segment_0/block_0/moe/null/mix", 3), ("segment_0/block_0/moe/null/vectors", 12),
    ):  # fmt: skip
        assert found[name] == pytest.approx(gain), name


def test_latent_experts_take_over_the_settings_of_a_base():
    """The latent dim has no base size and grows with D, m = 4; F of experts by 1/2, as above."""
    model = tiny_model(**GROWN, **BASE, **MOE, latent_dim=8)
    adam, muon = (factors(rates, name, model=model) for name in ("adamw", "muon"))
    layer = "segment_0/block_0/moe/"
    shapes = parameters(nnx.to_pure_dict(abstract_parameters(model)))
    assert shapes[f"{layer}experts/up"].shape == (6, 4, 8, 10)
    for name, rate in (("latent/down", 1 / 4), ("latent/up", 1 / 4), ("experts/up", 1 / 4), ("experts/down", 2)):
        assert adam[layer + name] == pytest.approx(rate), name
    # As above: all dimensions of the latents grow by 4. For experts/up [8,10] f² is 10/(8·10), for the base's [2,20]
    # 20/(2·20), hence a factor of (2/8)^½; for experts/down [10,8] 8/10², for the base's [20,2] 2/20²: 16^½.
    for name, rate in (("latent/down", 1 / 2), ("latent/up", 1 / 2), ("experts/up", 1 / 2), ("experts/down", 4)):
        assert muon[layer + name] == pytest.approx(rate), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_models_own_sizes_as_base_change_nothing(rng, name):
    config = OptimizerConfig(name=name, warmup_steps=0, weight_decay=0.1)
    plain = tiny_model(**MOE)
    own = dataclasses.replace(plain, base_d_model=16, base_num_layers=2, base_expert_d_ff=20)
    assert dataclasses.replace(own, base_d_model=0, base_num_layers=0, base_expert_d_ff=0) == plain
    tree = {"segment_0": {"experts": {"up": (2, 3, 4)}, "norm": {"scale": (4,)}}, "embedding": {"table": (5, 4)}}
    weights, gradients = (
        jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape)), tree, is_leaf=lambda x: isinstance(x, tuple))
        for _ in range(2)
    )
    found = []
    for model in (None, own):
        optimizer = make_optimizer(config, 10, model)
        updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(weights), weights, norm=jnp.ones(()))
        found.append(updates)
    for left, right in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)


def test_updates_by_hand():
    """One step of AdamW: −η (r g c/(|g| c + ε) + λ w), with g = ε so that the gain c of the gradient is visible.

    An expert's up matrix has r = 1/4 and c = 12: −0.1 (1/4 · 12/13 + 0.5 · 2); a norm's scale has r = 1 and no decay.
    """
    model = tiny_model(**GROWN, **BASE, **MOE)
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5, eps=1e-3, gradient_clip=0.0
    )
    weights = {"segment_0": {"moe": {"experts": {"up": jnp.full((4, 2, 3), 2.0)}}, "norm": {"scale": jnp.ones(3)}}}
    gradients = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e-3), weights)
    optimizer = make_optimizer(config, 10, model)
    updates, _ = optimizer.update(gradients, optimizer.init(weights), weights, norm=jnp.ones(()))
    np.testing.assert_allclose(updates["segment_0"]["moe"]["experts"]["up"], -0.1 * (3 / 13 + 1), rtol=1e-4)
    np.testing.assert_allclose(updates["segment_0"]["norm"]["scale"], -0.1 * 12 / 13, rtol=1e-4)


def moved(width, name, *, transfer, routers=False):
    """RMS change of the logits, or of the router's, after three steps at a learning rate that suits the base of width
    16."""
    wide = {"d_model": width, "num_heads": width // 8, "num_kv_heads": width // 8, "head_dim": 8, "moe_d_ff": width}
    base = {"base_d_model": 16} if transfer else {}
    model = tiny_model(**wide, **base, **MOE, num_layers=1, vocab_size=32)
    graphdef, _ = random_parameters(model)
    optimizer = make_optimizer(
        OptimizerConfig(name=name, learning_rate=0.002, warmup_steps=0, schedule="constant", gradient_clip=0.0),
        10,
        model,
    )
    tokens = np.random.default_rng(0).integers(0, 32, (4, 8))
    targets = np.roll(tokens, -1, axis=1)

    @jax.jit
    def run(weights):
        def logits(weights):
            return nnx.merge(graphdef, weights)(tokens).logits

        def shown(weights):
            output = nnx.merge(graphdef, weights)(tokens, return_routing=True)
            return output.routing.router_logits if routers else output.logits

        def one(carry, _):
            weights, state = carry
            gradients = jax.grad(lambda w: cross_entropy(logits(w), targets)[0] / targets.size)(weights)
            updates, state = optimizer.update(gradients, state, weights, norm=jnp.ones(()))
            return (optax.apply_updates(weights, updates), state), None

        (after, _), _ = jax.lax.scan(one, (weights, optimizer.init(weights)), None, length=3)
        return jnp.sqrt(jnp.mean(jnp.square(shown(after) - shown(weights))))

    return float(run(initial(model)))


def initial(model):
    """Parameters with the model's initial distribution, σ = 1/sqrt(fan-in), drawn by NumPy."""
    _, drawn = random_parameters(model)  # σ = 1/4
    fan_in = {"table": -1, "out": (-3, -2)}

    def scale(path, leaf):
        name = path[-1].key
        if name == "scale":
            return jnp.ones_like(leaf)
        axes = fan_in.get(name, -3 if name in ("query", "key", "value") else -2)
        size = np.prod([leaf.shape[axis] for axis in np.atleast_1d(axes)])
        return leaf * 4 / size**0.5

    return jax.tree_util.tree_map_with_path(scale, drawn)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_changes_of_the_logits_do_not_grow_with_the_width(name):
    """Coordinate check (Yang et al. 2022, appendix D.1) at eight times the width; without the transfer changes grow."""
    base, transferred = (moved(width, name, transfer=True) for width in (16, 128))
    assert 1 / 3 < transferred / base < 1.5, (base, transferred)
    plain = moved(128, name, transfer=False)
    assert plain / base > 2.5, (base, plain)


@pytest.mark.slow
def test_changes_of_router_logits_do_not_depend_on_the_width():
    """A router's updates are those of an output (rate 1/M); σ ∝ M^-1/2 keeps first logits as large as the base's."""
    changes = [moved(width, "adamw", transfer=True, routers=True) for width in (16, 64)]
    assert changes[1] == pytest.approx(changes[0], rel=0.5)


def test_refusals_and_forms():
    with pytest.raises(ConfigError, match=r"model\.logit_scale=0\.3: must be 0\.5, or 1 to be filled in"):
        tiny_model(d_model=64, base_d_model=16, logit_scale=0.3)
    with pytest.raises(ConfigError, match=r"model\.encoder_layers=2: must be 0 where model\.base_\* is set"):
        tiny_model(encoder_layers=2, base_d_model=8)
    with pytest.raises(ConfigError, match=r"optimizer\.name='adafactor': must be adamw or muon"):
        Config(model=tiny_model(base_d_model=8), optimizer=OptimizerConfig(name="adafactor"))
    tree = changes_of(Config(model=tiny_model(d_model=64, base_d_model=16)))
    tree.model.d_model = 256
    assert from_config_dict(tree).model.embedding_scale == 4.0  # follows the new width
    wide = tiny_model(d_model=64, base_d_model=16, head_dim=24, base_head_dim=6)
    assert wide.attention_scale == pytest.approx(6**0.5 / 24)
    adapted = Config(model=wide, lora=LoraConfig(rank=2), start=StartConfig(checkpoint="/tmp/run"))
    assert adapted.lora.rank == 2
