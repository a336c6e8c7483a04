"""Spoilt checkpoints: a CheckpointError, or the undamaged model's captions; in seconds, and nothing else happens."""

import collections

import pytest
from hostile_checkpoints import CASES, QUICK, Loader, judge, make_checkpoint


@pytest.fixture(scope="module")
def loader():
    loader = Loader()
    yield loader
    loader.close()


@pytest.fixture(scope="module")
def undamaged(loader, tmp_path_factory):
    kind, captions, _, violations = loader.load(make_checkpoint(tmp_path_factory.mktemp("undamaged")))
    assert kind == "captions" and not violations
    return captions


@pytest.mark.parametrize("case", QUICK)
def test_spoilt_checkpoint(case, loader, undamaged, tmp_path):
    *_, problems = judge(case, loader, tmp_path / "root", undamaged)
    assert not problems


@pytest.mark.soak
def test_campaign(loader, undamaged, tmp_path, capsys):
    outcomes, failures, slowest = collections.Counter(), {}, (0.0, "")
    for number, case in enumerate(CASES):
        kind, detail, seconds, problems = judge(case, loader, tmp_path / str(number), undamaged)
        outcomes[kind] += 1
        slowest = max(slowest, (seconds, case))
        failures |= {case: problems} if problems else {}
    with capsys.disabled():
        print(f"\n{len(CASES)} checkpoints: {dict(outcomes)}; slowest {slowest[0]:.1f} s ({slowest[1]})")
    assert len(CASES) >= 200 and not failures
