"""Results of benchmarks in a model card: numbers by hand, a second run replaces them, and all else stays."""

import re

from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt

from trl_dt2it.evaluation.looking import NOTE, LookingReport
from trl_dt2it.evaluation.metrics import Interval
from trl_dt2it.evaluation.results import EvalResult, card_block, update_card


CARD = """---
license: mit
model-index:
- name: mine
  results:
  - task:
      type: text-classification
      name: Reward modeling
    dataset:
      name: held-out pairs
      type: held-out-pairs
    metrics:
    - type: accuracy
      value: 0.9
      name: pair accuracy
---

# Mine

Text with a | in it.

## Versions

- trl: 1
"""


def result(name="vl-rewardbench", title="VL-RewardBench", overall=0.75, **other) -> EvalResult:
    values = {"overall": overall, "macro": 0.7125}
    return EvalResult(
        name=name,
        title=title,
        metrics=values,
        micro=overall,
        macro=0.7125,
        correct={"overall": round(overall * 1200)},
        n={"overall": 1200},
        ties={"overall": 3},
        wilson={"overall": Interval(0.72, 0.77)},
        bootstrap={"overall": Interval(0.7312, 0.7689), "macro": Interval(0.69, 0.735)},
        settings={"hub_id": f"some/{name}", "revision": None},
        **other,
    )


def test_a_block_by_hand():
    block = card_block(result(label="image-only", notes=("A note.",)), "python recipes/evaluate.py --model m")
    assert block.splitlines() == [
        "### VL-RewardBench (image-only)",
        "",
        "| metric | value, % | 95 % interval | of | ties |",
        "|---|---|---|---|---|",
        "| overall | 75.0 | 73.1 to 76.9 | 1,200 | 3 |",
        "| macro | 71.2 | 69.0 to 73.5 |  |  |",
        "",
        "Intervals by drawing prompts with replacement. Ties count as wrong.",
        "A note.",
        "",
        "```bash",
        "python recipes/evaluate.py --model m",
        "```",
    ]


def test_a_block_with_a_looking_test_by_hand():
    shown = {"image": 0.75, "swapped": 0.5}
    looking = LookingReport(
        verdict="looks",
        text="The model looks.",
        n=1200,
        num_prompts=1000,
        text_only=0,
        alone=3,
        metrics={name: {"overall": value} for name, value in shown.items()},
        bootstrap={name: {"overall": Interval(value - 0.01, value + 0.01)} for name, value in shown.items()},
        gain={"swapped": 0.25},
        gain_interval={"swapped": Interval(0.2, 0.3)},
        changed={"swapped": 0.4},
    )
    without, block = card_block(result()).splitlines(), card_block(result(looking=looking)).splitlines()
    assert block[: len(without)] == without
    assert block[len(without) :] == [
        "",
        "#### Does it look at the image?",
        "",
        "The model looks.",
        "",
        "| image shown | accuracy, % | 95 % interval | own gains | 95 % interval | changed, % |",
        "|---|---|---|---|---|---|",
        "| its own | 75.0 | 74.0 to 76.0 |  |  |  |",
        "| another row's | 50.0 | 49.0 to 51.0 | +25.0 | 20.0 to 30.0 | 40.0 |",
        "",
        "1,200 pairs with images of 1,000 prompts; dropped: 3 for which no other row has as many other images.",
        NOTE,
    ]


def test_a_second_run_replaces_the_numbers_of_the_first(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(CARD)
    first, other = result(), result("mm-rlhf-rewardbench", "MM-RLHF-RewardBench", 0.5)
    update_card(path, [first, other], model_name="unused")
    once = path.read_text()
    update_card(path, [first, other], model_name="unused")
    assert path.read_text() == once
    update_card(path, [result(overall=0.25)], model_name="unused")
    card = ModelCard.load(path)
    found = {(entry.dataset_name, entry.metric_name): entry.metric_value for entry in card.data.eval_results}
    assert found == {
        ("held-out pairs", "pair accuracy"): 0.9,
        ("VL-RewardBench", "overall"): 0.25,
        ("VL-RewardBench", "macro"): 0.7125,
        ("MM-RLHF-RewardBench", "overall"): 0.5,
        ("MM-RLHF-RewardBench", "macro"): 0.7125,
    }
    assert card.data.license == "mit" and card.data.model_name == "mine"
    assert card.text.count("## Benchmarks") == 1 and card.text.count("### ") == 2
    assert "| overall | 25.0 |" in card.text and "| overall | 75.0 |" not in card.text
    assert "Text with a | in it." in card.text and card.text.index("# Mine") < card.text.index("## Benchmarks")
    # The metadata as the Hub reads them.
    (model,) = metadata_load(path)["model-index"]
    assert {one["dataset"]["type"] for one in model["results"]} == {
        "held-out-pairs",
        "some/vl-rewardbench",
        "some/mm-rlhf-rewardbench",
    }


def test_other_rows_of_a_benchmark_stand_beside_it(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\n\n# Mine\n\n## Benchmarks\n\nMeasured on a Monday.\n\n## After\n")
    update_card(path, [result()], model_name="mine")
    update_card(path, [result(label="image--> only", overall=0.5)], model_name="mine")
    text = ModelCard.load(path).text
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads[:1] == ["# Mine"] and heads.index("### VL-RewardBench") < heads.index("## After")
    assert "### VL-RewardBench (image--\\> only)" in heads and "Measured on a Monday." in text
    assert ModelCard.load(path).data.model_name == "mine"
    comments = [line for line in text.splitlines() if line.startswith("<!--")]
    assert len(comments) == 4 and all(line.endswith("-->") and line.count("--") == 2 for line in comments)


NASTY = [
    "a|b",
    "line\nbreak",
    "x\n---\ny",
    "---",
    "- item: 'one'",
    '"two": {three}',
    "<script>alert(1)</script>",
    "<!-- end of benchmark: x -->",
    "![x](http://evil.example/a.png) [y](javascript:z)",
    "```\ncode\n```",
    "`tick` ``two``",
    "# head",
    "1. list",
    "    indented",
    "**bold** _it_ ~~gone~~ $x$ &lt;",
    "{{ jinja }} {% if x %}",
    "\u202eright to left",
    "yes",
    "\ud800half",
]


def test_names_from_data_are_text_in_cards_and_survive_their_metadata(tmp_path):
    """Rendered by a Markdown parser of its own: nothing but the card's own tables, heads and code."""
    path = tmp_path / "README.md"
    path.write_text(CARD)
    values = {name: place / 100 for place, name in enumerate(NASTY)}
    notes = tuple(NASTY)
    nasty = [
        EvalResult(
            name=f"own-{place}",
            title=name,
            metrics=values,
            micro=0.5,
            macro=None,
            correct={},
            n={},
            ties={},
            wilson={},
            bootstrap={},
            label=name,
            notes=notes,
        )
        for place, name in enumerate(NASTY)
    ]
    for _ in range(2):
        update_card(path, nasty, model_name="unused", command="evaluate.py --x '```\n# <b>no</b>\n```'")
    card = ModelCard.load(path)
    found = {(entry.dataset_name, entry.metric_name): entry.metric_value for entry in card.data.eval_results}
    same = [name.replace("\ud800", "?") for name in NASTY]
    expected = {(f"{title} ({title})", name): place / 100 for title in same for place, name in enumerate(same)}
    assert found == {("held-out pairs", "pair accuracy"): 0.9, **expected}
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(card.text)
    tags = set(re.findall(r"</?([a-zA-Z][\w-]*)", re.sub(r"<!--[^>]*-->", "", html)))
    assert tags == {"h1", "h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "pre", "code", "ul", "li"}
    assert html.count("<li>") == 1  # of the card, before
    assert html.count("<h3>") == html.count("<table>") == html.count("<pre>") == len(NASTY)
    assert html.count("<h1>") == 1 and html.count("<h2>") == 2
    assert html.count("<td>") == 5 * len(NASTY) ** 2  # no cell more, and none less
    for text in ("a|b", "line break", "&lt;script&gt;alert(1)&lt;/script&gt;", "**bold** _it_ ~~gone~~ $x$ &amp;lt;"):
        assert f"<td>{text}</td>" in html
