"""The reinforcement room as a specification: the numbered details of rlhf.py, trl's figures, the optimum."""
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys

import pytest
import torch

import data
import rlhf
from bpe import BadInput, Tokenizer
from conftest import ROOT
from data import addition, multiplication, tastes
from model import GPT, GPTConfig, Process, by_response, end_scores, init_weights, load_run, rollouts, save_run
from parity import oracle_rlhf as oracle

CPU = Process(torch.device("cpu"), 0, 1)


pytestmark = pytest.mark.usefixtures("one_thread")


# --- formulas


def test_gae_is_the_discounted_sum_of_errors_and_padding_changes_nothing():
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(7) < torch.tensor([7, 3, 1, 5])[:, None]).float()
    rewards, values = (torch.randn(4, 7, generator=g) * mask for _ in range(2))
    gamma, lam = 0.9, 0.8
    advantages, returns = rlhf.gae(rewards, values, mask, gamma, lam)
    for n in range(4):
        length = int(mask[n].sum())
        v = values[n].tolist() + [0.0] * 8
        v[length:] = [0.0] * len(v[length:])
        delta = [rewards[n, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            brute = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert advantages[n, t].item() == pytest.approx(brute, abs=1e-5)
    assert torch.equal(advantages * (1 - mask), torch.zeros_like(mask))
    garbage = torch.nn.functional.pad(values, (0, 3), value=9.0)  # whatever a critic says behind the end
    wide = rlhf.gae(torch.nn.functional.pad(rewards, (0, 3)), garbage, torch.nn.functional.pad(mask, (0, 3)),
                    gamma, lam)
    assert torch.equal(wide[0][:, :7], advantages) and wide[0][:, 7:].abs().sum() == 0
    monte_carlo, _ = rlhf.gae(rewards, values, mask, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(monte_carlo, (to_go - values) * mask, atol=1e-5)
    assert torch.equal(rlhf.gae(rewards, values, mask, 1.0, 0.0)[0][1, 2], rewards[1, 2] - values[1, 2])


def test_returns_are_taken_before_whitening():
    x = oracle.inputs()
    advantages, returns = rlhf.gae(x["rewards"], x["values"], x["mask"], 0.98, 0.9)
    golden = json.loads(oracle.GOLDEN.read_text())["trl 0.24.0"]
    assert torch.allclose(returns, torch.tensor(golden["returns"], dtype=torch.float64), atol=1e-6)
    assert torch.allclose(returns, advantages + x["values"])


def test_whitened_tokens_have_mean_0_and_deviation_1_and_pads_do_not_count():
    x = oracle.inputs()
    golden = json.loads(oracle.GOLDEN.read_text())["trl 0.24.0"]
    advantages, _ = rlhf.gae(x["rewards"], x["values"], x["mask"], 0.98, 0.9)
    close = lambda a, name: (a - torch.tensor(golden[name], dtype=torch.float64)).abs().max() < 1e-5
    assert close(rlhf.whiten(advantages, x["mask"], unbiased=True), "advantages")
    assert close(rlhf.whiten(x["rewards"], x["mask"], shift_mean=False, unbiased=True), "whiten_keep_mean")
    white = rlhf.whiten(advantages + 1e3 * (1 - x["mask"]), x["mask"])[x["mask"] > 0]
    assert white.mean().abs() < 1e-6 and white.std(correction=0) == pytest.approx(1, abs=1e-6)
    only = rlhf.whiten(advantages, x["mask"], scale=False)[x["mask"] > 0]
    assert only.mean().abs() < 1e-5 and torch.allclose(only.std(), advantages[x["mask"] > 0].std())
    keep = rlhf.whiten(x["rewards"], x["mask"], shift_mean=False)[x["mask"] > 0]
    assert keep.mean() == pytest.approx(x["rewards"][x["mask"] > 0].mean().item())
    assert keep.std(correction=0) == pytest.approx(1)
    # two ranks, of which each adds the other's sums
    halves = [(x["rewards"][i:i + 4], x["mask"][i:i + 4]) for i in (0, 4)]
    whole = rlhf.whiten(x["rewards"], x["mask"])
    for i, (mine, m) in enumerate(halves):
        other, o = halves[1 - i]
        sums = iter([torch.stack((o.sum(), (other * o).sum())), None])

        def total(t):
            extra = next(sums)
            if extra is None:
                n, s = torch.stack((o.sum() + m.sum(), (other * o).sum() + (mine * m).sum()))
                extra = ((other - s / n).square() * o).sum()
            return t + extra
        assert torch.allclose(rlhf.whiten(mine, m, total=total), whole[4 * i:4 * i + 4])


def test_ppo_losses_are_pessimistic_bounded_and_trls():
    x, golden = oracle.inputs(), json.loads(oracle.GOLDEN.read_text())["trl 0.24.0"]
    advantages = torch.tensor(golden["advantages"], dtype=torch.float64)
    returns = torch.tensor(golden["returns"], dtype=torch.float64)
    policy = rlhf.masked_mean(rlhf.ppo_policy_loss(x["policy"], x["old"], advantages, x["mask"]), x["mask"])
    value = rlhf.masked_mean(rlhf.ppo_value_loss(x["new_values"], x["values"], returns, x["mask"]), x["mask"])
    assert policy.item() == pytest.approx(golden["policy_loss"], abs=1e-6)
    assert value.item() == pytest.approx(golden["value_loss"], abs=1e-6)
    one = torch.ones(1, 1)
    loss = lambda new, a, **k: rlhf.ppo_policy_loss(new * one, 0 * one, a * one, one, **k).item()
    # no reward beyond the clip
    assert loss(1.0, 1.0) == pytest.approx(-1.2) and loss(-1.0, -1.0) == pytest.approx(0.8)
    # but a punishment
    assert loss(1.0, -1.0) == pytest.approx(math.e) and loss(-1.0, 1.0) == pytest.approx(-1 / math.e)
    assert loss(5.0, -1.0, dual_clip=3.0) == pytest.approx(3.0)
    assert math.isfinite(loss(1e4, -1.0)) and loss(1e4, -1.0) == pytest.approx(math.exp(20), rel=1e-4)


def test_ratio_of_a_sequence_is_the_product_and_gspos_its_geometric_mean():
    new, mask = torch.tensor([[0.1, 0.2, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    at = lambda level: rlhf.ratios(new, torch.zeros(1, 3), mask, level)[0, 0].item()
    assert [at(k) for k in ("token", "sequence", "mean")] == pytest.approx([math.exp(v) for v in (0.1, 0.3, 0.15)])


def ours(name, t):
    """trl's case by the functions here."""
    x = oracle.inputs()
    if name in ("bradley_terry", "margin_center"):
        more = name == "margin_center"
        return rlhf.bradley_terry_loss(t[:4], t[4:], x["margin"] if more else 0.0, 0.01 if more else 0.0).mean()
    how = dict(grpo="sequence", bnpo="token", dr_grpo="constant", dapo="token", gspo="sequence", cispo="token",
               rloo="sequence").get(name, "sequence")
    level = {"gspo": "mean", "rloo": "sequence"}.get(name, "token")
    return rlhf.grpo_loss(t, x["old"], x["advantages"], x["mask"], how, oracle.CLIP,
                          {"dapo": oracle.HIGH, "cispo": 1.1}.get(name), level, oracle.LONGEST, x["ref"],
                          oracle.BETA if "k3" in name else 0.0, kl_ratio="ratio" in name, cispo=name == "cispo")


@pytest.mark.parametrize("name", list(json.loads(oracle.GOLDEN.read_text())["trl 1.16.0"]))
def test_every_loss_and_its_gradient_are_trls(name):
    loss, gradient = json.loads(oracle.GOLDEN.read_text())["trl 1.16.0"][name]
    trained = "scores" if name in ("bradley_terry", "margin_center") else "policy"
    value, mine = oracle.evaluate(lambda t: ours(name, t), trained)
    mask = oracle.inputs()["mask"] if trained == "policy" else 1
    assert value == pytest.approx(loss, abs=1e-5)
    assert ((torch.tensor(mine) - torch.tensor(gradient)) * mask).abs().max() < 1e-5


def test_group_advantages_in_every_convention():
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 5.0, 7.0, 9.0])
    assert rlhf.group_advantages(scores, 4, std="none")[:4].tolist() == [0.5, -0.5, -0.5, 0.5]
    unbiased = rlhf.group_advantages(scores, 4, eps=0.0)
    assert unbiased[0].item() == pytest.approx(0.5 / scores[:4].std().item())
    assert rlhf.group_advantages(scores, 4, std="biased", eps=0.0)[0].item() == pytest.approx(1.0)
    loo = rlhf.group_advantages(scores, 4, "loo", "none")
    assert loo[4].item() == pytest.approx(3 - (5 + 7 + 9) / 3)
    assert rlhf.group_advantages(scores, 4, "none", "none").tolist() == scores.tolist()
    assert rlhf.group_advantages(scores, 4, "batch", "none").sum().abs() < 1e-5


def test_equal_rewards_give_no_gradient_and_no_nan():
    x = oracle.inputs()
    for std in ("unbiased", "biased", "none"):
        advantages = rlhf.group_advantages(torch.full((8,), 0.7), 4, std=std)
        policy = x["policy"].clone().requires_grad_()
        rlhf.grpo_loss(policy, x["old"], advantages.double(), x["mask"]).backward()
        assert advantages.abs().max() < 1e-6 and policy.grad.abs().max() < 1e-6


def test_on_policy_grpo_loss_is_0_and_its_gradient_is_not():
    x = oracle.inputs()
    policy, advantages = x["old"].clone().requires_grad_(), rlhf.group_advantages(x["scores"], 4)
    loss = rlhf.grpo_loss(policy, x["old"], advantages, x["mask"])
    loss.backward()
    assert loss.abs() < 1e-6 and policy.grad.abs().max() > 0.01


def test_kl_estimators_have_the_right_mean_variance_and_gradient():
    p, q = (torch.tensor(v, dtype=torch.float64).log_softmax(-1)
            for v in ([0.3, -0.2, 0.9, 0.1], [0.1, 0.3, 0.4, -0.5]))
    exact = (p.exp() * (p - q)).sum()
    mean = lambda kind: (p.exp() * rlhf.kl_estimate(p, q, kind)).sum()
    spread = lambda kind: (p.exp() * rlhf.kl_estimate(p, q, kind).square()).sum() - mean(kind) ** 2
    assert mean("k1") == pytest.approx(exact.item()) and mean("k3") == pytest.approx(exact.item())
    assert (rlhf.kl_estimate(p, q, "k3") >= 0).all() and spread("k3") < spread("k1")

    def gradient(value):  # of the logits, through log π alone: what a loss on samples sees
        z = torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=torch.float64, requires_grad=True)
        logp = z.log_softmax(-1)
        value(logp).backward()
        return z.grad
    weight = p.exp()
    true = gradient(lambda logp: (logp.exp() * (logp - q)).sum())
    assert gradient(lambda logp: (weight * rlhf.kl_estimate(logp, q, "k1")).sum()).abs().max() < 1e-12
    assert torch.allclose(gradient(lambda logp: (weight * rlhf.kl_estimate(logp, q, "k2")).sum()), true)


def test_adaptive_kl_moves_by_the_error_and_at_most_a_fifth():
    trace, beta = [], 0.2
    for kl in (6.0, 6.6, 60.0, 0.0):  # on target; 10 % above; far above; none
        beta = rlhf.adaptive_kl(beta, kl, target=6.0, horizon=10000, n=512)
        trace.append(beta)
    a = 0.2 * (1 + 0.1 * 0.0512)
    b = a * (1 + 0.2 * 0.0512)
    assert trace == pytest.approx([0.2, a, b, b * (1 - 0.2 * 0.0512)])


def test_token_rewards_put_the_score_on_the_last_token_and_the_price_on_all():
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    kl = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    rewards = rlhf.token_rewards(torch.tensor([10.0, -10.0]), kl, mask, 0.1)
    assert torch.allclose(rewards, torch.tensor([[-0.1, -0.2, 9.7], [-10.4, 0.0, 0.0]]))


def test_missing_end_and_overlong_answers():
    scores, ended = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    assert rlhf.punish_missing_end(scores, ended, "replace", 1.0).tolist() == [2.0, -1.0]
    assert rlhf.punish_missing_end(scores, ended, "subtract", 1.0).tolist() == [2.0, 1.0]
    soft = rlhf.overlong_penalty(torch.tensor([5.0, 8.0, 9.0, 10.0, 12.0]), 10, 2)
    assert soft.tolist() == pytest.approx([0.0, 0.0, -0.5, -1.0, -1.0])


def test_reward_losses():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])
    assert rlhf.bradley_terry_loss(a, b)[0].item() == pytest.approx(math.log(2))
    ranked = torch.tensor([2.0, 1.0, 0.5])
    pairs = [rlhf.bradley_terry_loss(ranked[i], ranked[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert rlhf.ranking_loss(ranked).item() == pytest.approx(sum(p.item() for p in pairs) / 3)
    mixed = rlhf.combine_rewards(torch.tensor([5.0, 1.0, 0.0]), torch.tensor([-4.0, 2.0, 2.0]))  # the first is unsafe
    assert mixed.tolist() == [-4.0, 1.0, 0.0]
    assert rlhf.calibration_error(torch.tensor([0.7] * 7 + [0.3] * 3)) == pytest.approx(0.0, abs=1e-6)
    assert rlhf.calibration_error(torch.tensor([0.99] * 5 + [0.01] * 5)) == pytest.approx(0.49, abs=1e-5)


def test_explained_variance():
    r, mask = torch.randn(5, 4), torch.ones(5, 4)
    assert rlhf.explained_variance(r, r, mask) == 1
    assert rlhf.explained_variance(torch.full_like(r, 3.0), r, mask).abs() < 1e-5
    assert rlhf.explained_variance(-r, r, mask) < 0


# --- the optimum: 64 answers, a table for a policy


def play(world, advise, iterations=250, answers=1024, lr=0.1, epochs=1, beta=0.5):
    """
    Train a table of logits from the world's reference by samples: advise(old, ref, scores, mask, states) returns a loss
    of log π (N, 3). Returns KL(π ‖ π*).
    """
    g = torch.Generator().manual_seed(0)
    table = torch.tensor(world.table, requires_grad=True)
    states, letters, reward = (torch.from_numpy(t) for t in (world.states, world.letters, world.reward))
    reference = table.detach().clone().log_softmax(-1)[states, letters]
    optimizer = torch.optim.Adam([table], lr=lr)
    mask = torch.ones(answers, 3, dtype=torch.float64)
    for i in range(iterations):
        optimizer.param_groups[0]["lr"] = lr * (1 - i / iterations)
        logp = table.detach().log_softmax(-1)[states, letters]
        y = torch.multinomial(logp.sum(1).exp(), answers, replacement=True, generator=g)
        loss_of = advise(logp[y], reference[y], reward[y], mask, states[y])
        for _ in range(epochs):
            optimizer.zero_grad()
            loss_of(table.log_softmax(-1)[states[y], letters[y]]).backward()
            optimizer.step()
    logp = table.detach().log_softmax(-1)[states, letters].sum(1)
    star, _ = world.optimum(beta)
    return (logp.exp() * (logp - torch.from_numpy(star))).sum().item()


@pytest.fixture(scope="module")
def world():
    return tastes.world(0)


def reinforce(baseline, beta=0.5):
    def advise(old, ref, scores, mask, states):
        shaped = scores - beta * rlhf.kl_estimate(old, ref, "k1").sum(1)
        advantages = rlhf.group_advantages(shaped, 8, baseline, "none")
        level, how = ("sequence", "sequence") if baseline == "loo" else ("token", "sum")
        return lambda logp: rlhf.grpo_loss(logp, old, advantages, mask, how, level=level)
    return advise


@pytest.mark.parametrize("baseline", ["batch", "loo"])
def test_optimum_is_reached_by_reinforce_and_rloo_with_kl_in_the_reward(world, baseline):
    assert play(world, reinforce(baseline)) < 0.01


def test_optimum_is_reached_by_ppo_with_kl_in_the_reward(world):
    values, rate = torch.zeros(21, dtype=torch.float64), 0.3

    def advise(old, ref, scores, mask, states):
        rewards = rlhf.token_rewards(scores, rlhf.kl_estimate(old, ref, "k1"), mask, 0.5)
        advantages, returns = rlhf.gae(rewards, values[states], mask, 1.0, 0.95)
        for s in range(3):  # the critic: a running mean of each state's returns
            n = torch.bincount(states[:, s], minlength=21)
            mean = torch.bincount(states[:, s], returns[:, s], minlength=21) / n.clamp(min=1)
            values.copy_(torch.where(n > 0, values + rate * (mean - values), values))
        advantages = rlhf.whiten(advantages, mask)
        return lambda logp: rlhf.masked_mean(rlhf.ppo_policy_loss(logp, old, advantages, mask), mask)
    assert play(world, advise, epochs=2) < 0.01


def test_optimum_is_missed_by_kl_in_the_loss_in_the_known_order(world):
    def in_loss(kind, ratio=False):
        def advise(old, ref, scores, mask, states):
            advantages = rlhf.group_advantages(scores, 1024, std="none")
            return lambda logp: rlhf.grpo_loss(logp, old, advantages, mask, "sum", ref=ref, beta=0.5, kl=kind,
                                               kl_ratio=ratio)
        return play(world, advise)
    k1, k2, k3, k3_ratio = in_loss("k1"), in_loss("k2"), in_loss("k3"), in_loss("k3", True)
    assert k1 > 0.5 > k3 > k3_ratio > 0.01 and k2 > 0.01  # k1 in the loss does not regularize at all


# --- models


def letters(chat=True):
    tokenizer = Tokenizer.train([addition.LETTERS + "abc"], 0, kind="char")
    tokenizer.chat = {"template": "plain", "system": None}
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of sums that has seen a little, and one with another tokenizer."""
    folder = tmp_path_factory.mktemp("rlhf")
    other = Tokenizer.train([addition.LETTERS + "xyz"], 0, kind="char")
    other.chat = {"template": "plain", "system": None}
    for name, tokenizer in (("start", letters()), ("other", other)):
        model = GPT(GPTConfig(block_size=48, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=32, init="gpt2"))
        init_weights(model)
        if name == "start":
            teach(model, tokenizer)
        save_run(folder / name, model, {"stage": "start", "step": 0, "metrics": {}, "args": {},
                                        "tokenizer": tokenizer.spec()})
        tokenizer.save(folder / name)
    return folder


def teach(model, tokenizer, steps=60):
    rows = [data.prompt_and_response(tokenizer, [{"role": "user", "content": r["prompt"]}], r["answer"])
            for r in addition.problems("train", 2000)]
    x = torch.tensor([p + r[:-1] for p, r in rows])
    y = torch.tensor([[-100] * (len(p) - 1) + r for p, r in rows])
    optimizer, g = torch.optim.Adam(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(steps):
        i = torch.randint(0, len(x), (64,), generator=g)
        optimizer.zero_grad()
        model(x[i], y[i])[1].backward()
        optimizer.step()


def learner(folder, *flags, reward=None):
    args = rlhf.get_args(["--init", str(folder / "start"), "--device", "cpu", "--prompts", "6", "--group", "4",
                          "--micro_batch", "2", *map(str, flags)])
    tasks = list(addition.problems("train", 50))
    reward = reward or (lambda prompts, texts: [sum(map(ord, text)) % 7 / 7 for text in texts])
    return rlhf.Learner(args, CPU, reward, Tokenizer.from_pretrained(args.init), lambda *a, **k: None), tasks


def clock():
    return dict.fromkeys(("rollout", "score", "train"), 0.0)


def test_settings(folder):
    it, _ = learner(folder)
    assert it.optimizer.defaults["eps"] == 1e-5 and it.args.grad_clip == 1.0 and it.actor.config.dropout == 0
    assert all(not p.requires_grad for p in it.frozen.parameters())


def test_sampler_and_trainer_agree_on_every_log_probability(folder):
    """Also at another temperature; nothing is cut from the sampler's distribution."""
    it, tasks = learner(folder, "--temperature", 0.7)
    prompts = [data.question(it.tokenizer, t["prompt"]) for t in tasks[:5]]
    tokens, logprobs = it.actor.generate(prompts, 6, stop=[it.end], temperature=0.7, seed=3)
    groups = [(p, [ids]) for p, ids in zip(prompts, tokens) if ids]
    found = it.read(it.actor, groups)[0]
    for row, expected in zip(found, [lp for lp in logprobs if lp]):
        assert row[:len(expected)].tolist() == pytest.approx(expected, abs=1e-5)


def test_temperature_divides_the_logits_of_actor_and_reference(folder):
    it, tasks = learner(folder, "--temperature", 2.0)
    r, _ = it.rollout(lambda i: tasks[i], 0, clock())
    cold = learner(folder)[0]
    assert (cold.read(cold.actor, r.groups)[0] - r.old).abs().max() > 0.1
    assert torch.allclose(r.old, r.ref, atol=1e-6)


def test_end_token_is_part_of_the_answer(folder):
    it, tasks = learner(folder)
    r, _ = it.rollout(lambda i: tasks[i], 0, clock())
    answers = [a for _, group in r.groups for a in group]
    for n, answer in enumerate(answers):
        assert r.mask[n].sum() == len(answer) and (answer[-1] == it.end) == bool(r.ended[n])
        assert it.end not in answer[:-1] and len(answer) <= it.args.max_new_tokens
        assert r.old[n, len(answer) - 1] < 0  # the end's own log-probability
    assert r.ended.any()


def test_first_epoch_has_ratio_1_and_no_kl(folder):
    for algo in ("ppo", "grpo", "rloo", "gspo"):
        it, tasks = learner(folder, "--algo", algo, "--epochs", 1, "--minibatches", 1, "--lr", 1e-3)
        r, _ = it.rollout(lambda i: tasks[i], 0, clock())
        line = it.update(r, 0)
        assert line["approx_kl"] < 1e-9 and line["clip_fraction"] == 0
        assert line["ratio_max"] == pytest.approx(1, abs=1e-5)
        after = it.read(it.actor, r.groups)[0]
        assert (after - r.old).abs().max() > 1e-4


@pytest.mark.parametrize("algo", ["ppo", "grpo", "dr_grpo", "dapo", "rloo", "cispo"])
def test_pieces_have_the_gradient_of_the_whole(folder, algo):
    """Micro-batches of any size, prompts shared or not."""
    found = []
    for rows, share in ((1, True), (50, True), (3, False)):
        it, tasks = learner(folder, "--algo", algo, "--epochs", 1, "--minibatches", 1, "--grad_clip", 0,
                            "--kl_coef", 0.1, *(["--critic", "head"] if algo == "ppo" else []),
                            *(["--no-dynamic"] if algo == "dapo" else []))
        it.args.micro_batch, it.share, kept = rows, share, {}
        r, _ = it.rollout(lambda i: tasks[i], 0, clock())
        r = r._replace(old=r.old - 0.05 * r.mask)  # so that ratios differ from 1
        it.optimizer.step = lambda: kept.update({n: p.grad.clone() for n, p in it.actor.named_parameters()
                                                 if p.grad is not None})
        it.update(r, 0)
        found.append(kept)
    for name, grad in found[0].items():
        for other in found[1:]:
            assert (grad - other[name]).abs().max() <= 1e-5 + 1e-3 * grad.abs().max(), name


def test_early_stop_drops_the_gradient_that_went_too_far(folder):
    it, tasks = learner(folder, "--target_kl", 1e-6, "--epochs", 4, "--minibatches", 1, "--lr", 1e-2, "--warmup", 1)
    r, _ = it.rollout(lambda i: tasks[i], 0, clock())
    line = it.update(r, 0)
    assert line["stopped"] and line["updates"] == 1
    assert all(p.grad is None for p in it.actor.parameters())


@pytest.mark.parametrize("critic", ["separate", "head"])
def test_critic_warmup_leaves_the_actor_alone(folder, critic):
    it, tasks = learner(folder, "--critic_warmup", 1, "--critic", critic)
    head = (it.actor if it.critic is None else it.critic.model).scalar_head.weight
    before, value = {n: p.clone() for n, p in it.actor.named_parameters()}, head.clone()
    r, _ = it.rollout(lambda i: tasks[i], 0, clock())
    it.update(r, 0)
    assert all(torch.equal(p, before[n]) for n, p in it.actor.named_parameters() if n != "scalar_head.weight")
    assert not torch.equal(head, value)
    it.update(r, 1)
    assert not all(torch.equal(p, before[n]) for n, p in it.actor.named_parameters() if n != "scalar_head.weight")


def test_ppo_divides_advantages_by_their_deviation_unless_told(folder):
    reward, spread = lambda prompts, texts: [30.0 * len(t) for t in texts], []
    for flags in ((), ("--std", "none")):
        it, tasks = learner(folder, "--algo", "ppo", *flags, reward=reward)
        r, _ = it.rollout(lambda i: tasks[i], 0, clock())
        white = r.advantages[r.mask > 0]
        assert white.mean().abs() < 1e-4 * white.abs().max()
        spread.append(white.std(correction=0).item())
    assert spread[0] == pytest.approx(1, abs=1e-4) and spread[1] > 2


def test_two_reward_models_scores_are_whitened_over_the_batch_and_logged_as_they_are(folder):
    lengths = lambda prompts, texts: [5.0 + len(t) for t in texts]
    it, tasks = learner(folder, "--algo", "reinforce", "--reward", "helpful=A,safe=B", "--missing_end", "none",
                        reward=lengths)
    r, _ = it.rollout(lambda i: tasks[i], 0, clock())
    assert r.scores.min() >= 5 and r.shaped.mean().abs() < 1e-5
    assert r.shaped.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_dynamic_sampling_leaves_no_flat_group_where_others_can_be_had(folder):
    flat = lambda prompts, texts: [float(int(p[0]) % 2 == 0 and len(t) % 2 == 0)
                                   + (0.1 * (hash(t) % 5) if int(p[0]) % 2 == 0 else 0)
                                   for p, t in zip(prompts, texts)]
    it, tasks = learner(folder, "--algo", "dapo", reward=flat)
    r, drawn = it.rollout(lambda i: tasks[i % 50], 0, clock())
    assert drawn > 1 and len(r.groups) == 6
    plain, _ = learner(folder, "--algo", "grpo", reward=flat)
    assert (plain.rollout(lambda i: tasks[i % 50], 0, clock())[0].scores.view(-1, 4).std(1) == 0).any()


def test_adapters_critic_and_reference_share_one_base(folder):
    it, tasks = learner(folder, "--lora_rank", 2, "--lora_targets", "all", "--critic", "head", "--lr", 1e-2)
    assert it.frozen is None and it.critic is None
    for i in range(2):
        r, _ = it.rollout(lambda k: tasks[k], i, clock())
        it.update(r, i)
    assert (r.old - r.ref).abs().max() > 1e-5 and r.values.abs().max() > 0


@pytest.mark.parametrize("flags", [("--algo", "grpo"), ("--algo", "ppo"), ("--algo", "ppo", "--critic", "head")])
def test_a_micro_batch_bounds_the_rows_of_one_pass_and_changes_no_update(folder, monkeypatch, flags):
    pack, rows, weights = data.pack_branches, [], []
    monkeypatch.setattr(data, "pack_branches", lambda *a, **k: rows.append(len((p := pack(*a, **k)).idx)) or p)
    for micro in (1, 64):
        it, tasks = learner(folder, *flags, "--group", 24, "--micro_batch", micro, "--block_size", 40)
        flat = lambda: torch.cat([p.detach().flatten() for p in it.actor.parameters()])
        rows.clear()
        r, _ = it.rollout(lambda i: tasks[i], 0, clock())
        start = flat()
        it.update(r, 0)
        weights.append(flat() - start)
        most, longest = max(rows), max(len(p) + sum(map(len, answers)) for p, answers in r.groups)
        assert longest > 40 and (most == 1 if micro == 1 else 1 < most <= 64)
    assert (weights[0] - weights[1]).abs().max() < 0.01 * weights[0].abs().max()


def test_by_response_puts_each_answers_tokens_in_its_own_row():
    segments = torch.tensor([[-1, 0, 0, 0, -1, 2, 2], [-1, 1, -1, 3, 3, 3, 3]])
    values = torch.arange(14.0).view(2, 7).requires_grad_()
    rows = by_response(values, segments, 4)
    assert rows.tolist() == [[1, 2, 3, 0], [8, 0, 0, 0], [5, 6, 0, 0], [10, 11, 12, 13]]
    rows.sum().backward()
    assert values.grad.sum() == 10


def test_reward_model_reads_the_end_token_alone_and_starts_small(folder):
    model = rlhf.with_scalar_head(GPT.from_pretrained(folder / "start"), seed=1)
    assert model.scalar_head.weight.std().item() == pytest.approx((32 + 1) ** -0.5, rel=0.4)
    prompt, answers = [1, 2, 3], [[4, 5, 6], [7, 8]]
    expected = [model.scalars(torch.tensor([prompt + a]))[0, -1].item() for a in answers]
    assert end_scores(model, [(prompt, answers)])[0] == pytest.approx(expected, abs=1e-5)


def test_rollouts_do_not_depend_on_their_batch(folder):
    model = GPT.from_pretrained(folder / "start")
    prompts = [[1, 2, 10, 3, 4, 11, 12], [5, 6, 10, 7, 11, 12], [8, 10, 9, 11, 12]]
    whole = rollouts(model, prompts, 3, 16, 5, seed=7)
    assert whole == rollouts(model, prompts, 3, 16, 5, seed=7, batch=2)
    assert whole != rollouts(model, prompts, 3, 16, 5, seed=8)


def test_best_of_n_is_the_expectation_over_all_subsets(folder):
    it, tasks = learner(folder, "--algo", "best_of_n", reward=None)
    scores = torch.tensor([[0.0, 1.0, 5.0, 2.0]])
    it.sample = lambda tasks, seed: (None, ["a"] * 4, ["p"] * 4)
    rows = rlhf.best_of_n(it, tasks, it.args, lambda p, t: scores.flatten().tolist(), None, lambda *a: None)
    pairs = [max(a, b) for k, a in enumerate([0.0, 1.0, 5.0, 2.0]) for b in [0.0, 1.0, 5.0, 2.0][k + 1:]]
    assert [row["reward"] for row in rows] == pytest.approx([2.0, sum(pairs) / 6, 5.0])
    assert rows[1]["kl"] == pytest.approx(math.log(2) - 0.5)


def test_tastes_count_each_pair_once_and_punish_repeats():
    once, twice = tastes.reward("abcdefghabcd"), tastes.reward("abababababab")
    worth = lambda a, b: tastes.WORTH[tastes.LETTERS.index(a)][tastes.LETTERS.index(b)]
    assert twice == pytest.approx(worth("a", "b") + worth("b", "a") - 0.5 * 9)
    assert tastes.reward("") == -6 and once != twice
    draws = [tastes.preferred(1.0, 0.0, random.Random(i)) for i in range(2000)]
    assert sum(draws) / 2000 == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)


# --- the script


def here(monkeypatch, folder, *flags, out="run", init="start"):
    monkeypatch.setattr(sys, "argv", ["rlhf.py", "--device", "cpu", "--out", str(folder / out), "--val", "60",
                                      "--prompts", "8", "--group", "8",
                                      *(["--init", str(folder / init)] if init else []), *map(str, flags)])
    rlhf.main()
    log = [json.loads(line) for line in (folder / out / "log.jsonl").read_text().splitlines()]
    return json.loads((folder / out / "run.json").read_text())["metrics"], log


FIRST_DIGIT = "def score(prompts, answers):\n    return [float(answer.startswith('3')) for answer in answers]\n"


@pytest.mark.parametrize("algo", list(rlhf.ALGOS))
def test_every_method_learns_to_begin_with_a_three(monkeypatch, folder, algo):
    (folder / "three.py").write_text(FIRST_DIGIT)
    more = {"raft": ["--raft_above", 1], "reinforce": [], "gspo": ["--clip", 0.2, "--clip_high", 0.2]}.get(algo, [])
    metrics, log = here(monkeypatch, folder, "--algo", algo, "--reward", f"{folder / 'three.py'}:score",
                        "--iterations", 16, "--lr", 6e-3, "--warmup", 1, *more)
    if algo == "best_of_n":
        assert metrics["best_of_8"] > metrics["best_of_1"] + 0.1
        return
    assert log[-1]["reward"] > log[0]["reward"] + 0.1, [line["reward"] for line in log]
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5) and log[-1]["kl"] > 0.01
    assert {"reward", "reward_sd", "flat_groups", "kl", "kl_k3", "entropy", "length", "end_rate", "tokens_per_s",
            "share_rollout", "share_score", "share_train"} <= log[0].keys()
    if algo == "ppo":
        assert {"approx_kl", "clip_fraction", "ratio_max", "explained_variance"} <= log[0].keys()
    assert load_run(folder / "run")[1]["stage"] == "rl"


def test_resuming_ends_where_an_uninterrupted_run_does(monkeypatch, folder):
    flags = "--iterations", 4, "--lr", 3e-3, "--save_every", 2, "--kl_target", 0.1, "--kl_horizon", 500
    _, whole = here(monkeypatch, folder, *flags, out="whole")
    expected = load_run(folder / "whole")[0].state_dict()
    update, calls = rlhf.Learner.update, []

    def crash(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return update(self, *args)
    monkeypatch.setattr(rlhf.Learner, "update", crash)
    with pytest.raises(KeyboardInterrupt):
        here(monkeypatch, folder, *flags, out="half")
    monkeypatch.setattr(rlhf.Learner, "update", update)
    monkeypatch.setattr(sys, "argv", ["rlhf.py", "--resume", "--out", str(folder / "half")])
    rlhf.main()
    found, log = load_run(folder / "half")[0].state_dict(), (folder / "half" / "log.jsonl").read_text().splitlines()
    assert all(torch.allclose(found[k], expected[k], atol=1e-6) for k in expected) and len(log) == 4
    for a, b in zip(whole, map(json.loads, log)):
        assert a["reward"] == b["reward"] and a["kl_coef"] == pytest.approx(b["kl_coef"])


def test_reward_model_then_ppo_on_it(monkeypatch, folder):
    rows = [{"prompt": p["prompt"], "chosen": "3" + p["answer"][1:], "rejected": "7" + p["answer"][1:]}
            for p in addition.problems("train", 400)]
    (folder / "threes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rm, _ = here(monkeypatch, folder, "--stage", "rm", "--task", "pairs", "--input", folder / "threes.jsonl",
                 "--rm_lr", 1e-2, out="rm")
    assert rm["accuracy"] > 0.95 and rm["calibration_error"] < 0.2
    judge = rlhf.RewardModel(folder / "rm", "cpu")
    good, bad = judge(["12+30="] * 2, ["342", "742"])
    assert good > bad + 1
    metrics, log = here(monkeypatch, folder, "--reward", f"reward={folder / 'rm'}", "--critic_init", folder / "rm",
                        "--iterations", 8, "--lr", 3e-3, out="on_rm")
    assert log[-1]["reward"] > log[0]["reward"]


def test_ppo_with_pretraining_mix_adaptive_price_and_whitened_rewards(monkeypatch, folder, tmp_path):
    (tmp_path / "text.txt").write_text("12+30=\n240\n" * 400)
    prepare = data.prepare
    monkeypatch.setattr(data, "prepare", lambda *args, **named: prepare(*args, **named, root=tmp_path / "data"))
    _, log = here(monkeypatch, folder, "--ptx", "text", "--input", tmp_path / "text.txt", "--kl_target", 0.1,
                  "--kl_horizon", 100, "--whiten_rewards", "--reward_clip", 2, "--entropy_coef", 0.01,
                  "--iterations", 3, out="ptx")
    assert log[0]["kl_coef"] == pytest.approx(0.02 * (1 - 0.2 * 64 / 100)) and math.isfinite(log[-1]["policy_loss"])


def test_multiplication_is_written_out_and_only_its_end_is_checked():
    train, val = ({r["prompt"]: r["answer"] for r in multiplication.problems(s)} for s in ("train", "val"))
    assert len(train) == 80_000 and len(val) == 1000 and not train.keys() & val.keys()
    for prompt, text in itertools.islice(val.items(), 200):
        a, b = map(int, prompt[:-1].split("*"))
        parts, product = text.split("####")
        ones, tens = (int(part[::-1]) for part in parts.split("+"))
        assert ones + 10 * tens == int(product[::-1]) == a * b and ones == a * (b % 10)
        assert data.is_right(text, text) and data.is_right(f"0+0####{product}", text)
        assert not data.is_right(text[:-1] + str((int(text[-1]) + 1) % 10), text)
    assert next(multiplication.problems("train"))["prompt"] in train
    assert multiplication.answer(123, 45) == "5160+2940####53550"


def test_a_start_is_trained_once_and_stopped_early(monkeypatch, folder, capsys):
    problems = tastes.problems
    monkeypatch.setattr(tastes, "problems", lambda split, n=1000: problems(split, n))
    args = rlhf.get_args(["--task", "tastes", "--out", str(folder / "x"), "--start_steps", "30"])
    where = rlhf.train_start(args, torch.device("cpu"), print)
    assert "30 steps" in capsys.readouterr().out
    assert rlhf.train_start(args, torch.device("cpu"), print) == where and not capsys.readouterr().out
    assert load_run(where)[1]["metrics"]["train_loss"] < 2.3  # below ln 10


def run(folder, *flags, world=1, check=0):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)] if world > 1 else []
    done = subprocess.run([sys.executable, *launch, str(ROOT / "rlhf.py"), "--init", str(folder / "start"),
                           "--device", "cpu", *map(str, flags)],
                          capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == check, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("parallel,algo", [("ddp", "ppo"), pytest.param("fsdp", "grpo", marks=pytest.mark.slow),
                                           pytest.param("zero1", "rloo", marks=pytest.mark.slow)])
def test_two_processes_answer_and_learn_as_one(folder, monkeypatch, parallel, algo):
    (folder / "three.py").write_text(FIRST_DIGIT)
    judge = f"{folder / 'three.py'}:score"
    flags = ("--algo", algo, "--reward", judge, "--gold", judge, "--iterations", 3, "--lr", 1e-3, "--epochs", 1,
             "--minibatches", 1, "--kl_coef", 0.1)
    here(monkeypatch, folder, *flags, out="one")
    run(folder, *flags, "--prompts", 8, "--group", 8, "--parallel", parallel, "--val", 60,
        "--out", folder / "two", world=2)
    one, two = ([json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
                for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key in ("reward", "tokens", "flat_groups", "kl", "entropy", "policy_loss", "grad_norm",
                    "end_rate", "ratio_mean", "ratio_max", "true_reward", *["explained_variance"] * (algo == "ppo")):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (key, a, b)


def test_every_numbered_detail_has_its_test():
    named = re.findall(r"test_\w+", rlhf.__doc__.split("each with its test")[1].replace("tests/test_rlhf.py", ""))
    assert len(named) >= 20 and all(any(name.startswith(detail) for name in globals()) for detail in named), named


@pytest.mark.parametrize("flags,sentence", [
    (["--reward", "reward=NOWHERE"], "NOWHERE"),
    (["--reward", "reward=START"], "no reward model"),
    (["--reward", "nothing"], "--reward nothing is unknown"),
    (["--reward", "RAISES:score"], "raised ZeroDivisionError"),
    (["--reward", "NAN:score"], "returned nan"),
    (["--reward", "SHORT:score"], "returned 1 scores"),
    (["--algo", "grpo", "--group", "1"], "--group 1"),
    (["--max_new_tokens", "45"], "do not fit"),
    (["--critic_init", "OTHER"], "another tokenizer"),
    (["--task", "nowhere.jsonl"], "--task nowhere.jsonl"),
    (["--temperature", "0"], "--temperature 0"),
    (["--stage", "rm"], "needs comparisons"),
    (["--log_every", "0"], "--log_every 0"),
    (["--kl_target", "1", "--algo", "grpo"], "--kl_in reward"),
])
def test_bad_input_is_answered_in_one_sentence(folder, capsys, monkeypatch, flags, sentence):
    for name, body in (("raises", "1 / 0"), ("nan", "[float('nan')] * len(a)"), ("short", "[1.0]")):
        (folder / f"{name}.py").write_text(f"def score(p, a):\n    return {body}\n")
    for name in ("RAISES", "NAN", "SHORT"):
        flags = [f.replace(name, str(folder / f"{name.lower()}.py")) for f in flags]
    flags = [f.replace("START", str(folder / "start")).replace("OTHER", str(folder / "other")) for f in flags]
    monkeypatch.setattr(sys, "argv", ["rlhf.py", "--init", str(folder / "start"), "--device", "cpu", "--val", "20",
                                      "--out", str(folder / "bad"), "--iterations", "1", *flags])
    with pytest.raises(SystemExit) as stop:
        rlhf.cli(rlhf.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and error.count("\n") == 1, error


@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_equal_scores_teach_nothing_however_they_round(baseline):
    advantages = rlhf.group_advantages(torch.tensor([0.3] * 6 + [0.1] * 6), 6, baseline, "unbiased", 1e-9)
    assert torch.equal(advantages, torch.zeros(12))


def test_checked_rewards_need_answers():
    with pytest.raises(BadInput, match="answer"):
        rlhf.reward_function("check", [{"prompt": "say something", "answer": ""}], "cpu")
