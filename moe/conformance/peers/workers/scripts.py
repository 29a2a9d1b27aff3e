"""Run scripts one after another, each in a process of its own, which has the imports of the first already.

    python scripts.py FIRST.py SECOND.py ...

Prints each script's path before its output. A script that raises an error prints it, and the next one
runs. One whose first line names torchrun is started by it.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys


def main(paths: list[str]) -> None:
    """The program. Imports of a large library take longer than a script's work."""
    with open(paths[0]) as file:
        exec("".join(line for line in file if line.startswith(("import ", "from "))), {})
    for path in paths:
        print(path, flush=True)
        with open(path) as file:
            processes = re.search(r"torchrun (--nproc_per_node=\d+)", file.readline())
        if processes:
            subprocess.run([sys.executable, "-m", "torch.distributed.run", processes[1], path], check=False)
            continue
        process = os.fork()
        if process == 0:
            try:
                runpy.run_path(path, run_name="__main__")
            except Exception as error:
                print(f"{type(error).__name__}: {error}")
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.waitpid(process, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
