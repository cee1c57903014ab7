"""All adapters together: TRL's own code takes what they give, and damaged rows make them say so, never crash."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor
from trl import prepare_multimodal_messages
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from tests.data.fixtures_as_rows import fixture
from tests.families import family_dir
from trl_dt2it.data import RowError, check_row
from trl_dt2it.data.messages import FEATURES
from trl_dt2it.data.sources.formats import llamafactory, llava_human_preference, ms_swift, povid, wildvision_battle
from trl_dt2it.data.sources.judged import (
    llava_critic,
    mm_rlhf,
    mmpr,
    r1_reward_rl,
    rlaif_v,
    rlhf_v,
    spa_vl,
    vlfeedback,
)
from trl_dt2it.data.sources.trl_rows import columns, trl


COLUMNS = {"question": "question", "chosen": "chosen", "rejected": "rejected", "images": "image", "strength": "idx"}
ADAPTERS = {
    "rlaif_v": (rlaif_v, {}),
    "rlhf_v": (rlhf_v, {}),
    "rlhf_v_llamafactory": (rlhf_v, {}),
    "vlfeedback_hf": (vlfeedback, {}),
    "vlfeedback_raw": (vlfeedback, {"aspects": ["Helpfulness"]}),
    "povid": (povid, {}),
    "wildvision_battle": (wildvision_battle, {}),
    "mm_rlhf_dpo_pairs": (mm_rlhf, {}),
    "spa_vl": (spa_vl, {}),
    "mmpr": (mmpr, {}),
    "llava_critic_pairwise": (llava_critic, {}),
    "llava_human_preference_10k": (llava_human_preference, {}),
    "r1_reward_rl": (r1_reward_rl, {}),
    "trl_canonical": (trl, {}),
    "rlaif_v_formatted": (trl, {}),
    "llamafactory_sharegpt": (llamafactory, {}),
    "ms_swift_rlhf": (ms_swift, {}),
    "table": (columns, COLUMNS),
}


def raw_rows(name):
    return fixture("rlaif_v" if name == "table" else name)


def good_rows(name):
    """The pairs of a fixture, as a loader would name them."""
    adapter, options = ADAPTERS[name]
    rows = []
    for raw in raw_rows(name):
        try:
            rows += [row for row in adapter(raw, **options) if not isinstance(row, RowError)]
        except RowError:
            pass
    return [{**row, "pair_id": f"{name}-{index}", "source": name} for index, row in enumerate(rows)]


def with_files(row, folder):
    """The row with a picture wherever it has a path."""
    for image in row["images"]:
        if image["bytes"] is None:
            file = folder / image["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (200, len(file.name), 0)).save(file, format="PNG")
            image["path"] = str(file)
    return row


def texts(messages):
    return [block["text"] for message in messages for block in message["content"] if block["type"] == "text"]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(family_dir("qwen3_vl"))


@pytest.mark.parametrize("name", ADAPTERS)
def test_trl_takes_the_rows_as_they_are(name, tmp_path, processor):
    made = [with_files(row, tmp_path) for row in good_rows(name) if "videos" not in row]
    assert made
    for row in made:
        check_row(row)
    rows = list(Dataset.from_list(made, features=FEATURES))
    for before, row in zip(made, rows, strict=True):
        assert {key: row[key] for key in FEATURES if key != "images"} == {
            key: before[key] for key in FEATURES if key != "images"
        }
        prompt = prepare_multimodal_messages(row["prompt"], images=row["images"])
        shown = [block["image"] for turn in prompt for block in turn["content"] if block["type"] == "image"]
        assert len(shown) == len(row["images"])
        assert all(image is given for image, given in zip(shown, row["images"], strict=True))
        without_images = [
            {**turn, "content": [{k: v for k, v in block.items() if k != "image"} for block in turn["content"]]}
            for turn in prompt
        ]
        assert without_images == before["prompt"]
        for side in ("chosen", "rejected"):
            assert prepare_multimodal_messages(row[side]) == before[side]

    batch = DataCollatorForVisionPreference(processor)(copy.deepcopy(rows))
    tokenizer = processor.tokenizer
    for index, (row, side) in enumerate([(row, side) for side in ("chosen", "rejected") for row in rows]):
        is_answer = batch["completion_mask"][index].bool()
        is_prompt = batch["attention_mask"][index].bool() & ~is_answer
        answer, prompt = (tokenizer.decode(batch["input_ids"][index][mask]) for mask in (is_answer, is_prompt))
        assert texts(row[side])[0] in answer
        assert all(text in prompt for text in texts(row["prompt"]))
        assert prompt.count("<|vision_start|>") == len(row["images"])
    pictures = [image for row in rows for image in row["images"]]
    if pictures:
        assert len(batch["image_grid_thw"]) == 2 * len(pictures)
        image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        merged = processor.image_processor.merge_size**2
        assert torch.sum(batch["input_ids"] == image_token) == torch.sum(batch["image_grid_thw"].prod(1)) // merged


def test_every_sample_row_gives_a_pair_or_a_reason():
    counts = {name: len(good_rows(name)) for name in ADAPTERS}
    one = ("rlhf_v", "rlhf_v_llamafactory", "povid", "wildvision_battle", "spa_vl", "llava_critic_pairwise")
    one += ("llava_human_preference_10k", "r1_reward_rl", "rlaif_v_formatted", "ms_swift_rlhf")
    assert counts == {
        **dict.fromkeys(one, 1),
        **{"rlaif_v": 2, "table": 2, "vlfeedback_hf": 2, "vlfeedback_raw": 2, "mm_rlhf_dpo_pairs": 2, "mmpr": 3},
        **{"trl_canonical": 4, "llamafactory_sharegpt": 3},
    }


# Damage.

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.sampled_from(
        ["", "<image>", "[]", "{}", "tie", "model_a", "human", "image", 10**400, "\ud800", "<answer>1</answer>"]
    ),
)
junk = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["from", "value", "role", "content", "type", "text", "bytes", "path", "frames", "fps", "x"]
            ),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=5,
)


def places(value, path=()):
    """All places in a nested value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def damaged(row, path, value, remove):
    parent = row
    for key in path[:-1]:
        parent = parent[key]
    if remove:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value


@pytest.mark.parametrize("name", ADAPTERS)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_damaged_rows_make_an_adapter_say_so(name, data):
    row = copy.deepcopy(data.draw(st.sampled_from(raw_rows(name))))
    if name in JSON and data.draw(st.booleans()):
        row[JSON[name]] = json.loads(row[JSON[name]])
    for extra in data.draw(st.lists(st.sampled_from(EXTRA), max_size=1)):
        row[extra] = data.draw(junk)
    for _ in range(data.draw(st.integers(1, 3))):
        if not (there := places(row)):
            break
        damaged(row, data.draw(st.sampled_from(there)), data.draw(junk), data.draw(st.booleans()))
    adapter, options = ADAPTERS[name]
    results = []
    try:
        results.extend(adapter(row, **options))
    except RowError as error:
        results.append(error)
    assert results  # no row goes without a word
    for result in results:
        if not isinstance(result, RowError):
            assert set(FEATURES) - {"pair_id", "source"} <= result.keys()
            if not isinstance((result.get("videos") or [[]])[0], str):  # a folder, which a loader replaces
                try:
                    check_row(result)
                except RowError:
                    pass


JSON = {"rlhf_v": "text", "r1_reward_rl": "message"}
# Columns that change what an adapter does, though the sample rows do not have them.
EXTRA = [
    *("videos", "image", "images", "img_path", "conversations", "is_tie", "tools", "margin", "strength", "weight"),
    *("system", "rejected_messages", "rejected_images", "history", "instruction", "id", "pair_id", "group_id"),
]
