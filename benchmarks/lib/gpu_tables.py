"""The tables of `gpu_shared_prefix.py`, from what its parts found."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from .report import markdown


def tables(record: dict[str, Any], layouts: Sequence[str]) -> str:
    """The parts that are there, each with what it measured."""
    lines = [
        f"One {record.get('card', 'CPU')}; a Qwen3-VL with the sizes of the published 2B model and random weights. "
        "`sdpa` is torch's attention, and `flash` FlashAttention 2: the CUDA kernels that torch carries, called as "
        "transformers calls those of the package flash-attn, vision tower included"
        + ("." if record.get("kernel shares heads", True) else ", with keys and values repeated for the heads.")
    ]
    parts = (("speed", _speed), ("scoring", _scoring), ("exactness", _exactness), ("training", _training))
    for name, part in parts:
        if name in record:
            lines += ["", *part(record, layouts)]
    for note in record.get("notes", []):
        lines += ["", note]
    return "\n".join(lines)


def _speed(record: dict[str, Any], layouts: Sequence[str]) -> list[str]:
    rate = record.get("matrix_rate")
    rows, memory = [], []
    for result in record["speed"]:
        seconds, operations = result["seconds"], result["operations"]
        setting = [result["attention"], "yes" if result["checkpointing"] else "no", result["shape"]]
        setting.append(str(result["pairs"]))
        plain, once = (result.get(f"faster than {name}") for name in (layouts[2], layouts[1]))
        passes = 4 if result["checkpointing"] else 3
        shares = [
            f"{100 * passes * operations[name] / median(seconds[name]) / rate:.0f}%"
            if rate and name in seconds
            else "–"
            for name in ("one row", "two rows")
        ]
        rows.append(
            [
                *setting,
                *(f"{1e3 * median(seconds[name]):.0f}" if name in seconds else "no memory" for name in layouts),
                f"{plain:.2f}x" if plain else "–",
                f"{once:.2f}x" if once else "–",
                f"{result['limit']:.2f}x",
                f"{plain / result['limit']:.2f}" if plain else "–",
                *shares,
            ]
        )
        found = {
            one["layout"]: one["seconds"]
            for one in record.get("busy", [])
            if not result["checkpointing"] and (one["attention"], one["shape"]) == (setting[0], setting[2])
        }
        rows[-1] += [
            f"{100 * found[name] / median(seconds[name]):.0f}%" if name in found else "–"
            for name in ("one row", "two rows")
        ]
        peaks = result["peak_bytes"]
        memory.append(
            [
                *setting,
                *("no memory" if peaks[name] is None else f"{peaks[name] / 1e9:.1f}" for name in layouts),
                f"{peaks['two rows'] / peaks['one row']:.2f}x" if peaks["two rows"] and peaks["one row"] else "–",
            ]
        )
    setting = ["attention", "checkpointing", "prompt/answer tokens", "pairs"]
    names = [*setting, *(f"{name}, ms" for name in layouts), "faster than two rows", "than image once"]
    names += ["operations, fewer by", "share of the limit", "of the matrix rate, one row", "two rows"]
    names += ["GPU computes, one row", "two rows"]
    text = f"Forward and backward pass in bf16, medians of {record['runs of speed']} runs in turn by the GPU's clock."
    if rate:
        text += f" A large matrix product runs at {rate / 1e12:.0f} TFLOP/s here."
    names_of_memory = [*setting, *(f"{name}, GB" for name in layouts), "less than two rows by"]
    return [
        *(text, "", markdown(names, rows), ""),
        *("Peak memory of the same above the weights, gradients included.", "", markdown(names_of_memory, memory)),
    ]


def _scoring(record: dict[str, Any], layouts: Sequence[str]) -> list[str]:
    ways = list(record["scoring"][0]["seconds"])
    rows = [
        [
            *(result["attention"], result["shape"]),
            *(f"{1e3 * median(result['seconds'][name]):.0f}" for name in ways),
            *(f"{result['speedups'][name]:.2f}x" for name in ways[1:]),
            *(f"{result['errors'][name]:.1e}" for name in ways),
        ]
        for result in record["scoring"]
    ]
    names = ["attention", "prompt/answer tokens", *(f"{name}, ms" for name in ways)]
    names += [f"faster than {name}" for name in ways[1:]] + [f"error, {name}" for name in ways]
    text = "Eight candidates of a prompt with an image through `RewardScorer` in bf16, from the image to the numbers, "
    text += "the image processor on the CPU included. Errors are those of the rewards against fp32, one by one."
    return [text, "", markdown(names, rows)]


def _exactness(record: dict[str, Any], layouts: Sequence[str]) -> list[str]:
    groups: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for result in record["exactness"]:
        by_layout = groups.setdefault((result["numbers"], result["attention"]), {})
        by_layout.setdefault(result["layout"], []).append(result)
    rows = [
        [
            *setting,
            what,
            *(f"{_mean(results[layout], what):.1e}" for layout in layouts),
            "–" if setting[0] == "fp32" else f"{_ratio(results[layouts[0]], results[layouts[2]], what):.2f}",
        ]
        for setting, results in groups.items()
        for what in ("rewards", "margins", "gradients")
    ]
    draws = len({tuple(result["draw"]) for result in record["exactness"]})
    text = f"Errors against two plain rows in fp32, norm of the difference over norm, means of {draws} batches. "
    text += "`autocast` is fp32 weights under bf16 autocast, the Trainer's `bf16=True`; `bf16` is weights in bf16."
    names = ["numbers", "attention", "error of", *layouts, "one row over two rows"]
    return [text, "", markdown(names, rows)]


def _training(record: dict[str, Any], layouts: Sequence[str]) -> list[str]:
    rows = [
        [
            result["layout"],
            str(result["steps"]),
            "–" if result["seconds"] is None else f"{result['seconds']:.0f}",
            "–" if result["accuracy"] is None else f"{result['accuracy']:.4f}",
        ]
        for result in record["training"]
    ]
    text = "The digits recipe with `--use_cpu false --bf16 true`: a model of 1 M parameters, 32 pairs a step."
    return [text, "", markdown(["layout", "steps", "training, s", "held-out pair accuracy"], rows)]


def _ratio(one: Sequence[dict[str, Any]], two: Sequence[dict[str, Any]], what: str) -> float:
    return _mean(one, what) / _mean(two, what)


def _mean(results: Sequence[dict[str, Any]], what: str) -> float:
    return sum(result[what] for result in results) / len(results)
