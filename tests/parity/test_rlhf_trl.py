"""The installed trl against the golden numbers of rlhf.py's tests, and its GRPO and reward trainers' forward passes."""
import json

import pytest
import torch

import rlhf
from conftest import package
from parity import oracle_rlhf as oracle


def test_the_golden_numbers_are_what_the_installed_trl_says():
    trl = package("trl")
    golden = json.loads(oracle.GOLDEN.read_text())[f"trl {trl.__version__}"]
    if trl.__version__ >= "1":
        for name, case in oracle.new_losses().items():
            value, gradient = oracle.evaluate(*case)
            assert value == pytest.approx(golden[name][0], abs=1e-9)
            assert (torch.tensor(gradient) - torch.tensor(golden[name][1])).abs().max() < 1e-9
    else:
        for name, value in oracle.old_ppo().items():
            assert (value - torch.tensor(golden[name], dtype=torch.float64)).abs().max() < 1e-9


@pytest.mark.parametrize("scale", ["group", "none"])
def test_group_advantages_are_trls(scale):
    """GRPOTrainer's lines on the same rewards: mean of the group, unbiased deviation + 1e-4."""
    package("trl")
    from trl.trainer.utils import nanstd
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 3.0, 3.0, 3.0, 3.0])
    groups = rewards.view(2, 4)
    expected = groups - torch.nanmean(groups, dim=1, keepdim=True)
    if scale == "group":
        expected = expected / (nanstd(groups, dim=1)[:, None] + 1e-4)
    found = rlhf.group_advantages(rewards, 4, std="unbiased" if scale == "group" else "none")
    assert torch.allclose(found, expected.flatten(), atol=1e-6)
