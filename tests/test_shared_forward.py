"""One row per pair against two rows: the same rewards and gradients for every family that is said to be able to."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_dt2it import (
    MultimodalPreferenceCollator,
    MultimodalRewardConfig,
    MultimodalRewardTrainer,
    load_reward_model,
    modeling,
)
from trl_dt2it.encoding import encode_branches
from trl_dt2it.shared_forward import decide_share_prefix, why_not_shared
from trl_dt2it.shared_prefix import pack_branches

from .families import FAMILIES, example_images, family_dir
from .flash_stand_in import install
from .pairs import (
    SHARING_FAMILIES,
    collate,
    gradient_difference,
    model_of,
    plain_two_rows,
    processor_of,
    rewards_and_gradients,
)
from .rows import make_dataset, make_rows, png


OTHER_FAMILIES = [family for family in FAMILIES if family not in SHARING_FAMILIES]


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def compare(family: str, rows: list[dict], model=None) -> None:
    """Rewards to 1e-5 and gradients to 1e-4, in one row and in two."""
    model = model or model_of(family)
    one, two = collate(family, rows, share_prefix=True), collate(family, rows)
    assert "pair_layout" in one and "pair_layout" not in two
    expected, expected_gradients = rewards_and_gradients(model, plain_two_rows(two))
    assert expected.shape == (2 * len(rows),) and expected.std() > 1e-3
    rewards, gradients = rewards_and_gradients(model, one)
    assert (rewards - expected).abs().max() <= 1e-5
    assert gradient_difference(gradients, expected_gradients) <= 1e-4


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
        branches, tensors = encode_branches([rendered], processor)
        groups.append([branch[0] for branch in branches])
        images.append(tensors)
        with torch.no_grad():
            for branch in groups[-1]:
                single = {key: value[None] for key, value in branch.items()}
                expected.append(model(**single, **tensors).logits[0, 0])
    packed = pack_branches(groups, {processor.image_token_id})
    assert packed["pair_layout"].shape == (2, 6)
    if family in ("llava_next", "smolvlm"):  # tiles, padded to the row that has most
        with torch.no_grad():
            parts = [
                model(**pack_branches([g], {processor.image_token_id}), **t).logits[:, 0]
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


@pytest.mark.parametrize("family", SHARING_FAMILIES)
def test_flash_attention_varlen_call(family, monkeypatch):
    """The FlashAttention path on the CPU: one call a layer, through an exact stand-in for the kernel."""
    calls = install(monkeypatch)
    rows = make_rows(3, num_images=(1, 0))
    model = model_of(family)
    batch = collate(family, rows, share_prefix=True)
    expected, expected_gradients = rewards_and_gradients(model, batch)
    assert not calls
    decoder = model.model.get_decoder()
    decoder.config._attn_implementation_internal = "flash_attention_2"  # setting it asks for a GPU
    rewards, gradients = rewards_and_gradients(model, batch)
    assert decoder.config._attn_implementation == "shared_prefix_flash_attention_2"
    assert (rewards - expected).abs().max() <= 1e-5
    assert gradient_difference(gradients, expected_gradients) <= 1e-4
    prefix, chosen, rejected = batch["pair_layout"].sum(0).tolist()
    assert [(call["queries"], call["keys"]) for call in calls] == [
        (prefix + chosen + rejected, 2 * prefix + chosen + rejected)
    ] * decoder.config.num_hidden_layers
    assert all(call["causal"] for call in calls)


def test_the_mask_that_cuda_kernels_know_by_name():
    from torch.nn.attention.bias import causal_lower_right

    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    mask = torch.ones(3, 8, dtype=torch.bool).tril(5)
    named = attend(query, key, value, attn_mask=causal_lower_right(3, 8))
    torch.testing.assert_close(named, attend(query, key, value, attn_mask=mask))


def test_vision_tower_and_head_run_on_no_more_than_is_read(monkeypatch):
    """Pixels of each image once, in one row and in two; the head on the tokens that are read; no language head."""
    model, rows = model_of("qwen3_vl"), make_rows(3, num_images=(1, 2))
    seen, scored = [], []
    model.model.visual.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model.score.register_forward_pre_hook(lambda _, args: scored.append(tuple(args[0].shape)))
    for share_prefix in (True, False):
        batch = collate("qwen3_vl", rows, share_prefix=share_prefix)
        model(**batch)
        assert seen.pop() == len(batch["pixel_values"]) == batch["image_grid_thw"].prod(1).sum()
        assert len(batch["image_grid_thw"]) == 4
        assert scored.pop() == (6, model.config.get_text_config().hidden_size)
    assert not seen and not scored
    assert not any("lm_head" in name for name, _ in model.named_modules())


def test_the_last_feed_forward_part_runs_on_the_tokens_that_are_read():
    model, rows = model_of("qwen3_vl"), make_rows(3, num_images=(1, 2))
    one, two = collate("qwen3_vl", rows, share_prefix=True), collate("qwen3_vl", rows)
    model(**one)  # installs what leaves the others out
    seen = []
    for layer in model.model.language_model.layers:
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    model(**one)
    assert seen == [one["input_ids"].shape, (1, 6)]
    seen.clear()
    model(**two)
    assert seen == [two["input_ids"].shape] * 2


def test_rope_index_is_computed_once(monkeypatch):
    model, batch = model_of("qwen3_vl"), collate("qwen3_vl", make_rows(2, num_images=(1,)), share_prefix=True)
    calls = []
    original = type(model.model).get_rope_index

    def count(self, *args, **kwargs):
        calls.append(kwargs["input_ids"].shape)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "get_rope_index", count)
    model(**batch)
    assert calls == [(2, int(batch["pair_layout"][:, 0].max()) + 1)]


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


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_families_that_cannot_are_refused_by_name(family, tmp_path):
    model = model_of(family)
    assert decide_share_prefix("auto", model) is False
    with pytest.raises(ValueError, match=f"`share_prefix=True`, but the model is of the family `{family}`"):
        decide_share_prefix("true", model)
    batch = collate(family, make_rows(2, num_images=(1,)), share_prefix=True)
    with pytest.raises(ValueError, match="cannot read one row per pair: it is of the family"):
        model(**batch)


@pytest.mark.parametrize("family", SHARING_FAMILIES)
def test_families_that_can(family):
    model = model_of(family)
    assert why_not_shared(model) is None
    assert decide_share_prefix("auto", model) and decide_share_prefix("true", model)
    assert not decide_share_prefix("false", model)


def test_eager_attention_and_sliding_layers_are_refused():
    model = model_of("qwen3_vl", attn_implementation="eager")
    assert 'has `attn_implementation="eager"`' in why_not_shared(model)
    model = model_of("llava")
    model.config.text_config.sliding_window = 16
    assert "sliding" in why_not_shared(model)


def test_a_layout_that_is_not_that_of_the_row():
    batch = collate("qwen3_vl", make_rows(1), share_prefix=True)
    with pytest.raises(ValueError, match="`pair_layout` describes one row of .* tokens, but `input_ids` has shape"):
        model_of("qwen3_vl")(**{**batch, "input_ids": batch["input_ids"][:, 1:]})


def test_saved_configuration_does_not_name_the_attention(tmp_path):
    model = model_of("qwen3_vl")
    model(**collate("qwen3_vl", make_rows(1), share_prefix=True))
    model.save_pretrained(tmp_path)
    assert "shared_prefix" not in (tmp_path / "config.json").read_text()
    again = load_reward_model(tmp_path, allow_new_head=False)
    assert type(again) is modeling.Qwen3VLForSequenceClassification


# ------------------------------------------------------------------------------------------------------------ trainer


def train(family: str, output_dir, **options) -> tuple[list[float], dict]:
    args = MultimodalRewardConfig(
        str(output_dir),
        **{
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "num_train_epochs": 2,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 7,
            **options,
        },
    )
    data = make_dataset(5, num_images=(1, 2, 0))
    trainer = MultimodalRewardTrainer(str(family_dir(family)), args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return log, trainer.evaluate(), trainer


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava", "gemma3"])
def test_training_is_the_same(family, tmp_path):
    one, one_eval, trainer = train(family, tmp_path, share_prefix="auto")
    two, two_eval, other = train(family, tmp_path, share_prefix=False)
    assert trainer.data_collator.share_prefix is (family != "gemma3")
    assert other.data_collator.share_prefix is False
    assert len(one) == len(two) == 6
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
        assert ours["num_tokens"] == theirs["num_tokens"]
    for name in ("eval_loss", "eval_accuracy", "eval_margin"):
        assert one_eval[name] == pytest.approx(two_eval[name], rel=1e-3, abs=1e-4)


def test_wishes_of_the_configuration(tmp_path):
    for wish, kept in ((True, "true"), ("False", "false"), ("auto", "auto")):
        assert MultimodalRewardConfig(str(tmp_path), share_prefix=wish, use_cpu=True, bf16=False).share_prefix == kept
    with pytest.raises(ValueError, match="`share_prefix` is 'sometimes'; choose one of auto, true, false"):
        MultimodalRewardConfig(str(tmp_path), share_prefix="sometimes", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="`share_prefix=True`, but the model is of the family `gemma3`"):
        train("gemma3", tmp_path, share_prefix=True)


def test_text_models_have_two_rows(tmp_path):
    """transformers' own classes know no layout, and are left as they are."""
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    tokenizer = processor_of("qwen3_vl").tokenizer
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=8, num_labels=1, **sizes)
    assert "is of the family `qwen3`" in why_not_shared(Qwen3ForSequenceClassification(config))
