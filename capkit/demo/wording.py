"""Questions about a scene and true answers, in several styles and many wordings."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from numpy.random import Generator

from capkit.cogvlm2 import DEFAULT_PROMPT, TEMPLATES
from capkit.demo.facts import Event, Facts, Seen
from capkit.demo.prompts import CLAUSE_PREFIXES, FOLLOW_UPS, PROMPTS, SEEN_PREFIXES, TEXT_PREFIXES
from capkit.demo.scenes import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, UNSEEN_PAIRS, pick

TIMELESS_QUESTIONS = ("colour", "shape", "size", "count", "background", "exists")
"""Kinds of questions that frames without numbers and order answer too: the only ones under "vqa" and "base"."""
QUESTIONS = (*TIMELESS_QUESTIONS, "motion", "turns", "happens", "when", "order", "camera")
MOVES: dict[str | None, tuple[str, ...]] = {
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
STYLES = (*PROMPTS, "question")

Questions = dict[str, list[tuple[list[str], list[str], str]]]
"""By kind, (wordings of the question, wordings of the answer, short answer) of each question of that kind."""


@dataclass(frozen=True)
class Example:
    """A prompt for a clip, and a true answer."""

    prompt: str
    answer: str
    style: str
    template: str
    history: tuple[tuple[str, str], ...] = ()  # (question, answer) of earlier turns
    kind: str = ""  # one of QUESTIONS
    answer_prefix: str = ""  # what the answer is told to begin with


def make_example(facts: Facts, rng: Generator, style: str | None = None, template: str | None = None) -> Example:
    """A prompt and its answer. Style and template are drawn at random where they are None, mostly "chat".

    Under "vqa" and "base", where frames carry no numbers, answers do not depend on time.

    Raises:
        ValueError: unknown style or template.
    """
    if style not in (None, *STYLES) or template not in (None, *TEMPLATES):
        raise ValueError(f"style={style!r}, template={template!r}: styles are {STYLES}, templates {TEMPLATES}")
    if style is None:
        style = STYLES[int(rng.choice(6, p=[0.42, 0.08, 0.06, 0.05, 0.05, 0.34]))]
    is_question = style == "question"
    if template is None and not is_question and any(event.kind == "changes" for event in facts.events):
        template = "chat"  # without order nobody could say which colour such an object has first
    if template is None:
        template = TEMPLATES[int(rng.choice(3, p=[0.7, 0.22, 0.08] if is_question else [0.86, 0.06, 0.08]))]
    turns = []
    if template != "base" and rng.random() < (0.6 if is_question else 0.15):
        num_turns = rng.integers(1, 5 if is_question else 3)
        turns = [_pick_question(_questions(facts, rng, template), rng, template) for _ in range(num_turns)]
    history = tuple((turn.prompt, turn.answer) for turn in turns)
    if is_question:
        return replace(_pick_question(_questions(facts, rng, template), rng, template), history=history)
    is_timeless = template != "chat"
    if style == "list":
        answer = "\n".join(f"- {seen.full_name}" for seen in facts.objects) or "- nothing"
    elif style == "json":
        answer = _as_json(facts, is_timeless)
    elif template == "vqa":
        answer = f"{_phrase(facts.objects) or 'nothing'} in front of {BACKGROUNDS[facts.background][0]}"
    elif style == "sentence":
        answer = _sentence(facts, rng, is_timeless)
    elif style == "motion" and not is_timeless:
        answer = _motion(facts, rng)
    else:
        answer = _timeless_description(facts, rng) if is_timeless else _description(facts, rng)
    # The default prompt comes most often.
    prompt = DEFAULT_PROMPT if style == "detailed" and rng.random() < 0.4 else pick(rng, PROMPTS[style])
    return Example(prompt, answer, style, template, history)


def make_steered(facts: Facts, rng: Generator) -> Example:
    """An answer that is told how to begin, or the last answer of a chain of prompts, under "chat"."""
    style = "detailed" if rng.random() < 0.6 else "sentence"
    if rng.random() < 0.5:
        prefix, answer = _prefixed(facts, rng, style)
        prompt = DEFAULT_PROMPT if style == "detailed" and rng.random() < 0.5 else pick(rng, PROMPTS[style])
        return Example(prompt, answer, style, "chat", answer_prefix=prefix)
    if rng.random() < 0.5:
        turns = [make_example(facts, rng, pick(rng, tuple(PROMPTS)), "chat") for _ in range(rng.integers(1, 3))]
    else:
        turns = [_pick_question(_questions(facts, rng), rng, "chat") for _ in range(rng.integers(2, 11))]
    last = make_example(facts, rng, style, "chat")
    history = tuple((turn.prompt, turn.answer) for turn in turns)
    return replace(last, prompt=pick(rng, (*FOLLOW_UPS[style], last.prompt)), history=history)


def make_question(
    facts: Facts, rng: Generator, template: str = "chat", kinds: Collection[str] = QUESTIONS
) -> Example | None:
    """A question of one of these kinds with a single right answer; None where the facts allow none.

    Under "vqa" and "base" only TIMELESS_QUESTIONS come up. Answers under "vqa" have a word or two.
    """
    questions = {kind: items for kind, items in _questions(facts, rng, template).items() if kind in kinds}
    return _pick_question(questions, rng, template) if questions else None


def _pick_question(questions: Questions, rng: Generator, template: str) -> Example:
    kind = pick(rng, list(questions))
    wordings, answers, short = pick(rng, questions[kind])
    answer = short if template == "vqa" else pick(rng, answers)
    return Example(pick(rng, wordings), answer, "question", template, kind=kind)


def make_interview(facts: Facts, rng: Generator) -> Example:
    """Two to eight questions about these facts in a row, the last of them with the others as its history.

    Most questions name an object, so that the model learns to find objects by their names. In half of the interviews,
    questions about colours and shapes come first, before other questions give the answers away.
    """
    template = "vqa" if rng.random() < 0.25 else "chat"
    questions = [(kind, item) for kind, items in _questions(facts, rng, template).items() for item in items]
    questions += [("exists", _questions(facts, rng)["exists"][0]) for _ in range(2)]
    questions = [questions[i] for i in rng.permutation(len(questions))]
    if rng.random() < 0.5:
        questions.sort(key=lambda item: item[0] not in ("colour", "shape"))
    turns = [
        (pick(rng, wordings), short if template == "vqa" else pick(rng, answers), kind)
        for kind, (wordings, answers, short) in questions[: rng.integers(2, 9)]
    ]
    prompt, answer, kind = turns.pop()
    history = tuple((question, answer) for question, answer, _ in turns)
    return Example(prompt, answer, "question", template, history, kind)


def _questions(facts: Facts, rng: Generator, template: str = "chat") -> Questions:
    """All questions that the facts allow under this template."""
    questions: Questions = {}

    def add(kind: str, wordings: str, answers: str, short: str = "") -> None:
        questions.setdefault(kind, []).append((wordings.split("|"), answers.split("|"), short))

    number, (noun, predicate, _) = NUMBERS[len(facts.objects)], BACKGROUNDS[facts.background]
    wordings = "How many objects are there?|How many objects can be seen?|How many objects does the video show?"
    add("count", wordings, f"{number.capitalize()}.|There {_count(facts)}.", number)
    wordings = "What is the background?|What does the background look like?|What is behind the objects?"
    add("background", wordings, f"{noun.capitalize()}.|The background is {predicate}.", predicate)
    if facts.camera:
        answers = "|".join(f"The camera {verb}." for verb in CAMERA[facts.camera])
        add("camera", "Does the camera move?|What does the camera do?|Is the camera still?", answers)
    changed = {event.name: event.new_colour for event in facts.events if event.kind == "changes"}
    colours = [*(seen.colour for seen in facts.objects), *changed.values()]
    shapes = [seen.shape for seen in facts.objects]
    for seen in facts.objects:
        name, colour, shape = seen.name, seen.colour, seen.shape
        if name in changed:
            new = changed[name]
            wordings = f"What colour does the {name} turn?|Which colour does the {name} change to?"
            add("turns", wordings, f"It turns {new}.|The {name} turns {new}.")
        elif shapes.count(shape) == 1:
            wordings = f"What colour is the {shape}?|Which colour does the {shape} have?"
            add("colour", wordings, f"It is {colour}.|The {shape} is {colour}.", colour)
        if colours.count(colour) == 1:
            wordings = f"What shape is the {colour} object?|Which shape does the {colour} object have?"
            add("shape", wordings, f"It is a {shape}.|The {colour} object is a {shape}.", shape)
        if seen.size:
            add("size", f"What size is the {name}?|How big is the {name}?", f"It is {seen.size}.", seen.size)
        if seen.motion:
            wordings = f"How does the {name} move?|What does the {name} do?"
            if seen.motion in DIRECTIONS:
                wordings += f"|Which way does the {name} move?|In which direction does the {name} move?"
            add("motion", wordings, "|".join(f"It {verb}.|The {name} {verb}." for verb in MOVES[seen.motion]))

    # Is there such an object? Half of the answers are yes. An absent one has the colour or the shape of one that is
    # there. Of UNSEEN_PAIRS only present ones are asked about, or training would teach that they never are.
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
    add("exists", f"Is there {_a(name)}?|Can {_a(name)} be seen?", answers, short)

    _add_event_questions(facts, rng, add)
    if template != "chat":
        questions = {kind: items for kind, items in questions.items() if kind in TIMELESS_QUESTIONS}
        if changed:  # without order it could be two objects
            del questions["count"]
    return questions


def _add_event_questions(facts: Facts, rng: Generator, add: Callable[..., None]) -> None:
    happenings = [f"the {event.name} {_happening(event, rng)}" for event in facts.events]
    for event, happening in zip(facts.events, happenings, strict=True):
        at, verb = f"at second {event.second}", HAPPENS[event.kind][0].format(event.new_colour)
        wordings = f"What happens {at}?|What changes {at}?"
        add("happens", wordings, f"{_sentences(happening)}|{_sentences(f'{at}, {happening}')}")
        plain = f"turn {event.new_colour}" if event.new_colour else event.kind.removesuffix("s")
        wordings = f"When does the {event.name} {plain}?|At which second does the {event.name} {plain}?"
        add("when", wordings, f"{_sentences(at)}|The {event.name} {verb} {at}.")
    seconds = [event.second for event in facts.events]
    quiet = [number for number in facts.numbers[1:] if all(abs(number - second) > 1 for second in seconds)]
    if quiet and (not seconds or rng.random() < 0.3):
        at = f"at second {pick(rng, quiet)}"
        add("happens", f"What happens {at}?|What changes {at}?", "Nothing new happens.")
    if len({event.name for event in facts.events}) == 2:
        one, other = happenings if rng.random() < 0.5 else happenings[::-1]
        wordings = f"What comes first: {one} or {other}?|What happens first: {one} or {other}?"
        add("order", wordings, f"First, {happenings[0]}.|{_sentences(happenings[0] + ' first')}")


def _description(facts: Facts, rng: Generator) -> str:
    """All the facts, in short sentences."""
    return " ".join([_opening(facts, rng), *_story(facts, rng)])


def _motion(facts: Facts, rng: Generator) -> str:
    """How the objects and the camera move, and what happens."""
    story = _story(facts, rng, always_camera=True)
    if not facts.objects:
        story.insert(0, f"Nothing moves in front of {BACKGROUNDS[facts.background][0]}.")
    return " ".join(story)


def _prefixed(facts: Facts, rng: Generator, style: str) -> tuple[str, str]:
    """What an answer begins with, and the whole answer."""

    def make() -> str:
        return _description(facts, rng) if style == "detailed" else _sentence(facts, rng, is_timeless=False)

    kind = rng.random()
    if kind < 0.2:
        prefix = pick(rng, TEXT_PREFIXES)
        return prefix, f"{prefix} {make()}"
    if kind < 0.5:
        while (answer := make()).startswith("The video shows"):
            pass
        prefix = pick(rng, CLAUSE_PREFIXES)
        return prefix, f"{prefix} {answer[0].lower()}{answer[1:]}"
    prefix, shows = pick(rng, SEEN_PREFIXES), "The video shows"
    while not (answer := make()).startswith(shows):
        pass
    return prefix, prefix + answer.removeprefix(shows)


def _story(facts: Facts, rng: Generator, always_camera: bool = False) -> list[str]:
    """What the objects do, what happens, and what the camera does, in short sentences."""
    objects, happenings = list(facts.objects), []
    for event in facts.events:
        seen = next(seen for seen in facts.objects if seen.name == event.name)
        name, verb = f"the {event.name}", _happening(event, rng)
        if event.kind == "appears" and rng.random() < 0.5:  # and describe the object here only
            objects.remove(seen)
            name, verb = _a(seen.full_name), f"{verb} and {pick(rng, MOVES[seen.motion])}" if seen.motion else verb
        elif len(facts.objects) == 1 and rng.random() < 0.5:
            name = "it"
        at = f"at second {event.second}"
        is_first = " and " in verb or rng.random() < 0.5
        happenings.append(f"{at}, {name} {verb}" if is_first else f"{name} {verb} {at}")
    parts = []
    moves = _with_moves(objects, rng)
    for clauses, joined in ((moves, _joined(moves)), (happenings, ", and ".join(happenings))):
        if clauses:
            parts.append(_sentences(*clauses) if rng.random() < 0.5 else _sentences(joined))
    if facts.camera and (always_camera or facts.camera != "still" or rng.random() < 0.4):
        parts.append(f"The camera {pick(rng, CAMERA[facts.camera])}.")
    return parts


def _opening(facts: Facts, rng: Generator) -> str:
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


def _timeless_description(facts: Facts, rng: Generator) -> str:
    if not facts.objects:
        return _opening(facts, rng)
    (noun, predicate, _), are_two_objects, them = BACKGROUNDS[facts.background], _count(facts), _phrase(facts.objects)
    descriptions = [f"The background is {predicate}. There {are_two_objects}: {them}."]
    descriptions += [f"The video shows {them} in front of {noun}. There {are_two_objects} in all."]
    return pick(rng, [*descriptions, f"In front of {noun}, there {are_two_objects}: {them}."])


def _sentence(facts: Facts, rng: Generator, is_timeless: bool) -> str:
    """One sentence, without the events."""
    noun, them = BACKGROUNDS[facts.background][0], _phrase(facts.objects)
    if not facts.objects:
        wordings = [f"the video shows nothing but {noun}", f"there is only {noun}"]
    elif is_timeless or not all(seen.motion for seen in facts.objects):
        wordings = [f"the video shows {them} in front of {noun}", f"{them} can be seen in front of {noun}"]
    else:
        moves = _joined(_with_moves(facts.objects, rng))
        wordings = [f"in front of {noun}, {moves}", f"{moves} in front of {noun}"]
        wordings += [f"the video shows {_joined(_with_moves(facts.objects, rng, 'that '))} in front of {noun}"]
    sentence = pick(rng, wordings)
    if not is_timeless and facts.camera in ("left", "right"):
        sentence += f", and the camera {pick(rng, CAMERA[facts.camera])}"
    return _sentences(sentence)


def _as_json(facts: Facts, is_timeless: bool) -> str:
    keys = ("colour", "shape", "size") if is_timeless else ("colour", "shape", "size", "motion")
    objects = [{key: getattr(seen, key) for key in keys} for seen in facts.objects]
    return json.dumps({"background": facts.background, "objects": objects})


def _with_moves(objects: Sequence[Seen], rng: Generator, that: str = "") -> list[str]:
    return [f"{_a(seen.full_name)} {that}{pick(rng, MOVES[seen.motion])}" for seen in objects]


def _phrase(objects: Sequence[Seen]) -> str:
    return _joined([_a(seen.full_name) for seen in objects])


def _happening(event: Event, rng: Generator) -> str:
    return pick(rng, HAPPENS[event.kind]).format(event.new_colour)


def _count(facts: Facts) -> str:
    number = len(facts.objects)
    return "is one object" if number == 1 else f"are {NUMBERS[number]} objects"


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _joined(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + ", and " + parts[-1] if len(parts) > 2 else " and ".join(parts)


def _sentences(*clauses: str) -> str:
    return " ".join(f"{clause[0].upper()}{clause[1:]}." for clause in clauses)
