"""
Tokens a second of evaluate.py's batches beside a loop over one example at a time, the same model in one process:

    python tests/parity/speed_evaluate.py --init SmolLM2-135M-Instruct --task choices=hellaswag.jsonl \\
        choices=blimp.jsonl lastword=lambada.jsonl answers=gsm8k.jsonl

The loop runs the model once for each choice, context and choice together, and writes one answer at a time from a
cache; it takes the first --loop questions, the batches all of them, and both count the same tokens: those of every
context with every choice, or those that were written. The last line is one JSON object.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import evaluate as E
from bpe import chat_stops
from model import setup_process

READ = {"choices": E.read_choices, "lastword": E.read_last_word, "answers": E.read_answer}


@torch.inference_mode()
def one_choice(model, context, choice):
    """Log-probability in nats of a choice after its context."""
    idx = torch.tensor([context + choice], device=model.device)
    logits = model.logits(model.trunk(idx)[0, len(context) - 1:-1])
    return logits.log_softmax(-1).gather(1, idx[0, len(context):, None]).sum().item()


def seconds(device, f):
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def compare(subject, kind, questions, args):
    """(tokens/s in batches, tokens/s of the loop)."""
    model, device, few = subject.model, subject.model.device, questions[:args.loop]
    if kind == "answers":
        stop, new = chat_stops(subject.tokenizer), args.max_new_tokens
        prompts = [subject.prompt(q.context) for q in questions]
        written = []
        batched = lambda qs: written.extend(model.generate(prompts[:len(qs)], new, stop=stop, temperature=0)[0])
        loop = lambda qs: [written.extend(model.generate([p], new, stop=stop, temperature=0)[0])
                           for p in prompts[:len(qs)]]

        def count(qs):
            n = sum(map(len, written))
            written.clear()
            return n
    else:
        def count(qs):
            return sum(len(context) + len(choice) for context, choices in subject.groups(qs) for choice in choices)

        def batched(qs):
            subject.known.clear()
            E.scored(subject, kind, qs, ())

        def loop(qs):
            return [one_choice(model, context, choice) for context, choices in subject.groups(qs)
                    for choice in choices]
    rates = []
    for f, qs in ((batched, questions), (loop, few)):
        f(qs[:2])
        count(qs[:2])
        spent = seconds(device, lambda: f(qs))
        rates.append(count(qs) / spent)
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--init", required=True)
    add("--task", nargs="+", required=True, metavar="NAME=FILE", help=f"NAME of {', '.join(READ)}")
    add("--limit", type=int, default=0, help="only the first rows of a file; 0: all")
    add("--loop", type=int, default=50, help="of them for the loop")
    add("--max_new_tokens", type=int, default=128)
    add("--device", default="auto")
    add("--dtype", default="float32")
    args = parser.parse_args()
    device = setup_process(args.device).device
    files = [(kind, Path(path).resolve()) for kind, path in (task.split("=", 1) for task in args.task)]
    init = str(Path(args.init).resolve()) if Path(args.init).exists() else args.init
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # evaluate.py keeps its log under out/
        metrics, flags = {}, E.get_args(["--dtype", args.dtype])
        subject = E.Subject(init, flags, device)
        for kind, path in files:
            questions = [READ[kind](*row) for row in E.read_rows(path, args.limit)]
            flags.chat = kind == "answers"
            many, one = compare(subject, kind, questions, args)
            metrics[path.stem] = {"batched": round(many), "loop": round(one), "ratio": round(many / one, 2)}
            print(f"{path.stem}, {len(questions)} questions: {many:,.0f} tokens/s, one at a time {one:,.0f}: "
                  f"{many / one:.1f} x", flush=True)
    print(json.dumps(metrics))


if __name__ == "__main__":
    main()
