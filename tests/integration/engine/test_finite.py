"""The finite check on the real engine: the request whose residuals overflow is ended, and no other notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.engine.checks import check_against_oracle, prompt_of
from tests.integration.engine.conftest import Tiny
from tests.integration.engine.loading import LoadingScenario, Step, play_loading
from tests.integration.engine.scenario import Ask


@pytest.mark.parametrize(("runner", "is_ahead"), [("v1", False), ("v1", True), ("v2", True)])
def test_only_the_request_that_overflows_is_ended(
    tiny: Callable[[str], Tiny], runner: str, is_ahead: bool, tmp_path: Path
) -> None:
    """At a strength at which what is added exceeds float32 its residuals are infinite: no token of that reaches the
    client. Its neighbours, steered by the same edit or not at all, are as the oracle says; so is a later request. On
    either runner, and where the next step of such a request is prepared before its residuals are known.
    """
    model = tiny("llama")
    asks = {
        "plain": Ask(prompt=prompt_of(9, 1), count=12),
        "same edit": Ask(prompt=prompt_of(20, 2), count=12, edit="add"),
        "guilty": Ask(prompt=prompt_of(11, 3), count=12, edit="add", strength=1e38),
        "ends at once": Ask(prompt=prompt_of(11, 4), count=1, edit="add", strength=1e38),
        "later": Ask(prompt=prompt_of(11, 3), count=6, edit="add"),
        "last": Ask(prompt=prompt_of(5, 5), count=2),
    }

    def ask(name: str) -> Step:
        return Step(do="ask", name=name, ask=asks[name], bundle=model.bundle_path)

    steps = [*(ask(name) for name in list(asks)[:4]), Step(do="run"), ask("later"), Step(do="run")]
    # An engine tells its workers of a request that ended with the next step.
    steps += [ask("last"), Step(do="run"), Step(do="report")]
    scenario = LoadingScenario(
        model=str(model.model),
        bundle=model.bundle_path,
        terms=32,
        steps=steps,
        check_finite=True,
        arguments={"async_scheduling": is_ahead, "max_num_seqs": 8},
        environment={"TRIMTAB_KERNEL": "triton"} if runner == "v2" else {},
        v2_interpreted=runner == "v2",
    )
    result = play_loading(scenario, tmp_path)
    for name in ("guilty", "ends at once"):
        assert (result.answers[name].finish, result.answers[name].tokens) == (["error"], [[]])
    good = ["plain", "same edit", "later", "last"]
    check_against_oracle(model.oracle, [asks[name] for name in good], [result.answers[name] for name in good])
    told = {outcome["plan_id"]: (outcome["applied"], outcome["error"]) for outcome in result.outcomes}
    wrong = (False, "the residuals are not finite")
    assert told == {"same edit": (True, ""), "later": (True, ""), "guilty": wrong, "ends at once": wrong}
    assert result.scheduler == ("SteeringAsyncScheduler" if is_ahead else "SteeringScheduler")
    report = result.steps[-1][0]
    assert (report["live"], report["runner"]) == (0, runner)
