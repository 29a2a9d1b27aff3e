"""moe translate --workdir=WORKDIR: BLEU of the likeliest translations of held-out pairs.

WORKDIR belongs to a run with data.objective=pairs. Needs sacrebleu (pip install "moe-jax[translation]"). The signature
printed with a score says how it was computed.
"""

from absl import flags

from moe.programs import cli

_WORKDIR = cli.WorkdirFlags()
_ROWS = flags.DEFINE_integer("rows", 500, "Pairs per domain, the first of the held-out ones.", lower_bound=1)
_SHOW = flags.DEFINE_integer("show", 5, "Pairs to print per domain.", lower_bound=0)


def main() -> None:
    """Translate, score and print."""
    import jax
    import numpy as np

    from moe.config import ConfigError
    from moe.data.documents import PAIR
    from moe.models import sampling
    from moe.objectives.pairs import Pairs
    from moe.training.open_workdir import open_workdir

    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ConfigError("moe translate needs sacrebleu; install it with pip install sacrebleu") from error
    opened = open_workdir(_WORKDIR.path, _WORKDIR.instead)
    config, tokenizer = opened.program.config, opened.prepared.tokenizer
    objective = config.objective
    if not isinstance(objective, Pairs):
        raise ConfigError(f"data.objective={config.data.objective!r}: must be pairs")
    options = sampling.Sampling(temperature=0, stop_tokens=(tokenizer.eos_id,), start_token=tokenizer.pad_id)
    with jax.set_mesh(opened.program.mesh):
        variables = opened.variables(_WORKDIR.step)
        for domain in opened.prepared.domains:
            documents = opened.prepared.heldout[domain]
            texts = [documents[i] for i in range(min(int(_ROWS.value or 0), len(documents)))]
            rng = np.random.default_rng(0)  # pairs need none
            prompts = [objective.examples(text, rng, config.data, tokenizer)[0]["encoder"] for text in texts]
            length = config.data.sequence_length
            written = sampling.sample(config.model, variables, prompts, length, options)
            sources, references = zip(*(text.split(PAIR) for text in texts), strict=True)
            translations = [tokenizer.decode(ids) for ids in written]
            metric = BLEU()
            score = metric.corpus_score(translations, [references])
            print(f"{domain}: {score} on {len(texts)} pairs; {metric.get_signature()}")
            for shown in list(zip(sources, translations, references, strict=True))[: _SHOW.value]:
                print("  " + " | ".join(shown))


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=("workdir",),
        examples=(
            "moe translate --workdir=/tmp/translation",
            "moe translate --workdir=/tmp/translation --rows=100 --show=0",
        ),
    )
