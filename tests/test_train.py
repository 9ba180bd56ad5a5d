"""The train room as a specification: optimizers, schedules, batches, and runs of the script itself."""
import gzip
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import train as T
from bpe import BadInput, Tokenizer
from conftest import ROOT, package
from data import fineweb, hh, tinystories
from model import (GPT, GPTConfig, Process, init_weights, linear_cross_entropy, load_run, load_safetensors,
                   start_run)
from quantize import dynamic_code

CPU = Process(torch.device("cpu"), 0, 1)
SMALL = ["--data", "arithmetic", "--tokenizer", "char", "--block_size", "32", "--n_layer", "2", "--n_head", "2",
         "--n_embd", "32", "--batch_tokens", "256", "--warmup", "2", "--eval_every", "0", "--save_every", "0",
         "--eval_tokens", "512", "--device", "cpu", "--log_every", "1"]


def run(*args, world=1, check=0, **kwargs):
    """train.py in a process of its own (or two, through torchrun); returns what it printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)] \
        if world > 1 else [sys.executable]
    done = subprocess.run([*launch, str(ROOT / "train.py"), *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, **kwargs)
    assert done.returncode == check, done.stdout + done.stderr
    assert "Traceback" not in done.stderr or world > 1, done.stderr
    return done.stdout + done.stderr


pytestmark = pytest.mark.usefixtures("one_thread")


def here(monkeypatch, *args):
    """train.py in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    T.main()


def small_trainer(*args, dtype=torch.float32, **config):
    """A trainer of a tiny model, and a function that takes a step on random tokens."""
    model = GPT(GPTConfig(n_embd=64, n_layer=1, vocab_size=100, init="gpt2", **config))
    init_weights(model)
    model.compute_dtype = dtype
    trainer = T.Trainer(model, T.get_args([*map(str, args)]), CPU, dtype, 1, False)

    def step(seed):
        x = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(seed))
        trainer.micro_step(x[:, :-1], x[:, 1:])
        trainer.update()
        trainer.loss.zero_()
    return trainer, step


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out):
    return torch.load(out / "optim.pt", weights_only=True)["model"]


# --- optimizers and schedules


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (2, 64, 16), (1, 16, 24)])
def test_orthogonalized_updates_have_singular_values_near_one(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    s = torch.linalg.svdvals(T.orthogonalize(G))
    big = torch.linalg.svdvals(G) > 0.01 * G.norm(dim=(-2, -1)).unsqueeze(1)  # what the quintics promise to reach
    assert big.float().mean() > 0.9 and (s[big] - 1).abs().max() < 0.03 and s.max() < 1.03
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    wide_enough = big.all(-1)
    assert torch.allclose(T.orthogonalize(G)[wide_enough], (U @ V)[wide_enough], atol=0.05)


def test_orthogonalizing_a_nearly_rank_one_gradient_in_bf16_stays_bounded():
    g = torch.Generator().manual_seed(0)
    for i in range(20):
        G = torch.randn(1, 64, 1, generator=g) @ torch.randn(1, 1, 64, generator=g) * (1 + i / 20)
        X = (G / (G.norm() + 1e-7)).bfloat16()
        for a, b, c in T.POLAR:
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
        assert torch.linalg.matrix_norm(X.float(), 2).item() < 1.1


def test_the_polynomial_of_the_gram_matrix_equals_the_steps_on_the_matrix():
    X = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(0))
    X = Y = X / X.norm(dim=(-2, -1), keepdim=True)
    for a, b, c in T.POLAR:
        A = Y @ Y.mT
        Y = a * Y + (b * A + c * A @ A) @ Y
    assert torch.allclose(Y, T.polar_factor(X @ X.mT) @ X, atol=1e-4)


def test_muon_is_momentum_then_orthogonalization():
    p = torch.nn.Parameter(torch.zeros(8, 4))
    optimizer = T.Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5)
    grads = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    expected, m = torch.ones(8, 4), torch.zeros(8, 4)
    with torch.no_grad():
        p.fill_(1)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        m = 0.9 * m + g
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 2 ** 0.5 * T.orthogonalize((g + 0.9 * m)[None])[0]
    assert torch.allclose(p, expected, atol=1e-6)


@pytest.mark.parametrize("optimizer", T.OPTIMIZERS)
@pytest.mark.parametrize("style", [dict(), dict(norm="layernorm", bias=True, pos="learned", tied=True, init="gpt2")])
def test_every_parameter_is_in_exactly_one_group(optimizer, style):
    model = GPT(GPTConfig(n_embd=32, **style))
    args = T.get_args(["--optimizer", optimizer])
    groups = [g for o in T.make_optimizers(model, args, CPU.device) for g in o.param_groups]
    held = [id(p) for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in model.parameters()}
    for g in groups:  # vectors are never decayed
        assert g["weight_decay"] == 0 or all(p.dim() >= 2 for p in g["params"])


def test_experts_and_routers_may_have_rates_of_their_own():
    model = GPT(GPTConfig(n_embd=32, n_expert=4))
    args = T.get_args(["--lr", "0.02", "--expert_lr", "0.5", "--router_lr", "0.25"])
    _, muon = T.make_optimizers(model, args, CPU.device)
    rates = {id(p): g["peak_lr"] for g in muon.param_groups for p in g["params"]}
    for name, p in model.blocks.named_parameters():
        if p.dim() == 2:
            assert rates[id(p)] == (0.01 if ".experts." in name else 0.005 if ".router." in name else 0.02)


def test_adamw_equals_torchs_on_the_whole_model():
    ours, theirs = (GPT(GPTConfig(n_embd=32, init="gpt2")) for _ in range(2))
    init_weights(ours), init_weights(theirs)
    args = T.get_args(["--optimizer", "adamw", "--lr", "0.01", "--weight_decay", "0.1", "--grad_clip", "0"])
    trainer = T.Trainer(ours, args, CPU, torch.float32, 1, False)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    x = torch.randint(0, 1024, (2, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        trainer.micro_step(x[:, :-1], x[:, 1:])
        trainer.update()
        theirs(x[:, :-1], x[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(p, q, atol=1e-6)


def steps_of(optimizer, p, grads):
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def random_gradients(*shape, n=5):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g) * 10 ** torch.randn(shape[:1] + (1,) * (len(shape) - 1), generator=g)
            for _ in range(n)]


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_is_momentum(nesterov):
    p = torch.nn.Parameter(torch.ones(4))
    args = T.get_args(["--momentum", "0.9", "--nesterov" if nesterov else "--no-nesterov"])
    grads, w, m = random_gradients(4), torch.ones(4), torch.zeros(4)
    ours = steps_of(T.OPTIMIZERS["sgd"]([{"params": [p]}], args, 0.1, False), p, grads)
    for g in grads:
        m = 0.9 * m + g
        w = w - 0.1 * (g + 0.9 * m if nesterov else m)
    assert torch.allclose(ours, w, rtol=1e-5)


@pytest.mark.parametrize("shape", [(48, 80), (7,)])
def test_adafactor_equals_transformers(shape):
    theirs_class = package("transformers.optimization").Adafactor
    p, q = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    ours = steps_of(T.Adafactor([p], lr=0.01, weight_decay=0.1), p, random_gradients(*shape))
    theirs = theirs_class([q], lr=0.01, weight_decay=0.1, relative_step=False, scale_parameter=False,
                          warmup_init=False, clip_threshold=1.0, decay_rate=-0.8)
    assert torch.allclose(ours, steps_of(theirs, q, random_gradients(*shape)), atol=1e-6)


def test_adafactor_keeps_two_vectors_for_a_matrix():
    p = torch.nn.Parameter(torch.ones(48, 80))
    optimizer = T.Adafactor([p])
    steps_of(optimizer, p, random_gradients(48, 80, n=1))
    assert sum(t.numel() for t in optimizer.state[p].values()) == 48 + 80 + 1


def test_the_dynamic_code_has_256_numbers_over_seven_decades():
    signed, plain = dynamic_code(True), dynamic_code(False)
    assert len(signed.unique()) == len(plain.unique()) == 256
    assert signed[0] > -1 and signed[-1] == plain[-1] == 1 and plain[0] == 0
    x = torch.logspace(-4, 0, 1000)
    for code, error in ((signed, 0.3), (plain, 0.2)):  # relative, four decades deep, and near the top
        nearest = (code - x[:, None]).abs().amin(1) / x
        assert nearest.max() < error and nearest[x > 0.5].max() < 0.02


def test_adam_in_8_bits_stays_near_adamw_and_takes_a_quarter_of_the_memory():
    g = torch.Generator().manual_seed(0)
    start, target = torch.randn(64, 100, generator=g), torch.randn(64, 100, generator=g)
    moved = []
    for make in (torch.optim.AdamW, T.AdamW8bit):  # a noisy bowl
        p, noise = torch.nn.Parameter(start.clone()), torch.Generator().manual_seed(1)
        optimizer = make([p], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
        for _ in range(100):
            p.grad = p.detach() - target + torch.randn(p.shape, generator=noise)
            optimizer.step()
        moved.append(p.detach() - start)
    assert (moved[1] - moved[0]).norm() < 0.05 * moved[0].norm()
    size = sum(t.numel() * t.element_size() for t in optimizer.state[p].values())
    assert size < 1.02 * 2 * p.numel() + 16


def test_adam_in_8_bits_is_adamw_on_small_tensors():
    grads = random_gradients(40, 40)
    p, q = (torch.nn.Parameter(torch.ones(40, 40)) for _ in range(2))
    ours = steps_of(T.AdamW8bit([p], lr=0.01, weight_decay=0.1), p, grads)
    theirs = steps_of(torch.optim.AdamW([q], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1), q, grads)
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("name", T.OPTIMIZERS)
def test_every_optimizer_learns_and_goes_on_bit_for_bit_from_its_saved_state(name, tmp_path):
    (a, step_a), (b, step_b) = (small_trainer("--optimizer", name, "--lr", 0.01, "--ema", 0.9) for _ in range(2))
    first = a.model(torch.arange(20)[None], torch.arange(20)[None])[1].item()
    for i in range(6):
        if i == 3:
            torch.save(a.state_dict(), tmp_path / "state.pt")
            b.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        step_a(i)
    for i in range(3, 6):
        step_b(i)
    for p, q in zip([*a.model.parameters(), *a.ema.values()], [*b.model.parameters(), *b.ema.values()]):
        assert torch.equal(p, q)
    for _ in range(20):  # one batch, again and again
        step_b(7)
    x = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(7))
    assert b.model(x[:, :-1], x[:, 1:])[1].item() < first


def test_a_resumed_optimizer_takes_the_rates_that_are_given_again():
    (a, step), (b, _) = (small_trainer("--optimizer", "adamw", "--lr", lr) for lr in (0.01, 0.5))
    step(0)
    b.load_state_dict(a.state_dict())
    assert {g["peak_lr"] for o in b.optimizers for g in o.param_groups} == {0.5}


@pytest.mark.parametrize("name", T.SCHEDULES)
def test_schedules_warm_up_from_above_zero_and_never_exceed_the_peak(name):
    shares = [T.lr_share(s, 100, 10, name) for s in range(100)]
    assert 0 < shares[0] < shares[5] < 1 and shares[10] == 1 == max(shares)
    assert all(a >= b > 0 for a, b in zip(shares[10:], shares[11:]))
    if name in ("linear", "wsd"):
        assert shares[-1] < 0.03
    if name == "wsd":
        assert shares[60] == 1


@pytest.mark.parametrize("name, shares", [  # at a quarter, half and three quarters of what follows the warm-up
    ("constant", (1, 1, 1)), ("linear", (0.75, 0.5, 0.25)), ("wsd", (1, 1, 0.625)),
    ("cosine", tuple(0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2 for t in (0.25, 0.5, 0.75)))])
def test_schedules_have_their_closed_forms(name, shares):
    assert [T.lr_share(s, 110, 10, name) for s in (35, 60, 85)] == pytest.approx(shares)


def test_min_lr_is_where_a_schedule_ends():
    assert T.lr_share(10 ** 6 - 1, 10 ** 6, 0, "cosine") == pytest.approx(0.1, abs=1e-5)
    for name in ("linear", "cosine", "wsd"):
        assert T.lr_share(10 ** 6 - 1, 10 ** 6, 0, name, 0.3) == pytest.approx(0.3, abs=1e-5)
        assert T.lr_share(10 ** 6 - 1, 10 ** 6, 0, name, 0.0) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("spec, tokens", [(None, 4096), ("512:100", 4096), ("512:7", 4096), ("4096:9", 4096)])
def test_the_rows_before_a_step_of_a_growing_batch_are_their_sum(spec, tokens):
    args = T.get_args(["--batch_tokens", str(tokens), *(["--batch_ramp", spec] if spec else [])])
    start, levels, length = T.parse_ramp(args)
    sizes = [start * T.batch_level(s, levels, length) for s in range(150)]
    assert sizes == sorted(sizes) and sizes[0] == start and sizes[-1] == tokens
    assert [start * T.levels_before(s, levels, length) for s in range(150)] == [sum(sizes[:s]) for s in range(150)]


@pytest.mark.parametrize("spec", ["512", "x:y", "500:10", "512:3", "0:5"])
def test_a_ramp_that_does_not_fit_is_refused(spec):
    with pytest.raises(BadInput, match="--batch_ramp"):
        T.parse_ramp(T.get_args(["--batch_tokens", "4096", "--batch_ramp", spec]))


def test_the_average_of_the_weights_is_their_exponential_mean_and_comes_and_goes():
    trainer, step = small_trainer("--ema", 0.9)
    name, p = next(iter(trainer.model.named_parameters()))
    expected = p.detach().clone()
    for i in range(4):
        step(i)
        expected = 0.9 * expected + 0.1 * p.detach()
    now = p.detach().clone()
    with trainer.averaged():
        assert torch.allclose(p, expected, atol=1e-6) and not torch.equal(p, now)
    assert torch.equal(p, now)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_the_z_loss_and_its_gradient_equal_autograd_of_the_formula(reduction, softcap):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(10, 16, generator=g), torch.randn(64, 16, generator=g)
    targets = torch.randint(0, 50, (10,), generator=g)
    targets[3] = -100
    results = []
    for ours in (True, False):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        if ours:
            loss = linear_cross_entropy(a, b, targets, 50, reduction, softcap, chunk=4, z_loss=0.1)
        else:
            logits = a @ b[:50].T
            logits = softcap * (logits / softcap).tanh() if softcap else logits
            loss = F.cross_entropy(logits, targets, reduction="none") + 0.1 * logits.logsumexp(-1) ** 2 * (targets >= 0)
            loss = loss if reduction == "none" else loss.sum() / (9 if reduction == "mean" else 1)
        (loss * torch.arange(10)).sum().backward() if reduction == "none" else (2 * loss).backward()
        results.append((loss, a.grad, b.grad))
    assert all(torch.allclose(p, q, atol=1e-4, rtol=1e-4) for p, q in zip(*results))


def test_the_z_loss_is_of_training_only():
    model = GPT(GPTConfig(n_embd=32))
    init_weights(model)
    x = torch.arange(20)[None]
    plain = model(x, x)[1].item()
    model.z_loss = 0.1
    assert model(x, x)[1].item() == pytest.approx(plain + 0.1 * math.log(1024) ** 2)
    assert model.eval()(x, x)[1].item() == pytest.approx(plain)


@pytest.mark.parametrize("tied", [True, False])
def test_shrinking_the_embedding_gradient_leaves_the_loss_and_the_head_alone(tied):
    grads = []
    for alpha in (1.0, 0.1):
        model = GPT(GPTConfig(n_embd=32, tied=tied, init="gpt2"))
        init_weights(model)
        T.shrink_embedding_gradient(model, alpha)
        loss = model(torch.arange(20)[None], torch.arange(1, 21)[None])[1]
        loss.backward()
        grads.append((loss.detach(), model.head_weight.grad[30:], model.wte.weight.grad[:20],
                      model.blocks[0].attn.q.weight.grad))
    (loss, head, wte, q), (loss1, head1, wte1, q1) = grads
    assert torch.equal(loss, loss1) and torch.equal(head, head1) and torch.equal(q, q1)
    assert tied or torch.allclose(wte * 0.1, wte1)


def test_init_scale_multiplies_deviations_and_not_constants():
    a, b = (GPT(GPTConfig(n_embd=32, init="gpt2", norm="rmsnorm")) for _ in range(2))
    init_weights(a), init_weights(b, scale=3.0)
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert torch.allclose(p if "norm" in name else 3 * p, q)


def test_fp16_recovers_from_an_overflow():
    trainer, step = small_trainer("--ema", 0.9, "--optimizer", "adamw", dtype=torch.float16)
    assert trainer.scaler.is_enabled()
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 40)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    step(0)
    assert not math.isfinite(trainer.norm.item()) and trainer.scaler.get_scale() == 2.0 ** 39
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters()))
    for i in range(40):
        step(i)
    assert math.isfinite(trainer.norm.item()) and 1 < trainer.scaler.get_scale() < 2.0 ** 32
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert not all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters()))


def test_a_dropped_step_changes_nothing_and_tells_the_scaler():
    for dtype in (torch.float32, torch.float16):
        trainer, _ = small_trainer(dtype=dtype)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        for _ in range(2):
            trainer.micro_step(torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.long))
            trainer.clip()
            trainer.drop()
        assert all(torch.equal(p, q) and p.grad is None for p, q in zip(trainer.model.parameters(), before))


@pytest.mark.parametrize("loss, norm, words", [
    (2.0, 1.0, ""), (9.0, 1.0, "a loss"), (2.0, 9.0, "a norm"), (math.nan, 1.0, "not finite"),
    (2.0, math.inf, "not finite"), (0.0, 0.0, "")])  # a fall is none
def test_a_spike_is_far_above_the_window_or_not_finite(loss, norm, words):
    history = [[2 + 0.1 * (-1) ** i, 1 + 0.1 * (-1) ** i] for i in range(20)]
    found = T.find_spike(history, loss, norm, 6.0, 0.0, 20)
    assert (words in found) if words else found == ""
    if words.startswith("a"):
        assert T.find_spike(history, loss, norm, 6.0, 0.0, 21) == ""  # the window is not full
        assert T.find_spike(history, loss, norm, 0.0, 0.0, 20) == ""
        assert T.find_spike([], 2.0, norm + 5, 6.0, 5.5, 20) == "a norm above 5.5"


def test_prefix_targets_are_those_that_no_earlier_token_sees():
    rows = torch.arange(1000)
    prefix = T.prefix_lengths(3, rows, 32)
    assert prefix.min() == 0 and prefix.max() == 31 and abs(prefix.float().mean() - 15.5) < 1
    assert torch.equal(prefix[500:], T.prefix_lengths(3, rows[500:], 32))  # of the row alone
    x = torch.arange(1, 9)[None]
    masked = T.mask_prefix(x, torch.tensor([3]))  # tokens 0 1 2 see each other: 1 and 2 are no questions
    assert masked.tolist() == [[-100, -100, 3, 4, 5, 6, 7, 8]]
    for p in (0, 1):
        assert torch.equal(T.mask_prefix(x, torch.tensor([p])), x)


def test_every_model_flag_reaches_the_config():
    flags = ["--place", "sandwich", "--attn", "full,window", "--window", "16", "--pos", "alibi", "--act", "geglu",
             "--alibi_scale", "0.5", "--share", "2", "--embd_dim", "64", "--softcap", "15", "--resid_mix",
             "--no-qk_norm", "--resid_scale", "0.5", "--prefix_lm", "--norm_eps", "1e-6", "--mlp_bias", "--head_dim",
             "16", "--tied"]
    config = T.make_config(T.get_args(flags), 500)
    assert asdict(config) == asdict(GPTConfig(
        vocab_size=500, place="sandwich", attn="full,window", window=16, pos="alibi", act="geglu", alibi_scale=0.5,
        share=2, embd_dim=64, softcap=15.0, resid_mix=True, qk_norm=False, resid_scale=0.5, prefix_lm=True,
        norm_eps=1e-6, mlp_bias=True, head_dim=16, tied=True))
    rope = T.make_config(T.get_args(["--rope_scaling", "yarn", "--rope_factor", "4", "--rope_original", "32",
                                     "--rope_theta", "5e5"]), 500)
    assert (rope.rope_scaling, rope.rope_factor, rope.rope_original, rope.rope_theta) == ("yarn", 4.0, 32, 5e5)
    assert asdict(T.make_config(T.get_args([]), 500)) == asdict(GPTConfig(vocab_size=500))


def test_calibrating_measures_a_product_and_a_copy():
    flops, bandwidth = T.calibrate(torch.device("cpu"), torch.float32)
    assert flops > 1e8 and bandwidth > 1e8


@pytest.mark.slow
def test_a_bench_times_a_layout_and_leaves_nothing(tmp_path):
    common = ["--n_layer", 2, "--n_embd", 32, "--n_head", 2, "--block_size", 32, "--batch_tokens", 512]
    out = run(*common, "--device", "cpu", "--bench", 2, "--pp", 2, "--out", tmp_path / "run", world=2)
    metrics = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    assert metrics["tokens_per_s"] > 0 and "2 process(es)" in out
    assert 0 < metrics["loss"] < math.log(1024) + 1  # the mean over both, also where only the last stage has one
    assert not (tmp_path / "run").exists()


def test_a_bench_refuses_prefixes(monkeypatch):
    with pytest.raises(BadInput, match="--bench draws rows without a prefix"):
        here(monkeypatch, "--bench", 1, "--prefix_lm", "--device", "cpu")


def test_two_micro_batches_equal_one_batch():
    grads = []
    x = torch.randint(0, 1024, (8, 33), generator=torch.Generator().manual_seed(0))
    for parts in (1, 2):
        model = GPT(GPTConfig(n_embd=32, init="gpt2"))
        init_weights(model)
        trainer = T.Trainer(model, T.get_args([]), CPU, torch.float32, parts, False)
        for i, part in enumerate(x.chunk(parts)):
            trainer.micro_step(part[:, :-1], part[:, 1:], last=i == parts - 1)
        grads.append([trainer.loss] + [p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_validation_counts_every_target_once_whatever_the_batch():
    model = GPT(GPTConfig(n_embd=32, vocab_size=100, block_size=16))
    init_weights(model)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    ids = np.random.default_rng(0).integers(0, 100, 203).astype(np.uint16)
    width = torch.randint(1, 5, (100,), generator=torch.Generator().manual_seed(0))
    results = [T.validate(model, {"a": (1.0, ids)}, 16, 0, rows, CPU, width) for rows in (1, 5, 64)]
    nll = 0.0
    for start in range(0, 202, 16):
        part = torch.from_numpy(ids[start:start + 17].astype(np.int64))
        nll += model(part[None, :-1], part[None, 1:], reduction="sum")[1].item()
    for metrics in results:
        assert metrics["val_loss"] == pytest.approx(nll / 202, abs=1e-5)
        assert metrics["val_bpb"] == pytest.approx(nll / np.log(2) / width[ids[1:].astype(int)].sum().item(), abs=1e-5)


# --- data order


def test_every_window_of_an_epoch_is_read_once_and_batches_are_a_function_of_the_row():
    ids = np.arange(1000, dtype=np.uint16)
    loader = data.TokenLoader([(1.0, ids)], 10, seed=1)
    windows = 1000 // 10 - 2 if (1000 - 1) // 10 * 10 == 999 else (1000 - 1) // 10 - 1
    epoch = loader.batch(0, windows)
    starts = np.sort(epoch[:, 0])
    assert (np.diff(starts) == 10).all() and (np.diff(epoch) == 1).all()
    again = data.TokenLoader([(1.0, ids)], 10, seed=1)
    assert (again.batch(37, 5) == epoch[37:42]).all()
    assert (again.batch(0, 3) == epoch[:3]).all()
    assert not (loader.batch(windows, windows) == epoch).all()  # the next epoch is another
    assert not (data.TokenLoader([(1.0, ids)], 10, seed=2).batch(0, windows) == epoch).all()


def test_a_mixture_draws_each_source_by_its_weight():
    sources = [(0.75, np.zeros(5000, np.uint16)), (0.25, np.ones(5000, np.uint16))]
    share = data.TokenLoader(sources, 8, 0).batch(0, 4096)[:, 0].mean()
    assert share == 0.25


def test_token_files_round_trip_and_forged_ones_are_refused(tmp_path):
    for n_vocab, dtype in ((1000, np.uint16), (100000, np.uint32)):
        path = tmp_path / f"{n_vocab}.bin"
        assert data.write_tokens(path, [[1, 2, 3], np.array([n_vocab - 1])], n_vocab) == 4
        assert data.open_tokens(path).dtype == dtype and list(data.open_tokens(path)) == [1, 2, 3, n_vocab - 1]
    whole = path.read_bytes()
    for bad in (whole[:-1], whole[:-4], whole[:500], b"", b"x" * 2000, whole + b"0000"):
        path.write_bytes(bad)
        with pytest.raises(BadInput, match="bin"):
            data.open_tokens(path)


def test_files_of_tokens_in_a_row_read_as_one(tmp_path):
    parts = np.split(np.arange(1000, dtype=np.uint16), [300, 301, 301, 700])
    for i, part in enumerate(parts):
        data.write_tokens(tmp_path / f"{i}.bin", [part], 1000)
    (tmp_path / "train.json").write_text(json.dumps([f"{i}.bin" for i in range(len(parts))]))
    ids = data.open_tokens(tmp_path / "train.bin")
    assert len(ids) == 1000
    for a in (0, 1, 299, 300, 301, 650, 999, 1000):
        for b in (0, a, a + 1, 300, 301, 302, 700, 1000, 1005, None):
            assert (ids[a:b] == np.arange(1000)[a:b]).all() and ids[a:b].dtype == np.uint16
    whole = data.TokenLoader([(1.0, np.arange(1000, dtype=np.uint16))], 10, seed=1).batch(0, 200)
    assert (data.TokenLoader([(1.0, ids)], 10, seed=1).batch(0, 200) == whole).all()


@pytest.mark.parametrize("depth", [0, 1, 2, 100])
def test_a_thread_ahead_keeps_the_order_and_ends_with_its_consumer(depth):
    threads = threading.active_count()
    assert list(data.prefetch(iter(range(50)), depth)) == list(range(50))
    endless = data.prefetch(iter(int, 1), depth)
    assert next(endless) == 0
    endless.close()
    abandoned = data.prefetch(iter(int, 1), depth)
    next(abandoned)
    del abandoned
    assert threading.active_count() == threads


def test_an_error_in_the_thread_reaches_the_consumer_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise BadInput("no more")
    stream = data.prefetch(items())
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(BadInput, match="no more"):
        next(stream)


@pytest.fixture
def hub_server(tmp_path, monkeypatch):
    """A hub with two data sets; one download breaks off in the middle."""
    rng, files, calls = np.random.default_rng(0), {}, []
    for name in ("val_000000", "train_000001", "train_000002"):
        data.write_tokens(tmp_path / "shard.bin", [rng.integers(0, 60, 50000)], 2 ** 16)
        files[f"fineweb_{name}.bin"] = (tmp_path / "shard.bin").read_bytes()
    stories = [f"Once there were {i} cats.\n" for i in range(3000)]
    for name in tinystories.FILES.values():
        files[name] = "<|endoftext|>\n".join(stories).encode()
    for name in ("train", "test"):
        pairs = [{part: f"\n\nHuman: {name} {i}\n\nAssistant: {part}" for part in ("chosen", "rejected")}
                 for i in range(9)]
        files[f"harmless-base/{name}.jsonl.gz"] = gzip.compress("\n".join(map(json.dumps, pairs)).encode())

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            calls.append(self.path)
            if self.path.startswith("/api/datasets/"):
                listed = [{"path": name, "size": len(content), "lfs": {"oid": hashlib.sha256(content).hexdigest()}}
                          for name, content in files.items() if "/" not in name or "recursive=true" in self.path]
                body, start = json.dumps([*listed, {"path": "README.md", "size": 3}]).encode(), 0
            else:
                body, asked = files[self.path.split("/resolve/main/")[1]], self.headers.get("Range")
                start = int(asked[6:-1]) if asked else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            breaks = "train_000001" in self.path and not start
            time.sleep(0.2 * ("/resolve/" in self.path))
            self.wfile.write(body[start:start + 70000 if breaks else None])

        def log_message(self, *args):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(fineweb, "FOLDER", tmp_path / "fineweb")
    monkeypatch.setattr(tinystories, "FOLDER", tmp_path / "tinystories")
    monkeypatch.setattr(hh, "FOLDER", tmp_path / "hh")
    yield files, calls
    server.shutdown()
    server.server_close()


def name_tokenizer(module, letters, folder, monkeypatch):
    """A corpus that comes tokenized, in these letters instead of GPT-2's tokens."""
    tokenizer = Tokenizer.train([letters], len(letters), kind="char")
    tokenizer.save(folder)
    (folder / "meta.json").write_text(json.dumps({"tokenizer": tokenizer.spec()}))
    monkeypatch.setattr(module, "TOKENIZER", str(folder))


def test_fineweb_shards_arrive_whole_in_their_order_and_train(hub_server, tmp_path, monkeypatch):
    files, calls = hub_server
    name_tokenizer(fineweb, "".join(chr(33 + i) for i in range(80)), tmp_path / "tokenizer", monkeypatch)
    folders, tokenizer = data.prepare("fineweb", input="2", root=tmp_path / "data")
    (weight, folder), = folders.values()
    ids = data.open_tokens(folder / "train.bin")
    expected = np.concatenate([np.frombuffer(files[f"fineweb_train_00000{i}.bin"][1024:], np.uint16) for i in (1, 2)])
    assert (ids[0:len(ids)] == expected).all() and len(data.open_tokens(folder / "val.bin")) == 50000
    assert sum("train_000001" in path for path in calls) == 2  # it broke off and went on
    n = len(calls)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert data.prepare("fineweb", input="2", root=tmp_path / "data")[0] == folders  # as it is
    one = data.prepare("fineweb", root=tmp_path / "data")[0]["fineweb"][1]
    assert len(data.open_tokens(one / "train.bin")) == 50000
    local = data.prepare("fineweb", input=str(fineweb.FOLDER), root=tmp_path / "data")[0]["fineweb"][1]
    assert len(data.open_tokens(local / "train.bin")) == 100000 and len(calls) == n
    monkeypatch.setattr(data, "prepare", lambda *a, **k: (folders, tokenizer))
    here(monkeypatch, *SMALL, "--data", "fineweb", "--steps", 2, "--out", tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 2


def test_fineweb_refuses_what_it_cannot_have(hub_server, tmp_path, monkeypatch):
    for input, words in (("9", "fewer"), ("0", "at least 1"), (str(tmp_path), "holds no fineweb_train")):
        with pytest.raises(BadInput, match=words):
            fineweb.shards(input)
    name_tokenizer(fineweb, "abc", tmp_path / "tokenizer", monkeypatch)
    with pytest.raises(BadInput, match="id 59"):
        data.prepare("fineweb", root=tmp_path / "data")
    with pytest.raises(BadInput, match="comes tokenized"):
        data.prepare("fineweb", "char", root=tmp_path / "data")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE"):
        fineweb.shards("2")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match="could not be had"):
        fineweb.shards("2")


def test_preferences_of_the_hub_arrive_from_a_folder_and_once_for_all_ranks(hub_server, tmp_path):
    with ThreadPoolExecutor(4) as ranks:
        found = list(ranks.map(lambda rank: list(hh.preferences("train")), range(4)))
    assert all(rows == found[0] and len(rows) == 9 for rows in found)
    assert sum("/resolve/" in path for path in hub_server[1]) == 1
    assert "test 0" in str(next(iter(hh.preferences("val")))) and not list(tmp_path.rglob("*.part"))


def test_tinystories_are_one_document_each(hub_server):
    documents = list(tinystories.documents("train"))
    assert documents == [(f"Once there were {i} cats.", True) for i in range(3000)]


# --- the script


@pytest.fixture
def garbage(monkeypatch):
    """Call it with a row: the 8 rows from there on are random letters."""
    rows, clean = [], data.TokenLoader.window

    def window(self, g):
        ids = clean(self, g)
        return np.random.default_rng(g).permutation(ids) % 9 if any(r <= g < r + 8 for r in rows) else ids
    monkeypatch.setattr(data.TokenLoader, "window", window)
    return rows.append


SPIKY = [*SMALL, "--steps", 22, "--schedule", "constant", "--spike_window", 8, "--save_every", 5, "--log_every", 10]


def log_lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_skipped_spike_is_a_step_without_an_update(tmp_path, monkeypatch, garbage, capsys):
    garbage(14 * 8)
    here(monkeypatch, *SPIKY, "--spike", "skip", "--out", tmp_path / "a")
    assert "step 15: loss" in (said := capsys.readouterr().out) and said.count("its update is left out") == 1
    lines = log_lines(tmp_path / "a")
    assert [line["step"] for line in lines] == list(range(1, 23))
    assert [line["step"] for line in lines if "spike" in line] == [15]
    apply, steps = T.Trainer.apply, iter(range(1, 100))
    monkeypatch.setattr(T.Trainer, "apply", lambda self: self.drop() if next(steps) == 15 else apply(self))
    here(monkeypatch, *SPIKY, "--out", tmp_path / "b")
    assert all(torch.equal(p, q) for p, q in zip(weights(tmp_path / "a").values(), weights(tmp_path / "b").values()))


def test_a_rewound_spike_is_a_run_that_never_read_those_rows(tmp_path, monkeypatch, garbage, capsys):
    garbage(13 * 8)
    rewind = [*SPIKY, "--spike", "rewind"]
    here(monkeypatch, *rewind, "--out", tmp_path / "a")
    assert "back to step 10, and on with row 112" in capsys.readouterr().out
    lines = log_lines(tmp_path / "a")
    assert [line["step"] for line in lines] == [*range(1, 15), *range(11, 23)]
    assert [line["rewound_to"] for line in lines if "spike" in line] == [10]
    assert json.loads((tmp_path / "a" / "run.json").read_text())["rows"] == (22 + 4) * 8

    class Crash(Exception):
        pass

    def crash(self):  # between two saves after the spike
        if self.count == 18:
            raise Crash
        self.count += 1
        clip(self)
    with monkeypatch.context() as m:
        clip = T.Trainer.clip
        m.setattr(T.Trainer, "count", 0, raising=False)
        m.setattr(T.Trainer, "clip", crash)
        with pytest.raises(Crash):
            here(m, *rewind, "--out", tmp_path / "b")
    here(monkeypatch, "--resume", "--out", tmp_path / "b")
    assert all(torch.equal(p, q) for p, q in zip(weights(tmp_path / "a").values(), weights(tmp_path / "b").values()))
    assert [line["loss"] for line in log_lines(tmp_path / "b")] == [line["loss"] for line in lines]

    with monkeypatch.context() as m:  # a loader that leaves them out
        batch = data.TokenLoader.batch
        m.setattr(data.TokenLoader, "batch", lambda self, g, n: batch(self, g + 4 * 8 * (g >= 80), n))
        here(m, *SPIKY, "--out", tmp_path / "c")
    assert all(torch.equal(p, q) for p, q in zip(weights(tmp_path / "a").values(), weights(tmp_path / "c").values()))


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_spikes_without_end_end_the_run_with_a_sentence(policy, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="ten loss spikes in a row"):
        here(monkeypatch, *SPIKY, "--spike", policy, "--spike_norm", 1e-9, "--out", tmp_path / "run")


@pytest.mark.slow
def test_a_batch_that_grows_is_the_same_run_on_two_processes(tmp_path, monkeypatch):
    common = [*SMALL, "--steps", 10, "--batch_tokens", 512, "--batch_ramp", "128:6", "--micro_batch", 1,
              "--spike", "skip", "--spike_norm", 0.57, "--ema", 0.8, "--prefix_lm", "--save_every", 4]
    here(monkeypatch, *common, "--out", tmp_path / "one")
    run(*common, "--out", tmp_path / "two", "--micro_batch", 2, "--keep", "all", world=2)
    one, two = (log_lines(tmp_path / name) for name in ("one", "two"))
    assert [line["batch_tokens"] for line in one] == [128] * 2 + [256] * 2 + [384] * 2 + [512] * 4
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-3)
        assert a["batch_tokens"] == b["batch_tokens"] and ("spike" in a) == ("spike" in b)
    assert 0 < sum("spike" in line for line in one) < 10
    one, two = (json.loads((tmp_path / n / "run.json").read_text()) for n in ("one", "two"))
    assert one["metrics"]["val_loss"] == pytest.approx(two["metrics"]["val_loss"], abs=1e-4)
    assert one["rows"] == (2 * (4 + 8 + 12) + 4 * 16) == two["rows"]

    # every save is a run of its own, with its place in the data
    saves = sorted(path.name for path in (tmp_path / "two").glob("step-*"))
    assert saves == ["step-000004", "step-000008", "step-000010"]
    model, info = load_run(tmp_path / "two" / "step-000004")
    assert (info["step"], info["rows"]) == (4, 24) and Tokenizer.load(tmp_path / "two" / "step-000004").n_vocab
    # what is saved is the average
    last, state = (load_safetensors(tmp_path / "two" / "model.safetensors"),
                   torch.load(tmp_path / "two" / "optim.pt", weights_only=True))
    assert all(torch.equal(last[name], state["ema"][name]) for name in last)
    assert not all(torch.equal(last[name], state["model"][name]) for name in last)


def test_a_growing_batch_resumes_bit_for_bit(tmp_path, monkeypatch):
    common = [*SMALL, "--batch_tokens", 512, "--batch_ramp", "128:6", "--ema", 0.8, "--prefix_lm",
              "--schedule", "constant", "--optimizer", "adam8bit", "--lr", 0.003]
    here(monkeypatch, *common, "--steps", 9, "--out", tmp_path / "a")
    here(monkeypatch, *common, "--steps", 5, "--out", tmp_path / "b")
    here(monkeypatch, "--resume", "--steps", 9, "--out", tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert all(torch.equal(p, q) for p, q in zip(weights(tmp_path / "a").values(), weights(tmp_path / "b").values()))


def test_a_thread_that_loads_changes_nothing(tmp_path, monkeypatch):
    for depth in (0, 3):
        here(monkeypatch, *SMALL, "--steps", 3, "--prefetch", depth, "--out", tmp_path / str(depth))
    assert losses(tmp_path / "0") == losses(tmp_path / "3")


def test_twenty_steps_equal_ten_a_stop_and_ten_more_bit_for_bit(tmp_path, monkeypatch):
    common = [*SMALL, "--steps", 20, "--dropout", "0.1", "--batch_tokens", 8192]  # slow enough to kill in time
    here(monkeypatch, *common, "--out", tmp_path / "a")
    child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, common), "--out", str(tmp_path / "b"),
                              "--save_every", "10"], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in child.stdout:
        if line.startswith("step 10/"):
            break
    while not (tmp_path / "b" / "run.json").exists():  # written last: the save is complete
        time.sleep(0.001)
    child.kill()
    child.wait()
    saved = torch.load(tmp_path / "b" / "optim.pt", weights_only=True)["step"]
    assert saved == 10
    here(monkeypatch, "--resume", "--out", tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and len(losses(tmp_path / "b")) == 20
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_equal_one(tmp_path, monkeypatch, capsys):
    common = [*SMALL, "--steps", 8, "--micro_batch", 2]
    here(monkeypatch, *common, "--out", tmp_path / "one")
    run(*common, "--out", tmp_path / "two", world=2)
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=1e-5)
    one, two = (json.loads((tmp_path / n / "run.json").read_text())["metrics"] for n in ("one", "two"))
    assert one["val_loss"] == pytest.approx(two["val_loss"], abs=1e-4)
    # and a run of two goes on as one
    with open(tmp_path / "two" / "log.jsonl", "a") as log:
        log.write('{"step": 9, "lo')  # a line that a crash cut short
    here(monkeypatch, "--resume", "--out", tmp_path / "two", "--steps", 10)
    assert len(losses(tmp_path / "two")) == 10
    capsys.readouterr()
    here(monkeypatch, "--resume", "--out", tmp_path / "two", "--steps", 5)  # nothing left to do
    assert "val_loss" in capsys.readouterr().out


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_exits_with_zero(tmp_path, sig):
    child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *SMALL, "--steps", "100000", "--out",
                              str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.startswith("step 3/"):
            child.send_signal(sig)
            break
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0 and "--resume" in out and err == ""
    saved = torch.load(tmp_path / "run" / "optim.pt", weights_only=True)
    assert saved["step"] == len(losses(tmp_path / "run")) >= 3


def test_a_finished_run_is_kept_beside_the_new_one(tmp_path, monkeypatch):
    here(monkeypatch, *SMALL, "--steps", 1, "--out", tmp_path / "run")
    here(monkeypatch, *SMALL, "--steps", 2, "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run.old" / "run.json").read_text())["step"] == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["step"] == 2


@pytest.mark.parametrize("args, words", [
    (["--data", "wikipedia"], ["--data", "wikipedia", "shakespeare"]),
    (["--data", "bios:-1"], ["weight"]),
    (["--batch_tokens", "100"], ["--batch_tokens", "128"]),
    (["--batch_tokens", "256", "--micro_batch", "3"], ["--micro_batch", "[1, 2, 4, 8]"]),
    (["--n_embd", "30", "--n_head", "4"], ["--n_embd"]),
    (["--block_size", "4000000", "--batch_tokens", "4000000"], ["--block_size"]),
    (["--resume", "--out", "nowhere"], ["--resume", "nowhere"]),
    (["--device", "cuda:77"], ["--device"]),
    (["--data", "text", "--input", "missing.txt"], ["missing.txt"]),
    (["--tokenizer", "no-such-name"], ["no-such-name"])])
def test_bad_input_is_one_sentence(args, words, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--steps", "1", "--out", str(tmp_path / "run"), *args])
    with pytest.raises(BadInput) as error:
        T.main()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_bad_input_ends_with_status_two_and_no_traceback(tmp_path):
    out = run(*SMALL, "--data", "wikipedia", "--out", tmp_path / "run", check=2)
    assert out.startswith("train.py: error: --data") and len(out.splitlines()) == 1


def test_an_empty_text_and_a_damaged_checkpoint_are_refused(tmp_path, monkeypatch):
    def refused(words, *args):
        with pytest.raises(BadInput, match=words):
            here(monkeypatch, *args, "--out", tmp_path / "run")
    (tmp_path / "empty.txt").write_text("")
    refused("empty", *SMALL, "--data", "text", "--input", tmp_path / "empty.txt")
    here(monkeypatch, *SMALL, "--steps", 1, "--out", tmp_path / "run")
    whole = (tmp_path / "run" / "optim.pt").read_bytes()
    (tmp_path / "run" / "optim.pt").write_bytes(whole[:len(whole) // 2])
    refused("damaged", "--resume")
    (tmp_path / "run" / "optim.pt").write_bytes(whole)
    refused("differ", "--resume", "--n_layer", 3, "--steps", 3)
    refused("trained by muon", "--resume", "--optimizer", "sgd", "--steps", 3)


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_norm(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=r"at step \d+ \(lr .*gradient norm"):
        here(monkeypatch, *SMALL, "--steps", 50, "--optimizer", "adamw", "--lr", "1e30", "--grad_clip", 0,
             "--out", tmp_path / "run")


def test_a_full_disk_while_saving_is_one_sentence(tmp_path):
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000)); " \
              f"sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'train.py'; import bpe, train; bpe.cli(train.main)"
    data.prepare("arithmetic", "char")  # not part of this test
    done = subprocess.run([sys.executable, "-c", limited, *SMALL, "--steps", "1", "--out", str(tmp_path / "run")],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "could not be written" in done.stderr and "Traceback" not in done.stderr


def test_out_takes_the_place_of_a_run_and_of_nothing_else(tmp_path):
    precious = tmp_path / "precious"
    (precious / "notes").mkdir(parents=True)
    (precious / "notes" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for out in (precious, tmp_path / "file", tmp_path):
        with pytest.raises(BadInput, match="is no run"):
            start_run(out)
    assert (precious / "notes" / "thesis.txt").read_text() == "years"
    for name in ("run.json", "model.safetensors"):
        run = tmp_path / name / "run"
        run.mkdir(parents=True)
        (run / name).write_text("first")
        start_run(run)
        assert not any(run.iterdir()) and (run.with_name("run.old") / name).read_text() == "first"
        (run / "log.jsonl").write_text("{}")  # begun, not saved
        start_run(run)
        assert not any(run.iterdir()) and (run.with_name("run.old") / name).read_text() == "first"
    for needed in (run, run.with_name("run.old")):
        with pytest.raises(BadInput, match="is read"):
            start_run(run, needed)


def test_in_float16_an_overflow_in_one_optimizer_stops_all_of_them():
    trainer, step = small_trainer("--dtype", "float16", "--grad_clip", 0, dtype=torch.float16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in range(3):
        step(i)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    hook = trainer.model.wte.weight.register_hook(lambda g: torch.full_like(g, math.inf))
    step(3)
    hook.remove()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    step(4)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("router", ["noisy", "switch", "gshard"])
def test_routers_that_draw_are_resumed_exactly(router, tmp_path, monkeypatch):
    active = {"switch": 1}.get(router, 2)
    flags = [*SMALL, "--n_expert", 4, "--n_expert_active", active, "--router", router, "--schedule", "constant"]
    here(monkeypatch, *flags, "--steps", 4, "--out", tmp_path / "whole")
    here(monkeypatch, *flags, "--steps", 2, "--out", tmp_path / "half")
    here(monkeypatch, "--resume", "--steps", 4, "--out", tmp_path / "half")
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")


def test_an_average_of_a_sigmoid_routers_model_keeps_its_biases(tmp_path, monkeypatch):
    here(monkeypatch, *SMALL, "--n_expert", 4, "--router", "sigmoid", "--ema", 0.5, "--steps", 3, "--out",
         tmp_path / "run")
    assert load_run(tmp_path / "run")[0].blocks[0].mlp.router.bias.abs().sum() > 0


def test_token_files_that_were_deleted_or_cut_are_made_again(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("the cat sat on the mat. " * 200)
    folders, _ = data.prepare("text", "char", None, str(tmp_path / "t.txt"), root=tmp_path / "data")
    file = folders["text"][1] / "train.bin"
    whole = file.read_bytes()
    for damage in (file.unlink, lambda: file.write_bytes(whole[:1500])):
        damage()
        data.prepare("text", "char", None, str(tmp_path / "t.txt"), root=tmp_path / "data")
        assert file.read_bytes() == whole


def test_an_odd_context_needs_no_context_parallelism(tmp_path, monkeypatch):
    here(monkeypatch, *SMALL, "--block_size", 31, "--batch_tokens", 248, "--steps", 1, "--out", tmp_path / "odd")
    assert load_run(tmp_path / "odd")[0].config.block_size == 31


def test_letters_are_those_of_the_whole_text_and_documents_need_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TOKENIZER_CHARS", 1000)
    (tmp_path / "t.txt").write_text("the cat sat on the mat. " * 500 + "é" + " the dog ran." * 500)
    _, tokenizer = data.prepare("text", "char", None, str(tmp_path / "t.txt"), root=tmp_path / "data")
    assert tokenizer.decode(tokenizer.encode("é")) == "é"
    endless = Tokenizer.train(["the cat sat"], 260, special=())
    with pytest.raises(BadInput, match="ends a document"):
        data.prepare("text", endless, None, str(tmp_path / "t.txt"), root=tmp_path / "data")


def test_documents_begin_with_a_token_of_their_own_where_the_tokenizer_has_one(tmp_path):
    (tmp_path / "t.txt").write_text("the cat sat on the mat. " * 500)
    llama = Tokenizer.train(["the cat sat on the mat."], 260, special=("<s>", "</s>"))
    folders, tokenizer = data.prepare("text", llama, None, str(tmp_path / "t.txt"),
                                      root=tmp_path / "data")
    ids = data.open_tokens(folders["text"][1] / "train.bin")
    assert list(ids[0:2]) == [tokenizer.special["</s>"], tokenizer.special["<s>"]]
    assert tokenizer.begin == [tokenizer.special["<s>"]]
