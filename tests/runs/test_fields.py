"""Prompts with fields: filled clip by clip, refused before a run where they cannot be, and compared unfilled."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from video_factory import encode_clip

import capkit
from capkit import CaptionStore, Clip, Decoding, Prompt, run_sweep
from capkit.export import choose_records
from capkit.runs import Item, caption_clips, caption_shard, check_fields, find_clips, merge, request_settings
from capkit.runs.caption import plan_clips
from capkit.runs.store import ModelIdentity

MODEL = ModelIdentity("m", "f", "float32", None)
FEW = Decoding(max_new_tokens=3)
JSON = 'Answer as {"a": {"b": [1]}}, not {}, {1} or {one two}.'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips of 2 and 3.4 seconds, and a manifest."""
    folder = tmp_path_factory.mktemp("clips") / "farm"
    folder.mkdir()
    for name, count in (("cow", 20), ("goat", 34)):
        encode_clip(folder / f"{name}.mp4", range(count), fps=10)
    rows = "video,camera,shot type,caption,year\ncow.mp4,left,wide,A {cow}.,2024\ngoat.mp4,right,close up,,2025\n"
    (folder / "clips.csv").write_text(rows)
    return folder


@pytest.fixture
def items(folder):
    with pytest.warns(match=r"ignored columns \['camera', 'shot type', 'year'\].*as fields, such as \{camera\}"):
        return find_clips(folder / "clips.csv")


def prompts(items, prompt):
    return [settings["prompt"] for settings in plan_clips(MODEL, items, prompt)]


@pytest.mark.parametrize(
    "prompt, filled",
    [
        ("What does the {name} do?", ["What does the cow do?", "What does the goat do?"]),
        ("{folder}/{name}: {shot type}, {camera}", ["farm/cow: wide, left", "farm/goat: close up, right"]),
        ("{name} {name}", ["cow cow", "goat goat"]),
        (
            'Like {"name": "{name}", "of": {"a": 1}}',
            [f'Like {{"name": "{name}", "of": {{"a": 1}}}}' for name in ("cow", "goat")],
        ),
        ("{{name}} is {name}", ["{name} is cow", "{name} is goat"]),
        ('{{"name": {{"is": "{name}"}}}}', ['{"name": {"is": "cow"}}', '{"name": {"is": "goat"}}']),
        ("{{{name}}}", ["{cow}", "{goat}"]),
        ("In {year}, {start} s", ["In 2024, 0 s", "In 2025, 0 s"]),
        (JSON, [JSON, JSON]),
        ("a } b {", ["a } b {", "a } b {"]),
    ],
)
def test_are_filled_clip_by_clip(items, prompt, filled):
    assert prompts(items, prompt) == filled


def test_values_are_not_fields_again(items):
    assert (
        prompts(items[:1], "Is it so: {caption}")
        == prompts(items[:1], "Is it so: {reference}")
        == ["Is it so: A {cow}."]
    )


def test_of_tables_in_memory_and_rows_with_prompts_of_their_own(folder):
    table = pd.DataFrame(
        {
            "video": [*map(str, sorted(folder.glob("*.mp4")))],
            "prompt": ["Who is {who}?", None],
            "who": ["Ann", "Bo"],
            "n": [3, None],
        }
    )
    with pytest.warns(match="ignored columns"):
        items = find_clips(table)
    assert prompts(items, "Where is {who}?") == ["Who is Ann?", "Where is Bo?"]
    assert prompts(items[:1], "{name}") == ["Who is Ann?"]
    assert prompts([Item("/clips/a b.mp4", columns={"n": 3.0, "name": "Ann "})], "{n} of {name}.") == ["3 of Ann."]


@pytest.mark.parametrize(
    "prompt, message",
    [
        (
            "By {camra}?",
            r"prompt='By \{camra\}\?': unknown field 'camra'; did you mean 'camera'\? there are: name, .*camera",
        ),
        ("By {camra}?", r"for these braces themselves write \{\{camra\}\} \(clip: .*cow.mp4\)"),
        ("Is it so: {caption}", r"prompt='Is it so: \{caption\}': \{caption\} is empty \(clip: .*goat.mp4\)"),
        (Prompt("Why?", history=[("{camra}?", "a")]), "history=.*unknown field 'camra'"),
        (Prompt("Why?", steps=["{camra}?"]), "steps=.*unknown field 'camra'"),
    ],
)
def test_what_cannot_be_filled_is_refused_before_a_run(captioner, items, tmp_path, prompt, message):
    loaded = []
    for run in (
        lambda: check_fields(Prompt.of(prompt), items),
        lambda: caption_clips(captioner, items, tmp_path / "a.jsonl", prompt),
        lambda: caption_shard(lambda: loaded.append(1), items, tmp_path / "out", prompt=prompt),
        lambda: run_sweep(captioner, items, tmp_path / "b.jsonl", prompts=[prompt]),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    assert not loaded and not (tmp_path / "a.jsonl").exists() and not (tmp_path / "b.jsonl").exists()


def test_an_own_prompt_that_cannot_be_filled_names_its_clip(folder):
    items = [Item("a.mp4"), Item("b.mp4", "Who is {who}?")]
    with pytest.raises(ValueError, match=r"'Who is \{who\}\?': unknown field 'who'.*\(clip: .*b.mp4\)"):
        plan_clips(MODEL, items)
    bad = Item("c.mp4", error="clips.csv, row 3: no such thing")  # its record says so, whatever the prompt
    assert plan_clips(MODEL, [bad], "{who}")[0]["error"] == bad.error


def test_a_request_is_that_of_the_words_it_is_filled_to(folder):
    video = str(folder / "cow.mp4")
    assert request_settings(MODEL, video, "A {name}?")["request"] == request_settings(MODEL, video, "A cow?")["request"]
    plain = request_settings(MODEL, video, JSON)
    assert plain["prompt"] == JSON and not {"prompt_pattern", "prompt_fields", "steps"} & plain.keys()
    filled = request_settings(MODEL, video, Prompt("A {name}?", steps=["Who?", "{folder}?"], history=[("{name}", "b")]))
    assert filled["prompt_fields"] == {"name": "cow", "folder": "farm"}
    assert [filled["prompt"], filled["steps"], filled["history"]] == ["A cow?", ["Who?", "farm?"], [["cow", "b"]]]
    assert [filled[f"{name}_pattern"] for name in ("prompt", "steps", "history")] == [
        "A {name}?",
        ["Who?", "{folder}?"],
        [["{name}", "b"]],
    ]
    literal, left = request_settings(MODEL, video, "{{duration}}"), request_settings(MODEL, video, "{duration}")
    assert literal["request"] != left["request"] and literal["prompt"] == "{duration}"


class TestDuration:
    def test_is_that_of_the_video_or_the_window_and_the_file_is_read_once(
        self, captioner, folder, tmp_path, monkeypatch
    ):
        prompt = "What happens in these {duration} s of {name}?"
        items = find_clips(
            [
                *({"video": str(path)} for path in sorted(folder.glob("*.mp4"))),
                {"video": str(folder / "cow.mp4"), "start": 0.5, "end": 1.25},
            ]
        )
        expected = [f"What happens in these {what}?" for what in ("2 s of cow", "3.4 s of goat", "0.8 s of cow")]
        read, load = [], capkit.load_clip
        monkeypatch.setattr(
            "capkit.runs.prefetch.load_clip", lambda path, *args: read.append(path) or load(path, *args)
        )
        store = CaptionStore(tmp_path / "captions.jsonl")
        records = caption_clips(captioner, items, store, prompt, FEW, batch_size=3)
        assert [record["prompt"] for record in records] == expected and len(read) == 3
        assert {record["prompt_pattern"] for record in records} == {prompt}
        assert {frozenset(record["prompt_fields"]) for record in records} == {frozenset({"name"})}
        for record, words in zip(records, expected, strict=True):
            clip = load(record["video"], "chat", record["start_seconds"], record["end_seconds"])
            assert record["text"] == captioner.caption(clip, words, FEW).text
        assert caption_clips(captioner, items, store, prompt, FEW) == records and len(read) == 3
        swept = run_sweep(captioner, items, store, prompts=[prompt], decodings=[FEW])
        assert swept.records == records and len(read) == 3
        assert swept.to_frame()["prompt"].unique().tolist() == [prompt]

    def test_of_frames_in_memory(self, captioner, random_clip):
        clip = Clip.from_frames(random_clip(3).frames)
        record, *_ = run_sweep(captioner, clip, prompts=["{duration} s?"], decodings=[FEW]).records
        assert record["prompt"] == "3 s?"
        with pytest.raises(ValueError, match=r"\{name\} is empty \(clip: frames in memory"):
            run_sweep(captioner, clip, prompts=["{name}?"])

    def test_a_replaced_video_has_one_current_caption(self, captioner, tmp_path):
        store, video = CaptionStore(tmp_path / "captions.jsonl"), tmp_path / "a.mp4"
        for count in (10, 20):
            encode_clip(video, range(count), fps=10)
            caption_clips(captioner, find_clips(video), store, "{duration} s?", FEW)
        assert [record["prompt"] for record in store.lines()] == ["1 s?", "2 s?"]
        assert [record["prompt"] for record in store.current()] == ["2 s?"]


def test_rows_of_one_video_stay_apart(captioner, folder, tmp_path):
    items = [Item(str(folder / "cow.mp4"), columns={"what": what}) for what in ("horns", "tail")]
    store = CaptionStore(tmp_path / "captions.jsonl")
    caption_clips(captioner, items, store, "Where are the {what}?", FEW)
    assert [record["prompt"] for record in store.current()] == ["Where are the horns?", "Where are the tail?"]
    chosen = choose_records(store, {"prompt": "Where are the tail?"})
    assert [one.record["prompt"] for one in chosen] == ["Where are the tail?"]
    with pytest.raises(ValueError, match="several captions"):
        choose_records(store, {"prompt": "Where are the {what}?"})


def test_a_value_that_one_prompt_cannot_have_fails_that_prompt_only(captioner, folder, tmp_path):
    items = [Item(str(folder / "cow.mp4"), columns={"what": "x" * 100_001})]
    result = run_sweep(captioner, items, tmp_path / "a.jsonl", prompts=["{what}", "Why?"], decodings=[FEW])
    bad, good = result.records
    assert "has 100001 characters, more than 100000" in bad["error"] and good["status"] == "ok"


def test_shards_agree_and_are_merged(captioner, items, tmp_path):
    arguments = {"prompt": "What does the {name} do {camera}?", "decoding": FEW}
    for index in range(2):
        caption_shard(lambda: captioner, items, tmp_path, f"{index}/2", **arguments)
    merged = merge(tmp_path)
    assert not merged.problems and merged.num_ok == 2
    assert [record["prompt"] for record in merged.store.current()] == [
        "What does the cow do left?",
        "What does the goat do right?",
    ]
    others = [Item(item.video, columns=dict(item.columns) | {"camera": "top"}) for item in items]
    caption_shard(lambda: captioner, others, tmp_path, "1/2", **arguments)
    assert "another list of clips" in " ".join(merge(tmp_path).problems)


def test_cells_of_a_sweep_are_compared_unfilled(captioner, items, tmp_path):
    axes = {"prompts": ["What does the {name} do?", "Why?"], "decodings": [FEW]}
    result = run_sweep(captioner, items, tmp_path / "a.jsonl", **axes)
    assert result.to_frame().groupby("cell").size().to_dict() == {"What does the {name} do?": 2, "Why?": 2}
    assert [record["prompt"] for record in result.records[::2]] == ["What does the cow do?", "What does the goat do?"]
    again = run_sweep(captioner, items, tmp_path / "a.jsonl", **axes)
    assert again.records == result.records and len(CaptionStore(tmp_path / "a.jsonl").lines()) == 4


def test_on_the_command_line(folder, tmp_path):
    command = [sys.executable, "-m", "capkit", "caption-shard", str(folder / "clips.csv"), "--output", str(tmp_path)]
    command += ["--decoding", '{"max_new_tokens": 3}', "--step", "What is {camera}?", "--step", "And {name}?"]
    run = subprocess.run([*command, "--prompt", "By {camra}?"], capture_output=True, text=True)
    assert run.returncode == 2 and "did you mean 'camera'?" in run.stderr, run.stderr
    assert not list(tmp_path.glob("*.jsonl"))
    run = subprocess.run([*command, "--prompt", "Well, {name}?"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (store,) = tmp_path.glob("shard-*-of-00001.jsonl")
    records = [json.loads(line) for line in store.read_text().splitlines()]
    assert sorted(record["prompt"] for record in records) == ["Well, cow?", "Well, goat?"]
    assert sorted(record["steps"] for record in records) == [
        ["What is left?", "And cow?"],
        ["What is right?", "And goat?"],
    ]
    assert all(len(record["step_answers"]) == 2 for record in records)
