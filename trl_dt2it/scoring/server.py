"""Rewards of a server (vLLM's `/classify`) compared with those of the same model here, with images and without."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from itertools import islice
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
from datasets import Dataset
from PIL import Image
from rich.table import Table

from ..data.columns import leave_images_encoded
from ..data.controls import GRAY
from ..data.mixing import with_canonical_columns
from ..data.rows import SIDES, row_images, row_name, without_empty
from ..models.rendering import get_tokenizer, lacks_special_tokens, render_conversation
from ..utils import check_value, printable, screen_table
from .scorer import RewardScorer, open_images


_SHOWN = ("its images", "blank images")
_BLIND = 0.1  # least share of the local change by the image that a served model shows that sees it
_LONGEST_REPLY = 2**20  # bytes


@dataclass(frozen=True)
class ServerCheck:
    """
    Rewards of n pairs by a server and by the same model here.

    Parameters:
        names (`list[str]`):
            Names of the rows.
        local, served (`np.ndarray`):
            Rewards of shape `(n, 2, 2)`: of chosen and rejected, with the images of the row and with blank ones.
        tolerance (`float`):
            Largest difference that is none.
    """

    names: list[str]
    local: np.ndarray
    served: np.ndarray
    tolerance: float

    @property
    def looks(self) -> bool:
        """True if the rewards of the model here change with the image, so that those of the server have to."""
        return float(np.abs(np.diff(self.local)).max()) > self.tolerance

    @property
    def problem(self) -> str | None:
        """The first thing that is wrong with the served rewards, and what to do, in a sentence; `None` if nothing."""
        difference = np.abs(self.served - self.local)
        largest = difference.max()
        if largest > self.tolerance:
            sigmoid = 1 / (1 + np.exp(-self.local))
            for name, values in (("softmax", np.ones_like(sigmoid)), ("sigmoid", sigmoid)):
                if np.abs(self.served - values).max() <= self.tolerance / 4:
                    return (
                        f"The server returns probabilities, the {name} of rewards: serve the directory that the "
                        'trainer saved, whose config.json has `"problem_type": "regression"`, or start vLLM with '
                        """`--pooler-config '{"use_activation": false}'`."""
                    )
        here, there = (float(np.abs(np.diff(rewards)).max()) for rewards in (self.local, self.served))
        if self.looks and there < _BLIND * here:
            return (
                f"The served reward does not change with the image (by {there:.2g} at most where a blank takes its "
                f"place, here by {here:.2g}): the server drops images or reads them wrong; compare its chat template "
                "and processor with those in the model's directory."
            )
        if largest > self.tolerance:
            pair, side, shown = np.unravel_index(difference.argmax(), difference.shape)
            return (
                f"Rewards differ by up to {largest:.3g}, more than {self.tolerance:g}: of {self.names[pair]}, "
                f"`{SIDES[side]}` with {_SHOWN[shown]}, the server says {self.served[pair, side, shown]:.4f} and the "
                f"model here {self.local[pair, side, shown]:.4f}; serve the same weights, chat template and pixel "
                "limits, in the same dtype."
            )
        return None

    def table(self) -> Table:
        """Make a table of the rewards for the screen."""
        columns = ("pair", "answer", "here", "served", "difference", "blank here", "blank served")
        rows = [
            (name, side, f"{own[0]:.4f}", f"{got[0]:.4f}", f"{got[0] - own[0]:+.4f}", f"{own[1]:.4f}", f"{got[1]:.4f}")
            for name, local, served in zip(self.names, self.local, self.served, strict=True)
            for side, own, got in zip(SIDES, local, served, strict=True)
        ]
        return screen_table(columns, rows, title="Rewards here and of the server")


def check_server(
    scorer: RewardScorer,
    dataset: Dataset,
    server: str,
    *,
    num_pairs: int = 8,
    tolerance: float = 0.1,
    model: str | None = None,
    api_key_env: str | None = None,
    timeout: float = 120.0,
) -> ServerCheck:
    """
    Compare the rewards of a few pairs by a server with those by the same model here, also with blank images.

    Each answer is a request to `/classify` with the conversation as messages, its images decoded as in training and
    sent as PNG. The server's answer is `data[0].probs[0]`, as vLLM gives it.

    Args:
        scorer, dataset ([`RewardScorer`], `Dataset`):
            The model here, and preference rows, of which the first with images are sent.
        server (`str`):
            Address of the server, such as `"http://localhost:8000"`. Redirects are not followed.
        num_pairs (`int`, *optional*, defaults to `8`):
            Most rows; each takes four requests.
        tolerance (`float`, *optional*, defaults to `0.1`):
            Largest difference of rewards that is none: for half precision. In fp32 on both sides, 1e-3 will do.
        model, api_key_env (`str`, *optional*):
            Name of the model on the server, if it has several, and of an environment variable that holds its key.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds that the server may take for an answer.

    Returns:
        [`ServerCheck`]: rewards, and as `problem` what is wrong with them.

    Raises:
        `ValueError`: if an argument is out of range, or there is no row.
        `RuntimeError`: if the server does not answer with a reward; the message is one sentence.

    Example:

    ```python
    >>> from trl_dt2it.data import load_preferences
    >>> from trl_dt2it.scoring import RewardScorer, check_server

    >>> pairs = load_preferences("trl", "pairs.jsonl")
    >>> scorer = RewardScorer.from_pretrained("outputs/my-reward-model")
    >>> check = check_server(scorer, pairs, "http://localhost:8000")
    >>> assert check.problem is None, check.problem
    ```
    """
    ask = Server(server, model, api_key_env, timeout)
    check_value("`num_pairs`", num_pairs, num_pairs >= 1, "it must be at least 1")
    check_value("`tolerance`", tolerance, 0 < tolerance < float("inf"), "it must be above 0")
    processor = scorer.collator.processing_class
    if getattr(processor, "chat_template", None) is None:
        raise ValueError("The model has no chat template, without which a server cannot read conversations.")
    rows = list(leave_images_encoded(with_canonical_columns(_first_rows(dataset, num_pairs))))
    if not rows:
        raise ValueError("There is no row to compare rewards of.")
    names = [row_name(row, index) for index, row in enumerate(rows)]
    images = [
        open_images(row_images(row), scorer.collator.image_options, processor, name)
        for row, name in zip(rows, names, strict=True)
    ]
    blanks = [[Image.new("RGB", image.size, GRAY) for image in some] for some in images]
    prompts, answers = [row["prompt"] for row in rows], [[row[side] for side in SIDES] for row in rows]
    mean, std = scorer.normalization
    local, served = np.empty((2, len(rows), 2, 2))
    for shown, pictures in enumerate((images, blanks)):
        local[:, :, shown] = np.array(scorer.score(prompts, answers, pictures)) * std + mean
        for index, (prompt, pair, some) in enumerate(zip(prompts, answers, pictures, strict=True)):
            for side, answer in enumerate(pair):
                text = render_conversation([*prompt, *answer], some, processor)
                lacks_bos = get_tokenizer(processor).bos_token and lacks_special_tokens(text, processor)
                extra = {"add_special_tokens": True} if lacks_bos else {}
                served[index, side, shown] = ask.reward(_messages([*prompt, *answer], some), **extra)
    return ServerCheck(names, local, served, tolerance)


def _first_rows(dataset: Dataset, count: int) -> Dataset:
    """Select the first rows with images, or the first of a set without."""
    columns = [name for name in ("images", "image") if name in dataset.column_names]
    rows = leave_images_encoded(dataset.with_format(None).select_columns(columns)) if columns else []
    pictured = list(islice((index for index, row in enumerate(rows) if row_images(row)), count))
    return dataset.select(pictured or range(min(count, len(dataset))))


def _messages(messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Write messages as the API takes them, with each image in its position."""
    rest = iter(images)
    return [
        {**without_empty(message), "content": [_block(block, rest) for block in message["content"]]}
        for message in messages
    ]


def _block(block: Mapping[str, Any], images: Any) -> dict[str, Any]:
    if block["type"] != "image":
        return {"type": "text", "text": block["text"]}
    buffer = io.BytesIO()
    next(images).save(buffer, format="PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}


class _NoRedirect(HTTPRedirectHandler):
    """Handler that makes a redirect an error: the key would go with it."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Server:
    """A server that scores conversations."""

    def __init__(self, address: str, model: str | None, api_key_env: str | None, timeout: float = 120.0) -> None:
        parts = urlsplit(address)  # not quoted if it is bad, because it may hold a secret
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or "@" in parts.netloc
            or parts.query
            or parts.fragment
        ):
            raise ValueError("`server` must be an address such as 'http://localhost:8000', without user or query.")
        self.where, self.url = parts.netloc, address.rstrip("/") + "/classify"
        self.fields: dict[str, Any] = {"add_generation_prompt": False} | ({} if model is None else {"model": model})
        self.headers, self.timeout = {"Content-Type": "application/json"}, timeout
        if api_key_env is not None:
            if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", api_key_env):
                raise ValueError("`api_key_env` must name an environment variable in capitals, not the key itself.")
            if not re.fullmatch("[!-~]+", key := os.environ.get(api_key_env, "").strip()):
                raise ValueError(f"The environment variable {api_key_env} holds no key; put the server's key in it.")
            self.headers["Authorization"] = f"Bearer {key}"

    def reward(self, messages: list[dict[str, Any]], **fields: Any) -> float:
        """Ask for the reward of the last message."""
        body = json.dumps({**self.fields, **fields, "messages": messages}).encode()
        try:
            with build_opener(_NoRedirect).open(Request(self.url, body, self.headers), timeout=self.timeout) as reply:
                content = reply.read(_LONGEST_REPLY)
        except HTTPError as error:
            with error:
                said = printable(error.read(_LONGEST_REPLY).decode(errors="replace"), 200).strip()
            advice = "is the address that of `vllm serve ... --runner pooling`?" if error.code in (404, 405) else ""
            message = (
                f"The server at {self.where} answers `/classify` with status {error.code}: {said or error.reason}"
            )
            raise RuntimeError(f"{message}; {advice}" if advice else message) from error
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            message = f"The server at {self.where} does not answer ({reason or type(error).__name__})"
            raise RuntimeError(f"{message}; start it, or correct `server`.") from error
        try:
            (scored,) = json.loads(content)["data"]
            probs = [float(number) for number in scored["probs"]]
        except (ValueError, TypeError, KeyError) as error:
            message = f"The server at {self.where} answers `/classify` with something else than a reward"
            raise RuntimeError(f"{message}; what it serves has to be a classification model.") from error
        if len(probs) != 1 or not np.isfinite(probs[0]):
            message = f"The server at {self.where} gives {probs} for an answer, and not one finite reward"
            raise RuntimeError(f"{message}; serve the directory that the trainer saved.")
        return probs[0]
