"""Progress where nobody watches: few lines, the last of which says that it is done."""

import pytest

from capkit.console import ProgressLines


@pytest.fixture
def clock(monkeypatch):
    """Seconds on every clock that progress is read from."""
    time = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: time[0])
    monkeypatch.setattr("tqdm.std.time", lambda: time[0])
    return time


def test_a_line_every_ten_seconds_and_one_at_the_end(clock, capsys):
    for _ in ProgressLines(range(100), desc="Loading weights"):
        clock[0] += 0.25
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[-1] == "Loading weights: 100 of 100 in 00:25, 00:00 left"
    assert lines[0].startswith("Loading weights: 4") and "left" in lines[0]


def test_bars_that_are_drawn_again_and_again_say_no_more(clock, capsys):
    """As when files are downloaded: the total grows, and several threads draw."""
    bar = ProgressLines(desc="Downloading bytes", total=0, initial=0, unit="B", unit_scale=True)
    for _ in range(1000):
        clock[0] += 0.025
        bar.total += 25_000_000
        bar.refresh()
        bar.update(25_000_000)
    bar.set_description("Download complete")
    bar.close()
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[-1].startswith("Download complete: 25.0G of 25.0G in 00:2")


def test_nothing_done_is_not_shown(capsys):
    for _ in ProgressLines([], desc="Loading weights"):
        pass
    assert capsys.readouterr().err == ""


def test_a_loaded_model_is_announced_where_nobody_watches(captioner, capsys, monkeypatch):
    from capkit.cogvlm2 import CogVLM2VideoForConditionalGeneration

    for is_watched in (False, True):
        monkeypatch.setattr("capkit.console.is_interactive", lambda answer=is_watched: answer)
        CogVLM2VideoForConditionalGeneration.from_pretrained(captioner.name, device="cpu")
        shown = capsys.readouterr().err
        assert shown.count("Loading weights: 62 of 62 in 00:0") == (not is_watched)
        assert ("62/62" in shown) == is_watched
