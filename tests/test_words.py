"""What every front end says about sizes, pictures and answers."""

from types import SimpleNamespace

import pytest

from mmchat import words


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (words.size(1023), "1023 B"),
        (words.size(1536), "1.5 KiB"),
        (words.size(5 * 1024**3), "5.0 GiB"),
        (words.count(10_670_000_000), "10.7 B"),
        (words.count(999_999), "999,999"),
        (words.plural(1, "turn"), "1 turn"),
        (words.plural(1000, "turn"), "1,000 turns"),
        (words.pixels((480, 640)), "640 x 480 px"),
    ],
)
def test_numbers_read_as_people_say_them(said, text):
    assert said == text


@pytest.mark.parametrize(
    ("speed", "text"), [(283.6, "284"), (9.6, "10"), (9.4, "9.4"), (1.0, "1.0"), (0.043, "0.043")]
)
def test_a_pace_has_about_two_digits(speed, text):
    assert words.pace(speed) == text


def test_the_columns_of_a_table_are_as_wide_as_their_widest_cell():
    rows = [("model", "tiny", "7"), ("in", "a folder", "123")]
    assert words.table(rows, right={2}) == "model  tiny        7\nin     a folder  123"
    assert words.table([("a", ""), ("bcd", "e")]) == "a\nbcd  e"


@pytest.mark.parametrize(
    ("reason", "made", "text"),
    [
        ("stop", 3, ""),
        ("interrupted", 9, ""),
        ("length", 9, "cut at 9 tokens; -n N allows more"),
        ("length", 8, "cut because the context of 4,096 positions is full; ask less"),
    ],
)
def test_an_answer_that_was_cut_is_said_to_be_with_what_helps(reason, made, text):
    finished = SimpleNamespace(reason=reason, output_ids=(1,) * made)
    assert words.cut(finished, 9, 4096, "-n N", "ask less") == text
