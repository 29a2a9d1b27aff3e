"""Files that tracing a plain train step enters: none of a feature that the run does not use."""

import sys
from pathlib import Path

import jax
import pytest

import moe
from moe.config import Config, DataConfig, TrainConfig
from moe.parallel.mesh import make_mesh
from moe.training.step import build
from tests.helpers import tiny_model

ROOT = Path(moe.__file__).parent

#: Feature → its file.
FEATURES = {
    "spikes": "training/spikes.py",
    "QK-clip": "training/qk_clip.py",
    "optimizer in host memory": "training/host_memory.py",
    "teacher": "training/teacher.py",
    "pipeline": "models/pipeline.py",
    "adapters": "models/adapters.py",
}


@pytest.fixture(scope="module")
def entered():
    """Files of the package with a function that is called while a plain step is traced."""
    config = Config(
        model=tiny_model(gate="mixtral", num_layers=1),
        data=DataConfig(sequence_length=8),
        train=TrainConfig(batch_size=4),
    )
    mesh, files = make_mesh(config.mesh, jax.devices()[:1]), set()

    def profile(frame, event, _):
        if event == "call":
            files.add(frame.f_code.co_filename)

    with jax.set_mesh(mesh):
        program = build(config, mesh)
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            program.train_step.lower(program.state, program.batch)
        finally:
            sys.setprofile(before)
    return {str(Path(file).relative_to(ROOT)) for file in files if file.startswith(f"{ROOT}/")}


def test_the_step_itself_is_entered(entered):
    assert {"training/update.py", "training/optimizer.py", "training/skipping.py"} <= entered


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_that_is_off_is_not_entered(entered, feature):
    assert (ROOT / FEATURES[feature]).exists()
    assert FEATURES[feature] not in entered
