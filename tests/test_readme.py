"""README.md and docs/: what they show runs, and what they name exists."""

import contextlib
import importlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ("training", "generate", "evaluate", "export")
LINK = re.compile(r'\]\(([^)\s]+)\)|src="([^"]+)"')
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# Flags of other programs: pip, torchrun, sbatch.
FOREIGN = {"--no-deps", "--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port",
           "--max-restarts", "--rdzv-backend", "--rdzv-id", "--rdzv-endpoint", "--nodes", "--ntasks-per-node",
           "--gpus-per-node", "--cpus-per-task", "--time", "--signal", "--dependency", "--logdir"}


def code(page):
    """Returns the code of a page: lines of fenced blocks, and spans between backticks."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S))
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + spans


def anchors(page):
    """Returns the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def flags_of():
    """flags_of(script) returns the flags of a script at the top level, or those that a benchmark's source names and the
    constants, which most benchmarks take."""
    found = {}

    def flags(script):
        if script not in found and "/" in script:
            found[script] = set(FLAG.findall((ROOT / script).read_text())) | flags("training.py")
        elif script not in found:
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
                importlib.import_module(script.removesuffix(".py")).main(["--help"])
            found[script] = set(FLAG.findall(out.getvalue()))
        return found[script]
    return flags


def test_readme_has_at_most_160_lines():
    assert len(README.read_text().splitlines()) <= 160


def test_python_of_the_readme_runs():
    [block] = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.M | re.S)
    check = "assert images.shape == (4, 3, 64, 64) and images.abs().max() <= 1"
    result = subprocess.run([sys.executable, "-c", block + check], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    for link in (markdown or html for markdown, html in LINK.findall(page.read_text())):
        if not re.match(r"https?:", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_picture_and_table_of_docs_is_shown():
    text = "".join(page.read_text() for page in PAGES)
    for file in (ROOT / "docs").iterdir():
        assert file.suffix == ".md" or file.name in text, file.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page, flags_of):
    for words in code(page):
        script = re.search(r"(?:benchmarks/)?\w+\.py", words)
        own, rest = (words[:script.start()], words[script.end():]) if script else (words, "")
        if script:
            assert set(FLAG.findall(rest)) <= flags_of(script[0]), words
        known = FOREIGN.union(*(flags_of(name + ".py") for name in SCRIPTS))
        assert set(FLAG.findall(own)) <= known, words


def test_file_table_holds_every_module():
    rows = [line.split("|")[1] for line in README.read_text().splitlines() if line.startswith("| [")]
    named = {name for row in rows for name in re.findall(r"\]\(([^)]+)\)", row)}
    assert all((ROOT / name).exists() for name in named), named
    assert {file.name for file in ROOT.glob("*.py")} <= named


def test_names_of_the_readme_exist():
    for module, name in re.findall(r"# (training_step)\.(\w+)", README.read_text()):
        assert hasattr(importlib.import_module(module), name), name
