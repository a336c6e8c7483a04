"""mypy over the package, and over code of a user."""

import os
import subprocess
import sys

from paths import ROOT


def run_mypy(*arguments, folder=ROOT):
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        ROOT / "pyproject.toml",
        "--cache-dir",
        ROOT / ".mypy_cache",
    ]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    run = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, env=environment)
    return [line for line in run.stdout.splitlines() if ": error: " in line], run.stdout + run.stderr


def test_the_package_is_clean():
    errors, output = run_mypy("-p", "capkit")
    assert errors == [] and "no issues found in" in output, output


def test_a_wrong_argument_of_a_user_is_refused(tmp_path):
    (tmp_path / "user.py").write_text(
        "import capkit\n"
        'capkit.load_clip("a", nonsense=3)\n'
        'capkit.Decoding(max_new_tokens="many")\n'
        'capkit.load_captioner().caption(capkit.load_clip("a"), "Why?", capkit.Decoding()).text.upper()\n'
    )
    errors, output = run_mypy("user.py", folder=tmp_path)
    assert len(errors) == 2 and '"nonsense"' in errors[0] and '"max_new_tokens"' in errors[1], output
