"""Kernels for `rpa verify --platform tests.verify_targets:NAME` to judge: one that is right, many that are not."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from oracle import Case, Claim, attend


def right(*arrays, return_lse=False, softmax_scale=None, logits_soft_cap=None, sliding_window=None,
          compute_dtype=None, k_scale=None, v_scale=None):  # fmt: skip
    """The float64 answer, rounded once."""
    case = Case(
        *arrays, softmax_scale=softmax_scale, logits_soft_cap=logits_soft_cap, sliding_window=sliding_window,
        compute_dtype=compute_dtype, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    output, lse = attend(case)
    output = output.astype(case.queries.dtype)
    return (output, lse.astype(np.float32)) if return_lse else output


def _changed(change):
    """`right` with a change to its arrays or options before, as a bug in a kernel would have it."""

    def kernel(*arrays, return_lse=False, **options):
        arrays, options = change([np.array(a) if a is not None else None for a in arrays], dict(options))
        return right(*arrays, return_lse=return_lse, **options)

    return kernel


def _window_wide(arrays, options):
    if options["sliding_window"] is not None:
        options["sliding_window"] += 1
    return arrays, options


def _future(arrays, options):
    """One key too many for every row but the last of a sequence: the chunk's rows stand one too late."""
    arrays[2][: int(arrays[5])] = np.maximum(arrays[2][: int(arrays[5])] - 1, 0)
    return arrays, options


def _last_sequence_skipped(arrays, options):
    arrays[5] = arrays[5] - 1
    return arrays, options


window_wide = _changed(_window_wide)
one_behind = _changed(_future)
last_sequence_skipped = _changed(_last_sequence_skipped)


def lse_without_maximum(*arrays, return_lse, **options):
    """A right output beside a log-sum-exp that is off by a little."""
    output, lse = right(*arrays, return_lse=return_lse, **options)
    return output, lse + np.float32(1e-3)


def leaks(*arrays, return_lse, **options):
    """Right within the bound, yet a finite value in a page that nobody owns moves a bit."""
    output, lse = right(*arrays, return_lse=return_lse, **options)
    dead = np.nan_to_num(arrays[1][..., 0].astype(np.float64), nan=0.0)
    if np.abs(dead).max() > 1000:
        output = np.nextafter(output.astype(np.float32), np.float32(9)).astype(output.dtype)
    return output, lse


def raises(*arrays, **options):
    raise RuntimeError("the kernel gave up\nand said why at length")


def wrong_shape(*arrays, return_lse, **options):
    output, lse = right(*arrays, return_lse=return_lse, **options)
    return output[:-1], lse


def out_of_memory(*arrays, **options):
    raise MemoryError


def device_out_of_memory(*arrays, **options):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 137438953472 bytes")


def unsupported(*arrays, **options):
    raise AssertionError("asked although it said that it cannot")


unsupported.supports = lambda case: "needs a chip that nobody has"


def no_windows(*arrays, **options):
    assert options["sliding_window"] is None
    return right(*arrays, **options)


no_windows.supports = lambda case: None if case.sliding_window is None else "has no windows"


def boundless(*arrays, **options):
    return right(*arrays, **options)


boundless.claim = Claim(
    u=0.25, u_in=0.5, u_q=0.5, u_p=0.5, u_o=0.5, eta_p=0.0, eta_o=0.0, eps_exp=0.5, eps_tanh=0.5, eps_div=0.5, block=1
)  # fmt: skip


def takes_the_contracts_arguments_only(*arrays, softmax_scale, logits_soft_cap, sliding_window, compute_dtype):
    return right(
        *arrays, softmax_scale=softmax_scale, logits_soft_cap=logits_soft_cap, sliding_window=sliding_window,
        compute_dtype=compute_dtype,
    )  # fmt: skip


def hands_its_options_on(*arrays, **options):
    return takes_the_contracts_arguments_only(*arrays, **options)


def interrupted(*arrays, **options):
    """Right twice, then the user presses Ctrl-C."""
    interrupted.calls += 1
    if interrupted.calls > 2:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    return right(*arrays, **options)


interrupted.calls = 0


def slow(*arrays, **options):
    """Says in a file that it has begun its fifth call, then takes its time."""
    slow.calls += 1
    if slow.calls == 5:
        Path(os.environ["RPA_TEST_BEGUN"]).touch()
        time.sleep(300)
    return right(*arrays, **options)


slow.calls = 0
