"""Train a vision-language model with TRL's GRPO on the rewards of a multimodal reward model.

    accelerate launch recipes/grpo_with_reward_model.py \
        --model_name_or_path Qwen/Qwen3-VL-2B-Instruct --reward_model outputs/my-reward-model \
        --dataset_name HuggingFaceH4/rlaif-v_formatted --use_peft --lora_target_modules all-linear \
        --output_dir outputs/qwen3-vl-2b-grpo

The data set has a column `prompt` of messages and `images` or `image`; other columns are dropped. TRL passes images to
reward functions alone, not to reward models, so the model goes in as a function. For RLOO replace `GRPOConfig` and
`GRPOTrainer`; the function is the same.

To try it, after `recipes/train_reward_model.py --config recipes/configs/digits.yaml`, on a model that can say nothing
yet:

    python recipes/grpo_with_reward_model.py --model_name_or_path tiny-qwen3-vl --dtype float32 \
        --reward_model outputs/digits --dataset_name digits --output_dir outputs/grpo --max_steps 10 \
        --max_completion_length 16 --use_cpu true --bf16 false --report_to none
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

from trl_dt2it.recipe import DIGITS, init_kwargs, with_tiny


@dataclass
class GRPOScriptArguments(ScriptArguments):
    """
    Arguments of this script, besides TRL's [`~trl.ScriptArguments`].

    Parameters:
        reward_model (`str`):
            Directory or Hub id of the reward model.
        reward_dtype (`str`, *optional*):
            Dtype of its weights; by default the checkpoint's.
        reward_batch_tokens (`int`, *optional*, defaults to `16384`):
            Most tokens that it reads at a time.
        invalid_reward (`float`, *optional*):
            Reward of a completion that spells a special token of the reward model. By default it does not count.
        lower_confidence (`float`, *optional*, defaults to `0.0`):
            Standard deviations to lower each reward by; the model was trained with `reward_posterior`.
        image_root (`str`, *optional*):
            Folder that paths of images start from.
        num_prompts (`int`, *optional*, defaults to `1000`):
            Number of prompts of the digits set.
    """

    reward_model: str | None = field(default=None, metadata={"help": "Directory or Hub id of the reward model."})
    reward_dtype: str | None = field(default=None, metadata={"help": "Dtype of its weights."})
    reward_batch_tokens: int = field(default=16384, metadata={"help": "Most tokens that it reads at a time."})
    invalid_reward: float | None = field(default=None, metadata={"help": "Reward of what it cannot read."})
    lower_confidence: float = field(default=0.0, metadata={"help": "Standard deviations to lower each reward by."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that paths of images start from."})
    num_prompts: int = field(default=1000, metadata={"help": "Number of prompts of the digits set."})


def load_prompts(script_args, seed):
    """Read prompts and images, without other columns."""
    from datasets import load_dataset

    if script_args.dataset_name == DIGITS:
        from trl_dt2it.demo.digits import make_digits

        dataset = make_digits("train", script_args.num_prompts, seed=seed)
    else:
        name, split = script_args.dataset_name, script_args.dataset_train_split
        dataset = load_dataset(name, name=script_args.dataset_config, split=split)
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{script_args.dataset_name} has no column `prompt`; it has {', '.join(dataset.column_names)}."
        )
    return dataset.select_columns([name for name in ("prompt", "images", "image") if name in dataset.column_names])


def main(script_args, training_args, model_args):
    from trl import GRPOTrainer, get_peft_config, get_quantization_config

    from trl_dt2it.scoring.scorer import RewardScorer

    for name, value in (("reward_model", script_args.reward_model), ("dataset_name", script_args.dataset_name)):
        if not value:
            raise ValueError(f"Give `{name}`.")
    model = with_tiny(model_args.model_name_or_path, training_args.output_dir, training_args.seed)
    scorer = RewardScorer.from_pretrained(
        script_args.reward_model,
        device=training_args.device,
        dtype=script_args.reward_dtype,
        batch_tokens=script_args.reward_batch_tokens,
        image_root=script_args.image_root,
        trust_remote_code=training_args.trust_remote_code,
    )
    training_args.model_init_kwargs = init_kwargs(model_args, training_args)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=scorer.as_reward_func(
            invalid_reward=script_args.invalid_reward, lower_confidence=script_args.lower_confidence
        ),
        args=training_args,
        train_dataset=load_prompts(script_args, training_args.seed),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if PartialState().is_main_process:
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        print(f"Mean reward: {rewards[0]:+.3f} at first, {rewards[-1]:+.3f} at last.")
        print(f"Model: {Path(training_args.output_dir).resolve()}")


def make_parser():
    return TrlParser((GRPOScriptArguments, GRPOConfig, ModelConfig), allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
