"""The configuration of a run: its rounds, the sets that it reads, and its models."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from ...data.columns import column_of, connected, group_codes, is_ranked, leave_images_encoded, rows_at_once
from ...data.contents import pair_contents, source_fingerprint
from ...data.controls import MEDIA
from ...data.decontamination import look_alikes
from ...data.load import is_saved, load_preferences, load_saved
from ...data.mixing import concatenate, with_canonical_columns, with_columns
from ...data.ranked import to_pairs
from ...debias.balance import ONE_SIDED
from ...debias.style import STYLE_FEATURES
from ...models.modeling import load_processing_class, set_pixel_limits
from ...processes import main_process_first, on_main_process
from ...training.collator import MultimodalPreferenceCollator
from ...training.config import MultimodalRewardConfig
from ...training.setup import image_options, prepare_dataset
from ...utils import check_value, digest, digest_of, whole_file
from ..health import num_reference_parts
from ..judging import Judging, read_judging
from ..ledger import LABELS, Labels
from ..rules import FLIP_RULES, KEEP_RULES, Flip, Keep, parameters_of
from .stages import Stage
from .training import RewardTraining


logger = logging.get_logger(__name__)

# The paper: the worse half of the pairs that the model contradicts is flipped; a model that is trained on the result
# decides what is consistent; judges decide on the rest. Twice.
PAPER_ROUND = [
    {"name": "flip", "rules": [{"flip": "flip_weakest_half"}], "orientation": "current", "min_kept": 0.0},
    {"name": "filter", "rules": [{"keep": "keep_consistent"}], "orientation": "current", "min_kept": 0.0},
]

# Ours: the least certain pairs sit a round out, and all are kept at the end. Models of several rounds err less
# together than each of them, and have no common unit.
_FLIP, _KEEP = {"flip": "flip_mixture", "by": "source"}, {"keep": "keep_confident", "share": 0.9}
_TOGETHER = {"with_earlier": True, "combine": "zscore"}

METHODS: dict[str, list[dict[str, Any]]] = {
    "paper": [{"steps": PAPER_ROUND}, {"steps": PAPER_ROUND}],
    "mixture": [{"rules": [_FLIP, _KEEP]}, {"rules": [_FLIP, _KEEP], **_TOGETHER}, {"rules": [_FLIP], **_TOGETHER}],
}

FINALS = ("unbalanced", "base", "uncurated", "curated", "oracle")
SET_KINDS = ("dataset_name", "preferences")

# Rows of further kinds of sources: a function of the `source` and of the value of the key that names the kind.
Loaders = Mapping[str, Callable[[str, Mapping[str, Any]], Dataset]]

_FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_BALANCE = {"by": "source", "max_weight": 10.0, "features": None}


@dataclass(frozen=True)
class Step:
    """One scoring of the pool, and the decision by it."""

    name: str | None = None  # tells the steps of a round apart
    # Training set of the models that score: `"base"`, the constructed data alone, or `"current"`, these and the pool
    # as curated so far. By default `"base"` in the first step and `"current"` later.
    train_on: str | None = None
    # With `"current"`, number of parts of the pool, each scored by a model that is trained on the others; 1 scores in
    # sample. By default that of the run.
    folds: int | None = None
    # Rules, one after the other, with their options: `{flip: NAME, by: source, ...}`, `{keep: NAME, by: source, ...}`
    rules: Sequence[Mapping[str, Any]] = ()
    combine: str = "raw"  # as in `combine_scores`
    with_earlier: bool = False  # combine the scores with those of all steps before
    # Judge labels anew as in the `"source"`, or as they are `"current"`, so that flips stay unless flipped back.
    orientation: str = "source"
    min_kept: float = 0.1  # least share of each source to keep
    judge: bool = False  # ask judges about the pairs that the rules drop; those that they agree on come back

    def __post_init__(self) -> None:
        choices = {"train_on": (None, "base", "current"), "combine": ("raw", "zscore", "rank")}
        for name, known in {**choices, "orientation": ("source", "current")}.items():
            given, told = getattr(self, name), f"choose one of {', '.join(filter(None, known))}"
            check_value(f"`{name}` of a round", given, given in known, told)
        check_value("`folds` of a round", self.folds, self.folds is None or self.folds >= 1, "it must be at least 1")
        check_value("`min_kept` of a round", self.min_kept, 0 <= self.min_kept <= 1, "it must be a share from 0 to 1")
        if not self.rules:
            raise ValueError("A round has no `rules`; give at least one, such as {flip: flip_mixture}.")
        self.read_rules()

    def read_rules(self) -> list[Flip | Keep]:
        """Return the rules as [`decide`] takes them."""
        return [read_rule(rule) for rule in self.rules]

    @property
    def is_base(self) -> bool:
        """True if the models of the step are trained on the base alone."""
        return self.train_on == "base"

    @property
    def takes_reference(self) -> bool:
        """True if a rule of the step takes the margins of pairs known to be right."""
        return any("reference" in parameters_of(rule) for rule in self.read_rules())

    def settings(self) -> dict[str, Any]:
        """Return all settings that a decision depends on."""
        names = ("rules", "combine", "orientation", "min_kept", *(["with_earlier"] if self.with_earlier else []))
        return {name: asdict(self)[name] for name in names}


def read_rule(rule: Mapping[str, Any]) -> Flip | Keep:
    """Read a rule as [`decide`] takes it."""
    options = dict(rule)
    if ("flip" in rule) == ("keep" in rule):
        raise ValueError(f"The rule {dict(rule)} has to have one of the keys `flip` and `keep`.")
    kind, made = ("flip", Flip) if "flip" in rule else ("keep", cast(Any, Keep))
    name, known = options.pop(kind), cast("dict[str, Any]", FLIP_RULES if kind == "flip" else KEEP_RULES)
    own = {key.name: options.pop(key.name) for key in fields(made) if key.name in options and key.name != "rule"}
    if name not in known:
        raise ValueError(f"`{kind}: {name}` is no rule; choose one of {', '.join(known)}.")
    # The first parameter is the reward margins, and keyword-only parameters are for arrays.
    _, *others = inspect.signature(known[name]).parameters.values()
    allowed = [one.name for one in others if one.kind != one.KEYWORD_ONLY]
    if unknown := [option for option in options if option not in allowed]:
        takes = f"takes {', '.join(allowed)}" if allowed else "takes no options"
        raise ValueError(f"The rule {name} has no option `{unknown[0]}`; it {takes}.")
    return made(partial(known[name], **options), **own)


def read_rounds(
    method: str, rounds: Sequence[Mapping[str, Any]] | None = None, *, folds: int = 2, judge: bool = False
) -> list[list[Step]]:
    """Read the rounds of a configuration, with all defaults filled in."""
    check_value("`method`", method, method in METHODS, f"choose one of {', '.join(METHODS)}")
    if rounds is not None and not rounds:
        raise ValueError("`rounds` is empty; give at least one round, or leave it out for those of the method.")
    read: list[list[Step]] = []
    known = [field.name for field in fields(Step)]
    for number, given in enumerate(METHODS[method] if rounds is None else rounds, 1):
        if "steps" in given and len(given) > 1:
            raise ValueError(f"Round {number} has `steps` and other keys beside it; put these into the steps.")
        steps = [dict(one) for one in given.get("steps", [given])]
        if rounds is None and judge:
            steps[-1]["judge"] = True
        if unknown := [key for step in steps for key in step if key not in known]:
            raise ValueError(f"Round {number} has the unknown key `{unknown[0]}`; known are {', '.join(known)}.")
        for index, step in enumerate(steps):
            step.setdefault("train_on", "current" if read or index else "base")
            step.setdefault("folds", folds)
        read.append([Step(**step) for step in steps])
        if len({step.name for step in read[-1]}) < len(steps):
            raise ValueError(f"The steps of round {number} need a `name` each, all different.")
        if any(step.judge for step in read[-1]) and not judge:
            raise ValueError(f"Round {number} has `judge: true`, but there is no `judge`; say where it is.")
    return read


def read_sets(name: str, specs: Mapping[str, Mapping[str, Any]], loaders: Loaders | None = None) -> Dataset:
    """Read a set from several sources; ranked prompts become their pairs."""
    if not specs:
        raise ValueError(f"`{name}` is empty; name at least one source.")
    parts = {}
    with main_process_first():  # the others find its downloads and conversions
        for source, spec in specs.items():
            rows = read_set(f"{name}.{source}", source, spec or {}, loaders)
            rows = to_pairs(rows) if is_ranked(rows) else rows
            if "source" not in rows.column_names or name == "test":
                rows = with_columns(rows, {"source": pa.repeat(source, len(rows))})
            parts[source] = leave_images_encoded(rows)
    return concatenate(parts)


def read_set(where: str, source: str, spec: Mapping[str, Any], loaders: Loaders | None = None) -> Dataset:
    """Read the rows of one source; messages name the setting as `where`."""
    spec, loaders = dict(spec), loaders or {}
    known = (*SET_KINDS, *loaders)
    kinds = [kind for kind in known if kind in spec]
    if len(kinds) != 1:
        raise ValueError(f"`{where}` has to have one of the keys {', '.join(known)}.")
    kind, value, most = kinds[0], spec.pop(kinds[0]), spec.pop("max_rows", None)
    if kind == "preferences":
        rows, spec = load_preferences(value, **{"source": source, **spec}), {}
    elif kind == "dataset_name":
        rows = _load(where, str(value), spec.pop("dataset_config", None), spec.pop("dataset_split", "train"))
        root = spec.pop("image_root", None)
        rows = rows if root is None else with_canonical_columns(rows, image_root=root)
    else:
        rows = loaders[kind](source, json.loads(value) if isinstance(value, str) else value)
    if spec:
        raise ValueError(f"`{where}` has the unknown key `{next(iter(spec))}`.")
    return rows if most is None or most >= len(rows) else rows.select(range(most))


def _load(where: str, name: str, config: str | None, split: str) -> Dataset:
    path = Path(name).expanduser()
    if path.suffix in _FILES:
        if not path.is_file():
            raise ValueError(f"`{where}` is {name}, but there is no such file.")
        return load_dataset(_FILES[path.suffix], data_files=str(path), split=split)
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~"))):
        raise ValueError(f"`{where}` is {name}, but there is no such folder.")
    if is_saved(path):
        return load_saved(path, split)
    return load_dataset(str(path) if path.is_dir() else name, config, split=split)


def set_digest(dataset: Dataset, contents: pa.Table) -> str:
    """Hash the names, contents and rows of a set, the same on another machine."""
    names = [name for name in dataset.column_names if name not in MEDIA]
    tables = dataset.select_columns(names).with_format("arrow").iter(rows_at_once(dataset))
    return digest(
        *((f"{value}\n" for value in contents[name].to_pylist()) for name in ("pair_id", "content")),
        (json.dumps(row, sort_keys=True, default=str) for table in tables for row in table.to_pylist()),
    )


def prompt_groups(dataset: Dataset, pair_ids: pa.Array) -> np.ndarray:
    """Number the prompts of a set, by `group_id` where it has one; return that of each row, `(N,)`."""
    # Without its number, the name of a copy is that of the original.
    groups, _ = group_codes(pa.array([re.sub(r"#\d+$", "", name) for name in pair_ids.to_pylist()]))
    if "group_id" in dataset.column_names:
        _, first = np.unique(groups, return_index=True)
        groups = group_codes(column_of(dataset, "group_id"))[0][first[groups]]  # copies are where the original is
    return np.unique(groups, return_inverse=True)[1]


def merged_groups(groups: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Merge groups that share a row with one of the `others`, both `(N,)`. One of the `others` of over 1 % of the rows
    (and 50), such as a placeholder of many, counts for nothing; where more than an eighth would be one group, which no
    parts can be made of, the groups stay as they are, with a warning."""
    others = np.unique(others, return_inverse=True)[1]
    counts = np.bincount(others)
    rows = np.flatnonzero(counts[others] <= max(50, len(groups) // 100))
    size = groups.max(initial=0) + 1
    merged = connected(size + len(counts), groups[rows], size + others[rows])[groups]
    sizes = np.bincount(merged)[merged]
    is_large = (sizes > max(50, len(groups) // 8)) & (sizes > np.bincount(groups)[groups])
    if is_large.any():
        logger.warning(
            f"{is_large.sum():,} of {len(groups):,} pairs are joined by prompts and images that look alike, too many "
            "for one part of a set: of these, only prompts are kept together, and copies may be in several parts."
        )
        merged = np.where(is_large, merged.max() + 1 + groups, merged)
    return np.unique(merged, return_inverse=True)[1]


def folds_of(groups: np.ndarray, number: int, seed: int = 42) -> np.ndarray:
    """Split a set into parts that share no group, given that of each row, `(N,)`; return the part of each row."""
    sizes = np.bincount(groups)
    order = np.random.default_rng(seed).permutation(len(sizes))
    middles = np.cumsum(sizes[order]) - sizes[order] / 2
    part = np.empty(len(sizes), dtype=np.int64)
    part[order] = (middles * number / len(groups)).astype(np.int64)
    return part[groups]


@dataclass
class SourceSets:
    """The sets of a run, each read when it is first needed."""

    specs: Mapping[str, Mapping[str, Mapping[str, Any]]]  # the sources of `base`, `pool` and `test`, as in `read_sets`
    args: MultimodalRewardConfig  # `on_bad_row`, `image_check` and `max_length` decide which rows can be used
    model_dir: Callable[[], str]  # directory or Hub id of a model whose processor counts tokens and knows special ones
    loaders: Loaders | None = None

    def __post_init__(self) -> None:
        for method in (self.raw, self.contents, self.digest, self.usable, self.groups):
            setattr(self, method.__name__, cache(method))  # called once for each set

    def raw(self, name: str) -> Dataset:
        """Return all rows of a set."""
        return read_sets(name, self.specs[name], self.loaders)

    def contents(self, name: str) -> pa.Table:
        """Return names and contents of all rows of a set, as [`pair_contents`] does; images are read once."""
        rows, args = self.raw(name), self.args
        return on_main_process(lambda: pair_contents(rows, image_root=args.image_root, num_proc=args.dataset_num_proc))

    def digest(self, name: str) -> str:
        """Hash a set, and the settings that decide which of its rows can be used."""
        args, rows, contents = self.args, self.raw(name), self.contents(name)
        limits = {"max_length": args.max_length, "min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
        content = on_main_process(lambda: set_digest(rows, contents))
        return digest_of([content, args.on_bad_row, args.image_check, limits])

    def fingerprint(self, name: str) -> str:
        """Hash the names of all rows of a set, by which a ledger knows it, whichever of them can be used."""
        return source_fingerprint(self.contents(name)["pair_id"].combine_chunks())

    def usable(self, name: str) -> Dataset:
        """Return the rows of a set that can be trained on and scored; others are quarantined as in a training."""
        model_dir, args = self.model_dir(), self.args
        processing_class = load_processing_class(model_dir, trust_remote_code=args.trust_remote_code)
        set_pixel_limits(processing_class, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
        collator = MultimodalPreferenceCollator(processing_class, image_options=image_options(args))
        # Named first, so that copies are numbered the same way whatever rows are dropped.
        rows = with_columns(self.raw(name), {"pair_id": self.contents(name)["pair_id"].combine_chunks()})
        return prepare_dataset(rows, name=name, collator=collator, args=args)[0]

    def groups(self, name: str) -> np.ndarray:
        """Return groups of usable rows that a model may not know one of and score another, `(N,)`: of one prompt, or
        with images that look alike, since wrong labels of copies are wrong alike."""
        rows, args = self.usable(name), self.args
        # Kept, so that a later start and another machine have the same parts, and do not read all images anew.
        file = Path(cast(str, args.output_dir)) / "groups" / f"{name}-{self.digest(name)[:16]}.parquet"
        known = on_main_process(lambda: pq.read_table(file)["group"].to_numpy() if file.is_file() else None)
        if known is not None and len(known) == len(rows):
            return known
        alike = look_alikes(rows, image_options=image_options(args), num_proc=args.dataset_num_proc)
        groups = merged_groups(prompt_groups(rows, self.names(name)), alike)

        def write() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as part:
                pq.write_table(pa.table({"group": groups}), part)

        on_main_process(write)
        return groups

    def names(self, name: str) -> pa.Array:
        """Return the names of the usable rows of a set."""
        return column_of(self.usable(name), "pair_id")


@dataclass(frozen=True)
class BaseModel:
    """A model to start from, and the seed of its trainings."""

    name_or_path: str
    seed: int
    directory: str | None = field(default=None, compare=False)  # its folder, if not its name
    stage: Stage | None = field(default=None, compare=False)  # makes it, if the run does


@dataclass
class CurationRun:
    """The settings that the stages of a run share."""

    output_dir: Path
    training: RewardTraining
    models: Sequence[BaseModel]  # all score; the first is trained at the end
    sets: SourceSets  # `base`, `pool` and, optionally, `test`
    rounds: Sequence[Sequence[Step]]
    final: Sequence[str]  # of `FINALS`
    judging: Judging | None = None
    balance: dict[str, Any] | None = None  # from `read_balance`
    rows_per_shard: int = 4096
    shard: tuple[int, int] = (0, 1)  # i of n machines
    labels: Labels = "hard"  # of the curated pool in the final training, as in [`CurationLedger.apply`]

    def model_dir(self, model: int = 0) -> str:
        """Return the directory or Hub id of a base model."""
        one = self.models[model]
        return str(self.output_dir / one.stage.name) if one.stage is not None else one.directory or one.name_or_path

    @property
    def first_base_step(self) -> str | None:
        """Name of the first step whose models are trained on the base alone, if there is one."""
        named = (step_name(number, one) for number, steps in enumerate(self.rounds, 1) for one in steps if one.is_base)
        return next(named, None)

    @property
    def num_reference_parts(self) -> int:
        """Number of parts of the base, of which each model that scores leaves one out, by which rules know how far it
        can be trusted; 0 for none."""
        is_asked = any(step.takes_reference for steps in self.rounds for step in steps)
        return num_reference_parts(len(self.sets.raw("base"))) if is_asked else 0

    def models_with_part(self, fold: tuple[int, int]) -> range:
        """Return those of n models, by their folds, that leave the part of the base out that the i-th of them does."""
        return range(fold[0] % self.num_reference_parts, fold[1], self.num_reference_parts)

    def final_stage(self, name: str) -> str:
        """Return the stage that trains a final model: one that has scored the pool is not trained again, unless it has
        left pairs of the base out."""
        is_trained = name == "base" and self.first_base_step is not None and not self.num_reference_parts
        return f"{self.first_base_step}/train/model-0" if is_trained else f"final/{name}"


def read_run(
    training: RewardTraining,
    *,
    base: Mapping[str, Any],
    pool: Mapping[str, Any],
    test: Mapping[str, Any] | None = None,
    method: str = "mixture",
    rounds: Sequence[Mapping[str, Any]] | None = None,
    folds: int = 2,
    models: Sequence[Mapping[str, Any]] = ({},),
    default_model: str | None = None,
    judge: Mapping[str, Any] | None = None,
    balance_style: Mapping[str, Any] | bool | None = None,
    final: Sequence[str] = ("curated",),
    rows_per_shard: int = 4096,
    shard: tuple[int, int] = (0, 1),
    labels: str | None = None,
    find_model: Callable[[str, int], BaseModel] = BaseModel,
    loaders: Loaders | None = None,
) -> CurationRun:
    """Read a run from the keys of a configuration file; raise a `ValueError` on an unknown key or a bad value.
    `find_model` resolves a name and a seed, and `loaders` load further kinds of sources, as in [`read_sets`]."""
    specs = {"base": base, "pool": pool, **({} if test is None else {"test": test})}
    if unknown := [name for name in final if name not in FINALS]:
        raise ValueError(f"`final` names {unknown[0]!r}; choose of {', '.join(FINALS)}.")
    if "unbalanced" in final and not balance_style:
        raise ValueError("`final` names 'unbalanced', but no style is balanced; give `balance_style`, or name 'base'.")
    if training.args.eval_strategy != "no" and test is None:
        raise ValueError("`eval_strategy` needs something to evaluate on; give `test`, or leave it out.")
    if training.args.load_best_model_at_end or training.args.save_strategy == "best":
        raise ValueError("The rounds score with the last weights of a training; leave `load_best_model_at_end` out.")
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "The rounds load whole models to score, which DeepSpeed ZeRO-3 does not allow; launch them with ZeRO-2, "
            "as in recipes/accelerate/deepspeed_zero2.yaml."
        )
    check_value("`labels`", labels, labels in (None, *LABELS), f"give one of {', '.join(LABELS)}")
    check_value("`rows_per_shard`", rows_per_shard, rows_per_shard >= 1, "it must be at least 1")
    read = list[BaseModel]()
    for one in models:
        if unknown := [key for key in one if key not in ("model_name_or_path", "seed")]:
            raise ValueError(f"A model has the unknown key `{unknown[0]}`; known are model_name_or_path and seed.")
        name = one.get("model_name_or_path", default_model)
        if name is None:
            raise ValueError("No model is named; give `model_name_or_path`.")
        read.append(find_model(name, one.get("seed", training.args.seed)))
    if not read or len(set(read)) < len(read):
        raise ValueError("`models` has to name at least one model, and none twice with one seed.")
    run = CurationRun(
        Path(cast(str, training.args.output_dir)),
        training,
        read,
        SourceSets(specs, training.args, lambda: run.model_dir(), loaders),
        read_rounds(method, rounds, folds=folds, judge=judge is not None),
        tuple(final),
        None if judge is None else read_judging(judge),
        read_balance(balance_style),
        rows_per_shard,
        shard,
    )
    knows_doubt = "curated" in final and any(
        "estimates" in parameters_of(rule) for steps in run.rounds for one in steps for rule in one.read_rules()
    )
    run.labels = cast(Labels, labels or ("soft" if knows_doubt else "hard"))
    if run.labels != "hard" and not knows_doubt:
        raise ValueError(
            f"`labels` is {labels!r}, but no rule says how probable a wrong label is, or `final` does not name "
            "'curated'; flip by `flip_mixture`, or leave `labels` out."
        )
    if "oracle" in final and "is_flipped" not in run.sets.raw("pool").column_names:
        raise ValueError("`final` names 'oracle', but the pool has no column `is_flipped` that tells true labels.")
    return run


def read_balance(given: Mapping[str, Any] | bool | None) -> dict[str, Any] | None:
    """Read the settings of style balancing: keys of [`~trl_dt2it.debias.balance_style`], or `True` for defaults."""
    if given is None or given is False:
        return None
    options = {} if given is True else given
    if not isinstance(options, Mapping):
        raise ValueError(f"`balance_style` is {given!r}; give true, or by, max_weight and features.")
    if unknown := [key for key in options if key not in (*_BALANCE, "one_sided")]:
        known = ", ".join(_BALANCE)
        raise ValueError(f"`balance_style` has the unknown key `{unknown[0]}`; known are {known} and one_sided.")
    settings = {**_BALANCE, **options}
    most, one_sided = settings["max_weight"], settings.get("one_sided", "leave")
    check_value("`max_weight` of `balance_style`", most, most is None or most > 1, "give a number above 1")
    told = f"give one of {', '.join(ONE_SIDED)}"
    check_value("`one_sided` of `balance_style`", one_sided, one_sided in ONE_SIDED, told)
    if unknown := [name for name in settings["features"] or () if name not in STYLE_FEATURES]:
        known = ", ".join(STYLE_FEATURES)
        raise ValueError(f"`balance_style` names the feature {unknown[0]!r}; known are {known}.")
    return settings


def step_name(number: int, step: Step) -> str:
    """Return the common beginning of the names of a step's stages."""
    return f"round-{number}" + ("" if step.name is None else f"/{step.name}")
