"""Layouts of the trainers of 2026 and of data sets: each is read back by its reader's rule, written down anew here."""

import json
import os
import re
import tarfile
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from odd_captions import NAMES, TEXTS
from PIL import Image
from store_records import make_record
from video_factory import encode_clip

from capkit import CaptionStore
from capkit.export import LAYOUTS, check_export, export_dataset
from capkit.files import file_sha256

tomllib = pytest.importorskip("tomllib")  # from Python 3.11
FRAMES = 57


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def write_store(folder, captions, clip, alike=1):
    """A store with a record for each pair of a clip's name and a caption, or fields; equal names are the same clip.

    So many clips that follow each other are `alike`: their bytes are the same.
    """
    folder.mkdir(exist_ok=True)
    with open(folder / "captions.jsonl", "w") as file:
        for number, (name, caption) in enumerate(captions):
            path = folder / "clips" / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(
                    clip.read_bytes() + b"\0\0\0\x10free" + f"{number:08}".encode()
                )  # a box without meaning
            fields = {"text": caption} if isinstance(caption, str) else caption
            fields = {"video_sha256": file_sha256(path), "prompt": "Describe."} | fields
            print(json.dumps(make_record(number, path, **fields)), file=file)
    return CaptionStore(folder / "captions.jsonl")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return encode_clip(tmp_path_factory.mktemp("a clip") / "clip.mp4", range(FRAMES), fps=16, size=(32, 48))


# ---- the readers' own rules, written down a second time from their sources -----------------------------------------


def rows_of(path):
    with open(path) as file:
        return json.load(file) if path.suffix == ".json" else [json.loads(line.strip()) for line in file]


def read_diffsynth(root, table):
    if table.endswith(".csv"):
        frame = pd.read_csv(root / table)
        rows = [frame.iloc[number].to_dict() for number in range(len(frame))]
    else:
        rows = rows_of(root / table)
    return [(os.path.join(root, row["video"]), [row["prompt"]]) for row in rows]


def read_ltx(root, table):
    if table.endswith(".csv"):
        rows = [row for _, row in pd.read_csv(root / table).iterrows()]
    else:
        rows = rows_of(root / table)
    return [(root / row["video"].strip(), [row["caption"]]) for row in rows]


def config_of(root, suffix):
    return root.with_name(root.name + suffix).read_text(encoding="ascii")


def read_musubi(root):
    config = tomllib.loads(config_of(root, ".toml"))
    assert config["general"].keys() == {"resolution", "caption_extension", "batch_size", "enable_bucket"}
    (data,) = config["datasets"]
    assert data["frame_extraction"] == "full" and data["max_frames"] == 49
    assert Path(data["cache_directory"]).parent == root
    if "video_jsonl_file" in data:
        rows = rows_of(Path(data["video_jsonl_file"]))
        return [(row["video_path"], [row["caption"]]) for row in rows]
    pairs = []
    for video in sorted(Path(data["video_directory"]).glob("*.mp4")):
        with open(os.path.splitext(video)[0] + config["general"]["caption_extension"], encoding="utf-8") as file:
            pairs.append((video, [file.read().strip()]))
    return pairs


def read_simpletuner(root):
    videos, texts = json.loads(config_of(root, ".json"))
    assert videos["dataset_type"] == "video" and videos["caption_strategy"] == "textfile"
    assert texts["dataset_type"] == "text_embeds" and texts["default"]
    assert videos["video"] == {"num_frames": 49, "min_frames": 49}
    pairs = []
    for video in Path(videos["instance_data_dir"]).glob("*.mp4"):
        caption = video.with_suffix(".txt").read_bytes().decode("utf-8")
        pairs.append((video, [line for line in caption.split("\n") if line] if "\n" in caption else [caption]))
    return pairs


def read_diffusion_pipe(root):
    (directory,) = (config := tomllib.loads(config_of(root, ".toml")))["directory"]
    assert config["frame_buckets"] == [1, 49]
    folder, pairs = Path(directory["path"]), []
    with open(folder / "captions.json") as file:
        captions = json.load(file)
    for video in folder.glob("*"):
        if video.suffix not in (".txt", ".npz", ".json", ".parquet", ".bak", ".db"):
            assert isinstance(captions[video.name], list)
            pairs.append((video, captions.pop(video.name)))
    assert not captions
    return pairs


def read_onetrainer(root):
    (concept,) = json.loads(config_of(root, ".json"))
    pairs = []
    for video in Path(concept["path"]).glob("*.mp4"):
        with open(video.with_suffix(".txt"), encoding="utf-8") as file:
            pairs.append((video, [text for text in [line.strip() for line in file] if text != ""] or [""]))
    return pairs


def read_ai_toolkit(root):
    pairs = []
    for folder, _, files in os.walk(root):
        for name in files:
            if name.lower().endswith((".mp4", ".mov", ".jpg", ".png")):
                with open(os.path.splitext(os.path.join(folder, name))[0] + ".txt", encoding="utf-8") as file:
                    caption = ", ".join(file.read().split(","))
                for word in ("[name]", "[trigger]"):
                    caption = caption.replace(word, "")
                pairs.append((os.path.join(folder, name), [caption]))
    return pairs


def read_fastvideo(root):
    datasets = pytest.importorskip("datasets")
    file = str(root / "videos2caption.json")
    rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(root.parent / "cache"))
    rows = rows.rename_column("cap", "caption").rename_column("path", "name")
    for row in rows:
        assert row["fps"] == 16 and row["num_frames"] == FRAMES and row["resolution"] == {"height": 32, "width": 48}
    return [(os.path.join(root, "videos", row["name"]), row["caption"]) for row in rows]


def read_videotuna(root):
    return [
        (os.path.join(root, row["path"]), [row["caption"]]) for _, row in pd.read_csv(root / "metadata.csv").iterrows()
    ]


def read_open_sora(root):
    frame = pd.read_csv(root / "metadata.csv")
    assert list(frame) == ["path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps"]
    wanted = [FRAMES, 32, 48, 32 / 48, 32 * 48, 16]
    assert (frame[list(frame)[2:]] == wanted).all(axis=None)
    return [(frame["path"].iloc[number], [frame["text"].iloc[number]]) for number in range(len(frame))]


def read_webdataset(root):
    """Clips by their content, because they are in archives."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(
        "webdataset", data_dir=str(root), split="train", cache_dir=str(root.parent / "cache")
    ).cast_column("mp4", datasets.Video(decode=False))
    assert all(row["txt"] == row["json"]["captions"][0] for row in rows)
    return [(row["mp4"]["bytes"], row["json"]["captions"]) for row in rows]


def read_video_folder(root):
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(
        "videofolder", data_dir=str(root), split="train", cache_dir=str(root.parent / "cache")
    ).cast_column("video", datasets.Video(decode=False))
    assert all(row["caption"] == row["captions"][0] for row in rows)
    return [(row["video"]["path"], row["captions"]) for row in rows]


READERS = {
    "diffsynth": lambda root: read_diffsynth(root, "metadata.jsonl"),
    "diffsynth-json": lambda root: read_diffsynth(root, "metadata.json"),
    "diffsynth-csv": lambda root: read_diffsynth(root, "metadata.csv"),
    "ltx-2": lambda root: read_ltx(root, "dataset.jsonl"),
    "ltx-2-csv": lambda root: read_ltx(root, "dataset.csv"),
    **{"musubi": read_musubi, "musubi-jsonl": read_musubi, "simpletuner": read_simpletuner},
    **{"diffusion-pipe": read_diffusion_pipe, "onetrainer": read_onetrainer, "ai-toolkit": read_ai_toolkit},
    **{"fastvideo": read_fastvideo, "videotuna": read_videotuna, "open-sora": read_open_sora},
    **{"webdataset": read_webdataset, "metadata-parquet": read_video_folder},
}
SEVERAL = ("simpletuner", "diffusion-pipe", "onetrainer", "fastvideo", "webdataset", "metadata-parquet")
LINE_ENDS, CARRIAGE_RETURNS = {"separator 0xa", "separator 0xd", "both line ends"}, {"separator 0xd", "both line ends"}
NUMBERS = {"like a number", "like a fraction", "like a truth", "like nothing", "like no number"}
NOT_IN = {
    **dict.fromkeys(("diffsynth-csv", "ltx-2-csv", "videotuna", "open-sora"), NUMBERS | {"zero"}),
    "musubi": CARRIAGE_RETURNS,
    "simpletuner": {"separator 0xa", "both line ends"},
    "onetrainer": LINE_ENDS,
    "ai-toolkit": {"commas", "a comma in a number", "a trigger"} | CARRIAGE_RETURNS,
    "fastvideo": {"like a date", "like a time"},
}


def assert_read_back(layout, root, report):
    """What the layout's own reader reads is what the report says, clip by clip, in its order of captions."""
    found = READERS[layout](root)
    wanted = {}
    for row in report.exported.itertuples():
        wanted.setdefault(row.video, []).append(row.text)
    if layout == "webdataset":
        pairs = [(Path(video).read_bytes(), tuple(texts)) for video, texts in wanted.items()]
        assert Counter((content, tuple(texts)) for content, texts in found) == Counter(pairs)
    else:
        assert {os.path.realpath(video): texts for video, texts in found} == wanted
    assert len(found) == len(wanted)


# ---- every caption with every name ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cross_product(tmp_path_factory, clip):
    """48 odd captions of clips of 48 odd names, in folders of their own, so that many stems are equal."""
    captions = [(f"my videos/{number}/{name}", text) for number, text in enumerate(TEXTS.values()) for name in NAMES]
    return write_store(tmp_path_factory.mktemp("cross product") / "of all", captions, clip, alike=48)


@pytest.mark.parametrize("layout", READERS)
def test_48_odd_captions_of_clips_of_48_odd_names(request, tmp_path, layout):
    report = export_dataset(request.getfixturevalue("cross_product"), layout, tmp_path / "out", token_limit=10_000)
    texts, refused = list(TEXTS), {}
    for row in report.refused.itertuples():
        refused.setdefault(texts[int(Path(row.video).parent.name)], []).append(row.reason)
    assert refused.keys() == NOT_IN.get(layout, set()) and all(len(reasons) == 48 for reasons in refused.values())
    why = {reason for text, reasons in refused.items() if text != "zero" for reason in reasons}
    assert all(LAYOUTS[layout].trainer in reason for reason in why)
    for row in report.exported.itertuples():
        assert row.text == list(TEXTS.values())[int(Path(row.video).parent.name)]
    assert len(report.exported) == (48 - len(refused)) * 48
    assert_read_back(layout, tmp_path / "out", report)


# ---- several captions, and none ------------------------------------------------------------------------------------

SHORT, LONG = {"prompt": "Briefly."}, {"prompt": "Describe."}


@pytest.fixture
def sweep(tmp_path, clip):
    """Three clips, each with a long caption and two samples of a short one; the third clip's samples are alike."""
    captions = []
    for name in ("a", "b", "c"):
        captions.append((f"{name}.mp4", {"text": f"A small dog runs in {name}.", **LONG}))
        for sample in range(2):
            text = f"Dog in {name}, {'' if name == 'c' else sample}."
            captions.append((f"{name}.mp4", {"text": text, "sample": sample, **SHORT}))
    return write_store(tmp_path / "sweep", captions, clip)


@pytest.mark.parametrize("layout", SEVERAL)
def test_several_captions_of_a_clip(sweep, tmp_path, layout):
    report = export_dataset(sweep, layout, tmp_path / "out", several=True)
    assert_read_back(layout, tmp_path / "out", report)
    assert "3 clips with 8 captions exported" in str(report) and not report.table["near_duplicate"].all()
    assert list(report.refused["reason"]) == ["another caption of the clip reads the same"]
    assert not any(report.exported["same_file_as"])
    report = export_dataset(sweep, layout, tmp_path / "chosen", several=True, choose=[SHORT, LONG])
    assert_read_back(layout, tmp_path / "chosen", report)
    texts = list(report.exported[report.exported["file"] == report.exported["file"].iloc[0]]["text"])
    assert texts == ["Dog in a, 0.", "Dog in a, 1.", "A small dog runs in a."]
    report = export_dataset(sweep, layout, tmp_path / "cell", several=True, choose=SHORT | {"sample": 1})
    assert list(report.exported["text"]) == ["Dog in a, 1.", "Dog in b, 1.", "Dog in c, ."]
    assert_read_back(layout, tmp_path / "cell", report)
    with pytest.raises(ValueError, match="several captions of 3 clips"):
        export_dataset(sweep, layout, tmp_path / "one")


def test_texts_edited_by_hand_stand_among_the_others(sweep, tmp_path):
    sweep.edit(sweep.current()[1]["request"], "By hand.")
    report = export_dataset(sweep, "diffusion-pipe", tmp_path / "out", several=True, choose=[LONG, SHORT])
    assert list(report.exported["text"])[:3] == ["A small dog runs in a.", "By hand.", "Dog in a, 1."]
    assert list(report.exported["edited"])[:3] == [False, True, False]
    assert_read_back("diffusion-pipe", tmp_path / "out", report)


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - set(SEVERAL)))
def test_where_the_trainer_reads_one_caption_several_are_refused(sweep, tmp_path, layout):
    with pytest.raises(ValueError, match=r"several=True: .* reads one caption a clip; .* simpletuner, diffusion-pipe"):
        export_dataset(sweep, layout, tmp_path / "out", several=True)
    assert not (tmp_path / "out").exists()


CANNOT_BE_EMPTY = {"cogvideo", "diffusers", "cogvideox-factory", "metadata-csv", "diffsynth-csv", "ltx-2-csv"} | {
    "videotuna",
    "open-sora",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_share_of_empty_captions(tmp_path, clip, layout):
    store = write_store(tmp_path / "store", [(f"{number}.mp4", f"Dog {number} runs.") for number in range(10)], clip)
    settings = {"empty_share": 0.3, "trigger_word": "" if LAYOUTS[layout].adds_trigger else "ZORP"}
    if layout in CANNOT_BE_EMPTY:
        with pytest.raises(ValueError, match="empty_share=0.3: .* cannot read an empty caption"):
            export_dataset(store, layout, tmp_path / "out", **settings)
        return
    report = export_dataset(store, layout, tmp_path / "out", **settings)
    empty = report.exported[report.exported["text"] == ""]
    assert len(report.exported) == 10 and len(empty) == 3 and "3 clips with an empty caption" in str(report)
    assert set(empty["changed_by"]) == {"emptied"} and all(empty["original"]) and not any(empty["over_limit"])
    if layout in READERS:
        assert_read_back(layout, tmp_path / "out", report)
    again = export_dataset(store, layout, tmp_path / "again", **settings)
    check_export(layout, tmp_path / "other", **settings, seed=1)
    other = export_dataset(store, layout, tmp_path / "other", **settings, seed=1)
    assert other.options["seed"] == 1
    assert list(again.table["text"]) == list(report.table["text"]) != list(other.table["text"])
    if LAYOUTS[layout].adds_trigger:
        with pytest.raises(ValueError, match="would put the trigger word before empty captions"):
            export_dataset(store, layout, tmp_path / "trigger", empty_share=0.3, trigger_word="ZORP")
    with pytest.raises(ValueError, match="empty_share=1: must be at least 0 and below 1"):
        export_dataset(store, layout, tmp_path / "all", empty_share=1)


# ---- archives and pictures -----------------------------------------------------------------------------------------


@pytest.fixture
def with_strips(tmp_path, clip):
    """Three clips with picture strips in colours of their own."""
    names = ("red", "green", "blue")
    store = write_store(
        tmp_path / "store",
        [(f"{name}.mp4", {"text": f"A {name} dog.", "strip": f"{name}.webp"}) for name in names],
        clip,
    )
    store.strips.mkdir()
    for name in names:
        Image.new("RGB", (64, 32), name).save(store.strips / f"{name}.webp")
    return store


def test_shards_hold_clips_captions_and_strips(with_strips, tmp_path, monkeypatch):
    monkeypatch.setattr("capkit.export.layouts.archives.MAX_SHARD_CLIPS", 2)
    report = export_dataset(with_strips, "webdataset", tmp_path / "out")
    assert_read_back("webdataset", tmp_path / "out", report)
    members = []
    for shard in sorted((tmp_path / "out").iterdir()):
        with tarfile.open(shard) as opened:
            members.append(opened.getnames())
            for member in opened.getmembers():
                assert member.isreg() and member.uname == member.gname == "" and member.mtime == 0
                if member.name.endswith(".webp"):
                    content = (with_strips.strips / member.name).read_bytes()
                    assert opened.extractfile(member).read() == content
    assert members == [
        [f"{name}.{suffix}" for name in names for suffix in ("mp4", "json", "txt", "webp")]
        for names in (("red", "green"), ("blue",))
    ]
    (with_strips.strips / "blue.webp").unlink()  # all or none: samples must have the same members
    export_dataset(with_strips, "webdataset", tmp_path / "without")
    with tarfile.open(tmp_path / "without" / "clips-00000.tar") as opened:
        assert opened.getnames() == [
            f"{name}.{suffix}" for name in ("red", "green") for suffix in ("mp4", "json", "txt")
        ]


def test_a_clip_in_a_shard_that_has_changed_is_noticed(with_strips, tmp_path, clip):
    export_dataset(with_strips, "webdataset", tmp_path / "out")
    path = tmp_path / "store" / "clips" / "red.mp4"
    path.write_bytes(clip.read_bytes())
    record = dict(with_strips.current()[0]) | {"request": "another", "video_sha256": file_sha256(path)}
    with_strips.append(record | {"created": "2027-01-01T00:00:00+00:00"})
    with pytest.raises(ValueError, match="holds other captions"):
        export_dataset(with_strips, "webdataset", tmp_path / "out", choose="latest")
    report = export_dataset(with_strips, "webdataset", tmp_path / "out", choose="latest", overwrite=True)
    assert_read_back("webdataset", tmp_path / "out", report)


def test_parquet_holds_strips_as_pictures(with_strips, tmp_path):
    (with_strips.strips / "blue.webp").unlink()
    report = export_dataset(with_strips, "metadata-parquet", tmp_path / "out")
    assert_read_back("metadata-parquet", tmp_path / "out", report)
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(
        "videofolder", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")
    ).remove_columns("video")
    for row, colour in zip(rows, ((255, 0, 0), (0, 128, 0), None), strict=True):
        strip = row["strip"]
        assert strip is None if colour is None else strip.size == (64, 32)
        if colour:
            assert max(abs(a - b) for a, b in zip(strip.getpixel((9, 9)), colour, strict=True)) < 9


def test_a_missing_package_is_named_before_anything_is_done(with_strips, tmp_path, monkeypatch):
    monkeypatch.setattr("capkit.export.dataset.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="layout='metadata-parquet': needs pyarrow: pip install pyarrow"):
        export_dataset(with_strips, "metadata-parquet", tmp_path / "out")


# ---- the folder, and the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", READERS)
def test_the_same_again_other_captions_and_foreign_files(with_strips, tmp_path, layout):
    root = tmp_path / "an odd 'place'" / "out"
    export_dataset(with_strips, layout, root)
    before = {path: path.lstat().st_mtime_ns for path in root.parent.rglob("*") if "export.json" not in path.name}
    export_dataset(with_strips, layout, root)
    after = {path: path.lstat().st_mtime_ns for path in root.parent.rglob("*") if "export.json" not in path.name}
    assert {path: time for path, time in after.items() if path in root.rglob("*")} == {
        path: time for path, time in before.items() if path in root.rglob("*")
    }
    with_strips.edit(with_strips.current()[0]["request"], "Our dog, it runs.")
    with pytest.raises(ValueError, match="holds other captions"):
        export_dataset(with_strips, layout, root)
    report = export_dataset(with_strips, layout, root, overwrite=True)
    assert_read_back(layout, root, report)
    (root / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match="holds 'notes.md', not part of such an export"):
        export_dataset(with_strips, layout, root, overwrite=True)


FLAGS = {  # of the entry points, as their parsers at the commits of the layouts' docstrings have them
    "diffsynth": {
        *("--dataset_base_path", "--dataset_metadata_path", "--height", "--width", "--num_frames", "--learning_rate"),
        *("--model_id_with_origin_paths", "--num_epochs", "--remove_prefix_in_ckpt", "--output_path", "--lora_rank"),
        *("--lora_base_model", "--lora_target_modules"),
    },
    "ltx-2": {"--resolution-buckets", "--model-path", "--text-encoder-path", "--lora-trigger"},
    "musubi": {
        *("--dataset_config", "--vae", "--t5", "--batch_size", "--num_cpu_threads_per_process", "--mixed_precision"),
        *("--task", "--dit", "--sdpa", "--fp8_base", "--optimizer_type", "--learning_rate", "--gradient_checkpointing"),
        *("--network_module", "--network_dim", "--timestep_sampling", "--discrete_flow_shift", "--max_train_epochs"),
        *("--output_dir", "--output_name"),
    },
    "simpletuner": set(),
    "diffusion-pipe": {"--num_gpus", "--deepspeed", "--config"},
    "onetrainer": {"--config-path", "--config-value"},
    "ai-toolkit": set(),
    "fastvideo": {
        *("--nproc_per_node", "--model_path", "--mode", "--workload_type", "--preprocess.video_loader_type"),
        *("--preprocess.dataset_type", "--preprocess.dataset_path", "--preprocess.dataset_output_dir"),
        *("--preprocess.preprocess_video_batch_size", "--preprocess.dataloader_num_workers", "--preprocess.max_height"),
        *(
            "--preprocess.max_width",
            "--preprocess.num_frames",
            "--preprocess.train_fps",
            "--preprocess.samples_per_file",
        ),
        *("--preprocess.flush_frequency", "--preprocess.video_length_tolerance_range"),
    },
    "videotuna": {"--base", "--logdir", "--name", "--devices", "--auto_resume"},
    "open-sora": {"--nproc_per_node", "--dataset.data-path", "--model.from_pretrained"},
    "webdataset": set(),
    "metadata-parquet": set(),
}


@pytest.mark.parametrize("layout", READERS)
def test_the_command_has_the_trainers_flags_and_names_what_is_there(with_strips, tmp_path, layout):
    root = tmp_path / "an odd 'place'" / "out"
    command = export_dataset(with_strips, layout, root, trigger_word="ZORP").command
    alike = re.sub("-(jsonl|json|csv)$", "", layout)
    assert set(re.findall(r"(?<=\s)--[\w.-]+", command)) == FLAGS[alike]
    assert ("ZORP" in command) == LAYOUTS[layout].adds_trigger
    assert str(root) in command.replace("'\"'\"'", "'").replace("\\'", "'") and "{" not in command.replace("[{", "")


# ---- what the trainers leave out -----------------------------------------------------------------------------------

FEW = "48 frames are too few: .* takes 49 or more"
LEFT_OUT = {
    **dict.fromkeys(("ltx-2", "ltx-2-csv", "simpletuner", "videotuna"), (48, 16, FEW)),
    "diffusion-pipe": (76, 25, "76 frames at 25 a second are too few: it leaves out clips of fewer than 49 at 16"),
    "fastvideo": (500, 25, "20 s are too long: it leaves out clips of more than 15.3125 s"),
}


@pytest.mark.parametrize("layout", LEFT_OUT)
def test_what_a_trainer_leaves_out_is_refused_and_the_clip_beside_it_exported(tmp_path, clip, layout):
    num_frames, fps, message = LEFT_OUT[layout]
    store = write_store(tmp_path / "store", [("good.mp4", "A good dog runs.")], clip)
    other = encode_clip(tmp_path / "other.mp4", range(num_frames), fps=fps, size=(32, 48))
    store.append(make_record(7, other))
    report = export_dataset(store, layout, tmp_path / "out")
    assert list(report.exported["text"]) == ["A good dog runs."]
    assert re.search(message, report.refused["reason"].item())
    longer = encode_clip(tmp_path / "longer.mp4", range(77), fps=25, size=(32, 48))
    store.append(make_record(8, longer))
    assert len(export_dataset(store, layout, tmp_path / "longer").exported) == 2
