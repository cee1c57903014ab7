"""Adapters of sets of judged answers, and a parser of judges' prompts and verdicts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

from ..messages import IMAGE_MARKER, preference, ranked_prompt
from ..rows import RowError, blocks
from .fields import (
    Pairs,
    Row,
    Source,
    image_field,
    images_field,
    json_field,
    name_field,
    text_field,
    to_number,
    turns_field,
    without_markers,
)
from .formats import llamafactory, or_llamafactory


def rlaif_v(row: Row) -> Pairs:
    """Read a row of openbmb/RLAIF-V-Dataset; no strength."""
    yield _pair(row, text_field(row, "question"), image_field(row, "image"), source_id=name_field(row, "idx"))


RLAIF_V = Source(
    rlaif_v,
    licence="CC-BY-NC-4.0",
    hub_id="openbmb/RLAIF-V-Dataset",
    is_non_commercial=True,
    reads=("question", "chosen", "rejected", "image", "idx"),
)


def rlhf_v(row: Row) -> Pairs:
    """Read a row of openbmb/RLHF-V-Dataset, or of llamafactory/RLHF-V in ShareGPT's layout; no strength."""
    if row.get("conversations") is not None:
        yield from llamafactory(row)
        return
    content = json_field(row, "text")
    if not isinstance(content, Mapping):
        raise RowError("unparsed_verdict", "`text` is JSON, but no object with `question`, `chosen` and `rejected`.")
    yield _pair(content, text_field(content, "question"), image_field(row, "image"), source_id=name_field(row, "idx"))


RLHF_V = Source(
    rlhf_v,
    licence="CC-BY-NC-4.0",
    hub_id="openbmb/RLHF-V-Dataset",
    is_non_commercial=True,
    reads=partial(or_llamafactory, ("text", "image", "idx")),
)


def spa_vl(row: Row) -> Pairs:
    """Read a row of sqrti/SPA-VL; no strength."""
    question = text_field(row, "question")
    if question.count(IMAGE_MARKER) > 1:  # of one image, which then comes first
        question = without_markers(question)
    yield _pair(row, question, image_field(row, "image"), source_id=name_field(row, "id"))


SPA_VL = Source(
    spa_vl,
    licence="CC-BY-4.0",
    hub_id="sqrti/SPA-VL",
    config="default",
    reads=("question", "chosen", "rejected", "image", "id"),
)


def mmpr(row: Row) -> Pairs:
    """Read a row of the OpenGVLab/MMPR family, with any number of images; no strength."""
    yield _pair(row, text_field(row, "question"), images_field(row, "image"), source_id=name_field(row, "id"))


MMPR = Source(
    mmpr,
    licence="MIT",
    hub_id="OpenGVLab/MMPR-v1.2",
    files=("meta*.json",),
    reads=("question", "chosen", "rejected", "image", "id"),
    note="The Hub has zip archives, in parts: unpack annotations and images, and give the path of `meta.json`, with "
    "its folder as `image_root`.",
)


def mm_rlhf(row: Row) -> Pairs:
    """Read a row of `dpo_pairs.jsonl` of yifanzhang114/MM-RLHF, about an image or a video. It has no strength: human
    scores are in another file, `data.jsonl`, and `ls_factor` smooths the labels of one training run."""
    if row.get("is_tie") not in (None, False, 0):
        raise RowError("tie", "`is_tie` is set; drop the row, neither answer is better.")
    prompt, video = without_markers(text_field(row, "prompt")), row.get("video")
    if video is None or video == "":
        yield _pair(row, prompt, image_field(row, "image", "video"), source_id=name_field(row, "id"))
        return
    if images_field(row, "image"):
        raise RowError("image_type", "the row has both `image` and `video`; leave the one that the question is about.")
    if not isinstance(video, str):
        kind = type(video).__name__
        raise RowError("video_type", f"`video` is of type {kind}; give the path of a folder of frames.")
    yield _pair(row, prompt, [], videos=[video], source_id=name_field(row, "id"))


MM_RLHF = Source(
    mm_rlhf,
    hub_id="yifanzhang114/MM-RLHF",
    files=("dpo_pairs.jsonl",),
    has_videos=True,
    reads=("prompt", "chosen", "rejected", "image", "video", "id", "is_tie"),
    note="Images and frames of videos come in zip archives: unpack them and give the folder as `image_root`.",
)


def _pair(row: Row, question: str, images: list[Any], **kwargs: Any) -> dict[str, Any]:
    return preference(question, text_field(row, "chosen"), text_field(row, "rejected"), images, **kwargs)


_ANSWER_TAG = re.compile(r"\s*<answer>\s*([12])\s*</answer>\s*")


def llava_critic(row: Row) -> Pairs:
    """Read a row of lmms-lab/LLaVA-Critic-113k, with question, answers and verdict in its text. Strength is the gap of
    two scores, or 1 or 2 for `[[A>B]]` and `[[A>>B]]`; where the judge only names the better answer, there is none."""
    turns = turns_field(row, "conversations")
    if [role for role, _ in turns] != ["user", "assistant"]:
        raise RowError("unparsed_verdict", "`conversations` is not a judge's prompt and its reply; drop the row.")
    (_, prompt), (_, reply) = turns
    if (comparison := parse_comparison(prompt)) is None:
        raise RowError("unparsed_verdict", "a question and two answers cannot be read from the judge's prompt.")
    if (verdict := parse_verdict(reply)) is None:
        raise RowError("unparsed_verdict", "the better answer cannot be read from the judge's reply.")
    if verdict.winner == 0:
        raise RowError("tie", "the judge finds both answers equally good; drop the row.")
    question, *answers = comparison
    chosen, rejected = answers if verdict.winner == 1 else answers[::-1]
    images, name = image_field(row, "image"), name_field(row, "id")
    yield preference(question, chosen, rejected, images, strength=verdict.strength, source_id=name)


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


def r1_reward_rl(row: Row) -> Pairs:
    """Read a row of yifanzhang114/R1-Reward-RL, with answers in a judge's prompt and the preference in its reply; no
    strength. Of the publisher's image paths the last part is kept: the image root holds all pictures in one folder."""
    answer = row.get("answer")
    texts = answer if isinstance(answer, (list, tuple)) else [answer]
    match = _ANSWER_TAG.fullmatch(texts[0]) if len(texts) == 1 and isinstance(texts[0], str) else None
    if match is None:
        raise RowError("unparsed_verdict", f"`answer` is {answer!r:.60}; it has to hold <answer>1</answer> or 2.")
    messages = json_field(row, "message")
    said = [message for message in messages if isinstance(message, Mapping)] if isinstance(messages, list) else []
    said = [message for message in said if isinstance(message.get("content"), (str, list))]
    parts = [block for message in said for block in blocks(message) if isinstance(block, Mapping)]
    if any(part.get("type") == "video" for part in parts):
        raise RowError("video_type", "`message` shows a video, which is not read; drop the row.")
    text = "\n".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    if (comparison := parse_headed_comparison(text)) is None:
        raise RowError("unparsed_verdict", "a question and two answers cannot be read from `message`.")
    paths = [part.get("image") for part in parts if part.get("type") == "image"]
    images = [re.split(r"[/\\]", path)[-1] if isinstance(path, str) else "" for path in paths]
    if not images or "" in images:
        raise RowError("image_missing", "`message` has no path in its image block, or no such block; drop the row.")
    question, *answers = comparison
    question = row["question"] if isinstance(row.get("question"), str) else question
    chosen, rejected = answers if match[1] == "1" else answers[::-1]
    yield preference(question, chosen, rejected, images, source_id=name_field(row, "id"))


R1_REWARD_RL = Source(
    r1_reward_rl,
    hub_id="yifanzhang114/R1-Reward-RL",
    reads=("message", "question", "answer", "id"),
    note="Images are not shipped: give the one folder with those of the sets behind this one as `image_root`.",
)


ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


def vlfeedback(row: Row, *, aspects: Sequence[str] = ASPECTS) -> Pairs:
    """Read a row of MMInstruction/VLFeedback or Zhihui/VLFeedback. Strength is the gap of mean ratings, 0 to 4."""
    if row.get("conversations") is not None:  # Zhihui's
        yield from llamafactory(row)
        return
    prompt, images, name = _of_vlfeedback(row, aspects)
    rated = []
    for index, answer in enumerate(_answers(row.get("completions"))):
        try:
            rated.append((_total(answer, index, aspects), text_field(answer, "response")))
        except RowError as error:
            yield error
    for two in itertools.combinations(rated, 2):
        (high, chosen), (low, rejected) = sorted(two, key=itemgetter(0), reverse=True)
        if high == low:
            yield RowError("tie", f"two answers are rated {high / len(aspects):g}; neither is better.")
        else:
            strength = (high - low) / len(aspects)
            yield preference(prompt, chosen, rejected, images, strength=strength, source_id=name)


def vlfeedback_ranked(row: Row, *, aspects: Sequence[str] = ASPECTS) -> Pairs:
    """Read the answers of a row of MMInstruction/VLFeedback. Scores are mean ratings, 1 to 5, and `None` where one is
    no number."""
    if row.get("conversations") is not None:
        raise RowError("bad_rating", "rows of Zhihui/VLFeedback are pairs without scores; load them as pairs.")
    prompt, images, name = _of_vlfeedback(row, aspects)
    answers, scores = [], list[float | None]()
    for index, answer in enumerate(_answers(row.get("completions"))):
        answers.append(text_field(answer, "response"))
        try:
            scores.append(_total(answer, index, aspects) / len(aspects))
        except RowError:
            scores.append(None)
    if len(scores) - scores.count(None) < 2:
        raise RowError("bad_rating", f"its scores are {scores}, which rank no two answers; drop the row.")
    yield ranked_prompt(prompt, answers, scores, images, source_id=name)


def _of_vlfeedback(row: Row, aspects: Sequence[str]) -> tuple[str, list[Any], str | None]:
    """Read the prompt, the images and the name of a row."""
    if not aspects:
        raise ValueError("`aspects` is empty; name at least one rating.")
    name = name_field(row, "id")
    by_name = None if name is None else f"merged_images/{name}.jpg"
    return text_field(row, "prompt"), image_field({**row, "id": by_name}, "image", "img_path", "id"), name


VLFEEDBACK = Source(
    vlfeedback,
    ranked=vlfeedback_ranked,
    hub_id="MMInstruction/VLFeedback",
    files=("vlfeedback_80k.jsonl",),
    reads=partial(or_llamafactory, ("prompt", "completions", "image", "img_path", "id")),
    note="Unpack `merged_images.zip` and give the folder that holds `merged_images` as `image_root`.",
)


def _answers(completions: Any) -> list[Row]:
    """List the completions, which the Hub has as a mapping of columns."""
    if isinstance(completions, Mapping):
        columns = {field: completions.get(field) for field in ("annotations", "response")}
        lengths = {len(column) if isinstance(column, (list, tuple)) else None for column in columns.values()}
        if len(lengths) > 1 or None in lengths:
            raise RowError("missing_column", "`completions` has not as many `annotations` as `response`s; fix it.")
        completions = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if not isinstance(completions, (list, tuple)) or len(completions) < 2:
        raise RowError("missing_column", "`completions` has fewer than two answers, which make no pair; drop the row.")
    return [answer if isinstance(answer, Mapping) else {} for answer in completions]


def _total(answer: Row, index: int, aspects: Sequence[str]) -> float:
    """Sum up the ratings; sums of equal ratings are equal, which means are not."""
    annotations, total = answer.get("annotations"), 0.0
    for aspect in aspects:
        annotation = annotations.get(aspect) if isinstance(annotations, Mapping) else None
        rating = annotation.get("Rating") if isinstance(annotation, Mapping) else None
        if (number := to_number(rating)) is None:
            raise RowError("bad_rating", f"answer {index} has {rating!r:.40} as its rating of {aspect}; no number.")
        total += number
    return total


Comparison: TypeAlias = tuple[str, str, str]  # a question and two answers to it, as a judge was shown them


class Verdict(NamedTuple):
    """The better answer (1 or 2, 0 for a tie), and by how much, where the judge says so."""

    winner: int
    strength: float | None = None


# Names that the two answers have in prompts with `Question: [...]`.
_NAMES = (("The first response", "The second response"), ("Response 1", "Response 2"), ("Response A", "Response B"))
_BRACKETED = tuple((r"Question: \[", *(rf"\][ \t\r]*\n\s*{name}: \[" for name in names)) for names in _NAMES)
_ENCLOSED = tuple(
    tuple(map(re.escape, headers))
    for headers in (
        ("<|User Prompt|>", *(f"<|The {end} of Assistant {x}'s Answer|>" for x in "AB" for end in ("Start", "End"))),
        ("[Question]", "[Assistant 1]", "[End of Assistant 1]", "[Assistant 2]", "[End of Assistant 2]"),
    )
)
_HEADED = tuple(rf"(?m:^)[ \t]*#{{2,6}} \[{name}\]:" for name in ("Question", "Response 1", "Response 2"))
_OUTPUT_FORMAT = re.compile(r"^[ \t]*#{2,6} \*\*Output Format", re.MULTILINE)

# Forms that a judge is told to reply in. An answer that holds one has taken in the instructions.
_FORM = re.compile(r"better response: ?\[|\[\[[AB][<>=]|<answer>", re.IGNORECASE)
_SIDES = {"1": 1, "first": 1, "a": 1, "2": 2, "second": 2, "b": 2}
_MARKS = {"A=B": Verdict(0), "A>B": Verdict(1, 1.0), "B>A": Verdict(2, 1.0)}
_MARKS |= {"A>>B": Verdict(1, 2.0), "B>>A": Verdict(2, 2.0)}
_MARK = re.compile(r"\[\[([AB<>=\s]+)\]\]")
_BETTER = re.compile(r"\bbetter response:[ \t]*(?:\[(\w+)\])?", re.IGNORECASE)
_SCORES = re.compile(r"\s*(\d+(?:\.\d+)?)[ \t]+(\d+(?:\.\d+)?)[ \t\r]*(?:\n|$)")

_ANSWER = r"(?:the )?(?:(?:response|answer|assistant) (?:1|2|a|b)|(?:first|second) (?:response|answer))"
_CLAIM = re.compile(
    rf"\b(?P<answer>{_ANSWER})\b(?P<between>(?: is| was|'s| isn.t| wasn.t)(?: \w+){{0,3}}?) (?P<word>better|worse)\b",
    re.IGNORECASE,
)
_DENIAL = re.compile(r"\b(?:no|not|never|neither|hardly|barely|nowhere)\b|n.t\b", re.IGNORECASE)
_LEAD = r"(?:(?:(?:final )?(?:verdict|judgement|judgment)|(?:in )?conclusion|overall|therefore|thus|hence)[,:]? )?"
_REASON = r"(?: overall)?(?:[.!]?$|,? (?:because|since)\b)"

# A whole sentence, so that nothing turns it round: no "if", no "not", no praise for one thing only.
_WINNER = re.compile(
    rf"{_LEAD}{_ANSWER} is (?:(?:clearly|slightly|significantly|much|overall|the) )?better"
    rf"(?: response| answer| one)?(?: than {_ANSWER})?{_REASON}",
    re.IGNORECASE,
)
_TIE = re.compile(
    rf"{_LEAD}(?:(?:the |these )?(?:two|both) (?:responses|answers)|both) are equally good{_REASON}", re.IGNORECASE
)

_QUOTED, _QUOTE = re.compile(r'"[^"]*"|“[^”]*”'), re.compile(r'["“”]')
_PARAGRAPH_END = re.compile(r"\n\s*\n")  # a single line break may be in the middle of a sentence
_SENTENCE_END = re.compile(r"(?<=[.!?]) ")


def parse_comparison(text: str) -> Comparison | None:
    """Find a question and two answers in a judge's prompt."""
    found = [parts for headers in (*_BRACKETED, *_ENCLOSED) if (parts := _between(text, headers)) is not None]
    if len(found) != 1:
        return None
    if len(found[0]) == len(_BRACKETED[0]):
        return _bracketed(*found[0])
    question, first, between, second, _ = (part.strip() for part in found[0])
    return None if between else (question, first, second)


def parse_headed_comparison(text: str) -> Comparison | None:
    """Find a question and two answers under the headers `#### [Question]:`, `#### [Response 1]:` and so on."""
    if (parts := _between(text, _HEADED)) is None:
        return None
    second, *instructions = _OUTPUT_FORMAT.split(parts[2])
    if len(instructions) > 1 or _FORM.search(second):
        return None
    return parts[0].strip(), parts[1].strip(), second.strip()


def parse_verdict(text: str) -> Verdict | None:
    """Read the answer that a judge prefers; `None` where that is in doubt."""
    # Quotations are an answer's words and not the judge's.
    paragraphs = [" ".join(_QUOTED.sub("it", part).split()) for part in _PARAGRAPH_END.split(text)]
    sentences = [sentence for paragraph in paragraphs for sentence in _SENTENCE_END.split(paragraph)]
    if formal := _formal_verdicts(text):
        # Praise in passing does not matter here, but a whole sentence that calls it a tie does.
        ties = [Verdict(0) for sentence in sentences if _TIE.fullmatch(sentence)]
        return formal[0] if len({*formal, *ties}) == 1 else None
    claims = {_claimed(match) for paragraph in paragraphs for match in _CLAIM.finditer(paragraph)}
    if any(map(_QUOTE.search, paragraphs)):
        return None  # a quotation that does not end
    if any(map(_TIE.match, sentences)):
        return None if claims else Verdict(0)
    if len(claims) != 1 or "equally good" in text.lower() or not any(map(_WINNER.match, sentences)):
        return None
    winner = claims.pop()
    return Verdict(winner) if winner else None


def _formal_verdicts(text: str) -> list[Verdict | None]:
    """Read the forms that a judge is told to fill in; `None` for one that is not filled in properly."""
    verdicts = [_MARKS.get("".join(mark.split())) for mark in _MARK.findall(text)]
    names = map(str.lower, _BETTER.findall(text))
    verdicts += [Verdict(_SIDES[name]) if name in _SIDES else None for name in names]
    if scores := _SCORES.match(text):
        first, second = map(float, scores.groups())
        verdict = Verdict(1 if first > second else 2, abs(first - second)) if first != second else Verdict(0)
        verdicts.append(verdict if all(1 <= score <= 10 for score in (first, second)) else None)
    return verdicts


def _claimed(claim: re.Match[str]) -> int:
    """Return the answer that a claim calls better, or the other of the one it calls worse; 0 if it is denied."""
    side = next(_SIDES[word] for word in claim["answer"].lower().split() if word in _SIDES)
    if _DENIAL.search(claim["between"]):
        return 0
    return side if claim["word"].lower() == "better" else 3 - side


def _bracketed(question: str, first: str, rest: str) -> Comparison | None:
    """Split the second answer from its closing bracket and from what follows."""
    second, bracket, tail = rest.rpartition("]")
    has_tail = bool(tail.strip()) and tail.strip() != "ASSISTANT:"
    # Behind further instructions, the last bracket may be any: it has to end its line and to close what was opened.
    is_closed = tail.lstrip(" \t\r").startswith("\n") and second.count("[") == second.count("]")
    if not bracket or (has_tail and ("[" in tail or not is_closed)) or _FORM.search(second) or _may_end(second):
        return None
    return question.strip(), first.strip(), second.strip()


def _may_end(answer: str) -> bool:
    """Tell whether a line ends with a bracket that closes none of the answer's own: the answer may end there."""
    depth = 0
    for line in answer.splitlines():
        for character in line:
            depth += (character == "[") - (character == "]")
        if depth < 0 and line.rstrip().endswith("]"):
            return True
        depth = max(depth, 0)  # as in "(1, 2]"
    return False


def _between(text: str, headers: Sequence[str]) -> list[str] | None:
    """Split a text behind each of its headers, if each occurs exactly once and in this order."""
    matches = [list(re.finditer(header, text)) for header in headers]
    if any(len(found) != 1 for found in matches):
        return None
    spans = [*(found[0].span() for found in matches), (len(text), len(text))]
    parts = [(end, start) for (_, end), (start, _) in itertools.pairwise(spans)]
    return [text[end:start] for end, start in parts] if all(end <= start for end, start in parts) else None
