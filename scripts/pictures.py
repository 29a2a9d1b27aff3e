"""Pictures of pages in the guides, as headless Chromium shows them: docs/NAME.png.

docs/pictures.json notes a hash of the files that each was made from, by which --check names the stale ones. Making them
needs Chromium (apt-get install chromium).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from absl import flags

from moe.programs import cli
from moe.system.atomic_files import write_atomic
from moe.system.fields import ConfigError

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
HASHES = DOCS / "pictures.json"
_NAMES = flags.DEFINE_list("names", [], "Pictures to make, such as playground,explorer; default: all.")
_CHECK = flags.DEFINE_bool("check", False, "Make nothing; end with 1 where a picture was made from other files.")


def _playground() -> str:
    from moe.playground.packed import read
    from moe.playground.page import render
    from moe.system import shipped

    return render(read(shipped.PLAYGROUND))


def _explorer() -> str:
    from moe.analysis import explorer

    return explorer.render((DOCS / "routing_explorer.json").read_text())


def _suite_report() -> str:
    from markdown_it import MarkdownIt

    folder = DOCS / "results" / "switch_vs_mixtral"
    text = MarkdownIt("commonmark", {"html": True}).enable("table").render((folder / "report.md").read_text())
    style = "<style>body { font: 16px/1.5 sans-serif; margin: 24px 32px; max-width: 740px } img { width: 100% }</style>"
    return f'<!doctype html><html><head><base href="{folder.as_uri()}/">{style}</head><body>{text}</body></html>'


def _plan() -> str:
    """The page of docs/plan.json, which ``moe plan --json`` printed (docs/pods.md has the command)."""
    from moe.planner import pages

    return pages.page(json.loads((DOCS / "plan.json").read_text()))


def _difference() -> str:
    """The figure of docs/difference.json, which ``moe diff`` wrote (docs/analysis.md has the commands)."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    from moe.analysis.difference import Agreement, LossDifference
    from moe.analysis.difference_page import Difference, figure

    found = json.loads((DOCS / "difference.json").read_text())
    found["agreements"] = {
        name: [Agreement(**layer) for layer in layers] for name, layers in found["agreements"].items()
    }
    found["losses"] = {
        grouping: {name: LossDifference(**value) for name, value in values.items()}
        for grouping, values in found["losses"].items()
    }
    drawn = io.StringIO()
    FigureCanvasSVG(figure(Difference(**found))).print_svg(drawn)
    svg = drawn.getvalue()
    return f"<!doctype html><html><body style='margin: 0'>{svg[svg.index('<svg') :]}</body></html>"


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        page: makes the HTML.
        sources: files and folders that it shows, below the repository.
        width: of the window, pixels.
        height: of the window, pixels.
        script: run in the page before the picture is taken.
    """

    page: Callable[[], str]
    sources: tuple[str, ...]
    width: int
    height: int
    script: str = ""

    def fingerprint(self) -> str:
        """Hash of the sources and of how they are shown."""
        shown = hashlib.sha256(f"{self.width} {self.height} {self.script}".encode())
        for path in (ROOT / source for source in self.sources):
            shown.update(path.read_bytes())
        return shown.hexdigest()[:16]

    def make(self, file: Path, browser: str) -> None:
        """Write the PNG file."""
        page = self.page().replace("</body>", f"<script>{self.script}</script></body>")
        with tempfile.TemporaryDirectory() as folder:
            html = Path(folder, "page.html")
            write_atomic(html, page)
            command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
            command += ["--allow-file-access-from-files", f"--user-data-dir={folder}/profile"]
            command += [f"--window-size={self.width},{self.height}", "--virtual-time-budget=20000"]
            command += [f"--screenshot={folder}/page.png", html.as_uri()]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            shutil.copyfile(Path(folder, "page.png"), file)


#: Capacity 0.75, expert 2 of the last layer off, and the explanations of the two open.
_CHANGED = """
const capacity = document.getElementById("capacity");
capacity.value = "0.75";
capacity.dispatchEvent(new Event("input"));
[...document.getElementById("experts").rows].at(-1).querySelectorAll("button")[2].click();
[...document.querySelectorAll("details")].forEach((each, number) => { each.open = number === 0 || number === 2; });
"""
_PAGE = tuple(f"moe/playground/{name}" for name in ("model.js", "model.npz", "page.css", "page.html", "page.js"))
_REPORT = tuple(f"docs/results/switch_vs_mixtral/{name}" for name in ("report.md", "losses.png", "effects.png"))
PICTURES = {
    "playground": Picture(_playground, _PAGE, 1280, 1180, _CHANGED),
    "playground_phone": Picture(_playground, _PAGE, 500, 900),
    "explorer": Picture(_explorer, ("moe/analysis/explorer.html", "docs/routing_explorer.json"), 1000, 760),
    "suite_report": Picture(_suite_report, _REPORT, 800, 1000),
    "plan": Picture(_plan, ("docs/plan.json", "moe/planner/pages.py"), 960, 610),
    "difference": Picture(_difference, ("docs/difference.json", "moe/analysis/difference_page.py"), 1060, 560),
}


def main() -> None:
    """Make the pictures and note what they were made from, or check them."""
    names = _NAMES.value or list(PICTURES)
    if unknown := sorted({*names} - {*PICTURES}):
        raise ConfigError(f"--names={','.join(unknown)}: must be among {', '.join(PICTURES)}")
    hashes = json.loads(HASHES.read_text()) if HASHES.exists() else {}
    if _CHECK.value:
        stale = [name for name in names if hashes.get(name) != PICTURES[name].fingerprint()]
        if stale:
            raise ConfigError(f"stale: python scripts/pictures.py --names={','.join(stale)}")
        return
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise ConfigError("needs Chromium: apt-get install chromium")
    for name in names:
        PICTURES[name].make(DOCS / f"{name}.png", browser)
        hashes[name] = PICTURES[name].fingerprint()
        write_atomic(HASHES, json.dumps(dict(sorted(hashes.items())), indent=1) + "\n")
        print(DOCS / f"{name}.png")


if __name__ == "__main__":
    cli.run(main, examples=("python scripts/pictures.py", "python scripts/pictures.py --names=playground,explorer"))
