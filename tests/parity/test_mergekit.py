"""mergekit merges the same folders to the same tensors: where it follows the papers, and in its variants."""
import sys

import pytest
import torch

import merge as room
from bpe import cli
from conftest import package
from merge import dare, slerp, ties, trim
from model import GPT, GPTConfig, init_weights, load_shards, save_hf

LLAMA = dict(vocab_size=300, block_size=64, n_layer=4, n_head=4, n_kv_head=2, n_embd=48, n_hidden=112, norm="rmsnorm",
             act="swiglu", qk_norm=False, embd_norm=False, init="gpt2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """base, a, b, c: Hugging Face folders in float32."""
    root = tmp_path_factory.mktemp("folders")
    for seed, name in enumerate(("base", "a", "b", "c")):
        model, g = GPT(GPTConfig(**LLAMA)), torch.Generator().manual_seed(seed)
        init_weights(model)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=g) * 0.05)
        save_hf(root / name, model)
    return root


def theirs(out, config):
    """What mergekit writes for a config, name -> tensor."""
    package("mergekit.merge").run_merge(
        package("mergekit.config").MergeConfiguration.model_validate(config), str(out),
        package("mergekit.options").MergeOptions(copy_tokenizer=False, write_model_card=False, allow_crimes=True,
                                                 quiet=True))
    return load_shards(out)


def ours(monkeypatch, out, *args):
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, args), "--out", str(out)])
    cli(room.main)
    return load_shards(out)


def same(a, b, limit=1e-6):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() < limit, name


WEIGHTS = (0.3, 0.8, 0.5)
MERGES = {  # name: (mergekit's method and parameters, what each model has, our flags)
    "linear": ("linear", {}, {}, ["--weights", 0.3, 0.8, 0.5]),
    "task_arithmetic": ("task_arithmetic", {"lambda": 0.7}, {}, ["--weights", 0.3, 0.8, 0.5, "--scale", 0.7]),
    "ties": ("ties", {"lambda": 1.5}, {"density": 0.3}, ["--weights", 0.3, 0.8, 0.5, "--density", 0.3, "--scale", 1.5,
                                                         "--mergekit"]),
}


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_of_three_models(folders, tmp_path, monkeypatch, name):
    method, parameters, each, flags = MERGES[name]
    models = [{"model": str(folders / m), "parameters": {"weight": w, **each}} for m, w in zip("abc", WEIGHTS)]
    config = {"merge_method": method, "models": models, "parameters": parameters, "dtype": "float32"}
    flags = flags if method == "linear" else [*flags, "--base", folders / "base"]
    config |= {} if method == "linear" else {"base_model": str(folders / "base")}
    same(ours(monkeypatch, tmp_path / "ours", method, *(folders / m for m in "abc"), *flags),
         theirs(tmp_path / "theirs", config))


def test_with_equal_weights_and_tensors_trimmed_one_by_one_the_papers_signs_are_mergekits(folders, tmp_path):
    """Where the two rules of election agree, the paper's formula is what mergekit writes."""
    models = [{"model": str(folders / m), "parameters": {"weight": 1.0, "density": 0.3}} for m in "abc"]
    config = {"merge_method": "ties", "models": models, "base_model": str(folders / "base"), "dtype": "float32"}
    base, *others = ({n: t.clone() for n, t in load_shards(folders / m).items()} for m in ("base", "a", "b", "c"))
    same({n: ties(base[n], [trim(m[n] - base[n], 0.3) for m in others]) for n in base},
         theirs(tmp_path / "theirs", config))


@pytest.mark.parametrize("flags", [[], ["--mergekit"]])
def test_slerp_with_t_by_layer_and_part(folders, tmp_path, monkeypatch, flags):
    """The angles here are wide, where mergekit follows the paper."""
    t = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.3, 0]}, {"value": 0.4}]
    layers = [{"model": str(folders / m), "layer_range": [0, 4]} for m in "ab"]
    config = {"merge_method": "slerp", "slices": [{"sources": layers}], "base_model": str(folders / "a"),
              "parameters": {"t": t}, "dtype": "float32"}
    same(ours(monkeypatch, tmp_path / "ours", "slerp", folders / "a", folders / "b", "--t", "self_attn=0,0.5,1",
              "mlp=1,0.5,0.3,0", "0.4", *flags),
         theirs(tmp_path / "theirs", config))


def test_slerp_of_near_tensors_is_mergekits_line():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(40, 30, generator=g)
    for noise in (0.01, 0.03, 0.5, 5.0):
        b, t = a + noise * torch.randn(40, 30, generator=g), torch.tensor([0.3])
        wanted = package("mergekit.merge_methods.slerp").slerp(t, a[None], b[None])[0]
        assert (slerp(a, b, 0.3, mergekit=True) - wanted).abs().max() < 1e-6 * wanted.abs().max()


def test_passthrough_stacks_the_same_layers(folders, tmp_path, monkeypatch):
    slices = [("a", 0, 3), ("b", 1, 4), ("a", 2, 4)]
    config = {"merge_method": "passthrough", "dtype": "float32", "slices": [
        {"sources": [{"model": str(folders / m), "layer_range": [start, stop]}]} for m, start, stop in slices]}
    parts = [f"{folders / m}@{start}:{stop}" for m, start, stop in slices]
    same(ours(monkeypatch, tmp_path / "ours", "passthrough", *parts), theirs(tmp_path / "theirs", config))


def test_dare_of_one_mask_with_either_factor():
    sparsify = package("mergekit.sparsify")
    delta = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for norm in (None, sparsify.RescaleNorm.l1):
        torch.manual_seed(5)
        wanted = sparsify.bernoulli(delta, 0.2, norm)
        torch.manual_seed(5)
        left = dare(delta, 0.2, rescale=1.0)
        factor = (delta.abs().sum() / left.abs().sum()).item() if norm else 1.0
        torch.manual_seed(5)
        assert torch.allclose(dare(delta, 0.2, rescale=factor), wanted, atol=1e-6)


def test_a_lora_folder_of_peft_is_merged_as_peft_merges_it(folders, tmp_path, monkeypatch):
    peft, tf = package("peft"), package("transformers")
    for extra in ({}, {"use_rslora": True}, {"use_dora": True},
                  {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}}):
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], **extra)
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape) * 0.1)
        model.save_pretrained(tmp_path / "adapter")
        wanted = model.merge_and_unload().state_dict()
        found = ours(monkeypatch, tmp_path / "ours", "lora", tmp_path / "adapter", "--base", folders / "base")
        same(found, {name: wanted[name] for name in found}, 1e-5)
