"""The contents of cards: sources, curation and style, each by hand, and the card of a real training."""

import random
import re

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from trl_dt2it.curation import CurationLedger, IterativeCurationCallback
from trl_dt2it.curation.publish import curation_section
from trl_dt2it.curation.rounds.training import LedgerSection
from trl_dt2it.data.cards import (
    cell,
    code_block,
    code_span,
    hub_link,
    name_cell,
    paragraph,
    run_command,
    source_counts,
    source_lines,
)
from trl_dt2it.debias import StyleAuditCallback, audit_style
from trl_dt2it.debias.style_callback import style_section
from trl_dt2it.evaluation import read_benchmark
from trl_dt2it.training.model_card import evaluation_entries, write_model_card

from ..evaluation.benchmark_rows import vl_rows
from ..rows import make_dataset
from .test_trainer import trainer_for


def test_a_cell_is_one_line_without_markup():
    assert (
        cell("a|b\n<img src=x> `c` **d** [e](f) #g") == "a\\|b \\<img src=x\\> \\`c\\` \\*\\*d\\*\\* \\[e\\](f) \\#g"
    )


def test_code_and_paragraphs_end_where_they_should():
    assert code_span("plain") == "`plain`" and code_span("a `b` ``c``") == "``` a `b` ``c`` ```"
    assert name_cell("eval_a_b _c_ d__e_") == "eval_a_b \\_c\\_ d\\_\\_e\\_"
    assert code_span("two\nlines") == "`two lines`" and code_span(" ") == ""
    assert code_block("a\n```\nb", "bash") == "````bash\na\n```\nb\n````"
    assert [paragraph(text) for text in ("- a", "1. b", "---", "    c", "+d", "e")] == [
        "\\- a",
        "1\\. b",
        "\\---",
        "c",
        "\\+d",
        "e",
    ]
    assert hub_link("a b](x)/c", "datasets/") == "[a b\\](x)/c](https://huggingface.co/datasets/a%20b%5D%28x%29/c)"


def test_sources_by_hand():
    rows = Dataset.from_dict({"source": ["own", "rlaif_v", "own", None]})
    counts = source_counts(rows)
    assert counts == {"own": 2, "rlaif_v": 1, "": 1}
    assert source_lines(counts, {"own": "CC-BY-4.0"}) == [
        ("own", "2", "CC-BY-4.0"),
        ("[rlaif\\_v](https://huggingface.co/datasets/openbmb/RLAIF-V-Dataset)", "1", "CC-BY-NC-4.0"),
        ("not named", "1", "unknown"),
    ]
    assert source_counts(Dataset.from_dict({"chosen": ["a"] * 3})) == {"": 3}
    assert source_counts(rows.to_iterable_dataset()) == {}


def test_curation_by_hand(tmp_path):
    ledger = CurationLedger(tmp_path)
    assert curation_section(ledger, []) is None and curation_section(None, []) is None
    ledger.append(1, "flip", pair_ids=["a", "b", "c"], actions=["flip", "drop", "keep"], sources=["x", "y", "x"])
    ledger.append(2, "flip", pair_ids=["a", "b", "c"], actions=["drop"] * 3)
    ledger.append(3, "judge", pair_ids=["b"], actions=["flip"])
    ledger.undo(2)
    section = curation_section(ledger, [{"curation/kept": 0}])
    assert section.startswith("### Curation\n\n") and section == curation_section(ledger)
    assert "3 pairs are kept, 2 of them with chosen and rejected exchanged, and 0 are left out." in section
    assert section.endswith("\n| 1 | flip | 3 | 1 | 1 | 1 |\n| 3 | judge | 1 | 0 | 1 | 0 |")
    log = [{"curation/kept": 9, "curation/flipped": 1, "curation/dropped": 0}, {"loss": 1.0}]
    log.append({"curation/kept": 8000, "curation/flipped": 2, "curation/dropped": 1})
    assert curation_section(None, log).endswith(
        ": 8,000 pairs are kept, 2 of them with chosen and rejected exchanged, and 1 are left out."
    )
    assert curation_section(None) is None


def test_style_by_hand():
    log = [
        {"style/leakage": 0.9},
        {"style/leakage": 0.75, "style/leakage/b|c": 0.5, "style/feature/words": 0.6, "style/feature/bold": 0.3},
        {"loss": 0.1},
    ]
    assert style_section(log[:1]).endswith("an AUC of 0.900; 0.5 is no style bias.")
    assert style_section(log).endswith(
        "an AUC of 0.750; 0.5 is no style bias.\n\n"
        "| source | AUC |\n|---|---|\n| b\\|c | 0.500 |\n\n"
        "| most telling feature | AUC |\n|---|---|\n| bold | 0.300 |\n| words | 0.600 |"
    )
    assert style_section(log[2:]) is None


def test_accuracies_become_entries_of_the_metadata():
    metrics = {"eval_accuracy": 0.91234, "eval_loss": 1.0, "eval_vl-rewardbench_accuracy": 0.5, "eval_own_accuracy": 1}
    sets = {"vl-rewardbench": read_benchmark("vl-rewardbench", vl_rows(random.Random(0), 1)), "own": make_dataset(1)}
    entries = evaluation_entries(metrics, "some/pairs", sets)
    assert [(one.dataset_type, one.dataset_name, one.metric_value) for one in entries] == [
        ("some/pairs", "some/pairs", 0.9123),
        ("MMInstruction/VL-RewardBench", "VL-RewardBench", 0.5),
        ("own", "own", 1),
    ]


@pytest.mark.parametrize(
    ("argv", "processes", "command"),
    [
        (["/home/me/code/recipes/evaluate.py", "--model", "a b"], 1, "python recipes/evaluate.py --model 'a b'"),
        (["/x/train.py", "--out=/home/me/secret/run"], 8, "accelerate launch train.py --out=run"),
        (["/x/bin/trl-dt2it", "train", "--hub_token", "hf_1"], 1, "trl-dt2it train --hub_token '***'"),
        (["/x/site-packages/pytest/__main__.py"], 1, None),
        (["/x/bin/pytest", "tests"], 1, None),
        (["-c"], 1, None),
        ([""], 1, None),
    ],
)
def test_commands(argv, processes, command):
    assert run_command(processes, argv) == command


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    output = tmp_path_factory.mktemp("card") / "my-model"
    rows = make_dataset(8, source=["own", "rlaif_v"] * 4, pair_id=[f"pair-{i}" for i in range(8)])
    trainer = trainer_for("qwen3_vl", output, rows, {"num_train_epochs": 2, "warmup_steps": 0.25}, eval_dataset=rows)
    trainer.add_callback(StyleAuditCallback(trainer, min_pairs=4, num_folds=2))
    curation = IterativeCurationCallback(trainer, ledger=output / "ledger", start_epoch=1, min_kept=0.5)
    trainer.add_callback(curation)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card()
    return trainer, curation, metrics, ModelCard.load(output / "README.md")


def test_the_card_of_a_curated_training(card):
    trainer, curation, metrics, card = card
    assert card.data.datasets == ["openbmb/RLAIF-V-Dataset"]
    (entry,) = card.data.eval_results
    assert entry.metric_value == round(metrics["eval_accuracy"], 4)
    rows = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line.startswith("|")]
    assert ["own", "4", "unknown"] in rows
    counts = dict.fromkeys(("keep", "flip", "drop"), 0)
    for line in curation.ledger.summary().to_pylist():
        counts = {action: counts[action] + line[action] for action in counts}
    assert [str(value) for value in (8, *counts.values())] in [row[2:] for row in rows]
    leakage = audit_style(trainer.train_dataset, min_pairs=4, num_folds=2).overall.auc
    assert f"names the chosen answer with an AUC of {leakage:.3f}" in card.text
    for figure in ("- epochs: 2", "- warm-up: 0.25 of all steps", "- precision: fp32", "- weight decay: 0"):
        assert figure in card.text, figure
    assert "{%" not in card.text and "{{ " not in card.text and "None" not in card.text


def test_the_card_tells_of_a_ledger_without_the_callback(card, tmp_path):
    trainer, curation, *_ = card
    ledger = CurationLedger(tmp_path)
    ledger.append(7, "by-rule", pair_ids=["a", "b"], actions=["keep", "drop"])
    trainer.remove_callback(curation)
    told = LedgerSection(ledger)
    trainer.add_callback(told)
    try:
        write_model_card(trainer)
    finally:
        trainer.remove_callback(told)
        trainer.add_callback(curation)
    text = ModelCard.load(f"{trainer.args.output_dir}/README.md").text
    assert "| 7 | by-rule | 2 | 1 | 0 | 1 |" in text
    assert re.search(r"1 pairs are kept, 0 of them with chosen and rejected exchanged, and 1 are left out", text)


def test_nothing_that_is_named_in_a_run_is_markup(card):
    """Names of sets and of the model, whatever is in them, leave the card and its metadata whole."""
    trainer, *_ = card
    nasty = "a|b \"c\": 'd'\n---\n# <script>e</script> `f` [g](h)"
    trainer.state.log_history.append({f"eval_{nasty}_accuracy": 0.75})
    folder = trainer.args.output_dir
    try:
        write_model_card(trainer, model_name=nasty, dataset_name="x/y](z) <b>", tags=[nasty])
    finally:
        trainer.state.log_history.pop()
    card = ModelCard.load(f"{folder}/README.md")
    assert card.data.model_name == nasty and nasty in card.data.tags
    assert nasty in [entry.dataset_name for entry in card.data.eval_results]
    html = MarkdownIt("commonmark").enable("table").render(card.text)
    assert "<script" not in html and "<b>" not in html and html.count("<h1>") == 1
    name = "a|b &quot;c&quot;: 'd' --- # &lt;script&gt;e&lt;/script&gt; `f` [g](h)"
    assert f"<h1>{name}</h1>" in html and f"<td>eval_{name}_accuracy</td>\n<td>0.75</td>" in html
    assert '<a href="https://huggingface.co/datasets/x/y%5D%28z%29%20%3Cb%3E">x/y](z) &lt;b&gt;</a>' in html
