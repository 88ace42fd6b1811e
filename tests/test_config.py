"""The config: frozen, hashable, validated alike by constructor, dict and JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpa import Backend, Platform, RaggedPageAttentionv2Config

_sizes = st.none() | st.integers(1, 2**31)
_configs = st.builds(
    RaggedPageAttentionv2Config,
    num_kv_pages_per_block=_sizes,
    num_queries_per_block=_sizes,
    num_warps=_sizes,
    num_stages=_sizes,
    num_kv_splits=_sizes,
    platform=st.sampled_from(["auto", *Platform]),
    backend=st.sampled_from(list(Backend)),
    options=st.dictionaries(st.text(max_size=5), st.integers()),
)


@given(_configs)
def test_dict_and_json_give_the_same_config_back(config):
    again = RaggedPageAttentionv2Config.from_dict(config.to_dict())
    assert again == config
    assert hash(again) == hash(config)
    assert RaggedPageAttentionv2Config.from_json(config.to_json()) == config


@given(_configs, _configs)
def test_equal_hashes_are_not_made_of_concatenated_digits(one, other):
    assert (one == other) == (one.to_dict() == other.to_dict())


def test_sizes_that_read_alike_when_joined_hash_apart():
    one = RaggedPageAttentionv2Config(num_kv_pages_per_block=1, num_queries_per_block=64)
    other = RaggedPageAttentionv2Config(num_kv_pages_per_block=16, num_queries_per_block=4)
    assert hash(one) != hash(other)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"num_warps": 0}, ValueError, "num_warps=0"),
        ({"num_stages": -1}, ValueError, "num_stages=-1"),
        ({"num_queries_per_block": 1.5}, TypeError, "num_queries_per_block=1.5"),
        ({"num_queries_per_block": True}, TypeError, "num_queries_per_block=True"),
        ({"num_kv_pages_per_block": "8"}, TypeError, "num_kv_pages_per_block='8'"),
        ({"num_kv_splits": 0}, ValueError, "num_kv_splits=0"),
        ({"platform": "tpu"}, ValueError, "platform='tpu'"),
        ({"platform": 3}, TypeError, "platform=3"),
        ({"backend": "xla"}, ValueError, "backend='xla'"),
        ({"options": {"a": 1.5}}, TypeError, "'a'=1.5"),
        ({"options": 7}, TypeError, "options=7"),
    ],
)
def test_a_bad_field_is_named_however_the_config_is_made(fields, error, text):
    whole = {**RaggedPageAttentionv2Config().to_dict(), **fields}
    for make in (
        lambda: RaggedPageAttentionv2Config(**fields),
        lambda: RaggedPageAttentionv2Config.from_dict(whole),
        lambda: RaggedPageAttentionv2Config.from_json(json.dumps(whole)),
    ):
        with pytest.raises(error) as caught:
            make()
        assert text in str(caught.value)


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match="'num_wraps' is unknown"):
        RaggedPageAttentionv2Config.from_dict({"num_wraps": 4})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"num_warps": '])
def test_text_that_is_no_config_is_refused(text):
    with pytest.raises((ValueError, TypeError), match="config"):
        RaggedPageAttentionv2Config.from_json(text)


def test_a_config_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RaggedPageAttentionv2Config().num_warps = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_replace_validates_again():
    assert RaggedPageAttentionv2Config(num_warps=4).replace(num_stages=2).num_warps == 4
    with pytest.raises(ValueError, match="num_warps=0"):
        RaggedPageAttentionv2Config().replace(num_warps=0)


def test_enum_members_are_taken_as_their_names():
    config = RaggedPageAttentionv2Config(platform=Platform.XLA, backend=Backend.CPU)
    assert config == RaggedPageAttentionv2Config(platform="xla", backend="cpu")
    assert json.loads(config.to_json())["platform"] == "xla"
