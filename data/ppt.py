"""
A pretext that teaches a soft prompt before its task: is the second sentence the one that follows the first (yes), another
of the same document (maybe), or of another document (no)? (PPT, Gu et al. 2022, 3.2, from unlabelled text.)

    python sft.py --tune prompt --data ppt --input books/ --out out/ppt       # the prompt is pretrained,
    python sft.py --tune prompt --init out/ppt --data FILE                    # then tuned to a task
"""
import random
import re

from bpe import BadInput
from data import text

PAIRS = {"train": 3000, "val": 300}


def sentences(document):
    """Sentences of 4 to 40 words."""
    found = re.split(r"(?<=[.!?])\s+", " ".join(document.split()))
    return [s for s in found if 4 <= len(s.split()) <= 40]


def chats(split, input=None):
    """Rows {"messages"} with the answers yes, maybe and no, a third each."""
    if input is None:
        raise BadInput("--data ppt makes its pairs from a text of yours: give --input FILE or a folder")
    documents = [s for s in map(sentences, (piece for piece, _ in text.documents(split, input))) if len(s) > 3]
    if len(documents) == 1:  # one book: its halves are two
        half = len(documents[0]) // 2
        documents = [documents[0][:half], documents[0][half:]]
    if len(documents) < 2:
        raise BadInput(f"--input {input} has too few sentences for pairs: give a longer text")
    rng = random.Random(f"ppt {split}")
    for i in range(PAIRS[split]):
        d = int(rng.random() * len(documents))
        mine, a = documents[d], int(rng.random() * (len(documents[d]) - 1))
        other = documents[(d + 1 + int(rng.random() * (len(documents) - 1))) % len(documents)]
        far = [s for j, s in enumerate(mine) if abs(j - a) > 1] or other
        second = (mine[a + 1], far[int(rng.random() * len(far))], other[int(rng.random() * len(other))])[i % 3]
        yield {"messages": [{"role": "user", "content": f"{mine[a]}\n{second}"},
                            {"role": "assistant", "content": ("yes", "maybe", "no")[i % 3]}]}
