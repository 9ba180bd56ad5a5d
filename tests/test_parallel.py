"""
One run, whatever the processes: every way to spread a model gives the losses, gradient norms and weights of one
process. Each launch of torchrun runs this file as a script, over many layouts, and writes what it saw as JSON.
"""
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import model as M
import torch.distributed as dist
import train as T
from bpe import BadInput

ROOT = Path(__file__).parent.parent
NANO = dict(n_layer=4, n_head=4, n_embd=32, vocab_size=100, block_size=32)
STYLES = {
    "nano": dict(NANO, n_kv_head=2),
    "gpt2": dict(NANO, norm="layernorm", bias=True, tied=True, pos="learned", act="gelu_tanh", init="gpt2",
                 qk_norm=False, embd_norm=False),
    "llama": dict(NANO, norm="rmsnorm", act="swiglu", init="gpt2", qk_norm=False, embd_norm=False, softcap=15.0),
    "alibi": dict(NANO, pos="alibi", attn="window,full", window=9, init="gpt2"),
    "t5": dict(NANO, pos="t5", init="gpt2", embd_dim=16),
    "falcon": dict(NANO, place="parallel", norm="layernorm", norm_bias=True, n_kv_head=2, init="gpt2"),
}
ROWS, STEPS, HALF = 8, 20, 10
RUNS = {  # processes: (style, flags), each from the first step to the last
    2: [("nano", "--parallel ddp"), ("nano", "--parallel zero1"), ("gpt2", "--parallel zero2"),
        ("gpt2", "--parallel fsdp --micro_batch 2 --recompute block --ema 0.9"), ("nano", "--tp 2 --z_loss 0.01"),
        ("nano", "--cp 2"), ("gpt2", "--cp 2"), ("nano", "--pp 2")],
}
SLOW = {
    2: [("alibi", "--tp 2"), ("alibi", "--cp 2"), ("nano", "--parallel fsdp --offload"),
        ("gpt2", "--pp 2 --pp_schedule gpipe --micro_batch 2"), ("nano", "--micro_batch 2 --recompute selective"),
        ("llama", "--tp 2"), ("t5", "--tp 2"), ("t5", "--cp 2"), ("falcon", "--tp 2"),
        ("nano", "--parallel zero1 --offload"), ("nano", "--parallel zero1 --optimizer adamw --lr 0.01"),
        ("gpt2", "--parallel fsdp --optimizer adamw --lr 0.01"), ("gpt2", "--parallel fsdp --dtype bfloat16"),
        ("gpt2", "--pp 2 --dtype bfloat16"), ("gpt2", "--tp 2 --dtype bfloat16")],
    4: [("nano", "--parallel zero1 --tp 2"), ("llama", "--parallel fsdp --cp 2"), ("gpt2", "--tp 2 --cp 2"),
        ("gpt2", "--pp 2 --tp 2"), ("gpt2", "--pp 2 --parallel fsdp --micro_batch 1"),
        ("nano", "--pp 2 --parallel zero1"), ("gpt2", "--pp 4 --micro_batch 2"),
        ("gpt2", "--parallel hsdp --hsdp_shard 2"), ("nano", "--parallel fsdp --tp 2"),
        ("nano", "--parallel hsdp --hsdp_shard 2 --micro_batch 1"), ("alibi", "--pp 2 --cp 2")],
}
SAVED = [("nano", "--parallel fsdp --ckpt full"), ("gpt2", "--parallel fsdp --ckpt sharded"),
         ("gpt2", "--tp 2 --ckpt full"), ("nano", "--parallel zero1 --ckpt sharded"), ("gpt2", "--pp 2 --ckpt sharded")]


@functools.cache
def loader():
    rng = np.random.default_rng(0)
    ids = (np.cumsum(rng.integers(0, 7, 5000)) % 100).astype(np.uint16)  # something to learn
    return data.TokenLoader([(1.0, ids)], 32, 0)


def start(process, style, flags):
    args = T.get_args(["--grad_clip", "0.5", "--batch_tokens", str(ROWS * 32), *flags.split()])
    gpt = M.GPT(M.GPTConfig(**STYLES[style]))
    M.init_weights(gpt, 1)
    gpt.compute_dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
    gpt.z_loss = args.z_loss
    rows, micro, accumulate = T.split_batch(args, 32, process)
    return T.Trainer(gpt, args, process, gpt.compute_dtype, accumulate, False), micro


def go(process, trainer, micro, first=0, steps=STEPS):
    """Losses and gradient norms of some steps, the mean over all processes."""
    seen = []
    for step in range(first, first + steps):
        trainer.set_lr(T.lr_share(step, STEPS, 2, "linear"))
        for i in range(trainer.accumulate):
            row = step * ROWS + (i * process.dp_world + process.dp_rank) * micro
            batch = torch.from_numpy(loader().batch(row, micro)).to(process.device)
            trainer.micro_step(batch[:, :-1], batch[:, 1:], last=i == trainer.accumulate - 1)
        trainer.update()
        seen.append((M.all_reduce(torch.stack((trainer.loss, trainer.norm))) / process.world).tolist())
        trainer.loss.zero_()
    return seen


def evaluate(process, trainer):
    ids = loader().tokens[0][:1000]
    return T.validate(trainer.sharded, {"a": (1.0, ids)}, 32, 0, 3, process,
                      torch.ones(100, dtype=torch.long))["val_loss"]


def spread_out(device, world, rank, flags):
    args = T.get_args(flags.split())
    process = M.lay_out(M.Process(device, rank, world), args.parallel, args.hsdp_shard, args.pp, args.cp, args.tp)
    M.make_groups(process)
    return process


def collectives(rank, n):
    """What all-reduce is made of, on numbers that differ between ranks."""
    mine = torch.randn(8 * n, generator=torch.Generator().manual_seed(rank))
    results = {"all-reduce": mine.clone(), "ring": mine.clone(), "reduce + broadcast": mine.clone()}
    dist.all_reduce(results["all-reduce"])
    M.ring_all_reduce(results["ring"])
    dist.reduce(results["reduce + broadcast"], 0)
    dist.broadcast(results["reduce + broadcast"], 0)
    scattered = M.reduce_scatter(mine, 0, dist.group.WORLD)
    results["reduce-scatter + all-gather"] = M.all_gather(scattered, 0, dist.group.WORLD)
    return {name: t.tolist() for name, t in results.items()}


def worker(out, tasks):
    """
    Run every [style, flags, what] of a JSON list; rank 0 writes what it saw. what: "" for a whole run, "save NAME" for
    its first half, "load NAME" for its second.
    """
    first, out = M.setup_process("cpu"), Path(out)
    results = {"collectives": collectives(first.rank, first.world)}
    for style, flags, what in json.loads(tasks):
        process = spread_out(first.device, first.world, first.rank, flags)
        trainer, micro = start(process, style, flags)
        act, _, name = what.partition(" ")
        if act == "load":
            trainer.load_state_dict(T.load_optim(out / name))
        seen = go(process, trainer, micro, HALF if act == "load" else 0, HALF if act else STEPS)
        if act == "save":
            T.save_optim(out / name, trainer, process, "sharded" in flags, step=HALF)
            process.wait()
        val, state = evaluate(process, trainer), trainer.state_dict()
        if process.rank == 0:
            results[f"{style} {flags} {what}".strip()] = {
                "seen": seen, "val": val, "weights": {name: t.tolist() for name, t in state["model"].items()},
                "ema": {name: t.tolist() for name, t in state["ema"].items()}}
    if first.rank == 0:
        (out / "seen.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def launch(world, out, tasks):
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node", str(world), __file__, "worker", str(out),
                           json.dumps([[*t, ""][:3] for t in tasks])],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "seen.json").read_text())


def name_of(style, flags):
    return f"{style}-{''.join(flags.split()).strip('-')}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def launched(folder):
    """(processes, slow ones?) -> what that launch saw; each is made once, when first asked for."""
    @functools.cache
    def get(world, slow=False):
        tasks = list((SLOW if slow else RUNS).get(world, []))
        if world == 2 and not slow:
            save_alone(folder)
            tasks += [(style, flags, f"save {name_of(style, flags)}") for style, flags in SAVED]
            tasks += [("gpt2", "--parallel fsdp", f"load {name_of(*SAVED[2])}"), ("nano", "--cp 2", "load alone"),
                      ("nano", "--pp 2", f"load {name_of(*SAVED[0])}"),
                      ("gpt2", "--tp 2", f"load {name_of(*SAVED[1])}")]
        if world == 4 and not slow:
            get(2)
            tasks += [("gpt2", "--parallel fsdp --tp 2", f"load {name_of(*SAVED[1])}")]
        return launch(world, folder, tasks)
    return get


def save_alone(folder):
    """The first half of a run of one process, saved."""
    process = M.Process(torch.device("cpu"))
    trainer, micro = start(process, "nano", "")
    go(process, trainer, micro, 0, HALF)
    (folder / "alone").mkdir(exist_ok=True)
    T.save_optim(folder / "alone", trainer, process, False, step=HALF)


@functools.cache
def alone(style, optimizer):
    """The same run of one process."""
    process = M.Process(torch.device("cpu"))
    trainer, micro = start(process, style, optimizer)
    seen, val, state = go(process, trainer, micro), evaluate(process, trainer), trainer.state_dict()
    return {"seen": seen, "val": val, "weights": state["model"], "ema": state["ema"]}


def expect_equal(got, style, flags, first=0, tolerance=1e-4):
    words = flags.split()
    trained = ("--optimizer", "--lr", "--z_loss", "--ema")  # what a process alone must be told too
    expected = alone(style, " ".join(f"{a} {b}" for a, b in zip(words, words[1:]) if a in trained))
    last = first + len(got["seen"])
    assert np.allclose(got["seen"], expected["seen"][first:last], rtol=tolerance, atol=0) and last > first
    if last == STEPS:
        assert got["val"] == pytest.approx(expected["val"], rel=tolerance)
        assert list(got["weights"]) == list(expected["weights"])
        assert list(got["ema"]) == list(expected["ema"]) and bool(got["ema"]) == ("--ema" in words)
        for kind in ("weights", "ema"):
            for name, t in expected[kind].items():
                near = torch.allclose(torch.tensor(got[kind][name]), t, atol=2 * tolerance if tolerance < 0.01 else 1)
                assert near, (kind, name)


@pytest.mark.parametrize("world, style, flags", [(world, *run) for world, runs in RUNS.items() for run in runs])
def test_losses_norms_and_weights_are_those_of_one_process(world, style, flags, launched):
    expect_equal(launched(world)[f"{style} {flags}"], style, flags)


@pytest.mark.slow
@pytest.mark.parametrize("world, style, flags", [(world, *run) for world, runs in SLOW.items() for run in runs])
def test_more_layouts_are_those_of_one_process(world, style, flags, launched):
    tolerance = 0.05 if "bfloat16" in flags else 1e-4
    expect_equal(launched(world, slow=True)[f"{style} {flags}"], style, flags, tolerance=tolerance)


@pytest.mark.parametrize("world, style, flags, saved", [
    (2, "gpt2", "--parallel fsdp", name_of(*SAVED[2])), (2, "nano", "--pp 2", name_of(*SAVED[0])),
    (2, "gpt2", "--tp 2", name_of(*SAVED[1])), (2, "nano", "--cp 2", "alone"),
    pytest.param(4, "gpt2", "--parallel fsdp --tp 2", name_of(*SAVED[1]), marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_layout_and_number_of_processes(world, style, flags, saved, launched):
    expect_equal(launched(world)[f"{style} {flags} load {saved}"], style, flags, first=HALF)


@pytest.mark.slow
def test_what_eight_processes_saved_two_go_on_with(folder):
    saved = [("gpt2", "--parallel fsdp --ckpt sharded"), ("nano", "--parallel hsdp --hsdp_shard 4 --ckpt sharded"),
             ("gpt2", "--parallel fsdp --tp 2 --ckpt full"), ("nano", "--parallel ddp --ckpt full")]
    later = ["--parallel fsdp", "--parallel zero1", "--tp 2", "--parallel fsdp"]
    launch(8, folder / "eight", [(style, flags, f"save {i}") for i, (style, flags) in enumerate(saved)])
    seen = launch(2, folder / "eight", [(saved[i][0], flags, f"load {i}") for i, flags in enumerate(later)])
    for i, flags in enumerate(later):
        expect_equal(seen[f"{saved[i][0]} {flags} load {i}"], saved[i][0], flags, first=HALF)


@pytest.mark.parametrize("style, flags", SAVED)
def test_one_process_goes_on_with_what_several_saved(style, flags, launched, folder):
    expect_equal(launched(2)[f"{style} {flags} save {name_of(style, flags)}"], style, flags)
    process = M.Process(torch.device("cpu"))
    trainer, micro = start(process, style, "")
    trainer.load_state_dict(T.load_optim(folder / name_of(style, flags)))
    expected = torch.tensor(alone(style, "")["seen"])[HALF:]
    assert torch.allclose(torch.tensor(go(process, trainer, micro, HALF, STEPS - HALF)), expected, rtol=1e-4)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather_or_a_reduce_and_a_broadcast(world, launched):
    seen = {name: torch.tensor(values) for name, values in launched(world)["collectives"].items()}
    total = sum(torch.randn(8 * world, generator=torch.Generator().manual_seed(r)) for r in range(world))
    assert len(seen) == 4
    for name, t in seen.items():
        assert torch.allclose(t, total, atol=1e-5), name


def test_a_save_is_one_file_or_one_a_process_beside_the_file_that_names_them(launched, folder):
    launched(2)
    files = {flags: sorted(p.name for p in (folder / name_of(style, flags)).iterdir()) for style, flags in SAVED}
    assert files["--parallel fsdp --ckpt full"] == ["optim.pt"]
    assert files["--parallel fsdp --ckpt sharded"] == ["optim-10-0-of-2.pt", "optim-10-1-of-2.pt", "optim.pt"]
    sizes = [(folder / name_of(*SAVED[1]) / f"optim-10-{r}-of-2.pt").stat().st_size for r in range(2)]
    assert max(sizes) < 1.5 * min(sizes)  # each its share


# --- what needs no processes


def test_owners_have_about_as_much_each():
    owner = M.spread({f"{i}": size for i, size in enumerate([5, 5, 4, 3, 3, 3, 1])}, 3)
    load = [sum(s for i, s in enumerate([5, 5, 4, 3, 3, 3, 1]) if owner[f"{i}"] == r) for r in range(3)]
    assert sorted(load) == [8, 8, 8]


def test_places_and_ranks_are_one_to_one_and_the_layers_of_stages_all():
    p = M.lay_out(M.Process(torch.device("cpu"), 0, 24), "hsdp", 2, pp=2, tp=3)
    assert (p.pp, p.replicate, p.shard, p.tp, p.dp_world) == (2, 2, 2, 3, 4)
    assert [p.place(r) for r in range(24)] == list(np.ndindex(2, 2, 2, 3))
    assert [l for stage in range(3) for l in M.split_layers(8, 3, stage)] == list(range(8))


def test_context_parallel_chunks_see_the_same_number_of_keys():
    T_, n = 64, 4
    chunks = torch.arange(T_).chunk(2 * n)
    assert len({int((torch.cat((chunks[r], chunks[2 * n - 1 - r])) + 1).sum()) for r in range(n)}) == 1


@pytest.mark.parametrize("style, flags, words", [
    ({}, "--tp 3", ["--tp 3", "2 process", "multiple of 3"]),
    ({}, "--parallel hsdp --hsdp_shard 3", ["--hsdp_shard 3"]),
    (dict(n_head=3, n_embd=36), "--tp 2", ["--tp 2", "heads"]), (dict(n_hidden=65), "--tp 2", ["--tp 2", "hidden"]),
    (dict(n_head=4, n_kv_head=1), "--tp 2", ["--tp 2", "heads of keys"]),
    (dict(block_size=34), "--cp 2", ["--cp 2", "block_size"]), (dict(n_layer=1), "--pp 2", ["--pp 2", "layers"]),
    (dict(resid_mix=True), "--pp 2", ["--pp 2", "resid_mix"]), (dict(share=2), "--pp 2", ["--pp 2", "share"])])
def test_a_layout_that_cannot_work_is_refused_in_one_sentence_that_names_the_flag(style, flags, words):
    args = T.get_args(flags.split())
    with pytest.raises(BadInput) as error:
        process = M.lay_out(M.Process(torch.device("cpu"), 0, 2), args.parallel, args.hsdp_shard,
                            args.pp, args.cp, args.tp)
        config = M.GPTConfig(**{**NANO, **style})
        M.check_layout(config, process, config.block_size)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# --- the script

SMALL = ["--data", "arithmetic", "--tokenizer", "char", "--block_size", "32", "--n_layer", "2", "--n_head", "2",
         "--n_embd", "32", "--batch_tokens", "256", "--warmup", "2", "--eval_every", "0", "--eval_tokens", "512",
         "--device", "cpu", "--log_every", "1"]


def script(*args, world=2):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)] if world > 1 else []
    return subprocess.Popen([sys.executable, *launch, str(ROOT / "train.py"), *SMALL, *map(str, args)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_rank_stops_the_others_and_the_last_save_goes_on_exactly(tmp_path):
    out = tmp_path / "run"
    job = script("--parallel", "fsdp", "--ckpt", "sharded", "--steps", 1000, "--schedule", "constant",
                 "--save_every", 4, "--timeout", 20, "--out", out)
    for line in job.stdout:
        if line.startswith("step 9/"):
            break
    ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert len(ranks) == 2
    began = time.time()
    os.kill(int(ranks[1]), 9)
    rest = job.stdout.read()
    assert job.wait(timeout=60) != 0 and time.time() - began < 60, rest
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    step = T.load_optim(out)["step"]
    assert step % 4 == 0 and step >= 8
    go_on = script("--resume", "--out", out, "--steps", step + 4, world=1)
    assert go_on.wait(timeout=120) == 0, go_on.stdout.read()
    whole = script("--steps", step + 4, "--schedule", "constant", "--out", tmp_path / "whole", world=1)
    assert whole.wait(timeout=120) == 0
    assert np.allclose(losses(out), losses(tmp_path / "whole"), rtol=1e-4) and len(losses(out)) == step + 4
    ours, theirs = (M.load_safetensors(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)


def test_a_loss_that_is_not_finite_stops_all_ranks_with_one_sentence(tmp_path):
    job = script("--parallel", "fsdp", "--steps", 50, "--optimizer", "adamw", "--lr", "1e30", "--grad_clip", 0,
                 "--out", tmp_path / "run")
    text = job.communicate(timeout=60)[0]
    assert job.returncode != 0 and text.count("train.py: error: the loss is") == 1 and "at step" in text


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--parallel fsdp", "--parallel zero1", "--tp 2", "--pp 2", "--cp 2"])
def test_the_script_trains_saves_and_answers_under_every_layout(flags, tmp_path):
    job = script(*flags.split(), "--steps", 6, "--out", tmp_path / "run")
    text = job.communicate(timeout=120)[0]
    assert job.returncode == 0 and "val_loss" in text.splitlines()[-1], text
    assert M.load_run(tmp_path / "run")[0].config.n_layer == 2
    assert ("(1f1b)" in text) == ("--pp" in flags)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
