"""Who reads one row per pair: families that cannot, models that are refused, and the trainer's option."""

import pytest

from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer, load_reward_model
from trl_dt2it.models import modeling
from trl_dt2it.models.shared_prefix import decide_share_prefix, why_not_shared

from ..families import FAMILIES, family_dir
from ..pairs import (
    SHARING_FAMILIES,
    collate,
    model_of,
    processor_of,
)
from ..rows import make_dataset, make_rows
from ..trainers import config


OTHER_FAMILIES = [family for family in FAMILIES if family not in SHARING_FAMILIES]


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
    args = config(output_dir, **{"num_train_epochs": 2, "seed": 7, **options})
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
