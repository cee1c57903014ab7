"""Benchmarks read, and scored by any scorer, also between the epochs of a training."""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, Value
from huggingface_hub import snapshot_download
from transformers.utils import logging

from ..data.columns import column_of, leave_images_encoded, row_groups
from ..data.contents import pair_ids
from ..data.load import Conversion, check_options, map_pairs, raw_rows, read_raw, rows_by_group
from ..data.mixing import with_columns
from ..data.rows import summarize
from ..data.sources.fields import FOLDER_COLUMN, JSON_COLUMN
from ..data.t2i import reformulate_t2i
from ..utils import digest, read_json, write_json
from .benchmarks import BENCHMARKS, find_benchmark
from .benchmarks.benchmark import Benchmark, pair_ratio
from .looking import CONTROLS, OWN, ControlSets, LookingReport, compare, make_controls, shown_by
from .metrics import CANONICAL_KEYS, Tally, as_scores, bootstrap_intervals, compute_metrics, row_keys, tally, wilson
from .results import EvalResult, ScoreFile, rounded, write_scores


if TYPE_CHECKING:
    from ..training.losses import PairRecord


logger = logging.get_logger(__name__)

BenchmarkRows: TypeAlias = Dataset | Iterable[Mapping[str, Any]] | str | os.PathLike
Videos: TypeAlias = Literal["auto", "images", "video", "skip"]

# Columns of a benchmark's canonical rows besides; `row_index` is the position of the raw row.
_OWN = {"category": Value("string"), "row_index": Value("int64")}

_NO_FRAMES = "no_frames"


def read_benchmark(
    name: str,
    rows: BenchmarkRows | None = None,
    *,
    image_root: str | os.PathLike | None = None,
    split: str = "test",
    revision: str | None = None,
    videos: Videos = "auto",
    max_frames: int = 32,
    both_orders: bool | None = None,
    seed: int = 42,
    on_bad_row: Literal["raise", "leave_out"] = "raise",
    **options: Any,
) -> Dataset:
    """
    Read a benchmark as canonical rows, for a scorer, for `eval_dataset`, or to align scores of another model.

    Args:
        name (`str`):
            One of [`BENCHMARKS`].
        rows (`Dataset`, `Iterable[Mapping]`, `str` or `os.PathLike`, *optional*):
            Rows as the benchmark has them, a file or folder with them, or a Hub id; by default the benchmark's own
            repository on the Hub. Canonical rows come back as they are, with the metrics of the benchmark, which a
            data set does not keep when it is saved and loaded again.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that the paths of images start from; that of the files of the rows by default.
        split, revision (`str`, *optional*):
            Split to read, `"test"` by default, and branch, tag or commit on the Hub.
        videos (`str`, *optional*, defaults to `"auto"`):
            Form of rows about a video. `"images"`: its frames are images of the prompt. `"video"`: a video, in the
            column `videos`. `"skip"`: they are dropped. `"auto"`: images, or dropped if not all frames are there.
        max_frames (`int`, *optional*, defaults to `32`):
            Most frames of a video, taken evenly.
        both_orders (`bool`, *optional*):
            Ask about a text-to-image pair twice, with the better image first (`category` is `chosen_first`) and second
            (`chosen_second`). By default only for benchmarks that do so.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the wording of text-to-image questions, and of the order of images where only one is used.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            `"leave_out"` drops rows that cannot be used, and logs their number. Ties are always dropped.
        options:
            Options of the benchmark's adapter, such as `criteria` of Omni-RewardBench.

    Returns:
        `Dataset`: with the columns of [`~trl_dt2it.data.messages.FEATURES`], `category` and `row_index`. `pair_id`,
        the benchmark's own id with a hash of question and answers, is unique.

    Raises:
        `ValueError`: if the name or an option is unknown, if there is nothing to read, or if a row cannot be used.
    """
    benchmark = find_benchmark(name)
    if videos not in ("auto", "images", "video", "skip"):
        raise ValueError(f'`videos` is {videos!r}; it must be "auto", "images", "video" or "skip".')
    if on_bad_row not in ("raise", "leave_out"):
        raise ValueError(f'`on_bad_row` is {on_bad_row!r}; it must be "raise" or "leave_out".')
    if isinstance(rows, Dataset) and {"prompt", "pair_id", "category"} <= set(rows.column_names):
        return with_metrics(rows, name)
    if image_root is not None and not Path(image_root).is_dir():
        raise ValueError(f"`image_root` is {image_root}, but there is no such folder.")
    check_options(name, benchmark.source, options)
    raw, folder = _read_raw_rows(benchmark, rows, split, revision)
    root, below = (Path(image_root), None) if image_root is not None else _find_image_root(raw, folder)
    conversion = Conversion(benchmark.source, name, options, None if root is None else str(root.resolve()), max_frames)
    converted = _convert(raw, conversion, videos, below)
    kept = _without_bad(converted, benchmark, videos, on_bad_row)
    if "images" in kept.column_names and (folder is not None or image_root is not None):
        _warn_of_missing_files(kept, benchmark)
    if benchmark.source.is_t2i:
        ask_both = benchmark.both_orders if both_orders is None else both_orders
        kept = reformulate_t2i(kept, seed=seed, both_orders=ask_both)
        orders = {"ab": "chosen_first", "ba": "chosen_second"}
        categories = pa.array([orders[name[-2:]] if ask_both else "" for name in kept["pair_id"]], pa.string())
        kept = with_columns(kept, {"category": categories, "row_index": np.arange(len(kept))})
    names = pair_ids(kept)  # the second of equal names becomes `name#2`
    kept = kept if names.equals(column_of(kept, "pair_id")) else with_columns(kept, {"pair_id": names})
    return with_metrics(kept, name)


def eval_datasets(
    benchmarks: Sequence[str] | Mapping[str, BenchmarkRows | None], **reading: Any
) -> dict[str, Dataset]:
    """
    Read benchmarks as `eval_dataset` of [`MultimodalRewardTrainer`].

    With `eval_dataset={**eval_datasets(["vl-rewardbench"]), "held_out": pairs}` every evaluation logs
    `eval_vl-rewardbench_macro` and so on.

    Args:
        benchmarks (`Sequence[str]` or `Mapping[str, BenchmarkRows]`):
            Names of benchmarks to read from the Hub, or rows by name, as in [`read_benchmark`].
        reading:
            Other arguments of [`read_benchmark`].

    Returns:
        `dict[str, Dataset]`: their rows by name.
    """
    rows_by_name = benchmarks if isinstance(benchmarks, Mapping) else dict.fromkeys(benchmarks)
    return {name: read_benchmark(name, rows, **reading) for name, rows in rows_by_name.items()}


def _read_raw_rows(
    benchmark: Benchmark, rows: BenchmarkRows | None, split: str, revision: str | None
) -> tuple[Dataset | list[Mapping[str, Any]], Path | None]:
    """Rows as the benchmark has them, images encoded, and the folder that they come from."""
    if isinstance(rows, Dataset):
        return leave_images_encoded(rows.with_format(None)), None
    if rows is not None and not isinstance(rows, (str, os.PathLike)):
        return list(rows), None
    if rows is None and benchmark.source.hub_id is None:
        raise ValueError(f"{benchmark.title} has no known place on the Hub; pass its rows, or a file with them.")
    path_or_id = os.fspath(rows if rows is not None else str(benchmark.source.hub_id))
    path = Path(path_or_id).expanduser()
    if benchmark.whole_repository and not path.exists() and not path.suffix and path_or_id.count("/") == 1:
        path = Path(snapshot_download(path_or_id, repo_type="dataset", revision=revision))
    is_local = path.exists()
    raw = read_raw(benchmark.source, path if is_local else path_or_id, split=split, revision=revision)
    return cast(Dataset, raw), (path if path.is_dir() else path.parent) if is_local else None


def _find_image_root(raw: Dataset | list[Mapping[str, Any]], folder: Path | None) -> tuple[Path | None, str | None]:
    """The folder that no path of an image may leave, and the folder in it that paths start from: of those that
    benchmarks use, the one in which the first path leads to a file."""
    if folder is None:
        return None, None
    first = raw.select(range(min(20, len(raw)))) if isinstance(raw, Dataset) else raw[:20]
    paths = [
        Path(row[column])
        for row in (raw_rows(first) if isinstance(first, Dataset) else first)
        for column in ("image", "Image", "video", "image_path")
        if isinstance(row.get(column), str) and 0 < len(row[column]) < 1000
    ]
    for start in (folder, folder / "images", folder.parent) if paths and not paths[0].is_absolute() else ():
        if (start / paths[0]).exists():
            # In the cache of the Hub, files are links to others beside the snapshots.
            is_cache = folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir()
            return (folder.parents[1], str(start.relative_to(folder.parents[1]))) if is_cache else (start, None)
    return None, None


def _convert(
    raw: Dataset | list[Mapping[str, Any]], conversion: Conversion, videos: Videos, below: str | None
) -> Dataset:
    """Canonical rows, with `reason` and `message` of those that cannot be used. Paths start `below` the image root."""
    source = conversion.source
    made = {**conversion.features, **({} if source.is_t2i else _OWN)}
    dropped = {"row"} if videos == "video" else {"row", "videos"}
    features = Features({name: feature for name, feature in made.items() if name not in dropped})

    def convert(row: Mapping[str, Any], index: int) -> Iterator[dict[str, Any]]:
        is_video = source.has_videos and _has_video(row)
        if is_video and videos == "skip":
            yield {**dict.fromkeys(features), "row_index": index, "reason": _NO_FRAMES, "message": "skipped"}
            return
        for pair in conversion.convert(row if below is None else {**row, FOLDER_COLUMN: below}, index):
            if is_video and pair["reason"] == "image_missing":
                pair["reason"] = _NO_FRAMES
            if pair.get("videos") and videos != "video":
                pair |= _frames_as_images(pair)
            yield {name: pair.get(name) for name in features} | ({} if source.is_t2i else {"row_index": pair["row"]})

    if source.group_by is not None or not isinstance(raw, Dataset):
        pairs = [pair for index, row in enumerate(_grouped(raw, source.group_by)) for pair in convert(row, index)]
        return Dataset.from_list(pairs, features=features)

    return map_pairs(raw, convert, conversion, features)


def _has_video(row: Mapping[str, Any]) -> bool:
    with suppress(ValueError, KeyError, TypeError):  # no row at all: its conversion refuses it
        return bool((json.loads(row[JSON_COLUMN]) if JSON_COLUMN in row else row)["video"])
    return False


def _grouped(raw: Dataset | list[Mapping[str, Any]], column: str | None) -> list[Any]:
    """The rows, or all rows of each group together where pairs are formed from several."""
    if column is None:
        return list(raw)
    if isinstance(raw, Dataset):
        return [{"group": [raw[int(index)] for index in group]} for group in rows_by_group(raw, column)]
    groups: dict[Any, list[Any]] = {}  # of keys that need not fit into one column of Arrow
    for index, row in enumerate(raw):
        key = row.get(column)
        groups.setdefault(index if key in (None, "") else (key,), []).append(row)
    return [{"group": group} for group in groups.values()]


def _frames_as_images(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The frames of a row's only video as images of its prompt, in their order."""
    (frames,) = pair["videos"]
    blocks = pair["prompt"][0]["content"]
    images = [{"type": "image", "text": None}] * len(frames)
    content = [new for block in blocks for new in (images if block["type"] == "video" else [block])]
    return {"prompt": [{**pair["prompt"][0], "content": content}], "images": list(frames)}


def _without_bad(converted: Dataset, benchmark: Benchmark, videos: Videos, on_bad_row: str) -> Dataset:
    reasons = np.array(column_of(converted, "reason").to_pylist(), dtype=object)
    keep = reasons == ""
    no_frames = reasons == _NO_FRAMES
    if no_frames.any() and videos in ("auto", "skip"):
        category, rest = cast("tuple[str, str]", benchmark.optional_category)
        is_video = no_frames | (np.array(column_of(converted, "category").to_pylist(), dtype=object) == category)
        keep &= ~is_video
        missing = "their frames are not there; unpack them, or check `image_root`"
        why = "`videos` says so" if videos == "skip" else missing
        logger.warning(
            f"Dropped {is_video.sum()} of {len(converted)} rows of {benchmark.title}, those about a video: {why}. "
            f'Others report on all rows; results are labelled "{rest}".'
        )
        reasons = np.where(is_video, "", reasons)
    bad = np.flatnonzero((reasons != "") & (reasons != "tie"))
    if len(bad) and (on_bad_row == "raise" or len(bad) == len(converted)):
        first, counts = converted[int(bad[0])], summarize(Counter(reasons[bad]))
        way_out = "" if len(bad) == len(converted) else ', or set `on_bad_row="leave_out"`'
        raise ValueError(
            f"{len(bad)} of {len(converted)} pairs of {benchmark.title} cannot be used ({counts}). The first, "
            f"{first['pair_id']}: {first['message']} Fix the rows{way_out}."
        )
    if dropped := Counter(reason for reason in reasons if reason):
        share = f"{dropped.total()} of {len(converted)} pairs"
        logger.warning(f"Dropped {share} of {benchmark.title} ({summarize(dropped)}).")
    rows = converted.remove_columns(["reason", "message"])
    return rows if keep.all() else rows.select(np.flatnonzero(keep))


def _warn_of_missing_files(rows: Dataset, benchmark: Benchmark) -> None:
    """Warn of images without a file: scores of another model may be aligned without them, and nothing else done."""
    missing = []
    for row in leave_images_encoded(rows.select_columns("images")):
        paths = [image["path"] for image in row["images"] if image["bytes"] is None]
        missing += [path for path in paths if "://" not in path and not Path(path).is_file()][:1]
    if missing:
        logger.warning(
            f"Image files of {len(missing)} of {len(rows)} rows of {benchmark.title} are not there, such as "
            f"{missing[0]}; pass the folder that their paths start from as `image_root`."
        )


@runtime_checkable
class PairScorer(Protocol):
    """A scorer of pairs, such as `RewardScorer`."""

    def score_pairs(self, dataset: Dataset) -> Any:
        """Rewards of chosen and rejected, `(n, 2)`, in the order of the rows."""


def evaluate(
    scorer: PairScorer | Callable[[Dataset], Any],
    name: str,
    rows: BenchmarkRows | None = None,
    *,
    image_root: str | os.PathLike | None = None,
    revision: str | None = None,
    model: str | None = None,
    scores_file: str | os.PathLike | None = None,
    round: int | None = None,
    controls: Sequence[str] = (),
    num_resamples: int = 2000,
    seed: int = 0,
    **reading: Any,
) -> EvalResult:
    """
    Evaluate a reward model on a benchmark.

    A pair is right if the better answer scores strictly more, at full precision; ties are wrong, and counted.

    Args:
        scorer ([`PairScorer`] or `Callable`):
            Object with `score_pairs(dataset)`, function of a data set, or [`ScoreFile`], which returns the rewards of
            chosen and rejected, `(n, 2)`, in the order of the rows.
        name, rows, image_root, revision, reading:
            As in [`read_benchmark`].
        model (`str`, *optional*):
            Name of the model, for the record.
        scores_file (`str` or `os.PathLike`, *optional*):
            Parquet or JSON lines file for the scores, by [`write_scores`]. On several processes, pass it on one.
        round (`int`, *optional*):
            As in [`ScoreFile`].
        controls (`Sequence[str]`, *optional*, defaults to `()`):
            Other images to show, as in [`audit_looking`], with a file of scores for each beside `scores_file`
            (`scores.blank.parquet`), which is read again if the scores with the image are the same. On several
            processes, all must call with them.
        num_resamples, seed (`int`, *optional*, default to `2000` and `0`):
            Draws of the bootstrap, and the seed of these and of the other rows whose images are shown.

    Returns:
        [`EvalResult`]

    Raises:
        `ValueError`: if the scores are not one pair of numbers for each row, or as [`read_benchmark`] and
            [`audit_looking`] say.
    """
    shown = _check_controls(controls, scorer)
    benchmark = find_benchmark(name)
    dataset = read_benchmark(name, rows, image_root=image_root, revision=revision, **reading)
    category, unit = row_keys(benchmark, dataset)
    label, notes = _describe(benchmark, category)
    for note in notes:
        logger.warning(note)
    made = _make_controls(scorer, dataset, shown, benchmark.title, seed) if shown else None
    scores = _score(scorer, dataset)
    if scores_file is not None:
        write_scores(scores_file, dataset, scores)
    others = {} if made is None else _score_controls(scorer, made, scores, scores_file, seed)
    if round is not None:
        scores, others = rounded(scores, round), {one: rounded(values, round) for one, values in others.items()}
        notes.append(f"Scores were rounded to {round} digits, which makes ties that count as wrong.")
    counted = tally(benchmark, category, unit, scores)
    is_right = scores[:, 0] > scores[:, 1]
    by_category = [float(is_right[category == group].mean()) for group in sorted(set(category.tolist()) - {""})]
    correct = {key: int(ratio.hits.sum()) for key, ratio in counted.ratios.items()}
    n = {key: int(ratio.total.sum()) for key, ratio in counted.ratios.items()}
    drawing: Any = {"num_resamples": num_resamples, "seed": seed}

    def count(rows: np.ndarray, units: np.ndarray, values: np.ndarray) -> Tally:
        return tally(benchmark, category[rows], units, values)

    return EvalResult(
        name=name,
        title=benchmark.title,
        metrics=counted.values(),
        micro=float(is_right.mean()),
        macro=float(np.mean(by_category)) if by_category else None,
        correct=correct,
        n=n,
        ties=counted.ties,
        wilson={key: wilson(correct[key] / n[key], n[key]) for key in n},
        bootstrap=bootstrap_intervals(counted, **drawing),
        label=label,
        notes=tuple(notes),
        settings={
            "model": model,
            "hub_id": benchmark.source.hub_id,
            "revision": revision,
            # A hash over the ids of rows: the same for the same rows, whatever their order.
            "rows_sha256": digest("\n".join(sorted(column_of(dataset, "pair_id").to_pylist()))),
            "round": round,
            "bootstrap": {**drawing, "num_prompts": int(unit.max()) + 1},
        },
        looking=None if made is None else compare(made, {OWN: scores[made.rows], **others}, unit, count, **drawing),
    )


def audit_looking(
    scorer: PairScorer | Callable[[Dataset], Any],
    dataset: Dataset,
    *,
    controls: Sequence[str] = tuple(CONTROLS),
    scores: Any = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> LookingReport:
    """
    Measure how far a reward model looks at the images of a preference set, such as one held out of its training.

    Rows without images are dropped. With `swapped`, so are those for which no other row has as many other images.

    Args:
        scorer ([`PairScorer`] or `Callable`):
            As in [`evaluate`]; no [`ScoreFile`]. Images are read as a [`RewardScorer`] reads them.
        dataset (`Dataset` of n rows):
            Preference rows, of which those with equal `group_id` are one independent unit.
        controls (`Sequence[str]`, *optional*):
            `"blank"` shows a gray image of the same size, `"swapped"` the images of another row, and
            `"low_resolution"` each image at a half and at a quarter of its pixels; by default all.
        scores (`array` of shape `(n, 2)`, *optional*):
            Rewards of chosen and rejected with the rows' own images, where they are known.
        num_resamples, seed (`int`, *optional*, default to `2000` and `0`):
            As in [`evaluate`].

    Returns:
        [`LookingReport`]

    Raises:
        `ValueError`: if a control is unknown, if no row has an image, or none another row whose images it can show.
    """
    made = _make_controls(scorer, dataset, _check_controls(controls, scorer), "the set", seed)
    values = _score(scorer, dataset) if scores is None else as_scores(scores, len(dataset))

    def count(rows: np.ndarray, units: np.ndarray, values: np.ndarray) -> Tally:
        return Tally({"overall": pair_ratio(values[:, 0] > values[:, 1], units)}, {}, {})

    values_of = {OWN: values[made.rows], **{shown: _score(scorer, rows) for shown, rows in made.sets.items()}}
    return compare(made, values_of, row_groups(dataset), count, num_resamples=num_resamples, seed=seed)


def _score(scorer: PairScorer | Callable[[Dataset], Any], dataset: Dataset) -> np.ndarray:
    score = scorer.score_pairs if isinstance(scorer, PairScorer) else scorer
    return as_scores(score(dataset), len(dataset))


def _check_controls(controls: Sequence[str], scorer: Any) -> list[str]:
    """List the images to show, and refuse a scorer that does not look at what it is shown."""
    shown = shown_by(controls)
    if shown and isinstance(scorer, ScoreFile):
        raise ValueError(f"{scorer.path} holds scores of the rows' own images; pass a model for `controls`.")
    return shown


def _make_controls(scorer: Any, dataset: Dataset, shown: Sequence[str], title: str, seed: int) -> ControlSets:
    """Make the controls, whose images are read as the scorer reads images, also if it is a method of another."""
    collator = getattr(getattr(scorer, "__self__", scorer), "collator", None)
    options = getattr(collator, "image_options", None)
    return make_controls(dataset, shown, title=title, image_options=options, seed=seed)


def _score_controls(
    scorer: Any, made: ControlSets, scores: np.ndarray, scores_file: str | os.PathLike | None, seed: int
) -> dict[str, np.ndarray]:
    """Score the rows of controls, or read the scores that an earlier run has written; every process has to call it.
    Shapes: `scores` `(N, 2)`, returns `(M, 2)` by the image shown."""
    from ..processes import on_main_process  # imports torch, which no scorer needs otherwise

    found, path = {}, None if scores_file is None else Path(scores_file)
    for shown, rows in made.sets.items():
        file = None if path is None else path.with_name(f"{path.stem}.{shown}{path.suffix}")
        # The same scores with the image are those of the same model, settings and images.
        names = "\n".join(column_of(rows, "pair_id").to_pylist())
        about = digest(names, scores[made.rows].tobytes(), f"{shown} {seed}")
        known = on_main_process(partial(_read_control, file, about, rows))
        found[shown] = _score(scorer, rows) if known is None else known
        if file is not None and known is None:
            file.with_suffix(".json").unlink(missing_ok=True)
            write_scores(file, rows, found[shown])
            write_json(file.with_suffix(".json"), {"digest": about})
    return found


def _read_control(file: Path | None, about: str, rows: Dataset) -> np.ndarray | None:
    """Read the scores of a control that were written for the same rows and model."""
    if file is None or not file.is_file() or (read_json(file.with_suffix(".json")) or {}).get("digest") != about:
        return None
    return ScoreFile(file)(rows)


def _describe(benchmark: Benchmark, category: np.ndarray) -> tuple[str, list[str]]:
    """A label and notes for rows that are not the benchmark as it is known. Shapes: `category` `(n,)`."""
    num_rows = len(category)
    if not benchmark.sizes or num_rows == next(iter(benchmark.sizes)):
        return "", []
    label, start = f"{num_rows:,} rows", f"{benchmark.title} has {num_rows:,} rows here"
    if num_rows in benchmark.sizes:
        return label, [f"{start}: {benchmark.sizes[num_rows]}."]
    known = " or ".join(f"{size:,} ({what})" for size, what in benchmark.sizes.items())
    if benchmark.optional_category is not None and benchmark.optional_category[0] not in category:
        left_out, rest = benchmark.optional_category
        note = f"{start}, none of the category {left_out}, and others report on {known}"
        return f"{rest}, {label}", [f"{note}: these numbers are {rest} and cannot be compared with theirs."]
    return label, [f"{start}, and others report on {known}: the numbers cannot be compared."]


class BenchmarkInfo(DatasetInfo):
    """Info of a data set that is the benchmark `dataset_name`. `datasets` passes it on to all that is selected,
    filtered, mapped or shuffled, so that the trainer finds `measure` whatever became of the rows."""

    @property
    def title(self) -> str:
        return BENCHMARKS[str(self.dataset_name)].title

    @property
    def hub_id(self) -> str | None:
        return BENCHMARKS[str(self.dataset_name)].source.hub_id

    def measure(self, dataset: Any, records: Sequence[PairRecord]) -> dict[str, float]:
        return training_metrics(dataset, records)


def with_metrics(dataset: Dataset, name: str) -> Dataset:
    """Make canonical rows of a benchmark bring its metrics along."""
    if isinstance(dataset.info, BenchmarkInfo) and dataset.info.dataset_name == name:
        return dataset
    dataset = copy.copy(dataset)
    dataset._info = BenchmarkInfo(**{**vars(dataset.info), "dataset_name": name})
    return dataset


def training_metrics(dataset: Any, records: Sequence[PairRecord]) -> dict[str, float]:
    """
    Compute the metrics of a benchmark from the records that the trainer keeps of an evaluation.

    Args:
        dataset, records (`Dataset` and `Sequence[PairRecord]`):
            Evaluation set, and its pairs with their positions in it.

    Returns:
        `dict[str, float]`: as in [`compute_metrics`]; empty if the set is not from [`read_benchmark`].
    """
    is_benchmark = isinstance(dataset.info, BenchmarkInfo) and set(CANONICAL_KEYS) <= set(dataset.column_names)
    if not records or not is_benchmark:
        return {}
    chosen, rejected = (np.array([getattr(record, side) for record in records]) for side in ("chosen", "rejected"))
    rows = dataset.select_columns(list(CANONICAL_KEYS)).select([record.position for record in records])
    return compute_metrics(str(dataset.info.dataset_name), rows, chosen, rejected)
