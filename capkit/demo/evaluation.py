"""How true are captions of held-out scenes? Clips go through a file and the public path; texts are read back.

`claims` reads what a text says, `check` compares it with what the frames show. `evaluate`, `evaluate_prompts` and
`evaluate_controls` do so for many scenes, `summarise` counts.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from capkit.captioning import Decoding
from capkit.cogvlm2 import Prompt
from capkit.demo.claims import COLOUR_WORDS, MOTION_WORDS, NUMBER_WORDS, SHAPE_WORDS, claims
from capkit.demo.facts import Facts, see
from capkit.demo.planning import make_scene
from capkit.demo.scenes import SIZES, UNSEEN_PAIRS
from capkit.demo.wording import DEFAULT_PROMPT, QUESTIONS, Example, make_example, make_question
from capkit.video import Clip, load_clip

CHECKS = ("background", "count", "colour", "shape", "objects", "size", "motion", "events", "camera")
CHECKS += ("no_wrong_statement",)
TIMELESS_CHECKS = CHECKS[:6]
DIRECTIONS = ("left", "right", "up", "down")
BATCH_SIZE = 16
DECODING = Decoding(max_new_tokens=160)

# ---- checking ------------------------------------------------------------------------------------------------------


def check(text: str, facts: Facts) -> dict[str, bool | None]:
    """Is a description right? One answer for each of CHECKS; None where there is nothing to be right about.

    "colour" and "shape" look at each alone; "objects" also at what belongs together. "size" and "motion" look object by
    object where the objects are right, else at all together. "events": all of them, of the right object and within one
    second, and no others. What is left out is wrong everywhere but in "no_wrong_statement".
    """
    said, objects = claims(text), facts.objects
    named, true = Counter(one.pair for one in said.objects), Counter((seen.colour, seen.shape) for seen in objects)
    is_pair_for_pair = named == true

    def same(attribute):
        if not any(getattr(one, attribute) for one in (*said.objects, *objects)):
            return None
        sides = [
            Counter(((one.colour, one.shape) if is_pair_for_pair else None, getattr(one, attribute)) for one in side)
            for side in (said.objects, objects)
        ]
        return sides[0] == sides[1]

    num_true_events = _num_true(said.events, facts.events)
    results = {
        "background": said.backgrounds == {facts.background},
        "count": (said.counts or {len(said.objects)}) == {len(objects)},
        "colour": Counter(one.colour for one in said.objects) == Counter(seen.colour for seen in objects),
        "shape": Counter(one.shape for one in said.objects) == Counter(seen.shape for seen in objects),
        "objects": is_pair_for_pair,
        "size": same("size"),
        "motion": same("motion"),
        "events": num_true_events == len(said.events) == len(facts.events),
        "camera": said.camera == facts.camera,
    }
    if not named and not true:
        results |= dict.fromkeys(("colour", "shape", "objects"))
    if not said.events and not facts.events:
        results["events"] = None
    if said.camera is None and facts.camera in ("still", None):  # that it is still need not be said
        results["camera"] = None
    seen = {(seen.colour, seen.shape): seen for seen in objects}
    results["no_wrong_statement"] = (
        bool(said.backgrounds or said.objects)  # who says nothing is not right
        and said.backgrounds <= {facts.background}
        and said.counts <= {len(objects)}
        and named <= true
        and all(one.size in (None, seen[one.pair].size) for one in said.objects)
        and all(one.motion in (None, seen[one.pair].motion) for one in said.objects)
        and num_true_events == len(said.events)
        and said.camera in (None, facts.camera)
    )
    return results


def _num_true(said, events):
    """How many of the events said happen, each counted once. Without a second, any will do."""
    left = list(events)
    for kind, pair, new, second in said:
        for event in left:
            is_it = (event.kind, (event.colour, event.shape), event.new_colour) == (kind, pair, new)
            if is_it and (second is None or abs(second - event.second) <= 1):
                left.remove(event)
                break
    return len(events) - len(left)


def check_answer(example: Example, text: str) -> bool:
    """Does `text` answer the example's question as its answer does? Wording is free; a description is no answer."""
    if len(_sentences(text)) != 1 or len(text.split()) > 12:
        return False
    right, answer = _gist(example.kind, example.answer), _gist(example.kind, text)
    if example.kind == "when":
        return answer is not None and abs(int(answer) - int(right)) <= 1
    return answer is not None and answer == right


def _gist(kind, text):
    """What an answer says to a question of this kind, or None."""
    text = text.lower()
    if kind in ("background", "motion", "camera", "happens", "order"):
        said = claims(text)
        motions = [motion for motion, wordings in MOTION_WORDS.items() if re.search(rf"\b(?:{wordings})\b", text)]
        happenings = [happening[:3] for happening in said.events]
        if kind == "happens" and "nothing new" in text:
            happenings = ["nothing"]
        found = {"background": list(said.backgrounds), "motion": motions, "camera": [said.camera]}.get(kind, happenings)
        return found[0] if len(found) == 1 else None
    patterns = {
        "colour": COLOUR_WORDS,
        "turns": COLOUR_WORDS,
        "shape": SHAPE_WORDS,
        "size": "|".join(SIZES),
        "when": r"\d+",
    }
    patterns |= {"exists": "yes|no", "count": "|".join(NUMBER_WORDS)}
    found = re.findall(rf"\b(?:{patterns[kind]})\b", text)
    if not found:
        return None
    if kind == "exists":
        return found[0]
    return NUMBER_WORDS[found[-1]] if kind == "count" else found[-1]


def check_json(text: str, facts: Facts, keys=("colour", "shape", "size", "motion")) -> bool:
    """Is it JSON with the right background and the right objects, in any order?"""
    try:
        said = json.loads(text)
        named = Counter(tuple(one[key] for key in keys) for one in said["objects"])
        background = said["background"]
    except (ValueError, TypeError, KeyError):
        return False
    return background == facts.background and named == Counter(
        tuple(getattr(seen, key) for key in keys) for seen in facts.objects
    )


def _sentences(text):
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+|\n", text.strip()) if sentence]


# ---- many scenes ---------------------------------------------------------------------------------------------------


def evaluate(
    captioner,
    num_scenes: int,
    seed: int = 0,
    frame_sampling="chat",
    folder=None,
    decoding: Decoding = DECODING,
) -> pd.DataFrame:
    """Caption held-out scenes with the default prompt and check each caption.

    Args:
        captioner: a `capkit.Captioner`, or whatever has its `caption_batch`.
        num_scenes: the scenes are those of the seeds `seed`, `seed` + 1, ...
        frame_sampling: as in `load_clip`.
        folder: where the clips are written and stay; None for a temporary one.
        decoding: greedy unless told otherwise.

    Returns:
        One row a scene: `seed`, `num_frames`, `num_objects`, `has_unseen_pair`, CHECKS as True, False or None,
        `seconds` that the caption took, `text` and the true `facts`.
    """
    rows = []
    for batch in _held_out(num_scenes, seed, frame_sampling, folder):
        captions = _captions(captioner, [clip for _, clip, _ in batch], DEFAULT_PROMPT, "chat", decoding)
        for (scene_seed, clip, facts), caption in zip(batch, captions, strict=True):
            unseen = any((seen.colour, seen.shape) in UNSEEN_PAIRS for seen in facts.objects)
            row = {"seed": scene_seed, "num_frames": len(clip), "num_objects": len(facts.objects)}
            row |= {"has_unseen_pair": unseen, **check(caption.text, facts)}
            rows.append(row | {"seconds": caption.seconds, "text": caption.text, "facts": facts})
    return pd.DataFrame(rows)


def evaluate_prompts(
    captioner,
    num_scenes: int,
    seed: int = 0,
    frame_sampling="chat",
    folder=None,
    decoding: Decoding = DECODING,
    questions_per_scene: int = 3,
) -> pd.DataFrame:
    """Ask for other things than a description: questions, one sentence, a list, JSON; also under "vqa" and "base".

    Under "vqa" and "base" only what does not depend on time is asked and checked.

    Returns:
        One row for each answer and thing checked: `measure`, `kind` of question or check, `seed`, `prompt`, `expected`,
        `text` and whether it is `right`.
    """
    rows = []
    for batch in _held_out(num_scenes, seed, frame_sampling, folder):
        for template, style, repeats in (
            ("chat", "question", questions_per_scene),
            ("vqa", "question", questions_per_scene),
            ("base", "question", 1),
            ("base", "detailed", 1),
            ("chat", "sentence", 1),
            ("chat", "list", 1),
            ("chat", "json", 1),
        ):
            asked = []
            for scene_seed, clip, facts in batch * repeats:
                # Which colour an object has first cannot be told without order.
                if template == "base" and any(event.kind == "changes" for event in facts.events):
                    continue
                rng = np.random.default_rng([scene_seed, len(asked)])
                asked.append((scene_seed, clip, facts, make_example(facts, rng, style, template)))
            rows += _answered(captioner, asked, f"{template}: {style}", _judge, decoding)
    return pd.DataFrame(rows)


def evaluate_controls(
    captioner,
    num_scenes: int,
    seed: int = 0,
    frame_sampling="chat",
    folder=None,
    decoding: Decoding = DECODING,
) -> pd.DataFrame:
    """Does the video matter? Directions and times are asked with frames in order and shuffled; and blank clips shown.

    Returns:
        Rows as `evaluate_prompts` has them. A model that looks is right in order and wrong when shuffled.
    """
    rows = []
    for batch in _held_out(num_scenes, seed, frame_sampling, folder):
        in_order, shuffled = [], []
        for scene_seed, clip, facts in batch:
            rng = np.random.default_rng([scene_seed, 1])
            order = _shuffle(rng, len(clip))
            mixed = Clip.from_frames(clip.frames[order], clip.timestamps_seconds)
            going = replace(facts, objects=tuple(seen for seen in facts.objects if seen.motion in DIRECTIONS))
            for about, kind in ((going, "motion"), (facts, "when"), (facts, "order")):
                if example := make_question(about, rng, kinds=(kind,)):
                    in_order.append((scene_seed, clip, facts, example))
                    shuffled.append((scene_seed, mixed, facts, example))
        rows += _answered(captioner, in_order, "frames in order", _judge, decoding)
        rows += _answered(captioner, shuffled, "frames shuffled", _judge, decoding)
    blank = Example(DEFAULT_PROMPT, "", "detailed", "chat")
    for batch in _held_out(num_scenes, seed, frame_sampling, folder, lambda scene: replace(scene, things=(), pan=0.0)):
        asked = [(*row, blank) for row in batch]
        rows += _answered(captioner, asked, "blank clip", _judge_blank, decoding)
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
            groups |= {(measure, kind): some for kind, some in rows.groupby("kind")}
        table = {name: {"right": rows["right"].mean(), "n": len(rows)} for name, rows in groups.items()}
        return pd.DataFrame.from_dict(table, orient="index").rename_axis(["measure", "kind"]).astype({"n": int})
    table = {}
    for name in CHECKS:
        rows = frame[frame[name].notna()]
        right, is_unseen = rows[name].astype(bool), rows["has_unseen_pair"].astype(bool)
        table[name] = {"right": right.mean(), "n": len(rows)}
        table[name] |= {"seen_pairs": right[~is_unseen].mean(), "unseen_pairs": right[is_unseen].mean()}
        table[name]["n_unseen_pairs"] = int(is_unseen.sum())
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("check")


def _held_out(num_scenes, seed, frame_sampling, folder, change=lambda scene: scene) -> Iterator[list]:
    """Batches of (seed, clip, facts), each clip encoded and read back."""
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for first in range(seed, seed + num_scenes, BATCH_SIZE):
            batch = []
            for scene_seed in range(first, min(first + BATCH_SIZE, seed + num_scenes)):
                scene = change(make_scene(scene_seed, held_out=True))
                path = scene.write_mp4(Path(folder) / f"held_out_{scene_seed}.mp4")
                clip = load_clip(path, frame_sampling, timeout_seconds=None)  # our own files: no child needed
                batch.append((scene_seed, clip, see(scene, clip)))
            yield batch


def _captions(captioner, clips, prompts, template, decoding):
    return captioner.caption_batch(clips, [Prompt(text, template) for text in prompts], decoding, BATCH_SIZE)


def _answered(captioner, asked, measure, judge, decoding):
    """Rows for (seed, clip, facts, example) tuples of one template."""
    if not asked:
        return []
    _, clips, _, examples = zip(*asked, strict=True)
    captions = _captions(captioner, clips, [example.prompt for example in examples], examples[0].template, decoding)
    rows = []
    for (scene_seed, _, facts, example), caption in zip(asked, captions, strict=True):
        row = {"seed": scene_seed, "prompt": example.prompt, "expected": example.answer, "text": caption.text}
        for kind, right in judge(example, caption.text.strip(), facts).items():
            rows.append({"measure": measure, "kind": kind, "right": right, **row})
    return rows


def _judge(example, text, facts):
    """What to look at in an answer of each style, and whether it is right."""
    if example.style == "question":
        return {example.kind: check_answer(example, text)}
    if example.style == "list":
        said = Counter(line.strip() for line in text.splitlines())
        return {"right": said == Counter(example.answer.splitlines())}
    if example.style == "json":
        return {"parses": _parses(text), "right": check_json(text, facts)}
    checks = check(text, facts)
    if example.style == "sentence":
        is_one = len(_sentences(text)) == 1 and text.endswith(".")
        return {"is one sentence": is_one, "no wrong statement": checks["no_wrong_statement"]}
    timeless = {name: checks[name] for name in TIMELESS_CHECKS if checks[name] is not None}
    return timeless | {"names no second": not re.search(r"\bsecond\b", text)}


def _judge_blank(example, text, facts):
    return {"names no object": not claims(text).objects, "background": check(text, facts)["background"]}


def _parses(text):
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _shuffle(rng, count):
    """An order of `count` frames that is not the right one."""
    while True:
        order = rng.permutation(count)
        if count < 2 or (order != np.arange(count)).any():
            return order
