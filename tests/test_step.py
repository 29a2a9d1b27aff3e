"""What the compiled train step must and must not do with memory."""

import re

import jax
import pytest

from moe import losses, sharding
from moe.config import Config, DataConfig, TrainConfig
from moe.step import build
from tests.helpers import tiny_model


@pytest.fixture(scope="module")
def programs():
    """(Program, its compiled train step, its text): 4 rows of 24 tokens, vocabulary of 48, 8 positions a chunk."""
    config = Config(
        model=tiny_model(), data=DataConfig(sequence_length=24), train=TrainConfig(batch_size=4, num_steps=100)
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr(losses, "_CHUNK", 32)
        program = build(config, mesh)
        compiled = program.train_step.lower(program.state, program.batch).compile()
    return program, compiled, compiled.as_text()


def test_every_buffer_of_the_state_is_reused(programs):
    program, compiled, text = programs
    leaves = jax.tree.leaves(program.state)
    header = text.splitlines()[0]
    pairs = re.findall(r"\{(\d+)\}: \((\d+), \{\}, (?:may|must)-alias\)", header)
    assert sorted(int(output) for output, _ in pairs) == list(range(len(leaves)))
    assert all(output == argument for output, argument in pairs), "each takes the place of its predecessor"
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert compiled.memory_analysis().alias_size_in_bytes == nbytes


def test_logits_are_held_a_chunk_at_a_time(programs):
    """In no shape is there an array of 4·24·48 numbers, other than of what has that size by itself."""
    text = programs[2]
    assert "f32[4,8,48]" in text
    sizes = {shape: 1 for shape in re.findall(r"\w+\[([\d,]+)\]", text) if shape.endswith(",48")}
    for shape in sizes:
        elements = 1
        for size in shape.split(","):
            elements *= int(size)
        assert elements < 4 * 24 * 48, shape
