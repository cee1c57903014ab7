"""Sources whose pairs are written into the prompt of a judge, and the preference into its reply."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..canonical import preference
from ..errors import RowError
from .fields import image_field, json_field, name_field, turns_field
from .source import Source
from .verdicts import parse_comparison, parse_headed_comparison, parse_verdict


_ANSWER_TAG = re.compile(r"\s*<answer>\s*([12])\s*</answer>\s*")


def llava_critic(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    A row of lmms-lab/LLaVA-Critic-113k: question, answers and verdict are all in the text.

    Strength is the gap of two scores, or 1 or 2 for `[[A>B]]` and `[[A>>B]]`; where the judge only names the better
    answer, there is none.

    Args:
        row (`Mapping`):
            `conversations` (the judge's prompt and its reply), `image`, `id`.

    Yields:
        `dict`: the pair.

    Raises:
        [`RowError`]: `tie`; `unparsed_verdict` if the answers or the preference cannot be read without doubt, as in
            the rows with one answer and a score; or if a part is missing or of another type.
    """
    turns = turns_field(row, "conversations")
    if [role for role, _ in turns] != ["user", "assistant"]:
        raise RowError("unparsed_verdict", "`conversations` is not a judge's prompt and its reply; drop the row.")
    (_, prompt), (_, reply) = turns
    comparison = parse_comparison(prompt)
    if comparison is None:
        raise RowError("unparsed_verdict", "a question and two answers cannot be read from the judge's prompt.")
    verdict = parse_verdict(reply)
    if verdict is None:
        raise RowError("unparsed_verdict", "the better answer cannot be read from the judge's reply.")
    if verdict.winner == 0:
        raise RowError("tie", "the judge finds both answers equally good; drop the row.")
    question, first, second = comparison
    chosen, rejected = (first, second) if verdict.winner == 1 else (second, first)
    yield preference(
        question,
        chosen,
        rejected,
        image_field(row, "image"),
        strength=verdict.strength,
        source_id=name_field(row, "id"),
    )


def r1_reward_rl(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    A row of yifanzhang114/R1-Reward-RL: the answers are in the prompt of a judge, the preference in its answer.

    Images are named by the publisher's paths, of which the last part is kept: the image root is the one folder that
    holds all pictures. No strength.

    Args:
        row (`Mapping`):
            `message` (a JSON string of messages with content blocks), `question`, `answer` (a list of
            `<answer>1</answer>` or `<answer>2</answer>`).

    Yields:
        `dict`: the pair.

    Raises:
        [`RowError`]: `unparsed_verdict` if the answers or the preference cannot be read without doubt; `image_missing`
            or `video_type` if the prompt shows something else than images.
    """
    answer = row.get("answer")
    texts = answer if isinstance(answer, (list, tuple)) else [answer]
    match = _ANSWER_TAG.fullmatch(texts[0]) if len(texts) == 1 and isinstance(texts[0], str) else None
    if match is None:
        raise RowError("unparsed_verdict", f"`answer` is {answer!r:.60}; it has to hold <answer>1</answer> or 2.")
    blocks = _blocks(json_field(row, "message"))
    if any(block.get("type") == "video" for block in blocks):
        raise RowError("video_type", "`message` shows a video, which is not read; drop the row.")
    text = "\n".join(block["text"] for block in blocks if isinstance(block.get("text"), str))
    comparison = parse_headed_comparison(text)
    if comparison is None:
        raise RowError("unparsed_verdict", "a question and two answers cannot be read from `message`.")
    images = [_last_part(block.get("image")) for block in blocks if block.get("type") == "image"]
    if not images or None in images:
        raise RowError("image_missing", "`message` has no path in its image block, or no such block; drop the row.")
    question = row["question"] if isinstance(row.get("question"), str) else comparison.question
    _, first, second = comparison
    chosen, rejected = (first, second) if match[1] == "1" else (second, first)
    yield preference(question, chosen, rejected, images, source_id=name_field(row, "id"))


def _blocks(messages: Any) -> list[Mapping[str, Any]]:
    """All content blocks of all messages; a string is one block of text."""
    blocks = []
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        blocks += [block for block in content or [] if isinstance(block, Mapping)] if isinstance(content, list) else []
    return blocks


def _last_part(path: Any) -> str | None:
    return path.replace("\\", "/").rsplit("/", 1)[-1] or None if isinstance(path, str) else None


LLAVA_CRITIC = Source(
    llava_critic,
    licence="Apache-2.0",
    hub_id="lmms-lab/LLaVA-Critic-113k",
    config="pairwise",
    reads=("conversations", "image", "id"),
    has_parts=True,
    note="Rows whose verdict cannot be read without doubt are counted as `unparsed_verdict`. Some rows have a "
    "strength in one of two units, others none. The `pointwise` configuration has pairs among its rows, too.",
)
R1_REWARD_RL = Source(
    r1_reward_rl,
    licence="unknown",
    hub_id="yifanzhang114/R1-Reward-RL",
    reads=("message", "question", "answer", "id"),
    note="The terms are not clear. Images are not shipped: they come from the sets that this one was made of. Give "
    "the one folder that holds them all as `image_root`.",
)
