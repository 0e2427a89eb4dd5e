"""One optimizer step over packs: its loss and every gradient are those of flat training, on each back end."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from data.conversation import Conversation
from data.encode.chat import Example, encode, encode_turns
from data.encode.pack import Layout, attention_mask, is_chain, make_packs
from sft.kernels.forest_attention import forest_attention, pieces_of
from sft.kernels.fused_lora import fuse_lora
from sft.models.load import load_base
from sft.models.tune import tune_model
from sft.recipe.schema import Model, Tune
from sft.training.attention import pack_inputs
from sft.training.step import pack_loss
from tests.helpers.builders import read_squad
from tests.helpers.places import REAL_DATA, SMOLLM, needs_real

pytestmark = pytest.mark.heavy


def flat_loss(model, example: Example, smoothing: float = 0.0) -> torch.Tensor:
    """An independent reference: plain causal forward, every position, labels shifted by hand."""
    ids = torch.tensor([example.ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    labels = torch.tensor([t if m else -100 for t, m in zip(example.ids, example.loss_mask, strict=True)][1:])
    return functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100, label_smoothing=smoothing)


def assert_same_step(model, examples: list[Example], layout: Layout, smoothing: float = 0.0) -> None:
    count = sum(sum(e.loss_mask) for e in examples)
    losses, gradients = [], []
    for mode in ("flat", "shared"):
        model.zero_grad()
        total = 0.0
        parts = (
            (flat_loss(model, e, smoothing) for e in examples)
            if mode == "flat"
            else (pack_loss(model, p, torch.device("cpu"), smoothing) for p in make_packs(examples, layout))
        )
        for part in parts:
            (part / count).backward()
            total += part.item() / count
        losses.append(total)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert abs(losses[0] - losses[1]) < 1e-5
    assert gradients[0]
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-4 * gradient.norm(), name


def random_adapter(model) -> None:
    """LoRA-B starts at zero, and LoRA-A would then have no gradient to compare."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)


LORA = Tune.model_validate({"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"})


@pytest.fixture(params=["forest", "sdpa", "eager"])
def tuned(request, tiny):
    """A tiny model with an adapter that changes its answers, on each back end; on eager with fused LoRA."""
    model = tune_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), LORA, seed=0)
    random_adapter(model)
    model.set_attn_implementation(request.param)
    if request.param == "eager":
        assert fuse_lora(model) == 14
    return model


@pytest.mark.parametrize("budget", [600, 4000])
@pytest.mark.parametrize(("attention", "smoothing"), [("dense", 0.0), ("sparse", 0.0), ("sparse", 0.1)])
def test_one_shared_step_equals_the_flat_one(questions, tokenizer, tuned, budget, attention, smoothing):
    rows = [encode(q, tokenizer, 1024) for q in [*questions[:8], questions[3]]]  # one question twice
    assert_same_step(tuned, rows, Layout(True, budget, attention), smoothing)


def test_one_step_of_branching_conversations_equals_the_flat_one(tokenizer, tuned):
    rng = random.Random(5)

    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choice(["red", "blue", "seven", "why", "not"]) for _ in range(9))}

    opening = [{"role": "system", "content": "Be brief."}, turn("user"), turn("assistant")]
    middles = [[turn("user"), turn("assistant")] for _ in range(2)]
    talks = [[*opening, *middle, turn("user"), turn("assistant")] for middle in middles for _ in range(3)]
    talks += [opening, [*opening, *middles[0]]]  # some are the beginning of others
    rows = [
        row
        for i, talk in enumerate(talks)
        for row in encode_turns(Conversation(tuple(talk), str(i), ""), tokenizer, 512)
    ]
    assert_same_step(tuned, rows, Layout(True, 2048, "sparse"))
    packs = make_packs(rows, Layout(True, 2048, "sparse"))
    assert sum(len(p.input_ids) for p in packs) < 0.6 * sum(len(row.ids) for row in rows)


@pytest.mark.parametrize("seed", range(6))
def test_one_step_of_random_forests_equals_the_flat_one(tuned, seed):
    rng = random.Random(seed)
    rows: list[Example] = []
    for _ in range(rng.randrange(3, 12)):
        ids = list(rows[rng.randrange(len(rows))].ids) if rows and rng.random() < 0.7 else []
        ids = [*ids[: rng.randrange(len(ids) + 1)], *(rng.randrange(5, 9) for _ in range(rng.randrange(2, 12)))]
        mask = [0, *(rng.randrange(2) for _ in ids[1:])]
        mask[-1] = 1
        rows.append(Example(ids, mask))
    assert_same_step(tuned, rows, Layout(True, rng.choice([8, 40, 500]), "sparse"))


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_a_pack_see_what_the_mask_lets_them_see(seed):
    rng = random.Random(seed)
    rows: list[Example] = []
    for _ in range(30):
        ids = list(rng.choice(rows).ids) if rows and rng.random() < 0.8 else []
        ids = [*ids[: rng.randrange(len(ids) + 1)], *(rng.randrange(5, 9) for _ in range(rng.randrange(2, 90)))]
        rows.append(Example(ids, [0] * len(ids)))
    (pack,) = make_packs(rows, Layout(True, 10_000, "sparse"))
    mask, pieces = torch.zeros(len(pack.end), len(pack.end), dtype=torch.bool), pieces_of(tuple(pack.end))
    for piece in pieces:
        own = range(piece.start, piece.stop)
        columns = [i for a, b in piece.before for i in range(a, b)] + list(own)
        sees = torch.ones(len(own), len(columns), dtype=torch.bool).tril() if piece.mask is None else piece.mask == 0
        mask[piece.start : piece.stop, columns] = sees
    assert torch.equal(mask, attention_mask(pack)[0, 0])
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(len(pack.end)))
    assert sum(p.pairs for p in pieces) < 0.5 * mask.numel()


@pytest.mark.parametrize("most", [2.0, 0.0])
def test_pieces_train_in_bfloat16_as_the_dense_mask_does(questions, tokenizer, tiny, monkeypatch, most):
    """By plain products, and by the fused kernel if the scores would take too much memory."""
    monkeypatch.setattr("sft.kernels.forest_attention.PLAIN_GIB", most)
    (pack,) = make_packs([encode(q, tokenizer, 1024) for q in questions[:8]], Layout(True, 4096, "sparse"))
    gradients = []
    for dtype, implementation in ((torch.float32, "sdpa"), (torch.bfloat16, "sdpa"), (torch.bfloat16, "forest")):
        model = tune_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype), LORA, seed=0)
        random_adapter(model)
        model.set_attn_implementation(implementation)
        torch.manual_seed(0)
        pack_loss(model, pack, torch.device("cpu")).backward()
        gradients.append(torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad]))
    exact, dense, forest = gradients
    assert (forest - exact).norm() < 1.5 * (dense - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("case", ["plain", "transposed", "autocast", "checkpointed", "other value size"])
def test_attention_by_pieces_has_the_gradients_of_a_dense_mask(case):
    """With grouped heads, on a trunk with long and short branches."""
    torch.manual_seed(0)
    end = [300, *[300] * 39, *[120] * 80, *[200] * 80, *[250] * 50, *[300] * 50]
    mask = torch.tensor([[k <= q < end[k] for k in range(300)] for q in range(300)])
    size = 8 if case.endswith("value size") else 16
    shapes = ((6, 16), (2, 16), (2, size))
    states = [torch.randn(1, h, 300, s, requires_grad=True) for h, s in shapes]
    module = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=2), training=False)
    of_output = torch.randn(1, 300, 6, size)

    def forest(*qkv: torch.Tensor) -> torch.Tensor:
        if case == "transposed":  # a last stride that the fused kernel does not take
            qkv = tuple(t.transpose(2, 3).contiguous().transpose(2, 3) for t in qkv)
        return forest_attention(module, *qkv, torch.tensor(end)[None, None, None], scaling=0.3)[0]

    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        ours = checkpoint(forest, *states, use_reentrant=False) if case == "checkpointed" else forest(*states)
    theirs = functional.scaled_dot_product_attention(*states, mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    gradients = [torch.autograd.grad(o, states, of_output.to(o.dtype)) for o in (ours, theirs)]
    for mine, other in zip((ours, *gradients[0]), (theirs, *gradients[1]), strict=True):
        assert (mine.float() - other).norm() <= (0.02 if case == "autocast" else 1e-5) * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_sees_what_the_dense_mask_lets_it_see(questions, tokenizer, tiny, dtype):
    """Forward only: PyTorch has no backward for it on a CPU."""
    rows = [encode(q, tokenizer, 1024) for q in questions[:8]]
    (pack,) = make_packs(rows, Layout(True, 4096, "sparse"))
    assert not is_chain(pack)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype).eval()
    logits = []
    for implementation in ("sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits.append(model(**pack_inputs(model, pack, torch.device("cpu")), use_cache=False).logits.float())
    assert logits[0].shape == logits[1].shape == (1, len(pack.target), len(tokenizer))
    tolerance = 1e-4 if dtype == torch.float32 else 0.05 * logits[0].std()
    assert (logits[0] - logits[1]).abs().max() < tolerance


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward needs a GPU")
def test_flex_attention_trains_on_a_gpu_as_the_dense_mask_does(questions, tokenizer, tuned):
    device = torch.device("cuda")
    model = tuned.to(device)
    (pack,) = make_packs([encode(q, tokenizer, 1024) for q in questions[:8]], Layout(True, 4096, "sparse"))
    results = []
    for implementation in ("sdpa", "flex_attention"):
        model.get_base_model().set_attn_implementation(implementation)
        model.zero_grad()
        loss = pack_loss(model, pack, device)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        results.append((loss.item(), gradients))
    tuned.to("cpu")
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4)
    assert (results[1][1] - results[0][1]).norm() < 1e-3 * results[0][1].norm()


@pytest.mark.slow
@needs_real("squad_v2/train.json.gz")
def test_one_shared_step_on_real_squad_and_the_real_model_equals_the_flat_one(tokenizer):
    rows = read_squad(REAL_DATA / "squad_v2" / "train.json.gz")
    start = next(i for i, r in enumerate(rows) if not r.answers) // 8 * 8
    chosen = rows[start : start + 12]
    assert len({r.context for r in chosen}) >= 2
    model = tune_model(load_base(Model(base=SMOLLM, dtype="float32"), torch.device("cpu")), LORA, seed=0)
    random_adapter(model)
    assert fuse_lora(model) == 210
    assert_same_step(model, [encode(r, tokenizer, 1024) for r in chosen], Layout())
