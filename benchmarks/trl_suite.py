"""Do TRL's own tests of its reward trainer pass with our classes in place of TRL's?

Takes `tests/test_reward_trainer.py` of a checkout of https://github.com/huggingface/trl as it is, builds the tiny
models and sets that it names, and runs it twice: with TRL's classes and with `MultimodalRewardTrainer` and
`MultimodalRewardConfig`. Prints a table and writes `benchmarks/results/trl_suite.{json,md}`. Fails if a test that
passes with TRL's classes fails with ours and is not listed below as a difference by design, or fails in another way
than the list says, and if a listed one passes.

usage: python benchmarks/trl_suite.py TRL_CHECKOUT
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lib.report import markdown, write
from lib.trl_hub import build_hub


HERE = Path(__file__).parent
TESTS = Path("tests/test_reward_trainer.py")
TESTING_UTILS = """import pytest


class TrlTestCase:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.tmp_dir = str(tmp_path)


def __getattr__(name):
    return lambda test: test  # every `require_...`
"""


@dataclass
class Difference:
    """A way in which our classes differ from TRL's by design: the tests that see it, how they fail, and why."""

    tests: str
    failure: str
    reason: str


# docs/migrating.md lists the same, at more length.
BY_DESIGN = [
    Difference(
        r"test_init_with_eval_dataset\[(?!none).*|test_train_with_chat_template_kwargs",
        r"KeyError: 'chosen_ids'|assert 'chosen_ids' in ",
        "Rows stay as they are and are tokenized when their batch comes, with their images; there is no column "
        "`chosen_ids`.",
    ),
    Difference(
        r"test_train_(dense|moe)_with_peft_config|test_train_peft_model|"
        r"test_train_with_peft_config_and_gradient_checkpointing.*",
        r"score\.original_module\.weight has not changed",
        "A LoRA configuration or a PEFT model without `modules_to_save` trains the `score` head too, wrapped by PEFT, "
        "so that the head's name changes; TRL leaves it frozen, and a new head random.",
    ),
    Difference(
        r"test_train_model_dtype",
        r"assert torch\.float32 == torch\.float16",
        "Weights that are trained are kept in fp32, also of a model that is loaded in half precision, and so is the "
        "head; TRL trains the half-precision weights themselves.",
    ),
]


def run_tests(checkout: Path, work: Path, classes: str) -> dict[str, str]:
    """Outcome of each test: nothing where it passed, and how it failed."""
    tests = work / classes / "tests"
    shutil.copytree(checkout / TESTS.parent / "data", tests / "data")
    shutil.copy(checkout / TESTS, tests)
    (tests / "__init__.py").touch()
    (tests / "testing_utils.py").write_text(TESTING_UTILS)
    (work / classes / "empty.ini").write_text("[pytest]\n")
    environment = {
        **os.environ,
        "CLASSES": classes,
        "OUTCOMES": str(work / f"{classes}.json"),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "home"),
    }
    options = ["-c", str(work / classes / "empty.ini"), "--rootdir", str(work / classes), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "lib.trl_plugin", *options, str(tests / TESTS.name)]
    # In the folder in which the names of the Hub are folders.
    done = subprocess.run(command, cwd=work / "hub", env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"TRL's tests could not be run:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    outcomes = json.loads((work / f"{classes}.json").read_text())
    return {name: failure[:200] for name, failure in outcomes.items()}


def judge(name: str, theirs: str, ours: str) -> tuple[str, str]:
    """A verdict on a test and, if it differs, why or how."""
    listed = next((one for one in BY_DESIGN if re.fullmatch(one.tests, name)), None)
    if not ours:
        return ("listed, but passes", listed.reason) if listed and not theirs else ("passes", "")
    if listed and re.search(listed.failure, ours):
        return "differs by design", listed.reason
    if theirs:
        return "fails with TRL's classes too", ours
    return "FAILS", ours


def main(checkout: Path) -> None:
    if not (checkout / TESTS).is_file():
        sys.exit(f"There is no {TESTS} in {checkout}; clone https://github.com/huggingface/trl, and pass the folder.")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        build_hub(work / "hub")
        theirs, ours = (run_tests(checkout, work, classes) for classes in ("trl", "ours"))
    verdicts = {name: judge(name, theirs[name], ours[name]) for name in theirs}
    counts = {
        "theirs": sum(not failure for failure in theirs.values()),
        "ours": sum(not failure for failure in ours.values()),
    }
    kinds = ("passes", "differs by design", "fails with TRL's classes too", "listed, but passes", "FAILS")
    differing = [(name, *verdict) for name, verdict in verdicts.items() if verdict[0] != "passes"]
    differing.sort(key=lambda row: (kinds.index(row[1]), row[2]))
    version = (checkout / "VERSION").read_text().strip() if (checkout / "VERSION").is_file() else "unknown"
    text = [
        f"TRL's own tests of `RewardTrainer` (`{TESTS}` of TRL {version}, unchanged), with TRL's classes and with "
        f"`MultimodalRewardTrainer` and `MultimodalRewardConfig` in their place: of {len(theirs)} tests "
        f"{counts['theirs']} pass with TRL's and {counts['ours']} with ours.",
        "",
        markdown(["verdict", "tests"], [[kind, str(sum(v[0] == kind for v in verdicts.values()))] for kind in kinds]),
        "",
        markdown(
            ["test", "verdict", "why"],
            [[f"`{name}`", kind, " ".join(why.split()).replace("|", "/")] for name, kind, why in differing],
        ),
    ]
    write("trl_suite", "\n".join(text), {"trl_tests": version, "theirs": theirs, "ours": ours, "verdicts": verdicts})
    wrong = [name for name, (kind, _) in verdicts.items() if kind in ("FAILS", "listed, but passes")]
    if wrong:
        sys.exit(f"Not as listed: {', '.join(wrong)}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkout", type=Path, help="folder of a clone of https://github.com/huggingface/trl")
    main(parser.parse_args().checkout.resolve())
