"""Pairs for people to look at: the strongest flips first, with thumbnails and all that was ever said of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..curation.ledger import CurationLedger
from ..data.columns import arrow_rows, column_of, find_json_columns, leave_images_encoded
from ..data.images import ImageOptions
from .flow import STATES, Flow, step_title
from .row_views import conversation, thumbnails


def choose_pairs(flow: Flow, strength: np.ndarray, most: int) -> np.ndarray:
    """Choose the pairs to show: of each state those most worth a look, half of them the strongest flips. Flips come
    first, the strongest before others, then relabelled, dropped and kept pairs, the weakest first."""
    final = flow.states[-1]
    known = np.nan_to_num(strength, nan=0.0)
    order = {
        state: np.flatnonzero(final == STATES.index(state)) for state in ("flipped", "relabelled", "dropped", "kept")
    }
    for state, rows in order.items():
        order[state] = rows[np.argsort(-known[rows] if state == "flipped" else known[rows], kind="stable")]
    others = [rows for state, rows in order.items() if state != "flipped"]
    # What others do not need goes to flips, and what flips do not need to the others, dropped and kept last.
    flips = max(most // 2, most - sum(map(len, others)))
    chosen = [order["flipped"][:flips]]
    left = most - len(chosen[0])
    for number, rows in enumerate(others):
        share = max(left // (len(others) - number), left - sum(map(len, others[number + 1 :])))
        chosen.append(rows[: max(0, share)])
        left -= len(chosen[-1])
    return np.concatenate(chosen)


def gallery_items(
    pool: Dataset, ledger: CurationLedger, flow: Flow, *, most: int, options: ImageOptions
) -> dict[str, Any]:
    """Return what the page's script shows: `pairs`, each with texts, images, state and history, as the source has it,
    and `images`, thumbnails as `data:` addresses. The pool has the ledger's names in `pair_id`."""
    state = ledger.state()
    strength = state["strength"].to_numpy()
    rows = pc.index_in(flow.pair_id, value_set=column_of(pool, "pair_id").cast(pa.string()))
    is_missing = rows.is_null().to_numpy(zero_copy_only=False)
    shown = choose_pairs(flow, np.where(is_missing, np.nan, strength), most)
    shown = shown[~is_missing[shown]]
    names = flow.pair_id.take(pa.array(shown))
    histories = _histories(ledger, names)
    since = flow.since()
    encoded = leave_images_encoded(pool).with_format(None)
    coded = find_json_columns(encoded.features)
    images: dict[str, str] = {}
    pairs = []
    for place, name in zip(shown.tolist(), names.to_pylist(), strict=True):
        table = encoded.select([rows[place].as_py()]).with_format("arrow")[:]
        row = next(iter(arrow_rows(table, coded)))
        history = histories.get(name, [])
        pairs.append(
            {
                "id": name,
                "source": str(row.get("source") or ""),
                "state": STATES[flow.states[-1][place]],
                "flipped": bool(flow.flipped[place]),
                "kept": bool(state["kept"][place].as_py()),
                "since": flow.steps[since[place]],
                "strength": _number(strength[place]),
                "reason": history[-1]["reason"] if history else "",
                "history": history,
                **conversation(row),
                "images": thumbnails(row, options, images),
            }
        )
    return {"pairs": pairs, "images": list(images.values())}


def _histories(ledger: CurationLedger, names: pa.Array) -> dict[str, list[dict[str, Any]]]:
    """Return what each stage that stands said of pairs, rewards as the source has the pair. Each file is read once."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in ledger.standing:
        table = ledger.table(entry)
        for row in table.filter(pc.is_in(table["pair_id"], value_set=names)).to_pylist():
            found.setdefault(row["pair_id"], []).append(_told(entry, row))
    return found


def _told(entry: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    sides = ("rejected", "chosen") if row["was_flipped"] else ("chosen", "rejected")
    models = entry["models"] if "chosen_0" in row else []
    judges = entry["models"] if "vote_0_0" in row else []
    sign = -1 if row["was_flipped"] else 1
    votes = [[row[f"vote_{judge}_{order}"] for order in (0, 1)] for judge in range(len(judges))]
    return {
        "step": step_title(entry),
        "action": row["action"],
        "reason": row["reason"],
        "strength": _number(row["strength"]),
        "scores": [[name, *(_number(row[f"{side}_{place}"]) for side in sides)] for place, name in enumerate(models)],
        # 1 is for the answer that the source calls better.
        "votes": [[name, *(vote and sign * vote for vote in two)] for name, two in zip(judges, votes, strict=True)],
    }


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 4)
