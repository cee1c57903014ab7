"""The model and the pairs that all trainers of this comparison train on: a random Qwen3-VL and crops of photographs.

The checkpoint has the sizes of a small model, but a real processor and the token ids of the real Qwen tokenizer, since
ms-swift hard-codes some of them. The pairs are written once in the format of every trainer.

usage: python model_and_pairs.py WORKDIR [SCENARIO ...]        (`run_peers.py` calls it by itself)
"""

import json
import random
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)


# Named after the tokens of a prompt, its image included, and of an answer. Each word is one token; the chat template
# and the start of the question make 16 tokens of a prompt, and 2 of an answer, besides the (image_side / 32)^2 ones of
# the image. Answers vary by 30%. A prompt has two answers, or four, whose six pairs follow one another.
SCENARIOS: dict[str, dict[str, Any]] = {
    "300/135": {"image_side": 512, "prompt_words": 40, "answer_words": (93, 173)},
    "1100/100": {"image_side": 1024, "prompt_words": 60, "answer_words": (68, 128)},
    "1100/400": {"image_side": 1024, "prompt_words": 60, "answer_words": (278, 518)},
}
SCENARIOS |= {f"{name}, 4 answers": {**SCENARIOS[name], "answers": 4} for name in ("300/135", "1100/100")}

WORDS = (
    "the image shows a large temple beside water with people trees flowers petals red green stone roof sky "
    "reflection yellow bright detail left right several visible"
).split()
QUESTION = "Describe the picture in detail."

VOCAB_SIZE = 151936
FIRST_SPECIAL_ID = 151643
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
CHAT_TEMPLATE = (
    "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH_SIZE = 16


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the words of the pairs, with the id layout of the Qwen tokenizer."""
    small = Tokenizer(models.BPE())
    small.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    small.train_from_iterator([" ".join(WORDS), *WORDS, QUESTION, "user", "assistant", "system"], trainer)
    trained = json.loads(small.to_str())["model"]

    vocab = trained["vocab"]
    vocab |= {f"<filler{index}>": index for index in range(len(vocab), FIRST_SPECIAL_ID)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge) for merge in trained["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=32768,
    )


def build_config(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 512, num_layers: int = 8) -> Qwen3VLConfig:
    """A Qwen3-VL of some 190M parameters, of which the embeddings and the LM head are 155M."""
    num_heads = 8
    head_dim = hidden_size // num_heads
    third = head_dim // 2 // 3
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads // 2,
        "head_dim": head_dim,
        "max_position_embeddings": 32768,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [head_dim // 2 - 2 * third, third, third],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 4,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_heads": 4,
        "out_hidden_size": hidden_size,
        "patch_size": PATCH_SIZE,
        "deepstack_visual_indexes": [0, 1, 2],
        "num_position_embeddings": 2304,
    }
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


def build_model(directory: str | Path) -> None:
    """Writes the checkpoint, in fp32, and its processor into a directory."""
    tokenizer = build_processor(directory)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(build_config(tokenizer)).save_pretrained(directory)


def build_processor(directory: str | Path) -> PreTrainedTokenizerFast:
    """Writes the processor into a directory, and gives its tokenizer."""
    tokenizer = build_tokenizer()
    # Images of up to 1024 x 1024 pixels pass as they are.
    pixels_per_token = (2 * PATCH_SIZE) ** 2
    image_processor = Qwen2VLImageProcessor(
        patch_size=PATCH_SIZE, min_pixels=4 * pixels_per_token, max_pixels=1280 * pixels_per_token
    )
    Qwen3VLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(patch_size=PATCH_SIZE),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)
    return tokenizer


def build_pairs(
    directory: str | Path,
    *,
    image_side: int,
    prompt_words: int,
    answer_words: tuple[int, int],
    answers: int = 2,
    count: int = 64,
    seed: int = 0,
) -> None:
    """
    Writes preference pairs with images, once in each trainer's format.

    Args:
        directory (`str` or `Path`):
            Receives the images, `trl.jsonl`, `swift.jsonl`, `llamafactory.json` and `dataset_info.json`.
        image_side (`int`):
            Width and height of the images, in pixels.
        prompt_words (`int`):
            Number of words after the question.
        answer_words (`tuple[int, int]`):
            Smallest and largest number of words of an answer.
        answers (`int`, *optional*, defaults to `2`):
            Number of answers of a prompt, of which every two make a pair.
        count (`int`, *optional*, defaults to `64`):
            Number of prompts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of crops and words.
    """
    directory = Path(directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    photographs = load_sample_images().images

    def sentence(length: int) -> str:
        return " ".join(rng.choices(WORDS, k=length))

    pairs = []
    for index in range(count):
        image = directory / f"{index}.png"
        write_crop(photographs[index % len(photographs)], image, image_side, rng)
        question = f"{QUESTION} {sentence(prompt_words)}"
        for chosen, rejected in combinations([sentence(rng.randint(*answer_words)) for _ in range(answers)], 2):
            pairs.append({"image": str(image), "question": question, "chosen": chosen, "rejected": rejected})

    write_jsonl(directory / "trl.jsonl", map(trl_row, pairs))
    write_jsonl(directory / "swift.jsonl", map(swift_row, pairs))
    (directory / "llamafactory.json").write_text(json.dumps([llamafactory_row(pair) for pair in pairs]))
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
    info = {"file_name": "llamafactory.json", "ranking": True, "formatting": "sharegpt", "columns": columns}
    (directory / "dataset_info.json").write_text(json.dumps({"pairs": info}))


def write_crop(photograph, path: Path, side: int, rng: random.Random, crop: int = 420) -> None:
    """Cuts a square out of a photograph and scales it."""
    height, width, _ = photograph.shape
    top, left = rng.randint(0, height - crop), rng.randint(0, width - crop)
    cut = Image.fromarray(photograph[top : top + crop, left : left + crop])
    # zlib's fastest level: all trainers decode these files while the clock runs, which the level does not change.
    cut.resize((side, side)).save(path, compress_level=1)


def write_jsonl(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def trl_row(pair: dict) -> dict:
    content = [{"type": "image"}, {"type": "text", "text": pair["question"]}]
    sides = {side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": content}], **sides, "images": [pair["image"]]}


def swift_row(pair: dict) -> dict:
    user = {"role": "user", "content": "<image>" + pair["question"]}
    messages = [user, {"role": "assistant", "content": pair["chosen"]}]
    return {"messages": messages, "rejected_response": pair["rejected"], "images": [pair["image"]]}


def llamafactory_row(pair: dict) -> dict:
    conversation = [{"from": "human", "value": "<image>" + pair["question"]}]
    sides = {side: {"from": "gpt", "value": pair[side]} for side in ("chosen", "rejected")}
    return {"conversations": conversation, **sides, "images": [pair["image"]]}


def folder_name(scenario: str) -> str:
    return scenario.replace("/", "-").replace(", ", "-").replace(" ", "-")


def build(workdir: Path, scenario: str) -> tuple[Path, Path]:
    """Directories of the model and of a scenario's pairs, built where they are not there yet."""
    model, pairs = workdir / "model", workdir / "pairs" / folder_name(scenario)
    # What is written last says whether all is there.
    if not (model / "processor_config.json").exists():
        build_model(model)
    if not (pairs / "dataset_info.json").exists():
        build_pairs(pairs, **SCENARIOS[scenario])
    return model, pairs


if __name__ == "__main__":
    for name in sys.argv[2:] or SCENARIOS:
        print(name, *build(Path(sys.argv[1]), name))
