"""Which steps a trace covers; tests/training/test_train.py traces a real run."""

import contextlib
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moe.config import Config, ConfigError
from moe.training import profiling


@dataclasses.dataclass(frozen=True)
class FakeProgram:
    train_step: Callable[..., Any]


def test_the_profile_flag_is_parsed_as_steps_of_the_run():
    assert profiling.parse("10:3", 12) == profiling.Steps(10, 12)
    for text in ("", "10", "0:3", "10:0", "10:-1", "a:b", "10:3:1"):
        with pytest.raises(ConfigError, match="must be STEP:COUNT"):
            profiling.parse(text, 100)
    with pytest.raises(ConfigError, match=r"ends at step 12, but train\.num_steps is 11"):
        profiling.parse("10:3", 11)


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
def test_moments_in_host_memory_need_no_device_memory(kind):
    """A device of 2 GiB; parameters and two moments take 1 GiB each."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = (one, one.with_memory_kind(kind))
    gibibyte, moment = (jax.ShapeDtypeStruct((2**28,), jnp.float32, sharding=place) for place in places)
    tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32, sharding=one)
    device = types.SimpleNamespace(platform="tpu", memory_stats=lambda: {"bytes_limit": 2 * 2**30})
    program = types.SimpleNamespace(
        mesh=types.SimpleNamespace(local_devices=[device]),
        config=Config(),
        batch={"tokens": tokens},
        state=[gibibyte, moment, moment],
    )
    refused = pytest.raises(ConfigError, match=r"need 3\.0 GiB where there are 2\.0")
    with refused if kind == "device" else contextlib.nullcontext():
        profiling.refuse_too_large(program)


def test_a_teacher_and_the_hosts_part_of_the_state_count(monkeypatch):
    """Two devices of 2 GiB on a host of 3: parameters and a teacher of 1 GiB a device leave no room for activations,
    and moments of 2 GiB a device exceed the host."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stored = one.with_memory_kind("pinned_host")
    gibibyte, moments = (
        jax.ShapeDtypeStruct((size,), jnp.float32, sharding=place) for size, place in ((2**28, one), (2**29, stored))
    )
    device = types.SimpleNamespace(platform="tpu", memory_stats=lambda: {"bytes_limit": 2 * 2**30})
    program = types.SimpleNamespace(
        mesh=types.SimpleNamespace(local_devices=[device] * 2),
        config=Config(),
        batch={"tokens": jax.ShapeDtypeStruct((8, 256), jnp.int32, sharding=one)},
        state=[gibibyte],
    )
    monkeypatch.setattr(profiling.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 3 * 2**18}.__getitem__)
    profiling.refuse_too_large(program)
    with pytest.raises(ConfigError, match=r"need 2\.0 GiB where there are 2\.0"):
        profiling.refuse_too_large(program, {"table": gibibyte})
    program.state = [gibibyte, moments]
    with pytest.raises(ConfigError, match=r"optimizer\.memory=host: needs 4\.0 GiB of the host's 3\.0 GiB"):
        profiling.refuse_too_large(program)


@pytest.mark.parametrize(
    ("resumed_at", "run_to", "traced"),
    [(0, 9, [3, 4]), (3, 9, [4]), (4, 9, []), (0, 2, []), (0, 3, [3])],
)
def test_only_the_given_steps_are_traced(tmp_path, monkeypatch, resumed_at, run_to, traced):
    running, seen = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: running.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: running.pop())
    step = types.SimpleNamespace(step=jnp.asarray(resumed_at))

    def train_step(state, batch):
        if running:
            seen.append(batch)
        return types.SimpleNamespace(step=state.step + 1)

    def make():
        return FakeProgram(train_step)

    with profiling.profiled(profiling.Steps(3, 4), str(tmp_path), make) as make_program:
        run = make_program().train_step
        for number in range(resumed_at + 1, run_to + 1):
            step = run(step, number)
    assert seen == traced
    assert not running  # also if the run ended before the last of these steps
