"""The notebooks in examples/ run from top to bottom, find what their text says, and name only what exists.

`pytest tests/test_notebooks.py --overwrite` (make notebooks) keeps what they showed.
"""

import importlib
import re
import sys
from pathlib import Path
from textwrap import dedent

import nbformat
import pytest
from nbformat import NotebookNode
from nbmake.nb_run import NotebookRun

from paramlens.cli.main import main
from paramlens.config.file import field_paths, shipped_configs

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
CLAIMS = {
    "editing-a-fact": """
        assert know.accuracy >= 0.9 and fit["recon"] < 0.02
        assert len(edit.selected) == 2 and kept["target"] < 0.6
        assert min(kept[kind] for kind in ("other-target", "same-sport", "other-sport", "general")) >= 0.9
        assert all(controls[name].kept["target"] > 0.9 for name in ("random directions", "random subcomponents"))
        assert controls["top singular directions"].kept["general"] < 0.95 and controls["activation read"].kept["target"] < 0.6
        assert len(own.selected) > 10 and left["target"] < kept["target"] and left["general"] < kept["general"]
        """,
    "induction-circuit": """
        assert others == [] and abs(inner[s]) > 10 * inner[:s].std()
        rows = table.sites
        assert all(site.active[role] > 0.9 for site, role in zip(rows.values(), ("m", "s1", "s1", "s2", "m", "m"), strict=True))
        assert max(site.active["random"] for site in rows.values()) < 0.2
        assert rows["blocks.1.attn.v"].active["m"] > 3
        assert looks_back(*(parts[site] for site in (q, k)))[0] > 0.8
        assert looks_back(*(weight(site) - parts[site] for site in (q, k)))[0] < 0.4
        accuracy = {change.name: change.accuracy for change in table.interventions}
        assert all(accuracy[f"{site} alone"] > 0.8 for site in rows)
        assert sum(accuracy[f"{site} removed"] < 0.5 for site in rows) >= 5
        assert all(accuracy[f"no position in the {place}"] < 0.2 for place in ("query at m", "key at s1"))
        """,
    "your-own-model": """
        assert right > 0.95 and table.metrics["recon"] < 0.05
        assert table.sites["q"].unique == table.sites["k"].unique == len(used) == 1 < table.sites["v"].unique
        assert (order > 0).all() or (order < 0).all()
        assert at[is_largest].mean() > 3 * at[~is_largest].mean()
        assert accuracy(keeping(1 - one)) < 0.5 < 0.9 < accuracy(keeping(one))
        assert page.is_file() and again.step == run.step
        """,
}
"""What a notebook's text says, asked of its kernel when it is through."""


def texts(cell: NotebookNode) -> list[str]:
    """What a code cell has shown, as text."""
    return [output["text"] if output.output_type == "stream" else str(dict(output.data)) for output in cell.outputs]


def kept(notebook: NotebookNode) -> NotebookNode:
    """A notebook as it is committed: what it showed, without timestamps and the log; prints of one cell in one piece."""
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
            shown = [output for output in cell.outputs if output.output_type != "stream"]
            cell.outputs = [*([nbformat.v4.new_output("stream", name="stdout", text=printed)] if printed else []), *shown]
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_finds_what_it_says(path: Path, tmp_path: Path, monkeypatch, pytestconfig: pytest.Config):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    before = sorted(EXAMPLES.rglob("*"))
    notebook = nbformat.read(path, 4)
    same_python = f"import sys\nassert sys.executable == {sys.executable!r}\n"
    notebook.cells.append(nbformat.v4.new_code_cell(same_python + dedent(CLAIMS[path.stem])))
    copy = tmp_path / path.name
    nbformat.write(notebook, copy)
    result = NotebookRun(copy, 3600).execute()
    assert result.error is None, result.error.trace
    assert (tmp_path / "runs").is_dir()
    assert sorted(EXAMPLES.rglob("*")) == before
    if pytestconfig.option.overwrite:
        result.nb.cells.pop()
        nbformat.write(kept(result.nb), path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_shows_what_it_did(path: Path):
    """It was run as a whole and without an error, says nothing of the machine, and is small."""
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" and output.get("name") != "stderr" for cell in code for output in cell.outputs)
    assert not re.search(r"/(home|root|tmp|work|usr)/|site-packages", "".join(text for cell in code for text in texts(cell)))
    assert path.stat().st_size < 300 * 1024


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebooks_text_names_what_exists(path: Path, capsys):
    notebook = nbformat.read(path, 4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    code = "\n".join("\n".join([cell.source, *texts(cell)]) for cell in notebook.cells if cell.cell_type == "code")
    main(["--help"])
    usage = capsys.readouterr().out
    for name in re.findall(r"`([^`]+)`", prose):
        if name.startswith("paramlens."):
            attribute = name.partition("(")[0].removeprefix("paramlens.")
            assert hasattr(importlib.import_module("paramlens"), attribute), name
        elif name.startswith("paramlens "):
            assert f"\n  {name.split()[1]} " in usage, name
        else:
            fields = [part for field in field_paths() for part in (field, field.rsplit(".", 1)[-1])]
            assert name in code or name in shipped_configs() or name in fields, name
    for link in re.findall(r"\]\(([^)#]+)", prose):
        assert (EXAMPLES / link).exists(), link
