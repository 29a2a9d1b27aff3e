"""Which token, weight, loss or gradient of an MoE layer is off, and by what: python scripts/conform.py --npz=FILE.

The program is moe/programs/conform.py, also installed as the command moe-conform.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("conform")
