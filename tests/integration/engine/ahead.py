"""Asynchronous scheduling on the CPU, where vLLM switches it off since it gains nothing there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def as_asked(options: Mapping[str, Any]) -> Iterator[None]:
    """Inside, an engine that is to schedule ahead does: steps are prepared before the tokens of the last are known."""
    if not options.get("async_scheduling"):
        yield
        return
    from vllm.platforms.cpu import CpuPlatform

    own = CpuPlatform.__dict__["check_and_update_config"]

    def check(cls: type[CpuPlatform], config: Any) -> None:
        own.__func__(cls, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = own
