"""The planner as a specification: bytes and FLOPs of papers, and what autograd and tensors really hold."""
import argparse
import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as P
import train
from bpe import BadInput
from model import (GPT, GPT2, LLAMA, PEAK_FLOPS, PRESETS, GPTConfig, KVCache, adamw_groups, flops_per_token,
                   init_weights)

SMALL = dict(block_size=64, vocab_size=1000, n_layer=3, n_head=4, n_embd=64)
STYLES = {
    "nano": dict(),
    "gpt2": dict(GPT2),
    "llama": dict(LLAMA),
    "gqa": dict(n_kv_head=2, act="geglu"),
    "post": dict(place="post", act="silu"),
    "sandwich": dict(GPT2, place="sandwich", act="bilinear"),
    "deepnorm": dict(place="deepnorm", init="deepnorm", act="reglu"),
    "parallel": dict(place="parallel", act="glu"),
    "parallel2": dict(GPT2, place="parallel2", act="relu"),
    "albert": dict(share=3, embd_dim=32, act="swiglu"),
    "mixed residual": dict(resid_mix=True),
}


def flags(line=""):
    parser = argparse.ArgumentParser()
    P.add_memory_flags(parser)
    return parser.parse_args(line.split())


def config(name, **kwargs):
    return GPTConfig(**{**STYLES[name], **SMALL, **kwargs})


def build(c, dtype=torch.float32):
    model = GPT(c)
    init_weights(model)
    model.compute_dtype = dtype
    return model


def held(tensors):
    """Bytes of the tensors' storages, each counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def gb(shapes, *args, **kwargs):
    return sum(P.state_bytes(shapes, *args, **kwargs)) / 1e9


def rows(line, c=None, parallel="none"):
    return {what: b for what, b, *_ in P.memory_plan(flags(line), c, parallel)}


def largest(line, c=None, parallel="none"):
    return max(P.moment_bytes(P.memory_plan(flags(line), c, parallel)).values())


# --- states, by the papers' figures


@pytest.mark.parametrize("optimizer, precision, each", [
    ("adam", "mixed", 16), ("momentum", "mixed", 12), ("sgd", "mixed", 8), ("adam", "mixed_fp32_grad", 20),
    ("adam", "fp32", 16), ("momentum", "fp32", 12), ("adam", "bf16", 8), ("adam", "ours", 16),
    ("adam8bit", "mixed", 2 + 2 + 4 + 2 * (1 + 4 / 256))])
def test_bytes_a_parameter(optimizer, precision, each):
    assert gb(1e9, optimizer, precision) == pytest.approx(each)


def test_slides_totals_of_7b_and_1_3b():
    assert gb(7e9) == pytest.approx(112) and gb(7e9, "momentum") == pytest.approx(84)
    assert gb(1.3e9) == pytest.approx(20.8) and gb(1.3e9, precision="mixed_fp32_grad") == pytest.approx(26)
    assert largest("--params 1.3e9 --mode infer") == pytest.approx(2.6e9)  # a tenth of the latter


@pytest.mark.parametrize("parallel, expected", [("ddp", 120), ("zero1", 31.4), ("zero2", 16.6),
                                                ("zero3", 1.9)])
def test_zero_on_64_gpus_holds_a_7_5b_model_in_the_papers_bytes(parallel, expected):  # its fig. 1
    assert gb(7.5e9, parallel=parallel, gpus=64) == pytest.approx(expected, abs=0.05)
    assert largest("--params 7.5e9 --gpus 64", parallel=parallel) / 1e9 == pytest.approx(expected, abs=0.05)


def test_zero_stages_1_and_2_send_what_ddp_sends_and_stage_3_half_more():
    sent = {p: P.communication(7.5e9, p) for p in P.SHARDED}
    assert [sent[p][0] / 7.5e9 for p in P.SHARDED] == [0, 2, 2, 2, 3]
    assert sent["ddp"][1] == 2 * sent["ddp"][0] == 30e9 and sent["zero3"][1] == 45e9
    assert P.communication(1, "zero1", weight=2, gradient=4)[1] == 6


def test_bloom_176b_on_48_gpus_takes_58_7_gb_each_however_it_is_shared():
    assert gb(176e9, parallel="zero3", gpus=48) == pytest.approx(58.67, abs=0.01)
    assert largest("--params 176e9 --tp 4 --pp 12") / 1e9 == pytest.approx(58.67, abs=0.01)


def test_tensor_and_pipeline_parallel_divide_the_matrices_of_a_preset():
    c = GPTConfig(**PRESETS["gpt2"])
    whole, split = (P.count(P.stage_shapes(P.meta_model(c), tp)) for tp in (1, 4))
    vectors = sum(p.numel() for n, p in P.meta_model(c).named_parameters() if p.dim() == 1 or "wpe" in n)
    assert split == vectors + (whole - vectors) / 4
    stages = [P.count(P.stage_shapes(P.meta_model(c), 1, 4, s)) for s in range(4)]
    assert sum(stages) == whole + c.padded_vocab * c.n_embd  # the tied embedding stands at both ends


def test_gpt3_full_tuning_is_1_4_tb_in_pure_16_bit_adam_and_lora_350_gb():  # LoRA: 1.2 TB
    assert gb(175e9, "adam", "bf16") == 1400 and 1.4e12 / 2 ** 40 == pytest.approx(1.27, abs=0.01)
    assert largest("--params 175e9 --mode infer") == 350e9
    plan = rows("--mode lora --lora_rank 4 --micro_batch 1", GPTConfig(**PRESETS["gpt3-175b"]))
    assert plan["frozen weights"] + plan["weights"] + plan["gradients"] + plan["optimizer state"] \
        == pytest.approx(350e9, rel=0.01)


def test_rank_4_adapters_of_gpt3s_queries_and_values_are_37_7_mb():
    n = P.count(P.lora_shapes(P.meta_model(GPTConfig(**PRESETS["gpt3-175b"])), 4, "q,v"))
    assert n == 96 * 2 * 2 * 4 * 12288 == 18_874_368 and 2 * n / 1e6 == pytest.approx(37.7, abs=0.05)


def test_an_adapter_parameter_takes_16_bytes():
    plan = rows("--mode lora --lora_rank 8 --lora_targets all", c := config("llama"))
    n = P.count(P.lora_shapes(P.meta_model(c), 8, "all"))
    assert plan["weights"] + plan["gradients"] + plan["optimizer state"] == 16 * n
    assert plan["frozen weights"] == 2 * sum(p.numel() for p in P.meta_model(c).parameters())


def test_nf4_with_double_quantization_takes_4_127_bits():  # QLoRA, Dettmers et al. 2023
    assert 8 * P.NF4 == pytest.approx(4.127, abs=5e-4)


def test_qlora_tunes_llama_65b_on_48_gb():
    line = "--mode qlora --lora_rank 64 --lora_targets all --micro_batch 1 --block_size 512 --recompute block"
    c = GPTConfig(**PRESETS["llama-65b"])
    assert 45e9 < largest(line, c) < 48e9
    assert largest(line.replace("qlora", "lora"), c) > 130e9 and largest("--micro_batch 1", c) > 1000e9


def test_preference_methods_by_the_models_they_hold():
    assert largest("--params 7e9 --mode ppo") == 252e9  # 2 x 16 + 2 x 2 bytes, before activations
    assert largest("--params 7e9 --mode dpo") == largest("--params 7e9 --mode grpo") == 126e9
    assert largest("--params 7e9 --mode grpo_reward") == 140e9


def test_offload_leaves_16_bit_weights_on_the_gpu():  # ZeRO-Offload, Ren et al. 2021
    assert largest("--params 10e9 --offload") == 20e9


# --- states, by what tensors hold after a step


@pytest.mark.parametrize("style", ["nano", "gpt2", "llama", "albert"])
@pytest.mark.parametrize("optimizer", ["adam", "muon", "adafactor", "momentum"])
def test_weights_gradients_and_optimizer_hold_the_planned_bytes(style, optimizer):
    model = build(c := config(style))
    args = train.get_args(["--weight_decay", "0.1"])  # muon
    optimizers = {"adam": lambda: [torch.optim.AdamW(adamw_groups(model, 0.1))],
                  "muon": lambda: train.make_optimizers(model, args, torch.device("cpu")),
                  "adafactor": lambda: [torch.optim.Adafactor(model.parameters())],
                  "momentum": lambda: [torch.optim.SGD(model.parameters(), momentum=0.9)]}[optimizer]()
    idx = torch.arange(64)[None]
    model(idx, idx)[1].backward()
    for o in optimizers:
        o.step()
    tensors = [t for p in model.parameters() for t in (p, p.grad)]
    tensors += [t for o in optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
    plan = rows(f"--optimizer {optimizer}", c)
    planned = plan["weights"] + plan["gradients"] + plan["optimizer state"]
    assert planned == pytest.approx(held(tensors), rel=0.002)  # step counts are the rest
    assert planned == P.moment_bytes(P.memory_plan(flags(f"--optimizer {optimizer}"), c))["step"]


# --- activations, by what autograd saves


def saved(c, B, T, dtype):
    """Bytes that autograd keeps of a forward pass, parameters and tables left out."""
    model = build(c, dtype)
    idx, kept = torch.arange(B * T).view(B, T) % c.vocab_size, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(idx, idx)[1]
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    return held(t for t in kept if t.untyped_storage().data_ptr() not in own)


def kept_otherwise_on_cpu(c, size):
    """Bytes a token: the CPU's rms_norm is several operations that keep float32 copies; its layer_norm's
    statistics of 16-bit rows are 16-bit."""
    norms = c.n_layer * P.PLACE_SAVED[c.place][0] + (c.place not in ("post", "deepnorm")) + c.embd_norm
    if c.norm == "rmsnorm":
        return norms * c.n_embd * (4 if size == 4 else 6)
    return -(norms + c.n_layer * c.qk_norm * (c.n_head + c.n_kv_head)) * 2 * (4 - size)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("ours", torch.bfloat16)])
def test_activations_are_what_autograd_saves(style, precision, dtype):
    c, B = config(style), 16
    size = dtype.itemsize
    plan = rows(f"--precision {precision} --micro_batch {B}", c)
    planned = sum(b for what, b in plan.items() if what[0] == " ") + plan.get("cast copies", 0)
    planned += B * 64 * kept_otherwise_on_cpu(c, size) + P.loss_bytes(c, B * 64, size)[1]
    assert planned == pytest.approx(saved(c, B, 64, dtype), rel=0.005)


def test_a_gpt2_block_keeps_32_c_and_a_token_of_124m_takes_296_kb():
    c = GPTConfig(**PRESETS["gpt2"])
    block = sum(row[1] for row in P.block_activations(c, 2))
    assert block == 32 * 768 + 4 * 12 + 16 and 12 * block == 295_680


def test_recomputing_keeps_less_and_blocks_only_their_inputs():
    c = config("gpt2")
    kept = [sum(b for what, b in rows(f"--recompute {r}", c).items() if what[0] == " ")
            for r in ("none", "selective", "block")]
    assert kept[0] > kept[1] > kept[2]
    assert rows("--recompute block", c)["  block inputs"] == 3 * 8 * 64 * 64 * 2  # layers, rows, T, C, bytes


def test_tensor_parallelism_divides_the_inner_activations_and_sequence_parallelism_the_rest():
    c = config("gpt2")
    one, tensor, sequence = (rows(line, c) for line in ("", "--tp 4", "--tp 4 --sequence_parallel"))
    for what in ("  q k v", "  mlp, gelu_tanh"):
        assert tensor[what] == sequence[what] == one[what] / 4
    assert tensor["  norms, residual"] == one["  norms, residual"] == 4 * sequence["  norms, residual"]


def test_the_first_stage_of_a_pipeline_holds_as_many_micro_batches_as_stages():
    c = config("gpt2")
    whole, first, last = (dict((r[0], r[1]) for r in P.memory_plan(flags(f"--pp {pp}"), c, "none", stage))
                          for pp, stage in ((1, 0), (3, 0), (3, 2)))
    assert first["  q k v"] == whole["  q k v"] == 3 * last["  q k v"]
    assert first["head and loss"] == 0 < last["head and loss"]


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors alive at once after any operation."""

    def __init__(self, tensors):
        super().__init__()
        self.live, self.peak = {}, 0
        self.add(tensors)

    def add(self, tensors):
        for s in (t.untyped_storage() for t in tensors):
            self.live[s._cdata] = StorageWeakRef(s), s.nbytes()
        self.live = {key: pair for key, pair in self.live.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.live.values()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.add(t for t in tree_leaves(out) if torch.is_tensor(t))
        return out


@pytest.mark.parametrize("style", ["nano", "gpt2"])
@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("ours", torch.bfloat16)])
@pytest.mark.parametrize("chunk", [2048, 200])
def test_the_planned_moments_are_the_peaks_of_live_tensors(style, precision, dtype, chunk, monkeypatch):
    c, B, loss_bytes = config(style), 16, P.loss_bytes
    monkeypatch.setattr(P, "loss_bytes", lambda *args: loss_bytes(*args, chunk=chunk, fused=False))
    planned = P.moment_bytes(P.memory_plan(flags(f"--precision {precision} --micro_batch {B}"), c))
    model, idx = build(c, dtype), torch.arange(B * 64).view(B, 64) % 1000
    model.loss = lambda *args, loss=model.loss, **kwargs: loss(*args, **kwargs, chunk=chunk)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(idx, idx)[1].backward()
    optimizer.step()
    optimizer.zero_grad()
    own = [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values()), idx]
    peaks = []
    with LiveBytes(own) as live:
        loss = model(idx, idx)[1]
        peaks.append(live.peak)
        live.peak = 0
        loss.backward()
        peaks.append(live.peak)
    assert planned["loss"] == pytest.approx(peaks[0], rel=0.02)
    assert max(planned["backward pass"], planned["step"]) == pytest.approx(peaks[1], rel=0.08)


def test_kv_cache_bytes_are_the_caches():
    cache = KVCache(c := config("gqa"), 3, 40, dtype=torch.bfloat16)
    assert P.kv_cache_bytes(c, 3, 40) == held((cache.k, cache.v))
    assert P.kv_cache_bytes(GPTConfig(**PRESETS["gpt2"]), 1, 1) == 36_864


# --- FLOPs and time


def test_the_slides_roofline_on_an_a100():
    flops, compute, moved, memory, longer = P.roofline(4096, 2048, 4096, "A100")
    assert (flops, longer) == (68_719_476_736, "compute")
    assert (compute * 1e6, memory * 1e6) == pytest.approx((220.255, 33.5544), rel=1e-5)
    flops, compute, moved, memory, longer = P.roofline(1, 2048, 4096, "A100")
    assert (flops, longer) == (16_777_216, "memory")
    assert (compute * 1e6, memory * 1e6) == pytest.approx((0.0538, 8.3948), rel=1e-3)
    assert P.device_rates("A100")[0] / P.device_rates("A100")[1] == 156  # the ridge, FLOPs a byte


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("tied", [False, True])
def test_products_add_up_to_6_n_plus_12_l_h_d_t(style, tied):
    c = config(style, tied=tied)
    trained = flops_per_token(P.meta_model(c), 64)
    assert 3 * sum(f for f, _ in P.products(c, 2, 64, 64).values()) == 2 * 64 * trained
    assert 3 * sum(f for f, _ in P.products(c, 2, 1, 64).values()) == 2 * trained  # a token a row


def test_a_gpt_block_takes_24_b_s_d2_plus_4_b_s2_d():
    c = GPTConfig(**PRESETS["gpt2"])
    for new in (1024, 1):
        blocks = sum(f for name, (f, _) in P.products(c, 2, new, 1024).items() if name != "head")
        assert blocks == 12 * (24 * 2 * new * 768 ** 2 + 4 * 2 * new * 1024 * 768)


def test_decoding_moves_every_weight_and_cached_key_once():
    c = GPTConfig(**PRESETS["gpt2"])
    moved = sum(b for _, b in P.products(c, 1, 1, 1024).values())
    weights, cache = 2 * 123_568_128, P.kv_cache_bytes(c, 1, 1024)
    assert weights + cache < moved < 1.005 * (weights + cache)


def test_every_device_with_a_peak_has_a_bandwidth_and_a_part_of_a_name_will_do():
    assert set(P.BANDWIDTH) == set(dict(PEAK_FLOPS))
    assert P.device_rates("4090") == (165e12, 1.008e12) and P.device_rates("h100") == (989e12, 3.35e12)


# --- commands


@pytest.mark.parametrize("line, part", [
    ("gpt2 --gpus 0", "--gpus"), ("gpt2 --tp 5", "--tp"), ("gpt2 --pp 5", "--pp"), ("nothing", "preset"),
    ("gpt2 --mode lora", "--lora_rank"), ("gpt2 --micro_batch 0", "--micro_batch"), ("", "--params"),
    ("gpt2 --mode lora --lora_rank 4 --lora_targets x", "--lora_targets"),
    ("--params 7e9 --optimizer muon", "--optimizer"), ("--params 7e9 --mode qlora --lora_rank 4", "--mode"),
    ("gpt2 --params 7e9", "--params"), ("--params nan", "--params"), ("gpt2 --cache_tokens -5", "--cache_tokens"),
    ("gpt2 --pp 2 --micro_batches -1", "--micro_batches")])
def test_a_plan_that_cannot_be_is_refused_in_a_sentence(line, part):
    with pytest.raises(BadInput, match=part) as error:
        P.memory(flags(line))
    assert "\n" not in str(error.value)


def test_an_unknown_device_is_refused_with_the_known_ones():
    with pytest.raises(BadInput, match="abacus.*H100.*T4"):
        P.device_rates("abacus")


def test_memory_prints_the_four_ways_side_by_side(capsys):
    P.memory(flags("--params 7.5e9 --gpus 64"))
    out = capsys.readouterr().out
    total = next(line.split() for line in out.splitlines() if line.startswith("TOTAL"))
    assert total[1:5] == ["120.000", "31.406", "16.641", "1.875"] and "2 Φ, 2 Φ, 2 Φ, 3 Φ" in out


@pytest.mark.parametrize("line", ["gpt2 --parallel fsdp --gpus 8", "llama-7b --mode infer",
                                  "nano --mode ppo --pp 2 --tp 2",
                                  "gpt2 --mode dpo --recompute selective --offload --cache_tokens 64"])
def test_memorys_total_is_its_largest_moment(line, capsys):
    P.memory(flags(line))
    sizes = {row.split("  ")[0]: float(row[22:32]) for row in capsys.readouterr().out.splitlines()[1:]
             if row[:2] == "= " or row[:5] == "TOTAL"}
    assert sizes.pop("TOTAL") == max(b for name, b in sizes.items() if name != "= activations")


def test_flops_prints_training_and_decoding(capsys):
    parser = argparse.ArgumentParser()
    P.add_flops_flags(parser)
    P.flops(parser.parse_args(["gpt2", "--device", "H100", "--batch", "2"]))
    out = capsys.readouterr().out
    assert f"{6 * 123_568_128 + 12 * 12 * 768 * 1024:,}" in out
    sums = [line.split()[-1] for line in out.splitlines() if line.startswith("sum")]
    assert sums == ["compute", "memory"] and math.isfinite(P.device_rates("H100")[0])
