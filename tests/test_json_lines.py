"""Files of JSON lines after a crash, or a slip of the hand: what is whole is read, and the next line is whole again."""

import json

import pytest

from capkit.files import append_lines, read_lines
from capkit.runs.prefetch import Quarantine
from capkit.video import VideoError

NO_OBJECTS = ("5", '"request"', "[1]", "null", "true", "{", '{"a": NaN')


def test_lines_that_are_no_objects_are_named_and_skipped(tmp_path):
    path = tmp_path / "lines.jsonl"
    for line in NO_OBJECTS:
        path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
        with pytest.warns(UserWarning, match="line 2 is not"):
            assert [*read_lines(path)] == [{"a": 1}, {"a": 2}]


def test_a_line_after_one_that_a_crash_cut_short_is_a_line_of_its_own(tmp_path):
    path, whole = tmp_path / "lines.jsonl", b'{"a": 1}\n'
    for length in range(1, len(whole) + 1):
        path.write_bytes(whole + whole[:length])
        append_lines(path, {"a": 2})
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.endswith(b"}")]
        assert lines[0] == {"a": 1} and lines[-1] == {"a": 2}
        assert lines[1:-1] in ([], [{"a": 1}]) and path.read_bytes().startswith(whole + whole[:length])


def test_a_quarantine_with_damaged_lines_keeps_the_others(tmp_path):
    video, path = tmp_path / "a.mp4", tmp_path / "quarantine.jsonl"
    video.write_bytes(b"x")
    Quarantine(path).add(str(video), "hung")
    for line in (*NO_OBJECTS, "{}", '{"video": [], "size": 1, "mtime_ns": 1, "reason": ""}'):
        path.write_text(f"{line}\n{path.read_text().splitlines()[-1]}\n")
        with pytest.warns(UserWarning, match="quarantine.jsonl.*skipped"):
            quarantine = Quarantine(path)
        with pytest.raises(VideoError, match="hung"):
            quarantine.check(str(video))
