"""Pairs of one prompt: rewards and gradients of the same pairs apart, each pair once, and prompts whole in batches."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List

from trl_dt2it import load_reward_model
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.models.families import FAMILIES
from trl_dt2it.models.modeling import load_processing_class
from trl_dt2it.training.batching import (
    EpochLengthGroupedSampler,
    TokenBatchSampler,
    count_pairs,
    pair_sizes,
    plan_training,
)
from trl_dt2it.training.collator import MultimodalPreferenceCollator
from trl_dt2it.training.grouping import GroupedSampler, arrange, find_prompts, make_units
from trl_dt2it.training.losses import EmbeddingNoise, pair_rewards
from trl_dt2it.training.selection import Selection, SelectionSampler

from ..families import family_dir
from ..rows import make_rows, sentence
from ..trainers import config, losses, trainer_for, weights


# Two that differ in the positions of tokens, one whose images are padded, and all that have a row for each answer; of
# all families, and under DDP and FSDP: `benchmarks/group_exactness.py`.
SOME = ["qwen3_vl", "qwen2_5_vl", "llava", "llava_onevision", "mistral3"]
SOME += [name for name, family in FAMILIES.items() if not family.shares_prefix]


def grouped_rows(numbers=(4, 2, 3, 3, 2), *, seed: int = 0, num_images=(1, 2, 0)) -> list[dict]:
    """All pairs of prompts with so many answers each, in a random order; of each prompt the first pair is there twice,
    and every third pair has its answers swapped."""
    rng = random.Random(seed)
    rows = []
    for prompt, number in zip(make_rows(len(numbers), seed=seed, num_images=num_images), numbers, strict=True):
        answers = []
        while len(answers) < number:
            if (answer := sentence(rng)) not in answers:
                answers.append(answer)
        pairs = [pair if index % 3 else pair[::-1] for index, pair in enumerate(itertools.combinations(answers, 2))]
        for sides in [pairs[0], *pairs]:
            row = copy.deepcopy(prompt)
            for side, answer in zip(("chosen", "rejected"), sides, strict=True):
                row[side] = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            rows.append({**row, "weight": rng.uniform(0.5, 2.0)})
    rng.shuffle(rows)
    return rows


def dataset_of(rows: list[dict]) -> Dataset:
    features = Dataset.from_list([{k: v for k, v in row.items() if k != "images"} for row in rows]).features
    return Dataset.from_list(rows, features=Features({**features, "images": List(Image())}))


def loss_of(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = {name: value for name, value in batch.items() if name != "pairs"}
    pairs = batch["pairs"]
    rewards = pair_rewards(model, tensors, len(pairs["weight"]), pairs.get("answers"))
    rewards = rewards[:, : len(pairs["weight"])]
    delta = rewards[0] - rewards[1]
    return rewards.detach(), -(pairs["weight"] * torch.nn.functional.logsigmoid(delta)).sum()


@pytest.mark.parametrize("most", [16, 3], ids="at most {} answers".format)
@pytest.mark.parametrize("family", SOME)
def test_rewards_and_gradients_are_those_of_the_pairs_apart(family, most):
    torch.manual_seed(0)
    model = load_reward_model(family_dir(family), dtype="float32")
    processor = load_processing_class(family_dir(family))
    # Some families refuse batches of rows with and without images in pairs as well.
    rows = grouped_rows()
    shares = FAMILIES[family].shares_prefix
    apart = MultimodalPreferenceCollator(processor, share_prefix=shares, add_dummy_image=True)
    together = MultimodalPreferenceCollator(
        processor, share_prefix=shares, add_dummy_image=True, group_pairs=True, max_answers_per_group=most
    )
    found = {}
    for name, collator in {"apart": apart, "together": together}.items():
        model.zero_grad()
        batch = collator(rows)
        rewards, loss = loss_of(model, batch)
        loss.backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        found[name] = batch, rewards, gradients
    (batch, expected, wanted), (grouped, rewards, gradients) = found["apart"], found["together"]
    assert "answers" not in batch["pairs"]
    assert grouped["input_ids"].numel() < 0.7 * batch["input_ids"].numel()
    if shares:
        assert batch["pair_layout"].shape[1] == 3 and grouped["pair_layout"].shape[1] == 1 + min(most, 4)
    if not shares and most == 16:
        dummies = 2 * (len(grouped["pairs"]["num_answers"]) - 5)
        assert len(grouped["input_ids"]) == 14 + dummies and len(batch["input_ids"]) == 2 * len(rows) + dummies
    for name in ("weight", "num_tokens", "has_media"):
        assert torch.equal(grouped["pairs"][name], batch["pairs"][name]), name
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, wanted[name].abs().max().item())
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-4 * scale, msg=name)


def test_pairs_that_share_nothing_make_the_batch_that_they_made(tmp_path):
    processor = load_processing_class(family_dir("qwen3_vl"))
    rows = make_rows(5)
    batches = [
        MultimodalPreferenceCollator(processor, share_prefix=True, group_pairs=on)(rows) for on in (False, True)
    ]
    one, other = batches
    assert one.keys() == other.keys() and one["pairs"].keys() == other["pairs"].keys()
    assert all(torch.equal(one[name], other[name]) for name in one if name != "pairs")


def test_noise_has_the_scale_of_the_longest_conversation_of_a_prompt():
    processor, rows = load_processing_class(family_dir("gemma3")), grouped_rows()
    lengths = {}
    for shares in (True, False):  # the layouts are the same whatever the model
        batch = MultimodalPreferenceCollator(processor, share_prefix=shares, group_pairs=True)(rows)
        noise = EmbeddingNoise(1.0)
        noise.see(batch)
        last = batch["pair_layout"].sum(dim=1).cumsum(0) - 1 if shares else None
        by_row = noise._lengths[0, last] if shares else noise._lengths[:, 0]
        lengths[shares] = sorted(set(by_row.tolist()))
        if not shares:
            assert noise._lengths.shape == batch["input_ids"].shape
            assert (by_row >= batch["attention_mask"].sum(dim=1)).all()
            longest = by_row[batch["pairs"]["answers"]]
            assert (longest[:, 0] == longest[:, 1]).all()
    assert lengths[True] == lengths[False] and len(lengths[True]) > 1


def test_equal_answers_are_refused_by_the_name_of_their_row():
    processor = load_processing_class(family_dir("qwen3_vl"))
    rows = grouped_rows((3,))
    rows[2]["rejected"] = copy.deepcopy(rows[2]["chosen"])
    with pytest.raises(ValueError, match="row 2"):
        MultimodalPreferenceCollator(processor, share_prefix=True, group_pairs=True)(rows)


def test_prompts_are_the_same_by_content_within_a_group():
    rows = grouped_rows((4, 3), num_images=(1,))
    rows[0]["images"] = [{"bytes": rows[0]["images"][0]["bytes"] + b" ", "path": None}]  # another file
    data = dataset_of(rows)
    numbers = find_prompts(leave_images_encoded(data)).number
    texts = [(row["prompt"][0]["content"][-1]["text"], index == 0) for index, row in enumerate(rows)]
    for one, other in itertools.combinations(range(len(rows)), 2):
        assert (numbers[one] == numbers[other]) == (texts[one] == texts[other])
    half = [str(index % 2) for index in range(len(rows))]
    narrowed = find_prompts(leave_images_encoded(data.add_column("group_id", half))).number
    assert len(np.unique(narrowed)) > len(np.unique(numbers))
    assert find_prompts(data.add_column("group_id", [str(index) for index in range(len(rows))])) is None
    assert find_prompts(leave_images_encoded(dataset_of(make_rows(4)))) is None
    # The prompts that differ among those that do not.
    more = dataset_of([*make_rows(3, seed=9), *[{k: v for k, v in row.items() if k != "weight"} for row in rows]])
    whole = find_prompts(leave_images_encoded(more))
    assert len(np.unique(whole.number[:3])) == 3 and not set(whole.number[:3]) & set(whole.number[3:])
    assert (
        np.unique(whole.number[3:], return_inverse=True)[1].tolist()
        == np.unique(numbers, return_inverse=True)[1].tolist()
    )
    assert len(np.unique(whole.answers[:3])) == 6 and not set(whole.answers[:3].flat) & set(whole.answers[3:].flat)


@pytest.mark.parametrize("size", [2, 4, 6, 7, 16])
def test_each_pair_comes_once_and_prompts_are_whole_where_they_fit(size):
    rng = np.random.default_rng(size)
    prompts = np.repeat(np.arange(200), rng.choice([1, 3, 6, 10], 200))
    rows = rng.permutation(len(prompts))
    order = arrange(rows, prompts, size)
    assert np.array_equal(np.sort(order), np.arange(len(prompts)))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    parts = sum(len(np.unique(prompts[batch])) for batch in batches)
    fewest = sum(-(-np.sum(prompts == prompt) // size) for prompt in range(200))
    at_random = sum(len(np.unique(prompts[rows[start : start + size]])) for start in range(0, len(rows), size))
    assert fewest <= parts <= 1.25 * fewest < at_random
    # A subset, and alone.
    some = rows[: len(rows) // 2]
    assert np.array_equal(np.sort(arrange(some, prompts, size)), np.sort(some))
    assert len(arrange(some[:0], prompts, size)) == 0


@pytest.mark.parametrize(("cap", "most"), [(400, 16), (150, 16), (10**6, 3), (60, 16)])
def test_batches_by_tokens_hold_prompts_whole_and_no_more_than_their_cap(cap, most, tmp_path):
    processor = load_processing_class(family_dir("qwen3_vl"))
    collator = MultimodalPreferenceCollator(processor, share_prefix=True, group_pairs=True, max_answers_per_group=most)
    data = leave_images_encoded(dataset_of(grouped_rows((4, 2, 3, 3, 2, 5), num_images=(1, 0))))
    counts = count_pairs(data, name="train", collator=collator)
    sizes = pair_sizes(data, counts, collator=collator, args=config(tmp_path, max_tokens_per_batch=cap))
    prompts = find_prompts(data)
    units = make_units(prompts, counts, sizes, cap, most)
    assert sorted(units.rows.tolist()) == list(range(len(data)))
    parts = [units.pairs_of(np.array([unit])) for unit in range(len(units.sizes))]
    for pairs, size in zip(parts, units.sizes.tolist(), strict=True):
        assert len(np.unique(prompts.number[pairs])) == 1
        assert len(np.unique(prompts.answers[pairs])) <= most
        batch = collator(data.select(pairs).to_list())
        # Of a part of a prompt, what all answers begin with may be more than the part counts.
        assert batch["input_ids"].numel() <= size
        assert size <= cap or len(pairs) == 1
        assert most < 16 or batch["input_ids"].numel() >= 0.9 * size
    alone = plan_training(sizes, cap, world_size=1, padded=False)
    plan = plan_training(sizes, cap, world_size=1, padded=False, units=units)
    batches = list(TokenBatchSampler(plan))
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(data)))
    assert len(batches) <= len(alone.batches)
    for rows in batches:
        length = collator(data.select(rows).to_list())["input_ids"].numel()
        assert length <= cap or len(rows) == 1
    if cap == 400:
        assert len(batches) <= len(alone.batches) / 1.5


def test_grouped_by_length_each_pair_comes_once_and_prompts_of_like_length_together():
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(600), 6)
    lengths = np.repeat(rng.integers(50, 5000, 600), 6) + rng.integers(0, 50, 3600)
    sampler = EpochLengthGroupedSampler(12, lengths.tolist(), seed=0, prompts=prompts)
    order = np.array(list(sampler))
    assert len(sampler) == 3600 and np.array_equal(np.sort(order), np.arange(3600))
    assert order.tolist() == list(sampler)
    sampler.set_epoch(1)
    assert order.tolist() != list(sampler)
    batches = order.reshape(-1, 12)
    assert all(len(np.unique(prompts[batch])) == 2 for batch in batches)
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    at_random = np.mean(
        [np.ptp(lengths[batch]) for batch in arrange(rng.permutation(3600), prompts, 12).reshape(-1, 12)]
    )
    assert spread < at_random / 10


def test_a_step_of_few_prompts_is_told_of(tmp_path, caplog):
    data = dataset_of(grouped_rows())  # 19 pairs of five prompts
    for args, told in (
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}, "16 pairs of a step are of about 4 pr"),
        ({"per_device_train_batch_size": 64}, None),
        ({"max_tokens_per_batch": 300}, None),
        ({"per_device_train_batch_size": 8, "group_pairs": "false"}, None),
    ):
        caplog.clear()
        trainer_for("qwen3_vl", tmp_path, data, args)
        found = [message for message in caplog.messages if "pairs of a step" in message]
        assert (told is None and not found) or told in found[0]


def test_an_epoch_is_random_and_follows_from_the_seed():
    prompts = np.repeat(np.arange(50), 3)
    orders = []
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        sampler = GroupedSampler(prompts, 6, seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[1] and orders[1] != orders[2]
    assert orders[2] == orders[3]  # seed and epoch are added, as in accelerate
    assert sorted(orders[0]) == list(range(150)) and orders[0] != sorted(orders[0])


def test_dropped_pairs_are_not_drawn_and_the_others_stay_together():
    prompts = np.repeat(np.arange(40), 4)
    selection = Selection.of_all(160)
    selection.kept[::2] = False
    selection.flipped[1] = True
    draws = list(SelectionSampler(selection, arrange=GroupedSampler(prompts, 8, 0).arrange))
    first = [draw.row for draw in draws[:80]]
    assert sorted(first) == list(range(1, 160, 2)) and len(draws) == 160
    assert all(draw.is_flipped == (draw.row == 1) for draw in draws)
    batches = [prompts[first[start : start + 8]] for start in range(0, 80, 8)]
    assert all(len(np.unique(batch)) == 4 for batch in batches)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
@pytest.mark.parametrize("args", [{}, {"gradient_checkpointing": True, "per_device_train_batch_size": 5}], ids=str)
def test_training_is_that_of_the_pairs_apart(args, family, tmp_path):
    data = dataset_of(grouped_rows())
    # In the order of the set, so that both read the same batches; Adam's sign of what is round-off must not decide.
    args = {"train_sampling_strategy": "sequential", "num_train_epochs": 2, "adam_epsilon": 1e-3, **args}
    args = {"per_device_train_batch_size": 8, "reward_posterior": True, "neftune_noise_alpha": None, **args}
    apart = trainer_for(family, tmp_path / "apart", data, {**args, "group_pairs": "false"})
    together = trainer_for(family, tmp_path / "together", data, args)
    for trainer in (apart, together):
        torch.manual_seed(0)
        torch.nn.init.normal_(trainer.model.score.weight, std=0.1)
        trainer.train()
    assert losses(together) == pytest.approx(losses(apart), abs=1e-5)
    expected = weights(apart)
    assert max((value - expected[name]).abs().max().item() for name, value in weights(together).items()) <= 1e-4
    one, other = (trainer._posterior for trainer in (together, apart))
    torch.testing.assert_close(one.factor @ one.factor.T, other.factor @ other.factor.T, rtol=0, atol=1e-3)
    assert together.evaluate(data)["eval_loss"] == pytest.approx(apart.evaluate(data)["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("args", [{"per_device_train_batch_size": 6}, {"max_tokens_per_batch": 300}], ids=str)
def test_resumed_run_equals_the_undisturbed_one_bitwise(args, tmp_path):
    data = dataset_of(grouped_rows())
    args = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "reward_statistics_pairs": 0, **args}
    whole = trainer_for("qwen3_vl", tmp_path / "run", data, args)
    seen = watch_batches(whole)
    whole.train()
    assert sum(len(batch) for batch in seen) == 2 * len(data) and seen[: len(seen) // 2] != seen[len(seen) // 2 :]
    resumed = trainer_for("qwen3_vl", tmp_path / "run", data, args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def watch_batches(trainer) -> list[list[float]]:
    """The weights of the pairs of each batch, which tell them apart."""
    seen, collate = [], trainer.data_collator

    def watching(rows):
        seen.append([row["weight"] for row in rows])
        return collate(rows)

    trainer.data_collator = watching
    return seen
