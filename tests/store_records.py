"""Caption records as capkit writes them, for tests of stores."""

import hashlib

PROMPT = "Please describe this video in detail."


def make_record(number, video, **fields):
    """A complete caption record; `video` need not exist."""
    content = hashlib.sha256(video.read_bytes()).hexdigest() if video.exists() else None
    text = f" A dog runs over lawn number {number}, turns at the tree, and comes back with a stick of {number} inches."
    record = {"request": f"{number:020x}", "video": str(video)}
    record |= {"frame_sampling": {"strategy": "chat", "num_frames": 24, "frames_per_second": None}}
    record |= {"start_seconds": 0.0, "end_seconds": None, "template": "chat", "frame_numbers": "index"}
    record |= {"prompt": PROMPT, "history": [], "decoding": {"max_new_tokens": 2048}, "sample": 0}
    record |= {"model_fingerprint": "9204037982b1c548", "dtype": "float32", "quantization": None, "model": "demo"}
    record |= {"strip": f"{number:020x}.webp", "video_sha256": content, "duration_seconds": 23.5}
    record |= {"frame_indices": list(range(0, 720, 30)), "timestamps_seconds": [n * 1.001 for n in range(24)]}
    record |= {"video_notes": [], "text": text, "num_tokens": 20 + number, "mean_logprob": -0.128461}
    record |= {"finish_reason": "eos", "seconds": 0.3561, "status": "ok", "error": None, "capkit_version": "0.1.0"}
    return record | {"created": f"2026-11-26T11:{number // 60 % 60:02}:{number % 60:02}+00:00"} | fields


def an_error(record, reason="the file is empty"):
    """The record of the same request when it has failed."""
    nothing = dict.fromkeys(("text", "num_tokens", "mean_logprob", "finish_reason", "seconds", "timestamps_seconds"))
    return record | nothing | {"status": "error", "error": reason}
