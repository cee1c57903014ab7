"""Rows with videos, given as frames: in one row and in two, mixed with images and text, and as a server reads them."""

import pytest
import torch
from datasets import Dataset, Features, Image, List
from transformers.video_utils import VideoMetadata

from trl_dt2it import MultimodalPreferenceCollator, MultimodalRewardConfig, MultimodalRewardTrainer
from trl_dt2it.data import load_image
from trl_dt2it.data.columns import leave_images_encoded

from ..families import FAMILIES, family_dir
from ..pairs import (
    SHARING_FAMILIES,
    collate,
    gradient_difference,
    model_of,
    plain_two_rows,
    processor_of,
    rewards_and_gradients,
)
from ..rows import make_rows, video_rows


VIDEO_FAMILIES = [
    *("gemma4", "glm4v", "internvl", "llava_onevision", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl"),
    *("qwen3_vl_moe", "smolvlm"),
]


def mixed_rows(family: str) -> list[dict]:
    """Videos, an image and text alone. GLM-4V writes images and videos with one token, and transformers does not take
    both in a batch."""
    first, second = video_rows()
    return [first, *make_rows(2, seed=1, num_images=(0 if family == "glm4v" else 1, 0)), second]


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_layouts_agree_and_equal_single_conversations(family):
    rows, model = mixed_rows(family), model_of(family)
    two = collate(family, rows)
    expected, expected_gradients = rewards_and_gradients(model, plain_two_rows(two))
    assert expected.std() > 1e-3
    batches = [two] + [collate(family, rows, share_prefix=True)] * (family in SHARING_FAMILIES)
    for batch in batches:
        rewards, gradients = rewards_and_gradients(model, batch)
        assert (rewards - expected).abs().max() <= 1e-5
        assert gradient_difference(gradients, expected_gradients) <= 1e-4

    processor = processor_of(family)
    for side, reward in (("chosen", expected[0]), ("rejected", expected[4])):  # of the first row, as a server does it
        text = processor.apply_chat_template([*rows[0]["prompt"], *rows[0][side]], tokenize=False)
        metadata = VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=[0, 1, 2, 3], duration=2.0)
        single = processor(
            text=[text],
            videos=[[load_image(frame) for frame in rows[0]["videos"][0]]],
            do_sample_frames=False,
            video_metadata=[metadata],
            add_special_tokens=False,
            return_tensors="pt",
        )
        with torch.no_grad():
            torch.testing.assert_close(model(**single).logits[0, 0], reward, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_frames_a_second_are_read(family):
    """Qwen3-VL writes the time before each pair of frames, Qwen2.5-VL spreads its positions."""
    row = video_rows((6,))[0]
    model = model_of(family).eval()
    slow = {**row, "videos": [{"frames": row["videos"][0], "fps": 0.5}]}
    with torch.no_grad():
        rewards, slow_rewards = (model(**collate(family, [r], share_prefix=True)).logits for r in (row, slow))
    assert (rewards - slow_rewards).abs().max() > 1e-4


def test_number_of_frames_may_differ():
    for family in ("qwen3_vl", "internvl", "smolvlm"):
        rows, model = video_rows((2, 6)), model_of(family)
        expected, _ = rewards_and_gradients(model, plain_two_rows(collate(family, rows)))
        rewards, _ = rewards_and_gradients(model, collate(family, rows, share_prefix=True))
        torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="differ in their number of frames"):
        collate("llava_onevision", video_rows((2, 6)))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(VIDEO_FAMILIES)))
def test_families_without_videos_say_so(family):
    with pytest.raises(ValueError, match="The row has a video, but .*Processor reads none"):
        collate(family, video_rows((2,)))


def test_training_on_videos(tmp_path):
    rows = video_rows((2, 4, 2))
    rows = [{**row, "videos": [v["frames"] if isinstance(v, dict) else v for v in row["videos"]]} for row in rows]
    text = Dataset.from_list(
        [{k: v for k, v in row.items() if k not in ("images", "videos")} for row in rows]
    ).features
    features = Features({**text, "images": List(Image()), "videos": List(List(Image()))})
    data = Dataset.from_list(rows, features=features)
    kept = leave_images_encoded(data)[0]["videos"][0][0]
    assert kept["bytes"] == rows[0]["videos"][0][0]
    args = MultimodalRewardConfig(
        str(tmp_path), per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True
    )
    trainer = MultimodalRewardTrainer(str(family_dir("qwen3_vl")), args=args, train_dataset=data)
    assert isinstance(trainer.data_collator, MultimodalPreferenceCollator) and trainer.data_collator.share_prefix
    trainer.train()
    rows[1]["videos"][0][1] = b"no image"
    with pytest.raises(ValueError, match="1 of 3 rows .*image_corrupt"):
        MultimodalRewardTrainer(str(family_dir("qwen3_vl")), args=args, train_dataset=Dataset.from_list(rows))


MEDIA = {"image": (0, 1), "images": (1, 2), "text": (0, 0), "video": None, "mixed": None}


def rows_of(kind: str, family: str) -> list[dict]:
    if kind == "video":
        return video_rows((2, 2))
    if kind == "mixed":
        return [video_rows((2,))[0], *make_rows(1, seed=3, num_images=(1,))]
    return make_rows(2, seed=4, num_images=MEDIA[kind])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share_prefix", [True, False])
def test_every_batch_calls_each_layer_equally_often(family, share_prefix):
    """Where a model is sharded, a layer is gathered by all processes at once: one that ran it more often than the
    others would wait for them for ever. A blank image or video stands in."""
    if share_prefix and family not in SHARING_FAMILIES:
        pytest.skip("two rows per pair only")
    kinds = ["image", "images", "text"]
    if family in VIDEO_FAMILIES and family != "glm4v":  # which reads one kind of media in a batch
        kinds += ["video", "mixed"]
    model = model_of(family)
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or [])]
    layers += [model.score, model.get_input_embeddings()]
    calls = [0] * len(layers)
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    media = ("image", "video") if "video" in kinds else ("image",)
    seen = set()
    for kind in kinds:
        rows, calls[:] = rows_of(kind, family), [0] * len(layers)
        batch = collate(family, rows, add_dummy_image=True, share_prefix=share_prefix, media=media)
        with torch.no_grad():
            assert len(model(**batch).logits) >= 2 * len(rows)
        assert all(calls), kind
        seen.add(tuple(calls))
    assert len(seen) == 1, seen


def test_glm4v_refuses_images_and_videos_in_one_batch():
    rows = [video_rows((2,))[0], *make_rows(1, num_images=(1,))]
    with pytest.raises(ValueError, match="reads one kind in a batch"):
        collate("glm4v", rows)
