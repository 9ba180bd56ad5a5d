"""
TinyStories: 2.7 million stories in a small child's words (Eldan & Li 2023), the part that GPT-4 wrote.

    python train.py --data tinystories --vocab_size 4096 --block_size 256    # downloads 2.2 GB
    python train.py --data tinystories --input FILE                          # a copy of yours, its last tenth for val

roneneldan/TinyStories on the Hugging Face hub; HF_ENDPOINT names a mirror.
"""
from pathlib import Path

from data import text
from data.fineweb import fetch

REPO = "roneneldan/TinyStories"
FILES = {"train": "TinyStoriesV2-GPT4-train.txt", "val": "TinyStoriesV2-GPT4-valid.txt"}
FOLDER = Path(__file__).with_suffix("")
END = "<|endoftext|>"


def stories(blocks):
    """The stories of a text that comes in blocks, each once."""
    rest = ""
    for block in blocks:
        *whole, rest = (rest + block).split(END)
        yield from whole
    yield rest


def documents(split, input=None):
    """(text, starts_document) of a split, a story each; downloads the text on first use."""
    if input is not None:
        blocks = ((END if starts else "") + piece for piece, starts in text.documents(split, input))
    else:
        blocks = text.blocks(fetch(REPO, [FILES[split]], FOLDER)[0])
    for story in stories(blocks):
        if story := text.clean(story.strip()):
            yield story, True
