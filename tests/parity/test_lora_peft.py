"""Each method that PEFT has computes what PEFT computes, forward and backward, and its folders go both ways."""
import json

import pytest
import torch

import lora
from bpe import BadInput
from conftest import package
from model import GPT, load_hf, save_hf
from model import GPTConfig, init_weights

STYLES = {
    "llama": dict(norm="rmsnorm", act="swiglu", init="gpt2", qk_norm=False, embd_norm=False, n_kv_head=2),
    "gpt2": dict(norm="layernorm", bias=True, tied=True, pos="learned", act="gelu_tanh", init="gpt2", qk_norm=False,
                 embd_norm=False),
}
SIZES = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=96, block_size=64)


@pytest.fixture(scope="module")
def peft():
    package("transformers")
    return package("peft")


@pytest.fixture(scope="module", params=STYLES)
def style(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """style -> a Hugging Face folder with weights that are not small."""
    out = {}
    for style, config in STYLES.items():
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SIZES | config))
        init_weights(model)
        for p in model.parameters():
            p.data.add_(torch.randn_like(p) * 0.1)
        out[style] = tmp_path_factory.mktemp(style)
        save_hf(out[style], model)
    return out


def theirs(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def shake(module, seed=1):
    """Trained numbers that are not zero, as if trained."""
    torch.manual_seed(seed)
    for p in module.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.1)


def ids_and_targets():
    torch.manual_seed(2)
    idx = torch.randint(0, 96, (3, 17))
    targets = idx.roll(-1, 1)
    targets[:, -1] = -100
    targets[:, :5] = -100
    return idx, targets


def compare(ours, model, virtual=0):
    """Logits, loss and the gradients' norm; returns (ours, theirs) gradients by sum over all trained numbers."""
    idx, targets = ids_and_targets()
    labels = idx.masked_fill(targets.roll(1, 1) == -100, -100)
    out = model(idx, labels=labels, attention_mask=torch.ones_like(idx))
    logits = out.logits[:, -idx.shape[1]:]
    assert (ours(idx)[0] - logits).abs().max() < 1e-5 * logits.abs().max()
    loss = ours(idx, targets)[1]
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    out.loss.backward()


def grads(model, part):
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad and part in n}


LORA = {
    "lora": (dict(), lora.Adapter("lora", lora_rank=4, lora_alpha=12, lora_targets="{}")),
    "rslora": (dict(use_rslora=True), lora.Adapter("lora", lora_rank=4, lora_alpha=12, rslora=True, lora_targets="{}")),
    "dora": (dict(use_dora=True), lora.Adapter("dora", lora_rank=4, lora_alpha=12, lora_targets="{}")),
}


def with_peft(peft, folder, config):
    model = peft.get_peft_model(theirs(folder), config)
    shake(model)
    return model


@pytest.mark.parametrize("kind", LORA)
def test_lora_rslora_and_dora_equal_peft_and_load_here_and_back(peft, folders, style, kind, tmp_path):
    extra, _ = LORA[kind]
    targets = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
               "gpt2": ["c_fc", "mlp.c_proj"] + ["c_attn"] * (kind == "lora")}[style]
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, fan_in_fan_out=style == "gpt2", **extra)
    model = with_peft(peft, folders[style], config)
    model.save_pretrained(tmp_path / "theirs")
    ours = lora.load(tmp_path / "theirs", base=folders[style])
    idx, targets = ids_and_targets()
    compare(ours, model)
    if style == "llama":  # the same numbers lie in the same places
        back = {n.replace(".default", "").removeprefix("base_model.model."): p.grad for n, p in model.named_parameters()
                if p.grad is not None}
        for name, place in (("blocks.1.mlp.up", "model.layers.1.mlp.up_proj"),
                            ("blocks.0.attn.q", "model.layers.0.self_attn.q_proj")):
            m = ours.get_submodule(name)
            torch.testing.assert_close(m.lora_A.grad, back[f"{place}.lora_A.weight"], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(m.lora_B.grad, back[f"{place}.lora_B.weight"], rtol=1e-4, atol=1e-6)
            if kind == "dora":
                torch.testing.assert_close(m.lora_m.grad, back[f"{place}.lora_magnitude_vector.weight"],
                                           rtol=1e-4, atol=1e-6)
    # and what we write, PEFT reads
    lora.save(tmp_path / "ours", ours, {"stage": "x"}, folders[style])
    again = peft.PeftModel.from_pretrained(theirs(folders[style]), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(idx).logits, model(idx).logits, rtol=1e-4, atol=1e-5)
        merged = model.merge_and_unload()(idx).logits
    lora.merge(ours)
    with torch.no_grad():
        assert (ours(idx)[0] - merged).abs().max() < 1e-5 * merged.abs().max()


def test_trained_embeddings_and_head_go_both_ways(peft, folders, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = with_peft(peft, folders["llama"], config)
    model.save_pretrained(tmp_path / "theirs")
    ours = lora.load(tmp_path / "theirs", base=folders["llama"])
    assert ours.adapter.train_embeddings
    compare(ours, model)
    lora.save(tmp_path / "ours", ours, {}, folders["llama"])
    again = peft.PeftModel.from_pretrained(theirs(folders["llama"]), tmp_path / "ours").eval()
    idx, _ = ids_and_targets()
    torch.testing.assert_close(again(idx).logits, model(idx).logits, rtol=1e-4, atol=1e-5)


def test_a_lora_of_embedding_and_head_equals_peft(peft, folders, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["embed_tokens", "lm_head"])
    model = with_peft(peft, folders["llama"], config)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    compare(lora.load(tmp_path / "theirs", base=folders["llama"]), model)


def test_adalora_equals_peft_forward_backward_and_in_what_it_prunes(peft, folders, tmp_path):
    config = peft.AdaLoraConfig(init_r=6, target_r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], total_step=12,
                                tinit=2, tfinal=3, deltaT=2, task_type="CAUSAL_LM")
    model = with_peft(peft, folders["llama"], config)
    model.save_pretrained(tmp_path / "theirs")
    ours = lora.load(tmp_path / "theirs", base=folders["llama"])
    idx, targets = ids_and_targets()
    labels = idx.masked_fill(targets.roll(1, 1) == -100, -100)
    allocator = lora.RankAllocator(ours, average=2, steps=12, warm=2, final=3, every=2)
    theirs_opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ours_opt = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    for step in range(12):
        out = model(idx, labels=labels)
        loss = ours(idx, targets)[1] + 0.5 * lora.orthogonality(ours)
        torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-5)
        theirs_opt.zero_grad(), ours_opt.zero_grad()
        out.loss.backward(), loss.backward()
        theirs_opt.step(), ours_opt.step()
        model.base_model.update_and_allocate(step)
        allocator.step(step)
        kept = [(m.lora_E != 0).flatten().tolist() for m in allocator.parts]
        E = {n: p for n, p in model.named_parameters() if "lora_E" in n}
        assert kept == [(p != 0).flatten().tolist() for p in E.values()], step
    assert sum(map(sum, kept)) == 2 * 4


def test_prompt_and_p_tuning_equal_peft(peft, folders, style, tmp_path):
    for config in (peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
                   peft.PromptEncoderConfig(num_virtual_tokens=5, task_type="CAUSAL_LM", encoder_hidden_size=32,
                                            encoder_reparameterization_type="LSTM")):
        model = with_peft(peft, folders[style], config).eval()
        model.save_pretrained(tmp_path / config.peft_type)
        ours = lora.load(tmp_path / config.peft_type, base=folders[style])
        compare(ours, model)
        if config.peft_type == "PROMPT_TUNING":
            their_grad = model.prompt_encoder.default.embedding.weight.grad
            torch.testing.assert_close(ours.virtual.table.grad, their_grad, rtol=1e-4, atol=1e-6)
        else:  # our encoder, with their weights
            ours = GPT.from_pretrained(folders[style])
            lora.apply(ours, lora.Adapter("ptuning", virtual_tokens=5))
            encoder = model.prompt_encoder.default
            ours.virtual.table.data.copy_(encoder.embedding.weight.data)
            ours.virtual.encoder.load_state_dict({n: p for n, p in encoder.state_dict().items()
                                                  if "embedding" not in n})
            model.zero_grad()
            compare(ours.eval(), model)
            torch.testing.assert_close(ours.virtual.encoder.lstm_head.weight_hh_l0.grad,
                                       encoder.lstm_head.weight_hh_l0.grad, rtol=1e-4, atol=1e-7)


def test_prefix_tuning_with_and_without_mlp_equals_peft(peft, folders, style, tmp_path):
    for project in (False, True):
        config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM", prefix_projection=project,
                                         encoder_hidden_size=32)
        model = with_peft(peft, folders[style], config).eval()
        encoder = model.prompt_encoder.default
        if not project:
            model.save_pretrained(tmp_path / "theirs")
            ours = lora.load(tmp_path / "theirs", base=folders[style])
        else:
            ours = GPT.from_pretrained(folders[style])
            lora.apply(ours, lora.Adapter("prefix", virtual_tokens=5))
            ours.virtual.table.data.copy_(encoder.embedding.weight.data)
            ours.virtual.encoder.load_state_dict({n.partition(".")[2]: p for n, p in encoder.state_dict().items()
                                                  if n.startswith("transform")})
        compare(ours.eval(), model)
        torch.testing.assert_close(ours.virtual.table.grad, encoder.embedding.weight.grad, rtol=1e-4, atol=1e-6)
        lora.save(tmp_path / "ours", ours, {}, folders[style])
        again = peft.PeftModel.from_pretrained(theirs(folders[style]), tmp_path / "ours").eval()
        idx, _ = ids_and_targets()
        with torch.no_grad():
            torch.testing.assert_close(again(idx).logits, model(idx).logits, rtol=1e-4, atol=1e-5)


def test_llama_adapter_equals_peft(peft, tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | STYLES["llama"] | dict(n_kv_head=4)))
    init_weights(model)
    save_hf(tmp_path / "base", model)
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    model = with_peft(peft, tmp_path / "base", config).eval()
    model.save_pretrained(tmp_path / "theirs")
    ours = lora.load(tmp_path / "theirs", base=tmp_path / "base")
    compare(ours, model)
    gate = [p.grad for n, p in model.named_parameters() if n.endswith("adaption_gate")]
    torch.testing.assert_close(ours.blocks[1].attn.adapter_gate.grad, gate[0], rtol=1e-4, atol=1e-7)
