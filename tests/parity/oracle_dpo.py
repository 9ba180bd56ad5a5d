"""
The preference losses of trl, whichever version is installed, on fixed log-probabilities. As a script it writes what
tests/test_dpo.py compares with, one version's part at a time:

    # IPO by mean, per-token DPO, SFT, …
    pip install trl==1.16.0 transformers==5.23.0; python tests/parity/oracle_dpo.py
    # cDPO, IPO by sum, KTO, ORPO, CPO, …
    pip install trl==0.24.0 transformers==4.57.6; python tests/parity/oracle_dpo.py
"""
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "dpo.json"
LENGTHS = [3, 6, 1, 4, 5, 2, 6, 4, 1, 3]  # of five chosen, then of the five rejected responses
BETA, EPSILON, GAMMA = 0.3, 0.15, 0.5


def inputs():
    """Per-token log-probabilities of policy and reference (10, 6) float64, 0 behind a response's end; log-ratios of
    five mismatched responses (5,), and labels for unpaired rows (10,)."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    policy, ref = (-torch.rand(10, 6, generator=g, dtype=torch.float64) * 3 * mask for _ in range(2))
    return policy, ref, mask, torch.randn(5, generator=g, dtype=torch.float64) + 0.5


def accelerator():
    same = lambda t: t
    return SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=same, gather=same)


def new_losses():
    """name -> mean loss as a function of the policy's per-token log-probabilities, from trl 1.16's DPOTrainer."""
    from trl import DPOTrainer
    _, ref, mask, _ = inputs()
    ref = ref.sum(1)

    def of(kind, weights=None):
        def loss(policy):
            kinds = kind if isinstance(kind, list) else [kind]
            stub = SimpleNamespace(
                model=SimpleNamespace(training=True), accelerator=accelerator(), ld_alpha=None, aux_loss_enabled=False,
                precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=kinds, beta=BETA,
                use_weighting=False, loss_weights=weights or [1.0], label_smoothing=EPSILON,
                _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1)
            outputs = SimpleNamespace(log_probs=policy, entropy=policy.detach() * 0, mean_logits=policy.detach(),
                                      is_top1=mask)
            completion = torch.cat((torch.zeros(10, 1, dtype=torch.long), mask.long()), 1)
            batch = dict(input_ids=torch.ones_like(completion), attention_mask=torch.ones_like(completion),
                         completion_mask=completion, ref_chosen_logps=ref[:5], ref_rejected_logps=ref[5:])
            return DPOTrainer._compute_loss(stub, lambda **_: outputs, batch, False)
        return loss
    return {"dpo": of("sigmoid"), "hinge": of("hinge"), "ipo_mean": of("ipo"), "robust": of("robust"),
            "dpo_per_token": of("sigmoid_norm"), "dpo_sft": of(["sigmoid", "sft"], [1.0, 0.7])}


def old_losses():
    """The same from trl 0.24's pure methods."""
    from trl import CPOTrainer, DPOTrainer, KTOTrainer, ORPOTrainer
    _, ref, mask, mismatched = inputs()
    ref, n = ref.sum(1), mask.sum(1)

    def dpo(kind, smoothing=0.0, free=False):
        stub = SimpleNamespace(accelerator=accelerator(), beta=BETA, label_smoothing=smoothing, reference_free=free,
                               f_divergence_type="reverse_kl", f_divergence_params={}, model=None)
        return lambda policy: DPOTrainer.dpo_loss(stub, policy.sum(1)[:5], policy.sum(1)[5:], ref[:5], ref[5:], kind,
                                                  {})[0].mean()

    def cpo(kind, per_token, beta=BETA):
        stub = SimpleNamespace(accelerator=accelerator(), beta=beta, label_smoothing=0.0, loss_type=kind, alpha=0.0,
                               simpo_gamma=GAMMA)
        norm = n if per_token else 1
        return lambda policy: CPOTrainer.cpo_loss(stub, (policy.sum(1) / norm)[:5],
                                                  (policy.sum(1) / norm)[5:])[0].mean()

    def orpo(policy):
        stub = SimpleNamespace(accelerator=accelerator(), beta=BETA)
        mean = policy.sum(1) / n
        return -ORPOTrainer.odds_ratio_loss(stub, mean[:5], mean[5:])[0].mean()

    def kto(policy):
        stub = SimpleNamespace(accelerator=accelerator(), beta=BETA, loss_type="kto", calculate_KL=True,
                               desirable_weight=1.3, undesirable_weight=0.6)
        sums = policy.sum(1)
        return KTOTrainer.kto_loss(stub, sums[:5], sums[5:], mismatched, ref[:5], ref[5:], torch.zeros(5))[0].mean()
    return {"dpo": dpo("sigmoid"), "cdpo": dpo("sigmoid", EPSILON), "robust": dpo("robust", EPSILON),
            "hinge": dpo("hinge"), "ipo_sum": dpo("ipo"), "dpo_reference_free": dpo("sigmoid", free=True),
            "cpo": cpo("sigmoid", False), "simpo": cpo("simpo", True, 2.0), "orpo": orpo, "kto": kto}


def evaluate(loss):
    """(loss, gradient by the per-token log-probabilities) as lists."""
    policy = inputs()[0].requires_grad_()
    value = loss(policy)
    value.backward()
    return value.item(), policy.grad.tolist()


if __name__ == "__main__":
    import trl
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    losses = new_losses() if trl.__version__ >= "1" else old_losses()
    golden[f"trl {trl.__version__}"] = {name: evaluate(loss) for name, loss in losses.items()}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden))
