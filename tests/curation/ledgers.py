"""Writing decisions about a few pairs into a ledger, and reading off how the pairs then stand."""

NAMES = ["a", "b", "c", "d"]


def act(ledger, round, stage, actions, names=NAMES, **kwargs):
    ledger.append(round, stage, pair_ids=names[: len(actions)], actions=actions, **kwargs)


def orientation(ledger, after=None):
    """For each pair `+` or `-` for its orientation, in brackets if it is dropped."""
    rows = sorted(ledger.state(after).to_pylist(), key=lambda row: row["pair_id"])
    marks = ("-" if row["flipped"] else "+" for row in rows)
    return " ".join(mark if row["kept"] else f"({mark})" for mark, row in zip(marks, rows, strict=True))
