"""The callback in real trainings: against hand-made data sets, plain runs and undisturbed runs, bit for bit."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from trl_dt2it.curation import (
    CurationLedger,
    Flip,
    IterativeCurationCallback,
    Keep,
    decide,
    flip_negative,
    keep_consistent,
)
from trl_dt2it.curation.callback_round import Round, blend, deal_out, fold_of, round_metrics
from trl_dt2it.curation.callback_state import add_round
from trl_dt2it.pair_scoring import score_pairs

from ..rows import make_dataset
from ..test_reward_trainer import losses, trainer_for, weights


N = 11
WORKERS = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
BY_TOKENS = {"max_tokens_per_batch": 400}
BY_LENGTH = {"train_sampling_strategy": "group_by_length"}
REBALANCED = {"train_sampling_strategy": "batch_rebalance", "gradient_accumulation_steps": 2}


def keep_all(strength):
    return np.ones(len(strength), dtype=bool)


def data(**columns) -> Dataset:
    return make_dataset(
        N,
        **{
            "strength": [float(i % 5) for i in range(N)],
            "pair_id": [f"pair-{i}" for i in range(N)],
            "row_index": list(range(N)),
            **columns,
        },
    )


class Known:
    """A scorer that says what it is told, by `row_index`, and counts how often it is asked."""

    def __init__(self, *strengths: list[float]):
        self.strengths = strengths
        self.asked: list[list[int]] = []

    def __call__(self, dataset: Dataset) -> np.ndarray:
        rows = dataset["row_index"][:]
        strength = self.strengths[min(len(self.asked), len(self.strengths) - 1)]
        self.asked.append(rows)
        torch.rand(3)  # a scorer that draws must not disturb the training
        np.random.rand(3)
        return np.array([[strength[row], 0.0] for row in rows])


def trained(folder, dataset=None, args=None, resume=None, record=None, lora=False, **curation):
    """A trainer after its training; with arguments for the callback, if there are any."""
    # TRL turns dropout off by default; with it, a step depends on the random state.
    args = {"num_train_epochs": 3, "gradient_checkpointing": False, "disable_dropout": not lora, **(args or {})}
    extra = {"peft_config": LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj"])} if lora else {}
    trainer = trainer_for("qwen3_vl", folder, dataset or data(), args, **extra)
    if curation:
        trainer.add_callback(IterativeCurationCallback(trainer, **curation))
    if record is not None:
        compute_loss = trainer.compute_loss

        def recording(model, inputs, *rest, **options):
            record.append((inputs["pairs"]["row_index"].tolist(), inputs["pairs"]["weight"].tolist()))
            return compute_loss(model, inputs, *rest, **options)

        trainer.compute_loss = recording
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def callback_of(trainer) -> IterativeCurationCallback:
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, IterativeCurationCallback))


def log_of(trainer) -> list[dict]:
    """All that was logged in training, but for curation and times."""
    kept = [e for e in trainer.state.log_history if "curation/kept" not in e and "train_runtime" not in e]
    assert kept
    return kept


def without_tokens(log: list[dict]) -> list[dict]:
    """TRL counts tokens from where it resumes."""
    return [{name: value for name, value in entry.items() if name != "num_tokens"} for entry in log]


def rounds_of(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "curation/kept" in entry]


def assert_same_weights(one, other):
    for name, value in weights(other).items():
        assert torch.equal(weights(one)[name], value), name


# ---------------------------------------------------------------------------------------------- against other runs


@pytest.mark.parametrize(
    ("args", "lora"),
    [({"logging_steps": 4}, True), (WORKERS, False), (BY_TOKENS, False), (BY_LENGTH, True), (REBALANCED, False)],
    ids=["random", "workers", "tokens", "length", "rebalanced"],
)
def test_rules_that_change_nothing_change_nothing(args, lora, tmp_path):
    """The same batches, dropout, losses and weights as without the callback, though the model scores all pairs."""
    plain = trained(tmp_path, args=args, lora=lora)
    curated = trained(tmp_path, args=args, lora=lora, rules=[Keep(keep_all)])
    assert [entry["epoch"] for entry in rounds_of(curated)] == [1, 2]
    assert log_of(curated) == log_of(plain)
    assert_same_weights(curated, plain)
    assert len({entry["learning_rate"] for entry in log_of(plain)}) == len(log_of(plain))
    if lora:  # dropout depends on the random state, which this scorer moves
        drawing = trained(tmp_path, args=args, lora=lora, rules=[Keep(keep_all)], scorer=Known([1.0] * N))
        assert log_of(drawing) == log_of(plain)
        assert_same_weights(drawing, plain)


@pytest.mark.parametrize("args", [{}, WORKERS, BY_TOKENS], ids=["random", "workers", "tokens"])
def test_flips_are_those_of_a_data_set_flipped_by_hand(args, tmp_path):
    """Margins stay where they are; so does everything but the two sides."""
    strength = [1.0, -1.0] * 5 + [-3.0]
    dataset = data(margin=[i / 4 for i in range(N)])
    rows = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if strength[i] < 0 else row
        for i, row in enumerate(dataset)
    ]
    by_hand = Dataset.from_list(rows, features=dataset.features)
    args = {**args, "num_train_epochs": 2, "loss_type": "margin"}
    plain = trained(tmp_path, by_hand, args)
    curated = trained(tmp_path, dataset, args, rules=[Flip(flip_negative)], scorer=Known(strength), start_epoch=0)
    assert log_of(curated) == log_of(plain)
    assert_same_weights(curated, plain)
    assert losses(trained(tmp_path, dataset, args)) != losses(plain)
    assert rounds_of(curated)[0]["curation/flipped"] == 6


def test_workers_that_persist_see_flips_and_strengths_at_once(tmp_path):
    strength = [2.0, -1.0, 5.0, 4.0, -2.0, 3.0, -6.0, 1.0, 0.5, 0.2, -3.0]
    rules = [Flip(flip_negative)]
    runs = [
        trained(tmp_path, args=args, rules=rules, scorer=Known(strength), refresh_strength=True)
        for args in ({}, {**WORKERS, "dataloader_prefetch_factor": 4})
    ]
    assert log_of(runs[0]) == log_of(runs[1])
    assert_same_weights(*runs)
    plain = trained(tmp_path)
    per_epoch = len(losses(plain)) // 3
    assert losses(runs[1])[:per_epoch] == losses(plain)[:per_epoch]
    assert losses(runs[1])[per_epoch] != losses(plain)[per_epoch]


def test_dropped_pairs_of_planned_batches_have_no_weight(tmp_path):
    strength = [1.0, -1.0, 2.0] * 3 + [1.0, -2.0]
    plain = trained(tmp_path, data(weight=[float(one > 0) for one in strength]), {**BY_TOKENS, "num_train_epochs": 2})
    curated = trained(
        tmp_path,
        args={**BY_TOKENS, "num_train_epochs": 2},
        rules=[Keep(keep_consistent)],
        scorer=Known(strength),
        start_epoch=0,
    )
    assert log_of(curated) == log_of(plain)
    assert_same_weights(curated, plain)
    assert rounds_of(curated)[0]["curation/dropped"] == 4


def test_dropped_pairs_are_not_drawn_and_steps_stay(tmp_path):
    strength = [1.0, -1.0, 2.0] * 3 + [1.0, -2.0]
    record = []
    curated = trained(tmp_path, record=record, rules=[Keep(keep_consistent)], scorer=Known(strength))
    plain = trained(tmp_path)
    assert [e["learning_rate"] for e in log_of(curated)] == [e["learning_rate"] for e in log_of(plain)]
    assert curated.state.global_step == plain.state.global_step == 18
    rows = [row for batch, _ in record for row in batch]
    first, second, third = rows[:N], rows[N : 2 * N], rows[2 * N :]
    assert sorted(first) == list(range(N))
    kept = {row for row in range(N) if strength[row] > 0}
    assert set(second) == set(third) == kept and len(kept) == 7
    assert len(second) == len(third) == N and second != third
    assert sorted(np.bincount(second, minlength=N)[list(kept)]) == [1, 1, 1, 2, 2, 2, 2]
    assert all(weight == 1.0 for _, batch in record for weight in batch)


def test_strengths_are_dealt_out_anew(tmp_path):
    """As a data set in which the strengths of each source have been given to other pairs by hand."""
    source = ["a"] * 6 + ["b"] * 5
    raw = [0.0, 4.0, 2.0, None, 1.0, 3.0, 30.0, 10.0, 20.0, 0.0, 40.0]
    strength = [6.0, 1.0, -5.0, 9.0, -4.0, 3.0, 1.0, 2.0, 3.0, 4.0, -0.5]
    # a: pairs 1, 5, 4, 2, 0 by how sure the model is; pair 3 stays unknown. b: pairs 10, 6, 7, 8, 9.
    by_hand = [4.0, 0.0, 3.0, None, 2.0, 1.0, 10.0, 20.0, 30.0, 40.0, 0.0]
    dataset = data(source=source, strength=raw)
    flipped = Dataset.from_list(
        [
            {
                **(row | {"chosen": row["rejected"], "rejected": row["chosen"]} if strength[i] < 0 else row),
                "strength": by_hand[i],
            }
            for i, row in enumerate(dataset)
        ],
        features=dataset.features,
    )
    plain = trained(tmp_path, flipped, {"num_train_epochs": 1})
    curated = trained(
        tmp_path,
        dataset,
        {"num_train_epochs": 1},
        rules=[Flip(flip_negative)],
        scorer=Known(strength),
        start_epoch=0,
        refresh_strength=True,
    )
    assert log_of(curated) == log_of(plain)
    assert_same_weights(curated, plain)


# -------------------------------------------------------------------------------------------------------- decisions


def test_the_model_in_training_scores_by_default(tmp_path):
    curated = trained(tmp_path, args={"num_train_epochs": 2, "learning_rate": 0.0}, rules=[Flip(flip_negative)])
    scores = score_pairs(curated.model, data(), curated.data_collator, batch_size=2)
    expected = scores[:, 0].astype(np.float64) - scores[:, 1]
    state = callback_of(curated).state
    np.testing.assert_array_equal(state.average, expected)
    assert state.selection.flipped.tolist() == (expected < 0).tolist() and 0 < state.selection.flipped.sum() < N
    entry = rounds_of(curated)[0]
    assert entry["curation/mean_strength"] == pytest.approx(np.abs(expected).mean())
    assert entry["curation/noise_rate"] == pytest.approx((expected < 0).mean())


def test_rounds_come_when_they_are_due(tmp_path):
    scorer = Known([1.0] * N)
    curated = trained(tmp_path, args={"num_train_epochs": 6}, scorer=scorer, every=2, start_epoch=1)
    assert [entry["epoch"] for entry in rounds_of(curated)] == [1, 3, 5]
    assert len(scorer.asked) == 3 and callback_of(curated).state.round == 3


def test_rules_see_the_average_and_decide_from_the_labels(tmp_path):
    """A pair that is flipped can come back, and the mean of two rounds decides, with the weights of the momentum."""
    first = [-1.0, -1.0] + [1.0] * (N - 2)
    second = [2.0, 4.0] + [-0.5] + [1.0] * (N - 3)
    curated = trained(tmp_path, scorer=Known(first, second), rules=[Flip(flip_negative)], momentum=0.75)
    state = callback_of(curated).state
    assert state.average[:4].tolist() == [-0.25, 0.25, 0.625, 1.0]
    assert [entry["curation/flipped"] for entry in rounds_of(curated)] == [2, 1]
    assert np.flatnonzero(state.selection.flipped).tolist() == [0]


def test_several_models_and_sources(tmp_path):
    dataset = data(source=["a", "b"] * 5 + ["b"])

    def ensemble(rows):
        index = np.array(rows["row_index"][:])
        chosen = np.stack([index - 5.0, index - 2.0], axis=-1)
        return np.stack([chosen, np.zeros_like(chosen)], axis=1)  # mean strength: row - 3.5

    curated = trained(
        tmp_path, dataset, {"num_train_epochs": 2}, scorer=ensemble, rules=[Flip(flip_negative)], only_sources=["b"]
    )
    selection = callback_of(curated).state.selection
    assert np.flatnonzero(selection.flipped).tolist() == [1, 3]
    assert np.isnan(callback_of(curated).state.average[[0, 2, 4, 6, 8]]).all()
    both = trained(tmp_path, dataset, {"num_train_epochs": 2}, scorer=ensemble, rules=[Flip(flip_negative)])
    entry = rounds_of(both)[0]
    assert (entry["curation/flipped/a"], entry["curation/flipped/b"], entry["curation/flipped"]) == (2, 2, 4)
    assert entry["curation/noise_rate/a"] == 2 / 5 and entry["curation/kept/b"] == 6
    # |row - 3.5| of a's rows 0, 2, 4, 6, 8
    assert entry["curation/mean_strength/a"] == pytest.approx((3.5 + 1.5 + 0.5 + 2.5 + 4.5) / 5)


def test_rules_are_told_of_pairs_known_to_be_right(tmp_path):
    """A rule gets the average strengths of the reference; others are not disturbed by it."""
    told = []

    def flip_below(strength, reference=None):
        told.append(reference)
        return strength < reference.mean()

    reference = make_dataset(20, seed=3, row_index=list(range(20)))
    scorer = Known([float(i) for i in range(20)], [float(i) for i in range(20)], [0.0] * 20)
    args = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 8}
    options = {"rules": [Flip(flip_below), Keep(keep_all)], "momentum": 0.5, "reference": reference}
    curated = trained(tmp_path, args=args, scorer=scorer, **options)
    # In each round the train set and the reference; the strengths of the second round are all 0.
    assert [len(asked) for asked in scorer.asked] == [N, 20, N, 20]
    assert [one.tolist() for one in told] == [list(range(20)), [i / 2 for i in range(20)]]
    assert np.flatnonzero(callback_of(curated).state.selection.flipped).tolist() == list(range(10))
    again = Known([0.0] * 20)
    trained(tmp_path, args=args, scorer=again, resume=tmp_path / "checkpoint-8", **options)
    assert told[-1].tolist() == [i / 2 for i in range(20)]


def test_no_source_is_emptied(tmp_path, caplog):
    dataset = data(source=["a"] * 8 + ["b"] * 3)
    strength = [1.0] * 8 + [-3.0, -1.0, -2.0]
    curated = trained(
        tmp_path, dataset, {"num_train_epochs": 2}, scorer=Known(strength), rules=[Keep(keep_consistent)], min_kept=0.1
    )
    assert np.flatnonzero(callback_of(curated).state.selection.kept).tolist() == [*range(8), 9]


def test_pairs_without_a_score_stay_as_they_are(tmp_path):
    strength = [float("nan"), -1.0] + [1.0] * (N - 2)
    curated = trained(tmp_path, scorer=Known(strength), rules=[Keep(keep_consistent)])
    assert np.flatnonzero(~callback_of(curated).state.selection.kept).tolist() == [1]


def test_folds_are_scored_by_a_model_that_did_not_see_them_in_this_epoch(tmp_path):
    scorer, record = Known([1.0] * N), []
    curated = trained(
        tmp_path, args={"num_train_epochs": 4}, record=record, scorer=scorer, rules=[Keep(keep_all)], folds=3
    )
    rows = [row for batch, _ in record for row in batch]
    epochs = [set(rows[N * i : N * (i + 1)]) for i in range(4)]
    assert [sorted(set(range(N)) - epoch) for epoch in epochs] == [*map(sorted, scorer.asked), []]
    assert sorted(row for asked in scorer.asked for row in asked) == list(range(N))
    assert len(rows) == 4 * N and rounds_of(curated)[0]["curation/kept"] == len(scorer.asked[0])


# ----------------------------------------------------------------------------------------------------------- resume


RULES = [Flip(flip_negative), Keep(lambda strength: strength > 0.02)]


@pytest.mark.parametrize(
    ("args", "curation"),
    [
        ({}, {"refresh_strength": True}),
        (BY_TOKENS, {}),
        ({"gradient_accumulation_steps": 2}, {"folds": 3, "momentum": 0.3}),
    ],
    ids=["random", "tokens", "folds"],
)
def test_resumed_runs_equal_the_undisturbed_one_bitwise(args, curation, tmp_path):
    """From a checkpoint within an epoch, from one of an epoch's last step, and from one before the first round."""
    args = {**args, "save_strategy": "steps", "save_steps": 1}
    curation = {"rules": RULES, "ledger": tmp_path / "ledger", **curation}
    whole = trained(tmp_path / "run", args=args, lora=True, **curation)
    per_epoch = whole.state.max_steps // 3
    ledger = contents(tmp_path / "ledger")
    assert len(rounds_of(whole)) == 2 and per_epoch >= 2
    for step in (1, per_epoch, per_epoch + 1, 2 * per_epoch):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        resumed = trained(tmp_path / "run", args=args, lora=True, resume=checkpoint, **curation)
        assert without_tokens(log_of(resumed)) == without_tokens(log_of(whole)), step
        assert rounds_of(resumed) == rounds_of(whole), step
        assert_same_weights(resumed, whole)
        assert contents(tmp_path / "ledger") == ledger, step


def contents(folder) -> dict:
    """What a ledger says, in its state and in each of its rounds."""
    ledger = CurationLedger(folder)
    history = {pair: ledger.history(pair) for pair in data()["pair_id"]}
    return {"state": ledger.state().to_pylist(), "history": history}


def test_a_checkpoint_is_not_whole_without_its_curation(tmp_path):
    """The state is there before the file that is written last, and a round is not done again that it holds."""
    scorer = Known([1.0] * N)
    args = {"save_strategy": "epoch", "save_total_limit": 1}
    trained(tmp_path, args=args, scorer=scorer, rules=[Keep(keep_all)])
    checkpoint = tmp_path / "checkpoint-18"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [checkpoint.name]
    for name in ("curation_state.json", "curation_state.safetensors"):
        assert (checkpoint / name).stat().st_mtime_ns <= (checkpoint / "trainer_state.json").stat().st_mtime_ns
    record = json.loads((checkpoint / "curation_state.json").read_text())
    assert (record["round"], record["last_epoch"], record["seed"]) == (2, 2, 42)
    resumed = Known([1.0] * N)
    trained(tmp_path, args=args, scorer=resumed, rules=[Keep(keep_all)], resume=checkpoint)
    assert resumed.asked == []


def run_and_resume(tmp_path, dataset=None, before=None, after=None):
    args = {"save_strategy": "steps", "save_steps": 8}
    before = {"scorer": Known([1.0] * N), "rules": [Flip(flip_negative)], **(before or {})}
    trained(tmp_path, args=args, **before)
    after = {**before, **after} if after is not None else {}
    trained(tmp_path, dataset, args=args, resume=tmp_path / "checkpoint-8", **after)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": 2}, "made with `every` 1, which now is 2; set it back, or start anew"),
        ({"rules": [Flip(partial(flip_negative, margin=0.5))]}, "made with `rules` .*0.5"),
        ({"momentum": 0.0}, "made with `momentum` 0.5, which now is 0.0"),
        ({"scorer": None}, 'made with `scorer` "Known", which now is null'),
    ],
)
def test_other_settings_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_and_resume(tmp_path, after=change)


def test_another_train_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is that of another train set"):
        run_and_resume(tmp_path, data(strength=[1.0] * N), after={})


def test_curation_is_not_forgotten_in_silence(tmp_path):
    with pytest.raises(ValueError, match="whose flips would be forgotten; add the callback before you resume"):
        run_and_resume(tmp_path)
    args = {"save_strategy": "steps", "save_steps": 8}
    trained(tmp_path / "plain", args=args)
    with pytest.raises(ValueError, match="was written without the curation callback"):
        trained(tmp_path / "plain", args=args, resume=tmp_path / "plain" / "checkpoint-8", rules=RULES)


# ----------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every` is 0; it must be at least 1"),
        ({"start_epoch": -1}, "`start_epoch` is -1"),
        ({"momentum": 1.0}, "`momentum` is 1.0"),
        ({"min_kept": 0.0}, "`min_kept` is 0.0; it must be above 0"),
        ({"folds": 1}, "`folds` is 1; it must be from 2"),
        ({"folds": 2, "every": 2}, "`every` is 2; it must be 1 with `folds`"),
        ({"only_sources": ["x"]}, "`only_sources` names x, which is not in the column `source`"),
        ({"reference": make_dataset(3)}, "`reference` is 3 pairs; it must be at least 20"),
        ({"reference": make_dataset(20), "rules": RULES}, "no rule takes it"),
        ({"combine": "mean"}, "`combine` is mean; it must be raw, zscore or rank"),
    ],
)
def test_misuse_fails_at_start(options, message, tmp_path):
    trainer = trainer_for("qwen3_vl", tmp_path, data(source=["a"] * N))
    with pytest.raises(ValueError, match=message):
        IterativeCurationCallback(trainer, **options)


def test_sets_that_cannot_be_curated(tmp_path):
    streamed = trainer_for(
        "qwen3_vl", tmp_path, data().remove_columns("strength").to_iterable_dataset(), {"max_steps": 1}
    )
    with pytest.raises(ValueError, match="not streamed"):
        IterativeCurationCallback(streamed)
    plain = trainer_for("qwen3_vl", tmp_path, data().remove_columns("strength"))
    with pytest.raises(ValueError, match="has no column `strength`"):
        IterativeCurationCallback(plain, refresh_strength=True)


def test_scores_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"an array of shape \(11,\) for 11 pairs"):
        trained(tmp_path, scorer=lambda rows: np.zeros(len(rows)))


# ------------------------------------------------------------------------------------------------------------ by hand


def test_blend_by_hand():
    nan = float("nan")
    result = blend(np.array([1.0, nan, 4.0, nan]), np.array([3.0, 2.0, nan, nan]), 0.25)
    np.testing.assert_array_equal(result, [2.5, 2.0, 4.0, nan])


def test_deal_out_by_hand():
    raw = np.array([1.0, 2.0, 3.0, np.nan, 9.0])
    strength = np.array([0.5, 0.1, -0.2, 0.9, 7.0])
    np.testing.assert_array_equal(deal_out(raw, strength, {"a": np.array([0, 1, 2, 3])}), [3, 2, 1, np.nan, 9])


def test_folds_by_hand():
    folds = fold_of(10, 3, seed=5)
    assert sorted(np.bincount(folds)) == [3, 3, 4]
    assert folds.tolist() == fold_of(10, 3, seed=5).tolist() != fold_of(10, 3, seed=6).tolist()


def test_metrics_by_hand():
    flipped, kept = np.array([True, True, False, False]), np.array([True, False, True, True])
    strength, rows = np.array([1.0, -4.0, 3.0, 5.0]), np.array([0, 1, 2])
    decision = decide(strength[rows], [])
    done = Round(flipped, kept, strength, strength, rows, None, decision, {"a": rows})
    assert round_metrics(done) == {
        "curation/kept": 2,
        "curation/flipped": 2,
        "curation/dropped": 1,
        "curation/noise_rate": pytest.approx(2 / 3),
        "curation/mean_strength": 2.0,
    }


# ------------------------------------------------------------------------------------------------------------- ledger


def test_the_ledger_gives_what_training_read(tmp_path):
    """Applied to the train set, it makes the set that the last epoch drew from."""
    record, strength = [], [1.0, -1.0, -2.0, 3.0] * 2 + [-4.0, 5.0, float("nan")]
    rules = [Flip(lambda s: s < -1.5), Keep(keep_consistent)]
    curated = trained(tmp_path, record=record, rules=rules, scorer=Known(strength), ledger=tmp_path / "ledger")
    ledger = CurationLedger(tmp_path / "ledger")
    applied = ledger.apply(data())
    drawn = {row for batch, _ in record[-curated.state.max_steps // 3 :] for row in batch}
    assert set(applied["row_index"]) == drawn == {0, 2, 3, 4, 6, 7, 8, 9, 10}
    selection = callback_of(curated).state.selection
    flipped = dict(zip(applied["row_index"], applied["curation_flipped"], strict=True))
    assert {row for row, is_flipped in flipped.items() if is_flipped} == {2, 6, 8}
    assert np.flatnonzero(selection.flipped).tolist() == [2, 6, 8]
    assert [entry["stage"] for entry in ledger.rounds] == ["epoch", "epoch"]
    (first, second) = ledger.history("pair-2")
    assert first["scores"] == second["scores"] == {"Known": (-2.0, 0.0)} and second["strength"] == 2.0
    assert ledger.history("pair-10") == []


def test_a_ledger_of_something_else_is_refused(tmp_path):
    options = {"scorer": Known([1.0] * N), "ledger": tmp_path / "ledger", "args": {"num_train_epochs": 2}}
    trained(tmp_path, **options)
    trained(tmp_path, **options)  # once more from the start, as after a kill
    assert len(CurationLedger(tmp_path / "ledger").rounds) == 1
    with pytest.raises(ValueError, match=r"holds rounds of something else, or of other settings \(round 1, stage"):
        trained(tmp_path, **options, momentum=0.0)


def test_rounds_that_come_out_otherwise_are_undone(tmp_path):
    ledger, names = CurationLedger(tmp_path), ["p", "q"]

    def add(round, strength):
        decision = decide(np.array(strength), [Flip(flip_negative)])
        add_round(ledger, round, pair_ids=names, decision=decision, settings={})

    add(1, [1.0, -1.0])
    add(2, [-1.0, -1.0])
    add(2, [-1.0, -1.0])
    assert len(ledger.rounds) == 2
    add(1, [-1.0, 1.0])
    assert ledger.state().select(["flipped", "round"]).to_pylist() == [
        {"flipped": True, "round": 1},
        {"flipped": False, "round": 1},
    ]
    add(2, [2.0, -2.0])
    assert ledger.state()["flipped"].to_pylist() == [False, True]
    assert ledger.summary()["undone"].to_pylist() == [True, True, False, False]
    with pytest.raises(ValueError, match="one per pair"):
        add(3, [1.0])
