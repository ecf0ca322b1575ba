"""problems/preprocessing.py: as computed by hand, and as transformers does it."""

import numpy as np
import pytest
import torch
from disk_forms import one_line, set_config, settings
from PIL import Image

from expunge.core.errors import DataError, ModelError
from expunge.problems.preprocessing import preprocessing


def test_preprocessing_by_hand(copy):
    settings(
        copy,
        "preprocessor_config.json",
        do_resize=True,
        size={"height": 4, "width": 2},
        resample=0,
        do_rescale=True,
        rescale_factor=0.5,
        do_normalize=True,
        image_mean=[3.0],
        image_std=[4.0],
    )
    pixels = np.arange(8 * 4, dtype=np.uint8).reshape(8, 4)
    nearest = pixels[1::2, 1::2].astype(np.float64)  # PIL takes the pixel under the centre
    wanted = (nearest * 0.5 - 3.0) / 4.0
    prepare = preprocessing(copy)
    assert prepare.origin == "preprocessor_config.json"
    for image in (pixels, pixels[None], pixels[:, :, None], Image.fromarray(pixels)):
        found = prepare(image)
        assert found.shape == (1, 4, 2)
        assert found.dtype == torch.float32
        assert np.allclose(found[0].numpy(), wanted, atol=1e-6)


def test_preprocessing_without_settings_says_so(copy):
    prepare = preprocessing(copy)
    assert "assumed" in str(prepare)
    assert "8×8" in str(prepare)
    rgb = np.zeros((8, 8, 3), np.uint8)
    rgb[..., 0] = 255
    grey = prepare(Image.fromarray(rgb))
    assert grey.shape == (1, 8, 8)
    assert torch.allclose(grey, torch.tensor(76 / 255))  # ITU-R 601: 0.299 R
    assert torch.equal(prepare(rgb), grey)
    assert torch.allclose(prepare(np.full((8, 8), 51, np.uint8)), torch.tensor(0.2))
    assert prepare(np.zeros((20, 30), np.uint8)).shape == (1, 8, 8)


ORACLE = {
    "vit": ("vit", "ViT", {"size": {"height": 10, "width": 12}}),
    "convnext small": ("convnext", "ConvNext", {"size": {"shortest_edge": 9}, "crop_pct": 0.7}),
    "convnext large": ("convnext", "ConvNext", {"size": {"shortest_edge": 384}}),
    "clip": (
        "clip",
        "CLIP",
        {"size": {"shortest_edge": 11}, "crop_size": {"height": 7, "width": 8}},
    ),
    "crop larger than the image": (
        "deit",
        "DeiT",
        {"size": {"height": 6, "width": 7}, "crop_size": {"height": 9, "width": 10}},
    ),
    "crop only": ("deit", "DeiT", {"do_resize": False, "crop_size": {"height": 8, "width": 40}}),
    "nothing but scale": ("vit", "ViT", {"do_resize": False, "do_normalize": False}),
    "no scale": ("vit", "ViT", {"do_rescale": False, "size": {"height": 5, "width": 5}}),
}


@pytest.mark.parametrize("case", ORACLE)
def test_preprocessing_equals_the_processor_of_transformers(case, copy):
    module, kind, values = ORACLE[case]
    name = f"{kind}ImageProcessorPil"
    path = f"transformers.models.{module}.image_processing_pil_{module}"
    processor = getattr(pytest.importorskip(path), name)(**values)
    set_config(num_channels=3)(copy)
    processor.save_pretrained(copy)
    rng = np.random.default_rng(0)
    for shape in ((17, 23, 3), (30, 14, 3)):
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        image = Image.fromarray(pixels)
        wanted = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
        assert torch.allclose(preprocessing(copy)(image), wanted.float(), atol=2e-6)
        assert torch.allclose(preprocessing(copy)(pixels), wanted.float(), atol=2e-6)


def test_a_grey_model_takes_one_of_three_equal_means_and_refuses_others(copy):
    settings(copy, "preprocessor_config.json", image_mean=[0.5] * 3, image_std=[0.25] * 3)
    white = np.full((8, 8), 255, np.uint8)
    assert torch.allclose(preprocessing(copy)(white), torch.tensor(2.0))
    settings(copy, "preprocessor_config.json", image_mean=[0.5, 0.4, 0.3], image_std=[0.25] * 3)
    with pytest.raises(ModelError, match="3 means or deviations for 1 channel") as error:
        preprocessing(copy)
    one_line(error)


@pytest.mark.parametrize(
    "values",
    [
        {"image_processor_type": "EfficientNetImageProcessor", "size": 8},
        {"size": 8, "do_flip_channel_order": True},
        {"size": {"max_pixels": 3}},
        {"size": 8, "resample": "sharp"},
    ],
)
def test_unknown_preprocessing_is_refused(values, copy):
    settings(copy, "preprocessor_config.json", **values)
    with pytest.raises(ModelError, match=r"preprocessor_config.json") as error:
        preprocessing(copy)
    one_line(error)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.zeros((8, 8), np.uint16)),
        np.zeros((8, 8), np.float32),
        np.zeros((2, 2, 2, 2), np.uint8),
        np.zeros((8, 8, 2), np.uint8),
    ],
)
def test_what_is_no_8_bit_image_is_refused(image, plain_vit):
    with pytest.raises(DataError) as error:
        preprocessing(plain_vit)(image)
    one_line(error)
