"""Text-to-image sets that rate or rank several images of a caption: HPDv2's test split, EvalMuse, ImageRewardDB."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from statistics import fmean
from typing import Any, Literal

from ..errors import RowError
from .fields import to_number
from .source import Source
from .t2i_pairs import better_first, is_list, pair


# Means of the same ratings may differ in the last digits.
_TOLERANCE = 1e-9


def hpdv2_test(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    All pairs of a row of HPDv2's test split.

    The strength is the share of the annotators that rank the better image above the worse one, minus the share that
    rank it below, in [0, 1]: 1 if all agree with the row's own ranking, and 0 if no more than half of those who see a
    difference do. It is unknown if the row does not tell what each annotator said.

    Args:
        row (`Mapping`):
            `prompt`, file names in `image_path` or `file_path`, `rank` (lower is better) and, optionally,
            `raw_annotations`: the `rank` of each annotator.

    Yields:
        `dict` or [`RowError`]: for each two images the pair, or why there is none.
    """
    files = row.get("image_path") or row.get("file_path")
    if not isinstance(files, (list, tuple)) or len(files) < 2:
        yield RowError("image_missing", "`image_path` does not hold two file names or more; drop the row.")
        return
    ranks = _numbers(row.get("rank"), len(files))
    if ranks is None:
        yield RowError("bad_rating", f"`rank` is {row.get('rank')!r:.60}; it must be {len(files)} numbers.")
        return
    annotations = row.get("raw_annotations")
    annotations = annotations if isinstance(annotations, (list, tuple)) else []
    said = [_numbers(item.get("rank"), len(files)) for item in annotations if isinstance(item, Mapping)]
    for i, j in combinations(range(len(files)), 2):
        if ranks[i] == ranks[j]:
            yield _tie(f"`rank` of images {i} and {j} is {ranks[i]:g}")
            continue
        better, worse = better_first((i, j), ranks[i] < ranks[j])
        votes = [(r[better] < r[worse]) - (r[better] > r[worse]) for r in said if r is not None]
        strength = max(fmean(votes), 0.0) if votes else None
        yield pair(row.get("prompt"), files[better], files[worse], strength=strength)


HPDV2_TEST = Source(
    hpdv2_test,
    licence="Apache-2.0",
    hub_id="ymhao/HPDv2",
    is_t2i=True,
    files=("test.json",),
    reads=("prompt", "image_path", "file_path", "rank", "raw_annotations"),
    note="The images are in test.tar.gz; unpack it and give the folder as `image_root`. A benchmark too: do not train "
    "on it and report it.",
)


def evalmuse(
    rows: Sequence[Mapping[str, Any]],
    *,
    min_gap: float = 0.0,
    pairs: Literal["all", "extremes", "adjacent"] = "all",
) -> Iterator[dict[str, Any] | RowError]:
    """
    Pairs of EvalMuse's images of one caption.

    The strength is the gap of their mean scores, in points of a scale from 1 to 5.

    Args:
        rows (`Sequence[Mapping]`):
            All rows with one `prompt_id`: `prompt`, `img_path`, `total_score` and `promt_meaningless` (so spelled),
            these two a number for each annotator, or their mean. More than half of the annotators calling the prompt
            meaningless leave the caption out.
        min_gap (`float`, *optional*, defaults to `0.0`):
            Pairs with a smaller gap count as ties; equal means always do.
        pairs (`str`, *optional*, defaults to `"all"`):
            `"all"` pairs of images; `"extremes"`: best against worst; `"adjacent"`: each against the next best.

    Yields:
        `dict` or [`RowError`]: the pairs; for each that cannot be used, why; for an image without ratings, why.

    Raises:
        `ValueError`: if `pairs` is something else.
    """
    _check_id(rows)
    verdicts = [verdict for row in rows for verdict in _each(row.get("promt_meaningless"))]
    if verdicts and fmean(verdicts) > 0.5:
        message = f"the annotators call the caption {rows[0].get('prompt')!r:.80} meaningless; drop it."
        yield RowError("empty_caption", message)
        return
    scored = []
    for row in rows:
        scores = _each(row.get("total_score"))
        if scores:
            scored.append((fmean(scores), row))
        else:
            shown = f"{row.get('total_score')!r:.40}"
            yield RowError(
                "bad_rating", f"`total_score` of {row.get('img_path')!r:.80} is {shown}, which is no rating."
            )
    scored.sort(key=lambda item: item[0], reverse=True)
    for (high, better), (low, worse) in _pairings(scored, pairs):
        gap, names = high - low, f"{better.get('img_path')!r:.80} and {worse.get('img_path')!r:.80}"
        if better.get("prompt") != worse.get("prompt"):
            yield _two_captions(better)
        elif gap < _TOLERANCE:
            yield _tie(f"the mean `total_score` of {names} is {high:g}")
        elif gap < min_gap - _TOLERANCE:
            yield RowError("tie", f"the mean `total_score` of {names} differs by {gap:.3g}, less than {min_gap}.")
        else:
            paths = better.get("img_path"), worse.get("img_path")
            yield pair(better.get("prompt"), *paths, strength=gap, source_id=better.get("prompt_id"))


EVALMUSE = Source(
    evalmuse,
    licence="BSD-3-Clause",
    hub_id="DY-Evalab/EvalMuse",
    is_t2i=True,
    group_by="prompt_id",
    files=("train_list.json",),
    reads=("prompt", "img_path", "total_score", "promt_meaningless", "prompt_id"),
    note="The images are in images.zip.part-*; join the parts, unpack them and give the folder as `image_root`. The "
    "ratings of the test split are not public.",
)


def imagereward(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any] | RowError]:
    """
    All pairs of ImageRewardDB's images of one caption.

    The strength is the gap of the overall ratings, on a scale from 1 to 7; it is unknown where a rating is missing or
    speaks against the ranks.

    Args:
        rows (`Sequence[Mapping]`):
            All rows with one `prompt_id`: `prompt`, `image` or `image_path`, `rank` (1 is best), `overall_rating`.

    Yields:
        `dict` or [`RowError`]: for each two images the pair, or why there is none.
    """
    _check_id(rows)
    for first, second in combinations(rows, 2):
        if first.get("prompt") != second.get("prompt"):
            yield _two_captions(first)
            continue
        ranks = to_number(first.get("rank")), to_number(second.get("rank"))
        if ranks[0] is None or ranks[1] is None:
            shown = f"{first.get('rank')!r:.20} and {second.get('rank')!r:.20}"
            yield RowError("bad_rating", f"`rank` of two images is {shown}; both must be numbers.")
            continue
        if ranks[0] == ranks[1]:
            yield _tie(f"`rank` of two images is {ranks[0]:g}")
            continue
        better, worse = better_first((first, second), ranks[0] < ranks[1])
        high, low = to_number(better.get("overall_rating")), to_number(worse.get("overall_rating"))
        gap = None if high is None or low is None or high < low else high - low
        images = [row.get("image") or row.get("image_path") for row in (better, worse)]
        yield pair(better.get("prompt"), *images, strength=gap, source_id=better.get("prompt_id"))


IMAGEREWARD = Source(
    imagereward,
    licence="Apache-2.0",
    hub_id="THUDM/ImageRewardDB",
    is_t2i=True,
    group_by="prompt_id",
    files=("metadata-{split}.parquet",),
    reads=("prompt", "image", "image_path", "rank", "overall_rating", "prompt_id"),
    note="The images are in images/<split>/*.zip; unpack them beside the metadata and give that folder as "
    "`image_root`.",
)


def imagereward_rankings(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    All pairs of a row of ImageReward's own training files. They have no strength.

    Args:
        row (`Mapping`):
            `prompt`, `generations` (paths) and `ranking`, a number for each of them, lower is better.

    Yields:
        `dict` or [`RowError`]: for each two images the pair, or why there is none.
    """
    files = row.get("generations")
    if not isinstance(files, (list, tuple)) or len(files) < 2:
        yield RowError(
            "bad_rating", f"`generations` is {files!r:.60}; it must be two paths or more, which are ranked."
        )
        return
    ranks = _numbers(row.get("ranking"), len(files))
    if ranks is None:
        yield RowError("bad_rating", f"`ranking` is {row.get('ranking')!r:.60}; it must be {len(files)} numbers.")
        return
    for i, j in combinations(range(len(files)), 2):
        if ranks[i] == ranks[j]:
            yield _tie(f"`ranking` of images {i} and {j} is {ranks[i]:g}")
        else:
            yield pair(row.get("prompt"), *better_first((files[i], files[j]), ranks[i] < ranks[j]))


IMAGEREWARD_RANKINGS = Source(
    imagereward_rankings,
    licence="Apache-2.0",
    is_t2i=True,
    reads=("prompt", "generations", "ranking"),
    note="The training files of the ImageReward code: JSON lists, with paths that start at its image folder.",
)


def _check_id(rows: Sequence[Mapping[str, Any]]) -> None:
    if any(row.get("prompt_id") in (None, "") for row in rows):
        raise RowError(
            "missing_column", "`prompt_id` is missing or None; it tells which images were made of the same caption."
        )


def _two_captions(row: Mapping[str, Any]) -> RowError:
    name = f"{row.get('prompt_id')!r:.40}"
    return RowError(
        "not_conversational", f"two images with the `prompt_id` {name} have different captions; fix the id."
    )


def _pairings(ordered: list[Any], pairs: str) -> Iterable[tuple[Any, Any]]:
    if pairs == "all":
        return combinations(ordered, 2)
    if pairs == "extremes":
        return [(ordered[0], ordered[-1])] if len(ordered) > 1 else []
    if pairs == "adjacent":
        return pairwise(ordered)
    raise ValueError(f'`pairs` is {pairs!r}; choose "all", "extremes" or "adjacent".')


def _tie(what: str) -> RowError:
    return RowError("tie", f"{what}, so that neither is preferred.")


def _each(value: Any) -> list[float]:
    """The numbers of a list, or a number alone; empty if anything in it is no finite number."""
    numbers = [to_number(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    known = [item for item in numbers if item is not None]
    return known if len(known) == len(numbers) else []


def _numbers(value: Any, length: int) -> list[float] | None:
    numbers = _each(value) if is_list(value, length) else []
    return numbers if len(numbers) == length else None
