"""The response probe: its arithmetic on made-up residuals, and residuals of generated tokens on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steering.errors import ActivationsNotFinite, TooFewPrompts
from steering.fit.activations import (
    LoadedModel,
    generated_residuals,
    greedy,
    last_residuals,
    last_residuals_at,
    steered,
)
from steering.fit.generated import write_generated
from steering.fit.openings import Opening, Openings
from steering.fit.response import (
    CALIBRATE,
    FIT,
    HELD,
    fit_response_probe,
    mean_of_first,
    share_of,
    smoothed_platt,
)
from steering.fit.response_stage import MOST_LAYERS, candidate_layers, label_answers, response_record
from steering.manifest import ProbeRecord
from steering.terms import Edit, added_direction

N, G, D = 400, 4, 6


def made_up(gap: float, *, after: int = 0) -> tuple[dict[int, Tensor], Tensor, list[bool], list[str]]:
    """Two layers of noise; in layer 1 refusals differ along one axis from token `after` on."""
    generator = torch.Generator().manual_seed(3)
    residuals = {layer: torch.randn(N, G, D, generator=generator) for layer in (0, 1)}
    refused = [number % 4 == 0 for number in range(N)]
    residuals[1][torch.tensor(refused), after:, 2] += gap
    mask = torch.ones(N, G, dtype=torch.bool)
    return residuals, mask, refused, [f"prompt {number // 2}" for number in range(N)]


def test_layer_and_tokens_are_found_and_a_half_is_the_boundary() -> None:
    """The layer that tells is chosen, with no more tokens than are needed; scores are those of the mean residual."""
    residuals, mask, refused, groups = made_up(12.0)
    probe = fit_response_probe(residuals.__getitem__, [0, 1], mask, refused, groups, tokens=(1, 2, 4, 8))
    assert (probe.layer, probe.tokens) == (1, 1)
    assert probe.linear.weight.shape == (1, D)
    assert probe.facts["accuracy"]["rate"] > 0.99
    assert {row["tokens"] for row in probe.facts["layers"]} == {1, 2, 4}, "eight tokens are more than were kept"
    held = [row for row in range(N) if share_of(groups[row]) == HELD]
    told = probe.linear.scores(residuals[1][held, 0])[:, 0] >= 0
    assert probe.facts["accuracy"]["count"] == int((told == np.array(refused)[held]).sum())
    point = probe.facts["operating_points"][0]
    assert (point["threshold"], point["positives"] + point["negatives"]) == (0.5, len(held))
    assert set(probe.facts["calibration"]["balanced"]) == {"brier", "expected_calibration_error", "bins"}


def test_tokens_are_more_where_the_first_do_not_tell() -> None:
    """Where refusals differ from the third token on, four tokens are read."""
    residuals, mask, refused, groups = made_up(3.0, after=2)
    probe = fit_response_probe(residuals.__getitem__, [1], mask, refused, groups)
    assert probe.tokens == 4
    by_tokens = probe.facts["by_tokens"]
    assert by_tokens["4"]["area"] > 0.95 > by_tokens["1"]["area"]


def test_rare_refusals_are_not_outvoted() -> None:
    """One refusal in four, hard to tell: as many refusals are told as answers, not fewer."""
    residuals, mask, refused, groups = made_up(1.0)
    found = fit_response_probe(residuals.__getitem__, [1], mask, refused, groups, tokens=(1,)).facts
    assert abs(found["refusals_told"]["rate"] - (1 - found["answers_called_refusals"]["rate"])) < 0.25
    assert found["n"]["held"]["refused"] < found["n"]["held"]["answered"] / 2


def test_shares_are_cut_by_group_and_disjoint() -> None:
    """Answers to one prompt are in one share, about three fifths are fitted on, and the cut never changes."""
    shares = [share_of(f"group {number}") for number in range(2000)]
    assert [share_of(f"group {number}") for number in range(5)] == shares[:5]
    assert {FIT, CALIBRATE, HELD} == set(shares)
    assert abs(shares.count(FIT) / 2000 - 0.6) < 0.05
    assert abs(shares.count(HELD) / 2000 - 0.2) < 0.05


def test_mean_is_over_tokens_that_there_are() -> None:
    """An answer of two tokens has the mean of two, whatever stands in the places after."""
    residuals = torch.tensor([[[1.0], [3.0], [float("nan")]], [[2.0], [4.0], [9.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert mean_of_first(residuals, mask, 3).flatten().tolist() == [2.0, 5.0]
    assert mean_of_first(residuals, mask, 1).flatten().tolist() == [1.0, 2.0]


def test_scaling_of_separable_scores_stays_finite() -> None:
    """Platt's smoothed targets: the boundary lies in the gap, and no probability is certain."""
    scores = np.array([-3.0, -2.0, -2.5, 2.0, 3.0, 2.5])
    slope, offset = smoothed_platt(scores, scores > 0, np.ones(6))
    assert slope * -1.9 + offset < 0 < slope * 1.9 + offset
    assert abs(offset) < 1e-3
    assert slope < 1.5


def test_one_sided_answers_and_broken_residuals_are_told() -> None:
    """Too few of a side names the share; NaN names the layer; answers without tokens are left out and counted."""
    residuals, mask, refused, groups = made_up(12.0)
    with pytest.raises(TooFewPrompts, match="0 refusals among"):
        fit_response_probe(residuals.__getitem__, [1], mask, [False] * N, groups)
    mask[:10] = False
    probe = fit_response_probe(residuals.__getitem__, [1], mask, refused, groups, tokens=(1,))
    assert probe.facts["left_out"] == {"no generated token was fed in": 10}
    assert sum(sum(sides.values()) for sides in probe.facts["n"].values()) == N - 10
    residuals[1][20, 0, 0] = float("nan")
    with pytest.raises(ActivationsNotFinite, match="layer 1"):
        fit_response_probe(residuals.__getitem__, [1], mask, refused, groups)


def test_residuals_of_generated_tokens_are_those_of_generation(tiny: LoadedModel) -> None:
    """Each equals the last residual of the prompt with the answer up to it; the last token of an answer is not read."""
    prompts = tiny.prompts(["how do i tie a knot", "what is tea made of", "tea"])
    answers = greedy(tiny, prompts, new_tokens=5)
    answers[1] = answers[1][:2]
    answers[2] = answers[2][:1]
    found, mask = generated_residuals(tiny, prompts, answers, layers=[0, 2], most=3)
    assert mask.sum(dim=1).tolist() == [min(3, len(answer) - 1) for answer in answers]
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        for place in range(int(mask[row].sum())):
            expected = last_residuals(tiny, [[*prompt, *answer[: place + 1]]])[0]
            for layer in (0, 2):
                assert torch.allclose(found[layer][row, place], expected[layer], atol=1e-5)
    assert float(found[0][1, 1:].abs().sum()) == 0.0


def test_residuals_on_disk_are_those_in_memory(tiny: LoadedModel, tmp_path: Path) -> None:
    """In the order of the answers, whatever shards they lie in; each layer is read by itself."""
    prompts = tiny.prompts(["how do i tie a knot", "tea", "what is tea made of", "tie"])
    answers = greedy(tiny, prompts, new_tokens=4)
    answers[1] = answers[1][:1]
    direction = torch.nn.functional.normalize(torch.ones(tiny.width), dim=0)
    edit = Edit(name="e", layers=(added_direction(layer=0, direction=direction, coefficient=2.0),))
    edits = [None, edit, edit, None]
    found, mask = generated_residuals(tiny, prompts, answers, layers=[0, 2], most=3, edits=edits)
    arguments: dict[str, Any] = {"layers": [0, 2], "most": 3, "edits": edits}
    row = 2 * 3 * tiny.width * 4
    written = write_generated(tiny, prompts, answers, tmp_path, shard_bytes=2 * row, **arguments)
    assert len(written.files) == 2
    assert torch.equal(written.mask, mask)
    for layer in (0, 2):
        torch.testing.assert_close(written.layer(layer), found[layer], atol=1e-5, rtol=1e-5)


def test_residuals_are_read_before_an_edit_of_their_own_layer_and_after_earlier_ones(tiny: LoadedModel) -> None:
    """Layer 1 is read as its block gave it; layer 2 sees the edit at the last prompt token and at generated ones."""
    direction = torch.zeros(tiny.width)
    direction[0] = 1.0
    edit = Edit(name="e", layers=(added_direction(layer=1, direction=direction, coefficient=5.0),))
    prompt = tiny.prompts(["how do i tie a knot"])[0]
    answer = greedy(tiny, [prompt], edit, new_tokens=3)[0]
    found, _ = generated_residuals(tiny, [prompt] * 2, [answer] * 2, layers=[1, 2], most=2, edits=[edit, None])
    with steered(tiny, edit, tail=3):
        expected = last_residuals(tiny, [[*prompt, *answer[:2]]])[0]
    plain = last_residuals(tiny, [[*prompt, *answer[:2]]])[0]
    # `last_residuals` keeps what the edit left, since its hooks come after: at the edited layer it is 5 further.
    assert torch.allclose(found[1][0, 1] + 5.0 * direction, expected[1], atol=1e-5)
    assert torch.allclose(found[1][0, 1], plain[1], atol=1e-5)
    assert torch.allclose(found[2][0, 1], expected[2], atol=1e-5)
    assert torch.allclose(found[2][1, 1], plain[2], atol=1e-5)
    assert not torch.allclose(found[2][0, 1], found[2][1, 1], atol=1e-2)


def test_labels_come_from_tokens_or_from_the_keyword_judge(tiny: LoadedModel) -> None:
    """Decision tokens where the model has them; else text, with broken answers left out and openings compared."""
    category, token = next(iter(tiny.categories.items()))
    respond = tiny.respond
    assert respond is not None
    has_tokens = Openings(
        refusals=(Opening(tokens=(token,), text="[x]", category=category),), respond=respond, found="tokens"
    )
    found = label_answers(tiny, has_tokens, [[token, 5], [respond, 5], [5, token], []])
    assert found.refused == [True, False, None, None]
    assert found.counts == {"refused": 1, "answered": 1, "neither": 2}

    def ids(text: str) -> list[int]:
        return list(tiny.tokenizer.encode(text, add_special_tokens=False))

    answers = [ids("i cannot help with that."), ids("tie a knot like so."), ids("tea tea tea tea tea")]
    has_openings = Openings(
        refusals=(Opening(tokens=tuple(ids("tie")[:1]), text="tie"),), respond=None, found="beginnings"
    )
    found = label_answers(tiny, has_openings, answers)
    assert found.refused == [True, False, None]
    assert found.openings_agree is not None
    assert (found.openings_agree["count"], found.openings_agree["n"]) == (0, 2)


def test_record_is_what_a_manifest_takes() -> None:
    """Its fields are those of a probe of generated tokens; the operating point is at a half."""
    residuals, mask, refused, groups = made_up(12.0)
    probe = fit_response_probe(residuals.__getitem__, [0, 1], mask, refused, groups)
    told = {"labels": "made up", "verdicts": {}, "answers": {}, "edits": []}
    record = ProbeRecord(**response_record({**told, **probe.facts}, {"seed": 1}))
    assert (record.position, record.layer, record.tokens, record.categories) == ("generated_tokens", 1, 1, ())
    assert [point.threshold for point in record.operating_points] == [0.5]
    assert record.provenance["seed"] == 1
    assert record.calibration["expected_calibration_error"] < 0.1


def test_few_layers_of_a_deep_model_are_tried() -> None:
    """All of a shallow one; of 48 a dozen, from a quarter of its depth to the last."""
    assert candidate_layers(6) == [0, 1, 2, 3, 4, 5]
    found = candidate_layers(48)
    assert (len(found), found[0], found[-1]) == (MOST_LAYERS, 12, 47)


def test_one_layer_is_read_as_among_all(tiny: LoadedModel) -> None:
    """Prompts of several lengths, in the order they were given, at every layer."""
    prompts = tiny.prompts(["what is tea", "tea", "how do I make bread at home", "bread"])
    every = last_residuals(tiny, prompts)
    for layer in range(len(tiny.blocks)):
        assert torch.allclose(last_residuals_at(tiny, prompts, layer), every[:, layer], atol=1e-5)
