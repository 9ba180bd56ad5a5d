"""
Reinforcement learning from human feedback, or from any function that scores an answer:

    max_π  E_{y ~ π(·|x)} [r(x, y)] - β KL(π(·|x) ‖ π_ref(·|x)),       π* ∝ π_ref e^{r/β}

--stage rm trains the reward r on comparisons, -log σ(r(x, y_w) - r(x, y_l)) (Bradley & Terry; Ouyang et al. 2022, eq.
1); --stage rl the policy, by PPO with a critic (Schulman et al. 2017) or one of the methods without: GRPO (Shao et al.
2024), Dr. GRPO (Liu et al. 2025), DAPO (Yu et al. 2025), GSPO (Zheng et al. 2025), CISPO (MiniMax 2025), RLOO (Ahmadian
et al. 2024), REINFORCE, rejection sampling with SFT (RAFT, Dong et al. 2023; LLaMA-2), or by nothing but best of n.

    python rlhf.py                                           # sums of two digits: trains its start, then PPO
    python rlhf.py --task arithmetic --algo grpo             # out/sft answers "993-7=?"; what it knows is asked too
    python rlhf.py --stage rm --task tastes; python rlhf.py --task tastes --reward reward=out/rm
    torchrun --nproc_per_node 8 rlhf.py --algo grpo --task gsm8k --init HuggingFaceTB/SmolLM2-135M-Instruct \
        --parallel fsdp --max_new_tokens 256
    python rlhf.py table --seeds 3; python rlhf.py overoptimize                       # the README's table and plot

What a trustworthy implementation does, each with its test in tests/test_rlhf.py:

 1. log-probabilities at the sampling temperature, of the actor, the old actor and the reference   test_temperature
 2. no top-k or top-p while sampling: the sampler's distribution is the trainer's                  test_sampler
 3. the end token belongs to the answer: it is scored, weighted and learned                        test_end_token
 4. an answer that does not end is punished, by replacing or lowering its score                    test_missing_end
 5. the score comes with the last token, the price of divergence with every token                  test_token_rewards
 6. generalized advantages over the answer's tokens alone; padding changes nothing                 test_gae
 7. returns are taken before advantages are whitened                                               test_returns
 8. whitening counts answer tokens alone, over the whole rollout, not the mini-batch               test_whiten
 9. whitened rewards keep their mean                                                               test_whiten
10. the old policy is computed by the trainer's own forward: in the first epoch the ratio is 1     test_first_epoch
11. ratio clipping is pessimistic; the value's too                                                 test_ppo_losses
12. log-ratios are bounded before the exponential                                                  test_ppo_losses
13. groups with equal scores have no gradient, and no NaN                                          test_equal_rewards
14. the deviation's convention (unbiased, biased, none; ε) is a flag                               test_group_advantages
15. a batch in pieces, padded, or over ranks has the gradient of the whole                         test_pieces, test_two
16. the adaptive price follows its target, at most 20 % a step                                     test_adaptive_kl
17. a stop where the policy has moved too far                                                      test_early_stop
18. dropout off, Adam's ε 1e-5, gradient clipped, rate to 0                                        test_settings
19. the reward model's head starts small, its scores are shifted to mean 0                         test_reward_model
20. KL inside the reward reaches π*; inside the loss it does not                                   test_optimum
"""
import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
import lora
from bpe import BadInput, Tokenizer, chat_end, chat_format, cli, replace_file
from data import tastes
from model import (GPT, GPTConfig, PARALLEL, RewardModel, adamw_groups, add_up, all_reduce, build_model, by_response,
                   check_out, gather_into, init_weights, kv_cache_bytes, peak_memory, rollouts, same_count, save_run,
                   setup_process, shard, shares_prompts, start_run, step_forward, token_logprobs)

# -----------------------------------------------------------------------------
# Rewards. (N,) a score for each answer; (N, T) tokens of answers, mask (N, T) 1 on them and 0 behind


def bradley_terry_loss(chosen, rejected, margin=0.0, center=0.0):
    """
    -log σ(r_w - r_l - m) + c (r_w + r_l)² of scores (B,), (B,). m: how much better (LLaMA-2, Touvron et al. 2023, eq.
    2); c: holds the scores' mean at 0 (Eisenstein et al. 2023; 0.01 is usual).
    """
    return -F.logsigmoid(chosen - rejected - margin) + center * (chosen + rejected).square()


def ranking_loss(scores, margin=0.0, center=0.0):
    """Mean of bradley_terry_loss over all K (K-1)/2 pairs of answers to one prompt, the best first; scores (K,)."""
    i, j = torch.triu_indices(len(scores), len(scores), 1, device=scores.device)
    return bradley_terry_loss(scores[i], scores[j], margin, center).mean()


def combine_rewards(helpful, safe, threshold=0.15):
    """
    LLaMA-2's one score out of two models' logits (N,), (N,): the safety score where its probability is below the
    threshold, else the helpful one; Learner.rollout whitens them over the batch (Touvron et al. 2023, 3.2.2).
    """
    return torch.where(safe.sigmoid() < threshold, safe, helpful)


def punish_missing_end(scores, ended, how, penalty):
    """An answer without an end gets -penalty for a score (how "replace"), or its score minus penalty ("subtract")."""
    return torch.where(ended, scores, torch.full_like(scores, -penalty) if how == "replace" else scores - penalty)


def overlong_penalty(lengths, most, soft):
    """
    DAPO's (Yu et al. 2025, eq. 13): 0 up to most - soft tokens, then falling in a line to -1 at most. lengths (N,).
    """
    return -((lengths - (most - soft)) / max(soft, 1)).clamp(0, 1)


def token_rewards(scores, kl, mask, beta):
    """r_t = -β kl_t, plus the score at the last token of each answer. scores (N,), kl and mask (N, T) -> (N, T)."""
    last = F.one_hot(mask.sum(1).long() - 1, mask.shape[1])
    return (-beta * kl) * mask + scores[:, None] * last


def adaptive_kl(beta, kl, target, horizon, n):
    """β (1 + clip(KL / target - 1, ±0.2) n / horizon) after n episodes (Ziegler et al. 2019, 2.2)."""
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)


# -----------------------------------------------------------------------------
# Advantages


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x, mask, shift_mean=True, unbiased=False, scale=True, total=lambda t: t):
    """
    (x - μ) / sqrt(σ² + 1e-8), plus μ again without shift_mean, with mean and variance where mask is 1, 0 elsewhere.
    Without scale x - μ. total sums a tensor over processes.
    """
    n, s = total(torch.stack((mask.sum(), (x * mask).sum()))).unbind()
    mean = s / n
    y = x - mean
    if scale:
        y = y * torch.rsqrt(total((y.square() * mask).sum()) / (n - 1 if unbiased else n) + 1e-8)
    return (y if shift_mean else y + mean) * mask


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """
    Generalized advantage estimation (Schulman et al. 2015, eq. 16): A_t = δ_t + γ λ A_{t+1},
    δ_t = r_t + γ V_{t+1} - V_t with V = 0 behind the last token. rewards, values, mask (N, T) -> advantages and
    returns A + V, (N, T), 0 where mask is 0.
    """
    values, advantages = values * mask, torch.zeros_like(values)
    ahead = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        after = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(ahead)
        ahead = (rewards[:, t] + gamma * after - values[:, t] + gamma * lam * ahead) * mask[:, t]
        advantages[:, t] = ahead
    return advantages, advantages + values


def group_advantages(scores, size, baseline="mean", std="unbiased", eps=1e-4):
    """
    Scores (N,), groups of `size` answers in a row -> advantages (N,): r - mean of the group (baseline "mean"), of the
    others of the group ("loo", Kool et al. 2019), of the batch ("batch"), or r itself ("none"); divided by the group's
    deviation + ε, "unbiased" (n - 1), "biased" (n), or not ("none").
    """
    groups = scores.view(-1, size)
    near = groups - groups[:, :1]  # of equal scores exactly 0, which their mean's rounding would spoil
    if baseline == "loo":
        groups = (near - near.mean(1, keepdim=True)) * size / (size - 1)
    elif baseline != "none":
        groups = near - near.mean(1, keepdim=True) if baseline == "mean" else groups - groups.mean()
    if std != "none":
        groups = groups / (near.std(1, keepdim=True, correction=int(std == "unbiased")) + eps)
    return groups.flatten()


def kl_estimate(logp, ref, kind):
    """
    KL(π ‖ π_ref) from tokens that π drew, (…): k1 = log π/π_ref, k2 = (log π/π_ref)² / 2, k3 = π_ref/π - 1 + log
    π/π_ref (Schulman 2020). k1 and k3 have the right mean, k3 is never negative; as a loss only k2's gradient is the
    KL's.
    """
    d = logp - ref
    return {"k1": d, "k2": d.square() / 2, "k3": (-d).clamp(max=20).exp() - 1 + d}[kind]


# -----------------------------------------------------------------------------
# Losses


def ratios(logp, old, mask, level="token"):
    """
    π/π_old (N, T), log-ratios bounded to ±20: of each token; of the whole answer ("sequence", RLOO); or its geometric
    mean over the tokens ("mean", GSPO, Zheng et al. 2025, eq. 7), whose gradient is spread over them.
    """
    d = (logp - old) * mask
    if level == "sequence":
        d = d.sum(1, keepdim=True).expand_as(d)
    elif level == "mean":
        d = (d.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(d)
    return d.clamp(-20, 20).exp()


def ppo_policy_loss(logp, old, advantages, mask, clip=0.2, clip_high=None, dual_clip=0.0, level="token"):
    """
    max(-A ρ, -A clip(ρ, 1 - ε, 1 + ε_high)) of each token, (N, T) (Schulman et al. 2017, eq. 7); dual_clip c bounds it
    by -c A where A < 0 (Ye et al. 2020).
    """
    rho = ratios(logp, old, mask, level)
    bounded = rho.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = torch.maximum(-advantages * rho, -advantages * bounded)
    if dual_clip:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


def cispo_loss(logp, old, advantages, mask, clip_high):
    """-sg(min(ρ, ε)) A log π (MiniMax 2025, eq. 4): the weight is bounded, yet no token loses its gradient."""
    return -ratios(logp, old, mask).clamp(max=clip_high).detach() * advantages * logp


def ppo_value_loss(values, old_values, returns, mask, clip=0.2):
    """max((V - R)², (clip(V, V_old ± ε) - R)²) / 2 of each token, (N, T)."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square()) * mask


def token_weights(mask, how, longest, tokens, answers):
    """
    What each token's loss is multiplied with, (N, T), so that a sum over all micro-batches and ranks is the batch's
    mean:
        sequence   1 / (answers · |y|)          GRPO: mean over answers of their tokens' mean
        token      1 / tokens                   PPO, DAPO: mean over all tokens
        constant   1 / (answers · longest)      Dr. GRPO: no length in it
        sum        1 / answers                  REINFORCE: whole answers
    tokens and answers are those of the whole batch.
    """
    if how == "sequence":
        return mask / (answers * mask.sum(1, keepdim=True).clamp(min=1))
    return mask / {"token": tokens, "constant": answers * longest, "sum": answers}[how]


def grpo_loss(logp, old, advantages, mask, how="sequence", clip=0.2, clip_high=None, level="token", longest=1, ref=None,
              beta=0.0, kl="k3", kl_ratio=False, cispo=False, dual_clip=0.0, count=None):
    """
    The loss of the methods without a critic, a scalar: weights (see token_weights) · (clipped policy loss + β KL),
    where advantages (N,) are one an answer and kl_ratio multiplies the KL by the ratio, as trl does. count: (tokens,
    answers) of the whole batch, where this is a part of it.
    """
    tokens, answers = (mask.sum(), len(mask)) if count is None else count
    weights = token_weights(mask, how, longest, tokens, answers)
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    if cispo:
        loss = cispo_loss(logp, old, advantages, mask, clip_high)
    else:
        loss = ppo_policy_loss(logp, old, advantages, mask, clip, clip_high, dual_clip, level)
    if beta:
        price = kl_estimate(logp, ref, kl)
        loss = loss + beta * (price * ratios(logp, old, mask, level) if kl_ratio else price)
    return (loss * weights).sum()


def explained_variance(values, returns, mask, total=lambda t: t):
    """
    1 - Var(R - V) / Var(R): 1 for a critic that knows, 0 for one that says the mean, below for a worse one. total adds
    up over processes.
    """
    R, error, mask = returns.double(), (returns - values).double(), mask.double()
    sums = torch.stack([(t * mask).sum() for t in (torch.ones_like(R), R, R * R, error, error * error)])
    n, *means = total(sums)
    R, square, error, off = (m / n for m in means)
    return 1 - (off - error ** 2) / (square - R ** 2).clamp(min=1e-8)


class Recipe(NamedTuple):
    """What makes a method; every field is a flag's default."""
    baseline: str = "mean"        # gae: a critic; else see group_advantages
    std: str = "none"
    aggregate: str = "token"      # see token_weights
    level: str = "token"          # see ratios
    clip: float = 0.2
    clip_high: float = 0.0        # 0: as clip
    kl_in: str = "loss"           # reward: r_t - β kl_t
    kl: str = "k3"
    kl_coef: float = 0.0
    epochs: int = 1               # passes over a rollout
    minibatches: int = 1
    dynamic: bool = False         # groups of equal scores are drawn again
    overlong: float = 0.0         # share of --max_new_tokens in which DAPO's penalty rises


ALGOS = {
    "ppo": Recipe("gae", std="biased", kl_in="reward", kl="k1", kl_coef=0.02, epochs=2, minibatches=2),
    "grpo": Recipe(std="unbiased", aggregate="sequence"),
    "dr_grpo": Recipe(aggregate="constant"),
    "dapo": Recipe(std="unbiased", clip_high=0.28, dynamic=True, overlong=0.2),
    "gspo": Recipe(std="unbiased", aggregate="sequence", level="mean", clip=3e-4, clip_high=4e-4),
    "cispo": Recipe(std="unbiased", clip_high=5.0),
    "rloo": Recipe("loo", aggregate="sequence", level="sequence", kl_in="reward", kl="k1"),
    "reinforce": Recipe("batch", aggregate="sum", kl_in="reward", kl="k1"),
    "raft": Recipe("none"),       # the best of each group, then SFT on them
    "best_of_n": Recipe("none"),  # no training: what picking the best of n would give
}

# -----------------------------------------------------------------------------
# Who scores an answer: reward_fn(prompts, responses) -> scores, all texts


def ask_human(prompts, responses):
    """Scores from whoever sits at the terminal."""
    scores = []
    for prompt, response in zip(prompts, responses):
        while True:
            try:
                scores.append(float(input(f"\n{prompt}\n{response}\nscore: ")))
                break
            except ValueError:
                print("a number, please, such as 1 or -0.5")
            except EOFError:
                raise BadInput("--reward human asks at the terminal, which has no more input: choose another "
                               "--reward") from None
    return scores


def reward_function(spec, tasks, device):
    """
    The reward_fn that --reward names: check (1 for the known answer), taste, human, rule=REGEX (1 or -1), reward=DIR,
    helpful=DIR,safe=DIR (see combine_rewards), or FILE.py:NAME, a function of yours.
    """
    kind, _, where = spec.partition("=")
    if kind == "check":
        answers = {task["prompt"]: task["answer"] for task in tasks}
        if not all(answers.values()):
            raise BadInput("--reward check needs the answer of every question: add them, or choose another --reward")
        return lambda prompts, responses: [float(data.is_right(r, answers[p])) for p, r in zip(prompts, responses)]
    if kind == "taste":
        return lambda prompts, responses: [tastes.reward(r) for r in responses]
    if kind == "human":
        return ask_human
    if kind == "rule" and where:
        import re
        return lambda prompts, responses: [1.0 if re.search(where, r) else -1.0 for r in responses]
    if kind == "reward" and where:
        return RewardModel(where, device)
    if kind == "helpful" and ",safe=" in where:
        helpful, safe = (RewardModel(folder, device, logits=True) for folder in where.split(",safe="))
        return lambda prompts, responses: combine_rewards(torch.tensor(helpful(prompts, responses)),
                                                          torch.tensor(safe(prompts, responses))).tolist()
    file, _, name = spec.rpartition(":")
    if file.endswith(".py") and Path(file).is_file():
        module = importlib.util.spec_from_file_location("reward", file)
        code = importlib.util.module_from_spec(module)
        module.loader.exec_module(code)
        if callable(getattr(code, name, None)):
            return getattr(code, name)
    raise BadInput(f"--reward {spec} is unknown: use check, taste, human, rule=REGEX, reward=DIR, "
                   f"helpful=DIR,safe=DIR, or FILE.py:FUNCTION")


def score(reward_fn, prompts, responses):
    """Its scores, (N,) float32; BadInput where it raises, or returns anything but a finite number for each."""
    try:
        scores = torch.tensor([float(s) for s in reward_fn(prompts, responses)])
    except BadInput:
        raise
    except Exception as error:  # whatever the user's own function may raise
        raise BadInput(f"the reward function raised {type(error).__name__}: {error}; it gets a list of prompts and a "
                       f"list of answers and returns a list of numbers") from None
    if len(scores) != len(responses):
        raise BadInput(f"the reward function returned {len(scores)} scores for {len(responses)} answers: it must "
                       f"return one each")
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        raise BadInput(f"the reward function returned {scores[bad[0]].item()} for the answer "
                       f"{responses[bad[0].item()]!r}: a score must be a finite number")
    return scores


# -----------------------------------------------------------------------------
# Models


def load(init, args, process):
    """A model to start from, ready for this process."""
    model = lora.plain(init)
    if args.dtype == "auto":
        cuda = process.device.type == "cuda" and torch.cuda.is_bf16_supported()
        args.dtype = "bfloat16" if cuda else "float32"
    model.compute_dtype = getattr(torch, args.dtype)
    for m in model.modules():  # detail 18
        if isinstance(getattr(m, "dropout", None), float):
            m.dropout = 0.0
    model.config.dropout = 0.0
    return model


def with_scalar_head(model, seed=0, scale=None):
    """
    The same model with a Linear C → 1 on its last hidden states, N(0, 1/√(C+1)) for a reward model (scale None), zero
    for a critic (scale 0). The language head takes no gradient then: nothing asks it.
    """
    if model.config.scalar_head:
        return model
    config = replace(model.config, scalar_head=True)
    std = (config.n_embd + 1) ** -0.5 if scale is None else scale
    weight = torch.randn(1, config.n_embd, generator=torch.Generator().manual_seed(seed)) * std
    found = build_model(config, {**model.state_dict(), "scalar_head.weight": weight}, "the model")
    found.compute_dtype = model.compute_dtype
    return found


def freeze_language_head(model):
    if model.head is not None:
        model.head.weight.requires_grad_(False)
    return model


def optimizer_of(sharded, lr, args):
    """AdamW with ε 1e-5: with 1e-8, the first updates of tiny gradients are of full size (detail 18)."""
    groups = adamw_groups(sharded.stand_in, args.weight_decay)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.99), eps=1e-5)


def memory_table(models, rows, say):
    """
    models: name -> (model, trained?, shared with another?). Bytes of weights, gradients and Adam's moments, of the
    cache.
    """
    say(f"{'memory':12}{'parameters':>14}{'weights':>10}{'gradients':>11}{'moments':>10}   MB")
    for name, (model, trained, shared) in models.items():
        count = sum(p.numel() for p in model.parameters())
        held = 0 if shared else sum(p.numel() * p.element_size() for p in model.parameters())
        grown = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4 if trained else 0
        say(f"{name:12}{count:14,}{held / 1e6:10.1f}{grown / 1e6:11.1f}{2 * grown / 1e6:10.1f}"
            + ("   the actor's" if shared else ""))
    for name, size in rows.items():
        say(f"{name:12}{'':14}{size / 1e6:10.1f}")


# -----------------------------------------------------------------------------
# A start of one's own: --task addition, tastes, multiplication


class Start(NamedTuple):
    """A character model for a task, and how its SFT goes."""
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 96
    lr: float = 2e-3
    batch: int = 128
    warmup: int = 20
    decay: bool = False   # to 0 after --start_steps; the others stop where --stop of their samples are right
    new: int = 6          # tokens of an answer, at most
    rl_lr: float = 1e-3


STARTS = {"addition": Start(), "tastes": Start(decay=True, new=16, rl_lr=3e-4),
          "multiplication": Start(8, 8, 512, lr=5e-4, batch=512, warmup=100, new=24, rl_lr=1e-4)}


def train_start(args, device, say):
    """
    A model of STARTS that answers a task's questions not quite well. Kept in OUT/../start-TASK-…, once for all runs.
    Returns the folder.
    """
    module, shape = importlib.import_module(f"data.{args.task}"), STARTS[args.task]
    noise = f"-noise{args.teacher_noise:g}" if args.teacher_noise else ""
    folder = Path(args.out).parent / f"start-{args.task}{noise}-{args.seed}"
    if (folder / "run.json").exists():
        return folder
    begun, rows = time.time(), list(module.problems("train"))
    tokenizer = Tokenizer.train([module.LETTERS + "\n"], 0, kind="char")
    tokenizer.chat = {"template": "plain", "system": None}
    rng = random.Random(args.seed)
    if args.teacher_noise:  # a teacher that often gets one digit wrong
        for row in rows:
            if rng.random() < args.teacher_noise:
                at, digit = int(rng.random() * len(row["answer"])), str(int(rng.random() * 10))
                row["answer"] = row["answer"][:at] + digit + row["answer"][at + 1:]
    model = GPT(GPTConfig(block_size=48, vocab_size=tokenizer.n_vocab, init="gpt2",
                          **{name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd")}))
    init_weights(model, args.seed)
    model.to(device)
    if device.type == "cuda" if args.compile is None else args.compile:
        model.compile_parts()
    pairs = [data.prompt_and_response(tokenizer, [{"role": "user", "content": r["prompt"]}], r["answer"]) for r in rows]
    x = torch.tensor([p + r[:-1] for p, r in pairs], device=device)
    y = torch.tensor([[-100] * (len(p) - 1) + r for p, r in pairs], device=device)
    asked, end = list(module.problems("train", 500)), chat_end(tokenizer, "plain")
    prompts = [data.question(tokenizer, r["prompt"]) for r in asked]
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.lr, betas=(0.9, 0.99))
    order, accuracy = np.random.default_rng(args.seed), 0.0
    for step in range(args.start_steps):
        rows = torch.from_numpy(order.integers(0, len(x), shape.batch)).to(device)
        for group in optimizer.param_groups:
            group["lr"] = shape.lr * min(1, (step + 1) / shape.warmup) * (1 - shape.decay * step / args.start_steps)
        optimizer.zero_grad()
        loss = model(x[rows], y[rows])[1]
        loss.backward()
        optimizer.step()
        if not shape.decay and step % 5 == 4 and step >= 200:
            found = rollouts(model, prompts, 1, end, shape.new, 1.0, seed=step, batch=500)
            texts = [data.answer_text(tokenizer, ids) for ids, in found]
            accuracy = sum(data.is_right(text, r["answer"]) for text, r in zip(texts, asked)) / 500
            if accuracy >= args.stop:
                break
    metrics = {"train_loss": round(loss.item(), 5), "accuracy_sampled": accuracy,
               "seconds": round(time.time() - begun, 1)}
    save_run(folder, model, {"stage": "start", "step": step + 1, "metrics": metrics, "args": vars(args), "tokenizer":
                             tokenizer.spec()})
    tokenizer.save(folder)
    say(f"start: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {step + 1} steps of SFT in "
        f"{metrics['seconds']} s, loss {loss.item():.3f}" + (f", {accuracy:.1%} of samples right" if accuracy else ""))
    return folder


# -----------------------------------------------------------------------------
# Stage rm: the reward model


def calibration_error(p, bins=10):
    """
    Mean |confidence - accuracy| over bins of confidence max(p, 1 - p); p (B,): chance given to what was preferred.
    """
    confidence, right = torch.maximum(p, 1 - p), (p > 0.5).float()
    which = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    total = 0.0
    for b in which.unique():
        here = which == b
        total += here.float().mean() * (confidence[here].mean() - right[here].mean()).abs()
    return float(total)


def comparisons(args, tokenizer, device, say):
    """(training rows, held-out rows, the best accuracy possible or None) for --stage rm."""
    if args.task in ("pairs", "hh"):
        if args.task == "hh":
            from data import hh
            return hh.preferences("train", args.input)[:args.pairs], hh.preferences("val", args.input)[:512], None
        rows = data.read_preferences(args.input)
        random.Random(0).shuffle(rows)
        n = min(512, max(1, len(rows) // 10))
        return rows[n:][:args.pairs], rows[:n], None
    if args.task != "tastes":
        raise BadInput(f"--stage rm needs comparisons: --task pairs --input FILE, hh, or tastes; {args.task} has none")
    model, rng = lora.plain(args.init, device), random.Random(args.seed)
    end = chat_end(tokenizer, chat_format(tokenizer)[0])
    found, best, sure = [], 0, 0.0
    held = max(200, args.pairs // 5)
    tasks = list(tastes.problems("train", args.pairs + held))
    answers = rollouts(model, [data.question(tokenizer, t["prompt"]) for t in tasks], 2, end, args.max_new_tokens,
                       seed=args.seed + 1, batch=args.rollout_batch)
    for k, (task, pair) in enumerate(zip(tasks, answers)):
        a, b = (data.answer_text(tokenizer, ids) for ids in pair)
        worth = tastes.reward(a), tastes.reward(b)
        if not tastes.preferred(*worth, rng):
            a, b, worth = b, a, worth[::-1]
        if k >= args.pairs:
            best += worth[0] > worth[1]
            sure += 1
        found.append({"messages": [{"role": "user", "content": task["prompt"]}], "ranked": [a, b], "tie": False,
                      "margin": 0.0})
    say(f"{args.pairs} + {held} comparisons of the start's own answers; their true reward gets {best / sure:.1%} of "
        f"the held-out ones right: the ceiling")
    return found[:args.pairs], found[args.pairs:], best / sure


def reward_stage(args, process, say):
    device, started = process.device, time.time()
    tokenizer = Tokenizer.from_pretrained(args.init)
    rows, held, ceiling = comparisons(args, tokenizer, device, say if process.rank == 0 else lambda *a: None)
    model = freeze_language_head(with_scalar_head(load(args.init, args, process), args.seed))
    adapter = lora.from_args(args)
    if adapter is not None:
        lora.apply(model, adapter, tokenizer, args.seed)
        model.scalar_head.weight.requires_grad_(True)
    T, share = min(args.block_size or 2048, model.context), shares_prompts(model.config)
    sharded = shard(model, process, args)
    if sharded.sharded and adapter is not None:
        raise BadInput(f"--parallel {args.parallel} with an adapter cannot gather the model to save it: use ddp or "
                       f"zero1")
    optimizer = optimizer_of(sharded, args.rm_lr, args)
    args.micro_batch = args.micro_batch or max(1, (16384 if device.type == "cuda" else 4096) // T)

    def encode(rows):
        """[((prompt, answers best first, each with one more id behind, so that the end is read), margin)]."""
        found, left_out = [], 0
        for row in rows:
            if "label" in row or row["tie"]:
                left_out += 1
                continue
            both = [data.prompt_and_response(tokenizer, row["messages"], text, args.template) for text in row["ranked"]]
            answers = [[*r[:T - 2], 0] for _, r in both]
            found.append(((both[0][0][-max(1, T + 1 - max(map(len, answers))):], answers), row["margin"]))
        if left_out:
            say(f"left out {left_out} rows without two answers in order")
        if not found:
            raise BadInput(f"--task {args.task} has no comparison of two answers: give prompt, chosen and rejected")
        return found

    def scores(groups, last):
        """[scores (K,) of each group's answers]."""
        packed = data.pack_branches(groups or [([0], [[0, 0]])], T, share, steady=device.type == "cuda")
        idx, targets, positions, doc_ids, segments = (torch.from_numpy(a).to(device) for a in packed[:5])
        ends = segments >= 0
        ends[:, :-1] &= segments[:, 1:] != segments[:, :-1]
        value = lambda model, x: add_up(model.scalar_head(x).squeeze(-1).float() * ends, segments, packed.n)
        inputs = dict(idx=idx, positions=positions, doc_ids=doc_ids, outcome=value)
        found = step_forward(sharded, last, **inputs) if model.training else model(**inputs)
        return found.split([len(r) for _, r in groups]) if groups else [found]

    @torch.no_grad()
    def evaluate(rows):
        model.eval()
        mine, gaps, values = rows[process.dp_rank::process.dp_world], [], []
        for part in same_count(data.micro_batches([g for g, _ in mine], T, args.micro_batch, share), sharded):
            found = scores([mine[g][0] for g in part], True)
            for s in found if part else ():
                i, j = torch.triu_indices(len(s), len(s), 1, device=device)
                gaps += (s[i] - s[j]).tolist()
                values += s.tolist()
        model.train()
        if process.dp_world > 1:
            both = [None] * process.dp_world
            torch.distributed.all_gather_object(both, (gaps, values))
            gaps, values = (sum((b[k] for b in both), []) for k in (0, 1))
        gaps, values = torch.tensor(gaps), torch.tensor(values)
        sizes = gaps.abs().sort().values
        halves = {f"accuracy_{name}": round((gaps[pick] > 0).float().mean().item(), 4) for name, pick in
                  (("close", gaps.abs() <= sizes[len(sizes) // 2]), ("clear", gaps.abs() > sizes[len(sizes) // 2]))
                  if pick.any()}
        return {"rm_loss": -F.logsigmoid(gaps).mean().item(), "accuracy": (gaps > 0).float().mean().item(),
                "calibration_error": calibration_error(gaps.sigmoid())} | halves, values

    train, val = encode(rows), encode(held)
    steps = max(1, math.ceil(args.rm_epochs * len(train) / min(args.rm_batch, len(train))))
    out, log = Path(args.out), None
    if args.template:  # what scores with it later reads what it was trained on
        tokenizer.chat = dict(zip(("template", "system"), chat_format(tokenizer, args.template)))
    if process.rank == 0:
        start_run(out)
        tokenizer.save(out)
        log = open(out / "log.jsonl", "a")
    model.train()
    for step in range(steps):
        batch = data.batch_indices(len(train), args.rm_batch, step, args.seed)
        mine = batch[process.dp_rank::process.dp_world]
        for group in optimizer.param_groups:
            group["lr"] = args.rm_lr * min(1.0, (step + 1) / max(1, 0.1 * steps)) * (1 - step / steps)
        groups = [train[i] for i in mine]
        parts = same_count(data.micro_batches([g for g, _ in groups], T, args.micro_batch, share), sharded)
        totals = torch.zeros(3, device=device)
        for i, part in enumerate(parts):
            found = scores([groups[g][0] for g in part], i == len(parts) - 1)
            if not part:
                (0 * found[0].sum()).backward()
                continue
            losses = [ranking_loss(s, args.margin_weight * groups[g][1], args.center) for s, g in zip(found, part)]
            (sum(losses) / len(batch) * process.dp_world).backward()
            totals += torch.stack((sum(losses).detach(), sum((s[0] > s[-1]).float() for s in found),
                                   sum((s[0] - s[-1]).detach() for s in found)))
        norm = sharded.reduce(args.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sharded.publish()
        loss, right, margin = (all_reduce(totals) / len(batch)).tolist()
        if not math.isfinite(loss):
            raise BadInput(f"the loss is {loss} at step {step + 1}: lower --rm_lr")
        line = {"step": step + 1, "loss": round(loss, 5), "accuracy": round(right, 4), "margin": round(margin, 4),
                "grad_norm": round(float(norm), 4)}
        if log:
            log.write(json.dumps(line) + "\n")
        if (step + 1) % args.log_every == 0 or step in (0, steps - 1):
            say("  ".join(f"{k} {v}" for k, v in line.items()), flush=True)
    metrics, values = evaluate(val)
    if ceiling:
        metrics |= {"ceiling": ceiling, "share_of_ceiling": metrics["accuracy"] / ceiling}
    metrics = {k: round(v, 5) for k, v in metrics.items()} | {"seconds": round(time.time() - started, 1)}
    say("held out: " + "  ".join(f"{k} {v}" for k, v in metrics.items()))
    weights = None if sharded.plain or model.adapter is not None else sharded.state_dict([optimizer]).get("model")
    if process.rank == 0:
        if model.adapter is not None:
            lora.fold(model)
        # detail 19: what the policy sees has mean 0 and deviation 1 over held-out answers
        save_run(out, model, {"stage": "rm", "step": steps, "metrics": metrics, "args": vars(args),
                              "tokenizer": tokenizer.spec(),
                              "reward": {"mean": values.mean().item(), "std": max(values.std().item(), 1e-6)}}, weights)
        print(json.dumps(metrics))
    process.wait()


# -----------------------------------------------------------------------------
# Stage rl


class Rollout(NamedTuple):
    """
    N answers of this rank, in groups of --group to a prompt, and what is known of each token, (N, L), 0 behind the end.
    """
    groups: list              # [(prompt ids, [answer ids, …]), …]
    prompts: list             # N texts
    texts: list
    ended: torch.Tensor       # (N,) bool
    scores: torch.Tensor      # (N,) as the reward_fn gave them
    mask: torch.Tensor
    old: torch.Tensor         # log π_old
    ref: torch.Tensor         # log π_ref
    entropy: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    shaped: torch.Tensor      # (N,) scores as they were used


class Learner:
    """Actor, critic, reference, and one iteration: answers, scores, advantages, updates."""

    def __init__(self, args, process, reward_fn, tokenizer, say):
        self.args, self.process, self.reward_fn, self.tokenizer = args, process, reward_fn, tokenizer
        self.device, self.gae = process.device, args.baseline == "gae"
        actor = load(args.init, args, process)
        self.T, self.share = min(args.block_size or 2048, actor.context), shares_prompts(actor.config)
        if self.gae and args.critic == "head":
            actor = with_scalar_head(actor, scale=0)
        args.micro_batch = args.micro_batch or max(1, (32768 if self.device.type == "cuda" else 4096) // self.T)
        self.adapter = lora.from_args(args)
        if self.adapter is not None:
            lora.apply(actor, self.adapter, tokenizer, args.seed)
            if actor.config.scalar_head:
                actor.scalar_head.weight.requires_grad_(True)
        elif actor.config.scalar_head and not self.gae:
            actor.scalar_head.weight.requires_grad_(False)
        self.actor = actor
        critic = None
        if self.gae and args.critic == "separate":
            critic = load(args.critic_init or args.init, args, process)
            if Tokenizer.from_pretrained(args.critic_init or args.init).spec() != tokenizer.spec():
                raise BadInput(f"--critic_init {args.critic_init} has another tokenizer than --init {args.init}: a "
                               f"critic reads the actor's tokens; start it from a model of the same one")
            critic = freeze_language_head(with_scalar_head(critic, scale=0))
            if self.adapter is not None:
                lora.apply(critic, self.adapter, tokenizer, args.seed)
                critic.scalar_head.weight.requires_grad_(True)
        self.frozen = None
        if self.adapter is None:
            frozen = load(args.init, args, process).requires_grad_(False).eval()
            self.frozen = frozen.to(self.device, frozen.compute_dtype)
        self.sharded = shard(actor, process, args)
        self.optimizer = optimizer_of(self.sharded, args.lr, args)
        self.critic = self.critic_optimizer = None
        if critic is not None:
            self.critic = shard(critic, process, args)
            self.critic_optimizer = optimizer_of(self.critic, args.critic_lr, args)
        # what generates: of sharded parameters a copy, and on a GPU one in 16 bits, whose decoding reads half the bytes
        self.whole, fast = actor, self.device.type == "cuda" and self.adapter is None and not actor.config.scalar_head
        if self.sharded.sharded or fast:
            self.whole = load(args.init, args, process).to(self.device, actor.compute_dtype).requires_grad_(False)
        if self.sharded.sharded and (self.adapter is not None or actor.config.scalar_head):
            raise BadInput(f"--parallel {args.parallel} with an adapter or --critic head cannot gather the actor to "
                           f"generate with: use --parallel ddp, or full tuning with --critic separate")
        self.end = chat_end(tokenizer, chat_format(tokenizer, args.template)[0])
        self.kl_coef = args.kl_coef
        models = {"actor": (actor, True, False), "reference": (self.frozen or actor, False, self.frozen is None)}
        if self.gae:
            models["critic"] = (critic or actor, True, critic is None)
        if isinstance(reward_fn, RewardModel):
            models["reward"] = (reward_fn.model, False, False)
        answers = args.prompts * args.group // process.dp_world
        size = 2 if actor.compute_dtype == torch.bfloat16 else 4
        cache = kv_cache_bytes(actor.config, min(answers, args.rollout_batch), self.T, size)
        memory_table(models, {"KV cache": cache}, say)

    # forward passes

    def forward(self, model, groups, last=True, policy=True, values=False, trunk=True):
        """
        (log π, entropy, V), (n, L) each, of the answers of groups: at the sampling temperature, detail 1; None for what
        is not asked. model: a Sharded, or a plain model that is only read. Without trunk V's gradient ends at its head.
        """
        args = self.args
        steady = self.device.type == "cuda"
        packed = data.pack_branches(groups or [([0], [[0]])], self.T, self.share, steady=steady)
        idx, targets, positions, doc_ids, segments = (torch.from_numpy(a).to(self.device) for a in packed[:5])

        def outcome(model, x):
            found = token_logprobs(model, x, targets, args.temperature, entropy=True) if policy else ()
            return (*found, model.scalar_head(x if trunk else x.detach()).squeeze(-1).float()) if values else found
        inputs = dict(idx=idx, positions=positions, doc_ids=doc_ids, outcome=outcome)
        found = step_forward(model, last, **inputs) if hasattr(model, "stand_in") else model(**inputs)
        found = [by_response(t, segments, packed.n) for t in found]
        return (*(found[:2] if policy else (None, None)), found[-1] if values else None)

    def apart(self, groups):
        """Groups in parts that fit into a micro-batch, and where the answers of each begin among all of them."""
        parts = data.apart(groups, self.T, self.args.micro_batch, self.share)
        return parts, np.cumsum([0] + [len(answers) for _, answers in parts])

    def parts(self, groups, sharded):
        return same_count(data.micro_batches(groups, self.T, self.args.micro_batch, self.share), sharded)

    @torch.no_grad()
    def read(self, model, groups, policy=True, values=False):
        """forward over all groups, in their order, without a gradient: (log π, entropy, V), (N, L)."""
        L = max(len(r) for _, rs in groups for r in rs)
        groups, starts = self.apart(groups)
        out = [torch.zeros(starts[-1], L, device=self.device) for _ in range(3)]
        for part in self.parts(groups, self.sharded):
            found = self.forward(model, [groups[g] for g in part], policy=policy, values=values)
            rows = [i for g in part for i in range(starts[g], starts[g + 1])]
            for whole, t in zip(out, found):
                if t is not None and part:
                    whole[rows, :t.shape[1]] = t
        return out

    def generator(self):
        """The actor, whole: what generates."""
        return gather_into(self.whole, self.actor) if self.whole is not self.actor else self.actor

    @contextlib.contextmanager
    def reference(self):
        if self.frozen is not None:
            yield self.frozen
        else:
            with lora.disabled(self.actor):
                yield self.actor

    # an iteration

    def sample(self, tasks, seed, start=0):
        """[(prompt ids, [answer ids])] and texts and scores of --group answers to each task."""
        args = self.args
        prompts = [data.question(self.tokenizer, task["prompt"], args.template) for task in tasks]
        longest = max(map(len, prompts))
        if longest + args.max_new_tokens > self.T:
            raise BadInput(f"a prompt of {longest} tokens and --max_new_tokens {args.max_new_tokens} do not fit into a "
                           f"row of {self.T}: give shorter prompts, fewer new tokens, or a larger --block_size")
        answers = rollouts(self.generator(), prompts, args.group, self.end, args.max_new_tokens, args.temperature, seed,
                           args.rollout_batch, start)
        texts = [data.answer_text(self.tokenizer, ids) for group in answers for ids in group]
        return list(zip(prompts, answers)), texts, [task["prompt"] for task in tasks for _ in range(args.group)]

    def rollout(self, source, iteration, clock):
        """
        Answers, scores, and every quantity of theirs that the updates use. source(i): the i-th task of the run. With
        --dynamic, prompts whose answers all score the same are replaced by further ones, at most three times over.
        """
        args, process = self.args, self.process
        mine = args.prompts // process.dp_world
        first = iteration * args.prompts * (4 if args.dynamic else 1)
        groups, texts, prompts, scores, drawn = [], [], [], torch.zeros(0), 0
        self.sharded.eval()

        def lacking():  # all ranks go on until all have enough: generation may gather parameters
            return all_reduce(torch.tensor(float(mine - len(groups)), device=self.device)) > 0

        while drawn < (4 if args.dynamic else 1) and lacking():
            at = first + drawn * args.prompts + process.dp_rank * mine
            begun = time.time()
            new, said, asked = self.sample([source(at + k) for k in range(mine)],
                                           (args.seed * 100_003
                                            + iteration) * 4 + drawn, process.dp_rank * mine * args.group)
            clock["rollout"] += time.time() - begun
            begun = time.time()
            found = score(self.reward_fn, asked, said)
            clock["score"] += time.time() - begun
            keep = torch.ones(len(new), dtype=torch.bool)
            if args.dynamic and drawn < 3:
                keep = found.view(-1, args.group).amax(1) > found.view(-1, args.group).amin(1)
            for g in keep.nonzero().flatten().tolist()[:mine - len(groups)]:
                here = slice(g * args.group, (g + 1) * args.group)
                groups, texts, prompts = groups + [new[g]], texts + said[here], prompts + asked[here]
                scores = torch.cat((scores, found[here]))
            drawn += 1
        begun, N = time.time(), len(scores)
        answers = [r for _, rs in groups for r in rs]
        lengths = torch.tensor([len(r) for r in answers], device=self.device)
        mask = (torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]).float()
        ended = torch.tensor([r[-1] == self.end for r in answers], device=self.device)
        scores, shaped = scores.to(self.device), scores.to(self.device)
        total = lambda t: all_reduce(t.clone())
        if args.reward.startswith("helpful="):
            shaped = whiten(shaped, torch.ones_like(shaped), total=total)
        if args.missing_end != "none":
            shaped = punish_missing_end(shaped, ended, args.missing_end, args.end_penalty)
        if args.overlong:
            shaped = shaped + overlong_penalty(lengths.float(), args.max_new_tokens,
                                               int(args.overlong * args.max_new_tokens))
        if args.reward_clip:
            shaped = shaped.clamp(-args.reward_clip, args.reward_clip)
        if args.whiten_rewards:  # detail 9
            shaped = whiten(shaped, torch.ones_like(shaped), shift_mean=False, total=total)
        old, entropy, _ = self.read(self.actor, groups)
        with self.reference() as ref_model:
            ref = self.read(ref_model, groups)[0]
        values = torch.zeros_like(old)
        if self.gae:
            critic = self.actor if self.critic is None else self.critic.model
            critic.eval()
            values = self.read(critic, groups, policy=False, values=True)[2] * mask
        in_reward = args.kl_in == "reward"
        price = kl_estimate(old, ref, args.kl) * mask
        if self.gae:
            rewards = token_rewards(shaped, price if in_reward else torch.zeros_like(price), mask, self.kl_coef)
            advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
            if args.whiten_advantages:
                advantages = whiten(advantages, mask, unbiased=args.std == "unbiased", scale=args.std != "none",
                                    total=total)
        else:
            per_answer = shaped - self.kl_coef * price.sum(1) if in_reward else shaped
            baseline = args.baseline
            if baseline == "batch":  # of all ranks
                mean = total(torch.stack((per_answer.sum(), per_answer.new_tensor(float(N)))))
                per_answer, baseline = per_answer - mean[0] / mean[1], "none"
            advantages = group_advantages(per_answer, args.group, baseline, args.std, args.std_eps)
            advantages, returns = advantages[:, None] * mask, torch.zeros_like(mask)
        if args.mask_truncated:  # an answer that was cut off says nothing
            advantages = advantages * ended[:, None]
        clock["train"] += time.time() - begun
        return Rollout(groups, prompts, texts, ended, scores, mask, old, ref, entropy, values, advantages, returns,
                       shaped), drawn

    def update(self, r, iteration, ptx=None):
        """
        Epochs over the rollout in mini-batches of whole groups, an optimizer step each. Sums run over micro-batches and
        ranks and are divided by the mini-batch's tokens or answers (detail 15). Returns what is logged of it.
        """
        args, process, world = self.args, self.process, self.process.dp_world
        G, stats, updates = args.group, torch.zeros(8, device=self.device), 0
        rng, stopped, most = np.random.default_rng([args.seed, iteration, process.dp_rank]), False, 0.0
        longest, train_actor = args.max_new_tokens, iteration >= args.critic_warmup
        self.sharded.train()
        if self.critic is not None:
            self.critic.train()
        for epoch in range(args.epochs):
            for batch in np.array_split(rng.permutation(len(r.groups)), min(args.minibatches, len(r.groups))):
                drawn = [g * G + k for g in batch for k in range(G)]
                count = all_reduce(torch.stack((r.mask[drawn].sum(), r.mask.new_tensor(float(len(drawn))))))
                groups, starts = self.apart([r.groups[g] for g in batch])
                rows_of = lambda part: torch.tensor([i for g in part for i in drawn[starts[g]:starts[g + 1]]],
                                                    device=self.device, dtype=torch.long)
                parts, here = self.parts(groups, self.sharded), torch.zeros(8, device=self.device)
                if ptx is not None:
                    x, y = ptx(iteration, epoch)
                    loss = step_forward(self.sharded, False, idx=x, targets=y)[1]
                    (args.ptx_weight * train_actor * loss).backward()
                for i, part in enumerate(parts):
                    last = i == len(parts) - 1
                    logp, entropy, values = self.forward(self.sharded, [groups[g] for g in part], last,
                                                         values=self.gae and self.critic is None, trunk=train_actor)
                    if not part:
                        (0 * logp.sum()).backward()
                        continue
                    rows = rows_of(part)
                    L = logp.shape[1]
                    old, ref, mask, advantages = (t[rows, :L] for t in (r.old, r.ref, r.mask, r.advantages))
                    price = self.kl_coef if args.kl_in == "loss" else 0.0
                    loss = grpo_loss(logp, old, advantages, mask, args.aggregate, args.clip, args.clip_high or None,
                                     args.level, longest, ref, price, args.kl, args.kl_ratio, args.algo == "cispo",
                                     args.dual_clip, count)
                    loss = loss * train_actor
                    here[0] += loss.detach()
                    if args.entropy_coef:
                        loss = loss - args.entropy_coef * (entropy * mask).sum() / count[0] * train_actor
                    if self.gae and self.critic is None:
                        value_loss = ppo_value_loss(values, r.values[rows, :L], r.returns[rows, :L], mask,
                                                    args.value_clip).sum()
                        here[1] += value_loss.detach() / count[0]
                        loss = loss + args.value_coef * value_loss / count[0]
                    (loss * world).backward()
                    with torch.no_grad():
                        d = (logp - old) * mask
                        rho = ratios(logp, old, mask, args.level)
                        low, high = 1 - args.clip, 1 + (args.clip_high or args.clip)
                        clipped = ((rho < low) & (advantages < 0)) | ((rho > high) & (advantages > 0))
                        here += torch.stack((here.new_zeros(()), here.new_zeros(()), 0.5 * d.square().sum() / count[0],
                                             (clipped * mask).sum() / count[0], (rho * mask).sum() / count[0],
                                             *here.new_zeros(3)))
                        most = max(most, (rho * mask).max().item())
                here = all_reduce(here)
                if args.target_kl and here[2] > 1.5 * args.target_kl:  # detail 17: this gradient is dropped
                    self.optimizer.zero_grad(set_to_none=True)
                    if not self.sharded.plain:
                        self.actor.zero_grad()
                    stopped = True
                    break
                norm = self.sharded.reduce(args.grad_clip or math.inf)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.sharded.publish()
                here[5] = norm
                if self.critic is not None:
                    parts = self.parts(groups, self.critic)
                    loss_sum = torch.zeros((), device=self.device)
                    for i, part in enumerate(parts):
                        *_, values = self.forward(self.critic, [groups[g] for g in part], i == len(parts) - 1, False,
                                                  True)
                        if not part:
                            (0 * values.sum()).backward()
                            continue
                        rows, L = rows_of(part), values.shape[1]
                        loss = ppo_value_loss(values, r.values[rows, :L], r.returns[rows, :L], r.mask[rows, :L],
                                              args.value_clip)
                        (loss.sum() / count[0] * world).backward()
                        loss_sum += loss.sum().detach() / count[0]
                    self.critic.reduce(args.grad_clip or math.inf)
                    self.critic_optimizer.step()
                    self.critic_optimizer.zero_grad(set_to_none=True)
                    self.critic.publish()
                    here[1] = all_reduce(loss_sum)
                stats, updates = stats + here, updates + 1
            if stopped:
                break
        names = ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "ratio_mean", "grad_norm")
        found = dict(zip(names, (stats / max(1, updates)).tolist()))
        if not math.isfinite(found["policy_loss"] + found["grad_norm"]):
            raise BadInput(f"the loss is {found['policy_loss']}, the gradient norm {found['grad_norm']} in iteration "
                           f"{iteration + 1}: lower --lr or --temperature, or raise --kl_coef")
        most = all_reduce(torch.tensor(most, device=self.device), "max").item()
        return found | {"ratio_max": most, "updates": updates, "stopped": stopped}

    def imitate(self, r):
        """RAFT: SFT on the best answer of each group that has one above its mean. Returns what is logged."""
        args, G = self.args, self.args.group
        scores = r.scores.view(-1, G)
        best = scores.argmax(1)
        chosen = [(p, [rs[k]]) for (p, rs), k, row in zip(r.groups, best.tolist(), scores)
                  if row.max() >= args.raft_above]
        length = sum(len(rs[0]) for _, rs in chosen)
        tokens, kept = all_reduce(torch.tensor([length, len(chosen)], device=self.device)).tolist()
        if not tokens:
            return {"policy_loss": 0.0, "kept": 0}
        self.sharded.train()
        loss_sum, parts = torch.zeros((), device=self.device), self.parts(chosen, self.sharded)
        for i, part in enumerate(parts):
            logp, *_ = self.forward(self.sharded, [chosen[g] for g in part], i == len(parts) - 1)
            loss = -logp.sum() / tokens * (1 if part else 0)
            (loss * self.process.dp_world).backward()
            loss_sum += loss.detach()
        norm = self.sharded.reduce(args.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sharded.publish()
        return {"policy_loss": all_reduce(loss_sum).item(), "grad_norm": float(norm), "kept": kept}

    def describe(self, r):
        """Of a rollout, over all ranks: reward, share of groups without spread, KL, entropy, length, end, critic."""
        G, mask, n = self.args.group, r.mask, len(r.scores)
        d = (r.old - r.ref) * mask
        sums = torch.stack([
            r.scores.sum(), r.scores.square().sum(),
            (r.scores.view(-1, G).amax(1) == r.scores.view(-1, G).amin(1)).float().sum(),
            d.sum(), (kl_estimate(r.old, r.ref, "k3") * mask).sum(), (r.entropy * mask).sum(), mask.sum(),
            r.ended.float().sum(), torch.tensor(float(n), device=self.device), torch.tensor(n / G, device=self.device),
            r.shaped.sum()])
        s, sq, flat, k1, k3, H, tokens, ended, n, groups, shaped = all_reduce(sums).tolist()
        found = {"reward": s / n, "reward_sd": math.sqrt(max(0.0, sq / n - (s / n) ** 2)), "flat_groups": flat / groups,
                 "kl": k1 / n, "kl_k3": k3 / n, "entropy": H / tokens, "length": tokens / n, "end_rate": ended / n,
                 "shaped": shaped / n}
        if self.gae:
            found["explained_variance"] = explained_variance(r.values, r.returns, mask, all_reduce).item()
        return found | {"tokens": tokens}


# -----------------------------------------------------------------------------


@torch.no_grad()
def examine(learner, tasks, args, reward_fn, gold=None):
    """
    Held-out questions: accuracy greedy and sampled where answers are known, else the mean score; KL(π ‖ π_ref) in nats
    an answer over the samples; the share that ends.
    """
    learner.sharded.eval()
    model, found = learner.generator(), {}
    prompts = [data.question(learner.tokenizer, t["prompt"], args.template) for t in tasks]
    checked = args.task != "tastes" and all(t["answer"] for t in tasks)
    for name, temperature in (("", 0.0), ("_sampled", args.temperature)):
        answers = [a for a, in rollouts(model, prompts, 1, learner.end, args.max_new_tokens, temperature, 977,
                                        args.rollout_batch)]
        texts = [data.answer_text(learner.tokenizer, a) for a in answers]
        if checked:
            found["accuracy" + name] = sum(data.is_right(x, t["answer"]) for x, t in zip(texts, tasks)) / len(tasks)
        if not checked and not args.reward.startswith("human"):
            found["reward" + name] = score(reward_fn, [t["prompt"] for t in tasks], texts).mean().item()
        if gold:
            found["true_reward" + name] = score(gold, [t["prompt"] for t in tasks], texts).mean().item()
    groups = [(p, [a]) for p, a in zip(prompts, answers)]
    d = learner.read(learner.actor, groups)[0]
    with learner.reference() as ref:
        d = d - learner.read(ref, groups)[0]
    found |= {"kl": d.sum().item() / len(groups), "ended": sum(a[-1] == learner.end for a in answers) / len(answers)}
    return found, [f"{t['prompt']} {x!r}" for t, x in zip(tasks, texts)][:3]


def best_of_n(learner, tasks, args, reward_fn, gold, say):
    """
    The expected score of the best of n samples by reward_fn, n = 1, 2, 4 … --group, and of its true reward, from
    --group samples each (every subset of n counts: Nakano et al. 2021, appendix I), over KL = log n - (n - 1) / n.
    """
    _, texts, prompts = learner.sample(tasks, args.seed)
    G, rows = args.group, []
    proxy = score(reward_fn, prompts, texts).view(-1, G)
    true = score(gold, prompts, texts).view(-1, G) if gold else proxy
    order = proxy.argsort(1)
    proxy, true = proxy.gather(1, order), true.gather(1, order)
    n = 1
    while n <= G:
        chance = torch.tensor([math.comb(k, n - 1) / math.comb(G, n) for k in range(G)], dtype=torch.float64)
        rows.append({"n": n, "kl": math.log(n) - (n - 1) / n, "reward": (proxy.double() * chance).sum(1).mean().item(),
                     "true_reward": (true.double() * chance).sum(1).mean().item()})
        say("best of {n}: KL {kl:.3f}  reward {reward:.4f}  true reward {true_reward:.4f}".format(**rows[-1]))
        n *= 2
    return rows


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("command", nargs="?", default="train", choices=["train", *COMMANDS],
        help="table, overoptimize: many runs, see above")
    # run
    add("--stage", default="rl", choices=["rl", "rm"], help="the policy, or the reward model")
    add("--init",
        help="policy to start from, and reference (default: out/sft; of addition, tastes and multiplication a model "
             "that is trained first)")
    add("--out", help="run directory (default: out/rl, of --stage rm out/rm); a finished run there is kept as OUT.old")
    add("--resume", action="store_true", help="go on from OUT/optim.pt, with its arguments unless given again")
    add("--seed", type=int, default=0, help="of samples, order and the small start")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of activations")
    add("--compile", default=None, action=flag, help="torch.compile the blocks (default: on CUDA)")
    # task
    add("--task", default="addition",
        help=f"{', '.join(data.TASKS)}, FILE.jsonl with prompt and answer; --stage rm: tastes, hh, or pairs with "
             f"--input")
    add("--input", help="a local file of comparisons, for --stage rm; or the text of --ptx text")
    add("--template", help="chat template (default: the tokenizer's own)")
    add("--reward", help="who scores, see reward_function (default: check; tastes: taste)")
    add("--val", type=int, default=500, help="held-out questions asked before and after")
    add("--recall", type=int, default=-1,
        help="questions about the default world asked before and after (-1: 200 with --task arithmetic)")
    # the small start
    add("--stop", type=float, default=0.42, help="share of right samples at which the start's SFT stops")
    add("--start_steps", type=int, default=1500, help="its most steps")
    add("--teacher_noise", type=float, default=0.0, help="share of its teacher's answers with a random digit")
    # method
    add("--algo", default="ppo", choices=list(ALGOS), help="sets the defaults of the flags up to --overlong")
    add("--baseline", choices=["gae", "mean", "loo", "batch", "none"],
        help="of advantages: a critic, or the group's scores")
    add("--std", choices=["unbiased", "biased", "none"],
        help="deviation that advantages are divided by: the group's, or with gae the batch's (trl, verl, OpenRLHF "
             "unbiased; minimind, HALOs biased; Dr. GRPO none)")
    add("--std_eps", type=float, default=1e-4,
        help="added to a group's (trl 1e-4, verl 1e-6, OpenRLHF 1e-9, HALOs 1e-2)")
    add("--aggregate", choices=["sequence", "token", "constant", "sum"],
        help="what a token's loss weighs, see token_weights")
    add("--level", choices=["token", "sequence", "mean"], help="of the ratio, see ratios")
    add("--clip", type=float, help="ε of the ratio")
    add("--clip_high", type=float, help="above 1 (DAPO 0.28; CISPO's bound; 0: as --clip)")
    add("--kl_in", choices=["reward", "loss"],
        help="where the price of divergence goes: only in the reward does it reach π*")
    add("--kl", choices=["k1", "k2", "k3"], help="its estimator, see kl_estimate")
    add("--kl_coef", type=float, help="β")
    add("--epochs", type=int, help="over each rollout")
    add("--minibatches", type=int, help="of a rollout, an optimizer step each")
    add("--dynamic", default=None, action=flag, help="replace prompts whose answers all score the same")
    add("--overlong", type=float, help="share of --max_new_tokens over which DAPO's length penalty rises; 0: none")
    add("--kl_ratio", action="store_true", help="multiply the KL in the loss by the ratio, as trl does")
    add("--kl_target", type=float, default=0.0, help="of the adaptive controller, nats an answer; 0: β stays")
    add("--kl_horizon", type=float, default=10000, help="its horizon in answers")
    add("--target_kl", type=float, default=0.0,
        help="stop a rollout's epochs where 0.5 (log ratio)² exceeds 1.5 times it; 0: never")
    add("--dual_clip", type=float, default=0.0, help="bound of negative advantages' loss (3 is usual); 0: none")
    add("--entropy_coef", type=float, default=0.0, help="of an entropy bonus")
    add("--missing_end", default="subtract", choices=["none", "replace", "subtract"], help="answers without an end")
    add("--end_penalty", type=float, default=1.0, help="their score, negated, or what it is lowered by")
    add("--mask_truncated", action="store_true", help="answers without an end have no gradient")
    add("--reward_clip", type=float, default=0.0, help="bound of scores; 0: none")
    add("--whiten_rewards", action="store_true", help="scores to deviation 1, their mean kept")
    add("--raft_above", type=float, default=0.5, help="RAFT learns the best answer of a group if it scores so much")
    # critic
    add("--critic", default="separate", choices=["separate", "head"],
        help="a model of its own, or a head on the actor; with an adapter the actor, the head and the reference then "
             "share one base")
    add("--critic_init", help="model that a separate critic starts from, such as out/rm (default: --init)")
    add("--critic_lr", type=float, default=1e-3)
    add("--critic_warmup", type=int, default=0, help="iterations in which only the critic learns")
    add("--value_coef", type=float, default=0.1, help="of the value loss with --critic head")
    add("--value_clip", type=float, default=0.2)
    add("--gamma", type=float, default=1.0)
    add("--lam", type=float, default=0.95, help="λ of GAE")
    add("--whiten_advantages", default=True, action=flag, help="of PPO, over the rollout")
    # rollouts and optimization
    add("--iterations", type=int, default=300)
    add("--prompts", type=int, default=32, help="an iteration, over all processes")
    add("--group", type=int, default=8, help="answers to each prompt")
    add("--temperature", type=float, default=1.0)
    add("--max_new_tokens", type=int, default=0,
        help="(0: addition 6, arithmetic 8, tastes 16, multiplication 24, others 128)")
    add("--block_size", type=int, default=0,
        help="tokens of a packed row, at least of a prompt and its answer (0: the model's, at most 2048)")
    add("--rollout_batch", type=int, default=1024, help="answers generated at once")
    add("--micro_batch", type=int, default=0, help="packed rows per forward pass and process (0: as fits)")
    add("--lr", type=float, default=0,
        help="peak, to 0 in a line (0: 3e-4, of a start above its own; models of 100M and more want 1e-6)")
    add("--warmup", type=int, default=5, help="iterations")
    add("--weight_decay", type=float, default=0.0)
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm; 0: none")
    add("--ptx", help="text for PPO-ptx, as train.py's --data: its loss is added with --ptx_weight")
    add("--ptx_weight", type=float, default=1.0)
    lora.add_flags(parser)
    # reward model
    add("--pairs", type=int, default=4000, help="comparisons to learn from")
    add("--rm_lr", type=float, default=1e-3)
    add("--rm_batch", type=int, default=64)
    add("--rm_epochs", type=float, default=2.0)
    add("--margin_weight", type=float, default=1.0, help="of the rows' margins (LLaMA-2)")
    add("--center", type=float, default=0.01, help="of (r_w + r_l)²")
    # processes
    add("--parallel", default="ddp", choices=list(PARALLEL), help="; ".join(f"{k}: {v}" for k, v in PARALLEL.items()))
    add("--recompute", default="none", choices=["none", "block", "selective"])
    add("--timeout", type=float, default=120)
    # looking
    add("--log_every", type=int, default=10, help="iterations between printed lines; log.jsonl has each")
    add("--sample_every", type=int, default=100, help="iterations between printed answers; 0: only at the end")
    add("--save_every", type=int, default=0, help="iterations between saves of the policy; 0: at the end")
    add("--gold", default="", help="a second judge that only watches, as --reward (tastes with a reward model: taste)")
    # many runs
    add("--seeds", type=int, default=3, help="of a table")
    add("--jobs", type=int, default=1, help="runs at once")
    args = parser.parse_args(argv)
    if args.resume:  # saved arguments become the defaults, so what is given again wins
        parser.set_defaults(**{**load_state(args.out or "out/rl")["args"], "resume": True})
        args = parser.parse_args(argv)
    for name, value in ALGOS[args.algo]._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return check_args(args)


def load_state(out):
    try:
        return torch.load(Path(out) / "optim.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"--resume: there is no {Path(out) / 'optim.pt'}; start without --resume") from None
    except Exception as error:  # pickle, zip and torch each have their own
        raise BadInput(f"{Path(out) / 'optim.pt'} is damaged ({type(error).__name__}): start without "
                       f"--resume") from None


def check_args(args):
    args.out = args.out or ("out/rm" if args.stage == "rm" else "out/rl")
    args.max_new_tokens = args.max_new_tokens or (STARTS[args.task].new if args.task in STARTS else
                                                   8 if args.task == "arithmetic" else 128)
    args.lr = args.lr or (STARTS[args.task].rl_lr if args.task in STARTS else 3e-4)
    args.reward = args.reward or ("taste" if args.task == "tastes" else "check")
    if args.recall < 0:
        args.recall = 200 if args.task == "arithmetic" else 0
    if args.task == "tastes" and args.reward.startswith("reward=") and not args.gold:
        args.gold = "taste"
    if args.stage == "rl" and args.task not in data.TASKS and not Path(args.task).is_file():
        raise BadInput(f"--task {args.task} is unknown: use one of {', '.join(data.TASKS)}, or a file of questions")
    compares = args.algo in ("raft", "best_of_n") or args.baseline in ("mean", "loo")
    needs_group = compares or args.std != "none" and args.baseline != "gae"
    if args.group < 2 and needs_group and args.stage == "rl":
        raise BadInput(f"--group {args.group}: --algo {args.algo} compares answers to one prompt: give 2 or more")
    for name in ("prompts", "group", "max_new_tokens", "iterations", "epochs", "minibatches", "rollout_batch", "pairs",
                 "val", "start_steps", "log_every"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: give 1 or more")
    if args.temperature <= 0:
        raise BadInput(f"--temperature {args.temperature:g}: learning from samples needs some chance in them; 1 is "
                       f"usual")
    if args.kl_target and args.kl_in != "reward":
        raise BadInput("--kl_target steers the price in the reward: add --kl_in reward")
    if args.kl_target and not args.kl_coef > 0:
        raise BadInput("--kl_target multiplies --kl_coef, which is 0 and would stay so: give it a start, such as 0.05")
    if args.algo == "cispo" and not args.clip_high > 0:
        raise BadInput(f"--clip_high {args.clip_high:g}: cispo's weights need a bound above 0; 5 is usual")
    if args.stage == "rm" and args.resume:
        raise BadInput("--stage rm does not resume: start it again")
    if args.stage == "rm" and args.task == "pairs" and not args.input:
        raise BadInput("--task pairs needs --input FILE.jsonl")
    return args


def main():
    args = get_args()
    if args.command != "train":
        return COMMANDS[args.command](args)
    process = setup_process(args.device, args)
    device, main_process = process.device, process.rank == 0
    say = print if main_process else lambda *a, **k: None
    started, out = time.time(), Path(args.out)
    if args.init is None:
        if args.task in STARTS:
            if main_process:
                train_start(args, device, say)
            process.wait()
            args.init = str(train_start(args, device, lambda *a: None))
        else:
            args.init = "out/sft"
    if not args.resume:
        check_out(out, args.init)
    if args.stage == "rm":
        reward_stage(args, process, say)
        return process.close()

    # tasks, reward, models
    tokenizer = Tokenizer.from_pretrained(args.init)
    known = args.task in data.TASKS
    train, val = (data.read_tasks(args.task if known else "", split, n, None if known else args.task)
                  for split, n in (("train", 40_000), ("val", args.val)))
    if not known:  # a file has no split of its own
        random.Random(0).shuffle(train)
        train, val = train[args.val:], train[:args.val]
        if not train:
            raise BadInput(f"--task {args.task} has no more than the --val {args.val} questions held out: lower --val")
    reward_fn = reward_function(args.reward, train + val, device)
    gold = reward_function(args.gold, train + val, device) if args.gold else None
    if args.prompts % process.dp_world:
        raise BadInput(f"--prompts {args.prompts} is not a multiple of the {process.dp_world} processes")
    order = np.random.default_rng(args.seed).permutation(len(train))
    source = lambda i: train[order[i % len(train)]]
    learner = Learner(args, process, reward_fn, tokenizer, say)
    if args.template:  # what chats with it later writes what it was trained on
        tokenizer.chat = dict(zip(("template", "system"), chat_format(tokenizer, args.template)))
    if device.type == "cuda" if args.compile is None else args.compile:
        learner.actor.compile_parts()
    if args.ptx:
        if process.rank == 0:
            data.prepared(tokenizer, args.ptx, args.input)
        process.wait()
        folders = data.prepared(tokenizer, args.ptx, args.input)
        loader = data.TokenLoader([(w, data.open_tokens(f / "train.bin")) for w, f in folders.values()], learner.T,
                                  args.seed)

        def more(iteration, epoch):
            rows = max(1, 2048 // learner.T)
            at = ((iteration * args.epochs + epoch) * process.dp_world + process.dp_rank) * rows
            batch = torch.from_numpy(loader.batch(at, rows)).to(device)
            return batch[:, :-1], batch[:, 1:]
    recall = []
    if args.recall:
        from data import bios
        recall = bios.checks()["recall"][:args.recall]

    def look():
        found, shown = examine(learner, val, args, reward_fn, gold)
        if recall:
            found["recall"] = data.exact_match(learner.generator(), tokenizer, recall)[0]
        return found, shown

    saved = load_state(out) if args.resume else None
    before, shown = (saved["before"], [""]) if saved else look()
    say("before: " + "  ".join(f"{k} {v:.4f}" for k, v in before.items()) + f"   {shown[0]}")
    if main_process:
        if saved:
            os.truncate(out / "log.jsonl", saved["log"])
        else:
            start_run(out)
            tokenizer.save(out)
        log = open(out / "log.jsonl", "a")
    process.wait()
    trained = {"actor": (learner.sharded, learner.optimizer)}
    if learner.critic is not None:
        trained["critic"] = (learner.critic, learner.critic_optimizer)
    if saved:
        learner.kl_coef = saved["kl_coef"]
        for name, (sharded, optimizer) in trained.items():
            sharded.load_state_dict(saved[name], [optimizer])

    def save(metrics, iteration):
        state = {name: sharded.state_dict([optimizer]) for name, (sharded, optimizer) in trained.items()}
        weights = None if learner.sharded.plain else state["actor"].get("model")
        if main_process:
            log.flush()
            with replace_file(out / "optim.pt") as f:
                torch.save({**state, "iteration": iteration, "kl_coef": learner.kl_coef, "before": before,
                            "args": vars(args),
                            "log": (out / "log.jsonl").stat().st_size}, f)
        run_json = {"stage": "rl", "step": iteration, "metrics": metrics, "args": vars(args),
                    "tokenizer": tokenizer.spec()}
        if main_process:
            if learner.adapter is not None:
                lora.save(out, learner.actor, run_json, args.init)
            else:
                save_run(out, learner.actor, run_json, weights)
        process.wait()

    if args.algo == "best_of_n":
        rows = best_of_n(learner, val[:max(1, 4096 // args.group)], args, reward_fn, gold, say)
        metrics = {f"best_of_{r['n']}": r["reward"] for r in rows} | {"seconds": time.time() - started}
        if main_process:
            for r in rows:
                log.write(json.dumps(r) + "\n")
        metrics = {k: float(f"{v:.6g}") for k, v in metrics.items()}
        save(metrics, 0)
        say(json.dumps(metrics))
        return process.close()

    # loop
    warned = set()
    clock, tokens = dict.fromkeys(("rollout", "score", "train"), 0.0), 0
    for iteration in range(saved["iteration"] if saved else 0, args.iterations):
        share = min(1.0, (iteration + 1) / max(1, args.warmup)) * (1 - iteration / args.iterations)
        for optimizer, peak in ((learner.optimizer, args.lr), (learner.critic_optimizer, args.critic_lr)):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = peak * share
        begun, now = time.time(), dict.fromkeys(clock, 0.0)
        r, drawn = learner.rollout(source, iteration, now)
        line = {"iteration": iteration + 1} | learner.describe(r)
        if gold:
            true = score(gold, r.prompts, r.texts)
            total = all_reduce(torch.stack((true.sum(), true.new_tensor(len(true)))).to(device))
            line["true_reward"] = (total[0] / total[1]).item()
        start = time.time()
        line |= learner.imitate(r) if args.algo == "raft" else learner.update(r, iteration, more if args.ptx else None)
        now["train"] += time.time() - start
        if args.kl_target:
            learner.kl_coef = adaptive_kl(learner.kl_coef, line["kl"], args.kl_target, args.kl_horizon,
                                          args.prompts * args.group)
        seconds = time.time() - begun
        if iteration:  # the first compiles
            clock, tokens = {k: clock[k] + now[k] for k in clock}, tokens + line["tokens"]
        line |= {"kl_coef": learner.kl_coef, "lr": args.lr * share, "drawn": drawn,
                 "tokens_per_s": line["tokens"] / seconds}
        line |= {f"share_{k}": v / seconds for k, v in now.items()}
        if main_process:
            log.write(json.dumps({k: v if isinstance(v, (int, bool)) else float(f"{v:.6g}") for k, v in line.items()})
                      + "\n")
        if (iteration + 1) % args.log_every == 0 or iteration in (0, args.iterations - 1):
            say(f"{iteration + 1}/{args.iterations}  reward {line['reward']:.3f} ± {line['reward_sd']:.3f}"
                + (f"  true {line['true_reward']:.3f}" if gold else "")
                + f"  flat {line['flat_groups']:.2f}  KL {line['kl']:.3f} (k3 {line['kl_k3']:.3f})"
                + f"  entropy {line['entropy']:.3f}"
                + (f"  approx KL {line['approx_kl']:.1e}  clip {line['clip_fraction']:.3f}  ratio < "
                   f"{line['ratio_max']:.2f}"
                   if "approx_kl" in line else f"  kept {line['kept']}")
                + (f"  EV {line['explained_variance']:.2f}" if learner.gae else "")
                + f"  length {line['length']:.1f}  end {line['end_rate']:.2f}  {line['tokens_per_s']:,.0f} tok/s ("
                + " ".join(f"{k} {v / seconds:.0%}" for k, v in now.items()) + ")", flush=True)
        for name, bad, advice in (
                ("flat", line["flat_groups"] > 0.9, "nine of ten groups score all the same and teach nothing: give "
                                                    "harder or "
                 "easier questions, or --dynamic"),
                ("end", line["end_rate"] < 0.5, "more than half of the answers do not end: raise --max_new_tokens or "
                 "--end_penalty"),
                ("entropy", line["entropy"] < 0.01, "hardly any chance is left in the answers: raise --kl_coef or "
                 "--entropy_coef, or lower --lr"),
                ("kl", line["kl"] > 50, "the policy is more than 50 nats from the reference: raise --kl_coef or lower "
                                        "--lr")):
            if bad and name not in warned and main_process:
                warned.add(name)
                say(f"warning: {advice}")
        if args.sample_every and (iteration + 1) % args.sample_every == 0:
            for k in range(min(2, len(r.groups))):
                say(f"    {r.prompts[k * args.group]} {r.texts[k * args.group]!r}  {r.scores[k * args.group]:.2f}")
        if args.save_every and (iteration + 1) % args.save_every == 0:
            save({}, iteration + 1)

    # before and after
    after, shown = look()
    say(f"{'':24}{'before':>10}{'after':>10}")
    for name in after:
        say(f"{name:24}{before[name]:10.4f}{after[name]:10.4f}")
    metrics = after | {f"{name}_before": value for name, value in before.items()}
    total = sum(clock.values())
    metrics |= {"tokens_per_s": tokens / total} | {f"share_{k}": v / total for k, v in clock.items()} if total else {}
    metrics |= {"peak_memory": peak_memory(device), "seconds": time.time() - started}
    metrics = {k: float(f"{v:.6g}") for k, v in metrics.items()}
    save(metrics, args.iterations)
    if main_process:
        for text in shown:
            print("    " + text)
        print(json.dumps(metrics))
    process.close()


# -----------------------------------------------------------------------------
# Many runs


def table(args):
    """Methods on --task from the same start of each seed: mean ± sd over seeds, before and after."""
    root, runs = Path(args.out), {}
    rows = {"PPO": ["--algo", "ppo"], "GRPO": ["--algo", "grpo", "--iterations", 400],
            "Dr. GRPO": ["--algo", "dr_grpo", "--iterations", 400], "DAPO": ["--algo", "dapo", "--iterations", 400],
            "GSPO": ["--algo", "gspo", "--iterations", 400], "CISPO": ["--algo", "cispo", "--iterations", 400],
            "RLOO": ["--algo", "rloo", "--iterations", 400], "REINFORCE": ["--algo", "reinforce", "--iterations", 400],
            "RAFT": ["--algo", "raft", "--iterations", 400]}
    if args.task == "addition":
        rows["GRPO, noisy teacher"] = ["--algo", "grpo", "--iterations", 150, "--teacher_noise", 0.6]
    common = ["--task", args.task, "--device", args.device] + ["--init", args.init] * bool(args.init)
    starts = {(seed, noise): None for seed in range(args.seeds) for noise in (0.0, 0.6)[:1 + (args.task == "addition")]}
    for seed, noise in starts if not args.init and args.task in STARTS else ():
        args.seed, args.teacher_noise = seed, noise
        args.out = str(root / "start")  # beside the runs
        train_start(args, setup_process(args.device).device, print)
    for name, flags in rows.items():
        for seed in range(args.seeds):
            runs[str(root / f"{name.replace(' ', '').replace(',', '-')}-{seed}")] = [*common, *flags, "--seed", seed]
    found = lora.launch("rlhf.py", runs, args.jobs)
    columns = [c for c in ("accuracy_before", "accuracy_sampled_before", "accuracy", "accuracy_sampled", "reward", "kl",
                           "recall_before", "recall", "seconds") if any(c in m for m in found.values())]
    print("| method | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name in rows:
        prefix, cells = str(root / f"{name.replace(' ', '').replace(',', '-')}-"), []
        for column in columns:
            values = np.array([m.get(column, math.nan) for out, m in found.items() if out.rpartition("-")[0]
                               + "-" == prefix])
            cells.append(f"{values.mean():.3f} ± {values.std(ddof=1) if len(values) > 1 else 0:.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def overoptimize(args):
    """
    A reward model of --pairs comparisons of strings, PPO against it at three prices, and the best of n by it: proxy and
    true reward over KL (Gao et al. 2023). Writes OUT.svg and OUT.json beside the runs.
    """
    root, seed = Path(args.out), ["--task", "tastes", "--seed", args.seed, "--device", args.device]
    lora.launch("rlhf.py", {str(root / "rm"): [*seed, "--stage", "rm", "--pairs", args.pairs]}, 1)
    proxy = [*seed, "--reward", f"reward={root / 'rm'}", "--iterations", args.iterations]
    runs = {str(root / f"ppo-{beta}"): [*proxy, "--kl_coef", beta] for beta in ("0", "0.05", "0.2")}
    runs[str(root / "best")] = [*proxy, "--algo", "best_of_n", "--group", 256]
    lora.launch("rlhf.py", runs, args.jobs)
    rm = json.loads((root / "rm" / "run.json").read_text())
    curves = {}
    for out in runs:
        rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
        every = max(1, len(rows) // 25)
        name = {"best": "best of n"}.get(Path(out).name, Path(out).name.replace("ppo-", "PPO, β "))
        curves[f"{name}: reward model"] = [(round(r["kl"], 4), round(r["reward"] * rm["reward"]["std"], 4))
                                           for r in rows[::every]]
        curves[f"{name}: true"] = [(round(r["kl"], 4), round(r["true_reward"], 4)) for r in rows[::every]]
    shift = curves["best of n: true"][0][1] - curves["best of n: reward model"][0][1]
    curves = {name: [(x, round(y + shift * ("model" in name), 4)) for x, y in points] for name,
              points in curves.items()}
    tastes.plot(root.with_suffix(".svg"), curves, "KL from the start, nats", "reward", lines=list(curves), width=760)
    with replace_file(root.with_suffix(".json"), "w") as f:
        json.dump({"reward_model": rm["metrics"], "curves": curves}, f)
    print(json.dumps(rm["metrics"]))
    for name, points in curves.items():
        print(f"{name}: " + "  ".join(f"{x:.2f}:{y:+.2f}" for x, y in points[:: max(1, len(points) // 8)]))


COMMANDS = {"table": table, "overoptimize": overoptimize}

if __name__ == "__main__":
    cli(main)
