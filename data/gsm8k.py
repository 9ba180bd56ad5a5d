"""
GSM8K: grade-school word problems with worked answers that end in "#### 42" (Cobbe et al. 2021): 7,473 and 1,319.

    python sft.py --init HuggingFaceTB/SmolLM2-135M-Instruct --data gsm8k              # downloads 5 MB
    python sft.py --init HuggingFaceTB/SmolLM2-135M-Instruct --data gsm8k --input FILE
    python rlhf.py --init HuggingFaceTB/SmolLM2-135M-Instruct --task gsm8k --algo grpo --max_new_tokens 256
"""
import re
from itertools import islice
from pathlib import Path

from data import download, read_chats

URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{}.jsonl"
FOLDER = Path(__file__).with_suffix("")


def messages(row):
    """{"question", "answer"} as a conversation, without the <<48/2=24>> that are meant for a calculator."""
    return [{"role": "user", "content": row["question"]},
            {"role": "assistant", "content": re.sub(r"<<[^<>=;\n]*=[^<>;\n]*>>", "", row["answer"])}]


def chats(split, input=None):
    """Rows of "train", or of "val", which is GSM8K's test file; an input has no split of its own."""
    name = "train" if split == "train" else "test"
    if input is None:
        yield from (row for _, row in read_chats(download(URL.format(name), FOLDER / f"{name}.jsonl")))
    elif split == "train":
        yield from (row for _, row in read_chats(input))


def problems(split, n=None):
    """n rows {"prompt": a question, "answer": the worked answer}, whose last number is asked for."""
    for row in islice(chats(split), n):
        yield {"prompt": row["question"], "answer": row["answer"]}
