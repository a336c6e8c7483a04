"""What is counted in captions: against counts by hand and slow, plain reimplementations."""

import random
import sys

import numpy as np
import pandas as pd
import pytest

from capkit.sweep import COGVIDEOX_1_5_T5_LIMIT, COGVIDEOX_T5_LIMIT, agreement, describe, describe_set


def described(text, **columns):
    return describe(pd.DataFrame({"text": [text]} | {name: [value] for name, value in columns.items()})).iloc[0]


class TestDescribe:
    def test_a_caption_by_hand(self):
        text = (
            "The video shows a red kite. It appears to rise, a red kite in a serene sky. The kite is gone at second 9!"
        )
        row = described(text, finish_reason="eos", duration_seconds=7.5, mean_logprob=-0.4)
        assert (row["num_words"], row["num_sentences"]) == (24, 3)
        assert row["boilerplate_opening"] == "the video shows"
        assert (row["num_hedges"], row["num_mood_words"], row["num_meta_words"]) == (1, 1, 1)
        assert (row["repeated_4grams"], row["longest_repeat_words"]) == (0, 3)  # "a red kite"
        assert row["seconds_beyond_clip"] == 1.5
        assert not row["stopped_by_length"] and not row["over_t5_limit"]
        assert row["mean_logprob"] == -0.4

    def test_failed_captions_have_no_values_and_the_rest_is_untouched(self):
        captions = pd.DataFrame(
            {"text": ["A dog.", None, np.nan], "finish_reason": ["length", None, "eos"], "duration_seconds": 3.0},
            index=["x", "x", "y"],
        )
        before = captions.copy()
        result = describe(captions)
        pd.testing.assert_frame_equal(captions, before)
        pd.testing.assert_frame_equal(result[list(captions)], captions)
        new = result.drop(columns=list(captions))
        assert new.iloc[0].notna().all() and new.iloc[1:].isna().all(axis=None)
        assert result["stopped_by_length"].iloc[0]

    def test_what_is_unknown_is_missing(self):
        row = described("At second 99 a dog barks.")
        assert pd.isna(row["stopped_by_length"]) and np.isnan(row["seconds_beyond_clip"])
        assert "chrf" not in row
        half_known = describe(pd.DataFrame({"text": ["At second 9."] * 2, "duration_seconds": [3.0, None]}))
        assert half_known["seconds_beyond_clip"].tolist()[0] == 6 and half_known["seconds_beyond_clip"].isna()[1]

    def test_describing_twice_or_nothing(self):
        once = describe(pd.DataFrame({"text": ["A dog runs.", None]}))
        pd.testing.assert_frame_equal(describe(once), once)
        assert list(describe(once.iloc[:0])) == list(once)
        with pytest.raises(ValueError, match="no column 'text'; there are caption"):
            describe(pd.DataFrame({"caption": ["A dog."]}))

    @pytest.mark.parametrize(
        ("text", "num_words", "num_sentences"),
        [
            ("", 0, 0),
            ("  \n ", 0, 0),
            ("🎈🎈", 0, 0),
            ("The dog’s close-up isn't 3.5 m away...", 7, 1),
            ("One! Two? Three", 3, 3),
            ('He said "Stop." Then he left.', 6, 2),
            ("1. A dog\n2. A cat", 6, 2),
            ("Ein schöner Ma\u0308rz.", 3, 1),
            ("一只狗在跑。它很快。", 8, 2),
            ("كلب يجري. هل هو سريع؟", 5, 2),
            ("कुत्ता दौड़ता है।", 3, 1),
            ("word " * 10_000, 10_000, 1),
        ],
    )
    def test_words_and_sentences_of_any_script(self, text, num_words, num_sentences):
        row = described(text)
        assert (row["num_words"], row["num_sentences"]) == (num_words, num_sentences)

    @pytest.mark.parametrize(
        ("text", "share", "longest"),
        [
            ("", 0, 0),
            ("a b c", 0, 0),
            ("a a", 0, 1),
            ("a a a", 0, 1),
            ("a b c d a b c d", 1 / 5, 4),
            ("a a a a a a a a", 4 / 5, 4),
            ("a b a b a", 0, 2),
            ("A dog runs. a DOG, runs", 0, 3),
            ("x " * 10_000, 1 - 1 / 9997, 5000),
            (" ".join(map(str, range(10_000))), 0, 0),
        ],
    )
    def test_repetition(self, text, share, longest):
        row = described(text)
        assert row["repeated_4grams"] == pytest.approx(share)
        assert row["longest_repeat_words"] == longest

    def test_longest_repeat_equals_trying_them_all(self):
        rng = random.Random(0)
        for _ in range(300):
            words = [rng.choice("abc"[: rng.randint(1, 3)]) for _ in range(rng.randint(0, 24))]
            lengths = [
                length
                for length in range(1, len(words) // 2 + 1)
                for start in range(len(words) - 2 * length + 1)
                for again in range(start + length, len(words) - length + 1)
                if words[start : start + length] == words[again : again + length]
            ]
            assert described(" ".join(words))["longest_repeat_words"] == max(lengths, default=0), words

    @pytest.mark.parametrize(
        ("text", "opening"),
        [
            ("The video opens with a man", "the video opens with"),
            ("This short clip  features two", "this short clip features"),
            ("**In this video**, a dog", "in this video"),
            ("the image depicts a cat", "the image depicts"),
            ("Here’s a caption", "here's"),
            ("A video of a dog", "a video of"),
            ("A dog watches a video", ""),
            ("The video recorder stands on a shelf", ""),
            ("The scenery shows", ""),
            ("Surely a dog", ""),
            ("", ""),
        ],
    )
    def test_boilerplate_openings(self, text, opening):
        assert described(text)["boilerplate_opening"] == opening

    def test_lists_of_phrases(self):
        row = described("He seems to wait, possibly for her; perhaps it might rain. It appears to the left, as if new.")
        assert row["num_hedges"] == 5
        row = described(
            "A seemly mightily seen videographer clips... no, a clip of wonderful calm frames; the camera pans."
        )
        assert (row["num_hedges"], row["num_mood_words"], row["num_meta_words"]) == (0, 0, 3)
        assert described("A Serene mood, a sense of awe, evoking tranquility")["num_mood_words"] == 6

    @pytest.mark.parametrize(
        ("text", "beyond"),
        [
            ("At second 12 he waves", 6),
            ("In seconds 3 to 12 he waves", 6),
            ("from second 4-9, then", 3),
            ("For twelve seconds", 6),
            ("the 12-second mark", 6),
            ("the 12th second", 6),
            ("between 7.5 and 8.5 seconds", 2.5),
            ("at 0:12 he waves", 6),
            ("1:00:01", 3595),
            ("after 1 minute and 5 seconds", 59),
            ("two minutes later", 114),
            ("first at second 20, then at second 3", 14),
            ("within six seconds", 0),
            ("A second 12-year-old boy and the second two men", 0),
            ("in 16:9, at 10:30 pm, a clip from the 1980s, 12 dogs", 0),
            ("no time", 0),
            ("", 0),
        ],
    )
    def test_times_beyond_the_clip(self, text, beyond):
        assert described(text, duration_seconds=6.0)["seconds_beyond_clip"] == beyond

    def test_a_second_that_the_clip_has_begun_is_within(self):
        assert described("It lasts 6 seconds", duration_seconds=5.4)["seconds_beyond_clip"] == 0
        assert described("It lasts 6 seconds", duration_seconds=4.9)["seconds_beyond_clip"] == pytest.approx(1.1)


class TestT5Tokens:
    @pytest.fixture
    def tokenizer(self):
        """A token for each word, `</s>` at the end, as T5's adds it."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
        return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", model_max_length=512)

    def test_a_local_tokenizer_counts_exactly(self, tokenizer, tmp_path):
        captions = pd.DataFrame({"text": ["word " * 223, "word " * 224, "word " * 225, "word " * 600, "", None]})
        tokenizer.save_pretrained(tmp_path)
        for given in (tokenizer, tmp_path, str(tmp_path)):
            result = describe(captions, given)
            assert result["num_t5_tokens"].tolist() == [224, 225, 226, 601, 1, pd.NA]
            assert result["over_t5_limit"].dropna().tolist() == [False, False, False, True, False]
        strict = describe(captions, tokenizer, t5_limit=COGVIDEOX_1_5_T5_LIMIT)
        assert strict["over_t5_limit"].dropna().tolist() == [False, True, True, True, False]

    def test_without_a_tokenizer_cogvideoxs_is_used(self):
        result = describe(pd.DataFrame({"text": ["dog " * (COGVIDEOX_T5_LIMIT - 1), "dog " * COGVIDEOX_T5_LIMIT]}))
        assert result["over_t5_limit"].tolist() == [False, True]

    def test_a_folder_without_a_tokenizer_is_named(self, tmp_path):
        with pytest.raises(ValueError, match="no folder with a T5 tokenizer's files") as error:
            describe(pd.DataFrame({"text": ["a"]}), tmp_path)
        assert str(tmp_path) in str(error.value)
        with pytest.raises(ValueError, match="missing"):
            describe(pd.DataFrame({"text": ["a"]}), tmp_path / "missing")


class TestReferences:
    def test_scores_are_sacrebleus(self):
        sacrebleu = pytest.importorskip("sacrebleu")
        captions = pd.DataFrame(
            {
                "text": ["A brown dog runs over the grass.", "A dog runs.", "A dog runs.", None, ""],
                "reference": ["A brown dog runs over the grass.", "One dog is running.", None, "A dog.", "A dog."],
            }
        )
        result = describe(captions)
        assert result["bleu"][0] == pytest.approx(100) and result["chrf"][0] == pytest.approx(100)
        assert result["chrf"][1] == sacrebleu.sentence_chrf("A dog runs.", ["One dog is running."]).score
        assert result["bleu"][1] == sacrebleu.sentence_bleu("A dog runs.", ["One dog is running."]).score
        assert result["chrf"].isna().tolist() == result["bleu"].isna().tolist() == [False, False, True, True, False]

    def test_sacrebleu_is_needed_for_references_only(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sacrebleu", None)
        with pytest.raises(ImportError, match=r"pip install -e '.\[metrics\]'"):
            describe(pd.DataFrame({"text": ["a"], "reference": ["b"]}))
        assert describe(pd.DataFrame({"text": ["a"], "reference": [None]}))["chrf"].isna().all()
        assert described("a")["num_words"] == 1


class TestDescribeSet:
    def test_a_set_by_hand(self):
        captions = pd.DataFrame(
            {
                "prompt": ["Why?", "What?", "Why?", "Why?"],
                "clip": ["a", "a", "b", "c"],
                "text": ["The video shows a dog", "a a a", "the dog", None],
                "finish_reason": ["eos", "length", "length", None],
                "mean_logprob": [-1.0, -2.0, -4.0, None],
            }
        )
        result = describe_set(captions, "prompt").set_index("prompt")
        assert list(result.index) == ["Why?", "What?"]
        why, what = result.loc["Why?"], result.loc["What?"]
        assert (why["num_captions"], why["num_failed"]) == (2, 1) and (what["num_captions"], what["num_failed"]) == (
            1,
            0,
        )
        assert why["distinct_1"] == pytest.approx(5 / 7) and why["distinct_2"] == 1
        assert what["distinct_1"] == pytest.approx(1 / 3) and what["distinct_2"] == pytest.approx(1 / 2)
        assert (why["share_boilerplate"], what["share_boilerplate"]) == (0.5, 0)
        assert (why["share_stopped_by_length"], what["share_stopped_by_length"]) == (0.5, 1)
        assert (why["num_words"], why["mean_logprob"]) == (3.5, -2.5)
        pd.testing.assert_frame_equal(describe_set(describe(captions), ["prompt"]).set_index("prompt"), result)

    def test_several_columns_tell_cells_apart(self):
        captions = pd.DataFrame({"text": ["a b"] * 4, "prompt": list("xxyy"), "seed": [0, 1, 0, None]})
        result = describe_set(captions, ["prompt", "seed"])
        assert len(result) == 4 and result["num_captions"].eq(1).all()
        assert result["num_words"].eq(2).all()

    def test_failures_only_and_nothing_at_all(self):
        failed = describe_set(pd.DataFrame({"text": [None, None], "cell": 1}), "cell").iloc[0]
        assert (failed["num_captions"], failed["num_failed"]) == (0, 2)
        assert np.isnan(
            failed[["distinct_1", "share_near_duplicates", "share_boilerplate", "num_words"]].astype(float)
        ).all()
        empty = describe_set(pd.DataFrame({"text": [], "cell": []}), "cell")
        assert len(empty) == 0 and "share_near_duplicates" in empty
        with pytest.raises(ValueError, match="no column 'cel'; there are text, cell"):
            describe_set(pd.DataFrame({"text": ["a"], "cell": [1]}), "cel")

    def test_only_other_clips_count_as_near_duplicates(self):
        def share(texts, videos):
            return describe_set(pd.DataFrame({"text": texts, "clip": videos, "cell": 0}), "cell")[
                "share_near_duplicates"
            ][0]

        caption = " ".join(f"word{number}" for number in range(40))
        assert share([caption, caption], ["a", "a"]) == 0
        assert share([caption, caption.upper() + "!"], ["a", "b"]) == 1
        assert share(["A dog.", "a dog", "a cat"], list("abc")) == pytest.approx(2 / 3)
        assert share([caption, caption + " and", caption[:100]], list("abc")) == pytest.approx(2 / 3)
        # 36 of 40 runs of five words in common is exactly 0.8 of all; one fewer is less.
        assert share([caption, caption.replace("word0 word1 word2 word3 ", "a b c d ")], list("ab")) == 1
        assert share([caption, caption.replace("word0 word1 word2 word3 word4 ", "a b c d e ")], list("ab")) == 0

    def test_near_duplicates_equal_comparing_all_pairs(self):
        rng = random.Random(1)
        for _ in range(30):
            bases = [[rng.choice("abcdef") for _ in range(rng.randint(0, 60))] for _ in range(3)]
            texts = [list(rng.choice(bases)) for _ in range(rng.randint(2, 30))]
            for words in texts:
                for _ in range(rng.choice([0, 1, 2]) if words else 0):
                    words[rng.randrange(len(words))] = "z"
            videos = [rng.randrange(4) for _ in texts]
            runs = [{tuple(w[i : i + 5]) for i in range(len(w) - 4)} or {tuple(w)} for w in texts]
            expected = [
                any(
                    video != other_video and len(run & other) / len(run | other) >= 0.8
                    for other, other_video in zip(runs, videos, strict=True)
                )
                for run, video in zip(runs, videos, strict=True)
            ]
            table = pd.DataFrame({"text": [" ".join(words) for words in texts], "clip": videos, "cell": 0})
            assert describe_set(table, "cell")["share_near_duplicates"][0] == pytest.approx(np.mean(expected))

    def test_many_captions_that_are_nearly_the_same(self):
        words = [f"word{number}" for number in range(60)]
        texts = [" ".join([*words[: i % 60], f"other{i}", *words[i % 60 :]]) for i in range(1000)]
        result = describe_set(pd.DataFrame({"text": texts, "clip": range(1000), "cell": 0}), "cell")
        assert result["share_near_duplicates"][0] == 1


class TestAgreement:
    def test_words_that_others_say(self):
        captions = pd.DataFrame(
            {
                "clip": ["a"] * 4 + ["b"],
                "text": ["A dog runs.", "The dog is running with a hat.", "Dogs ran!", None, "A cat."],
            },
            index=[7, 7, 8, 9, 10],
        )
        result = agreement(captions)
        assert list(result.index) == [7, 7, 8, 9, 10]
        assert result["num_others"].tolist() == [2, 2, 2, pd.NA, 0]
        # "dog" is said by both others, "run(s)" by neither, since "running" leaves "runn"
        assert result["agreement"].iloc[:3].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 2])
        assert result["agreement"].iloc[3:].isna().all()
        assert result["words_only_here"].tolist()[:3] == ["runs", "running hat", "ran"]
        assert result["words_only_here"].iloc[4] == ""

    def test_half_of_the_others_is_enough(self):
        captions = pd.DataFrame({"clip": "a", "text": ["dog tree", "dog", "tree cat"]})
        result = agreement(captions)
        assert result["agreement"].tolist() == [1, 1, 0.5]
        assert result["words_only_here"].tolist() == ["", "", "cat"]

    def test_captions_of_one_variant_do_not_back_each_other(self):
        captions = pd.DataFrame({"clip": "a", "sampling": ["x", "x", "y"], "text": ["dog hat", "dog hat", "dog"]})
        assert agreement(captions)["words_only_here"].tolist() == ["", "", ""]
        result = agreement(captions, over="sampling")
        assert result["num_others"].tolist() == [1, 1, 1]
        assert result["words_only_here"].tolist() == ["hat", "hat", ""]
        assert result["agreement"].tolist() == [0.5, 0.5, 1]

    def test_only_what_has_by_in_common_is_compared(self):
        captions = pd.DataFrame({"clip": "a", "prompt": ["x", "x", "y"], "text": ["dog", "cat", "cow"]})
        assert agreement(captions, ["clip", "prompt"])["num_others"].tolist() == [1, 1, 0]
        assert len(agreement(captions.iloc[:0])) == 0
        with pytest.raises(ValueError, match="no column 'seed'"):
            agreement(captions, over="seed")
