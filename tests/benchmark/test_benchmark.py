"""The benchmark runs, its numbers are consistent, and capkit's tokens are the baseline's. No timings."""

import os
import re
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from paths import ROOT

from capkit import Decoding, Prompt
from capkit.benchmark import Benchmark, as_markdown, parts_of_a_caption, profile_table, read_results, to_frame
from capkit.benchmark.__main__ import main
from capkit.benchmark.measuring import OtherLoad, profile_of
from capkit.benchmark.models import (
    DECODINGS,
    PROMPTS,
    SIZES,
    make_captioner,
    make_clip,
    make_tokenizer,
    plain_caption,
    plain_pixels,
)
from capkit.benchmark.video import encode_video, measure_reading
from capkit.cogvlm2 import CogVLM2VideoProcessor, preprocess_frames

SHORT = replace(
    SIZES["tiny"],
    num_frames=3,
    num_tokens=5,
    num_sweep_tokens=2,
    num_long_tokens=7,
    batches=(2,),
    large_frame=(120, 90),
    repeats=1,
)
PARTS = ["preprocessing", *re.search("GPU_PARTS := (.*)", (ROOT / "Makefile").read_text())[1].split()]
# What a machine with a GPU may lack, on which `make gpu` runs.
ABSENT = "accelerate av bitsandbytes decord IPython ipywidgets jupyterlab matplotlib pandas papermill ray scipy"
BARE = f"import sys; sys.modules.update(dict.fromkeys('{ABSENT}'.split()));"


def run_bare(code, **env):
    env = os.environ | {"PYTHONPATH": str(ROOT), **env}
    run = subprocess.run([sys.executable, "-c", BARE + code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One short run on a bare machine, as its file has it."""
    out = tmp_path_factory.mktemp("benchmark") / "new" / "results.json"
    arguments = ["--size", "tiny", "--device", "cpu", "--dtype", "float32", "--out", str(out), "--parts", *PARTS]
    run_bare(
        f"""
from capkit.benchmark.__main__ import main
from capkit.benchmark.models import SIZES, Size
SIZES["tiny"] = {SHORT}
sys.argv[1:] = {arguments}
main()"""
    )
    return read_results(out)


def test_every_part_has_rows_and_ratios_are_baseline_by_value(results):
    assert {row["part"] for row in results["rows"]} == set(PARTS) - {"compiled", "profiling"}
    assert all("memory" in one["part"] or one["part"] == "compiled" for one in results["skipped"])  # seen on GPUs only
    for row in results["rows"]:
        assert row["value"] > 0 and row["ratio"] == pytest.approx(row["baseline_value"] / row["value"])
        assert row["baseline"] and row["unit"] in ("s", "MB")


def test_tokens_are_counted_and_equal_the_baselines(results):
    captioned = {row["name"]: row for row in results["rows"] if "num_captions" in row}
    assert [row["num_captions"] for row in captioned.values()] == [8, 2, 2, 2, 16, 64, 16, 64] + 2 * [1, 1, 8, 8] + [1]
    for name, row in captioned.items():
        long = f"{SHORT.num_long_tokens} tokens" in name
        each = SHORT.num_long_tokens if long else SHORT.num_sweep_tokens if "sweep" in name else SHORT.num_tokens
        compared = 4 if long and "sweep" in name else row["num_captions"]  # with the baseline
        assert row["equal"] == f"{compared} of {compared} captions"
        assert row["num_tokens"] <= row["num_captions"] * each  # an end token may come sooner
        assert row["num_tokens"] >= row["num_captions"] * each * 0.8
        per_run = 1 if name.startswith("one") else row["num_captions"]
        assert row["captions_an_hour"] == pytest.approx(3600 * per_run / row["value"])
        assert row["share_of_bandwidth"] > 0 and row["share_of_matmul"] > 0
    for row in results["rows"]:
        if "tokens_per_second" in row:
            assert row["tokens_per_second"] == pytest.approx(1 / row["value"])
            assert row["share_of_bandwidth"] == pytest.approx(row["tokens_per_second"] / row["limit_tokens_per_second"])


def test_no_frame_whose_features_are_stored_is_encoded_again(results):
    rows = [row for row in results["rows"] if row["part"] == "second_day"]
    assert [row["num_encoded"] for row in rows] == 9 * [0]
    assert sum("by another process" in row["name"] for row in rows) == 1


def test_grounding_is_that_of_one_call_each(results):
    together, left_out, looked, *memory = (row for row in results["rows"] if row["part"] == "grounding")
    for row in (together, left_out):
        assert float(row["equal"].split()[1]) < 1e-3  # nats
    assert left_out["scorings"] == pytest.approx((SHORT.num_frames + 2) / left_out["ratio"])
    assert looked["name"].startswith("see where") and looked["ratio"] > 0 and len(memory) <= 1


@pytest.mark.parametrize(
    "others, threads, gpu, is_busy",
    [(0.1, 2, None, False), (0.9, 1, None, False), (1.0, 2, None, True), (0.9, 2, "H", False), (1.9, 2, "H", True)],
)
def test_a_busy_machine_is_named(results, others, threads, gpu, is_busy):
    machine = results["machine"] | {"cores": 2, "torch_threads": threads, "gpu": gpu, "other_cores": others}
    text = as_markdown(results | {"machine": machine})
    assert (f"other programs used up to {others:.1f} of 2 cores" in text) == is_busy


def test_other_programs_are_counted_and_this_one_and_idle_time_are_not(monkeypatch):
    cores, process = namedtuple("cores", "user system idle iowait steal guest"), namedtuple("process", "u s cu cs")
    seconds = 100.0, 100.2, 102.0
    machine = cores(5, 1, 9, 1, 0, 1), cores(7, 1, 9, 1, 0, 1), cores(7.5, 2, 9.5, 3, 0.5, 2)
    own = process(1, 0, 0, 0), process(1, 0, 0, 0), process(1.5, 0.5, 0.25, 0.25)
    monkeypatch.setattr(time, "perf_counter", iter(seconds).__next__)
    monkeypatch.setattr(psutil, "cpu_times", iter(machine).__next__)
    values = iter(own)
    monkeypatch.setattr(psutil.Process, "cpu_times", lambda _: next(values))
    load = OtherLoad()
    assert load() == 0  # too soon to tell
    assert load() == pytest.approx((10 - 6 - 1.5) / 2)  # of user, system and steal; per second


def test_the_profile_has_both_ways_of_every_stage(results):
    assert {(one["stage"], one["way"]) for one in results["profile"]} == {
        (stage, side) for stage in ("vision tower", "prefill", "decoding 8 together") for side in ("plain", "capkit")
    }
    assert all(0 <= one["share"] <= 1 for one in results["profile"])
    assert list(profile_table(results).columns) == ["plain", "capkit"]


def test_profiling_writes_nothing_to_stderr(capfd):
    assert profile_of(lambda: torch.ones(3).sum(), torch.device("cpu"))
    assert capfd.readouterr().err == ""


def test_tables(results):
    frame, parts, text = to_frame(results), parts_of_a_caption(results), as_markdown(results)
    assert list(frame["name"]) == [row["name"] for row in results["rows"]]
    assert list(parts.index) == ["plain", "capkit"] and (parts >= 0).all(axis=None)
    assert "`python -m capkit.benchmark --size tiny`" in text and len(text.split("\n\n")[-1].splitlines()) == 2 + len(
        frame
    )
    with pytest.raises(ValueError, match="prefill was not measured"):
        parts_of_a_caption(results | {"rows": [row for row in results["rows"] if "prefill" not in row["name"]]})


def test_the_baseline_is_what_capkit_says_for_every_prompt_and_decoding():
    plain, captioner = make_captioner(SHORT, "cpu")
    assert {id(weight) for weight in plain.parameters()} == {id(w) for w in captioner.model.parameters()}
    seen = set()
    for number, (prompt, settings) in enumerate(zip(PROMPTS, DECODINGS, strict=True)):
        clip, decoding = make_clip(SHORT, number), Decoding(max_new_tokens=9, **settings)
        ids = captioner.caption(clip, prompt, decoding=decoding).token_ids
        assert plain_caption(plain, captioner.processor, clip, prompt, decoding) == ids
        seen |= set(ids)
    assert len(seen) > 20  # not the same word again and again


@pytest.mark.parametrize("height, width", [(120, 90), (90, 160), (56, 56), (61, 300)])
def test_the_baselines_pixels_are_capkits(height, width):
    frames = make_clip(SHORT, 0, (height, width)).frames
    plain = plain_pixels(frames, 56)
    assert np.allclose(plain, preprocess_frames(frames, 56), atol=1e-5)


def test_a_prompt_has_as_many_positions_as_with_the_published_tokenizer():
    small = SIZES["small"]
    tokenizer = make_tokenizer(32000)
    processor = CogVLM2VideoProcessor(tokenizer, 224, 66)
    assert abs(len(processor.prompt_ids(make_clip(small, 0, (32, 32)), Prompt(PROMPTS[0]))) - 1622) <= 5
    assert len(tokenizer) == 32000 and tokenizer.decode([31990]) == " word31990"
    assert tokenizer.decode(tokenizer.encode("Añy text, 42!")) == "Añy text, 42!"


def test_a_part_without_its_library_is_left_out_and_said_to_be(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.setitem(SIZES, "tiny", SHORT)
    results = Benchmark("tiny", "cpu").run(["reading"])
    assert results["rows"] == [] and [one["part"] for one in results["skipped"]] == ["reading"]
    assert "reading: skipped" in capsys.readouterr().out


@pytest.mark.soak
def test_reading_beside_decord_gives_the_same_frames():
    pytest.importorskip("decord")
    rows = measure_reading(2, 5, 1, height=96, width=128)
    assert [row["unit"] for row in rows] == ["s", "s", "MB"] and {row["equal"] for row in rows} == {"5 of 5 frames"}


def test_a_repeated_minute_is_a_video_of_that_length(tmp_path):
    from capkit import load_clip

    info = load_clip(encode_video(tmp_path / "v.mp4", 3, 96, 128), timeout_seconds=None).info
    assert info.num_frames == 3 * 60 * 25 and info.duration_seconds == pytest.approx(180)


@pytest.mark.parametrize(
    "arguments, message", [(["--size", "huge"], "invalid choice"), (["--parts", "x"], "choose from 'reading'")]
)
def test_wrong_arguments_are_named(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--size", "tiny", *arguments])
    with pytest.raises((SystemExit, ValueError)) as error:
        main()
    assert message in str(error.value) + capsys.readouterr().err


def test_command_line_writes_where_it_is_told_or_beside_the_notebooks(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES, "tiny", SHORT)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--size", "tiny", "--device", "cpu", "--parts", "preprocessing"])
    main()
    (out,) = (tmp_path / "notebooks" / "results").glob("*_tiny.json")
    assert str(out.relative_to(tmp_path)) in capsys.readouterr().out and read_results(out)["size"] == "tiny"


@pytest.mark.parametrize("text", [None, "", "[]", '{"size": 1}'])
def test_files_that_are_no_results_are_named(tmp_path, text):
    if text is not None:
        (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match="r.json: not results"):
        read_results(tmp_path / "r.json")


def test_make_gpu_tests_without_notebooks_and_video_libraries():
    """All are collected, and some run on the CPU."""
    arguments = ["tests/cuda", "-p", "no:cacheprovider", "-q", "-k", "loading_takes or frames_may or scores"]
    code = f"import pytest; sys.exit(pytest.main({arguments}))"
    assert "3 passed" in run_bare(code, CAPKIT_TEST_DEVICE="cpu", CAPKIT_REQUIRE="cuda")
