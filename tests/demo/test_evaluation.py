"""Texts are parsed as meant, damage is noticed, and evaluations count right."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from capkit import FrameSampling, Prompt
from capkit.demo import evaluation
from capkit.demo.claims import claims
from capkit.demo.evaluation import CHECKS, TIMELESS_CHECKS, check, check_answer, check_json
from capkit.demo.facts import see
from capkit.demo.random_scenes import make_scene
from capkit.demo.scenes import COLOURS
from capkit.demo.wording import PROMPTS, QUESTIONS, make_example, make_question


@pytest.fixture(scope="module")
def all_facts():
    scenes = [make_scene(seed, held_out=seed % 2 == 1) for seed in range(200)]
    return [
        see(s, s.timestamps_seconds[FrameSampling("chat").frame_indices(s.timestamps_seconds, s.fps)]) for s in scenes
    ]


def test_claims_of_a_text():
    claimed = claims(
        "The video shows a striped wall and two objects. A large red circle moves to the left. "
        "It turns blue at second 4. At second 7, a small white star appears and bounces up and down. "
        "The camera stays still."
    )
    assert claimed.backgrounds == {"striped wall"} and claimed.counts == {2} and claimed.camera == "still"
    circle, star = claimed.objects
    assert (circle.size, circle.colour, circle.shape, circle.motion) == ("large", "red", "circle", "left")
    assert (star.size, star.colour, star.shape, star.motion) == ("small", "white", "star", "bounces")
    assert claimed.events == (("changes", ("red", "circle"), "blue", 4), ("appears", ("white", "star"), "", 7))


@pytest.mark.parametrize("text", ["", "...", "The the red of at second", "A circle.", "\n\n{"])
def test_nonsense_claims_little_and_is_not_right(all_facts, text):
    assert not claims(text).objects
    facts = next(facts for facts in all_facts if facts.objects)
    assert not any(check(text, facts).values())


def test_free_wording_is_understood():
    claimed = claims(
        "Against a dark blue wall there is a yellow cross, which is small, going up while a red star is rising."
    )
    assert claimed.backgrounds == {"dark blue"}
    assert [(one.colour, one.shape, one.motion) for one in claimed.objects] == [
        ("yellow", "cross", "up"),
        ("red", "star", "up"),
    ]
    turned = claims("A red circle appears at second 1. It turns blue at second 3. The blue circle moves down.")
    assert len(turned.objects) == 1 and turned.objects[0].motion == "down"
    assert len(claims("A red circle stands still. A red circle grows.").objects) == 2


def test_every_true_description_is_found_right(all_facts):
    rng = np.random.default_rng(0)
    for facts in all_facts:
        for _ in range(3):
            text = make_example(facts, rng, "detailed", "chat").answer
            assert False not in check(text, facts).values(), (text, facts)
        timeless = make_example(facts, rng, "detailed", "base").answer
        assert all(check(timeless, facts)[name] is not False for name in TIMELESS_CHECKS), (timeless, facts)
        assert check(make_example(facts, rng, "sentence").answer, facts)["no_wrong_statement"]
        assert check_json(make_example(facts, rng, "json", "chat").answer, facts)


def test_nothing_to_check_is_none(all_facts):
    rng = np.random.default_rng(1)
    blank = next(facts for facts in all_facts if not facts.objects and facts.camera == "still")
    results = check(make_example(blank, rng, "detailed", "chat").answer, blank)
    assert results["background"] and results["count"] and results["no_wrong_statement"]
    assert all(results[name] is None for name in ("colour", "shape", "objects", "size", "motion", "events"))
    assert tuple(results) == CHECKS


DAMAGES = {  # what is changed in the text, and which check must notice
    "colour": (
        r"\b(red|orange|yellow|green|blue|purple|white|black)(?= (circle|square|triangle|star|cross))",
        "colour",
    ),
    "shape": (r"\b(circle|square|star|cross|triangle)\b", "shape"),
    "size": (r"\b(small|medium|large)\b", "size"),
    "direction": (r"\b(left|right)\b", "motion"),
    "second": (r"(?<=second )\d+", "events"),
    "count": (r"\b(one|two|three)(?= objects?)", "count"),
    "background": (r"\bplain (grey|beige|pink)", "background"),
    "camera": (r"(?<=camera )(pans|turns) to the (left|right)", "camera"),
}


def _damaged(name, word):
    if name == "colour":
        return next(colour for colour in COLOURS if colour not in word)
    if name == "second":
        return str(int(word) + 3)
    swaps = {"small": "large", "medium": "small", "large": "medium", "left": "right", "right": "left"}
    swaps |= {"one": "two", "two": "three", "three": "one", "plain grey": "plain pink", "plain pink": "plain beige"}
    swaps |= {"plain beige": "plain grey"}
    for direction, other in (("left", "right"), ("right", "left")):
        swaps |= {f"{verb} to the {direction}": f"{verb} to the {other}" for verb in ("pans", "turns")}
    return swaps.get(word, "square" if word != "square" else "circle")


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_noticed(all_facts, name):
    rng, noticed = np.random.default_rng(2), 0
    pattern, attribute = DAMAGES[name]
    for facts in all_facts:
        text = make_example(facts, rng, "detailed", "chat").answer
        if name == "direction":
            text = re.sub(r"The camera [^.]*\.", "", text)
        match = re.search(pattern, text)
        if not match:
            continue
        wrong = text[: match.start()] + _damaged(name, match[0]) + text[match.end() :]
        results = check(wrong, facts)
        assert results["no_wrong_statement"] is False, (wrong, facts)
        assert results[attribute] is False, (wrong, facts)
        noticed += 1
    assert noticed >= 8


def test_what_is_left_out_is_not_right_but_not_a_wrong_statement(all_facts):
    facts = next(facts for facts in all_facts if len(facts.objects) == 2 and facts.events)
    first = facts.objects[0]
    results = check(f"A {first.name} is there.", facts)
    assert results["no_wrong_statement"]
    assert [results[name] for name in ("background", "count", "objects", "events")] == [False] * 4


def test_invention_is_a_wrong_statement(all_facts):
    rng = np.random.default_rng(3)
    for facts in all_facts[:60]:
        text = make_example(facts, rng, "detailed", "chat").answer
        colour = next(colour for colour in COLOURS if not any(colour == seen.colour for seen in facts.objects))
        assert check(f"{text} A {colour} star can be seen.", facts)["no_wrong_statement"] is False
        if facts.objects and not facts.events:
            invented = check(f"{text} The {facts.objects[0].name} disappears at second 2.", facts)
            assert invented["events"] is invented["no_wrong_statement"] is False


def test_answers_are_judged_by_what_they_say(all_facts):
    rng, kinds = np.random.default_rng(4), set()
    for facts in all_facts:
        description = make_example(facts, rng, "detailed", "chat").answer
        for kind in QUESTIONS:
            for template in ("chat", "vqa"):
                example = make_question(facts, rng, template, (kind,))
                if example:
                    assert check_answer(example, example.answer), example
                    assert check_answer(example, " " + example.answer.upper().rstrip(".")), example
                    assert not check_answer(example, "") and not check_answer(example, "I do not know."), example
                    if len(facts.objects) > 1:
                        assert not check_answer(example, description), example
                    kinds.add(kind)
    assert kinds == set(QUESTIONS)


@pytest.mark.parametrize(
    "kind, right, same, wrong",
    [
        ("colour", "It is red.", "Red", "It is blue."),
        ("count", "There are two objects.", "2", "Three."),
        ("motion", "It moves to the left.", "The red star drifts to the left", "It moves to the right."),
        ("when", "At second 4.", "The red star appears at second 5.", "At second 6."),
        ("order", "First, the red star appears.", "The red star shows up first.", "The blue star appears first."),
        ("happens", "Nothing new happens.", "At second 3, nothing new happens.", "The red star appears."),
        ("happens", "The red star turns blue.", "The red star becomes blue.", "The red star turns green."),
        ("exists", "Yes.", "Yes, there is a red star.", "No."),
        ("camera", "The camera pans to the left.", "The camera pans left.", "The camera does not move."),
        ("background", "A plain grey background.", "plain grey", "A striped wall."),
    ],
)
def test_wording_is_free_meaning_is_not(kind, right, same, wrong):
    example = SimpleNamespace(kind=kind, answer=right)
    assert check_answer(example, right) and check_answer(example, same)
    assert not check_answer(example, wrong)


@pytest.mark.parametrize("text", ["{", "[]", "[1]", '"x"', '{"background": "grey"}', '{"background": 1, "objects": 2}'])
def test_other_json_is_wrong_not_an_error(all_facts, text):
    assert not check_json(text, all_facts[0])


class Oracle:
    """Answers truly: it knows the scene from the file's name. Of frames that come from no file it knows nothing."""

    def caption_batch(self, clips, prompts, decoding=None, batch_size=None):
        prompts = [Prompt.of(prompts)] * len(clips) if isinstance(prompts, str) else prompts
        return [
            SimpleNamespace(text=self.answer(clip, prompt.text, prompt.template), seconds=0.5)
            for clip, prompt in zip(clips, prompts, strict=True)
        ]

    def answer(self, clip, prompt, template):
        if clip.info.path is None:
            return "I cannot tell."
        scene = make_scene(int(re.search(r"_(\d+)\.mp4$", clip.info.path)[1]), held_out=True)
        looks = [scene, replace(scene, things=(), pan=0.0)]  # or blank
        scene = min(looks, key=lambda look: np.abs(look.sample().frames.astype(int) - clip.frames).mean())
        facts, rng = see(scene, clip), np.random.default_rng(0)
        style = next((style for style, prompts in PROMPTS.items() if prompt in prompts), "question")
        while True:
            example = make_example(facts, rng, style, template)
            if example.prompt == prompt or style != "question":
                return " " + example.answer


def test_a_true_captioner_gets_full_marks(tmp_path):
    frame = evaluation.evaluate(Oracle(), 6, folder=tmp_path)
    assert list(frame["seed"]) == list(range(6)) and len(list(tmp_path.glob("*.mp4"))) == 6
    table = evaluation.summarise(frame)
    assert list(table.index) == list(CHECKS)
    assert (table["right"] == 1).all() and table.loc["background", "n"] == 6
    assert table.loc["count", "n_unseen_pairs"] == frame["has_unseen_pair"].sum() > 0


def test_a_wrong_captioner_is_found_out():
    class Parrot(Oracle):
        def answer(self, clip, prompt, template):
            return "The background is plain pink. There is one object. A small red circle stands still."

    table = evaluation.summarise(evaluation.evaluate(Parrot(), 6, seed=20))
    assert (table["right"].drop("camera") < 0.5).all()


def test_prompts_and_controls():
    table = evaluation.summarise(evaluation.evaluate_prompts(Oracle(), 3, questions_per_scene=1))
    assert (table["right"] == 1).all(), table
    questions = {"chat: question", "vqa: question", "base: question", "base: detailed"}
    assert set(table.index.get_level_values("measure")) == questions | {"chat: sentence", "chat: list", "chat: json"}
    assert set(table.loc["chat: sentence"].index) == {"is one sentence", "no wrong statement"}

    table = evaluation.summarise(evaluation.evaluate_controls(Oracle(), 4))["right"]
    assert table["frames in order", "all"] == 1 and table["frames shuffled", "all"] == 0
    assert table["blank clip", "names no object"] == table["blank clip", "background"] == 1
