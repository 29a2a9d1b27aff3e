"""The commit of the checkout that this package is in."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """The commit, with "+changes" if tracked files differ from it; "unknown" outside of a repository or without git."""
    try:
        return _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def short_commit() -> str:
    """The commit, shortened; "unknown" outside of a repository or without git."""
    try:
        return _git("rev-parse", "--short", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    """Output of a git command in the package's folder. Raises OSError without git, CalledProcessError if it fails."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
