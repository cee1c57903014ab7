"""The loss of a ranking, from its pairs: by hand, against ListMLE, and with weights, doubts, ties and margins."""

import itertools
import math

import pytest
import torch
from datasets import Dataset

from trl_dt2it.training.losses import pair_curvature, pair_weight, pairwise_loss

from ..rows import make_rows
from ..trainers import config, trainer_for


def loss_of(rewards, pairs, **batch) -> torch.Tensor:
    """Weighted mean of the loss of pairs `(i, j)` of answers with these rewards."""
    answers = torch.tensor(pairs)
    batch = {"weight": torch.ones(len(pairs)), "answers": answers, **batch}
    chosen, rejected = torch.as_tensor(rewards)[answers.T]
    args = config("out", loss_type="plackett_luce")
    losses = pairwise_loss(chosen, rejected, batch, args, loss_type="plackett_luce")
    weights = pair_weight(batch, args, "plackett_luce")
    return (weights * losses).sum() / weights.sum()


def log_sum(*terms: float) -> float:
    return math.log(sum(map(math.exp, terms)))


def test_a_ranking_by_hand():
    # The first is chosen among 1, 0.5 and -2, the second among 0.5 and -2.
    expected = (log_sum(0, -0.5, -3) + log_sum(0, -2.5)) / 2
    rewards = torch.tensor([1.0, 0.5, -2.0])
    for pairs in itertools.permutations([(0, 1), (0, 2), (1, 2)]):
        assert loss_of(rewards, list(pairs)) == pytest.approx(expected, rel=1e-6)
    # Only neighbors: two choices between two.
    assert loss_of(rewards, [(0, 1), (1, 2)]) == pytest.approx((log_sum(0, -0.5) + log_sum(0, -2.5)) / 2, rel=1e-6)
    # The last two are tied and make no pair: one choice.
    assert loss_of(rewards, [(0, 1), (0, 2)]) == pytest.approx(log_sum(0, -0.5, -3), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_all_pairs_of_rankings_give_list_mle_and_its_gradients(seed):
    """Independently, from the last answer to the first by `logcumsumexp`."""
    generator = torch.Generator().manual_seed(seed)
    lists = [torch.randn(size, generator=generator).mul(3).requires_grad_() for size in (5, 2, 3)]
    terms = [ranking.flip(0).logcumsumexp(0).flip(0)[:-1] - ranking[:-1] for ranking in lists]
    expected = torch.cat(terms).mean()
    wanted = torch.autograd.grad(expected, lists)
    starts = [0, 5, 7]
    pairs = [
        (a + s, b + s)
        for ranking, s in zip(lists, starts, strict=True)
        for a in range(len(ranking))
        for b in range(a + 1, len(ranking))
    ]
    order = torch.randperm(len(pairs), generator=generator).tolist()
    loss = loss_of(torch.cat(lists), [pairs[index] for index in order])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, known in zip(torch.autograd.grad(loss, lists), wanted, strict=True):
        torch.testing.assert_close(gradient, known, rtol=1e-5, atol=1e-6)


def test_of_two_answers_it_is_bradley_terry():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 6, generator=generator)
    batch = {
        "weight": torch.rand(6, generator=generator) + 0.1,
        "label_confidence": torch.tensor([1.0, 0.9, 0.5, 0.0, 0.3, 0.7]),
        "margin": torch.tensor([0.0, 0.2, -0.4, 0.1, 0.0, 1.0]),
    }
    for names in (("weight",), ("weight", "margin"), ("weight", "label_confidence", "margin")):
        given, args = {name: batch[name] for name in names}, config("out")
        found = [pairwise_loss(chosen, rejected, given, args, loss_type=name) for name in ("plackett_luce", "bt")]
        torch.testing.assert_close(*found)
        torch.testing.assert_close(pair_weight(given, args, "plackett_luce"), given["weight"])
        for name in ("plackett_luce", "bt"):
            found.append(pair_curvature(torch.stack([chosen, rejected]), given, args, loss_type=name))
        torch.testing.assert_close(*found[2:], rtol=1e-4, atol=1e-6)


def test_weights_by_hand():
    rewards, pairs = torch.tensor([1.0, 0.5, -2.0]), [(0, 1), (0, 2), (1, 2)]
    # The first choice weighs 2, and in it the third answer counts a quarter; the second weighs 3.
    first, second = math.log(1 + math.exp(-0.5) + 0.25 * math.exp(-3)), log_sum(0, -2.5)
    weight = torch.tensor([2.0, 0.5, 3.0])
    assert loss_of(rewards, pairs, weight=weight) == pytest.approx((2 * first + 3 * second) / 5, rel=1e-6)
    assert loss_of(rewards, pairs, weight=7 * weight) == pytest.approx((2 * first + 3 * second) / 5, rel=1e-6)
    without = loss_of(rewards, [(0, 1), (1, 2)])
    assert loss_of(rewards, pairs, weight=torch.tensor([1.0, 0, 1])) == pytest.approx(without.item(), rel=1e-6)


def test_doubts_and_ties_by_hand():
    rewards, pairs = torch.tensor([1.0, 0.5, -2.0]), [(0, 1), (0, 2), (1, 2)]
    # The first two are tied: each wins by half, beside the third.
    first = math.log(1 + 0.5 * math.exp(-0.5) + math.exp(-3))
    second = math.log(1 + 0.5 * math.exp(0.5) + math.exp(-2.5))
    for doubt in (
        {"is_tie": torch.tensor([True, False, False])},
        {"label_confidence": torch.tensor([0.5, 1.0, 1.0])},
        {"label_confidence": torch.tensor([0.1, 1.0, 1.0]), "is_tie": torch.tensor([True, False, False])},
    ):
        assert loss_of(rewards, pairs, **doubt) == pytest.approx((first + second) / 2, rel=1e-6)
    # One pair is more likely the other way around, so that all three choose: 1 over its relative weight.
    terms = [
        (0.2 * 1, math.log(1 + math.exp(-0.5))),  # 0 over 1
        (0.8 * 1, math.log(1 + math.exp(0.5))),  # 1 over 0
    ]
    found = loss_of(rewards[:2], [(0, 1)], label_confidence=torch.tensor([0.2]))
    assert found == pytest.approx(sum(share * loss for share, loss in terms), rel=1e-6)


def test_votes_for_the_same_pair_are_one_competitor():
    # Two votes for the first and one for the second: as Bradley-Terry, least where the odds are two to one.
    rewards = torch.tensor([math.log(2), 0.0], requires_grad=True)
    loss = loss_of(rewards, [(0, 1), (0, 1), (1, 0)])
    loss.backward()
    assert loss.item() == pytest.approx((2 * math.log(1.5) + math.log(3)) / 3, rel=1e-6)
    torch.testing.assert_close(rewards.grad, torch.zeros(2), rtol=0, atol=1e-6)
    # A pair of a ranking that is there twice: its choice weighs 2, and the third answer there a half.
    found = loss_of(torch.tensor([1.0, 0.5, -2.0]), [(0, 1), (0, 1), (0, 2), (1, 2)])
    first = math.log(1 + math.exp(-0.5) + 0.5 * math.exp(-3))
    assert found == pytest.approx((2 * first + log_sum(0, -2.5)) / 3, rel=1e-6)


def test_curvature_is_that_of_a_choice_against_its_competitors():
    rewards, answers = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([[0, 1], [0, 2], [1, 2]])
    batch = {"weight": torch.ones(3), "answers": answers}
    args = config("out")
    found = pair_curvature(rewards[answers.T], batch, args, loss_type="plackett_luce")[0]
    weights = pair_weight(batch, args, "plackett_luce")
    first, second = torch.softmax(rewards, 0), torch.softmax(rewards[1:], 0)
    wanted = [first[0] * first[1], first[0] * first[2], second[0] * second[1]]
    torch.testing.assert_close(weights * found, torch.stack(wanted))
    # The Hessian by the rewards is that of these and of comparisons among competitors, which are not negative.
    args_of = lambda r: loss_of(r, answers.tolist()) * weights.sum()  # noqa: E731
    exact = torch.autograd.functional.hessian(args_of, rewards)
    ours = torch.zeros(3, 3)
    for (i, j), value in zip(answers.tolist(), weights * found, strict=True):
        ours[[i, j], [i, j]] += value
        ours[[i, j], [j, i]] -= value
    assert torch.linalg.eigvalsh(exact - ours).min() >= -1e-6
    # All tied: the same for all three pairs, whatever their order.
    tied = {**batch, "is_tie": torch.ones(3, dtype=torch.bool)}
    ties = pair_curvature(torch.zeros(2, 3), tied, args, loss_type="plackett_luce")[0] * pair_weight(
        tied, args, "plackett_luce"
    )
    torch.testing.assert_close(ties, ties[:1].expand(3))


def test_rewards_far_apart_have_finite_losses_and_gradients():
    rewards = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    batch = {"label_confidence": torch.tensor([1.0, 0.0, 0.5]), "weight": torch.tensor([1.0, 0.0, 2.0])}
    loss = loss_of(rewards, [(0, 1), (0, 2), (1, 2)], **batch)
    loss.backward()
    assert loss.isfinite() and rewards.grad.isfinite().all()
    # All weights 0: no choice, and no loss.
    zeros = {"weight": torch.zeros(2), "answers": torch.tensor([[0, 1], [0, 2]])}
    args = config("out")
    assert pairwise_loss(*torch.ones(2, 2), zeros, args, loss_type="plackett_luce").tolist() == [0, 0]
    assert pair_weight(zeros, args, "plackett_luce").tolist() == [0, 0]


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_a_training_ranks_the_answers_of_each_prompt(family, tmp_path):
    """Ranked rows as they are: the loss is that of the rankings, whatever the family's layout."""
    prompts = make_rows(2, num_images=(1,))
    rows = [
        {"prompt": row["prompt"], "images": row["images"], "completions": list(answers), "ranks": list(ranks)}
        for row, answers, ranks in zip(
            prompts,
            [("a cat", "two dogs", "no", "a red car"), ("yes", "a", "x y")],
            [(2, 1, 4, 3), (3, 1, 1)],
            strict=True,
        )
    ]
    args = {"loss_type": "plackett_luce", "per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1}
    trainer = trainer_for(family, tmp_path, Dataset.from_list(rows), args)
    torch.nn.init.normal_(trainer.model.score.weight, std=0.5)
    data = trainer.train_dataset
    batch = trainer.data_collator([data[index] for index in range(len(data))])
    rewards, alone = trainer.predict(data).predictions, {}
    assert len(data) == 8 and len(batch["pairs"]["num_answers"]) == 2
    for index, row in enumerate(data):
        group, pair = row["pair_id"].rsplit(":", 1)
        for side, number in enumerate(pair.split(">")):
            alone[group, int(number)] = rewards[index, side].item()
    first, second = (
        {n: r for (g, n), r in alone.items() if g == group} for group in dict.fromkeys(g for g, _ in alone)
    )
    order = [first[number] for number in (1, 0, 3, 2)]
    terms = [log_sum(*order[place:]) - order[place] for place in range(3)]
    terms += [log_sum(second[number], second[0]) - second[number] for number in (1, 2)]
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(terms) / 5, abs=1e-4)


def test_it_needs_pairs_that_are_read_together(tmp_path, caplog):
    with pytest.raises(ValueError, match='`group_pairs` is \'false\'; it must be "auto" or "true" with `loss_type='):
        config("out", loss_type="plackett_luce", group_pairs=False)
    trainer_for("qwen3_vl", tmp_path, Dataset.from_list(make_rows(3, num_images=(0,))), {"loss_type": "plackett_luce"})
    assert "no two pairs of the train set have one in common" in caplog.text
    rows = [
        {"prompt": row["prompt"], "completions": ["a", "b", "c"], "ranks": [1, 2, 3]}
        for row in make_rows(3, num_images=(0,))
    ]
    for change, told in (
        ({"per_device_train_batch_size": 4}, "divides some: there are up to 3 pairs of one"),
        ({"train_sampling_strategy": "sequential"}, "and nothing brings them together"),
        ({"per_device_train_batch_size": 6}, None),
        ({"max_tokens_per_batch": 500}, None),
    ):
        caplog.clear()
        trainer_for("qwen3_vl", tmp_path, Dataset.from_list(rows), {"loss_type": "plackett_luce", **change})
        found = [message for message in caplog.messages if "plackett_luce" in message]
        assert (told is None and not found) or told in found[0]
