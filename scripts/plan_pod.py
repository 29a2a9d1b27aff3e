"""python scripts/plan_pod.py --config=configs/mixtral_8x7b.py --topology=v5p:4x4x4 [--config.x.y=value ...]

Compiles the train step of main.py for TPUs that are not here, and prints whether it fits, what it exchanges and how
fast it should be. Needs libtpu: pip install "jax[tpu]". docs/pods.md explains the page.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe import platform

if __name__ == "__main__":
    platform.use_tpu_compiler()  # before JAX

import json

from absl import flags

from moe import cli

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU generation and shape, such as v5p:4x4x4 or v5e:16x16.")
_SLICES = flags.DEFINE_integer(
    "num_slices", 1, "Slices of that shape, joined by the data-center network.", lower_bound=1
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a page.")


def main() -> None:
    """Flags in, one page out."""
    config = cli.load_config(_CONFIG)
    from moe.pods import plan, topology

    made = plan.make_plan(config, topology.get_topology(str(_TOPOLOGY.value), _SLICES.value))
    print(json.dumps(made.to_json(), indent=2) if _JSON.value else plan.render(made))


if __name__ == "__main__":
    cli.run(main, required=("config", "topology"))
