"""Training the demo model: what is learnt from, and a run that stops and goes on."""

import numpy as np
import pytest

pytest.importorskip("accelerate")

import capkit
from capkit.cogvlm2 import CogVLM2VideoProcessor
from capkit.demo import training
from capkit.demo.planning import make_scene
from capkit.demo.scenes import COLOURS, SHAPES


@pytest.fixture(scope="module")
def clips():
    return training.draw_clips(range(12), num_workers=1)


@pytest.fixture(scope="module")
def examples(clips):
    return training.Examples(clips, CogVLM2VideoProcessor(training.train_tokenizer(clips), 112, 18))


def test_every_answer_is_learnt_and_nothing_else(examples):
    tokenizer = examples.processor.tokenizer
    for index in list(range(12)) * 5:
        state = examples.random.bit_generator.state
        drawn, ids, labels = examples[index]
        examples.random.bit_generator.state = state
        example = training.make_example(drawn.facts, examples.random, None)
        learnt = [label for label in labels if label != -100]
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        assert learnt[-1] == tokenizer.eos_token_id == ids[-1]
        # The last token of an answer in the history has the line's end in it and is left out.
        said = "".join(tokenizer.decode(learnt[:-1]).split())
        answers = [*(answer for _, answer in example.history), example.answer]
        assert said.endswith("".join(answers[-1].split()))
        assert len("".join("".join(answers).split())) - len(said) in range(len(answers))


def test_ids_are_those_of_the_processor(examples):
    """What training sees is what captioning asks, so that nothing changes between the two."""
    drawn, ids, _ = examples[3]
    asked = examples.processor.prompt_ids(drawn.clip, capkit.DEFAULT_PROMPT)
    assert ids[: 1 + 18] == asked[: 1 + 18]
    tokenizer = examples.processor.tokenizer
    prompt = "Question: Why? Answer:"
    joint = tokenizer.encode(prompt + " A red star.", add_special_tokens=False)
    alone = tokenizer.encode(prompt, add_special_tokens=False)
    assert joint == alone + examples.processor.continuation_ids("A red star.")


def test_cells_say_what_is_where(clips):
    for seed, drawn in enumerate(clips):
        scene = make_scene(seed)
        for frame, seconds in enumerate(drawn.clip.timestamps_seconds):
            there = scene.visible(seconds)
            cells = drawn.cells[frame]
            assert cells[:, 0].sum() <= len(there)
            for index in np.flatnonzero(cells[:, 0]):
                row, column = divmod(index, training.CELLS)
                x, y, _ = drawn.places[frame, index]
                kinds = [(list(COLOURS).index(colour), SHAPES.index(thing.shape)) for thing, colour, *_ in there]
                assert tuple(cells[index, 1:]) in kinds
                middles = np.array([(place[0], place[1]) for _, _, *place in there]) * training.CELLS
                assert np.abs(middles - (column + x, row + y)).sum(-1).min() < 1e-4


def test_a_run_stops_with_its_time_and_goes_on(tmp_path):
    settings = {"steps": 6, "vision_steps": 2, "batch_size": 4, "num_clips": 12, "num_held_out": 4}
    training.train(tmp_path, **settings, minutes=1e-6)
    assert max(line["step"] for line in training.read_history(tmp_path)) < 6
    checkpoint = training.train(tmp_path, **settings)
    history = training.read_history(tmp_path)
    assert max(line["step"] for line in history) == 6
    assert any(0 <= line.get("eval_token_accuracy", -1) <= 1 for line in history)
    captioner = capkit.load_captioner(checkpoint, device="cpu")
    caption = captioner.caption(make_scene(0).sample(), decoding=capkit.Decoding(max_new_tokens=8))
    assert len(caption.token_ids) <= 8
