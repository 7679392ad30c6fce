"""The notebook runs from its first cell to its last, and is what the script beside it says."""

import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_and_its_script_say_the_same_and_its_pictures_are_there(path):
    notebook = nbformat.read(path, as_version=4)
    assert cells(jupytext.read(path.with_suffix(".py"))) == cells(notebook), (
        f"Make it anew: jupytext --to ipynb --update {path.with_suffix('.py').name}"
    )
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert not [output for output in outputs if output.output_type == "error"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = re.sub(r"(?m)^(SUBJECTS.*)= .*$", r"\1= 3, 4, 4", parameters.source)
    kernels = tmp_path / "kernels"
    subprocess.run([sys.executable, "-m", "ipykernel", "install", "--prefix", kernels, "--name", "this"], check=True)
    monkeypatch.setenv("JUPYTER_PATH", f"{kernels / 'share' / 'jupyter'}")
    NotebookClient(notebook, kernel_name="this", timeout=900, resources={"metadata": {"path": tmp_path}}).execute()
    assert [cell for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
