"""Known wrong answers of published kernels: ours are right, and the oracle refuses the wrong ones."""

import dataclasses

import numpy as np
import pytest
from known_wrong_answers import REGRESSIONS

from fuzz.targets import Target, load
from oracle import Case, attend, default_claim, judge
from oracle.poison import large_fill, nan_fill

ON_CPU = [
    "xla",
    pytest.param("pallas_tpu", marks=pytest.mark.slow),  # interpreted: seconds a case
]


# The three table widths are one bug and a program each; the rest share theirs with the contract's cases.
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name == "table_127_wide")) for name in REGRESSIONS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ON_CPU)
def test_answers_right(target, name):
    case, kernel = REGRESSIONS[name].case(), load(target)
    gap = kernel.supports(case)
    if gap is not None:
        pytest.skip(f"{target} declares: {gap}")
    output, lse = answer(kernel, nan_fill(case))
    verdict = judge(case, output, kernel.claim(case), lse)
    assert verdict.status == "pass", verdict.text
    again, lse_again = answer(kernel, large_fill(case))
    assert (output.tobytes(), lse.tobytes()) == (again.tobytes(), lse_again.tobytes())


def answer(kernel: Target, case: Case) -> tuple[np.ndarray, np.ndarray]:
    output, lse = kernel.call(*case.arrays, **case.options, return_lse=True)
    return np.asarray(output), np.asarray(lse)


@pytest.mark.parametrize("name", REGRESSIONS)
def test_the_wrong_answer_is_refused(name):
    case = REGRESSIONS[name].case()
    wrong = REGRESSIONS[name].wrong(case).astype(case.queries.dtype)
    claim = dataclasses.replace(default_claim(case), block=128)  # the block of the kernel whose sums were narrow
    assert judge(case, wrong, claim).status == "fail"
    assert judge(case, attend(case)[0].astype(case.queries.dtype), claim).status == "pass"
