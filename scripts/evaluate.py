"""Held-out perplexity and bits per byte of a checkpoint, per domain: python scripts/evaluate.py --workdir=WORKDIR.

The program is moe/programs/evaluate.py, which is the command moe-evaluate too.
"""

from moe.commands import start

if __name__ == "__main__":
    start("evaluate")
