"""A campaign from the outside: exit codes, what it writes, and that nothing kills it for good."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fuzz import corpus, ledger
from fuzz.campaign import Campaign, OtherCampaign, Settings, _open_record
from fuzz.commands.search import _seconds, app
from fuzz.coverage import valid_pairs
from fuzz.isolate import Child
from fuzz.mutants import score
from fuzz.plan import Plan
from fuzz.stream import first_shapes
from fuzz.tally import Tally, read_record

ROOT = Path(__file__).parents[1]
KERNELS = """
import os, time
from fuzz.mutants.model import kernel
calls = 0
def right(*arrays, **options):
    return kernel(*arrays, **options)
def crashes(*arrays, **options):
    global calls
    calls += 1
    if calls > 20:
        os.abort()
    return kernel(*arrays, **options)
def killed(*arrays, **options):
    if not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(os.getpid(), 9)
    return kernel(*arrays, **options)
def hangs(*arrays, **options):
    time.sleep(1000)
def refuses(*arrays, **options):
    raise NotImplementedError("not today")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(KERNELS)
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from fuzz.commands.search import app; app()", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def rpa_fuzz(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=240
    )


def test_a_right_kernel_passes_and_leaves_a_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = rpa_fuzz(folder, "run", "--target", "own:right", "--max-examples", "20", "--out", "out")
    assert done.returncode == 0, done.stderr
    whole = json.loads((folder / "out/summary.json").read_text())
    assert (whole["status"], whole["verified"] + whole["vacuous"], whole["failed"]) == ("pass", 20, 0)
    assert 0 < whole["worst_ratio"]["own:right"] <= 1
    assert whole["exact_cases"] >= 1
    assert {"report.md", "report.html", "record.jsonl"} <= {p.name for p in (folder / "out").iterdir()}
    # The budget counts what the record holds: nothing is left to do.
    monkeypatch.chdir(folder)
    assert here("run", "--target", "own:right", "--max-examples", "20", "--out", "out") == 0
    assert read_record(folder / "out").cases == 20


def test_a_folder_of_another_campaign_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    line = {"line": "campaign", "t": 0.0, "session": 1, "target": "model", "seed": 3}
    (tmp_path / "record.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "file").write_text("")
    options = ("--max-examples", "5", "--seed", "3", "--out")
    assert here("run", "--target", "mutant:head0", *options, ".") == 2
    assert "holds a campaign of target model, seed 3" in capsys.readouterr().err
    assert here("run", "--target", "model", *options, "file") == 2
    assert "is a file" in capsys.readouterr().err


def here(*arguments: str) -> int:
    """The exit status of a command in this process, which has imported everything already."""
    with pytest.raises(SystemExit) as ended:
        app(arguments)
    return int(ended.value.code or 0)


def test_a_wrong_kernel_fails_leaves_a_script_and_replays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    done = rpa_fuzz(folder, "run", "--target", "mutant:window_wide", "--max-examples", "15", "--out", "out")
    assert done.returncode == 1, done.stderr
    assert "behaves like window_wide" in done.stderr
    (found,) = (folder / "out/failures").iterdir()
    assert {p.name for p in found.iterdir()} == {"case.npz", "reproduce.py"}
    assert json.loads((folder / "out/corpus.jsonl").read_text().splitlines()[0])["target"] == "mutant:window_wide"
    monkeypatch.chdir(folder)
    assert here("replay", str(found)) == 1
    assert "beyond HARD" in capsys.readouterr().err.replace("\n", " ")
    assert here("replay", str(found), "--target", "model") == 0
    assert here("replay", "out") == 2
    assert f"out/case.npz does not exist; there are out/failures/{found.name}" in capsys.readouterr().err.replace(
        "\n", ""
    )
    assert here("report", "out") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run", "--target", "nobody", "--max-examples", "5"), 2, "is unknown"),
        (("run", "--target", "own:right", "--budget", "soon"), 2, "is no time above 0"),
        (("run", "--target", "own:refuses", "--max-examples", "5"), 3, "not today"),
        (
            ("run", "--target", "own:right", "--max-examples", "5", "--share", "redis://127.0.0.1:1"),
            4,
            "no Redis answers",
        ),
        (("replay", "no-such-file"), 2, "does not exist"),
        (("report", "no-such-folder"), 2, "no finished campaign"),
    ],
)
def test_exit_codes_are_the_contracts(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    assert here(*arguments) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("10m", 600), ("13m30s", 810), ("1h 30m", 5400)])
def test_a_budget_is_a_time(text: str, seconds: float) -> None:
    assert _seconds(text) == seconds


def test_two_campaigns_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with _open_record(tmp_path / "record.jsonl"), pytest.raises(OtherCampaign, match="another campaign is writing"):
        _open_record(tmp_path / "record.jsonl")
    _open_record(tmp_path / "record.jsonl").close()


def test_a_kernel_that_crashes_the_process_is_a_failure_with_its_case(folder: Path) -> None:
    done = rpa_fuzz(
        folder,
        "run",
        "--target",
        "own:crashes",
        "--max-examples",
        "40",
        "--max-failures",
        "1",
        "--out",
        "out",
    )
    assert done.returncode == 1, done.stderr
    (found,) = read_record(folder / "out").failures.values()
    assert found["kind"] == "crash"
    assert "SIGABRT" in found["text"]
    assert (folder / "out/failures" / found["id"] / "case.npz").exists()


def test_a_worker_killed_from_outside_accuses_nobody(folder: Path) -> None:
    done = rpa_fuzz(folder, "run", "--target", "own:killed", "--max-examples", "20", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert read_record(folder / "out").cases == 20


def test_a_failure_whose_shrinking_is_cut_short_is_left_as_it_was_found(tmp_path: Path) -> None:
    campaign = Campaign(Settings("mutant:window_wide", tmp_path))
    plan = score.drawn(1, 3)[0]
    with open(tmp_path / "record.jsonl", "w") as campaign.record:
        campaign._left_as_found(plan, "it was wrong")
    (found,) = read_record(tmp_path).failures.values()
    assert (found["kind"], found["text"]) == ("unshrunk", "it was wrong")
    folder = tmp_path / "failures" / found["id"]
    assert (folder / "case.npz").exists()
    compile((folder / "reproduce.py").read_text(), "reproduce.py", "exec")


def test_a_failure_whose_shrinking_was_cut_short_is_shrunk_by_whoever_goes_on(folder: Path) -> None:
    arguments = ("run", "--target", "mutant:causal_plus1", "--max-examples", "3", "--max-failures", "1", "--out", "out")
    assert rpa_fuzz(folder, *arguments).returncode == 1
    out = folder / "out"
    lines = list(corpus.read_lines(out / "record.jsonl"))
    (shrunk,) = read_record(out).failures
    killed = [json.dumps(line) + "\n" for line in lines if line["line"] != "failure"]  # while it was being shrunk
    (out / "record.jsonl").write_text("".join(killed))
    assert (read_record(out).failures, len(read_record(out).unshrunk)) == ({}, 1)
    campaign = Campaign(Settings("mutant:causal_plus1", out))
    with open(out / "record.jsonl", "a") as campaign.record:  # or by Ctrl-C
        campaign._left_as_found(*campaign.unshrunk[0])
    (left,) = (out / "failures").glob("unshrunk-*")
    assert rpa_fuzz(folder, *arguments).returncode == 1
    assert list(read_record(out).failures) == [shrunk]
    assert not left.exists()
    assert read_record(out).cases == sum(line["line"] == "case" for line in lines)


@pytest.mark.slow
def test_a_failure_found_at_the_end_of_the_budget_is_still_shrunk(folder: Path) -> None:
    done = rpa_fuzz(folder, "run", "--target", "mutant:causal_plus1", "--budget", "2s", "--out", "out")
    if read_record(folder / "out").failed:  # a slow machine may not have come to the first case
        assert done.returncode == 1
        assert list((folder / "out/failures").iterdir())


def test_pairs_leave_out_what_the_target_does_not_have() -> None:
    tally = Tally()
    everything = tally.pairs()[1]
    tally.add({"line": "barred", "those": [[["types", "bf16"], ["page", 8]], [["types", "int8"]]]})
    lost = [
        pair for pair in valid_pairs() if ("types", "int8") in pair or set(pair) == {("types", "bf16"), ("page", 8)}
    ]
    assert tally.pairs()[1] == everything - len(lost)
    shared = Plan(first_shapes(0, 8)[7], ((1, 5),))  # somebody shared a case of int8 pages
    new = tally.coverage.add(shared, None)
    assert new == tally.coverage.pairs == len(tally.coverage.seen)
    found = sum(("types", "int8") in pair for pair in tally.coverage.seen)
    assert found > 10
    assert tally.pairs() == (new, everything - len(lost) + found)


@pytest.mark.slow
def test_a_kernel_that_hangs_is_a_failure_after_the_case_timeout(folder: Path) -> None:
    limits = ("--max-examples", "5", "--case-timeout", "3", "--max-failures", "1")
    done = rpa_fuzz(folder, "run", "--target", "own:hangs", *limits, "--out", "out")
    assert done.returncode == 1, done.stderr
    (found,) = read_record(folder / "out").failures.values()
    assert (found["kind"], found["text"].split(" no")[0]) == ("timeout", "timeout:")


def test_a_killed_campaign_goes_on_where_it_was_and_repeats_nothing(folder: Path) -> None:
    arguments = ("run", "--target", "own:right", "--max-examples", "120", "--out", "out")
    first = subprocess.Popen(command(*arguments), cwd=folder, env=environment(), stderr=subprocess.DEVNULL)
    record = folder / "out/record.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not record.exists() or record.read_text().count('"line":"case"') < 30):
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = read_record(folder / "out").cases
    assert 30 <= before < 120
    with open(record, "a") as stream:
        stream.write('{"line":"case","plan":"cut sho')  # what a kill in the middle of a write leaves
    done = rpa_fuzz(folder, *arguments)
    assert done.returncode == 0, done.stderr
    lines = [line for line in corpus.read_lines(record) if line["line"] == "case"]
    assert len(lines) == 120
    assert json.loads((folder / "out/summary.json").read_text())["sessions"] == 2
    assert len({line["plan"] for line in lines}) == 120


@pytest.mark.slow
def test_workers_draw_from_disjoint_shapes(tmp_path: Path) -> None:
    tally = run(tmp_path, max_examples=80, workers=2)
    shapes: dict[int, set] = {}
    for line in corpus.read_lines(tmp_path / "record.jsonl"):
        if line["line"] == "case":
            shapes.setdefault(line["worker"], set()).add(Plan.from_json(line["plan"]).shape)
    assert tally.cases == 80
    assert len(shapes) == 2
    assert not shapes[0] & shapes[1]


def run(out: Path, **changes):
    campaign = Campaign(Settings("model", out, **{"max_examples": 20, "seed": 1, **changes}))
    assert campaign.run() in ("pass", "fail")
    return campaign.tally


# ---------------------------------------------------------------- waivers

WAIVER = """
[[waiver]]
target = "mutant:window_wide"
kind = "{kind}"
reason = "known"
link = "issue 7"
expires = {expires}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "expires", "code", "words"),
    [
        ("", "2999-01-01", 0, "failures waived"),
        ("timeout", "2999-01-01", 1, "unexpectedly passes"),
        ("", "2001-01-01", 1, "expired on 2001-01-01"),
    ],
)
def test_a_waiver_excuses_expires_and_must_be_needed(
    folder: Path, kind: str, expires: str, code: int, words: str
) -> None:
    (folder / "known.toml").write_text(WAIVER.format(kind=kind, expires=expires))
    done = rpa_fuzz(folder, "run", "--target", "mutant:window_wide", "--max-examples", "12", "--waivers", "known.toml",
                    "--out", "out")  # fmt: skip
    assert done.returncode == code, done.stderr
    assert words in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[waiver]]\ntarget = "x"\nlink = "y"\nexpires = 2999-01-01\n', "waiver 1 has no reason"),
        (WAIVER.format(kind="", expires="2999-01-01") + "colour = 3\n", "field 'colour'"),
        (WAIVER.format(kind="", expires='"soon"'), "must be a date"),
        (WAIVER.format(kind="", expires="2999-01-01 10:00:00"), "must be a date"),
        (WAIVER.format(kind="", expires="2999-01-01") + "when = { page = 5 }\n", "when.page=5 is no feature; known of"),
        (WAIVER.format(kind="", expires="2999-01-01") + "when = { pages = 1 }\n", "when.pages=1 is no feature; known:"),
        (WAIVER.format(kind="", expires="2999-01-01") + 'when = "few"\n', "when='few' must be a table of features"),
        ("waiver = [1]\n", "waiver 1: 1 is no table"),
        ("[[waivers]]\n", "'waivers' is nothing a ledger holds"),
        ('[waiver]\ntarget = "x"\n', "write \\[\\[waiver\\]\\] entries"),
    ],
)
def test_a_waiver_without_reason_link_or_date_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "w.toml").write_text(text)
    with pytest.raises(ledger.WaiverError, match=words):
        ledger.read(tmp_path / "w.toml")


def test_a_crash_waiver_keeps_a_shared_case_from_being_launched() -> None:
    plan = score.drawn(1, 3)[0]
    waiver = ledger.Waiver("t", "known", "link", datetime.date(2999, 1, 1), when={"data": plan.data}, crash=True)
    book = ledger.Ledger([waiver], "t", datetime.date(2026, 1, 1))
    assert book.forbids(plan) is waiver
    assert book.complaints() == []


# ---------------------------------------------------------------- corpus and sharing


def test_a_minimised_corpus_covers_what_the_whole_did() -> None:
    entries = [(plan, None) for plan in score.drawn(1, 60)] + [(score.drawn(2, 1)[0], "nan-identity")]
    kept = corpus.minimised(entries)

    def covered(some):
        return set().union(*(corpus.pairs(corpus.features(plan)) for plan, _ in some)) & corpus.valid_pairs()

    assert covered(kept) == covered(entries)
    assert {finding for _, finding in kept} >= {"nan-identity"}
    assert len(kept) < len(entries)


@pytest.mark.slow
def test_campaigns_share_plans_through_a_folder(tmp_path: Path) -> None:
    share = str(tmp_path / "shared")
    run(tmp_path / "one", share=share)
    plans = corpus.fetch(corpus.open_store(share), "model")
    assert plans
    run(tmp_path / "two", share=share, seed=2)
    judged = {line["plan"] for line in corpus.read_lines(tmp_path / "two/record.jsonl") if line["line"] == "case"}
    assert judged >= {plan.to_json() for plan in plans}


@pytest.fixture
def redis_url(tmp_path: Path):
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server (Debian package redis-server)")
    pytest.importorskip("redis", reason="needs the `redis` extra")
    place = tmp_path / "redis.sock"
    command = [
        "redis-server",
        "--port",
        "0",
        "--unixsocket",
        str(place),
        "--save",
        "",
        "--dir",
        str(tmp_path),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not place.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    yield f"unix://{place}"
    server.terminate()
    server.wait()


def test_two_machines_share_a_campaign_through_redis(tmp_path: Path, redis_url: str) -> None:
    run(tmp_path / "one", share=redis_url)
    shared = corpus.fetch(corpus.open_store(redis_url), "model")
    assert shared
    run(tmp_path / "two", share=redis_url, seed=9)
    judged = {line["plan"] for line in corpus.read_lines(tmp_path / "two/record.jsonl") if line["line"] == "case"}
    assert judged >= {plan.to_json() for plan in shared}


def test_what_a_child_raises_outside_a_case_is_in_its_log(tmp_path: Path) -> None:
    child = Child(int, ("no base",), tmp_path / "log")  # int(pipe, "no base") raises
    assert child.receive() is None
    assert child.end(gently=30.0) == "exit code 1"
    assert "TypeError" in child.last_words(1)
