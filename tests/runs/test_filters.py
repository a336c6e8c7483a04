"""Choosing records by their columns, in Python and as a command line writes it."""

import pytest
from store_records import an_error, make_record

from capkit import CaptionStore
from capkit.runs import parse_where, select


@pytest.fixture
def records(tmp_path):
    store = CaptionStore(tmp_path / "captions.jsonl")
    for number in range(4):
        decoding = {"max_new_tokens": 2048, "temperature": number / 2}
        store.append(make_record(number, tmp_path / f"{number}.mp4", decoding=decoding, prompt=f"[{number}] What?"))
    store.append(an_error(make_record(4, tmp_path / "4.mp4")))
    store.edit(f"{1:020x}", "By hand.")
    return store.current()


@pytest.mark.parametrize(
    "conditions, where, expected",
    [
        ([], {}, [0, 1, 2, 3, 4]),
        (["status=ok"], {"status": "ok"}, [0, 1, 2, 3]),
        (["status=ok", "video=*/[13].mp4"], {"status": "ok", "video": "*/[13].mp4"}, [1, 3]),
        (["prompt=[2] What?"], {"prompt": "[2] What?"}, [2]),  # as it is, though it could be a pattern
        (["decoding.temperature=1"], {"decoding": {"temperature": 1}}, [2]),
        (
            ["decoding.temperature=0.50", "decoding.max_new_tokens=2048"],
            {"decoding": {"temperature": 0.5, "max_new_tokens": 2048}},
            [1],
        ),
        (["num_tokens=23"], {"num_tokens": 23}, [3]),
        (["num_tokens="], {"num_tokens": None}, [4]),
        (["edited_text=?*"], {"edited_text": "By hand."}, [1]),
        (["history=[]", "edited_text="], {"history": [], "edited_text": None}, [0, 2, 3, 4]),
        (["prompt="], {"prompt": ""}, []),
        (["decoding=x"], {"decoding": "x"}, []),
        (["status.of=x"], {"status": {"of": "x"}}, []),
    ],
)
def test_as_text_and_as_values(records, conditions, where, expected):
    for wanted in (parse_where(conditions), where):
        assert [int(record["request"], 16) for record in select(records, wanted)] == expected


def test_unknown_columns_and_what_is_no_condition(records):
    with pytest.raises(ValueError, match="where: unknown column 'promt'; did you mean 'prompt'"):
        select(records, {"promt": "x"})
    for conditions, message in (
        (["status"], "'status' is not of the form column=value"),
        (["=ok"], "'=ok' is not of the form column=value"),
        (["status=ok", "status=error"], "status has a value already"),
        (["decoding=x", "decoding.temperature=0"], "decoding.temperature has a value already"),
        (["decoding.temperature=0", "decoding=x"], "decoding has a value already"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_where(conditions)
