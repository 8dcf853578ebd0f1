"""Trials: the calibration prompts that doses and ranges are tried on. Knows nothing of edits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steering.fit.ability import ANSWER_TOKENS, of_common_length
from steering.fit.arms import ANSWERED, UNSTEERED, Codes, arm_codes
from steering.fit.certified import Grounds
from steering.fit.control import Fit
from steering.fit.openings import Openings
from steering.fit.passes import Sequences
from steering.fit.prompts import Kind, Prompt, Prompts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trials:
    """Calibration prompts as doses need them; see `trials_of`.

    Attributes:
        own: per category the prompts whose refusals a comply edit is to remove: its prompts that are not harmful, and
            borderline ones for the default category.
        missed: prompts to refuse that the model answers.
        plain: prompts that are mostly answered.
        plain_codes: what the model does with them unsteered.
        answered: (prompt, answer) tokens of plain prompts, the answers all of one length.
        ranged: prompts that are answered in full, of few lengths, to see what edits spoil.
        guarded: per category such prompts for the edits that raise refusal: those that are to be refused, since it is
            they that are edited; the category's own first, filled up with others.
    """

    own: dict[str, list[list[int]]]
    missed: list[list[int]]
    plain: list[list[int]]
    plain_codes: Codes
    answered: list[tuple[list[int], list[int]]]
    ranged: list[list[int]]
    guarded: dict[str, list[list[int]]]

    def grounds(self, asked: Sequences, loss: float) -> Grounds:
        """What ranges are certified on, with these prompts answered in full; `loss` is that of `answered` unsteered."""
        return Grounds(asked=asked, plain=self.plain, answered=self.answered, loss=loss)


def trials_of(fit: Fit, openings: Openings, prompts: Prompts) -> Trials:
    """At most `calibration` prompts of each kind."""
    most = fit.settings.calibration
    plain = [prompt for prompt in prompts.items if prompt.group == "plain"]
    borderline = [prompt.ids for prompt in prompts.items if prompt.group == "borderline"][:most]
    harmful = [prompt.ids for prompt in prompts.items if prompt.group == "harmful"][:most]
    own = {
        name: of_common_length(
            [prompt.ids for prompt in prompts.items if prompt.category == name and prompt.group != "harmful"], most
        )
        for name in fit.categories
    }
    lead = [] if openings.respond is None else [openings.respond]
    answered = [
        (prompt.ids, [*lead, *prompt.answer[:ANSWER_TOKENS]]) for prompt in plain if len(prompt.answer) >= ANSWER_TOKENS
    ]
    # Of lengths that are common, so that few passes are small; doses differ far more than lengths do.
    ids = of_common_length([prompt.ids for prompt in plain], most)
    to_refuse = [prompts.items[index] for index in prompts.where(Kind.REFUSE)]
    wanted = [prompt.ids for prompt in to_refuse]
    refused = arm_codes(fit.loaded, openings, fit.categories, wanted, [UNSTEERED])[0]
    shared = Counter(len(prompt) for prompt, _ in answered)
    return Trials(
        own={name: own[name] or borderline for name in fit.categories},
        missed=[wanted[index] for index in np.flatnonzero(refused == ANSWERED)][:most],
        plain=ids,
        plain_codes=arm_codes(fit.loaded, openings, fit.categories, ids, [UNSTEERED])[0],
        answered=sorted(answered, key=lambda pair: -shared[len(pair[0])])[: fit.settings.ranged],
        ranged=of_common_length(borderline + harmful, fit.settings.ranged),
        guarded={name: _guarded(to_refuse, name, fit.settings.ranged) for name in fit.categories},
    )


def _guarded(to_refuse: Sequence[Prompt], category: str, most: int) -> list[list[int]]:
    own = of_common_length([prompt.ids for prompt in to_refuse if prompt.category == category], most)
    return own + of_common_length([prompt.ids for prompt in to_refuse if prompt.category != category], most - len(own))
