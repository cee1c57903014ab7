"""Sources that compare two conversations, or two ends of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..canonical import preference
from ..errors import RowError
from .fields import answer_field, answered_field, image_field, name_field, prompt_field, same_prompt
from .source import Source


_COCO_FOLDER = "./data/coco/"


def povid(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    A row of YiyangAiLab/POVID_preference_data_for_VLLMs: two conversations that differ in their last answer.

    Images are files of COCO's train2014, named `./data/coco/COCO_train2014_....jpg`; the folder is removed, so that
    the image root is the folder that holds the pictures. No strength.

    Args:
        row (`Mapping`):
            `conversations` (with the better answer), `rejected_conversations`, `image`, `id`.

    Yields:
        `dict`: the pair.

    Raises:
        [`RowError`]: `not_conversational` if the conversations differ before their last answer or are none; or if a
            part is missing.
    """
    names = ("conversations", "rejected_conversations")
    (prompt, chosen), (other_prompt, rejected) = (answered_field(row, name) for name in names)
    prompt = same_prompt(prompt, other_prompt, names)
    images = [
        image.removeprefix(_COCO_FOLDER) if isinstance(image, str) else image for image in image_field(row, "image")
    ]
    yield preference(prompt, chosen, rejected, images, source_id=name_field(row, "id"))


def wildvision_battle(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    A row of WildVision/wildvision-battle: a user's vote on the answers of two models; no strength.

    Args:
        row (`Mapping`):
            `conversation_a`, `conversation_b`, `winner`, `image`, `question_id`.

    Yields:
        `dict`: the pair.

    Raises:
        [`RowError`]: `tie` if neither won; `unparsed_verdict` if `winner` is something else; `not_conversational` if
            the models have answered differently before, so that the user has seen two prompts; or if a part is
            missing.
    """
    winner = row.get("winner")
    if winner in ("tie", "tie (bothbad)"):
        raise RowError("tie", f"`winner` is {winner!r}; drop the row, neither answer is better.")
    if winner not in ("model_a", "model_b"):
        raise RowError("unparsed_verdict", f"`winner` is {winner!r:.40}; it has to be model_a, model_b or a tie.")
    names = ("conversation_a", "conversation_b")
    (prompt, answer_a), (other_prompt, answer_b) = (answered_field(row, name) for name in names)
    prompt = same_prompt(prompt, other_prompt, names)
    chosen, rejected = (answer_a, answer_b) if winner == "model_a" else (answer_b, answer_a)
    yield preference(prompt, chosen, rejected, image_field(row, "image"), source_id=name_field(row, "question_id"))


def llava_human_preference(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    A row of zhiqings/LLaVA-Human-Preference-10K: two answers at the end of a conversation; no strength.

    Args:
        row (`Mapping`):
            `conversations`, `output_1`, `output_2`, `preference` (1 or 2), `image` (a file of COCO's train2017), `id`.

    Yields:
        `dict`: the pair.

    Raises:
        [`RowError`]: `unparsed_verdict` if `preference` is neither 1 nor 2; or if a part is missing or of another
            type.
    """
    verdict = row.get("preference")
    if isinstance(verdict, bool) or verdict not in (1, 2):
        raise RowError("unparsed_verdict", f"`preference` is {verdict!r:.40}; it has to be 1 or 2.")
    chosen, rejected = ("output_1", "output_2") if verdict == 1 else ("output_2", "output_1")
    yield preference(
        prompt_field(row, "conversations"),
        answer_field(row, chosen),
        answer_field(row, rejected),
        image_field(row, "image"),
        source_id=name_field(row, "id"),
    )


POVID = Source(
    povid,
    licence="CC-BY-4.0",
    hub_id="YiyangAiLab/POVID_preference_data_for_VLLMs",
    reads=("conversations", "rejected_conversations", "image", "id"),
    note="Images are not shipped: give the folder of COCO's train2014 as `image_root`.",
)
WILDVISION_BATTLE = Source(
    wildvision_battle,
    licence="ODC-BY",
    hub_id="WildVision/wildvision-battle",
    reads=("conversation_a", "conversation_b", "winner", "image", "question_id"),
)
LLAVA_HUMAN_PREFERENCE = Source(
    llava_human_preference,
    licence="unknown",
    hub_id="zhiqings/LLaVA-Human-Preference-10K",
    files=("llava_7b_v1_preference.json",),
    reads=("conversations", "output_1", "output_2", "preference", "image", "id"),
    note="The terms are not clear. Images are not shipped: give the folder of COCO's train2017 as `image_root`.",
)
