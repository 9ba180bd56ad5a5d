"""bpe.py against the public tokenizers, id for id: tiktoken and Hugging Face tokenizers."""
import json
import lzma
import os
import random
import shutil

import pytest
from conftest import need, package
from hypothesis import given, settings, strategies as st

import bpe
from bpe import PATTERNS, Tokenizer

NAMES = ["gpt2", "cl100k_base", "o200k_base"]
TEXT = ("It's a far, far better thing that I do; it'll be 1859, or 12 months, in 3 cities.\n"
        "  def f(x):\n\treturn x != 2  # naïve café, 你好谢谢 你好, مرحبا مرحبا, привет привет\r\n") * 5
SCRIPTS = ["你好谢谢小笼包再见", "مرحبا بالعالم، كيف حالك؟", "👩‍👩‍👧‍👦 🏳️‍🌈 🫠🇫🇷 ❤️", "한국어 ไทย हिन्दी e\u0301", "I'm ſs 'ſ I'LL",
           "\x00\x1c\x85\u2028\u3000 \r\n \n\n\t  x  \n", "12345 ١٢٣ ½ Ⅷ", "", " ", "a" * 1000 + " " * 300]
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn", "Co"))
ANY_TEXT = st.text(ASSIGNED) | st.text(st.sampled_from("  \n\n\t\r\u3000a1'sD!/'ll_é你٣"), max_size=60)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A copy of tiktoken's cache: tiktoken deletes a file whose hash is wrong."""
    folder = tmp_path_factory.mktemp("ranks")
    for file in need("tiktoken").iterdir():
        shutil.copyfile(file, folder / file.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield folder


def readable(tokenizer, text):
    """The encoder in Python, with no tiktoken in it."""
    return [i for chunk in bpe.splitter(tuple(tokenizer.patterns))(text) for i in tokenizer._chunk(chunk)]


def book(n_chars=-1):
    with lzma.open(need("gutenberg_val.txt.xz"), "rt", encoding="utf-8", newline="") as file:
        return file.read(n_chars)


# tiktoken

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_chars", [300_000, pytest.param(-1, marks=pytest.mark.slow)])
def test_real_text_has_tiktokens_ids(ranks, name, n_chars):
    theirs, ours = bpe.tiktoken.get_encoding(name), Tokenizer.from_pretrained(name)
    shakespeare = need("tinyshakespeare.txt").read_bytes().decode()
    for text in (shakespeare[:n_chars], book(n_chars)):
        ids = theirs.encode_ordinary(text)
        assert ours.encode(text) == ids
        assert readable(ours, text) == ids
        assert ours.decode(ids) == text


@pytest.mark.parametrize("name", NAMES)
def test_odd_text_has_tiktokens_ids(ranks, name):
    theirs, ours = bpe.tiktoken.get_encoding(name), Tokenizer.from_pretrained(name)
    noise = random.Random(0).randbytes(20_000)
    texts = [*SCRIPTS, noise.decode("latin-1"), noise.decode("utf-8", "replace"),
             "".join(map(chr, random.Random(1).choices(range(32, 127), k=20_000))),
             noise.decode("utf-8", "surrogateescape"), "a\ud800b\udc00"]  # no UTF-8 in Python's way
    for text in texts:
        ids = theirs.encode_ordinary(text)
        assert ours.encode(text) == ids == readable(ours, bpe.clean(text))


@pytest.mark.parametrize("name", NAMES)
def test_a_megabyte_without_a_space_has_tiktokens_ids(ranks, name):
    theirs, ours = bpe.tiktoken.get_encoding(name), Tokenizer.from_pretrained(name)
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000))
    assert ours.encode(letters) == theirs.encode_ordinary(letters)
    assert readable(ours, letters[:50_000]) == theirs.encode_ordinary(letters[:50_000])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_has_tiktokens_ids(ranks, name, text):
    ours = Tokenizer.from_pretrained(name) if name not in LOADED else LOADED[name]
    LOADED[name] = ours
    assert readable(ours, text) == bpe.tiktoken.get_encoding(name).encode_ordinary(text)


LOADED = {}  # a tokenizer takes a second to read, an example takes none


def test_published_ids(ranks):
    gpt2, o200k = Tokenizer.from_pretrained("gpt2"), Tokenizer.from_pretrained("o200k_base")
    assert gpt2.encode("hello world") == [31373, 995]
    assert (gpt2.n_vocab, gpt2.eot) == (50257, 50256)
    assert o200k.encode("你好谢谢小笼包再见") == [177519, 97006, 5820, 6006, 120, 18201, 29020, 27041]


def test_special_names_are_allowed_as_in_tiktoken(ranks):
    theirs, ours = bpe.tiktoken.get_encoding("cl100k_base"), Tokenizer.from_pretrained("cl100k_base")
    text = "a<|endoftext|> b<|fim_prefix|><|endofprompt|>"
    assert ours.encode(text) == theirs.encode(text, disallowed_special=())
    assert ours.encode(text, "all") == theirs.encode(text, allowed_special="all")
    one = ["<|fim_prefix|>"]
    assert ours.encode(text, one) == theirs.encode(text, allowed_special=set(one), disallowed_special=())


def test_patterns_are_tiktokens(ranks):
    for name in NAMES:
        assert bpe.tiktoken.get_encoding(name)._pat_str == PATTERNS[name.removesuffix("_base")]


def test_gpt2s_own_two_files_are_the_gpt2_of_tiktoken(ranks, tmp_path):
    urls = {file: f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{file}"
            for file in ("vocab.bpe", "encoder.json")}
    for file, url in urls.items():
        shutil.copyfile(ranks / bpe.hashlib.sha1(url.encode()).hexdigest(), tmp_path / file)
    ours, known = Tokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained("gpt2")
    assert ours.token_bytes()[:-1] == known.token_bytes()[:-1]
    assert ours.encode(TEXT + book(50_000)) == known.encode(TEXT + book(50_000))


# Hugging Face tokenizers

def as_hugging_face(tokenizer, folder):
    tokenizer.export(folder)
    return package("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))


def agree(ours, theirs, texts):
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, "all") == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), text


@pytest.mark.parametrize("digits", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_exported_tokenizer_gives_the_same_ids(tmp_path, pattern, digits):
    ours = Tokenizer.train([TEXT], 350, pattern=pattern, digits=digits)
    theirs = as_hugging_face(ours, tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.ranks == ours.ranks and again.special == ours.special
    agree(ours, theirs, [TEXT, "a<|im_start|> b<|im_end|>", *SCRIPTS])

    @settings(max_examples=40, deadline=None)
    @given(ANY_TEXT)
    def any_text(text):
        agree(ours, theirs, [text])
        assert again.encode(text) == ours.encode(text)
    any_text()


def test_exported_gpt2_gives_the_same_ids(ranks, tmp_path):
    ours = Tokenizer.from_pretrained("gpt2")
    agree(ours, as_hugging_face(ours, tmp_path), [TEXT, book(100_000), "a<|endoftext|>b", *SCRIPTS])


def byte_level(before, normalizer=None, special=("<s>",)):
    """Trained by Hugging Face, with what the JSON of a family has before its byte level."""
    hf = package("tokenizers")
    peer = hf.Tokenizer(hf.models.BPE())
    steps = hf.pre_tokenizers
    peer.pre_tokenizer, peer.decoder = steps.Sequence(before), hf.decoders.ByteLevel()
    if normalizer:
        peer.normalizer = normalizer
    peer.train_from_iterator([TEXT], hf.trainers.BpeTrainer(
        vocab_size=420, show_progress=False, special_tokens=list(special),
        initial_alphabet=steps.ByteLevel.alphabet()))
    peer.add_tokens(["<tool>", hf.AddedToken("<tool_call>", normalized=False)])
    return peer


def families():
    hf = package("tokenizers")
    steps, cut = hf.pre_tokenizers, lambda p: hf.pre_tokenizers.Split(hf.Regex(p), "isolated")
    own, bare = steps.ByteLevel(add_prefix_space=False), steps.ByteLevel(False, use_regex=False)
    yield "gpt2", byte_level([own])
    yield "smollm2", byte_level([steps.Digits(individual_digits=True), own])
    yield "llama3", byte_level([cut(PATTERNS["llama3"]), bare])
    qwen = PATTERNS["llama3"].replace("{1,3}", "")
    yield "qwen2.5", byte_level([cut(qwen), bare], hf.normalizers.NFC())
    words = (r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    yield "deepseek", byte_level([cut(r"\p{N}{1,3}"), cut("[一-龥\u3040-ゟ゠-ヿ]+"), cut(words), bare])
    yield "uncovered", byte_level([cut("[a-z]+"), bare])


@pytest.mark.parametrize("i", range(6), ids=["gpt2", "smollm2", "llama3", "qwen2.5", "deepseek", "uncovered"])
def test_byte_level_tokenizer_json_gives_the_same_ids(tmp_path, i):
    name, theirs = list(families())[i]
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(tmp_path)
    agree(ours, theirs, [TEXT, "a<tool> <tool_call><s>b", *SCRIPTS])
    ours.save(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": ours.spec()}))
    assert Tokenizer.load(tmp_path).encode(TEXT) == ours.encode(TEXT)

    @settings(max_examples=40, deadline=None)
    @given(ANY_TEXT)
    def any_text(text):
        agree(ours, theirs, [text])
    any_text()


def test_vocab_json_and_merges_txt_give_the_same_ids(tmp_path):
    hf = package("tokenizers")
    theirs = byte_level([hf.pre_tokenizers.ByteLevel(add_prefix_space=False)], special=())
    theirs.model.save(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["merges.txt", "vocab.json"]
    agree(Tokenizer.from_pretrained(tmp_path), theirs, [TEXT, *SCRIPTS])


def llama2_like(prefix):
    """Trained by Hugging Face over ▁-words, then given LLaMA-2's layout: unknown, begin, end, the
    256 bytes, runs of ▁ that come first by id and merge last, the merges, the letters."""
    hf = package("tokenizers")
    peer = hf.Tokenizer(hf.models.BPE())
    peer.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    peer.train_from_iterator(TEXT.splitlines(), hf.trainers.BpeTrainer(
        vocab_size=300, show_progress=False))
    data = json.loads(peer.to_str())
    merges = [m for m in data["model"]["merges"] if "▁▁" not in "".join(m)]
    made = ["".join(m) for m in merges]
    letters = sorted({letter for token in data["model"]["vocab"] for letter in token})
    runs = ["▁" * n for n in (2, 4, 3)]
    merges += [["▁" * a, "▁" * b] for a, b in ((3, 1), (2, 2), (2, 1), (1, 3), (1, 2), (1, 1))]
    layout = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *runs, *made, *letters]
    data["model"] |= {"vocab": {t: i for i, t in enumerate(dict.fromkeys(layout))},
                      "merges": merges, "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    data["added_tokens"] = [
        {"id": i, "content": t, "special": True, "normalized": False, "single_word": False,
         "lstrip": False, "rstrip": False} for i, t in enumerate(layout[:3])]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, space] if prefix == "prepend" else [space]
    data["normalizer"] = {"type": "Sequence", "normalizers": steps}
    data["pre_tokenizer"] = None
    if prefix in ("first", "always", "never"):
        data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "split": False,
                                 "prepend_scheme": prefix}
        data["normalizer"] = None
    data["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": int(prefix != "never"), "stop": 0}]}
    return hf.Tokenizer.from_str(json.dumps(data))


@pytest.mark.parametrize("prefix", ["prepend", "first", "always", "never"])
def test_sentencepiece_tokenizer_json_gives_the_same_ids(tmp_path, prefix):
    theirs = llama2_like(prefix)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(tmp_path)
    texts = [TEXT, *SCRIPTS, "a<s> b</s>c", "<s>a", "   x    y  ", " a", "▁a", "<0x41>"]
    agree(ours, theirs, texts)
    (tmp_path / "out").mkdir()
    agree(ours, as_hugging_face(ours, tmp_path / "out"), texts)
    assert Tokenizer.from_pretrained(tmp_path / "out") == ours

    @settings(max_examples=60, deadline=None)
    @given(ANY_TEXT)
    def any_text(text):
        agree(ours, theirs, [text])
    any_text()


def test_llama2cs_real_tokenizer_exports_with_the_same_ids(tmp_path):
    ours = Tokenizer.from_pretrained(need("models/tok512.bin"))
    text = "Once upon a time, there was a little girl named Lily.\n  She was 3, naïve; 你好."
    # The start of every story in that model's training text, as llama2.c encodes it.
    assert ours.encode("Once upon a time")[0] == 403 and ours.n_vocab == 512
    agree(ours, as_hugging_face(ours, tmp_path), [text, *SCRIPTS])
