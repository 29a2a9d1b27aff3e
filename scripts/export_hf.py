"""Export a checkpoint for open-source libraries: python scripts/export_hf.py --workdir=WORKDIR --out=DIR

The program is moe/programs/export_hf.py, also installed as the command moe-export.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("export_hf")
