"""The log tells of every request in one line, for people or for machines, and never what was asked or answered."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.observe.log import LOGGERS, JsonLines, LogFormat, TextLines, configure_log
from steering.errors import EngineError
from tests.fakes import MODEL, FakeEngine, make_catalog, make_gated_bundle, read
from tests.unit.server.conftest import Make, Spoken


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What is logged as JSON."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    loggers = [logging.getLogger(name) for name, _ in LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger, (_, level) in zip(loggers, LOGGERS, strict=True):
        logger.addHandler(handler)
        logger.setLevel(level)
    yield stream
    for logger, (level, propagate) in zip(loggers, before, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def read_lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """Every line is one object."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def quoting() -> None:
    """Raise an exception whose words quote a prompt, caused by another."""
    empty: dict[str, str] = {}
    try:
        empty["sesame"]
    except KeyError as error:
        raise ValueError("sesame") from error


async def test_one_line_tells_of_a_request(make: Make, lines: io.StringIO) -> None:
    """Ids, key, profile, decision, verdict, tokens and timings; scores only where that is set."""
    spoken = make(FakeEngine(scores=[read(0.95)]), make_catalog(make_gated_bundle()))
    response = await spoken.client.post(
        "/v1/chat/completions",
        json={"model": MODEL, "messages": [{"role": "user", "content": "sesame"}], "stream": True},
        headers={"X-Request-Id": "abc-1", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"},
    )
    (line,) = read_lines(lines)
    expected = {
        "level": "info",
        "logger": "trimtab",
        "event": "request",
        "id": response.headers["x-request-id"],
        "client_id": "abc-1",
        "trace_id": "a" * 32,
        "key": "local",
        "endpoint": "/v1/chat/completions",
        "status": 200,
        "error": None,
        "model": MODEL,
        "profile": "refusal-control",
        "mode": "enforce",
        "decision": "refuse",
        "category": "Safety",
        "steered": True,
        "edit": "refuse-safety",
        "strength": 1.0,
        "verdict": "refusal",
        "detector": "refusal_token",
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "cached_tokens": 0,
        "complete": True,
    }
    assert expected.items() <= line.items()
    assert line["bundle"].startswith("gated-bundle@sha256:")
    assert line["seconds"] >= line["first_token_seconds"] >= 0
    assert {"auth", "body", "parse", "resolve", "first_token", "confirm"} <= line["stages_ms"].keys()
    assert "refusal_score" not in line


async def test_scores_are_told_where_that_is_set(make: Make, lines: io.StringIO) -> None:
    """The refusal probability and the two likeliest categories."""
    spoken = make(FakeEngine(scores=[read(0.95)]), make_catalog(make_gated_bundle()), log_scores=True)
    await spoken.chat()
    (line,) = read_lines(lines)
    assert (line["refusal_score"], line["category_scores"]) == (0.95, {"Safety": 0.7, "Political": 0.3})


async def test_errors_have_their_code(make: Make, lines: io.StringIO) -> None:
    """Those of a stream that had begun as well, whose status was sent long before."""
    spoken = make(FakeEngine(fails=EngineError("sesame"), fails_after=2))
    await spoken.chat(stream=True)
    await spoken.chat(steering={"profile": "evil"})
    await spoken.client.get("/evil")
    told = [(line["status"], line["error"]) for line in read_lines(lines) if line.get("event")]
    assert told == [(200, "engine_error"), (400, "steering_unknown_name"), (404, "not_found")]
    assert spoken.gateway.metrics.errors.labels("engine_error")._value.get() == 1


async def test_a_bug_is_logged_by_its_frames_and_not_by_its_words(lines: io.StringIO, make: Make) -> None:
    """An exception that nobody raised on purpose may quote a prompt: type and frames have to do."""
    try:
        quoting()
    except ValueError:
        logging.getLogger("trimtab").exception("a stream broke")
    (line,) = read_lines(lines)
    assert line["message"] == "a stream broke"
    assert "builtins.ValueError" in line["exception"]
    assert "builtins.KeyError" in line["exception"]
    assert "test_log.py" in line["exception"]
    assert "sesame" not in lines.getvalue()


@pytest.mark.parametrize("form", list(LogFormat))
def test_lines_have_the_form_that_is_set(form: LogFormat, capsys: pytest.CaptureFixture[str]) -> None:
    """Once each, however often the log is configured."""
    loggers = [logging.getLogger(name) for name, _ in LOGGERS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    try:
        configure_log(form)
        configure_log(form)
        logging.getLogger("trimtab").info("hello")
        try:
            quoting()
        except ValueError:
            logging.getLogger("trimtab").exception("broken")
        said = capsys.readouterr().err
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.level, logger.propagate = handlers, level, propagate
    assert said.count("hello") == 1
    assert "sesame" not in said
    assert "builtins.ValueError" in said
    if form is LogFormat.JSON:
        assert all("message" in json.loads(line) for line in said.splitlines())


def test_text_lines_are_what_people_read() -> None:
    """Time, level, logger and message."""
    record = logging.LogRecord("trimtab", logging.INFO, "", 0, "request %s", ("x",), None)
    assert TextLines().format(record).endswith("INFO trimtab request x")


ELSEWHERE: dict[str, Callable[[str], dict[str, Any]]] = {
    "profile": lambda text: {"steering": {"profile": text}},
    "category": lambda text: {"steering": {"category": text}},
    "mode": lambda text: {"steering": {"mode": text}},
    "model": lambda text: {"model": text},
    "user": lambda text: {"user": text},
    "stop": lambda text: {"stop": [text]},
    "tools": lambda text: {"tools": [{"type": "function", "function": {"name": "f", "description": text}}]},
    "cache_salt": lambda text: {"cache_salt": text},
}
"""Where else in a request a text may stand."""


@pytest.fixture
def spoken(make: Make) -> Spoken:
    """A gated gateway that logs scores."""
    return make(FakeEngine(scores=[read(0.95)]), make_catalog(make_gated_bundle()), log_scores=True)


SECRETS = st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=6, max_size=20)
"""Words that occur nowhere else."""


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=SECRETS,
    said=SECRETS,
    system=SECRETS,
    field=st.sampled_from(["none", *ELSEWHERE, "unknown", "header"]),
    is_stream=st.booleans(),
    fault=st.sampled_from(["none", "engine", "bug", "unconfirmed"]),
)
async def test_nothing_that_anyone_wrote_is_in_a_log_line_or_a_metric(
    spoken: Spoken,
    lines: io.StringIO,
    prompt: str,
    said: str,
    system: str,
    field: str,
    is_stream: bool,
    fault: str,
) -> None:
    """Whatever is asked, answered, misspelt or broken, and wherever in the request it stands."""
    lines.truncate(lines.seek(0))
    engine = spoken.gateway.engine
    assert isinstance(engine, FakeEngine)
    faults: dict[str, Exception] = {"engine": EngineError(f"could not do {prompt}"), "bug": KeyError(prompt)}
    engine.words, engine.confirms, engine.fails = [said], fault != "unconfirmed", faults.get(fault)
    engine.fails_after = 1
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": prompt}],
        "stream": is_stream,
    }
    if field in ELSEWHERE:
        body |= ELSEWHERE[field](prompt)
    elif field == "unknown":
        body[prompt] = prompt
    headers = {"authorization": "Bearer sk-sesame", "x-request-id": "x"}
    if field == "header":
        headers |= {"x-request-id": "a b", "traceparent": "sesame", "user-agent": "sesame"}
    with contextlib.suppress(KeyError):  # the transport raises what a server would log
        await spoken.client.post("/v1/chat/completions", json=body, headers=headers)
    logged = lines.getvalue() + (await spoken.admin.get("/metrics")).text
    assert logged.count('"event":"request"') == 1
    for text in (prompt, said, system):
        assert text not in logged
        assert json.dumps(text).strip('"') not in logged
    assert "sesame" not in logged
    assert len(spoken.gateway.observation.ledger) == 0


async def test_lines_of_one_prompt_have_one_keyed_hash(make: Make, lines: io.StringIO, tmp_path: Path) -> None:
    """The audit's own, and only where its secret is; requests that reach no engine have none."""
    for settings_ in ({}, {"audit_log": tmp_path / "audit.jsonl"}):
        spoken = make(**settings_)
        for content in ("sesame", "sesame", "other", 5):
            await spoken.client.post(
                "/v1/chat/completions", json={"model": MODEL, "messages": [{"role": "user", "content": content}]}
            )
    told = read_lines(lines)
    assert not any("prompt_hmac" in line for line in told[:4])
    first, second, other, refused = told[4:]
    assert spoken.gateway.audit is not None
    expected = spoken.gateway.audit.hash_of([{"role": "user", "content": "sesame"}])
    assert first["prompt_hmac"] == second["prompt_hmac"] == expected
    assert other["prompt_hmac"] != expected
    assert "prompt_hmac" not in refused
    assert "sesame" not in lines.getvalue()
