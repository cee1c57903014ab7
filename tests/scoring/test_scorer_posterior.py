"""Standard deviations and lower bounds of rewards: by hand from what the head reads, wherever the model lies."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig

from trl_dt2it import MultimodalPreferenceCollator
from trl_dt2it.demo.tiny import build_tiny_tokenizer
from trl_dt2it.models.posterior import POSTERIOR_FILE, laplace_posterior, write_posterior
from trl_dt2it.scoring.scorer import RewardScorer

from ..families import example_images
from ..hub_server import LoopbackHub
from ..pairs import model_of, processor_of
from ..processes import ROOT, Run
from ..rows import make_dataset
from ..trainers import text_model, trainer_for


ANSWERS = ["A flower.", "A temple beside still water under the sky.", "Nothing", "A flower.", "A red flower, or two."]
FAMILIES = {"qwen3_vl": "true", "gemma3": "false", "llava_next": "false"}


def posterior_for(head: torch.Tensor):
    """A posterior with a spread that differs by direction."""
    size = head.shape[-1]
    rows = torch.randn(size // 2, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    about = {"num_pairs": 9, "total_weight": 9.0, "loss_type": "bt"}
    return laplace_posterior(rows.T @ rows, head.detach().flatten(), torch.full((size,), 0.1), about)


def scorer_of(family: str, **options) -> RewardScorer:
    model = model_of(family)
    given = {"share_prefix": FAMILIES[family], "posterior": posterior_for(model.score.weight), **options}
    return RewardScorer(model, processor_of(family), **given)


@pytest.fixture(scope="module", params=FAMILIES)
def scorer(request) -> RewardScorer:
    return scorer_of(request.param)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("posterior") / "model"
    model = model_of("qwen3_vl")
    model.config.reward_mean, model.config.reward_std = 1.5, 0.25
    model.save_pretrained(folder)
    processor_of("qwen3_vl").save_pretrained(folder)
    write_posterior(posterior_for(model.score.weight), folder)
    return folder


def inputs_of(scorer: RewardScorer, question: str, answer: str, images: list) -> torch.Tensor:
    """The head's input of one conversation in one forward pass, with nothing of ours but the model's class."""
    blocks = [*({"type": "image", "image": one} for one in images), {"type": "text", "text": question}]
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    batch = scorer.collator.processing_class.apply_chat_template(
        [{"role": "user", "content": blocks}, reply], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        return scorer.model.base_model(**batch).last_hidden_state[0, -1]


@pytest.mark.parametrize("num_images", [0, 2])
def test_standard_deviations_are_relative_to_the_answers_of_the_prompt(scorer, num_images):
    images = example_images(num_images) if num_images else []
    scorer.model.eval()
    inputs = torch.stack([inputs_of(scorer, "What is shown?", one, images) for one in ANSWERS])
    covariance = scorer.posterior.factor @ scorer.posterior.factor.T
    centered = inputs - inputs[[0, 1, 2, 4]].mean(0)  # an answer that is repeated is one answer
    expected = (centered @ covariance * centered).sum(1).sqrt()
    rewards, stds = scorer.score("What is shown?", ANSWERS, images, return_std=True)
    assert stds == pytest.approx(expected.tolist(), rel=1e-3) and stds[0] == stds[3]
    assert all(isinstance(one, float) for one in stds) and len({round(one, 4) for one in stds}) == 4
    assert rewards == scorer.score("What is shown?", ANSWERS, images)  # bit for bit
    _, same = scorer.score("What is shown?", ANSWERS[:1] * 3, images, return_std=True)
    assert same == pytest.approx(scorer.score("What is shown?", ANSWERS[:1], images, return_std=True)[1] * 3, rel=1e-3)
    alone = inputs[1] - 0.1
    _, (std,) = scorer.score("What is shown?", ANSWERS[1:2], images, return_std=True)
    assert std == pytest.approx((alone @ covariance @ alone).sqrt().item(), rel=1e-3)


def test_prompts_together_are_as_alone_in_any_batch(scorer):
    prompts, answers = ["What is shown?", "Why?", "Where?"], [ANSWERS, [], ANSWERS[1:3]]
    images = [example_images(1), None, example_images(2)]
    given = zip(prompts, answers, images, strict=True)
    alone = [scorer.score(*one, return_std=True) for one in given]
    budget = scorer.batch_tokens
    for scorer.batch_tokens in (1, 300, budget):
        rewards, stds = scorer.score(prompts, answers, images, return_std=True)
        for index, (reward, std) in enumerate(alone):
            assert rewards[index] == pytest.approx(reward, abs=1e-5)
            assert stds[index] == pytest.approx(std, rel=1e-3)


def test_margins_of_pairs(scorer):
    data = make_dataset(5)
    stds = scorer.margin_std(data, show_progress=False)
    assert stds.shape == (5,) and stds.dtype == np.float32 and (stds > 0).all()
    rows = list(data)
    for row, std in zip(rows, stds, strict=True):
        # Each of two answers lies half of the margin from their mean.
        _, halves = scorer.score(row["prompt"], [row["chosen"], row["rejected"]], row["images"], return_std=True)
        assert [2 * one for one in halves] == pytest.approx([std, std], rel=1e-3)
    swapped = data.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    np.testing.assert_allclose(scorer.margin_std(swapped, show_progress=False), stds, rtol=1e-4)
    budget, scorer.batch_tokens = scorer.batch_tokens, 300
    np.testing.assert_allclose(scorer.margin_std(data.select([4, 3, 2, 1, 0]))[::-1], stds, rtol=1e-3)
    scorer.batch_tokens = budget
    assert scorer.margin_std(data.select([])).shape == (0,)


def test_a_lower_bound_ranks_and_picks(saved):
    scorer = RewardScorer.from_pretrained(saved)
    rewards, stds = scorer.score("What?", ANSWERS, return_std=True)
    ranks = []
    for k in (0.0, 0.5, 50.0):
        bounds = [reward - k * std for reward, std in zip(rewards, stds, strict=True)]
        ranked = scorer.rank("What?", ANSWERS, lower_confidence=k)
        assert [one.reward for one in ranked] == pytest.approx(sorted(bounds, reverse=True), abs=1e-5)
        assert ranked[0] == scorer.best_of_n("What?", ANSWERS, lower_confidence=k)
        assert [one.index for one in ranked] == sorted(range(5), key=lambda i: -bounds[i])
        found = scorer.as_reward_func(lower_confidence=k)(["What?"] * 5, ANSWERS)
        assert found == pytest.approx(bounds, abs=1e-5)
        ranks.append([one.index for one in ranked])
    assert ranks[0] != ranks[2]
    both = scorer.rank(["What?", "What?"], [ANSWERS, ANSWERS[:2]], lower_confidence=50.0)
    assert [one.index for one in both[0]] == ranks[2]
    # Two answers are as uncertain as each other.
    assert [one.index for one in both[1]] == [one.index for one in scorer.rank("What?", ANSWERS[:2])]
    invalid = scorer.as_reward_func(lower_confidence=0.5)(["What?"] * 3, [ANSWERS[0], "<|im_end|>", ANSWERS[1]])
    expected = scorer.as_reward_func(lower_confidence=0.5)(["What?"] * 2, ANSWERS[:2])
    assert invalid[1] is None and [invalid[0], invalid[2]] == pytest.approx(expected, abs=1e-5)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`lower_confidence` is .*; it must be finite and at least 0"):
            scorer.best_of_n("What?", ANSWERS, lower_confidence=bad)


def test_normalized_rewards_have_normalized_standard_deviations(saved):
    data = make_dataset(2)
    plain, normal = (RewardScorer.from_pretrained(saved, normalize=normalize) for normalize in (False, True))
    expected = [std / 0.25 for std in plain.score("What?", ANSWERS, return_std=True)[1]]
    assert normal.score("What?", ANSWERS, return_std=True)[1] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(normal.margin_std(data), plain.margin_std(data) / 0.25, rtol=1e-5)
    before, after = (one.rank("What?", ANSWERS, lower_confidence=2.0) for one in (plain, normal))
    assert [one.index for one in before] == [one.index for one in after]


def test_a_model_without_one_scores_as_ever_and_says_how_to_get_one(saved, tmp_path):
    model_of("qwen3_vl").save_pretrained(tmp_path)
    processor_of("qwen3_vl").save_pretrained(tmp_path)
    scorer = RewardScorer.from_pretrained(tmp_path)
    assert scorer.score("What?", ANSWERS) == RewardScorer.from_pretrained(saved).score("What?", ANSWERS)
    message = f"has no `{POSTERIOR_FILE}`, which standard deviations of rewards need; train with"
    for call in (
        lambda: scorer.score("What?", ANSWERS, return_std=True),
        lambda: scorer.margin_std(make_dataset(1)),
        lambda: scorer.best_of_n("What?", ANSWERS, lower_confidence=1.0),
        lambda: scorer.as_reward_func(lower_confidence=1.0),  # when it is made
    ):
        with pytest.raises(ValueError, match=message):
            call()
    bare = RewardScorer(scorer.model, scorer.collator.processing_class)
    with pytest.raises(ValueError, match="Pass `posterior`"):
        bare.score("What?", ANSWERS, return_std=True)
    path = RewardScorer(scorer.model, scorer.collator.processing_class, posterior=saved)
    assert path.score("What?", ANSWERS, return_std=True)[1]


def test_the_posterior_of_another_head_is_refused(saved):
    scorer = RewardScorer.from_pretrained(saved)
    scorer.model.score.weight.data *= 1.5
    with pytest.raises(ValueError, match="fitted to another `score` head than this model has"):
        scorer.score("What?", ANSWERS, return_std=True)
    with pytest.raises(ValueError, match="fitted to another `score` head than this model has"):
        scorer.margin_std(make_dataset(1))


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_an_adapter_and_the_merged_model(family, tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear")
    args = {"learning_rate": 1e-2, "max_steps": 2, "reward_posterior": True}
    data = make_dataset(4)
    trainer = trainer_for(family, tmp_path, data, args=args, peft_config=lora)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    in_training = RewardScorer(trainer.model, trainer.processing_class, posterior=trainer._posterior)
    expected = in_training.margin_std(data)
    adapted = RewardScorer.from_pretrained(tmp_path / "adapter", dtype="float32")
    np.testing.assert_allclose(adapted.margin_std(data), expected, rtol=1e-3)
    merged = RewardScorer(adapted.model.merge_and_unload(), trainer.processing_class, posterior=tmp_path / "adapter")
    np.testing.assert_allclose(merged.margin_std(data), expected, rtol=1e-2)


def test_a_text_model_with_a_bias():
    tokenizer = build_tiny_tokenizer()
    model = text_model(tokenizer)
    model.score.bias = torch.nn.Parameter(torch.tensor([3.0]))
    scorer = RewardScorer(model, tokenizer, posterior=posterior_for(model.score.weight))
    rewards, stds = scorer.score("What?", ANSWERS, return_std=True)
    model.score.bias.data.zero_()
    without, same = scorer.score("What?", ANSWERS, return_std=True)
    assert [one - 3 for one in rewards] == pytest.approx(without, abs=1e-5)
    assert stds == pytest.approx(same, rel=1e-5) and min(stds) > 0


def measure(folder, output) -> None:
    scorer = RewardScorer.from_pretrained(folder, device="cpu")
    stds = scorer.margin_std(make_dataset(5), show_progress=False)
    np.save(output / f"{os.environ['RANK']}.npy", stds)


def test_two_processes_measure_what_one_does(saved, tmp_path):
    expected = RewardScorer.from_pretrained(saved).margin_std(make_dataset(5))
    Run(measure, saved, tmp_path, num_processes=2).finish()
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"{rank}.npy"), expected, rtol=1e-3)


FROM_THE_HUB = """
import sys
from huggingface_hub import create_repo, upload_folder
from trl_dt2it import RewardScorer
from trl_dt2it.training.model_card import MODEL_FILES

create_repo("loopback/model", token="t")
upload_folder(repo_id="loopback/model", folder_path=sys.argv[1], token="t", allow_patterns=MODEL_FILES)
scorer = RewardScorer.from_pretrained("loopback/model", device="cpu")
print(*scorer.score("What?", ["A flower.", "A dog."], return_std=True)[1])
"""


def test_it_comes_from_the_hub_too(saved):
    with LoopbackHub() as hub:
        command = [sys.executable, "-c", FROM_THE_HUB, str(saved)]
        run = subprocess.run(command, env=hub.env(), capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert run.returncode == 0, run.stderr[-3000:]
    expected = RewardScorer.from_pretrained(saved).score("What?", ["A flower.", "A dog."], return_std=True)[1]
    assert list(map(float, run.stdout.split())) == pytest.approx(expected, rel=1e-4)


def test_dummy_images_are_no_answers():
    data = make_dataset(3, num_images=(0,))
    scorer = scorer_of("qwen3_vl")
    expected = scorer.margin_std(data)
    scorer.collator = MultimodalPreferenceCollator(
        processor_of("qwen3_vl"), add_dummy_image=True, share_prefix=scorer.collator.share_prefix
    )
    np.testing.assert_allclose(scorer.margin_std(data), expected, rtol=1e-3)
