"""Each private name of TRL, transformers or accelerate that the package touches. A failure here says what broke."""

import inspect

import pytest
from accelerate import Accelerator
from transformers import PreTrainedModel, Trainer
from transformers.modeling_layers import GenericForSequenceClassification
from trl import RewardTrainer


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (RewardTrainer, "_prepare_dataset", ["self", "dataset", "processing_class", "args", "dataset_name"]),
        (RewardTrainer, "_set_signature_columns_if_needed", ["self"]),
        (Trainer, "_push_from_checkpoint", ["self", "checkpoint_folder"]),
        (Trainer, "_finish_current_push", ["self"]),
        (Trainer, "get_batch_samples", ["self", "epoch_iterator", "num_batches", "device"]),
        (PreTrainedModel, "_can_set_attn_implementation", []),
        (PreTrainedModel, "_can_set_experts_implementation", []),
    ],
)
def test_signature(owner, name, parameters):
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


@pytest.mark.parametrize(
    ("owner", "code"),
    [
        (RewardTrainer.__init__, "self._prepare_dataset(train_dataset, processing_class, args, "),
        (RewardTrainer.__init__, "self._total_train_tokens = 0"),
        (RewardTrainer.__init__, "self._tp_size"),
        (RewardTrainer.__init__, "self.model.add_model_tags(self._tag_names)"),
        (RewardTrainer.log, "self._metrics[mode]"),
        (RewardTrainer._set_signature_columns_if_needed, "self._signature_columns"),
        (Trainer.training_step, "self.loss_is_scaled_for_ga"),
        (Trainer._push_from_checkpoint, "self.push_in_progress = PushInProgress("),
        (PreTrainedModel._can_set_attn_implementation.__func__, '"_can_set_attn_implementation_cached_value"'),
        (PreTrainedModel._can_set_experts_implementation.__func__, '"_can_set_experts_implementation_cached_value"'),
        (PreTrainedModel.save_pretrained, "save_original_format"),
        (GenericForSequenceClassification.__init__, "self.score = nn.Linear("),
        (Accelerator.prepare_model, "_is_accelerate_prepared"),
        (Accelerator.prepare_model, "self._models"),
    ],
)
def test_source_still_uses_the_name(owner, code):
    assert code in inspect.getsource(owner)
