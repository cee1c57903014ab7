"""Are preference files read right as people really publish them?

Takes a folder of clones of public repositories, `FOLDER/OWNER/NAME`, copies the files listed below out of them, each
at the commit that is named, and reads them as a user would. Prints a table in Markdown: rows in, rows out, and rows
quarantined by reason. Where a repository holds the images of its rows, each is decoded; where it does not, the table
says what `validate` finds when it looks for them. Nothing is fetched: commits of pull requests and of other branches
have to be in the clones (`git fetch origin pull/NUMBER/head`).

usage: python benchmarks/public_files.py FOLDER [--only TEXT]
"""

import argparse
import json
import logging
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from time import perf_counter
from typing import Any

from datasets import Dataset, disable_progress_bars
from lib.report import markdown

from trl_dt2it.data import load_preferences, reformulate_t2i, validate
from trl_dt2it.data.columns import column_of, leave_images_encoded
from trl_dt2it.evaluation import BENCHMARKS, read_benchmark


HEADER = ("file", "adapter", "rows in", "rows out", "rows quarantined", "read as expected", "images", "seconds")


@dataclass(frozen=True)
class PublicFile:
    """
    A file of a public repository, and how it is read.

    Parameters:
        path (`str`):
            The file in the repository.
        adapter (`str`):
            A name of `load_preferences` or of `read_benchmark`, or `"reformulate_t2i"`.
        expected (`Callable`, *optional*):
            An independent reading of a row: a question, the better and the worse answer, and the images, for each pair
            that it holds; or, of text to image, a caption, the better and the worse image.
        options (`dict`, *optional*):
            Options of the adapter.
        block (`str`, *optional*):
            Of a page of documentation, a text that only the code block with the sample rows contains.
        images (`str`, *optional*):
            Folder of the repository with the images of the rows, if it holds them.
        image_root (`str`, *optional*, defaults to `"."`):
            Folder of the repository that the paths of images start from.
    """

    path: str
    adapter: str
    expected: Callable[[Any], list[tuple]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    block: str | None = None
    images: str | None = None
    image_root: str = "."


@dataclass(frozen=True)
class Repository:
    """A public repository on GitHub, a commit of it, and files that it holds there."""

    name: str
    commit: str
    files: tuple[PublicFile, ...]


@dataclass(frozen=True)
class Outcome:
    """
    What a file gave.

    Parameters:
        rows (`int`):
            Rows in the file.
        pairs (`int`):
            Pairs that can be used, as far as is known without images that are not there.
        reasons (`Counter[str]`):
            Pairs that cannot be used, by reason.
        agreement (`str`):
            How many of the loaded pairs an independent reading of the file has, too.
        images (`str`):
            How many images the pairs have, and whether they were decoded.
        seconds (`float`):
            How long loading and validation took.
        refusal (`str`):
            The sentence that refuses the file where no pair can be used.
    """

    rows: int
    pairs: int
    reasons: Counter[str]
    seconds: float
    agreement: str = ""
    images: str = ""
    refusal: str = ""


class Sentences(logging.Handler):
    """Collect the messages of the loaders about pairs that they quarantine."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def reasons(self) -> Counter[str]:
        """Numbers of pairs by reason."""
        found: Counter[str] = Counter()
        for text in self.texts:
            if video := re.match(r"Left (\d+) of \d+ rows of .* out, those about a video", text):
                found["no frames of the video"] += int(video[1])
            elif summary := re.search(r"\(((?:\d+ [a-z_]+(?:, )?)+)\)", text):
                found.update({reason: int(n) for n, reason in (part.split() for part in summary[1].split(", "))})
        return found


# What the rows of each layout hold, read without the package.


def conversation(row: dict, name: str = "conversations", text: str = "value") -> str:
    return "\n".join(turn[text] for turn in row[name])


def of_strings(
    question: str, chosen: str = "chosen", rejected: str = "rejected", image: str | None = None
) -> Callable:
    return lambda row: [(row[question], row[chosen], row[rejected], [row[image]] if image else [])]


def of_ranked_answers(image: str) -> Callable:
    def read_row(row: dict) -> list[tuple]:
        better, worse = (row["response"][row["human_ranking"].index(rank)] for rank in (0, 1))
        return [(row["query"], better, worse, [row[image]])]

    return read_row


def of_share_gpt(row: dict) -> list[tuple]:
    return [(conversation(row), row["chosen"]["value"], row["rejected"]["value"], row.get("images", []))]


def of_two_conversations(row: dict) -> list[tuple]:
    chosen, rejected = (row[name][-1]["value"] for name in ("conversations", "rejected_conversations"))
    return [(row["conversations"][0]["value"], chosen, rejected, [row["image"]])]


def of_message_lists(prompt: str, chosen: str, rejected: str) -> Callable:
    def read_row(row: dict) -> list[tuple]:
        for part in prompt.split(".")[:-1]:
            row = {**row, **row[part]}
        answers = [row[name] if isinstance(row[name], dict) else row[name][0] for name in (chosen, rejected)]
        turns = conversation(row, prompt.split(".")[-1], "content")
        return [(turns, *(answer["content"] for answer in answers), [])]

    return read_row


def of_oumi(row: dict) -> list[tuple]:
    return [(row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"], row["images"])]


def of_v1_messages(row: dict) -> list[tuple]:
    chosen, rejected = (
        ["".join(block["value"] for block in message["content"]) for message in row[f"{side}_messages"]]
        for side in ("chosen", "rejected")
    )
    return [("\n".join(chosen[:-1]), chosen[-1], rejected[-1], [])]


def of_rejected_response(row: dict) -> list[tuple]:
    *prompt, answer = row["messages"]
    return [(conversation({"prompt": prompt}, "prompt", "content"), answer["content"], row["rejected_response"], [])]


def of_ranking(row: dict) -> list[tuple]:
    images = sorted(zip(row["ranking"], row["generations"], strict=True))
    return [(row["prompt"], better, worse) for (i, better), (j, worse) in combinations(images, 2) if i < j]


def of_mmrb2(row: dict) -> list[tuple]:
    (_, caption), *_ = row["prompt_content"]
    better, worse = ("a", "b") if row["chosen"] == "A" else ("b", "a")
    images = (row[f"response_{side}"]["response_content"][0][1] for side in (better, worse))
    return [(caption, *images)] * 2  # in both orders


def of_two_images(caption: str, better: str, worse: str) -> Callable:
    return lambda row: [(row[caption] if isinstance(row[caption], str) else row[caption][0], row[better], row[worse])]


def of_image_rows(row: dict) -> list[tuple]:
    return of_strings("prompt", image="image")(row) if row.get("image") else []  # others are about a video


Sample = partial(PublicFile, "README.md")
SWIFT_DOCS = partial(PublicFile, "docs/source_en/Customization/Custom-dataset.md", "ms_swift")
XTUNER_DOCS = partial(PublicFile, "docs/zh_cn/legacy/reward_model/preference_data.md", "trl")
TURBO = partial(
    PublicFile,
    adapter="columns",
    expected=of_message_lists("context", "answer_w", "answer_l"),
    options={"question": "context", "chosen": "answer_w", "rejected": "answer_l"},
)
REID = "data/mllm_reid_txt2img_one2many_2k_new_dpo_{}.json"

REPOSITORIES = (
    # Benchmarks.
    Repository(
        "vl-rewardbench/VL_RewardBench",
        "e492d6548558d9fcac8959de60be8f4e8a640dc8",
        (PublicFile("data/data.jsonl", "vl-rewardbench", of_ranked_answers("image_path")),),
    ),
    Repository(
        "CodeGoat24/UnifiedReward",
        "ff6f520247a2d36e2aff7b2ba53a935afd437f66",
        (
            PublicFile(
                "UnifiedReward-Think/benchmark_evaluation/VL-RewardBench/data.json",
                "vl-rewardbench",
                of_ranked_answers("image"),
            ),
        ),
    ),
    Repository(
        "yfzhang114/r1_reward",
        "3693413abedd4a1efaa9484143acfaa5d78a8d2b",
        (
            PublicFile("inference/MM-RLHF-Reward/mm_reward_bench.jsonl", "mm-rlhf-rewardbench", of_image_rows),
            PublicFile("inference/VL-Reward-Bench/data.jsonl", "mm_rlhf", of_image_rows),
        ),
    ),
    Repository(
        "facebookresearch/MMRB2",
        "58ee39c0419440cd299fc83b7f444ab445ccf8d6",  # on the branch `add_evaluation`
        (PublicFile("benchmark/t2i.json", "mmrb2-t2i", of_mmrb2), PublicFile("benchmark/edit.json", "mmrb2-t2i")),
    ),
    Repository(
        "facebookresearch/MMRB2",
        "7ff0552cf298441af5ebbabea634b682ef04afee",
        (PublicFile("benchmark/t2i_response_only.json", "mmrb2-t2i"),),
    ),
    # Text to image.
    Repository(
        "THUDM/ImageReward",
        "c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb",
        (PublicFile("data/test.json", "imagereward_rankings", of_ranking),),
    ),
    Repository(
        "sjz5202/LLaVA-Reward",
        "f082993e7da2e4a76c0af66afc01afe824e754d3",
        (
            PublicFile(
                "data/sample_test/pairwise_sample.json",
                "llava_reward",
                of_two_images("prompt", "chosen_path", "reject_path"),
                images="data/sample_test/sample_img",
            ),
        ),
    ),
    Repository(
        "MJ-Bench/MJ-Bench",
        "eb269adaff40460bed054963c504772317ad4955",
        tuple(
            PublicFile(
                f"quality/{part}/captions_{part.removesuffix('_indoor')}.json",
                "reformulate_t2i",
                of_two_images("caption", "image_0", "image_1"),
                # `label_0` is 1 in all rows: the first image is the better one.
                {"caption": "caption", "chosen_image": "image_0", "rejected_image": "image_1"},
                images=f"quality/{part}/examples_{part}",
                image_root=f"quality/{part}/examples_{part}",
            )
            for part in ("human", "objects_indoor", "mpii")
        ),
    ),
    # Answers about images.
    Repository(
        "PKU-Alignment/align-anything",
        "3f9decc221be74b2052e712e3a32e155686ec6ec",
        (
            PublicFile(
                "projects/janus/example/preference/text_image_to_text/train.json",
                "columns",
                of_strings("question", "better_response", "worse_response", "image"),
                {"question": "question", "chosen": "better_response", "rejected": "worse_response", "image": "image"},
                images="projects/janus/example/images",
                image_root="projects/janus",
            ),
            PublicFile(
                "projects/janus/example/preference/text_to_image/train.json",
                "reformulate_t2i",
                of_two_images("prompt", "better_image", "worse_image"),
                {"caption": "prompt", "chosen_image": "better_image", "rejected_image": "worse_image"},
                images="projects/janus/example/images",
                image_root="projects/janus",
            ),
        ),
    ),
    Repository(
        "luka-group/mDPO",
        "2221bb317a29dfe0f8d2c710cd8572e9d7ec101a",
        (
            PublicFile(
                "data/sample_data.json",
                "columns",
                of_strings("prompt", image="img_path"),
                {"question": "prompt", "chosen": "chosen", "rejected": "rejected", "image": "img_path"},
            ),
        ),
    ),
    Repository(
        "oumi-ai/oumi",
        "d8ed07778d7931565798ad45a859cafb54d4fc58",
        (PublicFile("data/dataset_examples/vision_language_dpo_format.jsonl", "trl", of_oumi),),
    ),
    Repository(
        "EchoseChen/SPA-VL-RLHF",
        "cade637c52a86f1ea4c1a7eb27e10133ef64c31c",
        (Sample("spa_vl", of_strings("question", image="image"), block='"rejected": "The person in the image'),),
    ),
    Repository(
        "YiyangZhou/POVID",
        "92c7c67850fa38cb25c953db329aa9298bab8b9e",
        (Sample("povid", of_two_conversations, block='"rejected_conversations"'),),
    ),
    Repository(
        "2U1/Qwen-VL-Series-Finetune",
        "93fef86285e442b1ed80a5c6f2724e6e06d3cde5",
        (Sample("mm_rlhf", of_image_rows, block='"rejected": "The image features'),),
    ),
    Repository(
        "TideDra/VL-RLHF",
        "e9737dcbf49ee8a23ad25b30dbb4f2b62437b5f4",
        (Sample("mm_rlhf", of_image_rows, block='"rejected":"This is a dog."'),),
    ),
    Repository(
        "zhang123434/DT2IT-MRM",
        "ec2edc9d1fa74d5dd3a0ee2e0dd02dff87a71327",
        (Sample("llamafactory", of_share_gpt, block='"value": "REJECTED_RESPONSE"'),),
    ),
    # LLaMA-Factory's own files and those of its users, in pull requests.
    Repository(
        "hiyouga/LLaMA-Factory",
        "ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30",
        (
            PublicFile("data/dpo_en_demo.json", "llamafactory", of_share_gpt),
            PublicFile("data/dpo_zh_demo.json", "llamafactory", of_share_gpt),
            PublicFile("data/v1_dpo_demo.jsonl", "llamafactory", of_v1_messages),
            PublicFile(
                "docs/zh/data-preparation/data-processing.md",
                "llamafactory",
                of_v1_messages,
                block='"rejected_messages"',
            ),
        ),
    ),
    Repository(
        "hiyouga/LLaMA-Factory",
        "bb009ec9fa9137fed65e5798d34c1488032a3fcc",  # pull request 10131
        tuple(PublicFile(REID.format(part), "llamafactory", of_share_gpt) for part in ("max", "min", "test_100")),
    ),
    Repository(
        "hiyouga/LLaMA-Factory",
        "7b7ba5a97d39423ebc64c377fdeb282f53a6890f",  # pull request 10357
        (
            PublicFile("data/distill_ocr_chat_translate_4lang_pref.jsonl", "trl", of_strings("prompt")),
            PublicFile(
                "data/distill_python_rust_pref.jsonl",
                "llamafactory",
                of_strings("prompt"),
                {"columns": {"prompt": "prompt"}},
            ),
        ),
    ),
    Repository(
        "namezhenzhang/CS291",
        "b2ff3e0fb6ceeb8f8d875777e2591a6f6d176512",
        (PublicFile("data/preference_data.json", "llamafactory", of_share_gpt),),
    ),
    # ms-swift's own samples and files of its users, in pull requests.
    Repository(
        "modelscope/ms-swift",
        "3602360a562313afbf2ef6065fdf61f271a2c5b9",
        (
            SWIFT_DOCS(of_rejected_response, block='"rejected_response": "I don\'t know"}'),
            SWIFT_DOCS(block='"rejected_messages": [{"role": "user", "content": "<image>What is this?"}'),
            SWIFT_DOCS(block="# Example 1 can also be written as:"),
        ),
    ),
    Repository(
        "modelscope/ms-swift",
        "82eba95d40846e43a172f1544f7de30290caa7b5",  # pull request 6323
        (PublicFile("examples/sampler/sample/sample_output/sampling.jsonl", "ms_swift", of_rejected_response),),
    ),
    Repository(
        "modelscope/ms-swift",
        "585b5ef942e2360a2d9c6e9dd07f1961b90335ca",  # pull request 6583
        (PublicFile("curation/data/dataset.json", "ms_swift", of_rejected_response),),
    ),
    # Text alone.
    Repository(
        "InternLM/xtuner",
        "b934f462095c1e750229de35367c50ae36caa786",
        (
            XTUNER_DOCS(of_message_lists("prompt", "chosen", "rejected"), block="Who won the world series in 2020?"),
            XTUNER_DOCS(of_message_lists("prompt", "chosen", "rejected"), block="How can I learn to better regulate"),
        ),
    ),
    Repository(
        "hpcaitech/ColossalAI",
        "4f9953be335ef371b3848719ddafe596c01ecd37",
        (
            PublicFile(
                "applications/ColossalChat/tests/test_data/dpo/test_dpo_data.jsonl",
                "columns",
                of_message_lists("context", "chosen", "rejected"),
                {"question": "context", "chosen": "chosen", "rejected": "rejected"},
            ),
        ),
    ),
    Repository(
        "microsoft-foundry/fine-tuning",
        "de257fc40581a1e6040d0eed682eab89f6d107e8",
        (
            PublicFile(
                "Sample_Datasets/Direct_Preference_Optimization/orca_dpo_pairs/validation.jsonl",
                "columns",
                of_message_lists("input.messages", "preferred_output", "non_preferred_output"),
                {"question": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"},
            ),
        ),
    ),
    Repository(
        "turbo-llm/turbo-alignment",
        "72e737dcd3ed85986e3d80059c19208578c31395",
        (
            TURBO("tests/fixtures/datasets/rm/dpo_chat.jsonl"),
            TURBO("tests/fixtures/datasets/rm/train_preferences.jsonl"),
        ),
    ),
    Repository(
        "SAISriram19/meta",
        "885189f02884c697505a11f634fa6a0ac5f6cb1a",
        (PublicFile("data/adversary_dpo_pairs.jsonl", "trl", of_strings("prompt")),),
    ),
    Repository(
        "namikazi25/gate_pilot",
        "587ce4636efaa11e662073a2ba1c54eeb8ccb677",
        (PublicFile("data/dpo_train.jsonl", "trl", of_strings("prompt")),),
    ),
    Repository(
        "JxKim/0415_llm",
        "0df6e7d3fd6bc70eaeb72711a9bde8920d4cdda4",
        (PublicFile("data/dpo_pairs.jsonl", "trl", of_strings("prompt")),),
    ),
    Repository(
        "lets-data-science/finetuning-lab",
        "679bf8719081d588d05ddc78ba49f2ec7fc82c93",
        (
            PublicFile(
                "data/pref_shard_10of12.json",
                "columns",
                of_strings("request"),
                {"question": "request", "chosen": "chosen", "rejected": "rejected"},
            ),
        ),
    ),
)


def git(checkout: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(checkout), *arguments], check=True, capture_output=True).stdout


def sample_rows(page: str, text: str) -> list[Any]:
    """The rows of the one code block of a page with a text, without the dots that stand for more of them."""
    blocks = re.findall(r"^[ \t]*(?:```|~~~)[^\n]*\n(.*?)^[ \t]*(?:```|~~~)", page, flags=re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if text in block]
    lines = [line for line in block.splitlines() if line.strip(" .,\t") and not line.startswith("#")]
    try:
        rows = json.loads(re.sub(r",\s*\]$", "]", "\n".join(lines)))
    except ValueError:
        rows = [json.loads(line) for line in lines]
    return rows if isinstance(rows, list) else [rows]


def copy_out(repository: Repository, file: PublicFile, checkouts: Path, work: Path) -> Path:
    """The file in a folder of its own, with the images that its repository has."""
    checkout = checkouts / repository.name
    content = git(checkout, "show", f"{repository.commit}:{file.path}")
    path = work / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.block is not None:
        path = path.with_suffix(".json")
        content = json.dumps(sample_rows(content.decode(), file.block), ensure_ascii=False).encode()
    path.write_bytes(content)
    if file.images:
        archive = git(checkout, "archive", repository.commit, "--", file.images)
        subprocess.run(["tar", "-x", "-C", str(work)], input=archive, check=True)
    return path


def load(file: PublicFile, path: Path, image_root: Path | None) -> Dataset:
    if file.adapter in BENCHMARKS:
        return read_benchmark(file.adapter, path, image_root=image_root, on_bad_row="leave_out", **file.options)
    if file.adapter != "reformulate_t2i":
        return load_preferences(file.adapter, path, image_root=image_root, **file.options)
    rows = rows_of(path)
    for row in rows if image_root is not None else ():
        row |= {name: str(image_root / row[name]) for key, name in file.options.items() if key != "caption"}
    return reformulate_t2i(Dataset.from_list(rows), **file.options)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON list, of JSON lines, or of an object with `pairs`."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return content.get("pairs", [content]) if isinstance(content, dict) else content


def read(repository: Repository, file: PublicFile, checkouts: Path) -> Outcome:
    """Loads and validates a file."""
    sentences, root = Sentences(), logging.getLogger("trl_dt2it")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        path = copy_out(repository, file, checkouts, work)
        rows = rows_of(path)
        root.addHandler(sentences)
        start = perf_counter()
        try:
            pairs = load(file, path, work / file.image_root if file.images else None)
        except ValueError as error:
            sentences.texts.append(str(error))
            return Outcome(len(rows), 0, sentences.reasons(), perf_counter() - start, refusal=str(error))
        finally:
            root.removeHandler(sentences)
        clean, bad = validate(pairs, image_check="full" if file.images else "none", show=False)
        seconds = perf_counter() - start
        reasons = sentences.reasons() + Counter(bad["reason"])
        return Outcome(len(rows), len(clean), reasons, seconds, compare(pairs, file, rows), images_of(clean, file))


def compare(pairs: Dataset, file: PublicFile, rows: list[dict[str, Any]]) -> str:
    """Count the pairs that an independent reading of the rows has too, and those that it alone has."""
    if file.expected is None:
        return "not compared"
    wanted = Counter(seen_alike(*pair) for row in rows for pair in file.expected(row))
    take_apart = text_to_image if len(next(iter(wanted))) == 3 else content_of
    got = Counter(seen_alike(*take_apart(pair)) for pair in leave_images_encoded(pairs.with_format(None)))
    beyond = f", {(wanted - got).total()} not read" if wanted - got else ""
    return f"{(got & wanted).total():,} of {got.total():,}{beyond}"


def seen_alike(question: str, first: str, second: str, images: list[str] | None = None) -> tuple:
    """A pair without what readings may differ in: markers and spaces of the question, folders of the images."""
    question = " ".join(question.replace("<image>", " ").split())
    if images is None:
        return question, Path(first).name, Path(second).name
    return question, first, second, tuple(Path(image).name for image in images)


def text_of(messages: list[dict[str, Any]]) -> str:
    return "\n".join("".join(block["text"] or "" for block in message["content"]) for message in messages)


def content_of(pair: dict[str, Any]) -> tuple[str, str, str, list[str]]:
    images = [image["path"] for image in pair["images"]]
    return text_of(pair["prompt"]), text_of(pair["chosen"]), text_of(pair["rejected"]), images


def text_to_image(pair: dict[str, Any]) -> tuple[str, str, str]:
    """Caption, better and worse image of a question about two images."""
    question, chosen, rejected, images = content_of(pair)
    says_first = [bool(re.match("(Image 1|The first)", answer)) for answer in (chosen, rejected)]
    assert sorted(says_first) == [False, True], chosen
    caption = re.split("\n(?:Caption|Description|Order): ", question, maxsplit=1)[1]
    return (caption, *(images if says_first[0] else images[::-1]))


def images_of(pairs: Dataset, file: PublicFile) -> str:
    """Count the images of the pairs, by what becomes of them."""
    count = sum(map(len, column_of(pairs, "images").to_pylist()))
    if not count:
        return "none"
    if file.images:
        return f"{count}, all decoded"
    _, bad = validate(pairs, show=False)
    missing = ", ".join(f"{number} {reason}" for reason, number in Counter(bad["reason"]).most_common())
    return f"{count}, not in the repository: {missing} when looked for"


def table_row(repository: Repository, file: PublicFile, outcome: Outcome) -> list[str]:
    place = f"`{file.path}`{'' if file.block is None else ', its sample'}"
    reasons = ", ".join(f"{number} {reason}" for reason, number in outcome.reasons.most_common())
    return [
        f"{repository.name}@{repository.commit[:8]} {place}",
        f"`{file.adapter}`",
        f"{outcome.rows:,}",
        f"{outcome.pairs:,}",
        reasons or "none",
        outcome.agreement or "none read",
        outcome.images or "not looked at",
        f"{outcome.seconds:.1f}",
    ]


def main(checkouts: Path, only: str) -> None:
    disable_progress_bars()
    rows = []
    for repository in REPOSITORIES:
        for file in repository.files:
            if only in f"{repository.name}/{file.path}":
                outcome = read(repository, file, checkouts)
                rows.append(table_row(repository, file, outcome))
                if outcome.refusal:
                    print(f"{rows[-1][0]}: {outcome.refusal}\n")
    print(markdown(HEADER, rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkouts", type=Path, help="folder of clones, `OWNER/NAME` each")
    parser.add_argument("--only", default="", help="only files whose repository and path have this in them")
    arguments = parser.parse_args()
    main(arguments.checkouts.resolve(), arguments.only)
