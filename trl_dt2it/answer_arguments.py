"""What the recipes that sample and score answers are told on the command line: prompts, models, and how to sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from datasets import Dataset

from .data.columns import leave_images_encoded
from .models.shared_prefix import usable_attention
from .recipe_data import RowArguments, show_dry_run
from .recipe_models import with_tiny
from .scoring.answers import Sampling


if TYPE_CHECKING:
    from .scoring.answers import ScoredAnswers

# The name that stands for what `trl_dt2it.demo.digits` makes.
DIGITS = "digits"
# The flags that the help of these recipes shows.
SAMPLING_FLAGS = (
    *("model_name_or_path", "reward_model", "dataset_name", "image_root", "max_rows", "output_dir", "num_answers"),
    *("max_new_tokens", "temperature", "top_p", "prompts_per_batch", "normalize", "dtype", "reward_dtype", "dry_run"),
)


@dataclass
class AnswerArguments(RowArguments):
    """
    Which prompts, who answers them, and who scores the answers; besides [`RowArguments`], of which `dataset_name` may
    be `digits`.

    Parameters:
        model_name_or_path (`str`, *optional*):
            Vision-language model that answers. Not needed where the rows have a column `answers`, lists of texts.
        reward_model (`str`):
            Directory or Hub id of the reward model.
        output_dir (`str`):
            Folder of the results.
        num_answers (`int`, *optional*, defaults to `8`):
            Answers to a prompt.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Longest answer, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the draws.
        top_p (`float`, *optional*, defaults to `1.0`):
            Share of the probability that tokens are drawn from.
        prompts_per_batch (`int`, *optional*, defaults to `4`):
            Prompts that are answered together: what a kill may cost at most.
        normalize (`bool`, *optional*, defaults to `False`):
            Whether rewards are in standard deviations of the reward model's training set.
        dtype, reward_dtype (`str`, *optional*):
            Dtype of the weights of either model; by default the checkpoint's.
        attn_implementation (`str`, *optional*):
            Attention implementation of both, such as `flash_attention_2`.
        batch_tokens (`int`, *optional*, defaults to `16384`):
            Most tokens that the reward model reads at a time.
        num_prompts (`int`, *optional*, defaults to `100`):
            Number of prompts of the digits set.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that ships with a checkpoint may run.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draws.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to say only what would be read and written.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Model that answers."})
    reward_model: str | None = field(default=None, metadata={"help": "Directory or Hub id of the reward model."})
    output_dir: str = field(default="outputs/answers", metadata={"help": "Folder of the results."})
    num_answers: int = field(default=8, metadata={"help": "Answers to a prompt."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the draws."})
    top_p: float = field(default=1.0, metadata={"help": "Share of the probability that tokens are drawn from."})
    prompts_per_batch: int = field(default=4, metadata={"help": "Prompts that are answered together."})
    normalize: bool = field(default=False, metadata={"help": "Rewards in standard deviations of the training set."})
    dtype: str | None = field(default=None, metadata={"help": "Dtype of the answering model."})
    reward_dtype: str | None = field(default=None, metadata={"help": "Dtype of the reward model."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation."})
    batch_tokens: int = field(default=16384, metadata={"help": "Most tokens that the reward model reads at a time."})
    num_prompts: int = field(default=100, metadata={"help": "Number of prompts of the digits set."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code of a checkpoint may run."})
    seed: int = field(default=42, metadata={"help": "Seed of the draws."})
    dry_run: bool = field(default=False, metadata={"help": "Say only what would be read and written."})

    def read(self) -> Dataset:
        """
        The rows of the prompts, images still encoded.

        Returns:
            `Dataset`

        Raises:
            `ValueError`: if a model or the rows are not named, or a file is missing.
        """
        if self.reward_model is None:
            raise ValueError("Give `reward_model`, the directory or Hub id of a reward model.")
        if self.dataset_name == DIGITS:
            from .demo.digits import make_digits

            rows = make_digits("test", self.num_prompts, seed=self.seed).select_columns(
                ["prompt", "images", "group_id"]
            )
        else:
            rows = super().read()
        if "answers" not in rows.column_names and self.model_name_or_path is None:
            raise ValueError("Give `model_name_or_path`, the model that answers, or rows with a column `answers`.")
        return leave_images_encoded(rows)

    def answer(self, rows: Dataset, *, source: str) -> list[ScoredAnswers]:
        """Answer the prompts of rows that [`read`] gave, and score the answers; every process has to call it."""
        from .scoring.answers import Answering, answer_and_score  # heavy, and not needed for `--help`

        folder = Path(self.output_dir)
        # A tiny model that was made stays, for what it has answered stands under the date of its files.
        is_given = "answers" in rows.column_names
        model = None if is_given else with_tiny(str(self.model_name_or_path), folder, self.seed, keep=True)
        names = ("num_answers", "max_new_tokens", "temperature", "top_p", "seed")
        attention = usable_attention(self.attn_implementation)
        loading = {"attn_implementation": attention, "trust_remote_code": self.trust_remote_code}
        scoring = {"dtype": self.reward_dtype, "batch_tokens": self.batch_tokens, "normalize": self.normalize}
        how = Answering(
            model,
            cast(str, self.reward_model),  # `read` has refused None
            Sampling(**{name: getattr(self, name) for name in names}),
            self.prompts_per_batch,
            self.image_options,
            {"dtype": self.dtype, **loading},
            {**scoring, **loading},
        )
        return answer_and_score(how, rows, folder, source=source)

    def show_plan(self, rows: Dataset, output: Path) -> None:
        """Prints what would be read and written."""
        has_answers = "answers" in rows.column_names
        show_dry_run(
            [
                ("reads", self.dataset_name or self.preferences),
                ("prompts", len(rows)),
                ("answers of", "the column `answers`" if has_answers else self.model_name_or_path),
                ("answers to a prompt", None if has_answers else self.num_answers),
                (
                    "tokens to write at most",
                    None if has_answers else self.num_answers * self.max_new_tokens * len(rows),
                ),
                ("scored by", self.reward_model),
                ("writes", output),
            ]
        )
