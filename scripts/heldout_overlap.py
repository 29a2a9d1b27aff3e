"""Measure the overlap of held-out text with training text: python scripts/heldout_overlap.py.

The program is moe/programs/heldout_overlap.py, also the command moe overlap.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("heldout_overlap")
