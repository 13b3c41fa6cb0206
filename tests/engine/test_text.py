"""Text of the engine's answers: characters, stop strings, ends."""

import pytest

from framework.engine.loop import Engine
from framework.engine.request import Finished, Request, SamplingParams, TokenEvent
from framework.layers.group import Alone
from tests.engine.models import Recitation
from tests.text.bytes_tokenizer import END, bytes_tokenizer, ids_of

PROMPT = ids_of("Say it")


def run(said, *, tokens=None, **sampling):
    """(text pieces, Finished) of an engine whose model says `said`, one token a byte."""
    ids = tokens if tokens is not None else ids_of(said)
    model = Recitation(ids, len(PROMPT))
    engine = Engine(model, model.cache(), bytes_tokenizer(), Alone(), max_batch=2, chunk_tokens=64)
    sampling.setdefault("max_new_tokens", len(ids))
    steps = list(engine.generate([Request(0, PROMPT, SamplingParams(**sampling))]))
    events = [event for step in steps for event in step]
    pieces = [event.text for event in events if isinstance(event, TokenEvent)]
    assert isinstance(events[-1], Finished)
    assert "".join(pieces) == events[-1].text
    return pieces, events[-1]


def test_text_comes_in_whole_characters():
    said = "a é 日本 🙂!"
    pieces, end = run(said)
    assert end.text == said
    assert [piece for piece in pieces if piece] == list(said)
    assert end.token_ids == ids_of(said)
    assert end.finish_reason == "length"


def test_an_answer_cut_within_a_character_shows_a_replacement():
    pieces, end = run("ab🙂", max_new_tokens=4)
    assert pieces[:2] == ["a", "b"]
    assert end.text.rstrip("\ufffd") == "ab"
    assert end.text != "ab"


@pytest.mark.parametrize(
    ("stop", "text", "sampled"),
    [
        (("STOP",), "go ", "go STOP"),
        # the stop string that is complete first ends it
        (("never", "TO", "STOP"), "go S", "go STO"),
        (("STOP here", "he", ""), "go STOP ", "go STOP he"),
    ],
)
def test_a_stop_string_over_several_tokens_ends_the_text_before_it(stop, text, sampled):
    _, end = run("go STOP here", stop=stop)
    assert (end.finish_reason, end.text, end.token_ids) == ("stop", text, ids_of(sampled))


def test_the_beginning_of_a_stop_string_is_shown_only_when_it_goes_on_differently():
    pieces, end = run("a STx b", stop=("STOP",))
    assert pieces == ["a", " ", "", "", "STx", " ", "b"]
    assert (end.text, end.finish_reason) == ("a STx b", "length")


def test_what_is_held_back_for_a_stop_string_is_shown_at_the_end():
    pieces, end = run("a STO", stop=("STOP",))
    assert (pieces[-1], end.text) == ("STO", "a STO")


def test_the_models_own_end_is_in_the_ids_and_not_in_the_text():
    pieces, end = run("", tokens=[*ids_of("hi"), END, *ids_of("more")])
    assert (end.text, end.finish_reason) == ("hi", "stop")
    assert end.token_ids == [*ids_of("hi"), END]
    assert len(pieces) == 3


def test_times_are_of_the_first_token_and_of_the_others():
    _, end = run("abcdef")
    assert end.ttft_s > 0
    assert end.tok_s > 0
    assert run("a")[1].tok_s == 0
