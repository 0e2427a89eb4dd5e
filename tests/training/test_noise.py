"""NEFTune in packs: each example's noise is that of its own row; a shared prefix has one draw for all of them."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from data.encode.chat import Example
from data.encode.pack import Layout, build_pack, make_packs, pad_rows
from sft.models.tune import tune_model
from sft.recipe.schema import Tune
from sft.training.noise import noise_scale, noisy_embeddings
from sft.training.step import pack_loss

CPU = torch.device("cpu")
TRUNK = [5, 6, 7, 8]
SHORT, LONG, LONGER = (
    Example([*TRUNK, *own], [0] * 4 + [1] * len(own)) for own in ([9], [10, 11, 12], [10, 11, 13, 9])
)
ALONE = Example([20, 21, 22], [0, 1, 1])
LORA = Tune.model_validate({"method": "lora", "r": 4, "target_modules": "all-linear"})


def embeddings(model, pack, alpha, draws: int) -> torch.Tensor:
    """Noise (draws, tokens, width) on the embeddings of the pack."""
    embedding = model.get_input_embeddings()
    ids = torch.tensor(pack.input_ids).view(pack.rows or 1, -1)
    with torch.no_grad(), noisy_embeddings(model, pack, alpha, CPU):
        return torch.stack([(embedding(ids) - embedding.weight[ids]).flatten(0, 1) for _ in range(draws)])


def test_scale_is_that_of_the_own_row_and_of_a_shared_token_the_mean_of_their_variances():
    examples = [SHORT, LONG, LONGER, ALONE]
    pack = build_pack([examples[:3], [ALONE]])
    variance = dict(zip(zip(pack.position_ids, pack.input_ids, strict=True), noise_scale(pack) ** 2, strict=True))
    assert variance[0, 5] == variance[3, 8] == pytest.approx((1 / 5 + 1 / 7 + 1 / 8) / 3)
    assert variance[4, 9] == pytest.approx(1 / 5)
    assert variance[5, 11] == pytest.approx((1 / 7 + 1 / 8) / 2)
    assert variance[7, 9] == pytest.approx(1 / 8)
    assert variance[1, 21] == pytest.approx(1 / 3)


def test_same_example_twice_and_the_beginning_of_another_have_their_lengths():
    start = Example(TRUNK, [0, 0, 1, 1])
    pack = build_pack([[SHORT, SHORT, start]])
    scale = noise_scale(pack) ** 2
    assert scale[:4] == pytest.approx([(1 / 5 + 1 / 5 + 1 / 4) / 3] * 4)
    assert scale[4] == pytest.approx(1 / 5)


def test_rows_without_sharing_have_their_own_noise_and_padding_none():
    pack = pad_rows([LONGER, ALONE])
    assert noise_scale(pack) == pytest.approx([8**-0.5] * 8 + [3**-0.5] * 3 + [0] * 5)


@pytest.mark.parametrize("examples", [[SHORT, LONG, LONGER], [LONGER, ALONE]], ids=["forest", "rows"])
def test_noise_is_uniform_with_the_bound_of_the_paper(examples, tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).train()
    pack = build_pack([examples]) if len(examples) == 3 else pad_rows(examples)
    torch.manual_seed(0)
    noise, width = embeddings(model, pack, 5.0, 400), 64
    bound = torch.from_numpy(5.0 * noise_scale(pack) / math.sqrt(width)).float()[None, :, None]
    assert (noise.abs() <= bound * 1.001 + 1e-7).all()
    drawn = noise[:, bound[0, :, 0] > 0] / bound[:, bound[0, :, 0] > 0]
    assert drawn.mean().item() == pytest.approx(0, abs=0.01)
    assert drawn.var(dim=(0, 2)).numpy() == pytest.approx(1 / 3, rel=0.03)
    assert drawn.abs().amax(dim=(0, 2)).min() > 0.99
    assert (embeddings(model, pack, None, 1) == 0).all()


def test_noise_of_one_row_is_that_of_transformers(tiny):
    model = tune_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), LORA, 0).train()
    (pack,), losses = make_packs([LONGER], Layout(False)), []
    torch.manual_seed(3)
    hook = activate_neftune(model, 5.0)
    losses.append(pack_loss(model, pack, CPU).item())
    deactivate_neftune(model, hook)
    torch.manual_seed(3)
    with noisy_embeddings(model, pack, 5.0, CPU):
        losses.append(pack_loss(model, pack, CPU).item())
    losses.append(pack_loss(model, pack, CPU).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert abs(losses[2] - losses[0]) > 1e-4 * losses[2]


def test_expected_loss_and_gradient_with_shared_prefixes_are_those_of_rows_alone(tiny):
    """The noise of a prefix is common to its examples, so single draws differ from those of rows; their means do not."""
    model = tune_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), LORA, 0).train()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    own = [Example([*TRUNK * 3, *tail], [0] * 12 + [1, 1]) for tail in ([9, 10], [11, 12], [11, 13])]  # equal lengths
    means, errors, gradients = [], [], []
    for share in (True, False):
        packs = make_packs(own, Layout(share, 4096, "sparse"))
        assert sum(len(pack.input_ids) for pack in packs) == (17 if share else 42)
        model.zero_grad()
        draws = []
        for _ in range(300):
            total = 0.0
            for pack in packs:
                with noisy_embeddings(model, pack, 1.0, CPU):
                    loss = pack_loss(model, pack, CPU)
                (loss / 300).backward()
                total += loss.item()
            draws.append(total)
        drawn = torch.tensor(draws, dtype=torch.float64)
        means.append(drawn.mean().item())
        errors.append(drawn.std().item() / math.sqrt(len(drawn)))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert errors[0] > 0
    assert abs(means[0] - means[1]) < 4 * math.hypot(*errors)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_have_no_noise_and_rows_have_theirs(method, tiny):
    tune = Tune.model_validate({"method": method, "num_virtual_tokens": 3})
    model = tune_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tune, 0).train()
    pack = pad_rows([LONGER, ALONE])
    losses = []
    for alpha in (None, 5.0, 5.0):
        with noisy_embeddings(model, pack, alpha, CPU):
            losses.append(pack_loss(model, pack, CPU).item())
    assert len(set(losses)) == 3
