"""Measure how often attention points at the right place and time, on clips whose truth is known.

    nice python -m capkit.demo.attention --out notebooks/results/attention.json

The demo model captions held-out scenes. Of each object that is there, the first words that give its colour and shape
are looked up in the caption's `AttentionMap`; of each event that happens, the words that tell it and the number of its
second. Beside attention stand chance, a patch or frame at random, and leaving frames out (`ground`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from capkit import __version__
from capkit.captioning import AttentionMap, Captioner, Decoding, Grounding, attend, ground, load_captioner
from capkit.cogvlm2 import DEFAULT_PROMPT
from capkit.demo.claims import Span, claims
from capkit.demo.facts import Facts, see
from capkit.demo.orders import resample, share
from capkit.demo.random_scenes import make_scene
from capkit.demo.scenes import Scene, Thing
from capkit.files import atomic_write, now
from capkit.video import Clip

FIRST_SEED = 21_000  # of held-out scenes that no other evaluation looks at
BATCH_SIZE = 16
DECODING = Decoding(max_new_tokens=160)
PIXELS = 16  # of a patch's side, where objects are drawn to see which patches they cover
RESULTS = Path(__file__).parents[2] / "notebooks" / "results" / "attention.json"


def measure(captioner: Captioner, num_scenes: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Look words up in held-out scenes.

    Returns:
        A row for each word: `scene`, `kind` ("thing" or "event"), `word`, and for each way to look whether it is right,
        for "chance" how often. A row for each scene: seconds of `score` and `attend`, and which shares of the patches
        on its objects, and of all others, were looked at.
    """
    words: list[dict[str, Any]] = []
    scenes: list[dict[str, float]] = []
    for first in range(0, num_scenes, BATCH_SIZE):
        numbers = range(first, min(first + BATCH_SIZE, num_scenes))
        drawn = [make_scene(FIRST_SEED + number, held_out=True) for number in numbers]
        clips = [scene.sample() for scene in drawn]
        captions = captioner.caption_batch(clips, DEFAULT_PROMPT, DECODING)
        for number, scene, clip, caption in zip(numbers, drawn, clips, captions, strict=True):
            started = time.perf_counter()
            captioner.score(clip, caption)
            scored = time.perf_counter()
            looked: Any = attend(captioner, clip, caption)
            seconds = {"score": scored - started, "attend": time.perf_counter() - scored}
            grounding: Any = ground(captioner, clip, caption)
            rows = [*_things(scene, clip, looked), *_events(see(scene, clip), looked, grounding)]
            words += [{"scene": number} | row for row in rows]
            scenes.append(seconds | _looked_at(scene, clip, looked))
    return pd.DataFrame(words), pd.DataFrame(scenes)


def _things(scene: Scene, clip: Clip, looked: AttentionMap) -> Iterator[dict[str, Any]]:
    """A row for each word that gives the colour or shape of an object that is there."""
    for named in claims("".join(looked.tokens)).objects:
        thing = _thing(scene, clip, named.pair)
        if thing is None:
            continue
        on = on_patches(scene, thing, clip, looked.patch_rows.shape[-1])
        for at in words_at(looked, named.spans["colour"], named.spans["shape"]):
            row: dict[str, Any] = {"kind": "thing", "word": looked.words[at][0], "chance": on.mean()}
            for name, rows in _rows(looked.patch_rows, looked, at).items():
                row[f"patches, {name}"] = on.flat[rows.argmax()]
            yield row | {"attention": on[tuple(looked.places[at])]}


def _events(facts: Facts, looked: AttentionMap, grounding: Grounding) -> Iterator[dict[str, Any]]:
    """A row for each word that tells an event that happens, or its second: whether a frame within a second is found."""
    claimed = claims("".join(looked.tokens))
    for number, (kind, pair, new, _) in enumerate(claimed.events):
        for event in facts.events:
            if (event.kind, (event.colour, event.shape), event.new_colour) != (kind, pair, new):
                continue
            spans = [claimed.spans[name, number] for name in ("event", "second") if (name, number) in claimed.spans]
            near = np.abs(np.array(facts.numbers) - event.second) <= 1
            left_out = grounding.of_words(grounding.leaning)
            for at in words_at(looked, *spans):
                if looked.words[at][0] == "second":  # its number tells it
                    continue
                row: dict[str, Any] = {"kind": "event", "word": looked.words[at][0], "chance": near.mean()}
                for name, rows in _rows(looked.patch_rows, looked, at).items():
                    row[f"patches, {name}"] = near[rows.reshape(len(near), -1).max(1).argmax()]
                for name, rows in _rows(looked.edge_rows, looked, at).items():
                    row[f"edges, {name}"] = near[rows.argmax()]
                row["leaving frames out"] = near[left_out[:, at].argmax()]
                yield row | {"attention": near[looked.frames[at]]}


def _rows(rows: np.ndarray, looked: AttentionMap, at: int) -> dict[str, np.ndarray]:
    """Attention of a word's tokens without punctuation, and of the tokens before each of them."""
    tokens = looked.words[at][1]
    spoken = [place for place in range(tokens.start, tokens.stop) if any(map(str.isalnum, looked.tokens[place]))]
    return {"own": rows[np.add(spoken, 1)].mean(0), "before": rows[spoken].mean(0)}


def words_at(looked: AttentionMap, *spans: Span) -> list[int]:
    """The places of the words that lie in these spans of the text that the tokens make."""
    ends = np.cumsum([0, *map(len, looked.tokens)])
    return [
        at
        for at, (_, tokens) in enumerate(looked.words)
        if any(ends[tokens.start] < span[1] and span[0] < ends[tokens.stop] for span in spans)
    ]


def _thing(scene: Scene, clip: Clip, pair: tuple[str, str]) -> Thing | None:
    """The object of this colour, as it is first seen, and shape."""
    for thing in scene.things:
        colours = [thing.colour_at(time) for time in clip.timestamps_seconds if thing.is_there(time)]
        if colours and (colours[0], thing.shape) == pair:
            return thing
    return None


def on_patches(scene: Scene, thing: Thing, clip: Clip, grid: int) -> np.ndarray:
    """Patches on an object, bool (T, grid, grid): it covers half as much of each as of the one it covers most."""
    covered = np.zeros((len(clip), grid, grid))
    for frame, seconds in enumerate(clip.timestamps_seconds):
        for seen, _, x, y, diameter in scene.visible(seconds):
            if seen is thing:
                corners = (thing.outline * diameter + [x, y]) * grid * PIXELS - 0.5
                mask = Image.new("L", (grid * PIXELS, grid * PIXELS))
                ImageDraw.Draw(mask).polygon(corners.ravel().tolist(), fill=1)
                covered[frame] = np.asarray(mask).reshape(grid, PIXELS, grid, PIXELS).mean((1, 3))
    return (covered > 0) & (covered >= covered.max((1, 2), keepdims=True) / 2)


def _looked_at(scene: Scene, clip: Clip, looked: AttentionMap) -> dict[str, float]:
    """Shares of the patches on objects, and of all others, that a word looked at; NaN where there are none."""
    seen, grid = ~looked.never_looked_at, looked.patch_rows.shape[-1]
    on = np.zeros(seen.shape, bool)
    for thing in scene.things:
        on |= on_patches(scene, thing, clip, grid)
    return {"on objects": seen[on].mean() if on.any() else np.nan, "elsewhere": seen[~on].mean()}


def summarise(words: pd.DataFrame, scenes: pd.DataFrame) -> dict[str, Any]:
    """Shares of words for which each way to look is right, with bootstrap intervals over scenes, and what it costs."""
    samples, results = resample(len(scenes)), dict[str, Any]()
    for kind, rows in words.groupby("kind", sort=False):
        rows = rows.dropna(axis=1).drop(columns=["kind", "word"]).astype(float)  # without the other kind's columns
        clips = rows.pop("scene").to_numpy(int)
        shares = {name: share(rows[name].to_numpy(), clips, samples) for name in rows}
        results[str(kind)] = {"words": len(rows)} | shares
    results["looked_at"] = scenes[["on objects", "elsewhere"]].mean().round(4).to_dict()
    return results | {"times_scoring": round(float((scenes["attend"] / scenes["score"]).median()), 2)}


def accuracy(path: str | Path = RESULTS) -> str:
    """The results in a file as a sentence."""
    results = json.loads(Path(path).read_text(encoding="utf-8"))

    def percent(kind: str, name: str) -> str:
        return f"{results[kind][name][0]:.0%}".replace("%", " %")

    thing, event = results["thing"], results["event"]
    return (
        f"On {results['scenes']} held-out scenes of the demo model, the place with the most attention lies on the "
        f"named object for {percent('thing', 'attention')} of {thing['words']} words (chance "
        f"{percent('thing', 'chance')}), and the frame is right within a second for {percent('event', 'attention')} of "
        f"{event['words']} words of events (leaving frames out {percent('event', 'leaving frames out')}, chance "
        f"{percent('event', 'chance')})."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m capkit.demo.attention", description=__doc__)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--model", default="demo", help="demo, or the folder of a demo model in training")
    a = parser.parse_args(arguments)
    captioner = load_captioner(a.model)
    made = {"model_fingerprint": captioner.fingerprint, "capkit_version": __version__, "created": now()}
    results = {"command": f"python -m capkit.demo.attention --scenes {a.scenes} --out {a.out}"} | made
    results |= {"scenes": a.scenes} | summarise(*measure(captioner, a.scenes))
    atomic_write(a.out, json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1), accuracy(a.out), sep="\n\n")


if __name__ == "__main__":
    main()
