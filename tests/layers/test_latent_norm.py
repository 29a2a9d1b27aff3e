"""Latent experts whose combined output is normalised before it is projected back."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.analysis.saliency import Reap
from moe.config import ConfigError
from moe.conformance import oracle, oracle_cases
from moe.interop.layers import single_layer
from moe.layers.extras import Latent
from moe.models.flops import count_parameters
from tests.helpers import eight_devices_equal_one, slow_case, tiny_model


def test_the_norm_by_hand():
    """√((3² + 4²)/2) = 3.5355: [3, 4] becomes [3, 2·4] / 3.5355 with the scale [1, 2]; a token without output, 0."""
    latent = Latent(tiny_model(d_model=2, latent_dim=2, latent_norm=True), rngs=nnx.Rngs(0))
    latent.norm.scale[...] = jnp.array([1.0, 2.0])
    latent.up[...] = jnp.eye(2)
    y = latent.project_up(jnp.array([[[3.0, 4.0], [0.0, 0.0]]]), jnp.dtype("float32"))
    np.testing.assert_allclose(y, [[[0.848528, 2.262742], [0, 0]]], rtol=1e-5)


@pytest.mark.parametrize("modes", [1, slow_case(3)])
def test_it_equals_the_oracle_in_values_and_gradients(modes):
    rows = [row for row, _ in zip(oracle.against_oracle(oracle_cases.NORMALISED, seed=3), range(modes), strict=False)]
    assert len(rows) == modes
    for row in rows:
        assert row.passes, row


@pytest.mark.parametrize("mode", [slow_case("dropless"), slow_case("gather"), slow_case("einsum")])
def test_eight_devices_compute_what_one_does(mode, rng):
    weights = oracle.weights_of(8, 8, 8, 11, latent_dim=4, latent_norm=True)
    given = oracle.arguments(oracle.read_by("mixtral", weights))
    _, gradients, *_ = eight_devices_equal_one(single_layer("mixtral", **given, dispatch=mode), rng)
    assert float(jnp.abs(gradients["latent_norm"]).min()) > 1e-3


def test_a_layer_has_one_more_vector():
    """P = 4 scales in each of two layers."""
    normalised, plain = (tiny_model(latent_dim=4, latent_norm=norm) for norm in (True, False))
    assert count_parameters(normalised)[0] - count_parameters(plain)[0] == 2 * 4


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ConfigError, match=r"^model\.moe\.latent_norm=True: needs latent_dim above 0$"):
        tiny_model(latent_norm=True)
    config = types.SimpleNamespace(model=tiny_model(latent_dim=4, latent_norm=True))
    with pytest.raises(ConfigError, match=r"^model\.moe\.latent_norm=True: must be False to measure outputs of single"):
        Reap(types.SimpleNamespace(config=config))
