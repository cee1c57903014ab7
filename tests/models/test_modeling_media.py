"""Placeholders of images and videos that come without pixels are refused, whatever the layout."""

import pytest
import torch

from ..pairs import SHARING_FAMILIES, collate, model_of
from ..rows import make_rows, video_rows
from .test_rendering_videos import VIDEO_FAMILIES


PIXELS = ("pixel_values", "pixel_values_videos")


def without_pixels(batch: dict) -> dict:
    """Tokens, and what tells of them, as a trainer gives them to a reward model that it takes for a text model."""
    names = ("input_ids", "attention_mask", "pair_layout", "mm_token_type_ids", "token_type_ids")
    return {name: value for name, value in batch.items() if name in names}


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_vl", "glm4v", "gemma3", "gemma4", "llava_onevision", "idefics3"])
def test_placeholders_without_pixels_are_refused(family):
    model = model_of(family).eval()
    for share in (False, True)[: 1 + (family in SHARING_FAMILIES)]:
        pictures = collate(family, make_rows(2, num_images=(1,)), share_prefix=share)
        model(**pictures)
        with pytest.raises(ValueError, match="placeholders of images without `pixel_values`.*as_reward_func"):
            model(**without_pixels(pictures))
        with pytest.raises(ValueError, match="placeholders of images"):
            model.train()(**without_pixels(pictures))
        model.eval()(**collate(family, make_rows(2, num_images=(0,)), share_prefix=share))
        if family not in VIDEO_FAMILIES:
            continue
        videos = collate(family, video_rows(), share_prefix=share)
        model(**videos)
        with pytest.raises(ValueError, match="placeholders of (images|videos) without `pixel_values"):
            model(**without_pixels(videos))


@torch.no_grad()
def test_one_kind_of_pixels_does_not_stand_for_the_other():
    rows = [video_rows()[0], *make_rows(1, num_images=(1,))]
    model, batch = model_of("qwen3_vl").eval(), collate("qwen3_vl", rows)
    model(**batch)
    for name, kind in zip(PIXELS, ("images", "videos"), strict=True):
        with pytest.raises(ValueError, match=f"placeholders of {kind} without `{name}`"):
            model(**{key: value for key, value in batch.items() if key != name})


@torch.no_grad()
def test_features_that_come_ready_made_are_pixels_enough():
    model, batch = model_of("qwen3_vl").eval(), collate("qwen3_vl", make_rows(2, num_images=(1,)))
    expected = model(**batch).logits
    pixels = torch.cat([batch.pop("pixel_values")] * 2)
    grids = torch.cat([batch.pop("image_grid_thw")] * batch.pop("image_repeats"))
    features = model.model.get_image_features(pixels, grids, return_dict=True)
    ready = model(**batch, image_grid_thw=grids, mm_encoder_outputs={"image": features}).logits
    torch.testing.assert_close(ready, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="placeholders of images"):
        model(**batch, image_grid_thw=grids, mm_encoder_outputs={"image": None})
