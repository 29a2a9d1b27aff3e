"""Models that the page cannot compute are refused, and every setting of a model is considered."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from moe.config import Capacity, Config, ConfigError, DataConfig, ModelConfig, MoEConfig
from moe.playground import page, supported
from moe.playground.making import make
from moe.routing.gates import TopK
from tests.helpers import tiny_model


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"gate": "none"}, r"model.moe.gate='none': the page needs a gate"),
        ({"gate": "hash"}, r"model.moe.gate='hash': the page needs a gate"),
        ({"gate": "expert_choice"}, r"model.moe.gate='expert_choice': the page needs a gate"),
        ({"gate": "noisy_topk", "experts_per_token": 2}, r"model.moe.gate='noisy_topk': the page needs a gate"),
        ({"gate": "switch_sampled", "bias_update": "sign"}, r"='switch_sampled': the page needs .* experts' scores"),
        ({"bias_update": "momentum"}, r"gate.bias='momentum': the page supports only none, sign and quantile"),
        ({"expert_capacity": 3}, r"model.moe.capacity.fixed=3: the page supports only 0"),
        ({"group_size": 4}, r"model.moe.group_size=4: the page supports only 0, .* is dropless"),
        ({"sliding_window": 4}, r"model.sliding_window=4: the page supports only 0"),
        ({"qk_norm": "head"}, r"model.qk_norm='head': the page supports only 'none'"),
        ({"zero_experts": 1}, r"model.moe.zero_experts=1: the page supports only 0"),
        ({"activation": "geglu_exact"}, r"model.activation='geglu_exact': the page supports only swiglu, "),
    ],
)  # fmt: skip
def test_models_that_the_page_cannot_compute_are_refused(overrides, message):
    overrides = {"accept_future_leak": True} | overrides if overrides.get("gate") == "expert_choice" else overrides
    with pytest.raises(ConfigError, match=message):
        supported.check(tiny_model(**overrides))


def test_other_objectives_are_refused():
    """The page attends to a prompt causally, and renders no conversation."""
    config = Config(model=tiny_model(dispatch="dropless"), data=DataConfig(objective="prefix_lm"))
    opened: Any = SimpleNamespace(program=SimpleNamespace(config=config))
    with pytest.raises(ConfigError, match=r"data.objective='prefix_lm': the page supports only 'causal'"):
        make(opened, 1, title="", tokens=1)


def test_a_rule_that_the_page_does_not_know_is_refused():
    """A subclass may choose other experts, but the page would show its parent's rule as the trained one."""

    class Reverse(TopK):
        def route(self, router_logits, inputs):
            return super().route(-router_logits, inputs)

    model = tiny_model(dispatch="dropless")
    moe = dataclasses.replace(model.moe, gate=Reverse(name="mine:Reverse", k=2))
    with pytest.raises(ConfigError, match=r"model.moe.gate='mine:Reverse': the page needs a gate"):
        supported.check(dataclasses.replace(model, moe=moe))


def test_the_page_has_the_share_of_a_pool():
    gate = supported.check(tiny_model(gate="emo", experts_per_token=2, dispatch="dropless", accept_future_leak=True))
    assert [rule.get("pool") for rule in supported.rules(gate)] == [0.25, *[None] * 6]


def test_groups_of_a_dropless_model_change_nothing():
    assert supported.check(tiny_model(dispatch="dropless", group_size=4)).name == "mixtral"


#: Fields that the page reads under another name, that a checked field switches off, or that no forward pass reads.
READ_OTHERWISE = {
    "num_layers", "d_ff", "rope_scaling", "delta_net", "memory", "tie_embeddings", "scale_logits", "logit_scale", "moe",
    "encoder_vocab_size", "relative_max_distance", "q_lora_rank", "value_dim", "attention",
    "prediction_weight", "dropout", "init_scale", "dtype", "low_precision_in", "scan_layers",
    "scan_unroll", "remat",
}  # fmt: skip
MOE_READ_OTHERWISE = {
    "gate", "num_experts", "d_ff", "shared_d_ff", "every", "layers", "first_dense", "group_size", "dispatch",
    "exchange", "exchange_chunks", "exchange_hosts", "capacity", "losses", "route_padding", "jitter", "expert_dropout",
    "accept_future_leak",
}  # fmt: skip


def test_every_setting_of_a_model_is_computed_or_refused():
    """A new field must be computed by model.js, refused by supported.py, or listed here."""
    fields = {field.name for field in dataclasses.fields(ModelConfig) if not field.name.startswith("base_")}
    assert fields == {*_refused(ModelConfig), *page._FIELDS, *READ_OTHERWISE}
    assert {field.name for field in dataclasses.fields(MoEConfig)} == {*_refused(MoEConfig), *MOE_READ_OTHERWISE}
    assert {field.name for field in dataclasses.fields(Capacity)} == {*_refused(Capacity), "eval", "train"}


def _refused(section):
    return {field.name for field in dataclasses.fields(section) if "page" in field.metadata}
