"""Measure how well numbers that need no judge tell true captions from false ones, on clips whose truth is known.

    nice python -m capkit.demo.measures --clips 500 --out notebooks/results/measures.json

The demo model captions held-out clips with many prompts, templates, decodings and seeds. Each statement of a caption is
judged by the facts of its scene. Truth of a caption is "true", the share of its statements that are; "told", the share
of the scene's facts that it tells; and "both", their harmonic mean. Captions and scores are kept in a folder, so that
the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from capkit import __version__
from capkit.captioning import Captioner, Decoding, Grounding, count_supported, ground, load_captioner
from capkit.cogvlm2 import Prompt
from capkit.demo.facts import Facts, see
from capkit.demo.orders import auc, beyond_length, correlate_cells, order_cells, order_within_clips, resample
from capkit.demo.random_scenes import make_scene
from capkit.demo.statements import Statement, share_told, share_true, statements, swap_word
from capkit.files import append_lines, atomic_write, now, read_lines
from capkit.sweep import PROMPT_PRESETS, SweepPlan, agreement, plan_sweep, run_sweep
from capkit.video import load_clip

FIRST_SEED = 20_000  # of held-out scenes that no other evaluation looks at
PROMPTS = [Prompt(text) for text, _ in PROMPT_PRESETS.values()]
PROMPTS += [Prompt(PROMPT_PRESETS[name][0], "base") for name in ("default", "sentence", "objects")]
PROMPTS += [Prompt(PROMPT_PRESETS[name][0], "vqa") for name in ("default", "objects")]
GREEDY = Decoding(max_new_tokens=160)
SAMPLED = [Decoding(160, temperature, seed=seed) for temperature, seed in ((0.8, 0), (0.8, 1), (1.2, 0), (1.6, 0))]
DECODINGS = [GREEDY, *SAMPLED, Decoding(160, repetition_penalty=1.2)]
MOST_SWAPPED = 4  # captions of a clip of which a word is swapped
TRUTHS = ("true", "told", "both")
RESULTS = Path(__file__).parents[2] / "notebooks" / "results" / "measures.json"
MEASURES = (
    *("supported_words", "support", "support, a word", "support, in all", "support, length-matched", "support, least"),
    *("mean_logprob", "log P, in all", "log P, length-matched", "log P, least"),
    *("agreement", "agreement, all prompts", "num_words"),
)


def plan_captions(num_clips: int, folder: Path) -> SweepPlan:
    """The sweep over so many clips, which are written to the folder."""
    videos = []
    for seed in range(FIRST_SEED, FIRST_SEED + num_clips):
        path = folder / "clips" / f"{seed}.mp4"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(make_scene(seed, held_out=True).write_mp4(path.with_suffix(".part.mp4")), path)
        videos.append(path)
    return plan_sweep(videos, prompts=PROMPTS, decodings=DECODINGS, max_captions=sys.maxsize)


def score_clips(captioner: Captioner, records: Sequence[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """Score the captions of each clip, and some true ones with a word swapped; a file keeps a line for each clip.

    Yields:
        `video`, `seconds` (of its frames), `captions` and `swapped`: lists of `_scores`, of captions with `requests`.
    """
    known = {line["video"]: line for line in read_lines(path)}
    by_clip: dict[str, dict[Any, list[dict[str, Any]]]] = {}
    for record in records:
        if record["status"] == "ok" and record["text"].strip():
            alike = (record["template"], record["prompt"], record["text"])
            by_clip.setdefault(record["video"], {}).setdefault(alike, []).append(record)
    for video, groups in by_clip.items():
        requests = [[record["request"] for record in group] for group in groups.values()]
        line = known.get(video)
        if line is None or [caption["requests"] for caption in line["captions"]] != requests:
            texts = [group[0] for group in groups.values()]
            seconds = texts[0]["timestamps_seconds"]
            changed = [swap_word(record["text"], facts_of(video, seconds)) for record in texts[:MOST_SWAPPED]]
            swapped = [record | {"text": text} for record, text in zip(texts, changed, strict=False) if text]
            grounded: Any = ground(captioner, load_clip(video), [*texts, *swapped], leave_one_out=False)
            scored = list(map(_scores, grounded))
            captions = [scores | {"requests": own} for scores, own in zip(scored, requests, strict=False)]
            line = {"video": video, "seconds": seconds, "captions": captions, "swapped": scored[len(texts) :]}
            append_lines(path, line)
        yield line


def _scores(grounding: Grounding) -> dict[str, Any]:
    """The text, its number of tokens, support and log P in all, and (start, end, support, log P) of each word."""
    joined = "".join(grounding.tokens)
    ends = np.cumsum([0, *map(len, grounding.tokens)]) - (len(joined) - len(joined.lstrip()))
    numbers = [grounding.of_words(values).round(4).tolist() for values in (grounding.support, grounding.logprobs)]
    words = [
        [max(int(ends[tokens.start]), 0), int(ends[tokens.stop]), *values]
        for (_, tokens), *values in zip(grounding.words, *numbers, strict=True)
    ]
    totals = {"support": grounding.total_support, "log P": float(grounding.logprobs.sum())}
    return {"text": joined.strip(), "num_tokens": len(grounding.token_ids), **totals, "words": words}


def facts_of(video: str, seconds: Sequence[float]) -> Facts:
    """What frames at these times of a clip of `plan_captions` show."""
    return see(make_scene(int(Path(video).stem), held_out=True), seconds)


def judge(
    plan: SweepPlan, records: Sequence[dict[str, Any]], lines: Iterator[dict[str, Any]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row for each caption with its truths and measures, and a row for each statement with its words' scores."""
    cells = {record["request"]: cell for (_, cell, _), record in zip(plan.requests(), records, strict=True)}
    captions: list[dict[str, Any]] = []
    stated: list[dict[str, Any]] = []
    for clip, line in enumerate(lines):
        facts = facts_of(line["video"], line["seconds"])
        for scores in line["captions"]:
            judged, own = statements(scores["text"], facts), [cells[request] for request in scores["requests"]]
            row = {"clip": clip, "text": scores["text"]} | _truths(judged, facts) | _measures(scores)
            names = [
                {"cell": plan.label(cell), "prompt": f"{cell.prompt.template}: {cell.prompt.text}"} for cell in own
            ]
            captions += [row | name for name in names]
            decodings = {cell.decoding for cell in own}
            kind = "greedy" if GREEDY in decodings else "sampled" if decodings & {*SAMPLED} else "penalised"
            stated += _statement_rows(clip, kind, scores, judged)
        for scores in line["swapped"]:
            stated += _statement_rows(clip, "swapped", scores, statements(scores["text"], facts))
    table = pd.DataFrame(captions)
    for name, by in (("agreement", ["clip", "prompt"]), ("agreement, all prompts", ["clip"])):
        table[name] = agreement(table, by, "cell")["agreement"]
    return table, pd.DataFrame(stated)


def _truths(judged: Sequence[Statement], facts: Facts) -> dict[str, float]:
    true, told = share_true(judged), share_told(judged, facts)
    return {"true": true, "told": told, "both": 2 * true * told / (true + told) if told else 0.0}


def _measures(scores: dict[str, Any]) -> dict[str, float]:
    support, logprob = np.array([word[2:] for word in scores["words"]]).T
    words = [scores["text"][word[0] : word[1]] for word in scores["words"]]
    return {
        "supported_words": count_supported(words, support),
        "support": scores["support"] / scores["num_tokens"],
        "support, a word": scores["support"] / len(support),
        "support, in all": scores["support"],
        "support, least": support.min(),
        "mean_logprob": scores["log P"] / scores["num_tokens"],
        "log P, in all": scores["log P"],
        "log P, least": logprob.min(),
        "num_words": len(support),
    }


def _statement_rows(clip: int, kind: str, scores: dict[str, Any], judged: Sequence[Statement]) -> list[dict[str, Any]]:
    """Of each statement, the least support and log P of its words."""
    rows = []
    for one in judged:
        own = [word[2:] for word in scores["words"] if word[0] < one.span[1] and one.span[0] < word[1]]
        support, logprob = np.min(own, axis=0).tolist()
        rows.append({"clip": clip, "kind": kind, "is_wrong": not one.is_true, "support": support, "log P": logprob})
    return rows


def compare_measures(plan: SweepPlan, table: pd.DataFrame, stated: pd.DataFrame) -> dict[str, Any]:
    """How well each measure orders cells and captions of a clip by each truth, and finds wrong statements."""
    labels, samples = [plan.label(cell) for cell in plan.cells], resample(table["clip"].max() + 1)
    table = table.pivot(index="clip", columns="cell")
    values = {name: table[name][labels].to_numpy(float) for name in (*MEASURES, *TRUTHS) if name in table}
    for name in ("support", "log P"):
        values[f"{name}, length-matched"] = beyond_length(values[f"{name}, in all"], values["num_words"])
    axes = [(cell.prompt, cell.decoding) for cell in plan.cells]
    differ = {
        pair: [a != b for a, b in zip(axes[pair[0]], axes[pair[1]], strict=True)]
        for pair in itertools.combinations(range(len(axes)), 2)
    }
    orders, found = [], []
    for measure, truth in itertools.product(MEASURES, TRUTHS):
        given = (values[measure], values[truth], samples)
        row: dict[str, Any] = {"measure": measure, "truth": truth, "cells": correlate_cells(*given)}
        for name, axis in (("prompts", [True, False]), ("decodings", [False, True])):
            pairs = [pair for pair, differs in differ.items() if differs == axis]
            row[name], row[f"pairs_of_{name}"] = order_cells(*given, pairs)
        row["captions"], row["pairs_of_captions"] = order_within_clips(*given)
        orders.append(row)
    for kind, measure in itertools.product(("greedy", "sampled", "swapped"), ("log P", "support")):
        rows = stated[stated["kind"] == kind]
        wrong, clips = rows["is_wrong"].to_numpy(bool), rows["clip"].to_numpy(int)
        row = {"mistakes": kind, "measure": measure, "auc": auc(rows[measure].to_numpy(float), wrong, clips, samples)}
        found.append(row | {"wrong": int(wrong.sum()), "right": int((~wrong).sum())})
    return {"orders": orders, "wrong_statements": found}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m capkit.demo.measures", description=__doc__)
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--folder", type=Path, default=Path("runs/measures"), help="for clips, captions and scores")
    parser.add_argument("--model", default="demo", help="demo, or the folder of a demo model in training")
    a = parser.parse_args(arguments)
    captioner, plan = load_captioner(a.model), plan_captions(a.clips, a.folder)
    records = run_sweep(captioner, plan, a.folder / "captions.jsonl").records
    table, stated = judge(plan, records, score_clips(captioner, records, a.folder / "words.jsonl"))
    counts = {"clips": a.clips, "cells": len(plan.cells), "captions": len(table), "failed": len(records) - len(table)}
    means = table.groupby("cell", sort=False)[[*TRUTHS, "num_words"]].mean().round(4)
    made = {"model_fingerprint": captioner.fingerprint, "capkit_version": __version__, "created": now()}
    results = {"command": f"python -m capkit.demo.measures --clips {a.clips} --out {a.out}"} | made | counts
    results |= compare_measures(plan, table, stated) | {"cell_means": means.to_dict("index")}
    atomic_write(a.out, json.dumps(results, indent=1) + "\n")
    print(*(shown.to_string() for shown in tables(a.out)), sep="\n\n")


def tables(path: str | Path = RESULTS) -> list[pd.DataFrame]:
    """The results in a file, to look at: how measures order cells and captions, and find wrong statements."""
    if not Path(path).is_file():  # as where capkit is installed without its notebooks
        return []
    results = json.loads(Path(path).read_text(encoding="utf-8"))

    def shown(estimate: Sequence[float | None]) -> str:
        value, low, high = estimate
        return "" if value is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"

    rows: dict[str, dict[str, str]] = {}
    for order in results["orders"]:
        row = rows.setdefault(order["measure"], {})
        row[f"cells by {order['truth']}"] = shown(order["cells"])
        if order["truth"] == "both":
            row |= {f"{name} by both": shown(order[name]) for name in ("prompts", "decodings", "captions")}
    found = pd.DataFrame(results["wrong_statements"])
    found["auc"], found["measure"] = found["auc"].map(shown), found["measure"].replace("log P", "doubt (log P)")
    counts = f"{results['clips']} clips, {results['cells']} cells, {results['captions']} captions"
    return [pd.DataFrame.from_dict(rows, orient="index").rename_axis(counts), found]


if __name__ == "__main__":
    main()
