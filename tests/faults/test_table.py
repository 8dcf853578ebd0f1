"""The tables of limits, bad inputs and faults, and the test that stands for each line of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
BAD = "faults/test_bad_inputs.py::test_bad_body_is_answered"
GRAMMARS = "integration/test_gateway_grammars.py::test_a_costly_schema_is_answered_and_so_is_everyone_else"
HARMLESS = "faults/test_bad_inputs.py::test_harmless_body_is_answered"
ADMISSION = "unit/server/test_admission.py"
DRAIN = "unit/server/test_drain.py"
PROCESS, OPERATIONS = "integration/test_gateway_process.py", "integration/test_gateway_operations.py"
INPUTS, FAULTS, MACHINE = "faults/test_bad_inputs.py", "faults/test_faults.py", "faults/test_machine.py"

LIMITS = {
    "body, counted while reading": [f"{BAD}[a body over 2 MB]", f"{INPUTS}::test_content_length_over_the_cap"],
    "headers: bytes and fields": [f"{INPUTS}::test_headers_without_end"],
    "Content-Encoding": [f"{INPUTS}::test_content_encoding"],
    "messages and prompts in one request": [f"{BAD}[2,049 messages]", f"{BAD}[65 prompts]"],
    "n and best_of": [f"{BAD}[n 9]", f"{BAD}[n 9 of a prompt]", f"{BAD}[129 answers]", f"{BAD}[best_of]"],
    "stop": [f"{BAD}[5 stops]", f"{BAD}[a stop of 257 characters]", f"{BAD}[an empty stop]"],
    "top_logprobs": [f"{BAD}[top_logprobs 21]", f"{BAD}[logprobs 21]"],
    "logit_bias: entries, ids in the vocabulary": [
        f"{BAD}[301 biases]",
        "integration/test_gateway.py::test_callers_faults_are_the_sdks_bad_request",
    ],
    "tools and schemas": [
        f"{BAD}[129 tools]",
        f"{BAD}[a schema over 64 KB]",
        f"{BAD}[a schema 40 levels deep]",
        f"{BAD}[long pattern]",
    ],
    "max_tokens by key, always sent to the engine": [
        f"{ADMISSION}::test_an_answer_is_no_longer_than_the_key_allows",
        f"{ADMISSION}::test_a_key_that_allows_more_than_the_context_can_be_used",
        f"{ADMISSION}::test_a_completion_without_a_length_gets_openais_unless_the_key_allows_less",
        "unit/server/test_chat.py::test_the_engine_is_always_told_how_long_an_answer_may_be",
    ],
    "the gateway's requests at once": [
        f"{FAULTS}::test_more_requests_than_places",
        f"{FAULTS}::test_more_prompts_than_places",
    ],
    "the engine's queue": [f"{FAULTS}::test_engine_without_room"],
    "time for a body": [f"{INPUTS}::test_slow_body"],
    "time for a first token": [f"{FAULTS}::test_engine_that_hangs_before_the_first_byte"],
    "time between chunks": [f"{FAULTS}::test_engine_that_hangs_in_mid_stream"],
    "time in all": [f"{FAULTS}::test_engine_that_never_ends"],
    "keep-alive": [f"{INPUTS}::test_keep_alive_outlasts_the_proxy_in_front"],
    "request id": [f"{INPUTS}::test_request_id_cannot_forge_a_log_line"],
}

BAD_INPUTS = {
    "NaN, Infinity, 1e400": [
        f"{BAD}[NaN for a float]",
        f"{BAD}[Infinity for a float]",
        f"{BAD}[1e400 for a float]",
    ],
    'true or "3" for an int': [f"{BAD}[true for an int]", f'{BAD}["3" for an int]'],
    "lone surrogate": [f"{BAD}[lone surrogate]"],
    "NUL in a string": [f"{BAD}[NUL in a string]"],
    "duplicate keys": [f"{HARMLESS}[duplicate keys]"],
    "5,000-digit integer": [f"{BAD}[5,000-digit integer]"],
    "10,000 nested brackets": [f"{BAD}[10,000 nested brackets]"],
    "invalid UTF-8": [f"{BAD}[invalid UTF-8]"],
    "wrong content type": [f"{INPUTS}::test_wrong_content_type"],
    "empty body": [f"{BAD}[empty body]"],
    "body shorter than Content-Length": [f"{INPUTS}::test_body_shorter_than_content_length"],
    "slow body": [f"{INPUTS}::test_slow_body"],
    "pipelined requests": [f"{INPUTS}::test_pipelined_requests"],
    "Host header": [f"{INPUTS}::test_host_header_changes_no_path"],
    "//, /../, %2e%2e": [f"{INPUTS}::test_path_tricks"],
    "unknown steering keys": [f"{BAD}[unknown steering key]"],
    "category in another case or with a NUL": [f"{BAD}[category in another case]", f"{BAD}[category with a NUL]"],
    "coefficient NaN, -0.0, 1e308": [f"{BAD}[strength NaN]", f"{BAD}[strength -0.0]", f"{BAD}[strength 1e308]"],
    "profile ../../etc/passwd": [f"{BAD}[profile ../../etc/passwd]"],
    "10 MB system prompt": [f"{BAD}[10 MB system prompt]"],
    "prompt of one token": [f"{HARMLESS}[prompt of one token]"],
    "empty messages": [f"{BAD}[empty messages]"],
    "only an assistant message": [f"{HARMLESS}[only an assistant message]"],
    "role tool with no call": [f"{BAD}[role tool with no call]"],
    "special tokens in user content": [f"{HARMLESS}[special tokens in user content]"],
    "right-to-left and zero-width text": [f"{HARMLESS}[right-to-left text]", f"{HARMLESS}[zero-width text]"],
    "max_tokens 0, -1, 2^63": [f"{BAD}[max_tokens 0]", f"{BAD}[max_tokens -1]", f"{BAD}[max_tokens 2^63]"],
    "n 0": [f"{BAD}[n 0]"],
    "both max_tokens and max_completion_tokens": [f"{BAD}[both max_tokens and max_completion_tokens]"],
    "fields of the engine": [f"{INPUTS}::test_field_of_the_engine_is_refused"],
    "two requests with one request id": [f"{INPUTS}::test_two_requests_with_one_request_id"],
    "recursive $ref": [
        f"{BAD}[recursive $ref]",
        f"{HARMLESS}[recursive but finite schema]",
        f"{GRAMMARS}[recursive but finite schema]",
    ],
    "catastrophic regex in pattern": [
        f"{HARMLESS}[catastrophic pattern]",
        f"{BAD}[long pattern]",
        f"{GRAMMARS}[catastrophic pattern]",
        f"{GRAMMARS}[nested repeats]",
    ],
}

INJECTED = {
    "engine refuses or fails before bytes": [
        f"{FAULTS}::test_engine_that_fails_before_the_first_byte",
        f"{FAULTS}::test_engine_without_room",
        f"{FAULTS}::test_engine_that_breaks_before_the_first_token",
    ],
    "engine hangs before the first byte": [f"{FAULTS}::test_engine_that_hangs_before_the_first_byte"],
    "engine hangs in mid-stream": [f"{FAULTS}::test_engine_that_hangs_in_mid_stream"],
    "engine cuts, sends nonsense, omits the end": [
        f"{FAULTS}::test_engine_that_breaks_in_mid_stream",
        f"{FAULTS}::test_failures_are_counted",
    ],
    "client leaves in each phase": [
        f"{FAULTS}::test_client_that_leaves",
        f"{FAULTS}::test_client_that_is_reset",
        f"{FAULTS}::test_client_that_leaves_while_its_body_is_read",
        f"{OPERATIONS}::test_clients_that_leave_in_any_phase_free_the_engine",
        f"{OPERATIONS}::test_a_client_that_leaves_the_queue_frees_its_place",
    ],
    "slow reader": [
        f"{FAULTS}::test_readers_that_do_not_read",
        "unit/server/test_connections.py::test_peers_that_do_not_read_are_cut_off",
    ],
    "probe raises, returns NaN, takes too long": [
        f"{FAULTS}::test_engine_that_fails_before_the_first_byte",
        f"{FAULTS}::test_probe_that_reads_no_number",
        f"{FAULTS}::test_probe_that_takes_too_long",
    ],
    "steering slots exhausted": [f"{FAULTS}::test_engine_without_room"],
    "vector file changed, wrong model, wrong hash": [
        f"{PROCESS}::test_bundle_of_another_model_is_refused",
        f"{PROCESS}::test_damaged_bundle_and_missing_folders_are_refused",
        f"{OPERATIONS}::test_a_damaged_bundle_changes_nothing",
    ],
    "engine process killed": [
        f"{PROCESS}::test_death_of_the_engine_ends_the_server",
        "unit/server/test_heartbeat.py::test_a_beat_that_fails_ends_readiness_and_three_end_the_server",
    ],
    "SIGTERM with 50 streams": [
        f"{DRAIN}::test_fifty_streams_finish_before_the_end",
        f"{DRAIN}::test_what_outlasts_the_grace_is_told",
        f"{PROCESS}::test_sigterm_lets_streams_finish",
    ],
    "second SIGTERM": [f"{DRAIN}::test_told_twice_it_ends_at_once"],
    "SIGTERM while loading": [f"{PROCESS}::test_told_to_end_while_loading_it_ends"],
    "prefix-cache clash": [
        "integration/engine/test_prefix_cache.py::test_each_answer_is_that_of_an_engine_without_prefix_caching"
    ],
    "batch neighbour": [
        "integration/engine/test_mixed_batch.py::test_each_request_gets_the_tokens_it_gets_alone",
        "integration/test_gateway_clients.py::test_one_steered_among_63_changes_none_of_them",
    ],
    "metrics scrape during load": [f"{FAULTS}::test_scrapes_during_load"],
    "disk full": [
        f"{MACHINE}::test_log_cannot_be_written",
        "unit/server/test_audit.py::test_what_cannot_be_put_on_record_is_not_done_and_all_else_is",
    ],
    "clock step": [f"{MACHINE}::test_clock_step"],
    "DNS gone": [f"{MACHINE}::test_names_cannot_be_resolved"],
}


@pytest.mark.parametrize("table", [LIMITS, BAD_INPUTS, INJECTED], ids=["limits", "bad inputs", "faults"])
def test_each_line_has_its_test(table: dict[str, list[str]]) -> None:
    """Every test that a table names is there; a test that was renamed leaves no line without proof."""
    for line, tests in table.items():
        assert tests, line
        for test in tests:
            path, _, name = test.partition("::")
            name, _, case = name.partition("[")
            source = (TESTS / path).read_text(encoding="utf-8")
            assert name in names_in(source), f"{line}: no {test}"
            assert not case or repr_of(case.removesuffix("]")) in source, f"{line}: no case {test}"


def names_in(source: str) -> set[str]:
    """Names of all functions of a module."""
    return {
        node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def repr_of(case: str) -> str:
    """A case's name as the key of a dictionary that the formatter has seen."""
    return f"'{case}':" if '"' in case else f'"{case}":'
