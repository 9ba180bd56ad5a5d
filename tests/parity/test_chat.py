"""Chats against transformers: its apply_chat_template on the families' Jinja texts gives our ids."""
import json

import pytest
from conftest import package
from hypothesis import given, settings, strategies as st

import bpe
from bpe import Tokenizer, render_chat

TEXT = "You are a helpful assistant. Write the user a response, system: It's 1859, or 12 months.\n" * 3
LLAMA3 = bpe.CHAT_TEMPLATES["llama3"].needs
# What the families publish in their tokenizer_config.json.
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
          "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SMOLLM2 = CHATML.replace("{{'<", "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
                         "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
                         "{% endif %}{{'<", 1)
QWEN25 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
JINJA = {
    "chatml": CHATML, "smollm2": SMOLLM2, "qwen2.5": QWEN25,
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
              "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
              "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
              "{{ content }}{% endfor %}{% if add_generation_prompt %}"
              "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
              "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
              "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
              "{% if loop.index0 == 0 and system_message != false %}"
              "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
              "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
              "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
              "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}"
              "{% endfor %}",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- endif %}
{%- endfor %}""",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] "
              "+ eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + "
              "eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + "
              "eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n"
              "{% endif %}\n{% endfor %}",
}
DEFAULTS = {"smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
            "qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."}
# An answer is encoded apart from its header, so one that begins with white space may have other ids. What is plain
# text here is special to them wherever it stands.
WORDS = st.text(st.characters(exclude_categories=("Cs", "Cn", "Co"), exclude_characters="<|▁"), min_size=1)
CONTENT = st.one_of(WORDS, st.text("aI's 1.\n", min_size=1)).filter(lambda text: text == text.strip())


def chat(system, contents):
    turns = [] if system is None else [{"role": "system", "content": system}]
    return turns + [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]


def both(folder, jinja, prefix=None):
    """The same tokenizer with the same Jinja text, read by us and by transformers."""
    if prefix is None:
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LLAMA3]
        Tokenizer.train([TEXT], 300, pattern="llama3", special=special).export(folder)
        names = {"bos_token": LLAMA3[0], "eos_token": "<|endoftext|>"}
    else:
        pieces = [f"<0x{b:02X}>" for b in range(256)] + ["▁", "a", "▁a", "I", "▁[", "[", "]", "/", "IN", "ST", "N", "S",
                                                         "T", "INST", "▁▁"]
        special = {"<unk>": 0, "<s>": 1, "</s>": 2}
        ranks = {piece.encode(): 3 + n for n, piece in enumerate(pieces)}
        bpe.sentencepiece(ranks, special, prefix=prefix).export(folder)
        names = {"bos_token": "<s>", "eos_token": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": jinja, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_pretrained(folder), read(folder)


def read(folder):
    package("jinja2")
    return package("transformers").AutoTokenizer.from_pretrained(folder)


def agree(ours, theirs, messages, *template):
    for generation in (False, True) if messages[-1]["role"] == "user" else (False,):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=generation, return_dict=False)
        ids, _ = render_chat(ours, messages, *template, generation=generation)
        assert ids == expected, theirs.decode(expected)


def agree_on_anything(ours, theirs):
    @settings(max_examples=50, deadline=None)
    @given(st.none() | CONTENT, st.lists(CONTENT, min_size=1, max_size=4))
    def anything(system, contents):
        agree(ours, theirs, chat(system, contents))

    for system in (None, "Be kind."):
        agree(ours, theirs, chat(system, ["Hi there.", "Hello, I'm a model.", "Why?"]))
    anything()


@pytest.mark.parametrize("family", ["chatml", "smollm2", "qwen2.5", "llama3", "zephyr"])
def test_a_familys_jinja_text_is_written_with_the_same_ids(tmp_path, family):
    ours, theirs = both(tmp_path, JINJA[family])
    name = "chatml" if family in DEFAULTS else family
    assert ours.chat == {"template": name, "system": DEFAULTS.get(family)}
    agree_on_anything(ours, theirs)


@pytest.mark.parametrize("prefix", ["prepend", "first", "always", ""])
@pytest.mark.parametrize("family", ["llama2", "mistral", "zephyr"])
def test_sentencepiece_families_too(tmp_path, family, prefix):
    ours, theirs = both(tmp_path, JINJA[family], prefix)
    assert ours.chat == {"template": family, "system": None}
    agree_on_anything(ours, theirs)


@pytest.mark.parametrize("system", [None, "You're \"it\": \\n {{ 你 }} 👩"])
@pytest.mark.parametrize("template", bpe.CHAT_TEMPLATES)
def test_an_exported_folder_writes_the_same_chat(tmp_path, template, system):
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", *LLAMA3]
    ours = Tokenizer.train([TEXT], 300, pattern="llama3", special=special)
    ours.chat = {"template": template, "system": system}
    ours.export(tmp_path)
    theirs = read(tmp_path)
    assert theirs.eos_token_id == bpe.chat_end(ours, template)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
    assert theirs.decode(ours.encode("a , b .")) == "a , b ."
    agree_on_anything(ours, theirs)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.chat == ours.chat
    with pytest.raises(Exception, match="a role is|take turns"):
        theirs.apply_chat_template(chat(None, ["Q"]) + [{"role": "tool", "content": ""}])


def test_an_export_without_a_chat_is_a_tokenizer_to_transformers(tmp_path):
    ours = Tokenizer.train([TEXT], 300)
    ours.export(tmp_path)
    theirs = read(tmp_path)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT) and theirs.chat_template is None
    assert (theirs.eos_token, theirs.bos_token, theirs.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")
