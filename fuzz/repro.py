# ruff: noqa: E501 - a line of the script is a line here
"""A failure as a script: literal numbers, NumPy and the target only, at most 25 lines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.build import build, refill
from fuzz.diagnose import Diagnosis
from fuzz.judge import Judgement, judge_case
from fuzz.plan import Plan
from fuzz.related import pick
from fuzz.targets import ADAPTERS, BACKENDS, Target
from oracle import Case
from oracle.case import array_literal, nested_literal

LINES = 25
SEED_LIMIT = 400  # numbers past which an array travels in case.npz, not in the text
FEW_NUMBERS, FEW_SLOTS = 32, 8  # a longer array of which few slots differ is told by those


def simplified(case: Case, target: Target, judgement: Judgement) -> Case:
    """The case with rounder numbers, if it still fails in the same way: integers, else one decimal, else as it is."""
    for decimals in (0, 1, 2):
        rounder = _rounded(case, decimals)
        if rounder is None:
            continue
        again = judge_case(rounder, target)
        if again.status == judgement.status and again.verdict is not None and again.verdict.token is not None:
            return rounder
    return case


def _rounded(case: Case, decimals: int) -> Case | None:
    changes = {}
    for name in ("queries", "kv_pages", "softmax_aux"):
        value = getattr(case, name)
        if value is None or value.dtype == np.int8:
            continue
        numbers = np.round(value.astype(np.float64), decimals)
        changes[name] = (numbers + 0.0).astype(value.dtype)  # no -0 to read
    rounder = case.replace(**changes)
    return None if rounder.hash == case.hash else rounder


@dataclass(frozen=True)
class Other:
    """A second case, what it has of the first, and the rows that are told of (all where `...`)."""

    case: Case
    words: str
    rows: Any
    alike: bool  # both must be answered with the same bits


def script(case: Case, target: Target, judgement: Judgement, diagnosis: Diagnosis, other: Other | None = None) -> str:
    """The reproducer of a failing case, by the kind of its failure."""
    place = judgement.verdict
    if other is not None or place is None or place.token is None:
        return _two_calls(case, target, judgement, diagnosis, other)
    if place.sequence is None:
        return _nobodys_row(case, target, judgement, diagnosis)
    return _wrong_number(case, target, judgement, diagnosis)


def _head(target: Target, judgement: Judgement, diagnosis: Diagnosis) -> list[str]:
    """What is wrong in two lines of words."""
    v, told = judgement.verdict, f"{str(diagnosis)[:1].upper()}{str(diagnosis)[1:]}."
    if v is None or v.got is None or v.token is None:
        text = judgement.text
    else:
        where = f"row {v.token}, head {v.head}" + (f", dim {v.dim}" if v.dim is not None else "")
        whose = "of no sequence" if v.sequence is None else f"at position {v.position} of sequence {v.sequence}"
        what = "the lse" if judgement.kind == "lse" else "the answer"
        text = (
            f"{what} is {v.got:.9g}; right is {v.expected:.9g}, and rounding explains {v.bound:.3g} ({where}, {whose})"
        )
        told = f"{v.key[:1].upper()}{v.key[1:]}. {told}" if v.key else told
    text = f"{target.name}: {text}".replace("\\", "/").replace('"', "'").split("\n")[0]
    return [f'"""{text[:240]}.', f'{told}"""']


# Ours that need nothing around the call: their scripts import what a user would.
_PUBLIC = ("xla", "triton")


def _imports(target: Target, body: list[str]) -> list[str]:
    """NumPy, and the target as a function."""
    module, _, function = target.name.partition(":")
    known = target.name in BACKENDS or target.name in ADAPTERS or module == "mutant" or not function
    if target.name in _PUBLIC:
        how = "from rpa import ragged_page_attention_v2 as target"
    elif known or "." in function:
        how = f'from fuzz.targets import load; target = load("{target.name}").call'
    else:
        how = f'import sys; sys.path.append("."); from {module} import {function} as target'
    return [
        "import ml_dtypes, numpy as np" if any("ml_dtypes." in line for line in body) else "import numpy as np",
        how,
    ]


def _script(target: Target, judgement: Judgement, diagnosis: Diagnosis, body: list[str]) -> str:
    return "\n".join([*_head(target, judgement, diagnosis), *_imports(target, body), *body]) + "\n"


def _arguments(case: Case, target: Target, lse: bool = False) -> list[str]:
    """The call's arguments, one line each, numbers spelled out; a big array comes from the file beside the script."""
    lines = []
    for name, short, words in (
        ("queries", "q", "[tokens, query heads, head size]"),
        ("kv_pages", "kv", "[pages, slots, key and value of each kv head, head size]"),
    ):
        value = getattr(case, name)
        file = f'__import__("oracle").Case.load(__file__.replace("reproduce.py", "case.npz")).{name}'
        whole = file if value.size > SEED_LIMIT else array_literal(value)
        lines.append(f"{_mostly_alike(short, value) or f'{short} = {whole}'}  # {words}")
    metadata = ", ".join(array_literal(a) for a in (case.context_lens, case.block_tables, case.query_start_loc))
    lines.append(f"context_lens, tables, starts = {metadata}")
    sinks = "None" if case.softmax_aux is None else array_literal(case.softmax_aux)
    lines.append(f"num_seqs, sinks = np.array([{case.num_seqs}], np.int32), {sinks}")
    options = case.options | ({"return_lse": True} if lse else {})
    options |= {"platform": target.name} if target.name in _PUBLIC else {}
    lines.append(f"options = dict({', '.join(f'{name}={_plain(value)}' for name, value in options.items())})")
    return lines


def _mostly_alike(name: str, array: np.ndarray) -> str | None:
    """An array of which all slots but few hold one number: that number, then those slots. None for another."""
    if array.size <= FEW_NUMBERS:
        return None
    bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
    numbers, first, counts = np.unique(bits, return_index=True, return_counts=True)
    usual = counts.argmax()
    odd = np.argwhere((bits != numbers[usual]).any(axis=(2, 3)[: array.ndim - 2]))
    if not 0 < len(odd) <= FEW_SLOTS or len(odd) * array[0, 0].size > SEED_LIMIT:
        return None
    fill = array_literal(np.full(array.shape, array.reshape(-1)[first[usual]]))
    return "; ".join([f"{name} = {fill}", *(f"{name}[{i}, {j}] = {nested_literal(array[i, j])}" for i, j in odd)])


def _plain(value: object) -> str:
    return array_literal(value) if isinstance(value, np.ndarray) else repr(value)


_CALL = "target(q, kv, context_lens, tables, starts, num_seqs, sinks, **options)"


def _got(judgement: Judgement) -> str:
    """The expression of the wrong number, at `row, head, dim`, or `row, head` of an lse."""
    return (
        f"float(np.asarray({_CALL}[1])[row, head])"
        if judgement.kind == "lse"
        else f"float(np.asarray({_CALL})[row, head, dim])"
    )


def _nobodys_row(case: Case, target: Target, judgement: Judgement, diagnosis: Diagnosis) -> str:
    """A row that no sequence owns must be 0, its lse -inf."""
    v = judgement.verdict
    assert v is not None
    body = [
        *_arguments(case, target, judgement.kind == "lse"),
        f"row, head, dim = {v.token}, {v.head}, {v.dim}  # past the last sequence's queries",
        f"got = {_got(judgement)}",
        f'print(f"expected={v.expected} {{got=}} bound=0: the row belongs to no sequence")',
    ]
    return _script(target, judgement, diagnosis, body)


def _wrong_number(case: Case, target: Target, judgement: Judgement, diagnosis: Diagnosis) -> str:
    """Expected, got, bound at the worst element, and the key whose loss or addition gives what was got."""
    v, lse = judgement.verdict, judgement.kind == "lse"
    assert v is not None
    kv_head = (v.head or 0) // case.group
    k_scale, v_scale = (_scale_at(s, kv_head) for s in (case.k_scale, case.v_scale))
    scale = "" if case.scale == 1 else f"{case.scale!r} * "
    sinks = case.softmax_aux is not None  # key -1 of the script
    sink, keys = (f" + [float(sinks[{v.head}])] * (-1 in keys)", "keys if j >= 0") if sinks else ("", "keys")
    capped = "x[:len(slots)]" if sinks else "x"
    cap, page = case.logits_soft_cap, case.page_size
    slot = "tables[sequence, j], 0" if page == 1 else f"tables[sequence, j // {page}], j % {page}"
    total = f"sum(a * s[{2 * kv_head + 1}][dim]{v_scale} for a, s in zip(w, slots)) / max(w.sum(), 1e-300)"
    window = case.sliding_window
    first = "" if window is None else "position, " if window == 1 else f"max(0, position - {window - 1}), "
    broken = v.got is not None and np.isnan(v.got) and np.isnan(case.kv_pages.astype(np.float32)).any()
    body = [
        *_arguments(case, target, lse),
        f"row, head, dim, sequence, position = {v.token}, {v.head}, {v.dim}, {v.sequence}, {v.position}",
        f"got = {_got(judgement)}",
        "",
        f"def attend(keys):  # in float64: query head {v.head}, kv head {kv_head}, over these keys of the sequence",
        f"    slots = [kv[{slot}].astype(float) for j in {keys}]",
        f"    x = np.array([{scale}q[row, head].astype(float) @ s[{2 * kv_head}]{k_scale} for s in slots]{sink})",
        *([f"    {capped} = {cap:g} * np.tanh({capped} / {cap:g})"] if cap else []),
        "    m = x.max(initial=-1e30); w = np.exp(x - m)",
        "    return float(m + np.log(max(w.sum(), 1e-300)))  # the lse" if lse else f"    return float({total})",
        "",
        f"seen = {{-1, *range({first}position + 1)}}  # -1 is the sink"
        if sinks
        else f"seen = set(range({first}position + 1))",
        f'print(f"expected={{attend(sorted(seen)):.9g}} {{got=:.9g}} bound={v.bound:.3g}")',
        *(_without_nan(judgement) if broken else _which_key(page, v.bound or 0.0, sinks)),
    ]
    return _script(target, judgement, diagnosis, body)


def _which_key(page: int, bound: float, sinks: bool) -> list[str]:
    """The lines that look for one key, or the sink, which is missing, or was read and should not be."""
    keys = "tables.shape[1]" if page == 1 else f"tables.shape[1] * {page}"
    entry = "tables[sequence, j]" if page == 1 else f"tables[sequence, j // {page}]"
    every, known = (f"range(-1, {keys})", f"j < 0 or 0 <= {entry}") if sinks else (f"range({keys})", f"0 <= {entry}")
    name = "{'the sink' if key < 0 else f'key {key}'}" if sinks else "key {key}"
    return [
        f"changed = {{j: attend(sorted(seen ^ {{j}})) for j in {every} if {known} < len(kv)}}",
        "key = min(changed, key=lambda j: abs(changed[j] - got), default=None)",
        f"explained = key is not None and abs(changed[key] - got) <= {bound:.9g}",
        f"""print(f"as if {name} were {{'missing' if key in seen else 'seen too'}}" if explained else "no one key explains it")""",
    ]


def _without_nan(judgement: Judgement) -> list[str]:
    """The lines that show where a NaN comes from: the slots that no row may see."""
    return [
        "kv = np.where(np.isnan(kv.astype(float)), 3, kv.astype(float)).astype(kv.dtype)  # no row may see the NaN",
        f'print("with 3 in the place of each NaN: got=%.9g" % {_got(judgement)})',
    ]


def _scale_at(scale: object, head: int) -> str:
    if scale is None:
        return ""
    return f" * {float(scale[head]) if isinstance(scale, np.ndarray) else scale!r}"


def _two_calls(case: Case, target: Target, judgement: Judgement, diagnosis: Diagnosis, other: Other | None) -> str:
    """The calls that show a failure which is no single wrong number: what happens, then what must."""
    lines = _arguments(case, target)
    if judgement.kind in _CALLS:
        lines += _CALLS[judgement.kind]
    elif other is not None:
        changed = [line for line in _arguments(other.case, target) if line not in lines]
        lines += ["one = np.asarray(CALL).astype(float)", f"# {other.words}", *changed]
        lines += ["two = np.asarray(CALL).astype(float)", *_compared(other)]
    else:
        lines += _PLAIN
    if judgement.kind == "accepts":
        name, _, value = judgement.text.split(" ")[0].partition("=")
        lines = [line for line in lines if line not in _PLAIN]
        lines += [f'print("must raise ValueError naming {name}:")', _CALL.replace("**options", f'**dict(options, {name}=float("{value}"))').join(("print(", ")"))]  # fmt: skip
    return _script(target, judgement, diagnosis, [line.replace("CALL", _CALL) for line in lines])


def _compared(other: Other) -> list[str]:
    if not other.alike:
        return ["print(one, two, sep='\\n')"]
    rows = "" if other.rows is ... or len(other.rows) == other.case.num_tokens else f"[{other.rows.tolist()}]"
    return [
        f"same = (one{rows} == two{rows}) | np.isnan(one{rows} + two{rows})",
        'print("elements that differ:", (~same).sum(), "must be 0;", one[np.nonzero(~same)][:5], two[np.nonzero(~same)][:5])',
    ]


_PLAIN = ("print(np.asarray(CALL).astype(float))",)
_CALLS = {
    "determinism": (
        "answers = []",
        "for _ in range(20):",
        "    answers.append(np.asarray(CALL).tobytes())",
        "    target(q, -kv, context_lens, tables, starts, num_seqs, sinks, **options)  # must leave nothing behind",
        'print("different answers to equal calls:", len(set(answers)), "must be 1")',
    ),
    "input": (
        "given = dict(q=q, kv=kv, context_lens=context_lens, tables=tables, starts=starts, num_seqs=num_seqs, sinks=sinks)",
        "before = {name: np.array(a) for name, a in given.items()}",
        "CALL",
        'print("written to:", [name for name in given if before[name].tobytes() != np.array(given[name]).tobytes()], "must be []")',
    ),
    "relation:alone": (
        "together = np.asarray(CALL).astype(float)",
        "for s in range(int(num_seqs[0])):",
        "    rows = slice(starts[s], starts[s + 1])",
        "    one = starts.copy(); one[: s + 1] = starts[s]; one[s + 1 :] = starts[s + 1]  # the others own no rows",
        "    single = np.asarray(target(q, kv, context_lens, tables, one, num_seqs, sinks, **options)).astype(float)",
        '    print("sequence", s, "alone differs by", np.abs(single - together)[rows].max(initial=0), "must be 0")',
    ),
}


def leave(folder: Path, plan: Plan, target: Target, judgement: Judgement, diagnosis: Diagnosis) -> Judgement:
    """Write `case.npz` and `reproduce.py` of a shrunk failure into a folder; the judgement of the case as written."""
    from fuzz.files import write_atomically

    target = target.asking(plan.shape.lse)
    case, judgement = _told(plan, target, judgement)
    text = script(case, target, judgement, diagnosis, _other(plan, case, judgement))
    write_atomically(folder / "case.npz", case.save)
    write_atomically(folder / "reproduce.py", lambda draft: draft.write_text(text))
    return judgement


def _told(plan: Plan, target: Target, judgement: Judgement) -> tuple[Case, Judgement]:
    """The fill, and the roundest numbers, that show the failure best: as a wrong number, if it can be.

    Numbers say which key was read; NaN only says that one was, and a changed bit not even that.
    """
    case, fill = build(plan), {"bound": "tame", "nan": "tame", "lse": "tame", "poison": "huge"}.get(judgement.kind)
    if judgement.status != "fail" or fill is None:
        return case, judgement
    other = build(plan, fill)
    again = judge_case(other, target)
    if again.bad and again.kind in ("bound", "nan")[: 1 + (fill == "huge")]:
        case, judgement = other, again
    if judgement.kind == "poison":
        return case, judgement
    case = simplified(case, target, judgement)
    again = judge_case(case, target)
    return case, again if again.bad else judgement


def _other(plan: Plan, case: Case, judgement: Judgement) -> Other | None:
    """The case that breaks the promise together with this one, where that is the failure."""
    if judgement.kind == "poison":
        return Other(refill(plan, case, "huge"), "slots that no row may see hold something else", ..., True)
    picked = pick(plan, case) if judgement.kind.startswith("relation:") else None
    if picked is None:
        return None
    relation, expected = picked
    judged = np.broadcast_to(expected.judged, (case.num_tokens, case.num_q_heads, 1))
    rows = np.flatnonzero(judged.all(axis=(1, 2)))
    outcome = np.arange(case.queries.size).reshape(case.queries.shape)
    alike = bool(np.array_equal(expected.predict(outcome), outcome))
    return Other(expected.case, (relation.apply.__doc__ or "").split("\n")[0], rows, alike)
