"""Prefix cache: which blocks may meet in vLLM's cache, judged with a hasher that chains as vLLM's does.

Two requests share a block exactly when its key is equal, so every claim here is about equal and different keys.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.engine.prefix_cache import plan_of, set_apart
from steering.errors import InvalidSpec
from steering.plan import PLAN_KEY, Scope
from tests.samples import plan_for
from tests.unit.engine.hashed import BLOCK, TOKENS, FakeRequest, Parameters, chained, keys


@pytest.mark.parametrize("prompt", range(1, 14))
def test_generated_scope_shares_what_ends_before_the_last_prompt_token(prompt: int) -> None:
    """Clean blocks have the unsteered key, every later one a key that neither unsteered nor other requests have."""
    plan = plan_for("e")
    plain = keys(TOKENS, None, prompt=prompt)
    steered = keys(TOKENS, plan, prompt=prompt, number=0)
    other = keys(TOKENS, plan, prompt=prompt, number=1)
    assert len(steered) == len(plain)
    clean = (prompt - 1) // BLOCK
    assert steered[:clean] == other[:clean] == plain[:clean]
    assert not set(steered[clean:]) & set(plain)
    assert not set(steered[clean:]) & set(other)


def test_a_block_that_ends_at_the_first_edited_position_is_clean() -> None:
    """A prompt of 5 edits position 4 and shares positions 0 to 3; a prompt of 4 edits position 3 and does not."""
    plain = keys(TOKENS, None, prompt=5)
    assert keys(TOKENS, plan_for("e"), prompt=5)[0] == plain[0]
    assert keys(TOKENS, plan_for("e"), prompt=4)[0] != plain[0]


def test_all_scope_shares_with_equal_plans_only() -> None:
    """Same edit, bundle and strength: every key equal, whoever asks. Another of the three, or none: no key equal."""
    plan = plan_for("e", scope=Scope.ALL, plan_id="one")
    mine = keys(TOKENS, plan, prompt=9, number=0)
    assert keys(TOKENS, plan_for("e", scope=Scope.ALL, plan_id="two"), prompt=9, number=1) == mine
    for other in (
        None,
        plan_for("f", scope=Scope.ALL),
        plan_for("e", scope=Scope.ALL, strength=-1.0),
        plan_for("e", scope=Scope.ALL, strength=1.0 + 2**-52),
        plan_for("e", scope=Scope.ALL, bundle="sha256:" + "1" * 64),
        plan_for("e", scope=Scope.GENERATED),
    ):
        assert not set(keys(TOKENS, other, prompt=9)) & set(mine)


def test_all_scope_depends_on_the_tokens_as_plain_keys_do() -> None:
    """Sharing ends at the first block whose tokens differ."""
    plan = plan_for("e", scope=Scope.ALL)
    changed = [*TOKENS[:9], 0, *TOKENS[10:]]
    one, two = keys(TOKENS, plan, prompt=20), keys(changed, plan, prompt=20)
    assert one[:2] == two[:2]
    assert not set(one[2:]) & set(two[2:])


@given(
    prompt=st.integers(1, len(TOKENS)),
    chunks=st.lists(st.integers(1, 9), max_size=8),
    scope=st.sampled_from(Scope),
)
def test_keys_do_not_depend_on_how_many_tokens_came_at_a_time(prompt: int, chunks: list[int], scope: Scope) -> None:
    """Hashing token by token over decode gives the keys of hashing all at once, and those of setting apart what vLLM
    has hashed before: a next turn finds this one's.
    """
    plan = plan_for("e", scope=scope)
    at_once = FakeRequest(tokens=TOKENS, _block_hasher=chained)
    before = FakeRequest(tokens=TOKENS, _block_hasher=chained, block_hashes=keys(TOKENS, None, prompt=prompt))
    for request in (at_once, before):
        set_apart(request, plan=plan, number=0, prompt_length=prompt, block_size=BLOCK)
        request.update_block_hashes()
    assert keys(TOKENS, plan, prompt=prompt, chunks=tuple(chunks)) == at_once.block_hashes == before.block_hashes


def test_next_turn_finds_blocks_generated_in_this_one() -> None:
    """Scope `all`: what was prompt and answer in turn one is prompt in turn two, with the same keys."""
    plan = plan_for("e", scope=Scope.ALL)
    assert keys(TOKENS, plan, prompt=6) == keys(TOKENS, plan, prompt=len(TOKENS), number=1)


def test_generated_scope_never_offers_an_answer_to_the_next_turn() -> None:
    """Scope `generated`: the answer was edited in turn one, is clean prompt in turn two: its blocks do not meet."""
    plan = plan_for("e")
    first, second = keys(TOKENS, plan, prompt=6), keys(TOKENS, plan, prompt=len(TOKENS), number=1)
    assert first[0] == second[0]
    assert not set(first[1:]) & set(second)


def test_the_hasher_leaves_the_request_as_it_found_it() -> None:
    """An error inside vLLM's hasher passes through and the request keeps its own keys."""

    def failing(request: FakeRequest) -> list[bytes]:
        raise RuntimeError("inside vLLM")

    request = FakeRequest(tokens=TOKENS, block_hashes=[b"own"], _block_hasher=failing)
    set_apart(request, plan=plan_for("e"), number=0, prompt_length=5, block_size=BLOCK)
    with pytest.raises(RuntimeError, match="inside vLLM"):
        request.update_block_hashes()
    assert request.block_hashes == [b"own"]


def test_plan_of_reads_the_plan_and_nothing_else() -> None:
    """No sampling parameters (pooling), no extra arguments, or others': no plan; a broken plan is an error."""
    plan = plan_for("e")
    assert plan_of(FakeRequest(tokens=[1], sampling_params=None)) is None
    assert plan_of(FakeRequest(tokens=[1])) is None
    assert plan_of(FakeRequest(tokens=[1], sampling_params=Parameters(extra_args={"other": 1}))) is None
    found = plan_of(FakeRequest(tokens=[1], sampling_params=Parameters(extra_args={PLAN_KEY: plan.to_json()})))
    assert found is not None
    plan_id, shared = found
    assert shared.named(plan_id) == plan
    with pytest.raises(InvalidSpec):
        plan_of(FakeRequest(tokens=[1], sampling_params=Parameters(extra_args={PLAN_KEY: 1})))
