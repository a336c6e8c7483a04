"""The command line: one table of exit codes, errors in one line, and Ctrl-C whatever the command is doing."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
from paths import GOLDEN, ROOT
from store_records import make_record

import capkit.__main__
from capkit import CaptionStore
from capkit.arguments import make_parser
from capkit.cogvlm2 import CogVLM2VideoForConditionalGeneration
from capkit.runs import DEMO_CLIPS, TRAINERS, new_record, request_settings
from capkit.runs.store import ModelIdentity

CLIPS = sorted(map(str, DEMO_CLIPS.glob("*.mp4")))[:2]
LONGEST_SECONDS = 10  # two on a machine with nothing else to do; a clip may take HOUR
HOUR = "3600"


@pytest.fixture
def main(monkeypatch, capsys):
    """Run the command in this process; returns exit code and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["capkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            capkit.__main__.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out + printed.err

    return run


@pytest.fixture
def store(tmp_path):
    store = CaptionStore(tmp_path / "captions.jsonl")
    settings = request_settings(ModelIdentity("", "", "", None), tmp_path / "a.mp4", "What?")
    store.append(new_record(settings, ValueError("as was to be shown")))
    return store


TRAINERS_IN_HELP = re.compile(r"trains on: (.*?); default", re.DOTALL)
COMMANDS = ["caption", "caption-shard", "merge", "show", "page", "compare", "replace", "batch", "doctor"]


@pytest.mark.parametrize("command", COMMANDS)
def test_exit_codes_are_one_table_in_every_help(main, command):
    code, printed = main(command, "--help")
    assert code == 0 and capkit.__main__.EXIT_CODES in printed


def test_the_version(main):
    assert main("--version") == (0, f"capkit {capkit.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_option_tells_its_default(command):
    parser = make_parser()._subparsers._group_actions[0].choices[command]
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.option_strings and not action.required and action.nargs != 0:
            told = formatter._expand_help(action)
            in_words = "default: " in (action.help or "") or not action.default
            assert "default" in told and (in_words or f"default: {action.default}" in told), told


def test_the_help_names_what_there_is(main):
    printed = " ".join(main("caption-shard", "--help")[1].split()).replace("- ", "-")  # broken at hyphens, too
    assert re.split(", | or ", TRAINERS_IN_HELP.search(printed)[1]) == [*TRAINERS]
    assert f"default: {capkit.DEFAULT_PROMPT}" in printed


@pytest.mark.skipif(os.name != "posix", reason="pipes")
class TestNobodyReads:
    """As in `| head`: no traceback, and only a command that has nothing left to do is done."""

    def run(self, *arguments):
        code = f"import sys; sys.argv[1:] = {[*map(str, arguments)]!r}; import capkit.__main__ as main; main.main()"
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
        os.close(writer)
        return ended.returncode, ended.stderr

    def test_help_show_doctor_and_merge(self, store):
        with CaptionStore(store.path).hold():  # many, so that printing breaks before the end, too
            store.append(*(make_record(number, store.path) for number in range(300)))
        plan = {"num_shards": 1, "items": "x", "written": "1", "settings": {}, "shard": 0, "clips": [["a", "a.mp4"]]}
        folder = store.path.parent / "shards"
        folder.mkdir()
        (folder / "shard-00000-of-00001.plan.json").write_text(json.dumps(plan))
        for arguments in (["--help"], ["show", store.path], ["show", store.path, "--where", "text=none"]):
            assert self.run(*arguments) == (0, ""), arguments
        assert self.run("merge", folder) == (1, "capkit: [Errno 32] Broken pipe\n")

    def test_a_replacement_that_is_not_written_is_no_success(self, store):
        store.append(*(make_record(number, store.path) for number in range(300)))
        code, errors = self.run("replace", store.path, "dog", "cat", "--write")
        assert code == 1 and errors == "capkit: [Errno 32] Broken pipe\n"
        assert not any("edited_text" in record for record in store.current())


class TestCaption:
    FEW = ("--model", GOLDEN, "--device", "cpu", "--max-new-tokens", "3")

    def test_prints_captions_and_keeps_nothing(self, main, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        code, printed = main("caption", *CLIPS, *self.FEW, "--prompt", "What is red?", "--start", "1", "--end", "2.5")
        assert code == 0 and "Traceback" not in printed
        assert "Prompt: What is red?" in printed and printed.count("Prompt:") == 1
        for clip in CLIPS:
            assert re.search(rf"^{re.escape(clip)} \(1 to 2.5 s\)\n  \S", printed, re.MULTILINE)
        assert not [*tmp_path.iterdir()]

    def test_into_a_store_and_a_bad_clip(self, main, tmp_path):
        (tmp_path / "bad.mp4").touch()
        clips = (tmp_path / "bad.mp4", CLIPS[0])
        code, printed = main("caption", *clips, *self.FEW, "--output", tmp_path / "out", "--num-frames", "2")
        assert code == 0 and f"{tmp_path / 'bad.mp4'}\n  error: " in printed
        assert f"Captions: {tmp_path / 'out' / 'captions.jsonl'}\n" in printed
        bad, good = CaptionStore(tmp_path / "out").current()
        assert (bad["status"], good["num_tokens"], len(good["frame_indices"])) == ("error", 3, 2)
        assert CaptionStore(tmp_path / "out").read_strip(good)
        assert main("caption", clips[0], *self.FEW)[0] == 1
        with CaptionStore(tmp_path / "out" / "captions.jsonl").hold():
            code, printed = main("caption", CLIPS[0], *self.FEW, "--output", tmp_path / "out")
        assert code == 3 and "another run is captioning" in printed.lower() or "is captioning into this" in printed

    def test_retries_need_the_folder_of_the_errors(self, main):
        code, printed = main("caption", CLIPS[0], *self.FEW, "--retry-errors")
        assert code == 2 and "--retry-errors" in printed and "--output" in printed

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("nowhere.mp4",), "'nowhere.mp4': there is no such file or folder"),
            ((CLIPS[0], "--start", "-1"), "start_seconds must be a finite number, not negative; got -1.0"),
            ((CLIPS[0], "--start", "3", "--end", "2"), "end_seconds must be None or above start_seconds, 3; got 2.0"),
            ((CLIPS[0], "--max-new-tokens", "0"), "max_new_tokens=0"),
            ((CLIPS[0], "--max-new-tokens", "9", "--decoding", '{"max_new_tokens": 3}'), "give one of them"),
            ((CLIPS[0], "--decoding", "[1]"), "decoding=[1]: must be"),
            ((CLIPS[0], "--batch-size", "0"), "batch_size must be a whole number, at least 1; got 0"),
            ((CLIPS[0], "--prompt", "Who is {camera}?"), "{camera}"),
            ((CLIPS[0], "--prompt", ""), "prompt"),
            ((CLIPS[0], "--frame-sampling", "all"), "unknown frame sampling 'all'"),
            ((CLIPS[0], "--output", __file__), "it is a file"),
            ((CLIPS[0], "--features-dir", __file__), "features_dir="),
            ((CLIPS[0], "--answer-prefix", "I see", "--decoding", '{"forbidden_words": ["see"]}'), "answer_prefix="),
            ((CLIPS[0], "--device", "meta"), "device='meta': cannot be used on this machine"),
            ((CLIPS[0], "--dtype", "float5"), "dtype='float5'"),
            ((CLIPS[0], "--revision", "v9"), "revision='v9': has no effect"),
        ],
    )
    @pytest.mark.parametrize("command", ["caption", "caption-shard"])
    def test_wrong_arguments_are_code_2_before_a_model_is_loaded(
        self, main, tmp_path, monkeypatch, command, arguments, message
    ):
        def load(*arguments, **settings):
            raise AssertionError("the weights are loaded")

        monkeypatch.setattr(CogVLM2VideoForConditionalGeneration, "from_pretrained", load)
        monkeypatch.chdir(tmp_path)
        if command == "caption-shard":
            if "--start" in arguments:
                return
            arguments = ("--output", tmp_path / "out", *arguments)
        code, printed = main(command, *arguments)
        assert code == 2 and message in printed and "Traceback" not in printed


class TestShow:
    def test_a_hand_edit_is_what_counts_and_said_to_be_one(self, main, tmp_path):
        store = CaptionStore(tmp_path / "captions.jsonl")
        for number, fields in enumerate(
            ({}, {"prompt": "What moves?", "start_seconds": 2.0, "duration_seconds": 9.0}, {"prompt": "What moves?"})
        ):
            store.append(make_record(number, tmp_path / f"{number}.mp4", **fields))
        store.edit(store.current()[1]["request"], "A cat\nsleeps.")
        code, printed = main("show", store.path)
        assert code == 0 and printed.count("edited by hand") == 1 and "lawn number 1," not in printed
        heading = "\nPrompt: What moves?\n"
        assert f"{heading}\n{tmp_path / '1.mp4'} (2 s to the end)\n  A cat sleeps.\n  edited by hand\n" in printed
        assert printed.count(heading) == 1 and printed.startswith(f"\nPrompt: {capkit.DEFAULT_PROMPT}\n")

    def test_a_store_and_the_folder_that_it_is_in(self, main, store):
        for path in (store.path, store.path.parent):
            code, printed = main("show", path)
            assert code == 0 and "a.mp4\n  error: as was to be shown" in printed
        shard = store.path.rename(store.path.with_name("shard-00000-of-00001.jsonl"))
        for path in (shard, shard.parent):
            code, printed = main("show", path)
            assert code == 0 and f"{store.path.parent / 'captions_strips'}/\n" in printed

    def test_a_caption_that_saw_only_part_is_marked(self, main, tmp_path):
        store = CaptionStore(tmp_path / "captions.jsonl")
        for number, fields in enumerate(
            ({"duration_seconds": 60.0}, {}, {"end_seconds": 40.0, "duration_seconds": 40.0})
        ):
            store.append(make_record(number, tmp_path / f"{number}.mp4", **fields))
        _, printed = main("show", store.path)
        assert "0.mp4 [saw only 24 of 60 s]\n" in printed and "1.mp4\n" in printed
        assert "2.mp4 (0 to 40 s) [saw only 24 of 40 s]\n" in printed

    @pytest.mark.skipif(os.name != "posix", reason="pipes")
    def test_pipes_devices_and_the_root_are_not_waited_for(self, main, tmp_path):
        os.mkfifo(tmp_path / "captions.jsonl")
        (tmp_path / "zero").mkdir()
        (tmp_path / "zero" / "captions.jsonl").symlink_to("/dev/zero")
        for path in (
            tmp_path,
            tmp_path / "captions.jsonl",
            tmp_path / "zero",
            tmp_path / ("a" * 300),
            "/proc/self/mem",
        ):
            code, printed = main("show", path)
            assert code in (1, 2) and str(path) in printed and printed.count("\n") == 1
        started = time.monotonic()
        code, printed = main("show", "/")
        assert code == 2 and printed.startswith("capkit: /: there are no captions in this folder")
        assert time.monotonic() - started < 60

    def test_anything_else_is_an_error_of_one_line(self, main, store, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x20ftypisom\n" * 10)
        (tmp_path / "manifest.jsonl").write_text('{"video": "a.mp4"}\n')
        for name, reason in (
            ("nowhere", "no such file or folder"),
            ("empty", "there are no captions in this folder"),
            ("clip.mp4", "is no caption store"),
            ("manifest.jsonl", "is no caption store"),
        ):
            code, printed = main("show", tmp_path / name)
            assert code == 2 and printed.startswith(f"capkit: {tmp_path / name}: {reason}") and printed.count("\n") == 1
        (tmp_path / "runs" / "mine").mkdir(parents=True)
        moved = store.path.rename(tmp_path / "runs" / "mine" / "captions.jsonl")
        code, printed = main("show", tmp_path / "runs")
        assert code == 2 and str(moved) in printed  # says what to give


class TestFollow:
    @pytest.fixture
    def follow(self, monkeypatch, capsys):
        """Follow a store, doing one thing after the other between looks at it; returns what each look printed."""

        def run(path, *between, where=()):
            looks, todo = [], iter(between)

            def sleep(seconds):
                printed = capsys.readouterr()
                looks.append(printed.out + printed.err)
                if (step := next(todo, None)) is None:
                    raise KeyboardInterrupt
                step()

            monkeypatch.setattr("capkit.store_commands.time.sleep", sleep)
            monkeypatch.setattr(sys, "argv", ["capkit", "show", str(path), "--follow", *where])
            with pytest.raises(SystemExit, match="130"):
                capkit.__main__.main()
            return [re.findall(r"(\d+)\.mp4", look) for look in looks], looks

        return run

    def test_captions_as_they_arrive(self, follow, tmp_path):
        store = CaptionStore(tmp_path / "captions.jsonl")

        def add(*numbers):
            for number in numbers:
                CaptionStore(store.path).append(make_record(number, tmp_path / f"{number}.mp4"))

        def edit():
            store.edit(f"{3:020x}", "By hand.")

        shown, looks = follow(tmp_path, lambda: add(*range(12)), lambda: None, lambda: add(12, 13), edit)
        assert looks[0] == f"{tmp_path}: no captions yet; waiting for them\n"
        assert shown[1:] == [[*map(str, range(12))], [], ["12", "13"], ["3"]]
        assert "  By hand.\n  edited by hand\n" in looks[-1]
        assert follow(store.path, lambda: add(20))[0] == [[*map(str, range(4, 14))], ["20"]]  # the last ten first
        where = ("--where", "video=*1.mp4")
        assert follow(store.path, lambda: add(30, 31), where=where)[0] == [["1", "11"], ["31"]]

    def test_shards_of_a_run_and_their_merging(self, follow, tmp_path):
        def add(shard, number):
            path = tmp_path / f"shard-0000{shard}-of-00002.jsonl"
            CaptionStore(path).append(make_record(number, tmp_path / f"{number}.mp4"))

        def merge():
            for shard in range(2):
                content = (tmp_path / f"shard-0000{shard}-of-00002.jsonl").read_bytes()
                with open(tmp_path / "captions.jsonl", "ab") as file:
                    file.write(content)

        add(0, 0)
        shown, _ = follow(tmp_path, lambda: add(1, 1), lambda: add(0, 2), merge, lambda: add(1, 3))
        assert shown == [["0"], ["1"], ["2"], [], ["3"]]

    def test_what_is_no_store_is_not_waited_for(self, main, tmp_path):
        (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x20ftypisom\n" * 10)
        for name, reason in (
            ("nowhere", "no such file"),
            ("clip.mp4", "is no caption store"),
            ("a/b.jsonl", "no such"),
        ):
            code, printed = main("show", "--follow", tmp_path / name)
            assert code == 2 and reason in printed and printed.count("\n") == 1


class TestReplace:
    @pytest.fixture
    def words(self, tmp_path):
        store = CaptionStore(tmp_path / "my captions.jsonl")
        for number, text in enumerate(["A red square.", "A red dot.", "Nothing."]):
            store.append({"request": f"{number}", "video": f"/{number}.mp4", "status": "ok", "text": text})
        return store

    def texts(self, store):
        return [record.get("edited_text", record["text"]) for record in store.current()]

    def test_preview_write_and_undo(self, main, words):
        before = words.path.read_bytes()
        code, printed = main("replace", words.path, "red", "blue")
        assert code == 0 and "'red' would be replaced in 2 of 3 captions, in 2 places" in printed
        assert "/0.mp4\n  A [-red-]{+blue+} square." in printed and "Nothing is written yet" in printed
        assert words.path.read_bytes() == before
        code, printed = main("replace", words.path, r"(\w+) dot", r"\1 spot", "--where", "video=*1.mp4", "--write")
        assert code == 0 and "1 caption replaced, in batch" in printed
        assert self.texts(words) == ["A red square.", "A red spot.", "Nothing."]
        (command,) = [line for line in printed.splitlines() if line.startswith("  python -m capkit")]
        code, printed = main(*shlex.split(command)[3:])  # as it is printed, though the name has a space in it
        assert code == 0 and printed.startswith("1 caption as before batch ")
        assert self.texts(words) == ["A red square.", "A red dot.", "Nothing."]
        assert main(*shlex.split(command)[3:])[0] == 2

    def test_an_edit_made_since_stays(self, main, words):
        batch = main("replace", words.path, "red", "blue", "--write")[1].split()[-1]
        words.edit("1", "By hand.")
        code, printed = main("replace", words.path, "--undo", batch)
        assert code == 0 and printed == f"1 caption as before batch {batch}; 1 edited since stay as they are\n"
        assert self.texts(words) == ["A red square.", "By hand.", "Nothing."]

    def test_nothing_to_replace_is_no_failure(self, main, words):
        for more in ((), ("--write",)):
            code, printed = main("replace", words.path, "green", "blue", *more)
            assert code == 0 and printed == "'green' would be replaced in 0 of 3 captions\n"

    def test_wrong_arguments_are_an_error_of_one_line(self, main, words, tmp_path):
        for arguments, message in (
            ((words.path, "(red", "x"), "is no regular expression"),
            ((words.path, "x*", "y"), "matches where there is no character"),
            ((words.path, ".+", " "), "/0.mp4: nothing would be left of 'A red square.'"),
            ((words.path, "red"), "give a pattern and a replacement, or --undo with a batch alone"),
            ((words.path,), "give a pattern and a replacement, or --undo with a batch alone"),
            ((words.path, "red", "x", "--undo", "abc"), "or --undo with a batch alone"),
            ((words.path, "--undo", "abc", "--write"), "or --undo with a batch alone"),
            ((words.path, "--undo", "abc"), "unknown batch 'abc'"),
            ((words.path, "red", "x", "--where", "promt=x"), "unknown column 'promt'; did you mean 'prompt'?"),
            ((words.path, "red", "x", "--where", "prompt"), "'prompt' is not of the form column=value"),
            ((words.path, "red", "x", "--where", "mark=wrong"), "holds no captions where"),
            ((tmp_path / "nowhere", "red", "x"), "no such file or folder"),
        ):
            code, printed = main("replace", *arguments)
            assert code == 2 and message in printed and printed.count("\n") == 1, printed

    def test_a_run_at_work_and_several_shards(self, main, words, tmp_path):
        with CaptionStore(words.path).hold():
            code, printed = main("replace", words.path, "red", "blue", "--write")
        assert code == 3 and "is captioning into this store" in printed
        for number in range(2):
            name = tmp_path / "shards" / f"shard-{number:05}-of-00002.jsonl"
            name.parent.mkdir(exist_ok=True)
            name.write_bytes(words.path.read_bytes())
        code, printed = main("replace", tmp_path / "shards", "red", "blue")
        assert code == 2 and "holds 2 stores; merge them first" in printed


class TestCaptionShard:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("nowhere.mp4",), "'nowhere.mp4': there is no such file or folder"),
            ((CLIPS[0], "nowhere.mp4"), "'nowhere.mp4': there is no such file or folder"),
            ((CLIPS[0], "nowhere.csv"), "'nowhere.csv': there is no such file or folder"),
            ((CLIPS[0], "."), "no videos found in '.'"),
            (("nowhere*.mp4",), "no videos found"),
            ((CLIPS[0], "--output", __file__), "it is a file"),
            ((CLIPS[0], "--output", ""), "argument --output: is empty"),
            ((CLIPS[0], "--decoding", "{max_new_tokens: 3}"), "is not JSON, such as"),
            ((CLIPS[0], "--decoding", "[1]"), "decoding=[1]: must be"),
            ((CLIPS[0], "--decoding", "[" * 50_000), "is not JSON, such as"),
            ((CLIPS[0], "--shard", ""), "argument --shard: is empty"),
            ((CLIPS[0], "--model", " "), "argument --model: is empty"),
            ((CLIPS[0], "--devices", ""), "argument --devices: '' names none"),
            ((CLIPS[0], "--devices", ","), "argument --devices: ',' names none"),
            ((CLIPS[0], "--revision", "v9"), "revision='v9': has no effect on a folder"),
            ((CLIPS[0], "--model", ROOT / "tests" / "data", "--revision", "v9"), "revision='v9': has no effect"),
            ((CLIPS[0], "--output", "a" * 300), "File name too long"),
            ((CLIPS[0], "--batch-size", "0"), "batch_size must be a whole number, at least 1; got 0"),
            ((CLIPS[0], "--timeout-seconds", "nan"), "timeout_seconds must be a positive number"),
            ((CLIPS[0], "--trainer-num-frames", "9"), "num_frames=9: no effect without a trainer"),
            ((CLIPS[0], "--shots", "--trainer", "sat"), "shots and trainer are both set"),
            ((CLIPS[0], "--device", "meta"), "device='meta': cannot be used on this machine"),
            ((CLIPS[0], "--devices", "cpu,cuda:99"), "device='cuda:99': this machine has"),
            ((CLIPS[0], "--model", ROOT / "tests" / "data"), "has no config.json"),
        ],
    )
    def test_wrong_arguments_are_code_2_before_a_model_is_loaded(self, main, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        code, printed = main("caption-shard", "--output", tmp_path / "out", *arguments)
        assert code == 2 and message in printed and "Traceback" not in printed
        assert not list(tmp_path.glob("out/*.jsonl"))

    def test_some_clips_with_errors_are_no_failure_and_only_such_clips_are_one(self, main, tmp_path):
        (tmp_path / "bad.mp4").touch()
        settings = ("--output", tmp_path / "out", "--model", GOLDEN, "--device", "cpu")
        settings += ("--decoding", '{"max_new_tokens": 2}')
        code, printed = main("caption-shard", tmp_path / "bad.mp4", *settings)
        assert code == 1 and "1 clip, 1 with an error" in printed
        assert main("merge", tmp_path / "out")[0] == 1
        code, printed = main("caption-shard", tmp_path / "bad.mp4", CLIPS[0], *settings)
        assert code == 0 and "2 clips, 1 with an error" in printed
        assert main("merge", tmp_path / "out")[0] == 0

    @pytest.mark.parametrize(
        "error, advises",
        [
            (OSError(errno.ENOSPC, "No space left on device", "out/a.jsonl"), True),
            (OSError(errno.ELOOP, "Too many levels of symbolic links", "out/a.jsonl"), False),
            (OSError("out/a.jsonl: was deleted or moved while it was in use"), False),
        ],
    )
    def test_what_is_advised_after_an_error_is_true(self, main, tmp_path, monkeypatch, error, advises):
        def fail(*arguments, **settings):
            raise error

        monkeypatch.setattr(capkit.runs, "caption_shard", fail)
        code, printed = main("caption-shard", CLIPS[0], "--output", tmp_path)
        assert code == 1 and str(error) in printed and ("the same command continues" in printed) == advises

    def test_a_prefix_and_forbidden_words(self, main, tmp_path):
        settings = ("--output", tmp_path, "--device", "cpu", "--answer-prefix", "I see")
        assert main("caption-shard", CLIPS[0], *settings, "--decoding", '{"forbidden_words": ["a", "red"]}')[0] == 0
        assert main("merge", tmp_path)[0] == 0
        (record,) = capkit.CaptionStore(tmp_path).current()
        assert record["text"].startswith("I see") and not {"a", "red"} & {*record["text"].lower().split()}
        assert record["answer_prefix"] == "I see" and record["text"].strip() in main("show", tmp_path)[1]
        code, printed = main("caption-shard", CLIPS[0], *settings, "--decoding", '{"forbidden_words": ["see"]}')
        assert code == 2 and "answer_prefix='I see': holds 'see'" in printed

    def test_a_file_where_the_strips_go_is_named(self, main, tmp_path):
        (tmp_path / "captions_strips").touch()
        code, printed = main("caption-shard", CLIPS[0], "--output", tmp_path, "--model", GOLDEN, "--device", "cpu")
        assert code == 1 and f"Not a directory: '{tmp_path / 'captions_strips'}'" in printed
        assert "continues" not in printed


def hanging_package(folder, name, how):
    """A package to be found before the real one; importing it notes the process in `folder/hanging`, and hangs."""
    package = folder / name
    package.mkdir(parents=True)
    note = f"import ctypes, hashlib, os; print(os.getpid(), file=open({str(folder / 'hanging')!r}, 'a'), flush=True)\n"
    (package / "__init__.py").write_text(note + how)


IN_C = "ctypes.PyDLL(None).pause()"  # with the interpreter lock held, as a library that reads videos
COMPUTING = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # no signal ends it


@pytest.fixture
def start(tmp_path):
    """Starts Python in a process group of its own, with packages of `tmp_path` before others."""
    started = []

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        # A shell lets what it runs in the background ignore Ctrl-C, these tests too, and the command would inherit it.
        ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True, preexec_fn=ctrl_c)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_for_hanging(folder, number, process):
    """Wait until so many processes hang; returns their ids."""
    path, until = folder / "hanging", time.monotonic() + 300
    while not path.exists() or path.read_text().count("\n") < number:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    return [*map(int, path.read_text().split())]


def assert_is_stopped(process, pids, since):
    printed, errors = process.communicate(timeout=60)
    assert time.monotonic() - since < LONGEST_SECONDS
    assert process.returncode == 130 and "Traceback" not in printed + errors
    assert errors.count("capkit: stopped") == 1
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() - since < LONGEST_SECONDS
        time.sleep(0.05)


@pytest.mark.skipif(os.name != "posix", reason="signals and process groups")
class TestCtrlC:
    @pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["process", "group"])
    @pytest.mark.parametrize(
        "arguments, num_hanging", [((), 1), (("--devices", "cpu,cpu"), 2), (("--window-seconds", "3"), 1)]
    )
    def test_caption_shard_while_a_clip_hangs(self, start, tmp_path, arguments, num_hanging, send):
        hanging_package(tmp_path, "av", IN_C)
        settings = ("--output", tmp_path / "out", "--timeout-seconds", HOUR, "--model", GOLDEN)
        process = start("-m", "capkit", "caption-shard", *CLIPS, *settings, *arguments)
        pids = wait_for_hanging(tmp_path, num_hanging, process)
        children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        since = time.monotonic()
        send(process.pid, signal.SIGINT)
        assert_is_stopped(process, [*pids, *children], since)
        assert not list((tmp_path / "out").glob("*.jsonl"))  # the clip is not to blame

    @pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
    def test_a_library_that_does_not_return(self, start, tmp_path, stop):
        hanging_package(tmp_path, "filelock", COMPUTING)
        process = start("-m", "capkit", "merge", tmp_path)
        pids = wait_for_hanging(tmp_path, 1, process)
        since = time.monotonic()
        process.send_signal(stop)
        assert_is_stopped(process, pids, since)

    def test_in_python_and_notebooks(self, start, tmp_path):
        hanging_package(tmp_path, "av", IN_C)
        code = f"""
import capkit, functools
from capkit.runs import caption_clips, caption_shard, find_clips
captioner = capkit.load_captioner({str(GOLDEN)!r}, device="cpu")
items, folder, limit = find_clips({CLIPS!r}), {str(tmp_path / "out")!r}, {{"timeout_seconds": {HOUR}}}
for call in (
    lambda: capkit.load_clip(items[0].video, **limit),
    lambda: caption_clips(captioner, items, capkit.CaptionStore(folder + "/captions.jsonl"), **limit),
    lambda: caption_shard(lambda: captioner, items, folder, **limit),
    lambda: capkit.run_sweep(captioner, items, **limit),
):
    try:
        call()
    except KeyboardInterrupt:
        print("back", flush=True)
"""
        process, num_hanging = start("-c", code), 0
        for num_readers in (1, 2, 2, 2):
            num_hanging += num_readers
            pids = wait_for_hanging(tmp_path, num_hanging, process)
            since = time.monotonic()
            process.send_signal(signal.SIGINT)
            while "back" not in process.stdout.readline():
                assert time.monotonic() - since < LONGEST_SECONDS
            assert time.monotonic() - since < LONGEST_SECONDS
            assert not any(map(psutil.pid_exists, pids))
        assert process.wait(LONGEST_SECONDS) == 0


class TestPages:
    def test_a_page_of_a_store_and_of_what_changed(self, main, store, tmp_path):
        out = tmp_path / "pages" / "a.html"
        code, printed = main("page", store.path.parent, "--out", out)
        assert code == 0 and printed == f"1 of 1 captions in captions.jsonl: {out}\n"
        assert "not captioned: as was to be shown" in out.read_text()
        code, printed = main("compare", store.path, store.path, "--out", out)
        assert code == 0 and printed == f"0 changed; 0 added; 0 removed; 1 same: {out}\n"

    def test_what_cannot_be_shown_is_an_error_of_one_line(self, main, store, tmp_path):
        for arguments, reason in (
            (["page", tmp_path / "nowhere"], f"{tmp_path / 'nowhere'}: no such file or folder"),
            (["page", store.path, "--baseline", "first"], "unknown cell 'first'"),
            (["compare", store.path, tmp_path / "nowhere"], f"{tmp_path / 'nowhere'}: no such file or folder"),
        ):
            code, printed = main(*arguments, "--out", tmp_path / "a.html")
            assert code == 2 and printed.startswith(f"capkit: {reason}") and printed.count("\n") == 1
        (store.path.with_name("shard-00001-of-00002.jsonl")).write_bytes(store.path.read_bytes())
        store.path.rename(store.path.with_name("shard-00000-of-00002.jsonl"))
        code, printed = main("page", tmp_path, "--out", tmp_path / "a.html")
        assert code == 2 and "holds 2 stores; merge them first (python -m capkit merge)" in printed
        assert not (tmp_path / "a.html").exists()

    @pytest.mark.parametrize("command", ["page", "compare"])
    def test_a_page_takes_the_place_of_no_other_file(self, main, store, tmp_path, command):
        before = store.path.read_bytes()
        stores = [store.path] * (1 if command == "page" else 2)
        for out in (store.path, tmp_path / "clip.mp4", tmp_path / "page"):
            code, printed = main(command, *stores, "--out", out)
            assert code == 2 and printed == f"capkit: {out}: is no name of a page; let it end in .html\n"
            assert store.path.read_bytes() == before and not (out.exists() and out != store.path)
