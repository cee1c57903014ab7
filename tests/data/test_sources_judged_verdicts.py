"""Answers and verdicts in a judge's texts: what is plainly there is read, whatever is doubtful is not."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_dt2it.data.sources.judged import Verdict, parse_comparison, parse_headed_comparison, parse_verdict


FIRST, SECOND, TIE = Verdict(1), Verdict(2), Verdict(0)


@pytest.mark.parametrize(
    "text, verdict",
    [
        # Marks.
        ("My final verdict is: [[A>>B]]", Verdict(1, 2.0)),
        ("[[A>B]] since A is right.", Verdict(1, 1.0)),
        ("It is a tie: [[A=B]].", TIE),
        ("[[B>A]]", Verdict(2, 1.0)),
        ("Assistant B is significantly better: [[B>>A]]", Verdict(2, 2.0)),
        ("[[ A > B ]]", Verdict(1, 1.0)),
        ("First I thought so: [[A>B]]. And I still do: [[A>B]]", Verdict(1, 1.0)),
        ("Assistant A is better at counting. Assistant B is better. [[A>B]]", Verdict(1, 1.0)),
        ("Both responses are equally good at counting, but: [[A>B]]", Verdict(1, 1.0)),
        # A form that is filled in.
        ("The better response: [1]. It is right.", FIRST),
        ("The better response: [2]", SECOND),
        ("The better response: [first].", FIRST),
        ("The better response: [second]. The first response is better in style.", SECOND),
        ("the BETTER response: [A]", FIRST),
        ("The better response: [b]", SECOND),
        ("The better response:[1]", FIRST),
        ("Both are good.\nThe better response: [1]\nThe better response: [1]", FIRST),
        # Scores on the first line.
        ("8 7\nThe first is more detailed.", Verdict(1, 1.0)),
        ("3 10\nThe second response is better.", Verdict(2, 7.0)),
        ("\n 8.5\t8 \r\nThe first is better.", Verdict(1, 0.5)),
        ("7 7\nBoth are fine.", TIE),
        ("1 10", Verdict(2, 9.0)),
        # Whole sentences.
        ("The first response is better because the square is red.", FIRST),
        ("The second response is better.", SECOND),
        ("Both see the dog. Overall, the second answer is better!", SECOND),
        ("Response 1 is better than Response 2.", FIRST),
        ("Response B is clearly better, since it is right.", SECOND),
        ("Therefore, assistant A is better.", FIRST),
        ("It counts. The first response is\nbetter because it counts.", FIRST),
        ("Final verdict: Response 2 is better overall.", SECOND),
        ("Response 2 is worse at counting.\n\nThe first response is better.", FIRST),
        ("The first response is better. It is better than the second response.", FIRST),
        ('The answer says "the second response is better", which is odd. The first response is better.', FIRST),
        ("Both are fine. The two responses are equally good.", TIE),
        ("Two responses are equally good.", TIE),
        ("Both responses are equally good because they agree.", TIE),
        ("Both are equally good.", TIE),
        # Nothing to read.
        ("", None),
        ("Hard to say.", None),
        ("Final Score: 92", None),
        ("The first response is long.", None),
        ("The better response depends on taste.", None),
        # Forms that are not filled in as they should be.
        ("[[A]]", None),
        ("[[A<B]]", None),
        ("[[A>>>B]]", None),
        ("[[A>A]]", None),
        ("[A>B]", None),
        ("The better response: [3]", None),
        ("The better response: [both]", None),
        ("The better response: [1 and 2]", None),
        ("The better response: 1", None),
        ("The better response: A cat is on the sofa.", None),
        ("The better response: [neither]. The first response is better.", None),
        ("0 5\nThe second is better.", None),
        ("7 11\nThe second is better.", None),
        ("92 40\nThe first is better.", None),
        ("8 7 6\nThree scores.", None),
        ("8 7 are the scores.", None),
        ("Scores:\n8 7", None),
        ("8/10 7/10", None),
        ("-8 7", None),
        # Forms that contradict each other.
        ("[[A>B]] or rather [[B>A]]", None),
        ("[[A>B]] or rather [[A>>B]]", None),
        ("[[A>B]] or rather [[A]]", None),
        ("The better response: [1]. No, the better response: [2].", None),
        ("The better response: [1]. Two responses are equally good.", None),
        ("8 7\nMy final verdict is: [[B>A]]", None),
        ("7 7\nThe better response: [1]", None),
        # Sentences that are denied, doubted, conditional, asked, or about one thing only.
        ("The first response is not better.", None),
        ("The first response isn't better.", None),
        ("The first response is no better than the second response.", None),
        ("The first response is not at all better. The first response is better.", None),
        ("Neither the first response nor the second response is better.", None),
        ("I doubt that the first response is better.", None),
        ("If only length counted, the first response is better.", None),
        ("Is it so? The first response is better?", None),
        ("The first response is better in terms of detail.", None),
        ("The first response is better as a caption.", None),
        ("The first response is better\nin some ways.", None),
        ("The first response is better than nothing.", None),
        ("The first response is better at counting. The second response is better.", None),
        ("The first response is better. The second response is better.", None),
        ("The first response is better. But no: Response 1 is worse.", None),
        ("The first response is better. The two responses are equally good.", None),
        ("The first response is better. They are equally good at counting.", None),
        ("The two responses are not equally good.", None),
        ("The two responses are equally good at counting.", None),
        ("Both responses are equally good, but the second response is better.", None),
        ("Some would say that both are equally good.", None),
        ("Worse than this, the second response is a better one only by luck.", None),
        # What is cited from an answer.
        ('Response 2 says: "Cats sleep. The first response is better."', None),
        ('Response 2 says: "Cats sleep. The first response is better because it is.', None),
        ("Response 2 says: “Cats sleep. The first response is better because it is.” So what.", None),
    ],
)
def test_verdicts(text, verdict):
    assert parse_verdict(text) == verdict


@given(
    st.lists(
        st.sampled_from('the first second response better is not equally good [1] [[A>B]] : . \n 8 7 " If'.split(" "))
    )
)
def test_a_verdict_turns_round_when_the_sides_are_exchanged(words):
    turned = {"first": "second", "second": "first", "[1]": "[2]", "[[A>B]]": "[[B>A]]", "8": "7", "7": "8"}
    verdict, other = (parse_verdict(" ".join(part)) for part in (words, [turned.get(word, word) for word in words]))
    if verdict is None:
        assert other is None
    else:
        assert other == Verdict({0: 0, 1: 2, 2: 1}[verdict.winner], verdict.strength)


def paired(question="q?", first="one", second="two", names=("Response 1", "Response 2"), *, head="Judge.\n", tail=""):
    return f"{head}Question: [{question}]\n{names[0]}: [{first}]\n{names[1]}: [{second}]{tail}"


NAMES = [("The first response", "The second response"), ("Response 1", "Response 2"), ("Response A", "Response B")]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("tail", ["", "\n", "\nASSISTANT:\n", "\n\nWhich one is better? Give your reasons.\n"])
@pytest.mark.parametrize(
    "first, second",
    [
        ("one", "two"),
        ("a [list] of\n\n* [x]\n* [y]", "x = [1, 2]"),
        ("Question: what?", "Response 1 is better. Response 2: no."),
        ("The better part: [1]", "The first response is better."),
        ("", "two"),
        ("[]", "[[A, B], [C, D]]"),
    ],
)
def test_bracketed_answers_may_hold_brackets_lines_and_praise(names, tail, first, second):
    assert parse_comparison(paired("q [x]?", first, second, names, tail=tail)) == ("q [x]?", first, second)


def test_bracketed_answers_of_the_layouts_seen():
    text = "Image and a corresponding question: <image>\nBe a fair judge (LMM). " + paired(head="", names=NAMES[0])
    assert parse_comparison(text + "\nASSISTANT:\n") == ("q?", "one", "two")
    text = paired().replace("\n", "\r\n").replace("]\r\nResponse 2", "] \r\n\r\nResponse 2")
    assert parse_comparison(text) == ("q?", "one", "two")
    # Without instructions behind it, the last bracket is the one that closes, unless another may be.
    for second in ("in (1, 2] or\n[3, 4)", "[ and\n[ more", ":] is\na smile"):
        assert parse_comparison(paired(second=second)) == ("q?", "one", second)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No pair.",
        "Question: [What is this?]\nAnswer: [A square.]\nRate it.",
        paired(names=("Response 1", "Response B")),
        paired(names=("Response 2", "Response 1")),
        paired(names=("Response 1", "The second response")),
        "Question: [q?]\nResponse 1: [one]",
        "Question: [q?] Response 1: [one] Response 2: [two]",
        "Question: q?\nResponse 1: one\nResponse 2: two",
        paired().removesuffix("]"),
        # An answer that looks like the next header.
        paired(first="one]\nResponse 2: [me"),
        paired(second="two]\nResponse 2: [me"),
        paired(second="two]\nResponse 1: [me"),
        paired(question="q?]\nResponse 1: [me"),
        paired(first="Question: [me]"),
        paired(first="x]\nResponse A: [y]\nResponse B: [z"),
        paired(head="Question: [in the instructions]\n"),
        paired(names=NAMES[0], first=paired(head="")),
        # Instructions with brackets behind the second answer.
        paired(tail="\nReply with: The better response: [1] or [2]"),
        paired(tail="\nReply with [1]\nor [2]\n"),
        paired(tail="\nReply with [[A>B]]"),
        paired(tail=" Reply with: The better response: [1]"),
        paired(tail=" and so on"),
        paired(second="a smile :]\nand more"),
        paired(tail="\nReply with [1"),
        # Cut off, so that the last bracket belongs to the answer.
        paired(second="see [1]\nand more").removesuffix("]"),
        paired(second="see [[1]\nand more").removesuffix("]"),
    ],
)
def test_bracketed_answers_in_doubt_are_not_read(text):
    assert parse_comparison(text) is None


ARENA = (
    "<|User Prompt|>\n{}\n\n<|The Start of Assistant A's Answer|>\n{}\n<|The End of Assistant A's Answer|>\n\n"
    "<|The Start of Assistant B's Answer|>\n{}\n<|The End of Assistant B's Answer|>"
)
BENCH = (
    "[Context]\nA dog.\n\n[Question]\n{}\n\n[Assistant 1]\n{}\n\n[End of Assistant 1]\n\n[Assistant 2]\n{}\n\n"
    "[End of Assistant 2]\n\n[System]\nGive two scores for Assistant 1 and 2."
)


@pytest.mark.parametrize("layout", [ARENA, BENCH])
def test_enclosed_answers(layout):
    answers = ("q [x]?", "one\n\n[[A>B]] [list]", "Question: two\n# Assistant 2 is better")
    assert parse_comparison("Judge.\n\n" + layout.format(*answers)) == (*answers,)


@pytest.mark.parametrize(
    "text",
    [
        ARENA.format("q", "one", "two\n<|The End of Assistant B's Answer|>"),
        ARENA.format("q", "one\n<|The Start of Assistant B's Answer|>", "two"),
        ARENA.format("q", "one", "two").replace("<|User Prompt|>", ""),
        ARENA.format("q", "one", "two").replace(
            "\n\n<|The Start of Assistant B", "\n\nmore\n<|The Start of Assistant B"
        ),
        ARENA.format("q", "one", "two").removesuffix("<|The End of Assistant B's Answer|>"),
        BENCH.format("q", "one", "two [End of Assistant 2]"),
        BENCH.format("q", "[Assistant 2]", "two"),
        BENCH.format("q", "one", "two").replace("[Assistant 1]", "[Assistant 2]", 1),
        BENCH.format("q", "one", "two") + ARENA.format("q", "one", "two"),
        BENCH.format("q", paired(head=""), "two"),
        BENCH.format("q", "one", "two").replace("[End of Assistant 1]", ""),
    ],
)
def test_enclosed_answers_in_doubt_are_not_read(text):
    assert parse_comparison(text) is None


def headed(question="q", first="one", second="two", *, mark="####", tail=""):
    parts = zip(("Question", "Response 1", "Response 2"), (question, first, second), strict=True)
    return "Judge.\n" + "".join(f"{mark} [{name}]:\n{part}  \n\n" for name, part in parts) + tail


FORMAT = "###### **Output Format (strictly follow):**  \n<think>Your analysis</think><answer>1/2</answer>"


@pytest.mark.parametrize("mark", ["##", "####", "######"])
@pytest.mark.parametrize("tail", ["", FORMAT])
def test_headed_answers(mark, tail):
    for answers in (("q", "one", "two"), ("q?", "# A\n\n[x]: y", "## Output Format\nResponse 1: [x]")):
        assert parse_headed_comparison(headed(*answers, mark=mark, tail=tail)) == (*answers,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        headed().replace("[Question]", "[Task]"),
        headed().replace("[Response 2]", "[Response 3]"),
        headed().replace("####", "#"),
        headed().replace("####", "see ####"),
        headed(first="one\n#### [Response 2]:\nme"),
        headed(second="two\n## [Response 1]:\nme"),
        headed(second="two\n#### [Response 2]:\nme"),
        headed().replace("Response 1", "Response 3").replace("Response 2", "Response 1").replace("3", "2"),
        headed(second="## **Output Format**\ntwo", tail=FORMAT),
        headed(tail="Reply with <answer>1</answer> or <answer>2</answer>."),
    ],
)
def test_headed_answers_in_doubt_are_not_read(text):
    assert parse_headed_comparison(text) is None


@given(st.text(st.sampled_from("[]\n ab:?")), st.text(st.sampled_from("[]\n ab:?")))
def test_what_is_read_is_what_was_written(first, second):
    written = ("q", first.strip(), second.strip())
    assert parse_headed_comparison(headed("q", first, second, tail=FORMAT)) == written
    assert parse_comparison(ARENA.format("q", first, second)) == written
    assert parse_comparison(paired("q", first, second)) in (written, None)
    if "[" not in second and "]" not in second:
        assert parse_comparison(paired("q", first, second)) == written


@pytest.mark.parametrize(
    "text",
    [
        "]" * 50_000,
        "]\n" * 50_000,
        "] \n" + "\n" * 50_000,
        "# " * 50_000,
        "[[" * 50_000,
        "the first response " * 9_000,
    ],
)
def test_long_texts_take_no_long_time(text):
    start = time.perf_counter()
    assert parse_comparison(paired(first=text[:-1] + "x")) is not None
    assert parse_headed_comparison(text) is None
    assert parse_verdict(text) is None
    assert time.perf_counter() - start < 2
