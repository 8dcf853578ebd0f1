"""Bundles come and go while requests run, on one rank and on two: none runs unsteered, others notice nothing, what they
took is free again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from steering.bundle import save_bundle
from steering.fingerprint import fingerprint_of
from steering.terms import Edit
from tests.integration.engine.checks import check_against_oracle, prompt_of
from tests.integration.engine.conftest import Tiny, all_kinds_of_edits
from tests.integration.engine.driver import TWO_RANKS
from tests.integration.engine.loading import LoadingResult, LoadingScenario, Step, play_loading
from tests.integration.engine.scenario import Ask
from tests.oracle import Oracle

TERMS = 23
"""Room at layer 1, where the first bundle has 13 terms and each of the others 8, for two of the three."""

EDITS = ("first", "second")
"""Edits of the second and of the third bundle."""


@dataclass(frozen=True)
class Turn:
    """Requests by name, and what came of the scenario's steps, by name; a worker's by rank."""

    ranks: int
    model: Tiny
    oracle: Oracle
    asks: dict[str, Ask]
    result: LoadingResult
    steps: dict[str, Any]

    def check(self, *names: str) -> None:
        """These requests were edited as the oracle says, to their end."""
        check_against_oracle(
            self.oracle, [self.asks[name] for name in names], [self.result.answers[name] for name in names]
        )


def low_rank_of(name: str, scale: float) -> Edit:
    """Eight terms at layer 1, of another size than those of the first bundle."""
    terms = all_kinds_of_edits(1.0)["low rank"].layers[0]
    changed = type(terms)(
        layer=1, read=terms.read, write=terms.write.flip(0), gain=terms.gain * scale, bias=terms.bias + scale
    )
    return Edit(name=name, layers=(changed,))


def scripted(model: Tiny, folders: list[str]) -> tuple[dict[str, Ask], dict[str, Step]]:
    """Requests by name, and what is done in turn, by name."""
    own, second, third = folders
    asks = {
        "plain": Ask(prompt=prompt_of(9, 1), count=30),
        "own": Ask(prompt=prompt_of(20, 2), count=30, edit="add"),
        "too early": Ask(prompt=prompt_of(8, 3), count=4, edit="first"),
        "running": Ask(prompt=prompt_of(11, 4), count=12, edit="first", scope="all"),
        "waiting": Ask(prompt=prompt_of(12, 5), count=8, edit="first"),
        "too late": Ask(prompt=prompt_of(13, 6), count=4, edit="first"),
        "revived": Ask(prompt=prompt_of(14, 7), count=6, edit="several terms"),
        "third": Ask(prompt=prompt_of(15, 8), count=8, edit="second"),
        "last": Ask(prompt=prompt_of(15, 9), count=4, edit="low rank"),
    }
    assert model.bundle_path == own

    def ask(name: str, bundle: str = "") -> Step:
        return Step(do="ask", name=name, ask=asks[name], bundle=bundle)

    return asks, {
        "ask plain": ask("plain"),
        "ask own": ask("own", own),
        "run 1": Step(do="run", count=3),
        "crowd last rank": Step(do="crowd", bundle=third),
        "load second on one rank": Step(do="load", bundle=second),
        "report crowded": Step(do="report"),
        "clear last rank": Step(do="clear", bundle=third),
        "report cleared": Step(do="report"),
        "ask too early": ask("too early", second),
        "load second": Step(do="load", bundle=second),
        "open second": Step(do="order", order="open", bundle=second),
        "load third in vain": Step(do="load", bundle=third),
        "run 2": Step(do="run", count=1),
        "ask running": ask("running", second),
        "ask waiting": ask("waiting", second),
        "run 3": Step(do="run", count=4),
        "unload in use": Step(do="unload", bundle=second),
        "close second": Step(do="order", order="close", bundle=second),
        "ask too late": ask("too late", second),
        "run 4": Step(do="run", count=2),
        "report in use": Step(do="report"),
        "run 5": Step(do="run"),
        "run 6": Step(do="run", count=1),
        "report free": Step(do="report"),
        "revive in vain": Step(do="order", order="revive", bundle=second),
        "load third": Step(do="load", bundle=third),
        "open third": Step(do="order", order="open", bundle=third),
        "ask third": ask("third", third),
        "ask revived": ask("revived", own),
        "run 7": Step(do="run", count=2),
        "close own": Step(do="order", order="close", bundle=own),
        "run 8": Step(do="run", count=1),
        "revive own": Step(do="order", order="revive", bundle=own),
        "ask last": ask("last", own),
        "run 9": Step(do="run"),
        "run 10": Step(do="run", count=1),
        "report last": Step(do="report"),
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def turn(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Turn:
    """One engine of three places, to which all of this is done."""
    return play_turn(tiny("llama"), tmp_path_factory.mktemp("loading"), request.param)


def play_turn(model: Tiny, folder: Path, ranks: int) -> Turn:
    """Do all of it to an engine of so many tensor-parallel ranks."""
    edits = {name: low_rank_of(name, scale) for name, scale in zip(EDITS, (0.5, -0.7), strict=True)}
    folders = [model.bundle_path]
    for name, edit in edits.items():
        strength = {"minimum": 0.0, "maximum": 4.0, "measured": "not measured: a test bundle"}
        manifest = {
            "name": f"tiny-{name}",
            "version": "1",
            "model": fingerprint_of(model.model).model_dump(),
            "categories": [{"name": "test"}],
            "edits": [{"name": name, "purpose": "refuse", "category": "test", "dose": "as made", "strength": strength}],
            "profiles": [{"name": "test", "refuse": {"test": name}, "default_category": "test"}],
            "default_profile": "test",
        }
        folders.append(str(save_bundle(folder / name, manifest, {name: edit}).path))
    asks, steps = scripted(model, folders)
    scenario = LoadingScenario(
        model=str(model.model),
        bundle=model.bundle_path,
        terms=TERMS,
        steps=list(steps.values()),
        arguments={"max_num_seqs": 3, "enable_prefix_caching": True, "tensor_parallel_size": ranks},
        environment=TWO_RANKS if ranks > 1 else {},
    )
    result = play_loading(scenario, folder)
    oracle = Oracle(model.model, {**model.bundle.edits, **edits})
    return Turn(ranks, model, oracle, asks, result, dict(zip(steps, result.steps, strict=True)))


class TestLoading:
    """An engine with a bundle; a second comes, is used, leaves; a third takes its place; the first leaves and stays."""

    def test_a_loaded_bundle_is_used_and_those_that_ran_do_not_notice(self, turn: Turn) -> None:
        """Requests that ran before, unsteered and steered, and one under the new bundle: all as the oracle says."""
        assert turn.steps["load second"] == [{"error": None}] * turn.ranks
        turn.check("plain", "own", "running")

    def test_before_it_is_loaded_a_bundle_is_refused(self, turn: Turn) -> None:
        """Ended with an error, without a token."""
        got = turn.result.answers["too early"]
        assert (got.finish, got.tokens) == (["error"], [[]])

    def test_one_rank_that_has_no_room_keeps_a_bundle_off_all(self, turn: Turn) -> None:
        """That rank says what is missing, the others that one could not; each has what it had before, and what ran
        meanwhile is not touched.
        """
        *others, failed = turn.steps["load second on one rank"]
        assert failed["error"]["class"] == "CapacityExceeded"
        assert [answer["error"]["class"] for answer in others] == ["EngineError"] * (turn.ranks - 1)
        taken = [report["taken"]["1"] for report in turn.steps["report crowded"]]
        assert taken == [*[13] * (turn.ranks - 1), 21]
        (own,) = turn.steps["report cleared"][0]["bundles"]
        for report in turn.steps["report cleared"]:
            assert (report["taken"]["1"], list(report["bundles"]), report["live"]) == (13, [own], 1)

    def test_a_full_bank_is_said_by_name_and_changes_nothing(self, turn: Turn) -> None:
        """The third bundle does not fit beside the second; what is loaded is served on."""
        for answer in turn.steps["load third in vain"]:
            assert answer["error"]["class"] == "CapacityExceeded"
        for report in turn.steps["report in use"]:
            assert len(report["bundles"]) == 2

    def test_unloaded_while_in_use_it_serves_what_was_accepted_and_nothing_else(self, turn: Turn) -> None:
        """One request was running and one waiting: both are edited to their end, and keep the slots; a later one is
        ended with an error; and no worker gives up slots that a request names.
        """
        turn.check("running", "waiting")
        assert turn.result.answers["too late"].finish == ["error"]
        assert [answer["error"]["class"] for answer in turn.steps["unload in use"]] == ["InvalidSpec"] * turn.ranks
        assert [report["taken"]["1"] for report in turn.steps["report in use"]] == [21] * turn.ranks

    def test_its_slots_are_free_after_its_last_request(self, turn: Turn) -> None:
        """Without another request: the engine takes a step for that alone. Another bundle takes them."""
        assert len(turn.steps["report free"]) == turn.ranks
        for free in turn.steps["report free"]:
            assert (free["taken"]["1"], len(free["bundles"]), free["live"]) == (13, 1, 0)
        assert turn.steps["revive in vain"] is False
        assert turn.steps["load third"] == [{"error": None}] * turn.ranks
        turn.check("third")

    def test_one_loaded_again_before_its_last_request_ended_stays(self, turn: Turn) -> None:
        """Closed and revived: its running request and a new one are edited, and its slots stay its own."""
        assert turn.steps["revive own"] is True
        turn.check("revived", "last")
        for report in turn.steps["report last"]:
            assert len(report["bundles"]) == 2

    def test_every_accepted_request_is_reported_as_edited(self, turn: Turn) -> None:
        """One outcome each of those that were steered, none of those that were refused; and before the first token."""
        applied = [outcome["plan_id"] for outcome in turn.result.outcomes if outcome["applied"]]
        assert sorted(applied) == sorted(["own", "running", "waiting", "third", "revived", "last"])
        assert sorted(turn.result.in_time) == sorted(applied)
