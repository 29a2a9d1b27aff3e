"""python scripts/plan_pod.py --config=configs/mixtral_8x7b.py --topology=v5p:4x4x4 [--config.x.y=value ...]

Compiles the train step of main.py for absent TPUs or GPUs and prints its memory, exchanges and predicted time.
--config.model.remat=fit chooses, of the remat policies that fit, the one that recomputes least. With --search it tries
meshes, remat policies and dispatch modes, and prints a ranked table and the command of the best. Needs the compiler of
the platform: pip install "jax[tpu]" or "jax[cuda13]". docs/pods.md explains both pages.
"""

from moe import platform

if __name__ == "__main__":
    platform.use_tpu_compiler()  # before JAX

import json

from absl import flags
from ml_collections import config_flags

from moe import cli
from moe.config import Config, ConfigError

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "TPUs as v5p:4x4x4 or v5p-128; GPUs as h100:8x8 (hosts x devices per host) or a3-megagpu-8g:8 (machines).",
)
_SLICES = flags.DEFINE_integer(
    "num_slices", 1, "TPU slices of that shape, joined by the data-center network.", lower_bound=1
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a page.")
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, remat policies and dispatch modes; run again to continue.")
_LIMIT = flags.DEFINE_integer(
    "limit", 9, "Largest number of programs that --search compiles, the best guesses first.", lower_bound=1
)
_CACHE = flags.DEFINE_string(
    "cache", "~/.cache/moe-plans", "Folder of plans that --search compiled; processes may share it."
)


def main() -> None:
    """Print one plan, or the table of a search."""
    fields = _CONFIG.value
    choose_remat = fields.model.remat == "fit"
    if choose_remat:
        fields.model.remat = "full"
    config = cli.load_config(_CONFIG)
    from moe.planner import page, plan, topology

    where = topology.get_topology(str(_TOPOLOGY.value), _SLICES.value)
    if _SEARCH.value:
        _search(config, where)
        return
    made = (plan.make_fitting_plan if choose_remat else plan.make_plan)(config, where)
    print(json.dumps(made.to_json(), indent=2) if _JSON.value else page.render(made))


def _search(config: Config, where) -> None:
    """Print the table of candidates and the command that runs the first."""
    from tqdm import tqdm

    from moe.planner import candidates, plan, search

    if _LIMIT.value < 1:
        raise ConfigError(f"--limit={_LIMIT.value}: must be at least 1")
    found, pruned = candidates.candidates(config, len(where.devices), where.chip, where.num_slices)
    chosen = found[: _LIMIT.value]
    cache = search.Cache(str(_CACHE.value), where.name, where.num_slices)
    with tqdm(total=len(chosen), unit="program", dynamic_ncols=True) as bar:
        results = search.run(
            chosen, cache, lambda tried: plan.make_plan(tried, where).to_json(), progress=lambda _: bar.update()
        )
    if _JSON.value:
        rows = [{"flags": search.overrides(candidate.config), **made} for candidate, made in results]
        print(json.dumps({"results": rows, "pruned": dict(pruned), "skipped": len(found) - len(chosen)}, indent=2))
        return
    print(search.render(results, pruned, len(found) - len(chosen)))
    if results and "error" not in results[0][1]:
        print(f"\nThe first:\npython main.py {_own_flags()} --workdir=DIR {search.overrides(results[0][0].config)}")


def _own_flags() -> str:
    """Config flags of this command without the fields that the search sets."""
    flag = flags.FLAGS["config"]
    fields = {
        name: value
        for name, value in config_flags.get_override_values(flag).items()
        if not name.startswith("mesh.") and name not in ("model.remat", "model.moe.dispatch")
    }
    words = [f"--config={config_flags.get_config_filename(flag)}"]
    return " ".join(words + [f"--config.{name}={value}" for name, value in fields.items()])


if __name__ == "__main__":
    cli.run(
        main,
        required=("config", "topology"),
        examples=(
            "python scripts/plan_pod.py --config=configs/mixtral_8x7b.py --topology=v5p:4x4x4",
            "python scripts/plan_pod.py --config=configs/mixtral_8x7b.py --topology=h100:8x8 --search --limit=20",
        ),
    )
