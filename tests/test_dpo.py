"""The preference room as a specification: losses against trl and their optimum, packing, batches, the script."""
import json
import math
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import dpo
import lora
from bpe import BadInput, Tokenizer
from conftest import ROOT, need
from data import addition, tastes
from model import GPT, GPTConfig, Process, init_weights, load_run, save_run, sequence_logprobs, token_logprobs
from parity import oracle_dpo as oracle

CPU = Process(torch.device("cpu"), 0, 1)


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**changes):
    config = dict(block_size=32, vocab_size=20, n_layer=2, n_head=2, n_embd=32, init="gpt2")
    model = GPT(GPTConfig(**config | changes))
    init_weights(model, scale=3)
    return model


def some_groups(n=6, seed=0, responses=2):
    rng = random.Random(seed)
    ids = lambda most: [rng.randrange(20) for _ in range(rng.randint(1, most))]
    return [(ids(9), [ids(7) for _ in range(responses)]) for _ in range(n)]


def tensors(packed):
    return [torch.from_numpy(a) for a in packed[:5]]


def packed_logprobs(model, groups, T=32, **how):
    packed = data.pack_branches(groups, T, **how)
    idx, targets, positions, doc_ids, segments = tensors(packed)
    n = packed.n + (len(groups) if how.get("ask_prompt") else 0)
    return sequence_logprobs(model, idx, targets, segments, n, positions, doc_ids)


def alone(model, prompt, response):
    """The response's log-probability the plain way: one row, a full softmax."""
    ids = torch.tensor([prompt + response])
    logp = model(ids[:, :-1])[0].log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
    return logp[len(prompt) - 1:].sum()


# --- losses


GOLDEN = json.loads(oracle.GOLDEN.read_text())


def ours(name, policy):
    """trl's case `name` by the functions here: the mean loss as a function of per-token log-probabilities (10, 6)."""
    _, ref, mask, mismatched = oracle.inputs()
    n, sums, ref, b = mask.sum(1), policy.sum(1), ref.sum(1), oracle.BETA
    pair = sums[:5], sums[5:], ref[:5], ref[5:]
    per_token = [t / k for t, k in zip(pair, (n[:5], n[5:], n[:5], n[5:]))]
    zero = torch.zeros(5)
    liked = torch.arange(10) < 5
    return {
        "dpo": lambda: dpo.dpo_loss(*pair, b), "cdpo": lambda: dpo.dpo_loss(*pair, b, oracle.EPSILON),
        "robust": lambda: dpo.robust_loss(*pair, b, oracle.EPSILON), "hinge": lambda: dpo.hinge_loss(*pair, b),
        "ipo_sum": lambda: dpo.ipo_loss(*pair, b), "ipo_mean": lambda: dpo.ipo_loss(*per_token, b),
        "dpo_per_token": lambda: dpo.dpo_loss(*per_token, b),
        "dpo_reference_free": lambda: dpo.dpo_loss(*pair[:2], zero, zero, b),
        "dpo_sft": lambda: dpo.dpo_loss(*pair, b) + 0.7 * -policy[:5].sum() / n[:5].sum(),
        "cpo": lambda: dpo.cpo_loss(*pair[:2], b),
        "simpo": lambda: dpo.simpo_loss(*pair[:2], n[:5], n[5:], 2.0, oracle.GAMMA),
        "orpo": lambda: dpo.orpo_loss(*pair[:2], n[:5], n[5:], b),
        "kto": lambda: dpo.kto_loss(sums, ref, liked, dpo.kto_kl(mismatched, zero), b, 1.3, 0.6),
    }[name]().mean()


@pytest.mark.parametrize("version,name", [(v, name) for v, cases in GOLDEN.items() for name in cases])
def test_every_loss_and_its_gradient_are_trls(version, name):
    loss, gradient = oracle.evaluate(lambda policy: ours(name, policy))
    assert abs(loss - GOLDEN[version][name][0]) < 1e-5
    there = torch.tensor(GOLDEN[version][name][1]) * oracle.inputs()[2]  # nothing is asked behind a response's end
    assert (torch.tensor(gradient) * oracle.inputs()[2] - there).abs().max() < 1e-5


def kl(p, q):
    return (p.exp() * (p - torch.as_tensor(q))).sum().item()


@pytest.fixture(scope="module")
def pairs_of_64():
    """A world and all pairs of its answers as the reference draws them, with the chance that the first is preferred."""
    world = tastes.world(0)
    ref, r = torch.from_numpy(world.ref()), torch.from_numpy(world.reward)
    return world, ref, r, (ref[:, None] + ref).exp() * torch.sigmoid(r[:, None] - r)


def test_dpo_reaches_the_gibbs_policy(pairs_of_64):
    world, ref, _, weight = pairs_of_64
    star, _ = world.optimum(0.5)
    assert kl(ref, star) > 1
    logp = dpo.tabular(world, lambda p: (weight * dpo.dpo_loss(p[:, None], p, ref[:, None], ref, 0.5)).sum())
    assert kl(logp, star) < 1e-3


def test_robust_dpo_reaches_it_from_flipped_labels_and_cdpo_does_not(pairs_of_64):
    world, ref, _, weight = pairs_of_64
    star, _ = world.optimum(0.5)
    flipped = 0.8 * weight + 0.2 * weight.T
    robust = dpo.tabular(world, lambda p: (flipped * dpo.robust_loss(p[:, None], p, ref[:, None], ref, 0.5, 0.2)).sum())
    assert kl(robust, star) < 0.01
    cautious = dpo.tabular(world, lambda p: (flipped * dpo.dpo_loss(p[:, None], p, ref[:, None], ref, 0.5, 0.2)).sum())
    assert kl(cautious, star) > 0.1


def test_ipo_reaches_its_own_optimum(pairs_of_64):
    world, ref, r, weight = pairs_of_64
    wins = (torch.sigmoid(r[:, None] - r) * ref.exp()).sum(1)  # p(y is preferred to a draw from the reference)
    own = (ref + wins / 0.5).log_softmax(0)
    logp = dpo.tabular(world, lambda p: (weight * dpo.ipo_loss(p[:, None], p, ref[:, None], ref, 0.5)).sum())
    assert kl(logp, own) < 1e-4


def test_where_policy_and_reference_agree_dpo_is_ln_2_and_every_gradient_is_finite():
    a, b = torch.tensor([-3.0, -50.0]), torch.tensor([-4.0, -1e-7])
    n = torch.tensor([2.0, 3.0])
    args = SimpleNamespace(beta=0.1, label_smoothing=0.1, gamma=0.5, loss="ipo", ipo_normalize="mean",
                           length_normalize=False, weight_liked=1.0, weight_disliked=1.0)
    assert torch.equal(dpo.dpo_loss(a, b, a, b, 0.1), torch.full((2,), math.log(2)))
    for name, method in dpo.METHODS.items():
        w, l = a.clone().requires_grad_(), b.clone().requires_grad_()
        args.loss = name
        method.loss(dpo.Batch(w, l, a, b, n, n, torch.tensor([1.0, 1.0]), torch.tensor(0.0)), args).sum().backward() \
            if name != "sft" else None
        for x in (w, l):
            assert x.grad is None or x.grad.isfinite().all(), name


def test_orpo_is_finite_where_a_response_is_certain():
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.tensor([-1e-7, 0.0, -1e-7, -80.0], dtype=dtype, requires_grad=True)
        l = torch.tensor([-1e-7, -2.0, -80.0, 0.0], dtype=dtype, requires_grad=True)
        loss = dpo.orpo_loss(w, l, 1, 1, 0.1)
        loss.sum().backward()
        assert loss.isfinite().all() and w.grad.isfinite().all() and l.grad.isfinite().all()


def test_log1mexp_against_float64():
    x = torch.tensor([-1e-6, -1e-3, -0.5, -math.log(2), -1.0, -30.0])
    assert torch.allclose(dpo.log1mexp(x).double(), torch.log(-torch.expm1(x.double())), rtol=1e-6)


def test_ktos_z0_is_not_negative_and_takes_no_gradient():
    ratio = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert dpo.kto_kl(ratio, torch.zeros(2)) == 0 and not dpo.kto_kl(-ratio, torch.zeros(2)).requires_grad
    for liked in (torch.tensor([True, True]), torch.tensor([False, False])):  # a batch of one label
        assert dpo.kto_loss(ratio, torch.zeros(2), liked, 0.0, 0.1).isfinite().all()


def test_a_tie_is_half_a_preference_each_way():
    a, b, zero = torch.tensor([-1.0]), torch.tensor([-2.0]), torch.zeros(1)
    both = (dpo.dpo_loss(a, b, zero, zero, 0.3) + dpo.dpo_loss(b, a, zero, zero, 0.3)) / 2
    assert torch.allclose(dpo.dpo_loss(a, b, zero, zero, 0.3, 0.5), both)
    assert dpo.ipo_loss(a, a, zero, zero, 0.3, 0.5) == 0


# --- packed log-probabilities


@pytest.mark.parametrize("pos", ["rope", "learned", "none", "alibi", "t5"])
@pytest.mark.parametrize("share", [True, False])
def test_packed_log_probabilities_are_those_of_each_response_alone(pos, share):
    model, groups = tiny(pos=pos), some_groups()
    if share and pos in ("alibi", "t5"):
        assert not dpo.shares_prompts(model.config)
        return
    expected = torch.stack([alone(model, p, r) for p, rs in groups for r in rs])
    assert torch.allclose(packed_logprobs(model, groups, share=share), expected, atol=2e-5)


def test_shared_prompts_save_tokens_and_gradients_agree():
    model, groups = tiny(), some_groups(4, responses=4)
    rows = {share: data.pack_branches(groups, 32, share).idx.size for share in (True, False)}
    assert rows[True] < rows[False]
    gradients = []
    for share in (True, False):
        model.zero_grad()
        packed_logprobs(model, groups, share=share).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[0].abs().max()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_group_longer_than_a_row_shares_its_prompt_piece_by_piece(rows):
    model, groups = tiny(), some_groups(5, responses=20)
    expected = torch.stack([alone(model, p, r) for p, rs in groups for r in rs])
    assert torch.allclose(packed_logprobs(model, groups), expected, atol=2e-5)
    assert data.pack_branches(groups, 32).idx.size < data.pack_branches(groups, 32, False).idx.size

    parts = data.apart(groups, 32, rows)
    assert [(p, r) for p, rs in parts for r in rs] == [(p, r) for p, rs in groups for r in rs]
    assert len(parts) > len(groups)
    assert torch.allclose(packed_logprobs(model, parts), expected, atol=2e-5)
    for batch in data.micro_batches(parts, 32, rows):
        assert len(data.pack_branches([parts[g] for g in batch], 32).idx) <= rows
    assert data.apart(groups, 512, 1) == groups


def test_padding_changes_nothing():
    model, groups = tiny(block_size=48), some_groups()
    wide = packed_logprobs(model, groups, T=48, steady=True)
    assert torch.allclose(wide, packed_logprobs(model, groups), atol=1e-5)


def test_the_prompt_is_asked_once_and_ignored_by_default():
    model, groups = tiny(), some_groups(3)
    found = packed_logprobs(model, groups, ask_prompt=True)
    assert torch.allclose(found[:6], packed_logprobs(model, groups), atol=1e-5)
    for (prompt, _), logp in zip(groups, found[6:]):
        expected = alone(model, prompt[:1], prompt[1:]) if len(prompt) > 1 else torch.zeros(())
        assert torch.allclose(logp, expected, atol=1e-5)


def test_only_responses_are_targets_and_their_end_is_one():
    prompt, response = [3, 4, 5], [6, 7, 19]  # 19 ends it
    packed = data.pack_branches([(prompt, [response])], 32)
    asked = packed.targets[0] != -100
    assert packed.targets[0][asked].tolist() == response and packed.idx[0].tolist() == [3, 4, 5, 6, 7]
    assert (packed.segments[0] >= 0).tolist() == asked.tolist()


def test_every_micro_batch_fits_and_every_group_comes_once():
    groups = some_groups(40, seed=3)
    parts = list(data.micro_batches(groups, 32, 3))
    assert sorted(g for part in parts for g in part) == list(range(40))
    for part in parts:
        assert len(data.pack_branches([groups[g] for g in part], 32).idx) <= 3
    with pytest.raises(BadInput, match="does not fit into 8"):
        list(data.micro_batches([([1] * 8, [[2] * 4])], 8, 1))


@pytest.mark.parametrize("chunk", [0, 3])
def test_entropy_and_temperature_are_those_of_the_full_softmax(chunk):
    model = tiny(softcap=5.0)
    ids = torch.randint(0, 20, (2, 9))
    targets = ids.roll(-1, 1).masked_fill(torch.arange(9) < 3, -100)
    logp, entropy = token_logprobs(model, model.trunk(ids), targets, temperature=0.7, entropy=True, chunk=chunk)
    full = (model(ids)[0] / 0.7).log_softmax(-1)
    asked = targets != -100
    assert torch.allclose(logp[asked], full.gather(2, targets.clamp(min=0)[..., None])[..., 0][asked], atol=1e-5)
    assert torch.allclose(entropy[asked], -(full.exp() * full).sum(-1)[asked], atol=1e-5)
    assert logp[~asked].abs().sum() == 0


# --- a step


def settings(*flags):
    return dpo.get_args(["--data", "pairs", "--input", "x", "--device", "cpu", *map(str, flags)])


def trainer_of(model, *flags):
    trainer = dpo.Trainer(model, settings(*flags), CPU, 32)
    trainer.rows, trainer.ends = 2, torch.tensor([0])
    return trainer


def some_examples(n=7, kto=False):
    return [dpo.Example(p, rs[:1] if kto else rs, float(i % 2) if kto else 1.0)
            for i, (p, rs) in enumerate(some_groups(n, seed=5))]


def gradient_of(trainer, examples, refs, mismatched):
    """The gradient that a step used, before Adam."""
    kept = {}
    trainer.optimizer.step = lambda: kept.update(
        {n: p.grad.clone() for n, p in trainer.sharded.model.named_parameters() if p.grad is not None})
    line = trainer.step(examples, refs, mismatched)
    return kept, line


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "simpo", "kto", "cpo"])
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(loss):
    kto = loss == "kto"
    examples = some_examples(kto=kto)
    refs = [[-5.0 - i] * len(e.responses) for i, e in enumerate(examples)]
    wrong = [((e.prompt, [examples[i - 1].responses[0]]), [-9.0]) for i, e in enumerate(examples)]
    found = []
    for rows in (1, 50):
        trainer = trainer_of(tiny(), "--loss", loss, "--sft_weight", 0.3, "--grad_clip", 0)
        trainer.rows = rows
        found.append(gradient_of(trainer, examples, refs, wrong))
    assert len(list(data.micro_batches([(e.prompt, e.responses) for e in examples], 32, 1))) > 1
    (a, line), (b, other) = found
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 1e-5 + 1e-4 * a[name].abs().max(), name
    for key in line:
        assert line[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5)


def test_the_first_step_of_dpo_is_at_ln_2_with_no_margin():
    model, examples = tiny(), some_examples()
    trainer = trainer_of(model)
    refs = dpo.sums_of(model, [(e.prompt, e.responses) for e in examples], 32, 2, True)
    line = trainer.step(examples, refs, [None] * len(examples), entropy=True)
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6) and line["margin"] == pytest.approx(0, abs=1e-6)
    assert line["kl"] == pytest.approx(0, abs=1e-5) and line["entropy"] > 0
    expected = [alone(model, e.prompt, e.responses[0]).item() for e in examples]
    assert refs[0][0] != refs[0][1] and math.isfinite(sum(expected))


def test_logged_log_probabilities_are_means_over_the_pairs():
    model, examples = tiny(), some_examples()
    refs = dpo.sums_of(model, [(e.prompt, e.responses) for e in examples], 32, 2, True)
    expected = [sum(alone(model, e.prompt, e.responses[k]).item() for e in examples) / len(examples) for k in (0, 1)]
    line = trainer_of(model).evaluate(examples, refs, None)
    assert [line["logp_chosen"], line["logp_rejected"]] == pytest.approx(expected, abs=1e-4)
    assert line["preferred"] == pytest.approx(sum(a > b for a, b in refs) / len(refs)) and line["accuracy"] == 0.5


def test_the_reference_of_an_adapter_is_the_model_with_it_switched_off():
    model, groups = tiny(), some_groups()
    before = dpo.sums_of(model, groups, 32, 2, True)
    lora.apply(model, lora.Adapter(lora_rank=4, lora_targets="all"), None, 0)
    for name in lora.trained_names(model):
        model.get_parameter(name).data.normal_(std=0.1)
    assert np.abs(np.array(dpo.sums_of(model, groups, 32, 2, True)) - before).max() > 0.01
    with dpo.reference(model, SimpleNamespace(ref=None), "cpu") as ref:
        assert np.allclose(dpo.sums_of(ref, groups, 32, 2, True), before, atol=1e-5)


def test_epochs_take_every_example_once():
    taken = [i for step in range(6) for i in data.batch_indices(10, 5, step, 0)]
    assert sorted(taken[:10]) == list(range(10)) == sorted(taken[10:20]) and taken[:10] != taken[10:20]
    assert sorted(i for step in range(5) for i in data.batch_indices(10, 4, step, 0)) == sorted(list(range(10)) * 2)


def test_ktos_mismatches_answer_other_prompts():
    examples = [dpo.Example([i // 2], [[i]], 1.0) for i in range(20)]
    for example, (prompt, (response,)) in zip(examples, dpo.mismatch(examples, 0, 64)):
        assert prompt == example.prompt and response[0] // 2 != prompt[0]


def test_the_warning_comes_once_and_only_where_the_chosen_keep_falling():
    falling, steady = dpo.Falling(2), dpo.Falling(2)
    said = [falling.sentence(-0.3 * i) for i in range(20)]
    assert sum(map(bool, said)) == 1 and "--sft_weight" in "".join(said)
    assert not any(steady.sentence(-1.0) for _ in range(20))


# --- data


def test_preferences_are_read_in_every_shape():
    user = [{"role": "user", "content": "q"}]
    pair = {"messages": user, "ranked": ["a", "b"], "tie": False, "margin": 0.0}
    bot = lambda text: {"role": "assistant", "content": text}
    for row in ({"prompt": "q", "chosen": "a", "rejected": "b"},
                {"prompt": user, "chosen": [bot("a")], "rejected": bot("b")},
                {"chosen": user + [bot("a")], "rejected": user + [bot("b")]},
                {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
                {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
                 "rejected": {"from": "gpt", "value": "b"}}):
        assert data.preference(row) == pair, row
    assert data.preference({"prompt": "q", "ranked": ["a", "b", "c"], "margin": 2})["margin"] == 2
    unpaired = {"messages": user, "completion": "a", "label": False}
    assert data.preference({"prompt": "q", "completion": "a", "label": False}) == unpaired
    assert data.preference({"messages": user + [bot("a")], "label": 0}) == unpaired


@pytest.mark.parametrize("name,kind,n", [("pref/hh_harmless_base_test.jsonl.gz", "ranked", 2312),
                                         ("pref/lf_dpo_en_demo.json", "ranked", 300),
                                         ("pref/lf_kto_en_demo.json", "completion", 300)])
def test_public_preference_files_are_read_whole(name, kind, n):
    rows = data.read_preferences(need(name), strict=False)
    assert len(rows) == n and all(kind in row and row["messages"][-1]["role"] == "user" for row in rows)


def letters():
    tokenizer = Tokenizer.train([addition.LETTERS + "abc"], 0, kind="char")
    tokenizer.chat = {"template": "plain", "system": None}
    return tokenizer


def row(prompt, chosen, rejected, **more):
    return data.preference({"prompt": prompt, "chosen": chosen, "rejected": rejected, **more})


def test_responses_end_with_the_end_token_and_prompts_are_cut_at_their_front():
    tokenizer, told = letters(), []
    examples = dpo.encode([row("1234567890", "11", "2222")], tokenizer, settings(), 8, told.append)
    (prompt, (chosen, rejected), p), = examples
    assert chosen[-1] == rejected[-1] == tokenizer.eot and tokenizer.decode(chosen[:-1]) == "11" and p == 1
    assert len(prompt) + len(rejected) == 9 and tokenizer.decode(prompt) == "890\n" and "1 prompts cut" in told[0]


def test_pairs_that_agree_once_cut_are_left_out_and_counted():
    told = []
    rows = [row("1=", "2" * 10, "2" * 11), row("1=", "3", "3"), row("1=", "3", "4")]
    assert len(dpo.encode(rows, letters(), settings("--max_response", 6), 32, told.append)) == 1
    assert "2 identical pairs left out" in told[0] and "2 responses cut" in told[0]
    with pytest.raises(BadInput, match="2 identical pairs left out"):
        dpo.encode(rows[:2], letters(), settings("--max_response", 6), 32, told.append)


def test_ties_rankings_and_unpaired_rows():
    tie, ranked = row("1=", "2", "3", tie=True), data.preference({"prompt": "1=", "ranked": ["2", "3", "4"]})
    say = lambda told: None
    assert [e.p for e in dpo.encode([tie], letters(), settings(), 32, say)] == [0.5]
    assert len(dpo.encode([ranked], letters(), settings(), 32, say)) == 3
    assert [e.p for e in dpo.encode([ranked], letters(), settings("--loss", "kto"), 32, say)] == [1, 0] * 3
    unpaired = data.preference({"prompt": "1=", "completion": "2", "label": True})
    with pytest.raises(BadInput, match="use --loss kto"):
        dpo.encode([unpaired], letters(), settings(), 32)
    with pytest.raises(BadInput, match="ties left out"):
        dpo.encode([tie], letters(), settings("--loss", "robust"), 32)


def test_addition_has_ten_thousand_problems_of_which_a_tenth_is_held_out():
    train, val = ({(r["prompt"], r["answer"]) for r in addition.problems(s)} for s in ("train", "val"))
    assert len(train) == 9000 and len(val) == 1000 and not train & val
    assert ("57+68=", "521") in train | val


# --- the script


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with an untrained model of sums, pairs for it, and one more model with another tokenizer."""
    folder = tmp_path_factory.mktemp("dpo")
    tokenizer, other = letters(), Tokenizer.train([addition.LETTERS + "xyz"], 0, kind="char")
    other.chat = tokenizer.chat
    for name, t in (("start", tokenizer), ("other", other)):
        model = GPT(GPTConfig(block_size=24, vocab_size=t.n_vocab, n_layer=1, n_head=2, n_embd=32, init="gpt2"))
        init_weights(model)
        save_run(folder / name, model, {"stage": "start", "step": 0, "metrics": {}, "args": {}, "tokenizer": t.spec()})
        t.save(folder / name)
    rng = random.Random(0)
    rows = [{"prompt": r["prompt"], "chosen": r["answer"], "rejected": f"{rng.randrange(1000):03}"}
            for r in addition.problems("train", 120)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "rows.jsonl").write_text("".join(json.dumps(
        {"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0}) + "\n" for i, r in enumerate(rows)))
    return folder


def here(monkeypatch, world, *flags, out="run", data="pairs"):
    """dpo.py in this process; returns run.json's metrics and the log."""
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--init", str(world / "start"), "--device", "cpu", "--lr", "3e-3",
                                      "--out", str(world / out), "--log_every", "5", *(
                                          ["--data", "pairs", "--input", str(world / f"{data}.jsonl")] if data else []),
                                      *map(str, flags)])
    dpo.main()
    lines = [json.loads(line) for line in (world / out / "log.jsonl").read_text().splitlines()]
    return json.loads((world / out / "run.json").read_text())["metrics"], lines


def test_a_run_learns_the_pairs_and_leaves_a_run(monkeypatch, world, capsys):
    metrics, log = here(monkeypatch, world, "--epochs", 4, "--batch", 16)
    assert metrics["preference_accuracy"] > 0.7 and len(log) == 27
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert {"loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "logp_chosen", "logp_rejected", "kl",
            "length", "eos_rate", "grad_norm", "tokens_per_s"} <= log[0].keys() and "entropy" in log[4]
    assert load_run(world / "run")[1]["stage"] == "dpo"
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == metrics


@pytest.mark.parametrize("loss", [name for name in dpo.METHODS if name != "dpo"])
def test_every_method_lowers_its_loss(monkeypatch, world, loss):
    metrics, log = here(monkeypatch, world, "--loss", loss, "--epochs", 3, "--batch", 16, "--schedule", "constant",
                        data="rows" if loss == "kto" else "pairs")
    assert log[-1]["loss"] < log[0]["loss"]


def test_the_reference_is_computed_once_for_the_same_weights_and_data(monkeypatch, world, capsys):
    here(monkeypatch, world, "--steps", 1, out="a")
    capsys.readouterr()
    here(monkeypatch, world, "--steps", 1, "--beta", 0.3, out="b")
    assert capsys.readouterr().out.count("from the cache") == 2
    here(monkeypatch, world, "--steps", 1, "--ref", world / "run", out="c")
    assert "from the cache" not in capsys.readouterr().out


def test_resuming_ends_where_an_uninterrupted_run_does(monkeypatch, world):
    here(monkeypatch, world, "--steps", 6, "--schedule", "constant", "--warmup", 0, out="whole")
    here(monkeypatch, world, "--steps", 3, "--schedule", "constant", "--warmup", 0, out="half")
    here(monkeypatch, world, "--resume", "--steps", 6, out="half")
    a, b = (load_run(world / name)[0].state_dict() for name in ("whole", "half"))
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def test_an_adapter_is_trained_against_itself_switched_off(monkeypatch, world):
    metrics, log = here(monkeypatch, world, "--lora_rank", 4, "--lora_targets", "all", "--epochs", 3, out="adapter")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and metrics["preference_accuracy"] > 0.7
    assert (world / "adapter" / "adapter_model.safetensors").exists()


def test_two_rounds_of_its_own_samples(monkeypatch, world):
    """An untrained model's right answers are too rare to pair, so the file asks for letters that it prefers anyway."""
    questions = [{"prompt": f"{i:02}+00=", "answer": ""} for i in range(60)]
    (world / "ask.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    metrics, log = here(monkeypatch, world, "--data", "prompts", "--input", world / "ask.jsonl", "--rounds", 2,
                        "--steps", 4, "--round_ref", "last", "--samples", 16, "--max_new_tokens", 6, "--val", 40,
                        out="rounds", data="")
    assert [line["round"] for line in log] == [0] * 4 + [1] * 4
    assert log[4]["loss"] == pytest.approx(math.log(2), abs=1e-3)  # the second round's reference is its own start
    assert metrics["accuracy_sampled"] >= 0


def run(world, *flags, world_size=1, check=0):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)] \
        if world_size > 1 else [sys.executable]
    done = subprocess.run([*launch, str(ROOT / "dpo.py"), "--init", str(world / "start"), "--device", "cpu",
                           *map(str, flags)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == check, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow),
                                      pytest.param("zero1", marks=pytest.mark.slow)])
def test_two_processes_take_one_processs_steps(world, monkeypatch, parallel):
    flags = ("--data", "pairs", "--input", world / "pairs.jsonl", "--steps", 4, "--batch", 15, "--log_every", 1,
             "--lr", 1e-3)
    here(monkeypatch, world, *flags, out="one", data="")
    run(world, *flags, "--parallel", parallel, "--check", "addition", "--out", world / "two", world_size=2)
    one, two = ([json.loads(line) for line in (world / name / "log.jsonl").read_text().splitlines()]
                for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "logp_chosen", "logp_rejected", "accuracy", "grad_norm", "entropy", "kl"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (key, a, b)


@pytest.mark.parametrize("flags,sentence", [
    (["--data", "pairs"], "needs --input"),
    (["--beta", "0"], "must be positive"),
    (["--label_smoothing", "0.7"], "chance of a wrong label"),
    (["--ref", "OTHER", "--data", "pairs", "--input", "PAIRS"], "another tokenizer"),
    (["--data", "pairs", "--input", "ROWS"], "use --loss kto"),
    (["--data", "pairs", "--input", "SAME"], "identical pairs left out"),
    (["--data", "pairs", "--input", "PAIRS", "--rounds", "2"], "does not have"),
    (["--data", "pairs", "--input", "BROKEN"], "line 2"),
    (["--judge", "nobody", "--data", "addition"], "--judge nobody"),
    (["--judge", "reward=START", "--data", "addition"], "no scalar head"),
    (["--data", "addition", "--samples", "2", "--limit", "4", "--val", "4"], "give more --samples"),
    (["--block_size", "99", "--data", "pairs", "--input", "PAIRS"], "context of 24"),
    (["--resume"], "--resume"),
])
def test_bad_input_is_answered_in_one_sentence(world, capsys, monkeypatch, flags, sentence):
    (world / "same.jsonl").write_text('{"prompt": "1=", "chosen": "2", "rejected": "2"}\n' * 20)
    (world / "broken.jsonl").write_text('{"prompt": "1=", "chosen": "2", "rejected": "3"}\n{"prompt": "1="}\n')
    places = {"OTHER": "other", "PAIRS": "pairs.jsonl", "ROWS": "rows.jsonl", "SAME": "same.jsonl",
              "BROKEN": "broken.jsonl"}
    flags = [str(world / places[f]) if f in places else f.replace("START", str(world / "start")) for f in flags]
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--init", str(world / "start"), "--device", "cpu", "--out",
                                      str(world / "bad"), *flags])
    with pytest.raises(SystemExit) as stop:
        dpo.cli(dpo.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and error.count("\n") == 1, error


def test_questions_of_a_file_are_asked_that_were_not_trained_on(tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n"
                                              for i in range(300)))
    args = SimpleNamespace(data="prompts", input=tmp_path / "q.jsonl", val=0)
    train, held = ({row["prompt"] for row in dpo.questions(args, "prompts", split, 1000)} for split in ("train", "val"))
    assert len(held) == 30 and len(train) == 270 and not held & train


def test_ktos_mismatches_fit_into_the_row():
    examples = [dpo.Example([1] * 30, [[2] * 5], 1.0), dpo.Example([3] * 5, [[4] * 30], 0.0)]
    assert all(len(p) - 1 + len(r) <= 48 for p, (r,) in dpo.mismatch(examples, 0, 48))
