"""Prompts with steps: questions that the model answers one after another, each seeing the answers before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from capkit.cogvlm2 import Prompt


class HasText(Protocol):
    """An answer, such as a `Caption`."""

    @property
    def text(self) -> str: ...


Answer = TypeVar("Answer", bound=HasText)


def ask_steps(
    prompts: Sequence[Prompt],
    ask: Callable[[Sequence[int], Sequence[Prompt]], Iterable[Answer]],
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[list[Answer]]:
    """The answers to the steps of each prompt: all first steps are asked together, then all second ones, and so on.

    Args:
        prompts: with steps or without.
        ask: from the numbers of prompts, and what each of them asks now, to the answers.
        is_stopped: True ends it after the current answers.

    Raises:
        ValueError: as `ask`, with the number of the step.
    """
    answers: list[list[Answer]] = [[] for _ in prompts]
    for number in range(max((len(prompt.steps) for prompt in prompts), default=0)):
        places = [place for place, prompt in enumerate(prompts) if number < len(prompt.steps)]
        questions = [next_question(prompts[place], answers[place]) for place in places]
        try:
            for place, answer in zip(places, ask(places, questions), strict=True):
                answers[place].append(answer)
        except ValueError as error:
            raise ValueError(f"step {number + 1}, {questions[0].text!r:.100}: {error}") from error
        if is_stopped():
            break
    return answers


def next_question(prompt: Prompt, answers: Sequence[HasText]) -> Prompt:
    """What a prompt asks after these answers to its first steps, see `Prompt.after`."""
    return prompt.after([answer.text for answer in answers])
