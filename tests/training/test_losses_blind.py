"""Blind margins: what the loss is spared, and the share of it that counts, from the column to the step."""

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoProcessor

from trl_dt2it import MultimodalRewardTrainer
from trl_dt2it.data.mixing import swap_pairs, with_columns
from trl_dt2it.training.collator import MultimodalPreferenceCollator
from trl_dt2it.training.losses import blind_weight, pairwise_loss, with_blind_margin
from trl_dt2it.training.model_card import _training_figures

from ..families import family_dir
from ..rows import make_dataset, make_rows, text_rows
from ..trainers import config, losses, text_model, trainer_for, weights


BLIND = [2.0, -1.0, 0.5, None, 6.0, -3.0, 0.0]
STRENGTH = [1.0, 3.0, 2.0, 5.0, 0.5, 4.0, 2.5]
WEIGHT = [1.0, 0.5, 2.0, 1.0, 0.7, 3.0, 1.0]
CONFIDENCE = [0.9, 0.6, 0.25, 1.0, None, 0.0, 0.75]


def bt(x: float, confidence: float = 1.0) -> float:
    return confidence * math.log1p(math.exp(-x)) + (1 - confidence) * math.log1p(math.exp(x))


def share(blind: float | None, delta: float, confidence: float | None = None) -> float:
    """The weight by hand, in fp64."""
    if blind is None:
        return 1.0
    known = 1.0 if confidence is None else confidence
    return bt(blind, known) / (bt(blind, known) + bt(delta, known))


def weight_of(blind: list[float], delta: list[float], confidence: list[float] | None = None) -> list[float]:
    batch = {"blind_margin": torch.tensor(blind)}
    if confidence is not None:
        batch["label_confidence"] = torch.tensor(confidence)
    rewards = torch.stack([torch.tensor(delta), torch.zeros(len(delta))]).requires_grad_()
    found = blind_weight(rewards, batch)
    assert found.dtype == torch.float32 and not found.requires_grad and found.shape == (len(delta),)
    return found.tolist()


def blind_pairs(**columns) -> Dataset:
    columns = {"blind_margin": BLIND, **columns}
    return with_columns(Dataset.from_list(text_rows(7)), columns)


def trainer_of(tmp_path, data, **args) -> MultimodalRewardTrainer:
    tokenizer = AutoProcessor.from_pretrained(family_dir("qwen3_vl")).tokenizer
    args = config(tmp_path, **{"blind_weighting": True, **args})
    return MultimodalRewardTrainer(text_model(tokenizer), args=args, train_dataset=data, processing_class=tokenizer)


def test_the_weight_by_hand():
    # log(1 + 1/3) / (log(1 + 1/3) + log 2) = 0.287682 / 0.980829; the other way round; equal losses; unknown
    ln3 = math.log(3)
    found = weight_of([ln3, 0.0, -0.7, math.nan], [0.0, ln3, -0.7, 1.0])
    assert found == pytest.approx([0.293305, 0.706695, 0.5, 1.0], abs=1e-6)
    assert blind_weight(torch.zeros(2, 3), {}).tolist() == [1.0, 1.0, 1.0]
    assert weight_of([1.0, -2.0], [0.5, 3.0], [0.8, 0.25]) == pytest.approx(
        [share(1.0, 0.5, 0.8), share(-2.0, 3.0, 0.25)], abs=1e-6
    )


def test_limits():
    margins = [-80.0, -20.0, -3.0, 0.0, 2.0, 14.9, 15.1, 30.0, 80.0]
    pairs = [(blind, delta) for blind in margins for delta in margins]
    found = weight_of(*map(list, zip(*pairs, strict=True)))
    expected = [share(blind, delta) for blind, delta in pairs]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    # exp(-1000) against exp(-1001), both of which are 0 in fp64, and the largest numbers that rows may hold.
    assert weight_of([1000.0, 1001.0, 1000.0], [1001.0, 1000.0, 1000.0]) == pytest.approx(
        [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1)), 0.5], rel=1e-5
    )
    assert weight_of([3e38, -3e38, -3e38], [0.0, 0.0, -3e38]) == pytest.approx([0.0, 1.0, 0.5])
    for confidence in (0.0, 0.5, 1.0):
        assert np.isfinite(weight_of([3e38, -3e38, 200.0], [-3e38, 0.0, 200.0], [confidence] * 3)).all()


def test_a_swapped_pair_weighs_the_same_and_a_coin_flip_has_no_side():
    blind, delta, confidence = [2.0, -1.0, 0.3], [0.5, 4.0, -2.0], [0.9, 0.4, 1.0]
    mirrored = weight_of([-b for b in blind], [-d for d in delta], [1 - c for c in confidence])
    assert mirrored == pytest.approx(weight_of(blind, delta, confidence), rel=1e-5)
    assert weight_of([2.0, -2.0], [0.5, -0.5], [0.5, 0.5])[0] == pytest.approx(weight_of([-2.0], [0.5], [0.5])[0])


@pytest.mark.parametrize("loss_type", ["bt", "strength_margin", "gce"])
def test_a_step_by_hand(loss_type, tmp_path):
    """Its gradient is that of the plain loss with fixed weights, over the plain weights; so is the posterior's."""
    columns = {"strength": STRENGTH, "weight": WEIGHT, "label_confidence": CONFIDENCE}
    settings = {"loss_type": loss_type, "max_steps": 1, "per_device_train_batch_size": 7, "reward_posterior": True}
    args = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, **settings}
    one = trainer_of(tmp_path / "one", blind_pairs(**columns), **args)
    rewards = one.predict(one.train_dataset).predictions.astype(np.float64)
    shares = [share(*values) for values in zip(BLIND, rewards[:, 0] - rewards[:, 1], CONFIDENCE, strict=True)]
    mean_loss = one.evaluate(one.train_dataset)["eval_loss"]
    plain = trainer_of(tmp_path / "plain", blind_pairs(**columns), **args, blind_weighting=False)
    assert plain.evaluate(plain.train_dataset)["eval_loss"] == mean_loss  # which blind weighting leaves alone
    one.train()
    # The mean of the weighted loss is the loss over the weights with the shares, times their part of the weights.
    power = (np.argsort(np.argsort(STRENGTH)) + 0.5) / 7 if loss_type == "strength_margin" else 1
    weight = np.array(WEIGHT) * power
    part = (weight * shares).sum() / weight.sum()
    fixed = blind_pairs(**{**columns, "weight": np.array(WEIGHT) * shares})
    other = trainer_of(tmp_path / "other", fixed, **{**args, "learning_rate": 0.05 * part}, blind_weighting=False)
    other.train()
    assert losses(one)[0] == pytest.approx(part * losses(other)[0], rel=1e-5)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-5, atol=1e-7)
    log = one.state.log_history[-2]
    known = [s for s, blind in zip(shares, BLIND, strict=True) if blind is not None]
    assert log["blind/weight"] == pytest.approx(np.mean(known), rel=1e-5)
    total = weight * shares
    assert log["blind/effective_pairs"] == pytest.approx(total.sum() ** 2 / (7 * (total**2).sum()), rel=1e-5)
    assert not any(name.startswith("blind/") for name in other.state.log_history[-2])
    # The posterior counts a pair as the last step would.
    rewards = one.predict(one.train_dataset).predictions.astype(np.float64)
    shares = [share(*values) for values in zip(BLIND, rewards[:, 0] - rewards[:, 1], CONFIDENCE, strict=True)]
    assert one._posterior.about["total_weight"] == pytest.approx((weight * shares).sum(), rel=1e-4)


def test_batches_accumulation_and_layout_do_not_matter(tmp_path):
    columns = {"strength": STRENGTH, "weight": WEIGHT, "label_confidence": CONFIDENCE, "blind_margin": BLIND}
    data = make_dataset(7, num_images=(1, 0), **columns)
    runs = {}
    for size, accumulation, share_prefix in ((7, 1, "auto"), (3, 3, "auto"), (1, 7, "auto"), (2, 4, "false")):
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        args |= {"num_train_epochs": 2, "blind_weighting": True, "share_prefix": share_prefix}
        runs[size] = trainer_for("qwen3_vl", tmp_path, data, args)
        runs[size].train()
    for run in (runs[3], runs[1], runs[2]):
        np.testing.assert_allclose(losses(run), losses(runs[7]), rtol=1e-5)
        for ours, theirs in zip(run.state.log_history[:2], runs[7].state.log_history[:2], strict=True):
            for name in ("blind/weight", "blind/effective_pairs"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
        for name, value in weights(runs[7]).items():
            torch.testing.assert_close(weights(run)[name], value, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("loss_type", ["bt", "strength_margin", "gce"])
def test_an_offset_is_what_the_loss_is_spared(loss_type, tmp_path):
    """One step with the blind margin is one with TRL's margin of the other sign, where no label is in doubt."""
    columns = {"strength": STRENGTH, "weight": WEIGHT}
    args = {"loss_type": loss_type, "optim": "sgd", "learning_rate": 0.05, "max_steps": 1, "reward_posterior": True}
    args |= {"per_device_train_batch_size": 7, "center_rewards_coefficient": 0.1, "blind_weighting": False}
    one = trainer_of(tmp_path / "one", blind_pairs(**columns), **args, blind_offset=True)
    plain = blind_pairs(**columns).remove_columns("blind_margin")
    other = trainer_of(tmp_path / "two", with_columns(plain, {"margin": [-(b or 0.0) for b in BLIND]}), **args)
    start = weights(one)
    assert one.evaluate(one.train_dataset)["eval_loss"] == other.evaluate(plain)["eval_loss"]  # of the model alone
    one.train()
    other.train()
    assert losses(one)[0] == pytest.approx(losses(other)[0], rel=1e-5)
    assert one.state.log_history[-2]["margin"] == pytest.approx(other.state.log_history[-2]["margin"], rel=1e-4)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-4, atol=1e-6)
    assert any((value - start[name]).abs().max() > 1e-4 for name, value in weights(one).items())
    covariances = [run._posterior.factor @ run._posterior.factor.T for run in (one, other)]
    torch.testing.assert_close(*covariances, rtol=1e-3, atol=1e-4 * covariances[0].max().item())


def test_an_offset_changes_its_sign_with_the_label():
    """Unlike TRL's margin, which is asked for in both directions."""
    rewards = torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]])
    batch = {"blind_margin": torch.tensor([2.0, -0.5, math.nan]), "label_confidence": torch.tensor([0.8, 1.0, 0.25])}
    moved = with_blind_margin(rewards, batch)
    torch.testing.assert_close(moved[0] - moved[1], torch.tensor([2.5, -1.5, 2.0]))
    torch.testing.assert_close(moved.sum(0), rewards.sum(0))
    assert with_blind_margin(rewards, {}) is rewards
    settings = SimpleNamespace(center_rewards_coefficient=None)
    expected = [bt(2.5, 0.8), bt(-1.5), bt(2.0, 0.25)]
    assert pairwise_loss(*moved, batch, settings).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_collator_marks_what_is_not_known():
    collator = MultimodalPreferenceCollator(AutoProcessor.from_pretrained(family_dir("qwen3_vl")))
    rows = make_rows(3, num_images=(0,), blind_margin=[None, -2, 0.5])
    margins = collator(rows)["pairs"]["blind_margin"]
    assert margins.dtype == torch.float32 and margins.isnan().tolist() == [True, False, False]
    assert margins[1:].tolist() == [-2.0, 0.5] and "blind_margin" not in collator(rows[:1])["pairs"]
    with pytest.raises(ValueError, match="row 1: `blind_margin` is inf; give the log odds .* or None if unknown"):
        collator([rows[0], {**rows[1], "blind_margin": math.inf}])


def test_a_swapped_pair_has_the_opposite_margin():
    data = make_dataset(4, num_images=(1,), blind_margin=[1.5, None, -2.0, 0.5])
    swapped = swap_pairs(data.select([3, 0, 1, 2]), [True, False, True, True])
    assert swapped["blind_margin"][:] == [-0.5, 1.5, None, 2.0] and swapped["chosen"][0] == data["rejected"][3]
    assert swapped.features == data.features and swap_pairs(swapped, [1, 0, 1, 1])["blind_margin"][0] == 0.5
    empty = swap_pairs(with_columns(data, {"blind_margin": [None] * 4}), np.ones(4, dtype=bool))
    assert empty["blind_margin"][:] == [None] * 4


def test_misuse_is_said_at_start(tmp_path, caplog):
    message = "needs a column `blind_margin` in the train set, .* trl_dt2it.debias.with_blind_margins"
    plain = Dataset.from_list(text_rows(7))
    nothing = with_columns(plain, {"blind_margin": [None] * 7})
    for data in (plain, nothing, plain.to_iterable_dataset(), plain.with_transform(lambda batch: batch)):
        with pytest.raises(ValueError, match=f"`blind_weighting` {message}"):
            trainer_of(tmp_path, data, max_steps=1)
    with pytest.raises(ValueError, match=f"`blind_offset` {message}"):
        trainer_of(tmp_path, plain, max_steps=1, blind_weighting=False, blind_offset=True)
    with pytest.raises(ValueError, match="`blind_weighting` is True; it must be False with `blind_offset`"):
        config(tmp_path, blind_weighting=True, blind_offset=True)
    with pytest.raises(ValueError, match="bad_blind_margin|`blind_margin` is nan"):
        trainer_of(tmp_path, blind_pairs(blind_margin=[math.nan] * 7))
    with caplog.at_level(logging.INFO, logger="trl_dt2it"):
        trainer_of(tmp_path, blind_pairs(), blind_weighting=False)
    assert "`blind_margin`, which counts only with `blind_offset=True` or `blind_weighting=True`" in caplog.text


def test_a_shortcut_is_learned_less(tmp_path):
    """Token 5 is in the right answer of 9 of 10 pairs, token 6 in all; a probe that sees 5 alone knows its odds."""
    rng = np.random.default_rng(0)
    odds, rows = math.log(9), []
    for index in range(80):
        has_it = index % 10 != 0  # else it stands in the wrong answer
        chosen, rejected = ([20, 5 if has_it else 9, 6], [20, 9 if has_it else 5, 7])
        noise = rng.integers(10, 19, 3).tolist()
        blind = odds if has_it else -odds
        rows.append({"chosen_ids": noise + chosen, "rejected_ids": noise + rejected, "blind_margin": blind})
    data = Dataset.from_list(rows)
    usual, reverse = ([20, 5, 6], [20, 9, 7]), ([20, 9, 6], [20, 5, 7])
    tests = Dataset.from_list([{"chosen_ids": a, "rejected_ids": b} for a, b in (usual, reverse)])
    args = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 3e-4, "logging_steps": 10}
    shares, runs = [], []
    for how in ({}, {"blind_weighting": True}, {"blind_offset": True}):
        run = trainer_of(tmp_path, data, **{"blind_weighting": False, **args, **how})
        run.train()
        rewards = run.predict(tests).predictions
        with_it, against_it = rewards[:, 0] - rewards[:, 1]
        shares.append((with_it - against_it) / (with_it + against_it))  # worth of token 5, in those of token 6
        runs.append(run)
    plain, weighted, offset = shares
    assert plain > weighted + 0.03 and plain > offset + 0.03, shares
    log = next(entry for entry in runs[1].state.log_history if "blind/weight" in entry)
    shown = [dict(_training_figures(run))["loss"] for run in runs]
    assert shown == ["`bt`", "`bt`, weighted by blind margins", "`bt`, beside blind margins"]
    assert 0.05 < log["blind/weight"] < 0.5 and 0.1 < log["blind/effective_pairs"] < 0.9
