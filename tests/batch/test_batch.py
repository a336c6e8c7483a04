"""Batches of notebooks: tables checked before anything runs, and every run done once, whatever happens to it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import nbformat
import psutil
import pytest
import yaml
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from paths import NOTEBOOKS

import capkit
from capkit.batch import TableError, check_parameters, read_table, run_command, runs_to_do
from capkit.batch.index import write_index

PARAMETERS = 'videos: str = "clips"  # which\nbatch_size: int = 1\nlimit: Optional[int] = None'

TINY_PARAMETERS = """n: int = 1  # a number
word: str = "a"  # "#" in a text
how: str = ""  # what goes wrong
share: float = 0.5
opt: int | None = None
names: list = []
output_dir: str = "out"
anything = 1"""
TINY = """import os, signal, time, pathlib
folder = pathlib.Path(output_dir)
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "ran.txt", "a") as file:
    print(os.getpid(), file=file)
if how == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "wait":
    time.sleep(600)
if how == "raise" and not pathlib.Path("repaired").exists():
    raise ValueError(f"<b>no {word}</b>")"""


@pytest.fixture
def folder(tmp_path):
    """A folder with braces and a space in its name, and a notebook in it."""
    folder = tmp_path / "a {b} #c"
    folder.mkdir()
    write_notebook(folder / "tiny.ipynb")
    return folder


def write_notebook(path, code=TINY, parameters=TINY_PARAMETERS):
    cells = [
        new_markdown_cell("# What?"),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_code_cell(code),
        new_code_cell('print(f"{n} times <i>{word}</i>")', metadata={"tags": ["headline"]}),
    ]
    kernel = {"name": "gone", "display_name": "Gone", "language": "python"}  # as JupyterLab saves that of a conda env
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def table(folder, text, name="runs.yaml"):
    (folder / name).write_text(text)
    return folder / name


@pytest.fixture
def start():
    """Starts the command; what the test leaves of it is ended, and its runs end with it."""
    started = []

    def make(path, *arguments):
        command = [sys.executable, "-m", "capkit", "batch", path, *arguments]
        # A shell lets what it runs in the background ignore Ctrl-C, these tests too, and the command would inherit it.
        ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=ctrl_c))
        return started[-1]

    yield make
    for process in started:
        process.kill()


def wait_for(condition, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


class TestCheckParameters:
    def test_known_parameters_pass(self):
        check_parameters(["", PARAMETERS, "import capkit"])
        check_parameters(["", PARAMETERS, '# Parameters\nbatch_size = 4\nvideos = "a # b"\n', "import capkit"])

    def test_a_misspelt_one_is_named_with_the_one_that_was_meant(self):
        with pytest.raises(ValueError) as error:
            check_parameters(["", PARAMETERS, "# Parameters\nbatch_sise = 4\n", "import capkit"])
        assert "unknown parameter 'batch_sise'; did you mean 'batch_size'?" in str(error.value)
        assert "videos, batch_size, limit" in str(error.value)

    def test_whatever_else_was_run_before_does_no_harm(self):
        check_parameters(["", "!ls", "%matplotlib inline", PARAMETERS, "import capkit"])
        with pytest.raises(ValueError, match="unknown parameter 'x'; This notebook has: videos"):
            check_parameters(["", "!ls", PARAMETERS, "# Parameters\nx = 1"])

    def test_names_of_later_cells_are_not_parameters(self):
        check_parameters(["", PARAMETERS, "x = 1", "check_parameters(In)"])

    @pytest.mark.parametrize(
        "annotation, given, meant",
        [
            *(("bool", text, False) for text in ("false", "False", "FALSE", "no", "off")),
            *(("bool", text, True) for text in ("true", "yes", "on")),
            *(("int", given, 3) for given in ("3", " 3", "3.0", 3.0)),
            *(("float", given, 0.001) for given in ("1e-3", "0.001", "1.0e-3")),
            *(("int | None", given, None) for given in ("null", "None", "none", "")),
            *(("Optional[int]", given, 3) for given in ("3", 3)),
            *(("list", text, [text]) for text in ("Describe.", "Name: the colours", "no", "runs/a.jsonl")),
            ("list", '["a", b]', ["a", "b"]),
            ("list", "{temperature: 0.5}", [{"temperature": 0.5}]),
            ("list[str]", "a b", ["a b"]),
            ("list[int]", ["3", 4], [3, 4]),
            ("str", "caf\udce9.mp4", "caf\udce9.mp4"),  # a file name that is not UTF-8
            ("dict", "{max_new_tokens: 20}", {"max_new_tokens": 20}),
            *(("str", text, text) for text in ("false", "3", "None", "[a]")),
        ],
    )
    @pytest.mark.parametrize("by", ["papermill", "hand"])
    def test_text_with_one_sensible_meaning_is_converted(self, annotation, given, meant, by):
        cells = ["", f"x: {annotation} = 1  # help", f"# Parameters\nx = {given!r}\n", "import capkit"]
        if by == "hand":
            cells = ["", f"x: {annotation} = {given!r}  # help", "import capkit"]
        namespace = {"x": given}
        check_parameters(cells, namespace)
        assert namespace == {"x": meant} and type(namespace["x"]) is type(meant)
        if by == "papermill" and given != meant:
            with pytest.raises(ValueError, match=f"x: .* must be given as {re.escape(repr(meant))}"):
                check_parameters(cells)  # cannot put it back

    @pytest.mark.parametrize(
        "annotation, given, message",
        [
            ("int", "two", "x: 'two' is text, not int, such as 3"),
            ("int", "", "x: '' is text, not int, such as 3"),
            ("int", True, "x: True is true or false, not int, such as 3"),
            ("int", 2.5, "x: 2.5 is a number, not int, such as 3"),
            ("int", float("nan"), "x: nan is a number, not int"),
            ("bool", "maybe", "x: 'maybe' is text, not bool, such as true"),
            ("bool", 0, "x: 0 is a whole number, not bool, such as true"),
            ("float", "fast", "x: 'fast' is text, not float, such as 0.5"),
            ("str", 2024, 'x: 2024 is a whole number, not str, such as "text"; to pass text, put it in quotes, or use'),
            ("str", None, 'x: None is empty, not str, such as "text"'),
            ("str", ["a"], "x: ['a'] is a list, not str"),
            ("list", 3, 'x: 3 is a whole number, not list, such as ["one", "two"]'),
            ("list", "[a", "x: '[a' is text, not list, such as"),
            ("dict", "x", "x: 'x' is text, not dict, such as {\"name\": 3}"),
            ("int | None", "x", "x: 'x' is text, not int or None, such as 3"),
            ("int", "1_0", "x: '1_0' is text, not int, such as 3"),
            ("list[str]", [5], 'x[0]: 5 is a whole number, not str, such as "text"'),
            ("list[str]", ["a", None], "x[1]: None is empty, not str"),
            ("list[str]", "[a, 1]", "x[1]: 1 is a whole number, not str"),
            ("list[int]", ["3", "two"], "x[1]: 'two' is text, not int, such as 3"),
            ("str", "a\0b", "x: 'a\\x00b' has a NUL or half a character in it"),
            ("str", "\ud83d", "x: '\\ud83d' has a NUL or half a character in it"),
            ("list", ["a", {"b": "\0"}], "x: ['a', {'b': '\\x00'}] has a NUL"),
            ("dict", {"\ud83d": 1}, "x: {'\\ud83d': 1} has a NUL or half a character"),
        ],
    )
    def test_a_value_of_another_type_is_named_with_an_example(self, annotation, given, message):
        namespace = {"x": given}
        with pytest.raises(ValueError, match=re.escape(message)):
            check_parameters(["", f"x: {annotation} = 1", "import capkit"], namespace)


class TestReadTable:
    def test_lists_grids_and_what_holds_for_all(self, folder):
        path = table(
            folder,
            "notebook: tiny.ipynb\n"
            "output_dir: ../results\n"
            "workers: 3\n"
            "parameters: {word: x, n: 5}\n"
            "runs:\n"
            "  - grid: {n: [1, 2], names: [[], [a]]}\n"
            "  - {name: own, parameters: {word: y}}\n"
            "  - {name: both, grid: {word: [p, q]}}\n"
            "  - {parameters: {opt: null, share: 1}}\n",
        )
        found = read_table(path)
        assert [run.name for run in found.runs] == [
            *("tiny-n=1-names=", "tiny-n=1-names=a", "tiny-n=2-names=", "tiny-n=2-names=a"),
            *("own", "both-word=p", "both-word=q", "tiny-opt=null-share=1"),
        ]
        assert found.runs[1].parameters == {"word": "x", "n": 1, "names": ["a"]}
        assert found.runs[4].parameters == {"word": "y", "n": 5}
        assert found.workers == 3 and found.output_dir.resolve() == folder.parent / "results"
        assert all(run.notebook == folder / "tiny.ipynb" for run in found.runs)

    def test_a_bare_list_and_one_grid_alone(self, folder):
        assert len(read_table(table(folder, "- notebook: tiny.ipynb\n")).runs) == 1
        assert len(read_table(table(folder, "notebook: tiny.ipynb\ngrid: {n: [1, 2], word: [a, b]}\n")).runs) == 4
        assert read_table(table(folder, "- notebook: tiny.ipynb\n", "some.yaml")).output_dir == folder / "some"

    def test_csv_text_stays_text_and_blanks_are_defaults(self, folder):
        path = table(
            folder,
            'notebook,name,word,n,names,share\ntiny.ipynb,one,007,3,"[1, b]",\ntiny.ipynb,,"yes, no",,,1.0e-3\n',
            "a.csv",
        )
        one, other = read_table(path).runs
        assert one.name == "one" and one.parameters == {"word": "007", "n": 3, "names": [1, "b"]}
        assert other.name == "tiny-word=yes,_no-share=0.001" and other.parameters == {"word": "yes, no", "share": 0.001}

    def test_names_stay_when_others_come_and_are_told_apart(self, folder):
        long = "Describe the clip at length, " * 9
        texts = f"notebook: tiny.ipynb\ngrid: {{word: [a, A, '{long}1', '{long}2']}}\n"
        names = [run.name for run in read_table(table(folder, texts)).runs]
        assert len({name.casefold() for name in names}) == 4 and all(len(name) < 80 for name in names)
        more = texts.replace("[a,", "[new, a,")
        assert [run.name for run in read_table(table(folder, more)).runs][1:] == names

    def test_the_fingerprint_is_of_code_and_parameters_alone(self, folder):
        path = table(folder, "notebook: tiny.ipynb\nparameters: {n: 2}\n")
        before = read_table(path).runs[0].fingerprint
        notebook = nbformat.read(folder / "tiny.ipynb", 4)
        notebook.cells[2].execution_count = 7  # opened and saved
        nbformat.write(notebook, folder / "tiny.ipynb")
        assert read_table(path).runs[0].fingerprint == before
        write_notebook(folder / "tiny.ipynb", TINY + "\n1")
        assert read_table(path).runs[0].fingerprint != before

    def test_all_problems_are_told_at_once(self, folder):
        (folder / "text.ipynb").write_text("no notebook")
        write_notebook(folder / "magic.ipynb", parameters="%time\nx = 1")
        path = table(
            folder,
            "parameters: {nn: 1}\n"
            "runs:\n"
            "  - {notebook: tiny.ipynb, parameters: {wrd: x, n: 'three', share: fast, word: [a, b], opt: x}}\n"
            "  - {notebook: tiny.ipynb, parameters: {word: yes, n: true, names: 2026-01-01}}\n"
            "  - {notebok: tiny.ipynb}\n"
            "  - {notebook: gone.ipynb}\n"
            "  - {notebook: gone.ipynb}\n"
            "  - {notebook: text.ipynb}\n"
            "  - {notebook: magic.ipynb}\n"
            "  - {notebook: tiny.ipynb, name: a/b}\n"
            "  - {notebook: tiny.ipynb, grid: {n: []}}\n"
            "  - {notebook: tiny.ipynb, grid: {n: [1]}, parameters: {n: 2}}\n",
        )
        with pytest.raises(TableError) as error:
            read_table(path)
        for message in (
            "run 1: unknown parameter 'wrd'; did you mean 'word'? tiny.ipynb has: n, word, how",
            "run 1: unknown parameter 'nn'; did you mean 'n'?",
            "run 1: n: 'three' is text, not int, such as 3",
            "run 1: share: 'fast' is text, not float, such as 0.5",
            "run 1: word: ['a', 'b'] is a list, not str, such as \"text\"; in a table, several values",
            "run 1: opt: 'x' is text, not int or None",
            'run 2: word: True is true or false, not str, such as "text"; to pass text, put it in quotes',
            "run 2: n: True is true or false, not int",
            "run 2: names: datetime.date(2026, 1, 1) cannot be passed to a notebook",
            "run 3: unknown key 'notebok'; did you mean 'notebook'?",
            "run 3: has no notebook",
            "gone.ipynb: no such file",
            "text.ipynb: cannot be read as a notebook",
            "magic.ipynb: its parameters cell is not plain Python",
            "run 8: name: 'a/b' must be text that can name a folder",
            "run 9: grid: {'n': []} must be a mapping of parameters to lists of values, none of them empty",
            "run 10: 'n' is both in parameters and in grid",
        ):
            assert message in str(error.value)
        assert sum("gone.ipynb" in problem for problem in error.value.problems) == 1

    @pytest.mark.parametrize(
        "text, message",
        [
            ("", "must be a list of runs, or a mapping"),
            ("[", "cannot be read as a table of runs"),
            ("runs: []", "has no runs"),
            ("runs: {a: 1}", "runs: {'a': 1} must be a list of mappings"),
            ("worker: 2\nnotebook: tiny.ipynb", "unknown key 'worker'; did you mean 'workers'?"),
            ("workers: 0\nnotebook: tiny.ipynb", "workers: 0 must be a whole number of at least 1"),
            ("time_limit_minutes: -1\nnotebook: tiny.ipynb", "time_limit_minutes: -1 must be a number above 0"),
            ("parameters: [n]\nnotebook: tiny.ipynb", "parameters: ['n'] must be a mapping"),
            (
                f"notebook: tiny.ipynb\ngrid: {{n: {[*range(3000)]}, share: {[*range(2000)]}}}",
                "run 1: its grid is 3000 x 2000 = 6,000,000 runs; a table may have 10,000: give fewer values",
            ),
            (
                f"notebook: tiny.ipynb\nruns: {[{'grid': {'n': [*range(i, i + 100)]}} for i in range(0, 10_100, 100)]}",
                "run 101: its grid is 100 = 100 runs, of 10,100 in the table; a table may have 10,000",
            ),
            ("notebook: tiny.ipynb\ngrid: {n: [1, 1]}", "the same run occurs more than once"),
            ("notebook: tiny.ipynb\ngrid: {n: [1, 2]}\nparameters: {output_dir: o}", "would both write into"),
        ],
    )
    def test_tables_that_make_no_sense(self, folder, text, message, capsys):
        path = table(folder, text)
        with pytest.raises(TableError) as error:
            read_table(path)
        assert message in str(error.value) and str(path) in str(error.value)
        assert run_command(path) == 2 and message in capsys.readouterr().err
        assert not path.with_suffix("").exists()  # nothing was begun

    def test_a_table_that_is_not_there_and_csv_that_is_torn(self, folder):
        with pytest.raises(TableError, match="No such file"):
            read_table(folder / "gone.yaml")
        with pytest.raises(TableError, match="more fields than there are columns"):
            read_table(table(folder, "notebook,n\ntiny.ipynb,1,2\n", "a.csv"))

    def test_the_example_tables_are_sound(self):
        found = read_table(NOTEBOOKS / "runs" / "batch_example.yaml")
        assert len(found.runs) >= 3 and {run.notebook.resolve().parent for run in found.runs} == {NOTEBOOKS}


class TestRun:
    def test_two_commands_at_once_do_each_run_once_and_later_ones_what_is_missing(self, folder, start, capsys):
        path = table(
            folder,
            "notebook: tiny.ipynb\nparameters: {word: '{x}'}\nruns:\n  - {name: good, parameters: {n: 2}}\n"
            "  - {name: bad, parameters: {how: raise}}\n  - {name: dead, parameters: {how: die}}\n",
        )
        batch, out = read_table(path), folder / "runs"
        (out / "good").mkdir(parents=True)
        with FileLock(out / ".good.capkit-lock"):  # as a third command would hold it
            both = [start(path), start(path)]
            wait_for(lambda: batch.runs[1].read_status()["status"] == "failed")
        shown = [process.communicate(timeout=300)[0] for process in both]
        assert [process.returncode for process in both] == [1, 1]
        for text in shown:
            assert "good: another command is running it; waiting" in text and "2 failed: bad, dead" in text
            assert re.search(r"good: done after [\d.]+ s: 2 times <i>{x}</i>", text)
        good, bad, dead = (run.read_status() for run in batch.runs)
        assert (good["status"], good["headline"]) == ("done", "2 times <i>{x}</i>")
        assert (bad["status"], bad["error"]) == ("failed", "cell 3: ValueError: <b>no {x}</b>")
        assert dead["status"] == "failed" and dead["error"].startswith("the kernel died in code cell 3: crashed, or")
        for name in ("good", "bad", "dead"):
            assert {file.name for file in (out / name).iterdir()} == {
                *("log.txt", "results", "status.json", "tiny.html", "tiny.ipynb")
            }
            assert (out / name / "results" / "ran.txt").read_text().count("\n") == 1
        executed = nbformat.read(out / "bad" / "tiny.ipynb", 4)
        assert any(output.get("ename") == "ValueError" for cell in executed.cells for output in cell.get("outputs", []))
        assert "Not run to its end" in (out / "dead" / "tiny.html").read_text()
        assert "no {x}" in (out / "bad" / "log.txt").read_text()
        page = (out / "index.html").read_text()
        assert "2 times &lt;i&gt;{x}&lt;/i&gt;" in page and "<i>" not in page and "<script" not in page
        assert 'href="good/tiny.html"' in page and 'href="dead/log.txt"' in page and "1 done, 2 failed" in page

        (folder / "repaired").touch()
        assert run_command(path) == 1 and "3 runs, 0 to do, 1 done before, 2 failed before" in capsys.readouterr().out
        assert run_command(path, retry=["bad", "good"]) == 1  # dead is still failed
        assert "3 runs, 1 to do" in capsys.readouterr().out and batch.runs[1].read_status()["status"] == "done"
        assert (out / "good" / "results" / "ran.txt").read_text().count("\n") == 1
        assert [run.name for run in runs_to_do(batch, retry=[])] == ["dead"]

        changed = table(folder, path.read_text().replace("n: 2", "n: 3"))
        assert [run.name for run in runs_to_do(read_table(changed))] == ["good"]
        assert run_command(path, retry=["goof"]) == 2 and "did you mean 'good'?" in capsys.readouterr().err

    def test_what_is_killed_or_stopped_leaves_nothing_running_and_goes_on_later(self, folder, start):
        path = table(folder, "notebook: tiny.ipynb\nparameters: {how: wait}\nruns: [{name: a}, {name: b}]\n")
        batch = read_table(path)
        a, b = batch.runs
        ran = [folder / "runs" / name / "results" / "ran.txt" for name in "ab"]
        process = start(path, "--workers", "2")
        wait_for(lambda: all(file.exists() and file.read_text().endswith("\n") for file in ran))
        os.kill(a.read_status()["process"], signal.SIGKILL)
        wait_for(lambda: a.read_status()["status"] == "failed")
        since = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert "b: interrupted" in process.communicate(timeout=300)[0] and process.returncode == 130
        assert time.monotonic() - since < 10  # two on a machine with nothing else to do
        assert "its process ended with signal 9 before it could say why" in a.read_status()["error"]
        assert (
            b.read_status()["status"] == "interrupted"
            and "1 interrupted" in (folder / "runs" / "index.html").read_text()
        )
        assert [run.name for run in runs_to_do(batch)] == ["b"]

        process = start(path)
        wait_for(lambda: ran[1].read_text().count("\n") == 2)
        process.kill()  # no chance to end its run
        process.communicate()
        wait_for(lambda: b.read_status()["status"] == "interrupted")
        kernels = [int(line) for file in ran for line in file.read_text().split()]
        assert len(kernels) == 3
        wait_for(lambda: not any(map(psutil.pid_exists, kernels)))

    def test_a_kernel_that_dies_at_its_start(self, folder, monkeypatch, capsys):
        spec = folder / "jupyter" / "kernels" / "python3"
        spec.mkdir(parents=True)
        argv = [sys.executable, "-c", "raise SystemExit('no kernel today')", "{connection_file}"]
        (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "x", "language": "python"}))
        monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        path = table(folder, "- {notebook: tiny.ipynb, name: one}\n")
        assert run_command(path) == 1
        assert "Kernel died" in capsys.readouterr().out
        assert "no kernel today" in (folder / "runs" / "one" / "log.txt").read_text()

    def test_a_run_past_its_time_limit(self, folder):
        path = table(folder, "notebook: tiny.ipynb\nparameters: {how: wait}\ntime_limit_minutes: 0.02\n")
        assert run_command(path) == 1
        batch = read_table(path)
        assert "stopped after 0.02 minutes, its time limit" in batch.runs[0].read_status()["error"]

    def test_notebook_01_with_the_example_parameters(self, folder, capsys):
        parameters = yaml.safe_load((NOTEBOOKS / "runs" / "example.yaml").read_text())
        del parameters["output_dir"]  # then it is `results` in the run's folder
        parameters |= {"limit": 1, "decoding": {"max_new_tokens": 4}}
        runs = {"notebook": str(NOTEBOOKS / "01_caption_clips.ipynb"), "parameters": parameters}
        path = table(folder, yaml.safe_dump({"runs": [runs | {"name": "captions"}]}))
        assert run_command(path) == 0
        message = "1 caption, 0 errors, 1 cut off by max_new_tokens, mean log-probability a token -"
        assert message in capsys.readouterr().out and message in (folder / "runs" / "index.html").read_text()
        (record,) = capkit.CaptionStore(folder / "runs" / "captions" / "results" / "captions.jsonl").current()
        assert record["status"] == "ok" and record["num_tokens"] == 4

    def test_files_beside_the_table_are_no_modules(self, folder, capsys):
        """Relative paths begin there, but neither capkit, papermill nor a notebook imports from there."""
        for name in ("papermill", "ipykernel_helper", "colorsys"):
            (folder / f"{name}.py").write_text("raise SystemExit('imported from the folder of the table')")
        code = "import colorsys, importlib.util, pathlib\nassert importlib.util.find_spec('ipykernel_helper') is None"
        write_notebook(folder / "tiny.ipynb", f"{code}\nassert pathlib.Path('colorsys.py').exists()")
        assert run_command(table(folder, "- {notebook: tiny.ipynb, name: one}\n")) == 0, capsys.readouterr().out

    def test_a_dry_run_starts_nothing_and_workers_are_checked(self, folder, capsys):
        path = table(folder, "notebook: tiny.ipynb\ngrid: {n: [1, 2]}\n")
        assert run_command(path, dry_run=True) == 0
        assert 'tiny-n=2: {"n": 2}' in capsys.readouterr().out and not (folder / "runs").exists()
        assert run_command(path, workers=0) == 2

    def test_a_run_that_was_tried_with_other_parameters_or_left_a_torn_status(self, folder):
        path = table(folder, "notebook: tiny.ipynb\nruns: [{name: a}, {name: b}]\n")
        batch = read_table(path)
        for name, text in (("a", '{"fingerprint": "other", "status": "done"}'), ("b", '{"fingerpr')):
            (folder / "runs" / name).mkdir(parents=True)
            (folder / "runs" / name / "status.json").write_text(text)
        assert [run.read_status()["status"] for run in batch.runs] == ["changed", "not run"]
        assert runs_to_do(batch) == list(batch.runs) and runs_to_do(batch, retry=[]) == []
        assert "1 changed, 1 not run" in write_index(batch).read_text()

    def test_an_output_folder_that_cannot_be_made(self, folder, capsys):
        path = table(folder, "notebook: tiny.ipynb\n")
        (folder / "file").touch()
        assert run_command(path, output_dir=folder / "file") == 2
        assert re.search("output_dir='.*file': no folder to write into: it is a file", capsys.readouterr().err)
