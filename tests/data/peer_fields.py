"""Every field that ms-swift and LLaMA-Factory document, in a row of its own, and what becomes of it.

A field is read (the canonical row that it makes), kept as a column, or refused by a message that names it. The tables
in docs/migrating.md list the same fields.
"""

import base64

from tests.data.source_rows import IMAGE, expected, say, says, user
from tests.families import example_images
from tests.rows import png


PICTURE = png(example_images(1)[0])
ENCODED = base64.b64encode(PICTURE).decode()
BYTES = {"bytes": PICTURE, "path": None}
QUESTION, GOOD, BAD = user(IMAGE, "What is this?"), "A kitten.", "A puppy."
REFUSED, KEPT = "refused", "kept"
TALK = says("<image>What is this?", GOOD)
WANTED = expected(QUESTION, GOOD, BAD, ["a.png"])
PLAIN = expected(user("What is this?"), GOOD, BAD)
BEFORE = [user("Hi"), say("assistant", "Hello")]


def swift(**change):
    """A row of ms-swift with other fields; `...` removes one."""
    row = {"messages": TALK, "rejected_response": BAD, "images": ["a.png"], **change}
    return {field: value for field, value in row.items() if value is not ...}


def asked(**change):
    """A row of ms-swift in its older layout."""
    return swift(**{"messages": ..., "query": "<image>What is this?", "response": GOOD, **change})


def blocks(*content):
    return [{"role": "user", "content": list(content)}, TALK[1]]


QUESTION_TEXT = {"type": "text", "text": "What is this?"}
TOOL_TURNS = {
    role: [TALK[0], {"role": role, "content": '{"name": "look"}'}, TALK[1]]
    for role in ("tool_call", "tool_response", "tool", "function_call", "observation")
}
GROUNDED = says("<image>Where is the <ref-object>?", "At <bbox>.")
BOX = {"ref": ["sheep"], "bbox": [[0.1, 0.25, 0.5, 0.75]], "bbox_type": "norm1"}

RESPONSES = "answer output targets target answer_key answers solution text completion content"
PARTS = ("messages", "images", "videos", "audios", "tools", "objects")

MS_SWIFT = {
    "messages": [(swift(), WANTED), (swift(messages=str(TALK)), WANTED)],
    "conversation": [
        (swift(messages=..., conversation=[{"human": "<image>What is this?", "assistant": GOOD}]), WANTED)
    ],
    "conversations": [
        (
            swift(
                messages=...,
                conversations=[{"from": "human", "value": TALK[0]["content"]}, {"from": "gpt", "value": GOOD}],
            ),
            WANTED,
        )
    ],
    "system": [(swift(system="Be brief."), expected([say("system", "Be brief."), QUESTION], GOOD, BAD, ["a.png"]))],
    "system_prompt": [
        (swift(system_prompt="Be brief."), expected([say("system", "Be brief."), QUESTION], GOOD, BAD, ["a.png"])),
        (swift(system="Be brief.", system_prompt="Be long."), REFUSED),
    ],
    "query": [(asked(), WANTED), (asked(prompt="Another?", input=""), WANTED)],
    **{
        name: [(asked(**{"query": ..., name: "<image>What is this?"}), WANTED)]
        for name in ("prompt", "question", "problem")
    },
    "instruction": [
        (
            asked(query=..., instruction="<image>What is", input="this?"),
            expected(user(IMAGE, "What is\nthis?"), GOOD, BAD, ["a.png"]),
        ),
        (asked(query=..., response=..., instruction="<image>What is this?", input="", output=GOOD), WANTED),
        (asked(query=..., instruction="q", question="r"), REFUSED),
    ],
    "input": [(asked(query=..., input="<image>What is this?"), WANTED)],
    "response": [
        (asked(), WANTED),
        (asked(solution="4", text="a page"), WANTED),
        (asked(response=[GOOD, BAD]), REFUSED),
        (asked(response=..., answer=GOOD, solution="4"), REFUSED),
    ],
    **{
        name: [(asked(**{"response": ..., name: GOOD}), WANTED)]
        for name in ("answer", "output", "targets", "target", "answer_key", "answers", "solution")
    },
    **{name: [(asked(**{"response": ..., name: GOOD}), WANTED)] for name in ("text", "completion", "content")},
    "history": [
        (asked(history=history), expected([*BEFORE, QUESTION], GOOD, BAD, ["a.png"]))
        for history in ([["Hi", "Hello"]], '[["Hi", "Hello"]]', "[['Hi', 'Hello']]")
    ],
    "rejected_response": [
        (swift(), WANTED),
        (swift(rejected_response=[{"role": "assistant", "content": BAD}]), WANTED),
        (swift(rejected_response=[{"role": "assistant", "content": [{"type": "text", "text": BAD}]}]), WANTED),
        (swift(rejected_response=says("q", BAD)), REFUSED),
        (swift(rejected_response=[{"role": "user", "content": BAD}]), REFUSED),
        (swift(rejected_response=f"<image>{BAD}"), REFUSED),
        (
            swift(rejected_response='[{"bbox_2d": [1, 2]}]'),
            expected(QUESTION, GOOD, '[{"bbox_2d": [1, 2]}]', ["a.png"]),
        ),
    ],
    "rejected_messages": [
        (swift(rejected_response=..., rejected_messages=[TALK[0], {"role": "assistant", "content": BAD}]), WANTED),
        (swift(rejected_messages=[TALK[0], {"role": "assistant", "content": BAD}]), WANTED),
        (swift(rejected_messages=[TALK[0], {"role": "assistant", "content": "A cow."}]), REFUSED),
        (swift(rejected_response=..., rejected_messages=says("Another?", BAD)), REFUSED),
    ],
    "images": [
        (swift(), WANTED),
        (swift(images="a.png"), WANTED),
        (swift(images=[{"bytes": None, "path": "a.png"}]), WANTED),
        (swift(images=[{"url": "a.png"}]), WANTED),
        *(
            (swift(images=[image]), expected(QUESTION, GOOD, BAD, [BYTES]))
            for image in (BYTES, {"bytes": ENCODED, "path": None}, f"data:image/png;base64,{ENCODED}", ENCODED)
        ),
        (swift(images=["data:image/png;base64,AAAA"]), REFUSED),
        (swift(images=[{"bytes": "no base64!", "path": None}]), REFUSED),
    ],
    "image": [
        (swift(images=..., image="a.png"), WANTED),
        (swift(images=..., image=f"data:image/png;base64,{ENCODED}"), expected(QUESTION, GOOD, BAD, [BYTES])),
        (swift(image="a.png"), WANTED),
        (swift(image="b.png"), REFUSED),
    ],
    "rejected_images": [
        (swift(rejected_images=["a.png"]), WANTED),
        (swift(rejected_images=["b.png"]), REFUSED),
        (swift(rejected_images=["b.png"], rejected_response=...), REFUSED),
        (swift(rejected_images=["a.png"], rejected_response=...), REFUSED),
    ],
    **{
        name: [(swift(**{name: ["x"]}), REFUSED), (swift(**{name: "x"}), REFUSED), (swift(**{name: [None]}), WANTED)]
        for kind in ("video", "audio")
        for name in (kind, f"{kind}s", f"rejected_{kind}s")
    },
    "ref_audios": [(swift(ref_audios=["a.wav"]), REFUSED)],
    "audio_codes": [(swift(audio_codes=[[1, 2]]), REFUSED)],
    "<video>": [
        (swift(messages=says("<image><video>q", GOOD)), REFUSED),
        (swift(messages=says("<image>q", "<video>")), REFUSED),
    ],
    "<audio>": [
        (swift(messages=says("<image><audio>q", GOOD)), REFUSED),
        (swift(rejected_response="<audio>"), REFUSED),
    ],
    "<image>": [
        (swift(messages=says("q", "<image>", "<image>q", GOOD)), REFUSED),
        (swift(messages=says("q", "An <image>")), REFUSED),
    ],
    "<img>": [(swift(messages=says("<img>a.png</img>q", GOOD), images=...), REFUSED)],
    "objects": [
        (
            swift(messages=GROUNDED, objects=BOX),
            expected(user(IMAGE, "Where is the sheep?"), "At [(100,250),(500,750)].", BAD, ["a.png"]),
        ),
        (
            swift(messages=GROUNDED, objects={**BOX, "bbox": [[0.5, 0.75, 0.1, 0.25]]}, rejected_response="By <bbox>"),
            expected(
                user(IMAGE, "Where is the sheep?"),
                "At [(100,250),(500,750)].",
                "By [(100,250),(500,750)]",
                ["a.png"],
            ),
        ),
        (
            swift(
                messages=says("<image>Click.", "<bbox>"),
                objects={"ref": [], "bbox": [[0.3, 0.7]], "bbox_type": "norm1"},
            ),
            expected(user(IMAGE, "Click."), "[(300,700)]", BAD, ["a.png"]),
        ),
        (
            swift(messages=says("<image>Is it a <ref-object>?", "Yes."), objects={"ref": ["dog"]}),
            expected(user(IMAGE, "Is it a dog?"), "Yes.", BAD, ["a.png"]),
        ),
        (swift(objects={"ref": [], "bbox": []}), WANTED),
        (swift(messages=GROUNDED, objects={"ref": ["sheep"], "bbox": [[9.5, 16, 13, 21]]}), REFUSED),  # pixels
        (swift(messages=GROUNDED, objects={**BOX, "ref": []}), REFUSED),
        (swift(messages=GROUNDED, objects={**BOX, "bbox": [[0.1, 2, 3, 4]]}), REFUSED),
        (swift(objects=BOX), REFUSED),  # no placeholder that it fills
    ],
    "rejected_objects": [
        (
            swift(
                messages=GROUNDED,
                objects=BOX,
                rejected_objects={**BOX, "bbox": [[0, 0, 1, 1]]},
                rejected_response="At <bbox>.",
            ),
            expected(
                user(IMAGE, "Where is the sheep?"), "At [(100,250),(500,750)].", "At [(0,0),(1000,1000)].", ["a.png"]
            ),
        ),
        (
            swift(
                messages=GROUNDED,
                objects=BOX,
                rejected_objects={**BOX, "ref": ["goat"]},
                rejected_response="At <bbox>.",
            ),
            REFUSED,
        ),
    ],
    "tools": [
        (swift(tools='[{"name": "look"}]'), REFUSED),
        (swift(tools=[{"name": "look"}]), REFUSED),
        (swift(tools="[]"), WANTED),
        (swift(tools=None), WANTED),
    ],
    "rejected_tools": [(swift(rejected_tools=[{"name": "look"}]), REFUSED)],
    **{role: [(swift(messages=turns), REFUSED)] for role, turns in TOOL_TURNS.items()},
    "tool_calls": [(swift(messages=[TALK[0], {**TALK[1], "tool_calls": [{"function": {"name": "look"}}]}]), REFUSED)],
    "tool_use": [(swift(messages=[TALK[0], {"role": "assistant", "content": [{"type": "tool_use"}]}]), REFUSED)],
    "tool_result": [(swift(messages=blocks({"type": "tool_result"}, QUESTION_TEXT)), REFUSED)],
    "image_url": [
        (swift(images=..., messages=blocks({"type": "image_url", "image_url": url}, QUESTION_TEXT)), wanted)
        for url, wanted in (
            ({"url": "a.png"}, WANTED),
            ("a.png", WANTED),
            ({"url": f"data:image/png;base64,{ENCODED}"}, expected(QUESTION, GOOD, BAD, [BYTES])),
        )
    ],
    "source": [
        (swift(images=..., messages=blocks({"type": "image", "source": source}, QUESTION_TEXT)), wanted)
        for source, wanted in (
            ({"type": "url", "url": "a.png"}, WANTED),
            ({"type": "base64", "media_type": "image/png", "data": ENCODED}, expected(QUESTION, GOOD, BAD, [BYTES])),
        )
    ],
    "margin": [
        (swift(margin=0.5), expected(QUESTION, GOOD, BAD, ["a.png"], strength=0.5)),
        (swift(margin=-1), REFUSED),
    ],
    "loss": [(swift(messages=[TALK[0], {**TALK[1], "loss": False}]), WANTED)],
    "loss_scale": [(swift(messages=[TALK[0], {**TALK[1], "loss_scale": 2.0}]), WANTED)],
    "chat_template_kwargs": [
        (swift(chat_template_kwargs={"max_pixels": 1048576}), REFUSED),
        (swift(chat_template_kwargs="{}"), REFUSED),
        (swift(chat_template_kwargs={"max_pixels": None}), WANTED),
    ],
    **{
        f"{side}_{part}": [(swift(**{f"{side}_{part}": [["x"]]}), REFUSED)]
        for side in ("positive", "negative")
        for part in PARTS
    },
    **{name: [(swift(**{name: "mine"}), KEPT)] for name in ("channel", "teacher_prompt", "id")},
    "label": [(swift(label="mine"), KEPT), (swift(rejected_response=..., label=True), REFUSED)],
}


def factory(**change):
    """A row of LLaMA-Factory with other fields; `...` removes one."""
    row = {
        "conversations": [{"from": "human", "value": "<image>What is this?"}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
        "images": ["a.png"],
        **change,
    }
    return {field: value for field, value in row.items() if value is not ...}


def alpaca(**change):
    return factory(
        **{"conversations": ..., "instruction": "<image>What is this?", "chosen": GOOD, "rejected": BAD} | change
    )


def whole(answer, *, first=None, **extra):
    """A conversation of LLaMA-Factory's main branch."""
    first = first or {"type": "image_url", "value": "a.png"}
    question = [first, {"type": "text", "value": "What is this?"}]
    answers = [{"type": "text", "value": answer}]
    return [{"role": "user", "content": question, **extra}, {"role": "assistant", "content": answers, **extra}]


def pair(**change):
    row = {"chosen_messages": whole(GOOD), "rejected_messages": whole(BAD), **change}
    return {field: value for field, value in row.items() if value is not ...}


LLAMAFACTORY = {
    "conversations": [(factory(), WANTED)],
    "messages": [
        (factory(conversations=..., messages=TALK[:1]), WANTED),
        (alpaca(messages=[{"role": "user", "content": "Another?"}]), WANTED),
    ],
    "instruction": [(alpaca(), WANTED)],
    "input": [(alpaca(input="Be brief."), expected(user(IMAGE, "What is this?\nBe brief."), GOOD, BAD, ["a.png"]))],
    "history": [
        (alpaca(history=[["Hi", "Hello"]]), expected([*BEFORE, QUESTION], GOOD, BAD, ["a.png"])),
        (alpaca(history=[["Hi", None]]), REFUSED),
    ],
    "system": [(factory(system="Be brief."), expected([say("system", "Be brief."), QUESTION], GOOD, BAD, ["a.png"]))],
    "chosen": [
        (factory(chosen=GOOD), WANTED),
        (factory(chosen=[{"role": "assistant", "content": GOOD}]), WANTED),
        (
            factory(conversations=..., chosen=TALK, rejected=[TALK[0], {"role": "assistant", "content": BAD}]),
            WANTED,
        ),
        (factory(chosen={"from": "function_call", "value": "{}"}), REFUSED),
        (factory(chosen={"from": "human", "value": GOOD}), REFUSED),
        (factory(chosen={"from": "gpt", "value": "<image>\n" * 8}), REFUSED),
        (factory(chosen="a.png", rejected="b.png"), REFUSED),
    ],
    "rejected": [
        (factory(rejected=BAD), WANTED),
        (factory(rejected={"from": "observation", "value": "{}"}), REFUSED),
        (factory(rejected={"from": "gpt", "value": "An <image>"}), REFUSED),
        (factory(rejected={"from": "gpt", "value": BAD, "tool_calls": [{"name": "look"}]}), REFUSED),
        (factory(rejected={"bytes": PICTURE, "path": None}), REFUSED),
    ],
    "chosen_messages": [
        (pair(), WANTED),
        (
            pair(
                chosen_messages=[{"role": "system", "content": "Be brief."}, *whole(GOOD)],
                rejected_messages=[{"role": "system", "content": "Be brief."}, *whole(BAD)],
            ),
            expected([say("system", "Be brief."), QUESTION], GOOD, BAD, ["a.png"]),
        ),
        (pair(chosen_messages=whole(GOOD, first={"type": "image_url", "value": "b.png"})), REFUSED),
        (pair(chosen_messages=whole(GOOD, first={"type": "video_url", "value": "b.mp4"})), REFUSED),
        (
            pair(
                chosen_messages=[
                    *whole(GOOD)[:1],
                    {"role": "assistant", "content": [{"type": "reasoning", "value": "x"}]},
                ]
            ),
            REFUSED,
        ),
        (
            pair(
                chosen_messages=[
                    *whole(GOOD)[:1],
                    {"role": "assistant", "content": [{"type": "tool_call", "value": "x"}]},
                ]
            ),
            REFUSED,
        ),
    ],
    "rejected_messages": [
        (pair(), WANTED),
        (pair(rejected_messages=...), REFUSED),
        (pair(rejected_messages=whole(BAD, first={"type": "audio_url", "value": "b.wav"})), REFUSED),
    ],
    "loss_weight": [(pair(chosen_messages=whole(GOOD, loss_weight=1.0)), WANTED)],
    "images": [
        (factory(), WANTED),
        (factory(images=[BYTES]), expected(QUESTION, GOOD, BAD, [BYTES])),
        (pair(images=["b.png"]), REFUSED),
    ],
    "image": [(factory(images=..., image="a.png"), WANTED), (factory(image="b.png"), REFUSED)],
    **{
        name: [(factory(**{name: ["x"]}), REFUSED), (factory(**{name: []}), WANTED)]
        for name in ("videos", "audios", "video", "audio")
    },
    "<video>": [
        (factory(conversations=[{"from": "human", "value": "<video>q"}], images=[]), REFUSED),
        (factory(rejected="<video>"), REFUSED),
    ],
    "<audio>": [(factory(conversations=[{"from": "human", "value": "<audio>q"}], images=[]), REFUSED)],
    "<image>": [
        (factory(chosen="<image>"), REFUSED),
        (
            factory(
                conversations=[
                    {"from": "human", "value": "Draw."},
                    {"from": "gpt", "value": "<image>"},
                    {"from": "human", "value": "Again."},
                ]
            ),
            REFUSED,
        ),
    ],
    "tools": [(factory(tools='[{"name": "look"}]'), REFUSED), (factory(tools=""), WANTED)],
    "kto_tag": [(factory(kto_tag=False), REFUSED), (factory(kto_tag=None), WANTED)],
    **{
        role: [(factory(conversations=[{"from": "human", "value": "q"}, {"from": role, "value": "{}"}]), REFUSED)]
        for role in ("function_call", "observation")
    },
    "output": [
        (alpaca(chosen=..., rejected=..., output=[GOOD, BAD]), WANTED),
        (alpaca(chosen=..., rejected=..., output=GOOD), REFUSED),
        (factory(output="mine"), KEPT),
    ],
    **{name: [(factory(**{name: "mine"}), KEPT)] for name in ("extra_info", "id")},
}
