"""Layouts: 48 names by 48 captions read back, commands and settings that start trainers, folders, cells of CSV."""

import json
import os
import re
import shlex
from inspect import getdoc
from pathlib import Path

import pandas as pd
import pytest
import yaml
from store_records import make_record
from test_export import HUGGING_FACE, READERS, TEXTS
from video_factory import encode_clip

from capkit import CaptionStore
from capkit.export import LAYOUTS, export_dataset
from capkit.export.layouts import LINE_SEPARATORS
from capkit.runs import TrainerSettings
from capkit.text import spreadsheet_cell

NAMES = (
    """
dog| dog |dog.v1.mp4|it's "a", dog|собака 🐕|DOG|test_1|b-train-2 videos|validation|dev|val.2|eval_test|training|videos
my videos.mp4|.hidden|-flag|--version|__init__|_|a&b|a;b|a=b|@home|$HOME|~user|[1]|{x}|(2)|*|?|!|日本|école|%20
a b|a  b|0|007|1e5|nan|None|a,b|"quoted"|back\\slash|x'y|tab\t.|line\u2028end
""".strip()
    .replace("\n", "|")
    .split("|")
)
MORE = ["=1+1", "+1 dog", "-a dog", "@dog", '=HYPERLINK("http://a")', "a\0b\0c", "\\", '"', "'", "``", "<b>dog</b>"]
MORE += ["%s", "a|b", "N/A", "[video] dog", "日本の犬。", "ﬁ ligature", "1,5", "a" * 3000, "null", "\u200ba dog"]
CAPTIONS = list(dict.fromkeys([*TEXTS.values(), *MORE]))[:48]


def test_there_are_48_of_each():
    assert len(NAMES) == len({*NAMES}) == len(CAPTIONS) == len({*CAPTIONS}) == 48


@pytest.fixture(scope="module")
def cross_product(tmp_path_factory):
    """A store with each caption for a clip of each name, all with the same content; in folders of their own."""
    folder = tmp_path_factory.mktemp("48 by 48")
    clip = encode_clip(folder / "clip.mp4", range(60), size=(32, 32))
    record, store = make_record(0, clip), CaptionStore(folder / "captions.jsonl")
    with open(store.path, "w") as file:
        for number, caption in enumerate(CAPTIONS):
            (folder / str(number)).mkdir()
            for name in NAMES:
                path = folder / str(number) / f"{name}.mp4"
                os.link(clip, path)
                own = {"request": f"{path}", "video": str(path), "text": caption}
                file.write(json.dumps(record | own) + "\n")
    return store


@pytest.mark.parametrize("layout", [*READERS, *HUGGING_FACE])
def test_48_names_by_48_captions_are_read_back_pair_by_pair(cross_product, tmp_path, monkeypatch, layout):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    report = export_dataset(cross_product, layout, tmp_path / "out", token_limit=10_000)
    cache = {"cache_dir": str(tmp_path / "cache")} if layout in HUGGING_FACE else {}
    found = list({**READERS, **HUGGING_FACE}[layout](tmp_path / "out", **cache))
    wanted = {(row.video, row.text) for row in report.exported.itertuples()}
    assert {(os.path.realpath(clip), text) for clip, text in found} == wanted and len(found) == len(wanted)
    refused = {CAPTIONS[int(Path(video).parent.name)] for video in report.refused["video"]}
    assert len(report.refused) == len(refused) * 48 and len(wanted) == (48 - len(refused)) * 48
    fine = [text for text in CAPTIONS if text.strip() and not re.search(f"[{LINE_SEPARATORS}]", text)]
    assert len(refused & {*fine}) <= 8  # such as dates where load_dataset reads JSON
    for text, row in ((CAPTIONS[int(Path(row.video).parent.name)], row) for row in report.exported.itertuples()):
        assert row.text == text.strip()


# ---- commands ------------------------------------------------------------------------------------------------------

SETTINGS = TrainerSettings()
MUST_HAVE = {
    "cogvideo": """--model_path --model_name --model_type --training_type --output_dir --data_root --caption_column
        --video_column --train_resolution --report_to""",
    "diffusers": "--pretrained_model_name_or_path --instance_data_root --caption_column --video_column",
    "cogvideox-factory": "--pretrained_model_name_or_path --data_root --caption_column --video_column --frame_buckets",
    "finetrainers": "--model_name --pretrained_model_name_or_path --dataset_config --training_type",
    "videox-fun": "--pretrained_model_name_or_path --train_data_dir --train_data_meta --train_mode",
    "sat": "--base",
    "cogkit": "--yaml",
    "cogkit-i2v": "--yaml",
}
TRAINERS = [*MUST_HAVE]  # the others: test_trainer_layouts.py
SCRIPTS = {
    "cogvideox-factory": "training/cogvideox/cogvideox_text_to_video_lora.py",
    "videox-fun": "scripts/cogvideox_fun/train_lora.py",
    "diffusers": "examples/cogvideo/train_cogvideox_lora.py",
    "sat": "train_video.py",
}


@pytest.mark.parametrize("layout", TRAINERS)
def test_commands_have_the_flags_that_their_scripts_need_and_know(layout):
    kind, root = LAYOUTS[layout], Path("/data/my set; rm")
    command, comment = kind.command(root, "ZORP", SETTINGS).split("  # ")
    words = shlex.split(command)
    (script,) = [place for place, word in enumerate(words) if word.endswith(".py")]
    assert words[script] == SCRIPTS.get(layout, "train.py")
    flags = [word for word in words[script:] if word.startswith("--")]
    facts = getdoc(type(kind)) + (getdoc(LAYOUTS["cogkit"]) if layout == "cogkit-i2v" else "")
    assert {*MUST_HAVE[layout].split()} <= {*flags} and len(flags) == len({*flags})
    assert {*flags} <= {*re.findall(r"--[a-z_]+", facts)} | {"--seed"}
    named = str(kind.config_path(root)) if kind.config_suffix else str(root)
    assert named in words and ("torchvision 0.25 or older" in comment) == (
        layout in ("cogkit", "cogkit-i2v", "sat", "finetrainers")
    )
    assert ("datasets 3.4.1" in comment) == (layout in ("cogkit", "cogkit-i2v", "finetrainers"))
    assert re.search("[0-9a-f]{7}", facts)


@pytest.mark.parametrize("layout", TRAINERS)
def test_the_number_of_frames_is_that_of_the_windows(layout):
    kind, root = LAYOUTS[layout], Path("/data/set")
    for num_frames in (SETTINGS.num_frames, 81):
        settings = TrainerSettings(num_frames)
        text = kind.command(root, "", settings) + kind.config(root, "", settings)
        assert re.search(rf"\b{num_frames}(x768x1360|\b)", text) and TrainerSettings.of(kind.window_rule, settings)


def test_the_files_of_settings_load_and_have_what_their_trainers_need(tmp_path):
    root = tmp_path / "a set: 'of' #1 日本"
    clip = encode_clip(tmp_path / "a.mp4", range(60))
    (store := CaptionStore(tmp_path / "captions.jsonl")).append(make_record(0, clip))
    paths = {}
    for layout in ("cogkit", "cogkit-i2v", "sat", "finetrainers"):
        report = export_dataset(store, layout, root / layout, trigger_word="ZORP", trainer={"num_frames": 81})
        paths[layout] = LAYOUTS[layout].config_path(root / layout)
        assert shlex.quote(str(paths[layout])) in report.command and paths[layout].parent == root
    for layout, name in (("cogkit", "cogvideox1.5-t2v"), ("cogkit-i2v", "cogvideox1.5-i2v")):
        settings = yaml.safe_load(paths[layout].read_text(encoding="utf-8"))
        needed = {
            "name4train",
            "model_path",
            "model_name",
            "data_root",
            "train_epochs",
            "checkpointing_steps",
            "batch_size",
        }
        needed |= {"checkpointing_limit", "mixed_precision", "validation_steps", "train_resolution", "enable_packing"}
        assert needed | {"training_type", "strategy", "output_dir"} <= settings.keys()
        assert (
            settings["strategy"] == "DDP" and settings["model_name"] == name and settings["mixed_precision"] == "bf16"
        )
        assert settings["data_root"] == str(root / layout) and settings["train_resolution"] == [81, 768, 1360]
    sat = yaml.safe_load(paths["sat"].read_text(encoding="utf-8"))
    assert sat["args"] == {"train_data": [str(root / "sat")], "valid_data": [str(root / "sat")]}
    assert (
        repr(sat["data"]["params"]) == "{'fps': 8, 'max_num_frames': 81}"
    )  # whole numbers, as its own files have them
    (data,) = json.loads(paths["finetrainers"].read_text())["datasets"]
    assert data["id_token"] == "ZORP" and data["data_root"] == str(root / "finetrainers")
    assert data["video_resolution_buckets"] == [[81, 480, 720]]


@pytest.mark.parametrize("layout", ["cogkit", "finetrainers", "sat"])
def test_a_file_of_someone_else_is_not_replaced_by_the_settings(tmp_path, layout):
    clip = encode_clip(tmp_path / "a.mp4", range(60))
    (store := CaptionStore(tmp_path / "captions.jsonl")).append(make_record(0, clip))
    path = LAYOUTS[layout].config_path(tmp_path / "out")
    path.write_text("mine: 1\n")
    with pytest.raises(ValueError, match=f"{re.escape(path.name)}, where the trainer's settings go, is something else"):
        export_dataset(store, layout, tmp_path / "out")
    assert path.read_text() == "mine: 1\n"


# ---- folders and cells ---------------------------------------------------------------------------------------------


class TestFolders:
    @pytest.fixture
    def store(self, tmp_path):
        clip = encode_clip(tmp_path / "a.mp4", range(120))
        (store := CaptionStore(tmp_path / "captions.jsonl")).append(make_record(0, clip))
        return store

    @pytest.mark.parametrize("name", ["a [1]", "what*", "what?", "a::b", "$HOME", "${HOME}"])
    def test_that_datasets_misreads_are_refused_and_others_are_not(self, store, tmp_path, name):
        for layout, kind in LAYOUTS.items():
            if kind.uses_datasets:
                with pytest.raises(ValueError, match="which `datasets` takes for a pattern; choose another folder"):
                    export_dataset(store, layout, tmp_path / name / layout)
            elif "${" not in name or layout not in ("sat", "videotuna"):
                export_dataset(store, layout, tmp_path / name / layout)
            with_datasets = (*HUGGING_FACE, "webdataset", "metadata-parquet", "fastvideo")
            assert kind.uses_datasets == (layout in with_datasets)

    @pytest.mark.parametrize("name", ["a [1]", "a::b", "$HOME"])
    def test_datasets_does_misread_them(self, store, tmp_path, name):
        datasets = pytest.importorskip("datasets")
        export_dataset(store, "metadata-jsonl", tmp_path / "good", clips="copy")
        (tmp_path / "good").rename(tmp_path / name)
        with pytest.raises(Exception):  # noqa: B017  # of many kinds
            rows = datasets.load_dataset("videofolder", data_dir=str(tmp_path / name), cache_dir=str(tmp_path / "c"))
            rows = rows["train"].cast_column("video", datasets.Video(decode=False))
            assert Path(rows[0]["video"]["path"]).is_file()

    def test_through_a_link_too(self, store, tmp_path):
        (tmp_path / "a [1]").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "a [1]")
        with pytest.raises(ValueError, match="which `datasets` takes for a pattern"):
            export_dataset(store, "cogkit", tmp_path / "link" / "out")


def test_cells_that_spreadsheets_run_reach_the_trainer_unchanged_and_the_report_tells(tmp_path):
    clip = encode_clip(tmp_path / "0.mp4", range(60))
    store = CaptionStore(tmp_path / "captions.jsonl")
    texts = ["=1+1 dogs run by", "+1 dog runs by", "-1 dog runs by", "@dog runs by", "a\0b runs by", "A dog = a dog."]
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.mp4"
        if not path.exists():
            path.hardlink_to(clip)
        store.append(make_record(number, path, text=text))
    report = export_dataset(store, "metadata-csv", tmp_path / "csv")
    read = [text for text in texts if "\0" not in text]
    assert pd.read_csv(tmp_path / "csv" / "metadata.csv")["caption"].to_list() == read
    assert "has NULs: pandas before 3 reads only what is before them" in report.refused["reason"].item()
    cells = list(report.exported["csv_cell"])
    assert [bool(cell) for cell in cells] == [True] * 4 + [False] and "begins with '='" in cells[0]
    assert "4 captions that spreadsheets take for formulas" in str(report)
    plain = export_dataset(store, "metadata-jsonl", tmp_path / "jsonl")
    assert not plain.exported["csv_cell"].any() and "that spreadsheets" not in str(plain)
    for_people = plain.table.map(spreadsheet_cell)["text"]
    assert list(for_people) == ["'" + text for text in texts[:4]] + ["a\\0b runs by", texts[5]]
