"""Every notebook: its form, and run as papermill runs it."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import yaml
from nbclient import NotebookClient
from notebook_runner import FAST, NOTEBOOK_PATHS, run
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from video_factory import encode_clip

import capkit


@pytest.mark.parametrize("path", NOTEBOOK_PATHS, ids=lambda path: path.stem)
class TestForm:
    def test_is_committed_clean(self, path):
        notebook = nbformat.read(path, 4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in code)
        assert "papermill" not in notebook.metadata
        assert (notebook.metadata.kernelspec.name, notebook.metadata.kernelspec.language) == ("python3", "python")
        assert len(code) <= 20
        for cell in code:  # parameters are a table, not code to follow
            assert len(cell.source.splitlines()) <= 15
        assert not any(re.search(r"sys\.path|^!|^%pip", cell.source, re.M) for cell in code)
        sources = "\n".join(cell.source for cell in code)
        assert sources.count("\ncheck_parameters(In, globals())") == sources.count("\nenter_project_root()") == 1
        titles = re.findall(r"^# .*", "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown"), re.M)
        assert len(titles) == 1 and titles[0].endswith("?")

    def test_parameters_are_all_seen_by_papermill(self, path):
        (cell,) = [cell for cell in nbformat.read(path, 4).cells if "parameters" in cell.metadata.get("tags", [])]
        seen = papermill.inspect_notebook(str(path))
        lines = cell.source.splitlines()
        assert list(seen) == [line.split(":")[0] for line in lines]
        assert all(parameter["help"] and parameter["inferred_type_name"] != "None" for parameter in seen.values())


class ByHand(NotebookClient):
    """Executes a notebook as JupyterLab does: a person could be asked for input."""

    async def async_start_new_kernel_client(self):
        client = await super().async_start_new_kernel_client()
        client.allow_stdin = True
        return client


@pytest.fixture
def clone(tmp_path):
    """A folder laid out as a clone of capkit, so that nothing is written into the real one."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "capkit").symlink_to(Path(capkit.__file__).parent)
    return tmp_path


class TestWorkingDirectory:
    """JupyterLab and VS Code start a kernel in the notebook's folder, papermill where it is called."""

    def test_by_hand_results_are_where_papermill_puts_them_at_the_root(self, clone):
        notebook = parameterize_notebook(load_notebook_node(str(NOTEBOOK_PATHS[0])), FAST | {"limit": 1})
        ByHand(notebook, resources={"metadata": {"path": clone / "notebooks"}}).execute()
        assert len(capkit.CaptionStore(clone / "runs" / "captions" / "captions.jsonl").current()) == 1
        assert not (clone / "notebooks" / "runs").exists()
        outputs = str([cell.get("outputs") for cell in notebook.cells])
        assert f"relative paths begin at {clone}" in outputs
        assert str(clone / "runs" / "captions" / "captions.jsonl") in outputs

    @pytest.mark.parametrize(
        "client, start, expected",
        [
            (ByHand, "notebooks/mine", "."),
            (ByHand, ".", "."),
            (ByHand, "..", ".."),
            (NotebookClient, "notebooks", "notebooks"),
        ],
    )
    def test_only_a_person_in_a_clone_is_moved_to_its_root(self, clone, client, start, expected):
        folder = clone / start
        folder.mkdir(exist_ok=True)
        lines = ("from capkit.runs import enter_project_root", "enter_project_root()", "import os; print(os.getcwd())")
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("\n".join(lines))])
        client(notebook, resources={"metadata": {"path": folder}}).execute()
        printed = "".join(output["text"] for output in notebook.cells[0].outputs).splitlines()
        assert printed[-1] == str((clone / expected).resolve())


class TestCaptionClips:
    def test_as_it_stands_with_a_few_tokens(self, executed):
        tmp_path, _, shown = executed("01")
        clips = list((Path(capkit.__file__).parent / "demo" / "clips").glob("*.mp4"))
        records = capkit.CaptionStore(tmp_path / "runs" / "captions" / "captions.jsonl").current()
        assert len(records) == len(clips) and all(record["status"] == "ok" for record in records)
        assert shown.count("data:image/webp;base64,") == len(clips)
        assert str(tmp_path / "runs" / "captions" / "captions.jsonl") in shown
        assert "\r" not in shown and "%|" not in shown
        assert shown.count("Loading weights: 95 of 95 in") == 1

    def test_bad_clips_manifest_and_pasted_decoding(self, tmp_path):
        encode_clip(tmp_path / "good.mp4", range(30), fps=10)
        (tmp_path / "empty.mp4").touch()
        (tmp_path / "list.csv").write_text(
            "video,prompt,start\ngood.mp4,Who is <b>there</b>?,\nempty.mp4,,\ngone.mp4,,\ngood.mp4,,1.5\n"
        )
        pasted = {"do_sample": False, "top_k": 1, "top_p": 0.1, "temperature": 0.1, "max_new_tokens": 8}
        _, shown = run("01", tmp_path, videos="list.csv", decoding=pasted, output_dir="out", batch_size=2)
        records = capkit.CaptionStore(tmp_path / "out" / "captions.jsonl").current()
        statuses = {(Path(r["video"]).name, r["start_seconds"]): r["status"] for r in records}
        good, bad = {("good.mp4", 0.0): "ok", ("good.mp4", 1.5): "ok"}, {("empty.mp4", 0.0), ("gone.mp4", 0.0)}
        assert len(records) == 4 and statuses == good | dict.fromkeys(bad, "error")
        assert "without effect, dropped: {'top_k': 1, 'top_p': 0.1, 'temperature': 0.1}" in shown
        assert "Who is &lt;b&gt;there&lt;/b&gt;?" in shown and "<b>there</b>" not in shown
        assert all(record["error"].split("/")[-1].split(":")[0] in shown for record in records if record["error"])
        _, shown = run("01", tmp_path, videos="list.csv", decoding=pasted, output_dir="out", batch_size=2)
        assert "0 clips to caption, 2 done before, 2 failed before" in shown

    def test_frame_numbers_that_are_not_seconds_are_said(self, tmp_path):
        encode_clip(tmp_path / "long.mp4", range(100), fps=10)
        settings = FAST | {"videos": "long.mp4", "frame_sampling": {"strategy": "uniform", "num_frames": 4}}
        _, shown = run("01", tmp_path, **settings)
        assert "In 1 of 1 clips the numbers that the model reads beside the frames are not seconds" in shown
        _, shown = run("01", tmp_path, **settings, prompt_options={"frame_numbers": "seconds"})
        assert "are not seconds" not in shown

    def test_windows_have_captions_and_subtitles(self, tmp_path):
        encode_clip(tmp_path / "long.mp4", range(100), fps=10)
        _, shown = run("01", tmp_path, **FAST, videos="long.mp4", parts={"window_seconds": 4.0}, output_dir="out")
        records = capkit.CaptionStore(tmp_path / "out" / "captions.jsonl").current()
        assert sorted((r["start_seconds"], r["end_seconds"]) for r in records) == [(0.0, 4.0), (4.0, 8.0), (8.0, None)]
        assert "3 captions to make, 3 of them of a part of a clip" in shown
        subtitles = (tmp_path / "out" / "webvtt" / "long.vtt").read_text()
        assert subtitles.count(" --> ") == 3 and "00:00:08.000 --> 00:00:10.000" in subtitles

    def test_shots_have_captions_and_subtitles_and_their_cuts_are_kept(self, tmp_path):
        def draw(number, height, width):
            return np.full((height, width, 3), 40 + 160 * (number >= 30), np.uint8)

        encode_clip(tmp_path / "film.mp4", range(50), fps=10, draw=draw)
        _, shown = run("01", tmp_path, **FAST, videos="film.mp4", parts={"shots": True}, output_dir="out")
        records = capkit.CaptionStore(tmp_path / "out" / "captions.jsonl").current()
        assert sorted((r["start_seconds"], r["end_seconds"]) for r in records) == [(0.0, 3.0), (3.0, None)]
        assert "2 captions to make, 2 of them of a part of a clip" in shown
        assert "00:00:03.000 --> 00:00:05.000" in (tmp_path / "out" / "webvtt" / "film.vtt").read_text()
        assert json.loads((tmp_path / "out" / "cuts.jsonl").read_text())["cuts_seconds"] == [3.0]

    @pytest.mark.parametrize(
        "parameters, message",
        [
            ({"engine": "dask"}, "engine='dask': must be 'local', or 'ray'"),
            ({"parts": {"trainer": "sora"}}, "unknown trainer 'sora'"),
            ({"promt": "Why?"}, "unknown parameter 'promt'; did you mean 'prompt'?"),
            ({"template": "poem"}, "template='poem': must be one of 'chat', 'vqa', 'base'"),
            ({"decoding": {"top_p": 0.5}}, "top_p=0.5: no effect, because temperature is 0"),
            ({"model": "no/such/model"}, "no such folder"),
        ],
    )
    def test_wrong_parameters_are_named_in_the_notebook(self, tmp_path, parameters, message):
        with pytest.raises(papermill.PapermillExecutionError) as error:
            run("01", tmp_path, **parameters)
        assert message in error.value.evalue
        kept = json.loads((tmp_path / "out.ipynb").read_text())
        assert message in json.dumps(kept, ensure_ascii=False)


class TestSweep:
    def test_as_it_stands_with_a_few_clips(self, executed):
        tmp_path, done, shown = executed("03")
        folder = tmp_path / "runs" / "sweep"
        assert {path.name for path in folder.iterdir()} == {
            *("captions.jsonl", "captions_strips", "captions.csv", "cells.csv", "comparison.csv", "winner.yaml"),
            *("heat_map.png", "length.png", "time.png", "differences.png", "differences.html", "captions.html"),
        }
        page = (folder / "captions.html").read_text()
        assert page.count('<div class="caption">') == 27 and str(folder / "captions.html") in shown
        assert len(capkit.CaptionStore(folder / "captions.jsonl").current()) == 3 * 3 * 3
        assert sum("image/png" in str(cell.get("outputs")) for cell in done.cells) >= 3
        assert "6 cells x 3 clips: 27 captions" in shown and "27/27 captions, 0 errors" in shown
        assert "\r" not in shown and "jupyter.widget" not in shown
        settings = yaml.safe_load((folder / "winner.yaml").read_text()) | FAST
        run("01", tmp_path, limit=1, **settings)  # its settings are parameters of notebook 01, and of 02
        run("02", tmp_path, limit=1, **settings)
        made = capkit.CaptionStore(tmp_path / "runs" / "captions" / "captions.jsonl").current()
        viewed = capkit.CaptionStore(tmp_path / "runs" / "view" / "captions.jsonl").current()
        assert [record["request"] for record in viewed] == [record["request"] for record in made]
        _, shown = run("03", tmp_path, limit=3, prompts=["default", "sentence", "Why?"])
        assert "9 captions to make, 18 done before" in shown  # only the changed prompt's cells

    def test_axes_from_a_file_and_a_bad_clip(self, tmp_path):
        encode_clip(tmp_path / "good.mp4", range(30), fps=10)
        (tmp_path / "empty.mp4").touch()
        (tmp_path / "axes.yaml").write_text("prompts: [default, sentence]\ndecodings: [{max_new_tokens: 4}]\n")
        _, shown = run("03", tmp_path, videos=["good.mp4", "empty.mp4"], axes_file="axes.yaml", measure="num_words")
        assert "2 cells x 2 clips: 4 captions" in shown and "SweepResult(2 captions and 2 errors in 2 cells)" in shown

    def test_windows_are_clips_of_their_own(self, tmp_path):
        encode_clip(tmp_path / "long.mp4", range(60), fps=10)
        (tmp_path / "parts.csv").write_text("video,start,end\nlong.mp4,0,2\nlong.mp4,2,4\nlong.mp4,4,\n")
        axes = {"prompts": ["default", "sentence"], "decodings": [{"max_new_tokens": 6}], "measure": "num_words"}
        run("03", tmp_path, videos="parts.csv", output_dir="out", **axes)
        table = pd.read_csv(tmp_path / "out" / "captions.csv")
        assert table["clip"].nunique() == 3 and table["agreement"].isna().all()  # each prompt has one caption of a clip
        compared = pd.read_csv(tmp_path / "out" / "comparison.csv")
        assert compared[["num_clips", "num_dropped"]].to_numpy().tolist() == [[3, 0]]
        assert re.search(r"(0 to 2|2 to 4) s|4 s to the end", (tmp_path / "out" / "differences.html").read_text())
        run("04", tmp_path, videos="parts.csv", output_dir="played")
        records = capkit.CaptionStore(tmp_path / "played" / "captions.jsonl").current()
        assert [(record["start_seconds"], record["end_seconds"]) for record in records] == [(0.0, 2.0)] * 2

    @pytest.mark.parametrize(
        "parameters, message",
        [
            ({"prompt": ["Why?"]}, "unknown parameter 'prompt'; did you mean 'prompts'?"),
            ({"prompts": []}, "prompts: is empty"),
            ({"decodings": [{"temprature": 1.0}]}, "temprature"),
            ({"axes_file": "nowhere.yaml"}, "nowhere.yaml"),
        ],
    )
    def test_wrong_axes_are_named_before_any_work(self, tmp_path, parameters, message):
        with pytest.raises(papermill.PapermillExecutionError) as error:
            run("03", tmp_path, **parameters)
        assert message in error.value.evalue
        assert not (tmp_path / "runs").exists()


def test_playground_headless_shows_its_static_twins(tmp_path):
    _, shown = run("04", tmp_path, limit=2)
    records = capkit.CaptionStore(tmp_path / "runs" / "playground" / "captions.jsonl").current()
    assert [record["status"] for record in records] == ["ok", "ok"] and len({r["prompt"] for r in records}) == 2
    assert shown.count("data:image/webp;base64,") == 3  # two captions, and the pair to rate
    assert "1 pair left" in shown and "jupyter.widget" not in shown


def test_export_as_it_stands_and_of_a_store_with_hand_edits(tmp_path):
    done, shown = run("05", tmp_path)
    folder = tmp_path / "runs" / "export"
    captions = (folder / "cogvideo" / "prompts.txt").read_text().splitlines()
    store = capkit.CaptionStore(folder / "captions.jsonl")
    records = store.current()
    assert len(captions) == 3 and captions == [" ".join(record["text"].split()) for record in records]
    assert {path.name for path in folder.iterdir()} == {
        *("captions.jsonl", "captions_strips", "cogvideo", "cogvideo.export.json", "export.csv", "tokens.png")
    }
    assert "3 clips exported for cogvideo" in shown and "all 3 pairs are right" in shown
    assert f"--data_root {folder / 'cogvideo'} --caption_column prompts.txt" in shown
    assert "0 of 3 captions differ from the store" in shown and "0 of 3 clips refused" in shown
    assert "data:image/webp;base64," not in shown  # no pair to compare
    assert sum("image/png" in str(cell.get("outputs")) for cell in done.cells) >= 1
    store.edit(records[0]["request"], "A dog runs.\nIt barks.")
    store.edit(records[1]["request"], "A <b>dog</b> runs.")
    store.mark(records[2]["request"], "wrong", remark="no dog at all")
    settings = {"stores": str(store.path), "layout": "diffusers", "export_dir": "data/dogs", "output_dir": "again"}
    done, shown = run("05", tmp_path, **settings, trigger_word="ZORP")
    assert "1 clip exported for diffusers" in shown and "2 of 3 clips refused" in shown
    assert "left out: marked wrong: no dog at all" in shown and "1 caption left out, marked wrong" in shown
    assert "has line breaks: diffusers" in shown and "--id_token 'ZORP '" in shown
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    html = "".join(output.get("data", {}).get("text/html", "") for output in outputs)
    assert "A &lt;b&gt;dog&lt;/b&gt; runs." in html and "<b>dog</b>" not in html
    assert (tmp_path / "data" / "dogs" / "prompts.txt").read_text().startswith("A <b>dog</b> runs.\n")
    assert (tmp_path / "again" / "export.csv").is_file()


def test_export_of_a_store_with_damaged_lines(tmp_path, executed):
    made = executed("01")[0] / "runs" / "captions"
    shutil.copytree(made / "captions_strips", tmp_path / "mine_strips")
    good = (made / "captions.jsonl").read_bytes().splitlines()
    nan = json.dumps(json.loads(good[0]) | {"request": "nan", "mean_logprob": float("nan")}).encode()
    (tmp_path / "mine.jsonl").write_bytes(b"\n".join([nan, *good, good[0][:200]]))
    _, shown = run("05", tmp_path, stores="mine.jsonl", layout="metadata-jsonl", export_dir="data", output_dir="out")
    exported = [json.loads(line) for line in (tmp_path / "data" / "metadata.jsonl").read_bytes().splitlines()]
    assert sorted(row["text"] for row in exported) == sorted(json.loads(line)["text"].strip() for line in good)
    assert f"0 of {len(good)} clips refused" in shown and "captions differ from the store" in shown
    assert "mine.jsonl, line 1 is skipped: has NaN in it" in shown
    assert f"mine.jsonl, line {len(good) + 2} is skipped: torn or damaged" in shown


class TestBenchmark:
    def test_measures_writes_and_shows_again(self, tmp_path):
        parts = ["stages", "captions", "profiling"]
        done, shown = run("06", tmp_path, parts=parts, device="cpu")
        folder = tmp_path / "runs" / "benchmark"
        assert {path.name for path in folder.iterdir()} == {
            *("results.json", "results.csv", "results.md", "ratios.png", "profile.csv"),
            *("parts_of_a_caption.csv", "parts_of_a_caption.png"),
        }
        assert sum("image/png" in str(cell.get("outputs")) for cell in done.cells) == 2
        assert "one caption of 8 tokens" in shown and "8 of 8 captions" in shown and "\r" not in shown
        assert not any(output.get("name") == "stderr" for cell in done.cells for output in cell.get("outputs", []))
        results = str(folder / "results.json")
        _, again = run("06", tmp_path, results_file=results, output_dir="again")
        assert (tmp_path / "again" / "results.md").read_text() == (folder / "results.md").read_text()
        assert "8 of 8 captions" in again

    @pytest.mark.parametrize(
        "parameters, message",
        [
            ({"sizes": "tiny"}, "unknown parameter 'sizes'; did you mean 'size'?"),
            ({"size": "huge"}, "size='huge': must be one of 'tiny', 'small', 'full'"),
            ({"results_file": "nowhere.json"}, "nowhere.json: not results"),
        ],
    )
    def test_wrong_parameters_are_named(self, tmp_path, parameters, message):
        with pytest.raises(papermill.PapermillExecutionError) as error:
            run("06", tmp_path, **parameters)
        assert message in error.value.evalue


def test_train_demo_model_smoke_run(tmp_path):
    """Three steps: everything is drawn, trained, plotted, written and evaluated."""
    settings = {
        "steps": 3,
        "vision_steps": 2,
        "question_steps": 2,
        "batch_size": 4,
        "num_clips": 12,
        "num_held_out": 4,
        "num_evaluated": 2,
    }
    done, shown = run("07", tmp_path, **settings)
    folder = tmp_path / "runs" / "train_demo_model"
    assert str(folder / "checkpoint") in shown and (folder / "evaluation.csv").is_file()
    assert capkit.load_captioner(folder / "checkpoint", device="cpu").processor.image_size == 112
    assert sum("image/png" in str(cell.get("outputs")) for cell in done.cells) >= 2
