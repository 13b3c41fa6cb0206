import random

import pytest

from framework.text.stream import StopMatcher, TextStream
from tests.text.bytes_tokenizer import END, bytes_tokenizer, ids_of


def pieces(ids):
    stream = TextStream(bytes_tokenizer())
    return [stream.push(token) for token in ids] + [stream.flush()]


TEXTS = ["plain", "é", "日本語 🙂🙂 z", "e\u0301👩\u200d👧", "\n\t \u00a0x", "ends�with� a replacement�"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(text):
    shown = pieces(ids_of(text))
    assert "".join(shown) == text
    assert all(len(piece) <= 1 or "�" in piece for piece in shown[:-1])


def test_special_tokens_give_no_text():
    assert "".join(pieces([*ids_of("a"), END, *ids_of("b"), END])) == "ab"


def test_bytes_that_are_no_text_are_shown_in_the_end_and_hold_nothing_up_for_long():
    shown = pieces([0xFF] * 40 + ids_of("ok"))
    assert "".join(shown).endswith("ok")
    assert "".join(shown).count("�") >= 30
    assert sum(bool(piece) for piece in shown) > 3


def test_half_a_character_at_the_end_is_a_replacement():
    assert "".join(pieces(ids_of("x🙂")[:-1])).startswith("x�")


def matched(pieces, stops):
    """Text shown and whether a stop string came, by the plain definition: the one that is complete first."""
    text = "".join(pieces)
    for end in range(len(text) + 1):
        for stop in sorted(filter(None, stops), key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], True
    return text, False


def test_stop_strings_are_found_wherever_pieces_are_cut():
    made = random.Random(5)
    for _ in range(3000):
        stops = tuple("".join(made.choices("ab", k=made.randint(0, 4))) for _ in range(made.randint(0, 3)))
        given = list(made.choices("abc", k=made.randint(0, 12)))
        matcher, shown, hit = StopMatcher(stops), "", False
        for character in given:
            text, hit = matcher.push(character)
            shown += text
            # what is shown is never taken back
            assert matched(given, stops)[0].startswith(shown)
            if hit:
                break
        else:
            shown += matcher.flush()
        assert (shown, hit) == matched(given, stops), (stops, given)


def test_nothing_is_held_back_that_cannot_become_a_stop_string():
    matcher = StopMatcher(("</s>",))
    assert matcher.push("a<") == ("a", False)
    assert matcher.push("b") == ("<b", False)
    assert matcher.push("</s") == ("", False)
    assert matcher.flush() == "</s"
