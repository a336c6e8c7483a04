"""Notebooks run by hand and saved: what they showed is there without a kernel and without scripts."""

import re

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from notebook_runner import NOTEBOOK_PATHS
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook


class ByHand(NotebookClient):
    """Executes a notebook as JupyterLab does: a person could be asked for input."""

    async def async_start_new_kernel_client(self):
        client = await super().async_start_new_kernel_client()
        client.allow_stdin = True
        return client


@pytest.fixture(scope="module")
def execute(tmp_path_factory):
    def run(*sources):
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        notebook = nbformat.v4.new_notebook(cells=cells)
        folder = tmp_path_factory.mktemp("saved")
        ByHand(notebook, resources={"metadata": {"path": folder}}).execute()
        return notebook

    return run


def without_scripts(notebook):
    """As HTML of a notebook that Lab has saved: without the state of widgets."""
    saved = nbformat.from_dict(notebook)
    saved.metadata.pop("widgets", None)
    html, _ = HTMLExporter().from_notebook_node(saved)
    return re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)


def test_a_progress_bar_is_one_output_that_stays_at_its_end(execute):
    bar = "for _ in progress_bar()(range(20), desc='clips'): pass"
    stopped = "for number in progress_bar()(range(20), desc='stopped'):\n    if number == 7: break"
    notebook = execute(f"from capkit.console import progress_bar\n{bar}", stopped)
    for cell, text in zip(notebook.cells, (r"clips: 100%\|.*\| 20/20", r"stopped: +35%\|.*\| 7/20"), strict=True):
        (output,) = cell.outputs
        assert set(output.data) == {"text/plain"} and re.match(text, output.data["text/plain"])
    assert "20/20" in without_scripts(notebook)


def test_a_table_to_browse_is_saved_as_it_was_filtered_last(execute):
    notebook = execute(
        "import time, pandas as pd\nfrom capkit.playground import browse\n"
        "panel = browse(pd.DataFrame({'cell': ['alpha', 'beta'], 'words': [1, 2]}))\npanel",
        "panel.children[0].children[2].value = 'BETA'\ntime.sleep(3)",
    )
    widget, twin = notebook.cells[0].outputs
    assert "application/vnd.jupyter.widget-view+json" in widget.data
    html = twin.data["text/html"]
    assert "beta" in html and "alpha" not in html and "BETA" in html
    saved = without_scripts(notebook)
    assert html in saved and "VBox(" not in saved
    (name,) = re.findall('class="(capkit-kept-[0-9a-f]+)"', html)  # a live page hides the twin by a style in the widget
    assert f".{name} {{ display: none }}" in str(notebook.metadata.widgets) and f".{name} {{" not in saved


SHORT = {"decoding": {"max_new_tokens": 6}, "limit": 2}
AXES = {"prompts": ["default", "sentence"], "decodings": [{"max_new_tokens": 6}], "limit": 2, "measure": "num_words"}


@pytest.mark.parametrize(
    "name, parameters, num_twins",
    [("01", SHORT, 0), ("02", SHORT | {"num_to_mark": 2}, 2), ("03", AXES, 1), ("04", {"limit": 1}, 1), ("05", {}, 0)],
)
def test_a_notebook_run_by_hand_keeps_all_that_it_showed(tmp_path, name, parameters, num_twins):
    (path,) = [path for path in NOTEBOOK_PATHS if path.stem.startswith(name)]
    notebook = parameterize_notebook(load_notebook_node(str(path)), parameters)
    ByHand(notebook, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    shown = [output.data for output in outputs if "data" in output]
    assert sum("application/vnd.jupyter.widget-view+json" in data for data in shown) == num_twins
    assert sum("capkit-kept" in data.get("text/html", "") for data in shown) == num_twins
    html = without_scripts(notebook)
    pictures = sum(data.get("text/html", "").count("<img ") + ("image/png" in data) for data in shown)
    assert html.count("<img ") == pictures >= 1
    assert html.count("<table") == sum(data.get("text/html", "").count("<table") for data in shown)
    assert "%|" not in html.replace("100%|", "") and "VBox(" not in html
