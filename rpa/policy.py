"""What may decide a config when no store holds one, and how a caller changes that for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from rpa import settings


@dataclass(frozen=True)
class AutotunePolicy:
    """What may decide a config when no store holds one.

    `cache_miss_fallback` is `"autotune"`, `"heuristics"` or None: None asks the environment, and without a word
    from it tunes on accelerators only.

    Raises:
        ValueError: naming the field, its value and the rule.
    """

    allow_autotune: bool = True
    allow_heuristics: bool = True
    cache_miss_fallback: str | None = None
    validate_backward: bool = False

    def __post_init__(self) -> None:
        if self.cache_miss_fallback not in (None, *settings.POLICIES):
            expected = f"one of {', '.join(settings.POLICIES)} or None is expected"
            raise ValueError(f"cache_miss_fallback={self.cache_miss_fallback!r}: {expected}")
        if self.validate_backward:
            raise ValueError("validate_backward=True: the operation has no backward pass to validate")


overrides: ContextVar[tuple[tuple[Any, dict[str, Any]], ...]] = ContextVar("rpa_policies", default=())


@contextlib.contextmanager
def policy_override(selector: Any = None, /, **changes: Any) -> Iterator[None]:
    """Within the block, and this thread or task only, change fields of a selector's policy.

    Args:
        selector: a `ConfigSelectorChain`, an `Executor` that holds one, or None for the public function's own.
        changes: fields of `AutotunePolicy`.
    """
    if selector is None:
        from rpa.select import default_chain

        selector = default_chain()
    chain = getattr(selector, "chooser", selector)
    replace(chain.policy, **changes)  # an unknown field or value is an error here, not at the next call
    token = overrides.set((*overrides.get(), (chain, changes)))
    try:
        yield
    finally:
        overrides.reset(token)


def in_force(chain: Any, policy: AutotunePolicy) -> AutotunePolicy:
    """A selector's policy with the overrides that are on here."""
    for changed, changes in overrides.get():
        policy = replace(policy, **changes) if changed is chain else policy
    return policy
