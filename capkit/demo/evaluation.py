"""Evaluate a captioner on held-out scenes, through mp4 files and the public functions.

`check`, `check_answer` and `check_json` compare one text with the facts. `evaluate`, `evaluate_prompts` and
`evaluate_controls` do so for many scenes, and `summarise` counts.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from capkit.captioning import Caption, Captioner, Decoding
from capkit.cogvlm2 import DEFAULT_PROMPT, Prompt
from capkit.demo.claims import COLOUR_WORDS, MOTION_WORDS, NUMBER_WORDS, SHAPE_WORDS, Claims, claims
from capkit.demo.facts import Event, Facts, see
from capkit.demo.random_scenes import make_scene
from capkit.demo.scenes import DIRECTIONS, SIZES, UNSEEN_PAIRS, Scene
from capkit.demo.wording import QUESTIONS, Example, make_example, make_question
from capkit.sweep import PROMPT_PRESETS
from capkit.video import Clip, load_clip

TIMELESS_CHECKS = ("background", "count", "colour", "shape", "objects", "size")
CHECKS = (*TIMELESS_CHECKS, "motion", "events", "camera", "no_wrong_statement")
BATCH_SIZE = 16
DECODING = Decoding(max_new_tokens=160)
# What answers to each kind of question are read by; those of the other kinds are read as claims.
_ANSWERS = {
    "colour": COLOUR_WORDS,
    "turns": COLOUR_WORDS,
    "shape": SHAPE_WORDS,
    "size": "|".join(SIZES),
    "when": r"\d+",
    "exists": "yes|no",
    "count": "|".join(NUMBER_WORDS),
}

Case = tuple[int, Clip, Facts]
"""Seed of the scene, clip and facts."""


def check(text: str, facts: Facts) -> dict[str, bool | None]:
    """Compare a description with the facts: a result for each of CHECKS; None where there is nothing to compare.

    "colour" and "shape" look at each alone; "objects" also at what belongs together. "size" and "motion" look object by
    object where the objects are right, else at all together. "events": all of them, of the right object and within one
    second, and no others. What is left out is wrong everywhere but in "no_wrong_statement".
    """
    claimed, objects = claims(text), facts.objects

    def are_equal(*names: str) -> bool | None:
        """Whether claimed and true objects have the same values; None where none has a value of the first name."""
        if not any(getattr(item, names[0]) for item in (*claimed.objects, *objects)):
            return None
        sides = [Counter(tuple(getattr(item, name) for name in names) for item in claimed.objects)]
        sides.append(Counter(tuple(getattr(item, name) for name in names) for item in objects))
        return sides[0] == sides[1]

    by_object = ("pair",) if are_equal("pair") else ()
    num_true_events = _num_true(claimed, facts.events)
    true = {seen.pair: seen for seen in objects}
    is_camera_optional = claimed.camera is None and facts.camera in ("still", None)  # "still" need not be said
    has_events = claimed.events or facts.events
    return {
        "background": claimed.backgrounds == {facts.background},
        "count": (claimed.counts or {len(claimed.objects)}) == {len(objects)},
        "colour": are_equal("colour"),
        "shape": are_equal("shape"),
        "objects": are_equal("pair"),
        "size": are_equal("size", *by_object),
        "motion": are_equal("motion", *by_object),
        "events": num_true_events == len(claimed.events) == len(facts.events) if has_events else None,
        "camera": None if is_camera_optional else claimed.camera == facts.camera,
        "no_wrong_statement": (
            bool(claimed.backgrounds or claimed.objects)  # an empty text is not right
            and claimed.backgrounds <= {facts.background}
            and claimed.counts <= {len(objects)}
            and Counter(named.pair for named in claimed.objects) <= Counter(seen.pair for seen in objects)
            and all(named.size in (None, true[named.pair].size) for named in claimed.objects)
            and all(named.motion in (None, true[named.pair].motion) for named in claimed.objects)
            and num_true_events == len(claimed.events)
            and claimed.camera in (None, facts.camera)
        ),
    }


def _num_true(claimed: Claims, events: tuple[Event, ...]) -> int:
    """How many of the claimed events are true, each counted once. One without a second may be at any."""
    left = list(events)
    for kind, pair, new, second in claimed.events:
        for event in left:
            is_same = (event.kind, (event.colour, event.shape), event.new_colour) == (kind, pair, new)
            if is_same and (second is None or abs(second - event.second) <= 1):
                left.remove(event)
                break
    return len(events) - len(left)


def check_answer(example: Example, text: str) -> bool:
    """Whether `text` gives the example's answer, in any wording; a description is no answer."""
    if len(_sentences(text)) != 1 or len(text.split()) > 12:
        return False
    right, answer = _content(example.kind, example.answer), _content(example.kind, text)
    if example.kind == "when":
        return answer is not None and abs(int(answer) - int(right)) <= 1
    return answer is not None and answer == right


def _content(kind: str, text: str) -> Any:
    """What the text answers to a question of this kind, or None."""
    text = text.lower()
    if kind in _ANSWERS:
        words = re.findall(rf"\b(?:{_ANSWERS[kind]})\b", text)
        if not words:
            return None
        word = words[0] if kind == "exists" else words[-1]
        return NUMBER_WORDS[word] if kind == "count" else word
    claimed = claims(text)
    answers: list[Any] = [event[:3] for event in claimed.events]
    if kind == "motion":
        answers = [motion for motion, wordings in MOTION_WORDS.items() if re.search(rf"\b(?:{wordings})\b", text)]
    elif kind == "background":
        answers = list(claimed.backgrounds)
    elif kind == "camera":
        answers = [claimed.camera]
    elif kind == "happens" and "nothing new" in text:
        answers = ["nothing"]
    return answers[0] if len(answers) == 1 else None


def check_json(text: str, facts: Facts) -> bool:
    """Whether `text` is JSON with the right background and the right objects, in any order."""
    keys = ("colour", "shape", "size", "motion")
    try:
        described = json.loads(text)
        named = Counter(tuple(item[key] for key in keys) for item in described["objects"])
        is_background_right = described["background"] == facts.background
    except (ValueError, TypeError, KeyError):
        return False
    return is_background_right and named == Counter(tuple(getattr(seen, key) for key in keys) for seen in facts.objects)


def _sentences(text: str) -> list[str]:
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+|\n", text.strip()) if sentence]


def evaluate(
    captioner: Captioner,
    num_scenes: int,
    seed: int = 0,
    folder: str | Path | None = None,
    any_background: bool = False,
) -> pd.DataFrame:
    """Caption held-out scenes with the default prompt and check each caption.

    Args:
        captioner: a `capkit.Captioner`, or an object with its `caption_batch`.
        num_scenes: the scenes are those of the seeds `seed`, `seed` + 1, ...
        folder: where the clips are written and kept; None for a temporary one.
        any_background: see `make_scene`.

    Returns:
        One row a scene: `seed`, `num_frames`, `num_objects`, `has_unseen_pair`, CHECKS as True, False or None,
        `seconds` that the caption took, `text` and the true `facts`.
    """
    rows = []
    for batch in _held_out(num_scenes, seed, folder, any_background=any_background):
        captions = _captions(captioner, [clip for _, clip, _ in batch], [DEFAULT_PROMPT] * len(batch), "chat")
        for (scene_seed, clip, facts), caption in zip(batch, captions, strict=True):
            unseen = any(seen.pair in UNSEEN_PAIRS for seen in facts.objects)
            row = {"seed": scene_seed, "num_frames": len(clip), "num_objects": len(facts.objects)}
            answers = {"seconds": caption.seconds, "text": caption.text, "facts": facts}
            rows.append({**row, "has_unseen_pair": unseen, **check(caption.text, facts), **answers})
    return pd.DataFrame(rows)


def evaluate_prompts(
    captioner: Captioner, num_scenes: int, seed: int = 0, questions_per_scene: int = 3
) -> pd.DataFrame:
    """Check other prompts than descriptions: questions, one sentence, a list, JSON; also under "vqa" and "base".

    Under "vqa" and "base" questions and checks do not depend on time.

    Returns:
        One row for each answer and check: `measure`, `kind` of question or check, `right`, `seed`, `prompt`,
        `expected` and `text`.
    """
    rows = []
    for batch in _held_out(num_scenes, seed):
        for template, style, repeats in (
            ("chat", "question", questions_per_scene),
            ("vqa", "question", questions_per_scene),
            ("base", "question", 1),
            ("base", "detailed", 1),
            ("chat", "sentence", 1),
            ("chat", "list", 1),
            ("chat", "json", 1),
        ):
            cases: list[tuple[Case, Example]] = []
            for case in batch * repeats:
                scene_seed, _, facts = case
                # The first colour of an object cannot be known without order.
                if template != "base" or not any(event.kind == "changes" for event in facts.events):
                    rng = np.random.default_rng([scene_seed, len(cases)])
                    cases.append((case, make_example(facts, rng, style, template)))
            rows += _answers(captioner, cases, f"{template}: {style}")
    return pd.DataFrame(rows)


def evaluate_presets(captioner: Captioner, num_scenes: int, seed: int = 0, template: str = "chat") -> pd.DataFrame:
    """Check the answers to each of `capkit.sweep.PROMPT_PRESETS`, of scenes of which half have any background.

    Returns:
        Rows as from `evaluate_prompts`, whose kind is the preset's name.
    """
    rows = []
    for any_background in (False, True):
        for batch in _held_out(num_scenes // 2, seed, any_background=any_background):
            for name, (prompt, _) in PROMPT_PRESETS.items():
                captions = _captions(captioner, [clip for _, clip, _ in batch], [prompt] * len(batch), template)
                for (scene_seed, _, facts), caption in zip(batch, captions, strict=True):
                    says_nothing_is_there = not facts.objects and caption.text.strip() == "- nothing"
                    right = says_nothing_is_there or check(caption.text, facts)["no_wrong_statement"]
                    row = {"measure": f"{template}: presets", "kind": name, "right": right, "seed": scene_seed}
                    rows.append({**row, "prompt": prompt, "expected": "", "text": caption.text})
    return pd.DataFrame(rows)


def evaluate_controls(captioner: Captioner, num_scenes: int, seed: int = 0) -> pd.DataFrame:
    """Check that the video matters: questions on direction and time with frames in order and shuffled; blank clips.

    Returns:
        Rows as from `evaluate_prompts`. A model that looks at the frames is right in order and wrong when shuffled.
    """
    rows = []
    for batch in _held_out(num_scenes, seed):
        in_order: list[tuple[Case, Example]] = []
        shuffled: list[tuple[Case, Example]] = []
        for scene_seed, clip, facts in batch:
            rng = np.random.default_rng([scene_seed, 1])
            mixed = Clip.from_frames(clip.frames[_shuffled(rng, len(clip))], clip.timestamps_seconds)
            going = replace(facts, objects=tuple(seen for seen in facts.objects if seen.motion in DIRECTIONS))
            for about, kind in ((going, "motion"), (facts, "when"), (facts, "order")):
                if example := make_question(about, rng, kinds=(kind,)):
                    in_order.append(((scene_seed, clip, facts), example))
                    shuffled.append(((scene_seed, mixed, facts), example))
        rows += _answers(captioner, in_order, "frames in order")
        rows += _answers(captioner, shuffled, "frames shuffled")
    blank = Example(DEFAULT_PROMPT, "", "blank", "chat")
    for batch in _held_out(num_scenes, seed, change=lambda scene: replace(scene, things=(), pan=0.0)):
        rows += _answers(captioner, [(case, blank) for case in batch], "blank clip")
    return pd.DataFrame(rows)


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Share right (0 to 1) and number n of each measure, None left out.

    Of `evaluate`: a row for each of CHECKS, also by whether the scene has a pair of colour and shape that training
    never showed. Of the others: a row for each measure and kind, and one for all kinds of questions together.
    """
    if "right" in frame:
        groups = {}
        for measure, rows in frame.groupby("measure", sort=False):
            if set(rows["kind"]) <= set(QUESTIONS):
                groups[measure, "all"] = rows
            groups |= {(measure, kind): alike for kind, alike in rows.groupby("kind")}
        shares = {name: {"right": rows["right"].mean(), "n": len(rows)} for name, rows in groups.items()}
        return pd.DataFrame.from_dict(shares, orient="index").rename_axis(["measure", "kind"]).astype({"n": int})
    table = {}
    for name in CHECKS:
        rows = frame[frame[name].notna()]
        right, is_unseen = rows[name].astype(bool), rows["has_unseen_pair"].astype(bool)
        table[name] = {
            "right": right.mean(),
            "n": len(rows),
            "seen_pairs": right[~is_unseen].mean(),
            "unseen_pairs": right[is_unseen].mean(),
            "n_unseen_pairs": int(is_unseen.sum()),
        }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("check")


def _held_out(
    num_scenes: int,
    seed: int,
    folder: str | Path | None = None,
    change: Callable[[Scene], Scene] = lambda scene: scene,
    any_background: bool = False,
) -> Iterator[list[Case]]:
    """Batches of held-out scenes, each encoded and read back."""
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        for first in range(seed, seed + num_scenes, BATCH_SIZE):
            batch = []
            for scene_seed in range(first, min(first + BATCH_SIZE, seed + num_scenes)):
                scene = change(make_scene(scene_seed, held_out=True, any_background=any_background))
                path = scene.write_mp4(Path(directory) / f"held_out_{scene_seed}.mp4")
                clip = load_clip(path, timeout_seconds=None)  # no child process for our own files
                batch.append((scene_seed, clip, see(scene, clip)))
            yield batch


def _captions(captioner: Captioner, clips: list[Clip], prompts: list[str], template: str) -> list[Caption]:
    return captioner.caption_batch(clips, [Prompt(text, template) for text in prompts], DECODING, BATCH_SIZE)


def _answers(captioner: Captioner, cases: list[tuple[Case, Example]], measure: str) -> list[dict[str, Any]]:
    """Caption cases of one template, and judge each text: a row for each check."""
    if not cases:
        return []
    prompts, template = [example.prompt for _, example in cases], cases[0][1].template
    captions = _captions(captioner, [clip for (_, clip, _), _ in cases], prompts, template)
    rows = []
    for ((scene_seed, _, facts), example), caption in zip(cases, captions, strict=True):
        row = {"seed": scene_seed, "prompt": example.prompt, "expected": example.answer, "text": caption.text}
        for kind, right in _judge(example, caption.text.strip(), facts).items():
            rows.append({"measure": measure, "kind": kind, "right": right, **row})
    return rows


def _judge(example: Example, text: str, facts: Facts) -> dict[str, bool | None]:
    """The checks that suit the example's style, by name."""
    if example.style == "question":
        return {example.kind: check_answer(example, text)}
    if example.style == "list":
        lines = Counter(line.strip() for line in text.splitlines())
        return {"right": lines == Counter(example.answer.splitlines())}
    if example.style == "json":
        try:
            is_object = isinstance(json.loads(text), dict)
        except ValueError:
            is_object = False
        return {"parses": is_object, "right": check_json(text, facts)}
    checks = check(text, facts)
    if example.style == "blank":
        return {"names no object": not claims(text).objects, "background": checks["background"]}
    if example.style == "sentence":
        is_one = len(_sentences(text)) == 1 and text.endswith(".")
        return {"is one sentence": is_one, "no wrong statement": checks["no_wrong_statement"]}
    timeless = {name: checks[name] for name in TIMELESS_CHECKS if checks[name] is not None}
    return timeless | {"names no second": not re.search(r"\bsecond\b", text)}


def _shuffled(rng: np.random.Generator, count: int) -> np.ndarray:
    """A random order of `count` frames, another than the right one."""
    while True:
        order = rng.permutation(count)
        if count < 2 or (order != np.arange(count)).any():
            return order
