"""Model folders that several files of tests read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from disk_forms import MEAN, STD, VIT, by_hand, digits
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    """A tiny ViT trained for a few seconds on digits, with a preprocessor config."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**VIT))
    images, labels = digits()
    x, y = by_hand(images), torch.tensor(labels)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        pick = torch.randint(0, len(x), (128,))
        optimiser.zero_grad()
        cross_entropy(model(x[pick]).logits, y[pick]).backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("models") / "vit"
    model.save_pretrained(folder)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 8, "width": 8},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN],
        "image_std": [STD],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="session")
def plain_vit(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "vit"
    ViTForImageClassification(ViTConfig(**VIT)).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(plain_vit, tmp_path):
    return Path(shutil.copytree(plain_vit, tmp_path / "copy"))
