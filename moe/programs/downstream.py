"""moe downstream --workdir=WORKDIR --tasks=lambada_openai,arc_easy: tasks of lm-evaluation-harness.

Needs pip install lm_eval. Its tasks download their data; --include_path names a folder with YAML files of tasks of your
own, which may read local files (docs/evaluation.md).
"""

import json

from absl import flags

from moe.programs import cli
from moe.system.fields import ConfigError

_WORKDIR = cli.define_path("workdir", "Folder of a run or an import.")
_TASKS = flags.DEFINE_list("tasks", None, "Names of tasks or groups of tasks.")
_INCLUDE = cli.define_path("include_path", "Folder with further tasks as YAML files.")
_SHOTS = flags.DEFINE_integer("num_fewshot", None, "Examples before each question; default: the task's.", lower_bound=0)
_LIMIT = flags.DEFINE_integer("limit", None, "Number of documents of each task, the first ones.", lower_bound=1)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_ROWS = flags.DEFINE_integer("batch_size", 8, "Rows at once.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("max_length", 0, "Longest row in tokens; 0: data.sequence_length.", lower_bound=0)
_BOS = flags.DEFINE_bool(
    "add_bos_token", None, "Begin texts with bos; default: if the tokenizer does so in the transformers library."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")


def main() -> None:
    """Evaluate and print a table."""
    try:
        from lm_eval import evaluator, tasks, utils  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("this program needs the package lm_eval; install it with pip install lm_eval") from error
    from moe.interop.harness import WorkdirLM

    manager = tasks.TaskManager(include_path=_INCLUDE.value)
    names = list(_TASKS.value or [])
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ConfigError(f"--tasks: unknown {', '.join(unknown)}; lm_eval ls tasks lists the harness's")
    model = WorkdirLM(
        str(_WORKDIR.value),
        step=_STEP.value,
        batch_size=_ROWS.value or 8,
        max_length=_LENGTH.value or 0,
        add_bos_token=_BOS.value,
    )
    results = evaluator.simple_evaluate(
        model, tasks=names, num_fewshot=_SHOTS.value, limit=_LIMIT.value, task_manager=manager
    )
    print(json.dumps(results["results"], indent=2, default=str) if _JSON.value else utils.make_table(results))


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=("workdir", "tasks"),
        examples=(
            "moe downstream --workdir=/tmp/imported --tasks=lambada_openai,arc_easy",
            "moe downstream --workdir=/tmp/imported --tasks=hellaswag --num_fewshot=5 --limit=100 --json",
        ),
    )
