"""Drawn clips show what the facts say: frames are measured without using where the scene puts things."""

import json
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_rgb

import capkit
from capkit.demo.claims import claims
from capkit.demo.evaluation import check
from capkit.demo.facts import see
from capkit.demo.random_scenes import make_scene, name_colour
from capkit.demo.scenes import BACKGROUNDS, COLOURS, PLAIN_COLOURS, SHAPES, SIZES, UNSEEN_PAIRS, USUAL_BACKGROUNDS
from capkit.demo.wording import (
    MOVES,
    PROMPTS,
    QUESTIONS,
    STYLES,
    TIMELESS_QUESTIONS,
    make_example,
    make_interview,
    make_question,
    make_steered,
)


def chat_facts(scene):
    times = scene.timestamps_seconds
    return see(scene, times[capkit.FrameSampling("chat").frame_indices(times, scene.fps)])


@pytest.fixture(scope="module")
def train():
    return [make_scene(seed) for seed in range(200)]


@pytest.fixture(scope="module")
def held_out():
    return [make_scene(seed, held_out=True) for seed in range(100)]


@pytest.fixture(scope="module")
def all_facts(train, held_out):
    return [chat_facts(scene) for scene in train + held_out]


# ---- scenes --------------------------------------------------------------------------------------------------------


def test_a_seed_is_a_scene(train):
    again = make_scene(7)
    assert again == train[7]
    assert np.array_equal(again.draw(1.0), train[7].draw(1.0))
    assert pickle.loads(pickle.dumps(train[7])) == train[7]


def test_everything_that_is_promised_comes_up(train, all_facts):
    assert all(4 <= scene.duration_seconds + 1 / scene.fps and scene.duration_seconds <= 12 for scene in train)
    assert {scene.fps for scene in train} == {8, 10, 12, 15, 24, 25, 30}
    assert all(112 <= min(scene.height, scene.width) <= 240 for scene in train)
    assert {round(scene.width / scene.height, 1) for scene in train} == {0.6, 1.0, 1.3, 1.8}
    assert {facts.background for facts in all_facts} == set(USUAL_BACKGROUNDS)
    assert {len(facts.objects) for facts in all_facts} == {0, 1, 2, 3}
    objects = [seen for facts in all_facts for seen in facts.objects]
    assert {seen.colour for seen in objects} == set(COLOURS) and len(COLOURS) >= 8
    assert {seen.shape for seen in objects} == set(SHAPES) and len(SHAPES) == 5
    assert {seen.size for seen in objects} == {*SIZES, None}
    assert {seen.motion for seen in objects} == set(MOVES)
    assert {event.kind for facts in all_facts for event in facts.events} == {"appears", "disappears", "changes"}
    assert {len(facts.events) for facts in all_facts} == {0, 1, 2}
    assert {facts.camera for facts in all_facts} == {"left", "right", "still"}


def test_held_out_descriptions_and_pairs_are_never_trained_on(train, held_out):
    def description(scene):  # without frame numbers, which are not drawn
        facts = chat_facts(scene)
        objects = frozenset((seen.full_name, seen.motion) for seen in facts.objects)
        return facts.background, facts.camera, objects, facts.events, len(facts.objects) or len(facts.numbers)

    def pairs(scene):
        things = scene.things
        return {(t.colour, t.shape) for t in things} | {(t.new_colour, t.shape) for t in things if t.new_colour}

    assert not {description(scene) for scene in train} & {description(scene) for scene in held_out}
    assert len({colour for colour, _ in UNSEEN_PAIRS}) == len({shape for _, shape in UNSEEN_PAIRS}) == 5
    assert not any(pairs(scene) & UNSEEN_PAIRS for scene in train)
    assert set.union(*map(pairs, held_out)) >= UNSEEN_PAIRS


def test_any_background_is_plain_and_has_one_name_and_no_objects_colour(train):
    names = set()
    for seed, usual in enumerate(train):
        scene = make_scene(seed, any_background=True)
        assert scene.things == usual.things and scene == make_scene(seed, any_background=True)
        if usual.pan:
            assert scene == usual
            continue
        frame = scene.draw(0.0)
        colour = frame[0, 0].astype(int)
        assert name_colour(colour) == scene.background in PLAIN_COLOURS
        assert (replace(scene, things=()).draw(0.0) == frame[0, 0]).all()
        for thing in scene.things:
            for name in filter(None, (thing.colour, thing.new_colour)):
                assert np.linalg.norm(colour - COLOURS[name]) > 90
        names.add(scene.background)
    assert len(names) >= 15 and names >= {"white", "black", "red"}


@pytest.mark.parametrize("seed", [177, 222])
def test_a_held_out_scene_keeps_its_background_where_training_may_show_all_others(seed):
    """One in fifty or so: looking for a colour has to end."""
    scene = make_scene(seed, held_out=True)
    assert not scene.pan and make_scene(seed, held_out=True, any_background=True) == scene


@pytest.mark.parametrize(
    ("name", "css"),
    [("white", "#fff"), ("black", "#000"), ("red", "#f00"), ("yellow", "#ff0"), ("green", "#008000"), ("blue", "#00f")]
    + [("turquoise", "#0ff"), ("orange", "#ffa500"), ("pink", "#ffc0cb"), ("grey", "#808080"), ("purple", "#800080")]
    + [("dark blue", "#00008b"), ("light blue", "#add8e6"), ("light green", "#90ee90"), ("brown", "#8b4513")],
)
def test_colours_have_the_names_that_css_gives_them(name, css):
    assert name_colour([round(255 * part) for part in to_rgb(css)]) == name


def test_a_colour_between_two_names_has_none():
    assert name_colour((196, 80, 24)) is None  # red or orange
    assert name_colour((0, 100, 100)) is None


def test_no_held_out_description_is_trained_on_in_front_of_any_background():
    def description(seed, held_out):
        facts = chat_facts(make_scene(seed, held_out, any_background=True))
        objects = frozenset((seen.full_name, seen.motion) for seen in facts.objects)
        return facts.background, facts.camera, objects, facts.events, len(facts.objects) or len(facts.numbers)

    assert not {description(seed, False) for seed in range(150)} & {description(seed, True) for seed in range(100)}


def test_empty_clips_exist_held_out_too():
    assert {len(make_scene(seed, held_out=True).things) for seed in range(60)} == {0, 1, 2, 3}


def test_things_stay_in_the_middle_square_and_apart(train):
    for scene in train:
        for seconds in scene.timestamps_seconds[:: scene.fps]:
            places = [place for _, _, *place in scene.visible(seconds)]
            for x, y, diameter in places:
                assert 0 <= min(x, y) - 0.5 * diameter and max(x, y) + 0.5 * diameter <= 1
            for i, (x, y, diameter) in enumerate(places):
                for other_x, other_y, other in places[:i]:
                    assert np.hypot(x - other_x, y - other_y) > 0.48 * (diameter + other)


def test_colours_are_far_apart():
    plain = [colour for _, _, colours in USUAL_BACKGROUNDS.values() for colour in colours]
    objects = list(COLOURS.values())
    for i, colour in enumerate(objects):
        for other in objects[:i] + plain:
            assert np.linalg.norm(np.subtract(colour, other)) > 80, (colour, other)


def test_shapes_are_told_apart_at_the_size_the_model_sees(train):
    scene = replace(next(scene for scene in train if len(scene.things) == 1), height=112, width=112, pan=0.0)
    thing = replace(scene.things[0], motion="still", appears=0, disappears=99, changes=99, diameter=0.3, x=0.5, y=0.5)
    empty = replace(scene, things=()).draw(0.0).astype(int)
    masks = []
    for shape in SHAPES:
        drawn = replace(scene, things=(replace(thing, shape=shape, tilt=0.0),)).draw(0.0)
        masks.append(np.abs(drawn - empty).sum(2) > 60)
    for i, mask in enumerate(masks):
        assert 20 <= np.ptp(np.nonzero(mask)[0]) + 1 <= 40
        for other in masks[:i]:
            assert (mask ^ other).sum() > 0.15 * (mask | other).sum()


@pytest.fixture(scope="module")
def looked_at():
    """(facts, what single-object clips without a pan show in each frame): seen or not, colour, middle, extent."""
    found = []
    for seed in range(1000, 1110):
        scene = make_scene(seed)
        if len(scene.things) != 1 or scene.pan:
            continue
        clip, empty = scene.sample(), replace(scene, things=()).sample()
        looks = []
        for frame, without in zip(clip.frames.astype(int), empty.frames.astype(int), strict=True):
            y, x = np.nonzero(np.abs(frame - without).sum(2) > 60)
            if not x.size:
                looks.append(None)
                continue
            rgb = np.median(frame[y, x], axis=0)
            colour = min(COLOURS, key=lambda name, rgb=rgb: np.linalg.norm(rgb - COLOURS[name]))
            side = min(frame.shape[:2])
            looks.append((colour, x.mean() / side, y.mean() / side, max(np.ptp(x), np.ptp(y)) / side))
        found.append((see(scene, clip), looks))
    return found


def test_frames_show_colours_and_events_at_the_seconds_told(looked_at):
    kinds = set()
    for facts, looks in looked_at:
        seen, happened = facts.objects[0], []
        for number in range(1, len(looks)):
            before, now = looks[number - 1], looks[number]
            if before is None and now is not None:
                happened.append(("appears", number, ""))
            if before is not None and now is None:
                happened.append(("disappears", number, ""))
            if before and now and before[0] != now[0]:
                happened.append(("changes", number, now[0]))
        assert [(e.kind, e.second, e.new_colour) for e in facts.events] == happened
        shown = [number for number, look in enumerate(looks) if look]
        assert (shown[0], shown[-1], looks[shown[0]][0]) == (seen.first, seen.last, seen.colour)
        kinds |= {kind for kind, _, _ in happened}
    assert len(kinds) == 3


def test_frames_show_the_motion_and_size_told(looked_at):
    motions = set()
    for facts, looks in looked_at:
        seen = facts.objects[0]
        _, x, y, extent = zip(*(look for look in looks if look), strict=True)
        dx, dy, ratio = x[-1] - x[0], y[-1] - y[0], extent[-1] / extent[0]
        is_there = {
            "still": max(np.ptp(x), np.ptp(y)) < 0.02,
            "left": dx < -0.1 and np.ptp(y) < 0.02,
            "right": dx > 0.1 and np.ptp(y) < 0.02,
            "up": dy < -0.1 and np.ptp(x) < 0.02,
            "down": dy > 0.1 and np.ptp(x) < 0.02,
            "bounces": np.ptp(y) > 0.05 and np.ptp(x) < 0.02 and (np.diff(y) > 0).any() and (np.diff(y) < 0).any(),
            "orbits": min(np.ptp(x), np.ptp(y)) > 0.1,
            "grows": ratio > 1.2,
            "shrinks": ratio < 0.85,
        }
        assert is_there[seen.motion], (seen, x, y, extent)
        if seen.size:
            assert abs(extent[0] - SIZES[seen.size]) < 0.09
        motions.add(seen.motion)
    assert motions == set(MOVES) - {None}


def test_a_pan_moves_the_background_and_all_objects_the_other_way():
    directions = set()
    for scene in filter(lambda scene: scene.pan, map(make_scene, range(300))):
        clip, start = scene.sample(), scene.visible(0.0)
        facts = see(scene, clip)
        for thing, _, x, _, _ in start:
            later = {t: x for t, _, x, _, _ in scene.visible(clip.timestamps_seconds[-1])}
            if thing in later:
                assert (later[thing] < x) == (facts.camera == "right")
        row = replace(scene, things=()).sample().frames[:, scene.height // 2 + 3].astype(int).sum(2)
        shift = round(abs(scene.panned(1.0)) * min(scene.height, scene.width))
        if shift and scene.background != "meadow":  # straight upright edges
            first, second = (row[0, shift:], row[1, :-shift]) if scene.pan > 0 else (row[0, :-shift], row[1, shift:])
            assert (first != second).mean() < 0.1
        assert all(seen.motion is None for seen in facts.objects)
        directions.add(facts.camera)
    assert directions == {"left", "right"}


@pytest.mark.parametrize("frame_sampling", ["chat", "base", {"strategy": "fps", "frames_per_second": 2.0}])
def test_a_file_holds_what_sample_draws(tmp_path, train, frame_sampling):
    for scene in train[:3]:
        path = scene.write_mp4(tmp_path / "scene.mp4")
        clip, drawn = capkit.load_clip(path, frame_sampling, timeout_seconds=None), scene.sample(frame_sampling)
        assert clip.frame_indices == drawn.frame_indices
        assert np.allclose(clip.timestamps_seconds, drawn.timestamps_seconds, atol=1e-4)
        assert see(scene, clip) == see(scene, drawn)
        assert clip.frames.shape == drawn.frames.shape
        assert np.abs(clip.frames.astype(int) - drawn.frames).mean() < 6
        assert path.stat().st_size < 100_000


# ---- facts and texts -------------------------------------------------------------------------------------------------


def test_one_frame_shows_no_motion_no_event_and_no_camera(train):
    for scene in train[:100]:
        facts = see(scene, [scene.duration_seconds / 2])
        assert not facts.events and facts.camera is None
        assert all(seen.motion is None for seen in facts.objects)


def test_only_what_the_frames_show_is_told():
    scene = next(s for s in map(make_scene, range(200)) if len(s.things) == 1 and 2.0 < s.things[0].appears < 9.0)
    appears = scene.things[0].appears
    assert not see(scene, [0.0, appears - 0.1]).objects
    assert see(scene, [appears - 0.1, appears + 0.1]).events[0].second == 1
    assert not see(scene, [appears + 0.1, appears + 0.2]).events


def test_seconds_may_be_told_instead_of_frame_numbers(train):
    scene = next(scene for scene in train if chat_facts(scene).events)
    clip = scene.sample({"strategy": "fps", "frames_per_second": 2.0, "num_frames": 64})
    by_index, by_seconds = see(scene, clip), see(scene, clip, frame_numbers="seconds")
    assert by_index.numbers == tuple(range(len(clip)))
    assert abs(by_index.events[0].second / 2 - by_seconds.events[0].second) <= 0.5


def test_all_styles_under_all_templates(all_facts):
    rng = np.random.default_rng(0)
    for facts in all_facts[:100]:
        for style in STYLES:
            for template in ("chat", "vqa", "base"):
                example = make_example(facts, rng, style, template)
                assert (example.style, example.template) == (style, template)
                assert example.prompt and example.answer == example.answer.strip() != ""
                assert not (example.history and template == "base")
                assert example.prompt in PROMPTS.get(style, (example.prompt,))
    with pytest.raises(ValueError, match="style='poem'"):
        make_example(all_facts[0], rng, "poem")


def test_without_frame_numbers_answers_do_not_depend_on_time(all_facts):
    rng = np.random.default_rng(1)
    timed = "|".join(phrase for motion, phrases in MOVES.items() if motion for phrase in phrases)
    for facts in all_facts:
        example = make_example(facts, rng, template=("vqa", "base")[int(rng.integers(2))])
        texts = [example.answer, *(answer for _, answer in example.history)]
        assert not any(re.search(rf"second|first|appear|turns|camera|motion|{timed}", text) for text in texts), texts
        assert example.kind in (*TIMELESS_QUESTIONS, "")
        if example.template == "vqa" and example.style == "question":
            assert len(example.answer.split()) <= 7 and not example.answer.endswith(".")


def test_sentences_lists_and_json_are_what_they_say(all_facts):
    rng = np.random.default_rng(2)
    for facts in all_facts:
        sentence = make_example(facts, rng, "sentence", "chat").answer
        assert sentence.count(".") == 1 and sentence.endswith(".") and "\n" not in sentence
        lines = make_example(facts, rng, "list").answer.split("\n")
        assert lines == [f"- {seen.full_name}" for seen in facts.objects] or lines == ["- nothing"]
        described = json.loads(make_example(facts, rng, "json", "chat").answer)
        assert described["background"] == facts.background and len(described["objects"]) == len(facts.objects)


def test_questions_have_one_clear_answer(all_facts):
    rng, kinds, yes = np.random.default_rng(3), set(), []
    for facts in all_facts:
        for kind in QUESTIONS:
            question = make_question(facts, rng, kinds=(kind,))
            if question is None:
                continue
            kinds.add(question.kind)
            named = [seen for seen in facts.objects if f"the {seen.shape}" in question.prompt]
            if kind == "colour":
                assert len(named) == 1 and named[0].colour in question.answer
            if kind == "exists" and facts.objects:
                yes.append(question.answer.startswith("Yes"))
                assert yes[-1] == any(seen.name in question.prompt for seen in facts.objects)
                if not yes[-1]:
                    assert not any(" ".join(pair) in question.prompt for pair in UNSEEN_PAIRS)
            if kind == "order":
                assert facts.events[0].name in question.answer
    assert kinds == set(QUESTIONS)
    assert 0.35 < np.mean(yes) < 0.6
    assert make_question(replace(all_facts[0], events=()), rng, kinds=("when",)) is None


def test_the_motion_prompt_tells_motions_events_and_camera_only(all_facts):
    rng = np.random.default_rng(7)
    for facts in all_facts:
        answer = make_example(facts, rng, "motion", "chat").answer
        told = claims(answer)
        assert {named.pair for named in told.objects} == {seen.pair for seen in facts.objects}
        assert len(told.events) == len(facts.events) and told.camera == facts.camera
        assert check(answer, facts)["no_wrong_statement"]
        if facts.objects:
            assert not told.backgrounds and not told.counts


def test_begun_answers_and_chains_are_true(all_facts):
    rng, prefixes, chains = np.random.default_rng(8), set(), 0
    for facts in all_facts:
        example = make_steered(facts, rng)
        assert check(example.answer, facts)["no_wrong_statement"], example
        assert bool(example.answer_prefix) != bool(example.history)
        if example.answer_prefix:
            assert example.answer.startswith(f"{example.answer_prefix} ")
            prefixes.add(example.answer_prefix)
        chains += bool(example.history)
    assert len(prefixes) >= 15 and chains > 100


@pytest.mark.parametrize("name", PLAIN_COLOURS)
def test_backgrounds_are_read_out_of_texts_and_objects_are_not_taken_for_them(name):
    noun, predicate, _ = BACKGROUNDS[name]
    for text in (f"The video shows {noun} and one object.", f"The background is {predicate}.", f"{noun.capitalize()}."):
        assert claims(text).backgrounds == {name}
    assert claims(f'{{"background": "{name}", "objects": []}}').backgrounds == {name}
    assert claims("A large red star moves left. A blue circle turns white.").backgrounds == frozenset()


def test_interviews_ask_for_every_object_by_its_name(all_facts):
    rng, by_name, given_away, templates = np.random.default_rng(6), [], [], set()
    for facts in all_facts:
        interview = make_interview(facts, rng)
        templates.add(interview.template)
        turns = [*interview.history, (interview.prompt, interview.answer)]
        assert 2 <= len(turns) <= 8 and interview.kind in QUESTIONS
        earlier = ""
        for question, answer in turns:
            if match := re.search(r"^Wh(?:at colour is|ich colour does) the (\w+)(?: have)?\?", question):
                (seen,) = [seen for seen in facts.objects if seen.shape == match[1]]
                assert re.search(rf"\b{seen.colour}\b", answer)
                given_away.append(seen.name in earlier)
            earlier += f"{question} {answer} "
            if len(facts.objects) == 3:
                names = [name for seen in facts.objects for name in (seen.name, seen.shape, f"{seen.colour} object")]
                by_name.append(any(f"the {name}" in question for name in names))
    assert templates == {"chat", "vqa"}
    assert np.mean(by_name) > 0.4
    assert 0.05 < np.mean(given_away) < 0.5


def test_the_usual_prompt_and_template_come_most(all_facts):
    rng = np.random.default_rng(4)
    examples = [make_example(facts, rng) for facts in all_facts]
    assert {example.style for example in examples} == set(STYLES)
    shares = {name: np.mean([e.template == name for e in examples]) for name in ("chat", "vqa", "base")}
    assert shares["chat"] > 0.7 and min(shares.values()) > 0.03
    assert max(PROMPTS["detailed"], key=[e.prompt for e in examples].count) == capkit.DEFAULT_PROMPT
    assert {len(example.history) for example in examples} == set(range(5))


def test_the_vocabulary_is_small(all_facts):
    rng, words = np.random.default_rng(5), set()
    for facts in all_facts * 4:
        example = make_example(facts, rng)
        words |= set(re.findall(r"[a-z]+", f"{example.prompt} {example.answer}".lower()))
    assert len(words) < 250
