from hypothesis import given
from hypothesis import strategies as st

from mmchat.engine.text import AnswerText
from tests.fake_model import ByteTokenizer


def read(data: bytes, stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    answer = AnswerText(ByteTokenizer(), stop)
    text = ""
    for byte in data:
        text += answer.push(byte)
        if answer.stopped:
            break
    return text + answer.flush(), answer.stopped


@given(st.text())
def test_text_arrives_whole(text):
    assert read(text.encode()) == (text, False)


@given(
    st.text(alphabet="abé", max_size=30), st.lists(st.text(alphabet="abé", min_size=1), max_size=3)
)
def test_text_ends_before_the_first_stop_string(text, stop):
    ends = [at for at in (text.find(s) for s in stop) if at >= 0]
    if not ends:
        assert read(text.encode(), tuple(stop)) == (text, False)
        return
    # the stop string that is complete first ends the answer
    first = min(text.find(s) + len(s) for s in stop if s in text)
    expected = min(at for s in stop if (at := text[:first].find(s)) >= 0)
    assert read(text.encode(), tuple(stop)) == (text[:expected], True)


def test_no_part_of_a_stop_string_is_shown_early():
    answer = AnswerText(ByteTokenizer(), ("\n\nUser:",))
    shown = [answer.push(b) for b in b"Hi\n\nUse"]
    assert "".join(shown) == "Hi"
    assert answer.flush() == "\n\nUse"


def test_half_a_character_is_not_shown():
    answer = AnswerText(ByteTokenizer(), ())
    assert [answer.push(b) for b in "é".encode()] == ["", "é"]
    answer.push(0xE2)
    assert answer.flush() == "\N{REPLACEMENT CHARACTER}"
