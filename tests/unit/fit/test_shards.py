"""Residuals in shards: the same as in memory, and the same after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steering.fit import shards as shards_module
from steering.fit.activations import LoadedModel, first_tokens, last_residuals
from steering.fit.shards import write_shards

TEXTS = ["what is tea", "tea", "how do i tie a knot", "a knot", "what is tea made of", "tie", "of tea", "is tea a knot"]
ROW = 3 * 16 * 4
"""Bytes of one prompt's residuals in the tiny model."""


def test_shards_hold_what_the_model_gives_in_the_order_of_the_prompts(tiny: LoadedModel, tmp_path: Path) -> None:
    """Layer by layer, with the greedy first tokens, and no shard above the limit."""
    prompts = tiny.prompts(TEXTS)
    found = write_shards(tiny, prompts, tmp_path, "fit", batch=2, shard_bytes=3 * ROW)
    expected = last_residuals(tiny, prompts)
    assert (found.count, found.layers, found.width, len(found.files)) == (8, 3, 16, 3)
    for layer in range(3):
        torch.testing.assert_close(found.layer(layer), expected[:, layer], atol=1e-5, rtol=1e-5)
        assert sum(len(batch) for _, batch in found.batches(layer)) == 8
    assert found.first_tokens().tolist() == first_tokens(tiny, prompts)


def test_an_interrupted_run_goes_on_and_gives_the_same_arrays(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second shard: the first is kept, half a file is not, and the bytes are those of one run."""
    prompts = tiny.prompts(TEXTS)
    whole = write_shards(tiny, prompts, tmp_path / "whole", "fit", batch=4, shard_bytes=3 * ROW)
    real = shards_module.last_residuals_and_tokens
    calls: list[int] = []

    def failing(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shards_module, "last_residuals_and_tokens", failing)
    with pytest.raises(KeyboardInterrupt):
        write_shards(tiny, prompts, tmp_path / "cut", "fit", batch=4, shard_bytes=3 * ROW)
    (tmp_path / "cut" / "fit-00001.safetensors").write_bytes(b"half a file")
    resumed = write_shards(tiny, prompts, tmp_path / "cut", "fit", batch=4, shard_bytes=3 * ROW)
    assert len(calls) == 4  # one before, one that failed, two after
    for one, other in zip(whole.files, resumed.files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_other_prompts_or_another_identity_make_shards_again(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard says what it was made from."""
    prompts = tiny.prompts(TEXTS)
    write_shards(tiny, prompts, tmp_path, "fit", batch=4, identity="one")
    write_shards(tiny, prompts[::-1], tmp_path, "fit", batch=4, identity="one")
    write_shards(tiny, prompts[::-1], tmp_path, "fit", batch=4, identity="two")

    def forbidden(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a kept shard was made again")

    monkeypatch.setattr(shards_module, "last_residuals_and_tokens", forbidden)
    found = write_shards(tiny, prompts[::-1], tmp_path, "fit", batch=4, identity="two")
    torch.testing.assert_close(found.layer(1), last_residuals(tiny, prompts[::-1])[:, 1], atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="made again"):
        write_shards(tiny, prompts, tmp_path, "fit", batch=4, identity="two")
