"""A judge that knows the truth about handwritten digits, with a known position bias and known noise; and its prompts.

Of an image it knows the digits, and of an answer it counts the wrong ones. A score is 9 - 1.8 for each wrong digit,
plus what the place in the list is worth. With probability `noise` it is instead drawn evenly from 1 to 10: of a list
each score by itself, of a single answer the scores of all criteria together. What is drawn depends on the request
alone, so that asking again gives the same.
"""

import base64
import hashlib
import io
import json
import random
import re

from datasets import Dataset, Features, Image, List, Value

from trl_dt2it.demo.digits import ANSWERS, QUESTIONS, render_strip, split_samples
from trl_dt2it.judge import DEFAULT_RUBRIC
from trl_dt2it.judge.rubric import fenced_texts


NUM_DIGITS = 4
TOP, STEP = 9.0, 1.8
BIAS = (0.6, 0.1, -0.2, -0.5)  # of lists of 4, in points; they sum to 0
FEATURES = Features(
    {
        "question": Value("string"),
        "images": List(Image()),
        "reference": Value("string"),
        "candidates": List({"text": Value("string"), "generator": Value("string")}),
    }
)


def digit_prompts(num_prompts: int, *, seed: int, alike: float = 0.0) -> tuple[Dataset, dict[str, str]]:
    """
    Prompts with 4 candidates of one generator, and the digits of each image by its hash.

    The candidates have different numbers of wrong digits, from 0 to 4. Of a share `alike` all are right, or all wrong
    in all digits, in different wordings.
    """
    from sklearn.datasets import load_digits

    rng, labels, samples = random.Random(f"prompts {seed}"), load_digits().target, split_samples("train")
    rows, truth = [], {}
    for number in range(num_prompts):
        strip = [rng.choice(samples) for _ in range(NUM_DIGITS)]
        buffer = io.BytesIO()
        render_strip(strip).save(buffer, format="PNG")
        digits = "".join(str(labels[sample]) for sample in strip)
        truth[hashlib.sha256(buffer.getvalue()).hexdigest()] = digits
        wrong = rng.sample(range(NUM_DIGITS + 1), 4)
        if rng.random() < alike:
            wrong = [rng.choice((0, NUM_DIGITS))] * 4
        style = ("plain", "verbose")[number % 2]
        frames = rng.sample(ANSWERS["plain"], 4) if style == "plain" else [rng.choice(ANSWERS["verbose"])] * 4
        texts = [frame.format(corrupted(digits, count, rng)) for frame, count in zip(frames, wrong, strict=True)]
        rows.append(
            {
                "question": rng.choice(QUESTIONS),
                "images": [{"bytes": buffer.getvalue(), "path": None}],
                "reference": f"It is {digits}.",
                "candidates": [{"text": text, "generator": f"{style}-model"} for text in texts],
            }
        )
    return Dataset.from_list(rows, features=FEATURES), truth


def corrupted(digits: str, count: int, rng: random.Random) -> str:
    places = rng.sample(range(len(digits)), count)
    return "".join(
        rng.choice([other for other in "0123456789" if other != digit]) if place in places else digit
        for place, digit in enumerate(digits)
    )


def num_wrong(answer: str, digits: str) -> int:
    read = re.search(r"\d{4}", answer)[0]
    return sum(one != other for one, other in zip(read, digits, strict=True))


class DigitJudge:
    """Answers requests for verdicts and for candidates, as `JudgeServer` asks for them."""

    def __init__(self, truth: dict[str, str], *, bias=BIAS, noise: float = 0.15, seed: int = 0, spread: float = 0.0):
        self.truth, self.bias, self.noise, self.seed, self.spread = truth, bias, noise, seed, spread

    def __call__(self, body: dict) -> str:
        user = body["messages"][-1]["content"]
        content = json.dumps([body["messages"], body.get("seed")])
        rng = random.Random(f"{self.seed} {hashlib.sha256(content.encode()).hexdigest()}")
        names = re.findall(r"^<<<(?!END OF )([^|]+?) \| ", user[-1]["text"], re.MULTILINE)
        texts = dict(zip(names, fenced_texts(body["messages"]), strict=True))
        digits = self.truth[image_hash(user[0])]
        if "SAMPLE" in texts:
            return re.sub(r"\d{4}", digits, texts["SAMPLE"])
        if "ANSWER" in texts:
            return re.sub(r"\d{4}", corrupted(digits, 2, rng), texts["ANSWER"])
        answers = [text for name, text in texts.items() if re.fullmatch(r"(ANSWER|回答) ?\d+", name)]
        schema = body["response_format"]["json_schema"]["schema"]
        if schema["properties"]["scores"]["type"] == "array":
            bias = self.bias if len(answers) == len(self.bias) else [0.0] * len(answers)
            pairs = zip(answers, bias, strict=True)
            return json.dumps({"scores": [self._score(answer, digits, worth, rng) for answer, worth in pairs]})
        score = self._score(answers[0], digits, 0.0, rng)
        return json.dumps({"scores": {one.name: score for one in DEFAULT_RUBRIC.criteria}})

    def _score(self, answer: str, digits: str, worth: float, rng: random.Random) -> float:
        if rng.random() < self.noise:
            return round(rng.uniform(1, 10), 2)
        score = TOP - STEP * num_wrong(answer, digits) + worth
        if self.spread:
            return float(round(min(max(score + rng.gauss(0, self.spread), 1), 10)))
        return round(score, 2)


def image_hash(block: dict) -> str:
    return hashlib.sha256(base64.b64decode(block["image_url"]["url"].partition(",")[2])).hexdigest()


def wrong_digits(row: dict, truth: dict[str, str]) -> tuple[int, int]:
    """Wrong digits of both sides of a pair, whose images are encoded."""
    digits = truth[hashlib.sha256(row["images"][0]["bytes"]).hexdigest()]
    chosen, rejected = (row[side][0]["content"][0]["text"] for side in ("chosen", "rejected"))
    return num_wrong(chosen, digits), num_wrong(rejected, digits)
