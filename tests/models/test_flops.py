"""FLOPs by hand, and the matmul rate that MFU divides by."""

import dataclasses

import jax
import numpy as np
import pytest

from moe.config import Config, DataConfig, DeltaNetConfig, MeshConfig, TrainConfig
from moe.models.flops import count_parameters, expert_rows_per_token, train_flops, train_flops_per_token
from moe.parallel.device_kinds import DEVICE_KINDS
from moe.parallel.mesh import make_mesh
from moe.parallel.target import Target
from moe.planner.chips import CHIPS
from moe.training import profiling
from moe.training.metrics import Throughput
from tests.helpers import tiny_encoder_decoder, tiny_model

# D 16, F 20, V 48, N 4, M 2, H 6; swiglu: an expert has 3·16·20 = 960 parameters.
# Attention: 16·6·(4+2+2) in, 4·6·16 out.
EXPERT, ATTENTION, NORMS, TABLE = 960, 768 + 384, 2 * 16, 48 * 16


def _by_hand(router, expert_rows, extra=0.0, length=8):
    """FLOPs of one layer, 4 experts: 6 per parameter, and scores over (T+1)/2 keys on average."""
    parameters = ATTENTION + NORMS + router + EXPERT * expert_rows + 16 + TABLE
    return 6 * parameters + extra + 12 * 4 * 6 * (length + 1) / 2


def test_a_gate_in_which_tokens_choose_counts_k_experts():
    config = tiny_model(num_layers=1, gate="mixtral")
    assert train_flops_per_token(config, 8) == _by_hand(16 * 4, expert_rows=2)
    total, active = count_parameters(config)
    assert total - active == 2 * EXPERT


def test_steps_count_their_rows_and_what_their_encoder_reads():
    """3 steps of 2 rows of 4 tokens, each with 8 encoder tokens."""
    data = DataConfig(sequence_length=4, input_length=8)
    config = Config(model=tiny_encoder_decoder(), data=data, train=TrainConfig(batch_size=2))
    assert train_flops(config, 3) == 3 * 2 * 4 * train_flops_per_token(config.model, 4, 8)


def test_windows_tied_tables_and_values_of_their_own_dimension_count_what_they_multiply():
    """A window of 4 in 8 tokens sees 1 + 2 + 3 + 4 keys, then 4 for each of 4 queries. A table that is tied to the
    logits multiplies once. Keys of 6 and values of 5 dimensions have 11 in all."""
    whole = _by_hand(16 * 4, expert_rows=2)
    scores = 12 * 4 * 6
    windowed = tiny_model(num_layers=1, gate="mixtral", sliding_window=4)
    assert train_flops_per_token(windowed, 8) == whole - scores * ((8 + 1) / 2 - (10 + 16) / 8)
    assert train_flops_per_token(tiny_model(num_layers=1, gate="mixtral", sliding_window=12), 8) == whole
    assert train_flops_per_token(tiny_model(num_layers=1, gate="mixtral", tie_embeddings=True), 8) == whole
    latent = tiny_model(num_layers=1, gate="mixtral", num_kv_heads=4, kv_lora_rank=3, rope_dim=2, value_dim=5)
    more = train_flops_per_token(latent, 80) - train_flops_per_token(latent, 8)
    assert more == pytest.approx(6 * 4 * (6 + 5) * (80 - 8) / 2)


def test_an_encoder_decoder_by_hand():
    """For each of 4 decoder tokens, 2 of 8 encoder tokens. An FFN has 2·16·28 = 896 parameters, an expert 2·16·20 = 640
    and a router 64; each stack has a norm and a relative bias of 8·4."""
    norm, ffn, sparse, of_stack = 16, 896, 64 + 640, 16 + 32
    decoder = 2 * (ATTENTION + 2 * norm) + 2 * (2 * 384 + norm) + ffn + sparse + of_stack + TABLE  # queries and outputs
    encoder = 3 * (ATTENTION + 2 * norm) + 2 * ffn + sparse + of_stack
    of_source = 2 * 2 * 192  # keys and values that the decoder makes of the encoder's tokens
    keys = 2 * (4 + 1) / 2 + 2 * 8 + 3 * 8 * 2  # causal, cross, and the encoder's
    expected = 6 * (decoder + 2 * (encoder + of_source)) + 12 * 4 * 6 * keys
    assert train_flops_per_token(tiny_encoder_decoder(), 4, 8) == expected
    own_table = tiny_encoder_decoder(encoder_vocab_size=10)
    assert train_flops_per_token(own_table, 4, 8) == expected


def test_a_delta_net_counts_its_matrices_and_its_memory():
    """M 2, N 4 heads of H 3 and V 5: 16·(2·2·3 + 2·4·5 + 2·4) in, 4·5·16 out, 3 taps of 2·2·3 + 4·5 channels, two
    numbers per head, a norm of 5; 3 products with 4·3·5 numbers, 2 FLOPs each, three times. There are no scores at any
    length."""
    delta = DeltaNetConfig(key_heads=2, value_heads=4, key_dim=3, value_dim=5, conv_width=3)
    config = tiny_model(num_layers=1, gate="mixtral", pattern="delta", delta_net=delta)
    mixer = 16 * (12 + 40 + 8) + 4 * 5 * 16 + 3 * (12 + 20) + 2 * 4 + 5
    parameters = mixer + NORMS + 16 * 4 + EXPERT * 2 + 16 + TABLE
    for length in (8, 800):
        assert train_flops_per_token(config, length) == 6 * parameters + 3 * 3 * 2 * 4 * 3 * 5
    total, active = count_parameters(config)
    assert active == parameters + TABLE
    assert total - active == 2 * EXPERT


def test_latent_experts_count_the_latent_dimension_and_two_projections():
    """Latent dimension 4: an expert has 3·4·20 parameters, not 3·16·20, and every token is projected 16 → 4 → 16."""
    config = tiny_model(num_layers=1, gate="mixtral", latent_dim=4)
    assert train_flops_per_token(config, 8) == _by_hand(16 * 4 + 2 * 16 * 4, expert_rows=2 * 4 / 16)
    total, active = count_parameters(config)
    assert total - active == 2 * 3 * 4 * 20


@pytest.mark.parametrize(("group_size", "rows"), [(0, 4 * 2 / 8), (16, 4 * 2 / 16)])
def test_soft_moe_counts_its_slots_and_their_mixing(group_size, rows):
    """E·P = 8 slots per group, each one row of one expert; mixing in and mixing out each multiply 8 slots by D."""
    config = tiny_model(
        num_layers=1, gate="soft_moe", dispatch="einsum", accept_future_leak=True, slots_per_expert=2,
        group_size=group_size,
    )  # fmt: skip
    assert expert_rows_per_token(config, 8) == rows
    mixing = 6 * 2 * 8 * 16
    assert train_flops_per_token(config, 8) == _by_hand(16 * 8, expert_rows=rows, extra=mixing)


@pytest.mark.parametrize(("factor", "rows"), [(1.0, 2.0), (0.5, 1.0), (1.1, 4 * 5 / 8)])
def test_expert_choice_counts_its_capacity(factor, rows):
    """Each of 4 experts takes C = ceil(factor · 2 · 8 / 4) tokens; for 1.1, ceil(4.4) = 5."""
    config = tiny_model(num_layers=1, gate="expert_choice", accept_future_leak=True, capacity_factor=factor)
    assert expert_rows_per_token(config, 8) == rows
    assert train_flops_per_token(config, 8) == _by_hand(16 * 4, expert_rows=rows)


def test_prediction_layers_count_the_mixing_of_slots():
    """A prediction layer that mixes slots counts 12 · 8 slots · 16 more than one that does not."""
    config = tiny_model(
        num_layers=1,
        gate="soft_moe",
        dispatch="einsum",
        accept_future_leak=True,
        slots_per_expert=2,
        prediction_layers=1,
    )
    slots = 2 * config.moe.num_experts
    assert train_flops_per_token(config, 8) == 44064 + 12 * slots * config.d_model
    assert slots * config.d_model == 128


def test_the_matmul_rate_counts_every_matmul_of_its_chain(monkeypatch):
    clock = iter(np.arange(100.0) * 0.5)  # each measurement takes half a second
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: next(clock))
    assert profiling.measured_matmul_rate(size=64, chain=1) == 2 * 64**3 / 0.5
    assert profiling.measured_matmul_rate(size=64, chain=7) == 7 * 2 * 64**3 / 0.5


def test_accelerators_are_measured_by_a_chain_of_large_matmuls(monkeypatch):
    seen = {}

    def multiply(matrix, factor, chain):
        seen.update(size=matrix.shape[0], chain=chain)
        return factor[:1, :1]

    monkeypatch.setattr(profiling.target, "is_cpu", lambda: False)
    monkeypatch.setattr(profiling, "_multiply", multiply)
    profiling.measured_matmul_rate.func("bfloat16", repeats=1)  # bypasses the small matrix of tests/fixtures.py
    assert seen["size"] >= 8192
    assert seen["chain"] >= 8


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v4", 275e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("cpu", None),
    ],
)
def test_datasheet_peaks(kind, peak):
    assert Target(kind.split()[0].lower(), kind).peak_flops == peak


def test_the_planners_chips_have_the_same_peaks():
    assert CHIPS["v5e"].peak == DEVICE_KINDS["TPU v5 lite"].peak == 197e12
    assert CHIPS["tpu7x"].peak == 2 * DEVICE_KINDS["TPU7"].known_peak == 2307e12


def test_the_rate_of_a_mesh_is_that_of_all_its_devices(monkeypatch):
    """Each device runs the whole measured matmul, so that the measured rate is that of one device."""
    monkeypatch.setattr(profiling, "measured_matmul_rate", lambda _: 1e9)
    monkeypatch.setattr(profiling.target, "current", lambda: Target("cpu", "TPU v5p"))
    config = Config(model=tiny_model(num_layers=1))
    shares = []
    for devices in (1, 4):
        with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=devices), jax.devices()[:devices])):
            row = Throughput(config).row(1.0, 0.0)
            shares.append([row["mfu"], row["mfu_datasheet"]])
    assert shares[0] == [pytest.approx(4 * share) for share in shares[1]]


def test_balanced_experts_without_an_ffn_compute_no_rows():
    """τ = 1/2, E = 6 and 3 experts without an FFN: of 2 assignments, 0.5·6 / (0.5·6 + 3) = 1/2 reach an FFN."""
    config = tiny_model(gate="mixtral", experts_per_token=2, num_experts=6, zero_experts=3)
    losses = dataclasses.replace(config.moe.losses, null=0.5)
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, losses=losses))
    assert expert_rows_per_token(config, 8) == 1
