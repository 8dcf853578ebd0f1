"""Loads: every rank has a bundle or none has, and it leaves the bank after the last request that names it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from steering.engine.bank import Bank
from steering.engine.loads import Loads
from steering.engine.rows import Rows
from steering.errors import (
    BundleDigestError,
    BundleFormatError,
    CapacityExceeded,
    EngineError,
    InvalidSpec,
    TrimtabError,
    UnsupportedConfiguration,
)
from tests.samples import WIDTH, manifest_of, plan_for, random_edit, save_bundle, write_bundle

CPU = torch.device("cpu")


class Rank:
    """One worker's share, with a bank of 8 terms at the layers given."""

    def __init__(self, vote: Callable[[bool], bool] = bool, layers: tuple[int, ...] = (0, 1)) -> None:
        self.bank = Bank(layers=layers, width=WIDTH, terms=8, device=CPU)
        self.rows = Rows(bank=self.bank, requests=4, tokens=16, device=CPU)
        self.settled = 0
        self.loads = Loads(bank=self.bank, rows=self.rows, vote=vote, settle=self._settle, can_spare=False)

    def _settle(self) -> None:
        self.settled += 1


class Ballot:
    """A vote of several threads, each of which stands for a rank."""

    def __init__(self, ranks: int) -> None:
        self._votes: list[bool] = []
        self._all_here = threading.Barrier(ranks, timeout=10)

    def __call__(self, is_done: bool) -> bool:
        self._votes.append(is_done)
        self._all_here.wait()
        return all(self._votes)


@pytest.fixture
def bundles(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Folders and digests: `small` of 2 terms at layer 0, `big` of 7, `deep` at layer 1."""
    ranks = {"small": {0: 2}, "big": {0: 7}, "deep": {1: 1}}
    return {
        name: (tmp_path / name, write_bundle(tmp_path / name, {name: random_edit(name, ranks=each)}).digest)
        for name, each in ranks.items()
    }


def load_on_all(ranks: list[Rank], path: Path, digest: str) -> list[TrimtabError | None]:
    """Load at once, as a call of every rank does; what each raised."""
    raised: list[TrimtabError | None] = [None] * len(ranks)

    def load(number: int) -> None:
        try:
            ranks[number].loads.load(path, digest)
        except TrimtabError as error:
            raised[number] = error

    threads = [threading.Thread(target=load, args=(number,)) for number in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return raised


def test_every_rank_has_a_bundle_or_none_has(bundles: dict[str, tuple[Path, str]]) -> None:
    """One rank lacks the layer: it says so, the others say that one could not, and all tables are as before."""
    ballot = Ballot(3)
    ranks = [Rank(ballot, layers=(0,) if number == 1 else (0, 1)) for number in range(3)]
    raised = load_on_all(ranks, *bundles["deep"])
    assert [type(error) for error in raised] == [EngineError, BundleFormatError, EngineError]
    for rank in ranks:
        assert rank.bank.bundles == {}
        assert not any(table.any() for table in rank.bank.tables.values())
    ballot.__init__(3)  # type: ignore[misc]
    assert load_on_all(ranks, *bundles["small"]) == [None] * 3
    assert all(list(rank.bank.bundles) == [bundles["small"][1]] for rank in ranks)


def test_a_bundle_that_was_there_stays_when_the_vote_fails(bundles: dict[str, tuple[Path, str]]) -> None:
    """What is taken back is what this load brought."""
    votes = iter([True, False])
    rank = Rank(lambda _: next(votes))
    rank.loads.load(*bundles["small"])
    with pytest.raises(EngineError, match="another rank"):
        rank.loads.load(*bundles["small"])
    assert list(rank.bank.bundles) == [bundles["small"][1]]


def test_what_cannot_be_loaded_is_said_by_name(bundles: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    """Another digest, no folder, no room, reasoning to be spared: typed, and the bank is as before."""
    rank = Rank()
    rank.loads.load(*bundles["small"])
    edits = {"e": random_edit("e", ranks={0: 1})}
    manifest = manifest_of(edits) | {"reasoning_end": {"token": "</think>", "token_id": 3}}
    manifest["profiles"][0]["reasoning"] = "spared"
    sparing = save_bundle(tmp_path / "sparing", manifest, edits)
    for path, digest, error in (
        (bundles["deep"][0], bundles["big"][1], BundleDigestError),
        (tmp_path / "nowhere", "sha256:none", BundleFormatError),
        (*bundles["big"], CapacityExceeded),
        (tmp_path / "sparing", sparing.digest, UnsupportedConfiguration),
    ):
        before = rank.bank.tables[0].clone()
        with pytest.raises(error):
            rank.loads.load(path, digest)
        assert list(rank.bank.bundles) == [bundles["small"][1]]
        assert torch.equal(rank.bank.tables[0], before)


def test_a_bundle_in_use_is_not_taken_away(bundles: dict[str, tuple[Path, str]]) -> None:
    """Running or preempted, its request finds its edit where it was; after its end the room goes to another."""
    rank, (_, small) = Rank(), bundles["small"]
    rank.loads.load(*bundles["small"])
    rank.rows.add("r", plan_for("small", bundle=small), 3)
    for change in (lambda: None, lambda: rank.rows.preempt("r"), lambda: rank.rows.resume("r")):
        change()
        with pytest.raises(InvalidSpec, match="named by a live request"):
            rank.loads.unload(small)
        rank.loads.release([small])
        assert rank.loads.is_waiting
        assert list(rank.bank.bundles) == [small]
    rank.rows.write_step(["r"], np.array([3], dtype=np.int32), np.array([0], dtype=np.int32))
    assert rank.rows.token_rows[:3].tolist() == [0, 0, rank.rows.token_rows[2].item()]
    assert rank.rows.token_rows[2] != 0
    rank.rows.remove("r")
    rank.loads.release([])
    assert (rank.bank.bundles, rank.loads.is_waiting, rank.settled) == ({}, False, 1)
    rank.loads.load(*bundles["big"])
    assert rank.bank.taken[0] == 7


def test_a_bundle_loaded_again_before_it_left_stays(bundles: dict[str, tuple[Path, str]]) -> None:
    """It is not read again, keeps its numbers, and does not leave with its last request."""
    rank, (_, small) = Rank(), bundles["small"]
    rank.loads.load(*bundles["small"])
    rank.rows.add("r", plan_for("small", bundle=small), 3)
    number = rank.bank.number(bundle=small, edit="small")
    rank.loads.release([small])
    rank.loads.load(Path("not read"), small)
    rank.rows.remove("r")
    rank.loads.release([])
    assert not rank.loads.is_waiting
    assert rank.bank.number(bundle=small, edit="small") == number
