"""The model and its processor against the original implementation's numbers, and checkpoints that are wrong."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from paths import GOLDEN
from safetensors.torch import load_file, save_file

import capkit
from capkit import Prompt
from capkit.cogvlm2 import (
    CheckpointError,
    CogVLM2VideoConfig,
    CogVLM2VideoForConditionalGeneration,
    CogVLM2VideoProcessor,
    checkpoint,
    loading,
    rotary_position_ids,
)

CASES = range(4)


@pytest.fixture(scope="module")
def model(captioner):
    return captioner.model


@pytest.fixture(scope="module")
def processor(captioner):
    return captioner.processor


@pytest.fixture(scope="module", params=["as published", "saved and loaded again"])
def model_and_processor(request, captioner, tmp_path_factory):
    if request.param == "as published":
        return captioner.model, captioner.processor
    folder = tmp_path_factory.mktemp("saved")
    captioner.model.save_pretrained(folder, max_shard_size="500KB")
    captioner.processor.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return (
        CogVLM2VideoForConditionalGeneration.from_pretrained(folder, device="cpu"),
        CogVLM2VideoProcessor.from_pretrained(folder),
    )


@pytest.mark.golden
@pytest.mark.parametrize("index", CASES)
def test_golden_numbers_from_frames_to_tokens(model_and_processor, golden_cases, index):
    model, processor = model_and_processor
    case = golden_cases[index]
    inputs = processor(case.frames, case.query, return_mm_token_type_ids=True, **case.settings)
    assert np.abs(inputs["pixel_values_videos"].numpy() - case.pixel_values).max() < 1e-5
    assert inputs["input_ids"].flatten().tolist() == case.input_ids.flatten().tolist()
    assert inputs.pop("mm_token_type_ids").flatten().tolist() == case.token_type_ids.flatten().tolist()
    positions = rotary_position_ids(inputs["input_ids"], model.config.video_token_id)
    assert positions.flatten().tolist() == case.position_ids.flatten().tolist()
    with torch.inference_mode():
        features = model.model.get_video_features(inputs["pixel_values_videos"]).numpy()
        assert np.abs(features - case.vision_features).max() < 1e-4
        # Without a cache and a mask transformers would take our positions for packed sequences.
        for given in ({}, {"use_cache": False}, {"use_cache": False, "attention_mask": None}):
            logits = model(**(inputs | given)).logits.numpy()
            assert np.abs(logits.reshape(case.logits.shape) - case.logits).max() < 1e-3
    for how in ({}, {"cache_implementation": "static"}, {"attention_mask": None}):
        ids = model.generate(**(inputs | how), max_new_tokens=24, do_sample=False)
        new_ids = ids[0, inputs["input_ids"].shape[1] :]
        assert new_ids.tolist() == case.greedy.flatten().tolist()
    assert processor.decode(new_ids, skip_special_tokens=True) == case.greedy_text


@pytest.mark.golden
def test_full_size_model_has_exactly_the_published_weights():
    with torch.device("meta"):
        model = CogVLM2VideoForConditionalGeneration(CogVLM2VideoConfig(dtype="bfloat16"))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.published_state_dict().items()}
    assert shapes == published_shapes()
    assert len(shapes) == 997
    assert sum(p.numel() for p in model.parameters()) == 12_507_530_496
    assert model.config.tokens_per_frame == 66
    buffers = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(32)]
    assert len(shapes) + len(buffers) == 1029
    assert model.config.rope_parameters["rope_theta"] == 500_000


def published_shapes():
    """The table of tensors of THUDM/cogvlm2-llama3-caption, written out from its shards' headers."""
    hidden, mlp, vision, vision_mlp = 4096, 14336, 1792, 15360
    shapes = {"model.embed_tokens.weight": (128256, hidden), "lm_head.weight": (128256, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(32):
        at = f"model.layers.{layer}."
        shapes |= {at + f"{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        shapes[at + "self_attn.language_expert_query_key_value.weight"] = (6144, hidden)
        shapes[at + "self_attn.language_expert_dense.weight"] = (hidden, hidden)
        shapes |= {at + f"mlp.language_mlp.{name}_proj.weight": (mlp, hidden) for name in ("gate", "up")}
        shapes[at + "mlp.language_mlp.down_proj.weight"] = (hidden, mlp)
    at = "model.vision.patch_embedding."
    shapes |= {at + "proj.weight": (vision, 3, 14, 14), at + "proj.bias": (vision,), at + "cls_embedding": (1, vision)}
    shapes[at + "position_embedding.weight"] = (257, vision)
    for layer in range(63):
        at = f"model.vision.transformer.layers.{layer}."
        for name, rows, columns in (
            ("attention.query_key_value", 3 * vision, vision),
            ("attention.dense", vision, vision),
            ("mlp.fc1", vision_mlp, vision),
            ("mlp.fc2", vision, vision_mlp),
        ):
            shapes |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (rows,)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{at}{norm}.{part}": (vision,) for part in ("weight", "bias")}
    shapes |= {"model.vision.conv.weight": (vision, vision, 2, 2), "model.vision.conv.bias": (vision,)}
    at = "model.vision.linear_proj."
    shapes |= {at + "linear_proj.weight": (hidden, vision), at + "dense_4h_to_h.weight": (hidden, mlp)}
    shapes |= {at + f"norm1.{part}": (hidden,) for part in ("weight", "bias")}
    shapes |= {at + f"{name}.weight": (mlp, hidden) for name in ("gate_proj", "dense_h_to_4h")}
    return shapes | {f"model.vision.{name}": (1, 1, hidden) for name in ("boi", "eoi")}


@pytest.mark.golden
def test_saving_writes_the_published_layout_back(captioner, tmp_path):
    captioner.model.save_pretrained(tmp_path)
    captioner.processor.save_pretrained(tmp_path)
    published = {}
    for shard in GOLDEN.glob("model-*.safetensors"):
        published |= load_file(shard)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == {name for name in published if not name.endswith("rotary_emb.inv_freq")}
    assert all(torch.equal(saved[name], published[name]) for name in saved)
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDEN))
    assert "model_type" not in config and "auto_map" not in config
    assert config | {"transformers_version": None} == {
        name: value for name, value in original.items() if name != "auto_map"
    } | {"transformers_version": None}
    assert (tmp_path / "tokenizer.json").is_file()


def test_saving_over_the_checkpoint_that_is_loaded(golden_copy):
    """Its weights may still be mapped from the very files; and the relic of an index must not mislead."""
    model = load(golden_copy)
    torch.nn.init.ones_(model.lm_head.weight)
    model.save_pretrained(golden_copy)
    again = load(golden_copy)
    assert (again.lm_head.weight == 1).all()
    assert torch.equal(again.model.vision.conv.weight, load(GOLDEN).model.vision.conv.weight)
    assert checkpoint.fingerprint(golden_copy) != checkpoint.fingerprint(GOLDEN)


def test_saving_keeps_a_rotary_base_of_its_own(captioner, tmp_path):
    config = CogVLM2VideoConfig(**captioner.model.config.to_dict() | {"rope_parameters": None, "rope_theta": 1e4})
    config.save_pretrained(tmp_path)
    assert checkpoint.read_config(tmp_path).rope_parameters["rope_theta"] == 1e4


def test_positions_are_the_same_in_a_batch_and_after_a_restart(model, processor, random_clip):
    clips = [random_clip(2), random_clip(5)]
    prompts = ["What is it?", "Please describe this video in detail."]
    together = processor(clips, prompts)
    positions = rotary_position_ids(together["input_ids"], model.config.video_token_id)
    for row, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
        alone = processor(clip, prompt)["input_ids"]
        expected = rotary_position_ids(alone, model.config.video_token_id)[0]
        assert positions[row, -len(expected) :].tolist() == expected.tolist()
    # A generation that is cut and goes on from its own ids, with the cache and without, gives the same tokens.
    inputs = processor(clips[1], prompts[1])
    uncut = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    first = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    again = {"input_ids": first.sequences, "pixel_values_videos": inputs["pixel_values_videos"]}
    again["attention_mask"] = torch.ones_like(first.sequences)
    for cache in (None, first.past_key_values):
        rest = model.generate(**again, past_key_values=cache, max_new_tokens=7, do_sample=False)
        assert rest.tolist() == uncut.tolist()


def test_a_cache_without_positions_is_an_error_and_not_a_guess(model, processor, random_clip):
    inputs = processor(random_clip(2), "What is it?")
    cache = model(**inputs).past_key_values
    with pytest.raises(ValueError, match="pass position_ids"):
        model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)
    with pytest.raises(ValueError, match="pass position_ids"):
        model.generate(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache, max_new_tokens=2)


def test_every_returned_sequence_sees_its_own_clip(model, processor, random_clip):
    """transformers would repeat the frames one by one and so mix the clips up."""
    clips = [random_clip(2, seed=1), random_clip(3, seed=2)]
    for beams in ({"num_beams": 3, "num_return_sequences": 3}, {"num_beams": 2}):
        settings = beams | {"max_new_tokens": 8, "do_sample": False}
        inputs = processor(clips, "What is it?")
        together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
        alone = []
        for clip in clips:
            # Embeddings hold the frames in place: what is repeated then are whole rows.
            one = processor(clip, "What is it?")
            positions = rotary_position_ids(one["input_ids"], model.config.video_token_id)
            embeds = model.model.embed(one["input_ids"], one["pixel_values_videos"])
            given = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": one["attention_mask"]}
            alone += model.generate(**given, **settings).tolist()
        assert together == alone


def test_ids_and_frames_that_disagree(model, processor, random_clip):
    inputs = processor(random_clip(3), "What is it?")
    with pytest.raises(ValueError, match="18 image positions, the frames have 12 features"):
        model(**(inputs | {"pixel_values_videos": inputs["pixel_values_videos"][:2]}))


def test_training_a_step_gives_every_weight_a_gradient(golden_copy, processor, random_clip):
    model = CogVLM2VideoForConditionalGeneration.from_pretrained(golden_copy, device="cpu").train()
    inputs = processor([random_clip(2), random_clip(3)], "What is it?")
    labels = inputs["input_ids"].clone()
    labels[:, :-5] = -100
    model(**inputs, labels=labels).loss.backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []


def test_a_model_made_from_nothing_is_initialised():
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 16, "image_size": 28}
    config = CogVLM2VideoConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_multi_query_heads=1,
        vocab_size=64,
        **{"bos_token_id": 60, "eos_token_id": 61, "pad_token_id": 62},
        vision_config=vision | {"num_positions": 5},
    )
    model = CogVLM2VideoForConditionalGeneration(config)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    assert all(getattr(model.model.vision, name).std() > 0 for name in ("boi", "eoi"))
    assert model.model.vision.patch_embedding.cls_embedding.std() > 0


class TestProcessor:
    def test_frame_numbers_in_seconds(self, processor, captioner):
        frames = np.zeros((3, 30, 30, 3), np.uint8)
        clip = capkit.Clip.from_frames(frames, timestamps_seconds=[0.0, 4.6, 11.2])
        text = processor.decode(processor.prompt_ids(clip, Prompt("Q", frame_numbers="seconds")))
        for run in (processor.tokenizer.pad_token * 6 + number for number in ("0", "5", "11")):
            assert run in text

    def test_frame_numbers_count_from_the_windows_start(self, processor):
        clip = capkit.Clip.from_frames(np.zeros((2, 30, 30, 3), np.uint8), timestamps_seconds=[30.0, 33.0])
        object.__setattr__(clip, "start_seconds", 30.0)
        numbered = processor.decode(
            processor.prompt_ids(clip, Prompt("Q", frame_numbers="seconds")), skip_special_tokens=True
        )
        assert numbered.startswith("03Question")

    def test_pads_on_the_left(self, processor, random_clip):
        inputs = processor([random_clip(1), random_clip(4)], "What is it?")
        mask = inputs["attention_mask"]
        assert mask[0].tolist() == sorted(mask[0].tolist()) and mask[0].sum() < mask[1].sum() == mask.shape[1]
        assert (inputs["input_ids"][0][mask[0] == 0] == processor.tokenizer.pad_token_id).all()
        assert inputs["pixel_values_videos"].shape == (5, 3, 56, 56)

    def test_takes_tensors_arrays_and_clips(self, processor):
        frames = np.random.default_rng(0).integers(0, 256, (2, 30, 50, 3), dtype=np.uint8)
        inputs = [processor(video) for video in (frames, torch.tensor(frames), capkit.Clip.from_frames(frames))]
        assert all(torch.equal(inputs[0]["pixel_values_videos"], other["pixel_values_videos"]) for other in inputs)

    def test_what_the_model_sees_can_be_looked_at(self, processor):
        """A frame of the tower's own size comes through unchanged, a wide one loses its sides."""
        from capkit.cogvlm2 import pixels_to_frames, preprocess_frames

        frames = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)
        wide = np.concatenate([np.zeros_like(frames), frames, np.zeros_like(frames)], axis=2)
        for video in (frames, wide):
            assert (pixels_to_frames(preprocess_frames(video, 56)) == frames).all()

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"template": "caption"}, "template='caption': must be one of 'chat', 'vqa', 'base'"),
            ({"text": " \n"}, "must be a text that is not empty"),
            ({"text": None}, "None for 1 clips: give one prompt"),
            ({"text": ["a", "b"]}, "2 prompts for 1 clips"),
            ({"template": "base", "history": [("a", "b")]}, "history: no effect under template"),
            ({"history": ["a", "b"]}, "must be (question, answer) pairs"),
            ({"frame_numbers": "frames"}, "frame_numbers='frames': must be one of 'index', 'seconds'"),
            ({"template": "vqa", "frame_numbers": "seconds"}, "no effect under template"),
            ({"text": "What is <|reserved_special_token_0|>?"}, "marks the frames' positions"),
            ({"videos": []}, "videos: give at least one clip"),
            ({"videos": np.zeros((2, 30, 30, 3))}, "uint8"),
        ],
    )
    def test_bad_input_says_what_is_allowed(self, processor, random_clip, settings, message):
        with pytest.raises(ValueError) as error:
            processor(**({"videos": random_clip(2), "text": "What is it?"} | settings))
        assert message in str(error.value)


def load(folder, **kwargs):
    return CogVLM2VideoForConditionalGeneration.from_pretrained(folder, device="cpu", **kwargs)


def rewrite_shard(folder, change):
    path = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


class TestWrongCheckpoints:
    @pytest.mark.parametrize(
        "damage, message",
        [
            (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "00002-of-00002.safetensors is missing"),
            (lambda f: os.truncate(f / "model-00002-of-00002.safetensors", 100_000), "cut short or damaged"),
            (lambda f: os.truncate(f / "model-00002-of-00002.safetensors", 0), "cut short or damaged (0 bytes"),
            (
                lambda f: (f / "model-00001-of-00002.safetensors").write_text(
                    "version https://git-lfs.github.com/spec"
                ),
                "git lfs pull",
            ),
            (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json is damaged"),
            (lambda f: (f / "model.safetensors.index.json").unlink(), "has no weights"),
            (lambda f: (f / "config.json").unlink(), "has no config.json"),
            (lambda f: (f / "config.json").write_text('{"vocab'), "config.json is damaged"),
            (lambda f: (f / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}'), "LlamaForCausalLM"),
            (
                lambda f: rewrite_shard(f, lambda t: t.pop("model.vision.boi")),
                "1 tensors missing: model.vision.boi",
            ),
            (
                lambda f: rewrite_shard(f, lambda t: t.update({"model.other.weight": torch.zeros(2)})),
                "1 tensors unexpected: model.other.weight",
            ),
            (
                lambda f: rewrite_shard(f, lambda t: t.update({"lm_head.weight": torch.zeros(10, 64)})),
                "lm_head.weight (is [10, 64], should be [384, 64])",
            ),
            (
                lambda f: rewrite_shard(
                    f, lambda t: t.update({"model.layers.0.mlp.vision_mlp.vision_expert.weight": torch.zeros(2)})
                ),
                "image model's checkpoint",
            ),
        ],
    )
    def test_says_what_is_wrong(self, golden_copy, damage, message):
        damage(golden_copy)
        with pytest.raises(CheckpointError) as error:
            load(golden_copy)
        assert message in str(error.value) and str(golden_copy) in str(error.value)

    def test_damaged_tokenizer(self, golden_copy):
        (golden_copy / "tokenizer.json").write_text('{"model": 3}')
        with pytest.raises(CheckpointError, match="tokenizer"):
            CogVLM2VideoProcessor.from_pretrained(golden_copy)
        (golden_copy / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
            CogVLM2VideoProcessor.from_pretrained(golden_copy)

    def test_no_such_folder_and_a_file(self, tmp_path):
        with pytest.raises(CheckpointError, match="no such folder"):
            load(tmp_path / "nothing" / "here")
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="is a file"):
            load(tmp_path / "file")
        for name in ("x" * 5000, "a/" + "b" * 300, "a\0b"):
            with pytest.raises(CheckpointError):
                load(name)
        with pytest.raises(ValueError, match="model=5: must be a folder"):
            load(5)

    def test_hub_out_of_reach(self, tmp_path):
        code = (
            "import capkit\n"
            "try: capkit.load_captioner('THUDM/cogvlm2-llama3-caption')\n"
            "except capkit.CheckpointError as error: print(error)"
        )
        for setting in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
            env = os.environ | {"HF_HOME": str(tmp_path)} | setting
            run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
            assert "THUDM/cogvlm2-llama3-caption: " in run.stdout and "cannot be reached" in run.stdout, run.stderr

    def test_hub_answers_in_words(self, monkeypatch):
        import huggingface_hub

        class Response:
            headers, status_code, request, url = {}, 404, None, ""

        for name, message in (
            ("RepositoryNotFoundError", "no such name on the hub"),
            ("RevisionNotFoundError", "no revision 'v9'"),
            ("GatedRepoError", "accept the model's licence"),
        ):
            error = getattr(huggingface_hub.errors, name)

            def refuse(*args, error=error, **kwargs):
                raise error("refused", response=Response())

            monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
            with pytest.raises(CheckpointError, match=message):
                capkit.load_captioner("nobody/nothing", revision="v9")

    def test_a_folder_has_no_revisions(self, golden_copy):
        for model in ("demo", golden_copy, str(golden_copy)):
            with pytest.raises(ValueError, match="revision='v9': has no effect on a folder"):
                capkit.load_captioner(model, revision="v9")

    def test_hub_name_downloads_no_code(self, golden_copy, monkeypatch):
        import huggingface_hub

        request = {}

        def download(name, revision, allow_patterns, tqdm_class):
            request.update(name=name, revision=revision, patterns=allow_patterns)
            return str(golden_copy)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        (golden_copy / "modeling_cogvlm.py").write_text("raise SystemExit('remote code ran')")
        (golden_copy / "configuration_cogvlm.py").write_text("raise SystemExit('remote code ran')")
        captioner = capkit.load_captioner("THUDM/cogvlm2-llama3-caption", device="cpu", revision="main")
        assert captioner.name == request["name"] == "THUDM/cogvlm2-llama3-caption" and request["revision"] == "main"
        assert not any(pattern.endswith(".py") or pattern == "*" for pattern in request["patterns"])

    @pytest.mark.parametrize(
        "settings, is_accelerate_there, free, message",
        [
            ({"device": "cpu"}, True, {"cpu": 1000}, "as torch.float32 and cpu has 0.0 GB free; try a smaller dtype"),
            ({"device": "cpu", "dtype": "bfloat16"}, True, {"cpu": 1000}, "try another device"),
            ({}, True, {"cuda": 1000}, 'try a smaller dtype, or quantization="8bit" or "4bit"'),
            ({"quantization": "8bit"}, True, {"cuda": 1000}, 'as 8bit and cuda has .* or quantization="4bit"'),
            ({"quantization": "4bit", "dtype": "bfloat16"}, True, {"cuda": 1000}, "as 4bit .* try another device"),
            # Without accelerate the CPU holds them first, with it only the GPU.
            ({}, False, {"cpu": 1000, "cuda": 1e9}, "and cpu has .* try installing accelerate, .* or a smaller dtype"),
            ({}, False, {"cpu": 1e9, "cuda": 1000}, "and cuda has 0.0 GB free"),
            ({}, True, {"cpu": 1000, "cuda": 1e9}, "InterruptedError"),
        ],
    )
    def test_no_room_in_memory(self, monkeypatch, settings, is_accelerate_there, free, message):
        """Where a GPU is meant, nothing goes there: what follows the check is replaced."""

        def load_weights(*args, **kwargs):
            raise InterruptedError

        monkeypatch.setattr("capkit.cogvlm2.loading.choose_device", torch.device)
        monkeypatch.setattr("capkit.cogvlm2.loading._free_bytes", lambda device: free[device.type])
        monkeypatch.setattr("capkit.cogvlm2.modeling.is_accelerate_available", lambda: is_accelerate_there)
        monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load_weights)
        with pytest.raises(CheckpointError, match=message):
            settings = {"device": "cuda", "dtype": "float32"} | settings
            CogVLM2VideoForConditionalGeneration.from_pretrained(GOLDEN, **settings)

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"device": "gpu"}, "device='gpu'"),
            ({"device": "cuda:99"}, "CUDA devices"),
            ({"dtype": "int8"}, "dtype='int8': must be 'auto', 'float32', 'bfloat16', 'float16'"),
            ({"quantization": "3bit"}, "must be None, '4bit' or '8bit'"),
            (
                {"quantization": "4bit", "device": "cpu"},
                "needs a CUDA GPU, and the device is cpu; leave quantization out",
            ),
            ({"quantization": "8bit", "device": "cpu"}, 'or set dtype="bfloat16"'),
        ],
    )
    def test_arguments(self, kwargs, message):
        with pytest.raises(ValueError) as error:
            capkit.load_captioner("no/such/folder", **kwargs)  # which would be found later
        assert message in str(error.value)

    def test_bitsandbytes_absent(self, monkeypatch):
        monkeypatch.setattr("capkit.cogvlm2.loading.QUANTIZED_DEVICES", ("cpu",))
        monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None)
        with pytest.raises(ImportError, match="needs bitsandbytes: pip install"):
            load(GOLDEN, quantization="4bit")


@pytest.mark.parametrize("quantization, tolerance", [("8bit", 0.1), ("4bit", 0.5)])
def test_quantised_loading_leaves_the_vision_tower_and_the_head_alone(
    golden_cases, quantization, tolerance, monkeypatch
):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("capkit.cogvlm2.loading.QUANTIZED_DEVICES", ("cpu",))
    captioner = capkit.load_captioner(GOLDEN, device="cpu", dtype="float32", quantization=quantization)
    model, case = captioner.model, golden_cases[0]
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}
    small = {name for name, kind in kinds.items() if kind in ("Linear8bitLt", "Linear4bit")}
    assert small == {name for name in kinds if name.startswith("model.layers.")}
    logits = model(**captioner.processor(case.frames, case.query)).logits.float().detach().numpy()
    error = np.abs(logits.reshape(case.logits.shape) - case.logits).mean() / np.abs(case.logits).mean()
    assert 0 < error < tolerance
    with pytest.raises(ValueError, match="quantised"):
        model.save_pretrained("unused")


@pytest.mark.parametrize(
    "dtype, quantization", [("float32", None), ("bfloat16", None), ("bfloat16", "8bit"), ("bfloat16", "4bit")]
)
def test_the_memory_that_is_checked_is_what_the_weights_take(captioner, dtype, quantization, monkeypatch):
    if quantization:
        pytest.importorskip("bitsandbytes")
        monkeypatch.setattr("capkit.cogvlm2.loading.QUANTIZED_DEVICES", ("cpu",))
    model = load(GOLDEN, dtype=dtype, quantization=quantization)
    states = [getattr(weight, "quant_state", None) for weight in model.parameters()]  # scales of 4-bit weights
    held = [*model.parameters(), *(state.absmax for state in states if state is not None)]
    checked = loading.num_bytes(captioner.model.published_state_dict(), getattr(torch, dtype), quantization)
    assert checked == pytest.approx(sum(tensor.nbytes for tensor in held), rel=1e-3)


def test_loading_keeps_memory_within_bounds(tmp_path):
    """Anonymous memory while loading stays below 1.3 times the parameters' bytes, from bfloat16 shards."""
    script = """
import sys, threading, time, json
import torch
from capkit.cogvlm2 import CogVLM2VideoConfig, CogVLM2VideoForConditionalGeneration
folder, dtype = sys.argv[1:]
vision = dict(hidden_size=256, num_hidden_layers=4, num_heads=4, intermediate_size=1024)
config = CogVLM2VideoConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8,
    num_multi_query_heads=2, vocab_size=32000, bos_token_id=31990, eos_token_id=31991, pad_token_id=31992,
    vision_config=vision)
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
if dtype == "save":
    torch.manual_seed(0)
    model = CogVLM2VideoForConditionalGeneration(config).bfloat16()
    model.save_pretrained(folder, max_shard_size="100MB")
else:
    before, peak, done = anonymous(), 0, False
    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous()); time.sleep(0.002)
    thread = threading.Thread(target=watch); thread.start()
    model = CogVLM2VideoForConditionalGeneration.from_pretrained(folder, device="cpu", dtype=dtype)
    done = True; thread.join()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(json.dumps({"ratio": (peak - before) / size, "size": size}))
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux's /proc")
    for step in ("save", "float32"):
        run = subprocess.run([sys.executable, "-c", script, str(tmp_path), step], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    shutil.rmtree(tmp_path)
    measured = json.loads(run.stdout.splitlines()[-1])
    assert measured["size"] > 300e6
    assert measured["ratio"] < 1.3, measured


def test_fingerprint_tells_models_apart(golden_copy):
    same = checkpoint.fingerprint(golden_copy)
    assert same == checkpoint.fingerprint(GOLDEN)
    rewrite_shard(golden_copy, lambda tensors: tensors["model.norm.weight"].mul_(1.001))
    assert checkpoint.fingerprint(golden_copy) != same


@pytest.mark.parametrize("shard", [1, 2])
def test_fingerprint_covers_every_byte_of_a_small_checkpoint(golden_copy, shard):
    path = golden_copy / f"model-0000{shard}-of-00002.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    seen = {checkpoint.fingerprint(golden_copy)}
    for place in range(start, len(content), (len(content) - start) // 10):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        seen.add(checkpoint.fingerprint(golden_copy))
    assert len(seen) == 1 + len(range(start, len(content), (len(content) - start) // 10))


def test_fingerprint_covers_what_captions_depend_on_and_nothing_else(golden_copy):
    seen = [checkpoint.fingerprint(golden_copy)]
    for name, content in (
        ("README.md", "Trained anew."),
        ("preprocessor_config.json", '{"size": 5}'),
        ("generation_config.json", '{"eos_token_id": 381, "repetition_penalty": 3.0}'),  # the end token as before
    ):
        (golden_copy / name).write_text(content)
        assert checkpoint.fingerprint(golden_copy) == seen[0]
    (golden_copy / "generation_config.json").write_text('{"eos_token_id": [381, 7]}')
    seen.append(checkpoint.fingerprint(golden_copy))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        content = json.loads((golden_copy / name).read_text())
        (golden_copy / name).write_text(json.dumps(content | {"a_new_field": 1}))
        seen.append(checkpoint.fingerprint(golden_copy))
    assert len(set(seen)) == 5


def test_end_tokens_of_generation_config_end_captions(golden_copy, random_clip):
    """As in transformers, which takes them from there."""
    settings = {"decoding": {"max_new_tokens": 12}}
    before = capkit.load_captioner(golden_copy, device="cpu").caption(random_clip(), **settings)
    (golden_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [381, before.token_ids[4]]}))
    caption = capkit.load_captioner(golden_copy, device="cpu").caption(random_clip(), **settings)
    end = before.token_ids.index(before.token_ids[4]) + 1
    assert (caption.token_ids, caption.finish_reason) == (before.token_ids[:end], "eos")


def test_imports_nothing_of_the_originals_relics():
    """Nor Jupyter, papermill, decord or PyAV: model and captioner run on a bare GPU machine."""
    code = "import capkit.captioning.captioner, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    relics = {"torchvision", "pytorchvideo", "xformers", "einops"}
    assert not (relics | {"decord", "av", "IPython", "papermill", "matplotlib"}) & set(loaded)
    sources = [*(GOLDEN.parents[2] / "capkit").rglob("*.py"), *(GOLDEN.parents[2] / "notebooks").glob("*.ipynb")]
    assert sources
    for source in sources:
        assert "trust_remote_code=True" not in source.read_text()
