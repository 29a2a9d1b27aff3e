"""Advice on what to train for a budget: python scripts/advise.py --chip_hours=10000 --topology=v5p-128.

The program is moe/programs/advise.py.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("advise")
