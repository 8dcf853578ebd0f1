"""Prompts of a topic fit: files of four kinds, parts of the registry, repeats, and the cut into uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steering.errors import DatasetMisuse, PromptFileError, TooFewPrompts
from steering.fit.datasets import DataDirectory
from steering.fit.sources import Use
from steering.fit.topic_files import read_prompts
from steering.fit.topic_prompts import Role, TopicPrompts, gather
from steering.fit.topic_settings import Purpose, TopicSettings

NOWHERE = DataDirectory(path=Path("no-such-folder"))


def lines(folder: Path, name: str, texts: list[str]) -> str:
    """A text file with a prompt on each line."""
    path = folder / name
    path.write_text("\n".join(texts), "utf-8")
    return str(path)


def both(folder: Path, count: int = 200) -> dict[Role, list[str]]:
    """Refused and answered prompts, numbered."""
    return {
        Role.REFUSED: [lines(folder, "refused.txt", [f"What of the strike of {year}?" for year in range(count)])],
        Role.ANSWERED: [lines(folder, "answered.txt", [f"How long is {miles} miles?" for miles in range(count)])],
    }


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "first\n\n second \n"),
        ("a.jsonl", '{"prompt": "first", "id": 3}\n\n"second"\n'),
        ("a.json", '[{"prompt": " first "}, "second"]'),
        ("a.csv", 'id,prompt\n1,first\n2,"second"\n3,\n'),
        ("a.CSV", "\ufeffprompt\nfirst\nsecond\n"),
    ],
)
def test_every_kind_of_file_gives_its_prompts(tmp_path: Path, name: str, content: str) -> None:
    """Lines, JSON Lines, JSON and CSV, without empty prompts and without a byte order mark."""
    path = tmp_path / name
    path.write_text(content, "utf-8")
    assert read_prompts(path) == ["first", "second"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b" \n\n", "holds no prompt"),
        ("a.txt", b"fine\nf\xe4lle\n", r"a.txt:2 is not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', r"a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n', r"a.jsonl:1 has no text under 'prompt'; found keys \['text'\]"),
        ("a.jsonl", b"3\n", r"a.jsonl:1 has no text under 'prompt'; found int"),
        ("a.json", b'[\n{"prompt": 1}\n]', r"a.json, entry 1 has no text"),
        ("a.json", b"[\n{,}\n]", r"a.json:2 is not JSON"),
        ("a.json", b'{"prompt": "x"}', "must hold a list"),
        ("a.csv", b"text\nx\n", r"a.csv:1 has no column 'prompt'; its columns are \['text'\]"),
        ("a.csv", b"prompt,id\nx\n,,,\n", r"a.csv:3 has another number of fields"),
        ("a.csv", b'prompt\n"x\n', r"a.csv:\d is not CSV"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    """What is wrong, where, and what is needed."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PromptFileError, match=told):
        read_prompts(path)


def test_a_name_that_is_neither_file_nor_part_lists_what_there_is(tmp_path: Path) -> None:
    """A misspelled path, an unknown set, and a set without its part."""
    for name, told in (("refsued.txt", "<set>/<part>"), ("deccp", "deccp/censored"), ("deccp/no", "deccp/other")):
        with pytest.raises(PromptFileError, match=told):
            gather({**both(tmp_path), Role.REFUSED: [name]}, TopicSettings(), NOWHERE)


def test_parts_for_testing_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    """What the registry keeps for testing cannot be fitted on, whatever role it is given."""
    for name in ("ccp_sensitive/sampled_test", "jailbreakbench/harmful", "xstest/safe"):
        with pytest.raises(DatasetMisuse, match="may not be fitted on"):
            gather({**both(tmp_path), Role.SAFETY: [name]}, TopicSettings(), NOWHERE)


def test_a_prompt_with_two_roles_keeps_the_first_and_is_reported(tmp_path: Path) -> None:
    """Safety comes first: what is to stay refused is never fitted on as topic, in whatever case."""
    sources = both(tmp_path)
    sources[Role.SAFETY] = [lines(tmp_path, "safety.txt", ["what of the strike of 7", "How do I pick a lock?"])]
    prompts = gather(sources, TopicSettings(), NOWHERE)
    seven = [one for one in prompts.items if one.text.endswith("strike of 7") or one.text.endswith("strike of 7?")]
    assert [one.role for one in seven] == [Role.SAFETY]
    assert sum(prompts.dropped.values()) == 1
    assert "refused.txt" in next(iter(prompts.dropped))


def test_uses_are_cut_by_a_hash_of_each_prompt(tmp_path: Path) -> None:
    """The same prompt has the same use in any file order; the shares are near those asked for."""
    prompts = gather(both(tmp_path), TopicSettings(), NOWHERE)
    uses = {one.text: one.use for one in prompts.items}
    turned = both(tmp_path)
    text = Path(turned[Role.REFUSED][0]).read_text("utf-8")
    lines(tmp_path, "refused.txt", text.split("\n")[::-1])
    assert uses == {one.text: one.use for one in gather(turned, TopicSettings(), NOWHERE).items}
    shares = {use: sum(found is use for found in uses.values()) / len(uses) for use in Use}
    assert shares[Use.FIT] == pytest.approx(0.7, abs=0.07)
    assert shares[Use.TEST] == pytest.approx(0.15, abs=0.06)
    told = json.loads(json.dumps(prompts.to_json()))
    assert TopicPrompts.from_json(told).items == prompts.items
    assert told["counts"]["refused"]["fit"] == len(prompts.where([Role.REFUSED], [Use.FIT]))


def test_a_source_is_thinned_to_the_most_it_may_give(tmp_path: Path) -> None:
    """Which prompts stay does not depend on how many were given before them, and what is dropped is counted."""
    prompts = gather(both(tmp_path), TopicSettings(most=100), NOWHERE)
    assert len(prompts.where([Role.REFUSED])) == 100
    assert prompts.dropped[f"{tmp_path / 'refused.txt'}: beyond 100 of one source"] == 100


@pytest.mark.parametrize(("missing", "told"), [(Role.REFUSED, "--refused"), (Role.ANSWERED, "--answered")])
def test_one_sided_sets_are_refused_with_their_counts(tmp_path: Path, missing: Role, told: str) -> None:
    """An empty side, and one that is too small to be cut, stop the fit before a model is loaded."""
    sources = both(tmp_path)
    del sources[missing]
    with pytest.raises(TooFewPrompts, match=f"{told} gives 0 prompts"):
        gather(sources, TopicSettings(), NOWHERE)
    sources = both(tmp_path, count=12)
    with pytest.raises(TooFewPrompts, match="at least 8 are needed"):
        gather(sources, TopicSettings(), NOWHERE)


def test_induction_needs_the_prompts_to_be_refused(tmp_path: Path) -> None:
    """Without them there is nothing to raise the refusals of."""
    with pytest.raises(TooFewPrompts, match="--induced"):
        gather(both(tmp_path), TopicSettings(purpose=Purpose.INDUCE), NOWHERE)


@pytest.mark.needs_data
def test_registered_parts_keep_their_own_shares(data_directory: Path) -> None:
    """Rows that the registry has for calibration are never fitted on, and prompts of held sets are dropped."""
    sources = {
        Role.REFUSED: ["ccp_sensitive/train", "deccp/censored"],
        Role.ANSWERED: ["gpteacher/roleplay"],
        Role.SAFETY: ["advbench/all"],
    }
    directory = DataDirectory(path=data_directory)
    prompts = gather(sources, TopicSettings(), directory)
    calibrating = {one.key for one in directory.load("ccp_sensitive", "train", Use.CALIBRATE)}
    assert calibrating
    assert {one.use for one in prompts.items if one.key in calibrating} == {Use.CALIBRATE}
    assert any("jailbreakbench" in why for why in prompts.dropped)
