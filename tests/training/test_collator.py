"""The batch against the plain way: every conversation through the processor by itself, images and all."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor
from trl import prepare_multimodal_messages

from trl_dt2it import MultimodalPreferenceCollator, load_reward_model
from trl_dt2it.data.images import ImageOptions
from trl_dt2it.data.rows import RowError
from trl_dt2it.training.losses import fit_strength

from ..families import FAMILIES, example_images, family_dir
from ..rows import make_rows, png, text_rows


def collate(family: str, rows: list[dict], **kwargs) -> dict:
    return MultimodalPreferenceCollator(AutoProcessor.from_pretrained(family_dir(family)), **kwargs)(rows)


@torch.no_grad()
def rewards(model, batch: dict) -> torch.Tensor:
    return model(**{key: value for key, value in batch.items() if key != "pairs"}).logits[:, 0]


@torch.no_grad()
def rewards_one_by_one(family: str, model, rows: list[dict]) -> torch.Tensor:
    """As a server does it: each conversation through `apply_chat_template`, in a batch of one."""
    processor = AutoProcessor.from_pretrained(family_dir(family))
    values = []
    for side in ("chosen", "rejected"):
        for row in rows:
            images = [collate_image(image) for image in row["images"]]
            messages = prepare_multimodal_messages([*row["prompt"], *row[side]], images)
            inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
            values.append(model(**inputs).logits[0, 0])
    return torch.stack(values)


def collate_image(image: dict) -> Image.Image:
    import io

    return Image.open(io.BytesIO(image["bytes"])).convert("RGB")


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_equal_those_of_single_conversations(family):
    """Several images, one image and none in one batch, with answers of unequal length."""
    rows = make_rows(5, num_images=(1, 2, 0))
    model = load_reward_model(family_dir(family))
    batch = collate(family, rows)
    assert batch["input_ids"].shape[0] == 10
    expected = rewards_one_by_one(family, model, rows)
    assert expected.std() > 1e-3
    torch.testing.assert_close(rewards(model, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava", "idefics3"])
def test_each_image_is_preprocessed_once_per_pair(family, monkeypatch):
    processor = AutoProcessor.from_pretrained(family_dir(family))
    seen = []
    image_processor = type(processor.image_processor)
    original = image_processor.__call__

    def count(self, images, *args, **kwargs):
        seen.extend(image for row in images for image in (row if isinstance(row, list) else [row]))
        return original(self, images, *args, **kwargs)

    monkeypatch.setattr(image_processor, "__call__", count)
    MultimodalPreferenceCollator(processor)(make_rows(3, num_images=(1, 2)))
    assert len(seen) == 4
    assert len({id(image) for image in seen}) == 4


def test_batches_do_not_leak_into_each_other():
    collator = MultimodalPreferenceCollator(AutoProcessor.from_pretrained(family_dir("qwen3_vl")))
    first, second = make_rows(2, seed=1), make_rows(2, seed=2)
    fresh = collator(second)["pixel_values"]
    collator(first)
    assert torch.equal(collator(second)["pixel_values"], fresh)
    assert not torch.equal(collator(first)["pixel_values"][:4], fresh[:4])


def test_rows_are_left_as_they_are():
    rows = make_rows(2, strength=[1.0, 2.0])
    before = copy.deepcopy(rows)
    collate("qwen3_vl", rows)
    assert rows == before


def test_pair_columns():
    rows = make_rows(3, num_images=(0,), strength=[0.0, 3.0, None], source=["a", "a", None], margin=[0.5, 0.0, -1.0])
    rows[1]["weight"] = 2.0
    normalizer = fit_strength([0.0, 3.0], ["a", "a"], how="rank")
    pairs = collate("llava", rows, normalizer=normalizer)["pairs"]
    assert list(pairs)[0] == "weight"
    assert pairs["weight"].tolist() == [1.0, 2.0, 1.0]
    assert pairs["strength"].tolist() == [0.25, 0.75, 0.5]
    assert pairs["is_tie"].tolist() == [True, False, False]
    assert pairs["margin"].tolist() == [0.5, 0.0, -1.0]
    assert pairs["source"] == ["a", "a", None]
    assert {pairs[name].shape for name in ("weight", "strength", "is_tie", "margin")} == {(3,)}


def test_padding_is_on_the_right_and_to_a_multiple():
    batch = collate("qwen3_vl", make_rows(3), pad_to_multiple_of=32)
    assert batch["input_ids"].shape[1] % 32 == 0
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    for mask, length in zip(batch["attention_mask"], lengths, strict=True):
        assert mask[:length].all() and not mask[length:].any()


def test_dummy_image_only_where_the_batch_has_none():
    text = make_rows(2, num_images=(0,))
    plain, dummy = collate("qwen3_vl", text), collate("qwen3_vl", text, add_dummy_image=True)
    assert "pixel_values" not in plain
    assert dummy["input_ids"].shape[0] == 2 * (2 + 2) and {"pixel_values", "pixel_values_videos"} <= set(dummy)
    model = load_reward_model(family_dir("qwen3_vl"))
    kept = rewards(model, dummy).reshape(2, 4)[:, :2].flatten()
    torch.testing.assert_close(kept, rewards(model, plain), rtol=1e-4, atol=1e-5)
    images = ("image",)
    assert collate("qwen3_vl", text, add_dummy_image=True, media=images)["input_ids"].shape[0] == 2 * (2 + 1)
    with_images = collate("qwen3_vl", make_rows(2, num_images=(1, 0)), add_dummy_image=True, media=images)
    assert with_images["input_ids"].shape[0] == 4


def test_string_contents_get_their_images_in_the_first_user_turn():
    image = png(example_images(1)[0])
    blocks = make_rows(1, num_images=(1,))[0]
    text = blocks["prompt"][0]["content"][1]["text"]
    strings = {
        "prompt": [{"role": "user", "content": text}],
        "chosen": [{"role": "assistant", "content": blocks["chosen"][0]["content"][0]["text"]}],
        "rejected": [{"role": "assistant", "content": blocks["rejected"][0]["content"][0]["text"]}],
    }
    as_blocks = collate("qwen3_vl", [{**blocks, "images": [image]}])
    for row in ({**strings, "images": [image]}, {**strings, "image": image}):
        assert torch.equal(collate("qwen3_vl", [row])["input_ids"], as_blocks["input_ids"])


def test_implicit_prompt_equals_explicit():
    row = make_rows(1, num_images=(2,))[0]
    implicit = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} | {"images": row["images"]}
    explicit = collate("qwen2_5_vl", [row])
    for key, value in collate("qwen2_5_vl", [implicit]).items():
        assert key in ("pairs", "image_repeats") or torch.equal(value, explicit[key])


def test_system_message_and_several_turns():
    row = make_rows(1, num_images=(1,))[0]
    first = [
        {"role": "system", "content": [{"type": "text", "text": "You judge pictures."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hello."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Good day."}]},
    ]
    row["prompt"] = first + row["prompt"]
    processor = AutoProcessor.from_pretrained(family_dir("qwen3_vl"))
    batch = collate("qwen3_vl", [row])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text.index("You judge") < text.index("Hello") < text.index("Good day") < text.index("<|image_pad|>")
    model = load_reward_model(family_dir("qwen3_vl"))
    torch.testing.assert_close(
        rewards(model, batch), rewards_one_by_one("qwen3_vl", model, [row]), rtol=1e-4, atol=1e-5
    )


def test_arrow_round_trip_changes_nothing():
    """Arrow gives image blocks `text: None` and the like."""
    rows = make_rows(2, num_images=(1, 0))
    again = Dataset.from_list(rows).to_list()
    assert again[0]["prompt"][0]["content"][0] == {"text": None, "type": "image"}
    assert torch.equal(collate("qwen3_vl", again)["input_ids"], collate("qwen3_vl", rows)["input_ids"])


def test_plain_text_rows_end_with_eos():
    processor = AutoProcessor.from_pretrained(family_dir("qwen3_vl"))
    tokenizer = processor.tokenizer
    row = text_rows(1, plain=True)[0]
    ids = MultimodalPreferenceCollator(tokenizer)([row])["input_ids"]
    expected = tokenizer(row["prompt"] + row["chosen"] + tokenizer.eos_token)["input_ids"]
    assert ids[0, : len(expected)].tolist() == expected


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        (lambda r: r["images"].pop(), "placeholder_count", "1 .* blocks, but the row has 0 images"),
        (lambda r: r["chosen"][0]["content"].append({"type": "image"}), "image_in_answer", "only the prompt may show"),
        (
            lambda r: r["rejected"][0]["content"][0].update(text="no<|im_end|>"),
            "special_token",
            "contains the special token '<|im_end|>'".replace("|", r"\|"),
        ),
        (lambda r: r["images"].__setitem__(0, {"bytes": b"not an image", "path": None}), "image_corrupt", ""),
        (lambda r: r["images"].__setitem__(0, "http://127.0.0.1:9/x.png"), "image_url", "127.0.0.1"),
        (lambda r: r.update(strength=-1.0), "bad_strength", "not negative"),
    ],
)
def test_bad_rows_are_named(change, reason, message):
    row = make_rows(1, num_images=(1,))[0]
    change(row)
    with pytest.raises(RowError, match=f"row 1: .*{message}") as caught:
        collate("qwen3_vl", [make_rows(1, seed=3)[0], row])
    assert caught.value.reason == reason
    with pytest.raises(RowError, match="my-pair: "):
        collate("qwen3_vl", [{**row, "pair_id": "my-pair"}])


def test_images_outside_of_the_root_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    example_images(1)[0].save(tmp_path / "out.png")
    row = {**make_rows(1, num_images=(1,))[0], "images": ["../out.png"]}
    with pytest.raises(RowError) as caught:
        collate("qwen3_vl", [row], image_options=ImageOptions(image_root=str(tmp_path / "in")))
    assert caught.value.reason == "image_outside_root"


def test_images_for_a_text_model_are_an_error():
    tokenizer = AutoProcessor.from_pretrained(family_dir("qwen3_vl")).tokenizer
    with pytest.raises(ValueError, match="reads text only"):
        MultimodalPreferenceCollator(tokenizer)(make_rows(1, num_images=(1,)))


def test_lengths_count_image_tokens():
    collator = MultimodalPreferenceCollator(AutoProcessor.from_pretrained(family_dir("qwen3_vl")))
    row = make_rows(1, num_images=(2,))[0]
    batch = collator([row])
    assert collator.lengths(row) == tuple(batch["attention_mask"].sum(1).tolist())
    assert collator.lengths({"chosen_ids": [1, 2, 3], "rejected_ids": [1]}) == (3, 1)


TEMPLATE = (
    "{%- if tools %}<|tools|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{%- endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + (message.role | upper if role_capital is defined and "
    "role_capital else message.role) }}{% if 'tool_calls' in message %}{{ message.tool_calls | tojson }}{% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for block in message.content or [] %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if block.type == 'image' else block.text }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
)


def rows_with_settings_of_their_own(with_images: bool) -> list[dict]:
    """Roles in capitals in every second row; tools as a list, of different parameters, as JSON, and none."""
    rows = make_rows(4, num_images=(1, 2, 0, 1) if with_images else (0,))
    for index, row in enumerate(rows):
        if not with_images:
            del row["images"]
        row["chat_template_kwargs"] = {"role_capital": True} if index % 2 else {"other": "x"}
        row["tools"] = [{"type": "function", "function": {"name": f"f{index}", "parameters": {f"p{index}": "int"}}}]
    rows[2]["tools"] = None
    call = [{"type": "function", "function": {"name": "f1", "arguments": {"p1": 1}}}]
    rows[1]["chosen"] = [{"role": "assistant", "content": None, "tool_calls": call}]
    return rows


@pytest.mark.parametrize(("with_images", "share_prefix"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("as_json", [True, False])
def test_each_row_has_its_own_template_settings_and_tools(with_images, share_prefix, as_json):
    """Also after a data set has given every row the keys of all others, with None."""
    processor = AutoProcessor.from_pretrained(family_dir("qwen3_vl"))
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATE
    used = processor if with_images else processor.tokenizer
    rows = rows_with_settings_of_their_own(with_images)
    expected = []
    for side in ("chosen", "rejected"):
        for row in rows:
            settings = {"tools": row["tools"], **row["chat_template_kwargs"]}
            text = used.apply_chat_template([*row["prompt"], *row[side]], tokenize=False, **settings)
            assert ("ASSISTANT" in text) is ("role_capital" in settings) and "null" not in text
            assert ("tool" in text) is (row["tools"] is not None)
            images = [collate_image(image) for image in row.get("images") or []]
            extra = {"images": images} if images else {}
            expected.append(used(text=[text], add_special_tokens=False, **extra)["input_ids"][0])
    if as_json:
        rows = [{**row, "tools": row["tools"] and json.dumps(row["tools"])} for row in rows]
    stored = list(Dataset.from_list(rows))
    assert stored[0]["chat_template_kwargs"] == {"other": "x", "role_capital": None}
    batch = MultimodalPreferenceCollator(used, share_prefix=share_prefix)(stored)
    assert ("pair_layout" in batch) is share_prefix
    if share_prefix:
        lengths = batch["pair_layout"].tolist()
        parts = iter(batch["input_ids"][0].split([length for row in lengths for length in row]))
        found = [[], []]
        for prefix, chosen, rejected in zip(parts, parts, parts, strict=True):
            found[0].append([*prefix.tolist(), *chosen.tolist()])
            found[1].append([*prefix.tolist(), *rejected.tolist()])
        found = found[0] + found[1]
    else:
        masks = batch["attention_mask"].bool()
        found = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=True)]
    assert found == [list(ids) for ids in expected]
