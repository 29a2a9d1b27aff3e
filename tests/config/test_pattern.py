"""The pattern of a model's token mixers, and the settings of earlier versions that it replaces."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.config import Config, ConfigError, layer_kinds, to_dict
from moe.config.changes import Changes
from moe.config.parse import from_config_dict
from moe.config.pattern import parse, write
from moe.lab import identity


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        ("delta x 3 attention", "d d d a"),
        ("(delta delta, attention)x2", "d d a d d a"),
        ("((delta x 2 attention) x 2 sliding) x 2", "d d a d d a s d d a d d a s"),
    ],
)
def test_repetitions_are_written_out(text, words):
    letters = {"d": "delta", "a": "attention", "s": "sliding"}
    assert parse(text) == tuple(letters[word] for word in words.split())


@pytest.mark.parametrize(
    "text", ["x 3", "(delta", "delta)", "full", "delta x 0", "delta x 3 x 3", "delta x 99999999", "(" * 2000]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError, match=r"^model\.pattern="):
        parse(text)


@given(st.lists(st.sampled_from(["attention", "sliding", "delta"]), min_size=1, max_size=12))
def test_a_written_pattern_is_read_back(words):
    unit = parse(write(words))
    assert list(unit) * (len(words) // len(unit)) == words


def _model(**model):
    return from_config_dict({"model": {"num_layers": 4, **model}}).model


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ({"delta_net": {"layers": [0, 1, 2]}}, {"pattern": "delta x 3 attention"}),
        ({"sliding_window": 3, "sliding_window_layers": (1, 3)}, {"sliding_window": 3, "pattern": "attention sliding"}),
        (
            {"sliding_window": 3, "delta_net": {"layers": (0,)}},
            {"sliding_window": 3, "pattern": "delta sliding x 3"},
        ),
        # As an earlier version wrote them into every config.json.
        (
            {"sliding_window": 3, "sliding_window_layers": [], "mixer_layers": [], "delta_net": {"layers": []}},
            {"sliding_window": 3},
        ),
    ],
)
def test_settings_of_earlier_versions_become_a_pattern(former, present):
    assert _model(**former) == _model(**present)
    changes = Changes()
    changes.model.update(former)
    assert layer_kinds(from_config_dict(changes).model) == layer_kinds(_model(**present))


def test_former_settings_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"model\.sliding_window=3: must be 0: .* has no sliding layer"):
        _model(sliding_window=3, pattern="delta attention")
    for former, message in (
        ({"sliding_window": 3, "sliding_window_layers": (7,)}, "sliding_window_layers=.*from 0 to 3"),
        ({"delta_net": {"layers": (0,)}, "pattern": "delta"}, "model.pattern='delta': replaces model.delta_net.layers"),
        (
            {"sliding_window": 3, "sliding_window_layers": (0,), "delta_net": {"layers": (0,)}},
            "model.delta_net.layers=.*must list none of model.sliding_window_layers",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            _model(**former)


def test_the_form_that_hashes_a_run_is_that_of_earlier_versions():
    """Lists of layers, under their former names; the hashes of published runs are made of them."""
    config = Config()

    def form(**model):
        return identity._model(dataclasses.replace(config.model, **model))

    plain = form()
    assert form(sliding_window=3) == plain | {"sliding_window": 3}
    windowed = form(sliding_window=3, pattern="attention sliding")
    assert windowed == plain | {"sliding_window": 3, "sliding_window_layers": [1, 3]}
    delta = {"layers": [0, 1, 2], "key_heads": 4, "value_heads": 8, "key_dim": 32, "value_dim": 32, "conv_width": 4}
    assert form(pattern="delta x 3 attention") == plain | {"delta_net": delta}
    assert form(pattern="attention") == plain
    assert json.loads(json.dumps(to_dict(config)))["model"]["pattern"] == ""
