"""Decoding settings: what has an effect, what is refused, what people paste."""

import dataclasses
import json

import numpy as np
import pytest

from capkit import Decoding


def test_defaults_are_the_originals_greedy_search():
    pasted = Decoding.from_generate_kwargs(
        max_new_tokens=2048, do_sample=False, top_k=1, top_p=0.1, temperature=0.1, pad_token_id=128002
    )
    assert pasted == Decoding()
    assert pasted.dropped == {"top_k": 1, "top_p": 0.1, "temperature": 0.1}
    assert pasted.to_dict() == {"max_new_tokens": 2048}
    assert str(pasted) == "greedy (max_new_tokens=2048)"


@pytest.mark.parametrize(
    "pasted, resolved",
    [
        ({"do_sample": True}, Decoding(temperature=1.0, top_k=50)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, Decoding(temperature=0.7, top_p=0.9, top_k=50)),
        ({"do_sample": True, "top_k": 0, "seed": 3}, Decoding(temperature=1.0, seed=3)),
        ({"do_sample": True, "top_k": 1, "temperature": 0.4}, Decoding()),
        ({"do_sample": True, "temperature": 0}, Decoding()),
        ({"temperature": 0.7, "num_beams": 4}, Decoding(num_beams=4)),
        ({"repetition_penalty": 1.1, "min_p": None, "use_cache": True}, Decoding(repetition_penalty=1.1)),
        ({}, Decoding()),
    ],
)
def test_pasted_arguments_become_what_they_really_do(pasted, resolved):
    assert Decoding.from_generate_kwargs(**pasted) == resolved


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p", "seed"])
def test_settings_without_effect_are_errors_that_name_them(name):
    value = {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1}[name]
    with pytest.raises(ValueError, match=rf"{name}=.*no effect, because temperature is 0"):
        Decoding(**{name: value})
    assert getattr(Decoding(temperature=1.0, **{name: value}), name) == value


def test_combinations_without_effect():
    with pytest.raises(ValueError, match="temperature=0.5: no effect, because num_beams=3"):
        Decoding(temperature=0.5, num_beams=3)
    with pytest.raises(ValueError, match="temperature=0.5: no effect, because top_k=1"):
        Decoding(temperature=0.5, top_k=1)
    with pytest.raises(ValueError, match="num_beams"):
        Decoding.from_generate_kwargs(do_sample=True, num_beams=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": True},
        {"temperature": -0.1},
        {"temperature": 1e-45},  # logits divided by it are infinite
        {"temperature": 1e300},
        {"temperature": float("nan")},
        {"temperature": 10**400},
        {"temperature": "hot"},
        {"temperature": 1.0, "top_p": 0},
        {"temperature": 1.0, "top_p": 1.5},
        {"temperature": 1.0, "top_k": -1},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "seed": -1},
        {"temperature": 1.0, "seed": 2**63},
        {"num_beams": 0},
        {"num_beams": 100_000},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e-300},
        {"no_repeat_ngram_size": -2},
    ],
)
def test_values_outside_their_range(settings):
    name = list(settings)[-1]
    with pytest.raises(ValueError, match=f"{name}="):
        Decoding(**settings)


def test_unknown_settings_are_named_with_the_known_ones():
    for make in (Decoding.from_generate_kwargs, lambda **kwargs: Decoding.of(kwargs)):
        with pytest.raises(ValueError, match="'temprature'; did you mean 'temperature'. known: .*top_p"):
            make(temprature=0.3)
    with pytest.raises(ValueError, match="must be a Decoding"):
        Decoding.of("greedy")


def test_of_takes_what_a_notebook_passes():
    assert Decoding.of(None) == Decoding.of({}) == Decoding()
    assert Decoding.of({"do_sample": False, "temperature": 0.1}) == Decoding()
    assert Decoding.of({"temperature": 0.8, "seed": 2}) == Decoding(temperature=0.8, seed=2)
    assert Decoding.of(Decoding(num_beams=2)).num_beams == 2


def test_the_effective_settings_always_hold_the_seed_of_a_draw():
    assert Decoding(temperature=0.5).to_dict() == Decoding(temperature=0.5, seed=0).to_dict()
    assert Decoding(temperature=0.5).to_dict()["seed"] == 0
    assert Decoding(**Decoding(temperature=0.5, top_k=4, seed=9).to_dict()) == Decoding(
        temperature=0.5, top_k=4, seed=9
    )


def test_is_frozen_and_can_be_a_key():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Decoding().temperature = 1.0
    assert len({Decoding(), Decoding(max_new_tokens=2048), Decoding(num_beams=2)}) == 2


@pytest.mark.parametrize("temperature", [1, 1.0, np.float32(1), np.float64(1), np.int64(1)])
def test_equal_numbers_are_one_request(temperature):
    decoding = Decoding(temperature=temperature, seed=np.int64(3), max_new_tokens=np.int32(32), top_p=np.float32(0.8))
    assert json.dumps(decoding.to_dict()) == ('{"max_new_tokens": 32, "temperature": 1.0, "top_p": 0.8, "seed": 3}')
