"""Parameters of the notebooks: what papermill's command passes is taken for what it means, or refused in time."""

import inspect
import subprocess
import sys

import pytest
from notebook_runner import NOTEBOOK_PATHS

import capkit
from capkit.batch.parameters import code_cells, parameter_annotations
from capkit.export import EXPORT_OPTIONS, export_dataset
from capkit.runs import find_clips


def find(name):
    (path,) = [path for path in NOTEBOOK_PATHS if path.stem.startswith(name)]
    return path


def execute_here(name, **parameters):
    """Execute a notebook's code in this process, with parameters as papermill injects them; raises its first error."""
    first, *others = [cell["source"] for cell in code_cells(find(name))]
    injected = "# Parameters\n" + "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    namespace = {"In": ["", first, injected], "display": print}
    for source in (first, injected, *others):
        exec(source, namespace)


def test_notebook_05_takes_every_argument_of_an_export():
    arguments = inspect.signature(export_dataset).parameters.keys() - {"stores", "layout", "output_dir"}
    parameters = parameter_annotations(code_cells(find("05"))[0]["source"])
    assert {*EXPORT_OPTIONS} <= arguments and arguments - parameters.keys() == {*EXPORT_OPTIONS}


@pytest.mark.parametrize(
    "name, parameters, message",
    [
        ("01", {"limit": "two"}, "limit: 'two' is text, not int, such as 3"),
        ("01", {"limit": -1}, "limit=-1"),
        ("01", {"output_dir": 2024}, "output_dir: 2024 is a whole number, not str"),
        ("01", {"output_dir": "file"}, "output_dir='file': no folder to write into: it is a file"),
        ("01", {"batch_size": 0}, "batch_size must be a whole number, at least 1"),
        ("01", {"parts": {"window": 3}}, "unknown {'window'}; there are window_seconds, shots, trainer, num_frames"),
        ("01", {"parts": {"num_frames": 9}}, "num_frames=9: no effect without a trainer"),
        ("01", {"parts": {"window_seconds": "3"}}, "window_seconds='3': must be a positive number"),
        ("01", {"parts": {"trainer": "sat", "num_frames": 0}}, "num_frames must be a whole number, at least 1"),
        ("01", {"parts": {"trainer": "sat", "stride": 2}}, "stride=2: has no effect on 'sat'"),
        ("05", {"options": {"trainer": {"num_frames": 50}}}, "num_frames=50: 'cogvideo' takes only 8 N + 1"),
        ("05", {"options": {"cuts": "encode"}}, "unknown {'cuts'}; there are leave_out, trainer, cut, crf, several"),
        ("05", {"options": {"cut": "copy"}}, "cut='copy': must be one of '', 'encode'"),
        ("05", {"options": {"seed": "one"}}, "seed='one': must be a whole number"),
        ("05", {"options": {"empty_share": "half"}}, "empty_share='half': must be at least 0 and below 1"),
        ("05", {"options": {"several": "no"}}, "several='no': must be true or false"),
        (
            "01",
            {"parts": {"window_seconds": 1e-7}},
            "window_seconds=1e-07: must be a positive number of seconds",
        ),
        (
            "01",
            {"parts": {"trainer": ""}},
            "['trainer'] without a value: give one, or leave it out",
        ),
        ("01", {"parts": {"window_seconds": None}}, "['window_seconds'] without a value"),
        ("01", {"parts": {"shots": "yes"}}, "shots='yes': must be true or false"),
        ("01", {"parts": {"shots": True, "trainer": "sat"}}, "shots and trainer are both set"),
        ("01", {"output_dir": "a\0b"}, "output_dir: 'a\\x00b' has a NUL or half a character in it"),
        ("01", {"output_dir": "\ud800"}, "output_dir: '\\ud800' has a NUL or half a character in it"),
        ("01", {"videos": ["demo", "\ud800"]}, "videos: ['demo', '\\ud800'] has a NUL or half"),
        ("01", {"quantization": "5bit"}, "quantization='5bit'"),
        ("01", {"decoding": {"max_new_tokens": "3"}}, "max_new_tokens='3': must be a whole number"),
        ("02", {"look_at": 5, "limit": 1}, "look_at=5: there are not so many captions"),
        ("02", {"order_by": "mean_logprb"}, "order_by='mean_logprb': no record has it; there are request, video"),
        ("02", {"prompts": [5]}, "prompts[0]: 5 is a whole number, not str"),
        (
            "02",
            {"frame_sampling": {"strategy": "chat", "frames_per_second": 2.0}},
            "frames_per_second has no effect with strategy 'chat'",
        ),
        ("02", {"prompt_options": {"frame_number": "seconds"}}, "frame_number"),
        ("02", {"store": "gone.jsonl"}, "store='gone.jsonl': no such file"),
        (
            "03",
            {"measure": "suport"},
            "measure='suport': must be one of supported_words, support, agreement",
        ),
        ("03", {"measure": "chrf"}, "measure='chrf': must be one of"),  # the clips have no references
        ("03", {"captions_elsewhere": {"other": "gone.csv"}}, "gone.csv: cannot be read as captions"),
        ("03", {"captions_elsewhere": {"other": 3}}, "3: must be the name of a file"),
        ("03", {"num_samples": 0}, "num_samples=0"),
        ("03", {"templates": "poem"}, "template='poem'"),
        ("04", {"output_dir": "file/out"}, "output_dir='file/out': no folder to write into"),
        ("05", {"layout": "cogvide"}, "layout='cogvide': must be one of 'cogvideo'"),
        ("05", {"cleaning": "nfd"}, "cleaning=['nfd']: must be of 'nfc'"),
        ("05", {"choose": "newest"}, "choose='newest': must be 'edited', 'latest'"),
        ("05", {"stores": [5]}, "stores[0]: 5 is a whole number, not str"),
        ("05", {"stores": [""]}, "store='': names no file; give one, such as"),
        ("05", {"cleaning": [5]}, "cleaning[0]: 5 is a whole number, not str"),
        ("05", {"trigger_word": "\ud800"}, "trigger_word: '\\ud800' has a NUL or half a character"),
        ("05", {"export_dir": "file"}, "file is a file"),
        ("05", {"export_dir": 2024}, "export_dir: 2024 is a whole number, not str"),
        ("05", {"options": {"tokenizer": "gone"}}, "gone is no folder with a T5 tokenizer's files"),
        ("05", {"on_too_long": "cut"}, "on_too_long='cut': must be one of"),
        ("05", {"clips": "move"}, "clips='move': must be one of"),
        ("05", {"overwrite": "maybe"}, "overwrite: 'maybe' is text, not bool, such as true"),
        ("06", {"parts": "sweep"}, "parts: unknown {'sweep'}; choose from reading"),
        ("06", {"output_dir": "file"}, "no folder to write into"),
        ("06", {"results_file": "gone.json"}, "gone.json: not results"),
        ("07", {"num_evaluated": 0}, "num_evaluated must be a whole number, at least 1"),
        ("07", {"steps": -1}, "steps must be a whole number, at least 1"),
        ("07", {"learning_rate": "nan"}, "learning_rate must be a positive number"),
        ("07", {"num_workers": 0}, "num_workers must be a whole number, at least 1"),
        ("07", {"output_dir": "file"}, "no folder to write into"),
    ],
)
def test_wrong_values_are_errors_before_a_model_is_loaded(tmp_path, monkeypatch, name, parameters, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    model = {"06": {}, "07": {"start_from": "no/such/model"}}.get(name, {"model": "no/such/model"})
    with pytest.raises(ValueError) as error:
        execute_here(name, **model, **parameters)
    assert message in str(error.value)


def test_measures_that_are_accepted_are_columns_of_the_notebook(executed):
    """`check_comparison` accepts what the table of notebook 03 then has."""
    import pandas as pd

    folder, _, _ = executed("03")
    cells = pd.read_csv(folder / "runs" / "sweep" / "cells.csv")
    plan = capkit.plan_sweep(find_clips("demo", 1))
    with pytest.raises(ValueError) as error:
        capkit.sweep.check_comparison(plan, "", {})
    measures = str(error.value).partition("one of ")[2].split(", ")
    assert {"support", "num_words"} < set(measures) <= set(cells.columns)


def papermill(name, folder, *arguments):
    command = [sys.executable, "-m", "papermill", find(name), "out.ipynb", "-k", "python3", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


class TestPapermillCommand:
    def test_text_for_lists_dictionaries_and_numbers(self, tmp_path):
        texts = ("-p", "prompts", "Describe.", "-p", "decoding", "{max_new_tokens: 4}", "-p", "order_by", "video")
        run = papermill("02", tmp_path, *texts, "-r", "limit", "1", "-r", "output_dir", "2024")
        assert run.returncode == 0, run.stderr
        (record,) = capkit.CaptionStore(tmp_path / "2024" / "captions.jsonl").current()
        assert (record["prompt"], record["num_tokens"]) == ("Describe.", 4)

    def test_no_is_not_true(self, tmp_path):
        (tmp_path / "clip.mp4").touch()  # an error, which is tried again only on request
        for answer, num_lines in (("no", 1), ("no", 1), ("yes", 2)):
            settings = ("-p", "videos", "clip.mp4", "-p", "output_dir", "out", "-p", "retry_errors", answer)
            assert papermill("01", tmp_path, *settings).returncode == 0
            assert len(capkit.CaptionStore(tmp_path / "out" / "captions.jsonl").lines()) == num_lines

    def test_false_does_not_overwrite(self, tmp_path):
        assert papermill("05", tmp_path, "-p", "limit", "1").returncode == 0
        captions = tmp_path / "runs" / "export" / "cogvideo" / "prompts.txt"
        before = captions.read_text()
        again = papermill("05", tmp_path, "-p", "limit", "1", "-p", "trigger_word", "ZORP", "-p", "overwrite", "false")
        assert again.returncode == 1 and "holds other captions; choose another folder" in again.stderr
        assert captions.read_text() == before
