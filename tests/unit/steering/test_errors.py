"""The error tree: what its docstring draws, and that errors survive a process border."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator

import pytest

import steering.errors
from steering.errors import CallerError, EditNotApplied, EngineError, OperatorError, TrimtabError, UnknownName


def tree(root: type[TrimtabError]) -> Iterator[type[TrimtabError]]:
    """`root` and everything below it that the module defines."""
    yield root
    for child in root.__subclasses__():
        if child.__module__ == steering.errors.__name__:
            yield from tree(child)


TREE = list(tree(TrimtabError))


def test_docstring_draws_the_tree_as_it_is() -> None:
    """Every class stands once in the drawing, one step right of its parent."""
    drawn: list[tuple[int, str]] = []
    for line in (steering.errors.__doc__ or "").splitlines():
        found = re.match(r"^(\s+[│├└─\s]*)([A-Z]\w+)(\s{2,}.*)?$", line)
        if found:
            drawn.append((len(found[1]), found[2]))
    parents: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for depth, name in drawn:
        while above and above[-1][0] >= depth:
            above.pop()
        if above:
            parents[name] = above[-1][1]
        above.append((depth, name))
    real = {error.__name__: error.__bases__[0].__name__ for error in TREE if error is not TrimtabError}
    assert parents == real


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_errors_survive_a_process_border_with_every_fact(error: type[TrimtabError]) -> None:
    """Message, parameter and code come out of a pickle as they went in, and out of JSON; engine processes send errors
    in both ways.
    """
    sent = error("found 1, needs 2", parameter="steering.strength", code="own_code")
    pickled = pickle.loads(pickle.dumps(sent))  # noqa: S301 - made one line above
    for received in (pickled, TrimtabError.from_fields(json.loads(json.dumps(sent.to_fields())))):
        assert type(received) is error
        assert (str(received), received.message) == ("found 1, needs 2", "found 1, needs 2")
        assert (received.parameter, received.code) == ("steering.strength", "own_code")


def test_an_error_of_an_unknown_class_is_still_one_of_ours() -> None:
    """Another version's worker may have errors that this process lacks."""
    fields = UnknownName("no such edit").to_fields() | {"class": "NotThoughtOfYet"}
    assert type(TrimtabError.from_fields(fields)) is TrimtabError


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_every_error_has_a_code_and_a_meaning_of_its_own(error: type[TrimtabError]) -> None:
    """Clients act on codes, so no two errors share one, but for kinds of one that only we tell apart; each class says
    in words what happened.
    """
    assert error.__doc__
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", error.code)
    sharing = [other for other in TREE if other.code == error.code]
    root = next(other for other in sharing if all(issubclass(kind, other) for kind in sharing))
    assert issubclass(error, root)
    assert len(sharing) == 1 or issubclass(root, EditNotApplied)
    assert error("x").code == error.code


def test_every_error_is_either_the_callers_the_operators_or_the_engines() -> None:
    """The three branches share no class, so a status is never ambiguous."""
    for error in TREE:
        if error is not TrimtabError:
            assert sum(issubclass(error, branch) for branch in (CallerError, OperatorError, EngineError)) == 1


def test_facts_are_optional() -> None:
    """An error that no field caused has no parameter."""
    error = UnknownName("no such edit")
    assert error.parameter is None
    assert error.code == "steering_unknown_name"
