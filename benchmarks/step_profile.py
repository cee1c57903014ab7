"""Where does the time of a training step go, and what is the next limit?

Profiles one step of two pairs (prompt 1100 tokens, answers 100) on a random Qwen3-VL, in one row per pair and in two:
collation, forward pass of vision tower and language model, backward pass, optimiser; and the kinds of operations
inside. Draws both as bars.

Prints a table and writes `benchmarks/results/step_profile.{json,md,png}`.

usage: python benchmarks/step_profile.py [RUNS]
"""

import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import matplotlib
import torch
from lib.report import RESULTS, markdown, write
from lib.vlm import batches, load, rows_of
from torch.nn.functional import logsigmoid
from torch.profiler import ProfilerActivity, profile

from trl_dt2it import MultimodalPreferenceCollator


matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402  (after the back end is chosen)


SHAPE, PAIRS = "1100/100", 2
STAGES = ("collation", "vision, forward", "language model, forward", "backward", "optimiser")
# Beginnings of operators' names, the first that fits counts.
KINDS = {
    "attention": ("aten::_scaled_dot_product", "aten::_flash", "aten::scaled_dot"),
    "linear layers": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::mkldnn", "aten::convolution"),
    "optimiser": ("aten::_fused_adamw",),
    "embedding": ("aten::embedding", "aten::index", "aten::_index", "aten::masked_scatter"),
    "copies and joins": ("aten::copy", "aten::cat", "aten::fill", "aten::zero", "aten::clone", "aten::split"),
}
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#9c6b4e", "#97bbf5")


def profile_layout(directory: Path, layout: str, runs: int) -> dict[str, dict[str, float]]:
    """Seconds by stage and by kind of operation, medians."""
    model, processor = load(directory)
    rows = rows_of(directory, SHAPE, PAIRS)
    batch = batches(processor, rows)[layout]
    collator = MultimodalPreferenceCollator(processor, share_prefix=layout == "one row")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    forward: dict[str, float] = defaultdict(float)

    def stopwatch(name: str, module: torch.nn.Module) -> None:
        started = []
        module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))
        module.register_forward_hook(
            lambda *_: forward.__setitem__(name, forward[name] + time.perf_counter() - started.pop())
        )

    stopwatch("vision, forward", model.model.visual)
    stopwatch("language model, forward", model.model.language_model)

    def step() -> dict[str, float]:
        forward.clear()
        times = [time.perf_counter()]
        collator(rows)
        times.append(time.perf_counter())
        loss = -logsigmoid(torch.sub(*model(**batch).logits[:, 0].chunk(2))).mean()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimiser.step()
        optimiser.zero_grad()
        times.append(time.perf_counter())
        collation, _, backward, optimising = (b - a for a, b in zip(times, times[1:], strict=False))
        return {"collation": collation, **forward, "backward": backward, "optimiser": optimising}

    step()
    measured = [step() for _ in range(runs)]
    stages = {name: median(run[name] for run in measured) for name in STAGES}
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    kinds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "elementwise and norms")
        if event.key.startswith("aten::"):
            kinds[kind] += event.self_cpu_time_total / 1e6
    return {"stages": stages, "kinds": dict(kinds)}


def draw(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    figure, panels = pyplot.subplots(2, 1, figsize=(9, 4.8), layout="constrained")
    titles = {"stages": "By stage", "kinds": "By kind of operation"}
    for panel, (part, title) in zip(panels, titles.items(), strict=True):
        left = [0.0] * len(results)
        for name, colour in zip(next(iter(results.values()))[part], COLOURS, strict=False):
            widths = [results[layout][part].get(name, 0.0) for layout in results]
            panel.barh(list(results), widths, left=left, color=colour, label=name, height=0.6)
            for index, width in enumerate(widths):
                if width > 0.05 * max(sum(r[part].values()) for r in results.values()):
                    panel.text(left[index] + width / 2, index, f"{width:.1f}", ha="center", va="center", fontsize=9)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        panel.set_title(title, loc="left", fontsize=11)
        panel.set_xlabel("seconds")
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    figure.suptitle(f"A training step of {PAIRS} pairs, {SHAPE} tokens, on {torch.get_num_threads()} CPU cores")
    figure.savefig(path, dpi=150)


def main(runs: int) -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        load(Path(folder))
        results = {layout: profile_layout(Path(folder), layout, runs) for layout in ("one row", "two rows")}
    RESULTS.mkdir(exist_ok=True)
    draw(results, RESULTS / "step_profile.png")
    lines = [f"A training step of {PAIRS} pairs, {SHAPE} tokens, fp32; seconds, medians of {runs} steps.", ""]
    for part, title in (("stages", "stage"), ("kinds", "kind of operation")):
        names = list(results["one row"][part])
        table = []
        for name in names:
            one, two = (results[layout][part].get(name, 0.0) for layout in results)
            share = one / sum(results["one row"][part].values())
            table.append([name, f"{one:.2f}", f"{share:.0%}", f"{two:.2f}", f"{two / one:.2f}x" if one else ""])
        lines += [markdown([title, "one row, s", "share", "two rows, s", "less by"], table), ""]
    lines += ["![profile](step_profile.png)"]
    write("step_profile", "\n".join(lines), {"results": results, "runs": runs})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
