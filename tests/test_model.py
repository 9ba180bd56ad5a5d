"""The model room as a specification: architecture, loss, cache and engine, initialization, files."""
import json
import math
import os
import resource
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as M
import quantize as Q
from bpe import BadInput, Tokenizer
from conftest import ROOT, need
from model import GPT, GPTConfig, KVCache, init_weights

TINY = dict(block_size=64, vocab_size=100, n_layer=2, n_head=4, n_embd=32)
STYLES = {
    "nano": dict(),
    "gpt2": dict(M.GPT2, vocab_size=100, block_size=64),
    "llama": dict(M.LLAMA, n_kv_head=2),
    "mqa": dict(n_kv_head=1, norm="rmsnorm_plain", act="geglu", tied=True),
    "nope": dict(pos="none", norm="layernorm", bias=True, act="silu"),
    "gpt1": dict(M.GPT1, vocab_size=100, block_size=64),
    "sandwich": dict(place="sandwich", norm="rmsnorm", act="reglu", resid_scale=0.5),
    "deepnorm": dict(place="deepnorm", init="deepnorm", norm="layernorm", bias=True, act="geglu"),
    "falcon": dict(M.FALCON, vocab_size=100, block_size=64, n_kv_head=1),
    "gpt-neox": dict(place="parallel2", rope_dim=4, norm="layernorm"),
    "bloom": dict(M.BLOOM, vocab_size=100, block_size=64),
    "t5": dict(pos="t5", attn_scale=1.0, norm="rmsnorm", act="relu"),
    "sinusoidal": dict(pos="sinusoidal", embd_scale=32 ** 0.5, act="glu"),
    "yarn": dict(rope_scaling="yarn", rope_factor=4.0, rope_original=16),
    "window": dict(attn="window", window=5),
    "gpt3": dict(M.GPT3, vocab_size=100, block_size=64, window=4),
    "window-alibi": dict(attn="full,window", window=5, pos="alibi", n_kv_head=2),
    "albert": dict(share=2, embd_dim=16, norm="layernorm", bias=True, tied=True),
    "gemma": dict(softcap=5.0, logit_scale=0.7, act="geglu_tanh", resid_mix=True),
    "chatglm": dict(M.QWEN2, vocab_size=100, block_size=64, n_kv_head=2, rope_dim=4),
}


def make(seed=0, noise=True, **kwargs):
    """A small model with every weight away from its special initial value."""
    model = GPT(GPTConfig(**{**TINY, **kwargs}))
    init_weights(model, seed)
    if noise:
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return model.eval()


@pytest.fixture(params=STYLES)
def model(request):
    return make(**STYLES[request.param])


def tokens(B, T, seed=0, V=100):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


# --- architecture


def test_a_later_token_never_changes_an_earlier_logit(model):
    a = tokens(2, 20)
    b = a.clone()
    b[:, 12:] = (b[:, 12:] + 1) % 100
    la, lb = model(a)[0], model(b)[0]
    assert torch.equal(la[:, :12], lb[:, :12])
    assert not torch.allclose(la[:, 12:], lb[:, 12:])


def test_every_earlier_token_can_change_a_later_logit(model):
    if model.config.window:
        pytest.skip("not with a window")
    a = tokens(1, 10)
    base = model(a)[0][0, -1]
    for t in range(10):
        b = a.clone()
        b[0, t] = (b[0, t] + 1) % 100
        assert not torch.allclose(model(b)[0][0, -1], base, atol=1e-6), t


def test_logits_have_the_real_vocabulary(model):
    assert model(tokens(2, 5))[0].shape == (2, 5, 100) and model.config.padded_vocab == 128


@pytest.mark.parametrize("name", ["layernorm", "rmsnorm"])
def test_norms_follow_their_formulas(name):
    norm, x = M.Norm(GPTConfig(norm=name, n_embd=8, bias=True, norm_eps=0.1)).double(), torch.randn(3, 8).double()
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    centred = x - x.mean(-1, keepdim=True) if name == "layernorm" else x
    y = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    assert torch.allclose(norm(x), y + norm.bias if name == "layernorm" else y)
    plain = M.Norm(GPTConfig(norm=name + "_plain", n_embd=8, norm_eps=0.1))
    assert not list(plain.parameters())
    assert torch.allclose(plain(x), centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt())


PHI = {  # each activation, from its definition
    "relu": lambda x: max(x, 0), "gelu": lambda x: x / 2 * (1 + math.erf(x / 2 ** 0.5)),
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3))),
    "silu": lambda x: x / (1 + math.exp(-x)), "relu2": lambda x: max(x, 0) ** 2,
    "glu": lambda x: 1 / (1 + math.exp(-x)), "bilinear": lambda x: x, "reglu": lambda x: max(x, 0)}
PHI |= {"geglu": PHI["gelu"], "geglu_tanh": PHI["gelu_tanh"], "swiglu": PHI["silu"]}


@pytest.mark.parametrize("name", PHI)
def test_mlps_follow_their_formulas(name):
    mlp, x = M.MLP(GPTConfig(n_embd=6, n_head=1, n_hidden=9, act=name)).double(), torch.randn(4, 6).double()
    phi = torch.tensor([[PHI[name](v) for v in row] for row in ((mlp.gate or mlp.up)(x)).tolist()]).double()
    assert torch.allclose(mlp(x), mlp.down(phi if mlp.gate is None else phi * mlp.up(x)), atol=1e-7)
    assert PHI.keys() == (M.ACTIVATIONS | M.GATED).keys()


@pytest.mark.parametrize("place, formula", [
    ("pre", lambda x, f, a, b, alpha: x + f(a(x))),
    ("post", lambda x, f, a, b, alpha: a(x + f(x))),
    ("sandwich", lambda x, f, a, b, alpha: x + b(f(a(x)))),
    ("deepnorm", lambda x, f, a, b, alpha: a(alpha * x + f(x)))])
def test_norms_stand_where_the_placement_says(place, formula):
    block = make(n_layer=8, place=place, norm="layernorm", pos="none",
                 init="deepnorm" if place == "deepnorm" else "gpt2").blocks[0]
    x = torch.randn(2, 5, 32)
    y = formula(x, lambda h: block.attn(h, None, None, M.attend), block.norm1, block.norm1_out, 2.0)  # (2 x 8)^(1/4)
    assert torch.allclose(block(x, None), formula(y, block.mlp, block.norm2, block.norm2_out, 2.0), atol=1e-6)


def test_parallel_blocks_add_both_branches_to_one_input():
    for place in ("parallel", "parallel2"):
        block = make(place=place, pos="none", norm="layernorm").blocks[0]
        x = torch.randn(2, 5, 32)
        second = block.norm1(x) if place == "parallel" else block.norm2(x)
        expected = x + block.attn(block.norm1(x), None, None, M.attend) + block.mlp(second)
        assert torch.allclose(block(x, None), expected, atol=1e-6)


def test_deepnorm_starts_from_scaled_xavier_weights():
    model = make(noise=False, place="deepnorm", init="deepnorm", n_layer=2, n_embd=256)
    beta = (8 * 2) ** -0.25
    for name, gain, shape in (("attn.q", 1, 512), ("attn.v", beta, 512), ("attn.o", beta, 512), ("mlp.up", beta, 1280)):
        weight = model.get_parameter(f"blocks.0.{name}.weight")
        assert weight.std().item() == pytest.approx(gain * math.sqrt(2 / shape), rel=0.02), name


def test_sinusoids_and_alibi_slopes_are_the_papers():
    table = M.sinusoid_table(GPTConfig(n_embd=16, n_head=1, block_size=50))
    for t, i in ((0, 0), (7, 3), (49, 7)):
        angle = t / 10000 ** (2 * i / 16)
        assert table[t, 2 * i:2 * i + 2].tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-5)
    assert M.alibi_slopes(8).tolist() == [2.0 ** -h for h in range(1, 9)]
    assert M.alibi_slopes(16)[:3].tolist() == pytest.approx([2 ** -0.5, 2 ** -1, 2 ** -1.5])
    assert len(M.alibi_slopes(12)) == 12


def test_scaled_rope_turns_slow_pairs_slower_and_fast_pairs_as_before():
    settings = dict(head_dim=64, block_size=256, rope_factor=4.0, rope_original=64)
    plain = M.rope_frequencies(GPTConfig(**settings))
    for scaling in ("linear", "ntk", "yarn", "llama3"):
        ratio = M.rope_frequencies(GPTConfig(**settings, rope_scaling=scaling)) / plain
        assert ratio[-1].item() == pytest.approx(0.25), scaling
        assert ratio[0].item() == pytest.approx(0.25 if scaling == "linear" else 1.0), scaling


SEEN = {  # of 8 places with a window of 3: the keys that each query sees
    "full": ["0", "01", "012", "0123", "01234", "012345", "0123456", "01234567"],
    "window": ["0", "01", "012", "123", "234", "345", "456", "567"],
    "strided": ["0", "01", "012", "0123", "1234", "2345", "03456", "14567"]}


@pytest.mark.parametrize("kind", SEEN)
def test_each_kind_of_attention_sees_its_keys(kind):
    i = torch.arange(8)
    rows = M.visible(kind, 3, i[:, None], i)
    assert ["".join(str(j) for j in range(8) if row[j]) for row in rows] == SEEN[kind]


@pytest.mark.parametrize("style", ["nano", "gpt2", "window", "bloom", "t5"])
def test_a_prefix_sees_itself_and_the_rest_is_causal(style):
    model, a = make(**STYLES[style]), tokens(2, 12)
    prefix = torch.tensor([6, 0])
    base = model(a, prefix=prefix)[0]
    assert torch.allclose(base[1], model(a)[0][1], atol=1e-5)  # no prefix: causal
    b = a.clone()
    b[:, 5] = (b[:, 5] + 1) % 100
    changed = (model(b, prefix=prefix)[0] - base).abs().amax(-1) > 1e-6
    assert changed[0, :6].all() and not changed[1, :5].any()
    c = a.clone()
    c[:, 9] = (c[:, 9] + 1) % 100
    assert torch.equal(model(c, prefix=prefix)[0][:, :9], base[:, :9])


def test_a_prefix_model_reads_its_prompt_both_ways():
    model, prompts = make(prefix_lm=True), [tokens(1, n, n)[0].tolist() for n in (3, 9)]
    (first, second), _ = model.generate(prompts, 5, temperature=0)
    for prompt, answer in zip(prompts, (first, second)):
        for n, token in enumerate(answer):
            logits = model(torch.tensor([prompt + answer[:n]]), prefix=torch.tensor([len(prompt)]))[0]
            assert token == logits[0, -1].argmax()


@pytest.mark.parametrize("T", [1, 64, 150])
def test_the_tiled_flash_algorithm_equals_attention(T):
    q, k, v = torch.randn(3, 2, 3, T, 16)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for block in (16, 64):
        assert torch.allclose(M.flash_attention(q, k, v, block), expected, atol=1e-5)


@pytest.mark.parametrize("style", ["window", "gpt3", "bloom", "window-alibi"])
def test_masks_and_biases_are_those_of_flex_attention(style):
    """The same functions serve flex_attention's interface; here its own reference evaluates them."""
    from torch.nn.attention.flex_attention import create_mask, flex_attention
    model, idx = make(**STYLES[style]), tokens(2, 40)
    docs = torch.arange(40).expand(2, 40) // torch.tensor([[13], [17]])
    seen = []

    def create(mask_mod, B, H, T, S, device):
        seen.append(mask_mod)
        return create_mask(mask_mod, B, H, T, S, device)

    def reference(q, k, v, score_mod, block_mask, scale, enable_gqa):
        k, v = (z.repeat_interleave(q.shape[1] // k.shape[1], 1) for z in (k, v))
        scores = (q @ k.transpose(-1, -2)) * scale
        if score_mod is not None:
            b, h, i, j = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
            scores = score_mod(scores, b, h, i, j)
        return scores.masked_fill(~block_mask, -math.inf).softmax(-1) @ v

    expected = model(idx, doc_ids=docs)[0]
    views = model.views
    model.views = lambda *args: views(*args[:-1], True)
    saved, M.flex = M.flex, lambda: (reference, create)
    try:
        assert torch.allclose(model(idx, doc_ids=docs)[0], expected, atol=1e-5) and seen
    finally:
        M.flex = saved


def test_shared_layers_and_a_factorized_embedding_are_alberts():
    full, shared = make(n_layer=4), make(n_layer=4, share=4, embd_dim=8)
    assert len(shared.blocks) == 1 and shared.wte.weight.shape == (128, 8)
    per_block = sum(p.numel() for p in full.blocks[0].parameters())
    assert M.count_parameters(full)[0] - M.count_parameters(shared)[0] == 3 * per_block + 2 * (128 * 24 - 8 * 32)
    repeated = make(n_layer=4, embd_dim=8)
    repeated.load_state_dict({
        name: shared.state_dict()[f"blocks.0.{name.split('.', 2)[2]}" if "blocks" in name else name]
        for name in repeated.state_dict()})
    assert torch.allclose(repeated(tokens(2, 9))[0], shared(tokens(2, 9))[0], atol=1e-6)


def test_mixing_in_the_first_residual_starts_as_nothing_and_learns():
    plain, mixed = make(noise=False), make(noise=False, resid_mix=True)
    assert torch.equal(plain(tokens(2, 9))[0], mixed(tokens(2, 9))[0])
    with torch.no_grad():
        mixed.head.weight.normal_()
    mixed(tokens(2, 9), tokens(2, 9, 1))[1].backward()
    assert mixed.mix_x0.grad.abs().sum() > 0


def test_embeddings_may_come_from_outside(model):
    idx = tokens(2, 9)
    assert torch.equal(model(None, embeds=model.wte(idx))[0], model(idx)[0])


def test_grouped_queries_with_copied_keys_equal_full_attention():
    full, grouped = make(), make(n_kv_head=2)
    state = grouped.state_dict()
    for name in list(state):
        if ".attn.k." in name or ".attn.v." in name:  # each key head serves two query heads
            state[name] = state[name].view(2, 1, 8, -1).expand(2, 2, 8, -1).reshape(32, -1)
    full.load_state_dict(state)
    idx = tokens(2, 16)
    assert torch.allclose(full(idx)[0], grouped(idx)[0], atol=1e-5)


def test_grouped_queries_with_all_heads_is_multi_head():
    assert GPTConfig(**TINY) == GPTConfig(**TINY, n_kv_head=4)


def test_rope_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16)
    table = M.rope_table(GPTConfig(head_dim=16, block_size=64))

    def score(i, j):
        rotated = [M.apply_rope(x, table[:, p:p + 1, None]) for x, p in ((q, i), (k, j))]
        return (rotated[0] * rotated[1]).sum()

    assert torch.allclose(score(7, 3), score(47, 43), atol=1e-5)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-3)
    assert torch.allclose(M.apply_rope(q, table[:, 9:10, None]).norm(), q.norm())


def test_rope_equals_complex_rotation():
    x, table = torch.randn(1, 5, 2, 8), M.rope_table(GPTConfig(head_dim=8, block_size=5, rope_theta=100.0))
    angles = torch.outer(torch.arange(5.0), 100.0 ** (-torch.arange(4) / 4))
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 4), angles)[:, None]
    assert torch.allclose(M.apply_rope(x, table.unsqueeze(-2)), torch.cat((z.real, z.imag), -1), atol=1e-6)


def test_documents_in_one_row_do_not_see_each_other():
    model = make(pos="none")
    a, b = tokens(1, 7, 1), tokens(1, 9, 2)
    ids = torch.tensor([[0] * 7 + [1] * 9])
    packed = model(torch.cat((a, b), 1), doc_ids=ids)[0]
    assert torch.allclose(packed[:, :7], model(a)[0], atol=1e-5)
    assert torch.allclose(packed[:, 7:], model(b)[0], atol=1e-5)


@pytest.mark.parametrize("settings, word", [
    (dict(n_embd=30), "n_head"), (dict(n_kv_head=3), "n_kv_head"), (dict(norm="batch"), "norm"),
    (dict(act="tanh"), "act"), (dict(pos="absolute"), "pos"), (dict(head_dim=7), "rope"), (dict(rope_dim=10), "rope"),
    (dict(attn="full,wide"), "attn"), (dict(attn="window"), "--window"),
    (dict(attn="full,full,full", window=2), "n_layer"), (dict(place="deepnorm"), "--init deepnorm"),
    (dict(rope_scaling="yarn", rope_factor=2.0), "rope_original"),
    (dict(rope_scaling="linear", pos="learned"), "pos=rope"), (dict(norm="rmsnorm", norm_bias=True), "bias"),
    (dict(share=3), "--share"), (dict(dropout=1.0), "dropout"), (dict(n_layer=0), "n_layer"),
    (dict(pos="sinusoidal", embd_dim=7), "odd")])
def test_a_config_that_cannot_work_is_refused_by_name(settings, word):
    with pytest.raises(BadInput, match=word):
        GPTConfig(**{**TINY, **settings})


def test_more_tokens_than_the_context_are_refused(model):
    with pytest.raises(BadInput, match="context of 64"):
        model(tokens(1, 65))


# --- initialization and loss


@pytest.mark.parametrize("style", STYLES)
def test_first_loss_is_ln_V(style):
    model = make(noise=False, **STYLES[style])
    loss = model(tokens(8, 64), tokens(8, 64, 1))[1].item()
    assert abs(loss - math.log(100)) < 0.06
    if model.config.init == "zero" and not model.config.tied:  # a silent head
        assert loss == pytest.approx(math.log(100), abs=1e-5)


def test_every_parameter_is_initialized():
    model = GPT(GPTConfig(**TINY, scalar_head=True))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    init_weights(model)
    assert all(p.isfinite().all() for p in model.parameters())
    model.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match="extra"):
        init_weights(model)


@pytest.mark.parametrize("tied, softcap", [(False, 0.0), (True, 0.0), (True, 3.0)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_chunked_loss_and_gradients_equal_plain_ones(tied, softcap, reduction):
    idx, targets = tokens(3, 20), tokens(3, 20, 1)
    targets[0, :5] = -100
    results = []
    for chunk in (0, 7, None):
        model = make(tied=tied, softcap=softcap)
        if chunk is None:
            loss = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten(), reduction=reduction)
        else:
            x = model.trunk(idx).flatten(0, 1)
            loss = M.linear_cross_entropy(x, model.head_weight, targets.flatten(), 100, reduction, softcap, chunk)
        (3 * loss).backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    for loss, grads in results[:2]:
        assert torch.allclose(loss, results[2][0], atol=1e-5)
        for name, grad in grads.items():
            assert torch.allclose(grad, results[2][1][name], atol=1e-4, rtol=1e-4), name


def test_loss_per_token_is_differentiable_row_by_row():
    idx, targets = tokens(2, 20), tokens(2, 20, 1)
    targets[1, 3] = -100
    weights = torch.randn(2, 20)
    model, plain = make(), make()
    x = model.trunk(idx).flatten(0, 1)
    losses = M.linear_cross_entropy(x, model.head_weight, targets.flatten(), 100, "none", chunk=6).view(2, 20)
    reference = F.cross_entropy(plain(idx)[0].transpose(1, 2), targets, reduction="none")
    assert torch.allclose(losses, reference, atol=1e-5) and losses[1, 3] == 0
    assert torch.equal(model(idx, targets, reduction="none")[1], model(idx, targets, reduction="none")[1])
    (losses * weights).sum().backward()
    (reference * weights).sum().backward()
    for p, q in zip(model.parameters(), plain.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-4)


def test_products_in_8_bits_are_near_the_exact_ones():
    """e4m3 keeps 3 bits of a fraction and e5m2 2: relative errors of a few per cent, whatever the scale."""
    for scale in (1e-4, 1.0, 1e4):
        x, w, g = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((64, 32), (48, 32), (64, 48)))
        x, w = (x * scale).requires_grad_(), w.requires_grad_()
        y = M.Float8Product.apply(x, w)
        y.backward(g)
        for got, exact in ((y, x @ w.T), (x.grad, g @ w), (w.grad, g.T @ x)):
            assert (got - exact).float().norm() < 0.1 * exact.float().norm()
    with pytest.raises(BadInput, match="--fp8 needs"):
        M.use_float8(make())


def test_overfits_one_batch():
    model = make(noise=False).train()
    x, y = tokens(2, 16), tokens(2, 16, 1)
    optimizer = torch.optim.AdamW(M.adamw_groups(model, 0.0), lr=1e-2)
    for _ in range(60):
        loss = model(x, y)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.02


def test_scalar_head_gives_one_value_a_position():
    model = make(scalar_head=True)
    a, b = tokens(2, 9), tokens(2, 9)
    b[:, 5:] = 0
    va, vb = model.scalars(a), model.scalars(b)
    assert va.shape == (2, 9) and torch.equal(va[:, :5], vb[:, :5]) and not torch.equal(va[:, 5:], vb[:, 5:])


# --- cache and engine


def test_cached_steps_equal_the_full_forward(model):
    idx = tokens(3, 24)
    full, cache = model(idx)[0], KVCache(model.config, 3, 64)
    parts = [model(idx[:, a:b], cache=cache)[0] for a, b in ((0, 10), (10, 11), (11, 17), (17, 18), (18, 24))]
    assert torch.allclose(torch.cat(parts, 1), full, atol=1e-5)
    assert cache.pos.tolist() == [24] * 3
    cache.drop(20)
    assert torch.allclose(model(idx[:, 4:], cache=cache)[0], full[:, 4:], atol=1e-5)
    small = KVCache(model.config, 3, 16)
    with pytest.raises(BadInput, match="16 left"):
        model(idx, cache=small)


def test_dropping_tokens_from_the_cache_is_as_if_they_were_never_there(model):
    idx, other = tokens(2, 20), tokens(2, 20, 9)
    cache = KVCache(model.config, 2, 64)
    model(idx, cache=cache)
    cache.drop(torch.tensor([5, 8]))  # another number for each row
    rows = torch.stack((other[0, :4], other[1, :4]))
    got = model(rows, cache=cache)[0]
    for i, kept in enumerate((15, 12)):
        full = model(torch.cat((idx[i, :kept], other[i, :4]))[None])[0]
        assert torch.allclose(got[i], full[0, kept:], atol=1e-5)


def test_a_ragged_batch_equals_its_rows_alone(model):
    prompts = [tokens(1, n, n)[0].tolist() for n in (3, 17, 9)]
    for sampling in (dict(temperature=0), dict(temperature=1.0, top_k=20, top_p=0.9)):
        together, logp = model.generate(prompts, 12, seed=[5, 6, 7], **sampling)
        for i, prompt in enumerate(prompts):
            alone, alone_logp = model.generate([prompt], 12, seed=[5 + i], **sampling)
            assert alone[0] == together[i]
            assert torch.allclose(torch.tensor(alone_logp[0]), torch.tensor(logp[i]), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_compiled_blocks_write_the_same_text_on_a_cpu(bits):
    """512 wide: floats take oneDNN's product, which the compiler meets as an operator of ours."""
    model = make(n_embd=512, n_head=8, n_kv_head=4, attn="full,window", window=6)
    if bits:
        Q.quantize_model(model, "symmetric" if bits == 8 else "zeropoint", bits, 0 if bits == 8 else 32)
    for lengths in ((9,), (3, 17, 9)):
        prompts = [tokens(1, n, n)[0].tolist() for n in lengths]
        ids, logp = model.generate(prompts, 12, temperature=0)
        compiled, compiled_logp = model.generate(prompts, 12, temperature=0, compile=True)
        assert compiled == ids
        assert torch.allclose(torch.tensor(compiled_logp), torch.tensor(logp), atol=1e-4 if not bits else 2e-2)


@pytest.mark.parametrize("sampling", [dict(temperature=0), dict(temperature=1.0, top_k=20, repetition_penalty=1.3)])
def test_rows_that_end_make_room_and_nothing_else_changes(sampling):
    model = make()
    prompts = [tokens(1, n, n)[0].tolist() for n in (3, 17, 9, 1, 60)]
    stop = [5, 6, 7, 8, 9]
    whole = model.generate(prompts, 40, stop, **sampling)
    assert len({len(row) for row in whole[0]}) > 1
    for slots, poll in ((1, 1), (2, 1), (2, 16), (3, 4), (5, 7)):
        tokens_of, logprobs = model.generate(prompts, 40, stop, slots=slots, poll=poll, **sampling)
        assert tokens_of == whole[0], (slots, poll)
        for a, b in zip(logprobs, whole[1]):
            assert a == pytest.approx(b, abs=1e-4)


def test_equal_prompts_go_through_the_model_once():
    model, seen = make(), []
    trunk = model.trunk
    model.trunk = lambda idx, **kwargs: seen.append(tuple(idx.shape)) or trunk(idx, **kwargs)
    one, two = tokens(1, 9, 1)[0].tolist(), tokens(1, 9, 2)[0].tolist()
    got, _ = model.generate([one, two, one, one], 3, seed=[1, 2, 3, 1])
    assert seen == [(2, 9), (4, 1), (4, 1)] and got[0] == got[3] != got[2]


TREE = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]  # a path of ranks for each node behind the root


def tree_of(paths):
    """depth (n,) and who sees whom (n, n) of nodes, the root first."""
    nodes = [[]] + paths
    sees = [[a == b[:len(a)] for a in nodes] for b in nodes]
    return torch.tensor([len(a) for a in nodes]), torch.tensor(sees)


@pytest.mark.parametrize("style", [dict(), dict(pos="alibi"), dict(pos="learned"), dict(pos="t5"),
                                   dict(attn="window", window=4)], ids=str)
def test_a_tree_of_tokens_equals_each_of_its_paths_alone(style):
    model = make(**style)
    prompts = tokens(2, 11), tokens(2, 8, 7)  # rows of different lengths
    lengths = torch.tensor([11, 8])
    idx = torch.stack((prompts[0][0], F.pad(prompts[1][1], (0, 3))))
    cache = KVCache(model.config, 2, 32)
    model.trunk(idx, cache=cache)
    cache.pos.copy_(lengths)
    cache.even, cache.tree = False, tree_of(TREE)
    nodes = tokens(2, 1 + len(TREE), 3)
    got = model.logits(model.trunk(nodes, cache=cache))
    assert cache.pos.tolist() == [11, 8]  # whoever accepts a branch moves it
    for b in range(2):
        start = idx[b, :lengths[b]]
        for n, path in enumerate([[]] + TREE):
            way = [0] + [1 + TREE.index(path[:i + 1]) for i in range(len(path))]
            alone = model(torch.cat((start, nodes[b, way]))[None])[0][0, -1]
            assert torch.allclose(got[b, n], alone, atol=1e-5), path
    # keep a branch of two, and only the root of the other row
    cache.move(torch.tensor([[0, 1, 4], [0, 3, 4]]), torch.tensor([3, 1]))
    cache.tree = None
    last = tokens(2, 1, 5)
    got = model.logits(model.trunk(last, cache=cache))[:, -1]
    for b, way in ((0, [0, 1, 4]), (1, [0])):
        alone = model(torch.cat((idx[b, :lengths[b]], nodes[b, way], last[b]))[None])[0][0, -1]
        assert torch.allclose(got[b], alone, atol=1e-5)


def test_greedy_generation_equals_argmax_of_full_forwards(model):
    row = tokens(1, 5)[0].tolist()
    got, logp = model.generate([row], 20, temperature=0)
    for token, lp in zip(got[0], logp[0]):
        logits = model(torch.tensor([row]))[0][0, -1]
        assert token == logits.argmax()
        assert lp == pytest.approx(logits.log_softmax(-1)[token].item(), abs=1e-4)
        row = row + [token]


def test_generation_goes_on_past_the_context():
    model = make()
    prompts = [tokens(1, n, n)[0].tolist() for n in (60, 10)]
    got, _ = model.generate(prompts, 150, temperature=0)
    assert [len(row) for row in got] == [150, 150]
    row = prompts[0] + got[0]
    # after 64 tokens the row keeps its last 32: token 65 comes from them alone
    logits = model(torch.tensor([row[65 - 32:65]]))[0][0, -1]
    assert row[65] == logits.argmax()


def test_generation_stops_before_a_stop_token_and_rows_stop_alone():
    model = make()
    prompts = [[1, 2, 3], [4, 5]]
    free, _ = model.generate(prompts, 30, temperature=1.0, seed=3)
    stop = free[0][4]
    got, logp = model.generate(prompts, 30, temperature=1.0, seed=3, stop=[stop])
    for a, b in zip(free, got):
        assert b == (a[:a.index(stop)] if stop in a else a)
    assert [len(r) for r in got] == [len(r) for r in logp]


def test_generation_leaves_the_training_mode_as_it_was_even_when_it_ends_early():
    model = make().train()
    stop = model.generate([[1, 2]], 3, temperature=0)[0][0][0]
    assert model.training and model.generate([[1, 2]], 50, temperature=0, stop=[stop])[0] == [[]]
    assert model.training


def test_pick_replaces_the_choice_and_sees_the_ids_so_far():
    model, seen = make(), []

    def pick(logits, ids):
        seen.append([list(row) for row in ids])
        return logits.argmin(-1)

    got, _ = model.generate([[1, 2], [3]], 5, pick=pick)
    assert got[1][0] == model(torch.tensor([[3]]))[0][0, -1].argmin()
    assert seen[-1] == [[1, 2] + got[0][:4], [3] + got[1][:4]]


def test_samples_follow_the_distribution():
    n, logits = 20000, torch.tensor([1.0, 0.0, -1.0, 2.0, -math.inf])
    u = M.uniform(torch.zeros(n, dtype=torch.long), torch.arange(n))
    two = torch.tensor([math.e, 0, 0, math.e ** 2, 0]) / (math.e + math.e ** 2)
    for settings, expected in ((dict(temperature=0.7), (logits / 0.7).softmax(-1)), (dict(top_k=2), two),
                               (dict(top_p=0.6), torch.tensor([0.0, 0, 0, 1, 0])), (dict(min_p=0.2), two)):
        token, logp = M.sample_token(logits.expand(n, 5), u, **settings)
        counts = torch.bincount(token, minlength=5) / n
        assert (counts - expected).abs().max() < 0.015
        assert counts[expected == 0].sum() == 0
        assert torch.allclose(logp, (logits / settings.get("temperature", 1)).log_softmax(-1)[token])


def test_uniform_numbers_are_uniform_and_streams_independent():
    seeds, positions = torch.meshgrid(torch.arange(100), torch.arange(100), indexing="ij")
    u = M.uniform(seeds, positions)
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003
    assert abs(torch.corrcoef(u[:2])[0, 1]) < 0.3 and abs(torch.corrcoef(u.T[:2])[0, 1]) < 0.3
    assert len(u.unique()) > 9900


@pytest.mark.parametrize("kwargs, word", [
    (dict(temperature=-1), "temperature"), (dict(top_k=0), "top_k"), (dict(top_p=0.0), "top_p")])
def test_bad_sampling_settings_are_refused(kwargs, word):
    with pytest.raises(BadInput, match=word):
        make().generate([[1]], 2, **kwargs)


@pytest.mark.parametrize("prompts, word", [([[]], "empty"), ([list(range(65))], "longer")])
def test_bad_prompts_are_refused(prompts, word):
    with pytest.raises(BadInput, match=word):
        make().generate(prompts, 2)


STORY = """Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, \
she saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play \
with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she"""


def test_a_llama2c_model_tells_its_story(tmp_path):
    """stories260K, greedy, 200 steps: the text that llama2.c's own test expects of its run.c."""
    model = GPT.from_pretrained(need("models/stories260K.bin")).eval()
    tokenizer = Tokenizer.from_pretrained(need("models/tok512.bin"))
    assert tokenizer.decode(model.generate([[1]], 200, temperature=0)[0][0]) == STORY
    data = need("models/stories260K.bin").read_bytes()
    for forged in (data[:-4], data[:1000], data[:10], b"\xff" * 100):
        (tmp_path / "forged.bin").write_bytes(forged)
        with pytest.raises(BadInput):
            GPT.from_pretrained(tmp_path / "forged.bin")


# --- accounting


@pytest.mark.parametrize("preset, millions", [
    ("gpt1", 116.5), ("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-large", 774.0), ("gpt2-xl", 1557.6),
    ("llama-7b", 6738.4), ("llama-13b", 13015.9), ("llama-30b", 32528.9), ("llama-65b", 65285.7),
    ("llama3-8b", 8030.3), ("tinyllama-1.1b", 1100.0), ("smollm2-135m", 134.5), ("mistral-7b", 7241.7),
    ("qwen2.5-0.5b", 494.0), ("qwen3-0.6b", 596.0), ("chatglm2-6b", 6243.6), ("falcon-7b", 6921.7),
    ("bloom-176b", 176247.3)])
def test_presets_have_the_published_number_of_parameters(preset, millions):
    """Where a paper rounds, the number of the released weights; GPT-1 by its dimensions."""
    assert unpadded(preset) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("preset, billions", [
    ("small", 0.125), ("medium", 0.350), ("large", 0.760), ("xl", 1.3), ("2.7b", 2.7), ("6.7b", 6.7), ("13b", 13.0),
    ("175b", 175.0)])
def test_gpt3_presets_are_the_papers_sizes(preset, billions):
    """Brown et al. 2020, table 2.1, to two digits."""
    assert unpadded("gpt3-" + preset) / 1e9 == pytest.approx(billions, rel=0.025)


def unpadded(preset):
    with torch.device("meta"):
        model = GPT(GPTConfig(**M.PRESETS[preset]))
    copies = 1 if model.config.tied else 2
    padding = (model.config.padded_vocab - model.config.vocab_size) * model.config.n_embd * copies
    return M.count_parameters(model)[0] - padding


@pytest.mark.parametrize("style", ["nano", "gpt2", "llama", "gpt1", "deepnorm", "falcon", "albert", "window"])
def test_flops_equal_torchs_own_count(style):
    c = GPTConfig(**{**TINY, **STYLES[style], "vocab_size": 128})
    with torch.device("meta"):
        model, x = GPT(c), torch.zeros(3, 64, dtype=torch.long)
        y = torch.zeros(3, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits, _ = model(x)
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    # the gradient of the first block's input reaches no matrix, everything else costs 6 N + 12 L H D T
    assert counter.get_total_flops() == 3 * 64 * M.flops_per_token(model, 64)


def test_mfu_of_published_runs():
    """TinyLlama: 24k tokens/s on an A100 is 56 %; nanoGPT's own estimate for GPT-2 at T 1024 uses the same formula."""
    with torch.device("meta"):
        tiny, gpt2 = (GPT(GPTConfig(**M.PRESETS[p])) for p in ("tinyllama-1.1b", "gpt2"))
    assert M.flops_per_token(gpt2, 1024) / 1e6 == pytest.approx(855.2, abs=1.0)
    # their count includes the input embedding (6 x 65.5M more)
    flops = M.flops_per_token(tiny, 2048) + 6 * 32000 * 2048
    assert flops * 24000 / 312e12 == pytest.approx(0.563, abs=0.03)


def test_an_unknown_device_has_no_peak():
    assert M.peak_flops(torch.device("cpu")) is None


# --- files


def test_safetensors_round_trip_every_dtype(tmp_path):
    tensors = {name: torch.arange(12).reshape(3, 4).to(dtype) for name, dtype in M.DTYPES.items()}
    tensors["empty"], tensors["scalar"] = torch.zeros(0, 3), torch.tensor(2.5)
    M.save_safetensors(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    back = M.load_safetensors(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys()
    for name, t in tensors.items():
        assert back[name].dtype == t.dtype and torch.equal(back[name].view(-1).view(torch.uint8),
                                                           t.contiguous().view(-1).view(torch.uint8)), name


def test_safetensors_reads_headers_of_any_length(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (1 - len(header) % 2)  # odd: the data is not aligned
    data = torch.tensor([1.5, -2.0])
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data.numpy().tobytes())
    assert torch.equal(M.load_safetensors(path)["x"], data)


def forged(path, header=None, length=None, data=b"\0" * 16):
    text = json.dumps(header or {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("change", [
    dict(length=2 ** 62), dict(length=0), dict(data=b"\0" * 15), dict(data=b"\0" * 20),
    dict(header={"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}),
    dict(header={"x": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}),
    dict(header={"x": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}),
    dict(header={"x": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}),
    dict(header={"x": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}),
    dict(header={"x": {"dtype": "Q4", "shape": [4], "data_offsets": [0, 16]}}),
    dict(header={"x": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}}),
    dict(header={"x": 3}), dict(header=[1, 2]),
    dict(header={"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                 "y": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})])
def test_forged_safetensors_are_refused(tmp_path, change):
    with pytest.raises(BadInput, match="forged.safetensors is not a sound"):
        M.load_safetensors(forged(tmp_path / "forged.safetensors", **change))


def test_every_truncation_of_a_safetensors_file_is_refused(tmp_path):
    path = forged(tmp_path / "a.safetensors")
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(BadInput):
            M.load_safetensors(path)


def test_a_run_directory_round_trips(tmp_path):
    model = make(**STYLES["llama"])
    M.save_run(tmp_path / "run", model, {"stage": "train", "step": 3})
    back, run = M.load_run(tmp_path / "run")
    idx = tokens(2, 9)
    assert run["step"] == 3 and back.config == model.config and torch.equal(back(idx)[0], model(idx)[0])
    half, _ = M.load_run(tmp_path / "run", dtype=torch.bfloat16)
    assert half.compute_dtype == torch.bfloat16 and torch.allclose(half(idx)[0], model(idx)[0], atol=0.2)


def test_a_missing_or_foreign_run_is_refused(tmp_path):
    with pytest.raises(BadInput, match="run.json"):
        M.load_run(tmp_path)
    model = make()
    M.save_run(tmp_path, model, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="model.safetensors"):
        M.load_run(tmp_path)
    M.save_safetensors({"wte.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="tensor|shape"):
        M.load_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(BadInput, match="run.json"):
        M.load_run(tmp_path)
    with pytest.raises(BadInput, match="python train.py"):
        M.newest_run(tmp_path / "nothing")


SAVER = """
import sys; sys.path.insert(0, {root!r})
import torch, model as M
model = M.GPT(M.GPTConfig(block_size=64, vocab_size=100, n_embd=64, n_head=4))
M.init_weights(model)
print("ready", flush=True)
for step in range(10 ** 6):
    M.save_run({out!r}, model, {{"step": step}})
"""


def test_a_kill_at_any_moment_of_saving_leaves_a_loadable_run(tmp_path):
    out = tmp_path / "run"
    for i in range(0, 6, 2):
        child = subprocess.Popen([sys.executable, "-c", SAVER.format(root=str(ROOT), out=str(out))],
                                 stdout=subprocess.PIPE)
        child.stdout.readline()
        while not (out / "run.json").exists():
            pass
        try:
            child.wait(0.02 + 0.013 * i)
        except subprocess.TimeoutExpired:
            child.kill()
        child.wait()
        model, run = M.load_run(out)
        assert run["step"] >= 0 and model(tokens(1, 4))[0].isfinite().all()


def test_a_failed_write_leaves_the_old_run_and_says_so(tmp_path):
    model = make()
    M.save_run(tmp_path, model, {"step": 1})
    before = (tmp_path / "model.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, hard))  # the disk is full after 10 kB
    try:
        with pytest.raises(BadInput, match="could not be written"):
            M.save_run(tmp_path, make(seed=1), {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert M.load_run(tmp_path)[1]["step"] == 1
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "run.json"]


KERNEL = """
import sys; sys.path.insert(0, {root!r})
import torch, model as M
torch.manual_seed(0)
device = {device!r}
depth, sees = torch.tensor([0, 1, 1, 2, 2]), torch.eye(5, dtype=torch.bool)
sees[1:, 0] = sees[3, 1] = sees[4, 2] = True
for kind, window, alibi, H, heads, D, T, size, tree in [
        ("full", 0, 0, 4, 4, 16, 1, 64, 0), ("full", 0, 0, 6, 2, 24, 5, 64, 0), ("full", 0, 1, 4, 2, 16, 5, 128, 1),
        ("window", 9, 0, 4, 4, 16, 5, 256, 1), ("window", 100, 1, 4, 1, 16, 1, 256, 0),
        ("strided", 7, 0, 4, 2, 32, 3, 64, 0), ("full", 0, 0, 4, 2, 16, 1, 2048, 0),
        ("full", 0, 1, 4, 2, 16, 5, 2048, 1)]:
    B, S = 3, size
    pos = torch.tensor([0, S // 2 + 3, S - T])
    k, v = torch.randn(B, heads, S, D), torch.randn(B, heads, S, D)
    q, new_k, new_v = torch.randn(B, H, T, D), torch.randn(B, heads, T, D), torch.randn(B, heads, T, D)
    deep, see = (depth, sees) if tree else (torch.arange(T), torch.ones(T, T, dtype=torch.bool).tril())
    slopes = M.alibi_slopes(H) if alibi else None
    for b in range(B):  # what it should be, row by row
        p = pos[b]
        every = torch.cat((torch.arange(p), p + deep))
        keys = torch.cat((k[b, :, :p], new_k[b]), 1), torch.cat((v[b, :, :p], new_v[b]), 1)
        at = (p + deep)[:, None]
        mask = M.visible(kind, window, at, every) & torch.cat((torch.ones(T, p, dtype=torch.bool), see), 1)
        bias = torch.zeros(H, T, p + T) - (slopes[:, None, None] * (at - every) if alibi else 0)
        bias = bias.masked_fill(~mask, -torch.inf)
        want = M.attend(q[b:b + 1], keys[0][None], keys[1][None], bias[None], 0.3, 0.0)
        if b == 0:
            wants = []
        wants.append(want)
    slots = M.Slots(*(None if t is None else t.to(device) for t in (k, v, pos, deep, see, slopes)), kind, window)
    got = M.decode_attention(*(t.to(device) for t in (q, new_k, new_v)), slots, 0.3, 0.0).cpu()
    assert torch.allclose(got, torch.cat(wants), atol=1e-5), (kind, T, size, (got - torch.cat(wants)).abs().max())
    for b in range(B):
        assert torch.equal(slots.k[b, :, pos[b]:pos[b] + T].cpu(), new_k[b])
        assert torch.equal(slots.v[b, :, pos[b]:pos[b] + T].cpu(), new_v[b])
print("equal")
"""


VECTORS = """
import sys; sys.path.insert(0, {root!r})
import torch, model as M, quantize as Q, torch.nn.functional as F
device, norms = {device!r}, {{"layernorm": True, "layernorm_plain": False, "rmsnorm": False, "": True}}
torch.manual_seed(0)
M.PROGRAMS = {{0: (512, 1, 4), 8: (512, 1, 4), 4: (2048, 1, 8)}}  # several steps a program, and a last one not full
for rows, K, widths, norm, act, residual, method, group in [
        (1, 48, [40], "layernorm", "gelu_tanh", 0, "", 0), (3, 48, [48, 24, 24], "rmsnorm", "", 0, "", 0),
        (2, 64, [40, 40], "rmsnorm", "swiglu", 0, "", 0), (1, 40, [64, 64], "layernorm_plain", "geglu", 0, "", 0),
        (2, 72, [300], "", "relu2", 1, "", 0), (2, 96, [64, 32, 32], "layernorm", "", 0, "symmetric:8", 0),
        (1, 96, [50], "", "gelu", 1, "zeropoint:4", 32), (2, 96, [64, 64], "rmsnorm", "silu", 0, "absmax:4", 32),
        (2, 64, [20, 20], "rmsnorm", "reglu", 0, "zeropoint:4", 0), (1, 128, [64], "", "", 0, "stretched:4", 64)]:
    bias = norms[norm]
    linears = [M.Linear(K, n, bias=bias) for n in widths]
    norm = M.Norm(M.GPTConfig(n_head=2, n_embd=K, norm=norm, norm_bias=bias)) if norm else None
    for p in () if norm is None else norm.parameters():
        torch.nn.init.normal_(p, 1, 0.2)
    if method:
        name, bits = method.split(":")
        stretch = {{"in_scale": torch.rand(K) + 0.5}} if name == "stretched" else {{}}
        qs = [Q.quantize(f.weight.detach(), "zeropoint" if stretch else name, int(bits), group) for f in linears]
        linears = [Q.QuantLinear(q._replace(parts=q.parts | stretch), f.bias) for q, f in zip(qs, linears)]
        assert all(f.stored() is not None for f in linears)
    x, more = torch.randn(rows, K), torch.randn(rows, widths[0]) if residual else None
    h = x if norm is None else norm(x)
    ys = [F.linear(h, f.weight, f.bias) for f in linears]  # a stretch is part of .weight
    want = M.GATED[act](ys[0]) * ys[1] if act in M.GATED else torch.cat(ys, -1)
    want = (M.ACTIVATIONS[act](want) if act in M.ACTIVATIONS else want) + (more if residual else 0)
    there = lambda m: m if m is None else m.to(device)
    got = M.vector_product(there(x), *map(there, linears), norm=there(norm), act=act, residual=there(more)).cpu()
    assert torch.allclose(got, want, atol=2e-5), (K, widths, act, method, (got - want).abs().max())

for style in (M.GPT2, dict(M.LLAMA, n_kv_head=2), dict(M.LLAMA, n_kv_head=1, qk_norm=True), {{}},
              dict(M.QWEN2, rope_dim=8, n_kv_head=2)):
    c = M.GPTConfig(**style | dict(vocab_size=64, n_layer=1, n_head=4, n_embd=64, block_size=64, n_hidden=96))
    model = M.GPT(c)
    M.init_weights(model)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    block = model.eval().to(device).blocks[0]
    assert M.vectorizes(block)
    for B, T in ((1, 1), (2, 3)):
        x, pos, depth = (t.to(device) for t in (torch.randn(B, T, 64), torch.tensor([5, 20][:B]), torch.arange(T)))
        k, v = (torch.randn(B, c.n_kv_head, 64, c.head_dim, device=device) for _ in "kv")
        rope = model.rope[:, pos[:, None] + depth].unsqueeze(-2) if c.pos == "rope" else None
        see = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        one, two = (M.Slots(k.clone(), v.clone(), pos, depth, see, None, "full", 0) for _ in "12")
        with torch.no_grad():
            want, got = M.decode_block(block, x, rope, one), M.vector_block(block, x, rope, two)
        assert torch.allclose(got, want, atol=2e-5), (style, B, T, (got - want).abs().max())
        assert (torch.allclose(one.k, two.k, atol=1e-5) and torch.equal(one.v, two.v)
                or torch.allclose(one.v, two.v, atol=1e-5))
print("equal")
"""


@pytest.mark.skipif(M.triton is None, reason="triton is not installed; it comes with torch for CUDA")
@pytest.mark.parametrize("script", [KERNEL, VECTORS], ids=["attention", "products"])
def test_the_decoding_kernels_equal_what_they_stand_for(script):
    """On a GPU, or by Triton's interpreter."""
    cuda = torch.cuda.is_available()
    done = subprocess.run([sys.executable, "-c", script.format(root=str(ROOT), device="cuda" if cuda else "cpu")],
                          env={**os.environ, **({} if cuda else {"TRITON_INTERPRET": "1"})},
                          capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("change, fits", [
    ({}, True), ({"qk_norm": True, "qk_norm_all": True}, False), ({"place": "post"}, False), ({"n_expert": 2}, False)])
def test_blocks_that_the_kernels_do_not_know_keep_their_own_forward(change, fits):
    c = M.GPTConfig(**dict(M.LLAMA, vocab_size=64, n_layer=1, n_head=4, n_embd=32, block_size=32) | change)
    block = M.GPT(c).blocks[0]
    assert M.vectorizes(block) == fits
    if fits:  # AWQ stretches the inputs of each its own way; what stands alone may
        quantized = lambda f: Q.QuantLinear(Q.quantize(f.weight.detach(), "awq", 4, 32, hessian=torch.eye(32),
                                                       mean_abs=torch.rand(32) + 0.1))
        for p in block.parameters():
            torch.nn.init.normal_(p)
        block.attn.o = quantized(block.attn.o)
        assert M.vectorizes(block)
        for name in "qkv":
            setattr(block.attn, name, quantized(getattr(block.attn, name)))
        assert not M.vectorizes(block)


@pytest.mark.parametrize("rows", [1, 2, 7, 32, 33])
def test_a_product_of_few_rows_is_the_product(rows):
    x, weight, bias = torch.randn(rows, 3, 512)[:, 1], torch.randn(640, 512), torch.randn(640)
    for b in (None, bias):
        with torch.no_grad():
            got = M.product(x, weight, b)
        assert torch.allclose(got, F.linear(x, weight, b), atol=1e-3) and got.shape == (rows, 640)
    with torch.no_grad():
        assert M.product(x[None], weight).shape == (1, rows, 640)
    weight.requires_grad_()
    M.product(x, weight).sum().backward()
    assert torch.allclose(weight.grad, x.sum(0).expand(640, -1), atol=1e-4)