"""The engine for Ray, on a cluster of two nodes that are simulated on this machine."""

import os
import threading
import time

import pytest
from paths import GOLDEN
from video_factory import cut, encode_clip

from capkit import CaptionStore, Decoding
from capkit.files import file_sha256
from capkit.runs import caption_on_ray, find_clips, merge
from capkit.runs.shards import shard_stores

# A busy machine starts Ray slowly; some of this is read when Ray is imported.
os.environ |= {"RAY_agent_register_timeout_ms": "200000", "RAY_raylet_start_wait_time_s": "200"}
ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
FEW = Decoding(max_new_tokens=6)


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        cluster.second = cluster.add_node(**node)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def caption(clips, output, **more):
    half = {"cpus_per_captioner": 0.5, "cpus_per_reader": 0.5, "num_captioners": 2, "batch_size": 2}
    return caption_on_ray(find_clips(clips), output, str(GOLDEN), device="cpu", decoding=FEW, **half, **more)


def test_clips_are_captioned_and_bad_ones_recorded_while_a_node_is_killed(cluster, tmp_path, capsys):
    clips, output = tmp_path / "clips", tmp_path / "out"
    clips.mkdir()
    for number in range(60):
        encode_clip(clips / f"{number:02}.mp4", range(number, number + 10 * (1 + number % 3)), fps=10)
    cut(clips / "00.mp4", clips / "short.mp4", 0.5)
    (clips / "text.mp4").write_text("not frames")
    killed = []

    def kill():
        while sum(path.read_bytes().count(b"\n") for path in shard_stores(output)) < 10:
            time.sleep(0.2)
        cluster.remove_node(cluster.second, allow_graceful=False)
        killed.append(True)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    records = caption(clips, output)
    killer.join(60)
    assert killed and len(records) == 62
    merged = merge(output)
    assert (merged.num_ok, merged.num_errors, merged.problems) == (60, 2, [])
    good = [record for record in records if record["status"] == "ok"]
    assert all(record["video_sha256"] == file_sha256(record["video"]) for record in good)
    assert all(merged.store.strip_path(record).exists() for record in good)
    lines = [line for path in shard_stores(output) for line in CaptionStore(path).lines()]
    num_twice = len(lines) - len(merged.store.lines()) - 62
    with capsys.disabled():
        print(f"\n62 clips over the death of a node: {merged}; {num_twice} captioned twice")
    caption(clips, output)
    assert "0 clips to caption, 62 done before" in capsys.readouterr().out
