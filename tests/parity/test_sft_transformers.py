"""Our loss of conversations packed side by side is transformers' loss of the same conversations, one a row."""
import pytest
import torch

import data
import sft
from bpe import Tokenizer, render_chat
from conftest import package
from model import GPT, GPTConfig, init_weights, save_hf

CHATS = [[("user", "the cat?"), ("assistant", "sat on the mat.")],
         [("system", "be short"), ("user", "who?"), ("assistant", "the cat."), ("user", "where?"),
          ("assistant", "on the mat, the cat sat.")],
         [("user", "cat"), ("assistant", "mat")],
         [("user", "the mat the mat the mat the mat"), ("assistant", "the cat the cat the cat")]]
STYLES = {"llama": dict(norm="rmsnorm", act="swiglu", init="gpt2", qk_norm=False, embd_norm=False, n_kv_head=2),
          "gpt2": dict(norm="layernorm", bias=True, tied=True, pos="learned", act="gelu_tanh", init="gpt2",
                       qk_norm=False, embd_norm=False)}


def examples(tokenizer):
    out = []
    for chat in CHATS * 3:
        ids, mask = render_chat(tokenizer, [{"role": role, "content": text} for role, text in chat])
        out.append((torch.tensor(ids).numpy(), torch.tensor(mask).numpy()))
    return out


def transformers_loss(model, chats):
    """Token-weighted mean, as a batch of one row each with labels of -100 would have it, and its gradient."""
    total = sum(int(mask[1:].sum()) for _, mask in chats)
    for ids, mask in chats:
        ids, mask = torch.tensor(ids)[None], torch.tensor(mask)[None]
        out = model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100))
        (out.loss * int(mask[:, 1:].sum()) / total).backward()
    losses = 0.0
    with torch.no_grad():
        for ids, mask in chats:
            ids, mask = torch.tensor(ids)[None], torch.tensor(mask)[None]
            mean = model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss
            losses += mean * int(mask[:, 1:].sum()) / total
    return losses


@pytest.mark.parametrize("style", STYLES)
def test_packed_and_masked_equals_transformers_unpacked_with_its_gradient(style, tmp_path):
    package("transformers")
    from transformers import AutoModelForCausalLM
    tokenizer = Tokenizer.train(["the cat sat on the mat, be short who? where? " * 20], 270)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, block_size=96, n_embd=32, n_layer=2, n_head=4, **STYLES[style]))
    init_weights(model)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    save_hf(tmp_path, model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    chats = examples(tokenizer)
    expected = transformers_loss(theirs, chats)

    rows = data.pack([len(ids) - 1 for ids, _ in chats], 96)
    assert len(rows) < len(chats)
    model.loss = sft.asked_cross_entropy
    batch = sft.to_device(data.lay_out(chats, rows, 96), True, "cpu")
    _, loss = model(**batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    grad = theirs.get_output_embeddings().weight.grad
    torch.testing.assert_close(model.head_weight.grad[:tokenizer.n_vocab], grad, rtol=1e-4, atol=1e-6)


def test_smollm2_packed_equals_transformers_unpacked(smollm2):
    package("transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = Tokenizer.from_pretrained(smollm2)
    chats = examples(tokenizer)[:4]
    for (ids, _), chat in zip(chats, CHATS):  # the template is theirs
        messages = [{"role": role, "content": text} for role, text in chat]
        assert ids.tolist() == AutoTokenizer.from_pretrained(smollm2).apply_chat_template(messages, return_dict=False)
    with torch.no_grad():
        total = sum(int(mask[1:].sum()) for _, mask in chats)
        expected = sum(theirs(input_ids=(i := torch.tensor(ids)[None]),
                              labels=i.masked_fill(torch.tensor(mask)[None] == 0, -100)).loss
                       * int(mask[1:].sum()) / total for ids, mask in chats)
        model = GPT.from_pretrained(smollm2)
        batch = sft.to_device(data.lay_out(chats, data.pack([len(ids) - 1 for ids, _ in chats], 200), 200), True, "cpu")
        torch.testing.assert_close(model(**batch)[1], expected, rtol=1e-5, atol=1e-5)
