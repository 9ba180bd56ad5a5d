"""Models of the transformers package: random ones saved by it and read by us give equal logits, and the way back."""
import json
import lzma
import os
import subprocess
import sys

import pytest
import torch

import model as M
from bpe import BadInput, Tokenizer, chat_stops, render_chat
from conftest import ROOT, need, package
from model import GPT, GPTConfig, KVCache

TOKENS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))

GPT2 = dict(vocab_size=300, n_positions=64, n_embd=48, n_layer=3, n_head=4)
LLAMA = dict(vocab_size=300, max_position_embeddings=64, hidden_size=48, intermediate_size=112, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2)
OPT = dict(vocab_size=300, max_position_embeddings=64, hidden_size=48, ffn_dim=100, num_hidden_layers=3,
           num_attention_heads=4, word_embed_proj_dim=48)
FALCON = dict(vocab_size=300, max_position_embeddings=64, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
              ffn_hidden_size=100)
BLOOM = dict(vocab_size=300, hidden_size=48, n_layer=3, n_head=4, seq_length=64)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-relu": ("GPT2", dict(GPT2, n_inner=100, activation_function="relu", layer_norm_epsilon=1e-3)),
    "gpt1": ("OpenAIGPT", GPT2),
    "llama": ("Llama", LLAMA),
    "llama-theta": ("Llama", dict(LLAMA, rope_theta=500.0, rms_norm_eps=1e-3, attention_bias=True, mlp_bias=True)),
    "llama-mqa": ("Llama", dict(LLAMA, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True)),
    "llama-linear": ("Llama", dict(LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})),
    "llama-yarn": ("Llama", dict(LLAMA, rope_parameters=YARN)),
    "llama-yarn-null": ("Llama", dict(LLAMA, rope_parameters=dict(YARN, factor=None))),
    "llama-yarn-own": ("Llama", dict(LLAMA, rope_parameters=dict(YARN, beta_fast=8.0, beta_slow=2.0,
                                                                 attention_factor=1.5))),
    "llama-3": ("Llama", dict(LLAMA, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", dict(LLAMA, sliding_window=9)),
    "mistral-full": ("Mistral", dict(LLAMA, sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2-window": ("Qwen2", dict(LLAMA, use_sliding_window=True, sliding_window=7, max_window_layers=1,
                                   tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(LLAMA, head_dim=16)),
    "opt": ("OPT", OPT),
    "opt-350m": ("OPT", dict(OPT, do_layer_norm_before=False, word_embed_proj_dim=24)),
    "bloom": ("Bloom", BLOOM),
    "bloom-6": ("Bloom", dict(BLOOM, n_head=6)),
    "falcon": ("Falcon", FALCON),
    "falcon-40b": ("Falcon", dict(FALCON, new_decoder_architecture=True, num_kv_heads=2, bias=True)),
    "falcon-11b": ("Falcon", dict(FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)),
    "falcon-rw": ("Falcon", dict(FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True)),
}


def saved(folder, kind, settings, **how):
    """A random model of theirs with every weight away from its initial value, in eval mode, and its folder."""
    tf = package("transformers")
    torch.manual_seed(0)
    cls = ({"GPT2": tf.GPT2LMHeadModel, "OpenAIGPT": tf.OpenAIGPTLMHeadModel}.get(kind)
           or getattr(tf, kind + "ForCausalLM"))
    theirs = cls(getattr(tf, kind + "Config")(**settings)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    theirs.save_pretrained(folder, **how)
    return theirs


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_text_equal_transformers_and_the_way_back(tmp_path, name):
    theirs = saved(tmp_path / "theirs", *MODELS[name])
    ours = GPT.from_pretrained(tmp_path / "theirs").eval()
    # Falcon rounds its ALiBi biases to bfloat16: there only the texts are equal
    limit = 0.02 if name == "falcon-rw" else 1e-4
    with torch.no_grad():
        logits = theirs(TOKENS).logits
        assert (ours(TOKENS)[0] - logits).abs().max() < limit
        expected = theirs.generate(TOKENS[:, :10], attention_mask=torch.ones(2, 10), max_new_tokens=20, do_sample=False,
                                   eos_token_id=None, pad_token_id=0)[:, 10:]
    assert ours.generate(TOKENS[:, :10], 20, temperature=0)[0] == expected.tolist()

    M.save_hf(tmp_path / "back", ours)
    kind = json.loads((tmp_path / "back" / "config.json").read_text())["model_type"]
    assert kind == {"mistral-full": "llama", "opt": "gpt2"}.get(name, theirs.config.model_type)  # the same network
    back = package("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert (back(TOKENS).logits - logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind", M.FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes_for_it(kind):
    whole = package("transformers").AutoConfig.for_model(kind).to_dict()
    sizes = ("vocab_size", "n_layer", "n_head", "n_embd")
    least = {name: whole[name] for name in ("model_type", *(M.FAMILIES[kind].fields[size] for size in sizes))}
    assert M.canonical(M.from_hf_config(least)) == M.canonical(M.from_hf_config(whole))


@pytest.mark.slow
def test_smollm2_here_is_smollm2_there(smollm2, tmp_path):
    """Losses on 1,024 tokens and the greedy answer, float32 and bf16; exported, transformers computes its logits."""
    tokenizer, ids = Tokenizer.from_pretrained(smollm2), {}
    for name, expected in (("tinyshakespeare.txt", 3.709), ("gutenberg_val.txt.xz", 2.904)):
        with (lzma.open if name.endswith("xz") else open)(need(name), "rt") as f:
            ids[expected] = torch.tensor([tokenizer.encode(f.read(20000))[:1024]])
    prompt, _ = render_chat(tokenizer, [{"role": "user", "content": "What is the capital of France?"}], generation=True)
    for dtype, limit in ((torch.bfloat16, 0.01), (torch.float32, 1e-3)):
        model = GPT.from_pretrained(smollm2, dtype=dtype).eval()
        for expected, x in ids.items():
            with torch.no_grad():
                assert model(x[:, :-1], x[:, 1:])[1].item() == pytest.approx(expected, abs=limit)
        answer = model.generate([prompt], 40, temperature=0, stop=chat_stops(tokenizer))[0][0]
        assert tokenizer.decode(answer) == "The capital of France is Paris."
    M.save_hf(tmp_path / "back", model, tokenizer)
    tf = package("transformers")
    auto, back = tf.AutoTokenizer.from_pretrained(tmp_path / "back"), \
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert auto.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == prompt
    with torch.no_grad():
        assert (back(x[:, :200]).logits - model(x[:, :200])[0]).abs().max() < 1e-4


def test_the_loss_equals_transformers(tmp_path):
    theirs = saved(tmp_path, *MODELS["gpt2"])
    ours = GPT.from_pretrained(tmp_path)
    expected = theirs(TOKENS, labels=TOKENS).loss.item()
    assert ours(TOKENS[:, :-1], TOKENS[:, 1:])[1].item() == pytest.approx(expected, abs=1e-5)


def test_alibi_slopes_and_relative_buckets_equal_transformers():
    package("transformers")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.t5.modeling_t5 import T5Attention
    for n_head in (1, 4, 6, 12, 71, 112):
        alibi = build_alibi_tensor(torch.ones(1, 2), n_head, torch.float32)[:, 0, 1]
        assert torch.allclose(M.alibi_slopes(n_head), alibi)
    distance = torch.arange(300)
    theirs = T5Attention._relative_position_bucket(-distance, bidirectional=False, num_buckets=32, max_distance=128)
    assert torch.equal(M.t5_bucket(distance), theirs)


def test_sharded_weights_are_read_and_written(tmp_path):
    theirs = saved(tmp_path / "theirs", *MODELS["llama"], max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = GPT.from_pretrained(tmp_path / "theirs")
    logits = theirs(TOKENS).logits
    assert (ours(TOKENS)[0] - logits).abs().max() < 1e-4
    M.save_hf(tmp_path / "back", ours, shard_bytes=1e5)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    back = package("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert (back(TOKENS).logits - logits).abs().max() < 1e-4
    next((tmp_path / "back").glob("model-00002*")).unlink()
    with pytest.raises(BadInput, match="lacks model-00002-of"):
        GPT.from_pretrained(tmp_path / "back")


def test_files_without_the_first_word_of_their_names_are_read(tmp_path):
    """GPT-2's own file on the hub has wte where the package writes transformer.wte."""
    theirs = saved(tmp_path, *MODELS["gpt2"])
    theirs.transformer.save_pretrained(tmp_path)
    assert (GPT.from_pretrained(tmp_path)(TOKENS)[0] - theirs(TOKENS).logits).abs().max() < 1e-4


def test_import_and_export_carry_the_tokenizer_and_its_chat_template(tmp_path):
    saved(tmp_path / "theirs", "Llama", dict(LLAMA, vocab_size=320, tie_word_embeddings=True))
    tokenizer = Tokenizer.train(["a few words, and a few words more " * 9], 270)
    tokenizer.chat = {"template": "chatml", "system": "You are brief."}
    tokenizer.export(tmp_path / "theirs")

    def run(*args):
        return subprocess.run([sys.executable, ROOT / "model.py", *args], capture_output=True, text=True, check=True,
                              cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})

    run("import", "theirs", "--out", "run")
    assert Tokenizer.load(tmp_path / "run").chat == tokenizer.chat
    run("export", "run", "--out", "back", "--dtype", "bfloat16")
    auto = package("transformers").AutoTokenizer.from_pretrained(tmp_path / "back")
    text = "a few more words"
    assert auto.encode(text) == tokenizer.encode(text)
    chat = auto.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    assert chat == f"<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n"
    model = package("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    ours = GPT.from_pretrained(tmp_path / "run", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert (model(TOKENS).logits.float() - ours(TOKENS)[0]).abs().max() < 0.2


@pytest.mark.parametrize("settings, words", [
    (dict(), "qk_norm=True"), (dict(M.LLAMA, pos="t5"), "pos=t5"),
    (dict(M.GPT2, attn="strided", window=3), "attn_kinds"), (dict(M.LLAMA, scalar_head=True), "scalar_head=True"),
    (dict(M.LLAMA, softcap=30.0), "softcap=30.0")])
def test_a_model_that_no_family_can_say_is_not_exported(tmp_path, settings, words):
    with pytest.raises(BadInput, match=words):
        M.save_hf(tmp_path / "hf", GPT(GPTConfig(**settings)))
    assert not (tmp_path / "hf").exists()


def rewrite(folder, change):
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(hf)))


@pytest.mark.parametrize("change, words", [
    (lambda hf: {"model_type": "mamba"}, "mamba"), (lambda hf: [], "config.json"),
    (lambda hf: hf | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    (lambda hf: hf | {"hidden_act": "tanh"}, "hidden_act 'tanh'"),
    (lambda hf: hf | {"hidden_size": "wide"}, "whole number"),
    (lambda hf: {k: v for k, v in hf.items() if k != "num_attention_heads"}, "field|n_head|shape"),
    (lambda hf: hf | {"intermediate_size": 111}, "shape"), (lambda hf: hf | {"num_hidden_layers": 4}, "no tensor"),
    (lambda hf: hf | {"num_hidden_layers": 2}, "does not explain"), (lambda hf: hf | {"vocab_size": 301}, "301 ids"),
    (lambda hf: hf | {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}, "no tensor")])
def test_a_folder_that_is_not_what_it_says_is_refused(tmp_path, change, words):
    saved(tmp_path, *MODELS["llama"])
    rewrite(tmp_path, change)
    with pytest.raises(BadInput, match=words):
        GPT.from_pretrained(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    saved(tmp_path, *MODELS["llama"])
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(BadInput, match="never read"):
        GPT.from_pretrained(tmp_path)


def test_cache_and_bf16_agree_with_the_whole_forward(tmp_path):
    saved(tmp_path, *MODELS["qwen3"])
    ours = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    full, cache = ours(TOKENS)[0], KVCache(ours.config, 2, 64, dtype=torch.bfloat16)
    steps = torch.cat([ours(TOKENS[:, t:t + 1], cache=cache)[0] for t in range(40)], 1)
    assert (steps - full).abs().max() < 0.05 * full.abs().max()
