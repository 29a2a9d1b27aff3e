"""Import an open checkpoint: python scripts/import_hf.py --source=DIR --out=WORKDIR

The program is moe/programs/import_hf.py, also installed as the command moe-import.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("import_hf")
