"""Arguments that recipes share, their sets and models by name, demo ones among them, and their output on screen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from .data.columns import leave_images_encoded
from .data.images import ImageOptions
from .demo import READER, READER_DIR, TINY
from .models.shared_prefix import usable_attention
from .processes import main_process_first, on_main_process, whole_weights
from .utils import check_value


if TYPE_CHECKING:
    from trl import GRPOConfig, ModelConfig, RewardConfig

    from .curation.rounds.config import BaseModel
    from .scoring.answers import ScoredAnswers
    from .scoring.scorer import RewardScorer


DIGITS = "digits"  # as `dataset_name`, the set that `trl_dt2it.demo.digits` makes

# Flags that the help of the recipes that sample answers shows.
SAMPLING_FLAGS = (
    *("model_name_or_path", "reward_model", "dataset_name", "image_root", "max_rows", "output_dir", "num_answers"),
    *("max_new_tokens", "temperature", "top_p", "prompts_per_batch", "normalize", "dtype"),
    *("reward_dtype", "dry_run"),
)


@dataclass
class RowArguments:
    """Rows that a recipe reads."""

    dataset_name: str | None = field(default=None, metadata={"help": "Rows: a file, a folder or a Hub id."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a set on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split."})
    # A name that `load_preferences` knows; `dataset_name` is then its file or folder.
    preferences: str | None = field(default=None, metadata={"help": "Public set or format, such as rlaif_v."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that no path of an image may leave."})
    max_rows: int | None = field(default=None, metadata={"help": "Take the first so many rows only."})

    def read(self) -> Dataset:
        """Read the rows, images still encoded; rows without a column `source` get none."""
        from .curation.rounds.config import read_set  # imports TRL's trainer, which a recipe's help does without

        if self.preferences is not None:
            spec: dict[str, Any] = {"preferences": self.preferences, "path_or_id": self.dataset_name}
            spec |= {"split": self.dataset_split, "image_root": self.image_root, "max_rows": self.max_rows}
            return read_set("preferences", self.preferences, spec)
        if self.dataset_name is None:
            raise ValueError("Give `dataset_name`, the file, folder or Hub id of the rows.")
        names = ("dataset_name", "dataset_config", "dataset_split", "max_rows")
        return read_set("dataset_name", "own", {name: getattr(self, name) for name in names})

    @property
    def image_options(self) -> ImageOptions:
        """Options of reading images; the paths of a format were resolved when it was read."""
        return ImageOptions(image_root=None if self.preferences is not None else self.image_root)

    @property
    def published_images(self) -> ImageOptions:
        """Options of reading images that are written into files."""
        return ImageOptions(image_root=self.image_root)


@dataclass
class EngineArguments:
    """The engine that works on rows."""

    engine: str | None = field(default=None, metadata={"help": "ray: share the work among the workers of a cluster."})
    ray_address: str | None = field(default=None, metadata={"help": "The cluster, such as auto; by default its own."})

    def in_use(self) -> AbstractContextManager[None]:
        """Use the engine within."""
        check_value("`engine`", self.engine, self.engine in (None, "ray"), "it must be ray, or left out")
        if self.engine is None:
            check_value("`ray_address`", self.ray_address, self.ray_address is None, "it needs `--engine ray`")
            return nullcontext()
        from .scale import on_ray  # imports the scorer

        return on_ray(self.ray_address)


def show_dry_run(rows: Iterable[tuple[str, object]]) -> None:
    """Print what a recipe would read and write, a line for each name with a value that is not `None`."""
    if not PartialState().is_main_process:
        return
    table = Table(title="Dry run: nothing is written", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)


def show_paths(paths: Mapping[str, object], console: Console) -> None:
    """Print where results are, a line each and outside of tables, where a long path is not cut."""
    width = max(map(len, paths)) + 1
    for name, path in paths.items():
        console.print(f"{name + ':':<{width}} {path}", soft_wrap=True, highlight=False)


@dataclass
class ScorerArguments:
    """Reward model that a recipe scores with."""

    model: str | None = field(default=None, metadata={"help": "Directory or Hub id of a reward model or adapter."})
    dtype: str | None = field(default=None, metadata={"help": "Dtype of the weights; by default the checkpoint's."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation."})
    batch_tokens: int = field(default=16384, metadata={"help": "Most tokens of a batch."})
    num_workers: int = field(default=0, metadata={"help": "Worker processes, for each process, that decode images."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code of the checkpoint may run."})
    dry_run: bool = field(default=False, metadata={"help": "Say only what would be read and written."})

    def named_model(self) -> str:
        """Return `model`, and refuse a missing one."""
        if self.model is None:
            raise ValueError("Give `model`, the directory or Hub id of a reward model.")
        return self.model

    def load(self, **options: Any) -> RewardScorer:
        """Load the reward model, with more options of [`RewardScorer.from_pretrained`]."""
        from .scoring.scorer import RewardScorer  # heavy, and not needed for `--help`

        return RewardScorer.from_pretrained(self.named_model(), **self.loading(), **options)

    def loading(self) -> dict[str, Any]:
        """Return arguments of [`RewardScorer.from_pretrained`]."""
        names = ("dtype", "batch_tokens", "num_workers", "revision", "trust_remote_code")
        options = {name: getattr(self, name) for name in names}
        return {**options, "attn_implementation": usable_attention(self.attn_implementation)}


def share_work() -> PartialState:
    """Return the state of all processes of the launcher; a recipe calls it before anything asks for a `PartialState`,
    which without an accelerator would take its process for the only one."""
    return PartialState(cpu=not torch.accelerator.is_available())


def with_tiny(name: str, output_dir: str | Path, seed: int, *, keep: bool = False) -> str:
    """Resolve the name of a model: `tiny-qwen3-vl` is made in `output_dir`, unless `keep` finds it there, and
    `tiny-qwen3-vl-reader` ships with the package. Every process has to call it."""
    if name == READER:
        return str(READER_DIR)
    if name != TINY:
        return name
    from .demo.tiny import build_tiny_vlm  # imports transformers' Qwen3-VL

    base = Path(output_dir) / "_base"
    with main_process_first():
        # The processor's file is written last. On other machines it is there if they share the folder.
        is_there = (base / "processor_config.json").is_file()
        if not is_there or (PartialState().is_main_process and not keep):
            with whole_weights():
                build_tiny_vlm(base, seed=seed)
    return str(base)


def find_base_model(name: str, seed: int, *, sets: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> BaseModel:
    """Resolve the name of the model that rounds on these sets start from, as [`with_tiny`]."""
    from .curation.rounds.config import BaseModel
    from .curation.rounds.stages import Stage
    from .demo.digits import two_image_texts
    from .demo.tiny import build_tiny_vlm

    if name != TINY:
        return BaseModel(name, seed, str(READER_DIR) if name == READER else None)
    # Questions about two images have words that read-outs have not.
    is_t2i = any("digits_t2i" in (spec or {}) for sources in sets.values() for spec in sources.values())
    texts = two_image_texts() if is_t2i else []

    def build(folder: Path) -> dict[str, Any]:
        on_main_process(lambda: build_tiny_vlm(folder, seed=seed, extra_texts=texts))
        return {"seed": seed}

    stage = Stage(f"base-model/seed-{seed}", build, {"model": TINY, "seed": seed, "texts": texts})
    return BaseModel(name, seed, stage=stage)


def loading_options(model_args: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained`, with an attention implementation that can run on this machine."""
    attention = usable_attention(model_args.attn_implementation)
    return {"revision": model_args.model_revision, "attn_implementation": attention, "dtype": model_args.dtype}


def init_kwargs(model_args: ModelConfig, training_args: RewardConfig | GRPOConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the model to train, of which `model_init_kwargs` overrides others."""
    own = cast("dict[str, Any] | None", training_args.model_init_kwargs)  # resolved by `__post_init__`
    return {**loading_options(model_args), **(own or {})}


@dataclass
class AnswerArguments(RowArguments):
    """Prompts, the model that answers them, and the reward model; besides [`RowArguments`]."""

    # Not needed where the rows have a column `answers`, lists of texts.
    model_name_or_path: str | None = field(default=None, metadata={"help": "Vision-language model that answers."})
    reward_model: str | None = field(default=None, metadata={"help": "Directory or Hub id of the reward model."})
    output_dir: str = field(default="outputs/answers", metadata={"help": "Folder of the results."})
    num_answers: int = field(default=8, metadata={"help": "Answers to a prompt."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the draws."})
    top_p: float = field(default=1.0, metadata={"help": "Share of the probability that tokens are drawn from."})
    prompts_per_batch: int = field(default=4, metadata={"help": "Prompts answered together, lost if a run is killed."})
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
        """Read the prompts, images still encoded."""
        if self.reward_model is None:
            raise ValueError("Give `reward_model`, the directory or Hub id of a reward model.")
        if self.dataset_name == DIGITS:
            from .demo.digits import make_digits

            rows = make_digits("test", self.num_prompts, seed=self.seed)
            rows = rows.select_columns(["prompt", "images", "group_id"])
        else:
            rows = super().read()
        if "answers" not in rows.column_names and self.model_name_or_path is None:
            raise ValueError("Give `model_name_or_path`, the model that answers, or rows with a column `answers`.")
        return leave_images_encoded(rows)

    def answer(self, rows: Dataset, *, source: str, lower_confidence: float = 0.0) -> list[ScoredAnswers]:
        """Sample answers to the prompts, and score them; every process has to call it."""
        from .scoring.answers import Answering, Sampling, answer_and_score  # likewise

        folder = Path(self.output_dir)
        # A tiny model that was made stays: its answers are stored under the date of its files.
        has_answers = "answers" in rows.column_names
        model = None if has_answers else with_tiny(str(self.model_name_or_path), folder, self.seed, keep=True)
        # Where nothing is sampled, no setting of sampling can be wrong.
        names = () if has_answers else ("num_answers", "max_new_tokens", "temperature", "top_p", "seed")
        attention = usable_attention(self.attn_implementation)
        loading = {"attn_implementation": attention, "trust_remote_code": self.trust_remote_code}
        scoring = {"dtype": self.reward_dtype, "batch_tokens": self.batch_tokens, "normalize": self.normalize}
        models = (model, cast(str, self.reward_model))  # `read` has refused None
        sampling = Sampling(**{name: getattr(self, name) for name in names})
        kwargs = ({"dtype": self.dtype, **loading}, {**scoring, **loading})
        how = Answering(*models, sampling, self.prompts_per_batch, self.image_options, *kwargs, lower_confidence)
        return answer_and_score(how, rows, folder, source=source)

    def show_plan(self, rows: Dataset, output: Path) -> None:
        """Print what would be read and written."""
        plan: list[tuple[str, object]] = [("reads", self.dataset_name or self.preferences), ("prompts", len(rows))]
        if "answers" in rows.column_names:
            plan.append(("answers of", "the column `answers`"))
        else:
            plan += [("answers of", self.model_name_or_path), ("answers to a prompt", self.num_answers)]
            plan.append(("tokens to write at most", self.num_answers * self.max_new_tokens * len(rows)))
        show_dry_run([*plan, ("scored by", self.reward_model), ("writes", output)])
