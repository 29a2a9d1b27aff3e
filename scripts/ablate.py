"""Train what an ablation suite is missing, then report: python scripts/ablate.py --suite=FILE --workdir=DIR.

The program is moe/programs/ablate.py, which is the command moe-ablate too.
"""

from moe.commands import start

if __name__ == "__main__":
    start("ablate")
