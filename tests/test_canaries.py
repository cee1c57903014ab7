"""Each private name of TRL, transformers, accelerate or datasets that we touch. A failure says what broke."""

import inspect

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModel,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    Trainer,
    masking_utils,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations import deepspeed, is_fsdp_enabled
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import cached_file
from trl import RewardTrainer

from trl_dt2it.models.families import FAMILIES
from trl_dt2it.training.batching import UNCOUNTED_TOKENS


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (RewardTrainer, "_prepare_dataset", ["self", "dataset", "processing_class", "args", "dataset_name"]),
        (RewardTrainer, "_set_signature_columns_if_needed", ["self"]),
        (Trainer, "_get_train_sampler", ["self", "train_dataset"]),
        (Trainer, "_push_from_checkpoint", ["self", "checkpoint_folder"]),
        (
            Trainer,
            "_get_dataloader",
            ["self", "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"],
        ),
        (Trainer, "_save_checkpoint", ["self", "model", "trial"]),
        (Trainer, "_get_output_dir", ["self", "trial"]),
        (Trainer, "_remove_unused_columns", ["self", "dataset", "description"]),
        (Trainer, "_finish_current_push", ["self"]),
        (Trainer, "_save", ["self", "output_dir", "state_dict"]),
        (Trainer, "save_model", ["self", "output_dir", "_internal_call"]),
        (Trainer, "_wrap_model", ["self", "model", "training", "dataloader"]),
        (Trainer, "_prepare_for_training", ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"]),
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
        (RewardTrainer.log, "self.model.training"),
        (SeedableRandomSampler.__iter__, "self.epoch + self.initial_seed"),
        (RewardTrainer._set_signature_columns_if_needed, "self._signature_columns"),
        (Trainer.get_train_dataloader, "batch_size=self._train_batch_size"),
        (Trainer.training_step, "self.loss_is_scaled_for_ga"),
        (Trainer.evaluation_loop, "losses = self.gather_function(losses.repeat(batch_size))"),
        (Trainer.evaluation_loop, "logits = self.gather_function(logits)"),
        (Trainer._get_dataloader, "if isinstance(sampler, BatchRebalanceSampler):"),
        (Trainer._get_dataloader, 'dataloader_params["batch_sampler"] = sampler'),
        (Trainer._get_dataloader, "prepared_bs.num_processes = 1"),
        (Trainer._get_train_sampler, "train_dataset[self.args.length_column_name]"),
        (Trainer.get_train_dataloader, "sampler_fn=self._get_train_sampler"),
        (Trainer._push_from_checkpoint, "self.push_in_progress = PushInProgress("),
        (PreTrainedModel._can_set_attn_implementation.__func__, '"_can_set_attn_implementation_cached_value"'),
        (PreTrainedModel._can_set_experts_implementation.__func__, '"_can_set_experts_implementation_cached_value"'),
        (PreTrainedModel.save_pretrained, "save_original_format"),
        (GenericForSequenceClassification.__init__, "self.score = nn.Linear("),
        (masking_utils._preprocess_mask_arguments, "len(attention_mask.shape) == 4"),
        (_flash_attention_forward, "(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)"),
        (_flash_attention_forward, "lazy_import_flash_attention(attn_implementation)"),
        (Accelerator.prepare_model, "_is_accelerate_prepared"),
        (Accelerator.prepare_model, "self._models"),
        (deepspeed.is_deepspeed_zero3_enabled, "_hf_deepspeed_config_weak_ref().is_zero3()"),
        (deepspeed.set_hf_deepspeed_config, "_hf_deepspeed_config_weak_ref = weakref.ref("),
        (is_fsdp_enabled, '"FSDP_CPU_RAM_EFFICIENT_LOADING", "False"'),
    ],
)
def test_source_still_uses_the_name(owner, code):
    assert code in inspect.getsource(owner)


def test_text_models_are_read_by_the_pad_id_in_one_place():
    """`read_last_real_token` takes over the classes that have this forward pass."""
    assert "pad_token_id" in inspect.getsource(GenericForSequenceClassification.forward)
    llama = transformers.LlamaForSequenceClassification
    assert llama.forward is GenericForSequenceClassification.forward and llama.base_model_prefix == "model"
    assert inspect.getsource(PreTrainedModel.base_model.fget).count("self.base_model_prefix") == 1


def test_names_of_a_checkpoint_are_those_that_a_save_would_write():
    config = GPTNeoXConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with torch.device("meta"):
        model = transformers.GPTNeoXForCausalLM(config)
    assert set(revert_weight_conversion(model, {"lm_head.weight": torch.empty(2)})) == {"embed_out.weight"}


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes_look_names_up_in_a_module_that_can_be_replaced(family):
    """`register_auto_classes` puts a module of ours into `_modules`, from which a class falls back to transformers."""
    mapping = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    assert model_type_to_module_name(family) == family and family in mapping._modules
    assert mapping._model_mapping is MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    config_class = CONFIG_MAPPING[family]
    assert mapping._reverse_config_mapping[config_class.__name__] == family
    assert mapping._load_attr_from_module(family, config_class.__name__) is config_class


def test_configurations_know_their_attention_and_where_they_are_from():
    config = LlamaConfig(num_hidden_layers=1, attn_implementation="eager", name_or_path="some/model")
    assert (config._attn_implementation, config._name_or_path) == ("eager", "some/model")
    config._attn_implementation = "sdpa"
    assert (config._attn_implementation, config.name_or_path) == ("sdpa", "some/model")


def test_a_file_that_is_not_there_is_none(tmp_path):
    assert cached_file(tmp_path, "nothing.json", _raise_exceptions_for_missing_entries=False) is None


def test_attention_is_looked_up_by_name():
    for name in ("sdpa", "flash_attention_2", "flash_attention_3"):
        assert name in ALL_ATTENTION_FUNCTIONS and name in ALL_MASK_ATTENTION_FUNCTIONS
    parameters = inspect.signature(_flash_attention_forward).parameters
    assert {"query_length", "is_causal", "softmax_scale", "target_dtype", "attn_implementation"} <= parameters.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_base_models_take_features_in_place_of_pixels(family):
    base = AutoModel._model_mapping[CONFIG_MAPPING[family]]
    assert "mm_encoder_outputs" in inspect.signature(base.forward).parameters
    assert "pixel_values" in inspect.signature(base.get_image_features).parameters


@pytest.mark.parametrize("name", UNCOUNTED_TOKENS)
def test_processors_count_from_sizes(name):
    assert "image_sizes" in inspect.signature(getattr(transformers, name)._get_num_multimodal_tokens).parameters


def test_rows_that_were_selected_are_known_by_their_indices():
    selected = Dataset.from_dict({"a": [10, 11, 12]}).select([2, 0])
    assert selected._indices.column(0).to_pylist() == [2, 0]
    again = Dataset(selected.data, fingerprint=f"{selected._fingerprint}-all")
    assert again._fingerprint == f"{selected._fingerprint}-all"
    assert selected.data.column("a").to_pylist() == [10, 11, 12]


def test_zero3_is_known_by_a_reference_that_can_be_put_aside():
    from transformers.integrations import deepspeed

    assert "_hf_deepspeed_config_weak_ref" in inspect.getsource(deepspeed.is_deepspeed_zero3_enabled)
    assert "_hf_deepspeed_config_weak_ref = None" in inspect.getsource(deepspeed.unset_hf_deepspeed_config)
    assert "is_deepspeed_zero3_enabled()" in inspect.getsource(PreTrainedModel._from_config.__func__)


def test_deepspeed_steps_group_by_group(monkeypatch):
    """`skip_idle_groups` takes the place of `_optimizer_step`, which gets the index of a group or of its part."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Stage2

    assert list(inspect.signature(Stage2._optimizer_step).parameters) == ["self", "group_no"]
    assert list(inspect.signature(Stage3._optimizer_step).parameters) == ["self", "sub_group_id"]
    assert "self._optimizer_step(i)" in inspect.getsource(Stage2)
    assert "self._optimizer_step(sub_group_id)" in inspect.getsource(Stage3)
    assert "self.sub_group_to_group_id[sub_group_id]" in inspect.getsource(Stage3._optimizer_step)


def test_every_cast_of_a_module_goes_through_apply():
    for cast in (torch.nn.Module.to, torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.cpu):
        assert "self._apply(" in inspect.getsource(cast)
    assert list(inspect.signature(torch.nn.Module._apply).parameters) == ["self", "fn", "recurse"]


def test_strict_fp32_modules_are_read_from_the_class():
    assert "_keep_in_fp32_modules_strict" in inspect.getsource(PreTrainedModel.post_init)


def test_a_stream_that_is_split_over_nodes_is_whole_without_its_mark():
    stream = Dataset.from_dict({"a": [0, 1, 2, 3, 4]}).to_iterable_dataset()
    assert isinstance(stream, IterableDataset) and stream._distributed is None
    half = split_dataset_by_node(stream, 1, 2)
    assert [row["a"] for row in half] == [1, 3]
    half._distributed = None
    assert [row["a"] for row in half] == [0, 1, 2, 3, 4]


def test_a_data_set_has_its_info_where_we_put_another():
    dataset = Dataset.from_dict({"a": [1]})
    assert dataset.info is dataset._info
