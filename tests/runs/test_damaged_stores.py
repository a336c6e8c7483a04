"""Damaged stores, a hundred and more: whoever reads them goes on with the good lines and names the bad ones; an error
is ours and soon there; nothing outside the store's folder is read, shown or written, and nothing is run."""

import base64
import gzip
import json
import os
import random
import re
import signal
import socket
import sys
import sysconfig
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from store_records import an_error, make_record

import capkit.__main__
from capkit import CaptionStore, Prompt
from capkit.export import choose_records, export_dataset
from capkit.runs import Shard, merge, write_webvtt
from capkit.runs.shards import write_plan
from capkit.sweep import agreement, describe
from capkit.views import captions_page, show_captions

LONGEST_SECONDS = 20
SECRET = "root:x:0:0:a secret"
DEAR = 8  # of so many stores one is read by the slow readers too


def encode(record, **fields):
    return json.dumps(record | fields).encode()


def without(record, name):
    return encode({key: value for key, value in record.items() if key != name})


WORDS = [{"forbidden_words": "a"}, {"word_bias": {"a": "b"}}, {"forbidden_words": [5]}, {"word_bias": ["a"]}]
WRONG = {
    **dict.fromkeys(("request", "video", "strip", "model", "created", "dtype"), [5, None, [], {"a": 1}, True]),
    **dict.fromkeys(("prompt", "template", "frame_numbers", "answer_prefix"), [5, None, {}, [""]]),
    **dict.fromkeys(("text", "status"), [5, None, ["ok"], {}]),
    **dict.fromkeys(("finish_reason", "video_sha256", "quantization"), [5, [], {"a": 1}, 0.5]),
    **dict.fromkeys(("start_seconds", "sample"), ["0", None, [], {}, True, 10**400]),
    **dict.fromkeys(("end_seconds", "duration_seconds", "seconds"), ["1.5", [], True, 1e300]),
    "mean_logprob": ["x", [], 900.0, False],
    "num_tokens": ["20", 2.5, [20], True, -(10**30)],
    "decoding": [5, None, [1], {"temperature": "warm"}, {"temperature": [0.5]}, {"seed": 10**400}, *WORDS],
    "frame_sampling": ["chat", 5, None, {"strategy": 5}, {"strategy": "chat", "num_frames": "x"}],
    "history": [5, "ab", [5], [["a"]], [["a", 5]], {"a": "b"}],
    "frame_indices": [5, "0", {}, ["0"], [0.5], [None], [True], [10**400]],
    "timestamps_seconds": [5, "0", {"a": 0}, ["0"], [None], [[0]], [1e300]],
    "video_notes": [5, "HDR", [5], [None]],
    **dict.fromkeys(("edited_text", "mark", "remark"), [5, None, ["red"]]),
    "wrong_words": [5, "red", [5], {"a": 1}],
}


def damages():
    """(name, what becomes of a good record's line) for every kind of damage."""
    yield from (
        (f"{value} instead of a record", lambda r, v=value: v) for value in (b"5", b"[1]", b'"a"', b"null", b"x")
    )
    yield "torn", lambda r: encode(r)[: len(encode(r)) // 2]
    yield "not UTF-8", lambda r: encode(r).replace(b"lawn", b"l\xe4wn")
    yield "NULs", lambda r: encode(r).replace(b"lawn", b"\0\0\0\0")
    yield "only NULs", lambda r: b"\0" * 4096
    yield "UTF-16", lambda r: encode(r).decode().encode("utf-16").replace(b"\n", b"")
    yield "nested", lambda r: encode(r)[:-1] + b', "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    yield "NaN", lambda r: encode(r, mean_logprob=float("nan"))
    yield "Infinity in an own field", lambda r: encode(r, own=float("-inf"))
    yield "half a character", lambda r: encode(r, text="A \ud83d dog.")
    yield "a key twice", lambda r: encode(r)[:-1] + b', "text": "Another."}'
    yield "a key twice inside", lambda r: encode(r).replace(b'"strategy"', b'"strategy": "base", "strategy"')
    yield "a file name with NUL", lambda r: encode(r, video="/clips/\0.mp4")
    yield "an edit without text", lambda r: encode({"edits": r["request"], "created": "2026"})
    yield "an edit of no time", lambda r: encode({"edits": r["request"], "text": "By hand.", "created": 5})
    yield "an edit of a number", lambda r: encode({"edits": 5, "text": "By hand."})
    yield "an edit with half a character", lambda r: encode({"edits": r["request"], "text": "\udc00"})
    mark = {"marks": "x", "mark": "wrong", "wrong_words": [], "remark": "", "text": "A dog."}
    for name, value in (
        ("mark", "wrnog"),
        ("mark", 5),
        ("wrong_words", "red"),
        ("wrong_words", [5]),
        ("wrong_words", None),
    ):
        yield f"a mark with {name}={value}", lambda r, n=name, v=value: encode(mark | {"marks": r["request"], n: v})
    yield "a mark of a number", lambda r: encode(mark | {"marks": 5})
    yield "a mark without its text", lambda r: without(mark | {"marks": r["request"]}, "text")
    yield "a remark with half a character", lambda r: encode(mark | {"marks": r["request"], "remark": "\ud83d"})
    yield "the end of a batch without a list", lambda r: encode({"completes": "abc"})
    yield "taking back a number", lambda r: encode({"undoes": 5})
    yield "a text of 9 MB", lambda r: encode(r, text="long " * 1_800_000)
    yield "a file name of 9 MB", lambda r: encode(r, video="/.." * 3_000_000)
    yield "an error without a reason", lambda r: without(an_error(r), "error")
    yield "two lines in one", lambda r: encode(r) + encode(r)
    yield "50 MB", lambda r: encode(r, own="long " * 10_000_000)
    for name in ("request", "video", "status", "text"):
        yield f"no {name}", lambda r, n=name: without(r, n)
    for name, values in WRONG.items():
        for value in values:
            yield f"{name}={str(value)[:20]}", lambda r, n=name, v=value: encode(r, **{n: v})


# ---- what the process does meanwhile, by Python's audit events -------------------------------------------------------

WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.find_class",
    "socket.connect",
)
CODE = [os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]  # imported when needed
CODE += [os.path.realpath(Path(capkit.__file__).parent)]
watched: list | None = None
strangers: set[int] = set()  # threads that other tests left running


def note(event, arguments):
    """Keep what is read or written, by the path behind all links, and what is started."""
    if (
        watched is None
        or threading.get_ident() in strangers
        or event not in ("open", "os.listdir", "os.scandir", *WRITES, *STARTS)
    ):
        return
    names = [os.fsdecode(name) for name in arguments[:2] if isinstance(name, (str, bytes, os.PathLike))]
    is_write = event in WRITES
    if event == "open":
        names, is_write = names[:1], arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    elif event in ("os.link", "os.symlink"):
        names = names[1:]
    if event in WRITES:  # of a link, itself
        names = [os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name)) for name in names]
    watched.append((event, is_write, [*map(os.path.realpath, names)] if event not in WRITES else names))


sys.addaudithook(note)


@contextmanager
def only_inside(folder, readable=()):
    """Fail if the block reads or writes outside a folder, except for reading some files, starts something, or hangs."""

    def stop(*_):
        pytest.fail(f"{folder}: more than {LONGEST_SECONDS} s")

    global watched, strangers
    strangers = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    watched, before = [], signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        events, watched = watched, None
    inside = os.path.realpath(folder) + os.sep
    for event, is_write, names in events:
        assert event not in STARTS, (event, names)
        for name in names:
            may_be_read = name in readable or any(name.startswith(code) for code in CODE)
            assert f"{name}{os.sep}".startswith(inside) or may_be_read and not is_write, (event, name)


# ---- readers -------------------------------------------------------------------------------------------------------


def texts(records):
    return {record["request"]: record.get("edited_text", record["text"]) for record in records}


def read(folder, path, planned, is_dear, monkeypatch, capsys):
    """The texts, by request, that each reader of a store found in it."""
    found, store = {}, CaptionStore(path)
    by_request = found["current"] = texts(store.current())
    found["done"] = {request: by_request[request] for request in store.done()}
    found["latest"] = texts(store.latest(planned))
    by_video = {record["video"]: record["request"] for record in store.current()}
    merged = merge(folder)
    found["merge"] = texts(merged.store.current())
    assert merged.num_ok + merged.num_errors + len(merged.problems) == len(planned)
    page = captions_page(store, order_by="mean_logprob").save(folder / "gallery.html").read_text()
    assert page.count('<div class="caption') == len(by_request) and show_captions(store, store.current())
    assert all(path.parent == folder / "vtt" for path in write_webvtt(store.current(), folder / "vtt"))
    monkeypatch.setattr(sys, "argv", ["capkit", "show", str(path)])
    with pytest.raises(SystemExit) as ended:
        capkit.__main__.main()
    shown = capsys.readouterr().out
    assert ended.value.code == (0 if by_request else 2) and shown.count("\n/") == len(by_request)
    assert all(video in shown for video in by_video)
    if is_dear and by_request:
        chosen = choose_records(store)
        report = export_dataset(store, "metadata-jsonl", folder / "out", overwrite=True)
        assert len(chosen) == len(report.table) == len(by_request)
        found["export"] = {by_video[row.video]: row.original or None for row in report.table.itertuples()}
        table = pd.DataFrame(store.current())
        assert len(describe(table)) == len(agreement(table, "prompt")) == len(by_request)
    return found


@pytest.fixture
def planned(tmp_path):
    """Six good records, one of them an error, and a hand edit, as lines; and the texts by request."""
    videos = [tmp_path / f"{number}.mp4" for number in range(6)]
    for number, video in enumerate(videos):
        video.write_bytes(b"not a video: %d" % number)
    records = [make_record(number, video) for number, video in enumerate(videos)]
    records[4] = an_error(records[4])
    edit = {"edits": records[0]["request"], "text": "By hand.", "created": "2026-11-26T12:00:00+00:00"}
    lines = [*map(encode, records), encode(edit)]
    return records, lines, texts(records) | {records[0]["request"]: "By hand."}


def new_folder(tmp_path, number, records):
    folder = tmp_path / str(number)
    folder.mkdir()
    write_plan(folder, Shard(), [], records, Prompt("Why?"))
    return folder, folder / f"{Shard().name}.jsonl"


def test_lines_of_more_than_a_hundred_kinds(tmp_path, planned, monkeypatch, capsys):
    chance, kinds, (records, good, expected) = random.Random(0), list(damages()), planned
    assert len(kinds) > 100
    requests, videos = [record["request"] for record in records], [record["video"] for record in records]
    stores = [[kind] for kind in kinds] + [chance.sample(kinds, 3) for _ in range(10)]
    for number, of_store in enumerate([[], *stores]):  # the first is sound
        folder, path = new_folder(tmp_path, number, records)
        lines, bad = [*good], []
        for _, damage in of_store:
            place = chance.randrange(len(lines) + 1)
            lines.insert(place, damage(make_record(99, tmp_path / "99.mp4")))
            bad = [*(number + (number > place) for number in bad), place + 1]
        path.write_bytes(b"\n".join(lines) + b"\n" * chance.randrange(2))
        names = [name for name, _ in of_store]
        with warnings.catch_warnings(record=True) as caught, only_inside(folder, videos):
            warnings.simplefilter("always")
            found = read(folder, path, requests, number % DEAR == 0, monkeypatch, capsys)
        for reader, texts_there in found.items():
            assert texts_there == expected, (reader, names)
        named = {
            int(n)
            for w in caught
            for n in re.findall(rf"^{re.escape(str(path))}, line (\d+) is skipped: .+", str(w.message))
        }
        assert named == set(bad), (names, [str(w.message)[:300] for w in caught])


# ---- whole files ---------------------------------------------------------------------------------------------------

ALL, NONE, ERROR = "all of the records", "no record", "an error that names the file"


def bind_socket(path):
    monkey = os.getcwd()
    os.chdir(path.parent)  # a socket's name may have 100 characters
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(monkey)


def files(records, good, outside):
    """(name, what makes the file, what is found in it) for every kind of damage to a file, or beside it."""
    content = b"\n".join(good) + b"\n"
    for name, damaged, found in (
        ("empty", b"", NONE),
        ("a byte order mark alone", b"\xef\xbb\xbf", NONE),
        ("blank lines", b"\n \n\r\n" * 1000, NONE),
        ("NULs", bytes(100_000), NONE),
        ("noise", random.Random(0).randbytes(100_000), NONE),
        ("gzip", gzip.compress(content), NONE),
        ("UTF-16", content.decode().encode("utf-16"), NONE),
        ("UTF-16 without mark", content.decode().encode("utf-16-be"), NONE),
        ("UTF-32", content.decode().encode("utf-32"), NONE),
        ("old Macintosh", content.replace(b"\n", b"\r"), NONE),
        ("a list", b"[" + b",\n".join(good) + b"]", NONE),
        ("a list in a line", b"[" + b",".join(good) + b"]", NONE),
        ("indented", "\n".join(json.dumps(record, indent=1) for record in records).encode(), NONE),
        ("CSV", pd.DataFrame(records).to_csv().encode(), NONE),
        ("Parquet", b"PAR1" + bytes(100) + b"PAR1", NONE),
        ("a failed download", b"<html><body>404 Not Found</body></html>\n", NONE),
        ("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", NONE),
        ("Python", b"__import__('os').system('touch " + os.fsencode(outside / "ran") + b"')\n", NONE),
        ("YAML", b"!!python/object/apply:os.system ['touch " + os.fsencode(outside / "ran") + b"']\n", NONE),
        ("a pickle", b"cos\nsystem\n(S'touch " + os.fsencode(outside / "ran") + b"'\ntR.", NONE),
        ("Windows", content.replace(b"\n", b"\r\n"), ALL),
        ("a byte order mark", b"\xef\xbb\xbf" + content, ALL),
        ("twice", content + content, ALL),
        ("NULs between", b"\n".join([*good[:3], bytes(5000), *good[3:]]), ALL),
        ("50 MB before", b"x" * 50_000_000 + b"\n" + content, ALL),
        ("50 MB after", content + b'{"text": "' + b"x" * 50_000_000, ALL),
        ("many bad lines", b"x\n" * 20_000 + content, ALL),
        ("many edits of nothing", content + b'{"edits": "a", "text": "b"}\n' * 20_000, ALL),
        ("a merge conflict", b"<<<<<<< HEAD\n" + content + b"=======\n" + content + b">>>>>>> other\n", ALL),
    ):
        yield name, lambda path, b=damaged: path.write_bytes(b), found
    yield "a folder", lambda path: path.mkdir(), ERROR
    yield "a pipe", lambda path: os.mkfifo(path), ERROR
    yield "a socket", bind_socket, ERROR
    yield "a link to a secret", lambda path: path.symlink_to(outside / "secret.txt"), NONE
    yield "a link to itself", lambda path: path.symlink_to(path), ERROR
    yield "a device", lambda path: path.symlink_to("/dev/zero"), ERROR
    yield "a disk that fails", lambda path: path.symlink_to("/proc/self/mem"), ERROR
    secret = outside / "secret.txt"

    def beside(name, make):
        def make_both(path):
            path.write_bytes(content)
            strip = path.with_name(path.stem + "_strips") / records[0]["strip"]
            strip.parent.mkdir()
            make(path.with_name(name) if name else strip)

        return make_both

    def replace(make):
        def replace_folder(strip):
            strip.parent.rmdir()
            make(strip.parent)

        return replace_folder

    yield "strips: a file", beside("", replace(lambda path: path.write_bytes(b""))), ALL
    yield "strips: a pipe", beside("", replace(os.mkfifo)), ALL
    yield "strips: a link", beside("", replace(lambda path: path.symlink_to(outside))), ALL
    for name, target in (
        ("text", secret),
        ("picture", outside / "secret.webp"),
        ("device", "/dev/zero"),
        ("nothing", "nowhere"),
    ):
        yield f"strip: a link to a {name}", beside("", lambda path, t=target: path.symlink_to(t)), ALL
    yield "strip: a pipe", beside("", os.mkfifo), ALL
    yield "strip: a folder", beside("", lambda path: path.mkdir()), ALL
    yield "strip: empty", beside("", lambda path: path.write_bytes(b"")), ALL
    yield "strip: 20 MB", beside("", lambda path: path.write_bytes(bytes(20_000_000))), ALL
    damaged = beside("captions.jsonl", lambda path: path.write_bytes(b"x\n" * 30))
    yield "merged: damaged", damaged, ALL

    def link_aside(path):
        damaged(path)
        path.with_name("captions.jsonl.damaged").symlink_to(secret)

    yield "merged: damaged, and a link where it is put aside", link_aside, ALL


@pytest.mark.skipif(os.name != "posix", reason="pipes, links and signals")
def test_whole_files(tmp_path, planned, monkeypatch, capsys):
    records, good, expected = planned
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    Image.new("RGB", (9, 9), "red").save(outside / "secret.webp")
    Image.new("RGB", (9, 9), "red").save(outside / records[0]["strip"])
    before = {path: path.read_bytes() for path in outside.iterdir()}
    requests, videos = [record["request"] for record in records], [record["video"] for record in records]
    for number, (name, make, outcome) in enumerate(files(records, good, outside)):
        folder, path = new_folder(tmp_path, number, records)
        make(path)
        warnings.simplefilter("ignore")
        with only_inside(folder, [*videos, os.path.realpath(path)]):
            if outcome is ERROR:
                assert_every_reader_refuses(folder, path, monkeypatch, capsys)
            else:
                found = read(folder, path, requests, number % DEAR == 0, monkeypatch, capsys)
                assert all(there == (expected if outcome is ALL else {}) for there in found.values()), (name, found)
        written = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
        for secret in (SECRET.encode(), base64.b64encode(before[outside / "secret.webp"])):
            assert secret not in written, name
    assert before == {path: path.read_bytes() for path in outside.iterdir()}


def assert_every_reader_refuses(folder, path, monkeypatch, capsys):
    store = CaptionStore(path)
    for reader in (
        store.current,
        store.done,
        store.lines,
        lambda: store.latest(["a"]),
        lambda: store.edit("a", "b"),
        lambda: merge(folder),
        lambda: captions_page(store),
        lambda: export_dataset(store, "metadata-jsonl", folder / "out"),
    ):
        with pytest.raises((OSError, ValueError), match=re.escape(str(path))):
            reader()
    monkeypatch.setattr(sys, "argv", ["capkit", "show", str(path)])
    with pytest.raises(SystemExit, match="2"):
        capkit.__main__.main()
    assert re.fullmatch(r"capkit: .*\n", capsys.readouterr().err)


def test_good_lines_that_lack_a_field(tmp_path, planned, monkeypatch, capsys):
    optional = planned[0][0].keys() - {"request", "video", "status", "text", "video_sha256"}  # no digest: it is decoded
    records = []
    for number, name in enumerate(sorted(optional)):
        video = tmp_path / f"lacks {name}.mp4"
        video.write_bytes(b"not a video")
        records.append({key: value for key, value in make_record(number, video).items() if key != name})
    folder, path = new_folder(tmp_path, 0, records)
    path.write_bytes(b"\n".join(map(encode, records)))
    found = read(folder, path, [record["request"] for record in records], True, monkeypatch, capsys)
    assert all(there == texts(records) for there in found.values())
    assert len(list((folder / "vtt").iterdir())) == len(records) - 1  # no duration, no cue


@pytest.mark.skipif(os.name != "posix", reason="pipes, links and signals")
def test_good_lines_that_name_other_files(tmp_path, planned, monkeypatch, capsys):
    (first, *_), _, _ = planned
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    Image.new("RGB", (9, 9), "red").save(outside / "secret.webp")
    os.mkfifo(outside / "pipe")
    targets = (outside / "secret.txt", outside / "pipe", outside, "/dev/zero", "~", "..")
    strips = (
        "../../outside/secret.webp",
        str(outside / "secret.webp"),
        "../../outside/pipe",
        "/dev/zero",
        "..",
        "",
        ".",
        "a/b.webp",
    )
    lines = [first | {"video": str(target)} for target in targets] + [first | {"strip": strip} for strip in strips]
    lines = [line | {"request": f"{number:020}", "prompt": str(number)} for number, line in enumerate(lines)]
    folder, path = new_folder(tmp_path, 0, lines)
    path.write_bytes(b"\n".join(map(encode, lines)))
    readable = [first["video"], str(outside / "secret.txt")]  # an export compares digests
    with only_inside(folder, readable):
        store = CaptionStore(path)
        assert len(store.current()) == len(merge(folder).store.current()) == len(lines)
        page = captions_page(store).save(folder / "gallery.html").read_text()
        shown = page + show_captions(store, store.current()).html
        write_webvtt(store.current(), folder / "vtt")
        report = export_dataset(store, "metadata-jsonl", folder / "out", choose="latest")
        assert [row.video for row in report.exported.itertuples()] == [first["video"]]
    assert "<img" not in shown and SECRET not in shown
    assert not any(SECRET in file.read_text() for file in folder.rglob("*") if file.is_file())
    assert {file.name for file in outside.iterdir()} == {"secret.txt", "secret.webp", "pipe"}


def plans(sound):
    """(what is damaged, content) of a shard's plan; None for a pipe."""
    yield from (("text", b"x"), ("no object", b"[1]"), ("empty", b""), ("not UTF-8", b"\xff"), ("pipe", None))
    yield "nested", b"[" * 100_000
    for name, values in {
        "num_shards": (0, -1, 10**12, True, "1"),
        "shard": (1, -1, 0.0),
        "clips": (5, [5], ["abc"], [["a"]], [["a", 5]]),
        "settings": (5, "abc", ["a"], {"prompt": "a"}),
        "run": ("1", None),
        "written": (5, None),
    }.items():
        for value in values:
            yield f"{name}={value}", encode(sound, **{name: value})
    for name in sound.keys() - {"run"}:
        yield f"no {name}", without(sound, name)


@pytest.mark.skipif(os.name != "posix", reason="pipes and signals")
def test_plans_of_shards(tmp_path, planned):
    records, good, _ = planned
    folder, path = new_folder(tmp_path, 0, records)
    path.write_bytes(b"\n".join(good))
    plan = folder / f"{Shard().name}.plan.json"
    for name, content in plans(json.loads(plan.read_text())):
        plan.unlink()
        os.mkfifo(plan) if content is None else plan.write_bytes(content)
        with only_inside(folder), pytest.raises((ValueError, OSError), match=re.escape(str(plan))):
            pytest.fail(f"{name}: {merge(folder)}")
