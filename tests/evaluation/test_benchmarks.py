"""Adapters of benchmarks: every field of the sample rows, in every layout, and every reason why a row is refused."""

import base64
import json

import pytest

from tests.data.fixtures_as_rows import fixture
from tests.data.source_rows import IMAGE, VIDEO, changed, expected, message, path, results, user
from trl_dt2it.data.rows import content_group
from trl_dt2it.evaluation.benchmarks.benchmark import pair_identity
from trl_dt2it.evaluation.benchmarks.mm_rlhf_rewardbench import category_of, mm_rlhf_rewardbench
from trl_dt2it.evaluation.benchmarks.mmrb2 import mmrb2
from trl_dt2it.evaluation.benchmarks.multimodal_rewardbench import group_of as mm_group
from trl_dt2it.evaluation.benchmarks.multimodal_rewardbench import multimodal_rewardbench
from trl_dt2it.evaluation.benchmarks.omni_rewardbench import t2i, ti2t
from trl_dt2it.evaluation.benchmarks.vl_rewardbench import group_of, vl_rewardbench


DESCRIBE = "Describe this image in detail."
RED, DOGS = "A red square.", "A red square and two dogs."


def benchmark_row(question, chosen, rejected, images=(), *, name, category=None, group=None, **kwargs):
    row = expected(
        user(*[IMAGE] * len(images), *[VIDEO] * len(kwargs.get("videos", ())), question),
        *(chosen, rejected, images),
        source_id=name,
        **kwargs,
    )
    row["pair_id"] = pair_identity(name, question, chosen, rejected)
    return row | ({} if category is None else {"category": category}) | ({} if group is None else {"group_id": group})


# VL-RewardBench.


def test_vl_rewardbench():
    groups = ["general", "general", *["hallucination"] * 3, *["reasoning"] * 3]
    for row, group in zip(fixture("vl_rewardbench"), groups, strict=True):
        answers = (DOGS, RED) if row["human_ranking"] == [1, 0] else (RED, DOGS)
        wanted = benchmark_row(DESCRIBE, *answers, [row["image"]], name=row["id"], category=group)
        assert results(vl_rewardbench, row) == [wanted]
    assert fixture("vl_rewardbench")[1]["human_ranking"] == [1, 0]


def test_vl_rewardbench_as_r1_reward_has_it():
    row = fixture("vl_rewardbench")[1]
    chosen, rejected = reversed(row["response"])
    line = {"id": row["id"], "image": row["image"], "prompt": row["query"], "chosen": chosen, "rejected": rejected}
    assert results(vl_rewardbench, line) == results(vl_rewardbench, row)


def test_vl_rewardbench_as_vlmevalkit_has_it():
    row = fixture("vl_rewardbench")[1]
    content = row["image"]["bytes"]
    line = {
        "index": 7,
        "question": f"<image>\n{DESCRIBE}",
        "image": base64.b64encode(content).decode(),
        "response": str(row["response"]),  # as Python prints a list
        "answer": "[1, 0]",
        "category": "povid",
    }
    image = {"bytes": content, "path": None}
    wanted = benchmark_row(DESCRIBE, DOGS, RED, [image], name="7", category="hallucination")
    assert results(vl_rewardbench, line) == [wanted]
    assert results(vl_rewardbench, line | {"response": json.dumps(row["response"]), "answer": [1, 0]}) == [wanted]
    (with_path,) = results(vl_rewardbench, line | {"image": "abcd"})  # which could be base64, too
    assert with_path["images"] == [path("abcd")]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("RLAIF-V-233", "hallucination"),
        ("RLHF-V_1", "hallucination"),
        ("hallucination_pair-9", "hallucination"),
        ("wildvision-battle-1", "general"),
        ("jailbreak_3", "general"),
        ("svit", "general"),
        ("politics-2", "general"),
        ("LRVInstruction-4", "general"),
        ("mathverse_2633", "reasoning"),
        ("mmmu-validation", "reasoning"),
    ],
)
def test_the_group_of_a_row_follows_from_its_id(name, group):
    assert group_of({"id": name}) == group
    assert group_of({"id": name, "category": "general"}) == group  # as before POVID was counted right
    assert group_of({"category": group}) == group


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": None}, "missing_column"),
        ({"response": ["One."]}, "missing_column"),
        ({"response": ["One.", None]}, "missing_column"),
        ({"response": "One."}, "missing_column"),
        ({"human_ranking": [0, 0]}, "tie"),
        ({"human_ranking": [1, 2]}, "unparsed_verdict"),
        ({"human_ranking": ...}, "unparsed_verdict"),
        ({"image": None}, "image_missing"),
    ],
)
def test_vl_rewardbench_refuses(change, reason):
    assert results(vl_rewardbench, changed(fixture("vl_rewardbench")[0], change)) == [reason]


def test_the_identity_is_of_the_question_and_both_answers_in_their_order():
    row = fixture("vl_rewardbench")[0]
    ids = [
        results(vl_rewardbench, row | change)[0]["pair_id"]
        for change in (
            {},
            {"image": {"bytes": b"other", "path": None}, "judge": "nobody"},
            {"id": "wildvision-battle-13"},
            {"query": "What?"},
            {"response": ["A red square!", DOGS]},
            {"human_ranking": [1, 0]},
        )
    ]
    assert ids[0] == ids[1] and len(set(ids)) == 5
    assert ids[0].startswith("wildvision-battle-12-")


# Multimodal RewardBench.


def test_multimodal_rewardbench():
    groups = ["correctness", "preference", "knowledge", "math", "coding", "safety", "vqa"]
    for row, group in zip(fixture("multimodal_rewardbench"), groups, strict=True):
        answers = (RED, "Two dogs.") if row["Better"] == "Output1" else ("Two dogs.", RED)
        wanted = benchmark_row("What is shown?", *answers, [row["Image"]], name=row["ID"], category=group)
        assert results(multimodal_rewardbench, row) == [wanted]
        hub = changed(row, {"Image": ..., "image": {"bytes": b"picture", "path": None}})
        (copy,) = results(multimodal_rewardbench, hub)
        assert copy["images"] == [hub["image"]] and copy["category"] == group and copy["pair_id"] == wanted["pair_id"]


def test_a_line_of_a_judge_s_answers_is_the_row_that_it_is_about():
    (answer,) = fixture("multimodal_rewardbench_answers")
    assert results(multimodal_rewardbench, answer) == results(multimodal_rewardbench, answer["Meta"])
    assert results(multimodal_rewardbench, answer)[0]["category"] == "preference"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Text": None}, "missing_column"),
        ({"Output1": None}, "missing_column"),
        ({"Better": "A"}, "unparsed_verdict"),
        ({"Category": "music"}, "missing_column"),
        ({"Image": ""}, "image_missing"),
    ],
)
def test_multimodal_rewardbench_refuses(change, reason):
    assert results(multimodal_rewardbench, changed(fixture("multimodal_rewardbench")[0], change)) == [reason]


def test_reasoning_is_parted_by_id_or_by_folder():
    for row, group in (
        ({"ID": "MathVista_1"}, "math"),
        ({"ID": "emma_1"}, "coding"),
        ({"image_path": "images/mathvista/1.png"}, "math"),
        ({"image_path": "images/EMMA-Coding/1.png"}, "coding"),
        ({"image_path": "images/image2struct/1.png"}, "coding"),
        ({"ID": "x", "Image": "images/mathvista/1.png"}, "math"),
    ):
        assert mm_group({"category": "reasoning", **row}) == group


# MM-RLHF-RewardBench.


def test_mm_rlhf_rewardbench():
    for row in fixture("mm_rlhf_rewardbench"):
        media = {"images": [row["image"]]} if "image" in row else {"images": [], "videos": [row["video"]]}
        wanted = benchmark_row(
            "What is shown?",
            *(row["chosen"], row["rejected"], media.pop("images")),
            name=row["id"],
            category=(row.get("image") or row["video"]).split("/")[0],
            group=row["id"],
            **media,
        )
        assert results(mm_rlhf_rewardbench, row) == [wanted]


def test_a_video_may_be_its_frames():
    row = fixture("mm_rlhf_rewardbench")[5]
    frames = [path("a.png"), {"bytes": b"b", "path": None}]
    (pair,) = results(mm_rlhf_rewardbench, row | {"video": frames})
    assert pair["videos"] == [frames] and pair["category"] == "video" and pair["images"] == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "missing_column"),
        ({"rejected": None}, "missing_column"),
        ({"image": None}, "image_missing"),
        ({"video": "video/v1"}, "image_type"),
        ({"image": ..., "video": 3}, "video_type"),
        ({"image": "a.png"}, "missing_column"),
    ],
)
def test_mm_rlhf_rewardbench_refuses(change, reason):
    assert results(mm_rlhf_rewardbench, changed(fixture("mm_rlhf_rewardbench")[0], change)) == [reason]


def test_the_category_is_a_folder_of_the_path_before_any_part_of_it():
    assert category_of({"image": "mcq/a.png"}) == "mcq"
    assert category_of({"image": "/data/long-term/images/short/a.png"}) == "short"
    assert category_of({"video": "video/v_long-walk"}) == "video"
    assert category_of({"image": "bench_safety_1.png"}) == "safety"


# Text to image, and criteria.


def t2i_row(caption, chosen, rejected, *, name, pair_id):
    return {
        "caption": caption,
        "chosen_image": path(chosen) if isinstance(chosen, str) else chosen,
        "rejected_image": path(rejected) if isinstance(rejected, str) else rejected,
        "strength": None,
        "group_id": content_group(caption, [], []),
        "source_id": name,
        "pair_id": pair_id,
    }


def pairs_of(adapter, row, **options):
    return list(adapter(row, **options))


def test_mmrb2_in_both_layouts():
    first, edit = fixture("mmrb2_hf")
    wanted = t2i_row(
        "a red square",
        first["response_a_images"][0],
        first["response_b_images"][0],
        name="t2i_0",
        pair_id=pair_identity("t2i_0", "a red square", "A"),
    )
    assert pairs_of(mmrb2, first) == [wanted]
    (other,) = pairs_of(mmrb2, first | {"chosen": "b"})
    assert (other["chosen_image"], other["rejected_image"]) == (wanted["rejected_image"], wanted["chosen_image"])
    assert other["pair_id"] != wanted["pair_id"]
    (local,) = fixture("mmrb2_local")["pairs"]
    files = {"chosen_image": path("images/a.png"), "rejected_image": path("images/b.png")}
    assert pairs_of(mmrb2, local) == [wanted | files]
    assert "only pairs of the text-to-image part" in message(mmrb2, edit)
    assert '"A" or "B"' in message(mmrb2, first | {"chosen": "C"})
    assert "`response_b`" in message(mmrb2, changed(local, {"response_b": ...}))
    # The authors' repository has the answers without the prompts, which a script of theirs fetches.
    assert "t2i.json" in message(mmrb2, changed(local, {"prompt_content": ...}))
    assert "`response_a`" in message(mmrb2, changed(local, {"response_a": ...}))


def test_omni_rewardbench():
    first, tie = fixture("omnirewardbench_ti2t")
    question = "What is shown?\n\nPrefer the accurate one."
    assert results(ti2t, first) == [benchmark_row(question, RED, "A dog.", [first["image"]], name="ti2t_0")]
    swapped = results(ti2t, first | {"criteria_preference": "response2"}, criteria=False)
    assert swapped == [benchmark_row("What is shown?", "A dog.", RED, [first["image"]], name="ti2t_0")]
    assert results(ti2t, tie) == ["tie"]
    assert results(ti2t, first | {"criteria_preference": "both"}) == ["unparsed_verdict"]

    (row,) = fixture("omnirewardbench_t2i")
    caption = "a red square\n\nColour"
    images = (row["response1"], row["response2"])
    wanted = t2i_row(caption, *images, name="t2i_0", pair_id=pair_identity("t2i_0", caption, "response1"))
    assert pairs_of(t2i, row) == [wanted]
    (by_path,) = pairs_of(t2i, changed(row, {"response1": None, "response2": ...}))
    assert (by_path["chosen_image"], by_path["rejected_image"]) == (path("a.png"), path("b.png"))
