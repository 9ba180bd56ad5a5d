"""
ShareGPT: conversations of several turns that people had with a chat model and shared, cut to 2,048 tokens.

    python sft.py --init HuggingFaceTB/SmolLM2-135M --data sharegpt                # downloads 670 MB
    python sft.py --init HuggingFaceTB/SmolLM2-135M --data sharegpt --input FILE   # or any file in its format

anon8231489123/ShareGPT_Vicuna_unfiltered on the Hugging Face hub; HF_ENDPOINT names a mirror.
"""
from pathlib import Path

from bpe import BadInput
from data import read_chats
from data.fineweb import fetch

REPO = "anon8231489123/ShareGPT_Vicuna_unfiltered"
FILE = "ShareGPT_V3_unfiltered_cleaned_split.json"
FOLDER = Path(__file__).with_suffix("")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
         "bing": "assistant", "assistant": "assistant", "system": "system"}


def messages(row, where="the row"):
    """{"conversations": [{"from", "value"}, …]} as messages; what the assistant says before anyone asks is left out."""
    turns = []
    for turn in row["conversations"]:
        if turn["from"] not in ROLES:
            raise BadInput(f"{where}: the role {turn['from']!r} is unknown; use {', '.join(ROLES)}")
        role = ROLES[turn["from"]]
        if turns or role != "assistant":
            turns.append({"role": role, "content": turn["value"]})
    return turns


def chats(split, input=None):
    """Rows of "train"; there is no other split."""
    if split == "train":
        yield from (row for _, row in read_chats(input or fetch(REPO, [FILE], FOLDER)[0]))
