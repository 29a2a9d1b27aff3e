"""moe overlap --config=quickstart: overlap of held-out text with training text.

Prints for each domain the share of held-out characters in lines (of at least 40 characters) that training text has too,
and the share in the document with the largest overlap. Reads every training document once.
"""

from moe.programs import cli
from moe.system import shipped

_CONFIG = cli.define_config(shipped.CONFIGS / "quickstart.py")


def main() -> None:
    """Print a line per domain."""
    from moe.data import pipeline
    from moe.data.overlap import line_overlap

    config = cli.load_config(_CONFIG)
    prepared = pipeline.prepare_run(config)
    for domain in prepared.domains:
        counts = line_overlap(list(prepared.heldout[domain]), prepared.train[domain])
        shared, total = (sum(column) for column in zip(*counts, strict=True))
        largest = max(part / max(whole, 1) for part, whole in counts)
        print(
            f"{domain}: {len(counts)} held-out documents, {shared / max(total, 1):.1%} of their text in lines that "
            f"training text has too; at most {largest:.1%} of one document"
        )


def run() -> None:
    """The program."""
    cli.run(
        main,
        examples=(
            "moe overlap --config=quickstart",
            "moe overlap --config=/tmp/quickstart/config.json",
        ),
    )
