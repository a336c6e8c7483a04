"""Places are where the pictures show them; attention counts as right where it looks there, and as wrong elsewhere."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from capkit.captioning import ACCURACY, AttentionMap, Grounding
from capkit.demo import attention
from capkit.demo.attention import accuracy, on_patches
from capkit.demo.facts import see
from capkit.demo.random_scenes import make_scene
from capkit.demo.scenes import Scene
from capkit.demo.wording import make_example

GRID = 4


def covered_in_pictures(scene, clip):
    """Share of each patch in which a clip's frames differ from those of the empty scene, (T, GRID, GRID)."""
    empty = replace(scene, things=()).sample()
    differs = (clip.frames.astype(int) - empty.frames != 0).any(-1)
    height, width = differs.shape[1:]
    top, left, side = (height - scene.side) // 2, (width - scene.side) // 2, scene.side // GRID * GRID
    square = differs[:, top : top + side, left : left + side]
    return square.reshape(len(clip), GRID, side // GRID, GRID, side // GRID).mean((2, 4))


def scenes_of_one_object():
    for seed in range(1000):
        scene = make_scene(seed, held_out=True)
        facts = see(scene, scene.sample())
        if len(facts.objects) == 1 and len(facts.events) == 1 and not scene.pan:
            yield scene


def test_patches_on_an_object_are_where_the_picture_shows_it():
    for scene, _ in zip(scenes_of_one_object(), range(4), strict=False):
        clip = scene.sample()
        expected = covered_in_pictures(scene, clip)
        most = expected.max((1, 2), keepdims=True)
        on = on_patches(scene, scene.things[0], clip, GRID)
        is_clear = np.abs(expected - most / 2) > 0.06  # pictures have pixels and softened edges
        assert (on == ((expected >= most / 2) & (most > 0)))[is_clear].all() and on.any() and is_clear.mean() > 0.8


def measured(monkeypatch, looks_at_it):
    """The summary of four scenes whose true captions' words all look at the object at its event, or all elsewhere."""
    scenes = [scene for scene, _ in zip(scenes_of_one_object(), range(4), strict=False)]
    clips, told, places = {id(scene): scene.sample() for scene in scenes}, {}, {}
    for scene in scenes:
        clip = clips[id(scene)]
        facts, covered = see(scene, clip), covered_in_pictures(scene, clip)
        text = make_example(facts, np.random.default_rng(0), "detailed", "chat").answer
        told[id(clip)] = [f" {word}" for word in text.split()]
        (event,) = facts.events
        frame = event.second - (event.kind == "disappears")
        if not looks_at_it:
            frame = max(range(len(clip)), key=lambda other, event=event: abs(other - event.second))
        patch = covered[frame].argmax() if looks_at_it else covered[frame].argmin()
        places[id(clip)] = frame, *np.unravel_index(patch, (GRID, GRID))

    def attend(_, clip, caption):
        tokens, (frame, row, column) = told[id(clip)], places[id(clip)]
        patches = np.full((len(tokens) + 1, len(clip), GRID, GRID), 1e-3, np.float32)
        patches[:, frame, row, column] = 0.5
        return AttentionMap([], tokens, clip.timestamps_seconds, patches, patches.sum((2, 3)))

    def ground(_, clip, caption):
        tokens = told[id(clip)]
        by_frame = np.zeros((len(clip), len(tokens)))
        by_frame[places[id(clip)][0]] = -1
        return Grounding([], tokens, *np.zeros((2, len(tokens))), by_frame)

    captioner = SimpleNamespace(caption_batch=lambda clips, *settings: clips, score=lambda clip, caption: None)
    with monkeypatch.context() as patched:
        patched.setattr(attention, "make_scene", lambda seed, held_out: scenes[seed - attention.FIRST_SEED])
        patched.setattr(Scene, "sample", lambda scene: clips[id(scene)])
        patched.setattr(attention, "attend", attend)
        patched.setattr(attention, "ground", ground)
        return attention.summarise(*attention.measure(captioner, 4))


def test_what_looks_there_is_right_and_what_looks_elsewhere_is_wrong(monkeypatch):
    right, wrong = measured(monkeypatch, True), measured(monkeypatch, False)
    for results, share in ((right, 1), (wrong, 0)):
        assert results["thing"]["attention"] == [share] * 3 and results["thing"]["words"] == 8
        for way in ("attention", "leaving frames out", "patches, own", "edges, before"):
            assert results["event"][way] == [share] * 3
        assert 0 < results["thing"]["chance"][0] < 0.4 and 0 < results["event"]["chance"][0] < 0.8
    assert right["looked_at"]["on objects"] > 0 == wrong["looked_at"]["on objects"] < wrong["looked_at"]["elsewhere"]


def test_the_command_measures_the_demo_model(tmp_path, capsys):
    out = tmp_path / "attention.json"
    attention.main(["--scenes", "3", "--out", str(out)])
    results = json.loads(out.read_text())
    assert results["scenes"] == 3 and results["thing"]["words"] >= 4 and results["times_scoring"] > 0
    assert capsys.readouterr().out.strip().endswith(accuracy(out))


def test_what_is_said_of_accuracy_holds_for_the_figures_beside_it():
    assert accuracy() == ACCURACY
    results = json.loads(attention.RESULTS.read_text())
    thing, event = (dict(results[kind]) for kind in ("thing", "event"))
    assert thing.pop("words") >= 200 and results["scenes"] >= 100 and event.pop("words") >= 100
    thing, event = ({name: share for name, (share, *_) in shares.items()} for shares in (thing, event))
    assert thing["attention"] >= 0.85 and event["attention"] >= 0.8 and results["times_scoring"] <= 2
    for shares in (thing, event):  # "about as often as the better of the two", and better than leaving frames out
        assert shares["attention"] >= max(shares.values()) - 0.02
        assert shares["attention"] > max(shares["chance"], shares.get("leaving frames out", 0)) + 0.1
    assert results["looked_at"]["on objects"] > 5 * results["looked_at"]["elsewhere"]
