"""Import an open checkpoint: python scripts/import_hf.py --source=DIR --out=WORKDIR

The program is moe/programs/import_hf.py, which is the command moe-import too.
"""

from moe.commands import start

if __name__ == "__main__":
    start("import_hf")
