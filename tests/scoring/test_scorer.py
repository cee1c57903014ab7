"""The scorer: training's own rewards for any number of answers, one process or two, killed or not."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoProcessor

from trl_dt2it import MultimodalPreferenceCollator
from trl_dt2it.data import to_pairs
from trl_dt2it.data.rows import RowError
from trl_dt2it.demo.tiny import build_tiny_tokenizer
from trl_dt2it.evaluation import evaluate
from trl_dt2it.evaluation.harness import PairScorer
from trl_dt2it.scoring.scorer import RewardScorer
from trl_dt2it.scoring.shards import model_fingerprint

from ..families import example_images, family_dir
from ..pairs import model_of, processor_of
from ..rows import make_dataset
from ..scoring_runs import scored_pairs, start
from ..trainers import text_model, trainer_for


# The first reads all answers of a prompt in one row, the others rows with the images once.
FAMILIES = ["qwen3_vl", "gemma3", "llava_next"]
ANSWERS = ["A flower.", "A temple beside still water under the sky.", "Nothing", "A flower.", "A red flower, or two."]


def save(family: str, directory: Path, **config) -> Path:
    model = model_of(family)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(directory)
    processor_of(family).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=FAMILIES)
def scorer(request, tmp_path_factory):
    directory = save(request.param, tmp_path_factory.mktemp("scorer") / request.param)
    return RewardScorer.from_pretrained(directory, share_prefix="auto" if request.param == "qwen3_vl" else "false")


@pytest.fixture(scope="module")
def sharing(tmp_path_factory):
    return RewardScorer.from_pretrained(save("qwen3_vl", tmp_path_factory.mktemp("scorer") / "model"))


def reference(scorer: RewardScorer, prompt: list, answer: str, images: list) -> float:
    """One conversation in one forward pass, with nothing of ours but the model's class."""
    blocks = [{**b, "image": i} for b, i in zip([{"type": "image"}] * len(images), images, strict=True)]
    turn = {"role": "user", "content": [*blocks, {"type": "text", "text": prompt}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    inputs = scorer.collator.processing_class.apply_chat_template(
        [turn, reply], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        return scorer.model(**inputs).logits.item()


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_rewards_are_those_of_each_conversation_alone(scorer, num_images):
    images = example_images(num_images) if num_images else []
    rewards = scorer.score("What is shown?", ANSWERS, images)
    expected = [reference(scorer, "What is shown?", answer, images) for answer in ANSWERS]
    assert rewards == pytest.approx(expected, abs=1e-5)
    assert all(isinstance(reward, float) for reward in rewards)
    assert rewards[0] == rewards[3] and len({round(r, 4) for r in rewards}) == 4


def test_prompts_together_are_as_alone_in_any_order_and_any_batch(scorer):
    images = example_images(3)
    prompts = ["What is shown?", "And where?", "Describe it in one sentence, please.", "Why?"]
    answers = [ANSWERS, ANSWERS[:2], ANSWERS[1:4], []]
    shown = [images[:1], None, images[1:], None]
    alone = [scorer.score(*one) for one in zip(prompts, answers, shown, strict=True)]
    assert [len(one) for one in alone] == [5, 2, 3, 0]
    budget = scorer.batch_tokens
    # 1: each answer is alone; 300: some of a prompt's are apart; the default: all together.
    for tokens, order in itertools.product((1, 300, budget), ([0, 1, 2, 3], [2, 3, 1, 0])):
        scorer.batch_tokens = tokens
        found = scorer.score([prompts[i] for i in order], [answers[i] for i in order], [shown[i] for i in order])
        for place, index in enumerate(order):
            assert found[place] == pytest.approx(alone[index], abs=1e-5), (tokens, order)
    scorer.batch_tokens = budget
    assert scorer.score(prompts[2], ANSWERS[1:4][::-1], images[1:])[::-1] == pytest.approx(alone[2], abs=1e-5)


def test_a_prompt_and_its_images_are_read_once(sharing):
    seen = []
    handle = sharing.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    sharing.score("What is shown?", ANSWERS, example_images(1))
    sharing.score(["What?", "Where?"], [ANSWERS, ANSWERS[:2]], [example_images(1), example_images(1, seed=1)])
    handle.remove()
    first, second = seen
    assert first["input_ids"].shape[0] == 1 and len(first["image_grid_thw"]) == 1
    lengths = first["pair_layout"].tolist()[0]
    assert len(lengths) == 5 and sum(lengths) == first["input_ids"].shape[1]
    assert second["pair_layout"].shape == (2, 5) and len(second["image_grid_thw"]) == 2


def test_padded_rows_encode_an_image_once():
    scorer = RewardScorer(model_of("llava_next"), processor_of("llava_next"), share_prefix="false")
    calls = []
    tower = scorer.model.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    scorer.score("What?", ANSWERS[:1], example_images(1))
    scorer.score("What?", ANSWERS, example_images(1))
    handle.remove()
    assert calls[0] == calls[1] and len(calls) == 2


def test_messages_strings_and_images_in_blocks_are_the_same(scorer):
    (image,) = example_images(1)
    expected = scorer.score("What is shown?", ANSWERS, [image])
    blocks = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
    prompt = [{"role": "user", "content": blocks}]
    replies = [[{"role": "assistant", "content": [{"type": "text", "text": one}]}] for one in ANSWERS]
    within = [{"role": "user", "content": [{**blocks[0], "image": image}, blocks[1]]}]
    assert scorer.score(prompt, ANSWERS, [image]) == pytest.approx(expected, abs=1e-6)
    assert scorer.score(prompt, replies, image) == pytest.approx(expected, abs=1e-6)
    assert scorer.score(prompt, [one[0] for one in replies], [image]) == pytest.approx(expected, abs=1e-6)
    assert scorer.score(within, replies) == pytest.approx(expected, abs=1e-6)
    assert scorer.score(within, replies, [image]) == pytest.approx(expected, abs=1e-6)
    assert within[0]["content"][0]["image"] is image  # what was given stays as it is


def test_another_image_is_another_reward(scorer):
    images = example_images(2)
    one, two, none = (scorer.score("What is shown?", ANSWERS[:2], shown) for shown in (images[:1], images[1:], None))
    for a, b in itertools.combinations((one, two, none), 2):
        assert min(abs(x - y) for x, y in zip(a, b, strict=True)) > 1e-4


def test_rank_and_best_of_n(sharing):
    rewards = sharing.score("What is shown?", ANSWERS)
    ranked = sharing.rank("What is shown?", ANSWERS)
    assert [one.reward for one in ranked] == sorted(rewards, reverse=True)
    assert sorted(one.index for one in ranked) == list(range(5))
    assert all(ANSWERS[one.index] == one.response and rewards[one.index] == one.reward for one in ranked)
    assert sharing.best_of_n("What is shown?", ANSWERS) == ranked[0]
    first, second = sharing.best_of_n(["What is shown?", "Why?"], [ANSWERS, ANSWERS[:1]])
    assert first.index == ranked[0].index and second.response == ANSWERS[0]
    assert sharing.rank("What is shown?", []) == []
    with pytest.raises(ValueError, match="no answer"):
        sharing.best_of_n(["What?", "Why?"], [ANSWERS, []])


def evaluated(family: str, output_dir: Path, data: Dataset, **kwargs):
    """A trainer, and the rewards, `(N, 2)`, that its own evaluation computes."""
    seen = []
    kwargs |= {"eval_dataset": data, "compute_metrics": lambda p: seen.append(p.predictions) or {}}
    trainer = trainer_for(family, output_dir, data, **kwargs)
    trainer.evaluate()
    return trainer, seen[0]


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_pairs_are_as_the_trainer_evaluates_them_and_as_a_reload_gives_them(family, tmp_path):
    data = make_dataset(5)
    trainer, expected = evaluated(family, tmp_path, data)
    trainer.save_model(tmp_path / "model")
    scores = RewardScorer(trainer.model, trainer.processing_class).score_pairs(data)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    reloaded = RewardScorer.from_pretrained(tmp_path / "model")
    np.testing.assert_allclose(reloaded.score_pairs(data), expected, atol=1e-5)
    # And as answers to a prompt, in fewer passes.
    rows = list(data)
    sides = [[row["chosen"], row["rejected"]] for row in rows]
    found = reloaded.score([row["prompt"] for row in rows], sides, [row["images"] for row in rows])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # As transformers alone loads and reads it.
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    batch = MultimodalPreferenceCollator(AutoProcessor.from_pretrained(tmp_path / "model"))(rows)
    del batch["pairs"]
    with torch.no_grad():
        logits = model(**batch).logits[:, 0].reshape(2, 5).T
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_an_adapter_and_the_merged_model_have_its_rewards(family, tmp_path):
    data = make_dataset(4)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    trainer, expected = evaluated(family, tmp_path, data, peft_config=lora)
    trainer.save_model(tmp_path / "adapter")
    scores = RewardScorer(trainer.model, trainer.processing_class).score_pairs(data)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    images = example_images(1)
    adapted = RewardScorer.from_pretrained(tmp_path / "adapter", dtype="float32")
    np.testing.assert_allclose(adapted.score_pairs(data), expected, atol=1e-5)
    answers = adapted.score("What?", ANSWERS, images)
    adapted.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    adapted.collator.processing_class.save_pretrained(tmp_path / "merged")
    merged = RewardScorer.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(merged.score_pairs(data), expected, atol=1e-4)
    assert merged.score("What?", ANSWERS, images) == pytest.approx(answers, abs=1e-4)
    assert model_fingerprint(merged.model) != model_fingerprint(trainer.model)


@pytest.mark.parametrize("has_template", [True, False])
def test_a_text_model(has_template, tmp_path):
    tokenizer = build_tiny_tokenizer()
    if not has_template:
        tokenizer.chat_template = None
    text_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = RewardScorer.from_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    expected = []
    for answer in ANSWERS:
        turns = [{"role": "user", "content": "What? "}, {"role": "assistant", "content": answer}]
        text = "What? " + answer + tokenizer.eos_token
        if has_template:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        with torch.no_grad():
            ids = tokenizer(text, add_special_tokens=not has_template, return_tensors="pt")["input_ids"]
            expected.append(model.score(model.model(ids).last_hidden_state[:, -1]).item())
    assert len({round(one, 4) for one in expected}) == 4
    assert scorer.score("What? ", ANSWERS) == pytest.approx(expected, abs=1e-5)
    with pytest.raises((ValueError, RowError), match="images"):
        scorer.score("What? ", ANSWERS, example_images(1))
    if not has_template:
        rows = {"prompt": ["What? "], "chosen": ANSWERS[:1], "rejected": ANSWERS[1:2]}
        assert scorer.score_pairs(Dataset.from_dict(rows))[0] == pytest.approx(expected[:2], abs=1e-5)


def test_a_benchmark_takes_the_scorer(sharing):
    data = make_dataset(6, num_images=(1,), pair_id=[f"p{i}" for i in range(6)], group_id=[f"p{i}" for i in range(6)])
    data = data.add_column("category", ["general", "hallucination", "reasoning"] * 2)
    assert isinstance(sharing, PairScorer)
    result = evaluate(sharing, "vl-rewardbench", data)
    scores = sharing.score_pairs(data)
    assert result.metrics["overall"] == pytest.approx((scores[:, 0] > scores[:, 1]).mean())


def test_normalized_rewards(tmp_path):
    plain = RewardScorer(model_of("qwen3_vl"), processor_of("qwen3_vl"))
    data = make_dataset(3)
    with pytest.raises(ValueError, match="`normalize=True` needs `reward_mean`"):
        RewardScorer(plain.model, processor_of("qwen3_vl"), normalize=True)
    directory = save("qwen3_vl", tmp_path / "model", reward_mean=1.5, reward_std=0.25)
    normal = RewardScorer.from_pretrained(directory, normalize=True)
    expected = [(reward - 1.5) / 0.25 for reward in plain.score("What?", ANSWERS)]
    assert normal.score("What?", ANSWERS) == pytest.approx(expected, abs=1e-4)
    np.testing.assert_allclose(normal.score_pairs(data), (plain.score_pairs(data) - 1.5) / 0.25, atol=1e-4)
    assert normal.best_of_n("What?", ANSWERS).index == plain.best_of_n("What?", ANSWERS).index
    assert RewardScorer.from_pretrained(directory).score("What?", ANSWERS) == pytest.approx(
        plain.score("What?", ANSWERS), abs=1e-5
    )


def test_modes_gradients_and_random_state_stay(sharing):
    sharing.model.train()
    before = torch.random.get_rng_state()
    sharing.score("What?", ANSWERS, example_images(1))
    assert sharing.model.training and torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in sharing.model.parameters())
    sharing.model.eval()


def test_images_by_path_stay_under_the_root(tmp_path):
    directory = save("qwen3_vl", tmp_path / "model")
    (image,) = example_images(1)
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "a.png")
    image.save(tmp_path / "b.png")
    scorer = RewardScorer.from_pretrained(directory, image_root=tmp_path / "images")
    assert scorer.score("What?", ANSWERS, ["a.png"]) == pytest.approx(
        scorer.score("What?", ANSWERS, [image]), abs=1e-6
    )
    with pytest.raises(RowError, match="prompt 1"):
        scorer.score(["What?", "What?"], [ANSWERS, ANSWERS], [["a.png"], ["../b.png"]])
    with pytest.raises(ValueError, match="no such folder"):
        RewardScorer.from_pretrained(directory, image_root=tmp_path / "nowhere")


def test_misuse_is_named(sharing, tmp_path):
    with pytest.raises(ValueError, match="single answer"):
        sharing.score("What?", "A flower.")
    with pytest.raises(ValueError, match="2 prompts, 1 lists"):
        sharing.score(["What?", "Why?"], [ANSWERS])
    with pytest.raises(RowError, match="prompt 1, response 2: the response message 0 contains the special token"):
        sharing.score(["What?", "Why?"], [ANSWERS, ["a", "b", "c <|im_end|>"]])
    with pytest.raises(RowError, match=r"`prompt` has 1 .* but the row has 2 images"):
        blocks = [{"type": "image"}, {"type": "text", "text": "What?"}]
        sharing.score([{"role": "user", "content": blocks}], ANSWERS, example_images(2))
    with pytest.raises(RowError, match="response 0: the response ends with a user message"):
        sharing.score("What?", [[{"role": "user", "content": "And?"}]])
    with pytest.raises(ValueError, match="no trained `score` head"):
        RewardScorer.from_pretrained(family_dir("qwen3_vl"))
    # A policy may give an empty answer, or the same one twice.
    assert len(set(sharing.score("What?", ["", ""]))) == 1


def test_a_reward_that_is_no_number_is_an_error():
    scorer = RewardScorer(model_of("qwen3_vl"), processor_of("qwen3_vl"))
    torch.nn.init.constant_(scorer.model.score.weight, float("inf"))
    with pytest.raises(ValueError, match="prompt 0, response 0 has the reward"):
        scorer.score(["What?"], [ANSWERS])


# Data sets.


def test_rewards_of_a_data_set(sharing, tmp_path):
    data = make_dataset(7)
    expected = sharing.score_pairs(data)
    for folder in (None, tmp_path / "scores"):
        scored = sharing.score_dataset(data, folder, rows_per_shard=3)
        assert scored.column_names == [*data.column_names, "chosen_reward", "rejected_reward"]
        found = np.stack([scored[name] for name in ("chosen_reward", "rejected_reward")], axis=1)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert scored.features["chosen_reward"].dtype == "float32"
    assert len(list((tmp_path / "scores").glob("*.parquet"))) == 3
    chosen = data.select([6, 2, 4])
    np.testing.assert_allclose(sharing.score_dataset(chosen)["chosen_reward"], expected[[6, 2, 4], 0], atol=1e-5)
    assert sharing.score_dataset(data.select([])).num_rows == 0
    assert "chosen_reward" in sharing.score_dataset(data.select([]), tmp_path / "none").column_names
    with pytest.raises(ValueError, match="column `chosen_reward` already"):
        sharing.score_dataset(scored)


def test_finished_files_are_not_scored_again_and_strange_ones_refused(sharing, tmp_path):
    data = make_dataset(5, pair_id=list("abcde"))
    sharing.score_dataset(data, tmp_path, rows_per_shard=2)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    sharing.score_dataset(data, tmp_path, rows_per_shard=2)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    with pytest.raises(ValueError, match="another rows_per_shard"):
        sharing.score_dataset(data, tmp_path, rows_per_shard=4)
    corrected = make_dataset(5, seed=1, pair_id=list("abcde"))
    with pytest.raises(ValueError, match="another rows;"):
        sharing.score_dataset(corrected, tmp_path, rows_per_shard=2)
    other = RewardScorer(model_of("qwen3_vl"), processor_of("qwen3_vl"))
    np.testing.assert_array_equal(
        other.score_dataset(data, tmp_path, rows_per_shard=2)["chosen_reward"],
        sharing.score_dataset(data, tmp_path, rows_per_shard=2)["chosen_reward"],
    )  # the same weights
    with torch.no_grad():
        other.model.score.weight.mul_(1.01)
    with pytest.raises(ValueError, match="another model;"):
        other.score_dataset(data, tmp_path, rows_per_shard=2)


def test_two_processes_give_the_table_of_one(tmp_path):
    model = save("qwen3_vl", tmp_path / "model")
    runs = [start(model, tmp_path / str(number), number) for number in (1, 2)]
    for run in runs:
        run.finish()
    one, two = (json.loads((tmp_path / str(number) / "table.json").read_text()) for number in (1, 2))
    assert one == two and len(one) == 12
    assert len(list((tmp_path / "2").glob("log-*"))) == 2
    assert set(scored_pairs(tmp_path / "1").values()) == {1}
    names = sorted(path.name for path in (tmp_path / "1").glob("*.parquet"))
    assert names == sorted(path.name for path in (tmp_path / "2").glob("*.parquet")) and len(names) == 6


def test_a_killed_run_goes_on_and_scores_nothing_twice_but_what_was_in_flight(tmp_path):
    model = save("qwen3_vl", tmp_path / "model")
    output = tmp_path / "scores"
    output.mkdir()
    (output / "slow").touch()
    for done in (1, 3):
        run = start(model, output, 1)
        assert run.kill_when(lambda done=done: len(list(output.glob("*.parquet"))) >= done), run.errors
        assert not (output / "table.json").exists()
    (output / "slow").unlink()
    start(model, output, 1).finish()
    counts = scored_pairs(output)
    assert len(counts) == 12 and max(counts.values()) <= 2
    assert sum(counts.values()) <= 12 + 2 * 2  # two kills, two pairs in a file
    expected = RewardScorer.from_pretrained(model).score_pairs(make_dataset(12))
    np.testing.assert_allclose(json.loads((output / "table.json").read_text()), expected, atol=1e-5)


def ranked_prompts() -> Dataset:
    """Prompts with four, one, three, no and two answers, one of which is there twice."""
    answers = [ANSWERS[:4], ANSWERS[:1], ["yes", "YES ", "perhaps"], [], ["left", "right"]]
    rows = make_dataset(5, num_images=(1, 2, 0)).select_columns(["prompt", "images"])
    return rows.add_column("completions", answers)


@pytest.mark.parametrize("batch_tokens", [16384, 200])
def test_ranked_prompts_get_a_reward_for_each_answer(scorer, batch_tokens, tmp_path):
    data, given = ranked_prompts(), scorer.batch_tokens
    expected = [
        scorer.score(row["prompt"], row["completions"], row["images"]) if row["completions"] else [] for row in data
    ]
    scorer.batch_tokens = batch_tokens
    try:
        for folder in (None, tmp_path, tmp_path):
            scored = scorer.score_dataset(data, folder, rows_per_shard=2)
            assert scored.column_names == [*data.column_names, "rewards"]
            for rewards, wanted in zip(scored["rewards"], expected, strict=True):
                assert rewards == pytest.approx(wanted, abs=1e-5)
            assert scored[0]["rewards"][0] == scored[0]["rewards"][3]
    finally:
        scorer.batch_tokens = given
    with pytest.raises(ValueError, match="has a column `rewards` already"):
        scorer.score_dataset(scored)
    bad = data.remove_columns("completions").add_column("completions", ["one", "two", "three", "four", "five"])
    with pytest.raises(RowError, match="row 0.*`completions` is no list of texts or of messages"):
        scorer.score_dataset(bad)
    with pytest.raises(ValueError, match="has a transform"):
        scorer.score_dataset(data.with_transform(lambda batch: batch))


@pytest.mark.parametrize("batch_tokens", [10**6, 300])
def test_pairs_of_a_prompt_are_read_together_wherever_they_lie(scorer, batch_tokens):
    data = to_pairs(ranked_prompts().select([0, 2, 4]).add_column("scores", [[4, 3, 2, None], [1, 2, 3], [0, 1]]))
    data = data.select([5, 0, 3, 1, 6, 4, 2])
    expected = [scorer.score(row["prompt"], [row["chosen"], row["rejected"]], row["images"]) for row in data]
    seen, model, given = [0], scorer.model, scorer.batch_tokens
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.__setitem__(0, seen[0] + kwargs["input_ids"].numel()), with_kwargs=True
    )
    scorer.batch_tokens = batch_tokens
    try:
        together = scorer.score_pairs(data)
        read, seen[0] = seen[0], 0
        scorer.collator.group_pairs = False
        apart = scorer.score_pairs(data)
    finally:
        scorer.batch_tokens, scorer.collator.group_pairs = given, True
        hook.remove()
    np.testing.assert_allclose(together, expected, atol=1e-5)
    np.testing.assert_allclose(apart, expected, atol=1e-5)
    assert read < 0.75 * seen[0] or not (scorer.collator.share_prefix or batch_tokens == 10**6)
