"""Describe captions by counts: length, repetition, stock phrases, impossible times, n-gram scores, agreement.

Tables in, tables out: a row is a caption, its `text` a string, or missing where captioning failed. No number says
whether a caption is true; n-gram scores reward the reference's wording and suit long captions badly. The lists of
phrases are English.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd

from capkit.sweep.t5 import COGVIDEOX_T5_LIMIT, t5_counter

# An opening is one of OPENINGS, or "the" or "this" with a subject and a verb: "The video begins with".
OPENINGS = """in this video, in the video, in this clip, in the clip, in this scene, in the scene, in this image,
    in the image, throughout the video, the video is, this is a video, a video of, a clip of, caption:, description:,
    here is, here's, sure, certainly, we see, we can see, the viewer"""
OPENING_SUBJECTS = "video|clip|footage|animation|image|picture|photo|scene|sequence|frame|film|recording"
OPENING_VERBS = "shows|depicts|features|captures|presents|displays|highlights|introduces|showcases|portrays|illustrates"
OPENING_VERBS += "|opens|begins|starts|commences|unfolds|contains"
# Regular expressions, in lower case.
HEDGES = r"""appears? to(?! (?:the|his|her|their|its)\b), appearing to, seems?, seeming, seemingly, apparently,
    possibly, perhaps, maybe, probably, presumably, potentially, likely, may be, may have, might, could be, could have,
    suggests?, suggesting, impl(?:y|ies|ying), as if, as though"""
MOOD_WORDS = """atmospher(?:e|ic), mood, ambian?ce, ambience, vibe, aura, allure, sense of, feeling of, evok(?:es?|ing),
    seren(?:e|ity), tranquil(?:l?ity)?, peaceful(?:ly)?, harmon(?:y|ious), co[sz]y, inviting, whimsical, captivating,
    mesmeri[sz]ing, enchanting, magical, mystical, mysterious, dramatic(?:ally)?, nostalgi(?:a|c), intimate, eerie,
    ominous, tension, anticipation, charm(?:ing)?, picturesque, idyllic, majestic, grandeur, breathtaking, stunning,
    beaut(?:y|iful), testament, contemplati(?:on|ve), introspecti(?:on|ve), melanchol(?:y|ic), solitude, wonder, awe"""
# About the recording. What the camera does is content for a video generator, so "camera" and "shot" are not here.
META_WORDS = "videos?, clips?, footage, frames?, images?, pictures?, photo(?:graph)?s?, screenshots?, viewers?"

# Function words, which `agreement` ignores.
STOP_WORDS = frozenset(
    """a an the this that these those and or but nor so as if while when where which who whose what there here then than
    of in on at to from by with without into onto over under up down out off for about through across between along
    around near behind before after during until against is are was were be been being am has have had having do does
    did can could will would may might must should shall it its it's he him his she her hers they them their theirs we
    us our you your i my me one ones some any each every other another both all no not only also just very more most
    such same own too still""".split()
)

NEAR_DUPLICATE_JACCARD = 0.8
NUM_BANDS, MOST_COMPARED = 16, 32
LEAST_SIGNATURE = 0.6  # four standard deviations below the limit
_MULTIPLIERS = np.random.default_rng(0).integers(0, 2**63, 4 * NUM_BANDS, np.uint64) * np.uint64(2) + np.uint64(1)


def _either(phrases: str) -> str:
    return re.sub(r",\s+", "|", phrases)


_CHARACTERS_AS_WORDS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese and Japanese: no spaces
_COMBINING_MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0eff"
_LETTER = rf"(?:(?![{_CHARACTERS_AS_WORDS}])[\w{_COMBINING_MARKS}])"
_WORD = re.compile(rf"[{_CHARACTERS_AS_WORDS}]|{_LETTER}+(?:(?:['-]|(?<=\d)[.,:](?=\d)){_LETTER}+)*")
SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)\]]*(?:\s+|$)|[。！？؟।]+|\n+")
_STARTS_SENTENCE = re.compile(r"[^\W\d_]")
OPENING = re.compile(
    rf"\W{{0,20}}((?:{_either(OPENINGS)})(?!\w)"
    rf"|th(?:e|is) (?:\w+ )?(?:{OPENING_SUBJECTS})(?: clip| sequence)? (?:{OPENING_VERBS})\b(?: with\b)?)",
    re.IGNORECASE,
)

_NUMBER_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty""".split()
_DIGITS = r"\d{1,5}(?:\.\d+)?"
_NUMBER = rf"{_DIGITS}|{'|'.join(_NUMBER_WORDS)}"
_START = r"(?<![\w.])"
_TIMES = (
    rf"(?:{_START}(?P<minutes>{_NUMBER})[ -]minutes?,?(?: and)? )?{_START}(?P<seconds>{_NUMBER})[ -]?sec(?:ond)?s?\b",
    rf"{_START}(?P<minutes>{_NUMBER})[ -]minutes?\b",
    r"(?<!\w)(?P<seconds>\d{1,5})(?:st|nd|rd|th)[ -]second\b",
    rf"\bseconds? (?:{_DIGITS} ?(?:-|–|to|and|through) ?)?(?P<seconds>{_DIGITS})(?!-?\w)",
    r"(?<![\d:.])(?:(?P<hours>\d{1,2}):)?(?P<minutes>\d{1,2}):(?P<seconds>[0-5]\d)(?![\d:])(?! ?[ap]\.?m\b)",
)


def describe(captions: pd.DataFrame, t5_tokenizer: Any = None, t5_limit: int = COGVIDEOX_T5_LIMIT) -> pd.DataFrame:
    """Add columns of counts and shares to a table of captions. A missing text gets NA or NaN in all of them.

    New columns:
        num_words, num_sentences: a Chinese or Japanese character is a word.
        num_t5_tokens: `</s>` included; a trigger word that a trainer adds is not counted.
        over_t5_limit: T5 tokens beyond `t5_limit` are cut off in training.
        stopped_by_length: `finish_reason` is "length"; NA where it is unknown.
        repeated_4grams: share of repeated runs of four words: 1 - distinct / all; 0 under four words.
        longest_repeat_words: words in the longest run that occurs twice without overlapping itself.
        boilerplate_opening: the opening, in lower case, if it matches OPENING, else "".
        num_hedges, num_mood_words, num_meta_words: occurrences of HEDGES, MOOD_WORDS, META_WORDS.
        seconds_beyond_clip: how far the largest time mentioned ("at second 12", "12 seconds", "0:12") lies beyond
            `duration_seconds`, rounded up; NaN where the duration is unknown. A clock in the picture counts too.
        chrf, bleu: against `reference`, if there is that column; sentence level, 0 to 100.

    Args:
        captions: `text` and, used where they exist, `finish_reason` ("eos", "length" or "stopped"), `duration_seconds`
            (of the clip or window) and `reference`; other columns are kept.
        t5_tokenizer: of another T5, see `t5_counter`; None for CogVideoX's.
        t5_limit: `capkit.sweep.t5.COGVIDEOX_T5_LIMIT` or, safe for every CogVideoX trainer, `COGVIDEOX_1_5_T5_LIMIT`.

    Returns:
        A new table with the same index.

    Raises:
        ValueError: no `text` column, or no tokenizer in the folder.
        ImportError: there are references, but sacrebleu is not installed.
    """
    require_columns(captions, ["text"])
    texts = [text if isinstance(text, str) else None for text in captions["text"]]
    lowered = [text if text is None else _normalise(text) for text in texts]
    words = [text if text is None else _WORD.findall(text) for text in lowered]
    optional = captions.reindex(columns=["finish_reason", "duration_seconds", "reference"])
    durations = pd.to_numeric(optional["duration_seconds"]).to_numpy(float, na_value=math.nan)
    described = captions.copy()
    described["num_words"] = _each(len, words, "Int64")
    described["num_sentences"] = _each(_num_sentences, texts, "Int64")
    described["num_t5_tokens"] = _each(t5_counter(t5_tokenizer), texts, "Int64")
    described["over_t5_limit"] = described["num_t5_tokens"] > t5_limit
    stopped = optional["finish_reason"].eq("length").astype("boolean")
    described["stopped_by_length"] = stopped.mask(optional["finish_reason"].isna() | described["num_words"].isna())
    described["repeated_4grams"] = _each(lambda w: 1 - _distinct_share([w], 4) if len(w) > 3 else 0, words, "float64")
    described["longest_repeat_words"] = _each(_longest_repeat, words, "Int64")
    described["boilerplate_opening"] = _each(stock_opening, texts, "string")
    for name, phrases in (("hedges", HEDGES), ("mood_words", MOOD_WORDS), ("meta_words", META_WORDS)):
        listed = re.compile(rf"\b(?:{_either(phrases)})(?!\w)")
        matches = [None if text is None else listed.findall(text) for text in lowered]
        described[f"num_{name}"] = _each(len, matches, "Int64")
    described["seconds_beyond_clip"] = [
        math.nan if text is None else _seconds_beyond(text, duration)
        for text, duration in zip(lowered, durations, strict=True)
    ]
    if "reference" in captions:
        described["chrf"], described["bleu"] = _reference_scores(texts, optional["reference"])
    return described


def describe_set(captions: pd.DataFrame, by: str | Sequence[str], clip: str = "clip") -> pd.DataFrame:
    """Summarise each set of captions: a row per cell, in the order in which cells first appear.

    Columns, after those of `by`:
        num_captions, num_failed: with and without a text.
        distinct_1, distinct_2: share of distinct words, and pairs of words. It falls with the number of words, so
            compare only sets of about the same size.
        share_near_duplicates: captions that nearly repeat one of another clip, see `near_duplicates`. Without a column
            `clip` each caption counts as its own clip.
        share_boilerplate, and share_... of every boolean column, such as `share_stopped_by_length`.
        The mean of every numeric column, under that column's name. Missing values are left out of shares and means.

    Args:
        captions: from `describe`, or a table that it takes.
        by: column or columns that identify the set.
        clip: column that identifies the clip.

    Raises:
        ValueError: a column is missing.
    """
    by = [by] if isinstance(by, str) else list(by)
    require_columns(captions, ["text", *by])
    described = (captions if "boilerplate_opening" in captions else describe(captions)).reset_index(drop=True)
    others = described.drop(columns=[*by, clip], errors="ignore")
    flags = others.select_dtypes(["bool", "boolean"])
    flags.insert(0, "boilerplate", described["boilerplate_opening"].ne("").astype("boolean"))
    numbers = others.select_dtypes("number", exclude=["boolean", "timedelta"])
    averaged = pd.concat([flags.add_prefix("share_"), numbers], axis=1).astype(float)
    rows = []
    for key, group in described.groupby(by, sort=False, dropna=False):
        spoken = group[[isinstance(text, str) for text in group["text"]]]
        words = [_words(text) for text in spoken["text"]]
        duplicates = near_duplicates(list(spoken["text"]), list(spoken[clip]) if clip in spoken else range(len(spoken)))
        shares = _distinct_share(words, 1), _distinct_share(words, 2), pd.Series(duplicates, dtype=float).mean()
        rows.append([*key, len(spoken), len(group) - len(spoken), *shares, *averaged.loc[group.index].mean()])
    columns = ["num_captions", "num_failed", "distinct_1", "distinct_2", "share_near_duplicates"]
    return pd.DataFrame(rows, columns=[*by, *columns, *averaged.columns])


def agreement(
    captions: pd.DataFrame, by: str | Sequence[str] = "clip", over: str | Sequence[str] | None = None
) -> pd.DataFrame:
    """Measure how far captions of one clip agree with each other: across seeds, frame samplings, prompts.

    A word in no other variant may be invented, or seen by this variant alone; a word in all of them may still be wrong.
    Words are compared by their stems, stop words are ignored.

    Args:
        captions: `text` and the columns named below.
        by: columns that compared captions have in common: the clip, and the prompt where it should be the same. With
            "video", captions of other windows (`start_seconds`, `end_seconds`) are not compared either.
        over: columns that make a variant: captions with the same values count as one variant and are not compared with
            each other. None: every caption is a variant.

    Returns:
        The same index, with
        num_others: other variants with a text,
        agreement: share of the caption's content words that at least half of the others contain; NaN without others
            or content words,
        words_only_here: the words that none of the others contains, in order, separated by spaces; "" without others.

    Raises:
        ValueError: a column is missing.
    """
    by = [by] if isinstance(by, str) else list(by)
    by += [name for name in ("start_seconds", "end_seconds") if "video" in by and name in captions]
    over = [] if over is None else [over] if isinstance(over, str) else list(over)
    require_columns(captions, ["text", *by, *over])
    content = [_content_words(text) if isinstance(text, str) else None for text in captions["text"]]
    names = list(zip(*(captions[name].astype(str) for name in over), strict=True)) or range(len(captions))
    results: list[dict[str, Any]] = [{} for _ in content]
    for places in captions.groupby(by, dropna=False).indices.values():
        variants: defaultdict[Any, set[str]] = defaultdict(set)
        for place in places:
            if (words := content[place]) is not None:
                variants[names[place]] |= words.keys()
        counts = Counter(chain.from_iterable(variants.values()))
        num_others = len(variants) - 1
        for place in places:
            if (words := content[place]) is None:
                continue
            in_others = {stem: counts[stem] - 1 for stem in words}  # without its own variant
            num_shared = sum(2 * count >= num_others for count in in_others.values())
            results[place] = {
                "num_others": num_others,
                "agreement": num_shared / len(words) if words and num_others else math.nan,
                "words_only_here": " ".join(words[s] for s, count in in_others.items() if num_others and not count),
            }
    columns = {"num_others": "Int64", "agreement": "float64", "words_only_here": "string"}
    return pd.DataFrame(results, index=captions.index, columns=list(columns)).astype(columns)


def near_duplicates(texts: Sequence[str], clips: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Find texts that nearly repeat one of another clip: the same words, or distinct runs of five words with a Jaccard
    index of at least 0.8.

    Likely pairs are found by MinHash, in time that grows with the number of texts and not with its square, and then
    compared run by run, so that what is found is right. Of 64 hashes in 16 bands two texts at the limit of 0.8 share a
    band with a probability of 0.9998, closer ones more surely. In a band a text is compared with 32 others at most.

    Args:
        texts: captions.
        clips: the clip of each; captions of one clip are not compared with each other.

    Returns:
        bool (N,).
    """
    bands = np.empty((len(texts), NUM_BANDS), np.uint64)
    signatures = np.empty((len(texts), 4 * NUM_BANDS), np.uint8)  # a byte of each hash, to sort unlikely pairs out
    for place, text in enumerate(texts):
        hashes = _minhash(_runs_of_words(text))
        bands[place] = (hashes.reshape(NUM_BANDS, 4) * _MULTIPLIERS[:4]).sum(axis=1)
        signatures[place] = hashes
    runs = lru_cache(20_000)(lambda place: _runs_of_words(texts[place]))
    numbers = pd.Series(pd.factorize(pd.Series(clips))[0])
    is_duplicate = numbers.groupby(bands.sum(axis=1)).transform("nunique").to_numpy(int) > 1  # the same words
    turns, clip = numbers.groupby(numbers).cumcount(), numbers.to_numpy()
    for band in bands.T:
        order = np.lexsort((turns, band))  # in a band first a text of each clip, then their second ones, and so on
        for step in range(1, MOST_COMPARED + 1):
            first, second = order[:-step], order[step:]
            in_band = band[first] == band[second]
            if not in_band.any():
                break
            in_band &= (clip[first] != clip[second]) & ~(is_duplicate[first] & is_duplicate[second])
            first, second = first[in_band], second[in_band]
            is_likely = (signatures[first] == signatures[second]).mean(axis=1) >= LEAST_SIGNATURE
            for a, b in zip(first[is_likely].tolist(), second[is_likely].tolist(), strict=True):
                if not (is_duplicate[a] and is_duplicate[b]):
                    num_shared = len(np.intersect1d(runs(a), runs(b), assume_unique=True))
                    num_all = len(runs(a)) + len(runs(b)) - num_shared
                    if num_shared >= NEAR_DUPLICATE_JACCARD * num_all:
                        is_duplicate[[a, b]] = True
    return is_duplicate


def _runs_of_words(text: str) -> np.ndarray:
    """uint64 (R,): hashes of the distinct runs of five words of a text, or of all of its words if they are fewer."""
    words = np.array([crc32(word.encode(errors="surrogatepass")) for word in _words(text)], np.uint64)
    length = min(len(words), 5)
    num_runs = len(words) - length + 1
    runs = np.zeros(num_runs, np.uint64)
    for place in range(length):  # arithmetic modulo 2**64
        runs = (runs ^ words[place : place + num_runs]) * _MULTIPLIERS[place] + (runs >> np.uint64(29))
    return np.unique(runs)


def _minhash(runs: np.ndarray) -> np.ndarray:
    """uint64 (64,): 64 hash functions' least values; each is equal for two sets with the probability of their Jaccard
    index."""
    return ((runs[:, None] * _MULTIPLIERS + _MULTIPLIERS[::-1]) >> np.uint64(32)).min(axis=0)


def require_columns(table: pd.DataFrame, names: Iterable[str]) -> None:
    if missing := [name for name in names if name not in table]:
        raise ValueError(f"no column {missing[0]!r}; there are {', '.join(map(str, table.columns))}")


def _each(measure: Callable[[Any], Any], items: list[Any], dtype: str) -> pd.api.extensions.ExtensionArray:
    missing = math.nan if dtype == "float64" else pd.NA
    return pd.array([missing if item is None else measure(item) for item in items], dtype=dtype)


def count_words(text: str) -> int:
    """Number of words; a Chinese or Japanese character is one."""
    return len(_words(text))


def stock_opening(text: str) -> str:
    """The opening of a text, in lower case, if it matches OPENING, else ""."""
    return (OPENING.match(_normalise(text)) or ["", ""])[1]


def _normalise(text: str) -> str:
    return " ".join(text.lower().replace("’", "'").split())


def _words(text: str) -> list[str]:
    return _WORD.findall(_normalise(text))


def _num_sentences(text: str) -> int:
    return sum(bool(_STARTS_SENTENCE.search(part)) for part in SENTENCE_END.split(text))


def _ngrams(words: list[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def _distinct_share(texts: list[list[str]], n: int) -> float:
    """Distinct n-grams among all; NaN if there are none."""
    num_all = sum(max(len(words) - n + 1, 0) for words in texts)
    return len(set(chain.from_iterable(_ngrams(words, n) for words in texts))) / num_all if num_all else math.nan


def _longest_repeat(words: list[str]) -> int:
    """Words in the longest run that occurs twice without overlapping itself."""
    numbers: dict[str, int] = {}
    runs = {1: np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int64)}

    def occurs_twice(length: int) -> bool:
        """Also sets `runs[length]`: for each word the number of the run that starts there, equal for equal runs."""
        half = max(number for number in runs if number <= length)
        num_starts = len(words) - length + 1
        first_and_last = runs[half][:num_starts] * (len(words) + 1) + runs[half][length - half :][:num_starts]
        _, first, runs[length] = np.unique(first_and_last, return_index=True, return_inverse=True)
        return bool((np.arange(num_starts) - first[runs[length]] >= length).any())

    low, high = 0, 1  # parts of a repeated run are repeated: double the length, then bisect
    while 2 * high <= len(words) and occurs_twice(high):
        low, high = high, 2 * high
    high = min(high, len(words) // 2 + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if occurs_twice(middle) else (low, middle)
    return low


def _seconds_beyond(lowered: str, duration: float) -> float:
    if math.isnan(duration):
        return math.nan
    latest = 0.0
    for match in chain.from_iterable(re.finditer(pattern, lowered) for pattern in _TIMES):
        words = {unit: number for unit, number in match.groupdict().items() if number}
        parts = {unit: _NUMBER_WORDS.index(n) if n in _NUMBER_WORDS else float(n) for unit, n in words.items()}
        time = 3600 * parts.get("hours", 0) + 60 * parts.get("minutes", 0) + parts.get("seconds", 0)
        latest = max(latest, time)
    return latest - duration if latest > math.ceil(duration) else 0.0


def _reference_scores(texts: list[str | None], references: Iterable) -> tuple[list[float], list[float]]:
    chrf, bleu = [math.nan] * len(texts), [math.nan] * len(texts)
    for place, (text, reference) in enumerate(zip(texts, references, strict=True)):
        if text is not None and isinstance(reference, str):
            try:
                import sacrebleu
            except ImportError as error:
                raise ImportError("scores against references need sacrebleu: pip install -e '.[metrics]'") from error
            chrf[place] = sacrebleu.sentence_chrf(text, [reference]).score
            bleu[place] = sacrebleu.sentence_bleu(text, [reference]).score
    return chrf, bleu


def _content_words(text: str) -> dict[str, str]:
    """Content words by stem, each as it first occurs: "moving" under "mov"."""
    stems: dict[str, str] = {}
    for word in _words(text):
        if word not in STOP_WORDS:
            stems.setdefault(re.sub(r"(?<=\w{3})(?:'s|ing|ed|es|(?<!s)s|e)$", "", word), word)
    return stems
