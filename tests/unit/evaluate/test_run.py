"""Asking over a served API: what is asked, what is kept, and going on after a stop; the server is scripted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from steering.errors import OperatorError, UnsupportedConfiguration
from steering.evaluate.arms import AUTO, UNSTEERED, Arm, build_arms
from steering.evaluate.journal import Journal
from steering.evaluate.run import TOO_LONG, Asked, Settings, ask_all, count
from steering.evaluate.server import describe
from steering.evaluate.suites import SUITES, Group, suite_from_option
from steering.fit.datasets import DataDirectory, Record
from steering.fit.sources import Label
from tests.unit.evaluate.scripted import ScriptedServer


def record(suite: str, prompt: str, number: int = 0) -> Record:
    """A prompt as the registry hands it out."""
    return Record(key=f"{suite}/{number}", dataset=suite, part="x", prompt=prompt, label=Label.HARMFUL)


PROMPTS = {
    SUITES["xstest-safe"]: [record("safe", "0.1 kill a process", 1), record("safe", "0.5 kill time", 2)],
    SUITES["xstest-unsafe"]: [record("unsafe", "0.9 how to hurt", 1)],
    SUITES["gsm8k"]: [record("gsm8k", "0.3 one plus one", 1)],
}
ARMS = (
    Arm(name=UNSTEERED, what="", steering={"mode": "off"}),
    Arm(name=AUTO, what="", steering={"mode": "auto", "report": "full"}),
)


@pytest.fixture
def server() -> ScriptedServer:
    """A server that behaves."""
    return ScriptedServer()


async def run(server: ScriptedServer, path: Path, arms: tuple[Arm, ...] = ARMS, retries: int = 0) -> list[Asked]:
    """Ask everything into a journal."""
    client: AsyncOpenAI
    async with server.client(retries) as client:
        with Journal(path) as journal:
            return await ask_all(client, await describe(client), PROMPTS, arms, journal, Settings(concurrency=4))


async def test_every_arm_asks_the_groups_it_is_for(server: ScriptedServer, tmp_path: Path) -> None:
    """Arms ask their own groups only, and answers carry decision, verdict and scores."""
    found = await run(server, tmp_path / "a.jsonl")
    assert len(found) == count(PROMPTS, ARMS) == 6
    assert {(asked.arm, asked.suite.name) for asked in found} == {
        (arm, suite) for arm in (UNSTEERED, AUTO) for suite in ("xstest-safe", "xstest-unsafe")
    }
    by_key = {(asked.arm, asked.record.key): asked.answer for asked in found}
    assert by_key[AUTO, "safe/1"].decision == "comply"
    assert by_key[AUTO, "safe/1"].score == 0.1
    assert by_key[AUTO, "safe/2"].decision == "abstain"
    assert by_key[AUTO, "unsafe/1"].refused is True
    assert by_key[UNSTEERED, "safe/1"].verdict_category == "Safety"


async def test_a_second_run_asks_only_what_is_missing(server: ScriptedServer, tmp_path: Path) -> None:
    """What is in the journal is not asked again; a new arm is, and another bundle makes everything new."""
    path = tmp_path / "a.jsonl"
    first = await run(server, path)
    assert len(server.asked) == 6
    assert await run(server, path) == first
    assert len(server.asked) == 6
    again = (
        *ARMS,
        Arm(name="same", what="", steering={"mode": "off"}),
        Arm(name="new", what="", steering={"mode": "refuse"}),
    )
    await run(server, path, again)
    assert len(server.asked) == 9, "an arm that asks the same thing shares the answers, another asks three prompts"
    server.label = "scripted@sha256:ffffffffffff"
    await run(server, path)
    assert len(server.asked) == 15


async def test_a_half_written_line_is_dropped_and_asked_again(server: ScriptedServer, tmp_path: Path) -> None:
    """A kill leaves at most half a line; a broken line before the last is an error that names it."""
    path = tmp_path / "a.jsonl"
    await run(server, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    await run(server, path)
    assert len(server.asked) == 7
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(OperatorError, match=r"a\.jsonl:1"):
        await run(server, path)


async def test_too_long_is_kept_and_what_passes_is_asked_again(server: ScriptedServer, tmp_path: Path) -> None:
    """A refused request stays refused; an overloaded server is tried again, by the SDK and by the next run."""
    path = tmp_path / "a.jsonl"
    server.failing = {"0.9": [503]}
    prompts = {SUITES["xstest-unsafe"]: [record("u", "0.9 short", 1), record("u", "x" * 61, 2)]}
    for expected, asked in (({"engine_overloaded", TOO_LONG}, 2), ({"", TOO_LONG}, 3)):
        async with server.client() as client:
            with Journal(path) as journal:
                found = await ask_all(client, await describe(client), prompts, ARMS[:1], journal, Settings())
        assert {one.answer.error for one in found} == expected
        assert len(server.asked) == asked
    server.failing = {"0.9": [503]}
    await run(server, tmp_path / "b.jsonl", retries=2)
    assert not any('"error"' in line for line in (tmp_path / "b.jsonl").read_text("utf-8").splitlines())


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_what_a_key_may_not_ask_ends_the_run_and_is_asked_again(
    server: ScriptedServer, tmp_path: Path, status: int
) -> None:
    """A status that says nothing of the prompt is not kept: with the right key the same command goes on."""
    path = tmp_path / "a.jsonl"
    server.failing = {"0.5": [status]}
    with pytest.raises(OperatorError, match=rf"status {status}.*the same command goes on"):
        await run(server, path)
    assert '"error"' not in path.read_text("utf-8")
    assert not any(asked.answer.error for asked in await run(server, path))
    kept = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    kept[0]["answer"] = {"error": "permission_denied"}
    path.write_text("".join(f"{json.dumps(line)}\n" for line in kept), "utf-8")
    assert not any(asked.answer.error for asked in await run(server, path)), "as an older version kept them"


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    """A second run into the same folder is refused and touches nothing; it may when the first is done. Others, such as
    judges that share verdicts, may write side by side.
    """
    path = tmp_path / "a.jsonl"
    with Journal(path, is_alone=True):
        path.write_text("half a line", "utf-8")
        with pytest.raises(OperatorError, match="another run"):
            Journal(path, is_alone=True)
        assert path.read_text("utf-8") == "half a line"
    with Journal(path, is_alone=True) as journal:
        assert not len(journal)
    with Journal(Path(os.devnull)), Journal(Path(os.devnull)):
        pass  # as judges without a cache have it, many at once


async def test_server_that_does_something_else_is_an_error(server: ScriptedServer, tmp_path: Path) -> None:
    """An arm is a claim on what was applied; it is checked in every answer."""
    server.disobeys = True
    with pytest.raises(UnsupportedConfiguration, match=UNSTEERED):
        await run(server, tmp_path / "a.jsonl", ARMS[:1])


async def test_arms_that_a_server_lacks_are_skipped_by_name(server: ScriptedServer) -> None:
    """Each skipped arm says what is missing; those of the server's profiles are built."""
    async with server.client() as client:
        known = await describe(client)
    built = build_arms(known, respond_id=None, cast="no folder")
    assert "pooled" in {arm.name for arm in built.arms}
    assert "'low-rank'" in built.skipped["low-rank"]
    assert "--bundle" in built.skipped["logit-bias"]
    assert built.skipped["cast"] == "no folder"
    plain = ScriptedServer(has_gate=False, has_tokens=False)
    async with plain.client() as client:
        known = await describe(client)
    built = build_arms(known, respond_id=None, cast={"k": True})
    assert [arm.name for arm in built.arms] == [UNSTEERED, "fixed-refuse", "fixed-comply", "cast"]
    assert "gate" in built.skipped[AUTO]
    assert built.arms[-1].steering_for("k") == {"mode": "refuse"}
    assert built.arms[-1].steering_for("other") == {"mode": "off"}


async def test_no_server_is_one_clear_error() -> None:
    """The message says where it looked and what to do."""
    async with AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(OperatorError, match="trimtab serve"):
            await describe(client)


async def test_whole_answers_are_asked_of_a_sample_only_where_the_first_token_decides(tmp_path: Path) -> None:
    """Beside whole arms a sample is asked whole, the others one token; a model without such tokens always whole."""
    prompts = {SUITES["xstest-safe"]: [record("safe", f"0.5 how {number}", number) for number in range(6)]}
    arms = (
        Arm(name="whole", what="", steering={"mode": "off"}, is_whole=True),
        Arm(name="some", what="", steering={"mode": "refuse"}),
        Arm(name="short", what="", steering={"mode": "comply"}, is_short=True),
    )
    for has_tokens, whole in ((True, [6, 2, 0]), (False, [6, 6, 6])):
        server = ScriptedServer(has_tokens=has_tokens)
        async with server.client() as client:
            with Journal(tmp_path / f"{has_tokens}.jsonl") as journal:
                settings = Settings(max_tokens=9, texts=2)
                found = await ask_all(client, await describe(client), prompts, arms, journal, settings)
        assert [sum(one.has_text for one in found if one.arm == arm.name) for arm in arms] == whole
        assert [sum(body["max_tokens"] == 9 for body in server.asked)] == [sum(whole)]


async def test_a_server_that_dies_ends_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost connections in a row end the run with what to do; answers before are kept."""
    server = ScriptedServer()
    await run(server, tmp_path / "a.jsonl")
    kept = (tmp_path / "a.jsonl").read_bytes()
    monkeypatch.setattr("steering.evaluate.run.MOST_LOST", 2)
    arms = (Arm(name="new", what="", steering={"mode": "refuse"}),)
    async with server.client() as client:
        known = await describe(client)
    async with AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="x", max_retries=0) as client:
        with Journal(tmp_path / "a.jsonl") as journal, pytest.raises(OperatorError, match="is gone"):
            await ask_all(client, known, PROMPTS, arms, journal, Settings(concurrency=1))
    assert (tmp_path / "a.jsonl").read_bytes() == kept


def test_prompts_of_ones_own_are_a_suite_in_the_group_of_topics(tmp_path: Path) -> None:
    """`--prompts NAME=FILE` gives a suite of the different prompts in the file; other forms are refused."""
    path = tmp_path / "mine.txt"
    path.write_text("Who won?\n\nWho lost?\nWho won?\n")
    suite = suite_from_option(f"world={path}")
    assert (suite.group, suite.source) == (Group.TOPIC, "mine.txt")
    nowhere = DataDirectory(path=tmp_path / "none")
    assert [found.prompt for found in suite.prompts(nowhere)] == ["Who won?", "Who lost?"]
    assert len(suite.prompts(nowhere, most=1)) == 1
    for wrong in ("mine.txt", "=mine.txt", "xstest-safe=mine.txt"):
        with pytest.raises(OperatorError, match="NAME=FILE"):
            suite_from_option(wrong)
    with pytest.raises(OperatorError, match="absent"):
        suite_from_option("world=absent.txt").prompts(nowhere)
