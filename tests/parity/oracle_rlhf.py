"""
What the installed trl says about reward models and policies, on fixed numbers; see oracle_dpo.py. As a script it writes
tests/golden/rlhf.json: GRPO's family, RLOO and the reward model by trl 1.16.0, PPO's helpers by trl 0.24.0, whose
trainer computes them inside one long function: the lines are taken from its source.
"""
import inspect
import json
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "rlhf.json"
LENGTHS = [3, 6, 1, 4, 5, 2, 6, 4]
LONGEST = 6
CLIP, HIGH, BETA = 0.2, 0.28, 0.3


def inputs():
    """name -> float64 tensor: tokens (8, 6) of eight answers, two groups of four; 0 behind an end."""
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).double()
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    old = -draw(8, LONGEST).abs() * mask
    return dict(mask=mask, old=old, policy=(old + 0.3 * draw(8, LONGEST)) * mask,
                ref=(old + 0.3 * draw(8, LONGEST)) * mask, advantages=draw(8), scores=draw(8),
                values=draw(8, LONGEST) * mask, rewards=draw(8, LONGEST) * mask,
                new_values=draw(8, LONGEST) * mask, margin=draw(4).abs())


def stub(**more):
    same = lambda t, *a, **k: t
    accelerator = SimpleNamespace(reduce=same, gather=same, gather_for_metrics=same, num_processes=1, device="cpu",
                                  sync_gradients=True)
    return SimpleNamespace(accelerator=accelerator, model=SimpleNamespace(training=True), aux_loss_enabled=False,
                           _metrics=defaultdict(lambda: defaultdict(list)),
                           current_gradient_accumulation_steps=1, **more)


def completions(mask):
    ids = torch.zeros(mask.shape, dtype=torch.long)
    return dict(prompt_ids=ids[:, :1], prompt_mask=ids[:, :1] + 1, completion_ids=ids, completion_mask=mask.long())


def new_losses():
    """name -> loss as a function of the tensor that is trained: the policy's log-probabilities, or scores."""
    from trl import GRPOTrainer, RewardTrainer, RLOOTrainer
    x = inputs()

    def grpo(kind, level="token", beta=0.0, ratio=False, high=CLIP):
        def loss(policy):
            self = stub(_get_per_token_logps_and_entropies=lambda *a, **k: (policy, policy.detach() * 0, None),
                        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=level,
                        beta=beta,
                        args=SimpleNamespace(use_bias_correction_kl=ratio, delta=None, steps_per_generation=1),
                        epsilon_low=CLIP, epsilon_high=high, loss_type=kind, use_vllm=False,
                        max_completion_length=LONGEST, _entropy_bonus_enabled=False)
            batch = completions(x["mask"]) | dict(advantages=x["advantages"], old_per_token_logps=x["old"],
                                                  ref_per_token_logps=x["ref"], num_items_in_batch=x["mask"].sum())
            return GRPOTrainer._compute_loss(self, None, batch)
        return loss

    def rloo(policy):
        self = stub(_get_per_token_logps_and_entropies=lambda *a, **k: (policy, policy.detach() * 0, None),
                    epsilon_low=CLIP, epsilon_high=CLIP)
        batch = completions(x["mask"]) | dict(advantages=x["advantages"], old_logps=x["old"].sum(1))
        return RLOOTrainer._compute_loss(self, None, batch)

    def reward(margin, center):
        def loss(scores):
            self = stub(args=SimpleNamespace(center_rewards_coefficient=center), _total_train_tokens=0, _tp_size=1)
            batch = dict(attention_mask=torch.ones(8, 1)) | ({"margin": x["margin"]} if margin else {})
            model = lambda **_: SimpleNamespace(logits=scores[:, None])
            return RewardTrainer.compute_loss(self, model, batch)
        return loss
    policies = {"grpo": grpo("grpo"), "bnpo": grpo("bnpo"), "dr_grpo": grpo("dr_grpo"), "dapo": grpo("dapo", high=HIGH),
                "gspo": grpo("grpo", "sequence"), "cispo": grpo("cispo", high=1.1), "grpo_k3": grpo("grpo", beta=BETA),
                "grpo_k3_ratio": grpo("grpo", beta=BETA, ratio=True), "rloo": rloo}
    rewards = {"bradley_terry": reward(False, None), "margin_center": reward(True, 0.01)}
    return {**{k: (f, "policy") for k, f in policies.items()}, **{k: (f, "scores") for k, f in rewards.items()}}


def old_ppo():
    """PPO's quantities from trl 0.24: whitened tensors, advantages, returns, losses."""
    from trl.core import masked_mean, masked_whiten
    from trl.trainer.ppo_trainer import PPOTrainer
    x, source = inputs(), inspect.getsource(PPOTrainer.train)
    args = SimpleNamespace(gamma=0.98, lam=0.9, cliprange=CLIP, cliprange_value=CLIP, vf_coef=0.1)
    padded = x["mask"] == 0

    def run(start, end, **names):
        first, last = (source.rindex("\n", 0, source.index(mark)) + 1 for mark in (start, end))
        code = textwrap.dedent(source[first:last])
        space = dict(torch=torch, masked_mean=masked_mean, masked_whiten=masked_whiten, args=args,
                     empty_cache=lambda: None, **names)
        exec(code, space)
        return space
    g = run("# 6. compute advantages", "# Do multiple epochs", rewards=x["rewards"], values=x["values"],
            responses=x["mask"], padding_mask=padded)
    everything = slice(None)
    losses = run("vpredclipped = torch.clamp(", "accelerator.backward(loss)", vpred=x["new_values"],
                 mb_values=x["values"], mb_return=g["returns"], padding_mask=padded, padding_mask_p1=padded,
                 micro_batch_inds=everything, new_logprobs=x["policy"], mb_logprobs=x["old"],
                 mb_advantage=g["advantages"])
    keep = masked_whiten(x["rewards"], ~padded, shift_mean=False).masked_fill(padded, 0)
    return {"advantages": g["advantages"], "returns": g["returns"] * x["mask"], "whiten_keep_mean": keep,
            "policy_loss": losses["pg_loss"], "value_loss": losses["vf_loss"]}


def evaluate(loss, name):
    x = inputs()[name].requires_grad_()
    value = loss(x)
    value.backward()
    return value.item(), x.grad.tolist()


if __name__ == "__main__":
    import trl
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if trl.__version__ >= "1":
        golden[f"trl {trl.__version__}"] = {name: evaluate(*case) for name, case in new_losses().items()}
    else:
        golden[f"trl {trl.__version__}"] = {name: t.tolist() for name, t in old_ppo().items()}
    GOLDEN.write_text(json.dumps(golden))
