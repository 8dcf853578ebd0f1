"""A short soak in every run of the tests; `python -m tests.soak` is the long one."""

from __future__ import annotations

from tests.dying import WAYS
from tests.soak import scripted, soak


async def test_nothing_is_lost_among_sixty_four_clients() -> None:
    """Clients that stay, leave, err and are killed, an engine that fails, bundles that come and go: every request that
    somebody waits for has an end.
    """
    with scripted() as target:
        found = await soak(target, seconds=12, streams=64, seed=6)
    assert found["lost"] == []
    assert not any(found["gauges"].values())
    assert found["states"] == [200, 200]
    assert all(act.endswith(" 200") for act in found["reloads"])
    assert set(found["ended"]) >= {"complete", "error", "left"}
    assert set(found["killed"]) == {*WAYS, "processes"}
