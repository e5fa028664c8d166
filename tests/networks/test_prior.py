"""The prior: one pass or prepare and step, trimmed or padded, ours or diffusers' arithmetic: the same numbers."""

import pytest
import torch
from diffusers import PriorTransformer

from t2i.diffusion.condition import TextEncoding
from t2i.networks.layers import Attention, PackedSequences
from t2i.networks.prior import Prior

D, W, LENGTH = 16, 12, 10


def make_prior(width: int = 32, depth: int = 3, heads: int = 4) -> Prior:
    torch.manual_seed(0)
    prior = Prior(D, W, LENGTH, width, depth, heads)
    for parameter in prior.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return prior.eval()


def captions(*lengths: int, padded_to: int | None = None) -> TextEncoding:
    torch.manual_seed(1)
    states = torch.randn(len(lengths), LENGTH, W)
    embedding = torch.nn.functional.normalize(torch.randn(len(lengths), D), dim=-1)
    longest = padded_to or max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return TextEncoding(embedding, states[:, :longest] * 1.0, mask)


@pytest.mark.parametrize("lengths", [(4,), (10, 3, 7)])
def test_prepare_and_step_equal_the_full_pass(lengths):
    prior, text = make_prior(), captions(*lengths)
    x, t = torch.randn(len(lengths), D), torch.randint(1000, (len(lengths),))
    torch.testing.assert_close(prior.step(x, t, prior.prepare(text)), prior(x, t, text), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("times", [[3, 500, 900], [3, 3, 3], [3, 4, 900]])  # 4 was not prepared
@torch.no_grad()
def test_timesteps_prepared_ahead_change_nothing(times):
    prior, text, x = make_prior(), captions(10, 3, 7), torch.randn(3, D)
    context, t = prior.prepare(text, torch.tensor([900, 500, 3])), torch.tensor(times)
    torch.testing.assert_close(prior.step(x, t, context), prior(x, t, text), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_several_pictures_share_is_computed_once(monkeypatch):
    prior, text, counts = make_prior(), captions(4, 6).repeat(3), []
    both, x, t = prior.null(6).cat(text), torch.randn(12, D), torch.full((12,), 7)
    expected = prior(x, t, both)
    hook = prior.blocks[0].norm_1.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    context = prior.prepare(both, torch.tensor([7]))
    hook.remove()
    assert counts == [3]  # the null and two captions
    torch.testing.assert_close(prior.step(x, t, context), expected, atol=1e-5, rtol=1e-5)


def test_a_step_has_the_gradient_of_the_full_pass():
    prior, text, t = make_prior(), captions(5, 2), torch.tensor([3, 3])
    x = torch.randn(2, D, requires_grad=True)
    with torch.no_grad():
        context = prior.prepare(text, torch.tensor([3]))
    (found,), (expected,) = (
        torch.autograd.grad(out.square().sum(), x) for out in (prior.step(x, t, context), prior(x, t, text))
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_trimmed_captions_equal_padded_ones():
    prior = make_prior()
    x, t = torch.randn(2, D), torch.tensor([3, 900])
    trimmed, padded = captions(5, 2), captions(5, 2, padded_to=LENGTH)
    torch.testing.assert_close(prior(x, t, trimmed), prior(x, t, padded), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        prior.step(x, t, prior.prepare(trimmed)), prior.step(x, t, prior.prepare(padded)), atol=1e-5, rtol=1e-5
    )


def test_padding_is_never_read():
    prior, text = make_prior(), captions(5, 2)
    x, t = torch.randn(2, D), torch.tensor([3, 900])
    before = prior(x, t, text)
    text.states[1, 2:] = 1e3
    torch.testing.assert_close(prior(x, t, text), before)
    text.states[1, 1] += 1
    assert not torch.allclose(prior(x, t, text)[1], before[1], atol=1e-3)


@pytest.mark.parametrize("static", [False, True])
def test_captions_of_different_lengths_are_trained_on_together_as_alone(static, monkeypatch):
    """Rows end to end, as on a CPU, and padded at the end, as where shapes stay static: outputs and gradients."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: static)
    prior, text = make_prior(), captions(4, 9, 1, padded_to=LENGTH)
    x, t = torch.randn(3, D), torch.tensor([3, 900, 500])
    together = prior(x, t, text)
    gradients = torch.autograd.grad(together.square().sum(), list(prior.parameters()))
    alone = []
    for i in range(3):
        mask = text.mask[i, None, : int(text.mask[i].sum())]
        one = TextEncoding(text.embedding[i, None], text.states[i, None, : mask.shape[1]], mask)
        alone.append(prior(x[i, None], t[i, None], one))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    expected = torch.autograd.grad(torch.cat(alone).square().sum(), list(prior.parameters()))
    for one, other in zip(gradients, expected):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_rows_are_padded_and_back_wherever_the_padding_was():
    known = torch.tensor([[False, True, True], [True, False, False]])
    rows, order = PackedSequences.from_token_mask(known)
    x = torch.arange(6.0)[:, None][order]
    assert rows.pad_to_batch(x).tolist() == [[[1], [2]], [[3], [0]]]
    assert torch.equal(rows.unpad_to_rows(rows.pad_to_batch(x)), x) and x[rows.last_rows].tolist() == [[2], [3]]


def test_rows_come_in_few_sizes_and_nobody_reads_what_is_added():
    """What is added to make the sizes few changes nothing that is real, whatever stands there."""
    attention, sizes = Attention(8, 2), set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        known = torch.rand(30, 20, generator=generator) < 0.5
        known[:, -1] = True
        rows, order = PackedSequences.from_token_mask(known)
        real = int(known.sum())
        assert 0 <= len(order) - real <= real / 32 and torch.equal(order[:real], known.flatten().nonzero()[:, 0])
        sizes.add(len(order))
        x = torch.randn(len(order), 8, generator=generator, requires_grad=True)
        out = attention.attend_all_tokens(x, rows)
        other = torch.cat([x[:real], 1e3 * torch.ones(len(order) - real, 8)])
        torch.testing.assert_close(attention.attend_all_tokens(other, rows)[:real], out[:real], atol=0, rtol=0)
        torch.testing.assert_close(attention.attend_last_tokens(other, rows), out[rows.last_rows], atol=1e-5, rtol=1e-5)
        (gradient,) = torch.autograd.grad(attention.attend_last_tokens(x, rows).square().sum(), x)
        assert not gradient[real:].any() and gradient[:real].any()
    assert len(sizes) < 10


def test_the_arithmetic_is_that_of_diffusers_prior_transformer():
    theirs = PriorTransformer(
        num_attention_heads=4, attention_head_dim=8, num_layers=3, embedding_dim=D, num_embeddings=LENGTH
    ).eval()
    theirs.encoder_hidden_states_proj = torch.nn.Linear(W, 32)  # theirs takes states as wide as embeddings
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data = 0.1 * torch.randn_like(parameter)
    ours = make_prior()
    ours.load_state_dict(renamed(theirs.state_dict(), ours))
    text = captions(7, 3, padded_to=LENGTH)
    x, t = torch.randn(2, D), torch.tensor([10, 800])
    expected = theirs(x, t, text.embedding * D**0.5, text.states, text.mask).predicted_image_embedding
    torch.testing.assert_close(ours(x, t, text), expected, atol=1e-5, rtol=1e-4)


def renamed(theirs: dict[str, torch.Tensor], ours: Prior) -> dict[str, torch.Tensor]:
    names = {
        "from_states": "encoder_hidden_states_proj",
        "from_text": "embedding_proj",
        "from_time": "time_embedding",
        "from_image": "proj_in",
        "norm": "norm_out",
        "to_image": "proj_to_clip_embeddings",
    }
    state = {name: value for name, value in ours.state_dict().items() if name in dict(ours.named_buffers())}
    state |= {"query": theirs["prd_embedding"][0, 0], "positions": theirs["positional_embedding"][0]}
    for mine, name in names.items():
        for key in theirs:
            if key.startswith(name + "."):
                state[key.replace(name, mine, 1)] = theirs[key]
    for i in range(len(ours.blocks)):
        old, new = f"transformer_blocks.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            qkv = [theirs[f"{old}attn1.to_{part}.{kind}"] for part in "qkv"]
            state[f"{new}attention.to_qkv.{kind}"] = torch.cat(qkv)
            state[f"{new}attention.to_out.{kind}"] = theirs[f"{old}attn1.to_out.0.{kind}"]
            state[f"{new}norm_1.{kind}"] = theirs[f"{old}norm1.{kind}"]
            state[f"{new}norm_2.{kind}"] = theirs[f"{old}norm3.{kind}"]
            state[f"{new}mlp.0.{kind}"] = theirs[f"{old}ff.net.0.proj.{kind}"]
            state[f"{new}mlp.2.{kind}"] = theirs[f"{old}ff.net.2.{kind}"]
    return state


def test_scaling_is_undone_and_gives_unit_variance():
    prior = make_prior()
    z_i = torch.nn.functional.normalize(torch.randn(500, D) + torch.arange(D), dim=-1)
    prior.mean.copy_(z_i.mean(dim=0))
    prior.std.copy_(z_i.std(dim=0))
    scaled = prior.scale_image_embeds(z_i)
    torch.testing.assert_close(scaled.std(dim=0), torch.ones(D), atol=1e-4, rtol=0)
    torch.testing.assert_close(prior.unscale_image_embeds(scaled), z_i)


def test_a_caption_beyond_the_context_is_refused():
    prior, text = make_prior(), captions(LENGTH)
    with pytest.raises(ValueError, match="at most 10"):
        prior.prepare(text.pad_like(captions(LENGTH).cat(TextEncoding(*longer(text)))))


def longer(text: TextEncoding) -> tuple[torch.Tensor, ...]:
    return text.embedding, text.states.repeat(1, 2, 1), text.mask.repeat(1, 2)
