"""Prompts with steps: questions that the model answers one after another, each seeing the answers before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from capkit.cogvlm2 import Prompt

if TYPE_CHECKING:
    from capkit.captioning.generate import Caption

Ask = Callable[[Sequence[int], Sequence[Prompt]], "Iterable[Caption]"]
"""From the numbers of prompts, and what they ask now, to an answer to each."""


def ask_steps(
    prompts: Sequence[Prompt], ask: Ask, is_stopped: Callable[[], bool] = lambda: False
) -> list[list[Caption]]:
    """The answers to the steps of each prompt: all first steps are asked together, then all second ones, and so on.

    Args:
        prompts: with steps or without.
        ask: answers prompts without steps.
        is_stopped: True ends it after the current answers.

    Raises:
        ValueError: as `ask`, with the number of the step.
    """
    answers: list[list[Caption]] = [[] for _ in prompts]
    for number in range(max((len(prompt.steps) for prompt in prompts), default=0)):
        places = [place for place, prompt in enumerate(prompts) if number < len(prompt.steps)]
        asked = [next_question(prompts[place], answers[place]) for place in places]
        try:
            for place, answer in zip(places, ask(places, asked), strict=True):
                answers[place].append(answer)
        except ValueError as error:
            raise ValueError(f"step {number + 1}, {asked[0].text!r:.100}: {error}") from error
        if is_stopped():
            break
    return answers


def next_question(prompt: Prompt, answers: Sequence[Caption]) -> Prompt:
    """What a prompt asks after these answers to its first steps, see `Prompt.after`."""
    return prompt.after([answer.text for answer in answers])


def with_steps(caption: Caption, prompt: Prompt, answers: Sequence[Caption]) -> Caption:
    """The last answer as the caption of a prompt, with the answers to its steps."""
    if not answers:
        return caption
    return replace(
        caption,
        prompt=prompt,
        seconds=caption.seconds + sum(answer.seconds for answer in answers),
        steps=tuple((step, answer.text.strip()) for step, answer in zip(prompt.steps, answers, strict=False)),
        step_finish_reasons=tuple(answer.finish_reason for answer in answers),
    )
