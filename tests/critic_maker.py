"""Makes critics whose heads are in their checkpoints, so that nothing about them is drawn when they are loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForTokenClassification

from tests.model_maker import make_model


def make_critic(directory: Path, *, seed: int, hidden: int = 32) -> Path:
    """A random value network as an exported critic is: a Hugging Face directory with a scalar head."""
    make_model(directory, seed=seed, hidden=hidden)
    torch.manual_seed(seed)  # of the head
    AutoModelForTokenClassification.from_pretrained(directory, num_labels=1).save_pretrained(directory)
    return directory
