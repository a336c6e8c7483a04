"""The shipped demo model: what it has to be able to do, on a small sample; its soak tests print the figures of a large
one."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from other_renderer import plain_shapes

import capkit
from capkit import Decoding
from capkit.captioning import SharedVideo, ground
from capkit.demo import evaluation
from capkit.demo.claims import claims
from capkit.demo.facts import Event, Facts, Seen, see
from capkit.demo.random_scenes import make_scene
from capkit.demo.scenes import COLOURS
from capkit.demo.wording import make_example
from capkit.runs import DEMO_CLIPS
from capkit.sweep import PROMPT_PRESETS, compare

LEAST = {"background": 0.95, "count": 0.95, "colour": 0.85, "shape": 0.85, "motion": 0.85, "events": 0.8}
LEAST |= {"no_wrong_statement": 0.8}


@pytest.fixture(scope="module")
def demo():
    return capkit.load_captioner("demo", device="cpu")


def held_out_texts(wanted, num_cases):
    """(clip, a true description, facts) of held-out scenes for which `wanted(facts)`."""
    seed = 10_000
    while num_cases:
        scene = make_scene(seed, held_out=True)
        clip = scene.sample()
        facts = see(scene, clip)
        if wanted(facts):
            yield clip, make_example(facts, np.random.default_rng(seed), "detailed", "chat").answer, facts
            num_cases -= 1
        seed += 1


def swapped_colours_found(demo, num_cases):
    """Share of descriptions in which the word with the lowest support is the one colour that was changed."""
    found = []
    for clip, text, facts in held_out_texts(lambda facts: facts.objects, num_cases):
        used = {seen.colour for seen in facts.objects} | {event.new_colour for event in facts.events}
        wrong = next(colour for colour in reversed(COLOURS) if colour not in used)
        seen = facts.objects[0]
        changed = re.sub(rf"\b{seen.colour} {seen.shape}", f"{wrong} {seen.shape}", text, count=1)
        grounding = ground(demo, clip, changed, leave_one_out=False)
        lowest = int(grounding.of_words(grounding.support).argmin())
        found.append(grounding.words[lowest][0] == wrong)
    return np.mean(found)


def events_found(demo, num_cases):
    """Share of seconds in descriptions that lean on a frame within one second of the event."""
    found = []
    for clip, text, _ in held_out_texts(lambda facts: facts.events, num_cases):
        grounding = ground(demo, clip, text)
        words, leaning = grounding.words, grounding.of_words(grounding.leaning)
        for place in range(1, len(words)):
            if words[place - 1][0].lower() == "second":
                second = int(re.match(r"\d+", words[place][0])[0])
                found.append(abs(int(leaning[:, place].argmax()) - second) <= 1)
    return np.mean(found)


def false_alarms(demo, num_clips, num_draws):
    """p values of comparing a cell with itself: captions of the same prompt with other seeds, drawn anew each time."""
    rows = []
    for place, (clip, _, _) in enumerate(held_out_texts(lambda facts: facts.objects, num_clips)):
        decodings = [Decoding(max_new_tokens=40, temperature=0.8, seed=seed) for seed in range(2 * num_draws)]
        captions = SharedVideo(demo, clip).caption([(capkit.DEFAULT_PROMPT, decoding) for decoding in decodings])
        rows += [
            {"clip": place, "draw": number // 2, "cell": number % 2, "mean_logprob": caption.mean_logprob}
            for number, caption in enumerate(captions)
        ]
    table = pd.DataFrame(rows)
    return [
        compare(draw, "mean_logprob", "cell", "clip", 0, num_resamples=2000)["p_value"].item()
        for _, draw in table.groupby("draw")
    ]


# ---- on a small sample ---------------------------------------------------------------------------------------------
# Bounds are well below the figures of capkit/demo/checkpoint/README.md, as far as chance may throw so few clips.


def test_captions_say_what_there_is(demo):
    table = evaluation.summarise(evaluation.evaluate(demo, 24))["right"]
    for name, least in LEAST.items():
        assert table[name] >= least, (name, table[name])


def test_prompts_are_followed(demo):
    table = evaluation.summarise(evaluation.evaluate_prompts(demo, 6, questions_per_scene=1))["right"]
    assert table["chat: sentence", "is one sentence"] == 1
    assert table["chat: json", "parses"] >= 0.8
    assert table["base: detailed", "names no second"] == 1
    answers = [demo.caption(clip, "How many objects are there?").text for clip, *_ in held_out_texts(lambda f: True, 6)]
    assert all(len(answer.split()) <= 4 for answer in answers)  # an answer, and no description


def one_shape_is_right(text, background, colour, shape, motion):
    """Whether a caption names this one object, and says nothing else than what is given."""
    told = claims(text)
    return (
        [named.pair for named in told.objects] == [(colour, shape)]
        and told.objects[0].motion in (None, motion)
        and told.backgrounds <= {background}
        and told.counts <= {1}
        and not told.events
        and told.camera in (None, "still")
    )


def plain_shapes_right(demo, num_clips):
    """Share of right captions of clips that are drawn without capkit, in front of colours with CSS's names."""
    clips, truths = zip(*((clip, truth) for clip, *truth in plain_shapes(num_clips)), strict=True)
    captions = demo.caption_batch(clips, decoding=evaluation.DECODING)
    return np.mean([one_shape_is_right(one.text, *truth) for one, truth in zip(captions, truths, strict=True)])


def test_plain_shapes_of_another_renderer_are_known_in_front_of_any_colour(demo):
    assert plain_shapes_right(demo, 32) >= 0.8


def test_other_backgrounds_are_named_and_nothing_is_lost_in_front_of_them(demo):
    table = evaluation.summarise(evaluation.evaluate(demo, 24, seed=100, any_background=True))["right"]
    for name, least in LEAST.items():
        assert table[name] >= least - 0.05, (name, table[name])


SHIPPED = {
    "camera_pans_right": ("striped wall", [("yellow", "triangle", "large", None), ("white", "square", "small", None)]),
    "orange_star_turns_green": ("beige", [("orange", "star", "medium", "orbits")]),
    "purple_circle_appears": (
        "dark blue",
        [("white", "triangle", "medium", "still"), ("purple", "circle", None, "grows")],
    ),
    "green_cross_grows": ("pink", [("green", "cross", None, "grows"), ("black", "cross", None, "shrinks")]),
    "purple_square_bounces": ("grey", [("purple", "square", "medium", "bounces")]),
    "yellow_triangle_orbits": ("checkered wall", [("yellow", "triangle", "small", "orbits")]),
}
"""Background and objects (colour, shape, size, motion) of the clips that capkit comes with, as a person sees them."""
SHIPPED_EVENTS = {
    "orange_star_turns_green": Event("changes", 6, "orange", "star", "green"),
    "purple_circle_appears": Event("appears", 4, "purple", "circle"),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_preset_is_answered_truly_for_the_shipped_clips(demo, name):
    clip = capkit.load_clip(DEMO_CLIPS / f"{name}.mp4")
    background, objects = SHIPPED[name]
    events = (SHIPPED_EVENTS[name],) if name in SHIPPED_EVENTS else ()
    camera = "right" if name == "camera_pans_right" else "still"
    facts = Facts(background, tuple(Seen(*one, 0, 0) for one in objects), events, camera, tuple(range(len(clip))))
    answers = {}
    for preset, (prompt, _) in PROMPT_PRESETS.items():
        for template in ("chat", "vqa", "base"):
            answers[preset, template] = demo.caption(clip, capkit.Prompt(prompt, template), evaluation.DECODING).text
    for (preset, template), text in answers.items():
        if template == "chat" or not events:  # without order nobody knows which colour is the first
            assert evaluation.check(text, facts)["no_wrong_statement"], (preset, template, text)
    # And each is the kind of text that was asked for.
    assert evaluation.check(answers["motion", "chat"], facts)["motion"] in (True, None)
    assert evaluation.check(answers["motion", "chat"], facts)["camera"] in (True, None)
    assert answers["sentence", "chat"].strip().count(".") == 1
    assert all(line.startswith("- ") for line in answers["objects", "chat"].strip().splitlines())


def test_a_begun_caption_goes_on_truly(demo):
    right = []
    for clip, _, facts in held_out_texts(lambda facts: True, 6):
        for prefix in ("The video shows", "In this video,", "A video of", "Caption:"):
            prompt = capkit.Prompt(answer_prefix=prefix)
            text = demo.caption(clip, prompt, evaluation.DECODING).text
            assert text.startswith(prefix)
            right.append(evaluation.check(text, facts)["no_wrong_statement"])
    assert np.mean(right) >= 0.75


def test_the_last_answer_of_a_chain_is_true(demo):
    ask = capkit.DEFAULT_PROMPT
    one_sentence, motion = (PROMPT_PRESETS[name][0] for name in ("sentence", "motion"))
    chains = (
        [ask, one_sentence],
        ["How many objects are there?", "What is the background?", one_sentence],
        [ask, motion],
    )
    right = []
    for clip, _, facts in held_out_texts(lambda facts: facts.objects, 6):
        for chain in chains:
            text = demo.caption(clip, chain, evaluation.DECODING).text
            right.append(evaluation.check(text, facts)["no_wrong_statement"])
            if chain[-1] == one_sentence:
                assert text.strip().count(".") == 1
    assert np.mean(right) >= 0.75


@pytest.mark.soak
def test_soak_plain_shapes_of_another_renderer(demo):
    share = plain_shapes_right(demo, 100)
    print(f"plain shapes of another renderer: {share:.0%} of 100 right")
    assert share >= 0.9


@pytest.mark.xfail(strict=True, reason="three presets are right for 92 to 94 % of clips", raises=AssertionError)
@pytest.mark.soak
def test_soak_presets_on_held_out_clips(demo):
    table = evaluation.summarise(evaluation.evaluate_presets(demo, 200))
    print(table.to_string())
    assert (table["right"] >= 0.95).all()


def test_objects_are_found_by_their_names(demo):
    """Not only by their places in the order in which descriptions name them."""

    def is_clear(facts):
        return len({seen.shape for seen in facts.objects}) == len(facts.objects) > 1 and not facts.events

    answers = [
        (demo.caption(clip, f"What colour is the {seen.shape}?").text, seen.colour)
        for clip, _, facts in held_out_texts(is_clear, 12)
        for seen in facts.objects
    ]
    assert np.mean([colour in text for text, colour in answers]) >= 0.85


def test_order_matters(demo):
    table = evaluation.summarise(evaluation.evaluate_controls(demo, 24))["right"]
    assert table["frames in order", "all"] > table["frames shuffled", "all"] + 0.15
    assert table["blank clip", "background"] >= 0.9 and table["blank clip", "names no object"] >= 0.6


def test_another_seed_is_another_wording_of_the_same(demo):
    decodings = [Decoding(max_new_tokens=160, temperature=0.8, seed=seed) for seed in range(6)]
    clip, _, facts = next(iter(held_out_texts(lambda f: len(f.objects) == 1 and not f.events, 1)))
    texts = [demo.caption(clip, decoding=decoding).text for decoding in decodings]
    assert len(set(texts)) >= 4
    seen = [evaluation.check(text, facts) for text in texts]
    assert sum(one["background"] and one["objects"] for one in seen) >= 4


def test_a_wrong_colour_has_the_lowest_support(demo):
    assert swapped_colours_found(demo, 15) >= 0.6


@pytest.mark.soak
def test_soak_grounding_of_wrong_colours_and_events(demo):
    colours, events = swapped_colours_found(demo, 100), events_found(demo, 60)
    print(f"a swapped colour has the lowest support: {colours:.0%} of 100; seconds lean on their frame: {events:.0%}")
    assert colours >= 0.7  # the goals are 90 % and 80 %


@pytest.mark.soak
def test_soak_comparing_a_prompt_with_itself_raises_few_false_alarms(demo):
    p_values = np.array(false_alarms(demo, num_clips=16, num_draws=100))
    print(f"false alarms at 0.05: {(p_values < 0.05).sum()} of {len(p_values)} draws")
    assert (p_values < 0.05).sum() <= 12


@pytest.mark.soak
def test_soak_the_better_of_two_prompts_is_found(demo):
    """One sentence leaves events out, a detailed caption tells them: by the share of clips with all events right."""
    rows = []
    for number, (clip, _, facts) in enumerate(held_out_texts(lambda facts: facts.events, 40)):
        for prompt in (capkit.DEFAULT_PROMPT, "Describe this video in one sentence."):
            right = evaluation.check(demo.caption(clip, prompt).text, facts)["events"]
            rows.append({"clip": number, "prompt": prompt, "right": bool(right)})
    (row,) = compare(pd.DataFrame(rows), "right", "prompt", "clip", capkit.DEFAULT_PROMPT).itertuples()
    print(f"events right: {row.baseline_mean:.2f} against {row.mean:.2f}, p {row.p_value:.4f}")
    assert row.difference < 0 and row.p_value < 0.05


def test_json_is_json(demo):
    (clip, _, facts), *_ = held_out_texts(lambda f: len(f.objects) == 1, 1)
    described = json.loads(demo.caption(clip, "Describe this video as JSON.").text)
    assert described["background"] == facts.background and len(described["objects"]) == 1
