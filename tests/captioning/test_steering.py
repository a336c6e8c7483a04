"""Forbidden words, word biases and answer prefixes: what they keep out and bring in, equally on all paths."""

import json
import re

import numpy as np
import pytest
import torch

import capkit
from capkit import Captioner, Decoding, Prompt
from capkit.captioning import SharedVideo, ground
from capkit.captioning.steering import SteerRows, Vocabulary
from capkit.runs import DEMO_CLIPS

CLIPS = sorted(DEMO_CLIPS.glob("*.mp4"))
FORBIDDEN = ["Moves", "background", "the", "circle", "to the right"]
PREFIX = "In this clip, a"
STEERED = {"forbidden_words": ["e", "Ġ", "in the", "("], "word_bias": {"zebra": 9, "in": -3.0}}


@pytest.fixture(scope="module")
def demo():
    return capkit.load_captioner("demo", device="cpu")


def holds(text, word):
    """Whether a text holds a word or phrase, whole and in any case."""
    phrase = r"\s+".join(map(re.escape, word.split()))
    starts, ends = (r"\b" if re.match(r"\w", at) else "" for at in (word[0], word[-1]))
    return re.search(starts + phrase + ends, text, re.IGNORECASE) is not None


# ---- forbidden words -------------------------------------------------------------------------------------------------


def one_by_one(captioner, clip, prompt, decodings):
    return [captioner.caption(clip, prompt, decoding) for decoding in decodings]


def batches(captioner, clip, prompt, decodings):
    return [one for decoding in decodings[::2] for one in captioner.caption_batch([clip, clip], prompt, decoding)]


def streams(captioner, clip, prompt, decodings):
    made = [captioner.stream(clip, prompt, decoding) for decoding in decodings]
    assert ["".join(stream) for stream in made] == [stream.caption.text for stream in made]
    return [stream.caption for stream in made]


def sweeps(captioner, clip, prompt, decodings):
    return list(SharedVideo(captioner, clip).caption([(prompt, decoding) for decoding in decodings]))


def check_none_is_said(demo, num_captions, with_graphs=False):
    """Sampled hot, where a model says everything, by each path in turn."""
    captioner = Captioner(demo.model, demo.processor)
    captioner._graph_decoder.is_useful = with_graphs
    said, num_made = {word: 0 for word in FORBIDDEN}, 0
    clips = [capkit.load_clip(path) for path in CLIPS]
    for number in range(num_captions // 10):
        clip, path = clips[number % len(clips)], (one_by_one, batches, streams, sweeps)[number % 4]
        prompt = Prompt(answer_prefix=PREFIX if number % 3 else "")
        settings = [{"temperature": 1.3, "seed": 10 * number + seed, "max_new_tokens": 80} for seed in range(10)]
        captions = path(captioner, clip, prompt, [Decoding(**one, forbidden_words=FORBIDDEN) for one in settings])
        assert not [one.text for one in captions for word in FORBIDDEN if holds(one.text, word)]
        assert all(one.text.startswith(prompt.answer_prefix) for one in captions)
        num_made += len(captions)
        free = captioner.caption(clip, prompt, Decoding(**settings[0]))
        for word in FORBIDDEN:
            said[word] += holds(free.text, word)
    assert num_made >= num_captions - 10
    assert min(said.values()) > 0, said  # else the words would prove nothing


@pytest.mark.parametrize("with_graphs", [False, True])
def test_forbidden_words_are_not_said(demo, with_graphs):
    check_none_is_said(demo, 60, with_graphs)


@pytest.mark.soak
def test_soak_forbidden_words_are_not_said_in_a_thousand_captions(demo):
    for with_graphs in (False, True):
        check_none_is_said(demo, 500, with_graphs)


def test_beams_do_not_say_them_either(demo):
    for path in CLIPS[:2]:
        clip = capkit.load_clip(path)
        free, kept = (
            demo.caption(clip, decoding=Decoding(num_beams=4, max_new_tokens=40, forbidden_words=words))
            for words in ((), FORBIDDEN)
        )
        assert not any(holds(kept.text, word) for word in FORBIDDEN) and any(holds(free.text, w) for w in FORBIDDEN)
        assert demo.score(clip, kept).logprobs == pytest.approx(kept.logprobs, abs=1e-4)


SNIPPETS = (
    *(
        "the",
        "The",
        " the",
        " THE",
        " video",
        " Vi",
        "deo",
        "  ",
        "\n",
        "\t",
        "c",
        "ca",
        "t",
        "at",
        "cat",
        " cat",
        "egory",
    ),
    *(
        "é",
        "É",
        "e\u0301",
        "caf",
        "CAF",
        "don",
        "'t",
        "’t",
        "t’",
        "ß",
        "SS",
        "Stra",
        "e",
        "🌟",
        "猫",
        "がいる",
        ",",
        ".",
        "!",
        "s",
    ),
    *("<|reserved_special_token_0|>", '"', "(", "ing", "-", "_", "1", " "),
)
WORDS = ("the video", "cat", "café", "don't", "Straße", "🌟", "猫がいる", "!", "the", "s , t", "t")


@pytest.mark.parametrize("name", ["captioner", "demo"])
def test_exactly_what_completes_a_word_is_masked(name, request):
    """After random beginnings, against the text that the tokenizer makes of them and each token."""
    processor = request.getfixturevalue(name).processor
    tokenizer, random = processor.tokenizer, np.random.default_rng(0)
    size = max(tokenizer.get_vocab().values()) + 1
    pieces = [[*tokenizer.encode(snippet, add_special_tokens=False)] for snippet in SNIPPETS]
    fragments = set(Vocabulary(tokenizer).fragments)
    num_masked = 0
    for _ in range(150):
        words = tuple(random.choice(WORDS, random.integers(1, 4), replace=False))
        ids = [token for place in random.integers(len(pieces), size=random.integers(0, 9)) for token in pieces[place]]
        begun = random.choice(words)
        begun = random.choice(["", " ", "\n", "x"]) + begun[: random.integers(len(begun) + 1)]
        ids += tokenizer.encode(begun.upper() if random.random() < 0.3 else begun, add_special_tokens=False)
        ids = ids[: len(ids) - random.integers(0, 2)]  # within a character, perhaps
        before = plain(tokenizer.decode(ids, skip_special_tokens=True))
        prefix = ids[: random.integers(0, len(ids) + 1)]
        steer = SteerRows(tokenizer, Decoding(forbidden_words=words), [prefix])
        found = steer.steer([ids[len(prefix) :]], torch.zeros(1, size))[0].isinf()
        for token in range(size):
            after = plain(tokenizer.decode([*ids, token], skip_special_tokens=True))
            completed = any(end > len(before) for word in words for end in ends(after, word))
            if token not in fragments:  # of these, more may be masked
                assert bool(found[token]) == completed, (words, before, after)
            assert bool(found[token]) or not completed, (words, before, after)
            num_masked += completed
    assert num_masked > 100


def plain(text):
    """Without what is incomplete at the end, one kind of apostrophe, in small letters."""
    return text.rstrip("\ufffd").replace("’", "'").casefold()


def ends(text, word):
    """Where a word or phrase ends in a text, with its accents as one character or two."""
    word = word.casefold()
    found = []
    for form in {word, word.replace("é", "e\u0301")}:
        phrase = r"\s+".join(map(re.escape, form.split()))
        starts, stops = (r"\b" if re.match(r"\w", at) else "" for at in (form[0], form[-1]))
        found += [match.end(1) for match in re.finditer(f"(?={starts}({phrase}){stops})", text)]
    return found


def test_no_end_of_a_text_counts_as_the_middle_of_a_word(captioner):
    """Where "cat" is forbidden, neither ends a caption after "cat" nor does "egory" go on from there."""
    tokenizer = captioner.processor.tokenizer
    steer = SteerRows(tokenizer, Decoding(forbidden_words=["cat"]), [[]])
    for ids in (tokenizer.encode(text, add_special_tokens=False) for text in (" ca", "The ca")):
        masked = steer.steer([ids], torch.zeros(1, 5000))[0].isinf().nonzero().flatten().tolist()
        assert tokenizer.encode("t", add_special_tokens=False)[0] in masked
        assert tokenizer.eos_token_id not in masked


# ---- equal on all paths ----------------------------------------------------------------------------------------------

DECODINGS = (
    Decoding(max_new_tokens=14, **STEERED),
    Decoding(max_new_tokens=14, forbidden_words=["e", "o"], repetition_penalty=1.3),
    Decoding(max_new_tokens=9, temperature=1.1, seed=3, **STEERED),
    Decoding(max_new_tokens=14, temperature=1.1, top_k=40, word_bias={"zebra": 9}),
    Decoding(max_new_tokens=6, num_beams=3, **STEERED),
    Decoding(max_new_tokens=14),
)
PROMPTS = (
    Prompt("Why?"),
    Prompt("What happens?", answer_prefix="A zeb"),
    Prompt("Why?", "vqa", answer_prefix="Ein großes"),
)


def check_same(found, expected):
    found = list(found)
    assert [caption.token_ids for caption in found] == [caption.token_ids for caption in expected]
    assert [caption.text for caption in found] == [caption.text for caption in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


@pytest.mark.golden
def test_all_paths_say_the_same(captioner, static, random_clip):
    clip = random_clip(3)
    branches = [(prompt, decoding) for prompt in PROMPTS for decoding in DECODINGS]
    static._graph_decoder.is_useful = False
    alone = [static.caption(clip, *branch) for branch in branches]
    static._graph_decoder.is_useful = True
    check_same([static.caption(clip, *branch) for branch in branches], alone)
    for useful in (False, True):
        static._graph_decoder.is_useful = useful
        check_same(SharedVideo(static, clip).caption(branches), alone)
        streamed = [number for number, (_, decoding) in enumerate(branches) if decoding.num_beams == 1]
        check_same([drain(static.stream(clip, *branches[number])) for number in streamed], [alone[n] for n in streamed])
        for place, decoding in enumerate(DECODINGS):  # other clips and prompts beside each
            together = static.caption_batch([random_clip(2, 5), clip, clip, clip], ["?", *PROMPTS], decoding)[1:]
            check_same(together, alone[place :: len(DECODINGS)])
    plain_ones = [static.caption(clip, prompt, DECODINGS[-1]).token_ids for prompt in PROMPTS]
    assert all(alone[place].token_ids not in plain_ones for place in range(3))  # words matter


def drain(stream):
    assert "".join(stream) == stream.caption.text
    return stream.caption


# ---- answer prefixes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 2}, {"num_beams": 2}, STEERED])
def test_a_caption_begins_with_its_prefix_and_scores_as_it_was_made(captioner, random_clip, settings):
    clip, prompt = random_clip(), Prompt("Why?", answer_prefix="A zeb")
    caption = captioner.caption(clip, prompt, Decoding(max_new_tokens=10, **settings))
    assert caption.text == "A zeb" + captioner.processor.decode(caption.token_ids, skip_special_tokens=True)
    score = captioner.score(clip, caption)
    assert score.token_ids == caption.token_ids
    assert score.logprobs == pytest.approx(caption.logprobs, abs=1e-4)
    assert (
        captioner.score(clip, "A zebra runs.", prompt).tokens == captioner.score(clip, "A zebra runs.", prompt).tokens
    )
    grounding = ground(captioner, clip, caption)
    assert grounding.logprobs.tolist() == pytest.approx(caption.logprobs[: len(grounding.token_ids)], abs=1e-3)


def test_a_prefix_stands_where_an_answer_does(captioner, random_clip):
    """Its log probability and that of what follows are that of the full answer."""
    clip, text = random_clip(), "A quiet harbour."
    processor = captioner.processor
    for template in ("chat", "vqa", "base"):
        prompt = Prompt("What is it?", template, answer_prefix="A quiet")
        full, rest = (captioner.score(clip, text, one) for one in (Prompt("What is it?", template), prompt))
        num_before = len(full.token_ids) - len(rest.token_ids)
        assert full.token_ids[:num_before] == processor.prefix_ids(prompt)
        assert full.token_ids[num_before:] == rest.token_ids and num_before
        assert rest.logprobs == pytest.approx(full.logprobs[num_before:], abs=1e-4)
        assert ground(captioner, clip, text, prompt, leave_one_out=False).token_ids == rest.token_ids


@pytest.mark.parametrize("text, message", [("A loud one", "does not begin with"), ("A quiet", "no text behind")])
def test_a_text_that_lacks_the_prefix_is_not_scored(captioner, random_clip, text, message):
    with pytest.raises(ValueError, match=message):
        captioner.score(random_clip(), text, Prompt(answer_prefix="A quiet"))


def test_a_prefix_with_a_forbidden_word_is_refused_by_every_path(captioner, random_clip):
    clip, prompt, decoding = random_clip(), Prompt(answer_prefix="The  Video"), Decoding(forbidden_words=["the video"])
    for attempt in (
        lambda: captioner.caption(clip, prompt, decoding),
        lambda: captioner.stream(clip, prompt, decoding),
        lambda: list(SharedVideo(captioner, clip).caption([(prompt, decoding)])),
        lambda: capkit.plan_sweep([clip], [prompt], [decoding]),
        lambda: capkit.caption_clips(captioner, [], "unused.jsonl", prompt, decoding),
    ):
        with pytest.raises(ValueError, match="answer_prefix='The  Video': holds 'the video', which forbidden_words"):
            attempt()


# ---- word biases -----------------------------------------------------------------------------------------------------


def test_a_bias_makes_words_likelier_and_rarer(demo):
    for path in CLIPS:
        clip = capkit.load_clip(path)
        plain_one = demo.caption(clip).text
        assert holds(plain_one, "a") and not holds(plain_one, "zebra")
        assert not holds(demo.caption(clip, decoding=Decoding(word_bias={"a": -100})).text, "a")
        for word in ("zebra", "Red zebra"):
            steered = demo.caption(clip, decoding=Decoding(max_new_tokens=30, word_bias={word: 100}))
            assert holds(steered.text, word)


def test_a_bias_goes_to_the_tokens_that_begin_and_continue_the_word(captioner):
    tokenizer = captioner.processor.tokenizer
    steer = SteerRows(tokenizer, Decoding(word_bias={"Zebra": 2, "zebra stripes": -1, "a": 0.5}), [[]])

    def biases(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        added = steer.steer([ids], torch.zeros(1, 5000))[0]
        return {tokenizer.decode([token]): float(added[token]) for token in added.nonzero().flatten().tolist()}

    def first(text):
        return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:1])

    spaced = {first(" Zebra"), first(" zebra"), first(" a"), first(" A")}
    assert set(biases("The c")) == spaced  # a word is being written
    assert set(biases("")) == set(biases("The (")) == spaced | {first("Zebra"), first("zebra"), first("a"), first("A")}
    begun = [tokenizer.encode(form, add_special_tokens=False) for form in (" zebra", " Zebra")]
    assert min(map(len, begun)) > 2, "the test needs a word of several tokens"
    after_two = biases(" z" if len(tokenizer.encode(" z", add_special_tokens=False)) == 2 else " ze")
    assert after_two.pop(tokenizer.decode(begun[0][2:3])) == 2 - 1  # both words go on so, and do not begin anew
    assert set(after_two) <= {first(" a"), first(" A"), first("a"), first("A")}


def test_rows_of_other_beginnings_are_steered_apart(captioner):
    tokenizer = captioner.processor.tokenizer
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in ("The ca", "The do")]
    new = torch.tensor([ids[0][-1:], ids[1][-1:]])
    decoding = Decoding(forbidden_words=["cat"])
    together = SteerRows(tokenizer, decoding, [ids[0][:-1], ids[1][:-1]])(new, torch.zeros(2, 5000))
    apart = [SteerRows(tokenizer, decoding, [ids[n][:-1]])(new[[n]], torch.zeros(1, 5000)) for n in range(2)]
    assert torch.equal(together, torch.cat(apart)) and not torch.equal(together[0], together[1])


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"forbidden_words": "cat"}, "forbidden_words='cat': must be a list"),
        ({"forbidden_words": ["cat", " "]}, "forbidden_words: ' ' is in it"),
        ({"forbidden_words": [5]}, "forbidden_words: 5 is in it"),
        ({"forbidden_words": ["\ud800"]}, "which is no word"),
        ({"word_bias": ["cat"]}, "must be a dictionary of words and numbers"),
        ({"word_bias": {"cat": 0}}, "0 of 'cat' has no effect"),
        ({"word_bias": {"cat": "much"}}, "'much' of 'cat' must be a number from -100 to 100"),
        ({"word_bias": {"cat": -float("inf")}}, "goes into forbidden_words"),
        ({"word_bias": {"cat": 1, "Cat": 2}}, "'Cat' is there twice"),
        ({"word_bias": {"": 1}}, "'' is in it"),
        ({"word_bias": {"cat" * 100: 1}}, "which is no word or phrase (of at most 200 characters)"),
        ({"word_bias": {"Cat": 1}, "forbidden_words": ["cat"]}, "word_bias: 'Cat' has no effect"),
    ],
)
def test_words_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Decoding(**settings)


def test_equal_words_are_one_setting():
    one = Decoding(forbidden_words=("the  video", "Cat", "cat"), word_bias={"b": np.float32(0.1), "a": 2})
    other = Decoding(forbidden_words=["Cat", "the video"], word_bias=[("a", 2.0), ("b", 0.1)])
    assert one == other and len({one, other}) == 1
    plain_one = json.loads(json.dumps(one.to_dict()))
    assert plain_one["forbidden_words"] == ["Cat", "the video"] and plain_one["word_bias"] == {"a": 2.0, "b": 0.1}
    assert Decoding(**plain_one) == Decoding.of(plain_one) == one
    assert "word" not in str(Decoding().to_dict())


@pytest.mark.parametrize("prefix", [" The", "The ", "\n", None, 5, "\ud800"])
def test_prefixes_that_make_no_sense(prefix):
    with pytest.raises(ValueError, match="answer_prefix"):
        Prompt(answer_prefix=prefix)


def test_a_prompt_without_a_prefix_is_recorded_as_before():
    assert "answer_prefix" not in Prompt().to_record()
    prompt = Prompt("Why?", answer_prefix="The video shows")
    assert Prompt.from_record(prompt.to_record()) == prompt
    assert Prompt.from_record(Prompt("Why?").to_record()).answer_prefix == ""
