"""A campaign: workers judge chunks of cases until the budget is spent; every case is on disk before the next one.

The record is the state. A campaign that is killed at any moment goes on from it: chunks that were begun are never
begun again, so no case repeats, and at most the case in flight is lost. A failure whose shrinking was cut short is
shrunk first.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from fuzz import corpus
from fuzz.coverage import AXES
from fuzz.isolate import Child
from fuzz.ledger import Ledger, Waiver
from fuzz.plan import Plan
from fuzz.tally import Tally, read_record
from fuzz.worker import Chunk, serve

FIRST_CHUNK, CHUNK = 150, 1200
GRACE = 60.0  # seconds past the budget for a failure that is being shrunk
STARTS = 3  # a worker that dies this often before its first case is no worker
EXIT = {"pass": 0, "fail": 1, "nothing": 3, "infrastructure": 4, "interrupted": 4}


@dataclass(frozen=True)
class Settings:
    """What a campaign is asked to do."""

    target: str
    out: Path
    budget: float | None = None  # seconds, those already in the record included
    max_examples: int | None = None  # cases, those already in the record included
    seed: int = 0
    workers: int = 1
    case_timeout: float = 120.0
    max_failures: int = 3  # distinct ones; the campaign stops there
    share: str | None = None
    waivers: tuple[Waiver, ...] = ()
    reduce: bool = True


class OtherCampaign(ValueError):
    """The folder holds the record of another target or seed, or another campaign is writing to it."""


class Campaign:
    """One run of a campaign, new or resumed."""

    def __init__(self, settings: Settings, watch: Callable[[Tally], None] = lambda tally: None):
        self.settings, self.watch = settings, watch
        settings.out.mkdir(parents=True, exist_ok=True)
        self.tally = read_record(settings.out)
        mine, known = (settings.target, settings.seed), self.tally.campaign
        if known not in (None, mine):
            raise OtherCampaign(f"--out {settings.out} holds a campaign of target {known[0]}, seed {known[1]}: "
                                f"not of {mine[0]}, seed {mine[1]}; choose another folder")  # fmt: skip
        self.tally.session += 1
        self.ledger = Ledger(settings.waivers, settings.target, datetime.date.today())
        self.store = corpus.open_store(settings.share)
        self.record: Any = None  # open while it runs
        self.began = time.monotonic() - self.tally.seconds
        self.promised: dict[int, int] = {}  # cases handed to each worker and not yet judged
        self.flying: dict[int, Plan] = {}
        self.reducing: dict[int, tuple[Plan, str]] = {}  # failures being shrunk: the plan, and what is wrong
        self.children: dict[int, Child] = {}
        self.deaths: Counter = Counter()
        self.shared: set[Plan] = set()
        self.killed: list[Plan] = []  # their worker was, once
        self.again: list[Plan] = []  # to be judged again
        unshrunk = self.tally.unshrunk if settings.reduce else {}
        self.unshrunk = [(Plan.from_json(plan), text) for plan, text in sorted(unshrunk.items())]
        self.told = 0.0  # when the progress display was
        self.trouble: str | None = None

    # -- budget

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def _left(self) -> int:
        """Cases still to hand out."""
        if self.settings.max_examples is None:
            return CHUNK
        return self.settings.max_examples - self.tally.cases - sum(self.promised.values())

    def _over(self) -> bool:
        s = self.settings
        if self.trouble or len(self.tally.failures) >= s.max_failures or self.tally.failed >= 50 * s.max_failures:
            return True
        return s.budget is not None and self.elapsed >= s.budget

    # -- running

    def run(self) -> str:
        """Run to the end of the budget; the status, a key of `EXIT`."""
        status = None
        self.record = _open_record(self.settings.out / "record.jsonl")
        try:
            if self.tally.campaign is None:
                self._write("campaign", target=self.settings.target, seed=self.settings.seed)
            for worker in range(self.settings.workers):
                self._start(worker)
            while self.children and (self.unshrunk or not self._over()):
                self._step()
                self._tell()
            self.watch(self.tally)
            self._end_reductions()
        except KeyboardInterrupt:
            status = "interrupted"
        finally:
            for child in self.children.values():
                child.end()
            for plan, text in self.reducing.values():
                self._left_as_found(plan, text)
            self.record.close()
        return status if status == "interrupted" and not self.tally.failed else self._status()

    def _end_reductions(self) -> None:
        """A failure that is being shrunk when the budget ends is worth some seconds more: it is what was looked for."""
        deadline = time.monotonic() + GRACE
        while self.reducing and time.monotonic() < deadline:
            for worker in [worker for worker in self.children if worker not in self.reducing]:
                self.children.pop(worker).end()
            self._step()
            self._tell()

    def _tell(self) -> None:
        """Show how far it is, a few times a second: every case would cost as much as judging some."""
        if time.monotonic() - self.told >= 0.25:
            self.told = time.monotonic()
            self.watch(self.tally)

    def _left_as_found(self, plan: Plan, text: str) -> None:
        """A failure whose shrinking was cut short, by Ctrl-C or a slow kernel: the case as it was drawn."""
        name = _unshrunk_name(plan.to_json())
        self._write("failure", id=name, kind="unshrunk", status="fail", text=text,
                    diagnosis="not shrunk: stopped; the same command goes on", family="unknown", mutant=None,
                    plan=plan.to_json(), found=plan.to_json(), shrink_seconds=0, tried=0)  # fmt: skip
        folder = self.settings.out / "failures" / name
        _leave_case(folder, plan, self.settings.target, "fails on this case, which is not shrunk")

    def _status(self) -> str:
        if self.tally.failed or self.tally.accepted or self.ledger.complaints():
            return "fail"
        if self.trouble:
            return "infrastructure"
        return "pass" if self.tally.verified else "nothing"

    def _start(self, worker: int) -> None:
        s = self.settings
        arguments = (s.target, s.seed, (worker, s.workers), str(s.out), s.reduce)
        self.children[worker] = Child(serve, arguments, s.out / "workers" / f"{worker}.log")

    def _step(self) -> None:
        """Read what the workers report within a moment; see to those that hang."""
        pipes = {child.pipe: worker for worker, child in self.children.items()}
        for pipe in wait(list(pipes), timeout=0.2):
            worker = pipes[pipe]  # type: ignore[index]
            message = self.children[worker].receive()
            if message is None:
                self._died(worker, "crash")
            else:
                self._message(worker, *message)
        for worker, child in list(self.children.items()):
            if worker in self.flying and time.monotonic() - child.busy_since > self.settings.case_timeout:
                self._died(worker, "timeout")

    def _message(self, worker: int, kind: str, *rest: Any) -> None:
        child = self.children[worker]
        child.busy_since = time.monotonic()
        if kind == "begin":
            self.flying[worker] = rest[0]
        elif kind == "end":
            self._judged(worker, self.flying.pop(worker), rest[0])
        elif kind == "reducing":
            self.reducing[worker] = rest[0], rest[1]
            self._write("reducing", plan=rest[0].to_json(), text=rest[1])
        elif kind == "failure":
            self.reducing.pop(worker, None)
            self._failure(rest[0])
        elif kind == "ready":
            if rest[0] and not self.tally.accepted:
                self._write("accepts", texts=rest[0])
            self._next(worker)
        elif kind == "gap":
            if self.tally.declined.get(rest[0]) != rest[1]:  # every worker finds the same
                self._write("gap", text=rest[0], shapes=rest[1])
        elif kind == "barred":
            if not set(rest[0]) <= self.tally.barred:
                self._write("barred", those=rest[0])
        elif kind == "barren":  # the target takes no shape of the stream
            self.children.pop(worker).end()
        elif kind == "done":
            self.promised.pop(worker, None)
            self.reducing.pop(worker, None)
            self._next(worker)

    def _next(self, worker: int) -> None:
        """Hand out the next chunk, or end the worker when no case is left."""
        if self.unshrunk:
            self.reducing[worker] = self.unshrunk.pop()
            self._send(worker, 0, unshrunk=(self.reducing[worker][0],))
            return
        workers = self.settings.workers
        cases = min(self._left(), FIRST_CHUNK if self.tally.next_chunk < workers else CHUNK)
        if self.settings.max_examples is not None:  # so that all workers have something to do until the end
            share = min(FIRST_CHUNK, -(-self.settings.max_examples // workers))
            cases = min(cases, max(share, -(-self._left() // workers)))
        if cases <= 0:
            self.children[worker].send(None)
            self.children.pop(worker).end(gently=5.0)
            return
        shared = [self.again.pop()] if self.again else self._from_store(cases)
        self._send(worker, len(shared) or cases, tuple(shared))

    def _send(self, worker: int, cases: int, plans: tuple[Plan, ...] = (), unshrunk: tuple[Plan, ...] = ()) -> None:
        chunk = Chunk(self.tally.next_chunk, cases, self.tally.cases, plans, unshrunk)
        self._write("chunk", chunk=chunk.number, worker=worker)
        self.promised[worker] = chunk.cases
        self.children[worker].send(chunk)

    def _from_store(self, limit: int) -> list[Plan]:
        """Plans that other machines (or an earlier campaign) shared, not yet judged here."""
        new = [p for p in corpus.fetch(self.store, self.settings.target) if p not in self.shared][:limit]
        new = [p for p in new if self.ledger.forbids(p) is None]
        self.shared.update(new)
        return new

    def _judged(self, worker: int, plan: Plan, report: dict[str, Any]) -> None:
        failed = report["status"] in ("fail", "suspect")
        waiver = self.ledger.excuses(plan, failed, report["kind"])
        before = self.tally.coverage.pairs
        self._case(worker, plan, report, waived=str(waiver) if waiver and failed else None)
        self.promised[worker] = max(0, self.promised.get(worker, 0) - 1)
        worth_sharing = (failed and not waiver) or self.tally.coverage.pairs - before >= 40
        if worth_sharing and plan not in self.shared:
            self.shared.add(plan)
            corpus.save(self.store, self.settings.target, plan)

    def _case(self, worker: int, plan: Plan, report: dict[str, Any], waived: str | None = None) -> None:
        told = {"text": report["text"]} if report["status"] != "pass" else {}
        ratio = report["ratio"] if report["ratio"] < 1e300 else None  # JSON has no infinity
        self._write("case", plan, worker=worker, status=report["status"], kind=report["kind"], ratio=ratio,
                    ms=round(1e3 * report["seconds"], 2), compiled=report["compiled"],
                    elements=report["elements"], plan=plan.to_json(),
                    **told, **({"waived": waived} if waived else {}))  # fmt: skip

    def _failure(self, found: dict[str, Any]) -> None:
        plan = Plan.from_json(found["plan"])
        if self.ledger.excuses(plan, True, found["kind"]) is None:
            self._write("failure", **found)
            shutil.rmtree(self.settings.out / "failures" / _unshrunk_name(found["found"]), ignore_errors=True)
            entry = {"target": self.settings.target, "finding": found["id"], "plan": found["plan"]}
            with open(self.settings.out / "corpus.jsonl", "a") as stream:
                stream.write(json.dumps(entry) + "\n")
        else:
            self._write("reduced", plan=found["found"])

    def _died(self, worker: int, how: str) -> None:
        """A child that crashed or hung: the case in flight is its failure; another child goes on."""
        child, plan = self.children.pop(worker), self.flying.pop(worker, None)
        self.promised.pop(worker, None)
        reducing = self.reducing.pop(worker, None)
        words = child.end(gently=1.0 if how == "crash" else 0.0)
        if how == "timeout":
            words = f"no answer in {self.settings.case_timeout:g} s"
        text = f"{how}: {words} {child.last_words()}".strip()
        busy = reducing[0] if reducing is not None else plan
        spared = words.endswith("SIGKILL") and busy not in self.killed  # from outside, or for memory: once is nothing
        if spared and busy is not None:
            self.killed.append(busy)
        if reducing is not None:
            self._left_as_found(*reducing)
            self.unshrunk += [reducing] if spared else []
        elif plan is not None and spared:
            self.again.append(plan)
        elif plan is not None:
            report = {
                "status": "fail",
                "kind": how,
                "ratio": float("inf"),
                "text": text,
                "seconds": 0.0,
                "compiled": 0,
                "elements": 0,
            }
            self._case(worker, plan, report)
            self._write("failure", id=f"{how}-{words.replace(' ', '-')}", kind=how, status="fail", text=text,
                        diagnosis=how, family=how, mutant=None, plan=plan.to_json(), found=plan.to_json(),
                        shrink_seconds=0, tried=0)  # fmt: skip
            folder = self.settings.out / "failures" / f"{how}-{words.replace(' ', '-')}"
            _leave_case(folder, plan, self.settings.target, "crashed or hung on this case; running it does so again")
        else:
            self.deaths[worker] += 1
        if self.deaths[worker] >= STARTS:
            self.trouble = f"worker {worker} died {STARTS} times outside a case; {text}"
        else:
            self._start(worker)

    def _write(self, line: str, case: Plan | None = None, /, **fields: Any) -> None:
        """Append a line to the record, flushed, and count it."""
        whole = {"line": line, "t": round(self.elapsed, 3), "session": self.tally.session, **fields}
        self.record.write(json.dumps(whole, separators=(",", ":")) + "\n")
        self.record.flush()
        self.tally.add(whole, case)


def _open_record(path: Path) -> Any:
    """The record, open for appending by this campaign alone; a last line that a crash cut short is ended first."""
    stream = open(path, "a+")  # noqa: SIM115 - the campaign closes it
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
    except BlockingIOError:
        stream.close()
        raise OtherCampaign(f"another campaign is writing to --out {path.parent}; choose another folder") from None
    stream.seek(0, 2)
    if stream.tell():
        stream.seek(stream.tell() - 1)
        if stream.read(1) != "\n":
            stream.write("\n")
    return stream


def _unshrunk_name(plan: str) -> str:
    return f"unshrunk-{hashlib.sha256(plan.encode()).hexdigest()[:8]}"


def _leave_case(folder: Path, plan: Plan, target: str, what: str) -> None:
    """A case as it was drawn, and a script that judges it again."""
    from fuzz.build import build
    from fuzz.files import write_atomically

    text = (
        f'"""{target} {what}."""\n'
        "from pathlib import Path\n\nfrom fuzz.judge import judge_case\nfrom fuzz.targets import load\n"
        "from oracle import Case\n\n"
        f'print(judge_case(Case.load(Path(__file__).with_name("case.npz")), load("{target}").asking(True)).text)\n'
    )
    write_atomically(folder / "case.npz", build(plan).save)
    write_atomically(folder / "reproduce.py", lambda draft: draft.write_text(text))


def _never_taken(tally: Tally) -> dict[str, list[Any]]:
    """The values of each axis that the target does not take, and so are never drawn."""
    alone = {combination[0] for combination in tally.barred if len(combination) == 1}
    return {axis: lost for axis, values in AXES.items() if (lost := [v for v in values if (axis, v) in alone])}


def summary(settings: Settings, tally: Tally, status: str, ledger: Ledger, trouble: str | None) -> dict[str, Any]:
    """The campaign in one JSON object."""
    (pairs, possible), (triples, possible_triples) = tally.pairs(), tally.coverage.triple_share(tally.barred)
    return {
        "status": status, "exit": EXIT[status], "target": settings.target, "seed": settings.seed,
        "cases": tally.cases, "verified": tally.verified, "failed": tally.failed, "vacuous": tally.vacuous,
        "waived": tally.waived, "skipped": dict(tally.skipped), "declined": tally.declined,
        "never_taken": _never_taken(tally), "worst_ratio": {settings.target: tally.worst},
        "kinds": dict(tally.kinds), "seconds": round(tally.seconds, 2), "exact_cases": tally.exact,
        "elements": tally.elements,
        "cases_per_second": round(tally.cases / tally.seconds, 1) if tally.seconds else None,
        "compilations": sum(tally.compiled.values()), "sessions": tally.session,
        "pairs": {"seen": pairs, "possible": possible},
        "triples": {"seen": triples, "possible": possible_triples},
        "accepts_illegal": tally.accepted, "waiver_complaints": ledger.complaints(), "trouble": trouble,
        "failures": [
            {k: f[k] for k in ("id", "kind", "text", "diagnosis", "family", "plan")} for f in tally.failures.values()
        ],
    }  # fmt: skip
