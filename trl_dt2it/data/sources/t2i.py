"""Adapters of text-to-image sets: pairs of images, and groups of ranked or rated images."""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations, pairwise
from operator import itemgetter
from statistics import fmean
from typing import Any, Literal, TypeGuard, cast

from ..messages import IMAGE_MARKER
from ..rows import RowError
from ..t2i import t2i_pair
from .fields import Pairs, Row, Source, answer_field, name_field, strength_field, to_number, turns_field


# Images of the archive of HPDv2's train split that do not decode.
HPDV2_CORRUPT = frozenset({"00006811.jpg", "00168743.jpg", "00331911.jpg", "00310087.jpg"})

T2ISource = partial(Source, is_t2i=True)
_TOLERANCE = 1e-9  # means of the same ratings may differ in their last digits


def hpdv2_train(row: Row) -> Pairs:
    """Read a row of HPDv2's train split; no strength."""
    files, preference = row.get("file_path") or row.get("image_path"), row.get("human_preference")
    if not _is_list(files, 2):
        raise RowError("image_missing", "neither `file_path` nor `image_path` holds two file names; drop the row.")
    if not _is_list(preference, 2) or not all(value in (0, 1) for value in preference):
        raise RowError("unparsed_verdict", f"`human_preference` is {preference!r:.40}; it must be two of 0 and 1.")
    if preference[0] == preference[1]:
        raise RowError("tie", f"`human_preference` is {preference!r}, which prefers neither image.")
    if corrupt := [file for file in files if posixpath.basename(str(file)) in HPDV2_CORRUPT]:
        raise RowError("image_corrupt", f"`{corrupt[0]}` is known not to decode; drop the row.")
    yield _pair(row.get("prompt"), *(files if preference[0] > preference[1] else files[::-1]))


HPDV2_TRAIN = T2ISource(
    hpdv2_train,
    licence="Apache-2.0",
    hub_id="ymhao/HPDv2",
    files=("train.json",),
    reads=("prompt", "file_path", "image_path", "human_preference"),
    note="Unpack train.tar.gz (31.7 GB) and give the folder as `image_root`. Pairs of 4 corrupt images are dropped.",
)


def hpdv3(row: Row, *, min_confidence: float = 0.0, strength: Literal["confidence", "votes"] = "confidence") -> Pairs:
    """Read a row of HPDv3, where `path1` is always the better image."""
    if strength not in ("confidence", "votes"):
        raise ValueError(f'`strength` is {strength!r}; choose "confidence" or "votes".')
    confidence, votes = to_number(row.get("confidence")), row.get("choice_dist")
    if (confidence or 0.0) < min_confidence:
        raise RowError("tie", f"`confidence` is {row.get('confidence')!r:.40}, less than {min_confidence}.")
    if strength == "votes":
        first, second = [to_number(count) or 0.0 for count in votes] if _is_list(votes, 2) else [0.0, 0.0]
        confidence = abs(first - second) / (first + second) if first + second > 0 else None
    yield _pair(row.get("prompt"), row.get("path1"), row.get("path2"), strength=confidence)


HPDV3 = T2ISource(
    hpdv3,
    licence="MIT",
    hub_id="MizzenAI/HPDv3",
    files=("{split}.json",),
    reads=("prompt", "path1", "path2", "confidence", "choice_dist"),
    note="Join and unpack images.tar.gz.* and give the folder as `image_root`. The test split has no confidence.",
)


def pickapic(row: Row) -> Pairs:
    """Read a row of Pick-a-Pic; no strength."""
    labels = [to_number(row.get(f"label_{index}")) for index in range(2)]
    if row.get("has_label") is False:
        raise RowError("unparsed_verdict", "`has_label` is False: nobody compared the two images.")
    if row.get("are_different") is False:
        raise RowError("equal_images", "`are_different` is False: the two images are one.")
    if labels == [0.5, 0.5]:
        raise RowError("tie", "`label_0` and `label_1` are 0.5, which prefers neither image.")
    if labels not in ([1.0, 0.0], [0.0, 1.0]):
        shown = f"{row.get('label_0')!r:.20} and {row.get('label_1')!r:.20}"
        raise RowError("unparsed_verdict", f"`label_0` and `label_1` are {shown}; one must be 1 and the other 0.")
    images = [row.get(f"jpg_{index}") or row.get(f"image_{index}_url") for index in range(2)]
    ordered = images if labels[0] == 1.0 else images[::-1]
    yield _pair(row.get("caption"), *ordered, source_id=row.get("ranking_id"))


PICKAPIC_V2 = T2ISource(
    pickapic,
    hub_id="yuvalkirstain/pickapic_v2",
    reads=(
        *("caption", "has_label", "are_different", "ranking_id"),
        *(name for n in range(2) for name in (f"jpg_{n}", f"image_{n}_url", f"label_{n}")),
    ),
    note="Captions and images may be unsafe for work. pickapic_v2_no_images holds addresses, many of them dead.",
)


def imagereward_pairs(row: Row) -> Pairs:
    """Read a row of ImageRewardDB's configurations `*_pair`; no strength."""
    yield _pair(row.get("prompt"), row.get("img_better"), row.get("img_worse"), source_id=row.get("prompt_id"))


IMAGEREWARD_PAIRS = T2ISource(
    imagereward_pairs,
    licence="Apache-2.0",
    reads=("prompt", "img_better", "img_worse", "prompt_id"),
    note="For local copies: `datasets` no longer runs the script of THUDM/ImageRewardDB that made the configurations.",
)


def rapidata(row: Row, *, criterion: Literal["preference", "coherence", "alignment"] = "preference") -> Pairs:
    """Read a row of Rapidata's image sets. Strength is the difference of weighted vote shares, in [0, 1]."""
    names = [f"weighted_results_image{index}_{criterion}" for index in (1, 2)]
    first, second = (to_number(row.get(name)) for name in names)
    if first is None or second is None:
        raise RowError("bad_rating", f"`{names[0]}` or `{names[1]}` is no number; choose a criterion of this set.")
    if first == second:
        raise RowError("tie", f"`{names[0]}` and `{names[1]}` are equal.")
    better, worse = ("image1", "image2") if first > second else ("image2", "image1")
    yield _pair(row.get("prompt"), row.get(better), row.get(worse), strength=abs(first - second))


RAPIDATA = T2ISource(
    rapidata,
    licence="CDLA-Permissive-2.0",
    hub_id="Rapidata/human-style-preferences-images",
    reads=("prompt", "image1", "image2"),
    note="Other sets of Rapidata have the same columns, each with a licence of its own. Not for the video sets.",
)


def hpdv2_test(row: Row) -> Pairs:
    """Read all pairs of a row of HPDv2's test split. Strength is the share of annotators that rank the better image
    above the worse, minus the share that rank it below, in [0, 1]; unknown where the row has no annotators' ranks."""
    files = row.get("image_path") or row.get("file_path")
    if not isinstance(files, (list, tuple)) or len(files) < 2:
        raise RowError("image_missing", "`image_path` does not hold two file names or more; drop the row.")
    annotations = row.get("raw_annotations")
    annotations = annotations if isinstance(annotations, (list, tuple)) else []
    ranks = (_numbers(item.get("rank"), len(files)) for item in annotations if isinstance(item, Mapping))
    yield from _ranked_pairs(row, files, "rank", list(filter(None, ranks)))


HPDV2_TEST = T2ISource(
    hpdv2_test,
    licence="Apache-2.0",
    hub_id="ymhao/HPDv2",
    files=("test.json",),
    reads=("prompt", "image_path", "file_path", "rank", "raw_annotations"),
    note="Unpack test.tar.gz and give the folder as `image_root`. A benchmark too: do not train on it and report it.",
)


def evalmuse(
    rows: Sequence[Row], *, min_gap: float = 0.0, pairs: Literal["all", "extremes", "adjacent"] = "all"
) -> Pairs:
    """Read pairs of EvalMuse's images of one caption. Strength is the gap of mean scores, on a scale from 1 to 5."""
    _check_id(rows)
    verdicts = [verdict for row in rows for verdict in _numbers(row.get("promt_meaningless"))]
    if verdicts and fmean(verdicts) > 0.5:
        message = f"annotators call the caption {rows[0].get('prompt')!r:.80} meaningless; drop it."
        raise RowError("empty_caption", message)
    scored = []
    for row in rows:
        if scores := _numbers(row.get("total_score")):
            scored.append((fmean(scores), row))
        else:
            problem = f"`total_score` of {row.get('img_path')!r:.80} is {row.get('total_score')!r:.40}, no rating."
            yield RowError("bad_rating", problem)
    scored.sort(key=itemgetter(0), reverse=True)
    for (high, better), (low, worse) in _pairings(scored, pairs):
        gap, names = high - low, f"{better.get('img_path')!r:.80} and {worse.get('img_path')!r:.80}"
        if better.get("prompt") != worse.get("prompt"):
            yield _two_captions(better)
        elif gap < _TOLERANCE:
            yield RowError("tie", f"the mean `total_score` of {names} is {high:g}, so that neither is preferred.")
        elif gap < min_gap - _TOLERANCE:
            yield RowError("tie", f"the mean `total_score` of {names} differs by {gap:.3g}, less than {min_gap}.")
        else:
            paths = better.get("img_path"), worse.get("img_path")
            yield _pair(better.get("prompt"), *paths, strength=gap, source_id=better.get("prompt_id"))


EVALMUSE = T2ISource(
    evalmuse,
    licence="BSD-3-Clause",
    hub_id="DY-Evalab/EvalMuse",
    group_by="prompt_id",
    files=("train_list.json",),
    reads=("prompt", "img_path", "total_score", "promt_meaningless", "prompt_id"),
    note="Join and unpack images.zip.part-* and give the folder as `image_root`. The test split has no ratings.",
)


def imagereward(rows: Sequence[Row]) -> Pairs:
    """Read all pairs of ImageRewardDB's images of one caption. Strength is the gap of overall ratings, on a scale from
    1 to 7; unknown where a rating is missing or contradicts the ranks."""
    _check_id(rows)
    for first, second in combinations(rows, 2):
        one, other = to_number(first.get("rank")), to_number(second.get("rank"))
        if first.get("prompt") != second.get("prompt"):
            yield _two_captions(first)
        elif one is None or other is None:
            shown = f"{first.get('rank')!r:.20} and {second.get('rank')!r:.20}"
            yield RowError("bad_rating", f"`rank` of two images is {shown}; both must be numbers.")
        elif one == other:
            yield RowError("tie", f"`rank` of two images is {one:g}, so that neither is preferred.")
        else:
            better, worse = (first, second) if one < other else (second, first)
            high, low = to_number(better.get("overall_rating")), to_number(worse.get("overall_rating"))
            gap = None if high is None or low is None or high < low else high - low
            images = [row.get("image") or row.get("image_path") for row in (better, worse)]
            yield _pair(better.get("prompt"), *images, strength=gap, source_id=better.get("prompt_id"))


IMAGEREWARD = T2ISource(
    imagereward,
    licence="Apache-2.0",
    hub_id="THUDM/ImageRewardDB",
    group_by="prompt_id",
    files=("metadata-{split}.parquet",),
    reads=("prompt", "image", "image_path", "rank", "overall_rating", "prompt_id"),
    note="Unpack images/<split>/*.zip beside the metadata, and give that folder as `image_root`.",
)


def imagereward_rankings(row: Row) -> Pairs:
    """Read all pairs of a row of ImageReward's own training files; no strength."""
    files = row.get("generations")
    if not isinstance(files, (list, tuple)) or len(files) < 2:
        raise RowError("bad_rating", f"`generations` is {files!r:.60}; it must be two paths or more.")
    yield from _ranked_pairs(row, files, "ranking")


IMAGEREWARD_RANKINGS = T2ISource(
    imagereward_rankings,
    licence="Apache-2.0",
    reads=("prompt", "generations", "ranking"),
    note="The training files of the ImageReward code: JSON lists. Give its image folder as `image_root`.",
)


def t2i(
    row: Row,
    *,
    caption: str = "caption",
    chosen_image: str = "chosen_image",
    rejected_image: str = "rejected_image",
    strength: str | None = "strength",
    source_id: str | None = None,
    group: str | None = None,
) -> Pairs:
    """Read a row of any table with a caption, a better and a worse image. All options are names of columns."""
    for name in filter(None, (caption, chosen_image, rejected_image, source_id, group)):
        if name not in row:
            there = ", ".join(map(str, row))
            raise RowError("missing_column", f"there is no column `{name}`; the row has {there:.200}.")
    given, own_id = strength_field(row, strength) if strength else None, name_field(row, source_id or "source_id")
    pair = t2i_pair(row[caption], row[chosen_image], row[rejected_image], strength=given, source_id=own_id)
    names = {"group_id": group or "group_id", "pair_id": "pair_id", "source": "source"}
    yield pair | {name: value for name, field in names.items() if (value := name_field(row, field)) is not None}


def _t2i_fields(present: Collection[str], options: Mapping[str, Any]) -> set[str]:
    names = {name: name for name in ("caption", "chosen_image", "rejected_image", "strength")}
    return {name for name in (names | dict(options)).values() if name}


T2I = T2ISource(
    t2i,
    reads=_t2i_fields,
    note="Columns are `caption`, `chosen_image`, `rejected_image` and `strength`, unless options say otherwise.",
)


def per_answer_images(row: Row) -> Pairs:
    """Read a ShareGPT row whose first image belongs to `chosen` and whose second to `rejected`, as the input of
    DT2IT-MRM's reformulation and the text-to-image part of OmniRewardData. The caption is the text of both answers
    or, where it is empty, the last human turn."""
    images = row.get("images")
    values = [answer_field(row, side) for side in ("chosen", "rejected")]
    texts = [value.replace(IMAGE_MARKER, "").strip() if IMAGE_MARKER in value else value for value in values]
    turns = [] if row.get("conversations") is None else turns_field(row, "conversations")
    human = [text for role, text in turns if role == "user"]
    if not _is_list(images, 2):
        raise RowError("placeholder_count", "`images` must hold two images, of `chosen` and of `rejected`.")
    if any(IMAGE_MARKER in text for text in human):
        problem = f"a human turn has `{IMAGE_MARKER}`: the question shows the images; load the set as `llamafactory`."
        raise RowError("placeholder_count", problem)
    if texts[0] != texts[1]:
        raise RowError("not_conversational", "`chosen` and `rejected` differ, so that the caption is unclear.")
    yield _pair(texts[0] if texts[0].strip() or not human else human[-1], *images)


PER_ANSWER_IMAGES = T2ISource(
    per_answer_images,
    reads=("chosen", "rejected", "images", "conversations"),
    note="A format: images[0] is the image of `chosen`, images[1] that of `rejected`.",
)


def llava_reward(row: Row) -> Pairs:
    """Read a row of LLaVA-Reward. Strength is the difference of the two ratings."""
    captions = row["prompt"] if isinstance(row.get("prompt"), (list, tuple)) else [row.get("prompt")]
    better, worse = (to_number(row.get(name)) for name in ("c_rate", "r_rate"))
    if not captions or any(caption != captions[0] for caption in captions):
        raise RowError("not_conversational", "`prompt` holds different captions; the images of a pair share one.")
    if better is None or worse is None:
        shown = f"{row.get('c_rate')!r:.20} and {row.get('r_rate')!r:.20}"
        raise RowError("bad_rating", f"`c_rate` and `r_rate` are {shown}; both must be numbers.")
    if better == worse:
        raise RowError("tie", f"`c_rate` and `r_rate` are both {better}.")
    if better < worse:
        raise RowError("bad_rating", f"`c_rate` is {better}, less than `r_rate`, {worse}; swap the images.")
    paths = row.get("chosen_path"), row.get("reject_path")
    yield _pair(captions[0], *paths, strength=better - worse, source_id=row.get("prompt_id"))


LLAVA_REWARD = T2ISource(
    llava_reward,
    reads=("prompt", "chosen_path", "c_rate", "reject_path", "r_rate", "prompt_id"),
    note="A format; the images are the authors' local files.",
)


def _pair(caption: Any, chosen: Any, rejected: Any, **options: Any) -> dict[str, Any] | RowError:
    """Make a pair, or return the error that [`~trl_dt2it.data.t2i.t2i_pair`] raises."""
    try:
        return t2i_pair(caption, chosen, rejected, **options)
    except RowError as error:
        return error


def _is_list(value: Any, length: int) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple)) and len(value) == length


def _ranked_pairs(row: Row, files: Sequence[Any], field: str, annotators: Sequence[Sequence[float]] = ()) -> Pairs:
    """Make a pair of every two images with different ranks; `annotators` are further rankings, for the strength."""
    if not (ranks := _numbers(row.get(field), len(files))):
        raise RowError("bad_rating", f"`{field}` is {row.get(field)!r:.60}; it must be {len(files)} numbers.")
    for i, j in combinations(range(len(files)), 2):
        if ranks[i] == ranks[j]:
            yield RowError("tie", f"`{field}` of images {i} and {j} is {ranks[i]:g}, so that neither is preferred.")
            continue
        better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
        votes = [(other[better] < other[worse]) - (other[better] > other[worse]) for other in annotators]
        strength = max(fmean(votes), 0.0) if votes else None
        yield _pair(row.get("prompt"), files[better], files[worse], strength=strength)


def _check_id(rows: Sequence[Row]) -> None:
    if any(row.get("prompt_id") in (None, "") for row in rows):
        raise RowError("missing_column", "`prompt_id` is missing or None; it tells which images share a caption.")


def _two_captions(row: Row) -> RowError:
    shown = f"`prompt_id` {row.get('prompt_id')!r:.40}"
    return RowError("not_conversational", f"two images with the {shown} have different captions; fix the id.")


def _pairings(ordered: list[Any], pairs: str) -> Iterable[tuple[Any, Any]]:
    if pairs not in ("all", "extremes", "adjacent"):
        raise ValueError(f'`pairs` is {pairs!r}; choose "all", "extremes" or "adjacent".')
    ordered = [ordered[0], ordered[-1]] if pairs == "extremes" and len(ordered) > 1 else ordered
    return combinations(ordered, 2) if pairs == "all" else pairwise(ordered)


def _numbers(value: Any, length: int | None = None) -> list[float]:
    """Read a number or a list of numbers; empty if any is not finite, or if there are not as many as `length`."""
    numbers = [to_number(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    return [] if None in numbers or length not in (None, len(numbers)) else cast(list[float], numbers)
