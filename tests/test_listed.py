"""Lists of names in messages."""

import pytest

from outlier_mlx.errors import OutlierError, listed


@pytest.mark.parametrize(
    ("names", "most", "expected"),
    [
        ([], None, "none"),
        (["a"], None, "a"),
        (["a", "b"], None, "a and b"),
        (["a", "b", "c"], None, "a, b and c"),
        (["a", "b", "c"], 3, "a, b and c"),
        (["a", "b", "c", "d"], 3, "a, b, c and 1 more"),
        (["a", "b", "c"], 1, "a and 2 more"),
        ((number for number in range(5)), 2, "0, 1 and 3 more"),
    ],
)
def test_lists_of_names(names: list, most: int | None, expected: str) -> None:
    assert listed(names, most) == expected


def test_lists_of_alternatives() -> None:
    assert listed(["4", "8", "none"], last="or") == "4, 8 or none"
    assert listed("abcd", 2, last="or") == "a, b and 2 more"


def test_long_names_are_cut_where_a_list_is() -> None:
    long = "x" * 500
    assert listed([long, "b"]) == f"{long} and b"
    assert listed([long, "b"], 2) == f"{'x' * 80}... and b"


def test_a_message_is_one_line_of_bounded_length() -> None:
    text = str(OutlierError("bad\nname \x1b[31m" + "y" * 5000))
    assert text.startswith("bad name \\x1b[31m")
    assert "\n" not in text
    assert len(text) < 1000
