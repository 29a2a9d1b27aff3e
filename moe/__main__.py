"""``python -m moe COMMAND``."""

from moe.programs.commands import main

if __name__ == "__main__":
    main()
