"""Text models of transformers as reward models: heads of any name, and the reward at the last real token."""

import pickle

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, GPTNeoXConfig, GPTNeoXForCausalLM

from trl_dt2it import MultimodalRewardTrainer, RewardScorer, load_reward_model
from trl_dt2it.demo.tiny import build_tiny_tokenizer

from ..trainers import config


END = 2
COMMON = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": END, "pad_token_id": END, "initializer_range": 0.2}
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}
OLD_SIZES = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64}
# Each with the head that its checkpoint holds beside the base model.
FAMILIES = {
    "GPTNeoX": (SIZES, {"embed_out.weight"}),
    "Llama": (SIZES, {"lm_head.weight"}),
    "Phi": (SIZES, {"lm_head.weight", "lm_head.bias"}),
    "GPTJ": ({**OLD_SIZES, "rotary_dim": 4}, {"lm_head.weight", "lm_head.bias"}),
    "GPT2": (OLD_SIZES, set()),  # tied
    "Bloom": ({"hidden_size": 16, "n_head": 2, "n_layer": 2}, set()),
}


def native_dir(family: str, directory):
    """A causal language model of random weights, saved as a Hub repository would hold it."""
    torch.manual_seed(0)
    sizes, _ = FAMILIES[family]
    causal = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    family_config = getattr(transformers, f"{family}Config")(**COMMON, **sizes)
    getattr(transformers, causal)(family_config).save_pretrained(directory)
    return directory


@torch.no_grad()
def rewards(model, ids, mask=None) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return model(input_ids=ids, attention_mask=mask).logits[:, 0]


def conversations(num_pads: int = 3):
    """Two conversations that end with the end token, bare and padded with the same token."""
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = END
    pads, none = torch.full((2, num_pads), END), torch.zeros(2, num_pads, dtype=torch.int64)
    right = torch.cat([ids, pads], dim=1), torch.cat([torch.ones_like(ids), none], dim=1)
    left = torch.cat([pads, ids], dim=1), torch.cat([none, torch.ones_like(ids)], dim=1)
    return ids, right, left


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reward_is_read_at_the_end_token_though_it_pads(family, tmp_path):
    directory = native_dir(family, tmp_path / "native")
    held = load_file(directory / "model.safetensors")
    assert {name for name in held if "head" in name or "embed_out" in name} == FAMILIES[family][1]
    with pytest.raises(ValueError, match="has no trained `score` head"):
        load_reward_model(directory, allow_new_head=False)
    model = load_reward_model(directory)
    ids, right, left = conversations()
    bare = rewards(model, ids)
    with torch.no_grad():  # where vLLM reads, worked out with the base model alone
        last = model.base_model(input_ids=ids).last_hidden_state[:, -1] @ model.score.weight[0]
    torch.testing.assert_close(bare, last)
    torch.testing.assert_close(rewards(model, *right), bare, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rewards(model, *left), bare, rtol=1e-5, atol=1e-6)
    one = torch.cat([rewards(model, ids[:1]), rewards(model, right[0][1:], right[1][1:])])
    torch.testing.assert_close(one, bare, rtol=1e-5, atol=1e-6)

    model.save_pretrained(tmp_path / "reward")
    assert model.config.pad_token_id == END  # as before
    again = load_reward_model(tmp_path / "reward", allow_new_head=False)
    torch.testing.assert_close(rewards(again, *right), bare, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rewards(pickle.loads(pickle.dumps(again)), *right), bare, rtol=1e-5, atol=1e-6)
    # transformers' own class gives the same reward, or says that it cannot; it never reads another token.
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    assert type(stock).__module__.startswith("transformers.") and stock.config.architectures == [type(model).__name__]
    torch.testing.assert_close(torch.cat([rewards(stock, row[None]) for row in ids]), bare, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no padding token is defined"):
        rewards(stock, *right)


def test_another_pad_token_is_saved(tmp_path):
    model = load_reward_model(native_dir("Llama", tmp_path / "native"))
    model.config.pad_token_id = 5
    ids, (_, mask), _ = conversations()
    padded = torch.cat([ids, torch.full((2, 3), 5)], dim=1)
    model.save_pretrained(tmp_path / "reward")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    torch.testing.assert_close(rewards(stock, padded, mask), rewards(model, ids), rtol=1e-5, atol=1e-6)


def test_a_trainer_that_was_given_half_precision_saves_no_end_pad_either(tmp_path):
    """Where the configuration is written once more, for the dtype."""
    tokenizer = build_tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    native = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), **SIZES)).bfloat16()
    native.save_pretrained(tmp_path / "native")
    tokenizer.save_pretrained(tmp_path / "native")
    data = Dataset.from_list([{"prompt": "cup", "chosen": " red", "rejected": " green"}] * 2)
    args = config(tmp_path / "out", max_steps=1, model_init_kwargs={"dtype": "bfloat16"})
    trainer = MultimodalRewardTrainer(str(tmp_path / "native"), args=args, train_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = GPTNeoXConfig.from_pretrained(tmp_path / "saved")
    assert (saved.pad_token_id, saved.dtype) == (None, torch.bfloat16)
    assert trainer.model.config.pad_token_id == tokenizer.eos_token_id


def test_what_is_no_head_is_not_left_over(tmp_path):
    directory = native_dir("GPTNeoX", tmp_path)
    held = load_file(directory / "model.safetensors")
    save_file({**held, "embed_out_2.weight": torch.zeros(2)}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 weights of .* are unexpected: embed_out_2.weight"):
        load_reward_model(directory)


def test_a_tied_head_may_be_in_the_checkpoint(tmp_path):
    directory = native_dir("GPT2", tmp_path)
    held = load_file(directory / "model.safetensors")
    held["lm_head.weight"] = held["transformer.wte.weight"].clone()
    save_file(held, directory / "model.safetensors", {"format": "pt"})
    assert load_reward_model(directory).config.num_labels == 1


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>", None])
def test_a_trainer_reads_the_last_token_whatever_pads(pad, tmp_path):
    tokenizer = build_tiny_tokenizer()
    assert tokenizer.eos_token == "<|im_end|>"
    tokenizer.pad_token = pad
    torch.manual_seed(0)
    native = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), initializer_range=0.2, **SIZES))
    native.save_pretrained(tmp_path / "native")
    tokenizer.save_pretrained(tmp_path / "native")
    rows = [{"prompt": f"cup {i}", "chosen": " red" * (i + 1), "rejected": " green"} for i in range(4)]
    data = Dataset.from_list(rows)
    args = config(tmp_path / "out", max_steps=1)
    given = AutoModelForSequenceClassification.from_pretrained(tmp_path / "native", num_labels=1)
    given.config._name_or_path = str(tmp_path / "native")
    adapted = get_peft_model(given, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query_key_value"]))
    for model in (str(tmp_path / "native"), adapted):
        trainer = MultimodalRewardTrainer(model, args=args, train_dataset=data)
        trainer.train()
        got = torch.tensor(trainer.predict(trainer.train_dataset).predictions)
        base = getattr(trainer.model, "get_base_model", lambda: trainer.model)()  # noqa: B023
        for index, row in enumerate(rows):
            for side, name in enumerate(("chosen", "rejected")):
                ids = torch.tensor([tokenizer(row["prompt"] + row[name] + "<|im_end|>")["input_ids"]])
                with torch.no_grad():
                    expected = base.score(base.base_model(ids).last_hidden_state[:, -1])[0, 0]
                assert got[index, side].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
        trainer.save_model(str(tmp_path / "saved"))
        scorer = RewardScorer.from_pretrained(tmp_path / "saved", device="cpu")
        torch.testing.assert_close(torch.tensor(scorer.score_pairs(data)), got, rtol=1e-4, atol=1e-5)
        for file in (tmp_path / "saved").iterdir():
            file.unlink()
