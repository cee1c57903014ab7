"""What strangers wrote, on a screen: nothing that a terminal obeys is left, and other scripts are."""

import pytest

from trl_dt2it.utils import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("A red cup, 桌子, كوب", "A red cup, 桌子, كوب"),
        ("\x1b[2Jgone\r\nnew", "\ufffd[2Jgone\ufffd\ufffdnew"),
        ("a\u202eb\ud800c\u2028d", "a\ufffdb\ufffdc\ufffdd"),
        (7, "7"),
        (None, "None"),
        ("", ""),
    ],
)
def test_what_is_shown(text, shown):
    assert printable(text, 60) == shown


def test_long_texts_are_cut():
    assert printable("ab" * 50, 3) == "aba"
