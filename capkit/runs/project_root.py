"""Where relative paths begin in notebooks that a person runs."""

from __future__ import annotations

import os
from pathlib import Path

from capkit.console import is_interactive


def enter_project_root() -> None:
    """Make the clone's root the working directory of a notebook that a person runs in JupyterLab or VS Code.

    Both start kernels in the notebook's own folder; papermill starts them in the folder that it is called from, usually
    the root. With this, relative paths mean the same in both. Under papermill, nbconvert and the batch command nothing
    changes, nor outside a clone of capkit.
    """
    if not is_interactive():
        return
    current = Path.cwd()
    for folder in (current, *current.parents):
        if (folder / "capkit" / "__init__.py").is_file() and (folder / "notebooks").is_dir():
            if folder != current:
                os.chdir(folder)
                print(f"relative paths begin at {folder}")
            return
