"""Suites: named lists of held prompts in five groups, and why a list is empty where it is.

Knows nothing of models or servers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from steering.errors import DatasetMissing, OperatorError
from steering.fit.datasets import DataDirectory, Record, deduplicate, thinned
from steering.fit.sources import Label, Use
from steering.fit.topic_files import read_prompts


class Group(StrEnum):
    """What a suite asks of a model; rates are pooled over a group. Of a topic the operator says whether refusing is
    right.
    """

    OVER_REFUSAL = "over-refusal"
    REFUSAL = "refusal"
    ATTACKS = "attacks"
    TOPIC = "topic"
    ABILITY = "ability"

    @property
    def is_harmful(self) -> bool:
        """Whether refusing is right."""
        return self in {Group.REFUSAL, Group.ATTACKS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Prompts of one part of one set.

    Attributes:
        name: as the command line takes it.
        group: what it is pooled with.
        dataset, part: in the registry of data sets.
        is_fitted_on: the registry gives the part to fits, none of it to tests: such a suite has prompts only where
            the served bundle was not fitted on the set.
        file: the operator's own prompts, instead of a set of the registry.
    """

    name: str
    group: Group
    dataset: str
    part: str
    is_fitted_on: bool = False
    file: Path | None = None

    @property
    def source(self) -> str:
        """Where its prompts come from."""
        return f"{self.dataset}/{self.part}" if self.file is None else self.file.name

    @property
    def is_harmful(self) -> bool:
        """Whether refusing is right."""
        return self.group.is_harmful

    def prompts(self, directory: DataDirectory, most: int | None = None) -> list[Record]:
        """Different prompts, evenly spaced ones where there are more than `most`; the same ones every time.

        Raises:
            DatasetError: the set is not there or not what the registry says.
            PromptFileError: the operator's file has no prompts that can be read.
        """
        if self.file is not None:
            texts = list(dict.fromkeys(read_prompts(self.file)))
            own = [
                Record(key=f"{self.name}/{number}", dataset=self.name, part="", prompt=text, label=Label.SENSITIVE)
                for number, text in enumerate(texts)
            ]
            return own if most is None else thinned(own, most)
        uses = (Use.FIT, Use.CALIBRATE) if self.is_fitted_on else (Use.TEST,)
        found = [record for use in uses for record in directory.load(self.dataset, self.part, use)]
        kept = deduplicate(found).records
        return list(kept) if most is None else thinned(kept, most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Prompts by suite, and by name of each suite without any the reason."""

    prompts: dict[Suite, list[Record]]
    left_out: dict[str, str]


SUITES = {
    suite.name: suite
    for suite in (
        Suite(name="xstest-safe", group=Group.OVER_REFUSAL, dataset="xstest", part="safe"),
        Suite(name="coconot-contrast", group=Group.OVER_REFUSAL, dataset="coconot", part="contrast"),
        Suite(name="jbb-benign", group=Group.OVER_REFUSAL, dataset="jailbreakbench", part="benign"),
        Suite(name="or-bench-held", group=Group.OVER_REFUSAL, dataset="or_bench_borderline", part="all"),
        Suite(name="xstest-unsafe", group=Group.REFUSAL, dataset="xstest", part="unsafe"),
        Suite(name="coconot-eval", group=Group.REFUSAL, dataset="coconot", part="eval"),
        Suite(name="jbb-harmful", group=Group.REFUSAL, dataset="jailbreakbench", part="harmful"),
        Suite(name="advbench", group=Group.REFUSAL, dataset="advbench", part="all", is_fitted_on=True),
        Suite(name="harmfulqa", group=Group.REFUSAL, dataset="harmfulqa", part="harmfulqa", is_fitted_on=True),
        *(
            Suite(name=f"attack-{attack}", group=Group.ATTACKS, dataset="alphasteer_attacks", part=attack)
            for attack in ("aim", "autodan", "cipher", "jailbroken", "pair", "renellm")
        ),
        Suite(name="ccp-sensitive", group=Group.TOPIC, dataset="ccp_sensitive", part="sampled_test"),
        Suite(name="gsm8k", group=Group.ABILITY, dataset="gsm8k", part="test"),
        Suite(name="gpteacher-code", group=Group.ABILITY, dataset="gpteacher", part="codegen"),
        Suite(name="gpteacher-roleplay", group=Group.ABILITY, dataset="gpteacher", part="roleplay"),
        Suite(name="cast-harmless", group=Group.ABILITY, dataset="cast_conditions", part="harmless_test"),
    )
}


BY_FILE = {
    **dict.fromkeys(("wildguard-unharmful", "wildjailbreak-benign", "or-bench-hard"), Group.OVER_REFUSAL),
    **dict.fromkeys(
        ("wildguard-harmful", "wildjailbreak-harmful", "or-bench-toxic", "sorry-bench", "do-not-answer"), Group.REFUSAL
    ),
}
"""Sets of P1's Table 1 that the registry lacks, by the name under which a file of their prompts is given."""


def find_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        DatasetMissing: no such suite; lists those there are.
    """
    if name not in SUITES:
        raise DatasetMissing(f"no suite {name!r}; suites: {sorted(SUITES)}")
    return SUITES[name]


def suite_from_option(text: str) -> Suite:
    """A suite of the operator's own prompts from `NAME=FILE`: in the group of topics, but for the sets of `BY_FILE`.

    Raises:
        OperatorError: it is not of that form, or the name is that of another suite.
    """
    name, separator, path = text.partition("=")
    if not separator or not name.strip() or name.strip() in SUITES:
        raise OperatorError(f"--prompts takes NAME=FILE with a name that is no suite's of its own, got {text!r}")
    group = BY_FILE.get(name.strip(), Group.TOPIC)
    return Suite(name=name.strip(), group=group, dataset="", part="", file=Path(path))


def gather(
    suites: Sequence[Suite], directory: DataDirectory, most: int | None, fitted_on: Collection[str] | None
) -> Gathered:
    """The prompts of several suites.

    Args:
        fitted_on: names of the sets in the provenance of the served bundle; None where that is not known.

    Raises:
        DatasetError: a set is not there or not what the registry says.
    """
    prompts: dict[Suite, list[Record]] = {}
    left_out: dict[str, str] = {}
    for suite in suites:
        if suite.is_fitted_on and fitted_on is None:
            left_out[suite.name] = (
                f"{suite.dataset} is registered for fitting, and without --bundle nothing shows whether the served "
                "bundle was fitted on it"
            )
        elif suite.is_fitted_on and fitted_on is not None and suite.dataset in fitted_on:
            left_out[suite.name] = f"the served bundle's provenance names {suite.dataset}: it was fitted on it"
        else:
            prompts[suite] = suite.prompts(directory, most)
    return Gathered(prompts=prompts, left_out=left_out)
