# ruff: noqa: E501 - a line of the script is a line here
"""A failure as a script: literal numbers, NumPy and the target only, at most 25 lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fuzz.build import build
from fuzz.diagnose import Diagnosis
from fuzz.judge import Judgement, judge_case
from fuzz.plan import Plan
from fuzz.targets import ADAPTERS, BACKENDS, Target
from oracle import Case
from oracle.case import array_literal

LINES = 25
SEED_LIMIT = 400  # numbers past which an array travels in case.npz, not in the text


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


def script(case: Case, target: Target, judgement: Judgement, diagnosis: Diagnosis) -> str:
    """The reproducer of a failing case, by the kind of its failure."""
    place = judgement.verdict
    if place is None or place.token is None:
        return _two_calls(case, target, judgement, diagnosis)
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
        lines.append(f"{short} = {file if value.size > SEED_LIMIT else array_literal(value)}  # {words}")
    metadata = ", ".join(array_literal(a) for a in (case.context_lens, case.block_tables, case.query_start_loc))
    lines.append(f"context_lens, tables, starts = {metadata}")
    sinks = "None" if case.softmax_aux is None else array_literal(case.softmax_aux)
    lines.append(f"num_seqs, sinks = np.array([{case.num_seqs}], np.int32), {sinks}")
    options = case.options | ({"return_lse": True} if lse else {})
    options |= {"platform": target.name} if target.name in _PUBLIC else {}
    lines.append(f"options = dict({', '.join(f'{name}={_plain(value)}' for name, value in options.items())})")
    return lines


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
    sink = "" if case.softmax_aux is None else f" + [float(sinks[{v.head}])]"
    capped = "x[:-1]" if sink else "x"
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
        f"    slots = [kv[{slot}].astype(float) for j in keys]",
        f"    x = np.array([{scale}q[row, head].astype(float) @ s[{2 * kv_head}]{k_scale} for s in slots]{sink})",
        *([f"    {capped} = {cap:g} * np.tanh({capped} / {cap:g})"] if cap else []),
        "    m = x.max(initial=-1e30); w = np.exp(x - m)",
        "    return float(m + np.log(max(w.sum(), 1e-300)))  # the lse" if lse else f"    return float({total})",
        "",
        f"seen = set(range({first}position + 1))",
        f'print(f"expected={{attend(sorted(seen)):.9g}} {{got=:.9g}} bound={v.bound:.3g}")',
        *(_without_nan(judgement) if broken else _which_key(page, v.bound or 0.0)),
    ]
    return _script(target, judgement, diagnosis, body)


def _which_key(page: int, bound: float) -> list[str]:
    """The lines that look for one key which is missing, or was read and should not be."""
    keys = "tables.shape[1]" if page == 1 else f"tables.shape[1] * {page}"
    entry = "tables[sequence, j]" if page == 1 else f"tables[sequence, j // {page}]"
    return [
        f"changed = {{j: attend(sorted(seen ^ {{j}})) for j in range({keys}) if 0 <= {entry} < len(kv)}}",
        "key = min(changed, key=lambda j: abs(changed[j] - got), default=None)",
        f"explained = key is not None and abs(changed[key] - got) <= {bound:.9g}",
        """print(f"as if key {key} were {'missing' if key in seen else 'seen too'}" if explained else "no one key explains it")""",
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


def _two_calls(case: Case, target: Target, judgement: Judgement, diagnosis: Diagnosis) -> str:
    """The calls that show a failure which is no single wrong number: what happens, then what must."""
    lines = [*_arguments(case, target), *_CALLS.get(judgement.kind, _PLAIN)]
    if judgement.kind == "accepts":
        name, _, value = judgement.text.split(" ")[0].partition("=")
        lines = [line for line in lines if line not in _PLAIN]
        lines += [f'print("must raise ValueError naming {name}:")', _CALL.replace("**options", f'**dict(options, {name}=float("{value}"))').join(("print(", ")"))]  # fmt: skip
    return _script(target, judgement, diagnosis, [line.replace("CALL", _CALL) for line in lines])


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
        "before = q.copy(), kv.copy()",
        "CALL",
        'print("arguments unchanged:", q.tobytes() == before[0].tobytes(), kv.tobytes() == before[1].tobytes())',
    ),
    "poison": (
        "one = np.asarray(CALL).astype(float)",
        "kv = np.where(np.isnan(kv.astype(float)), 200.0, kv.astype(float)).astype(kv.dtype)  # slots nobody may see",
        "two = np.asarray(CALL).astype(float)",
        'print("changed by slots nobody may see:", np.argwhere(one != two).tolist(), "must be []")',
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

    case, target = build(plan), target.asking(plan.shape.lse)
    if judgement.kind in ("bound", "nan", "lse") and judgement.status == "fail":
        # Numbers say which key was read; NaN only says that one was.
        tame = build(plan, "tame")
        case = tame if judge_case(tame, target).kind == "bound" and judge_case(tame, target).bad else case
        case = simplified(case, target, judgement)
        again = judge_case(case, target)
        judgement = again if again.bad else judgement
    text = script(case, target, judgement, diagnosis)
    write_atomically(folder / "case.npz", case.save)
    write_atomically(folder / "reproduce.py", lambda draft: draft.write_text(text))
    return judgement
