"""The room of experts as a specification: routing, losses, dispatch, causality, balance, upcycling, files, refusals."""
import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import model as M
import moe
from bpe import BadInput, Tokenizer
from conftest import call
from model import GPT, GPTConfig, KVCache, PRESETS, count_parameters, init_weights, load_run, save_run

ROOT = Path(__file__).parent.parent
SMALL = dict(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=32, n_expert=4)
CAUSAL = [("softmax", 2), ("softmax", 1), ("softmax", 4), ("noisy", 2), ("switch", 1), ("gshard", 2), ("sigmoid", 2)]


def build(seed=0, **settings):
    """A model whose weights are all random, so that no expert and no head is zero."""
    model = GPT(GPTConfig(**SMALL | settings))
    init_weights(model, seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


def ids(rows=2, n=40, seed=0):
    return torch.randint(0, 300, (rows, n), generator=torch.Generator().manual_seed(seed))


def config(**settings):
    return GPTConfig(**SMALL | settings)


def layer(**settings):
    return moe.layers(build(**settings))[0]


# -----------------------------------------------------------------------------
# Routers


def test_softmax_of_the_top_k_is_the_renormalized_softmax_of_all():
    logits = torch.randn(50, 8)
    weights, experts, probs = moe.softmax_top_k(logits, config(n_expert=8), False, None)
    top, index = logits.topk(2)
    assert torch.equal(experts, index) and torch.allclose(weights, top.softmax(-1), atol=1e-6)
    weights, *_ = moe.softmax_top_k(logits, config(n_expert=8, router_norm=False), False, None)
    assert torch.allclose(weights, probs.gather(1, index))


@pytest.mark.parametrize("router, k", CAUSAL + [("expert_choice", 2)])
def test_every_router_has_a_task_gradient_also_with_one_expert(router, k):
    model = build(router=router, n_expert_active=k, aux_loss=0.0, router_z_loss=0.0)
    model.train()(ids(), ids(seed=1))[1].backward()
    for m in moe.layers(model):
        assert m.router.weight.grad.abs().max() > 1e-8


def test_gshard_takes_the_second_with_twice_its_weight():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(20000, 3)
    torch.manual_seed(0)
    weights, experts, _ = moe.gshard_top_2(logits, config(n_expert=3, router="gshard"), True, None)
    g2 = 1 / (1 + math.e)
    assert torch.allclose(weights[:, 0], torch.tensor(1 - g2)) and (experts == torch.tensor([0, 1])).all()
    taken = (weights[:, 1] > 0).float().mean().item()
    assert abs(taken - 2 * g2) < 5 * math.sqrt(0.25 / 20000)
    still, *_ = moe.gshard_top_2(logits, config(n_expert=3, router="gshard"), False, None)
    assert torch.allclose(still.sum(1), torch.ones(20000))


def test_a_sigmoid_routers_bias_chooses_but_does_not_weigh():
    logits, c = torch.tensor([[1.0, 0.5, 0.0, -1.0]]), config(router="sigmoid")
    weights, experts, _ = moe.sigmoid_top_k(logits, c, False, torch.tensor([0.0, -9.0, 0.0, 0.0]))
    s = logits.sigmoid()[0]
    assert experts.tolist() == [[0, 2]]
    assert torch.allclose(weights[0], s[[0, 2]] / s[[0, 2]].sum())


@pytest.mark.parametrize("router, k", CAUSAL + [("expert_choice", 2)])
def test_the_experts_sum_is_scaled(router, k):
    x, one = torch.randn(2, 6, 32), layer(router=router, n_expert_active=k)
    scaled = layer(router=router, n_expert_active=k, router_scale=2.5)
    scaled.load_state_dict(one.state_dict())
    assert torch.allclose(scaled.eval()(x), 2.5 * one.eval()(x), atol=1e-6)


def test_noise_and_jitter_belong_to_training():
    for router, k in (("noisy", 2), ("switch", 1)):
        m = layer(router=router, n_expert_active=k)
        x = torch.randn(10, 32)
        assert torch.equal(m.eval().router(x), m.router(x))
        assert not torch.equal(m.train().router(x), m.router(x))


def test_expert_choice_gives_every_expert_as_many_tokens():
    weights, tokens, probs = moe.expert_choice(torch.randn(24, 4), config(router="expert_choice"))
    assert tokens.shape == (4, 12)
    assert torch.equal(weights, probs.T.gather(1, tokens))
    assert all(weights[e].min() >= probs[:, e][~torch.isin(torch.arange(24), tokens[e])].max() for e in range(4))


# -----------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_balancing_loss_is_1_when_balanced_and_e_when_collapsed(k):
    E, N = 6, 600
    probs, load = torch.full((N, E), 1 / E), torch.full((E,), N * k / E)
    assert moe.load_balancing_loss(probs, load).item() == pytest.approx(1.0)
    one = torch.eye(E)[:1]
    assert moe.load_balancing_loss(one.expand(N, E), one[0] * N).item() == pytest.approx(E)


def test_losses_are_the_formulas():
    logits = torch.randn(30, 5)
    probs, top = logits.softmax(-1), logits.argmax(-1)
    f = torch.tensor([(top == i).float().mean() for i in range(5)])
    formula = 5 * sum(f[i] * probs[:, i].mean() for i in range(5))
    assert moe.load_balancing_loss(probs, f * 30).item() == pytest.approx(formula.item())
    assert moe.router_z_loss(logits).item() == pytest.approx(logits.exp().sum(-1).log().square().mean())


def test_the_loss_is_nats_and_its_gradient_has_the_penalties():
    """Per layer: the gradient with coefficients is that without, plus theirs; the value does not move."""
    x, y = ids(), ids(seed=1)
    plain, losses = build(aux_loss=0.0, router_z_loss=0.0), build(aux_loss=0.5, router_z_loss=0.1)
    a, b = plain.train()(x, y)[1], losses.train()(x, y)[1]
    assert a.item() == b.item()
    a.backward()
    b.backward()
    again = build(aux_loss=0.5, router_z_loss=0.1).train()
    again(x)
    sum(m.penalty for m in moe.layers(again)).backward()
    for p, q, r in zip(plain.parameters(), losses.parameters(), again.parameters()):
        assert torch.allclose(p.grad + (0 if r.grad is None else r.grad), q.grad, atol=1e-6)
    assert losses.eval()(x, y)[1].item() == plain.eval()(x, y)[1].item()


# -----------------------------------------------------------------------------
# Dispatch


def dense(m, x):
    """Every token through all experts, weighted."""
    flat = x.flatten(0, 1)
    weights, experts, _ = moe.ROUTERS[m.config.router](m.router(flat), m.config, m.training, m.router.bias)
    gates = torch.zeros(len(flat), m.config.n_expert).scatter_add(1, experts, weights)
    y = sum(gates[:, i:i + 1] * f(flat) for i, f in enumerate(m.experts))
    return (y if m.shared is None else y + m.shared(flat)).view_as(x)


@pytest.mark.parametrize("settings", [{}, dict(act="swiglu"), dict(n_expert_active=1, router="switch"),
                                      dict(router="sigmoid", n_expert_shared=2, expert_hidden=24),
                                      dict(n_expert_active=4)])
def test_dispatch_is_the_dense_sum_forward_and_backward(settings):
    m = layer(**settings).eval()
    results = []
    for f in (m, lambda x: dense(m, x)):
        x = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        m.zero_grad()
        y = f(x)
        (y * torch.arange(32.0)).sum().backward()
        results.append([y.detach(), x.grad] + [p.grad.clone() for p in m.parameters()])
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=2e-4 * b.abs().max().item() + 1e-6)


@pytest.mark.parametrize("act", ["relu2", "swiglu"])
def test_grouped_products_are_the_loop(act):
    m = layer(act=act)
    counts = torch.tensor([7, 0, 12, 5])
    results = []
    for run in (moe.loop, moe.grouped, moe.masked):
        rows = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        m.zero_grad()
        y = run(m.experts, rows, counts)
        y.backward(torch.randn(24, 32, generator=torch.Generator().manual_seed(1)))
        results.append([y.detach(), rows.grad] + [p.grad.clone() for p in m.experts.parameters()])
    for a, *others in zip(*results):
        assert all(torch.allclose(a, b, atol=1e-5) for b in others)


def test_decoding_lays_the_experts_side_by_side_once_and_training_goes_on():
    m = layer()
    before = [f.up.weight.clone() for f in m.experts]
    with torch.no_grad():
        a, b = (moe.stacked(m.experts, "up", torch.float32) for _ in range(2))
        assert a.data_ptr() == b.data_ptr() == m.experts[0].up.weight.data_ptr()
        assert torch.equal(a, torch.stack(before))
        m.experts[2].up.weight.add_(1)
        assert torch.equal(moe.stacked(m.experts, "up", torch.float32)[2], before[2] + 1)
        m.experts[1].up.weight.data = torch.zeros_like(before[1])  # loaded anew
        assert not moe.stacked(m.experts, "up", torch.float32)[1].any()


@pytest.mark.parametrize("chosen", [0, 3])
def test_all_tokens_to_one_expert_and_none_to_the_others(chosen):
    m = layer(n_expert_active=1)
    with torch.no_grad():
        m.router.weight.zero_()
        m.router.weight[chosen, 0] = 50
    x = torch.randn(2, 9, 32)
    x[..., 0] = 1
    y = m(x)
    assert torch.allclose(y, m.experts[chosen](x), atol=1e-5)
    y.square().sum().backward()
    assert all((f.up.weight.grad != 0).any() == (i == chosen) for i, f in enumerate(m.experts))


# -----------------------------------------------------------------------------
# Causality: a token's result depends on that token alone


@pytest.mark.parametrize("router, k", CAUSAL)
def test_a_suffix_never_changes_the_logits_before_it(router, k):
    model = build(router=router, n_expert_active=k).eval()
    x = ids(1, 60)
    full = model(x)[0]
    for n in (1, 13, 59):
        changed = torch.cat((x[:, :n], ids(1, 60 - n, seed=5)), 1)
        assert torch.allclose(model(changed)[0][:, :n], full[:, :n], atol=1e-5)


@pytest.mark.parametrize("router, k", CAUSAL)
def test_cached_decoding_equals_the_full_forward_and_alone_equals_in_a_batch(router, k):
    model = build(router=router, n_expert_active=k).eval()
    x = ids(3, 20)
    with torch.no_grad():
        full, cache = model(x)[0], KVCache(model.config, 3, 20)
        steps = [model(x[:, :6], cache=cache)[0]] + [model(x[:, i:i + 1], cache=cache)[0] for i in range(6, 20)]
        assert torch.allclose(torch.cat(steps, 1), full, atol=1e-5)
        assert torch.allclose(torch.cat([model(row[None])[0] for row in x]), full, atol=1e-5)


def test_capacity_drops_in_training_only_and_never_an_earlier_token_for_a_later_one():
    experts = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0]])
    assert moe.within_capacity(experts, 3, 2).tolist() == [[True, True], [True, True], [False, True], [False, False]]
    tight, free = build(capacity=0.5), build()
    x = ids()
    assert torch.equal(tight.eval()(x)[0], free.eval()(x)[0])
    assert not torch.equal(tight.train()(x)[0], free.train()(x)[0])
    moe.take_stats(tight), tight(x)
    assert all(d >= 0.4 for d in moe.take_stats(tight)["dropped"])
    assert "capacity" in next(moe.warnings(tight.config)) and not list(moe.warnings(free.config))


def test_expert_choice_looks_ahead_and_says_so():
    model = build(router="expert_choice").eval()
    x = ids(1, 60)
    changed = torch.cat((x[:, :30], ids(1, 30, seed=5)), 1)
    assert not torch.allclose(model(changed)[0][:, :30], model(x)[0][:, :30], atol=1e-3)
    assert "future" in next(moe.warnings(model.config))
    with pytest.raises(BadInput, match="cannot generate"):
        model.generate([[1, 2, 3]], 5)


# -----------------------------------------------------------------------------
# Balance


def test_a_sigmoid_routers_biases_balance_a_skewed_input():
    """Tokens that all like the same two experts: max over mean load ends below 1.3 (it begins above 3)."""
    model = build(router="sigmoid", n_expert=8, bias_rate=0.01, n_layer=1)
    m = moe.layers(model.train())[0]
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        m.router.weight[:2, 0] += 1.0
    loads = []
    for _ in range(400):
        x = torch.randn(1, 256, 32, generator=g)
        x[..., 0] = 3.0
        with torch.no_grad():
            m(x)
        loads.append((m.load.max() / m.load.mean()).item())
        moe.balance(model)
    assert loads[0] > 3 and sum(loads[-20:]) / 20 < 1.3
    assert abs(m.router.bias.sum()) < 1e-4 and not m.router.bias.requires_grad


def test_the_auxiliary_loss_balances_a_collapsed_router():
    m = layer(n_expert=8, aux_loss=1.0, router_z_loss=0.0).train()
    g, loads = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        m.router.weight[:2] += 0.3  # of inputs whose mean is 1
    optimizer = torch.optim.Adam([m.router.weight], 0.02)
    for _ in range(100):
        m.load.zero_()
        m(torch.randn(1, 256, 32, generator=g) + 1)
        optimizer.zero_grad()
        m.penalty.backward()
        optimizer.step()
        loads.append((m.load.max() / m.load.mean()).item())
    assert loads[0] > 3.5 and sum(loads[-20:]) / 20 < 1.5


def test_stats_count_what_was_routed():
    model = build(n_layer=3, moe_every=2).train()
    assert [bool(b) for b in model.config.moe_layers] == [False, True, False] and len(moe.layers(model)) == 1
    model(ids(2, 40))
    tally = moe.layers(model)[0].tally.clone()
    assert tally[:4].sum() == 2 * 40 * 2 and tally[-1] == 80
    stats = moe.take_stats(model)
    assert stats["min"][0] <= 1 <= stats["max"][0] and 0 < stats["entropy"][0] <= 1 and stats["dropped"] == [0.0]
    assert 0 < stats["router"][0] <= math.log(4) and not moe.layers(model)[0].tally.any()
    model.eval()(ids())
    assert not moe.layers(model)[0].tally.any()


@pytest.mark.parametrize("recompute", ["block", "selective"])
def test_recomputation_keeps_no_graph_of_the_penalties(recompute):
    model = build().train()
    M.shard(model, M.Process(torch.device("cpu")), argparse.Namespace(recompute=recompute))
    model(ids(), ids(seed=1))[1].backward()
    assert all(m.penalty is None for m in moe.layers(model))


def test_recomputed_blocks_give_the_same_gradients():
    grads = []
    for recompute in ("none", "block", "selective"):
        model = build().train()
        M.shard(model, M.Process(torch.device("cpu")), argparse.Namespace(recompute=recompute))
        model(ids(), ids(seed=1))[1].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for other in grads[1:] for a, b in zip(grads[0], other))


# -----------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("name, stored, active", [
    ("mixtral-8x7b", 46.70, 12.88), ("mixtral-8x22b", 140.6, 39.2), ("olmoe-1b-7b", 6.92, 1.28),
    ("deepseek-moe-16b", 16.4, 2.83), ("qwen1.5-moe-a2.7b", 14.3, 2.69), ("qwen3-30b-a3b", 30.5, 3.35)])
def test_presets_have_the_published_sizes(name, stored, active):
    model = M.meta_model(GPTConfig(**PRESETS[name]))
    total = count_parameters(model)[0]
    assert total / 1e9 == pytest.approx(stored, rel=2e-3)
    assert (total - moe.idle_parameters(model)) / 1e9 == pytest.approx(active, rel=4e-3)


def test_flops_are_of_the_active_experts():
    few, all_ = (M.meta_model(config(n_expert=8, n_expert_active=k)) for k in (2, 8))
    one = sum(p.numel() for p in moe.layers(few)[0].experts[0].parameters())
    assert count_parameters(all_)[1] - count_parameters(few)[1] == 2 * 6 * one
    assert sum(f for f, _ in M.products(config(n_expert=8), 1, 64, 64).values()) * 3 + 6 * 64 * 2 * 8 * 32 == \
        64 * M.flops_per_token(M.meta_model(config(n_expert=8)), 64)


@pytest.mark.parametrize("settings", [dict(act="swiglu"), dict(n_expert_shared=1), dict(moe_every=2), dict(n_expert=8)])
def test_the_memory_plan_knows_experts(settings):
    """Bytes that autograd keeps of the blocks, within 3 %."""
    c = config(n_embd=128, norm="layernorm_plain", **settings)
    model, kept = GPT(c), []
    init_weights(model)
    x = torch.randn(8, 64, 128)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rope = model.rope[:, :64].unsqueeze(-2)
        for block in model.train().blocks:
            x = block(x, rope)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    held = sum(size for place, size in storages.items() if place not in own)
    assert 512 * 2 * sum(row[1] for row in M.block_activations(c, 4)) == pytest.approx(held, rel=0.03)


# -----------------------------------------------------------------------------
# Files, upcycling


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A dense run and one with experts, with a tokenizer."""
    root = tmp_path_factory.mktemp("runs")
    tokenizer = Tokenizer.train([(ROOT / "README.md").read_text()], 290)
    for name, settings in (("dense", dict(n_expert=0)), ("experts", dict(router="sigmoid"))):
        model = build(**settings | dict(vocab_size=tokenizer.n_vocab))
        if name == "experts":
            moe.layers(model)[0].router.bias.copy_(torch.randn(4))
        save_run(root / name, model, {"tokenizer": tokenizer.spec(), "args": {}})
        tokenizer.save(root / name)
    return root


def run(*args, check=0):
    return call(moe, *args, check=check)[check > 0]


def test_a_run_with_experts_is_saved_and_loaded_with_its_biases(runs):
    a, b = load_run(runs / "experts")[0], load_run(runs / "experts")[0]
    assert moe.layers(a)[0].router.bias.abs().sum() > 0
    assert torch.equal(a.eval()(ids())[0], b.eval()(ids())[0])
    small = load_run(runs / "experts", dtype=torch.bfloat16)[0]
    assert torch.equal(moe.layers(small)[0].router.bias, moe.layers(a)[0].router.bias)
    b.train()(ids())
    assert moe.take_stats(b)["min"]


@pytest.mark.parametrize("flags", [[], ["--n_expert_active", 4], ["--router", "sigmoid"], ["--moe_every", 2],
                                   ["--n_expert_shared", 1], ["--router", "gshard"]])
def test_upcycling_keeps_the_function(runs, tmp_path, flags):
    run("upcycle", "--init", runs / "dense", "--n_expert", 4, "--out", tmp_path / "up", *flags)
    dense, up = (load_run(p)[0].eval() for p in (runs / "dense", tmp_path / "up"))
    with torch.no_grad():
        assert (dense(ids())[0] - up(ids())[0]).abs().max() < 1e-5
    assert Tokenizer.load(tmp_path / "up") == Tokenizer.load(runs / "dense")
    up.train()(ids(), ids(seed=1))[1].backward()
    assert all(m.router.weight.grad.abs().sum() > 0 for m in moe.layers(up))
    refused = run("upcycle", "--init", runs / "dense", "--n_expert", 4, "--out", runs / "dense", check=2)
    assert "take the place" in refused


def test_inspect_counts_what_goes_where_and_draws_it(runs, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    text = run("inspect", runs / "experts", "--text", tmp_path / "text.txt", "--picture", tmp_path / "x.svg")
    assert text.count("layer") >= 2 and "the" in text
    svg = (tmp_path / "x.svg").read_text()
    assert svg.startswith("<svg") and svg.count("<rect") >= 2 * 4
    shares = [float(w[:-1]) for line in text.splitlines() for w in line.split() if w.endswith("%")]
    assert sum(shares) == pytest.approx(200, abs=5)  # of each of the two layers


@pytest.mark.parametrize("settings, word", [
    (dict(n_expert_active=5), "--n_expert_active"), (dict(n_expert_active=0), "--n_expert_active"),
    (dict(router="best"), "--router"), (dict(router="switch"), "--n_expert_active 1"),
    (dict(router="gshard", n_expert_active=1), "--n_expert_active 2"), (dict(moe_every=3), "--moe_every"),
    (dict(share=2), "--share"), (dict(capacity=-1.0), "--capacity"), (dict(shared_gate=True), "--shared_gate")])
def test_a_config_that_cannot_work_is_refused_by_its_flag(settings, word):
    with pytest.raises(BadInput) as error:
        config(**settings)
    assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("layout, ep, word", [(dict(world=2), 3, "--ep 3"), (dict(world=3), 2, "--ep 2"),
                                              (dict(world=2, mode="fsdp"), 2, "--ep"), (dict(world=2, tp=2), 1, "--tp"),
                                              (dict(world=2, pp=2), 1, "--pp")])
def test_a_layout_that_cannot_work_is_refused_by_its_flag(layout, ep, word):
    with pytest.raises(BadInput) as error:
        moe.check_layout(config(), M.Process(torch.device("cpu"), **layout), ep)
    assert word in str(error.value)


@pytest.mark.parametrize("args, word", [
    (["upcycle", "--init", "DENSE", "--n_expert", 4, "--n_expert_active", 1], "--n_expert_active"),
    (["upcycle", "--init", "EXPERTS", "--n_expert", 4], "already"),
    (["upcycle", "--init", "missing", "--n_expert", 4], "missing"),
    (["upcycle", "--init", "DENSE", "--n_expert", 4, "--router", "expert_choice"], "--router"),
    (["inspect", "DENSE", "--text", "x"], "no experts"),
    (["inspect", "EXPERTS", "--text", "nowhere.txt"], "nowhere.txt"),
])
def test_bad_input_is_answered_in_a_sentence(runs, tmp_path, args, word):
    places = {"DENSE": runs / "dense", "EXPERTS": runs / "experts", "missing": tmp_path / "missing"}
    args = [places.get(a, a) for a in args] + (["--out", tmp_path / "out"] if args[0] == "upcycle" else [])
    message = run(*args, check=2)
    assert word in message and message.count("\n") == 1


# -----------------------------------------------------------------------------
# Processes: expert parallelism and FSDP give the losses and weights of one process


LAYOUTS = [("softmax", "--ep 2"), ("sigmoid", "--ep 2"), ("softmax", "--parallel fsdp"), ("sigmoid", "")]
FLAGS = "--batch_tokens 512 --micro_batch 4 --grad_clip 0.5"


def steps(process, router, flags):
    """Six steps of training: losses, norms, the whole state at the end, and the same after a save and a load."""
    import numpy as np

    import data
    import train as T
    args = T.get_args([*FLAGS.split(), *flags.split()])
    model = build(router=router, block_size=32, vocab_size=100)
    rows, micro, accumulate = T.split_batch(args, 32, process)
    trainer = T.Trainer(model, args, process, torch.float32, accumulate, False)
    tokens = (np.cumsum(np.random.default_rng(0).integers(0, 7, 5000)) % 100).astype(np.uint16)
    loader, seen = data.TokenLoader([(1.0, tokens)], 32, 0), []
    for step in range(6):
        for i in range(accumulate):
            batch = torch.from_numpy(loader.batch(step * 16 + (i * process.dp_world + process.dp_rank) * micro, micro))
            trainer.micro_step(batch[:, :-1], batch[:, 1:], last=i == accumulate - 1)
        trainer.clip()
        stats = M.all_reduce(torch.stack((trainer.loss, trainer.norm))) / process.world
        seen.append(stats.tolist())
        trainer.apply()
        trainer.loss.zero_()
    stats = moe.take_stats(model)
    held = len([n for n, _ in model.named_parameters() if moe.is_expert(n)])
    state = trainer.state_dict()
    state = state.get("model", {}) | state["buffers"]
    return seen, stats, held, {name: t.double().sum().item() for name, t in state.items()}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    out = {}
    for world in (1, 2):
        path = tmp_path_factory.mktemp("world") / f"{world}.json"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        done = subprocess.run([*launch, __file__, str(path)], env=env, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr[-3000:]
        out[world] = json.loads(path.read_text())
    return out


@pytest.mark.parametrize("i", range(len(LAYOUTS)), ids=[" ".join(x) for x in LAYOUTS])
def test_two_processes_equal_one(launched, i):
    (one, stats, held, sums), (two, stats2, held2, sums2) = launched[1][i], launched[2][i]
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=2e-5)
    assert sums.keys() == sums2.keys()
    for name in sums:
        assert sums[name] == pytest.approx(sums2[name], abs=2e-3), name
    assert all(stats[name] == pytest.approx(stats2[name], abs=2e-3) for name in stats)
    assert held2 == (held // 2 if "--ep" in LAYOUTS[i][1] else held)


def main(path):
    seen = []
    for router, flags in LAYOUTS:
        import train as T
        world = int(os.environ["WORLD_SIZE"])
        flags = flags if world > 1 else ""
        process = M.setup_process("cpu", T.get_args(flags.split()))
        seen.append(steps(process, router, flags))
    if process.rank == 0:
        Path(path).write_text(json.dumps(seen))
    process.close()


if __name__ == "__main__":
    main(sys.argv[1])
