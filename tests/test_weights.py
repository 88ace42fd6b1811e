"""What a kernel weighs, and what is told of it: each way to be wrong is named by what is seen, without a catalogue."""

from __future__ import annotations

import numpy as np
import pytest
from wrong_kernels import Bug, broken

from fuzz.build import build
from fuzz.plan import Plan, Shape
from fuzz.targets import from_callable
from fuzz.weights import explain, measured

SHAPE = Shape(tokens=6, seqs=2, pages=8, pages_per_seq=3, page=2, kv_heads=2, group=2, head_dim=4, types="f32")
CASE = build(Plan(SHAPE, ((2, 5), (3, 4)), seed=3), "tame")


def ahead(case, sequence, low, high):
    return low, min(high + 1, sequence.context_len)


def behind(case, sequence, low, high):
    return low + (high - low > 1), high


def swapped(case, output):
    return output[:, ::-1].copy()


def one_later(case, output):
    return np.roll(output, 1, axis=0)


def turned(case, output):
    return output[..., ::-1].copy()


WRONG = {
    "masking: after its own position": Bug(span=ahead),
    "masking: misses key 0": Bug(span=behind),
    "heads: kv head 1; its own is 0": Bug(head=lambda case, head: head % 2),
    "heads: holds the answer of head": Bug(output=swapped),
    "heads: elements": Bug(output=turned),
    "ragged: holds the answer of row": Bug(output=one_later),
    "softmax: logits are wrong": Bug(logits=lambda case, x: 2 * x),
    "softmax: 0.5 times as much": Bug(weights=lambda p: p / 2),
    "split-KV: twice": Bug(weights=lambda p: p * np.where(np.arange(len(p)) == 1, 2, 1) if len(p) > 2 else p),
    "dtype: coarser": Bug(weights=lambda p: p.astype(np.float16).astype(np.float32) * np.float32(1 + 2.0**-11)),
    "softmax: not finite": Bug(logits=lambda case, x: x + np.nan),
    "ragged: weighs nothing": Bug(weights=lambda p: 0 * p),
}


@pytest.mark.parametrize("told", WRONG)
def test_each_way_to_be_wrong_is_told_from_the_others(told: str) -> None:
    family, words = told.split(": ", 1)
    weights = measured(CASE, from_callable(broken(lambda: WRONG[told]), told), frozenset())
    assert weights is not None
    found = explain(weights)
    assert found is not None
    assert (found.family, words in found.words) == (family, True), found


def test_of_a_right_kernel_nothing_is_told() -> None:
    weights = measured(CASE, from_callable(broken(Bug), "right"), frozenset())
    assert weights is not None
    assert explain(weights) is None


def test_what_raises_on_other_values_has_no_weights_to_show() -> None:
    def moody(*arrays, **options):
        raise ValueError("only what I know")

    assert measured(CASE, from_callable(moody, "moody"), frozenset()) is None
