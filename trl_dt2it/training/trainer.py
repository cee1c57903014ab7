"""[`MultimodalRewardTrainer`]: TRL's reward trainer for rows with images, strengths and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

import pyarrow as pa
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import BitsAndBytesConfig, DataCollator, EvalPrediction, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput
from transformers.utils import PushInProgress
from trl import RewardTrainer

from ..data.cards import PAPER
from ..data.columns import AnyDataset, column_names, has_transform, is_ranked
from ..data.mixing import concatenate
from ..data.ranked import to_pairs
from ..models.freezing import let_gradients_into_checkpoints
from ..models.modeling import pad_id_as_saved, set_reward_statistics, write_beside_adapter
from ..models.posterior import POSTERIOR_FILE, RewardPosterior, write_posterior
from ..models.rendering import ProcessingClass, get_tokenizer
from ..models.shared_prefix import decide_share_prefix
from ..processes import check_shared_folder, gather
from ..utils import with_values
from . import batching, grouping, losses, setup, sharding
from .blind_twin import BlindTwin, WithBlindBatch
from .collator import MultimodalPreferenceCollator
from .config import MultimodalRewardConfig
from .model_card import push_checkpoint, push_model, write_model_card
from .pair_scoring import fit_reward_posterior, measure_reward_statistics, try_reward_posterior
from .selection import SelectedRows, Selection, checkpoint_folder, resume_selection, selected


class MultimodalRewardTrainer(RewardTrainer):
    """
    Trainer for multimodal reward models.

    It accepts all that [`~trl.RewardTrainer`] does, and rows with images. With a text model and text rows, losses and
    gradients are those of TRL.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_dt2it import MultimodalRewardTrainer

    >>> dataset = load_dataset("HuggingFaceH4/rlaif-v_formatted", split="train")
    >>> trainer = MultimodalRewardTrainer(model="Qwen/Qwen3-VL-2B-Instruct", train_dataset=dataset)
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Hub id or directory, loaded with [`load_reward_model`] and `args.model_init_kwargs`, or a model with one
            label. An adapter is trained further, with its `score` head.
        args ([`MultimodalRewardConfig`], *optional*):
            Configuration. By default, one with the output directory `<model>-Reward`.
        data_collator (`DataCollator`, *optional*):
            By default [`MultimodalPreferenceCollator`], whose batches any other collator has to return too.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`] or `dict` or `list` of the former):
            Preference rows: conversational or plain, with explicit or implicit prompt; `images` or `image`; and
            optionally `strength`, `weight`, `label_confidence`, `margin`, `blind_margin`, `source` and `pair_id`.
            Several sets are concatenated.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Rows to evaluate on. If the `info` of a set has a method `measure(dataset, records)`, as that of a
            benchmark has, its metrics are logged too.
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`], *optional*):
            Processor, or the tokenizer of a text model. By default the model's own.
        compute_metrics (`Callable`, *optional*):
            Receives an [`~transformers.EvalPrediction`] with `predictions` of shape `(N, 2)`: the rewards of chosen
            and rejected, one row per pair.
        callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics:
            As in [`~transformers.Trainer`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a model passed as string.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters to train; the `score` head is added to `modules_to_save`.

    Raises:
        `ValueError`: at start, if a row cannot be trained on (the message names the first and counts the rest), if
        the loss needs a column that is not there, if a set has no rows, or if no parameter would be trained.
    """

    # `compute_loss` divides by the weight of all pairs of the optimization step.
    loss_is_scaled_for_ga = True

    _tag_names = ["trl", "reward-trainer", "trl-dt2it"]
    _name = "Multimodal Reward"
    _paper = PAPER

    # Trainer's annotations are wider.
    args: MultimodalRewardConfig
    model: PreTrainedModel

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: MultimodalRewardConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | dict[str, Dataset] | list[Dataset] | None = None,
        eval_dataset: Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict | None = None,
        processing_class: ProcessingClass | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = MultimodalRewardConfig(f"{name.split('/')[-1]}-Reward")
        if isinstance(train_dataset, (list, tuple)):
            train_dataset = {f"set {number}": dataset for number, dataset in enumerate(train_dataset)}
        if isinstance(train_dataset, dict) and not isinstance(train_dataset, (DatasetDict, IterableDatasetDict)):
            train_dataset = concatenate(train_dataset)
        setup.check_setup(args, train_dataset, eval_dataset)
        self._lengths: list[int] | None = None
        self._plan: batching.BatchPlan | None = None
        self._set_epoch = batching.SetEpoch()
        self._prepared: WeakSet[AnyDataset] = WeakSet()
        self._prompts: grouping.Prompts | None = None
        self._counts: pa.Table | None = None  # tokens of the pairs, if batches by tokens hold prompts whole
        if batching.needs_lengths(args) or args.group_pairs != "false":
            callbacks = [*(callbacks or []), self._set_epoch]

        is_loaded_here = isinstance(model, str)
        model, processing_class, peft_config = setup.set_up_model(
            model, processing_class, args, quantization_config, peft_config
        )
        # Read by `_prepare_dataset`, which RewardTrainer's `__init__` calls.
        self._collator = MultimodalPreferenceCollator(
            processing_class,
            setup.image_options(args),
            pad_to_multiple_of=cast("int | None", args.pad_to_multiple_of),  # `__post_init__` has resolved a string
            media=(),  # what the sets can hold is not known yet
            share_prefix=decide_share_prefix(args.share_prefix, model),
            group_pairs=args.group_pairs != "false",
            max_answers_per_group=args.max_answers_per_group,
        )
        self.loss_type: str | losses.LossFunction = args.loss_type
        sets = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        has_adapters = peft_config is not None or is_peft_model(model)
        setup.set_up_arguments(args, processing_class, [train_dataset, *sets], has_adapters=has_adapters)

        exact = setup.exact_weights(model)
        # Both are used above. RewardTrainer warns that it ignores the first, and applies the second to a tokenizer.
        with with_values(args, model_init_kwargs=None, chat_template_path=None):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator or self._collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=get_tokenizer(processing_class),
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=None if is_loaded_here else quantization_config,
                peft_config=peft_config,
            )
        if args.load_best_model_at_end and not args.save_on_each_node:
            check_shared_folder(cast(str, args.output_dir))  # every process reads the checkpoint that one has written
        # RewardTrainer handles a tokenizer; what is saved and pushed is the processor.
        self.processing_class = self.callback_handler.processing_class = processing_class
        self.model.config.pad_token_id = get_tokenizer(processing_class).pad_token_id
        self._collator.add_dummy_image = sharding.needs_equal_calls(self)
        is_ddp = self._collator.add_dummy_image and not sharding.is_sharded(self)
        if is_ddp and not self._collator.media and sharding.vision_parameters(self.model):
            self._collator.media = ("image",)  # DDP waits for gradients of the vision tower even if no set has images
        # DeepSpeed steps on parameters without a gradient as if it were zero, also on one process.
        self._leaves_vision_alone = self._collator.add_dummy_image or self.is_deepspeed_enabled
        if isinstance(data_collator, MultimodalPreferenceCollator):
            self.data_collator = setup.as_trainers(data_collator, self._collator)
        sharding.refuse_reentrant_twice(self)
        is_half = self.model.dtype in (torch.float16, torch.bfloat16)
        self._loaded_dtype = self.model.dtype if is_half and not is_peft_model(self.model) else None
        setup.put_back_exact(self, exact)
        sharding.keep_trained_in_fp32(self)
        self._shows_nothing = False
        self._filler: dict[str, Any] | None = None
        self._exact_head: dict[str, torch.Tensor] = {}
        self._body_dtype: torch.dtype | None = None
        setup.refuse_no_batch(self)
        if self.args.gradient_checkpointing and setup.is_reentrant(self.args):  # TRL sets it for ZeRO-3
            let_gradients_into_checkpoints(self.model)
        # In place of transformers' noise, which depends on the batch.
        alpha, self.neftune_noise_alpha = self.neftune_noise_alpha, None
        self._noise = None if alpha is None else losses.EmbeddingNoise(alpha)
        self._train_metrics = losses.TrainMetrics(self.accelerator.device)
        self._evaluation: batching.Evaluation | None = None
        self._posterior: RewardPosterior | None = None
        self._blind = None if args.blind_model is None else BlindTwin(args, self.accelerator)

    def _prepare_dataset(self, dataset: AnyDataset, processing_class: Any, args: Any, dataset_name: str) -> AnyDataset:
        if dataset in self._prepared:
            return dataset
        if is_ranked(dataset):
            dataset = to_pairs(dataset)
        columns = set(column_names(dataset))
        if dataset_name == "train":
            self.loss_type = losses.loss_type_for(args.loss_type, has_strength="strength" in columns)
            setup.check_blind_margins(dataset, columns, args)
        names = {"image": {"image", "images"}, "video": {"videos"}}
        self._collator.media = tuple(k for k in names if k in self._collator.media or names[k] & columns)
        dataset, counts = setup.prepare_dataset(dataset, name=dataset_name, collator=self._collator, args=args)
        self._prepared.add(dataset)
        if dataset_name != "train":
            return dataset
        prompts = None
        is_grouped = grouping.groups_pairs(args, self._collator) and isinstance(dataset, Dataset)
        if is_grouped:
            self._prompts = prompts = grouping.find_prompts(cast(Dataset, dataset), num_proc=args.dataset_num_proc)
        if prompts is not None:
            grouping.warn_of_few_prompts(prompts, args)
        if self.loss_type in losses.LISTWISE:
            grouping.warn_of_rankings(prompts, is_grouped, args)
        if batching.needs_lengths(args):
            sized = cast(Dataset, setup.plain_columns(dataset, (args.length_column_name,)))
            self._lengths = batching.pair_sizes(sized, counts, collator=self._collator, args=args)
            if (cap := args.max_tokens_per_batch) is not None:
                units = None
                if prompts is not None and counts is not None:
                    most = args.max_answers_per_group
                    units = grouping.make_units(prompts, counts, self._lengths, cap, most)
                    self._counts = counts
                how = {"world_size": args.world_size, "padded": not self._collator.share_prefix}
                self._plan = batching.plan_training(self._lengths, cap, units=units, **how)
        if "strength" in column_names(dataset):
            strengths = setup.plain_columns(dataset, ("strength", "source"))
            how, neutral = args.strength_normalization, args.neutral_strength
            self._collator.normalizer = losses.fit_dataset_strength(strengths, how=how, neutral=neutral)
        return dataset

    def _remove_unused_columns(self, dataset: Dataset, description: str | None = None) -> Dataset:
        # A transform may read any column, and its rows have other columns than the set.
        return dataset if has_transform(dataset) else super()._remove_unused_columns(dataset, description)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        # The lengths are kept beside the data: as a column they would have the whole set written anew.
        lengths, args = self._lengths, self.args
        prompts = None if self._prompts is None else self._prompts.number
        known = prompts if lengths is None else lengths
        if known is None:
            return super()._get_train_sampler(train_dataset)
        if len(known) != len(cast(Dataset, self.train_dataset if train_dataset is None else train_dataset)):
            raise ValueError("The train set was replaced after its lengths were taken; make a new trainer for it.")
        seed = args.seed if args.data_seed is None else args.data_seed
        if lengths is None:
            self._set_epoch.sampler = grouping.GroupedSampler(cast(Any, prompts), args.train_batch_size, seed)
            return self._set_epoch.sampler
        sampler: Sampler | None
        if self._plan is not None:
            sampler = batching.TokenBatchSampler(self._plan, rank=args.process_index, seed=seed)
        elif args.train_sampling_strategy == "group_by_length":
            size = args.train_batch_size * args.gradient_accumulation_steps
            sampler = batching.EpochLengthGroupedSampler(size, lengths, seed=seed, prompts=prompts)
        else:
            sampler = super()._get_train_sampler(Dataset.from_dict({args.length_column_name: lengths}))
        self._set_epoch.sampler = sampler
        return sampler

    @property
    def selection(self) -> Selection | None:
        """The [`Selection`] of the first callback that has one; without any, every row is trained on as it is."""
        found = (getattr(callback, "selection", None) for callback in self.callback_handler.callbacks)
        return next((selection for selection in found if isinstance(selection, Selection)), None)

    def get_train_dataloader(self) -> DataLoader:
        """As in [`~transformers.Trainer`], over the rows that a callback has selected."""
        if self._blind is not None and not isinstance(self.data_collator, WithBlindBatch):
            with with_values(self, data_collator=self._blind.collator(self.data_collator)):
                return self.get_train_dataloader()
        if (selection := self.selection) is None:
            return super().get_train_dataloader()
        dataset = cast(Dataset, self.train_dataset)
        if len(dataset) != len(selection):
            raise ValueError("The train set was replaced after the callback was made; make a new one for it.")
        return self._get_dataloader(
            SelectedRows(self._remove_unused_columns(dataset, description="training")),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=lambda _: selected(self._get_train_sampler(dataset), selection, self.args.data_seed),
            is_training=True,
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # First, because the checkpoint may be pushed, and is whole once the trainer's state is written.
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if (selection := self.selection) is not None and selection.save is not None and self.args.should_save:
            selection.save(checkpoint)
        if self._blind is not None and self.args.should_save:
            self._blind.save(checkpoint)
        super()._save_checkpoint(model, trial)

    def get_eval_dataloader(self, eval_dataset: str | AnyDataset | None = None) -> DataLoader:
        """As in [`~transformers.Trainer`], with every pair once, in the order of the set. A set that was not passed at
        start is prepared like those."""
        name = eval_dataset if isinstance(eval_dataset, str) else "eval"
        if eval_dataset is None:
            eval_dataset = self.eval_dataset
        elif isinstance(eval_dataset, str):
            eval_dataset = cast("dict[str, AnyDataset]", self.eval_dataset)[eval_dataset]
        if eval_dataset is None:
            raise ValueError("There is no evaluation set; pass `eval_dataset` to the trainer, or to `evaluate`.")
        return self._evaluation_loader(eval_dataset, name)

    def get_test_dataloader(self, test_dataset: AnyDataset) -> DataLoader:
        """As [`~MultimodalRewardTrainer.get_eval_dataloader`]."""
        return self._evaluation_loader(test_dataset, "test")

    def _evaluation_loader(self, dataset: AnyDataset, name: str) -> DataLoader:
        dataset = self._prepare_dataset(dataset, self.processing_class, self.args, name)
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description=name)
        return batching.evaluation_loader(self, dataset)

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """As in [`~transformers.Trainer`], of a set that is prepared like those passed at start, or a `dict` of sets,
        whose names follow the prefix. `predictions` `(N, 2)` are the rewards of chosen and rejected, in the order of
        the set."""
        if isinstance(test_dataset, dict):
            sets = test_dataset.items()
            return {name: self.predict(one, ignore_keys, f"{metric_key_prefix}_{name}") for name, one in sets}
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = setup.COLUMNS  # type: ignore[assignment]  # known to mypy as None, its first value

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in [`~transformers.Trainer`], also after an evaluation on several processes. The model's configuration
        gets the mean and standard deviation of the rewards, see `reward_statistics_pairs` and `reward_posterior`."""
        setup.refuse_uneven_batches(self)
        sharding.take_back_preparation(self)
        if not sharding.is_sharded(self):
            # Again, because an evaluation with `bf16_full_eval` puts the model into bf16.
            sharding.keep_trained_in_fp32(self)
        resume = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        resume_selection(self.selection, resume, cast(str, self.args.output_dir))
        if self._blind is not None:
            self._blind.resume(checkpoint_folder(resume, cast(str, self.args.output_dir)))
        set_reward_statistics(self.model.config, None)  # those of the model that training starts from
        self._posterior = None
        # Liger is applied already; transformers would hand it the whole model.
        noise = nullcontext() if self._noise is None else self._noise.on(self.model)
        with with_values(self.args, use_liger_kernel=False), noise:
            output = super().train(*args, **kwargs)
        if output.global_step == 0 and isinstance(self.train_dataset, IterableDataset):
            raise ValueError(
                "The streamed train set gave no batch, so nothing was trained; check where it reads from."
            )
        set_reward_statistics(self.model.config, measure_reward_statistics(self))
        self._posterior = try_reward_posterior(self) if self.args.reward_posterior else None
        return output

    def save_reward_posterior(self, output_dir: str | None = None) -> RewardPosterior:
        """
        Fit the posterior of the `score` head to the training set, in one pass of the model as it is, and write it
        beside the model; all processes must call it. For a model that was trained before, pass it to a trainer with
        its training set and its configuration.

        Args:
            output_dir (`str`, *optional*):
                Folder of the model; by default that of the configuration.

        Returns:
            [`~trl_dt2it.models.posterior.RewardPosterior`]: also for `RewardScorer(..., posterior=...)`.

        Raises:
            `ValueError`: if the set is streamed, if the loss has no curvature on it or all weights are 0, or before
                `train` where DeepSpeed or FSDP shards the model.
        """
        if isinstance(self.train_dataset, IterableDataset):
            raise ValueError("The posterior needs every training pair, and the train set is streamed; load it whole.")
        if sharding.is_sharded(self) and self.state.global_step == 0:
            raise ValueError("DeepSpeed and FSDP shard the model in `train`; call this after it, or launch without.")
        self._posterior = fit_reward_posterior(self)
        if self.args.should_save:
            write_posterior(self._posterior, output_dir or cast(str, self.args.output_dir))
        return self._posterior

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in [`~transformers.Trainer`], with the `score` head in fp32 and the body in the dtype in which the model
        was loaded. Checkpoints hold the fp32 weights of training."""
        self._exact_head = sharding.exact_head(self)
        # A checkpoint is an internal call, but so are the saves of `push_to_hub` and of the recipe.
        folder = Path(output_dir or cast(str, self.args.output_dir))
        is_checkpoint = _internal_call and folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        self._body_dtype = None if is_checkpoint else self._loaded_dtype
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is None and self._body_dtype is not None:
            state_dict = self.model.state_dict()
        if state_dict and self.args.should_save:  # empty where DeepSpeed saves in its own format
            state_dict = sharding.with_dtypes(state_dict, self._exact_head, self._body_dtype)
        # It is pickled, as many functions cannot be.
        with with_values(self.args, loss_type=losses.loss_name(self.args.loss_type)):
            super()._save(output_dir, state_dict)
        folder = output_dir or cast(str, self.args.output_dir)
        if self.args.should_save and self._body_dtype is not None:
            # `save_pretrained` has written the dtype in memory, which readers would load the weights in.
            model = self.accelerator.unwrap_model(self.model)
            model.config.dtype = self._body_dtype
            with pad_id_as_saved(model):
                model.config.save_pretrained(folder)
        if self.args.should_save and is_peft_model(self.model):
            write_beside_adapter(self.model.config, folder)
        if self.args.should_save and self._posterior is not None:
            write_posterior(self._posterior, folder)
        elif self.args.should_save and self.state.global_step:  # that of a model that lay here before
            (Path(folder) / POSTERIOR_FILE).unlink(missing_ok=True)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """As in [`~transformers.Trainer`], with the weight of the step's pairs over all processes, so that the step
        does not depend on their division into batches and processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if isinstance(self.train_dataset, IterableDataset):
            batches = self._fill_up(batches, num_batches)
        if not batches:
            return batches, None
        weight = sum(losses.pair_weight(batch["pairs"], self.args, self.loss_type).sum() for batch in batches)
        local = cast(torch.Tensor, weight).to(device)
        if self._filler is None and not (self._leaves_vision_alone and self._collator.media):
            self._shows_nothing = self._leaves_vision_alone
            return batches, self.accelerator.reduce(local, "sum")
        shown = sum(batch["pairs"]["has_media"].sum() for batch in batches)
        local = torch.stack([local, cast(torch.Tensor, shown).to(device).float()])
        total, num_shown = self.accelerator.reduce(local, "sum")
        self._shows_nothing = num_shown.item() == 0
        return batches, total

    def _fill_up(self, batches: list, num_batches: int) -> list:
        """Complete the optimizer step within which a stream ends with batches without weight, on all processes."""
        # transformers would leave the gradient of a step that is cut short to the next epoch, and processes out of
        # step. `[]` says that all processes are at their end.
        is_first = self._filler is None  # on all processes alike
        if batches:
            pairs = {**batches[-1]["pairs"], "is_filler": True}
            pairs |= {name: torch.zeros_like(pairs[name]) for name in ("weight", "has_media", "num_tokens")}
            self._filler = {**batches[-1], "pairs": pairs}
        counts = gather(len(batches))
        if max(counts) == 0:
            return []
        if is_first and 0 in counts:
            raise ValueError(
                f"Process {counts.index(0)} gets no row of the streamed train set, though others do; make it of at "
                "least as many files as there are processes, none of them empty."
            )
        return [*batches, *[self._filler] * (num_batches - len(batches))]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in [`~transformers.Trainer`]; a step without an image on any process leaves the vision tower alone."""
        loss = super().training_step(*args, **kwargs)
        if self._shows_nothing and self.accelerator.sync_gradients and not self.is_deepspeed_enabled:
            # Dummy images have given it gradients of zeros, by which weight decay and momentum would move it.
            # DeepSpeed's optimizer skips it by itself, see [`sharding.split_vision_groups`].
            for parameter in sharding.vision_parameters(self.model):
                parameter.grad = None
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in [`~transformers.Trainer`], prepared for DeepSpeed or FSDP2 to take over the parameters."""
        sharding.shard_head(self)
        optimizer = super().create_optimizer(model)
        if self.is_deepspeed_enabled:
            sharding.split_vision_groups(self)
        if self.is_fsdp_enabled:
            self._group_names = sharding.name_groups(self)
        return optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:
            sharding.point_groups_at(self, self._group_names)
        if self.is_deepspeed_enabled:
            sharding.skip_idle_groups(cast(Any, self.deepspeed).optimizer, lambda: self._shows_nothing)
        return prepared

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        sharding.shard_head(self)  # also where an evaluation comes first
        return super()._wrap_model(model, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As in [`~transformers.Trainer`], of a batch of B pairs, averaged with the weights. The outputs are `logits`
        `(B, 2)`, the rewards of chosen and rejected. `num_items_in_batch` is the weight of all pairs of the
        optimization step over all processes, by default the batch's own."""
        pairs = inputs["pairs"]
        num_pairs = len(pairs["weight"])
        if self._noise is not None:
            self._noise.see(inputs)
        # `skip_logits` is Trainer's option for Liger's language models.
        tensors = {name: value for name, value in inputs.items() if name not in ("pairs", "skip_logits")}
        weights = losses.pair_weight(pairs, self.args, self.loss_type)
        total, factor = weights.sum(), 1
        if num_items_in_batch is not None:
            # The weight is summed over processes, and DDP, FSDP and DeepSpeed average the loss over them.
            total, factor = torch.as_tensor(num_items_in_batch), self.accelerator.num_processes
        total = total.clamp(min=torch.finfo(torch.float32).tiny)
        # An evaluation is of the model alone.
        uses_blind = self._evaluation is None and (self.args.blind_offset or self.args.blind_weighting)
        if self._blind is not None and "blind" in pairs:
            # Before the main model's pass, so that their activations are not in memory together.
            rate = cast(torch.optim.Optimizer, self.optimizer).param_groups[0]["lr"]
            pairs = {**pairs, "blind_margin": self._blind.learn(pairs, factor / total, rate)}
        rewards = losses.pair_rewards(model, tensors, num_pairs, pairs.get("answers"))  # (2, B + D), of D dummies too
        chosen, rejected = of_loss = rewards[:, :num_pairs]
        if self.args.blind_offset and uses_blind:
            of_loss = losses.with_blind_margin(of_loss, pairs)
        of_pairs = losses.pairwise_loss(of_loss[0], of_loss[1], pairs, self.args, loss_type=self.loss_type)
        blind = None
        if self.args.blind_weighting and uses_blind:
            # Not in `total`, which is known before the rewards: a step is the same however its pairs are batched.
            share = losses.blind_weight(rewards[:, :num_pairs], pairs)
            weights = weights * share
            blind = (share, weights)
        loss = (weights * of_pairs).sum() * factor / total
        loss = loss + 0.0 * rewards[:, num_pairs:].sum()  # dummies take part without effect
        chosen, rejected = chosen.detach(), rejected.detach()
        if self._evaluation is not None:
            self._evaluation.add(pairs, chosen, rejected, of_pairs.detach(), weights)
        elif self.model.training and not pairs.get("is_filler"):
            counted = pairs.get("blind_margin") if uses_blind else None
            self._train_metrics.add(chosen, rejected, pairs["num_tokens"].sum(), counted, blind)
        return (loss, {"logits": torch.stack([chosen, rejected], dim=1)}) if return_outputs else loss

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in [`~transformers.Trainer`], with exact metrics under `metric_key_prefix`, which is a keyword here."""
        prefix = kwargs.setdefault("metric_key_prefix", "eval")
        evaluation = batching.Evaluation(self.accelerator)
        with with_values(self, _evaluation=evaluation, gather_function=evaluation.gather), sharding.evaluable(self):
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        records = evaluation.records(dataloader)
        dataset = getattr(dataloader.dataset, "dataset", dataloader.dataset)
        metrics = losses.evaluation_metrics(records)
        if (measure := getattr(getattr(dataset, "info", None), "measure", None)) is not None:
            metrics |= measure(dataset, records)
        metrics["num_tokens"] = self._total_train_tokens
        total = cast("dict[str, float]", output.metrics)  # None only in outputs made by hand
        total.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        return output._replace(num_samples=len(records))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            metrics, num_tokens = self._train_metrics.collect(self.accelerator)
            self._total_train_tokens += num_tokens // self._tp_size
            if metrics:
                # RewardTrainer averages these lists, of one entry each.
                self._metrics["train"].update({name: [value] for name, value in metrics.items()})
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)

    def create_model_card(  # type: ignore[override]  # TRL's signature, which is not transformers'
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write `README.md` into the output directory: usage with an image, training data, of which `dataset_name` is
        the Hub id, and the figures of training and evaluation."""
        if self.is_world_process_zero():
            extra = [tags] if isinstance(tags, str) else list(tags or [])
            write_model_card(self, model_name=model_name, dataset_name=dataset_name, tags=[*self._tag_names, *extra])

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in [`~transformers.Trainer`], of the model, its processor and its card, and nothing else of the output
        directory; other `kwargs` are passed to [`~MultimodalRewardTrainer.create_model_card`]."""
        return push_model(self, *args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        jobs: Any = push_checkpoint(self, checkpoint_folder)  # transformers annotates a list of futures as one future
        self.push_in_progress = PushInProgress(jobs)  # type: ignore[assignment]  # known to mypy as None, as above
