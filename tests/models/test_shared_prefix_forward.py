"""One row per pair against two rows: the same rewards and gradients for every family that is said to be able to."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_dt2it import MultimodalPreferenceCollator
from trl_dt2it.models.rendering import encode_completions
from trl_dt2it.models.shared_prefix import pack_completions

from ..families import FAMILIES, example_images
from ..pairs import (
    SHARING_FAMILIES,
    answer,
    collate,
    compare,
    gradient_difference,
    model_of,
    plain_two_rows,
    processor_of,
    rewards_and_gradients,
)
from ..rows import make_rows, png


@pytest.mark.parametrize("family", SHARING_FAMILIES)
def test_one_row_equals_two(family):
    """No, one and two images in a batch, and answers of unequal length."""
    compare(family, make_rows(4, num_images=(1, 2, 0)))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_rows_with_each_image_encoded_once_equal_two_plain_rows(family):
    model, batch = model_of(family), collate(family, make_rows(4, num_images=(1, 2, 0)))
    assert batch["image_repeats"] == 2
    expected, expected_gradients = rewards_and_gradients(model, plain_two_rows(batch))
    rewards, gradients = rewards_and_gradients(model, batch)
    assert (rewards - expected).abs().max() <= 1e-5
    assert gradient_difference(gradients, expected_gradients) <= 1e-4


@pytest.mark.parametrize("family", SHARING_FAMILIES)
def test_with_gradient_checkpointing(family):
    rows = make_rows(3, num_images=(1, 0))
    model = model_of(family)
    expected, expected_gradients = rewards_and_gradients(model, plain_two_rows(collate(family, rows)))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = collate(family, rows, share_prefix=True)
    rewards, gradients = rewards_and_gradients(model, batch)
    assert (rewards - expected).abs().max() <= 1e-5
    assert gradient_difference(gradients, expected_gradients) <= 1e-4
    # Another batch in two rows between the forward pass and the backward pass that computes the layers again.
    model.zero_grad()
    loss = torch.nn.functional.softplus(-torch.sub(*model(**batch).logits[:, 0].chunk(2))).mean()
    with torch.no_grad():
        model(**collate(family, rows))
    loss.backward()
    again = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradient_difference(again, expected_gradients) <= 1e-4


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava", "internvl"])
def test_with_adapters(family):
    lora = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, modules_to_save=["score"], task_type="SEQ_CLS"
    )
    torch.manual_seed(0)
    compare(family, make_rows(3, num_images=(1, 2)), model=get_peft_model(model_of(family), lora))


def test_with_saved_tensors_moved_elsewhere():
    """Activation offloading hooks every tensor that is saved for the backward pass."""
    model, batch = model_of("qwen3_vl"), collate("qwen3_vl", make_rows(3, num_images=(1, 0)), share_prefix=True)
    expected, expected_gradients = rewards_and_gradients(model, batch)
    with torch.autograd.graph.save_on_cpu():
        rewards, gradients = rewards_and_gradients(model, batch)
    assert torch.equal(rewards, expected)
    assert gradient_difference(gradients, expected_gradients) <= 1e-6


def make_row(chosen: str, rejected: str, num_images: int = 1) -> dict:
    row = make_rows(1, num_images=(num_images,))[0]
    return {**row, "chosen": answer(chosen), "rejected": answer(rejected)}


EDGES = {
    "one pair": make_rows(1, num_images=(1,)),
    "text alone": make_rows(3, num_images=(0,)),
    "four images": [make_row("The second.", "The third one, clearly.", num_images=4)],
    "one token": [make_row("a", "b"), make_row("b", "a", num_images=0)],
    "unequal": [make_row("No.", "The flower " * 80), make_row("A temple " * 60, "Yes.")],
    "begin alike": [make_row("The red flower is on the left.", "The red flower is on the right side of it.")],
    "one begins with the other": [make_row("A flower", "A flower and a temple"), make_row("It is red, yes.", "It is")],
}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava", "internvl", "idefics3"])
@pytest.mark.parametrize("edge", EDGES)
def test_edges(family, edge):
    compare(family, EDGES[edge])


def test_the_shared_part_covers_what_answers_have_in_common():
    layout = collate("qwen3_vl", EDGES["begin alike"], share_prefix=True)["pair_layout"][0]
    other = collate("qwen3_vl", [make_row("The left.", "A temple.")], share_prefix=True)["pair_layout"][0]
    assert layout[0] > other[0] + 10


@pytest.mark.parametrize("shared_start", ["", "a"])
def test_plain_strings_without_and_with_a_prompt(shared_start):
    """Without a prompt the two sides may share nothing; the tokenizer adds no token in front."""
    rows = [
        {"prompt": shared_start, "chosen": "red flower", "rejected": "old temple, blue sky"},
        {"prompt": "The picture shows ", "chosen": "a flower", "rejected": "a temple"},
    ]
    layout = collate("qwen3_vl", rows, share_prefix=True)["pair_layout"]
    assert layout[0, 0] == len(shared_start)
    compare("qwen3_vl", rows)


def test_tokens_are_those_of_the_whole_conversation_also_where_they_merge():
    """Prompt and answer together may have other tokens than one after the other; serving sees them together."""
    tokenizer = processor_of("qwen3_vl").tokenizer
    text = "The flower in the photograph"
    ids = tokenizer(text)["input_ids"]
    cut = next(
        i
        for i in range(2, len(text))
        if tokenizer(text[:i])["input_ids"] != ids[: len(tokenizer(text[:i])["input_ids"])]
    )
    row = {"prompt": text[:cut], "chosen": text[cut:], "rejected": "x is wet"}
    whole = tokenizer(text + tokenizer.eos_token)["input_ids"]
    assert whole[: len(tokenizer(row["prompt"])["input_ids"])] != tokenizer(row["prompt"])["input_ids"]
    batch = collate("qwen3_vl", [row], share_prefix=True)
    prefix, chosen, _ = batch["pair_layout"][0].tolist()
    assert batch["input_ids"][0, : prefix + chosen].tolist() == whole
    compare("qwen3_vl", [row])


def test_pairs_and_answers_do_not_see_each_other():
    """The reward of chosen is the same, bit for bit, whatever rejected says; that of a pair, whatever others say."""
    model = model_of("qwen3_vl").eval()
    rows = make_rows(2, num_images=(1,))
    changed = copy.deepcopy(rows)
    text = changed[0]["rejected"][0]["content"][0]["text"]
    changed[0]["rejected"] = answer(text[::-1])
    with torch.no_grad():
        before = model(**collate("qwen3_vl", rows, share_prefix=True)).logits[:, 0]
        after = model(**collate("qwen3_vl", changed, share_prefix=True)).logits[:, 0]
    assert (before[2] - after[2]).abs() > 1e-3
    torch.testing.assert_close(before[[0, 1, 3]], after[[0, 1, 3]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_swapping_the_answers_negates(family):
    model, rows = model_of(family).eval(), make_rows(3, num_images=(1, 0))
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    with torch.no_grad():
        chosen, rejected = model(**collate(family, rows, share_prefix=True)).logits[:, 0].chunk(2)
        other_chosen, other_rejected = model(**collate(family, swapped, share_prefix=True)).logits[:, 0].chunk(2)
    torch.testing.assert_close(other_chosen, rejected, rtol=0, atol=1e-5)
    torch.testing.assert_close(other_rejected, chosen, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_next", "smolvlm"])
def test_many_candidates_of_one_prompt(family):
    """Five answers behind one prompt, and three behind another in the same row."""
    model = model_of(family).eval()
    rows = make_rows(2, num_images=(1, 2))
    candidates = [
        ["A flower.", "A temple.", "Yes", "The red one is left.", "A flower too."],
        ["No.", "Both.", "Left."],
    ]
    processor, groups, images, expected = processor_of(family), [], [], []

    collator = MultimodalPreferenceCollator(processor)
    for row, texts in zip(rows, candidates, strict=True):
        rendered = collator.render(row)
        messages = [[*row["prompt"], *answer(text)] for text in texts]
        rendered.texts = [processor.apply_chat_template(conversation, tokenize=False) for conversation in messages]
        branches, tensors = encode_completions([rendered], processor)
        groups.append([branch[0] for branch in branches])
        images.append(tensors)
        with torch.no_grad():
            for branch in groups[-1]:
                single = {key: value[None] for key, value in branch.items()}
                expected.append(model(**single, **tensors).logits[0, 0])
    packed = pack_completions(groups, {processor.image_token_id})
    assert packed["pair_layout"].shape == (2, 6)
    if family in ("llava_next", "smolvlm"):  # tiles, padded to the row that has most
        with torch.no_grad():
            parts = [
                model(**pack_completions([g], {processor.image_token_id}), **t).logits[:, 0]
                for g, t in zip(groups, images, strict=True)
            ]
        torch.testing.assert_close(torch.cat(parts), torch.stack(expected), rtol=0, atol=1e-5)
        return
    tensors = {key: torch.cat([value, images[1][key]]) for key, value in images[0].items()}
    with torch.no_grad():
        rewards = model(**packed, **tensors).logits[:, 0]
    # The second group has three: it lacks the first two places.
    order = [0, 1, 2, 5, 3, 6, 4, 7]
    torch.testing.assert_close(rewards, torch.stack(expected)[order], rtol=0, atol=1e-5)


def different_prompts() -> list[dict]:
    """Implicit prompts that differ before the image."""
    image = png(example_images(1)[0])
    sides = {}
    for side, question in (("chosen", "What is left?"), ("rejected", "Which is red?")):
        user = {"role": "user", "content": [{"type": "text", "text": question}, {"type": "image"}]}
        sides[side] = [user, *answer(f"The {side} one.")]
    return [{**sides, "images": [image]}, make_rows(1, num_images=(1,))[0]]


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_sides_that_differ_before_the_image_get_two_rows(family):
    rows = different_prompts()
    if family == "llava":  # its template puts images first, so that nothing differs before them
        compare(family, rows)
        return
    batch = collate(family, rows, share_prefix=True)
    assert "pair_layout" not in batch and batch["input_ids"].shape[0] == 4
    model = model_of(family)
    expected, _ = rewards_and_gradients(model, plain_two_rows(batch))
    model(**collate(family, make_rows(1), share_prefix=True))  # from now on with the other attention
    assert model.model.get_decoder().config._attn_implementation == "shared_prefix_sdpa"
    rewards, _ = rewards_and_gradients(model, batch)
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-5)
