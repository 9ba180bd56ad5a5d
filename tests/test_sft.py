"""The tuning room as a specification: what is asked, what shares a row, what is left out, and that a run goes on."""
import json
import math
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import sft
from bpe import BadInput, Tokenizer, render_chat
from conftest import ROOT, call, write_tok512
from data import alpaca, arithmetic, bios, gsm8k, ppt, sharegpt
from model import GPT, GPTConfig, init_weights, linear_cross_entropy, load_safetensors, save_run

TEXT = "the cat sat on the mat. who sat there? nobody, 993-7=986. the dog ran to the town and saw a man. " * 20


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 300)


def make(tokenizer, **more):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, block_size=64, n_embd=32, n_layer=2, n_head=4, **more))
    init_weights(model)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "base"
    save_run(out, make(tokenizer), {"stage": "import", "tokenizer": tokenizer.spec()})
    tokenizer.save(out)
    return out


def chat(*turns):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


CHATS = [chat("who sat?", "the cat."), chat("where?", "on the mat.", "who ran?", "the dog ran to the town."),
         chat("the man?", "nobody saw a man."), chat("993-7=", "986")]


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(*args):
    return sft.get_args(list(map(str, args)))


def tune(*args, check=0):
    """sft.py in this process -> (the metrics of its last line, all that it printed)."""
    out, err = call(sft, "--device", "cpu", *args, check=check)
    assert not check or len(err.strip().splitlines()) == 1
    return json.loads(out.splitlines()[-1]) if not check else {}, out + err


def encoded(tokenizer, rows=CHATS):
    args = flags()
    return [sft.encode("row", row, tokenizer, args) for row in rows]


# What is asked


def test_only_answers_and_the_tokens_that_end_them_are_asked(tokenizer):
    ids, mask = sft.encode("row", CHATS[1], tokenizer, flags())
    said = tokenizer.decode([int(i) for i, m in zip(ids, mask) if m])
    assert said == "on the mat.<|im_end|>the dog ran to the town.<|im_end|>"
    _, everything = sft.encode("row", CHATS[1], tokenizer, flags("--train_on_prompt"))
    assert everything.all()


def test_a_wrong_prompt_target_changes_nothing_and_a_wrong_end_does(tokenizer):
    model, examples = make(tokenizer), encoded(tokenizer)
    model.loss = sft.asked_cross_entropy
    batch = sft.to_device(data.lay_out(examples, [[0, 1, 2, 3]], 160), True, "cpu")
    batch["idx"] = batch["idx"][:, :64]
    batch = {name: t[:, :64] for name, t in batch.items()}
    before = model(**batch)[1]
    end = (batch["targets"] == tokenizer.special["<|im_end|>"]).nonzero()[0]
    batch["targets"][tuple(end)] = 5
    assert model(**batch)[1] != before


def test_rows_of_other_kinds(tokenizer, tmp_path):
    args = flags()
    ids, mask = sft.encode("row", {"prompt": "the cat", "completion": " sat"}, tokenizer, args)
    assert tokenizer.decode(ids.tolist()) == "<|endoftext|>the cat sat<|endoftext|>"
    assert tokenizer.decode(ids[mask == 1].tolist()) == " sat<|endoftext|>"
    write_tok512(tmp_path / "tok.bin")  # whose texts begin with a space
    pieces = Tokenizer.from_pretrained(tmp_path / "tok.bin")
    for completion in (" b", "b"):
        ids, _ = sft.encode("row", {"prompt": "a", "completion": completion}, pieces, args)
        assert pieces.decode(ids[1:-1].tolist()) == "a" + completion
    ids, mask = sft.encode("row", {"text": "the cat"}, tokenizer, args)
    assert tokenizer.decode(ids[mask == 1].tolist()) == "the cat<|endoftext|>"
    ids, _ = sft.encode("row", {"instruction": "Say.", "input": "cat", "output": "mat"}, tokenizer,
                        flags("--template", "alpaca"))
    assert "### Input:\ncat\n" in tokenizer.decode(ids.tolist())
    ids, _ = sft.encode("row", CHATS[0], tokenizer, flags("--system", "be short"))
    assert tokenizer.decode(ids.tolist()).startswith("<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user")


def test_rows_that_teach_nothing_are_counted_by_reason(tokenizer):
    rows = [*CHATS, chat("who?"), chat("who?", "  "), CHATS[0], chat("who?", "the cat " * 60), {"text": ""}]
    left_out = Counter()
    kept = sft.read_examples([("f", r) for r in rows], tokenizer, flags("--long", "drop"), 64, left_out)
    assert len(kept) == 4
    assert left_out == {"without an assistant's turn": 1, "with an empty answer": 1, "that repeat another": 1,
                        "longer than 64 tokens": 1, "with an empty completion": 1}
    cut = sft.read_examples([("f", rows[7])], tokenizer, flags(), 64, left_out)
    assert len(cut[0][0]) == 65 and left_out["cut to 64 tokens"] == 1
    none = sft.read_examples([("f", chat("the cat " * 60, "mat"))], tokenizer, flags(), 64, Counter())
    assert none == []  # nothing of the answer was left
    assert len(sft.read_examples([("f", r) for r in CHATS], tokenizer, flags("--min_answer", 8), 64, Counter())) < 4


def test_near_duplicates_are_found_without_comparing_all_pairs():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 1000, 60) for _ in range(50)]
    texts += [np.r_[texts[7][:-1], 5], np.r_[texts[9], 3]]  # all but the same
    assert sft.near_duplicates([(ids, None) for ids in texts]) == {50, 51}
    template = rng.integers(0, 1000, 400)  # which all have in front
    assert sft.near_duplicates([(np.r_[template, ids], None) for ids in texts]) == {50, 51}
    assert sft.near_duplicates([(texts[0], None)] * 40) == set(range(1, 40))
    for copies, others in ((3, 20), (4, 50), (6, 100), (10, 100)):
        cluster = [rng.integers(0, 1000, 120)] * copies
        cluster = [np.r_[ids[:i], -1, ids[i + 1:]] for i, ids in enumerate(cluster)]
        rows = cluster + [rng.integers(0, 1000, 120) for _ in range(others)]
        assert sft.near_duplicates([(ids, None) for ids in rows]) == set(range(1, copies))


# Rows


def test_packing_keeps_everything_and_fills_rows():
    lengths = np.random.default_rng(0).integers(1, 60, 500).tolist()
    rows = data.pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 64
    assert len(rows) <= 1.06 * math.ceil(sum(lengths) / 64)
    with pytest.raises(ValueError):
        data.pack([65], 64)


@pytest.mark.parametrize("style", (dict(), dict(pos="learned", norm="layernorm", bias=True), dict(pos="alibi")))
def test_packed_loss_and_gradient_equal_those_of_conversations_alone(tokenizer, style):
    examples, results = encoded(tokenizer, CHATS * 2), []
    for rows in (data.pack([len(ids) - 1 for ids, _ in examples], 64), [[i] for i in range(8)]):
        model = make(tokenizer, **style)
        total = 0.0
        model.loss = sft.asked_cross_entropy
        for batch in sft.micro_batches(examples, rows, 2, 64, len(rows) < 8, "cpu"):
            loss = model(**batch, reduction="sum")[1]
            loss.backward()
            total += loss.item()
        results.append((total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (packed, g), (alone, h) = results
    assert packed == pytest.approx(alone, rel=1e-5)
    for name in g:
        torch.testing.assert_close(g[name], h[name], rtol=1e-3, atol=1e-5)


def test_a_conversation_never_sees_its_neighbour(tokenizer):
    model, examples = make(tokenizer), encoded(tokenizer)
    batch = sft.to_device(data.lay_out(examples, [[0, 2]], 64), True, "cpu")
    del batch["targets"]
    with torch.no_grad():
        before = model(**batch)[0]
        first = batch["doc_ids"] == 0
        batch["idx"] = torch.where(first, (batch["idx"] + 7) % 100, batch["idx"])
        after = model(**batch)[0]
    second = batch["doc_ids"] == 1
    assert torch.equal(after[second], before[second]) and not torch.equal(after[first], before[first])


def test_an_epoch_holds_each_example_once_and_a_cap_takes_turns():
    examples = [[(np.arange(n), np.ones(n, int)) for n in np.random.default_rng(s).integers(3, 20, size)]
                for s, size in enumerate((30, 7))]
    epochs = sft.Epochs(examples, 32, 4, True, 0, seed=0)
    seen = Counter(i for step in range(epochs.begins(1)) for row in epochs.at(step)[1] for i in row)
    assert seen == Counter(range(37)) and epochs.at(epochs.begins(1))[0] == 1
    assert epochs.plan(0) != epochs.plan(1)
    capped = sft.Epochs(examples, 32, 4, True, 10, seed=0)
    three = [sorted(i for row in capped.plan(e) for i in row) for e in range(3)]
    assert all(len(e) == 17 and sum(i >= 30 for i in e) == 7 for e in three)
    assert sorted(i for e in three for i in e if i < 30) == list(range(30))


# Losses


def test_skipping_what_is_not_asked_changes_no_loss_and_no_gradient():
    torch.manual_seed(0)
    x, w = torch.randn(50, 16, requires_grad=True), torch.randn(128, 16, requires_grad=True)
    targets = torch.where(torch.rand(50) < 0.5, torch.randint(0, 100, (50,)), -100)
    for reduction in ("mean", "sum", "none"):
        losses = [f(x, w, targets, 100, reduction, 5.0) for f in (linear_cross_entropy, sft.asked_cross_entropy)]
        torch.testing.assert_close(*losses)
        grads = [torch.autograd.grad(loss.sum(), (x, w)) for loss in losses]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b)
    assert sft.asked_cross_entropy(x, w, torch.full((50,), -100), 100, "sum").item() == 0


def test_label_smoothing_is_torchs_without_the_padding_rows():
    torch.manual_seed(0)
    x, w, targets = torch.randn(20, 16), torch.randn(128, 16), torch.randint(0, 100, (20,))
    expected = F.cross_entropy((x @ w.T)[:, :100], targets, label_smoothing=0.1)
    torch.testing.assert_close(sft.asked_cross_entropy(x, w, targets, 100, smooth=0.1), expected)
    with torch.no_grad():  # what validation asks
        plain = F.cross_entropy((x @ w.T)[:, :100], targets)
        torch.testing.assert_close(sft.asked_cross_entropy(x, w, targets, 100, smooth=0.1), plain)


def test_neftune_scales_by_each_conversations_own_length():
    lengths = torch.tensor([[4.0] * 4 + [16.0] * 16])
    noise = sft.neftune_noise((1, 20, 32), lengths, 5.0, torch.Generator().manual_seed(0))
    for part, L in ((noise[0, :4], 4), (noise[0, 4:], 16)):
        bound = 5 / math.sqrt(L * 32)
        assert 0.9 * bound < part.abs().max() <= bound


def test_neftune_does_not_count_padding(tokenizer):
    noise, examples, lengths = sft.Neftune(make(tokenizer), 5.0), encoded(tokenizer), []
    for packing, row in ((True, [[1]]), (False, [[1]])):
        batch = sft.to_device(data.lay_out(examples, row, 64), packing, "cpu")
        noise.set(batch, seed=1)
        lengths.append(noise.lengths[0, 0].item())
    assert lengths[0] == lengths[1] + 1 == len(examples[1][0]) - 1  # the template's last line feed is not asked


def test_neftune_is_noise_in_training_alone(tokenizer):
    model = make(tokenizer)
    noise, examples = sft.Neftune(model, 5.0), encoded(tokenizer)
    batch = sft.to_device(data.lay_out(examples, [[0, 2]], 64), True, "cpu")
    noise.set(batch, seed=1)
    train = model.train()(**batch)[1]
    noise.set(batch, seed=1)
    assert model(**batch)[1] == train != model.eval()(**batch)[1]


def test_lr_auto_is_the_course_notes_example():
    assert sft.auto_lr(5e-5, 2e6, 350, 1, 4e6) == pytest.approx(1.89e-6, rel=1e-3)


# Runs


def test_a_run_learns_and_keeps_its_template(base, tokenizer, tmp_path):
    rows = rows_file(tmp_path / "rows.jsonl", CHATS * 10 + [chat("who?")])
    metrics, text = tune("--init", base, "--data", rows, "--dedup", "none", "--steps", 30, "--batch_tokens", 256,
                         "--out", tmp_path / "out", "--lr", 5e-3, "--eval_every", 10, "--eval_answers", 5,
                         "--system", "be short", "--show", 1, "--neftune", 1, "--label_smoothing", 0.01)
    before = float(text.split("step 0: val_loss ")[1].split()[0])
    assert "1 without an assistant's turn" in text
    assert metrics["val_loss"] < 0.5 * before and 0 <= metrics["accuracy"] <= 1
    saved = Tokenizer.load(tmp_path / "out")
    assert saved.chat == {"template": "chatml", "system": "be short"}
    # generation writes the very chat that was trained on, with no flag given
    ids, _ = render_chat(saved, CHATS[0]["messages"][:1], generation=True)
    trained, _ = sft.encode("row", CHATS[0], tokenizer, flags("--system", "be short"))
    assert trained[:len(ids)].tolist() == ids
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 31)) and log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("extra", ([], ["--lora_rank", 4], ["--optimizer", "adam8bit"]))
def test_a_resumed_run_is_the_same_run(base, tmp_path, extra):
    rows = rows_file(tmp_path / "rows.jsonl", CHATS * 10)
    common = ["--init", base, "--data", rows, "--dedup", "none", "--batch_tokens", 256, "--eval_answers", 0,
              "--eval_every", 0, "--schedule", "constant", *extra]
    tune(*common, "--steps", 8, "--out", tmp_path / "whole")
    tune(*common, "--steps", 4, "--save_every", 4, "--out", tmp_path / "parts")
    tune("--resume", "--steps", 8, "--out", tmp_path / "parts")
    name = "adapter_model.safetensors" if "--lora_rank" in extra else "model.safetensors"
    whole, parts = (load_safetensors(tmp_path / run / name) for run in ("whole", "parts"))
    assert all(torch.equal(t, parts[n]) for n, t in whole.items())


def test_micro_batches_and_padding_do_not_change_a_step(base, tmp_path):
    rows = rows_file(tmp_path / "rows.jsonl", CHATS * 5)
    losses = []
    for i, extra in enumerate((["--micro_batch", 4], ["--micro_batch", 1])):
        tune("--init", base, "--data", rows, "--dedup", "none", "--steps", 3, "--batch_tokens", 256,
             "--eval_answers", 0, "--out", tmp_path / str(i), *extra)
        losses.append([json.loads(line)["loss"] for line in (tmp_path / str(i) / "log.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def held_out_loss(run, rows):
    """Nats a token of the saved model on the rows that training held out."""
    model, tokenizer = GPT.from_pretrained(run), Tokenizer.load(run)
    raw = data.chat_sets(str(rows), None, 0.05)
    val = sft.read_examples(raw[str(rows)]["val"], tokenizer, flags("--data", rows), 60, Counter())
    model.loss, total, count = sft.asked_cross_entropy, 0.0, 0
    with torch.no_grad():
        for batch in sft.micro_batches(val, [[i] for i in range(len(val))], 1, 60, False, "cpu"):
            total += model(**batch, reduction="sum")[1].item()
            count += (batch["targets"] != -100).sum().item()
    return total / count


def test_a_long_prompt_takes_nothing_from_the_answers_beside_it(base, tokenizer):
    model, ask = GPT.from_pretrained(base), lambda text: [{"role": "user", "content": text}]
    short = [ask("who sat?"), ask("where?")]
    expected = sft.answer(model, tokenizer, flags(), short, 12)
    assert sft.answer(model, tokenizer, flags(), [*short, ask("the cat sat on the mat. " * 40)], 12)[:2] == expected


def test_rows_begin_and_end_as_documents_of_the_pretraining_text(tokenizer):
    special = {name: tokenizer.n_vocab + i for i, name in enumerate(("<s>", "</s>"))}
    llama = Tokenizer(tokenizer.kind, tokenizer.ranks, tokenizer.patterns, special, tokenizer.normal)
    ids, mask = sft.encode("f", {"prompt": "the cat", "completion": " sat"}, llama, flags())
    assert ids[0] == special["<s>"] and ids[-1] == special["</s>"] and llama.decode(ids[1:-1]) == "the cat sat"
    assert mask[0] == 0 and mask[-1] == 1 and tokenizer.begin == [tokenizer.eot]


def test_a_sigmoid_routers_biases_go_on_after_a_save_and_back_with_the_best_weights(tokenizer, tmp_path):
    model = make(tokenizer, n_expert=4, router="sigmoid", bias_rate=0.05)
    save_run(tmp_path / "moe", model, {"stage": "import", "tokenizer": tokenizer.spec()})
    tokenizer.save(tmp_path / "moe")
    rows = rows_file(tmp_path / "rows.jsonl", CHATS * 10)
    common = ["--init", tmp_path / "moe", "--data", rows, "--dedup", "none", "--batch_tokens", 256, "--eval_answers", 0,
              "--schedule", "constant", "--warmup", 0]
    tune(*common, "--steps", 8, "--out", tmp_path / "one")
    tune(*common, "--steps", 4, "--save_every", 4, "--out", tmp_path / "two")
    tune("--resume", "--steps", 8, "--out", tmp_path / "two")
    one, two = (GPT.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert one["blocks.0.mlp.router.bias"].abs().sum() > 0
    assert all(torch.allclose(t, two[name], atol=1e-6) for name, t in one.items())
    metrics, text = tune(*common, "--lr", 0.5, "--grad_clip", 0, "--steps", 60, "--eval_every", 5, "--patience", 2,
                         "--out", tmp_path / "best")
    assert "no better" in text
    assert held_out_loss(tmp_path / "best", rows) == pytest.approx(metrics["val_loss"], rel=1e-3)


@pytest.mark.parametrize("method", ([], ["--lora_rank", 8, "--lora_targets", "all,wte", "--relora", 4]))
def test_patience_keeps_the_best_weights(base, tmp_path, method):
    rows = rows_file(tmp_path / "rows.jsonl", CHATS * 5)
    metrics, text = tune("--init", base, "--data", rows, "--dedup", "none", "--steps", 60, "--batch_tokens", 256,
                         "--lr", 0.2, "--schedule", "constant", "--warmup", 0, "--grad_clip", 0, "--eval_every", 5,
                         "--patience", 2, "--out", tmp_path / "out", "--eval_answers", 0, *method)
    seen = [float(line.split("val_loss ")[1].split()[0]) for line in text.splitlines()
            if line.startswith("step ") and "val_loss" in line]
    assert "no better for 2 validations" in text and metrics["val_loss"] == pytest.approx(min(seen[1:]), abs=1e-4)
    assert held_out_loss(tmp_path / "out", rows) == pytest.approx(metrics["val_loss"], rel=1e-3)


@pytest.mark.parametrize("method", ("lora", "adalora", "prefix", "serial"))
def test_an_adapters_run_is_small_and_answers_like_the_tuned_model(base, tmp_path, method):
    rows = rows_file(tmp_path / "rows.jsonl", CHATS * 10)
    metrics, _ = tune("--init", base, "--data", rows, "--dedup", "none", "--steps", 12, "--batch_tokens", 256,
                      "--tune", method, "--virtual_tokens", 4, "--out", tmp_path / "out", "--lr", 1e-2,
                      "--eval_answers", 4)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert held_out_loss(tmp_path / "out", rows) == pytest.approx(metrics["val_loss"], rel=1e-3)


def test_relora_saves_a_whole_model(base, tmp_path):
    rows = rows_file(tmp_path / "rows.jsonl", CHATS * 10)
    tune("--init", base, "--data", rows, "--dedup", "none", "--steps", 9, "--batch_tokens", 256, "--lora_rank", 2,
         "--relora", 3, "--out", tmp_path / "out", "--eval_answers", 0, "--warmup", 1)
    tuned, start = GPT.from_pretrained(tmp_path / "out"), GPT.from_pretrained(base)
    delta = tuned.blocks[0].attn.q.weight - start.blocks[0].attn.q.weight
    assert tuned.adapter is None and torch.linalg.matrix_rank(delta, rtol=1e-3) > 2  # three times rank 2


def test_pretraining_text_is_mixed_in_by_rows(base, tokenizer, tmp_path, monkeypatch):
    rows = rows_file(tmp_path / "rows.jsonl", CHATS * 10)
    (tmp_path / "book.txt").write_text(TEXT * 3)
    folders = data.prepare("text", tokenizer, input=tmp_path / "book.txt", root=tmp_path / "corpora")[0]
    monkeypatch.setattr(data, "prepared", lambda *args: folders)
    tune("--init", base, "--data", rows, "--dedup", "none", "--steps", 3, "--batch_tokens", 512, "--mix", "text",
         "--mix_share", 0.25, "--out", tmp_path / "out", "--eval_answers", 0)
    line = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])
    assert line["mix_loss"] > 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["args"]["mix"] == "text"


@pytest.mark.parametrize("layout", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow),
                                    pytest.param("zero1", marks=pytest.mark.slow)])
def test_two_processes_are_one_run(base, tmp_path, layout):
    rows = rows_file(tmp_path / "rows.jsonl", CHATS * 10)
    common = ["--init", base, "--data", rows, "--dedup", "none", "--steps", 3, "--batch_tokens", 256,
              "--eval_answers", 0, "--device", "cpu"]
    tune(*common, "--out", tmp_path / "one")
    env = dict(os.environ, OMP_NUM_THREADS="1")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                    str(ROOT / "sft.py"), *map(str, common), "--parallel", layout, "--out", str(tmp_path / "two")],
                   check=True, env=env, capture_output=True)
    one, two = ([json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
                for run in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


# Classification


def labelled(tmp_path, kind):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(120):
        a, b = ("cat mat sat", "dog ran town")[rng.integers(2)], ("cat mat sat", "dog ran town")[rng.integers(2)]
        same = "same" if a == b else "other"
        rows.append({"text": {"text": a, "label": a[:3]}, "entailment": {"premise": a, "hypothesis": b, "label": same},
                     "similarity": {"text_a": a, "text_b": b, "label": same},
                     "choice": {"context": a, "choices": ["cat mat", "dog ran"], "answer": int(a[0] == "d")}}[kind])
    return rows_file(tmp_path / f"{kind}.jsonl", rows)


@pytest.mark.parametrize("kind", ("text", "entailment", "similarity", "choice"))
def test_gpt1s_four_inputs_are_learned(base, tmp_path, kind):
    metrics, text = tune("--task", "classify", "--init", base, "--data", labelled(tmp_path, kind), "--steps", 40,
                         "--lr", 3e-3, "--batch_tokens", 512, "--out", tmp_path / "out", "--val", 0.2)
    assert kind in text and metrics["accuracy"] >= 0.9
    assert GPT.from_pretrained(tmp_path / "out").class_head is not None


def test_similarity_does_not_know_which_text_came_first(tokenizer):
    model = make(tokenizer, n_class=2)
    rows = [("f", {"text_a": "cat", "text_b": "dog ran", "label": "x"}),
            ("f", {"text_a": "dog ran", "text_b": "cat", "label": "y"})]
    examples, labels, kind = sft.read_labelled(rows, tokenizer, 64)
    logits = sft.class_logits(model, [texts for texts, _ in examples], kind)[0]
    torch.testing.assert_close(logits[0], logits[1])
    assert labels == ["x", "y"] and examples[0][1] == 0


def test_the_auxiliary_loss_is_the_texts_own(tokenizer):
    model = make(tokenizer, n_class=2)
    rows = [("f", {"text": "the cat sat", "label": "a"}), ("f", {"text": "dog", "label": "b"})]
    examples, _, kind = sft.read_labelled(rows, tokenizer, 64)
    texts, labels = zip(*examples)
    both, alone = (sft.classifier_loss(model, texts, labels, kind, aux) for aux in (0.5, 0.0))
    nats = [-model(torch.tensor([t[0]]))[0].log_softmax(-1)[0, :-1].gather(1, torch.tensor(t[0])[1:, None])
            for t in texts]
    torch.testing.assert_close(both - alone, 0.5 * torch.cat(nats).mean())


# Data


def test_self_instruct_asks_reads_and_keeps_what_is_new():
    seeds = [{"instruction": f"Name {i} kinds of trees that grow here.", "input": "", "output": "Oak."}
             for i in range(5)]
    text = alpaca.prompt(seeds, [{"instruction": "Sort the words.", "input": "b a", "output": "a b"}])
    assert text.count("###") == 4 and text.endswith("4. Instruction:") and "Input: b a" in text
    answer = (" Translate the sentence into French please.\n4. Input: the cat\n4. Output: le chat\n###\n"
              "5. Instruction: Draw a picture of a very old tree.\n5. Input: none\n5. Output: ...\n###\n"
              "6. Instruction: Name 3 kinds of trees that grow here.\n6. Input: none\n6. Output: Elm.\n###\n"
              "7. Instruction: Explain why the")
    tasks = alpaca.parse(answer)
    assert [t["output"] for t in tasks] == ["le chat", "...", "Elm."] and tasks[1]["input"] == ""
    assert [t["output"] for t in alpaca.novel(tasks, seeds)] == ["le chat"]
    assert alpaca.longest_common("the cat sat".split(), "the old cat".split()) == 2


def test_readers(tmp_path):
    _, answer = gsm8k.messages({"question": "q", "answer": "48/2 = <<48/2=24>>24\n#### 24"})
    assert answer["content"] == "48/2 = 24\n#### 24"
    row = {"conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "q"},
                             {"from": "gpt", "value": "a"}]}
    assert [m["role"] for m in sharegpt.messages(row)] == ["user", "assistant"]
    with pytest.raises(BadInput, match="'tool' is unknown"):
        sharegpt.messages({"conversations": [{"from": "tool", "value": "x"}]})
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}]))
    (where, row), = data.read_chats(tmp_path / "rows.json")
    assert data.conversation(row)["messages"][1]["content"] == "b" and where.endswith("row 1")
    (tmp_path / "book.txt").write_text(
        "The cat sat on the mat today. It was very old and grey. Nobody saw it at all there. " * 9)
    asked = list(ppt.chats("train", tmp_path / "book.txt"))
    assert Counter(r["messages"][1]["content"] for r in asked).keys() == {"yes", "no", "maybe"}


def test_questions_about_held_out_people_are_not_in_the_training_rows():
    train, val = ([r["messages"] for r in bios.chats(split)] for split in ("train", "val"))
    names = [p.name for p in bios.people(100)]
    of = lambda rows: {n for n in names for m in rows if n in m[0]["content"]}
    assert len(of(train)) == len(of(val)) == 50 and not of(train) & of(val)
    assert all(m[1]["content"].startswith("This person ") for m in train)
    short = [r["messages"] for r in bios.chats("val", "short")]
    assert all(s[1]["content"] in m[1]["content"] for s, m in zip(short, val))
    sums = [{r["messages"][0]["content"] if "messages" in r else r["prompt"] for r in arithmetic.chats(s)}
            for s in ("train", "val")]
    assert not sums[0] & sums[1] and len(sums[0]) == 2000


def test_a_share_of_a_file_is_held_out_and_never_trained(tmp_path):
    rows = rows_file(tmp_path / "rows.jsonl", [chat(f"{i}?", str(i)) for i in range(40)])
    sets = data.chat_sets(str(rows), None, 0.1)[str(rows)]
    assert len(sets["val"]) == 4 and len(sets["train"]) == 36
    assert not {w for w, _ in sets["val"]} & {w for w, _ in sets["train"]}


def test_an_answer_is_right_letter_by_letter_or_by_its_number():
    assert data.is_right(" 986 ", "986") and not data.is_right("9860", "986")
    assert data.is_right("so\n#### 1,024.", "x\n#### 1024") and not data.is_right("#### 10", "#### 1024")


# Bad input: one sentence, exit status 2


@pytest.mark.parametrize("rows, flags_, message", [
    ("{broken\n", [], "line 1"),
    (json.dumps(chat("who?")) + "\n", [], "without an assistant's turn"),
    (json.dumps(chat("who?", "")) + "\n", [], "with an empty answer"),
    (json.dumps({"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]}) + "\n",
     [], "'wizard'"),
    (json.dumps({"colour": "red"}) + "\n", [], "colour"),
    (json.dumps(chat("who?", "cat " * 90)) + "\n", ["--long", "drop"], "longer than 64"),
    (json.dumps(CHATS[0]) + "\n", ["--lr", "fast"], "--lr fast"),
    (json.dumps(CHATS[0]) + "\n", ["--block_size", 999], "--block_size 999"),
    (json.dumps(CHATS[0]) + "\n", ["--batch_tokens", 10], "--batch_tokens 10"),
    (json.dumps(CHATS[0]) + "\n", ["--quantize", "nf4", "--tune", "full"], "--quantize nf4"),
    (json.dumps(CHATS[0]) + "\n", ["--relora", 5], "--relora"),
    (json.dumps(CHATS[0]) + "\n", ["--mix", "bios", "--batch_tokens", 64], "--mix bios"),
    (json.dumps(CHATS[0]) + "\n", ["--template", "llama2"], "--template llama2"),
    (json.dumps(CHATS[0]) + "\n", ["--lora_targets", "query", "--lora_rank", 4], "query"),
    (json.dumps(CHATS[0]) + "\n", ["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (json.dumps(CHATS[0]) + "\n", ["--init", "nowhere/at/all"], "nowhere"),
    (json.dumps(CHATS[0]) + "\n", ["--resume"], "--resume"),
    (json.dumps(CHATS[0]) + "\n", ["--out", "BASE"], "take the place"),
    (json.dumps({"text_a": "x", "label": "y"}) + "\n", ["--task", "classify"], "line 1"),
    (json.dumps({"text": "x", "label": "y"}) + "\n", ["--task", "classify", "--patience", 3], "no use for --patience"),
])
def test_bad_input_is_one_sentence(base, tmp_path, rows, flags_, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    flags_ = [base if flag == "BASE" else flag for flag in flags_]
    _, text = tune("--init", base, "--data", path, "--steps", 2, "--batch_tokens", 256, "--out", tmp_path / "out",
                   *flags_, check=2)
    assert message in text.splitlines()[-1]


def test_numbers_are_read_where_evaluation_reads_them():
    assert not data.is_right("She bought 3 bags of 4, so 12 apples", "#### 3")
    assert data.is_right("She bought 3 bags of 4, so 12 apples", "#### 12")
    assert not data.is_right("nothing", "#### 12")


def test_only_calculators_notes_are_taken_out_of_an_answer():
    row = {"question": "C++?", "answer": "cin >> a; cout << a << b; x = y >> 2; 2*3=<<2*3=6>>6"}
    assert data.conversation(row)["messages"][-1]["content"] == "cin >> a; cout << a << b; x = y >> 2; 2*3=6"
