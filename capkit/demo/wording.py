"""True answers to questions about a scene, in several styles and many wordings."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np

from capkit.demo.facts import Facts
from capkit.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, UNSEEN_PAIRS, pick

DEFAULT_PROMPT = "Please describe this video in detail."  # capkit.cogvlm2's, which needs torch
STYLES = ("detailed", "sentence", "list", "json", "question")
QUESTIONS = ("colour", "shape", "size", "count", "background", "exists", "motion", "turns", "happens", "when", "order")
QUESTIONS += ("camera",)
TIMELESS_QUESTIONS = QUESTIONS[:6]
"""What frames without numbers and order answer too: all that is asked under "vqa" and "base"."""

PROMPTS = {
    "detailed": (
        DEFAULT_PROMPT,
        "Describe this video in detail.",
        "Describe the video.",
        "Please describe what you see.",
        "Please describe the video.",
        "What happens in this video?",
        "What can be seen in this video?",
        "Write a detailed caption for this video.",
        "Give a detailed description of the video.",
        "Tell me what this video shows.",
        "Describe everything that you see in this video.",
        "Caption this video.",
    ),
    "sentence": (
        "Describe this video in one sentence.",
        "Please describe the video in one sentence.",
        "What does the video show? Answer in one sentence.",
        "Write a caption of one sentence for this video.",
        "In one sentence, what can be seen?",
        "Sum up the video in a single sentence.",
        "Give a one-sentence description.",
        "Describe the video in a single short sentence.",
    ),
    "list": (
        "List the objects in this video.",
        "Which objects can be seen? Answer as a list.",
        "List all objects that you see.",
        "Make a list of the objects.",
        "Please list the objects, one on each line.",
        "What objects are in the video? Give a list.",
    ),
    "json": (
        "Describe this video as JSON.",
        "Describe the video in JSON.",
        "Answer in JSON: what can be seen?",
        "Give a description as a JSON object.",
        "Please answer with JSON: background and objects.",
        "Return the background and the objects as JSON.",
    ),
}
MOVES = {
    "still": ("stands still", "stays still", "does not move", "stays in place"),
    "left": ("moves to the left", "moves left", "drifts to the left", "slides to the left"),
    "right": ("moves to the right", "moves right", "drifts to the right", "slides to the right"),
    "up": ("moves up", "moves upwards", "rises", "drifts up"),
    "down": ("moves down", "moves downwards", "sinks", "drifts down"),
    "bounces": ("bounces", "bounces up and down", "jumps up and down"),
    "orbits": ("goes round the middle", "moves around the middle", "orbits the middle"),
    "grows": ("grows", "gets bigger", "becomes larger"),
    "shrinks": ("shrinks", "gets smaller", "becomes smaller"),
    None: ("can be seen", "is seen", "is there"),
}
CAMERA = {
    "left": ("pans to the left", "pans left", "turns to the left"),
    "right": ("pans to the right", "pans right", "turns to the right"),
    "still": ("does not move", "stays still"),
}
HAPPENS = {
    "appears": ("appears", "comes into view", "shows up"),
    "disappears": ("disappears", "vanishes", "is gone"),
    "changes": ("turns {}", "changes to {}", "becomes {}"),
}
NUMBERS = ("no", "one", "two", "three")


@dataclass(frozen=True)
class Example:
    """Something to ask of a clip, and a true answer."""

    prompt: str
    answer: str
    style: str
    template: str
    history: tuple[tuple[str, str], ...] = ()
    """(question, answer) of earlier turns."""
    kind: str = ""
    """Which of QUESTIONS."""


def make_example(facts: Facts, rng: np.random.Generator, style: str | None = None, template: str | None = None):
    """An `Example` about these facts. Style and template are drawn where they are not given, mostly "chat".

    Under "vqa" and "base", where frames carry no numbers, answers do not depend on time.

    Raises:
        ValueError: an unknown style or template.
    """
    if style not in (None, *STYLES) or template not in (None, "chat", "vqa", "base"):
        raise ValueError(f"style={style!r}, template={template!r}: styles are {STYLES}, templates chat, vqa, base")
    if style is None:
        style = STYLES[int(rng.choice(5, p=[0.42, 0.08, 0.06, 0.06, 0.38]))]
    if template is None and style != "question" and any(event.kind == "changes" for event in facts.events):
        template = "chat"  # without order nobody could tell which colour such an object has first
    if template is None:
        shares = [0.7, 0.22, 0.08] if style == "question" else [0.86, 0.06, 0.08]
        template = ("chat", "vqa", "base")[int(rng.choice(3, p=shares))]
    history, is_asked = (), style == "question"
    if template != "base" and rng.random() < (0.6 if is_asked else 0.15):  # one clip answers many questions
        earlier = (make_question(facts, rng, template) for _ in range(rng.integers(1, 5 if is_asked else 3)))
        history = tuple((turn.prompt, turn.answer) for turn in earlier)
    if is_asked:
        return replace(make_question(facts, rng, template), history=history)
    timeless = template != "chat"
    if style == "list":
        answer = "\n".join(f"- {seen.full_name}" for seen in facts.objects) or "- nothing"
    elif style == "json":
        answer = _as_json(facts, timeless)
    elif template == "vqa":
        answer = f"{_phrase(facts.objects) or 'nothing'} in front of {BACKGROUNDS[facts.background][0]}"
    elif style == "sentence":
        answer = _sentence(facts, rng, timeless)
    else:
        answer = _timeless_description(facts, rng) if timeless else _description(facts, rng)
    # The prompt that everybody uses comes most often.
    prompt = DEFAULT_PROMPT if style == "detailed" and rng.random() < 0.4 else pick(rng, PROMPTS[style])
    return Example(prompt, answer, style, template, history)


def make_question(facts: Facts, rng: np.random.Generator, template: str = "chat", kinds=QUESTIONS) -> Example | None:
    """A question of one of these kinds that has one clear answer; None where the facts allow none of them.

    Under "vqa" and "base" only TIMELESS_QUESTIONS are asked; "vqa" has answers of a word or two.
    """
    asked = {kind: found for kind, found in _questions(facts, rng, template).items() if kind in kinds}
    if not asked:
        return None
    kind = pick(rng, list(asked))
    wordings, answers, short = pick(rng, asked[kind])
    answer = short if template == "vqa" else pick(rng, answers)
    return Example(pick(rng, wordings), answer, "question", template, kind=kind)


def make_interview(facts: Facts, rng: np.random.Generator) -> Example:
    """Two to eight questions about these facts in a row, the last of them with the others as its history.

    Objects are asked for one by one, so that those that have to be found by their names come most often. In half of
    the interviews, questions for colours and shapes come first, before others have told them.
    """
    template = ("chat", "vqa")[int(rng.random() < 0.25)]
    asked = [(kind, one) for kind, some in _questions(facts, rng, template).items() for one in some]
    asked += [("exists", _questions(facts, rng)["exists"][0]) for _ in range(2)]
    asked = [asked[i] for i in rng.permutation(len(asked))]
    if rng.random() < 0.5:
        asked.sort(key=lambda one: one[0] not in ("colour", "shape"))
    asked = asked[: rng.integers(2, 9)]
    turns = [
        (pick(rng, wordings), short if template == "vqa" else pick(rng, answers))
        for _, (wordings, answers, short) in asked
    ]
    *history, (prompt, answer) = turns
    return Example(prompt, answer, "question", template, tuple(history), asked[-1][0])


def _questions(facts, rng, template="chat"):
    """By kind, all that can be asked under this template: lists of (wordings, answers, the short answer)."""
    asked = {}

    def ask(kind, wordings, answers, short=""):
        asked.setdefault(kind, []).append((wordings.split("|"), answers.split("|"), short))

    number, (noun, predicate, _) = NUMBERS[len(facts.objects)], BACKGROUNDS[facts.background]
    wordings = "How many objects are there?|How many objects can be seen?|How many objects does the video show?"
    ask("count", wordings, f"{number.capitalize()}.|There {_count(facts)}.", number)
    wordings = "What is the background?|What does the background look like?|What is behind the objects?"
    ask("background", wordings, f"{noun.capitalize()}.|The background is {predicate}.", predicate)
    if facts.camera:
        answers = "|".join(f"The camera {verb}." for verb in CAMERA[facts.camera])
        ask("camera", "Does the camera move?|What does the camera do?|Is the camera still?", answers)
    changed = {event.name: event.new_colour for event in facts.events if event.kind == "changes"}
    colours, shapes = [*(seen.colour for seen in facts.objects), *changed.values()], [s.shape for s in facts.objects]
    for seen in facts.objects:
        name, colour, shape = seen.name, seen.colour, seen.shape
        if name in changed:
            new = changed[name]
            wordings = f"What colour does the {name} turn?|Which colour does the {name} change to?"
            ask("turns", wordings, f"It turns {new}.|The {name} turns {new}.")
        elif shapes.count(shape) == 1:
            wordings = f"What colour is the {shape}?|Which colour does the {shape} have?"
            ask("colour", wordings, f"It is {colour}.|The {shape} is {colour}.", colour)
        if colours.count(colour) == 1:
            wordings = f"What shape is the {colour} object?|Which shape does the {colour} object have?"
            ask("shape", wordings, f"It is a {shape}.|The {colour} object is a {shape}.", shape)
        if seen.size:
            ask("size", f"What size is the {name}?|How big is the {name}?", f"It is {seen.size}.", seen.size)
        if seen.motion:
            wordings = f"How does the {name} move?|What does the {name} do?"
            if seen.motion in ("left", "right", "up", "down"):
                wordings += f"|Which way does the {name} move?|In which direction does the {name} move?"
            ask("motion", wordings, "|".join(f"It {verb}.|The {name} {verb}." for verb in MOVES[seen.motion]))
    _ask_what_is_there(facts, rng, ask, changed)
    _ask_about_events(facts, rng, ask)
    if template != "chat":
        asked = {kind: found for kind, found in asked.items() if kind in TIMELESS_QUESTIONS}
        if changed:  # without order it could be two objects
            del asked["count"]
    return asked


def _ask_what_is_there(facts, rng, ask, changed):
    """Is there such an object? Half of the answers are yes.

    An absent one has the colour or the shape of one that is there. Pairs kept for held-out scenes are asked for only
    where they are, or training would teach that they never are.
    """
    colours, shapes = [*(seen.colour for seen in facts.objects), *changed.values()], [s.shape for s in facts.objects]
    present = [seen.name for seen in facts.objects if seen.name not in changed]
    if present and rng.random() < 0.5:
        name = pick(rng, present)
        answers, short = f"Yes.|Yes, there is {_a(name)}.", "yes"
    else:
        absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in UNSEEN_PAIRS]
        absent = [(c, s) for c, s in absent if not (c in colours and s in shapes)]
        near = [(c, s) for c, s in absent if c in colours or s in shapes]
        name = " ".join(pick(rng, near or absent))
        answers, short = f"No.|No, there is no {name}.", "no"
    ask("exists", f"Is there {_a(name)}?|Can {_a(name)} be seen?", answers, short)


def _ask_about_events(facts, rng, ask):
    happenings = [f"the {event.name} {_happening(event, rng)}" for event in facts.events]
    for event, happening in zip(facts.events, happenings, strict=True):
        at, verb = f"at second {event.second}", HAPPENS[event.kind][0].format(event.new_colour)
        wordings = f"What happens {at}?|What changes {at}?"
        ask("happens", wordings, f"{_sentences(happening)}|{_sentences(f'{at}, {happening}')}")
        plain = f"turn {event.new_colour}" if event.new_colour else event.kind.removesuffix("s")
        wordings = f"When does the {event.name} {plain}?|At which second does the {event.name} {plain}?"
        ask("when", wordings, f"{_sentences(at)}|The {event.name} {verb} {at}.")
    seconds = [event.second for event in facts.events]
    quiet = [number for number in facts.numbers[1:] if all(abs(number - second) > 1 for second in seconds)]
    if quiet and (not seconds or rng.random() < 0.3):
        at = f"at second {pick(rng, quiet)}"
        ask("happens", f"What happens {at}?|What changes {at}?", "Nothing new happens.")
    if len(set(event.name for event in facts.events)) == 2:
        one, other = happenings if rng.random() < 0.5 else happenings[::-1]
        wordings = f"What comes first: {one} or {other}?|What happens first: {one} or {other}?"
        ask("order", wordings, f"First, {happenings[0]}.|{_sentences(happenings[0] + ' first')}")


def _description(facts, rng):
    """All there is to say, in short sentences."""
    objects, happenings = list(facts.objects), []
    for event in facts.events:
        seen = next(seen for seen in facts.objects if seen.name == event.name)
        name, verb = f"the {event.name}", _happening(event, rng)
        if event.kind == "appears" and rng.random() < 0.5:  # say all of this object here
            objects.remove(seen)
            name, verb = _a(seen.full_name), f"{verb} and {pick(rng, MOVES[seen.motion])}" if seen.motion else verb
        elif len(facts.objects) == 1 and rng.random() < 0.5:
            name = "it"
        at = f"at second {event.second}"
        is_first = " and " in verb or rng.random() < 0.5
        happenings.append(f"{at}, {name} {verb}" if is_first else f"{name} {verb} {at}")
    parts = [_opening(facts, rng)]
    for clauses, joined in ((_with_moves(objects, rng, ""), _joined), (happenings, ", and ".join)):
        if clauses:
            parts.append(_sentences(*clauses) if rng.random() < 0.5 else _sentences(joined(clauses)))
    if facts.camera and (facts.camera != "still" or rng.random() < 0.4):
        parts.append(f"The camera {pick(rng, CAMERA[facts.camera])}.")
    return " ".join(parts)


def _opening(facts, rng):
    """Background and number of objects."""
    (noun, predicate, _), are_two_objects = BACKGROUNDS[facts.background], _count(facts)
    openings = [f"The background is {predicate}. There {are_two_objects}."]
    if facts.objects:
        two_objects = are_two_objects.split(" ", 1)[1]
        openings += [f"The background is {predicate}, and there {are_two_objects}."]
        openings += [f"The video shows {noun} and {two_objects}.", f"In front of {noun}, there {are_two_objects}."]
        openings += [f"{two_objects.capitalize()} can be seen in front of {noun}."]
    else:
        openings += [f"The video shows nothing but {noun}.", f"There is only {noun}. No objects can be seen."]
    return pick(rng, openings)


def _timeless_description(facts, rng):
    if not facts.objects:
        return _opening(facts, rng)
    (noun, predicate, _), are_two_objects, them = BACKGROUNDS[facts.background], _count(facts), _phrase(facts.objects)
    descriptions = [f"The background is {predicate}. There {are_two_objects}: {them}."]
    descriptions += [f"The video shows {them} in front of {noun}. There {are_two_objects} in all."]
    return pick(rng, [*descriptions, f"In front of {noun}, there {are_two_objects}: {them}."])


def _sentence(facts, rng, timeless):
    """One sentence, without the events."""
    noun, them = BACKGROUNDS[facts.background][0], _phrase(facts.objects)
    if not facts.objects:
        said = [f"the video shows nothing but {noun}", f"there is only {noun}"]
    elif timeless or not all(seen.motion for seen in facts.objects):
        said = [f"the video shows {them} in front of {noun}", f"{them} can be seen in front of {noun}"]
    else:
        moves = _joined(_with_moves(facts.objects, rng, ""))
        said = [f"in front of {noun}, {moves}", f"{moves} in front of {noun}"]
        said += [f"the video shows {_joined(_with_moves(facts.objects, rng, 'that '))} in front of {noun}"]
    is_panned = not timeless and facts.camera in ("left", "right")
    return _sentences(pick(rng, said) + (f", and the camera {pick(rng, CAMERA[facts.camera])}" if is_panned else ""))


def _as_json(facts, timeless):
    keys = ("colour", "shape", "size") if timeless else ("colour", "shape", "size", "motion")
    objects = [{key: getattr(seen, key) for key in keys} for seen in facts.objects]
    return json.dumps({"background": facts.background, "objects": objects})


def _with_moves(objects, rng, that):
    return [f"{_a(seen.full_name)} {that}{pick(rng, MOVES[seen.motion])}" for seen in objects]


def _phrase(objects):
    return _joined([_a(seen.full_name) for seen in objects])


def _happening(event, rng):
    return pick(rng, HAPPENS[event.kind]).format(event.new_colour)


def _count(facts):
    number = len(facts.objects)
    return "is one object" if number == 1 else f"are {NUMBERS[number]} objects"


def _a(noun):
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _joined(parts):
    return ", ".join(parts[:-1]) + ", and " + parts[-1] if len(parts) > 2 else " and ".join(parts)


def _sentences(*clauses):
    return " ".join(f"{clause[0].upper()}{clause[1:]}." for clause in clauses)
