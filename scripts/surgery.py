"""Prune, split or merge the experts of a trained model: python scripts/surgery.py --workdir=RUN --out=NEW --prune=0.25.

The program is moe/programs/surgery.py, also installed as the command moe-surgery.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("surgery")
