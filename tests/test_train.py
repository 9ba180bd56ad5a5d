"""The train room as a specification: optimizers, schedules, batches, and runs of the script itself."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import train as T
from bpe import BadInput
from conftest import ROOT
from model import GPT, GPTConfig, Process, init_weights

CPU = Process(torch.device("cpu"), 0, 1)
SMALL = ["--data", "arithmetic", "--tokenizer", "char", "--block_size", "32", "--n_layer", "2", "--n_head", "2",
         "--n_embd", "32", "--batch_tokens", "256", "--warmup", "2", "--eval_every", "0", "--save_every", "0",
         "--eval_tokens", "512", "--device", "cpu", "--log_every", "1"]


def run(*args, world=1, check=0, **kwargs):
    """train.py in a process of its own (or two, through torchrun); returns what it printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)] \
        if world > 1 else [sys.executable]
    done = subprocess.run([*launch, str(ROOT / "train.py"), *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, **kwargs)
    assert done.returncode == check, done.stdout + done.stderr
    assert "Traceback" not in done.stderr or world > 1, done.stderr
    return done.stdout + done.stderr


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out):
    return torch.load(out / "optim.pt", weights_only=True)["model"]


# --- optimizers and schedules


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (2, 64, 16), (1, 16, 24)])
def test_orthogonalized_updates_have_singular_values_near_one(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    s = torch.linalg.svdvals(T.orthogonalize(G))
    big = torch.linalg.svdvals(G) > 0.01 * G.norm(dim=(-2, -1)).unsqueeze(1)  # what the quintics promise to reach
    assert big.float().mean() > 0.9 and (s[big] - 1).abs().max() < 0.03 and s.max() < 1.03
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    wide_enough = big.all(-1)
    assert torch.allclose(T.orthogonalize(G)[wide_enough], (U @ V)[wide_enough], atol=0.05)


def test_orthogonalizing_a_nearly_rank_one_gradient_in_bf16_stays_bounded():
    g = torch.Generator().manual_seed(0)
    for i in range(20):
        G = torch.randn(1, 64, 1, generator=g) @ torch.randn(1, 1, 64, generator=g) * (1 + i / 20)
        X = (G / (G.norm() + 1e-7)).bfloat16()
        for a, b, c in T.POLAR:
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
        assert torch.linalg.matrix_norm(X.float(), 2).item() < 1.1


def test_the_polynomial_of_the_gram_matrix_equals_the_steps_on_the_matrix():
    X = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(0))
    X = Y = X / X.norm(dim=(-2, -1), keepdim=True)
    for a, b, c in T.POLAR:
        A = Y @ Y.mT
        Y = a * Y + (b * A + c * A @ A) @ Y
    assert torch.allclose(Y, T.polar_factor(X @ X.mT) @ X, atol=1e-4)


def test_muon_is_momentum_then_orthogonalization():
    p = torch.nn.Parameter(torch.zeros(8, 4))
    optimizer = T.Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5)
    grads = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    expected, m = torch.ones(8, 4), torch.zeros(8, 4)
    with torch.no_grad():
        p.fill_(1)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        m = 0.9 * m + g
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 2 ** 0.5 * T.orthogonalize((g + 0.9 * m)[None])[0]
    assert torch.allclose(p, expected, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("style", [dict(), dict(norm="layernorm", bias=True, pos="learned", tied=True, init="gpt2")])
def test_every_parameter_is_in_exactly_one_group(optimizer, style):
    model = GPT(GPTConfig(n_embd=32, **style))
    args = T.get_args(["--optimizer", optimizer])
    groups = [g for o in T.make_optimizers(model, args, CPU.device) for g in o.param_groups]
    held = [id(p) for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in model.parameters()}
    for g in groups:  # vectors are never decayed
        assert g["weight_decay"] == 0 or all(p.dim() >= 2 for p in g["params"])


def test_adamw_equals_torchs_on_the_whole_model():
    ours, theirs = (GPT(GPTConfig(n_embd=32, init="gpt2")) for _ in range(2))
    init_weights(ours), init_weights(theirs)
    args = T.get_args(["--optimizer", "adamw", "--lr", "0.01", "--weight_decay", "0.1", "--grad_clip", "0"])
    trainer = T.Trainer(ours, args, CPU, torch.float32, 1, False)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    x = torch.randint(0, 1024, (2, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        trainer.micro_step(x[:, :-1], x[:, 1:])
        trainer.update()
        theirs(x[:, :-1], x[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize("name", T.SCHEDULES)
def test_schedules_warm_up_from_above_zero_and_never_exceed_the_peak(name):
    shares = [T.lr_share(s, 100, 10, name) for s in range(100)]
    assert 0 < shares[0] < shares[5] < 1 and shares[10] == 1 == max(shares)
    assert all(a >= b > 0 for a, b in zip(shares[10:], shares[11:]))
    if name in ("linear", "wsd"):
        assert shares[-1] < 0.03
    if name == "wsd":
        assert shares[60] == 1


def test_two_micro_batches_equal_one_batch():
    grads = []
    x = torch.randint(0, 1024, (8, 33), generator=torch.Generator().manual_seed(0))
    for parts in (1, 2):
        model = GPT(GPTConfig(n_embd=32, init="gpt2"))
        init_weights(model)
        trainer = T.Trainer(model, T.get_args([]), CPU, torch.float32, parts, False)
        for i, part in enumerate(x.chunk(parts)):
            trainer.micro_step(part[:, :-1], part[:, 1:], last=i == parts - 1)
        grads.append([trainer.loss] + [p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_validation_counts_every_target_once_whatever_the_batch():
    model = GPT(GPTConfig(n_embd=32, vocab_size=100, block_size=16))
    init_weights(model)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    ids = np.random.default_rng(0).integers(0, 100, 203).astype(np.uint16)
    width = torch.randint(1, 5, (100,), generator=torch.Generator().manual_seed(0))
    results = [T.validate(model, {"a": (1.0, ids)}, 16, 0, rows, CPU, width) for rows in (1, 5, 64)]
    nll = 0.0
    for start in range(0, 202, 16):
        part = torch.from_numpy(ids[start:start + 17].astype(np.int64))
        nll += model(part[None, :-1], part[None, 1:], reduction="sum")[1].item()
    for metrics in results:
        assert metrics["val_loss"] == pytest.approx(nll / 202, abs=1e-5)
        assert metrics["val_bpb"] == pytest.approx(nll / np.log(2) / width[ids[1:].astype(int)].sum().item(), abs=1e-5)


# --- data order


def test_every_window_of_an_epoch_is_read_once_and_batches_are_a_function_of_the_row():
    ids = np.arange(1000, dtype=np.uint16)
    loader = data.TokenLoader([(1.0, ids)], 10, seed=1)
    windows = 1000 // 10 - 2 if (1000 - 1) // 10 * 10 == 999 else (1000 - 1) // 10 - 1
    epoch = loader.batch(0, windows)
    starts = np.sort(epoch[:, 0])
    assert (np.diff(starts) == 10).all() and (np.diff(epoch) == 1).all()
    again = data.TokenLoader([(1.0, ids)], 10, seed=1)
    assert (again.batch(37, 5) == epoch[37:42]).all()
    assert (again.batch(0, 3) == epoch[:3]).all()
    assert not (loader.batch(windows, windows) == epoch).all()  # the next epoch is another
    assert not (data.TokenLoader([(1.0, ids)], 10, seed=2).batch(0, windows) == epoch).all()


def test_a_mixture_draws_each_source_by_its_weight():
    sources = [(0.75, np.zeros(5000, np.uint16)), (0.25, np.ones(5000, np.uint16))]
    share = data.TokenLoader(sources, 8, 0).batch(0, 4096)[:, 0].mean()
    assert share == 0.25


def test_token_files_round_trip_and_forged_ones_are_refused(tmp_path):
    for n_vocab, dtype in ((1000, np.uint16), (100000, np.uint32)):
        path = tmp_path / f"{n_vocab}.bin"
        assert data.write_tokens(path, [[1, 2, 3], np.array([n_vocab - 1])], n_vocab) == 4
        assert data.open_tokens(path).dtype == dtype and list(data.open_tokens(path)) == [1, 2, 3, n_vocab - 1]
    whole = path.read_bytes()
    for bad in (whole[:-1], whole[:-4], whole[:500], b"", b"x" * 2000, whole + b"0000"):
        path.write_bytes(bad)
        with pytest.raises(BadInput, match="bin"):
            data.open_tokens(path)


# --- the script


def test_twenty_steps_equal_ten_a_stop_and_ten_more_bit_for_bit(tmp_path):
    common = [*SMALL, "--steps", 20, "--dropout", "0.1", "--batch_tokens", 8192]  # slow enough to kill in time
    run(*common, "--out", tmp_path / "a")
    child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, common), "--out", str(tmp_path / "b"),
                              "--save_every", "10"], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in child.stdout:
        if line.startswith("step 10/"):
            break
    while not (tmp_path / "b" / "run.json").exists():  # written last: the save is complete
        time.sleep(0.001)
    child.kill()
    child.wait()
    saved = torch.load(tmp_path / "b" / "optim.pt", weights_only=True)["step"]
    assert saved == 10
    run("--resume", "--out", tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and len(losses(tmp_path / "b")) == 20
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_equal_one(tmp_path):
    common = [*SMALL, "--steps", 8, "--micro_batch", 2]
    run(*common, "--out", tmp_path / "one")
    run(*common, "--out", tmp_path / "two", world=2)
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=1e-5)
    one, two = (json.loads((tmp_path / n / "run.json").read_text())["metrics"] for n in ("one", "two"))
    assert one["val_loss"] == pytest.approx(two["val_loss"], abs=1e-4)
    # and a run of two goes on as one
    with open(tmp_path / "two" / "log.jsonl", "a") as log:
        log.write('{"step": 9, "lo')  # a line that a crash cut short
    run("--resume", "--out", tmp_path / "two", "--steps", 10)
    assert len(losses(tmp_path / "two")) == 10
    assert "val_loss" in run("--resume", "--out", tmp_path / "two", "--steps", 5)  # nothing left to do


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_exits_with_zero(tmp_path, sig):
    child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *SMALL, "--steps", "100000", "--out",
                              str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.startswith("step 3/"):
            child.send_signal(sig)
            break
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0 and "--resume" in out and err == ""
    saved = torch.load(tmp_path / "run" / "optim.pt", weights_only=True)
    assert saved["step"] == len(losses(tmp_path / "run")) >= 3


def test_a_finished_run_is_kept_beside_the_new_one(tmp_path):
    run(*SMALL, "--steps", 1, "--out", tmp_path / "run")
    run(*SMALL, "--steps", 2, "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run.old" / "run.json").read_text())["step"] == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["step"] == 2


@pytest.mark.parametrize("args, words", [
    (["--data", "wikipedia"], ["--data", "wikipedia", "shakespeare"]),
    (["--data", "bios:-1"], ["weight"]),
    (["--batch_tokens", "100"], ["--batch_tokens", "128"]),
    (["--batch_tokens", "256", "--micro_batch", "3"], ["--micro_batch", "[1, 2, 4, 8]"]),
    (["--n_embd", "30", "--n_head", "4"], ["--n_embd"]),
    (["--block_size", "4000000", "--batch_tokens", "4000000"], ["--block_size"]),
    (["--resume", "--out", "nowhere"], ["--resume", "nowhere"]),
    (["--device", "cuda:77"], ["--device"]),
    (["--data", "text", "--input", "missing.txt"], ["missing.txt"]),
    (["--tokenizer", "no-such-name"], ["no-such-name"])])
def test_bad_input_is_one_sentence(args, words, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--steps", "1", "--out", str(tmp_path / "run"), *args])
    with pytest.raises(BadInput) as error:
        T.main()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_bad_input_ends_with_status_two_and_no_traceback(tmp_path):
    out = run(*SMALL, "--data", "wikipedia", "--out", tmp_path / "run", check=2)
    assert out.startswith("train.py: error: --data") and len(out.splitlines()) == 1


def test_an_empty_text_and_a_damaged_checkpoint_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    out = run(*SMALL, "--data", "text", "--input", tmp_path / "empty.txt", "--out", tmp_path / "run", check=2)
    assert "empty" in out
    run(*SMALL, "--steps", 1, "--out", tmp_path / "run")
    whole = (tmp_path / "run" / "optim.pt").read_bytes()
    (tmp_path / "run" / "optim.pt").write_bytes(whole[:len(whole) // 2])
    assert "damaged" in run("--resume", "--out", tmp_path / "run", check=2)
    (tmp_path / "run" / "optim.pt").write_bytes(whole)
    assert "differ" in run("--resume", "--out", tmp_path / "run", "--n_layer", 3, "--steps", 3, check=2)


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_norm(tmp_path):
    out = run(*SMALL, "--steps", 50, "--optimizer", "adamw", "--lr", "1e30", "--grad_clip", 0,
              "--out", tmp_path / "run", check=2)
    assert "at step" in out and "lr" in out and "gradient norm" in out


def test_a_full_disk_while_saving_is_one_sentence(tmp_path):
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000)); " \
              f"sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'train.py'; import bpe, train; bpe.cli(train.main)"
    data.prepare("arithmetic", "char")  # not part of this test
    done = subprocess.run([sys.executable, "-c", limited, *SMALL, "--steps", "1", "--out", str(tmp_path / "run")],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "could not be written" in done.stderr and "Traceback" not in done.stderr
