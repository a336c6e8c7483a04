"""T5 tokens: as many as sentencepiece finds with T5's own vocabulary."""

import hashlib
import random
import unicodedata

import pytest
import sentencepiece

from capkit.sweep import t5_counter
from capkit.sweep.t5 import VOCABULARY

WORDS = (
    "a the he man woman wearing yellow shirt bicycle motorcycles camera pans slowly towards Notre-Dame "
    "photorealistic bokeh 4K 24fps f/1.8 Zürich naïve garçon Straße fünf țară înălțime déjà-vu don't it's "
    "Ukulele xylophone antidisestablishmentarianism www.example.com/a?b=c&d #tag @name $1,234.50 50% (maybe) [sic]"
).split()
SCRIPTS = [  # of which a text takes its letters
    (0x21, 0x7E), (0xA0, 0x24F), (0x250, 0x2FF), (0x370, 0x3FF), (0x400, 0x52F), (0x531, 0x58A), (0x590, 0x5F4),
    (0x600, 0x6FF), (0x900, 0x97F), (0xE01, 0xE5B), (0xF00, 0xFDA), (0x1100, 0x11FF), (0x1200, 0x137C),
    (0x1E00, 0x1FFE), (0x2010, 0x206F), (0x2070, 0x218B), (0x2190, 0x27BF), (0x2E80, 0x2FDF), (0x3040, 0x30FF),
    (0x3200, 0x33FF),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0xF900, 0xFAFF), (0xFB00, 0xFDFF), (0xFE00, 0xFFFD),
    (0x10000, 0x1FFFF), (0x20000, 0x3FFFF), (0xE0000, 0x10FFFF),
]  # fmt: skip
MARKS = [*range(0x300, 0x370), 0x345, 0x5B0, 0x64B, 0x93C, 0x94D, 0xE31, 0x3099, 0x309A, 0x20DD, 0x1D165]
SPACES = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2009\u200a\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
EMOJI = ["😀", "🎈", "👩‍👩‍👧‍👦", "👍🏽", "🇫🇷", "❤️", "1️⃣", "🏴\U000e0067\U000e0062\U000e007f", "☃", "\ufe0f", "\u200d"]
ODD = [
    "▁",
    "▁▁",
    " ▁ ",
    "<unk>",
    "</s>",
    "<pad>",
    "<extra_id_0>",
    "<0x0A>",
    "ﷺ",
    "¨",
    "´a",
    "ﬁ",
    "½",
    "㍿",
    "™",
    "\ufffd",
]
CONTROLS = [*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), "\u200e", "\u202e", "\u2066", "\ufff9"]


def some_text(rng):
    """A text of one of many kinds, or of several."""
    kind = rng.randrange(10)
    if kind == 0:
        return " ".join(rng.choices(WORDS, k=rng.randrange(1, 200))) + rng.choice(["", ".", "...", "!?"])
    if kind == 1:
        first, last = rng.choice(SCRIPTS)
        letters = [chr(rng.randint(first, last)) for _ in range(rng.randrange(1, 60))]
        return "".join(letter + rng.choice(["", "", "", " "]) for letter in letters)
    if kind == 2:
        letters = rng.choices("aeiouAEnszıøкиעאกक가が○ \u1100\u1161\u11a8", k=rng.randrange(1, 30))
        return "".join(letter + "".join(map(chr, rng.choices(MARKS, k=rng.randrange(4)))) for letter in letters)
    if kind == 3:
        return "".join(rng.choice([*EMOJI, *WORDS, " "]) for _ in range(rng.randrange(1, 30)))
    if kind == 4:
        return "".join(rng.choice([*CONTROLS, *WORDS, " ", ""]) for _ in range(rng.randrange(1, 40)))
    if kind == 5:
        return "".join(rng.choice([*SPACES, *WORDS, "  ", "a"]) for _ in range(rng.randrange(60)))
    if kind == 6:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyzéß", k=rng.choice([100, 1000, 5000])))
    if kind == 7:
        return "".join(rng.choice([*ODD, *WORDS, " "]) for _ in range(rng.randrange(1, 30)))
    if kind == 8:
        normal = rng.choice(["NFC", "NFD", "NFKD"])
        return unicodedata.normalize(normal, " ".join(rng.choices(WORDS, k=rng.randrange(1, 50))))
    return "".join(some_text(rng) for _ in range(rng.randrange(4)))


def assert_counts_are_sentencepieces(count, texts):
    truth = sentencepiece.SentencePieceProcessor(model_file=str(VOCABULARY))
    wrong = [(text, count(text), len(truth.encode(text)) + 1) for text in texts]
    assert not [case for case in wrong if case[1] != case[2]]


def test_the_vocabulary_is_t5s():
    assert hashlib.sha256(VOCABULARY.read_bytes()).hexdigest().startswith("d60acb12")
    assert "Apache" in (VOCABULARY.parent / "NOTICE").read_text()


def test_counts_are_sentencepieces():
    rng = random.Random(1)
    fixed = ["", " ", "\n\n", "▁", "\0", *ODD, *EMOJI, *SPACES, *CONTROLS, "a" * 20_000, "一只狗在草地上奔跑"]
    assert_counts_are_sentencepieces(t5_counter(), [*fixed, *(some_text(rng) for _ in range(500))])


@pytest.mark.soak
def test_counts_are_sentencepieces_for_every_character_and_thousands_of_texts():
    rng = random.Random(2)
    assert_counts_are_sentencepieces(t5_counter(), (some_text(rng) for _ in range(10_000)))
    characters = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert_counts_are_sentencepieces(t5_counter(), (f"a{character}b {character}" for character in characters))


def test_an_empty_text_and_an_unknown_script():
    assert t5_counter()("") == t5_counter("")("") == 1
    assert t5_counter()("一只狗在草地上奔跑") == 3  # a space, one unknown token, the end


class TestFolders:
    def test_one_with_only_a_spiece_model(self, tmp_path):
        """As CogVideoX's `tokenizer/`; the name is given with ~ or not, as text or path."""
        (tmp_path / "spiece.model").write_bytes(VOCABULARY.read_bytes())
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
        for folder in (tmp_path, str(tmp_path)):
            assert t5_counter(folder)("The man is wearing a yellow shirt.") == 10

    @pytest.mark.parametrize("damage", ["cut", "empty", "text", "another"])
    def test_one_that_is_damaged_or_of_another_model_is_named(self, tmp_path, damage):
        data = VOCABULARY.read_bytes()
        other = data.replace(b"nmt_nfkc", b"nmt_nfkX")
        content = {"cut": data[:-1000], "empty": b"", "text": b"version https://git-lfs", "another": other}[damage]
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(ValueError, match="spiece.model: is "):
            t5_counter(tmp_path)

    def test_half_a_character_counts_as_it_is_written(self):
        assert t5_counter()("a \ud800") == t5_counter()("a \\ud800")
