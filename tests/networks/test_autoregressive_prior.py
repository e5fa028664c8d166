"""The autoregressive prior: z_i as codes, one pass and cached steps, a distribution that is known."""

import torch
import torch.nn.functional as F

from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.sampling_loop import Sampling
from t2i.networks.autoregressive_prior import (
    AutoregressivePrior,
    compute_code_cross_entropy,
    count_principal_components,
    select_code_buckets,
)
from tests.helpers.small_priors import LENGTH, D, W, autoregressive, captions, shaken, unit
from tests.helpers.stages import seeds

# z_i as codes


def test_the_codes_of_z_i_are_within_half_a_bucket_of_it():
    z_i, prior = unit(300, D), autoregressive(components=D, buckets=16)
    codes = prior.quantise_image_embeds(z_i, z_i)
    values = (z_i - prior.mean) @ prior.basis.T
    width = (prior.high - prior.low) / 16
    again = prior.low + (codes[:, 1:] + 0.5) * width
    assert ((again - values).abs() <= width / 2 + 1e-6).all()
    assert (codes[:, 0] == 15).all()  # a dot product of 1
    drawn, bound = prior.dequantise_codes(codes), (width / 2).norm()
    assert ((drawn - z_i).norm(dim=1) <= 2 * bound).all()  # of unit length again
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(300))


def test_components_come_by_decreasing_variance_and_as_many_as_explain_it():
    deviations = torch.tensor([1.0, 3.0, 0.1, 2.0])
    z = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)) * deviations
    # 9, 4, 1 and 0.01 of 14.01
    assert [count_principal_components(z, share) for share in (0.5, 0.7, 0.95, 0.999, 1.0)] == [1, 2, 3, 3, 4]
    prior = AutoregressivePrior(4, W, LENGTH, 8, 1, 1, 4)
    prior.set_embed_statistics(
        captions(2).map_tensors(lambda tensor: tensor[..., :4] if tensor.shape[-1] == D else tensor), z
    )
    assert prior.basis.abs().argmax(dim=1).tolist() == [1, 3, 0, 2]


# The autoregressive prior


def test_logits_with_the_cache_are_those_of_one_pass():
    prior, text = autoregressive(), captions(7, 3, 10)
    codes = torch.randint(32, (3, prior.codes_per_embedding))
    expected = prior(text, codes)
    context = prior.prepare(text)
    for i in range(prior.codes_per_embedding):
        torch.testing.assert_close(context.logits, expected[:, i], atol=1e-5, rtol=1e-5)
        if i + 1 < prior.codes_per_embedding:
            prior.step(codes[:, i], i, context)


def test_before_it_learns_it_is_the_regression_that_it_starts_from():
    torch.manual_seed(0)
    prior = AutoregressivePrior(D, W, LENGTH, 32, 2, 4, D, 4096, regression={"kind": "mlp", "width": 32}).eval()
    null = TextEncoding(torch.zeros(1, D), torch.zeros(1, 2, W), torch.ones(1, 2, dtype=torch.bool))
    prior.set_embed_statistics(null, unit(300, D))
    text, codes = captions(7, 3), torch.randint(4096, (2, prior.codes_per_embedding))
    likeliest = prior.sample_image_embeds(text, None, Sampling(1, seeds(0, 1), 1.0), temperature=0)
    torch.testing.assert_close(likeliest, prior.regressor.sample_image_embeds(text), atol=2e-3, rtol=0)
    shaken(prior)
    expected, context = prior(text, codes), prior.prepare(text)
    for i in range(prior.codes_per_embedding - 1):
        torch.testing.assert_close(context.logits, expected[:, i], atol=1e-4, rtol=1e-4)
        prior.step(codes[:, i], i, context)


def test_no_code_is_seen_before_it_is_drawn():
    prior, text = autoregressive(), captions(4)
    codes = torch.randint(32, (1, prior.codes_per_embedding))
    before = prior(text, codes)
    codes[:, 3] = (codes[:, 3] + 7) % 32
    changed = (prior(text, codes) - before).abs().amax(dim=-1)[0] > 1e-6
    assert changed.tolist() == [False] * 4 + [True] * (prior.codes_per_embedding - 4)


def test_it_learns_a_distribution_that_is_known():
    """Four points of the circle with other probabilities for each of two captions, in which no component is alone."""
    tables = torch.tensor([[[0.1, 0.5], [0.3, 0.1]], [[0.6, 0.1], [0.1, 0.2]]])  # caption, first sign, second sign
    points = torch.tensor([[[-0.8, -0.6, 0], [-0.8, 0.6, 0]], [[0.8, -0.6, 0], [0.8, 0.6, 0]]])
    torch.manual_seed(0)
    prior = AutoregressivePrior(3, 2, 2, 32, 1, 2, components=2, buckets=2)
    null = TextEncoding(torch.zeros(1, 3), torch.zeros(1, 2, 2), torch.ones(1, 2, dtype=torch.bool))
    prior.set_embed_statistics(null, points.view(4, 3))

    def text(which: torch.Tensor) -> TextEncoding:
        states = F.one_hot(which, 2)[:, None].float()
        return TextEncoding(torch.tensor([[0.0, 0, 1]]).repeat(len(which), 1), states, states[..., 0] >= 0)

    optimizer = torch.optim.AdamW(prior.parameters(), lr=4e-3)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 400)
        which = torch.randint(2, (256,))
        point = torch.multinomial(tables[which].flatten(1), 1)[:, 0]
        codes = prior.quantise_image_embeds(text(which).embedding, points.view(4, 3)[point])
        loss = compute_code_cross_entropy(prior(text(which), codes), codes, 0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prior.eval()
    count = 2000
    for caption, table in enumerate(tables):
        z_i = prior.sample_image_embeds(
            text(torch.full((count,), caption)), None, Sampling(1, seeds(*range(count)), 1.0)
        )
        signs = [(z_i[:, 0] > 0) == bool(i) for i in range(2)], [(z_i[:, 1] > 0) == bool(j) for j in range(2)]
        found = torch.tensor([[(first & second).float().mean() for second in signs[1]] for first in signs[0]])
        torch.testing.assert_close(found, table, atol=0.05, rtol=0)
        torch.testing.assert_close(z_i.abs(), torch.tensor([0.8, 0.6, 0]).expand(count, 3), atol=1e-5, rtol=0)
        likeliest = prior.sample_image_embeds(
            text(torch.tensor([caption])), None, Sampling(1, seeds(0), 1.0), temperature=0
        )
        assert (likeliest[0, :2] > 0).int().tolist() == greedy(table)


def greedy(table: torch.Tensor) -> list[int]:
    first = int(table.sum(dim=1).argmax())
    return [first, int(table[first].argmax())]


def test_the_dot_product_is_drawn_from_its_upper_half():
    prior, text = autoregressive(), captions(4).repeat(64)
    distribution = prior.prepare(text).logits[0].softmax(dim=-1)
    read = []
    step, prior.step = prior.step, lambda codes, i, context: (read.append(codes), step(codes, i, context))
    prior.sample_image_embeds(text, None, Sampling(1, seeds(*range(64)), 1.0))
    assert len(read[0].unique()) > 3  # not always the same
    assert (distribution.cumsum(dim=0)[read[0]] >= 0.5 - 1e-6).all()


def test_a_quantile_picks_the_bucket_that_holds_it():
    logits = torch.tensor([[0.1, 0.2, 0.0, 0.7]]).log().expand(5, 4)
    where = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31])
    assert select_code_buckets(logits, where, 1.0).tolist() == [0, 0, 1, 1, 3]
    assert select_code_buckets(logits, where, 0).tolist() == [3] * 5
    # at temperature 1/2 probabilities are squared: 0.01, 0.04, 0, 0.49 of 0.54
    assert select_code_buckets(logits, torch.tensor([0.018, 0.02, 0.09, 0.1, 0.999]), 0.5).tolist() == [0, 1, 1, 3, 3]


def test_guidance_away_from_the_caption_itself_goes_nowhere():
    prior, text = autoregressive(), captions(4, 7)
    plain = prior.sample_image_embeds(text, None, Sampling(1, seeds(0, 1), 1.0))
    torch.testing.assert_close(prior.sample_image_embeds(text, text, Sampling(1, seeds(0, 1), 3.0)), plain)
    assert not torch.allclose(prior.sample_image_embeds(text, None, Sampling(1, seeds(0, 1), 3.0)), plain, atol=1e-3)


def test_smoothed_targets_are_plain_ones_for_no_smoothing_and_sum_to_one():
    logits, codes = torch.randn(3, 5, 8), torch.randint(8, (3, 5))
    torch.testing.assert_close(
        compute_code_cross_entropy(logits, codes, 1e-3), compute_code_cross_entropy(logits, codes, 0)
    )
    flat = torch.zeros(3, 5, 8)
    torch.testing.assert_close(compute_code_cross_entropy(flat, codes, 2.0), torch.full((3, 5), 8.0).log())
