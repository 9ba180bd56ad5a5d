"""
Preferences between two answers in a dialogue: Anthropic's hh-rlhf (Bai et al. 2022).

    python dpo.py --data hh --init HuggingFaceTB/SmolLM2-135M-Instruct      # harmless-base: 42,537 pairs, 2,312 to test
    python dpo.py --data hh --input helpful-base                            # or another part
    python dpo.py --data pairs --input FILE                                 # a copy of yours

Anthropic/hh-rlhf on the Hugging Face hub; HF_ENDPOINT names a mirror. What it holds is offensive in places: that is
what it is for.
"""
from pathlib import Path

from bpe import BadInput
from data import read_preferences
from data.fineweb import fetch

REPO = "Anthropic/hh-rlhf"
PARTS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
FOLDER = Path(__file__).with_suffix("")


def preferences(split, input=None):
    """Rows of a split, "train" or "val" (the part's test file), as read_preferences gives them."""
    part = input or PARTS[0]
    if part not in PARTS:
        raise BadInput(f"--input {part} is no part of hh-rlhf: choose one of {', '.join(PARTS)}, or read a file of "
                       f"yours with --data pairs --input FILE")
    name = f"{part}/{'train' if split == 'train' else 'test'}.jsonl.gz"
    return read_preferences(fetch(REPO, [name], FOLDER)[0], strict=False)
