"""Small pairs of every kind, whose images are files kept as text: no release of Pillow compresses them another way."""

import base64

from datasets import Dataset

from trl_dt2it.data import reformulate_t2i


PNG = [
    base64.b64decode(text)
    for text in (
        "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKklEQVR42mM4ISdHU8QwasGoBaMWjFowasGoBaMWjFowasGoBaMWDBULACXLED1gHZEpAAAAAElFTkSuQmCC",
        "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKklEQVR42mOQkztBU8QwasGoBaMWjFowasGoBaMWjFowasGoBaMWDBULANVxED1nz71CAAAAAElFTkSuQmCC",
        "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKklEQVR42mOQW2BDU8QwasGoBaMWjFowasGoBaMWjFowasGoBaMWDBULAHdh6C4jQkXkAAAAAElFTkSuQmCC",
    )
]
CAPTIONS = ("a red square", "一个红色的方块")


def image(index: int) -> dict:
    return {"bytes": PNG[index], "path": None}


def say(role: str, *blocks) -> dict:
    """A message with a block for each text, and for each `None` one of an image."""
    content = [{"type": "image"} if one is None else {"type": "text", "text": one} for one in blocks]
    return {"role": role, "content": content}


def t2i_pairs() -> Dataset:
    return Dataset.from_list(
        [
            {"caption": caption, "chosen_image": image(index), "rejected_image": image(index + 1), "source": "drawn"}
            for index, caption in enumerate(CAPTIONS)
        ]
    )


def datasets() -> dict[str, Dataset]:
    """Data sets by the kind of their pairs."""
    answers = {"chosen": [say("assistant", "A red one.")], "rejected": [say("assistant", "A blue one.")]}
    asked = [say("user", None, "Which square?")]
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    kinds = {
        "strings": [{"prompt": "Which?", "chosen": "Red.", "rejected": "Blue."}],
        "string messages": [
            {"prompt": [{"role": "user", "content": "Which?"}]}
            | {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "A"), ("rejected", "B"))}
        ],
        "one image": [{"prompt": asked, **answers, "images": [image(0)], "strength": 2.0, "source": "a"}],
        "image column": [{"prompt": asked, **answers, "image": image(0)}],
        "image path": [{"prompt": asked, **answers, "images": [{"bytes": None, "path": "red.png"}]}],
        "whole conversations": [
            {side: [say("system", "Be brief."), *asked, *answer] for side, answer in answers.items()}
            | {"images": [image(0)]}
        ],
        "two images": [
            {"prompt": [say("user", None, None, "Which?")], **answers, "images": [image(0), image(1)]},
        ],
        "video": [{"prompt": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]}
                  | answers | {"videos": [{"frames": PNG[:2], "fps": 2.0}]}],
        "tools": [{"prompt": asked, **answers, "images": [image(2)], "tools": [tool]}],
        "template options": [{"prompt": asked, **answers, "chat_template_kwargs": {"enable_thinking": False}}],
        "named, some twice": [
            {"prompt": f"{name}?", "chosen": "Yes.", "rejected": "No.", "pair_id": name} for name in ("x", "x", None)
        ],
        "same content": [{"prompt": "Which?", "chosen": "Red.", "rejected": "Blue."}] * 2,
    }  # fmt: skip
    pairs = t2i_pairs()
    return {
        **{kind: Dataset.from_list(rows) for kind, rows in kinds.items()},
        "text to image": pairs,
        "reformulated": reformulate_t2i(pairs),
        "reformulated in both orders": reformulate_t2i(pairs, both_orders=True),
    }
