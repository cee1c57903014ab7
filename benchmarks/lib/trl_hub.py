"""The tiny models and data sets that TRL's tests of its reward trainer name, built here, in folders of those names.

transformers and datasets take a folder of that name in the working directory for what is on the Hub.
"""

import json
import sysconfig
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content %}{{ message.content }}{%- endif %}"
    "{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{%- endif %}{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
SIZES = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32768,
}
# The code that a checkpoint ships: a model of another type that is Llama in all its parts.
REMOTE = '''"""Llama under another name, as code that ships with a checkpoint."""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig


class RemoteForSequenceClassification(LlamaPreTrainedModel):
    config_class = RemoteConfig

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    forward = GenericForSequenceClassification.forward
'''
SENTENCES = (
    "Rain falls on the old roof and the cat sleeps.",
    "Two boats leave the harbour before the sun is up.",
    "A short answer is often better than a long one.",
    "Nobody reads the manual until something breaks.",
    "The recipe asks for salt, flour and some patience.",
    "Every bridge in this town has a name and a story.",
    "Count the stairs twice if you walk down in the dark.",
    "The letter came late, but it came with good news.",
    "Good tools make hard work look easy to others.",
    "Between two hills the river turns to the north.",
)


def build_hub(hub: Path) -> None:
    """Makes all of it below `hub`."""
    owner = hub / "trl-internal-testing"
    _models(owner, hub / "Qwen" / "Qwen3-4B")
    for name in ("standard_preference", "standard_implicit_prompt_preference"):
        _save(owner / "zen", name, [_plain(index, implicit="implicit" in name) for index in range(19)])
    for name in ("conversational_preference", "conversational_implicit_prompt_preference"):
        _save(owner / "zen", name, [_conversation(index, implicit="implicit" in name) for index in range(19)])
    _save(owner / "toolcall", "preference", [_tool_call(index) for index in range(19)])


def _models(owner: Path, other_tokenizer: Path) -> None:
    torch.manual_seed(0)
    tokenizer = _tokenizer(chat=True)
    common = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **SIZES}
    grouped = {**common, "num_key_value_heads": 2}
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 2}
    made = {
        "tiny-Qwen2ForCausalLM-2.5": Qwen2ForCausalLM(Qwen2Config(**grouped)),
        "tiny-Qwen2ForSequenceClassification-2.5": Qwen2ForSequenceClassification(
            Qwen2Config(**grouped, num_labels=1)
        ),
        "tiny-Qwen3MoeForCausalLM": Qwen3MoeForCausalLM(Qwen3MoeConfig(**grouped, **moe)),
        "tiny-LlamaForCausalLM-3.2": LlamaForCausalLM(LlamaConfig(**grouped)),
        "tiny-RemoteForCausalLM": LlamaForCausalLM(LlamaConfig(**grouped)),
    }
    for name, model in made.items():
        model.save_pretrained(owner / name)
        tokenizer.save_pretrained(owner / name)
    name = "tiny-GPTNeoXForCausalLM"  # has neither a chat template nor a pad token
    GPTNeoXForCausalLM(GPTNeoXConfig(**common)).save_pretrained(owner / name)
    _tokenizer(chat=False).save_pretrained(owner / name)
    tokenizer.save_pretrained(other_tokenizer)

    remote = owner / "tiny-RemoteForCausalLM"
    (remote / "modeling_remote.py").write_text(REMOTE)
    config = json.loads((remote / "config.json").read_text())
    classes = {
        "AutoConfig": "RemoteConfig",
        "AutoModelForCausalLM": "RemoteForCausalLM",
        "AutoModelForSequenceClassification": "RemoteForSequenceClassification",
    }
    config["auto_map"] = {auto: f"modeling_remote.{name}" for auto, name in classes.items()}
    config.update(model_type="remote", architectures=["RemoteForCausalLM"])
    (remote / "config.json").write_text(json.dumps(config))


def _tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of some thousand tokens, learned from Python's own library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train([str(path) for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:30]], trainer)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} if chat else {"eos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=SPECIAL,
        chat_template=TEMPLATE if chat else None,
        **names,
    )


def _parts(index: int) -> tuple[str, str, str]:
    """A question, its end, and the end of another with some words more."""
    whole, other = SENTENCES[index % len(SENTENCES)], SENTENCES[(index + 3) % len(SENTENCES)]
    half = len(whole) // 2
    return f"{index}: {whole[:half]}", whole[half:], f"{other[len(other) // 2 :]} Or not, {index}."


def _plain(index: int, implicit: bool) -> dict:
    prompt, chosen, rejected = _parts(index)
    if implicit:
        return {"chosen": prompt + chosen, "rejected": prompt + rejected}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _conversation(index: int, implicit: bool) -> dict:
    prompt, *answers = _parts(index)
    question = [{"role": "user", "content": prompt}]
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
    if implicit:
        return {"chosen": question + chosen, "rejected": question + rejected}
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def _tool_call(index: int) -> dict:
    def call(city: str) -> list[dict]:
        function = {"name": "get_weather", "arguments": {"city": city}}
        return [{"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]

    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"name": "get_weather", "description": "The weather of a city.", "parameters": parameters}
    return {
        "prompt": [{"role": "user", "content": f"What is the weather like in town {index}?"}],
        "chosen": call(f"town {index}"),
        "rejected": call(f"city {index + 1}"),
        "tools": json.dumps([{"type": "function", "function": tool}]),
    }


def _save(folder: Path, name: str, rows: list[dict]) -> None:
    """One configuration of a data set, 17 rows to train on and 2 to test, as a repository on the Hub holds it."""
    (folder / name).mkdir(parents=True)
    for split, part in (("train", rows[:17]), ("test", rows[17:])):
        Dataset.from_list(part).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
    listed = "".join(
        f"- config_name: {path.name}\n  data_files:\n"
        f"  - split: train\n    path: {path.name}/train-*\n  - split: test\n    path: {path.name}/test-*\n"
        for path in sorted(folder.iterdir())
        if path.is_dir()
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
