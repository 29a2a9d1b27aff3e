"""Where two runs of one model first choose other experts, and whether rounding suffices to explain it.

The program is moe/programs/diverge.py, also ``moe diverge``.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("diverge")
