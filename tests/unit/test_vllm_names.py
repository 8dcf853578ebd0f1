"""Reading a vLLM's source finds every name that the plugin uses, and says which are not there."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from tests.vllm_names import USED, Missing, imported, missing


def _installed() -> Path:
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parents[1]


def test_the_installed_vllm_has_every_name() -> None:
    """The one that the engine tests run on: the list is true of it, at least."""
    assert missing(_installed()) == []


def test_a_name_that_is_gone_is_told(tmp_path: Path) -> None:
    """An imported function that was renamed, a method, and a module."""
    for module in {*USED, *(each.module for each in imported())}:
        path = Path(*module.split("."))
        folder = path if (_installed() / path).is_dir() else path.parent
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for source in (_installed() / folder).glob("*.py"):
            shutil.copy(source, tmp_path / folder)
    assert missing(tmp_path) == []
    scheduler = tmp_path / "vllm/v1/core/sched/scheduler.py"
    scheduler.write_text(scheduler.read_text().replace("update_from_output", "update_by_output"))
    (tmp_path / "vllm/v1/core/sched/async_scheduler.py").unlink()
    assert missing(tmp_path) == [
        Missing("vllm.v1.core.sched.async_scheduler", "AsyncScheduler"),
        Missing("vllm.v1.core.sched.scheduler", "Scheduler.update_from_output"),
    ]
