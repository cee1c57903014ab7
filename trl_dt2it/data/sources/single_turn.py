"""Sources of one question about one picture (or several, or a video) with a better and a worse answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..canonical import IMAGE_MARKER, preference
from ..errors import RowError
from .fields import image_field, images_field, json_field, name_field, text_field, without_markers
from .formats import llamafactory, or_llamafactory
from .source import Source


def rlaif_v(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    A row of openbmb/RLAIF-V-Dataset: everything in columns of its own, no strength.

    Args:
        row (`Mapping`):
            `question`, `chosen`, `rejected`, `image`, `idx`.

    Yields:
        `dict`: the pair.

    Raises:
        [`RowError`]: if a text or the image is missing or of another type.
    """
    yield _pair(row, text_field(row, "question"), image_field(row, "image"), source_id=name_field(row, "idx"))


def rlhf_v(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    A row of openbmb/RLHF-V-Dataset, or of llamafactory/RLHF-V in ShareGPT's layout; no strength.

    Chosen is a correction of rejected, so that both are nearly the same text.

    Args:
        row (`Mapping`):
            `text` (a JSON string of `question`, `chosen` and `rejected`), `image`, `idx`; or as in [`llamafactory`].

    Yields:
        `dict`: the pair.

    Raises:
        [`RowError`]: `unparsed_verdict` if `text` is not such a string, or if a text or the image is missing.
    """
    if row.get("conversations") is not None:
        yield from llamafactory(row)
        return
    content = json_field(row, "text")
    if not isinstance(content, Mapping):
        raise RowError("unparsed_verdict", "`text` is JSON, but no object with `question`, `chosen` and `rejected`.")
    yield _pair(content, text_field(content, "question"), image_field(row, "image"), source_id=name_field(row, "idx"))


def spa_vl(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    A row of sqrti/SPA-VL: safety, no strength.

    A question may have a marker anywhere, which is where the image goes. Where there are several, all are removed
    and the image comes first.

    Args:
        row (`Mapping`):
            `question`, `chosen`, `rejected`, `image`.

    Yields:
        `dict`: the pair.

    Raises:
        [`RowError`]: if a text or the image is missing or of another type.
    """
    question = text_field(row, "question")
    if question.count(IMAGE_MARKER) > 1:
        question = without_markers(question)
    yield _pair(row, question, image_field(row, "image"), source_id=name_field(row, "id"))


def mmpr(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    A row of the OpenGVLab/MMPR family: one image, several, or none; no strength.

    Args:
        row (`Mapping`):
            `question`, `chosen`, `rejected` and, if there are images, `image` (a path or a list of them, relative to
            the `root` that `meta.json` gives for the file).

    Yields:
        `dict`: the pair.

    Raises:
        [`RowError`]: `placeholder_count` if the question has markers, but not one for each image; or if a text is
            missing or of another type.
    """
    yield _pair(row, text_field(row, "question"), images_field(row, "image"), source_id=name_field(row, "id"))


def mm_rlhf(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    A row of `dpo_pairs.jsonl` of yifanzhang114/MM-RLHF: an image or a video.

    The human scores are in another file (`data.jsonl`), whose fields are not documented; `ls_factor` smooths the
    labels of one training run. So there is no strength.

    Args:
        row (`Mapping`):
            `prompt` (of which `<image>` is removed), `chosen`, `rejected`, `id`, and `image` or `video` (a folder of
            frames), relative to where the archives are unpacked.

    Yields:
        `dict`: the pair, with the folder as its only item of `videos`.

    Raises:
        [`RowError`]: `tie` if `is_tie` is set; `image_missing`, `image_type` or `video_type` if there is not exactly
            one of image and video; or if a text is missing or of another type.
    """
    if row.get("is_tie") not in (None, False, 0):
        raise RowError("tie", "`is_tie` is set; drop the row, neither answer is better.")
    prompt, video = without_markers(text_field(row, "prompt")), row.get("video")
    if video is None or video == "":
        yield _pair(row, prompt, image_field(row, "image", "video"), source_id=name_field(row, "id"))
        return
    if images_field(row, "image"):
        raise RowError("image_type", "the row has both `image` and `video`; leave the one that the question is about.")
    if not isinstance(video, str):
        raise RowError(
            "video_type", f"`video` is of type {type(video).__name__}; give the path of a folder of frames."
        )
    yield _pair(row, prompt, [], videos=[video], source_id=name_field(row, "id"))


def _pair(row: Mapping[str, Any], question: str, images: list[Any], **kwargs: Any) -> dict[str, Any]:
    return preference(question, text_field(row, "chosen"), text_field(row, "rejected"), images, **kwargs)


RLAIF_V = Source(
    rlaif_v,
    licence="CC-BY-NC-4.0",
    hub_id="openbmb/RLAIF-V-Dataset",
    is_non_commercial=True,
    reads=("question", "chosen", "rejected", "image", "idx"),
)
RLHF_V = Source(
    rlhf_v,
    licence="CC-BY-NC-4.0",
    hub_id="openbmb/RLHF-V-Dataset",
    is_non_commercial=True,
    reads=or_llamafactory("text", "image", "idx"),
)
SPA_VL = Source(
    spa_vl,
    licence="CC-BY-4.0",
    hub_id="sqrti/SPA-VL",
    config="default",
    reads=("question", "chosen", "rejected", "image", "id"),
)
MMPR = Source(
    mmpr,
    licence="MIT",
    hub_id="OpenGVLab/MMPR-v1.2",
    files=("meta*.json",),
    reads=("question", "chosen", "rejected", "image", "id"),
    note="The Hub has zip archives, in parts: unpack annotations and images, and give the path of `meta.json`, with "
    "its folder as `image_root`.",
)
MM_RLHF = Source(
    mm_rlhf,
    licence="unknown",
    hub_id="yifanzhang114/MM-RLHF",
    files=("dpo_pairs.jsonl",),
    has_videos=True,
    reads=("prompt", "chosen", "rejected", "image", "video", "id", "is_tie"),
    note="The publisher states no licence on the page of the data set. Images and frames of videos come in zip "
    "archives: unpack them and give the folder as `image_root`.",
)
