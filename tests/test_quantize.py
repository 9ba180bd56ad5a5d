"""The quantize room as a specification: grids, methods, the packed file, and what a quantized run does elsewhere."""
import copy
import csv
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import evaluate as evaluate_room
import lora
import model as model_room
import quantize as Q
import sample as sample_room
import train as train_room
from bpe import BadInput, Tokenizer
from conftest import ROOT, call
from model import GPT, GPTConfig, init_weights, load_run, load_safetensors, save_run, save_safetensors

TEXT = "the cat sat on the mat, and 993-7=986. Rain fell on the roof of the old house by the river. " * 60


pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0, std=0.02):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def correlated(K, n=2048, seed=1):
    """Inputs (n, K) whose entries depend on each other, and differ in size, as activations do."""
    mix = torch.linalg.qr(normal(K, K, seed=seed, std=1))[0] * torch.logspace(0, -2, K)[:, None]
    return normal(n, K, seed=seed + 1, std=1) @ mix * torch.linspace(0.3, 2, K)


def statistics_of(x):
    return {"hessian": 2 * x.T @ x / len(x), "mean_abs": x.abs().mean(0), "max_abs": x.abs().amax(0)}


def output_error(W, q, x):
    return ((x @ (Q.dequantize(q) - W).T).norm() / (x @ W.T).norm()).item()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# codes and grids


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", [64, 30])
def test_packed_codes_come_back(bits, width):
    codes = torch.randint(0, 2 ** bits, (5, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = Q.pack(codes, bits)
    assert packed.shape == (5, math.ceil(width * bits / 8)) and torch.equal(Q.unpack(packed, bits, width), codes)


def test_the_first_code_lies_in_the_highest_bits():
    assert Q.pack(torch.tensor([[0xA, 0x3]]), 4).tolist() == [[0xA3]]
    assert Q.pack(torch.tensor([[0b101, 0b011, 0b110, 0, 0, 0, 0, 0b001]]), 3).tolist() == \
        [[0b10101111, 0b00000000, 0b00000001]]


def test_absmax_is_the_formula():
    x = torch.tensor([[1.0, -2.54, 0.5, 0.02]])
    q = Q.quantize(x, "absmax", 8, 0)
    assert q.parts["codes"].tolist() == [[50, -127, 25, 1]] == torch.round(127 / 2.54 * x).int().tolist()
    torch.testing.assert_close(Q.dequantize(q), torch.tensor([[50, -127, 25, 1]]) * 2.54 / 127)


def test_zeropoint_is_the_formula():
    """scale = 255 / (max - min), zero point = -round(scale · min) - 128, clamp(round(scale · x + zero point))."""
    x = normal(16, 256)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale = 255 / (high - low)
    zero = -torch.round(scale * low) - 128
    codes = torch.clamp(torch.round(scale * x + zero), -128, 127)
    q = Q.quantize(x, "zeropoint", 8, 0)
    assert torch.equal(q.parts["codes"].float(), codes)
    torch.testing.assert_close(Q.dequantize(q), (codes - zero) / scale, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 0.5, -0.25, 1e-30])
@pytest.mark.parametrize("method", ["absmax", "zeropoint", "hqq", "nf4", "symmetric"])
def test_equal_weights_do_not_divide_by_zero(method, value):
    w = torch.full((2, 64), value)
    got = Q.dequantize(Q.quantize(w, method, 4, 64))
    assert torch.isfinite(got).all()
    if method == "zeropoint":
        torch.testing.assert_close(got, w)


@pytest.mark.parametrize("method", ["absmax", "symmetric", "zeropoint"])
@pytest.mark.parametrize("bits, group", [(2, 32), (3, 128), (4, 64), (5, 0), (6, 32), (7, -1), (8, 0)])
def test_no_weight_moves_further_than_half_a_step(method, bits, group):
    w = normal(48, 256)
    q = Q.quantize(w, method, bits, group)
    step = q.parts["scale"].float().expand(48, -1) if group < 0 else q.parts["scale"].float()
    off = (Q.dequantize(q) - w).view(*step.shape, -1).abs().amax(-1) / step
    assert off.max() <= 0.5 + (2 ** (bits - 9) if group > 0 else 1e-3)  # a bfloat16 scale moves the outermost levels


def test_a_group_far_from_zero_keeps_its_digits():
    w = 1 + 1e-4 * normal(4, 64, std=1)
    for method in ("zeropoint", "hqq"):
        torch.testing.assert_close(Q.dequantize(Q.quantize(w, method, 4, 64)), w, rtol=4e-3, atol=0)


def test_more_bits_and_smaller_groups_err_less():
    w = normal(64, 256)
    for method in Q.GRIDS:
        errors = [relative(Q.dequantize(Q.quantize(w, method, bits, 128)), w) for bits in range(2, 9)]
        assert errors == sorted(errors, reverse=True)
        errors = [relative(Q.dequantize(Q.quantize(w, method, 4, group)), w) for group in (-1, 0, 128, 64, 32)]
        assert errors == sorted(errors, reverse=True)


def test_hqq_gives_its_package_s_numbers():
    """From hqq 0.2.8.post1, 3 bits, groups of 64 along rows."""
    scale, zero = Q.hqq(normal(4, 64), 3)
    torch.testing.assert_close(scale.flatten(), torch.tensor([0.015787777, 0.014801586, 0.011002865, 0.010468441]))
    torch.testing.assert_close(zero.flatten(), torch.tensor([2.679451227, 3.499155045, 3.516193390, 3.168549538]))
    codes = Q.encode(normal(4, 64)[:1], scale[0], zero[0], 3)
    assert "".join(str(int(c)) for c in codes[0]) == "1122442031333442113431254223454223233333342336112443223224571152"


def test_hqq_errs_less_than_round_to_nearest():
    w = normal(64, 256)
    nearest, better = (Q.dequantize(Q.quantize(w, m, 4, 64)) - w for m in ("zeropoint", "hqq"))
    assert better.abs().mean() < nearest.abs().mean() and better.norm() < nearest.norm()


# uneven levels


def test_nf4_has_the_published_levels():
    """Dettmers et al. 2023, appendix E."""
    published = torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
    torch.testing.assert_close(Q.LEVELS["nf4"], published, rtol=0, atol=2e-7)


def test_nf4_packs_one_block_as_bitsandbytes_does():
    """From bitsandbytes 0.50.2, block size 64."""
    q = Q.quantize(normal(4, 64)[:1], "nf4", 4, 64, double=False)
    assert q.parts["codes"].numpy().tobytes().hex() == \
        "4466a96183887bb6329a936da568cca4575897997a679e325ab866966acf33d5"
    assert q.parts["scale"].item() == pytest.approx(0.068210050, rel=1e-7)


def test_double_quantization_costs_an_eighth_of_a_bit_and_hardly_an_error():
    w = normal(512, 256)
    once, twice = Q.quantize(w, "nf4", 4, 64, double=False), Q.quantize(w, "nf4", 4, 64)
    assert once.nbytes() * 8 / w.numel() == 4.5
    assert twice.nbytes() * 8 / w.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
    assert relative(Q.dequantize(twice), w) < 1.01 * relative(Q.dequantize(once), w)


def test_nf4_suits_a_normal_variable_better_than_even_levels_do():
    w = normal(256, 256)
    error = {m: relative(Q.dequantize(Q.quantize(w, m, 4, 64)), w) for m in ("nf4", "fp4", "absmax", "symmetric")}
    assert error["nf4"] < min(error["fp4"], error["absmax"], error["symmetric"])


def test_fp8_keeps_three_bits_of_mantissa_and_ends_at_448():
    q = Q.quantize(torch.tensor([[448.0, -3.3, 0.0171, 2.0 ** -9, 1e-5]]), "fp8", 8, 0)
    assert Q.dequantize(q).tolist() == [[448.0, -3.25, 0.017578125, 2.0 ** -9, 0.0]]


# methods that see inputs


def test_gptq_with_a_diagonal_hessian_is_round_to_nearest():
    w = normal(32, 128)
    for group in (32, 0):
        a, b = Q.quantize(w, "gptq", 4, group, hessian=torch.diag(torch.rand(128) + 0.1)), \
            Q.quantize(w, "zeropoint", 4, group)
        assert torch.equal(a.parts["codes"], b.parts["codes"]) and torch.equal(a.parts["scale"], b.parts["scale"])


@pytest.mark.parametrize("group", [16, 48, 96, 0])
def test_blocked_gptq_is_unblocked_gptq(group):
    w, h = normal(16, 192), statistics_of(correlated(192))["hessian"]
    codes = [Q.unpack(Q.quantize(w, "gptq", 4, group, hessian=h, block=block).parts["codes"], 4, 192)
             for block in (32, 192)]
    assert torch.equal(*codes)


@pytest.mark.parametrize("bits, most", [(4, 0.7), (3, 0.7)])
def test_gptq_cuts_the_output_error_of_correlated_inputs_by_a_third(bits, most):
    w, x = normal(128, 256), correlated(256)
    h = statistics_of(x)["hessian"]
    nearest = output_error(w, Q.quantize(w, "zeropoint", bits, 128), x)
    assert output_error(w, Q.quantize(w, "gptq", bits, 128, hessian=h), x) < most * nearest
    assert output_error(w, Q.quantize(w, "gptq", bits, 128, hessian=h, act_order=True), x) < most * nearest


def test_gptq_lives_with_inputs_that_are_always_zero():
    w, x = normal(16, 64), correlated(64)
    x[:, 5] = 0
    q = Q.quantize(w, "gptq", 4, 32, hessian=statistics_of(x)["hessian"])
    assert torch.isfinite(Q.dequantize(q)).all() and output_error(w, q, x) < 0.1


def test_awq_protects_weights_that_meet_large_inputs():
    w, x = normal(128, 256), normal(1024, 256, seed=3, std=1)
    x[:, ::37] *= 20
    s = statistics_of(x)
    nearest = output_error(w, Q.quantize(w, "zeropoint", 4, 128), x)
    q = Q.quantize(w, "awq", 4, 128, hessian=s["hessian"], mean_abs=s["mean_abs"])
    assert output_error(w, q, x) < 0.6 * nearest


def test_scaling_before_rounding_changes_nothing_itself():
    w, x = normal(32, 64), correlated(64, 256)
    s = statistics_of(x)
    for q in (Q.quantize(w, "awq", 8, 32, hessian=s["hessian"], mean_abs=s["mean_abs"]),
              Q.quantize(w, "smoothquant", 8, 0, max_abs=s["max_abs"])):
        exact = q.parts["in_scale"] * (w / q.parts["in_scale"])
        torch.testing.assert_close(exact, w, rtol=1e-6, atol=0)
        assert output_error(w, q, x) < 0.01


def test_decomposition_cuts_the_error_of_an_outlier_column_to_a_fifth():
    w, x = normal(256, 1024), normal(64, 1024, seed=4, std=1)
    x[:, 7] *= 60  # as large as the outliers of a 6.7B model
    exact, q = x @ w.T, Q.quantize(w, "llm_int8", 8, 0)
    without, within = (relative(Q.int8_product(x, q.parts, t), exact) for t in (math.inf, Q.OUTLIER))
    assert within < without / 5
    smooth = Q.QuantLinear(Q.quantize(w, "smoothquant", 8, 0, max_abs=x.abs().amax(0)))
    assert relative(smooth(x), exact) < without / 2


def test_low_rank_compensation_lowers_the_error_down_to_none():
    w = normal(48, 64)
    q = Q.quantize(w, "zeropoint", 3, 32)
    errors = [relative(Q.dequantize(Q.compensate(w, q, rank)), w) for rank in (1, 8, 24, 48)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 < errors[0] < relative(Q.dequantize(q), w)


# a Linear of codes


KINDS = [("absmax", 8, 0), ("symmetric", 8, 0), ("zeropoint", 8, 32), ("zeropoint", 4, 32), ("zeropoint", 4, 128),
         ("hqq", 3, 64), ("absmax", 2, 0), ("hqq", 5, 32), ("absmax", 4, -1), ("nf4", 4, 64), ("fp4", 4, 64)]


@pytest.mark.parametrize("method, bits, group", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_kernel_gives_the_dequantized_product(method, bits, group, rows):
    q = Q.compensate(normal(96, 256), Q.quantize(normal(96, 256), method, bits, group), 2)
    linear, x = Q.QuantLinear(q, normal(96, seed=5)), normal(2, rows, 256, seed=6, std=1)
    expected = F.linear(x, Q.dequantize(q), linear.bias)
    assert relative(linear(x), expected) < 6e-3  # kernels round x and scales to bfloat16
    assert linear(x.bfloat16()).dtype == torch.bfloat16
    assert bool(linear.kernel) == (bits <= 4 and method in Q.GRIDS and group >= 0 or (bits, group) == (8, 0))


@pytest.mark.parametrize("method, bits, group", [*KINDS, ("fp8", 8, 0), ("llm_int8", 8, 0)])
def test_the_gradient_goes_through_to_the_input_alone(method, bits, group):
    linear, x = Q.QuantLinear(Q.quantize(normal(32, 128), method, bits, group)), normal(4, 128, seed=7, std=1)
    x.requires_grad_()
    y = linear(x)
    saved = y.grad_fn.saved_tensors if hasattr(y.grad_fn, "saved_tensors") else ()
    assert not saved  # no float copy of the matrix waits for the backward pass
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 32) @ Q.dequantize(linear.q))
    assert not any(p.requires_grad for p in linear.parameters())


def test_eight_bit_activations_come_close_to_the_float_product():
    w, x = normal(96, 256), normal(5, 256, seed=8, std=1)
    for method, most in (("llm_int8", 0.012), ("fp8", 0.04)):
        assert relative(Q.QuantLinear(Q.quantize(w, method, 8, 0))(x), x @ w.T) < most
    assert relative(Q.QuantLinear(Q.quantize(w, "fp8", 8, -1))(x), x @ w.T) < 0.04


def test_casting_a_model_leaves_the_codes_alone():
    linear = Q.QuantLinear(Q.quantize(normal(32, 128), "fp8", 8, 0))
    before = linear.weight
    assert torch.equal(linear.to(torch.bfloat16).weight, before) and linear.codes.dtype == torch.float8_e4m3fn


# a model


def small(seed=0, **config):
    model = GPT(GPTConfig(**{**dict(vocab_size=280, block_size=32, n_embd=64, n_layer=2), **config}))
    init_weights(model, seed)
    for p in model.parameters():
        p.data = normal(*p.shape, seed=seed + p.numel(), std=0.08)
    return model.eval()


def ids(rows=4, T=32, seed=0):
    return torch.randint(0, 280, (rows, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method, bits, group", [("zeropoint", 4, 32), ("gptq", 3, 32), ("awq", 4, 0), ("nf4", 4, 64),
                                                 ("smoothquant", 8, 0), ("llm_int8", 8, 0), ("fp8", 8, -1)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_run_loads_to_the_same_logits(tmp_path, method, bits, group, tied):
    model = small(tied=tied, bias=True, act="swiglu", n_kv_head=2)
    exact = model(ids())[0]
    Q.quantize_model(model, method, bits, group, [ids(seed=1)], embeddings=8 if tied else 0, rank=2 if bits == 3 else 0)
    logits = model(ids())[0]
    save_run(tmp_path, model, {"quantize": Q.describe(model)})
    again, _ = load_run(tmp_path)
    assert torch.equal(again(ids())[0], logits) and again.device.type == "cpu"
    assert relative(logits, exact) < 0.3
    parts = [n for n in load_safetensors(tmp_path / "model.safetensors") if n.endswith("codes")]
    assert len(parts) == 2 * 7 + tied


def test_decoding_with_a_cache_agrees_with_the_whole_text():
    model = small()
    Q.quantize_model(model, "zeropoint", 4, 32, embeddings=8)
    tokens, logprobs = model.generate([ids()[0, :5].tolist()], 12, temperature=0)
    row = torch.tensor([ids()[0, :5].tolist() + tokens[0]])
    whole = model(row)[0].log_softmax(-1)[0, 4:-1]
    got = whole.gather(1, torch.tensor(tokens[0])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs[0]), got, rtol=0, atol=0.1)


@pytest.mark.parametrize("later, kind", [
    ("blocks.3.mlp.down", {"pos": "learned"}), ("blocks.1.mlp.down", {"share": 2}),
    ("blocks.3.attn.o", {"n_expert": 4}),
    ("blocks.3.mlp.down", {"resid_mix": True, "window": 8, "attn": "full,window"})])
def test_each_layer_is_calibrated_on_what_the_quantized_layers_before_it_give(later, kind):
    model = small(n_layer=4, **kind)
    order = Q.stages(model, ids())
    assert order[:2] == [["blocks.0.attn.q", "blocks.0.attn.k", "blocks.0.attn.v"], ["blocks.0.attn.o"]]
    assert kind.get("n_expert") or order[2:4] == [["blocks.0.mlp.up"], ["blocks.0.mlp.down"]]
    every = [name for names in order for name in names]
    assert set(every) == set(Q.linears(model)) and sorted(every, key=Q.block_of) == every
    quantized = copy.deepcopy(model)
    Q.quantize_model(quantized, "gptq", 2, 32, [ids(seed=2)])
    before = Q.observe(model, [later], [ids(seed=2)])[later]["hessian"]
    half = copy.deepcopy(quantized)  # all but the last as they were when it was calibrated
    half.set_submodule(later, model.get_submodule(later))
    seen = Q.observe(half, [later], [ids(seed=2)])[later]["hessian"]
    assert relative(seen, before) > 0.05
    expected = Q.quantize(model.get_submodule(later).weight, "gptq", 2, 32, hessian=seen)
    assert torch.equal(quantized.get_submodule(later).codes, expected.parts["codes"])


def test_the_experts_of_a_layer_are_observed_in_one_pass_that_ends_with_the_layer():
    model, batches = small(n_layer=3, n_expert=8), [ids(1, 2, seed=s) for s in range(3)]  # 4 experts a batch at most
    ups = [f"blocks.1.mlp.experts.{e}.up" for e in range(8)]
    assert ups in [[names[0] for names in together] for together in Q.passes([[name] for name in Q.linears(model)])]
    calls = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, x: calls.append(block), prepend=True)
    seen = Q.observe(model, ups, batches)
    assert calls.count(model.blocks[1]) <= 3 and not calls.count(model.blocks[2])
    cold = [name for name in ups if torch.equal(seen[name]["hessian"], torch.eye(64))]
    for name in set(ups) - set(cold):
        alone = Q.observe(model, [name], batches)[name]
        assert all(torch.equal(alone[part], seen[name][part]) for part in alone)
    assert sum(seen[name]["outliers"].isfinite().item() for name in ups) == 8


@pytest.mark.parametrize("method, tokens", [("gptq", 1), ("awq", 1), ("gptq", 4), ("awq", 4)])
def test_weights_whose_inputs_happened_to_be_zero_are_rounded_not_lost(method, tokens):
    w, x, new = normal(64, 256, std=0.02), normal(tokens, 256, seed=1).relu().square(), normal(2000, 256, seed=2)
    new = new.relu().square()
    seen = statistics_of(x)
    known = {name: seen[name] for name in Q.NEEDS[method]}
    rounded = output_error(w, Q.quantize(w, "zeropoint", 4, 128), new)
    assert output_error(w, Q.quantize(w, method, 4, 128, **known), new) < 1.4 * rounded


def test_an_expert_that_nobody_asks_gives_nothing():
    q = Q.QuantLinear(Q.quantize(normal(8, 64), "zeropoint", 4, 32))
    assert q(torch.zeros(0, 64)).shape == (0, 8) and q(torch.zeros(0, 64, requires_grad=True)).shape == (0, 8)


def test_methods_of_one_size_ignore_what_the_table_says_of_others():
    args = lambda *flags: Q.get_args([*map(str, flags)])
    assert Q.parse_row("llm_int8", args("--table", "--group", 32, "--bits", 3)) == ("llm_int8", 8, 0)
    assert Q.parse_row("nf4", args("--group", 32, "--bits", 3)) == ("nf4", 4, 32)
    assert Q.parse_row("gptq", args("--group", 32, "--bits", 3)) == ("gptq", 3, 32)
    assert Q.parse_row("llm_int8", args("--method", "llm_int8", "--bits", 3)) == ("llm_int8", 3, 0)  # then refused


def test_what_a_layer_reads_is_counted_once_a_token():
    model = small()
    seen = Q.observe(model, ["blocks.0.attn.q"], [ids(), ids(seed=3)])["blocks.0.attn.q"]
    x = model.blocks[0].norm1(model.embed(torch.cat((ids(), ids(seed=3))), torch.arange(32))).flatten(0, 1)
    for name, value in statistics_of(x).items():
        torch.testing.assert_close(seen[name], value, rtol=1e-4, atol=1e-4)
    assert seen["outliers"] == (x.abs() >= 6).float().mean()


def test_an_embedding_of_codes_looks_up_its_rows():
    model = small(tied=True)
    Q.quantize_model(model, "zeropoint", 4, 32, embeddings=8)
    torch.testing.assert_close(model.wte(ids()), model.wte.weight[ids()])
    x = normal(2, 64, std=1)
    assert relative(model.logits(x), (x @ model.wte.weight.T)[:, :280]) < 6e-3


def test_gpt2_124m_fits_into_95_megabytes():
    config = GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, tied=True, bias=True,
                       pos="learned", norm="layernorm", act="gelu_tanh", qk_norm=False, embd_norm=False)
    with torch.device("meta"):
        model = GPT(config)
    matrices = {name: m.weight.shape for name, m in Q.linears(model).items()}
    size = 2 * sum(p.numel() for name, p in model.named_parameters()
                   if name.removesuffix(".weight") not in matrices and name != "wte.weight")
    for shape, kind in [(s, ("zeropoint", 4, 32)) for s in matrices.values()] + \
                       [(model.wte.weight.shape, ("symmetric", 8, 0))]:
        parts = Q.layout(*kind, shape)
        for name in ("codes", "scale") + ("zero",) * (kind[0] == "zeropoint"):
            size += math.prod(parts[name][0]) * parts[name][1].itemsize
    assert 90e6 < size < 95e6


@pytest.mark.parametrize("method, bits, group", [*KINDS, ("fp8", 8, -1), ("llm_int8", 8, 0), ("gptq", 3, 32),
                                                 ("gptq", 4, -1)])
def test_the_layout_is_that_of_the_parts(method, bits, group):
    known = {"hessian": torch.eye(128)} if method == "gptq" else {}
    q = Q.quantize(normal(32, 128), method, bits, group, **known)
    places = Q.layout(method, bits, group, (32, 128))
    assert {n: (tuple(t.shape), t.dtype) for n, t in q.parts.items()} == {n: places[n] for n in q.parts}


# training with the rounding in place


def test_straight_through_the_gradient_is_that_of_the_rounded_weight():
    w = normal(16, 64).requires_grad_()
    rounded = Q.fake_quantize(w, 4, 32)
    torch.testing.assert_close(rounded, Q.dequantize(Q.quantize(w, "zeropoint", 4, 32)))
    (rounded ** 2).sum().backward()
    torch.testing.assert_close(w.grad, 2 * rounded.detach())


@pytest.mark.parametrize("flag", ["4", "qat1", "qat9", "int4", "qat4:48"])
def test_training_refuses_a_rounding_that_it_does_not_know(flag):
    with pytest.raises(BadInput, match="--quantize"):
        Q.use_qat(small(), flag)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text and a run that was trained a little on it, as train.py leaves it."""
    out = tmp_path_factory.mktemp("quantize")
    (out / "text.txt").write_text(TEXT)
    tokenizer = Tokenizer.train([TEXT], 280)
    model = small(vocab_size=tokenizer.n_vocab)
    row = torch.tensor(tokenizer.encode(TEXT))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for i in range(60):
        at = torch.randint(0, len(row) - 33, (8,), generator=torch.Generator().manual_seed(i))
        batch = torch.stack([row[j:j + 33] for j in at.tolist()])
        model(batch[:, :-1], batch[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    save_run(out / "run", model, {"tokenizer": tokenizer.spec(), "step": 60, "args": {}})
    tokenizer.save(out / "run")
    return out


def run(folder, *args, check=0):
    files = ["--text", folder / "text.txt", "--calibration", folder / "text.txt", "--device", "cpu"]
    return call(Q, "--init", folder / "run", *files, "--eval_tokens", 512, "--calibration_tokens", 512, *args,
                check=check)


def test_a_quantized_run_is_sampled_and_evaluated_like_any_other(folder):
    out, _ = run(folder, "--method", "gptq", "--bits", 4, "--group", 32, "--out", folder / "int4", "--embeddings", 8)
    metrics = json.loads(out.splitlines()[-1])
    assert metrics["perplexity"] == pytest.approx(metrics["perplexity_float"], rel=0.2) and metrics["perplexity"] < 20
    described = json.loads((folder / "int4" / "run.json").read_text())
    assert described["quantize"]["blocks.0.attn.q"] == \
        {"method": "gptq", "bits": 4, "group": 32, "parts": ["codes", "scale", "zero"]}
    out, _ = call(sample_room, "--init", folder / "int4", "--prompt", "the cat", "--max_new_tokens", 8)
    assert out.startswith("the cat")
    alone = ["--init", folder / "int4", "--prompt", "the cat", "--max_new_tokens", "8"]
    # where nothing has imported quantize.py yet
    done = subprocess.run([sys.executable, ROOT / "sample.py", *alone], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == out, done.stderr
    text = f"text={folder / 'text.txt'}"
    out, _ = call(evaluate_room, "--init", folder / "int4", "--task", text, "--eval_tokens", 512, "--device", "cpu",
                  "--dtype", "float32")
    assert json.loads(out.splitlines()[-1])["text/perplexity"] == pytest.approx(metrics["perplexity"], rel=2e-2)
    _, err = call(Q, "--init", folder / "int4", "--method", "nf4", check=2)
    assert "quantized already" in err
    _, err = run(folder, "--method", "zeropoint", "--group", 32, "--out", folder / "run", check=2)
    assert "take the place" in err
    run(folder, "--method", "zeropoint", "--group", 32, "--out", folder / "int4")
    assert (folder / "int4.old" / "run.json").exists()


def test_a_quantized_runs_size_is_the_float_models(folder, tmp_path):
    run(folder, "--method", "symmetric", "--bits", 8, "--group", 0, "--out", tmp_path / "int8")
    told = [call(model_room, "info", name)[0].splitlines()[-1] for name in (folder / "run", tmp_path / "int8")]
    assert told[0] == told[1]
    assert "blocks.0.attn.q.codes" in call(model_room, "params", tmp_path / "int8")[0]


def test_the_table_has_a_line_and_a_point_for_every_row(folder):
    out, _ = run(folder, "--table", "--rows", "float32", "zeropoint:4:32", "--plot", folder / "table")
    rows = list(csv.DictReader(open(folder / "table.csv")))
    assert [r["row"] for r in rows] == ["float32", "zeropoint:4:32"]
    assert float(rows[1]["megabytes"]) < 0.4 * float(rows[0]["megabytes"])
    assert float(rows[1]["perplexity"]) > float(rows[0]["perplexity"]) and float(rows[0]["tokens_per_s"]) > 0
    svg = (folder / "table.svg").read_text()
    assert svg.count("<circle") == 2 and ">zeropoint:4:32</text>" in svg
    assert json.loads(out.splitlines()[-1])["table"][0]["method"] == "float32"


def test_a_run_trained_with_rounding_is_that_run_when_rounded(tmp_path):
    common = ["--data", "arithmetic", "--tokenizer", "char", "--block_size", 32, "--n_layer", 1, "--n_embd", 32,
              "--batch_tokens", 256, "--warmup", 2, "--eval_every", 0, "--save_every", 0, "--eval_tokens", 2048,
              "--device", "cpu", "--dtype", "float32", "--steps", 6, "--out", tmp_path / "qat"]
    call(train_room, *common, "--quantize", "qat3:32")
    trained = json.loads((tmp_path / "qat" / "run.json").read_text())
    assert trained["args"]["quantize"] == "qat3:32"
    args = ["--init", tmp_path / "qat", "--device", "cpu", "--eval_tokens", 2048]
    out, _ = call(Q, *args, "--method", "zeropoint", "--bits", 3, "--group", 32, "--out", tmp_path / "int3")
    metrics = json.loads(out.splitlines()[-1])
    assert metrics["val_loss"] == pytest.approx(trained["metrics"]["val_loss"], abs=2e-4)
    assert abs(math.log(metrics["perplexity_float"]) - metrics["val_loss"]) > 2e-4


def test_a_number_is_shown_in_every_format():
    out, _ = call(Q, "--show", 3.14159, -0.1)
    assert "0    10000000 10010010000111111010000" in out  # fp32 3.14159 is 0x40490fd0
    assert "0    10000    1001001000 " in out and "0    1000     101 " in out
    for name, bits in (("fp32", 0x40490fd0), ("fp16", 0x4248), ("bf16", 0x4049)):
        assert int("".join(Q.float_bits(3.14159, name)[:3]), 2) == bits
    assert Q.float_bits(1e6, "fp8 e4m3")[3] == 448 and Q.float_bits(2.0 ** -9, "fp8 e4m3")[:3] == ("0", "0000", "001")


@pytest.mark.parametrize("args, words", [
    (["--method", "gptq", "--bits", 1], "--bits 1"), (["--method", "nothing"], "nothing"),
    (["--method", "gptq", "--group", 48], "--group 48"), (["--method", "nf4", "--bits", 3], "nf4"),
    (["--method", "llm_int8", "--bits", 4], "llm_int8"), (["--method", "zeropoint", "--embeddings", 1], "--embeddings"),
    (["--table", "--rows", "gptq:four"], "--rows"), (["--method", "zeropoint", "--stride", 100], "--stride 100"),
    (["--bench", "gpt2", "--steps", 0], "--steps"), (["--method", "gptq", "--init", "nowhere"], "nowhere"),
    (["--show", "nan"], "--show"), (["--method", "awq", "--calibration", "missing.txt"], "missing.txt")])
def test_bad_input_is_one_sentence_and_status_two(folder, tmp_path, args, words):
    _, err = run(folder, "--out", tmp_path / "no", *args, check=2)
    assert err.splitlines()[-1].startswith("quantize.py: error: ") and words in err and not (tmp_path / "no").exists()


def test_a_short_calibration_text_is_refused(folder, tmp_path):
    (tmp_path / "short.txt").write_text("the cat")
    _, err = run(folder, "--method", "gptq", "--calibration", tmp_path / "short.txt", "--out", tmp_path / "no", check=2)
    assert "--calibration" in err


def test_weights_that_are_not_finite_are_refused():
    w = normal(8, 64)
    w[3, 5] = math.nan
    for method in ("zeropoint", "nf4", "fp8"):
        with pytest.raises(BadInput, match="NaN"):
            Q.quantize(w, method, 8 if method == "fp8" else 4, 0)


def test_a_file_of_another_model_is_refused(folder, tmp_path):
    run(folder, "--method", "zeropoint", "--group", 32, "--out", tmp_path / "int4")
    other = small(n_embd=96)
    Q.quantize_model(other, "zeropoint", 4, 32)
    save_safetensors(other.state_dict(), tmp_path / "int4" / "model.safetensors")
    with pytest.raises(BadInput, match="config"):
        load_run(tmp_path / "int4")
    save_safetensors(small().state_dict(), tmp_path / "int4" / "model.safetensors")
    with pytest.raises(BadInput, match="no tensor blocks.0.attn.k.codes"):
        load_run(tmp_path / "int4")


def test_the_default_run_reads_texts(tmp_path):
    tokenizers = [("base", {"kind": "bpe", "ranks": "a"}), ("rl", {"kind": "char", "ranks": "no one's"})]
    for i, (name, tokenizer) in enumerate(tokenizers):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"tokenizer": tokenizer, "args": {}}))
        os.utime(tmp_path / name / "run.json", (i, i))
    assert Q.newest_float(tmp_path) == str(tmp_path / "base")
    (tmp_path / "base" / "run.json").write_text(json.dumps({"tokenizer": tokenizer, "args": {}}))
    with pytest.raises(BadInput, match="no run under"):
        Q.newest_float(tmp_path)


def test_an_adapter_is_in_what_is_quantized(folder):
    model, tokenizer = GPT.from_pretrained(folder / "run"), Tokenizer.load(folder / "run")
    lora.apply(model, lora.Adapter("lora", lora_rank=4))
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(normal(*p.shape, std=0.3))
    lora.save(folder / "adapter", model, {"tokenizer": tokenizer.spec()}, folder / "run")
    tokenizer.save(folder / "adapter")
    files = ["--text", folder / "text.txt", "--calibration", folder / "text.txt", "--device", "cpu"]
    call(Q, "--init", folder / "adapter", *files, "--eval_tokens", 128, "--method", "symmetric", "--bits", 8, "--group",
         0, "--out", folder / "adapter8")
    idx = torch.tensor([tokenizer.encode(TEXT)[:20]])
    with torch.no_grad():
        exact, got = model.eval()(idx)[0], GPT.from_pretrained(folder / "adapter8").eval()(idx)[0]
    assert (got - exact).norm() < 0.05 * exact.norm()


def test_experts_that_no_calibration_token_meets_are_quantized_too():
    model = small(n_expert=16, n_expert_active=1, router="switch")
    batches = [torch.randint(0, 100, (1, 4), generator=torch.Generator().manual_seed(0))]
    Q.quantize_model(model, "gptq", 4, 32, batches)
    assert not Q.linears(model)
