"""docs/colab.ipynb: its cells run on the CPU, in a copy of this folder, with stand-ins for what only Colab has."""

import json
import os
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
from conftest import SMALL, draw_images

REPO = Path(__file__).parent.parent
NOTEBOOK = json.loads((REPO / "docs" / "colab.ipynb").read_text())


@pytest.fixture
def session(tmp_path, monkeypatch):
    """session(flags) runs all cells as a new session and returns what the shell commands printed."""
    def stand_in(name, **content):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**content))

    stand_in("google.colab", drive=types.SimpleNamespace(mount=lambda folder: None))
    stand_in("IPython.display", Image=lambda file: os.stat(file))
    for name in ("google", "IPython"):
        stand_in(name)

    def run(flags):
        project = tmp_path / "project"
        shutil.rmtree(project, ignore_errors=True)                              # a new session starts with nothing
        printed, names = "", {}
        for cell in NOTEBOOK["cells"]:
            for line in "".join(cell["source"]).splitlines() if cell["cell_type"] == "code" else ():
                if line.startswith("!git clone"):
                    shutil.copytree(REPO, project, ignore=shutil.ignore_patterns(".*", "runs", "docs", "tests"))
                elif line == "%cd /content/project":
                    monkeypatch.chdir(project)
                elif line.startswith("!python"):
                    command = sys.executable + line[len("!python"):].format(**names)
                    printed += subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout
                elif not line.startswith("!pip install"):
                    exec(line, names)
                    names |= {"REPOSITORY": "", "IMAGES": str(tmp_path / "images.zip"), "FLAGS": flags,
                              "RUNS": str(tmp_path / "my drive" / "runs")}
        return printed
    return run


def test_the_cells_train_go_on_after_a_lost_session_and_make_images(session, tmp_path):
    photos = draw_images(tmp_path / "photos", 12)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in photos.iterdir():
            archive.write(file, f"inside/{file.name}")
    small = " ".join(SMALL)
    assert "step 2 of 2" in session(f"{small} --steps 2")
    printed = session(f"{small} --steps 4")
    assert "at step 2 from step_00000002.pt" in printed and "step 4 of 4" in printed
    assert (tmp_path / "project" / "pictures" / "walk.webp").exists()


def test_the_notebook_has_no_outputs_and_its_flags_exist():
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names = {}
    exec("".join(cells[0]["source"]), names)
    import command_line
    c, given = command_line.parse_constants(names["FLAGS"].split())
    assert c.IMAGE_SIZE == 64 and "MINUTES" in given
