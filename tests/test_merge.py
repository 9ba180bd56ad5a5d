"""The merge room as a specification: formulas of the papers, files in and out, memory, refusals in one sentence."""
import json
import math
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

import lora
import merge as room
from bpe import BadInput, Tokenizer
from conftest import ROOT, call
from merge import dare, ema_weights, kth_largest, linear, slerp, task_arithmetic, ties, trim
from model import (GPT, GPTConfig, PRESETS, init_weights, load_run, load_safetensors, load_shards, save_hf, save_run,
                   save_safetensors)
from quantize import describe, quantize_model

CONFIG = dict(block_size=32, n_embd=32, n_layer=4)
IDS = torch.randint(0, 280, (2, 20), generator=torch.Generator().manual_seed(0))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noisy(model, size, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=g))
    return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """base, and a and b a little way from it, as runs; hf/… the same as Hugging Face folders."""
    root = tmp_path_factory.mktemp("runs")
    tokenizer = Tokenizer.train([(ROOT / "README.md").read_text()], 280)
    for name, settings in (("", dict(CONFIG)), ("hf", dict(CONFIG, norm="rmsnorm", act="swiglu", qk_norm=False,
                                                           embd_norm=False, init="gpt2"))):
        for seed, (who, size) in enumerate((("base", 0), ("a", 0.05), ("b", 0.05))):
            model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **settings))
            init_weights(model, 0)
            noisy(noisy(model, 0.3, 9), size, seed)
            if name:
                save_hf(root / name / who, model, tokenizer, shard_bytes=4e4)
            else:
                save_run(root / who, model, {"tokenizer": tokenizer.spec(), "stage": "train", "args": {"data": "text"}})
                tokenizer.save(root / who)
    return root


def merge(*args, check=0):
    return call(room, *args, check=check)[check > 0]


def tensors(path):
    return {name: t.clone() for name, t in load_shards(path).items()}


# -----------------------------------------------------------------------------
# The formulas


def test_linear_is_the_weighted_mean():
    a, b = random(5, 7), random(5, 7, seed=1)
    assert torch.equal(linear([a, b]), (a + b) / 2)
    assert torch.allclose(linear([a, b], [3.0, 1.0]), 0.75 * a + 0.25 * b)


def test_slerp_ends_are_exact_the_norm_is_kept_and_the_angle_grows_evenly():
    a, b = random(40, 30), random(40, 30, seed=1)
    b = b * a.norm() / b.norm()
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    angle = lambda x, y: math.acos((x * y).sum() / (x.norm() * y.norm()))
    for t in (0.2, 0.5, 0.9):
        c = slerp(a, b, t)
        assert abs(c.norm() / a.norm() - 1) < 1e-6
        assert abs(angle(a, c) / angle(a, b) - t) < 1e-5


def test_slerp_of_near_neighbours_keeps_the_norm_where_mergekits_line_does_not():
    a = random(2000)
    b = a + 0.03 * random(2000, seed=1)  # cos 0.9996
    b = b * a.norm() / b.norm()
    arc, line = (slerp(a, b, 0.5, mergekit=m).norm() / a.norm() for m in (False, True))
    assert abs(arc - 1) < 1e-6 < 5e-5 < 1 - line
    for other in (a, -a, 0 * a, 2 * a):  # no angle to divide by
        assert torch.equal(slerp(a, other, 0.25), 0.75 * a + 0.25 * other)


def test_task_arithmetic_adds_scales_and_forgets():
    base, task = random(9), random(9, seed=1)
    assert torch.equal(task_arithmetic(base, [task], [-1.0]), base - task)
    assert torch.allclose(task_arithmetic(base, [task, 2 * task], [1.0, 0.5], 0.3), base + 0.6 * task)


def test_the_kth_largest_magnitude_is_found_without_sorting():
    x = torch.cat((random(1000), torch.tensor([0.0, 0.5, -0.5, 0.5, 1e-38, math.inf])))
    order = x.abs().sort(descending=True).values
    for k in (1, 2, 17, 400, 1005, 1006):
        assert kth_largest(lambda: x.split(100), k) == order[k - 1]


def test_trim_keeps_the_largest_share_and_what_equals_its_smallest():
    assert trim(torch.tensor([3.0, -2.0, 2.0, 1.0, 0.5]), 0.4).tolist() == [3, -2, 2, 0, 0]
    assert (trim(random(1000), 0.2) != 0).sum() == 200


def test_ties_elects_signs_and_averages_only_what_agrees():
    """The example of Yadav et al. 2023, figure 1: one place of each kind."""
    deltas = [torch.tensor(d) for d in ([4.0, 2.0, 0.0, 1.0, 0.0], [2.0, -3.0, 5.0, -1.0, 0.0],
                                        [0.0, -1.0, -1.0, 0.0, 0.0])]
    base = torch.ones(5)
    #  mean of 4 and 2; of -3 and -1; 5 alone; 1 and -1 cancel: no sign; nobody
    assert ties(base, deltas, scale=2.0).tolist() == [1 + 2 * 3, 1 - 2 * 2, 1 + 2 * 5, 1, 1]


def test_signs_are_elected_before_user_weights_and_after_them_in_mergekit():
    base, deltas = torch.zeros(1), [torch.tensor([3.0]), torch.tensor([-1.0])]
    assert ties(base, deltas, [0.1, 1.0]).item() == pytest.approx(3.0)
    assert ties(base, deltas, [0.1, 1.0], mergekit=True).item() == pytest.approx(-1.0)


def test_dare_keeps_the_expectation():
    """The mean of n draws has deviation |τ| sqrt((1-p)/p / n): all within 5 of them."""
    delta, n, g = random(50), 4000, torch.Generator().manual_seed(0)
    draws = torch.stack([dare(delta, 0.1, g) for _ in range(n)])
    assert ((draws.mean(0) - delta).abs() < 5 * delta.abs() * math.sqrt(9 / n)).all()
    assert set((draws[:, 0] / delta[0]).round(decimals=4).tolist()) == {0.0, 10.0}


def test_ema_weights_are_the_recursion():
    x, e = random(6), None
    for v in x:
        e = v if e is None else 0.8 * e + 0.2 * v
    weights = ema_weights(6, 0.8)
    assert sum(weights) == pytest.approx(1) and linear(list(x), weights).item() == pytest.approx(e.item(), abs=1e-6)


# -----------------------------------------------------------------------------
# Files: what is written is the formula over the state dicts, however small the pieces


@pytest.fixture(params=[1 << 24, 1000])
def piece(request, monkeypatch):
    monkeypatch.setattr(room, "PIECE", request.param)


def expected(kind, where, mergekit=False):
    """The whole state dicts through the formulas at once."""
    base, a, b = (tensors(where / who) for who in ("base", "a", "b"))
    da, db = ({n: m[n] - base[n] for n in base} for m in (a, b))
    if kind == "linear":
        return {n: linear([a[n], b[n]], [1.0, 3.0]) for n in a}
    if kind == "task_arithmetic":
        return {n: task_arithmetic(base[n], [da[n], db[n]], [1.0, 3.0]) for n in a}
    if kind == "slerp":
        return {n: slerp(a[n], b[n], 0.3) for n in a}
    if not mergekit:  # trimmed as one vector
        flat = [torch.cat([d[n].flatten() for n in base]) for d in (da, db)]
        sizes = [base[n].numel() for n in base]
        flat = [dict(zip(base, trim(f, 0.2).split(sizes))) for f in flat]
        return {n: ties(base[n], [f[n].view_as(base[n]) for f in flat], [1.0, 3.0]) for n in base}
    return {n: ties(base[n], [trim(d[n], 0.2) for d in (da, db)], [1.0, 3.0], mergekit=True) for n in base}


@pytest.mark.parametrize("kind", ["linear", "task_arithmetic", "slerp", "ties", "ties --mergekit"])
@pytest.mark.parametrize("where", ["", "hf"])
def test_merged_files_are_the_formula(runs, tmp_path, piece, kind, where):
    method, *flags = kind.split()
    flags += ["--t", 0.3] if method == "slerp" else ["--weights", 1, 3]
    flags += ["--base", runs / where / "base"] if method in ("ties", "task_arithmetic") else []
    merge(method, runs / where / "a", runs / where / "b", "--out", tmp_path / "out", "--shard_gb", 5e-5, *flags)
    found, wanted = tensors(tmp_path / "out"), expected(method, runs / where, "--mergekit" in flags)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], atol=1e-6), name
    assert torch.isfinite(GPT.from_pretrained(tmp_path / "out")(IDS)[0]).all()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 if where else \
        Tokenizer.load(tmp_path / "out") == Tokenizer.load(runs / "a")


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("mergekit", [False, True])
def test_dare_drops_by_seed_and_keeps_what_each_variant_says(runs, tmp_path, method, mergekit):
    """One model: base + τ · mask / density; by mergekit's rule Σ|τ| of each tensor stays."""
    flags = ["--density", 0.3, *["--mergekit"] * mergekit]
    for seed, out in ((0, "x"), (0, "y"), (1, "z")):
        merge(method, runs / "a", "--base", runs / "base", "--out", tmp_path / out, "--seed", seed, *flags)
    base, a, x, y, z = (tensors(p) for p in (runs / "base", runs / "a", *(tmp_path / o for o in "xyz")))
    for name in base:
        assert torch.equal(x[name], y[name])
        tau, new = a[name] - base[name], x[name] - base[name]
        kept = new.abs() > 1e-7
        factor = tau.abs().sum() / tau[kept].abs().sum() if mergekit else 1 / 0.3
        assert torch.allclose(new[kept], tau[kept] * factor, atol=1e-5)
        assert abs(kept.float().mean() - 0.3) < 5 * math.sqrt(0.21 / kept.numel()) + 0.01
    assert any(not torch.equal(x[n], z[n]) for n in x)


def test_the_same_model_twice_is_itself_and_the_other_run_is_kept(runs, tmp_path):
    out = tmp_path / "out"
    for method, *flags in (["linear"], ["slerp"], ["ties", "--density", 1, "--base", runs / "base"]):
        merge(method, runs / "a", runs / "a", "--out", out, *flags)
        assert all(torch.allclose(t, tensors(runs / "a")[n], atol=1e-6) for n, t in tensors(out).items())
    run = json.loads((out / "run.json").read_text())
    assert run["stage"] == "merge" and run["merge"]["method"] == "ties" and run["args"] == {"data": "text"}
    assert (tmp_path / "out.old" / "run.json").exists()


def test_t_by_layer_and_by_part(runs, tmp_path):
    merge("slerp", runs / "a", runs / "b", "--t", "attn=0,1", "mlp=1,0,1", "0.5", "--out", tmp_path / "out")
    found, a, b = tensors(tmp_path / "out"), tensors(runs / "a"), tensors(runs / "b")
    for name, t in (("blocks.0.attn.q.weight", 0), ("blocks.1.attn.q.weight", 1 / 3), ("blocks.3.attn.o.weight", 1),
                    ("blocks.0.mlp.up.weight", 1), ("blocks.1.mlp.up.weight", 1 / 3), ("wte.weight", 0.5)):
        assert torch.allclose(found[name], slerp(a[name], b[name], t), atol=1e-6), name


def test_average_and_ema_of_a_runs_saves(runs, tmp_path):
    model, _ = load_run(runs / "a")
    for step in (5, 10, 1000000):
        noisy(model, 0.1, step)
        save_run(tmp_path / "run" / f"step-{step:06}", model, json.loads((runs / "a" / "run.json").read_text()))
    saves = [tensors(tmp_path / "run" / f"step-{step:06}") for step in (5, 10, 1000000)]
    for flags, weights in (([], [1, 1, 1]), (["--last", 2], [0, 1, 1]), (["--ema", 0.9], ema_weights(3, 0.9))):
        merge("average", tmp_path / "run", "--out", tmp_path / "out", *flags)
        found = tensors(tmp_path / "out")
        assert all(torch.allclose(found[n], linear([s[n] for s in saves], weights), atol=1e-6) for n in found)


@pytest.mark.parametrize("where", ["", "hf"])
def test_passthrough_stacks_layers_into_a_model_that_loads(runs, tmp_path, where):
    a, b = runs / where / "a", runs / where / "b"
    merge("passthrough", f"{a}@0:3", f"{b}@1:", "--out", tmp_path / "out")
    model, A, B = (GPT.from_pretrained(p) for p in (tmp_path / "out", a, b))
    assert model.config.n_layer == 6 and torch.isfinite(model(IDS)[0]).all()
    for layer, (source, old) in enumerate([(A, 0), (A, 1), (A, 2), (B, 1), (B, 2), (B, 3)]):
        assert torch.equal(model.blocks[layer].mlp.up.weight, source.blocks[old].mlp.up.weight)
    assert torch.equal(model.wte.weight, A.wte.weight) and torch.equal(model.head.weight, B.head.weight)
    merge("passthrough", a, "--out", tmp_path / "same")
    assert torch.equal(GPT.from_pretrained(tmp_path / "same")(IDS)[0], A(IDS)[0])


def test_a_stack_keeps_the_kind_of_attention_of_each_layer(runs, tmp_path):
    run = json.loads((runs / "a" / "run.json").read_text())
    model = GPT(GPTConfig(**run["config"] | {"attn": "full,window", "window": 4}))
    init_weights(model)
    save_run(tmp_path / "a", model, {"tokenizer": run["tokenizer"]})
    merge("passthrough", f"{tmp_path / 'a'}@0:2", f"{tmp_path / 'a'}@1:4", "--out", tmp_path / "out")
    assert load_run(tmp_path / "out")[0].config.attn_kinds == ["full", "window", "window", "full", "window"]


def test_an_export_replaces_an_earlier_one_and_nothing_else(runs, tmp_path):
    for name in ("model-best.safetensors", "model-00001-of-00009.safetensors", "model_epoch3.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    model, tokenizer = GPT.from_pretrained(runs / "hf" / "a"), Tokenizer.load(runs / "base")
    save_hf(tmp_path, model, tokenizer)
    assert {p.name for p in tmp_path.glob("model*")} == {"model-best.safetensors", "model_epoch3.safetensors",
                                                        "model.safetensors"}
    with pytest.raises(BadInput, match="tokenizer.json"):
        save_hf(tmp_path / "new", model, Tokenizer.train(["abc"], 3, kind="char"))
    assert not list((tmp_path / "new").glob("*.safetensors"))


# -----------------------------------------------------------------------------
# Adapters


def adapter(path, base, rank=4, alpha=8, seed=0, **config):
    """A PEFT folder for q and down of every block of a run, and its ΔW by name."""
    model, tensors, deltas = GPT.from_pretrained(base), {}, {}
    for i, (name, W) in enumerate(model.named_parameters()):
        if name.endswith(("attn.q.weight", "mlp.down.weight")):
            A, B = random(rank, W.shape[1], seed=seed + 2 * i), random(W.shape[0], rank, seed=seed + 2 * i + 1)
            part = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            tensors |= {part + "A.weight": A, part + "B.weight": B}
            deltas[name] = alpha / rank * (B @ A)
    path.mkdir()
    save_safetensors(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": rank, "lora_alpha": alpha} | config))
    return deltas


def test_adapters_are_merged_into_their_base_and_with_each_other(runs, tmp_path):
    base = tensors(runs / "base")
    one = adapter(tmp_path / "one", runs / "base", base_model_name_or_path=str(runs / "base"))
    two = adapter(tmp_path / "two", runs / "base", rank=2, seed=50)
    merge("lora", tmp_path / "one", "--out", tmp_path / "x")
    x = tensors(tmp_path / "x")
    assert all(torch.allclose(x[n], base[n] + one.get(n, 0), atol=1e-5) for n in base) and one
    merge("lora", tmp_path / "one", tmp_path / "two", "--weights", 1, -0.5, "--base", runs / "base",
          "--out", tmp_path / "y")
    y = tensors(tmp_path / "y")
    assert all(torch.allclose(y[n], base[n] + one.get(n, 0) - 0.5 * two.get(n, 0), atol=1e-4) for n in base)
    merge("linear", tmp_path / "one", runs / "a", "--out", tmp_path / "z")
    z, a = tensors(tmp_path / "z"), tensors(runs / "a")
    assert all(torch.allclose(z[n], (base[n] + one.get(n, 0) + a[n]) / 2, atol=1e-5) for n in base)


def tuned(runs, tmp_path, name, base, system, seed=0):
    """An adapter of ours beside a base, tuned with a system text."""
    model, tokenizer = lora.plain(base), Tokenizer.load(runs / "base")
    tokenizer.chat = {"template": "chatml", "system": system}
    lora.apply(model, lora.Adapter("lora", lora_rank=2), seed=seed)
    noisy(torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad), 0.1, seed)
    lora.save(tmp_path / name, model, {"stage": "sft", "metrics": {}, "args": {}, "tokenizer": tokenizer.spec()}, base)
    tokenizer.save(tmp_path / name)
    return tokenizer.chat


def test_a_merge_speaks_as_the_first_model_that_is_named(runs, tmp_path):
    chat = tuned(runs, tmp_path, "one", runs / "base", "Be brief.")
    tuned(runs, tmp_path, "two", runs / "base", "Be long.", seed=1)
    merge("lora", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "x")
    merge("ties", tmp_path / "one", tmp_path / "two", "--base", runs / "base", "--out", tmp_path / "y")
    merge("linear", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "z")
    merge("passthrough", f"{tmp_path / 'one'}@0:2", f"{tmp_path / 'one'}@2:4", "--out", tmp_path / "w")
    for out in "wxyz":
        run = load_run(tmp_path / out)[1]
        assert Tokenizer.from_pretrained(tmp_path / out).chat == chat and run["stage"] == "merge"
        assert not run.keys() & {"base", "base_print", "adapter"}


def test_adapters_on_adapters_and_of_different_bases(runs, tmp_path):
    tuned(runs, tmp_path, "one", runs / "base", None)
    tuned(runs, tmp_path, "nest", tmp_path / "one", None, seed=1)
    merge("linear", tmp_path / "nest", tmp_path / "one", "--out", tmp_path / "x")
    one, nest = (GPT.from_pretrained(tmp_path / name) for name in ("one", "nest"))
    assert load_run(tmp_path / "x")[0](IDS)[0].shape == one(IDS)[0].shape
    name, module = "blocks.0.attn.q.weight", nest.get_submodule("blocks.0.attn.q")
    whole = tensors(tmp_path / "x")[name] * 2 - one.get_submodule("blocks.0.attn.q").effective()
    assert torch.allclose(whole, module.effective(), atol=1e-5)
    assert "take the place" in merge("linear", tmp_path / "nest", runs / "a", "--out", tmp_path / "one", check=2)
    assert "take the place" in call(lora, "merge", tmp_path / "nest", "--out", runs / "base", check=2)[1]
    tuned(runs, tmp_path, "other", runs / "a", None, seed=2)
    assert "--base" in merge("lora", tmp_path / "one", tmp_path / "other", "--out", tmp_path / "y", check=2)


def test_an_adapter_that_names_what_transformers_would_is_merged_into_a_run(runs, tmp_path):
    """As lora.py saves it for a run that can be exported; GPT-2's q, k, v are one matrix there."""
    for preset, there, ours, fused in (("gpt2", "transformer.h.1.attn.c_attn", "attn.q attn.k attn.v", True),
                                       ("gpt2", "transformer.h.1.mlp.c_fc", "mlp.up", False)):
        run = json.loads((runs / "a" / "run.json").read_text())
        model = GPT(GPTConfig(**PRESETS[preset] | dict(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=280)))
        init_weights(model)
        save_run(tmp_path / "gpt2", model, {"tokenizer": run["tokenizer"]})
        folder = tmp_path / there
        folder.mkdir()
        parts = [model.get_submodule(f"blocks.1.{part}") for part in ours.split()]
        A, B = random(4, 32), random(sum(m.weight.shape[0] for m in parts), 4, seed=1)
        save_safetensors({f"base_model.model.{there}.lora_A.weight": A, f"base_model.model.{there}.lora_B.weight": B},
                         folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4,
                                                                "fan_in_fan_out": True}))
        merge("lora", folder, "--base", tmp_path / "gpt2", "--out", tmp_path / "out")
        found, base = tensors(tmp_path / "out"), tensors(tmp_path / "gpt2")
        for part, b in zip(ours.split(), B.chunk(3) if fused else [B]):
            name = f"blocks.1.{part}.weight"
            assert torch.allclose(found.pop(name), base[name] + b @ A, atol=1e-5)
        assert all(torch.equal(t, base[n]) for n, t in found.items())


def test_rank_stabilized_adapters_divide_by_the_root(runs, tmp_path):
    delta = adapter(tmp_path / "one", runs / "base", use_rslora=True)
    merge("lora", tmp_path / "one", "--base", runs / "base", "--out", tmp_path / "x")
    x, base = tensors(tmp_path / "x"), tensors(runs / "base")
    assert all(torch.allclose(x[n], base[n] + delta[n] * 2, atol=1e-4) for n in delta)  # 8 / 2 instead of 8 / 4


# -----------------------------------------------------------------------------
# Memory


def synthetic(path, layers, seed, c=dict(n_embd=4096, n_hidden=11008, vocab=32000)):
    """A LLaMA-7B-shaped folder of bf16 shards, one a layer, written piece by piece."""
    C, F, V = c["n_embd"], c["n_hidden"], c["vocab"]
    path.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,), "lm_head.weight": (V, C)}
    for i in range(layers):
        part = f"model.layers.{i}."
        shapes |= {f"{part}self_attn.{x}_proj.weight": (C, C) for x in "qkvo"}
        shapes |= {f"{part}mlp.gate_proj.weight": (F, C), f"{part}mlp.up_proj.weight": (F, C),
                   f"{part}mlp.down_proj.weight": (C, F)}
        shapes |= {f"{part}input_layernorm.weight": (C,), f"{part}post_attention_layernorm.weight": (C,)}
    noise = random(1 << 20, seed=seed).bfloat16()

    def numbers(n):
        for start in range(0, n, len(noise)):
            yield noise[:n - start]
    files = {}
    for name, shape in shapes.items():
        layer = room.LAYER(name)
        files.setdefault(f"model-{layer[1] if layer else 'rest'}.safetensors", {})[name] = (torch.bfloat16, shape)
    for file, entries in files.items():
        room.write_safetensors(path / file, entries, (p for _, s in entries.values() for p in numbers(math.prod(s))))
    (path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {name: file for file, entries in files.items() for name in entries}}))
    (path / "config.json").write_text(json.dumps(dict(
        model_type="llama", hidden_size=C, intermediate_size=F, num_hidden_layers=layers, num_attention_heads=32,
        vocab_size=V, max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=False)))


def peak(*args, piece=room.PIECE):
    """Bytes that merge.py held at most, in a process of its own."""
    code = (f"import resource, sys, merge; from bpe import cli; merge.PIECE = {piece}; cli(merge.main); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT,
                          capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 32])
def test_a_merge_of_7b_shaped_models_stays_under_3_gb(tmp_path, layers):
    """The tensors of a 7B model; with all 32 layers, 13.5 GB a model, the cheapest method, if the disk has room."""
    if shutil.disk_usage(tmp_path).free < 6e8 * layers * 2.3:
        pytest.skip("needs 45 GB of disk")
    for seed, name in enumerate("ab"):
        synthetic(tmp_path / name, layers, seed)
    folders = tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out"
    for method, *flags in (["linear"], *([] if layers > 2 else [
            ["slerp"], ["ties", "--base", tmp_path / "a"], ["dare_ties", "--mergekit", "--base", tmp_path / "a"]])):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        start, used = time.time(), peak(method, *folders, *flags)
        print(f"{layers} layers, {method}: {used / 1e9:.2f} GB, {time.time() - start:.0f} s")
        assert used < 3e9
    a, out = load_shards(tmp_path / "a"), load_shards(tmp_path / "out")
    assert {name: t.shape for name, t in a.items()} == {name: t.shape for name, t in out.items()}
    for name in ("a", "b", "out"):
        shutil.rmtree(tmp_path / name)


def test_memory_is_bounded_by_the_piece_not_by_the_tensor(tmp_path):
    """36 times the numbers, two tensors of 126 MB in float32, cost no more than a few pieces of 4 MB."""
    used = []
    for C in (256, 1280):
        for seed, name in enumerate("ab"):
            synthetic(tmp_path / str(C) / name, 1, seed, dict(n_embd=C, n_hidden=C, vocab=C * C // 52))
        used.append(peak("slerp", tmp_path / str(C) / "a", tmp_path / str(C) / "b", "--out", tmp_path / str(C) / "out",
                         piece=1 << 20))
    assert used[1] < used[0] + 6e7


# -----------------------------------------------------------------------------
# Refusals


def changed(runs, tmp_path, **config):
    run = json.loads((runs / "a" / "run.json").read_text())
    model = GPT(GPTConfig(**{**{k: v for k, v in run["config"].items() if k != "n_hidden"}, **config}))
    init_weights(model)
    save_run(tmp_path / "other", model, {"tokenizer": run["tokenizer"]})
    (tmp_path / "other" / "tokenizer.tiktoken").write_bytes((runs / "a" / "tokenizer.tiktoken").read_bytes())
    return tmp_path / "other"


def test_different_shapes_settings_and_kinds_are_refused(runs, tmp_path):
    out = "--out", tmp_path / "out"
    for config, word in ((dict(n_embd=64, head_dim=8), "shape|is \\[|missing"), (dict(n_layer=5), "missing"),
                         (dict(rope_theta=500.0), "rope_theta")):
        message = merge("linear", runs / "a", changed(runs, tmp_path, **config), *out, check=2)
        assert "only models of one architecture" in message
        assert re.search(word, message) and message.count("\n") == 1
    assert "model.py import" in merge("linear", runs / "a", runs / "hf" / "a", *out, check=2)
    assert not (tmp_path / "out").exists()


def test_different_tokenizers_are_refused(runs, tmp_path):
    other = changed(runs, tmp_path)
    tokenizer = Tokenizer.train(["another text entirely, with other words in it: zebra zebra zebra. " * 40], 260)
    run = json.loads((other / "run.json").read_text()) | {"tokenizer": tokenizer.spec()}
    (other / "run.json").write_text(json.dumps(run))
    tokenizer.save(other)
    assert "different tokenizers" in merge("linear", runs / "a", other, "--out", tmp_path / "out", check=2)


@pytest.mark.parametrize("args, word", [
    (["ties", "A", "B"], "--base"),
    (["task_arithmetic", "A"], "--base"),
    (["linear", "A", "missing"], "missing"),
    (["linear", "A", "B", "--weights", "1"], "--weights"),
    (["linear", "A", "B", "--weights", "1", "-1"], "add up to 0"),
    (["slerp", "A"], "two models"),
    (["slerp", "A", "B", "--t", "attn=0.5"], "--t"),
    (["slerp", "A", "B", "--t", "attn=half", "1"], "--t"),
    (["ties", "A", "--base", "BASE", "--density", "1.5"], "--density"),
    (["average", "A"], "--keep all"),
    (["average", "A", "--ema", "1"], "--ema"),
    (["passthrough", "A@2:9"], "layers 0 to 3"),
    (["passthrough", "A@3:3"], "layers 0 to 3"),
    (["lora", "A", "--base", "BASE"], "adapter_config.json"),
    (["linear", "A", "B", "--out", "A"], "--out"),
])
def test_bad_input_is_answered_in_a_sentence(runs, tmp_path, args, word):
    places = {"A": runs / "a", "B": runs / "b", "BASE": runs / "base", "missing": tmp_path / "missing"}
    args = [str(places.get(a, a)).replace("A@", f"{runs / 'a'}@") for a in args]
    before = tensors(runs / "a")
    message = merge(*args, *([] if "--out" in args else ["--out", tmp_path / "out"]), check=2)
    assert word in message and message.count("\n") == 1 and message.startswith("merge.py: error:")
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(t, before[n]) for n, t in tensors(runs / "a").items())


def test_an_adapter_without_its_base_or_with_another_is_refused(runs, tmp_path):
    adapter(tmp_path / "one", runs / "base", base_model_name_or_path=str(tmp_path / "gone"))
    assert "give --base" in merge("lora", tmp_path / "one", "--out", tmp_path / "out", check=2)
    assert "give --base" in merge("lora", tmp_path / "one", "--base", runs / "hf" / "base", "--out", tmp_path / "out",
                                  check=2)
    wide = changed(runs, tmp_path, n_embd=64, head_dim=8)
    assert "give --base" in merge("lora", tmp_path / "one", "--base", wide, "--out", tmp_path / "out", check=2)


def test_a_damaged_shard_is_named(runs, tmp_path):
    other = changed(runs, tmp_path)
    data = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(data[:-5])
    assert "not a sound safetensors file" in merge("linear", runs / "a", other, "--out", tmp_path / "out", check=2)
    assert load_safetensors(runs / "a" / "model.safetensors")


def test_an_adapter_of_a_fused_family_keeps_the_ranks_of_all_its_matrices(tmp_path):
    model = GPT(GPTConfig(**PRESETS["gpt2"] | dict(vocab_size=280, block_size=32, n_embd=32, n_layer=2, n_head=2)))
    init_weights(model, 0)
    save_run(tmp_path / "base", noisy(model, 0.2, 1), {})
    lora.apply(model, lora.Adapter("lora", lora_rank=4, lora_targets="all"))
    for p in model.parameters():
        if p.requires_grad:
            noisy_part = torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
            p.data.add_(0.1 * noisy_part)
    lora.save(tmp_path / "adapter", model, {}, tmp_path / "base")
    merge("lora", tmp_path / "adapter", "--out", tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(load_run(tmp_path / "merged")[0].eval()(IDS)[0], model.eval()(IDS)[0], atol=1e-4,
                                   rtol=1e-4)


def test_quantized_runs_are_not_averaged(runs, tmp_path):
    model = GPT.from_pretrained(runs / "a")
    run = json.loads((runs / "a" / "run.json").read_text())
    quantize_model(model, "symmetric", 8, 0)
    save_run(tmp_path / "codes", model, run | {"quantize": describe(model)})
    assert "is quantized" in merge("linear", tmp_path / "codes", runs / "b", "--out", tmp_path / "x", check=2)


def test_a_merge_never_takes_the_place_of_what_is_no_model(runs, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    assert "is no run" in merge("linear", runs / "a", runs / "b", "--out", tmp_path / "notes", check=2)
    shutil.copytree(runs / "a", tmp_path / "m.old")
    assert "take the place" in merge("linear", tmp_path / "m.old", runs / "b", "--out", tmp_path / "m", check=2)
