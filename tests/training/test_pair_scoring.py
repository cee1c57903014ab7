"""Scoring of pairs: training's own rewards, in the order of the rows, and nothing else touched."""

import random

import numpy as np
import pytest
import torch

from trl_dt2it import MultimodalPreferenceCollator
from trl_dt2it.training.pair_scoring import evaluating, score_pairs

from ..pairs import model_of, processor_of
from ..rows import make_dataset
from ..trainers import trainer_for


# The first has one row per pair, the second two.
BOTH = ["qwen3_vl", "gemma3"]


def collator_of(family: str) -> MultimodalPreferenceCollator:
    return MultimodalPreferenceCollator(processor_of(family), share_prefix=family == "qwen3_vl")


@pytest.fixture(scope="module", params=BOTH)
def scored(request):
    model, collator, data = model_of(request.param), collator_of(request.param), make_dataset(7)
    return model, collator, data, score_pairs(model, data, collator, batch_size=3, show_progress=False)


def test_rewards_are_those_of_each_pair_alone(scored):
    model, collator, data, scores = scored
    assert scores.shape == (7, 2) and scores.dtype == np.float32
    model.eval()
    for index, row in enumerate(data):
        batch = collator([row])
        del batch["pairs"]
        with torch.no_grad():
            chosen, rejected = model(**batch).logits[:, 0].tolist()
        assert scores[index] == pytest.approx([chosen, rejected], abs=1e-5)
    model.train()
    assert len(np.unique(scores)) == 14


def test_they_are_what_the_evaluation_of_the_trainer_sees(tmp_path):
    data, seen = make_dataset(5), []
    trainer = trainer_for(
        "qwen3_vl", tmp_path, data, eval_dataset=data, compute_metrics=lambda p: seen.append(p.predictions) or {}
    )
    trainer.evaluate()
    scores = score_pairs(trainer.model, trainer.train_dataset, trainer.data_collator, batch_size=2)
    np.testing.assert_array_equal(scores, seen[0])


def test_batches_by_tokens_and_workers_change_nothing(scored):
    model, collator, data, scores = scored
    packed = score_pairs(model, data, collator, max_tokens_per_batch=400)
    np.testing.assert_allclose(packed, scores, atol=1e-5)
    # Given lengths are taken: with these each pair is alone.
    alone = score_pairs(model, data, collator, max_tokens_per_batch=1, lengths=[5] * 7)
    np.testing.assert_array_equal(alone, score_pairs(model, data, collator, batch_size=1))
    np.testing.assert_array_equal(score_pairs(model, data, collator, batch_size=3, num_workers=2), scores)


def test_swapped_pairs_have_swapped_rewards(scored):
    model, collator, data, scores = scored
    swapped = data.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    np.testing.assert_allclose(score_pairs(model, swapped, collator, batch_size=3), scores[:, ::-1], atol=1e-5)


def test_random_generators_modes_and_gradients_stay(scored):
    model, collator, data, _ = scored
    frozen = next(module for module in model.modules() if not list(module.children()))
    frozen.eval()
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state())
    modes = [module.training for module in model.modules()]
    score_pairs(model, data, collator, batch_size=4, num_workers=1)
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.random.get_rng_state(), before[2])
    assert all(parameter.grad is None for parameter in model.parameters())
    frozen.train()


def test_dropout_is_off(scored):
    model, collator, data, scores = scored
    dropout = torch.nn.Dropout(0.5)
    handle = model.score.register_forward_pre_hook(lambda module, args: (dropout(args[0]),))
    model.add_module("test_dropout", dropout)
    np.testing.assert_array_equal(score_pairs(model, data, collator, batch_size=3), scores)
    assert dropout.training
    del model.test_dropout
    handle.remove()


def test_modes_come_back_after_an_error():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]


def test_an_empty_set_has_no_rewards(scored):
    model, collator, data, _ = scored
    assert score_pairs(model, data.select([]), collator).shape == (0, 2)
