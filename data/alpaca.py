"""
Alpaca: 52,002 instructions with their answers, made by a language model from 175 that people wrote (Taori et al. 2023).

    python sft.py --init HuggingFaceTB/SmolLM2-135M --data alpaca                  # downloads 23 MB
    python sft.py --init HuggingFaceTB/SmolLM2-135M --data alpaca --input FILE     # a copy of yours

Also self-instruct, the way that they were made (Wang et al. 2023): `prompt` shows solved tasks and asks for new ones,
`parse` reads what a model answers, `novel` keeps what is like nothing before it.
"""
import random
import re
from pathlib import Path

from data import download, read_chats

URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
PATH = Path(__file__).with_suffix("") / "alpaca_data.json"


def messages(row, template=None):
    """A row {"instruction", "input", "output"} as a conversation; Alpaca's own template has a place for the input."""
    more = row.get("input") or ""
    asked = [{"role": "user", "content": row["instruction"] + (f"\n\n{more}" if more else "")}]
    if template == "alpaca" and more:
        asked = [{"role": "system", "content": more}, {"role": "user", "content": row["instruction"]}]
    return [*asked, {"role": "assistant", "content": row["output"]}]


def chats(split, input=None):
    """Rows of "train"; there is no other split."""
    if split == "train":
        yield from (row for _, row in read_chats(input or download(URL, PATH)))


# -----------------------------------------------------------------------------
# Self-instruct

RULES = (
    'Write {n} new and different tasks for an assistant that reads and writes text. Every task has an\n'
    'instruction of one or two sentences, an input where the instruction needs one and "none" where not, '
    'and the right output.\n'
    'Vary the verbs, the subjects and the form, ask nothing that needs pictures or sound, '
    'and answer in at most 100 words.\n')


def prompt(seeds, made, n=20, shown=3, seed=0):
    """
    A text for a model to continue with tasks shown + 1 … n: the rules, and `shown` tasks drawn from the seeds and from
    what was made before, one of the latter once there are some.
    """
    rng = random.Random(seed)
    tasks = rng.sample(made, min(1, len(made)))
    tasks = rng.sample(seeds, shown - len(tasks)) + tasks
    parts = [f"###\n{i}. Instruction: {t['instruction']}\n{i}. Input: {t.get('input') or 'none'}\n{i}. Output: "
             f"{t['output']}\n" for i, t in enumerate(tasks, 1)]
    return RULES.format(n=n) + "\n" + "".join(parts) + f"###\n{shown + 1}. Instruction:"


def parse(text):
    """The tasks of a continuation of `prompt`; the last is left out unless it is whole, with what follows it."""
    tasks = []
    for part in re.split(r"###\s*", "0. Instruction:" + text)[:-1 if "###" in text else None]:
        found = re.match(r"\d+\. ?Instruction:(.*?)\n\d+\. ?Input:(.*?)\n\d+\. ?Output:(.*)", part.strip(), re.DOTALL)
        if found:
            instruction, given, output = (s.strip() for s in found.groups())
            given = "" if given.strip("<>. ").lower() in ("none", "noinput", "no input") else given
            tasks.append({"instruction": instruction, "input": given, "output": output})
    return tasks


UNFIT = re.compile(r"\b(images?|graphs?|pictures?|photos?|files?|maps?|draw|plot|video|audio|music|flowcharts?"
                   r"|diagrams?)\b", re.IGNORECASE)


def longest_common(a, b):
    """Length of the longest common subsequence of two lists of words."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def novel(tasks, known, most=0.7):
    """
    Those of `tasks` worth keeping, in order: 4 to 150 words of instruction, an answer, nothing that a reader of text
    cannot do, and a ROUGE-L below `most` against every instruction known or kept before (Wang et al. 2023, 2.2).
    """
    def words(task):
        return re.findall(r"\w+", task["instruction"].lower())
    seen, kept = [words(t) for t in known], []
    for task in tasks:
        new = words(task)
        if not 3 < len(new) <= 150 or not task["output"] or UNFIT.search(task["instruction"]):
            continue
        if all(2 * longest_common(new, old) < most * (len(new) + len(old)) for old in seen):
            seen.append(new)
            kept.append(task)
    return kept
