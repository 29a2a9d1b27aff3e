"""Train what an ablation suite is missing, then report: python scripts/ablate.py --suite=FILE --workdir=DIR.

The program is moe/programs/ablate.py, also installed as the command moe-ablate.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("ablate")
