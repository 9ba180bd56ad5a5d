"""Mixtures of experts of the transformers package: their block, their losses, random models read, and written back."""
import pytest
import torch

import model as M
import moe
from conftest import package
from model import GPT, GPTConfig

TOKENS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
SIZES = dict(vocab_size=300, max_position_embeddings=64, hidden_size=48, intermediate_size=112, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2)
QWEN = dict(SIZES, num_experts=6, moe_intermediate_size=40, num_experts_per_tok=3)
MODELS = {
    "mixtral": ("Mixtral", dict(SIZES, num_local_experts=4)),
    "mixtral-window": ("Mixtral", dict(SIZES, num_local_experts=5, num_experts_per_tok=3, sliding_window=9,
                                       head_dim=16)),
    "qwen2-moe": ("Qwen2Moe", dict(QWEN, shared_expert_intermediate_size=80)),
    "qwen2-moe-norm": ("Qwen2Moe", dict(QWEN, shared_expert_intermediate_size=40, norm_topk_prob=True, qkv_bias=False)),
    "qwen3-moe": ("Qwen3Moe", dict(QWEN, norm_topk_prob=True, head_dim=16)),
    "qwen3-moe-some": ("Qwen3Moe", dict(QWEN, decoder_sparse_step=2, num_experts_per_tok=1)),
    "qwen3-moe-first": ("Qwen3Moe", dict(QWEN, mlp_only_layers=[0])),
    "olmoe": ("Olmoe", dict(SIZES, num_experts=6, num_experts_per_tok=2)),
    "olmoe-norm": ("Olmoe", dict(SIZES, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True)),
}


def saved(folder, kind, settings):
    tf = package("transformers")
    torch.manual_seed(0)
    theirs = getattr(tf, kind + "ForCausalLM")(getattr(tf, kind + "Config")(**settings)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_text_equal_transformers_and_the_way_back(tmp_path, name):
    theirs = saved(tmp_path / "theirs", *MODELS[name])
    ours = GPT.from_pretrained(tmp_path / "theirs").eval()
    with torch.no_grad():
        logits = theirs(TOKENS).logits
        assert (ours(TOKENS)[0] - logits).abs().max() < 1e-4
        expected = theirs.generate(TOKENS[:, :10], attention_mask=torch.ones(2, 10), max_new_tokens=15, do_sample=False,
                                   pad_token_id=0, eos_token_id=None)
    tokens, _ = ours.generate(TOKENS[:, :10].tolist(), 15, temperature=0)
    assert [list(row) for row in tokens] == expected[:, 10:].tolist()
    M.save_hf(tmp_path / "ours", ours)
    again = package("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert type(again) is type(theirs) and (again(TOKENS).logits - logits).abs().max() < 1e-4


@pytest.mark.parametrize("k", [2, 3])
def test_a_layer_is_mixtrals_block_and_the_loss_its_loss(tmp_path, k):
    theirs = saved(tmp_path, "Mixtral", dict(SIZES, num_local_experts=6, num_experts_per_tok=k))
    layer = moe.layers(GPT.from_pretrained(tmp_path))[1]
    block = theirs.model.layers[1].mlp
    x = torch.randn(3, 20, 48, generator=torch.Generator().manual_seed(0))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = layer(a), block(b)
    assert (ya - yb).abs().max() < 1e-6
    weight = torch.randn(48, generator=torch.Generator().manual_seed(1))
    (ya * weight).sum().backward()
    (yb * weight).sum().backward()
    assert (a.grad - b.grad).abs().max() < 1e-5
    logits = layer.router(x.flatten(0, 1)).detach()
    load_balancing_loss_func = package("transformers.models.mixtral.modeling_mixtral").load_balancing_loss_func
    probs, load = logits.softmax(-1), torch.bincount(logits.topk(k).indices.flatten(), minlength=6).float()
    # theirs of one layer is k when balanced
    assert k * moe.load_balancing_loss(probs, load) == pytest.approx(load_balancing_loss_func((logits,), 6, k).item())


def test_a_model_trained_here_is_exported_to_the_family_that_can_say_it(tmp_path):
    plain = dict(M.LLAMA, vocab_size=300, block_size=64, n_layer=2, n_head=4, n_embd=48, n_hidden=96)
    for settings, kind in ((dict(n_expert=4), "mixtral"),
                           (dict(n_expert=4, expert_hidden=40, moe_every=2, qk_norm=True), "qwen3_moe"),
                           (dict(n_expert=4, router="switch", n_expert_active=1, qk_norm=True), "qwen3_moe"),
                           (dict(n_expert=4, router="gshard"), "mixtral")):
        assert M.to_hf_config(GPTConfig(**plain | settings))[0] == kind
    with pytest.raises(M.BadInput, match="router=sigmoid"):
        M.to_hf_config(GPTConfig(**plain | dict(n_expert=4, router="sigmoid")))
