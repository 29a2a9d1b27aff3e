"""Held-out perplexity and bits per byte of a checkpoint, per domain: python scripts/evaluate.py --workdir=WORKDIR.

The program is moe/programs/evaluate.py, also installed as the command moe-evaluate.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("evaluate")
