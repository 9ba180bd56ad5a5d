"""GPT-2 and LLaMA of the transformers package: random models, saved by it, read by us, give equal logits."""
import pytest
import torch

from bpe import BadInput
from conftest import package
from model import GPT

TOKENS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))


def saved(tmp_path, kind, **settings):
    """A random model of theirs with every weight away from its initial value, in eval mode, and its folder."""
    tf = package("transformers")
    torch.manual_seed(0)
    config = {"gpt2": tf.GPT2Config, "llama": tf.LlamaConfig}[kind](**settings)
    theirs = {"gpt2": tf.GPT2LMHeadModel, "llama": tf.LlamaForCausalLM}[kind](config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    theirs.save_pretrained(tmp_path)
    return theirs


GPT2 = dict(vocab_size=300, n_positions=64, n_embd=48, n_layer=3, n_head=4)
LLAMA = dict(vocab_size=300, max_position_embeddings=64, hidden_size=48, intermediate_size=112, num_hidden_layers=3,
             num_attention_heads=4)


@pytest.mark.parametrize("kind, settings", [
    ("gpt2", GPT2), ("gpt2", dict(GPT2, n_inner=100, activation_function="relu", layer_norm_epsilon=1e-3)),
    ("llama", LLAMA), ("llama", dict(LLAMA, num_key_value_heads=2, rope_theta=500.0, rms_norm_eps=1e-3)),
    ("llama", dict(LLAMA, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True))])
def test_logits_and_greedy_text_equal_transformers(tmp_path, kind, settings):
    theirs = saved(tmp_path, kind, **settings)
    ours = GPT.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert (ours(TOKENS)[0] - theirs(TOKENS).logits).abs().max() < 1e-4
        expected = theirs.generate(TOKENS[:, :10], attention_mask=torch.ones(2, 10), max_new_tokens=20, do_sample=False,
                                   eos_token_id=None, pad_token_id=0)[:, 10:]
    assert ours.generate(TOKENS[:, :10], 20, temperature=0)[0] == expected.tolist()


def test_the_loss_equals_transformers(tmp_path):
    theirs = saved(tmp_path, "gpt2", **GPT2)
    ours = GPT.from_pretrained(tmp_path)
    expected = theirs(TOKENS, labels=TOKENS).loss.item()
    assert ours(TOKENS[:, :-1], TOKENS[:, 1:])[1].item() == pytest.approx(expected, abs=1e-5)


def test_what_we_cannot_be_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(BadInput, match="mamba"):
        GPT.from_pretrained(tmp_path)
