"""What every test run needs: an offline environment, the data directory, markers by folder.

Knows nothing of any package under test.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
FOLDER_MARKERS = {"integration": "integration", "gpu": "gpu"}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # a test that would download something fails at once instead of waiting
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM's default takes half of a small machine
    "TOKENIZERS_PARALLELISM": "false",  # tokenizers' threads and fork do not mix
    # Tests run side by side, and their models are tiny: threads of several processes that wait for each other by
    # spinning on the same cores take ten times as long.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}


def pytest_configure() -> None:
    """Set what vLLM and transformers read from the environment when they are imported; the caller's values win."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by folder and skip, with the reason, those whose data or device is not here."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if folder in FOLDER_MARKERS:
            item.add_marker(FOLDER_MARKERS[folder])
        if item.get_closest_marker("needs_data") and _data_directory() is None:
            item.add_marker(pytest.mark.skip(reason="needs the data directory: set TRIMTAB_DATA"))
        if item.get_closest_marker("gpu") and not _cuda_is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def data_directory() -> Path:
    """The directory with the refusal data sets; the test that asks for it is skipped, by name, when it is not there."""
    directory = _data_directory()
    if directory is None:
        pytest.skip("needs the data directory: set TRIMTAB_DATA")
    return directory


def _data_directory() -> Path | None:
    """`$TRIMTAB_DATA` if set, None if not; a value that names no directory is a mistake, not an absence."""
    value = os.environ.get("TRIMTAB_DATA")
    if not value:
        return None
    directory = Path(value)
    if not directory.is_dir():
        raise pytest.UsageError(f"TRIMTAB_DATA={value!r} is not a directory")
    return directory


@functools.cache
def _cuda_is_available() -> bool:
    """Whether torch sees a CUDA device; asked only when a test needs one, since importing torch takes seconds."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
