"""
FineWeb: ten billion tokens of filtered web text (Penedo et al. 2024), tokenized with GPT-2's tokenizer.

    python train.py --data fineweb --preset gpt2                 # one shard of 100 million tokens, 200 MB
    python train.py --data fineweb --input 9                     # nine of them, of 103
    python train.py --data fineweb --input FOLDER                # fineweb_val_*.bin and fineweb_train_*.bin of yours

The public shards kjj0/fineweb10B-gpt2 on the Hugging Face hub: token files as in data/__init__.py, the validation
shard that speed runs report, training shards in the order of their numbers. HF_ENDPOINT names a mirror. A download
that breaks off goes on where it stopped, and each file's checksum is the hub's.
"""
import hashlib
import os
from pathlib import Path
from urllib.parse import quote

import requests

from bpe import BadInput, download, hub_endpoint, hub_get, hub_lock

REPO = "kjj0/fineweb10B-gpt2"
TOKENIZER = "gpt2"
FOLDER = Path(__file__).with_suffix("") / "gpt2"


def fetch(repo, names, folder):
    """Files of a data set of the hub, in folder; asks the network only for those that are missing. Raises BadInput."""
    missing = [name for name in names if not (folder / name).exists()]
    if missing and os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise BadInput(f"{missing[0]} is not in {folder} and HF_HUB_OFFLINE forbids a download: unset that, or copy "
                       f"it there")
    try:
        if missing:
            answer = hub_get(f"{hub_endpoint()}/api/datasets/{repo}/tree/main?recursive=true")
            answer.raise_for_status()
            listed = {entry["path"]: entry for entry in answer.json()}
            if unknown := [name for name in missing if "lfs" not in listed.get(name, ())]:
                raise BadInput(f"{repo} has no {unknown[0]}: ask for fewer files")
        for name in missing:
            file, size, sha256 = folder / name, listed[name]["size"], listed[name]["lfs"]["oid"]
            file.parent.mkdir(parents=True, exist_ok=True)
            with hub_lock(file.parent):  # all ranks of a run ask at once
                if not file.exists():
                    print(f"{name}: {size / 1e6:,.0f} MB")
                    url = f"{hub_endpoint()}/datasets/{repo}/resolve/main/{quote(name)}"
                    download(url, file, size, hashlib.sha256(), sha256, repo)
    except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{repo} could not be had from {hub_endpoint()} ({type(error).__name__}): try again with a "
                       f"network, or copy {missing[0]} into {folder}") from None
    except OSError as error:
        raise BadInput(f"{folder} could not be written ({error.strerror}): free some space, or copy {missing[0]} "
                       f"there") from None
    return [folder / name for name in names]


def shards(input=None):
    """{split: [token files]}; input: None or a number of training shards to download, or a folder that holds some."""
    if input is not None and not str(input).isdigit():
        found = {split: sorted(Path(input).glob(f"fineweb_{split}_*.bin")) for split in ("train", "val")}
        for split, paths in found.items():
            if not paths:
                raise BadInput(f"--input {input} holds no fineweb_{split}_*.bin: give such a folder, or a number of "
                               f"shards to download")
        return found
    n = int(input or 1)
    if n < 1:
        raise BadInput("--input 0 shards hold no text: ask for at least 1")
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06}.bin" for i in range(1, n + 1)]
    val, *train = fetch(REPO, names, FOLDER)
    return {"train": train, "val": [val]}
