"""Sweeps: what is planned, that each result is what captioning alone gives, and that nothing is done twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from chance import seeded_random
from paths import NOTEBOOKS

import capkit
from capkit import CaptionStore, Clip, Decoding, FrameSampling, plan_sweep, run_sweep
from capkit.captioning import score_support
from capkit.files import file_sha256
from capkit.runs import find_clips
from capkit.runs.clips import DEMO_CLIPS
from capkit.sweep import PROMPT_PRESETS, SweepResult, agreement, compare, describe_set, read_axes
from capkit.sweep.run import read_captions
from capkit.views import show_sweep

CLIPS = sorted(map(str, DEMO_CLIPS.glob("*.mp4")))
WARM = {"temperature": 0.8, "seed": 3, "max_new_tokens": 10}
AXES = {
    "prompts": ["default", "sentence"],
    "decodings": [{"max_new_tokens": 30}, WARM, {"num_beams": 2, "max_new_tokens": 6}],
    "templates": ["chat", "vqa"],
    "frame_samplings": ["chat", {"strategy": "uniform", "num_frames": 3}],
    "frame_numbers": ["index", "seconds"],
    "num_samples": 2,
}


@pytest.fixture(scope="module")
def demo():
    return capkit.load_captioner("demo", device="cpu")


# ---- plans ---------------------------------------------------------------------------------------------------------


def test_a_grid_crosses_all_axes_and_leaves_out_what_would_only_repeat():
    plan = plan_sweep(CLIPS[:2], **AXES)
    # vqa numbers no frames, so "seconds" is no other cell: 3 combinations of template and numbers, not 4.
    assert len(plan.cells) == len(set(plan.cells)) == 2 * 3 * 2 * 3
    assert plan.num_captions == len(list(plan.requests())) == 2 * (36 + 12)  # a repeat of those that sample
    assert any("vqa" in reason for reason in plan.collapsed) and any("do not sample" in r for r in plan.collapsed)
    assert len({plan.label(cell) for cell in plan.cells}) == len(plan.cells)
    assert plan.to_frame()["captions"].sum() == plan.num_captions
    assert "36 cells x 2 clips: 96 captions" in str(plan)


def test_settings_that_come_to_the_same_are_one_cell():
    """What people paste from the original tool is greedy, whatever temperature it names."""
    pasted = {"do_sample": False, "top_k": 1, "top_p": 0.1, "temperature": 0.1, "max_new_tokens": 2048}
    plan = plan_sweep(CLIPS[:1], decodings=[{}, pasted, {"temperature": 0.5}])
    assert [cell.decoding for cell in plan.cells] == [Decoding(), Decoding(temperature=0.5)]
    assert len(plan.collapsed) == 1 and "greedy" in plan.collapsed[0]


def test_one_at_a_time_changes_one_axis_of_the_baseline():
    plan = plan_sweep(CLIPS[:1], mode="one_at_a_time", **{name: AXES[name] for name in AXES if name != "num_samples"})
    changed = []
    for cell in plan.cells:
        baseline = plan.baseline.to_strings()
        changed.append([axis for axis, value in cell.to_strings().items() if value != baseline[axis]])
    assert changed == [[], ["prompt"], ["decoding"], ["decoding"], ["frame_sampling"], ["template"], ["frame_numbers"]]


def test_no_repeat_has_the_seed_of_another_cells_repeat():
    decodings = [{"temperature": 1.0, "seed": seed} for seed in (*range(40), 2**63 - 1)]
    plan = plan_sweep(CLIPS[:1], decodings=decodings, num_samples=40)
    seeds = {(cell.decoding.seed, sample): cell.sampled(sample).seed for _, cell, sample in plan.requests()}
    assert len(seeds) == len(set(seeds.values())) == 41 * 40
    assert all(seeds[seed, 0] == seed for seed, _ in seeds)  # a single caption is repeated with the seed as given
    assert max(seed for (_, sample), seed in seeds.items() if sample) < 2**53  # exact in every reader of JSON
    again = plan_sweep(CLIPS[1:2], decodings=decodings[3:4], num_samples=2)
    assert [cell.sampled(sample).seed for _, cell, sample in again.requests()] == [3, seeds[3, 1]]


def test_no_seed_is_seed_0():
    plan = plan_sweep(CLIPS[:1], decodings=[{"temperature": 0.5}, {"temperature": 0.5, "seed": 0}])
    assert [cell.decoding for cell in plan.cells] == [Decoding(temperature=0.5)] and len(plan.collapsed) == 1


def test_labels_are_short_and_tell_cells_apart():
    long = "Describe everything that can be seen in this video in the greatest possible detail, please. "
    plan = plan_sweep(
        CLIPS[:1], prompts=["default", long + "One.", long + "Two."], decodings=[{}, {"temperature": 0.5}]
    )
    labels = [plan.label(cell) for cell in plan.cells]
    assert labels[0] == "default · greedy" and len(set(labels)) == 6 and max(map(len, labels)) < 70
    assert plan_sweep(CLIPS[:1]).label(plan_sweep(CLIPS[:1]).baseline) == "default"


def test_labels_and_tables_show_prefixes_and_words(demo, tmp_path):
    axes = {
        "prompts": ["default", {"text": "Why?", "answer_prefix": "I see"}, {"text": "Why?"}],
        "decodings": [
            {"max_new_tokens": 5},
            {"max_new_tokens": 5, "forbidden_words": ["a b", "c"]},
            {"max_new_tokens": 5, "forbidden_words": ["a b, c"], "word_bias": {"d": 2}},
            {"max_new_tokens": 5, "forbidden_words": [f"word {number}" for number in range(50)]},
            {"max_new_tokens": 5, "forbidden_words": [f"word {number}" for number in range(51)]},
        ],
    }
    plan = plan_sweep(CLIPS[:1], **axes)
    labels = [plan.label(cell) for cell in plan.cells]
    assert len(set(labels)) == 15 and max(map(len, labels)) < 200
    assert labels[6] == "Why? · greedy forbidden_words='a b', 'c' max_new_tokens=5 · I see"
    assert labels[0].endswith("· no prefix") and "word_bias='d':+2" in labels[2]
    assert "answer_prefix" in plan.to_frame() and "answer_prefix" not in plan_sweep(CLIPS[:1]).to_frame()
    assert plan.cells[6].to_parameters()["prompt_options"] == {"answer_prefix": "I see"}
    store = tmp_path / "sweep.jsonl"
    result = run_sweep(demo, plan, store=store)
    table = result.to_frame()
    assert (table["text"].str.startswith("I see") == (table["answer_prefix"] == "I see")).all()
    for record, cell in zip(result.records, plan.cells, strict=True):
        alone = demo.caption(capkit.load_clip(CLIPS[0]), cell.prompt, cell.decoding)
        assert (record["text"], record["num_tokens"]) == (alone.text, len(alone.token_ids))
    assert len(capkit.CaptionStore(store).current()) == 15


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"prompts": []}, "prompts: is empty"),
        ({"decodings": ()}, "decodings: is empty"),
        ({"templates": ["chat", "chat"]}, "'chat' is there twice"),
        ({"decodings": [{"temperature": 0.5}, {"temperature": 0.5}]}, "is there twice"),
        ({"decodings": [{"temprature": 0.5}]}, "temprature"),
        ({"decodings": [{"top_p": 0.5}]}, "no effect"),
        ({"frame_samplings": ["fastest"]}, "fastest"),
        ({"templates": ["poem"]}, "poem"),
        ({"frame_numbers": ["minutes"]}, "minutes"),
        ({"prompts": [" "]}, "prompt"),
        ({"prompts": [7]}, "prompt"),
        ({"prompts": ["a", {"text": "a", "history": [["q", "a"]]}]}, "differ in history"),
        ({"mode": "random"}, "random"),
        ({"num_samples": 0}, "num_samples"),
        ({"max_captions": "many"}, "max_captions='many': must be a whole number"),
        ({"max_captions": None}, "max_captions"),
        ({"prompts": None}, "prompts=None: must be a list"),
        ({"decodings": 5}, "decodings=5: must be a list"),
        ({"decodings": [{1: 2}]}, "unknown decoding setting 1"),
        (
            {"decodings": [{"seed": seed, "temperature": 1.0} for seed in range(1000)], "num_samples": 1000},
            "max_captions",
        ),
        ({"clips": []}, "clips"),
        ({"clips": [3]}, "neither a file name"),
    ],
)
def test_nonsense_is_refused_before_any_work(axes, message):
    clips = axes.pop("clips", CLIPS)
    with pytest.raises(ValueError, match=message):
        plan_sweep(clips, **axes)


def test_a_prompt_that_the_tokenizer_cannot_take_stops_before_any_work(demo, tmp_path):
    with pytest.raises(ValueError, match="marks the frames"):
        run_sweep(demo, CLIPS, tmp_path / "s.jsonl", prompts=["Fine?", "<|reserved_special_token_0|>?"])
    assert not (tmp_path / "s.jsonl").exists()
    with pytest.raises(ValueError, match="prompts: cannot be set beside a SweepPlan; pass them to plan_sweep"):
        run_sweep(demo, plan_sweep(CLIPS), prompts=["Why?"])


def test_a_plan_that_is_large_on_purpose():
    decodings = [{"temperature": 1.0, "seed": seed} for seed in range(101)]
    with pytest.raises(ValueError, match="raise max_captions"):
        plan_sweep(CLIPS[:1], decodings=decodings, num_samples=100)
    assert plan_sweep(CLIPS[:1], decodings=decodings, num_samples=100, max_captions=20_000).num_captions == 10_100


def test_axes_from_a_file(tmp_path):
    yaml = tmp_path / "axes.yaml"
    yaml.write_text(
        "prompts:\n- default\n- What happens?\ndecodings:\n- {}\n- {temperature: 0.8, seed: 1}\nnum_samples: 2\n"
    )
    table = tmp_path / "axes.csv"
    table.write_text('prompts,decodings,templates\ndefault,{},chat\nWhat happens?,"{temperature: 0.8, seed: 1}",\n')
    for path, num_samples in ((yaml, 2), (table, 1)):
        plan = plan_sweep(CLIPS[:1], **read_axes(path))
        assert [cell.prompt.text for cell in plan.cells[::2]] == [PROMPT_PRESETS["default"][0], "What happens?"]
        assert plan.cells[1].decoding == Decoding(temperature=0.8, seed=1) and plan.num_samples == num_samples
    for name, content in (
        ("unknown.yaml", "promts: [a]"),
        ("list.yaml", "- a"),
        ("broken.yaml", "prompts: [a"),
        ("empty.yaml", ""),
        ("unknown.csv", "prompt\na\n"),
        ("long.csv", "prompts,decodings\na,{},{}\nb,{}\n"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            read_axes(tmp_path / name)
    with pytest.raises(ValueError, match="nowhere.yaml"):
        read_axes(tmp_path / "nowhere.yaml")


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_each_result_is_what_captioning_alone_gives(demo):
    plan = plan_sweep(CLIPS[:2], **AXES)
    result = run_sweep(demo, plan)
    clips = {(p, s): capkit.load_clip(p, s) for p in CLIPS[:2] for s in map(FrameSampling.of, AXES["frame_samplings"])}
    for (source, cell, sample), record in zip(plan.requests(), result.records, strict=True):
        clip = clips[source.video, cell.frame_sampling]
        settings = (cell.prompt, cell.sampled(sample))
        alone = demo.caption(clip, *settings)
        assert (record["text"], record["finish_reason"]) == (alone.text, alone.finish_reason)
        assert record["num_tokens"] == len(alone.token_ids)
        assert record["mean_logprob"] == pytest.approx(alone.mean_logprob, abs=1e-4)
        assert record["decoding"] == cell.sampled(sample).to_dict() and record["sample"] == sample
    assert {record["finish_reason"] for record in result.records} == {"eos", "length"}


def test_the_table_has_a_row_a_caption(demo):
    plan = plan_sweep(
        CLIPS[:2], prompts=["default", "sentence"], decodings=[{"max_new_tokens": 4}, WARM], num_samples=2
    )
    table = run_sweep(demo, plan).to_frame()
    assert len(table) == plan.num_captions and set(table["clip"]) == set(table["video"]) == set(CLIPS[:2])
    assert table.groupby("cell")["sample"].nunique().to_dict() == {
        plan.label(cell): 2 if cell.decoding.samples else 1 for cell in plan.cells
    }
    assert (table["duration_seconds"] > 3).all() and table["text"].notna().all()


def test_windows_of_a_video_are_clips_of_their_own(demo, tmp_path):
    windows = [{"start": 0.0, "end": 2.0}, {"start": 2.0, "end": 4.0}, {}]
    items = find_clips([{"video": CLIPS[0], "reference": f"{number}."} | w for number, w in enumerate(windows)])
    result = run_sweep(demo, items, prompts=["default", "Why?"], decodings=[{"max_new_tokens": 9}])
    table = result.to_frame()
    assert table["clip"].nunique() == 3 and table["video"].nunique() == 1
    assert table["start_seconds"].tolist() == [0, 0, 2, 2, 0, 0]
    assert table["end_seconds"].fillna(-1).tolist() == [2, 2, 4, 4, -1, -1]
    assert table["reference"].tolist() == ["0.", "0.", "1.", "1.", "2.", "2."]
    assert describe_set(table, "cell")["num_captions"].tolist() == [3, 3]
    for by in ("clip", "video"):
        assert agreement(table, by=[by, "prompt"])["num_others"].tolist() == [0] * 6
        assert agreement(table, by=by)["num_others"].tolist() == [1] * 6
    compared = compare(table, "num_tokens", cell="cell", clip="clip", baseline="default")
    assert compared["num_clips"].item() == 3 and compared["num_dropped"].item() == 0
    html = show_sweep(result, num_clips=3).html
    assert "2 cells, 3 clips" in html and "0 to 2 s" in html and "2 to 4 s" in html

    captions, table_file = tmp_path / "captions.jsonl", tmp_path / "captions.csv"
    rows = [{"video": CLIPS[0], "text": f"Elsewhere {number}."} | window for number, window in enumerate(windows)]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    added = result.with_captions("elsewhere", captions).to_frame().iloc[6:]
    assert added["text"].tolist() == ["Elsewhere 0.", "Elsewhere 1."] and added["reference"].tolist() == ["0.", "1."]
    assert added["clip"].tolist() == table["clip"].iloc[[0, 2]].tolist()
    captions.write_text(json.dumps(rows[2]))
    with pytest.raises(ValueError, match="any of 3 clips of this sweep; name .* a window of it by start and end"):
        result.with_captions("elsewhere", captions)
    table_file.write_text(f"video,text,start,end\n{CLIPS[0]},All of it.,,\n")
    assert result.with_captions("elsewhere", table_file).to_frame()["clip"].iloc[-1] == CLIPS[0]
    table_file.write_text(f"video,text,start\n{CLIPS[0]},All of it.,soon\n")
    with pytest.raises(ValueError, match="row 1 .*start_seconds must be a number, such as 2.5; got 'soon'"):
        result.with_captions("elsewhere", table_file)


def test_copies_of_a_clip_count_once(demo, tmp_path):
    copies = [str(shutil.copy(CLIPS[0], tmp_path / f"copy {number}.mp4")) for number in range(3)]
    two = plan_sweep([CLIPS[0], *copies, CLIPS[1]], ["default", "sentence"], [{"max_new_tokens": 4}])
    result = run_sweep(demo, two)
    assert result.copies == dict.fromkeys(copies, CLIPS[0])
    table = result.to_frame()
    assert set(table["clip"]) == set(CLIPS[:2]) and set(table["video"]) == {*CLIPS[:2], *copies}
    comparison = compare(table, "num_tokens", "cell", "clip", two.label(two.baseline))
    assert comparison["num_clips"].tolist() == [2]
    halves = [capkit.runs.Item(CLIPS[0], end=2.0), capkit.runs.Item(copies[0], start=2.0)]
    assert run_sweep(demo, plan_sweep(halves, decodings=[{"max_new_tokens": 4}])).copies == {}


def test_a_video_is_prepared_where_it_is_read_and_hashed_once_however_many_captions_it_has(demo, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr("capkit.runs.digests.file_sha256", lambda path: hashed.append(path) or file_sha256(path))
    monkeypatch.setattr("capkit.video.clip.model_pixels", lambda *_: pytest.fail("preprocessed in this process"))
    decodings = [{"max_new_tokens": 2}, WARM]
    result = run_sweep(demo, CLIPS[:2], tmp_path / "s.jsonl", prompts=["default", "Why?"], decodings=decodings)
    assert sorted(hashed) == CLIPS[:2] and len(result.records) == 8
    assert all(record["video_sha256"] == file_sha256(record["video"]) for record in result.records)


def test_a_table_of_a_hundred_thousand_captions(tmp_path):
    """As many steps as captions: with a step for each pair it would take hours, not seconds."""
    clips = [f"/clips/{number}.mp4" for number in range(400)]
    decodings = [{"temperature": 0.1 + seed, "seed": seed} for seed in range(16)]
    prompts = [f"Question {number}?" for number in range(16)]
    plan = plan_sweep(clips, prompts, decodings, max_captions=10**6)
    fields = dict.fromkeys(("start_seconds", "end_seconds", "text", "error"), None) | {"status": "ok"}
    result = SweepResult(plan, [{"video": source.video} | fields for source, _, _ in plan.requests()])
    (tmp_path / "more.csv").write_text("video,text\n" + "".join(f"{clip},a\n" for clip in clips))
    table = result.with_captions("more", tmp_path / "more.csv").to_frame()
    assert len(table) == 256 * 400 + 400 and table.groupby("cell").size().eq(400).all()
    assert table["cell"].nunique() == 257 and table["clip"].nunique() == 400


def test_what_is_stored_is_not_done_again(demo, tmp_path):
    store, axes = tmp_path / "sweep.jsonl", {"decodings": [{"max_new_tokens": 3}, WARM], "num_samples": 2}
    first = run_sweep(demo, CLIPS[:2], store, prompts=["default", "Why?"], **axes)
    again = run_sweep(demo, CLIPS[:2], store, prompts=["default", "Why?"], **axes)
    assert again.records == first.records and len(CaptionStore(store).lines()) == 12
    changed = run_sweep(demo, CLIPS[:2], store, prompts=["default", "Who?"], **axes)
    assert len(CaptionStore(store).lines()) == 18  # only the changed prompt's cells
    assert [r for r in changed.records if r["prompt"] != "Who?"] == [r for r in first.records if r["prompt"] != "Why?"]


def test_the_store_is_the_same_that_single_captions_fill(demo, tmp_path):
    """Captions made by notebook 01 are not made again by a sweep that has them as a cell."""
    from capkit.runs import caption_clips

    store = CaptionStore(tmp_path / "captions.jsonl")
    caption_clips(demo, find_clips(CLIPS[:2]), store, decoding=Decoding(max_new_tokens=3))
    run_sweep(demo, CLIPS[:2], store, decodings=[{"max_new_tokens": 3}, {"max_new_tokens": 4}])
    assert len(store.lines()) == 4


def test_a_clip_that_cannot_be_read_is_recorded_and_the_others_go_on(demo, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    store = tmp_path / "sweep.jsonl"
    clips, axes = [str(tmp_path / "broken.mp4"), CLIPS[0]], {"prompts": ["default", "Why?"]}
    axes["decodings"] = [{"max_new_tokens": 3}]
    result = run_sweep(demo, clips, store, **axes)
    assert [record["status"] for record in result.records] == ["error", "error", "ok", "ok"]
    assert "broken.mp4" in result.records[0]["error"] and "2 errors" in repr(result)
    run_sweep(demo, clips, store, **axes)
    assert len(CaptionStore(store).lines()) == 4
    run_sweep(demo, clips, store, retry_errors=True, **axes)
    assert len(CaptionStore(store).lines()) == 6
    assert result.to_frame()["text"].isna().tolist() == [True, True, False, False]


def test_clips_in_memory_and_items_with_windows(demo, tmp_path):
    loaded, decodings = capkit.load_clip(CLIPS[0]), [{"max_new_tokens": 5}]
    item = {"video": CLIPS[0], "start": 1.0, "end": 3.0}
    texts = [
        run_sweep(demo, clips, decodings=decodings).records[0]["text"]
        for clips in ([CLIPS[0]], [loaded], [Clip.from_frames(loaded.frames)])
    ]
    assert len(set(texts)) == 1
    window = run_sweep(demo, find_clips([item]), decodings=decodings).records[0]
    assert (window["start_seconds"], window["end_seconds"], window["duration_seconds"]) == (1.0, 3.0, 2.0)
    # Frames in memory: other frames of them cannot be had, those of a file can.
    with pytest.raises(ValueError, match="frames in memory"):
        plan_sweep([Clip.from_frames(loaded.frames)], frame_samplings=["chat", "base"])
    both = run_sweep(demo, [loaded], frame_samplings=["chat", "base"], decodings=decodings)
    assert [len(record["frame_indices"]) for record in both.records] == [len(loaded), 24]


def test_captions_made_elsewhere_are_one_more_cell(demo, tmp_path):
    result = run_sweep(demo, CLIPS[:2], decodings=[{"max_new_tokens": 3}])
    jsonl, table = tmp_path / "other.jsonl", tmp_path / "other.csv"
    jsonl.write_text(
        "".join(json.dumps({"video": f"/data/{Path(p).name}", "text": "Ein Stern."}) + "\n" for p in CLIPS)
    )
    table.write_text(f'video,caption\n{Path(CLIPS[1]).name},"A star, red."\n')
    both = result.with_captions("other tool", jsonl).with_captions("by hand", table)
    rows = both.to_frame()
    assert rows["cell"].value_counts().to_dict() == {"default": 2, "other tool": 2, "by hand": 1}
    assert rows[rows["cell"] == "by hand"]["video"].tolist() == [CLIPS[1]]
    assert len(result.to_frame()) == 2  # the first is as it was
    support = score_support(demo, both.all_records)["support"]
    assert len(support) == len(rows) and np.isfinite(support).all()
    for name, path, message in (
        ("other tool", jsonl, "already has this name"),
        ("default", jsonl, "already has this name"),
        ("x", tmp_path / "none.csv", "none.csv"),
    ):
        with pytest.raises(ValueError, match=message):
            both.with_captions(name, path)
    (tmp_path / "strangers.csv").write_text("video,text\nother.mp4,a\n")
    with pytest.raises(ValueError, match="none of the sweep's videos"):
        both.with_captions("strangers", tmp_path / "strangers.csv")
    (tmp_path / "wordless.csv").write_text("video,words\nother.mp4,a\n")
    with pytest.raises(ValueError, match="wordless"):
        read_captions(tmp_path / "wordless.csv")


def test_captions_made_elsewhere_in_any_form(tmp_path):
    rows = [{"video": "a.mp4", "text": "Red, then blue."}, {"video": "caf\udce9.mp4", "text": "001"}]
    (tmp_path / "a.csv").write_bytes(
        b"\xef\xbb\xbffile_name;caption;id\r\na.mp4;Red, then blue.;1\r\n\r\ncaf\xe9.mp4;001;2\r\n"
    )
    with pytest.warns(UserWarning, match=r"file_name is read as video; ignored columns \['id'\]"):
        assert read_captions(tmp_path / "a.csv") == rows
    (tmp_path / "a.tsv").write_bytes(b"video\ttext\na.mp4\tRed, then blue.\ncaf\xe9.mp4\t001\n")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    for name in ("a.tsv", "a.json", "a.jsonl"):
        assert read_captions(tmp_path / name) == rows


@pytest.mark.parametrize(
    "line, words",
    [
        (b"b.mp4,Red, then blue.", "column caption: followed by 1 more, 'then blue.'; put quotation marks around"),
        (b'b.mp4,"Red', "not valid CSV"),
        (b"b.mp4,", "column caption: must be a text, not None"),
        (b"b.mp4", "column caption: must be a text, not None"),
        (b"b.mp4,NaN", "column caption: must be a text, not None"),
        (b"b.mp4,Caf\xe9", "column caption: 'Caf\\udce9' is not UTF-8"),
        (b",Red.", "column video: must be a file name, not None"),
    ],
)
def test_a_bad_row_among_captions_made_elsewhere_is_named(tmp_path, line, words):
    (tmp_path / "a.csv").write_bytes(b"video,caption\na.mp4,Red.\n" + line + b"\n")
    with pytest.raises(ValueError) as error:
        read_captions(tmp_path / "a.csv")
    assert str(error.value).startswith(f"{tmp_path / 'a.csv'}, row 2 (line 3), {words}")


def test_the_duration_is_estimated_from_the_first_clip_that_can_be_captioned(demo, tmp_path, capsys):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    broken, axes = [str(tmp_path / "broken.mp4"), str(tmp_path / "gone.mp4")], {"decodings": [{"max_new_tokens": 4}]}
    plan = plan_sweep([*broken, CLIPS[0]], prompts=["Why?", "How?"], **axes)
    assert 0 < plan.estimate_seconds(demo) < 60
    assert plan_sweep(broken, **axes).estimate_seconds(demo) is None
    assert plan_sweep(CLIPS[:1], **axes).estimate_seconds(demo, timeout_seconds=1e-3) is None
    result = run_sweep(demo, plan)
    assert repr(result) == "SweepResult(2 captions and 4 errors in 2 cells)"
    printed = "".join(capsys.readouterr())
    assert "6 captions to make, 0 done before" in printed and "6/6 captions, 4 errors" in printed
    for path in broken:
        assert printed.count(f"error: {path}") == 1 and printed.count("(the same error 2 times)") == 2


def test_a_row_that_cannot_be_used_is_an_error_of_its_own_requests(demo, tmp_path):
    clips = [{"video": CLIPS[0]}, {"video": CLIPS[0], "start": "soon"}]
    with pytest.warns(UserWarning, match="row 2, column start"):
        items = find_clips(clips)
    records = run_sweep(demo, items, tmp_path / "s.jsonl", decodings=[{"max_new_tokens": 3}]).records
    assert [record["status"] for record in records] == ["ok", "error"] and "row 2" in records[1]["error"]


def test_a_file_name_that_may_be_one_of_several_is_refused(demo, tmp_path):
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / Path(CLIPS[0]).name
    shutil.copy(CLIPS[0], twin)
    result = run_sweep(demo, [CLIPS[0], str(twin)], decodings=[{"max_new_tokens": 3}])
    captions = tmp_path / "captions.csv"
    captions.write_text(f"video,text\n{twin},by path\n")
    assert result.with_captions("mine", captions).all_records[-1]["video"] == str(twin)
    captions.write_text(f"video,text\n{twin.name},by name\n")
    with pytest.raises(ValueError, match="any of 2 clips"):
        result.with_captions("mine", captions)


def test_a_clip_that_is_named_twice_is_captioned_once(demo, tmp_path):
    result = run_sweep(demo, [CLIPS[0], CLIPS[0]], tmp_path / "s.jsonl", decodings=[{"max_new_tokens": 3}])
    assert len(result.records) == 2 and len(CaptionStore(tmp_path / "s.jsonl").lines()) == 1


def test_references_of_a_manifest_come_along(demo, tmp_path):
    items = find_clips([{"video": CLIPS[0], "reference": "A star."}, {"video": CLIPS[1]}])
    table = run_sweep(demo, items, decodings=[{"max_new_tokens": 3}]).to_frame()
    assert table["reference"].tolist()[0] == "A star." and table["reference"].isna().tolist() == [False, True]


@pytest.mark.parametrize("name", ["01_caption_clips", "02_view_frames"])
def test_a_cell_is_parameters_of_notebooks(name):
    import nbformat

    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    for settings in plan_sweep(CLIPS[:1], **AXES).cells:
        parameters = settings.to_parameters()
        assert all(f"\n{name}: " in f"\n{cell.source}" for name in parameters)
        assert Decoding.of(parameters["decoding"]) == settings.sampled(0)
        assert FrameSampling.of(parameters["frame_sampling"]) == settings.frame_sampling


def sweeping_process(path, num_prompts):
    """A sweep in a process of its own, to be killed."""
    code = f"""
import capkit
captioner = capkit.load_captioner("demo", device="cpu")
prompts = [f"What is object {{number}}?" for number in range({num_prompts})]
decodings = [{{"max_new_tokens": 3}}, {{"temperature": 1.0, "max_new_tokens": 3}}]
result = capkit.run_sweep(captioner, {CLIPS!r}, {str(path)!r}, prompts=prompts, decodings=decodings, num_samples=2)
assert all(record["status"] == "ok" for record in result.records)
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)


def kill_and_go_on(path, num_prompts, num_kills, random):
    """Kill it so many times at random moments in its writing, then let it end; lines of the store."""
    total = 6 * num_prompts * 3
    for _ in range(num_kills):
        process, before = sweeping_process(path, num_prompts), path.read_bytes().count(b"\n") if path.exists() else 0
        wanted = before + random.randint(1, max(1, total // (num_kills + 1) - 1))
        while not (path.exists() and path.read_bytes().count(b"\n") >= wanted):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert sweeping_process(path, num_prompts).wait() == 0
    return CaptionStore(path).lines()


@pytest.mark.filterwarnings("ignore:.*torn")
def test_killed_and_restarted_it_ends_with_the_planned_records(tmp_path):
    lines = kill_and_go_on(tmp_path / "sweep.jsonl", num_prompts=12, num_kills=2, random=Random(0))
    assert len(lines) == len({line["request"] for line in lines}) == 6 * 12 * 3


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*torn")
def test_soak_killed_again_and_again_none_is_computed_twice(tmp_path):
    num_kills = int(os.environ.get("CAPKIT_SOAK_KILLS", 10))
    lines = kill_and_go_on(tmp_path / "sweep.jsonl", num_prompts=60, num_kills=num_kills, random=seeded_random())
    print(f"{num_kills} kills, {len(lines)} lines, {len({line['request'] for line in lines})} requests")
    assert len(lines) == len({line["request"] for line in lines}) == 6 * 60 * 3


def test_a_file_name_that_is_not_utf_8_has_its_row(demo, capsys):
    result = run_sweep(demo, ["/nowhere/\udcff.mp4"], prompts=["a"])
    (row,) = result.to_frame().to_dict("records")
    assert row["clip"] == r"/nowhere/\udcff.mp4" and row["error"] == r"/nowhere/\udcff.mp4: no such file"
    assert result.records[0]["video"] == "/nowhere/\udcff.mp4"
    assert r"error: /nowhere/\udcff.mp4: no such file" in "".join(capsys.readouterr())
