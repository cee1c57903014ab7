"""Text-to-image sets whose rows hold two images, one of them preferred: HPDv2, HPDv3, Pick-a-Pic and others."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeGuard

from ..canonical import t2i_pair
from ..errors import RowError
from .fields import to_number
from .source import Source


# In the archive of HPDv2's train split, these do not decode.
HPDV2_CORRUPT = frozenset({"00006811.jpg", "00168743.jpg", "00331911.jpg", "00310087.jpg"})


def hpdv2_train(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    The pair of a row of HPDv2's train split. It has no strength.

    Args:
        row (`Mapping`):
            `prompt`, two file names in `file_path` or `image_path`, and `human_preference`, 1 for the better image.

    Yields:
        `dict` or [`RowError`]: the pair, or why there is none.
    """
    files = row.get("file_path") or row.get("image_path")
    preference = row.get("human_preference")
    if not is_list(files, 2):
        yield RowError("image_missing", "neither `file_path` nor `image_path` holds two file names; drop the row.")
    elif not is_list(preference, 2) or not all(value in (0, 1) for value in preference):
        yield RowError("unparsed_verdict", f"`human_preference` is {preference!r:.40}; it must be two of 0 and 1.")
    elif preference[0] == preference[1]:
        yield RowError("tie", f"`human_preference` is {preference!r}, which prefers neither image.")
    elif corrupt := [file for file in files if posixpath.basename(str(file)) in HPDV2_CORRUPT]:
        yield RowError("image_corrupt", f"`{corrupt[0]}` is known not to decode; drop the row.")
    else:
        yield pair(row.get("prompt"), *better_first(files, preference[0] > preference[1]))


HPDV2_TRAIN = Source(
    hpdv2_train,
    licence="Apache-2.0",
    hub_id="ymhao/HPDv2",
    is_t2i=True,
    files=("train.json",),
    reads=("prompt", "file_path", "image_path", "human_preference"),
    note="The images are in train.tar.gz (31.7 GB); unpack it and give the folder as `image_root`. Four of them are "
    "known to be corrupt, and their pairs are dropped.",
)


def hpdv3(
    row: Mapping[str, Any], *, min_confidence: float = 0.0, strength: Literal["confidence", "votes"] = "confidence"
) -> Iterator[dict[str, Any] | RowError]:
    """
    The pair of a row of HPDv3, where `path1` is always the better image.

    Args:
        row (`Mapping`):
            `prompt`, `path1` and `path2`, and, where they are known, `confidence` and `choice_dist`, two numbers of
            votes.
        min_confidence (`float`, *optional*, defaults to `0.0`):
            Pairs of which the confidence is lower count as ties, and those of which it is not known too, unless this
            is 0. HPSv3 was trained on 0.95 and more.
        strength (`str`, *optional*, defaults to `"confidence"`):
            `"confidence"`, or `"votes"`: the difference of the two numbers of votes over their sum. Unknown where the
            row does not tell.

    Yields:
        `dict` or [`RowError`]: the pair, or why there is none.

    Raises:
        `ValueError`: if `strength` is something else.
    """
    if strength not in ("confidence", "votes"):
        raise ValueError(f'`strength` is {strength!r}; choose "confidence" or "votes".')
    confidence, votes = to_number(row.get("confidence")), row.get("choice_dist")
    if (confidence or 0.0) < min_confidence:
        yield RowError("tie", f"`confidence` is {row.get('confidence')!r:.40}, less than {min_confidence}.")
        return
    value = confidence
    if strength == "votes":
        numbers = [to_number(count) or 0.0 for count in votes] if is_list(votes, 2) else [0.0, 0.0]
        value = abs(numbers[0] - numbers[1]) / sum(numbers) if sum(numbers) > 0 else None
    yield pair(row.get("prompt"), row.get("path1"), row.get("path2"), strength=value)


HPDV3 = Source(
    hpdv3,
    licence="MIT",
    hub_id="MizzenAI/HPDv3",
    is_t2i=True,
    files=("{split}.json",),
    reads=("prompt", "path1", "path2", "confidence", "choice_dist"),
    note="The images are in images.tar.gz.*; join the parts, unpack them and give the folder as `image_root`. The "
    "test split tells neither confidence nor votes.",
)


def pickapic(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    The pair of a row of Pick-a-Pic. It has no strength.

    Args:
        row (`Mapping`):
            `caption`, the images in `jpg_0` and `jpg_1` or else their addresses in `image_0_url` and `image_1_url`,
            `label_0` and `label_1` (1 for the better image, 0.5 for both of a tie), `has_label`, `are_different`.

    Yields:
        `dict` or [`RowError`]: the pair, or why there is none.
    """
    labels = [to_number(row.get(f"label_{index}")) for index in range(2)]
    if row.get("has_label") is False:
        yield RowError("unparsed_verdict", "`has_label` is False: nobody compared the two images.")
    elif row.get("are_different") is False:
        yield RowError("equal_images", "`are_different` is False: the two images are one.")
    elif labels == [0.5, 0.5]:
        yield RowError("tie", "`label_0` and `label_1` are 0.5, which prefers neither image.")
    elif labels not in ([1.0, 0.0], [0.0, 1.0]):
        shown = f"{row.get('label_0')!r:.20} and {row.get('label_1')!r:.20}"
        yield RowError("unparsed_verdict", f"`label_0` and `label_1` are {shown}; one must be 1 and the other 0.")
    else:
        images = [row.get(f"jpg_{index}") or row.get(f"image_{index}_url") for index in range(2)]
        ordered = better_first(images, labels[0] == 1.0)
        yield pair(row.get("caption"), *ordered, source_id=row.get("ranking_id"))


PICKAPIC_V2 = Source(
    pickapic,
    licence="unknown",
    hub_id="yuvalkirstain/pickapic_v2",
    is_t2i=True,
    reads=(
        *("caption", "has_label", "are_different", "ranking_id"),
        *(name for n in range(2) for name in (f"jpg_{n}", f"image_{n}_url", f"label_{n}")),
    ),
    note="Users wrote the captions, so that captions and images may be unsafe for work. The variant "
    "yuvalkirstain/pickapic_v2_no_images holds addresses, many of them dead.",
)


def imagereward_pairs(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    The pair of a row of ImageRewardDB's configurations `*_pair`. It has no strength.

    Args:
        row (`Mapping`):
            `prompt`, `img_better`, `img_worse`, `prompt_id`.

    Yields:
        `dict` or [`RowError`]: the pair, or why there is none.
    """
    yield pair(row.get("prompt"), row.get("img_better"), row.get("img_worse"), source_id=row.get("prompt_id"))


IMAGEREWARD_PAIRS = Source(
    imagereward_pairs,
    licence="Apache-2.0",
    is_t2i=True,
    reads=("prompt", "img_better", "img_worse", "prompt_id"),
    note="For local copies: a script of THUDM/ImageRewardDB made these configurations, and `datasets` no longer runs "
    "scripts.",
)


def rapidata(
    row: Mapping[str, Any], *, criterion: Literal["preference", "coherence", "alignment"] = "preference"
) -> Iterator[dict[str, Any] | RowError]:
    """
    The pair of a row of Rapidata's image sets. Its strength is the difference of the two weighted vote shares, in
    [0, 1].

    Args:
        row (`Mapping`):
            `prompt`, `image1`, `image2`, `weighted_results_image1_<criterion>` and the same of `image2`.
        criterion (`str`, *optional*, defaults to `"preference"`):
            What the annotators were asked: `"preference"`, `"coherence"` or `"alignment"`. Not every set has all.

    Yields:
        `dict` or [`RowError`]: the pair, or why there is none.
    """
    names = [f"weighted_results_image{index}_{criterion}" for index in (1, 2)]
    shares = [to_number(row.get(name)) for name in names]
    if shares[0] is None or shares[1] is None:
        yield RowError("bad_rating", f"`{names[0]}` or `{names[1]}` is no number; choose a criterion of this set.")
    elif shares[0] == shares[1]:
        yield RowError("tie", f"`{names[0]}` and `{names[1]}` are equal.")
    else:
        images = better_first([row.get("image1"), row.get("image2")], shares[0] > shares[1])
        yield pair(row.get("prompt"), *images, strength=abs(shares[0] - shares[1]))


RAPIDATA = Source(
    rapidata,
    licence="CDLA-Permissive-2.0",
    hub_id="Rapidata/human-style-preferences-images",
    is_t2i=True,
    reads=("prompt", "image1", "image2"),
    note="Other sets of Rapidata have the same columns, each with a licence of its own. Not for the video sets.",
)


def pair(
    caption: Any, chosen: Any, rejected: Any, *, strength: float | None = None, source_id: Any = None
) -> dict[str, Any] | RowError:
    """A pair, or the error that [`~trl_dt2it.data.canonical.t2i_pair`] raises."""
    try:
        return t2i_pair(caption, chosen, rejected, strength=strength, source_id=source_id)
    except RowError as error:
        return error


def better_first(images: Sequence[Any], first_is_better: bool) -> tuple[Any, Any]:
    return (images[0], images[1]) if first_is_better else (images[1], images[0])


def is_list(value: Any, length: int) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple)) and len(value) == length
