"""Training the demo model: what is learnt from, and a run that stops and goes on."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")

import capkit
from capkit.cogvlm2 import CogVLM2VideoProcessor
from capkit.demo import examples as drawn_examples
from capkit.demo import single_frames, training
from capkit.demo.examples import CAMERA_MOTIONS, CELLS, EVENTS, UNKNOWN
from capkit.demo.heads import TrainingModel
from capkit.demo.optimiser import Muon
from capkit.demo.random_scenes import make_scene
from capkit.demo.scenes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, UNSEEN_PAIRS


@pytest.fixture(scope="module")
def clips():
    return drawn_examples.draw_clips(range(12), num_workers=1)


@pytest.fixture(scope="module")
def tokenizer(clips):
    return drawn_examples.train_tokenizer(clips)


def make_examples(clips, tokenizer, **settings):
    features = [torch.zeros(len(drawn.clip), 18, 4) for drawn in clips]
    return drawn_examples.Examples(clips, features, CogVLM2VideoProcessor(tokenizer, 112, 18), **settings)


@pytest.fixture(scope="module")
def examples(clips, tokenizer):
    return make_examples(clips, tokenizer)


def test_every_answer_is_learnt_and_nothing_else(examples):
    tokenizer = examples.processor.tokenizer
    for index in list(range(12)) * 5:
        state = examples.random.bit_generator.state
        drawn, _, ids, labels, _ = examples[index]
        examples.random.bit_generator.state = state
        example = drawn_examples.make_example(drawn.facts, examples.random, None)
        learnt = [label for label in labels if label != -100]
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        assert learnt[-1] == tokenizer.eos_token_id == ids[-1]
        # The last token of an answer in the history has the line's end in it and is left out.
        learnt_text = "".join(tokenizer.decode(learnt[:-1]).split())
        answers = [*(answer for _, answer in example.history), example.answer]
        assert learnt_text.endswith("".join(answers[-1].split()))
        assert len("".join("".join(answers).split())) - len(learnt_text) in range(len(answers))


def test_ids_are_those_of_the_processor(examples):
    """What training sees is what captioning asks, so that nothing changes between the two."""
    drawn, _, ids, *_ = examples[3]
    prompt_ids = examples.processor.prompt_ids(drawn.clip, capkit.Prompt())
    assert ids[: 1 + 18] == prompt_ids[: 1 + 18]
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
                row, column = divmod(index, CELLS)
                x, y, _ = drawn.places[frame, index, :3]
                kinds = [(list(COLOURS).index(colour), SHAPES.index(thing.shape)) for thing, colour, *_ in there]
                assert tuple(cells[index, 1:3]) in kinds
                middles = np.array([(place[0], place[1]) for _, _, *place in there]) * CELLS
                assert (column, row) == (int(x), int(y)) and np.abs(middles - (x, y)).sum(-1).min() < 1e-4


def test_what_has_happened_is_what_the_facts_say(clips):
    """What cells and frames are to say of motion and events, against the facts that captions are made from."""
    counts = {"motion": 0, "event": 0, "gain": 0}
    for drawn in clips:
        motions = {(seen.colour, seen.shape): seen.motion for seen in drawn.facts.objects}
        changed = {(event.new_colour, event.shape): event.name for event in drawn.facts.events if event.new_colour}
        for frame, cell in zip(*np.nonzero(drawn.cells[..., 3] != UNKNOWN), strict=True):
            _, colour, shape, motion, _, size, place = drawn.cells[frame, cell]
            name = (list(COLOURS)[colour], SHAPES[shape])
            name = tuple(changed[name].split()) if name in changed else name
            assert MOTIONS[motion] == motions[name]
            seen = drawn.facts.objects[place]
            assert (seen.colour, seen.shape) == name and [*SIZES, None][size] == seen.size
            counts["motion"] += 1
        happened = {event.second: event for event in drawn.facts.events}
        for frame, (number, _, camera, event, colour, shape, place) in enumerate(drawn.frames):
            assert number == frame
            assert camera == UNKNOWN or CAMERA_MOTIONS[camera] == drawn.facts.camera
            if frame in happened:
                assert (EVENTS[event], list(COLOURS)[colour], SHAPES[shape]) == (
                    happened[frame].kind,
                    happened[frame].colour,
                    happened[frame].shape,
                )
                assert drawn.facts.events[place - 1] == happened[frame]
                counts["event"] += 1
            elif frame:
                assert EVENTS[event] == "nothing" and place == 0 and (drawn.cells[frame, :, 4] <= 0).all()
        assert drawn.frames[-1, 1] == len(drawn.facts.objects)
        for seen in drawn.facts.objects:
            if len(drawn.facts.objects) == 1 and seen.motion in ("left", "right", "grows", "shrinks", "still"):
                x, _, size = np.nanmean(drawn.places[..., 3:], axis=(0, 1))
                signs = {"left": (-1, 0), "right": (1, 0), "grows": (0, 1), "shrinks": (0, -1), "still": (0, 0)}
                assert (np.sign(np.round((x, size), 3)) == signs[seen.motion]).all()
                counts["gain"] += 1
    assert min(counts.values()) > 0  # the scenes at hand ask for all of it


def test_objects_are_told_in_the_order_of_the_texts(clips):
    for drawn in clips:
        seen, (count, *_) = drawn.facts.objects, drawn.objects.shape
        labels = drawn.objects[-1]
        assert (labels[len(seen) :] == UNKNOWN).all()
        names = [(list(COLOURS)[colour], SHAPES[shape]) for colour, shape, *_ in labels[: len(seen)]]
        assert names == [(one.colour, one.shape) for one in seen]
        sizes, motions = [*SIZES, None], [*MOTIONS, None]
        assert [sizes[size] for size in labels[: len(seen), 2]] == [one.size for one in seen]
        assert [motions[max(motion, -1)] for motion in labels[: len(seen), 3]] == [one.motion for one in seen]
        for place, one in enumerate(seen):  # nothing before it is there, its motion from the third frame on
            assert (drawn.objects[: one.first, place] == UNKNOWN).all()
            assert (drawn.objects[one.first :, place, :2] == labels[place, :2]).all()
            assert (drawn.objects[: min(one.first + 2, count - 1), place, 2:] == UNKNOWN).all()


def test_events_are_told_in_the_order_of_the_texts(clips):
    kinds = set()
    for drawn in clips:
        assert len(drawn.facts.events) == (drawn.events[-1, :, 0] != EVENTS.index("nothing")).sum()
        for place, event in enumerate(drawn.facts.events):
            kind, number, colour, shape, new_colour = labels = drawn.events[-1, place]
            assert drawn.facts.numbers[number] == event.second
            assert (EVENTS[kind], list(COLOURS)[colour], SHAPES[shape]) == (event.kind, event.colour, event.shape)
            assert new_colour == (list(COLOURS).index(event.new_colour) if event.new_colour else UNKNOWN)
            assert (drawn.events[number:, place] == labels).all()  # and nothing of it before it happens
            assert (drawn.events[:number, place] == (EVENTS.index("nothing"), *[UNKNOWN] * 4)).all()
            kinds.add(event.kind)
    assert kinds == set(EVENTS[1:])


def test_clips_without_pictures_are_asked_the_same(clips, tokenizer):
    full, bare = make_examples(clips, tokenizer), make_examples([c.without_pictures() for c in clips], tokenizer)
    for index, drawn in enumerate(clips):
        assert full[index][2:] == bare[index][2:]
        assert bare.clips[index].clip.frames.nbytes == 3 * len(drawn.clip)


def test_false_colours_teach_shapes_and_true_ones_colours(clips):
    """Or the vision tower would learn that pairs it has not seen do not exist."""
    frames = single_frames.Frames(clips, recoloured=0.5)
    taught = set()
    for index in range(len(frames)):
        pixels, cells, _ = frames[index]
        true = frames.numbers[index][0].clip.frames[frames.numbers[index][1]]
        at = cells[:, 0] == 1
        if (cells[at, 1] == UNKNOWN).all():
            taught.add("shape")
        else:
            assert (pixels == true).all() and (cells[at, 2] == UNKNOWN).all()
            taught.add("colour")
    assert taught == {"shape", "colour"}


def test_frames_of_a_pair_differ_in_the_background_only():
    """And the shares say which cells an object covers, found here by the colours of the scene."""
    pairs = single_frames.draw_pairs(range(40, 64), num_workers=1)
    data = single_frames.Backgrounds(pairs)
    compared = usual = 0
    for index, ((frames, taught, background), number) in enumerate(data.numbers):
        frame, grey, shares, label = data[index]
        assert (frame == frames[number]).all() and list(BACKGROUNDS)[label] == background
        if (frames == taught).all():  # taught as they are
            assert (shares == 1).all() and background in ("meadow", "striped wall", "checkered wall")
            usual += 1
        elif background not in ("grey", "beige"):
            assert grey[0, 0].tolist() == [176, 178, 180]
            corner = frame[0, 0].astype(int)  # no object reaches it
            is_object = np.abs(frame.astype(int) - corner).max(-1) > 60
            assert np.abs(is_object.reshape(CELLS, 28, CELLS, 28).mean((1, 3)).ravel() - shares).max() < 0.12
            compared += is_object.any()
    assert min(compared, usual) > 30


def test_a_begun_answer_is_learnt_from_where_it_was_begun(clips, tokenizer):
    examples, begun, chains = make_examples(clips, tokenizer, steered=1.0), set(), 0
    for index in list(range(12)) * 10:
        state = examples.random.bit_generator.state
        drawn, _, ids, labels, _ = examples[index]
        examples.random.bit_generator.state = state
        examples.random.random()  # whether it is steered
        example = drawn_examples.make_steered(drawn.facts, examples.random)
        learnt = "".join(tokenizer.decode([label for label in labels if label != UNKNOWN][:-1]).split())
        assert all(label in (UNKNOWN, token) for label, token in zip(labels, ids, strict=True))
        if example.answer_prefix:
            assert example.answer.startswith(f"{example.answer_prefix} ")
            assert learnt == "".join(example.answer.removeprefix(example.answer_prefix).split())
            begun.add(example.answer_prefix)
            # The model's input is the same as where a caption is made with this prefix.
            prompt = capkit.Prompt(example.prompt, answer_prefix=example.answer_prefix)
            asked = examples.processor.prompt_ids(drawn.clip, prompt)
            assert ids[: len(asked)] == asked
        else:
            assert example.history
            chains += 1
    assert len(begun) > 10 and chains > 30


def test_rows_come_in_batches_of_about_their_length(clips, tokenizer):
    """And the rows that were made to be measured are those that are learnt, each once."""
    examples = make_examples(clips * 6, tokenizer, interviews=0.5)
    order = list(training._ByLength(examples, 4))
    assert sorted(order) == list(range(72))
    lengths = np.array([len(examples[index][2]) for index in order]).reshape(-1, 4)
    assert (lengths.max(1) - lengths.min(1)).mean() < 0.35 * np.ptp(lengths)
    assert not examples.next_rows


def test_muon_makes_the_steps_that_torch_makes():
    """torch's are in bfloat16, so that they agree to a few hundredths."""
    torch.manual_seed(0)
    ours = [torch.randn(shape, requires_grad=True) for shape in ((16, 40), (40, 16), (24, 24))]
    theirs = [matrix.detach().clone().requires_grad_() for matrix in ours]
    mine = Muon(ours, 0.01, 0.1)
    reference = torch.optim.Muon(theirs, 0.01, 0.1, adjust_lr_fn="match_rms_adamw")
    starts = [matrix.detach().clone() for matrix in ours]
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        mine.step()
        reference.step()
    for one, other, start in zip(ours, theirs, starts, strict=True):
        assert (one - other).norm() < 0.05 * (one - start).norm()


def test_misheard_colours_are_still_answered_right(clips, tokenizer):
    """Some colours in the input are replaced by colours that the clip lacks; labels stay, and have no UNSEEN_PAIRS."""
    clean, misheard = make_examples(clips, tokenizer), make_examples(clips, tokenizer, misheard=0.5)
    changed = 0
    for index in list(range(12)) * 3:
        drawn, _, ids, labels, _ = misheard[index]
        there = {seen.colour for seen in drawn.facts.objects} | {event.new_colour for event in drawn.facts.events}
        for token, label in zip(ids, labels, strict=True):
            if label not in (UNKNOWN, token):
                assert tokenizer.decode([label]).strip() in COLOURS
                assert tokenizer.decode([token]).strip() in COLOURS.keys() - there
                changed += 1
        text = tokenizer.decode([label for label in labels if label != UNKNOWN])
        assert not any(f"{colour} {shape}" in text for colour, shape in UNSEEN_PAIRS)
    assert changed > 5
    for index in range(12):
        _, _, ids, labels, _ = clean[index]
        assert all(label in (UNKNOWN, token) for token, label in zip(ids, labels, strict=True))


def test_a_grey_frame_takes_the_place_of_one_and_nothing_is_asked_of_it(clips, tokenizer):
    examples = make_examples(clips, tokenizer, grey=torch.ones(18, 4))
    replaced = 0
    for index in list(range(12)) * 8:
        drawn, features, *_, is_chat = examples[index]
        grey = features[:, 0, 0].nonzero().flatten().tolist()
        assert len(grey) == (drawn is not clips[index]) and not (grey and not is_chat)
        for number in grey:
            assert (drawn.cells[number] == UNKNOWN).all() and np.isnan(drawn.places[number]).all()
            assert drawn.frames[number].tolist() == [number] + [UNKNOWN] * 6
            assert (drawn.objects[number] == UNKNOWN).all()
            assert (drawn.cells[number + 1 : number + 2, :, 4] == UNKNOWN).all()
            untouched = [frame for frame in range(len(features)) if frame not in (number, number + 1)]
            assert (drawn.cells[untouched] == clips[index].cells[untouched]).all()
        replaced += len(grey)
    assert 5 < replaced < 50
    assert all((features == 0).all() for features in examples.features)


def test_a_batch_learns_the_same_whatever_it_is_padded_to(clips, tokenizer):
    """Padding on the right, without a mask, changes no loss."""
    torch.manual_seed(0)
    model = training.new_model(tokenizer)
    heads = TrainingModel(model, drawn_examples.content_tokens(tokenizer))
    examples = make_examples(clips, tokenizer)
    examples.features = [torch.randn(len(drawn.clip), 18, 128) for drawn in clips]
    rows = [examples[index] for index in range(4)]
    short = examples.collate(rows)
    longer = dict(short)
    for name, value in (("input_ids", tokenizer.eos_token_id), ("labels", UNKNOWN)):
        longer[name] = torch.nn.functional.pad(short[name], (0, 7), value=value)
    with torch.no_grad():
        losses = [heads(**batch)["loss"].item() for batch in (short, longer)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_stops_with_its_time_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "VISION_CLIPS", 6)
    monkeypatch.setattr(training, "CLIPS_AT_A_TIME", 4)  # 12 are drawn and encoded in three pieces
    settings = {"steps": 4, "vision_steps": 3, "question_steps": 2, "batch_size": 4, "num_clips": 12, "num_held_out": 4}
    training.train(tmp_path, **settings, minutes=1e-6)
    assert {(line["stage"], line["step"]) for line in training.read_history(tmp_path)} == {("vision", 1)}
    checkpoint = training.train(tmp_path, **settings)
    history = training.read_history(tmp_path)
    last_steps = {line["stage"]: line["step"] for line in history}
    assert [*last_steps.items()] == [("vision", 3), ("model", 4), ("questions", 2)]
    assert any(0 <= line.get("eval_accuracy", -1) <= 1 for line in history if line["stage"] == "model")
    captioner = capkit.load_captioner(checkpoint, device="cpu")
    caption = captioner.caption(make_scene(0).sample(), decoding=capkit.Decoding(max_new_tokens=8))
    assert len(caption.token_ids) <= 8
    weights = (checkpoint / "model.safetensors").read_bytes()
    training.train(tmp_path, **settings)  # all is done: nothing changes
    assert (checkpoint / "model.safetensors").read_bytes() == weights
    settings |= {"vision_steps": 0, "start_from": checkpoint}
    stopped = training.train(tmp_path / "on", **settings, minutes=1e-6)
    assert {(line["stage"], line["step"]) for line in training.read_history(tmp_path / "on")} == {("heads", 1)}
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, stopped))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    further = training.train(tmp_path / "on", **settings)
    last_steps = {line["stage"]: line["step"] for line in training.read_history(tmp_path / "on")}
    assert last_steps == {"heads": 6, "model": 4, "questions": 2}
    once = (further / "model.safetensors").read_bytes()
    training.train(tmp_path / "on", **settings)  # all is done here too
    assert (further / "model.safetensors").read_bytes() == once
    after = load_file(further / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(".vision." in name for name in changed)


def test_a_trained_vision_tower_learns_backgrounds_alone(tmp_path):
    """Nothing but the tower changes, and less where it has been taught to see as before."""
    settings = {"steps": 0, "question_steps": 0, "batch_size": 4, "num_clips": 12, "num_held_out": 4}
    start = training.train(tmp_path / "first", **settings | {"steps": 1}, vision_steps=1)
    adapted = training.train(tmp_path / "on", **settings, vision_steps=12, vision_learning_rate=3e-4, start_from=start)
    before, after = (load_file(folder / "model.safetensors") for folder in (start, adapted))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".vision." in name for name in changed)
    losses = [line["eval_loss"] for line in training.read_history(tmp_path / "on") if "eval_loss" in line]
    assert losses == sorted(losses, reverse=True) and len(losses) == 3
    assert (adapted / "tokenizer.json").read_text() == (start / "tokenizer.json").read_text()


def test_the_optimiser_goes_on_where_it_was(tokenizer):
    """With what it remembers of earlier gradients, and at the rate that a schedule sets from then on."""

    def step(model, optimiser, learning_rate):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate
        for weight in model.parameters():
            weight.grad = weight.detach().cos()
        optimiser.step()
        return {name: weight.detach().clone() for name, weight in model.named_parameters()}

    model = training.new_model(tokenizer)
    optimiser = training.MuonAndAdamW(model, 1e-3, 0.01)
    before = step(model, optimiser, 1e-3)
    other = copy.deepcopy(model)
    resumed = training.MuonAndAdamW(other, 1e-3, 0.01)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    after = [step(*one, 2e-3) for one in ((model, optimiser), (other, resumed))]
    assert all(torch.equal(after[0][name], after[1][name]) for name in before)
    assert not any(torch.equal(after[0][name], before[name]) for name in before)
    assert all(torch.equal(weight, after[1][name]) for name, weight in step(other, resumed, 0.0).items())
