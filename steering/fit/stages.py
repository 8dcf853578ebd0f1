"""Named stages of a fit that leave their results as files and are not run again for the same inputs.

Knows nothing of what a stage does, nor of what it depends on: its caller gives one digest of all of that.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

Result = dict[str, Any]


def run_stage(work: Path, name: str, identity: str, make: Callable[[], Result], say: Callable[[str], None]) -> Result:
    """The stage's result: read where it was left under the same identity, else made.

    Args:
        work: folder of `<name>.json` and, where `make` gives `tensors`, `<name>.safetensors`.
        identity: digest of all that the stage depends on.
        make: gives JSON, and optionally `tensors`: a dict of tensors by name.
        say: is told what happens.

    Returns:
        What `make` gave, as JSON has it, with `identity`, `has_tensors` and `digest`, which is that of its content: a
        stage that was made again and came out the same keeps what follows.
    """
    path, tensors_path = work / f"{name}.json", work / f"{name}.safetensors"
    if path.is_file():
        kept: Result = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("identity") == identity and (not kept.get("has_tensors") or tensors_path.is_file()):
            say(f"{name}: kept from {path}")
            return kept
    say(f"{name}: running")
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    found = dict(make())
    tensors: dict[str, Tensor] | None = found.pop("tensors", None)
    digest = hashlib.sha256(json.dumps([identity, found], sort_keys=True).encode())
    if tensors is not None:
        fresh = tensors_path.with_suffix(".part")
        save_file({key: value.contiguous() for key, value in tensors.items()}, fresh)
        digest.update(fresh.read_bytes())
        fresh.replace(tensors_path)
    made = {"identity": identity, "digest": digest.hexdigest(), "has_tensors": tensors is not None, **found}
    say(f"{name}: took {time.monotonic() - started:.1f} s")
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(path)
    # What a later stage reads must be what a resumed run would read: floats and keys as JSON has them.
    result: Result = json.loads(path.read_text(encoding="utf-8"))
    return result


def stage_tensors(work: Path, name: str) -> dict[str, Tensor]:
    """The tensors a stage left."""
    return load_file(work / f"{name}.safetensors")


def draw_stage(path: Path, draw: Callable[[Path], None], *results: Mapping[str, Any]) -> None:
    """Draw a stage's picture, unless it was drawn from the same results."""
    identity = ",".join(str(result.get("digest", "")) for result in results)
    stamp = path.with_suffix(".drawn")
    if not path.is_file() or not stamp.is_file() or stamp.read_text("utf-8") != identity:
        draw(path)
        stamp.write_text(identity, "utf-8")


def plain(value: Any) -> Any:
    """A result without what only resuming needs."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items() if key not in ("identity", "digest", "has_tensors")}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value
