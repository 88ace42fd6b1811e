"""`rpa verify`: a right kernel passes, a wrong one fails and leaves its case, and every way out has its code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from fuzz.commands.verify import verify
from fuzz.files import write_atomically
from fuzz.models import MODELS
from fuzz.trace import MOONCAKE_CONVERSATION, read, scan
from fuzz.verify import plan_of
from oracle import Case, judge

TARGETS = "tests.verify_targets"
REAL = Path(__file__).parents[2] / "shared" / "traces"
LENGTHS = [(520, 3), (70, 9), (30, 2)]
MOONCAKE = "".join(
    f'{{"timestamp": {30 * i}, "input_length": {n}, "output_length": {m}, "hash_ids": {[i, i + 9][: -(-n // 512)]}}}\n'
    for i, (n, m) in enumerate(LENGTHS)
)


@pytest.fixture
def rpa_verify(tmp_path, monkeypatch):
    """Runs the command in-process in an empty folder; (exit code, stdout, stderr, JSON or None)."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(verify)

    def run(*arguments: str, platform: str | None = "right", steps: int = 3):
        result_file = tmp_path / "result.json"
        result_file.unlink(missing_ok=True)
        line = [*arguments, "--json", str(result_file)]
        if platform is not None:
            line += ["--platform", f"{TARGETS}:{platform}"]
        line += ["--steps", str(steps), "--budget", "10m"]
        done = CliRunner(env={"COLUMNS": "80"}).invoke(app, line, catch_exceptions=False)
        result = json.loads(result_file.read_text()) if result_file.exists() else None
        return done.exit_code, done.stdout, done.stderr, result

    return run


@pytest.mark.parametrize("model", ["llama3-70b-tp8", pytest.param("tiny", marks=pytest.mark.slow)])
def test_every_backend_of_this_machine_is_verified_by_default(rpa_verify, model):
    code, text, _, result = rpa_verify("--model", model, platform=None, steps=2)
    cases = 2 * len(MODELS[model].layers)
    assert code == 0
    assert (result["status"], result["verified"], result["failed"], result["vacuous"]) == (
        "pass",
        cases,
        0,
        0,
    )
    assert result["steps"] == 2
    assert set(result["backends"]["xla"]["layers"]) == {layer.name for layer in MODELS[model].layers}
    assert 0 < result["backends"]["xla"]["worst_ratio"] <= 1
    assert 0 < result["backends"]["xla"]["worst_lse_ratio"] <= 1
    assert any(reason.startswith("triton: runs on gpu") for reason in result["skipped"])
    assert f"PASS {cases} cases verified" in text


def test_a_right_kernel_passes_and_the_table_says_what_was_covered(rpa_verify):
    code, text, errors, result = rpa_verify(steps=14)
    assert (code, errors.strip()) == (0, "")
    for feature in (
        "chunk",
        "decode",
        "mixed",
        "shared pages",
        "window shorter than a context",
        "soft cap",
        "sinks",
    ):
        assert result["features"][feature] > 0, feature
    for words in ("backend", "worst", "covered:", "int8 pages", "PASS 56 cases verified"):
        assert words in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_the_same_seed_gives_the_same_result_and_another_seed_another(rpa_verify):
    def run(seed):
        result = rpa_verify("--seed", seed, steps=3)[3]
        for backend in result["backends"].values():
            for timed in (backend, *backend["layers"].values()):
                timed.pop("seconds")
                timed.pop("first", None)
        return {key: value for key, value in result.items() if key != "seconds"}

    first, again, other = run("5"), run("5"), run("6")
    assert first == again
    assert first["backends"] != other["backends"]


@pytest.mark.parametrize(
    "name", ["window_wide", "one_behind", "last_sequence_skipped", "lse_without_maximum", "wrong_shape"]
)
def test_a_wrong_kernel_fails_and_leaves_a_case_that_shows_it(rpa_verify, name):
    code, text, _, result = rpa_verify(platform=name, steps=12)
    assert code == 1
    assert (result["status"], result["failed"] > 0) == ("fail", True)
    failure = result["failures"][0]
    assert "FAIL" in text
    again = f"rpa fuzz replay {failure['case']} --target {TARGETS}:{name}"
    if name == "lse_without_maximum":  # `rpa fuzz replay` asks for no log-sum-exp
        again = f"rpa verify --model tiny --seed 0 --platform {TARGETS}:{name} --steps 1 --budget 1h"
    assert failure["reproduce"] == again
    assert again in text
    case = Case.load(failure["case"])
    kernel = getattr(__import__(TARGETS, fromlist=[name]), name)
    options = case.options if case.quantised else {k: v for k, v in case.options.items() if "k_" not in k}
    output, lse = kernel(*case.arrays[:5], case.num_seqs, case.softmax_aux, **options, return_lse=True)
    assert judge(case, output, lse=lse).status == "fail"


def test_a_kernel_whose_bits_follow_dead_slots_fails_and_leaves_both_cases(rpa_verify):
    code, _, _, result = rpa_verify(platform="leaks", steps=1)
    assert code == 1
    failure = result["failures"][0]
    assert failure["text"] == "the bits change with what lies in slots that no row sees"
    assert failure["reproduce"].startswith("rpa verify --model tiny --seed 0")
    first = Path(failure["case"])
    one, other = Case.load(first), Case.load(first.with_name(f"{first.stem}-refilled.npz"))
    np.testing.assert_array_equal(one.queries[: one.live_rows], other.queries[: other.live_rows])
    assert one.hash != other.hash


def test_what_a_kernel_raises_is_its_failure_in_one_line(rpa_verify):
    code, _, _, result = rpa_verify(platform="raises")
    assert code == 1
    assert result["failures"][0]["text"] == "raised RuntimeError: the kernel gave up"
    assert result["failed"] == 4 * 3
    assert len(list(Path(".rpa/verify").glob("*.npz"))) == 4 * 3


def test_a_hopeless_kernel_is_not_asked_for_ever(rpa_verify):
    code, _, _, result = rpa_verify(platform="raises", steps=9)
    assert (code, result["failed"]) == (1, 4 * 3)
    assert [count for reason, count in result["skipped"].items() if "not run after 3 failures" in reason] == [6] * 4


def test_a_declared_gap_is_counted_and_the_rest_is_verified(rpa_verify):
    code, text, _, result = rpa_verify(platform="no_windows", steps=3)
    assert (code, result["verified"]) == (0, 6)
    assert sorted(result["skipped"].values()) == [3, 3]
    assert "has no windows (3)" in " ".join(text.split())


@pytest.mark.parametrize("name", ["takes_the_contracts_arguments_only", "hands_its_options_on"])
def test_a_kernel_without_scales_or_lse_is_judged_on_what_it_takes(rpa_verify, name):
    code, _, _, result = rpa_verify(platform=name, steps=2)
    assert (code, result["verified"], sum(result["skipped"].values())) == (0, 6, 2)
    assert result["backends"][f"{TARGETS}:{name}"]["worst_lse_ratio"] is None


@pytest.mark.parametrize("name", ["unsupported", "boundless"])
def test_nothing_verified_is_no_pass(rpa_verify, name):
    code, text, _, result = rpa_verify(platform=name)
    assert (code, result["status"], result["verified"]) == (3, "nothing verified", 0)
    assert result["vacuous"] == (12 if name == "boundless" else 0)
    assert "NOTHING VERIFIED" in text


@pytest.mark.parametrize("name", ["out_of_memory", "device_out_of_memory"])
def test_a_machine_that_gives_out_is_no_verdict_on_the_kernel(rpa_verify, name):
    code, text, _, result = rpa_verify(platform=name)
    assert (code, result["status"], result["failed"]) == (4, "infrastructure", 0)
    assert "STOPPED" in text


def test_a_full_disk_is_trouble_not_a_verdict(rpa_verify, monkeypatch):
    def no_space(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Case, "save", no_space)
    code, text, _, _ = rpa_verify(platform="raises")
    assert code == 4
    assert "No space left on device" in " ".join(text.split())


def test_ctrl_c_leaves_the_table_of_what_was_done(rpa_verify):
    code, text, _, result = rpa_verify(platform="interrupted")
    assert (code, result["status"], result["verified"]) == (130, "interrupted", 1)
    assert "INTERRUPTED. Until then: 1 cases verified" in " ".join(text.split())


def test_sigint_to_the_real_command(tmp_path):
    begun, result_file = tmp_path / "begun", tmp_path / "result.json"
    command = "from fuzz.cli import main; main()"
    options = ["--platform", f"{TARGETS}:slow", "--json", str(result_file)]
    process = subprocess.Popen(
        [sys.executable, "-c", command, "verify", *options],
        cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"RPA_TEST_BEGUN": str(begun), "COLUMNS": "80"},
    )  # fmt: skip
    try:
        while not begun.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        text, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "INTERRUPTED. Until then: 2 cases verified" in " ".join(text.split())
    assert "Traceback" not in errors
    assert json.loads(result_file.read_text())["status"] == "interrupted"


USAGE = {
    "missing trace": (["--trace", "nowhere.jsonl"], "--trace nowhere.jsonl: no such file"),
    "folder": (["--trace", "."], "--trace .: a folder"),
    "platform": (["--platform", "tritn"], "--platform tritn: unknown (did you mean triton?)"),
    "platform elsewhere": (
        ["--platform", "triton"],
        "--platform triton cannot run here: triton: runs on gpu",
    ),
    "platform without kernel": (["--platform", "cuda"], "no backend of this package has the platform cuda"),
    "interpreter": (["--platform", "pallas"], "--platform pallas --interpret runs it in its interpreter"),
    "target": (["--platform", "nosuchmodule:f"], "--platform target 'nosuchmodule:f' cannot be loaded"),
    "model": (["--model", "llama9"], "no model is called 'llama9'; there are tiny, llama3-8b"),
    "budget": (["--budget", "soon"], "--budget 'soon' is no time above 0"),
    "no budget": (["--budget", "0"], "--budget '0' is no time above 0"),
    "json folder": (["--json", "."], "--json .: a folder"),
    "json nowhere": (["--json", "no/such/result.json"], "does not exist"),
}


@pytest.mark.parametrize("name", USAGE)
def test_a_usage_error_is_one_line_and_exit_2(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(verify)
    arguments, words = USAGE[name]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", MOONCAKE[:-9].encode()], ids=["empty", "png", "cut"])
def test_a_trace_that_is_none_is_refused_before_anything_runs(rpa_verify, tmp_path, content):
    (tmp_path / "trace").write_bytes(content)
    code, text, errors, result = rpa_verify("--trace", "trace", platform="raises")
    assert (code, text, result) == (2, "", None)
    assert errors.startswith("error: --trace trace")
    assert len(errors.splitlines()) == 1


def test_a_short_trace_is_replayed_whole_and_unscaled(rpa_verify, tmp_path):
    (tmp_path / "trace").write_text(MOONCAKE)
    code, _, _, result = rpa_verify("--trace", "trace", steps=1000)
    assert (code, result["requests"], result["scale"]) == (0, 3, {"prompt": 1, "output": 1})
    assert result["scheduler"]["finished"] == 3
    assert result["rows"] == sum(n + m - 1 for n, m in LENGTHS)


def test_requests_that_cannot_fit_are_counted(rpa_verify, tmp_path):
    (tmp_path / "trace").write_text(MOONCAKE.replace(" 30,", " 3000,"))
    code, text, _, result = rpa_verify("--trace", "trace", "--scale", "1", steps=1000)
    assert (code, result["requests"]) == (0, 2)
    assert result["skipped"] == {"request longer than 2048 replay tokens": 1}
    assert "hash_ids do not number one" in " ".join(text.split())


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/traces is not on this machine")
@pytest.mark.parametrize("name", ["mooncake_conversation.jsonl", "azure_llm_2023_code.csv"])
def test_the_real_traces_replay(rpa_verify, name):
    code, text, _, result = rpa_verify("--trace", str(REAL / name), steps=8)
    assert (code, result["verified"]) == (0, 32)
    assert ("shared pages" in result["features"]) == name.startswith("mooncake")
    assert ("the trace has no hash_ids" in " ".join(text.split())) == name.startswith("azure")


@pytest.mark.parametrize(
    "model",
    [m if m == "llama3-8b" else pytest.param(m, marks=pytest.mark.slow) for m in MODELS if m != "tiny"],
)
def test_the_published_models_replay(rpa_verify, model):
    code, _, _, result = rpa_verify("--model", model, steps=1)
    assert (code, result["verified"]) == (0, len(MODELS[model].layers))


def test_scaling_keeps_prefix_blocks_whole_pages():
    for model in MODELS.values():
        plan = plan_of(model, scan(MOONCAKE_CONVERSATION.draw(0, 500)), "", 0)
        assert 512 // plan.scale.prompt >= plan.limits.page_size
        assert plan.limits.pages >= plan.limits.pages_per_seq or plan.limits.capacity < 131072


def test_files_are_written_whole_or_not_at_all(tmp_path):
    place = tmp_path / "deep" / "result.json"
    write_atomically(place, lambda draft: draft.write_text("old"))

    def torn(draft):
        draft.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(place, torn)
    assert place.read_text() == "old"
    assert [path.name for path in place.parent.iterdir()] == ["result.json"]


def test_requests_are_read_as_a_stream(tmp_path):
    (tmp_path / "trace").write_text(MOONCAKE)
    assert next(read(tmp_path / "trace")).prompt == 520
