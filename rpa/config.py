"""The tuning parameters of one call: frozen, validated, hashable."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Platform(StrEnum):
    """What a kernel is written in."""

    TRITON = "triton"
    PALLAS = "pallas"
    CUDA = "cuda"
    XLA = "xla"


class Backend(StrEnum):
    """The chip a kernel runs on."""

    GPU = "gpu"
    TPU = "tpu"
    CPU = "cpu"
    MPS = "mps"
    ANY = "any"


PLATFORMS = (*(str(platform) for platform in Platform), "auto")
BACKENDS = tuple(str(backend) for backend in Backend)
_POSITIVE = ("num_kv_pages_per_block", "num_queries_per_block", "num_warps", "num_stages", "num_kv_splits")


@dataclass(frozen=True)
class RaggedPageAttentionv2Config:
    """Block sizes and resources of one kernel launch; `None` leaves a field to the backend's heuristic.

    `options` holds what only one kernel knows, as sorted `(name, int)` pairs.

    Raises:
        TypeError, ValueError: naming the field, its value and the rule.
    """

    num_kv_pages_per_block: int | None = None
    num_queries_per_block: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    platform: str = "auto"
    backend: str = "any"
    num_kv_splits: int | None = None
    options: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            _check_positive(name, getattr(self, name))
        _check_choice("platform", self.platform, PLATFORMS)
        _check_choice("backend", self.backend, BACKENDS)
        object.__setattr__(self, "platform", str(self.platform))
        object.__setattr__(self, "backend", str(self.backend))
        object.__setattr__(self, "options", _checked_options(self.options))

    def option(self, name: str, default: int) -> int:
        """The kernel-specific option `name`, or `default`."""
        return dict(self.options).get(name, default)

    def replace(self, **changes: Any) -> RaggedPageAttentionv2Config:
        """A copy with `changes`, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` undoes it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["options"] = dict(self.options)
        return fields

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RaggedPageAttentionv2Config:
        """The config that `to_dict` described; an unknown field is a `ValueError` that names it."""
        if not isinstance(data, dict):
            raise TypeError(f"config={data!r}: a dict of config fields is expected")
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [name for name in data if name not in known]
        if unknown:
            raise ValueError(f"config field {unknown[0]!r} is unknown; the fields are {', '.join(known)}")
        return cls(**data)

    def to_json(self) -> str:
        """One line of JSON; `from_json` undoes it."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RaggedPageAttentionv2Config:
        """The config that `to_json` wrote."""
        try:
            data = json.loads(text)
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"config text {text!r} is not JSON: {error}") from None
        return cls.from_dict(data)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_positive(name: str, value: Any) -> None:
    if value is None:
        return
    if not _is_int(value):
        raise TypeError(f"config field {name}={value!r}: a positive int or None is expected")
    if value <= 0:
        raise ValueError(f"config field {name}={value}: it must be positive")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"config field {name}={value!r}: a string is expected, one of {', '.join(choices)}")
    if value not in choices:
        raise ValueError(f"config field {name}={str(value)!r} is unknown; one of {', '.join(choices)} is expected")


def _checked_options(options: Any) -> tuple[tuple[str, int], ...]:
    try:
        pairs = dict(options)
    except (TypeError, ValueError):
        raise TypeError(f"config field options={options!r}: pairs of a name and an int are expected") from None
    for name, value in pairs.items():
        if not isinstance(name, str) or not _is_int(value):
            raise TypeError(f"config field options: {name!r}={value!r}: a name and an int are expected")
    return tuple(sorted(pairs.items()))
