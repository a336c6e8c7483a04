"""Which clips globs, folders, links, manifests and lists name, and what is left out."""

import json
import os
import random
import re
import shutil
import subprocess
import warnings
from glob import glob
from pathlib import Path

import imageio_ffmpeg
import pytest

import capkit
from capkit.runs import DEMO_CLIPS, find_clips
from capkit.runs.clips import VIDEO_SUFFIXES, Item

H264 = ("-c:v", "libx264")
MPEG2 = ("-c:v", "mpeg2video")
# Suffixes by what `ffmpeg` writes into such files.
FORMATS = {
    ("-f", "mp4", *H264): ".mp4 .m4v",
    ("-f", "mov", *H264): ".mov .qt",
    ("-f", "f4v", *H264): ".f4v",
    ("-f", "3gp", *H264): ".3gp",
    ("-f", "3g2", *H264): ".3g2",
    ("-f", "matroska", *H264): ".mkv .mk3d",
    ("-f", "webm", "-c:v", "libvpx"): ".webm",
    ("-f", "ivf", "-c:v", "libvpx"): ".ivf",
    ("-f", "obu", "-c:v", "libaom-av1", "-cpu-used", "8"): ".obu",
    ("-f", "ogv", "-c:v", "libtheora"): ".ogv .ogm",
    ("-f", "avi", "-c:v", "mpeg4"): ".avi .divx",
    ("-f", "nut", "-c:v", "mpeg4"): ".nut",
    ("-f", "asf", "-c:v", "wmv2"): ".wmv .asf",
    ("-f", "flv", "-c:v", "flv"): ".flv",
    ("-f", "rm", "-c:v", "rv20"): ".rm .rmvb",
    ("-f", "gif"): ".gif",
    ("-f", "apng"): ".apng",
    ("-f", "mpeg", *MPEG2): ".mpg .mpeg .mpe .m2p",
    ("-f", "vob", *MPEG2): ".vob",
    ("-f", "mpeg1video"): ".m1v",
    ("-f", "mpeg2video"): ".m2v",
    ("-f", "mpegts", *H264): ".ts .m2t .tp .trp",
    ("-f", "mpegts", "-mpegts_m2ts_mode", "1", *H264): ".mts .m2ts",
    ("-f", "wtv", *MPEG2): ".wtv",
    ("-f", "mxf", *MPEG2): ".mxf",
    ("-f", "dv", "-s", "720x576"): ".dv",
    ("-f", "yuv4mpegpipe"): ".y4m",
    ("-f", "h264", *H264): ".h264 .264",
    ("-f", "hevc", "-c:v", "libx265", "-x265-params", "log-level=none"): ".h265 .265 .hevc",
    ("-f", "mjpeg", "-pix_fmt", "yuvj420p"): ".mjpeg .mjpg",
}


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def link(path, target):
    """Make a link, relative to its own folder."""
    try:
        path.symlink_to(target)
    except OSError:
        pytest.skip("no right to make links")  # Windows


def found(folder, pattern=""):
    """Names of the clips, relative to the folder, and what the warning says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        items = find_clips(os.path.join(folder, pattern) if pattern else folder)
    (said,) = [str(warning.message) for warning in caught] or [""]
    assert all(warning.filename == __file__ for warning in caught)
    return [os.path.relpath(item.video, folder) for item in items], said


class TestFindClips:
    def test_folder_glob_file_and_list(self, tmp_path):
        for name in ("b.mp4", "a.MOV", "notes.txt", "sub/c.webm", "sub/d d.mkv"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.touch()
        everything = [str(tmp_path / name) for name in ("a.MOV", "b.mp4", "sub/c.webm", "sub/d d.mkv")]
        for videos in (tmp_path, f"{tmp_path}/**", f"{tmp_path}/**/*.*"):
            with pytest.warns(UserWarning, match=r"left out 1 not named like videos \(\.txt 1\)$"):
                assert [item.video for item in find_clips(videos)] == everything
        assert find_clips(f"{tmp_path}/*.mp4") == [Item(str(tmp_path / "b.mp4"))]
        assert [item.video for item in find_clips([f"{tmp_path}/sub", tmp_path / "b.mp4"], limit=2)] == [
            str(tmp_path / "sub/c.webm"),
            str(tmp_path / "sub/d d.mkv"),
        ]

    def test_a_name_must_be_there_and_a_row_need_not(self, tmp_path, monkeypatch):
        touch(tmp_path, "a.mp4", "empty/notes.txt")
        link(tmp_path / "link.mp4", "gone.mp4")
        (tmp_path / "list.csv").write_text("video\ngone.mp4\n")
        (tmp_path / "none.csv").write_text("video\n")
        monkeypatch.chdir(tmp_path)
        for name in ("gone.mp4", "gone.csv", "gone/", "gone", "link.mp4"):
            for videos in (name, [name], ["a.mp4", name], [{"video": "a.mp4"}, Path(name)]):
                with pytest.raises(ValueError, match=rf"{name.strip('/')}.*: there is no such file or folder"):
                    find_clips(videos)
        found_none = {name: f"no videos found in '{re.escape(name)}'" for name in ("*.mkv", "[1].mp4", "empty")}
        for name, message in (found_none | {"none.csv": "none.csv: has no rows"}).items():
            for videos in (name, ["a.mp4", name]):
                with pytest.raises(ValueError, match=message):
                    find_clips(videos)
        gone = Item("gone.mp4")
        assert find_clips(["a.mp4", "list.csv"]) == [Item("a.mp4"), gone]
        with pytest.raises(ValueError, match="'gone.mp4': there is no such file"):  # then there is nothing at all
            find_clips("list.csv")
        assert find_clips([{"video": "a.mp4"}, {"video": "gone.mp4"}]) == [Item("a.mp4"), gone]
        where = re.escape(f"(relative paths begin at {tmp_path})")
        with pytest.raises(ValueError, match=rf"'sub/gone': there is no such file or folder {where}"):
            find_clips("sub/gone")

    def test_rows_whose_files_are_missing_are_counted_at_once(self, tmp_path, monkeypatch):
        touch(tmp_path, "here.mp4")
        (tmp_path / "list.csv").write_text("video,start\nwrong/1.mp4,\nhere.mp4,\nwrong/2.mp4,\nx.mp4,soon\n")
        with pytest.warns(UserWarning, match=rf"^2 of 4 clips: there is no such file as {tmp_path}/wrong/1.mp4$"):
            find_clips(tmp_path / "list.csv")
        monkeypatch.setattr("capkit.runs.clips.MOST_LOOKED_FOR", 1)
        with pytest.warns(UserWarning, match="1 of the first 1 clip: there is no such file as"):
            find_clips(tmp_path / "list.csv")

    @pytest.mark.skipif(os.name != "posix", reason="pipes")
    @pytest.mark.parametrize("name", ["pipe", "pipe.ts", "pipe.mp4"])  # manifests: tests/test_files.py
    def test_a_pipe_is_not_waited_for(self, tmp_path, name):
        os.mkfifo(tmp_path / name)
        (item,) = find_clips(tmp_path / name)
        with pytest.raises(capkit.VideoError, match="is not a regular file|no such file|not a"):
            capkit.load_clip(item.video)

    def test_a_name_with_glob_characters(self, tmp_path):
        touch(tmp_path, "set [1]/a.mp4")
        assert found(tmp_path, "set [1]/*.mp4") == found(tmp_path, "set [1]") == (["set [1]/a.mp4"], "")
        (tmp_path / "take [1].mp4").touch()
        assert find_clips(tmp_path / "take [1].mp4") == [Item(str(tmp_path / "take [1].mp4"))]

    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_manifest(self, tmp_path, kind):
        path = tmp_path / f"list.{kind}"
        if kind == "csv":
            path.write_text(
                "video,prompt,reference,start,end\n007.mp4,,,,\n"
                'sub/b.mp4,"Why, ""so""?",None,1.5,4\n/abs/c.mp4,NA,null,,2\n'
            )
        else:
            rows = [
                {"video": "007.mp4"},
                {"video": "sub/b.mp4", "prompt": 'Why, "so"?', "reference": "None", "start": 1.5, "end": 4},
                {"video": "/abs/c.mp4", "prompt": "NA", "reference": "null", "end": 2},
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert find_clips(path) == [
            Item(str(tmp_path / "007.mp4")),
            Item(str(tmp_path / "sub/b.mp4"), 'Why, "so"?', "None", 1.5, 4.0),
            Item("/abs/c.mp4", "NA", "null", 0.0, 2.0),
        ]

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("a.csv", "file,prompt\nx.mp4,\n", "has no column 'video'"),
            ("a.csv", "video,prompt,video\nx.mp4,,\n", "column 'video' is there twice"),
            ("a.csv", 'video,"prompt\nx.mp4,\n', "cannot be read as a manifest"),
            ("a.tsv", "", "has no rows below its first line, which must name the columns"),
            ("a.json", '{"video": "x.mp4"}', "must be a list"),
            ("a.json", "[]", "has no rows"),
            ("a.jsonl", "\n\n", "has no rows"),
            ("a.jsonl", '{"video": "a.mp4"}\n{"video": "b\n', "row 2 (line 2), not valid JSON"),
            ("a.jsonl", "[" * 100_000, "row 1 (line 1), not valid JSON"),
            ("a.parquet", "PAR1", "cannot be read as a manifest"),
            ("a.txt", "video\nx.mp4\n", "is a text, not a video; a manifest is named .csv"),
            ("a.csv", "", "has no rows below its first line"),
            ("a.csv", "clips/a.mp4\n", "has no rows below its first line, which must name the columns, such as video"),
            ("a.csv", "video\n\x00\xff", "row 1 (line 2), "),
            ("a.jsonl", "[1]\n", "row 1 (line 1), must be an object"),
            ("a.jsonl", "{broken\n{", "row 1 (line 1), not valid JSON"),
            ("a.csv", "video,start\nx.mp4,soon\n", "row 1 (line 2), column start: start_seconds must be"),
            ("a.csv", "video\n", "has no rows below its first line"),
        ],
    )
    def test_bad_manifests(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError) as error:
            find_clips(tmp_path / name)
        assert message in str(error.value) and name in str(error.value)

    def test_misspelt_columns_are_named(self, tmp_path):
        (tmp_path / "a.csv").write_text("video,promt\nx.mp4,Why?\n")
        (tmp_path / "x.mp4").touch()
        with pytest.warns(UserWarning, match=r"ignored columns \['promt'\]; columns are video \("):
            find_clips(tmp_path / "a.csv")
        with pytest.raises(ValueError, match="nothing else"):
            find_clips([{"video": "x.mp4", "promt": "Why?"}])

    def test_nothing_found(self, tmp_path):
        for videos in (tmp_path, f"{tmp_path}/*.mp4", []):
            with pytest.raises(ValueError, match="no videos found in .*: nothing is there"):
                find_clips(videos)
        touch(tmp_path, "a.txt", "b.txt", "c.jpg", "Makefile", ".hidden/d.mp4")
        with pytest.raises(ValueError) as error:
            find_clips(tmp_path)
        for left_out in ("4 not named like videos (.txt 2, no suffix 1, .jpg 1)", f"1 hidden ({tmp_path}/.hidden)"):
            assert left_out in str(error.value)
        with pytest.raises(ValueError, match="limit=0"):
            find_clips("x.mp4", limit=0)

    @pytest.mark.parametrize("videos", ["", " ", [""], ["a.mp4", ""]])
    def test_an_empty_name_is_not_the_current_folder(self, tmp_path, monkeypatch, videos):
        touch(tmp_path, "a.mp4", "sub/b.mp4")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="a name is empty"):
            find_clips(videos)
        assert find_clips(".") == find_clips(Path()) == [Item("a.mp4"), Item(os.path.join("sub", "b.mp4"))]
        assert find_clips("*.mp4") == [Item("a.mp4")]

    @pytest.mark.parametrize("entry", [None, 3, 1.5, b"a.mp4", ["a.mp4"]])
    def test_entries_that_are_no_names(self, entry):
        for videos in (["demo", entry], *([entry] if not isinstance(entry, (bytes, list)) else [])):
            with pytest.raises(ValueError) as error:
                find_clips(videos)
            assert repr(entry) in str(error.value)

    @pytest.mark.parametrize("form", ["x.mp4", ["x.mp4"], "x/", "x/*.mp4", ["x/*.mp4"], "x.csv", {"video": "x.mp4"}])
    def test_what_is_not_there_is_an_error(self, tmp_path, monkeypatch, form):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=r"x\.mp4.*no such file|no such f|no videos found"):
            find_clips(form)

    def test_a_pattern_may_name_manifests(self, tmp_path):
        touch(tmp_path, "a1.mp4", "a2.mp4", "b1.mp4", "b2.mp4")
        for name in "ab":
            (tmp_path / f"{name}.csv").write_text(f"video\n{name}1.mp4\n{name}2.mp4\n")
        assert found(tmp_path, "*.csv") == (["a1.mp4", "a2.mp4", "b1.mp4", "b2.mp4"], "")

    def test_a_dictionary_is_one_clip_and_any_iterable_a_list(self, tmp_path, monkeypatch):
        touch(tmp_path, "a.mp4")
        monkeypatch.chdir(tmp_path)
        clip = {"video": "a.mp4", "prompt": "Why?"}
        assert find_clips(clip) == find_clips([clip]) == find_clips(iter([clip])) == [Item("a.mp4", "Why?")]


class TestLinks:
    def test_links_are_followed_but_not_in_circles(self, tmp_path):
        folder = tmp_path / "clips"
        touch(tmp_path, "clips/a.mp4", "clips/z/b.mp4", "far/c.mp4", "far/deep/d.mp4")
        link(folder / "again", "z")  # before "z" in the alphabet
        link(folder / "z/up", "..")
        link(folder / "z/here", ".")
        link(folder / "set", "../far")
        link(tmp_path / "far/back", "../clips/z")
        expected = ["a.mp4", "set/c.mp4", "set/deep/d.mp4", "z/b.mp4"]
        for pattern in ("", "**/*.mp4", "**"):
            names, said = found(folder, pattern)
            assert names == expected
            assert said.startswith(
                f"{os.path.join(folder, pattern) if pattern else folder}: left out 4 folders already"
            )
            assert said.count("...") == 1 and str(folder / "again") in said
        assert found(folder, "again/*.mp4") == (["again/b.mp4"], "")  # as named
        link(tmp_path / "linked", "clips")
        assert len(find_clips([tmp_path / "linked/z/b.mp4"])) == 1
        assert found(tmp_path / "linked")[0] == expected

    def test_a_linked_file_is_a_clip_under_each_name(self, tmp_path):
        touch(tmp_path, "pool/1.mp4")
        for name in ("cats", "dogs"):
            (tmp_path / name).mkdir()
            link(tmp_path / name / "x.mp4", "../pool/1.mp4")
        assert found(tmp_path) == (["cats/x.mp4", "dogs/x.mp4", "pool/1.mp4"], "")

    def test_links_to_nowhere_are_named(self, tmp_path):
        touch(tmp_path, "a.mp4")
        for name, target in (("b.mp4", "gone.mp4"), ("set", "/gone/folder"), ("loop", "loop")):
            link(tmp_path / name, target)
        for pattern in ("", "**/*.mp4"):
            names, said = found(tmp_path, pattern)
            assert names == ["a.mp4"] and "left out 3 unreadable" in said
            assert all(str(tmp_path / name) in said for name in ("b.mp4", "set", "loop"))

    def test_a_folder_that_may_not_be_read_is_named(self, tmp_path, monkeypatch):
        touch(tmp_path, "a.mp4", "locked/b.mp4")
        scandir = os.scandir

        def refusing(folder):
            if Path(folder).name == "locked":
                raise PermissionError(13, "Permission denied", folder)
            return scandir(folder)

        monkeypatch.setattr(os, "scandir", refusing)
        names, said = found(tmp_path)
        assert names == ["a.mp4"] and said.endswith(f"left out 1 unreadable ({tmp_path}/locked: Permission denied)")
        with pytest.raises(ValueError, match="no videos found in .*locked: Permission denied"):
            find_clips(tmp_path / "locked")

    @pytest.mark.parametrize("seed", range(20))
    def test_patterns_find_the_files_that_glob_finds_and_none_twice(self, tmp_path, seed):
        """In trees with links but without circles, which `glob` does not survive."""
        rng, folders = random.Random(seed), [tmp_path / "t"]
        folders[0].mkdir()
        for number in range(12):
            path = rng.choice(folders) / f"{rng.choice('ab')}{number}"
            if rng.random() < 0.3:  # to a folder apart, so that there is no circle
                touch(tmp_path, f"far{number % 2}/{rng.choice(('a/', 'b/', ''))}x{number}.mp4")
                link(path, tmp_path / f"far{number % 2}")
            else:
                path.mkdir()
                folders.append(path)
            touch(rng.choice(folders), f"{rng.choice('ab')}{number}.mp4", f"{number}.txt")
        for pattern in ("**/*.mp4", "*/*.mp4", "**/a*/*.mp4", "**/a*/**/b*.mp4", "*/**/[ax]*", "**/**/b*/*", "a*/**"):
            truth = {os.path.realpath(path) for path in glob(f"{tmp_path}/t/{pattern}", recursive=True)}
            truth = {path for path in truth if path.endswith(".mp4")}
            try:
                names = [str(tmp_path / "t" / name) for name in found(tmp_path / "t", pattern)[0]]
            except ValueError:
                names = []
            assert len(names) == len(truth) and {*map(os.path.realpath, names)} == truth


class TestLeftOut:
    def test_hidden_files_and_folders_unless_named(self, tmp_path):
        hidden = ("._a.mp4", ".ipynb_checkpoints/x.mp4", "__MACOSX/sub/y.mp4")
        touch(tmp_path, "a.mp4", ".DS_Store", ".gitignore", "sub/b.mp4", *hidden)
        for pattern in ("", "**/*.mp4", "**"):
            names, said = found(tmp_path, pattern)
            assert names == ["a.mp4", "sub/b.mp4"]
            left_out = [str(tmp_path / name) for name in ("._a.mp4", ".ipynb_checkpoints", "__MACOSX")]
            assert said.endswith(f": left out 3 hidden ({', '.join(left_out)})")
        assert found(tmp_path, "._*") == (["._a.mp4"], "")
        assert found(tmp_path, ".ipynb*/*.mp4") == ([".ipynb_checkpoints/x.mp4"], "")
        for pattern in ("__MACOSX/**/*.mp4", "__*/sub/*.mp4"):
            assert found(tmp_path, pattern) == (["__MACOSX/sub/y.mp4"], "")
        assert [item.video for item in find_clips(tmp_path / ".ipynb_checkpoints")] == [str(tmp_path / hidden[1])]

    def test_files_that_no_video_is_named_like_unless_the_pattern_asks_for_them(self, tmp_path):
        sidecars = [f"{number}.{suffix}" for number in range(3) for suffix in ("txt", "json", "JPG", "webp")]
        touch(tmp_path, *(f"{number}.mp4" for number in range(3)), *sidecars, "x.bin", "sub/clip")
        names, said = found(tmp_path, "*")
        assert names == ["0.mp4", "1.mp4", "2.mp4"]
        assert said.endswith("left out 13 not named like videos (.jpg 3, .json 3, .txt 3, ...)")
        assert found(tmp_path, "*.mp4") == (names, "")
        assert found(tmp_path, "*.bin") == (["x.bin"], "")
        assert found(tmp_path, "*/clip") == (["sub/clip"], "")
        assert find_clips(tmp_path / "0.txt") == [Item(str(tmp_path / "0.txt"))]

    def test_typescript(self, tmp_path):
        (tmp_path / "app.ts").write_text("export const greeting = 'Grüße';\n" * 40, encoding="utf-8")
        (tmp_path / "node.mts").write_text("export {};\n")
        packets = bytes([0x47, 0x40, 0x00, 0x10, 0x00]).ljust(188, b"\xff") * 6
        (tmp_path / "a.ts").write_bytes(packets)
        (tmp_path / "late.ts").write_bytes(packets[100:])
        touch(tmp_path, "failed download.ts")
        names, said = found(tmp_path)
        assert names == ["a.ts", "failed download.ts", "late.ts"] and said.endswith(
            f"left out 2 in plain text ({tmp_path}/app.ts, {tmp_path}/node.mts)"
        )

    def test_nothing_is_said_of_the_demo_clips(self):
        assert len(found(DEMO_CLIPS)[0]) == 6 and found(DEMO_CLIPS)[1] == ""


def test_what_is_found_by_suffix_can_be_read(tmp_path):
    source = ["-f", "lavfi", "-i", "testsrc=size=128x96:rate=25:duration=2", "-pix_fmt", "yuv420p"]
    for number, (settings, suffixes) in enumerate(FORMATS.items()):
        first, *others = [tmp_path / f"{number}{suffix}" for suffix in suffixes.split()]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, *settings, first]
        subprocess.run(command, check=True)
        for path in others:
            shutil.copy(first, path)
    names, said = found(tmp_path)
    assert {Path(name).suffix for name in names} == VIDEO_SUFFIXES and said == ""
    for name in names:
        clip = capkit.load_clip(tmp_path / name, "uniform", timeout_seconds=None)
        assert clip.info.num_frames == 50, name
