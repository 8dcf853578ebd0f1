"""What fits are tested on: a tiny random Llama with refusal tokens and the demo's chat template, made on the spot, and
topic fits on a planted model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from steering.demo.tokenizer import train_tokenizer
from steering.fit.activations import LoadedModel, load_model
from steering.fit.categories import CATEGORIES
from steering.fit.control import Fit
from tests.unit.fit.made_up import SMALL, on_made_up_prompts, small_fit
from tests.unit.fit.planted_fits import Fitted, planted_fit

MakeFit = Callable[..., Fitted]


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 3 blocks, width 16, saved in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer(["how do i tie a knot", "what is tea made of"], vocabulary=300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> LoadedModel:
    """The random Llama, loaded in float32."""
    return load_model(tiny_path, CATEGORIES)


@pytest.fixture
def make_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeFit:
    """Makes topic fits in one folder whose pictures are empty files: drawing takes longer than all else."""
    monkeypatch.setattr("steering.fit.topics.draw_stage", lambda path, _draw, *_results: path.touch())
    return partial(planted_fit, tmp_path)


@pytest.fixture
def fit(tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """A fit of the tiny random model on made-up prompts, nothing run yet."""
    on_made_up_prompts(monkeypatch)
    return small_fit(tiny, tmp_path, SMALL)
