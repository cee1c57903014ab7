"""The gallery: pairs with images, side by side with the decisions about them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from PIL import Image

from ..curation.ledger import CurationLedger
from ..data.columns import arrow_rows, column_of, leave_images_encoded
from ..data.export import check_publishable
from ..data.images import ImageOptions, load_image
from ..data.rows import SIDES, RowError, blocks, row_images, row_videos
from ..utils import digest
from .figures import STATES, Flow, step_title


SIDE = 320  # pixels of the longer side of a thumbnail; some hundreds fit in a page
MOST_IMAGES = 4
MOST_CHARACTERS = 6000


def conversation(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of a row; of whole conversations, the common turns are the prompt."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if not prompt and not isinstance(chosen, str):
        same = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(chosen[:-1], rejected[:-1], strict=False)))
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    # The position of a single image is obvious.
    mark = "[{}] " if len(row_images(row)) + len(row_videos(row)) > 1 else ""
    texts = {"prompt": _text(prompt or "", mark), "chosen": _text(chosen, mark), "rejected": _text(rejected, mark)}
    for name, text in texts.items():
        if len(text) > MOST_CHARACTERS:
            texts[name] = f"{text[:MOST_CHARACTERS]}…\n[{len(text):,} characters in all]"
    return texts


def thumbnails(row: Mapping[str, Any], options: ImageOptions, images: dict[str, str]) -> list[int | str]:
    """Return the index in `images` of a thumbnail of each image, and of the first frame of each video, or a reason."""
    options = replace(options, allowed_hosts=())
    try:
        values = [*row_images(row), *(video.frames[0] for video in row_videos(row))]
    except RowError as error:
        return [error.reason]
    shown: list[int | str] = []
    for value in values[:MOST_IMAGES]:
        try:
            content = _thumbnail(value, options)
        except RowError as error:
            shown.append(error.reason)
            continue
        name = digest(content)
        kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
        images.setdefault(name, f"data:image/{kind};base64,{base64.b64encode(content).decode()}")
        shown.append(list(images).index(name))
    if len(values) > MOST_IMAGES:
        shown.append(f"and {len(values) - MOST_IMAGES} more")
    return shown


def _thumbnail(value: Any, options: ImageOptions) -> bytes:
    check_publishable(value, options)
    image = load_image(value, options)
    is_small = max(image.size) <= SIDE
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if is_small and image.width * image.height <= 128 * 128:  # drawings and strips stay sharp
        image.save(out, "PNG", optimize=True)
    else:
        image.save(out, "JPEG", quality=80)
    return out.getvalue()


def _text(value: Any, mark: str) -> str:
    if isinstance(value, str):
        return value
    parts = []
    for message in value:
        kinds = [(block.get("type"), block.get("text") or "") for block in blocks(message)]
        text = "".join(text if kind == "text" else mark.format(kind) for kind, text in kinds).strip()
        if message.get("tool_calls"):
            text = f"{text}\n{json.dumps(message['tool_calls'], ensure_ascii=False, default=str)}".strip()
        parts.append((message["role"], text))
    return parts[0][1] if len(parts) == 1 else "\n\n".join(f"{role}: {text}" for role, text in parts)


def choose_pairs(flow: Flow, margin: np.ndarray, most: int) -> np.ndarray:
    """Choose the pairs to show, about half of them flips, of the largest margins; of other states the smallest."""
    order, margin = [], np.nan_to_num(margin, nan=0.0)
    for state in ("flipped", "relabelled", "dropped", "kept"):
        rows = np.flatnonzero(flow.states[-1] == STATES.index(state))
        order.append(rows[np.argsort(-margin[rows] if state == "flipped" else margin[rows], kind="stable")])
    flips, *others = order
    # Flips take the space that others do not need, and the other way round, dropped and kept pairs last.
    chosen = [flips[: max(most // 2, most - sum(map(len, others)))]]
    for number, rows in enumerate(others):
        left = most - sum(map(len, chosen))
        share = max(left // (len(others) - number), left - sum(map(len, others[number + 1 :])))
        chosen.append(rows[: max(0, share)])
    return np.concatenate(chosen)


def gallery_items(
    pool: Dataset, ledger: CurationLedger, flow: Flow, *, most: int, options: ImageOptions
) -> dict[str, Any]:
    """Return the data of the page's script: `pairs`, as labelled at the source, and `images` as `data:` addresses."""
    state = ledger.state()
    margin = state["strength"].to_numpy()
    rows = pc.index_in(flow.pair_id, value_set=column_of(pool, "pair_id").cast(pa.string()))
    is_missing = rows.is_null().to_numpy(zero_copy_only=False)
    shown = choose_pairs(flow, np.where(is_missing, np.nan, margin), most)
    shown = shown[~is_missing[shown]]
    names = flow.pair_id.take(pa.array(shown))
    histories = _histories(ledger, names)
    since = flow.since()
    encoded = leave_images_encoded(pool).with_format(None)
    images: dict[str, str] = {}
    pairs = []
    for index, name in zip(shown.tolist(), names.to_pylist(), strict=True):
        table = encoded.select([rows[index].as_py()]).with_format("arrow")[:]
        row = next(iter(arrow_rows(table)))
        history = histories.get(name, [])
        pairs.append(
            {
                "id": name,
                "source": str(row.get("source") or ""),
                "state": STATES[flow.states[-1][index]],
                "flipped": bool(flow.flipped[index]),
                "kept": bool(state["kept"][index].as_py()),
                "since": flow.steps[since[index]],
                "strength": _number(margin[index]),
                "reason": history[-1]["reason"] if history else "",
                "history": history,
                **conversation(row),
                "images": thumbnails(row, options, images),
            }
        )
    return {"pairs": pairs, "images": list(images.values())}


def _histories(ledger: CurationLedger, names: pa.Array) -> dict[str, list[dict[str, Any]]]:
    """Return the decisions of each stage about pairs, with rewards as labelled at the source; reads each file once."""
    histories: dict[str, list[dict[str, Any]]] = {}
    for entry in ledger.standing:
        table = ledger.table(entry)
        for row in table.filter(pc.is_in(table["pair_id"], value_set=names)).to_pylist():
            histories.setdefault(row["pair_id"], []).append(_decision(entry, row))
    return histories


def _decision(entry: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    sides, sign = (SIDES[::-1], -1) if row["was_flipped"] else (SIDES, 1)
    models = entry["models"] if "chosen_0" in row else []
    judges = entry["models"] if "vote_0_0" in row else []
    votes = [[row[f"vote_{judge}_{order}"] for order in (0, 1)] for judge in range(len(judges))]
    return {
        "step": step_title(entry),
        "action": row["action"],
        "reason": row["reason"],
        "strength": _number(row["strength"]),
        "scores": [[name, *(_number(row[f"{side}_{model}"]) for side in sides)] for model, name in enumerate(models)],
        # 1 is a vote for the answer that the source calls better.
        "votes": [[name, *(vote and sign * vote for vote in two)] for name, two in zip(judges, votes, strict=True)],
    }


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 4)
