"""Settings of topic fits: what the paper's presets give, and for which models."""

from __future__ import annotations

import pytest

from steering.errors import UnknownPreset
from steering.fit.topic_settings import PAPER_MODELS, TopicPreset, topic_settings


@pytest.mark.parametrize("preset", [TopicPreset.PAPER_CHINA, TopicPreset.PAPER_EXTENDED])
def test_a_preset_knows_its_models_and_lists_them_for_others(preset: TopicPreset) -> None:
    """Table 1's constants for the models it has; anything else is an error that names them."""
    for known in PAPER_MODELS:
        fingerprint = {"architecture": known.architecture, "hidden_size": known.width, "layers": known.layers}
        if preset not in known.doses:
            with pytest.raises(UnknownPreset, match="Qwen3-Next-80B-A3B-Thinking"):
                topic_settings(preset, model=known.name, fingerprint=fingerprint)
            continue
        settings = topic_settings(preset, model=f"models/{known.name.lower()}", fingerprint=fingerprint)
        assert settings.doses == known.doses[preset]
        assert settings.is_literal
        assert not settings.repositions
        assert settings.ridge.value == 1e-2
        assert (settings.max_tokens == 8192) == known.thinks
        with pytest.raises(UnknownPreset, match="this model has"):
            topic_settings(preset, model=known.name, fingerprint={**fingerprint, "layers": 12})
    with pytest.raises(UnknownPreset, match="top 16, α -0.15" if "extended" in preset else "top 4, α -0.75"):
        topic_settings(preset, model="llama", fingerprint={})
