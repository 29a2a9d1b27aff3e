"""Scripts run in a page by headless Chromium."""

import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")


def run(page: str, tmp_path, script: str, *flags: str, width: int = 1400):
    """Open a page, run a script in it and return the object that the script returns, or its exception as text."""
    assert BROWSER is not None
    probe = (
        "<script>let answer; try { answer = (() => {" + script + "})(); } catch (error) { answer = String(error); }"
        "document.body.dataset.answer = encodeURIComponent(JSON.stringify(answer));</script></body>"
    )
    tested, profile = tmp_path / "tested.html", tmp_path / "profile"
    tested.write_text(page.replace("</body>", probe))
    shutil.rmtree(profile, ignore_errors=True)
    command = [BROWSER, *FLAGS, f"--window-size={width},900", "--virtual-time-budget=20000", "--dump-dom", *flags]
    done = subprocess.run(
        [*command, f"--user-data-dir={profile}", tested.as_uri()],
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    answer = re.search(r'data-answer="([^"]*)"', done.stdout)
    assert answer, done.stderr[-2000:]
    return json.loads(unquote(answer[1]))
