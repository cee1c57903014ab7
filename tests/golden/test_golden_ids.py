"""Golden identities: content ids, names and contents of pairs of every kind, and the rows that sources become."""

import pytest
from datasets import Dataset

from tests.data.fixtures_as_rows import fixture
from trl_dt2it.curation import pair_contents, pair_ids
from trl_dt2it.data import SOURCES, RowError, content_id, load_preferences
from trl_dt2it.data.contents import source_fingerprint

from .golden import check
from .pairs_of_each_kind import CAPTIONS, PNG, datasets, image, say, t2i_pairs


def test_content_ids_of_rows_in_memory():
    text = [{"type": "text", "text": "A red one."}]
    rows = {
        "blocks": {"prompt": [say("user", None, "Which?")], "chosen": [say("assistant", "A")], "rejected": "B"},
        "bytes": {"prompt": "<", "chosen": "A", "rejected": "B", "images": [PNG[0]]},
        "path": {"prompt": "<", "chosen": "A", "rejected": "B", "images": ["red.png"]},
        "caption": {"caption": CAPTIONS[0], "chosen_image": PNG[0], "rejected_image": PNG[1]},
        "spaced caption": {"caption": f" {CAPTIONS[0]}\n", "chosen_image": image(0), "rejected_image": image(1)},
        "tool call": {
            "prompt": "Look.",
            "chosen": [{"role": "assistant", "content": text, "tool_calls": [{"function": {"name": "look"}}]}],
            "rejected": "B",
        },
    }
    check("content_ids", {kind: content_id(row) for kind, row in rows.items()})


def test_names_and_contents_of_pairs():
    found = {}
    for kind, dataset in datasets().items():
        if "chosen" not in dataset.column_names:  # only by a name of its own is such a pair known
            dataset = dataset.add_column("pair_id", [f"pair-{index}" for index in range(len(dataset))])
        contents = pair_contents(dataset).to_pydict()
        found[kind] = {**contents, "fingerprint": source_fingerprint(pair_ids(dataset))}
    check("pair_ids", found)


def test_columns_of_reformulated_pairs():
    rows = datasets()["reformulated in both orders"]
    values = [{name: value for name, value in row.items() if name != "images"} for row in rows]
    check("reformulated_t2i", {"features": {name: str(kind) for name, kind in rows.features.items()}, "rows": values})
    assert rows["t2i_caption"][::2] == t2i_pairs()["caption"][:]


# Sources whose sample rows have another name: of one pair a row, of groups that are ranked, of pairs of images.
SAMPLES = {
    "dt2it_t2i": "dt2it_t2i_input",
    "hpdv2": "hpdv2_train",
    "imagereward": "imagerewarddb",
    "imagereward_pairs": "imagerewarddb_pair",
    "llamafactory": "llamafactory_sharegpt",
    "llava_critic": "llava_critic_pairwise",
    "llava_human_preference": "llava_human_preference_10k",
    "llava_reward": "llava_reward_t2i",
    "mm_rlhf": "mm_rlhf_dpo_pairs",
    "ms_swift": "ms_swift_rlhf",
    "rapidata": "rapidata_image",
    "trl": "trl_canonical",
    "vlfeedback": "vlfeedback_hf",
}
ROWS = {
    "columns": [{"q": "Which?", "a": "Red.", "b": "Blue."}],
    "imagereward_rankings": [{"prompt": "a hat", "generations": ["a.png", "b.png", "c.png"], "ranking": [2, 1, 3]}],
    "t2i": [{"caption": "a hat", "chosen_image": "a.png", "rejected_image": "b.png"}],
}
OPTIONS = {"columns": {"question": "q", "chosen": "a", "rejected": "b"}}


def test_rows_out_of_sources():
    found = {}
    for name, source in SOURCES.items():
        rows = ROWS.get(name) or fixture(SAMPLES.get(name, name))
        groups = [list(rows)] if source.group_by else rows
        pairs = [pair for group in groups for pair in _pairs(source, group, OPTIONS.get(name, {}))]
        about = {field: getattr(source, field) for field in ("hub_id", "licence", "is_t2i", "group_by", "config")}
        found[name] = {**about, "rows": pairs}
    check("sources", found)


def _pairs(source, given, options) -> list:
    """Of each pair its identities, strength and columns, or why it is none."""
    pairs = []
    try:
        pairs.extend(source.convert(given, **options))
    except RowError as error:
        pairs.append(error)
    names = ("group_id", "source_id", "strength")
    return [
        ["refused", pair.reason]
        if isinstance(pair, RowError)
        # Videos are files here, whose frames the loader reads.
        else {
            "content_id": content_id({**pair, "videos": None}),
            **{name: pair[name] for name in names},
            "columns": list(pair),
        }
        for pair in pairs
    ]


@pytest.mark.parametrize("name", ["rlaif_v", "hpdv2_test", "imagereward_rankings", "pickapic_v2", "columns"])
def test_names_of_loaded_pairs(name, tmp_path):
    rows = ROWS.get(name) or fixture(SAMPLES.get(name, name))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    loaded = load_preferences(name, tmp_path / "rows.parquet", **OPTIONS.get(name, {}))
    names = [
        name for name in ("pair_id", "group_id", "source", "source_id", "strength") if name in loaded.column_names
    ]
    check(f"loaded_{name}", {"columns": loaded.column_names, "rows": loaded.select_columns(names).to_list()})
