"""Stage `ranges`: up to which strength each edit leaves answers whole.

Nothing beyond the largest strength that was tried is certified, whatever comes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steering.engine.asks import Ask, EditOrder
from steering.errors import FitError
from steering.evaluate.judge import is_broken
from steering.evaluate.reasoning import without_reasoning
from steering.fit.datasets import thinned
from steering.fit.sources import Use
from steering.fit.stages import Result
from steering.fit.topic_answers import Measured
from steering.fit.topic_candidates import Candidate
from steering.fit.topic_fit import Session, TopicFit
from steering.fit.topic_prompts import Role


def certify(
    fit: TopicFit,
    measured: Measured,
    edits: Mapping[str, Candidate],
    session: Session,
    digest: str,
    after: Sequence[Mapping[str, Any]],
) -> Result:
    """By edit the share of broken answers at each strength, and the largest certified strength; 0 where 1 is not."""
    return fit.stage(
        "ranges",
        lambda: _certify(fit, measured, edits, session, digest),
        of=("strengths", "most_spoiled", "ranged", "max_tokens"),
        after=after,
        given={"edits": {name: one.to_json() for name, one in edits.items()}},
    )


def require_certified(ranges: Mapping[str, Any], name: str) -> None:
    """Raises FitError where an edit that a bundle cannot be without is not certified at strength 1."""
    found = ranges["edits"][name]
    if found["maximum"] < 1.0:
        raise FitError(
            f"edit {name!r} breaks {found['broken']} of {found['n']} answers, by strength, and unsteered "
            f"{ranges['unsteered']}: there is no dose that removes enough and leaves answers whole; lower --removal, "
            "give more prompts, or look at the finder's table for a gentler configuration"
        )


def _certify(
    fit: TopicFit, measured: Measured, edits: Mapping[str, Candidate], session: Session, digest: str
) -> Result:
    settings = fit.settings
    engine = session.engine
    texts = {
        purpose: [
            measured.items[row].text
            for row in thinned(measured.rows(roles, [Use.CALIBRATE], is_judged=False), settings.ranged)
        ]
        for purpose, roles in (("comply", [Role.REFUSED]), ("refuse", [Role.INDUCED]))
    }
    cases: list[tuple[str, float, str, EditOrder | None]] = []
    for purpose, members in texts.items():
        cases += [(f"unsteered {purpose}", 0.0, text, None) for text in members]
    for name, one in edits.items():
        members = texts["refuse" if one.alpha > 0 else "comply"]
        cases += [(name, share, text, one.order(digest, share)) for share in settings.strengths for text in members]
    distinct = list(dict.fromkeys(text for _, _, text, _ in cases))
    ids = dict(zip(distinct, fit.prompt_ids(engine, distinct), strict=True))
    asks = [Ask(prompt=ids[text], max_tokens=settings.max_tokens, edit=order) for _, _, text, order in cases]
    broken: dict[tuple[str, float], list[bool]] = {}
    for (name, share, _, _), answer in zip(cases, fit.ask("ranges", engine, asks), strict=True):
        broken.setdefault((name, share), []).append(is_broken(without_reasoning(answer.samples[0].text)))
    unsteered = {name: sum(told) / len(told) for (name, share), told in broken.items() if share == 0.0}
    found = {}
    for name, one in edits.items():
        allowed = unsteered[f"unsteered {'refuse' if one.alpha > 0 else 'comply'}"] + settings.most_spoiled
        shares = {share: broken[name, share] for share in sorted(settings.strengths)}
        maximum = 0.0
        for share, told in shares.items():
            if sum(told) / len(told) > allowed + 1e-12:
                break
            maximum = share
        found[name] = {
            "maximum": maximum if maximum >= 1.0 else 0.0,
            "n": len(next(iter(shares.values()))),
            "broken": {f"{share:g}": sum(told) for share, told in shares.items()},
        }
    return {"edits": found, "unsteered": unsteered, "max_tokens": settings.max_tokens}
