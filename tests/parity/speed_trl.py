"""
Samples a second and peak memory of dpo.py and rlhf.py beside trl's trainers on the same model, data and device, in
one run:

    python tests/parity/speed_trl.py dpo --init SmolLM2-135M-Instruct --input hh_harmless_base.jsonl.gz
    python tests/parity/speed_trl.py grpo --init SmolLM2-135M-Instruct

dpo: steps of --batch pairs, reference log-probabilities precomputed by both. grpo: iterations of --prompts x --group
answers of --max_new_tokens tokens to arithmetic prompts, generation by each one's own engine (trl's by transformers).
Without trl our own figures are printed alone. The last line is one JSON object.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import dpo
import rlhf
from bpe import Tokenizer, chat_end, chat_format
from data import arithmetic
from model import Process, peak_memory, setup_process


def timed(device, steps, step):
    """Seconds of each call after two that warm up, the median; peak bytes over all."""
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for i in range(steps + 2):
        begun = time.perf_counter()
        step(i)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return sorted(seconds[2:])[steps // 2], peak_memory(device)


def our_dpo(args, rows, process):
    flags = dpo.get_args(["--data", "pairs", "--input", args.input, "--init", args.init, "--device", args.device,
                          "--lr", "1e-6", "--sft_weight", "0", "--block_size", str(args.max_length)])
    model, tokenizer = dpo.load_policy(flags, process)
    if process.device.type == "cuda":
        model.compile_parts()
    flags.micro_batch = args.micro_batch
    trainer = dpo.Trainer(model, flags, process, args.max_length)
    trainer.ends = torch.tensor([chat_end(tokenizer, chat_format(tokenizer)[0])], device=process.device)
    examples = dpo.encode(rows, tokenizer, flags, args.max_length)
    refs, n = [[-100.0, -100.0]] * len(examples), args.batch
    part = lambda i: slice(i * n % (len(examples) - n), i * n % (len(examples) - n) + n)
    model.train()
    tokens = sum(len(e.prompt) * 2 + sum(map(len, e.responses)) for e in examples) / len(examples) * n
    step = lambda i: trainer.step(examples[part(i)], refs[part(i)], [None] * n)
    return (*timed(process.device, args.steps, step), tokens)


def trl_dpo(args, rows, device):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    bf16 = device.type == "cuda"
    model = AutoModelForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.init)
    listed = [{"prompt": r["messages"], "chosen": [{"role": "assistant", "content": r["ranked"][0]}],
               "rejected": [{"role": "assistant", "content": r["ranked"][1]}]} for r in rows]
    accumulate = max(1, args.batch // args.trl_micro_batch)
    config = DPOConfig(output_dir="/tmp/trl_speed", report_to=[], max_steps=args.steps + 2, max_length=args.max_length,
                       bf16=bf16, per_device_train_batch_size=args.trl_micro_batch,
                       gradient_accumulation_steps=accumulate, learning_rate=1e-6, precompute_ref_log_probs=True,
                       use_cpu=device.type == "cpu", logging_steps=10 ** 6, save_strategy="no", disable_tqdm=True,
                       gradient_checkpointing=False)
    trainer = DPOTrainer(model, args=config, train_dataset=Dataset.from_list(listed), processing_class=tokenizer)
    return (*clocked(trainer, device, args.steps), 0)


def clocked(trainer, device, steps):
    from transformers import TrainerCallback
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *a, **k):
            if device.type == "cuda":
                torch.cuda.synchronize()
                if not times:
                    torch.cuda.reset_peak_memory_stats()
            times.append(time.perf_counter())
    trainer.add_callback(Clock())
    trainer.train()
    gaps = sorted(b - a for a, b in zip(times[1:], times[2:]))
    return gaps[len(gaps) // 2], peak_memory(device)


def our_grpo(args, process):
    flags = rlhf.get_args(["--algo", "grpo", "--task", "arithmetic", "--init", args.init, "--device", args.device,
                           "--prompts", str(args.prompts), "--group", str(args.group),
                           "--max_new_tokens", str(args.max_new_tokens), "--lr", "1e-6", "--missing_end", "none"])
    tasks = list(arithmetic.problems("train", 4096))
    tokenizer = Tokenizer.from_pretrained(args.init)
    flags.micro_batch = args.micro_batch
    learner = rlhf.Learner(flags, process, rlhf.reward_function("check", tasks, process.device), tokenizer, print)
    learner.T = min(learner.T, args.max_length)
    if process.device.type == "cuda":
        learner.actor.compile_parts()
    tokens, clock = [], dict.fromkeys(("rollout", "score", "train"), 0.0)

    def step(i):
        r, _ = learner.rollout(lambda k: tasks[k % len(tasks)], i, clock)
        learner.update(r, i)
        tokens.append(r.mask.sum().item())
    seconds, memory = timed(process.device, args.steps, step)
    print({k: round(v / sum(clock.values()), 2) for k, v in clock.items()})
    return seconds, memory, sum(tokens) / len(tokens)


def trl_grpo(args, device):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    tokenizer = AutoTokenizer.from_pretrained(args.init, padding_side="left")
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": t["prompt"]}], "answer": t["answer"]}
                              for t in arithmetic.problems("train", 4096)])
    right = lambda completions, answer, **k: [float(data.is_right(c[0]["content"], a))
                                              for c, a in zip(completions, answer)]
    config = GRPOConfig(output_dir="/tmp/trl_speed", report_to=[], max_steps=args.steps + 2, bf16=device.type == "cuda",
                        per_device_train_batch_size=args.prompts * args.group, num_generations=args.group,
                        loss_type="grpo", max_completion_length=args.max_new_tokens, learning_rate=1e-6, beta=0.0,
                        use_cpu=device.type == "cpu", logging_steps=10 ** 6, save_strategy="no", disable_tqdm=True,
                        gradient_checkpointing=False)
    model = AutoModelForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    trainer = GRPOTrainer(model, reward_funcs=right, args=config, train_dataset=rows, processing_class=tokenizer)
    return (*clocked(trainer, device, args.steps), 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["dpo", "grpo"])
    add("--init", required=True, help="a Hugging Face folder with config.json, weights and tokenizer")
    add("--input", help="dpo: a file of preferences")
    add("--steps", type=int, default=10)
    add("--batch", type=int, default=32, help="dpo: pairs a step")
    add("--max_length", type=int, default=1024)
    add("--micro_batch", type=int, default=8, help="dpo.py: packed rows of --max_length a forward pass")
    add("--trl_micro_batch", type=int, default=8, help="pairs a forward pass of trl")
    add("--prompts", type=int, default=32)
    add("--group", type=int, default=8)
    add("--max_new_tokens", type=int, default=64)
    add("--device", default="auto")
    args = parser.parse_args()
    process = setup_process(args.device)
    assert isinstance(process, Process)
    found = {}
    pairs = args.batch * (args.steps + 3)
    rows = data.read_preferences(args.input, strict=False)[:pairs] if args.what == "dpo" else None
    mine = (lambda: our_dpo(args, rows, process)) if args.what == "dpo" else (lambda: our_grpo(args, process))
    theirs = ((lambda: trl_dpo(args, rows, process.device)) if args.what == "dpo"
              else (lambda: trl_grpo(args, process.device)))
    samples = args.batch if args.what == "dpo" else args.prompts * args.group
    tokens = 0
    for name, run in (("ours", mine), ("trl", theirs)):
        try:
            seconds, memory, mean = run()
        except ImportError as error:
            print(f"{name}: {error}")
            continue
        tokens = tokens or mean
        found[name] = {"seconds": seconds, "samples_per_s": samples / seconds, "tokens_per_s": tokens / seconds,
                       "peak_memory": memory}
        print(name, found[name], flush=True)
        if process.device.type == "cuda":
            torch.cuda.empty_cache()
    if len(found) == 2:
        found["speed_ratio"] = found["trl"]["seconds"] / found["ours"]["seconds"]
        found["memory_ratio"] = found["ours"]["peak_memory"] / found["trl"]["peak_memory"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
