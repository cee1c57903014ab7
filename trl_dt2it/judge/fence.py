"""Fences around text that is to be judged and never obeyed.

An answer may try to end its fence, to open a turn of its own, or to smuggle in a control token of the judge's chat
template. So a fence carries a mark that is derived from all that is fenced and that occurs in none of it, and
[`neutralise`] puts one visible character, a backslash, into whatever a chat template or a reader could take for a
control token, a role header or a fence. Every other character stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..utils import digest


MARK_LENGTH = 16  # hexadecimal digits: 64 bits

# Each pattern matches the empty place where the backslash goes. Wide forms count as well, because some tokenizers
# normalise them to ASCII before they look for special tokens.
_OPEN, _CLOSE = "[<\uff1c]", "[>\uff1e]"
_BAR = "[|\uff5c\u2223\u01c0]"
_SLASH = "[/\uff0f]"

_TAGS = (
    # ends of sequences and turns
    "s|bos|eos|eod|eop|sop|pad|unk|mask|sep|cls|start_of_turn|end_of_turn|end_of_utterance|end_of_text|endoftext|"
    "begin_of_text|start_header_id|end_header_id|eot_id|im_start|im_end|im_sep|turn|channel|message|return|call|"
    # images, videos and sounds
    r"images?|img|im_patch|im_col|imagehere|image_?\d+|image[-_]\d+|image_pad|image_soft_token|image_token|"
    "image_placeholder|image_newline|start_of_image|end_of_image|boi|eoi|begin_of_image|img_context|"
    r"global-img|row_\d+_col_\d+|fake_token_around_image|vision_start|vision_end|vision_pad|videos?|video_pad|"
    "video_soft_token|audios?|audio_soft_token|speech|point|box|quad|ref|patch|tile|"
    r"patch_index_\d+|loc_?\d+|seg_?\d+|extra_id_\d+|unused_?\d+|reserved_\d+|"
    # tools and thoughts
    "tools?|tool_calls?|tool_response|tool_result|tool_code|tool_output|function|function_calls?|function_results?|"
    "invoke|think|thinking|reflection|scratchpad|system|user|assistant|human|developer|instructions?"
)
_BRACKETS = (
    "inst|sys|system_prompt|tool_calls|tool_results|tool_content|available_tools|args|call_id|img|img_break|img_end|"
    "image|think|audio|begin_audio|prefix|middle|suffix|model_settings|gmask|smask|mask|cls|sep|pad|unk|bos|eos|"
    r"control_\d+"
)
_ROLES = (
    "system|user|assistant|human|developer|tool|instructions?|response|input|gpt|ai|bot|"
    "\u7cfb\u7edf|\u7528\u6237|\u52a9\u624b|\u52a9\u7406|\u6307\u4ee4|\u56de\u590d|\u8f93\u5165"
)
_LINE_START = r"(?:(?<=[\n\r\v\f\x85\u2028\u2029])|(?<![\s\S]))"
_PLACES = re.compile(
    rf"(?<={_OPEN})(?={_BAR}\S)"  # <|im_start|>, and with wide bars <|User|>
    rf"|(?<={_OPEN})(?={_SLASH}?[A-Za-z][\w-]*{_BAR}{_CLOSE})"  # <turn|>
    rf"|(?<={_OPEN})(?={_SLASH}?(?:{_TAGS})\s*{_SLASH}?{_CLOSE})"
    rf"|(?<={_OPEN})(?={_OPEN}{_SLASH}?SYS{_CLOSE})"  # <<SYS>>
    rf"|(?<=[\[\uff3b])(?={_SLASH}?(?:{_BRACKETS})[\]\uff3d])"  # [INST]
    rf"|(?<=<)(?=<<)"  # our own fences
    # "### System:", "ASSISTANT:", also as "**User**:" or "> user:"
    rf"|{_LINE_START}(?=[ \t]*#{{1,6}}[ \t]*(?:{_ROLES})\b)"
    rf"|{_LINE_START}(?=[ \t>]*[*_]{{0,3}}(?:{_ROLES})[*_]{{0,3}}[ \t]*[*_]{{0,3}}[:\uff1a])",
    re.IGNORECASE,
)
# Characters that a reader does not see but a model does: controls other than line breaks and tabs, marks that reorder
# text, tag characters; and halves of surrogate pairs, which no encoding takes.
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f\ud800-\udfff]"
)

_FENCED = re.compile(
    rf"^<<<([^<>|\n]+) \| ([0-9a-f]{{{MARK_LENGTH}}})>>>\n(.*?)\n<<<END OF \1 \| \2>>>$", re.DOTALL | re.MULTILINE
)


def neutralise(text: str) -> str:
    """
    Breaks what could act as a control token, as a role header or as a fence, visibly.

    A backslash goes behind the first character of a token (`<\\|im_start|>`, `[\\INST]`, `<\\image>`) and in front of
    a role header that begins a line (`\\### System:`). Characters that nobody sees, such as tag characters, are
    written as `\\u{e0041}`. All else stays.

    Args:
        text (`str`):
            A question, an answer or a reference.

    Returns:
        `str`: the text, safe to put into a message.
    """
    text = _HIDDEN.sub(lambda match: f"\\u{{{ord(match[0]):x}}}", text)
    return _PLACES.sub("\\\\", text)


def mark_of(contents: Sequence[str]) -> str:
    """
    The mark of the fences around some texts: it looks random, is the same for the same texts, and is in none of them.

    Args:
        contents (`Sequence[str]`):
            All texts that are fenced in one message, neutralised.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    parts = [f"{len(content.encode())}:{content}" for content in contents]
    while any(digest(parts)[:MARK_LENGTH] in content.lower() for content in contents):
        parts.append("again")
    return digest(parts)[:MARK_LENGTH]


def fenced(name: str, content: str, mark: str) -> str:
    """
    A text between the two lines that fence it.

    Args:
        name (`str`):
            What the text is, such as `"ANSWER 1"`.
        content (`str`):
            The text, neutralised.
        mark (`str`):
            The mark of [`mark_of`].

    Returns:
        `str`
    """
    return f"<<<{name} | {mark}>>>\n{content}\n<<<END OF {name} | {mark}>>>"


def fenced_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """
    All that is fenced in some chat messages.

    Args:
        messages (`Sequence[Mapping]`):
            Chat messages.

    Returns:
        `list[str]`: the texts, in order.
    """
    found = []
    for message in messages:
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        found += [match[3] for text in texts for match in _FENCED.finditer(text)]
    return found
