"""
Sampling: continue a prompt with a trained model, one token at a time,

    x_{t+1} ~ softmax(logits_t / temperature), cut to the top_k likeliest ids and to the top_p mass.

    python sample.py                                     # the newest run, from an empty page
    python sample.py --prompt "993-7=" --temperature 0   # the likeliest continuation
    echo "ROMEO:" | python sample.py --init out/shakespeare --num_samples 3
"""
import argparse
import sys
import time
from pathlib import Path

import torch

from bpe import BadInput, StreamDecoder, Tokenizer, cli
from model import GPT, newest_run, setup_process


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--init", help="run directory or Hugging Face directory (default: the newest run under out/)")
    add("--prompt", help="text to continue, @FILE for a file's text (default: standard input if it is not a terminal)")
    add("--max_new_tokens", type=int, default=200)
    add("--num_samples", type=int, default=1)
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    add("--top_k", type=int, help="choose among this many likeliest tokens")
    add("--top_p", type=float, help="choose among the likeliest tokens that hold this much probability")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the step on CUDA")
    return parser.parse_args(argv)


def read_prompt(args):
    if args.prompt is None:
        return "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().rstrip("\n")
    if not args.prompt.startswith("@"):
        return args.prompt
    try:
        return Path(args.prompt[1:]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompt {args.prompt}: the file cannot be read ({error})") from None


def main():
    args = get_args()
    device = setup_process(args.device).device
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    init = args.init or newest_run()
    tokenizer = Tokenizer.from_pretrained(init)
    model = GPT.from_pretrained(init, device, getattr(torch, args.dtype))

    prompt = tokenizer.encode(read_prompt(args))
    if tokenizer.eot is not None:
        prompt = [tokenizer.eot] + prompt  # as every document of the training text began
    T = model.config.block_size
    if len(prompt) > T:
        raise BadInput(f"the prompt has {len(prompt)} tokens, more than the model's context of {T}: shorten it")
    print(f"{init}: {args.num_samples} sample(s) on {device}, {args.dtype}", file=sys.stderr)

    events = model.stream([prompt] * args.num_samples, args.max_new_tokens, [tokenizer.eot], seed=args.seed,
                          temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, compile=args.compile)
    streams = [StreamDecoder(tokenizer) for _ in range(args.num_samples)]
    texts, count, start = [[] for _ in streams], 0, time.perf_counter()
    alone = args.num_samples == 1  # then the text appears as it is written
    if alone:
        print(tokenizer.decode(prompt).removeprefix("<|endoftext|>"), end="", flush=True)
    for news in events:
        for i, tokens, _ in news:
            texts[i] += [streams[i].push(token) for token in tokens if token != tokenizer.eot]
            count += len(tokens)
            if alone:
                print(texts[i][-1], end="", flush=True)
    seconds = time.perf_counter() - start
    for i, (text, stream) in enumerate(zip(texts, streams)):
        text.append(stream.flush())
        if not alone:
            print(f"--- {i + 1}\n" + tokenizer.decode(prompt).removeprefix("<|endoftext|>") + "".join(text))
    if alone:
        print(texts[0][-1])
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    cli(main)
