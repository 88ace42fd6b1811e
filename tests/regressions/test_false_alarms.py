"""Right kernels that were accused once."""

import pytest

from fuzz.judge import judge_plan
from fuzz.plan import Plan
from fuzz.targets import load

PLANS = {
    # 32,768 keys out of 160: equal keys round alike, 205 times over, and SOFT had taken every rounding as random.
    "soft_of_repeated_pages": """{"amplitude":0.7,"check":"relation","data":"peaky","holes":"max","lengths":[[1,32768]],
        "seed":2078,"shape":{"cap":30.0,"group":3,"head_dim":8,"kv_heads":2,"lse":true,"page":32,"pages":5,
        "pages_per_seq":1032,"scale":0.3,"seqs":3,"sinks":true,"tokens":4,"types":"bf16","window":null},
        "tables":"identity"}""",
    # An answer of 2e-36: products below 2**-126, half a per cent of it, are flushed to 0, and not when doubled.
    "flushed_products_doubled": """{"amplitude":3.0,"check":"relation","data":"cliff","holes":"minus_one",
        "lengths":[[1,31],[1,6],[1,12]],"seed":16375,"shape":{"cap":null,"group":8,"head_dim":3,"kv_heads":3,"lse":false,
        "page":16,"pages":74,"pages_per_seq":2,"scale":0.3,"seqs":36,"sinks":true,"tokens":49,"types":"bf16",
        "window":null},"tables":"identity"}""",
}


@pytest.mark.parametrize("name", PLANS)
def test_right_kernel_passes(name):
    found = judge_plan(Plan.from_json(PLANS[name]), load("xla"))
    assert found.status == "pass", found.text
