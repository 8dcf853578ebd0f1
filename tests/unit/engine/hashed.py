"""Hashed requests: vLLM's request and its block hasher, as far as a scheduler and prefix caching read them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from steering.engine.prefix_cache import BlockHasher, set_apart
from steering.plan import Plan

BLOCK = 4
TOKENS = list(range(100, 130))


@dataclass(slots=True, kw_only=True)
class Parameters:
    """vLLM's `SamplingParams`, as far as it is read."""

    extra_args: dict[str, object] | None = None
    max_tokens: int | None = None
    logprobs: int | None = None


@dataclass(slots=True, kw_only=True)
class FakeRequest:
    """vLLM's `Request`, as far as prefix caching reads it: keys are appended as tokens arrive."""

    tokens: list[int]
    request_id: str = "r"
    sampling_params: Parameters | None = field(default_factory=Parameters)
    _block_hasher: BlockHasher | None = None
    block_hashes: list[bytes] = field(default_factory=list)
    num_prompt_tokens: int = 0
    resumable: bool = False
    client_index: int = 3

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def update_block_hashes(self) -> None:
        if self._block_hasher is not None:
            self.block_hashes.extend(self._block_hasher(self))


def chained(request: FakeRequest) -> list[bytes]:
    """VLLM's hasher in short (`v1/core/kv_cache_utils.py`): each full block over its tokens and its parent's key."""
    parent = request.block_hashes[-1] if request.block_hashes else b"none"
    hashes = []
    for start in range(len(request.block_hashes) * BLOCK, len(request.tokens) - BLOCK + 1, BLOCK):
        parent = hashlib.sha256(parent + repr(request.tokens[start : start + BLOCK]).encode()).digest()
        hashes.append(parent)
    return hashes


def keys(
    tokens: list[int], plan: Plan | None, *, prompt: int, number: int = 0, chunks: tuple[int, ...] = ()
) -> list[bytes]:
    """Keys of a request whose tokens arrive in `chunks` after the prompt, or one at a time after those."""
    request = FakeRequest(tokens=tokens[:prompt], _block_hasher=chained)
    if plan is not None:
        set_apart(request, plan=plan, number=number, prompt_length=prompt, block_size=BLOCK)
    request.update_block_hashes()
    for chunk in (*chunks, *[1] * len(tokens)):
        request.tokens = tokens[: min(len(tokens), len(request.tokens) + chunk)]
        request.update_block_hashes()
    return request.block_hashes
