"""Executing the notebooks as papermill does."""

import papermill
from paths import NOTEBOOKS

NOTEBOOK_PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
FAST = {"decoding": {"max_new_tokens": 8}}


def run(name, tmp_path, **parameters):
    """Execute a notebook headless; returns it, and all that it printed and showed as text."""
    (source,) = [path for path in NOTEBOOK_PATHS if path.stem.startswith(name)]
    done = papermill.execute_notebook(
        str(source), str(tmp_path / "out.ipynb"), parameters, kernel_name="python3", progress_bar=False, cwd=tmp_path
    )
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.get("text", "") + "".join(map(str, output.get("data", {}).values())) for output in outputs]
    return done, "\n".join(texts)
