"""Capture: every wanted residual is kept once and right, over schedules a vLLM scheduler could make; and its files."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from steering.engine.capture import CAPTURE_KEY, Capture, CaptureOrder, capture_of
from steering.engine.options import CaptureSettings
from steering.errors import CaptureError, InvalidSpec
from steering.fit.captured import ASKS, CapturedShards

WIDTH, LAYERS, TOKENS = 4, (1, 3), 64


def capture_in(folder: Path, *, generated: int = 0, shard_bytes: int = 2**20, is_writing: bool = True) -> Capture:
    """An empty capture of two layers into a folder."""
    return Capture(
        CaptureSettings(folder=folder, layers=LAYERS, generated=generated, shard_bytes=shard_bytes),
        layers=LAYERS,
        width=WIDTH,
        requests=8,
        tokens=TOKENS,
        device=torch.device("cpu"),
        is_writing=is_writing,
    )


def residual(name: int, position: int, layer: int) -> torch.Tensor:
    """What the model computes for a position of a request: different for each."""
    return torch.tensor([float(name), float(position), float(layer), 1.0])


def step(capture: Capture, *parts: tuple[int, int, int]) -> None:
    """A step of (request, tokens in it, tokens computed before it), forward pass included."""
    names, tokens, computed = zip(*parts, strict=True)
    capture.write_step([str(name) for name in names], np.array(tokens), np.array(computed))
    places = [(name, first + offset) for name, count, first in parts for offset in range(count)]
    for layer in LAYERS:
        x = torch.stack([residual(name, position, layer) for name, position in places])
        torch.ops.trimtab.capture(x / 2, x / 2, capture.slots, capture.kept(layer))
    capture.after_forward()


@dataclass(slots=True, kw_only=True)
class Request:
    """A request as the scheduler sees it; it captures under its own number, or does not ask."""

    name: int
    prompt: int
    asks: bool
    computed: int = 0
    length: int = field(init=False)
    most: int = 0

    def __post_init__(self) -> None:
        self.length = self.prompt


@settings(max_examples=25, deadline=None, phases=[Phase.generate])
@given(data=st.data(), generated=st.integers(0, 3))
def test_each_residual_is_kept_once_and_right(data: st.DataObject, generated: int) -> None:
    """Chunked prefill, cache hits, decode, preemption with recomputation, in any order, beside others that do not ask.

    What the files hold afterwards is, for each request that asked, what the model computed at its last prompt token and
    at as many of its first generated tokens as were fed back.
    """
    with tempfile.TemporaryDirectory() as folder:
        capture = capture_in(Path(folder), generated=generated, shard_bytes=100)
        requests = [
            Request(name=name, prompt=data.draw(st.integers(1, 9)), asks=name < 4 or data.draw(st.booleans()))
            for name in range(6)
        ]
        asking = [request for request in requests if request.asks]
        for number, request in enumerate(asking):
            capture.add(str(request.name), CaptureOrder(index=number), request.prompt)
        for request in requests:
            request.computed = data.draw(st.integers(0, request.prompt - 1))  # found in the prefix cache
        for _ in range(data.draw(st.integers(1, 20))):
            parts = []
            for request in requests:
                if data.draw(st.integers(0, 9)) == 0:
                    request.computed = data.draw(st.integers(0, request.prompt - 1))  # preempted and resumed
                    if request.asks:  # V2 adds it again
                        capture.add(str(request.name), CaptureOrder(index=asking.index(request)), request.prompt)
                elif data.draw(st.booleans()):
                    count = data.draw(st.integers(1, request.length - request.computed))
                    parts.append((request.name, count, request.computed))
                    request.computed += count
                    request.most = max(request.most, request.computed)
                    request.length += request.computed == request.length
            if parts:
                step(capture, *parts)
        for request in requests:
            capture.remove(str(request.name))
        reached = [request.most >= request.prompt for request in asking]
        assert capture.flush() == sum(reached)
        assert capture.live == 0
        if not all(reached):
            return
        shards = CapturedShards(Path(folder), count=len(asking))
        for layer in LAYERS:
            expected = torch.stack([residual(request.name, request.prompt - 1, layer) for request in asking])
            assert torch.equal(shards.layer(layer), expected)
            if generated:
                found = shards.generated(layer)
                for row, request in enumerate(asking):
                    fed = min(generated, request.most - request.prompt)
                    assert found.mask[row].tolist() == [True] * fed + [False] * (generated - fed)
                    for token in range(fed):
                        wanted = residual(request.name, request.prompt + token, layer)
                        assert torch.equal(found.residuals[row, token], wanted)


def test_a_given_answer_is_captured_from_the_end_of_its_prompt(tmp_path: Path) -> None:
    """Prompt and answer come as one prompt of 7 tokens; the order says that the prompt ends after 4."""
    capture = capture_in(tmp_path, generated=5)
    capture.add("0", CaptureOrder(index=0, prompt_length=4), 7)
    step(capture, (0, 5, 0))
    step(capture, (0, 2, 5))
    capture.remove("0")
    capture.flush()
    shards = CapturedShards(tmp_path)
    assert torch.equal(shards.layer(1), residual(0, 3, 1).unsqueeze(0))
    residuals, mask = shards.generated(1)
    assert mask.tolist() == [[True, True, True, False, False]]
    assert torch.equal(residuals[0, :3], torch.stack([residual(0, position, 1) for position in (4, 5, 6)]))


def test_of_several_samples_the_first_is_captured(tmp_path: Path) -> None:
    """VLLM puts a sample's number before its id; all of them come with the same order."""
    capture = capture_in(tmp_path)
    for sample in ("1_ask", "0_ask"):
        capture.add(sample, CaptureOrder(index=0), 1)
    assert list(capture._wanting) == ["0_ask"]


def test_a_request_owns_its_index_until_it_fails(tmp_path: Path) -> None:
    """A second one of that index is not kept; one that ended before its last prompt token leaves it to another."""
    capture = capture_in(tmp_path)
    capture.add("7", CaptureOrder(index=0), 3)
    capture.add("8", CaptureOrder(index=0), 3)
    step(capture, (7, 2, 0))
    capture.remove("7")
    capture.add("9", CaptureOrder(index=0), 3)
    step(capture, (8, 3, 0), (9, 3, 0))
    capture.add("6", CaptureOrder(index=0), 1)
    step(capture, (6, 1, 0))
    assert capture.flush() == 1
    assert torch.equal(CapturedShards(tmp_path).layer(3), residual(9, 2, 3).unsqueeze(0))


def test_a_step_in_which_nobody_is_due_runs_nothing(tmp_path: Path) -> None:
    """The map's last entry is 0, and the op looks at nothing else: the tokens before it may have any shape."""
    capture = capture_in(tmp_path)
    capture.add("0", CaptureOrder(index=0), 9)
    step(capture, (0, 4, 0), (1, 4, 0))
    assert capture.slots.eq(0).all()
    before = capture.kept(1).clone()
    torch.ops.trimtab.capture(torch.empty(3, 1), torch.empty(7, 2), capture.slots, capture.kept(1))
    assert torch.equal(capture.kept(1), before)


def test_a_rank_that_writes_nothing_keeps_step(tmp_path: Path) -> None:
    """Under tensor parallelism every rank runs the op, and the first alone writes."""
    capture = capture_in(tmp_path / "absent", is_writing=False)
    capture.add("0", CaptureOrder(index=0), 2)
    step(capture, (0, 2, 0))
    assert capture.flush() == 0
    assert capture.live == 0
    assert not (tmp_path / "absent").exists()


def _captured(folder: Path, indexes: range, **settings: Any) -> Capture:
    capture = capture_in(folder, **settings)
    for index in indexes:
        capture.add(str(index), CaptureOrder(index=index), 1)
        step(capture, (index, 1, 0))
    return capture


def test_an_interrupted_capture_goes_on_after_its_finished_shards(tmp_path: Path) -> None:
    """Two prompts to a shard: of five, four are in files when the engine dies; the next one makes the fifth alone."""
    row = 4 * len(LAYERS) * WIDTH
    died = _captured(tmp_path, range(5), shard_bytes=2 * row)
    died.flush()
    (tmp_path / "capture-00002.safetensors").rename(tmp_path / "capture-00002.part")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(before) == 2
    again = _captured(tmp_path, range(5), shard_bytes=2 * row)
    assert again.flush() == 5
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}.items() > before.items()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * 3
    assert CapturedShards(tmp_path).layer(1)[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_folder_of_other_layers_is_not_gone_on_with(tmp_path: Path) -> None:
    """Shards of another kind would be mixed with these."""
    _captured(tmp_path, range(2)).flush()
    with pytest.raises(CaptureError, match="other layers or tokens"):
        capture_in(tmp_path, generated=2)


def test_a_disk_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """The engine goes on; whoever waits for the files hears why there are none."""
    capture = _captured(tmp_path / "gone", range(1))
    (tmp_path / "gone").rmdir()
    with pytest.raises(CaptureError, match="cannot be written"):
        capture.flush()


def test_readers_name_what_is_missing_or_broken(tmp_path: Path) -> None:
    """No shards, an interrupted capture, a layer that was not captured, no generated tokens, a number that is none."""
    with pytest.raises(CaptureError, match="no captured residuals"):
        CapturedShards(tmp_path)
    _captured(tmp_path, range(3)).flush()
    (tmp_path / ASKS).write_text(json.dumps({"identity": {}, "asks": ["a"] * 5}))
    with pytest.raises(CaptureError, match="lacks 2 of 5 asks, the first is 3"):
        CapturedShards(tmp_path)
    (tmp_path / ASKS).unlink()
    shards = CapturedShards(tmp_path)
    with pytest.raises(CaptureError, match="layer 2 was not captured"):
        shards.layer(2)
    with pytest.raises(CaptureError, match="no generated tokens"):
        shards.generated(1)
    capture = capture_in(tmp_path)
    capture.add("5", CaptureOrder(index=3), 1)
    capture.write_step(["5"], np.array([1]), np.array([0]))
    for layer in LAYERS:
        broken = torch.full((1, WIDTH), float("nan"))
        torch.ops.trimtab.capture(broken, broken, capture.slots, capture.kept(layer))
    capture.after_forward()
    capture.flush()
    with pytest.raises(CaptureError, match="1 of 4 residuals at layer 1 are not finite, the first is that of ask 3"):
        CapturedShards(tmp_path).layer(1)


def wish(given: object) -> Any:
    """A request whose extra arguments hold this wish."""
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args={CAPTURE_KEY: given}))


def test_a_wish_is_an_index_and_at_most_where_the_prompt_ends() -> None:
    """Anything else is refused: a request chooses neither layers nor folder."""
    assert capture_of(SimpleNamespace(sampling_params=None)) is None
    assert capture_of(SimpleNamespace(sampling_params=SimpleNamespace(extra_args={"other": 1}))) is None
    assert capture_of(wish(4)) == capture_of(wish([4])) == CaptureOrder(index=4)
    assert capture_of(wish([4, 9])) == CaptureOrder(index=4, prompt_length=9)
    for strange in (True, -1, 1.0, "1", "/tmp", [], [1, 0], [1, 2, 3], [True], {"index": 1}):  # noqa: S108 - a refused path
        with pytest.raises(InvalidSpec):
            capture_of(wish(strange))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_made_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """In bfloat16 256 + 1 is 256; strided halves are read right, and neighbours are left alone."""
    capture = capture_in(tmp_path)
    capture.slots[2], capture.slots[-1] = 5, 1
    hidden = torch.full((4, 3 * WIDTH), 256.0, dtype=dtype)[:, WIDTH : 2 * WIDTH]
    torch.ops.trimtab.capture(hidden, torch.ones(4, WIDTH, dtype=dtype), capture.slots, capture.kept(3))
    assert capture.kept(3)[5].tolist() == [257.0] * WIDTH
    assert capture.kept(3).count_nonzero() == WIDTH
    assert capture.kept(1).count_nonzero() == 0
