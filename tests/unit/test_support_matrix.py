"""The README's support matrix is the list in `tests/support.py`, and its tests and errors exist."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from steering.engine.compat import check_configuration
from steering.errors import UnsupportedConfiguration
from tests.support import ROOT, SUPPORT, known_tests, with_table
from tests.unit.engine.test_compat import NOTHING, configuration

CONFIGURED: dict[str, Any] = {
    "speculative_config": {"speculative_config": SimpleNamespace(method="draft_model")},
    "enable_lora": {"lora_config": SimpleNamespace()},
    "kv_transfer_config": {"kv_transfer_config": SimpleNamespace()},
    "runner": {"runner_type": "pooling"},
    "api_server_count": {"_api_process_count": 2},
}
"""How an option is given to the configuration, where its own name is not how."""


def test_the_readme_has_the_table() -> None:
    """Word for word; `python -m tests.support` writes it."""
    text = (ROOT / "README.md").read_text()
    assert with_table(text) == text


@pytest.mark.parametrize("row", SUPPORT, ids=lambda row: row.feature)
def test_each_row_names_a_test_there_is(row: Any) -> None:
    """In a module of that name under `tests/`."""
    assert row.test in known_tests(row.test.partition("::")[0])


@pytest.mark.parametrize("row", [row for row in SUPPORT if "=" in row.refused], ids=lambda row: row.feature)
def test_each_refusal_is_what_the_check_says(row: Any) -> None:
    """Of the option and value in the row, and of nothing else."""
    option, _, value = row.refused.partition(":")[0].partition("=")
    given: Any = {"True": True}.get(value, int(value) if value.isdigit() else value)
    config = configuration(**CONFIGURED.get(option, {option: given}))
    with pytest.raises(UnsupportedConfiguration) as caught:
        check_configuration(config, NOTHING)
    assert caught.value.message == f"steering does not work with these engine options: {row.refused}"
