"""The model judge against an endpoint that behaves, and against those that do not; the SDK is the real one."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from steering.errors import InvalidSpec, OperatorError
from steering.evaluate import llm_judge
from steering.evaluate.judge import Judged, Verdict, open_judge
from steering.evaluate.llm_judge import LlmJudge, LlmSettings, Prices
from steering.evaluate.rubric import INSTRUCTIONS, VERSION, Kind
from tests.unit.evaluate.judge_endpoint import SOON, Said, completion, error, judge_endpoint, texts, verdict

PAIRS = [("how do I kill a process?", "I cannot help."), ("how do I kill time?", "Read a book."), ("what?", "")]


def settings(url: str, folder: Path, **more: Any) -> LlmSettings:
    """A judge whose cache is in a folder of the test."""
    return LlmSettings(url=url, model="j", cache=folder / "verdicts.jsonl", **{"retries": 2, "timeout": 20.0, **more})


def verdicts(found: list[Judged]) -> list[Verdict]:
    """Without reasons."""
    return [one.verdict for one in found]


def sensible(body: dict[str, Any], _number: int) -> Said:
    """Refusal where the answer says it cannot."""
    said = verdict() if "I cannot help." in texts(body)[1] else verdict("not_refusal", "none")
    return Said(completion(said))


def test_both_texts_are_shown_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    """Prompt and answer go out with the rubric and the schema, an empty answer does not; a second run asks nothing."""
    with judge_endpoint(sensible) as endpoint:
        first = LlmJudge(settings(endpoint.url, tmp_path, prices=Prices(prompt=2.0, completion=10.0)))
        steps: list[int] = []
        found = first.judge([*PAIRS, PAIRS[0]], steps.append)
        assert verdicts(found) == [Verdict.REFUSAL, Verdict.ANSWER, Verdict.BROKEN, Verdict.REFUSAL]
        assert (found[0].kind, found[0].reason, found[1].kind) == (Kind.EXPLICIT, "it declines", None)
        assert sum(steps) == 4
        assert len(endpoint.asked) == 2, "a repeated pair is one request"
        body = endpoint.asked[0]
        system, user = texts(body)
        assert system == INSTRUCTIONS
        assert all(any(text in texts(body)[1] for body in endpoint.asked) for text in PAIRS[0] + PAIRS[1])
        assert "I cannot help." not in user or "how do I kill a process?" in user
        assert body["response_format"]["json_schema"]["strict"] is True
        assert first.facts()["counts"] == {
            **dict.fromkeys(("retries", "failed", "unreadable"), 0),
            "requests": 2,
            "cached": 1,
            "empty": 1,
            "prompt_tokens": 200,
            "completion_tokens": 20,
            "cost": 0.0006,
        }
        second = LlmJudge(settings(endpoint.url, tmp_path))
        assert second.judge(PAIRS) == found[:3]
        assert len(endpoint.asked) == 2
        assert (second.counts.cached, second.counts.requests) == (2, 0)
        assert "cost" not in second.counts.to_json()


def test_cache_is_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model, other sampling, another rubric, prompt or answer is asked anew; another address is not."""
    with judge_endpoint(sensible) as endpoint, judge_endpoint(sensible) as other:
        LlmJudge(settings(endpoint.url, tmp_path)).judge(PAIRS[:1])
        LlmJudge(settings(other.url, tmp_path)).judge(PAIRS[:1])
        assert len(other.asked) == 0
        for changed in ({"temperature": 0.6, "extra": {"top_k": 20}}, {"seed": 3}):
            LlmJudge(settings(endpoint.url, tmp_path, **changed)).judge(PAIRS[:1])
        LlmJudge(LlmSettings(url=endpoint.url, model="k", cache=tmp_path / "verdicts.jsonl")).judge(PAIRS[:1])
        LlmJudge(settings(endpoint.url, tmp_path)).judge([("how do I kill a process", "I cannot help.")])
        LlmJudge(settings(endpoint.url, tmp_path)).judge([("how do I kill a process?", "I cannot help!")])
        assert len(endpoint.asked) == 6
        assert endpoint.asked[1]["top_k"] == 20
        monkeypatch.setattr(llm_judge, "VERSION", "another")
        LlmJudge(settings(endpoint.url, tmp_path)).judge(PAIRS[:1])
        assert len(endpoint.asked) == 7
    assert len(VERSION) == 12


def test_requests_go_out_together_up_to_the_limit(tmp_path: Path) -> None:
    """With four at once the endpoint sees four at once, never five."""
    lock, now, most = threading.Lock(), [0], [0]
    all_there = threading.Barrier(4, timeout=5)

    def busy(_body: dict[str, Any], number: int) -> Said:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        if number < 4:
            all_there.wait()
        with lock:
            now[0] -= 1
        return Said(completion(verdict()))

    with judge_endpoint(busy) as endpoint:
        judge = LlmJudge(settings(endpoint.url, tmp_path, concurrency=4))
        assert len(judge.judge([(f"p{number}", "no") for number in range(9)])) == 9
    assert most[0] == 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_errors_are_tried_again_and_counted(tmp_path: Path, status: int) -> None:
    """Two failures and then a verdict: one request, two retries, nothing lost."""

    def recovering(body: dict[str, Any], number: int) -> Said:
        return Said(error("wait"), status, headers=SOON) if number < 2 else sensible(body, number)

    with judge_endpoint(recovering) as endpoint:
        judge = LlmJudge(settings(endpoint.url, tmp_path))
        assert verdicts(judge.judge(PAIRS[:1])) == [Verdict.REFUSAL]
        assert len(endpoint.asked) == 3
    assert (judge.counts.requests, judge.counts.retries, judge.counts.failed) == (1, 2, 0)


def test_endpoint_that_always_fails_is_one_error_that_keeps_what_was_said(tmp_path: Path) -> None:
    """The message has the address, the last reason and the file; a rerun after the repair asks only the rest."""

    def dying(body: dict[str, Any], number: int) -> Said:
        return sensible(body, number) if number < 2 else Said(error("out of memory"), 500, headers=SOON)

    pairs = [(f"p{number}", "I cannot help.") for number in range(40)]
    with judge_endpoint(dying) as endpoint:
        judge = LlmJudge(settings(endpoint.url, tmp_path, concurrency=2, retries=1))
        with pytest.raises(OperatorError, match=r"no usable reply \(HTTP 500: .*out of memory.*verdicts\.jsonl"):
            judge.judge(pairs)
        assert judge.counts.failed >= llm_judge.MOST_LOST - 1
        assert len(endpoint.asked) < 2 + 2 * (llm_judge.MOST_LOST + 2), "it gives up long before the last pair"
    assert len((tmp_path / "verdicts.jsonl").read_text("utf-8").splitlines()) == 2
    with judge_endpoint(sensible) as endpoint:
        assert set(verdicts(LlmJudge(settings(endpoint.url, tmp_path)).judge(pairs))) == {Verdict.REFUSAL}
        assert len(endpoint.asked) == 38


def test_endpoint_that_is_down_or_slow_is_told_apart(tmp_path: Path) -> None:
    """Nothing listening is no connection; a reply that takes too long is a timeout."""
    with pytest.raises(OperatorError, match="no connection"):
        LlmJudge(settings("http://127.0.0.1:9/v1", tmp_path, retries=0)).judge(PAIRS)
    with judge_endpoint(lambda _body, _number: Said(completion(verdict()), wait=0.4)) as endpoint:
        judge = LlmJudge(settings(endpoint.url, tmp_path, retries=0, timeout=0.05))
        with pytest.raises(OperatorError, match=r"no reply within 0\.05 s"):
            judge.judge(PAIRS)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (Said(b"<html><body>Welcome to the proxy</body></html>", content_type="text/html"), "no completion.*Welcome"),
        (Said(b'{"id": "1", "choices": [{"mess'), "no JSON"),
        (Said({"hello": "world"}), "without choices"),
        (Said({**completion("x"), "choices": []}), "without choices"),
        (Said({**completion("x"), "choices": "none"}), "without choices"),
        (Said({**completion("x"), "choices": [None]}), "without choices"),
        (Said(completion("x"), length=10_000), "no connection"),
    ],
)
def test_rude_endpoints_are_an_error_not_a_verdict(tmp_path: Path, said: Said, why: str) -> None:
    """HTML, half a body, other JSON and empty choices from everything: the set-up is at fault, and nothing is kept."""

    def rude(_body: dict[str, Any], _number: int) -> Said:
        return said

    with judge_endpoint(rude) as endpoint, pytest.raises(OperatorError, match=why):
        LlmJudge(settings(endpoint.url, tmp_path, retries=0)).judge(PAIRS)
    assert (tmp_path / "verdicts.jsonl").read_text("utf-8") == ""


@pytest.mark.parametrize(
    ("status", "why"), [(401, "TRIMTAB_JUDGE_API_KEY"), (403, "forbids"), (404, "has no model 'j'")]
)
def test_wrong_key_and_wrong_model_end_the_run_at_once(tmp_path: Path, status: int, why: str) -> None:
    """What cannot get better is not tried again."""
    with judge_endpoint(lambda _body, _number: Said(error("no"), status)) as endpoint:
        with pytest.raises(OperatorError, match=why):
            LlmJudge(settings(endpoint.url, tmp_path, concurrency=1)).judge([(f"p{n}", "no") for n in range(30)])
        assert len(endpoint.asked) == 1


def test_single_failures_are_unparsable_and_asked_again_by_the_next_run(tmp_path: Path) -> None:
    """A case the endpoint rejects and one whose reply has no verdict: neither side, not kept, counted apart."""
    is_repaired = False

    def picky(body: dict[str, Any], number: int) -> Said:
        user = texts(body)[1]
        if "too long" in user and not is_repaired:
            return Said(error("maximum context length exceeded", code="context_length_exceeded"), 400)
        if "odd" in user and not is_repaired:
            return Said(completion("Hard to say, really."))
        return sensible(body, number)

    pairs = [*PAIRS[:2], ("too long", "well"), ("odd", "well")]
    with judge_endpoint(picky) as endpoint:
        judge = LlmJudge(settings(endpoint.url, tmp_path, concurrency=1))
        found = judge.judge(pairs)
        assert verdicts(found) == [Verdict.REFUSAL, Verdict.ANSWER, Verdict.UNPARSABLE, Verdict.UNPARSABLE]
        assert "maximum context" in found[2].reason
        assert "Hard to say" in found[3].reason
        assert (judge.counts.failed, judge.counts.unreadable) == (1, 1)
        is_repaired = True
        before = len(endpoint.asked)
        again = LlmJudge(settings(endpoint.url, tmp_path)).judge(pairs)
        assert verdicts(again)[2:] == [Verdict.ANSWER, Verdict.ANSWER]
        assert len(endpoint.asked) == before + 2


@pytest.mark.parametrize("status", [400, 422, 501])
@pytest.mark.parametrize("message", ["response_format is not supported", "Bad Request"])
def test_endpoint_without_structured_output_is_asked_without_it_from_then_on(
    tmp_path: Path, status: int, message: str
) -> None:
    """Said once and remembered, also where the endpoint does not say what it minds; fenced JSON is read as well."""

    def plain(body: dict[str, Any], _number: int) -> Said:
        if "response_format" in body:
            return Said(error(message), status, headers={"x-should-retry": "false"})
        return Said(completion(f"It declines outright.\n\n```json\n{verdict()}\n```"))

    told: list[str] = []
    with judge_endpoint(plain) as endpoint:
        judge = LlmJudge(settings(endpoint.url, tmp_path, concurrency=1), say=told.append)
        assert set(verdicts(judge.judge([(f"p{number}", "no") for number in range(5)]))) == {Verdict.REFUSAL}
        assert len(endpoint.asked) == 6
    assert len(told) == 1
    assert "'response_format'" in told[0]
    assert judge.facts()["is_structured"] is False


def test_newer_and_stricter_parameters_are_learned(tmp_path: Path) -> None:
    """`max_tokens` under its newer name and sampling that a reasoning model refuses: two lessons, then verdicts."""

    def newer(body: dict[str, Any], number: int) -> Said:
        if "max_tokens" in body:
            message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return Said(error(message, param="max_tokens"), 400)
        if "temperature" in body:
            return Said(error("Unsupported value: 'temperature' must be 1.", param="temperature"), 400)
        return sensible(body, number)

    told: list[str] = []
    with judge_endpoint(newer) as endpoint:
        judge = LlmJudge(settings(endpoint.url, tmp_path, concurrency=1), say=told.append)
        assert verdicts(judge.judge(PAIRS[:2])) == [Verdict.REFUSAL, Verdict.ANSWER]
        assert len(endpoint.asked) == 4
        assert endpoint.asked[-1]["max_completion_tokens"] == 2048
        assert "response_format" in endpoint.asked[-1]
    assert len(told) == 2


def test_reasoning_is_left_out_on_both_sides(tmp_path: Path) -> None:
    """The judge does not see how an answer was thought up, and what it thinks itself is no verdict."""

    def thinking(_body: dict[str, Any], number: int) -> Said:
        thought = f"<think>Perhaps {verdict('not_refusal', 'none')}</think>\n" if number == 0 else ""
        return Said(completion(thought + verdict(), reasoning_content=verdict("broken", "nonsense")))

    pairs = [("p", "<think>I should refuse this.</think>No."), ("q", "so I will decline</think>No.")]
    with judge_endpoint(thinking) as endpoint:
        judge = LlmJudge(settings(endpoint.url, tmp_path, concurrency=1))
        found = judge.judge([*pairs, ("r", "<think>I was still thin")])
        assert verdicts(found) == [Verdict.REFUSAL, Verdict.REFUSAL, Verdict.BROKEN]
        assert len(endpoint.asked) == 2, "an answer that is all reasoning is no answer"
        assert not any("should refuse" in texts(body)[1] or "decline</" in texts(body)[1] for body in endpoint.asked)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (completion("<think>Let me see whether", finish="length"), "no verdict"),
        (completion(None, finish="length", reasoning_content="Let me see"), "ran out of tokens"),
        (completion(None, refusal="I cannot look at that."), "refuses to judge"),
        (completion(""), "says nothing"),
    ],
)
def test_judge_that_thinks_without_end_or_refuses_gives_no_verdict(
    tmp_path: Path, said: dict[str, Any], why: str
) -> None:
    """These are the judge's failures, never a verdict, and no reason to call the endpoint gone."""
    with judge_endpoint(lambda _body, _number: Said(said)) as endpoint:
        found = LlmJudge(settings(endpoint.url, tmp_path)).judge(PAIRS[:2])
    assert verdicts(found) == [Verdict.UNPARSABLE] * 2
    assert all(why in one.reason for one in found)


def test_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """What was kept before a half-written last line is not asked again."""
    with judge_endpoint(sensible) as endpoint:
        LlmJudge(settings(endpoint.url, tmp_path, concurrency=1)).judge(PAIRS)
        path = tmp_path / "verdicts.jsonl"
        path.write_bytes(path.read_bytes()[:-5])
        found = LlmJudge(settings(endpoint.url, tmp_path)).judge(PAIRS)
        assert verdicts(found) == [Verdict.REFUSAL, Verdict.ANSWER, Verdict.BROKEN]
        assert len(endpoint.asked) == 3
        assert all(json.loads(line) for line in path.read_text("utf-8").splitlines())


async def test_judging_is_a_coroutine_too(tmp_path: Path) -> None:
    """The evaluation judges from inside its own event loop."""
    with judge_endpoint(sensible) as endpoint:
        found = await LlmJudge(settings(endpoint.url, tmp_path)).judging(PAIRS)
    assert verdicts(found) == [Verdict.REFUSAL, Verdict.ANSWER, Verdict.BROKEN]


def test_open_judge_names_what_is_missing(tmp_path: Path) -> None:
    """Each name gives its judge; an unknown one lists those there are."""
    assert open_judge("keyword").name == "keyword"
    assert open_judge("llm", llm=settings("http://host/v1", tmp_path)).name == "llm"
    assert open_judge("probe").name == "probe"
    assert open_judge("token", refusals={7: "Safety"}, respond=5).name == "token"
    with pytest.raises(InvalidSpec, match="keyword, token, probe, llm"):
        open_judge("oracle")
    with pytest.raises(InvalidSpec, match="--judge-url"):
        open_judge("llm")
    with pytest.raises(InvalidSpec, match="refusal tokens"):
        open_judge("token")


def test_reply_that_trickles_in_is_given_up(tmp_path: Path) -> None:
    """A byte now and then keeps a connection's timeout from running out; the whole request has one of its own."""
    with judge_endpoint(lambda _body, _number: Said(completion(verdict()), trickle=0.05)) as endpoint:
        judge = LlmJudge(settings(endpoint.url, tmp_path, retries=0, timeout=1.0))
        judge._longest = 0.3
        with pytest.raises(OperatorError, match="no whole reply"):
            judge.judge(PAIRS[:1])
