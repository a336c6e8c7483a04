"""Two hundred ways to spoil a checkpoint's folder, and a process that loads such folders and watches what that does."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import socket
import struct
import sys
import time
from pathlib import Path

import numpy as np
from paths import GOLDEN

SECONDS = 20  # no checkpoint may take longer
MAX_BYTES = 4e9  # memory of the process, far more than the small model needs, far less than hostile sizes
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)
ERROR, EQUAL, EITHER = "a CheckpointError", "the undamaged model's captions", "either"


def make_checkpoint(root):
    """A folder `root/checkpoint` to spoil, with `root/outside` beside it, which holds what must not be read."""
    folder, outside = root / "checkpoint", root / "outside"
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("golden.*", "sampling.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": 381}')
    outside.mkdir()
    for path in folder.iterdir():
        shutil.copy(path, outside)
    return folder


def write(name, content):
    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def edit(name, change):
    def spoil(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return spoil


def put(name, *path_and_value):
    *path, last, value = path_and_value

    def change(content):
        for part in path:
            content = content.setdefault(part, {}) if isinstance(content, dict) else content[part]
        content[last] = value

    return edit(name, change)


def in_place_of(name, make):
    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def make_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def make_sparse(path):
    path.touch()
    os.truncate(path, 100 << 30)


def truncated(folder, name):
    os.truncate(folder / name, (folder / name).stat().st_size // 2)


class _Canary:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('canary').touch()",))


def header(change=None, raw=None, shard=SHARDS[1], tail=b"", length=None):
    """Rewrite the header of a shard: `change` its dictionary, or put `raw` bytes in its place."""

    def spoil(folder):
        content = (folder / shard).read_bytes()
        size = int.from_bytes(content[:8], "little")
        entries, data = json.loads(content[8 : 8 + size]), content[8 + size :]
        if change:
            data = change(entries, data) or data
        new = json.dumps(entries).encode() if raw is None else raw
        new_length = struct.pack("<Q", len(new) if length is None else length)
        (folder / shard).write_bytes(new_length + new + data + tail)

    return spoil


def first_tensor(change):
    def spoil(entries, data):
        entry = next(entry for name, entry in entries.items() if name != "__metadata__" and len(entry["shape"]) == 2)
        return change(entry, data)

    return header(spoil)


def weight(value):
    """Put a float into the middle of a tensor."""

    def spoil(entry, data):
        assert entry["dtype"] == "F32"
        place = sum(entry["data_offsets"]) // 8 * 4
        return data[:place] + struct.pack("<f", value) + data[place + 4 :]

    return first_tensor(spoil)


def double_tensor(folder):
    from safetensors.torch import load_file, save_file

    first, second = (load_file(folder / shard) for shard in SHARDS)
    name = next(iter(first))
    save_file(second | {name: first[name] * 2}, folder / SHARDS[1], {"format": "pt"})


def code_everywhere(folder):
    code = "__import__('pathlib').Path('canary').touch()\n"
    for name in ("configuration_cogvlm", "modeling_cogvlm", "tokenization_cogvlm", "custom_generate/generate"):
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    put("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["tokenization_cogvlm.T", "tokenization_cogvlm.T"]})(
        folder
    )
    put("tokenizer_config.json", "tokenizer_class", "tokenization_cogvlm.T")(folder)


def pickles(folder):
    for name in ("pytorch_model.bin", "model.bin", "adapter_model.bin", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(_Canary()))
    put("model.safetensors.index.json", "weight_map", "lm_head.weight", "pytorch_model.bin")(folder)


def only_pickles(folder):
    pickles(folder)
    for name in (*SHARDS, "model.safetensors.index.json"):
        (folder / name).unlink()
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"lm_head.weight": "pytorch_model.bin"}}')


def pickled_shard(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(_Canary()))


def links_as_in_the_hub(folder):
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))


def shard_named(name):
    return put("model.safetensors.index.json", "weight_map", "lm_head.weight", name)


def tokenizer(*path_and_value):
    return put("tokenizer.json", *path_and_value)


def pattern(regex):
    return tokenizer("pre_tokenizer", "pretokenizers", 0, "pattern", {"Regex": regex})


def added_tokens(first, count):
    def change(content):
        one = content["added_tokens"][0]
        content["added_tokens"] += [one | {"id": first + i, "content": f"<x{i}>"} for i in range(count)]

    return edit("tokenizer.json", change)


def _cases():
    deep, number = "[" * 100_000, "1" + "0" * 5000
    for name in JSON_FILES:
        optional = EQUAL if name == "generation_config.json" else ERROR
        yield f"{name} missing", lambda f, name=name: (f / name).unlink(), optional
        for kind, content in {
            "empty": "",
            "garbage": bytes(range(256)),
            "list": "[]",
            "null": "null",
            "number": number,
            "infinite": "1e999",
            "deep": deep,
            "deep object": '{"a":' * 100_000,
            "zeros": b"\0" * 1000,
            "not UTF-8": b'{"\xff": 1}',
        }.items():
            yield f"{name} {kind}", write(name, content), ERROR
        yield f"{name} cut", lambda f, name=name: truncated(f, name), ERROR
        for kind, make in {
            "is a pipe": os.mkfifo,
            "is a folder": os.mkdir,
            "is a socket": make_socket,
            "is huge": make_sparse,
            "links to itself": lambda path: path.symlink_to(path.name),
            "links to zeros": lambda path: path.symlink_to("/dev/zero"),
            "links to passwords": lambda path: path.symlink_to("/etc/passwd"),
            "links to nothing": lambda path: path.symlink_to("nothing"),
        }.items():
            yield f"{name} {kind}", in_place_of(name, make), ERROR

    sizes = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_multi_query_heads".split()
    )
    for name in sizes:
        for value in (-1, "64", 10**9, None):
            yield f"config {name}={value!r}", put("config.json", name, value), ERROR
    for name in "hidden_size num_hidden_layers num_heads intermediate_size image_size patch_size num_positions".split():
        for value in (0, 10**6, [64]):
            yield f"config vision {name}={value!r}", put("config.json", "vision_config", name, value), ERROR
    for name, value in {
        "num_hidden_layers": 10**30,
        "hidden_size": 2**62,
        "max_position_embeddings": -1,
        "rms_norm_eps": "small",
        "initializer_range": -1,
        "hidden_act": "__import__('os').system('touch canary')",
        "tie_word_embeddings": True,
        "pad_token_id": 380,
        "bos_token_id": 10**9,
        "eos_token_id": ["a"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "vision_config": 5,
        "template_version": 5,
        "rope_theta": float("nan"),
    }.items():
        yield f"config {name}={value!r}", put("config.json", name, value), ERROR
    for name, value in {
        "num_labels": 10**9,
        "auto_map": {"AutoModelForCausalLM": "modeling_cogvlm.Model"},
        "torch_dtype": "float8",
        "architectures": 5,
        "pruned_heads": {"a": "b"},
        "repetition_penalty": 9.0,
        "bad_words_ids": [[n] for n in range(300)],
        "attn_implementation": "nonsense",
        "head_dim": -5,
        "use_cache": False,
        "model_type": "t5",
        "is_encoder_decoder": True,
    }.items():
        yield f"config {name}={value!r:.30}", put("config.json", name, value), EQUAL

    for name, value in {
        "repetition_penalty": 5.0,
        "bad_words_ids": [[n] for n in range(300)],
        "suppress_tokens": list(range(300)),
        "begin_suppress_tokens": list(range(300)),
        "forced_bos_token_id": 5,
        "forced_eos_token_id": 5,
        "min_length": 5000,
        "min_new_tokens": 5,
        "length_penalty": -9.0,
        "exponential_decay_length_penalty": [1, 9.0],
        "sequence_bias": [[[n], -50.0] for n in range(0, 300, 2)],
        "no_repeat_ngram_size": 1,
        "encoder_repetition_penalty": 9.0,
        "num_beams": 4,
        "guidance_scale": 5.0,
        "max_time": 1e-9,
        "do_sample": True,
        "cache_implementation": "static",
        "max_length": "x",
        "stop_strings": ["a", "e"],
    }.items():
        yield f"generation {name}", put("generation_config.json", name, value), EQUAL
    for ends in (-1, "a", [], [[1]], 10**9, {}):
        yield f"generation ends {ends!r}", put("generation_config.json", "eos_token_id", ends), ERROR

    yield "weights length huge", header(length=2**63), ERROR
    yield "weights length beyond", header(length=10**7), ERROR
    yield "weights length zero", header(length=0), ERROR
    yield "weights header garbage", header(raw=b"\xff" * 100), ERROR
    yield "weights header list", header(raw=b"[]"), ERROR
    yield "weights header deep", header(raw=deep.encode()), ERROR
    yield "weights header empty", header(raw=b"{}"), ERROR
    yield "weights tail", header(tail=b"\0" * 8), ERROR
    yield "weights cut", lambda f: truncated(f, SHARDS[1]), ERROR
    yield "weights empty", write(SHARDS[1], ""), ERROR
    yield "weights LFS pointer", write(SHARDS[0], "version https://git-lfs.github.com/spec/v1"), ERROR
    yield "weights missing", lambda f: (f / SHARDS[1]).unlink(), ERROR
    yield "weights sparse", in_place_of(SHARDS[1], make_sparse), ERROR
    yield "weights pipe", in_place_of(SHARDS[1], os.mkfifo), ERROR
    yield "weights folder", in_place_of(SHARDS[1], os.mkdir), ERROR
    yield "weights zeros", in_place_of(SHARDS[1], lambda path: path.symlink_to("/dev/zero")), ERROR
    yield "weights offsets overlap", first_tensor(lambda e, d: e.update(data_offsets=[0, 16])), ERROR
    yield "weights offsets beyond", first_tensor(lambda e, d: e.update(data_offsets=[0, 2**60])), ERROR
    yield "weights offsets reversed", first_tensor(lambda e, d: e["data_offsets"].reverse()), ERROR
    yield "weights offsets negative", first_tensor(lambda e, d: e.update(data_offsets=[-8, 0])), ERROR
    yield "weights type whole", first_tensor(lambda e, d: e.update(dtype="I32")), ERROR
    yield "weights type half", first_tensor(lambda e, d: e.update(dtype="BF16")), ERROR
    yield "weights type unknown", first_tensor(lambda e, d: e.update(dtype="X1")), ERROR
    yield (
        "weights shape turned",
        first_tensor(lambda e, d: e["shape"].reverse()),
        EITHER,
    )  # square ones stay as they are
    yield "weights shape flat", first_tensor(lambda e, d: e.update(shape=[int(np.prod(e["shape"]))])), ERROR
    yield "weights shape huge", first_tensor(lambda e, d: e.update(shape=[2**40, 2**40])), ERROR
    yield "weights NaN", weight(float("nan")), ERROR
    yield "weights infinite", weight(float("inf")), ERROR
    yield "weights twice", double_tensor, ERROR
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}
    yield "weights of 50,000 names", header(lambda e, d: e.update(many)), ERROR

    for name in (
        *("../outside/" + SHARDS[1], "/etc/passwd", "../../etc/passwd", "sub/x.safetensors", "", ".", "..", "\0"),
        *("\ud800.safetensors", "pytorch_model.bin", "config.json", 5, None, ["a"], {"a": 1}),
    ):
        yield f"index names {name!r:.40}", shard_named(name), ERROR
    yield "index without map", edit("model.safetensors.index.json", lambda c: c.pop("weight_map")), ERROR
    yield "index map list", put("model.safetensors.index.json", "weight_map", ["a"]), ERROR
    yield "index without metadata", edit("model.safetensors.index.json", lambda c: c.pop("metadata", None)), EITHER
    yield "index absolute", lambda f: shard_named(str(f / SHARDS[1]))(f), ERROR
    yield "links as in the hub", links_as_in_the_hub, EQUAL
    yield "code everywhere", code_everywhere, EQUAL
    yield "pickles", pickles, ERROR
    yield "only pickles", only_pickles, ERROR
    yield "pickled shard", pickled_shard, ERROR
    yield "adapter", write("adapter_config.json", '{"base_model_name_or_path": "../outside"}'), ERROR
    for name in ("README.md", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json"):
        yield f"unread {name} is a pipe", in_place_of(name, os.mkfifo), EQUAL
    yield "unread preprocessor", write("preprocessor_config.json", '{"image_size": 7'), EQUAL

    for regex in (r"(a|aa)+$", r"(?:(?:x{0,1000}){0,1000}){0,1000}", "(", ""):
        yield f"tokenizer pattern {regex}", pattern(regex), ERROR
    yield (
        "tokenizer grows texts",
        tokenizer(
            "normalizer",
            {
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10}] * 12,
            },
        ),
        ERROR,
    )
    yield (
        "tokenizer decoder replaces",
        tokenizer(
            "decoder",
            {
                "type": "Sequence",
                "decoders": [
                    {"type": "ByteLevel"},
                    {"type": "Replace", "pattern": {"String": "e"}, "content": "x" * 10**6},
                ],
            },
        ),
        ERROR,
    )
    padding = {"strategy": {"Fixed": 10**10}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    yield "tokenizer pads", tokenizer("padding", padding | {"pad_to_multiple_of": None}), EITHER
    cut = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    yield "tokenizer cuts", tokenizer("truncation", cut), EQUAL
    twice = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    twice["single"] = [{"Sequence": {"id": "A", "type_id": 0}}] * 2
    yield "tokenizer says all twice", tokenizer("post_processor", twice), EITHER
    yield "tokenizer drops out", tokenizer("model", "dropout", 0.9), ERROR
    yield "tokenizer of words", tokenizer("model", "type", "WordLevel"), ERROR
    yield "tokenizer model missing", tokenizer("model", None), ERROR
    yield "tokenizer vocabulary empty", tokenizer("model", "vocab", {}), ERROR
    yield "tokenizer id huge", tokenizer("model", "vocab", "zz", 2**32 - 1), ERROR
    yield "tokenizer id beyond", tokenizer("model", "vocab", "zz", 10**18), ERROR
    yield "tokenizer merges unknown", tokenizer("model", "merges", ["qq zz"]), ERROR
    yield "tokenizer merges wrong", tokenizer("model", "merges", 5), ERROR
    yield "tokenizer version", tokenizer("version", "99"), EITHER
    yield "tokenizer 100,000 tokens", added_tokens(384, 100_000), ERROR
    yield "tokenizer added id huge", added_tokens(2**32 - 1, 1), ERROR
    yield "tokenizer without added tokens", tokenizer("added_tokens", []), ERROR
    for value in (5, None, "<|reserved_special_token_0|>", "<nope>", {"content": 5}, ["a"], ""):
        yield f"tokenizer bos {value!r:.30}", put("tokenizer_config.json", "bos_token", value), ERROR
    yield "tokenizer reads outside", put("tokenizer_config.json", "tokenizer_file", "../outside/tokenizer.json"), EQUAL
    for name, value in {
        "padding_side": "up",
        "added_tokens_decoder": {"4000000000": {"content": "x"}},
        "extra_special_tokens": [f"<y{n}>" for n in range(1000)],
        "chat_template": "{% for i in range(10**12) %}{% endfor %}",
        "clean_up_tokenization_spaces": True,
        "model_max_length": -1,
    }.items():
        yield f"tokenizer settings {name}", put("tokenizer_config.json", name, value), EQUAL


CASES = {name: (spoil, expected) for name, spoil, expected in _cases()}
QUICK = """config.json missing|config.json deep|config.json is a pipe|tokenizer.json cut|tokenizer.json is a pipe
tokenizer_config.json missing|generation_config.json number|model.safetensors.index.json links to zeros
config num_hidden_layers=1000000000|config hidden_size=1000000000|config vision image_size=1000000
config num_labels=1000000000|generation repetition_penalty|generation bad_words_ids|weights offsets overlap
weights length huge|weights pipe|weights NaN|weights twice|index absolute|links as in the hub|code everywhere|pickles
tokenizer pattern (a¦aa)+$|tokenizer grows texts|tokenizer pads|tokenizer settings added_tokens_decoder"""
QUICK = [name for name in CASES if name.replace("|", "¦") in QUICK.replace("\n", "|").split("|")]


class Loader:
    """Loads checkpoints in a process of its own, which is killed after `SECONDS`."""

    def __init__(self):
        self._start()

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        assert self._pipe.poll(300) and self._pipe.recv() == "ready"

    def load(self, folder):
        """(kind, detail, seconds, violations): kind is "error", "raw error", "captions", "hung" or "died"."""
        started = time.monotonic()
        try:
            self._pipe.send(str(folder))
            answer = self._pipe.recv() if self._pipe.poll(SECONDS) else ("hung", "", [])
        except (EOFError, OSError):
            answer = ("died", "", [])
        kind, detail, violations = answer
        if kind in ("hung", "died"):
            self.close()
            self._start()
        return kind, detail, time.monotonic() - started, violations

    def close(self):
        self._process.kill()
        self._process.join()


def _serve(pipe):
    import capkit

    limit = int(MAX_BYTES) + next(  # beyond what the libraries map
        int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize")
    )
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    clip, watch = capkit.Clip.from_frames(frames), _Watch()
    decodings = [{}, {"temperature": 1.0, "seed": 1}, {"num_beams": 2}]
    capkit.load_captioner(GOLDEN, device="cpu").caption(clip, decoding={"max_new_tokens": 2})  # imports what it needs
    sys.addaudithook(watch)
    pipe.send("ready")
    while True:
        folder = pipe.recv()
        watch.begin(folder)
        try:
            captioner = capkit.load_captioner(folder, device="cpu")
            settings = [{"max_new_tokens": 8} | decoding for decoding in decodings]
            captions = [captioner.caption(clip, "Why?", decoding) for decoding in settings]
            answer = "captions", [(caption.token_ids, caption.text) for caption in captions]
        except capkit.CheckpointError as error:
            answer = "error", str(error)
        except BaseException as error:
            answer = "raw error", f"{type(error).__name__}: {error}"
        watch.folder = None
        pipe.send((*answer, watch.violations))


class _Watch:
    """Audit hook: notes what is opened beside the checkpoint, written, started or asked for over a network."""

    folder = None

    def begin(self, folder):
        self.folder, self.violations = os.path.realpath(folder), []
        os.chdir(os.path.dirname(folder))

    def __call__(self, event, arguments):
        if self.folder is None:
            return
        if event in ("subprocess.Popen", "os.system", "os.exec", "socket.connect", "pickle.find_class"):
            self.violations.append(f"{event} {arguments!r:.200}")
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path, _, flags = arguments
            path = os.path.abspath(os.fsdecode(path))
            root = os.path.dirname(self.folder)
            if path.startswith(root + os.sep) and not path.startswith((self.folder + os.sep, root + "/blobs/")):
                self.violations.append(f"read {path}")
            elif flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not path.startswith(("/dev/", "/proc/")):
                if "__pycache__" not in path:
                    self.violations.append(f"wrote {path}")


def judge(case, loader, root, undamaged):
    """Load a spoilt checkpoint; returns (kind, seconds, what is wrong or None)."""
    spoil, expected = CASES[case]
    folder = make_checkpoint(root)
    spoil(folder)
    before = sorted(map(str, root.rglob("*")))
    kind, detail, seconds, violations = loader.load(folder)
    problems = list(violations)
    if kind not in ("error", "captions") or seconds > SECONDS:
        problems.append(f"{kind}: {detail} ({seconds:.1f} s)")
    if kind == "captions" and (expected == ERROR or detail != undamaged):
        problems.append(f"loaded, and captions are {'equal' if detail == undamaged else 'others'}")
    if kind == "error" and (expected == EQUAL or str(folder) not in detail):
        problems.append(f"refused: {detail}")
    if sorted(map(str, root.rglob("*"))) != before:
        problems.append("files were written")
    shutil.rmtree(root)
    return kind, detail, seconds, problems
