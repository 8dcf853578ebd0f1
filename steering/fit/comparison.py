"""Stage `compare`: the improvements over P1 side by side on calibration prompts, and which of them the default keeps.

What is in place stays unless a challenger is better beyond chance. Knows nothing of bundles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from steering.fit.ability import ANSWER_TOKENS, fed
from steering.fit.arms import ANSWERED, Codes
from steering.fit.control import Fit
from steering.fit.families import (
    BENIGN_REFUSAL,
    CATEGORY,
    LOW_RANK,
    NULL_SPACE,
    POOLED,
    RANDOM_CATEGORY,
    REPOSITION,
    Family,
)
from steering.fit.gating import PlainEdits, Readings, evidence_of, family_codes, gated
from steering.fit.openings import Openings
from steering.fit.probes import Array
from steering.fit.prompts import GROUP_KINDS, Kind, Prompts
from steering.fit.thresholds import Choice, choose, keeps, threshold_curve
from steering.terms import Edit

COMPLY_SOURCES = (CATEGORY, REPOSITION, BENIGN_REFUSAL, POOLED, LOW_RANK)
REFUSE_SOURCES = (CATEGORY, NULL_SPACE, POOLED, LOW_RANK)
SIGNIFICANT = 0.05
PLAIN_GAIN = 0.02
"""By how much less, in nats, a challenger that over-refuses as little must raise the loss of plain answers."""


class Setup(NamedTuple):
    """A default profile in the making: whose comply and whose refuse edits, and whether strength is graded."""

    comply: str
    refuse: str
    is_graded: bool = False


def compare_stage(
    fit: Fit,
    openings: Openings,
    calibrating: Prompts,
    readings: Readings,
    families: Mapping[str, Family],
    edits: Mapping[str, Edit],
    gates: Mapping[str, Any],
    after: Sequence[Mapping[str, Any]],
    *,
    unspared: Readings | None = None,
) -> dict[str, Any]:
    """Every comparison, and the setup that won them one after the other.

    Args:
        unspared: readings whose head names a refusal category for every prompt, plain ones too; None where `readings`
            do that already.
    """

    def make() -> dict[str, Any]:
        codes = {key: np.asarray(value.numpy()) for key, value in fit.tensors("gate").items()}
        youden, most = float(gates["youden"]), fit.settings.most_plain_edited
        trial = _Trial(
            fit, openings, calibrating, readings, families, edits, codes, youden=youden, most_plain_edited=most
        )
        best = Setup(CATEGORY, CATEGORY)
        rounds: list[dict[str, Any]] = []
        # A fixed threshold, as the paper's preset has, goes with the edits it was given for: no contest.
        if fit.settings.threshold is None:
            for source in COMPLY_SOURCES[1:]:
                if source in families and families[source].comply:
                    best = trial.contest(rounds, "comply edits", best, best._replace(comply=source))
            for source in REFUSE_SOURCES[1:]:
                if source in families and families[source].refuse:
                    best = trial.contest(rounds, "refuse edits", best, best._replace(refuse=source))
            best = trial.contest(rounds, "strength", best, best._replace(is_graded=True))
        final = trial.judge(best)
        for entry in rounds:
            fit.say(f"  {entry['what']}: kept {entry['kept']}, not {entry['lost']}")
        unsteered = gates["families"][CATEGORY]["unsteered"]
        shown: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
            (
                "neutral band",
                {_band(final.choice): final.choice.to_json()},
                {"hard sign at the Youden point": gates["families"][CATEGORY]["hard_sign"]},
            )
        ]
        if unspared is not None:
            members = {key: families[key] for key in {best.comply, best.refuse}}
            other = family_codes(fit, openings, calibrating.ids, unspared, members, edits)
            rival = _Trial(
                fit, openings, calibrating, unspared, families, edits, other, youden=youden, most_plain_edited=None
            ).judge(best._replace(is_graded=False))
            shown.append(
                (
                    "plain prompts",
                    {"told by the head and hardly edited": _rates(final)},
                    {"steered like all others, as in P1": _rates(rival)},
                )
            )
        wrong = gates["families"].get(RANDOM_CATEGORY)
        if wrong is not None:
            shown.append(
                (
                    "category choice",
                    {"the head's category": gates["families"][CATEGORY]["chosen"]},
                    {"another category's edits at the same thresholds": wrong["chosen"]},
                )
            )
        margins = {"safety_margin": fit.settings.safety_margin, "plain_margin": fit.settings.plain_margin}
        beside = [beside_entry(what, one, other, unsteered, **margins) for what, one, other in shown]
        for entry in beside:
            fit.say(f"  {entry['what']}: {entry['in_place']} beside {entry['beside']}: {entry['measured']}")
        return {
            "winner": best._asdict(),
            "chosen": final.choice.to_json(),
            **final.plain._asdict(),
            "rounds": rounds,
            "beside": beside,
            "rule": f"a challenger must over-refuse less on calibration prompts (paired sign test, p < {SIGNIFICANT}) "
            f"without raising the next-token loss of given answers to plain prompts by {PLAIN_GAIN:g} nats more, or "
            f"over-refuse no more (same test) and raise that loss by {PLAIN_GAIN:g} nats less; refusals of prompts to "
            "refuse are held by the choice of thresholds",
        }

    return fit.stage("compare", make, of=("safety_margin", "plain_margin", "plain_edited", "threshold"), after=after)


def beside_entry(
    what: str,
    in_place: Mapping[str, Mapping[str, Any]],
    other: Mapping[str, Mapping[str, Any]],
    unsteered: Mapping[str, float],
    *,
    safety_margin: float,
    plain_margin: float,
) -> dict[str, Any]:
    """What settings put in place, beside what they leave out, on the same prompts: measured, and deciding nothing.

    Args:
        what: that differs.
        in_place: name and rates of the one; see `Choice.to_json`.
        other: likewise of the other.
        unsteered: rates without a gate; margins are from there.
    """
    rates = {**in_place, **other}
    (name,), (rival,) = in_place, other
    told = [f"{shown}: {_margins_kept(rates[shown], unsteered, safety_margin, plain_margin)}" for shown in rates]
    less = round(rates[name]["rates"]["over"] - rates[rival]["rates"]["over"], 4)
    order = "as many" if not less else f"{100 * abs(less):.1f} points {'fewer' if less < 0 else 'more'}"
    return {
        "what": what,
        "in_place": name,
        "beside": rival,
        "measured": f"{order} over-refusals; {'; '.join(told)}",
        "rates": rates,
    }


def _margins_kept(
    found: Mapping[str, Any], unsteered: Mapping[str, float], safety_margin: float, plain_margin: float
) -> str:
    broken = []
    # Rates are rounded to four places here.
    if found["rates"]["refuse"] < unsteered["refuse"] - safety_margin - 1e-4:
        broken.append("loses refusals beyond the margin")
    if found["rates"]["plain"] > unsteered["plain"] + plain_margin + 1e-4:
        broken.append("loses plain answers beyond the margin")
    return " and ".join(broken) or "keeps both margins"


def _band(choice: Choice) -> str:
    return "neutral band" if choice.comply_below < choice.refuse_above else "hard sign"


class Plain(NamedTuple):
    """What a gate costs plain prompts.

    Attributes:
        plain_loss_added: nats that it adds to the next-token loss of given answers.
        plain_tokens_unchanged: share of tokens of those answers at which the most likely next token stays the same.
        plain_edited: share of prompts that it edits, of the group of which it edits most.
    """

    plain_loss_added: float
    plain_tokens_unchanged: float
    plain_edited: float


class _Result(NamedTuple):
    choice: Choice
    codes: Codes
    plain: Plain


def _rates(result: _Result) -> dict[str, Any]:
    return {**result.choice.to_json(), **{key: round(value, 4) for key, value in result.plain._asdict().items()}}


class _Trial:
    """The calibration prompts, with each setup judged once."""

    def __init__(
        self,
        fit: Fit,
        openings: Openings,
        prompts: Prompts,
        readings: Readings,
        families: Mapping[str, Family],
        edits: Mapping[str, Edit],
        codes: Mapping[str, Codes],
        *,
        youden: float,
        most_plain_edited: float | None,
    ) -> None:
        self.fit, self.openings, self.prompts, self.readings = fit, openings, prompts, readings
        self.families, self.edits, self.codes = families, edits, codes
        self.youden, self.most_plain_edited = youden, most_plain_edited
        able = [
            index
            for index, prompt in enumerate(prompts.items)
            if prompt.group == "plain" and len(prompt.answer) >= ANSWER_TOKENS
        ]
        self.plain = able[: 2 * fit.settings.calibration]
        lead = [] if openings.respond is None else [openings.respond]
        self.answered = [
            (prompts.items[index].ids, [*lead, *prompts.items[index].answer[:ANSWER_TOKENS]]) for index in self.plain
        ]
        self.unsteered = fed(fit.loaded, self.answered, [None] * len(self.answered))
        self.judged: dict[Setup, _Result] = {}

    def contest(self, rounds: list[dict[str, Any]], what: str, incumbent: Setup, challenger: Setup) -> Setup:
        """The better of two setups; what is found goes into `rounds`."""
        one, other = self.judge(incumbent), self.judge(challenger)
        over = np.isin(self.prompts.groups, [group for group, kind in GROUP_KINDS.items() if kind == Kind.OVER])
        wins = int(((one.codes != ANSWERED) & (other.codes == ANSWERED) & over).sum())
        losses = int(((one.codes == ANSWERED) & (other.codes != ANSWERED) & over).sum())
        less, more = sign_test(wins, losses), sign_test(losses, wins)
        gain = one.plain.plain_loss_added - other.plain.plain_loss_added
        is_better = (less < SIGNIFICANT and gain > -PLAIN_GAIN) or (more >= SIGNIFICANT and gain >= PLAIN_GAIN)
        names = [_described(what, setup) for setup in (incumbent, challenger)]
        kept, lost = reversed(names) if is_better else names
        rounds.append(
            {
                "what": what,
                "kept": kept,
                "lost": lost,
                "rates": {name: _rates(result) for name, result in zip(names, (one, other), strict=True)},
                "over_refusals_only_by": {names[0]: wins, names[1]: losses},
                "p": {"challenger over-refuses less": less, "challenger over-refuses more": more},
            }
        )
        return challenger if is_better else incumbent

    def judge(self, setup: Setup) -> _Result:
        """Thresholds of the setup's own, what they give, and what they cost plain prompts."""
        if setup not in self.judged:
            self.judged[setup] = self._graded(setup) if setup.is_graded else self._full(setup)
        return self.judged[setup]

    def _full(self, setup: Setup) -> _Result:
        comply, refuse = self.codes[f"{setup.comply}/comply"], self.codes[f"{setup.refuse}/refuse"]
        choice, codes = self._chosen(setup, self.codes["unsteered"], comply, refuse)
        shares = np.ones(len(self.prompts.items))
        return _Result(choice, codes, self._plain(setup, choice, shares))

    def _chosen(self, setup: Setup, unsteered: Codes, comply: Codes, refuse: Codes) -> tuple[Choice, Codes]:
        probability = self.readings.probability
        evidence = evidence_of(self.prompts, probability, unsteered, comply, refuse)
        fixed = self.fit.settings.threshold
        if fixed is not None:
            choice = Choice(comply_below=fixed, refuse_above=fixed, rates=evidence.rates(fixed, fixed))
        else:
            choice = choose(
                self._edits(setup).kept(threshold_curve(evidence), self.most_plain_edited),
                evidence.rates(0.0, 1.0),
                safety_margin=self.fit.settings.safety_margin,
                plain_margin=self.fit.settings.plain_margin,
                refuse_near=self.youden,
            )
        codes = gated(probability, unsteered, comply, refuse, choice.comply_below, choice.refuse_above)
        return choice, codes

    def _graded(self, setup: Setup) -> _Result:
        """Graded strength depends on the thresholds, so a few pairs are run: the full-strength one, and wider ones; and
        the pair that decides nothing, which alone is sure to keep the margins.
        """
        full = self.judge(setup._replace(is_graded=False)).choice
        family = {"graded": self._family(setup)}
        results: list[tuple[Choice, Codes, Array]] = []
        unsteered = self.codes["unsteered"]
        middle = 0.5 * (full.comply_below + full.refuse_above)
        pairs = [(low, full.refuse_above) for low in (full.comply_below, middle, full.refuse_above)]
        for low, high in [*pairs, (0.0, 1.0)]:
            shares = graded_shares(self.readings.probability, low, high)
            strengths = torch.from_numpy(shares).to(torch.float32)
            codes = family_codes(
                self.fit, self.openings, self.prompts.ids, self.readings, family, self.edits, strengths
            )
            evidence = evidence_of(
                self.prompts, self.readings.probability, unsteered, codes["graded/comply"], codes["graded/refuse"]
            )
            choice = Choice(comply_below=low, refuse_above=high, rates=evidence.rates(low, high))
            behind = gated(
                self.readings.probability,
                unsteered,
                codes["graded/comply"],
                codes["graded/refuse"],
                low,
                high,
            )
            results.append((choice, behind, shares))
        margins = {
            "safety_margin": self.fit.settings.safety_margin,
            "plain_margin": self.fit.settings.plain_margin,
        }
        nothing = results[-1][0].rates
        allowed = [result for result in results if keeps(result[0], nothing, **margins)]
        choice, behind, shares = min(allowed, key=lambda result: result[0].rates["over"])
        return _Result(choice, behind, self._plain(setup, choice, shares))

    def _family(self, setup: Setup) -> Family:
        return Family(refuse=self.families[setup.refuse].refuse, comply=self.families[setup.comply].comply)

    def _edits(self, setup: Setup) -> PlainEdits:
        family = self._family(setup)
        return PlainEdits.of(self.fit, self.prompts, self.readings.head, self.readings.probability, family)

    def _plain(self, setup: Setup, choice: Choice, shares: Array) -> Plain:
        family = self._family(setup)
        each: list[Edit | None] = []
        for index in self.plain:
            probability = self.readings.probability[index]
            name = self.fit.head_categories[int(self.readings.head[index])]
            key = None
            if probability >= choice.refuse_above and choice.refuse_above < 1.0:
                key = family.refuse.get(name)
            elif probability <= choice.comply_below:
                key = family.comply.get(name)
            each.append(None if key is None else self.edits[key])
        strengths = torch.from_numpy(shares[self.plain]).to(torch.float32)
        found = fed(self.fit.loaded, self.answered, each, strengths)
        unchanged = (found.greedy == self.unsteered.greedy).float().mean() if self.answered else torch.ones(())
        shares_edited = self._edits(setup).shares(choice.comply_below, choice.refuse_above)
        return Plain(found.loss - self.unsteered.loss, float(unchanged), max(shares_edited.values(), default=0.0))


def graded_shares(probability: Array, comply_below: float, refuse_above: float) -> Array:
    """The share of its strength that a graded gate gives each prompt; see `steering.gate`."""
    refuse = (probability - refuse_above) / max(1.0 - refuse_above, 1e-12)
    comply = (comply_below - probability) / max(comply_below, 1e-12)
    chosen: NDArray[np.float64] = np.where(probability >= refuse_above, refuse, comply)
    return np.asarray(np.clip(chosen, 0.0, 1.0))


def sign_test(wins: int, losses: int) -> float:
    """One-sided p of at least `wins` of the prompts that differ, were either outcome as likely."""
    from scipy.stats import binomtest

    if not wins + losses:
        return 1.0
    return float(binomtest(wins, wins + losses, alternative="greater").pvalue)


def _described(what: str, setup: Setup) -> str:
    if what == "strength":
        return "graded strength" if setup.is_graded else "full strength"
    return setup.comply if what.startswith("comply") else setup.refuse
