"""Sampling answers, picking the best and building pairs for DPO: on tiny models, with images, down to a DPO step."""

import functools
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from transformers import AutoProcessor
from trl import DPOConfig, DPOTrainer

from trl_dt2it import RewardScorer
from trl_dt2it.cli import load_recipe
from trl_dt2it.data import ImageOptions, RowError, check_row, to_dpo
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.data.messages import read_prompt
from trl_dt2it.demo.digits import make_digits
from trl_dt2it.models.posterior import laplace_posterior, write_posterior
from trl_dt2it.scoring.answers import Sampling, load_generator, sample_answers

from ..policies import ON_THE_CPU, policy_and_reward_model
from ..rows import make_rows


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """A policy and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    return policy_and_reward_model(folder, reward_mean=1.0, reward_std=0.25)


def run(name: str, *flags: object) -> None:
    one = load_recipe(name)
    one.main(*one.make_parser().parse_args_and_config(list(map(str, flags))))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_are_those_of_generate_and_depend_on_the_seed_alone(models):
    model, processor = load_generator(models[0]), AutoProcessor.from_pretrained(models[0])
    rows = make_rows(3, num_images=(1, 2, 0))
    prompts = [read_prompt(row, index, source="s") for index, row in enumerate(rows)]
    sample = functools.partial(sample_answers, model, processor, image_options=ImageOptions())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn = sample(prompts, Sampling(num_answers=3, max_new_tokens=8))
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(one) for one in drawn] == [3, 3, 3] and len({a.text for one in drawn for a in one}) > 6
    assert drawn == sample(prompts, Sampling(num_answers=3, max_new_tokens=8))
    assert drawn != sample(prompts, Sampling(num_answers=3, max_new_tokens=8, seed=1))
    # Without draws, as transformers gives each prompt alone, through nothing of ours.
    greedy = sample(prompts, Sampling(num_answers=2, max_new_tokens=8, temperature=0))
    for row, (first, second) in zip(rows, greedy, strict=True):
        shown = iter([Image.open(io.BytesIO(image["bytes"])) for image in row["images"]])
        content = [{**b, "image": next(shown)} if b["type"] == "image" else b for b in row["prompt"][0]["content"]]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert first == second and first.text == processor.tokenizer.decode(output, skip_special_tokens=True).strip()
        assert first.is_finished == (len(output) < 8 or int(output[-1]) == model.generation_config.eos_token_id)


def test_best_of_n_picks_what_the_scorer_says_and_goes_on_after_a_kill(models, tmp_path, monkeypatch, capsys):
    flags = ["--model_name_or_path", models[0], "--reward_model", models[1], "--dataset_name", "digits"]
    flags += ["--num_prompts", 5, "--num_answers", 3, "--max_new_tokens", 6, "--prompts_per_batch", 2]
    run("best_of_n", *flags, "--output_dir", tmp_path / "out")
    assert "5 prompts, 15 answers." in capsys.readouterr().out
    found = lines(tmp_path / "out" / "best_of_n.jsonl")
    rows = make_digits("test", 5)
    scorer = RewardScorer.from_pretrained(models[1])
    for line, row in zip(found, rows, strict=True):
        assert line["rewards"] == pytest.approx(scorer.score(row["prompt"], line["answers"], row["images"]), abs=1e-5)
        assert line["best"] == int(np.argmax(line["rewards"])) and line["answer"] == line["answers"][line["best"]]
        assert line["reward"] == max(line["rewards"]) and line["group_id"] == row["group_id"]
        assert len(set(line["answers"])) > 1
    # Killed in the second batch of sampling: the third run samples that and the rest, and all is as before.
    from trl_dt2it.scoring import answers as scored_answers

    sampled = []

    def killed(model, processor, prompts, *rest, **options):
        if len(sampled) == 1:
            raise KeyboardInterrupt
        sampled.append([prompt.row for prompt in prompts])
        return sample_answers(model, processor, prompts, *rest, **options)

    monkeypatch.setattr(scored_answers, "sample_answers", killed)
    with pytest.raises(KeyboardInterrupt):
        run("best_of_n", *flags, "--output_dir", tmp_path / "again")
    sampled[:] = [[], []]
    run("best_of_n", *flags, "--output_dir", tmp_path / "again")
    assert sampled[2:] == [[2, 3], [4]]
    again = lines(tmp_path / "again" / "best_of_n.jsonl")
    assert [{**line, "rewards": None, "reward": None} for line in again] == [
        {**line, "rewards": None, "reward": None} for line in found
    ]
    run("best_of_n", *flags, "--output_dir", tmp_path / "again")
    assert len(sampled) == 4
    with pytest.raises(ValueError, match="other content or settings"):
        run("best_of_n", *flags, "--output_dir", tmp_path / "again", "--seed", 7)


def given(tmp_path: Path) -> list[str]:
    """Prompts with answers in a file, their images beside it."""
    rows = make_rows(2, num_images=(1,))
    for index, row in enumerate(rows):
        (tmp_path / f"{index}.png").write_bytes(row["images"][0]["bytes"])
    answers = [["One.", "<|im_end|>", "Two, or three."], ["Four.", "Four.", "Five"]]
    content = [
        {"question": f"What is {index}?", "images": [f"{index}.png"], "answers": answers[index]} for index in range(2)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return ["--dataset_name", str(tmp_path / "prompts.jsonl"), "--image_root", str(tmp_path)]


def test_given_answers_are_scored_and_an_unreadable_one_has_no_reward(models, tmp_path):
    flags = [*given(tmp_path), "--reward_model", models[1], "--output_dir", tmp_path / "out", "--normalize", "true"]
    run("best_of_n", *flags, "--num_answers", 0)  # a setting of sampling, of which there is none
    first, second = lines(tmp_path / "out" / "best_of_n.jsonl")
    assert first["images"] == ["0.png"] and first["rewards"][1] is None and first["best"] in (0, 2)
    scorer = RewardScorer.from_pretrained(models[1], image_root=tmp_path, normalize=True)
    expected = scorer.score("What is 1?", second["answers"], ["1.png"])
    assert second["rewards"] == pytest.approx(expected, abs=1e-4) and second["rewards"][0] == second["rewards"][1]
    (tmp_path / "1.png").unlink()
    with pytest.raises(RowError, match=r"^row 1: .*1\.png.* is not a file"):
        run("best_of_n", *flags[:-3], tmp_path / "other")


def with_posterior(model, folder):
    """A copy of a model with a posterior beside it, as of one pair in each direction."""
    head = RewardScorer.from_pretrained(model).model.score.weight.detach()[0]
    about = {"num_pairs": 1, "total_weight": 1.0, "loss_type": "bt"}
    posterior = laplace_posterior(torch.eye(len(head), dtype=torch.float64), head, 0 * head, about)
    write_posterior(posterior, shutil.copytree(model, folder))
    return folder


def test_rewards_lowered_by_their_standard_deviations(models, tmp_path):
    flags = [*given(tmp_path), "--reward_model", models[1], "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match="which standard deviations of rewards need"):
        run("best_of_n", *flags, "--lower_confidence", 2)
    model = with_posterior(models[1], tmp_path / "model")
    flags[flags.index("--reward_model") + 1] = model
    run("best_of_n", *flags, "--lower_confidence", 2)
    scorer = RewardScorer.from_pretrained(model)
    for index, line in enumerate(lines(tmp_path / "out" / "best_of_n.jsonl")):
        usable = [place for place, reward in enumerate(line["rewards"]) if reward is not None]
        texts = [line["answers"][place] for place in usable]
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is {index}?"}]}]
        ranked = scorer.rank(prompt, texts, [str(tmp_path / f"{index}.png")], lower_confidence=2)
        assert line["best"] == usable[ranked[0].index]
        assert line["reward"] == pytest.approx(ranked[0].reward, abs=1e-5)
    with pytest.raises(ValueError, match="other content or settings"):
        run("best_of_n", *flags)


def test_a_row_is_lowered_alike_beside_any_other(models, tmp_path):
    """Two rows with the same prompt and no image, which a trainer would take for one group."""
    model = with_posterior(models[1], tmp_path / "model")
    answers = [["Yes.", "No."], ["Maybe so.", "A long and different answer, really."]]
    content = [{"question": "Why?", "answers": texts} for texts in answers]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    flags = ["--dataset_name", tmp_path / "prompts.jsonl", "--reward_model", model, "--lower_confidence", 2]
    scorer = RewardScorer.from_pretrained(model)
    for size in (1, 2):
        run("best_of_n", *flags, "--output_dir", tmp_path / str(size), "--prompts_per_batch", size)
        for texts, line in zip(answers, lines(tmp_path / str(size) / "best_of_n.jsonl"), strict=True):
            rewards, stds = scorer.score("Why?", texts, return_std=True)
            expected = [reward - 2 * std for reward, std in zip(rewards, stds, strict=True)]
            assert line["rewards"] == pytest.approx(expected, abs=1e-5)


def test_pairs_as_json_lines_and_refusals(models, tmp_path, capsys):
    flags = [*given(tmp_path), "--reward_model", models[1], "--output_dir", tmp_path / "out"]
    run("build_dpo_pairs", *flags, "--output_format", "jsonl", "--min_gap", 0)
    assert "2 pairs out of 6 answers to 2 prompts" in capsys.readouterr().out
    pairs = load_dataset("json", data_files=str(tmp_path / "out/pairs/train.jsonl"), split="train")
    assert [row["images"] for row in pairs] == [[str(tmp_path / f"{index}.png")] for index in range(2)]
    assert json.loads((tmp_path / "out/report.json").read_text())["left_out"] == {"unscored": 1, "equal": 1}
    scorer = RewardScorer.from_pretrained(models[1])
    scores = scorer.score_pairs(leave_images_encoded(pairs), show_progress=False)
    assert (scores[:, 0] > scores[:, 1]).all() and [len(row["images"]) for row in to_dpo(pairs)] == [1, 1]
    for wrong, message in (
        (["--min_gap", -1], "`min_gap` is -1"),
        (["--output_format", "csv"], "`output_format` is 'csv'"),
        (["--dataset_name", "digits"], "Give `model_name_or_path`"),
        (["--dataset_name", "digits", "--model_name_or_path", models[0], "--output_format", "jsonl"], "parquet"),
        (["--dataset_name", "digits", "--model_name_or_path", models[0], "--num_answers", 0], "`num_answers` is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run("build_dpo_pairs", *flags[:2], *flags[4:], *wrong)
    # The lower bound of an uncertain answer does not make it a bad one.
    with pytest.raises(ValueError, match="lower_confidence"):
        run("build_dpo_pairs", *flags, "--lower_confidence", 1)
    run("build_dpo_pairs", *flags, "--dry_run", "true")
    assert "column `answers`" in capsys.readouterr().out


def test_its_pairs_through_a_real_dpo_step_with_images_that_reach_the_model(models, tmp_path):
    config = ROOT / "recipes/configs/build_dpo_pairs.yaml"
    flags = ["--config", config, "--model_name_or_path", models[0], "--reward_model", models[1]]
    flags += ["--num_prompts", 4, "--num_answers", 4, "--min_gap", 0, "--output_dir", tmp_path / "out"]
    run("build_dpo_pairs", *flags)
    pairs = load_dataset("parquet", data_files=str(tmp_path / "out/pairs/train.parquet"), split="train")
    assert len(pairs) == 4
    for row in leave_images_encoded(pairs):
        check_row(row)
        assert row["strength"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"]) and row["strength"] > 0
    scorer = RewardScorer.from_pretrained(models[1], normalize=True)
    rewards = scorer.score_pairs(pairs, show_progress=False)
    np.testing.assert_allclose(rewards[:, 0], pairs["chosen_reward"][:], atol=1e-3)
    args = DPOConfig(
        str(tmp_path / "dpo"),
        per_device_train_batch_size=2,
        max_length=None,
        **ON_THE_CPU,
    )
    trainer = DPOTrainer(model=models[0], args=args, train_dataset=to_dpo(pairs))
    seen = []
    trainer.model.model.visual.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and losses[0] == pytest.approx(np.log(2), abs=1e-3) and np.isfinite(losses).all()
    # A digit of 32 x 32 pixels is 16 patches; each step shows two prompts, for chosen and for rejected.
    assert seen and all(pixels.shape[0] == 2 * 2 * 16 for pixels in seen) and seen[0].std() > 0.1
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert any("visual" in name for name in changed) and any("language_model" in name for name in changed)


def test_rows_without_a_prompt_are_named(models, tmp_path):
    Dataset.from_list([{"question": "What?"}, {"question": " "}]).to_parquet(tmp_path / "prompts.parquet")
    flags = ["--dataset_name", tmp_path / "prompts.parquet", "--output_dir", tmp_path / "out"]
    with pytest.raises(RowError, match="^row 1: the question is empty"):
        run("best_of_n", *flags, "--model_name_or_path", models[0], "--reward_model", models[1])
    with pytest.raises(ValueError, match="Give `reward_model`"):
        run("best_of_n", *flags)
