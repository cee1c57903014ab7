"""Loading, saving and scoring of every supported family, from native checkpoints with real processors."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    CLIPConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
)

from trl_dt2it import load_reward_model
from trl_dt2it.models import families, freezing, modeling
from trl_dt2it.models.modeling import RewardHead, last_real_token

from ..families import FAMILIES, example_images, family_dir


MAIN_FAMILIES = ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava"]


def encode(directory: Path, answers: list[str], **kwargs):
    """One conversation an answer, all with the same two images."""
    processor = AutoProcessor.from_pretrained(directory)
    images = example_images(2, seed=1)
    texts = []
    for answer in answers:
        blocks = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which one is brighter?"}]
        messages = [
            {"role": "user", "content": blocks},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        texts.append(processor.apply_chat_template(messages, tokenize=False))
    kwargs = {"padding": True, "padding_side": "right", "add_special_tokens": False, **kwargs}
    return processor(text=texts, images=[images] * len(texts), return_tensors="pt", **kwargs)


@torch.no_grad()
def score(model, inputs) -> torch.Tensor:
    return model(**inputs).logits[:, 0]


def test_the_list_of_supported_families_is_the_list_of_tested_ones():
    assert set(FAMILIES) == set(families.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_says_what_a_family_has(family):
    model, row = load_reward_model(family_dir(family)), families.FAMILIES[family]
    assert type(model).__name__ == f"{row.prefix}ForSequenceClassification"
    assert type(AutoProcessor.from_pretrained(family_dir(family))).__name__ == row.processor
    names = {part for name, _ in model.named_parameters() for part in name.split(".")}
    assert names & set(freezing.VISION_TOWER_NAMES) == {row.vision_tower}
    assert names & set(freezing.PROJECTOR_NAMES) == set(row.projector)
    alike = [other for other in families.FAMILIES.values() if other.processor == row.processor]
    assert len({(other.uncounted_tokens, other.mixes_media) for other in alike}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_base_weights_arrive_complete_and_come_back_through_the_auto_class(family, tmp_path):
    directory = family_dir(family)
    native = AutoModelForImageTextToText.from_pretrained(directory)
    model = load_reward_model(directory)

    expected = {f"model.{key}": value for key, value in native.model.state_dict().items()}
    actual = model.state_dict()
    assert actual.keys() == {*expected, "score.weight"}
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert actual["score.weight"].shape == (1, model.config.get_text_config().hidden_size)

    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.state_dict().keys() == actual.keys()
    inputs = encode(directory, ["The left one.", "The right one is brighter, by far."])
    torch.testing.assert_close(score(again, inputs), score(model, inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_reward_does_not_depend_on_padding_or_batch(family):
    directory = family_dir(family)
    model = load_reward_model(directory)
    answers = ["Left.", "The right one is brighter, by far, and the left one is darker."]
    alone = torch.cat([score(model, encode(directory, [answer])) for answer in answers])
    assert (alone[0] - alone[1]).abs() > 1e-3
    for order in ([0, 1], [1, 0]):
        batch = encode(directory, [answers[index] for index in order])
        torch.testing.assert_close(score(model, batch), alone[order], rtol=1e-5, atol=1e-5)
    wide = encode(directory, answers, padding="max_length", max_length=batch["input_ids"].shape[1] + 13)
    torch.testing.assert_close(score(model, wide), alone, rtol=1e-5, atol=1e-5)


def test_last_real_token():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]])
    assert last_real_token(mask).tolist() == [2, 3, 2, 0]


def test_reward_is_read_at_the_last_token_even_if_it_is_the_pad_token():
    """transformers' own head looks for the last token that is not the pad id, and reads one token too early."""
    directory = family_dir("qwen3_vl")
    model = load_reward_model(directory)
    inputs = encode(directory, ["Left."])
    model.config.get_text_config().pad_token_id = int(inputs["input_ids"][0, -1])
    hidden = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(score(model, inputs), model.score(hidden[:, -1])[:, 0])


def test_without_a_mask_every_token_is_real():
    model = load_reward_model(family_dir("llava"))
    inputs = encode(family_dir("llava"), ["Left."])
    expected = score(model, inputs)
    del inputs["attention_mask"]
    torch.testing.assert_close(score(model, inputs), expected)


def test_a_new_head_depends_on_the_seed_alone():
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(load_reward_model(family_dir("qwen3_vl")).score.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_inference_wants_a_trained_head(family):
    directory = family_dir(family)
    with pytest.raises(ValueError, match="has no trained `score` head"):
        load_reward_model(directory, allow_new_head=False)
    with pytest.raises(ValueError, match="has no trained head|are missing|are unexpected"):
        AutoModelForSequenceClassification.from_pretrained(directory)


def damage(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_missing_and_unexpected_weights_raise(family, tmp_path):
    native = AutoModelForImageTextToText.from_pretrained(family_dir(family))
    native.save_pretrained(tmp_path)
    key = next(k for k in load_file(tmp_path / "model.safetensors") if "layers.1" in k and "mlp" in k)
    damage(tmp_path, lambda weights: weights.pop(key))
    with pytest.raises(ValueError, match=r"1 weights of .* are missing: .*layers\.1"):
        load_reward_model(tmp_path)
    native.save_pretrained(tmp_path)
    damage(tmp_path, lambda weights: weights.update({"odd.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match="are unexpected: odd.weight"):
        load_reward_model(tmp_path)


def test_a_reward_model_without_its_head_raises(tmp_path):
    load_reward_model(family_dir("qwen3_vl")).save_pretrained(tmp_path)
    damage(tmp_path, lambda weights: weights.pop("score.weight"))
    for load in (load_reward_model, AutoModelForSequenceClassification.from_pretrained):
        with pytest.raises(ValueError, match="1 weights of .* are missing: score.weight"):
            load(tmp_path)


def test_unsupported_family_is_an_error_that_lists_the_supported_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "florence2"}))
    with pytest.raises(ValueError, match="`florence2` .* Supported: aya_vision, gemma3, .*qwen3_vl"):
        load_reward_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="`vit` .* Supported: "):
        load_reward_model(tmp_path)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="There is no directory .*nowhere to load a model from"):
        load_reward_model(tmp_path / "nowhere")


def test_more_than_one_label_is_an_error(tmp_path):
    load_reward_model(family_dir("llava")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b"}
    config["label2id"] = {"a": 0, "b": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has 2 labels; a reward model has one"):
        load_reward_model(tmp_path)


@pytest.mark.parametrize("causal", [Qwen3ForCausalLM, LlamaForCausalLM])
def test_text_models_keep_their_own_class(causal, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = (Qwen3Config if causal is Qwen3ForCausalLM else LlamaConfig)(
        vocab_size=64, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, **sizes
    )
    native = causal(config)
    native.save_pretrained(tmp_path / "native")
    model = load_reward_model(tmp_path / "native")
    assert type(model).__module__.startswith("transformers.")
    assert torch.equal(model.model.embed_tokens.weight, native.model.embed_tokens.weight)
    with pytest.raises(ValueError, match="has no trained `score` head"):
        load_reward_model(tmp_path / "native", allow_new_head=False)
    model.save_pretrained(tmp_path / "reward")
    again = load_reward_model(tmp_path / "reward", allow_new_head=False)
    assert torch.equal(again.score.weight, model.score.weight)


def test_dtype_and_attention_are_passed_on():
    model = load_reward_model(family_dir("qwen3_vl"), dtype="bfloat16", attn_implementation="eager")
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "eager"


def test_remote_code_is_refused(tmp_path):
    """Code that ships with a checkpoint runs only if it is let, and nothing here lets it by itself."""
    marker = tmp_path / "ran"
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "configuration_strange.StrangeConfig"}})
    )
    (tmp_path / "configuration_strange.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import PretrainedConfig\n"
        "class StrangeConfig(PretrainedConfig):\n    model_type = 'strange'\n"
    )
    with pytest.raises(ValueError, match="custom code|trust_remote_code"):
        load_reward_model(tmp_path)
    assert not marker.exists()


def test_classes_can_be_imported_and_pickled_by_name():
    cls = modeling.Qwen3VLForSequenceClassification
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert cls.__module__ == "trl_dt2it.models.modeling"


IMPORTS = (
    "import trl_dt2it; from transformers import AutoModelForSequenceClassification as Auto",
    "from transformers import AutoModelForSequenceClassification as Auto; import trl_dt2it",
    "from trl_dt2it import load_reward_model; from transformers import AutoModelForSequenceClassification as Auto",
    "import trl_dt2it.models.modeling; from transformers import AutoModelForSequenceClassification as Auto",
    # These import the Auto classes from the middle of the import of a family's configuration.
    "import trl_dt2it; from transformers import Qwen2VLImageProcessor, AutoModelForSequenceClassification as Auto",
    "import trl_dt2it.demo.tiny; from transformers import AutoModelForSequenceClassification as Auto",
)


@pytest.fixture(scope="module")
def classes_by_import(tmp_path_factory) -> list[str]:
    """The class that the Auto class gives after each of the imports, in processes without transformers before."""
    folder = tmp_path_factory.mktemp("model")
    load_reward_model(family_dir("qwen2_5_vl")).save_pretrained(folder)
    program = (
        "import os, sys, datasets, scipy.stats, torch, torchvision\n"
        "for code in sys.argv[2:]:\n"
        "    if os.fork() == 0:\n"
        "        exec(code)\n"
        "        print(type(Auto.from_pretrained(sys.argv[1])).__name__, flush=True)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "    print(flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, folder, *IMPORTS], capture_output=True, text=True, check=True
    )
    return done.stdout.split("\n\n")


@pytest.mark.parametrize("number", range(len(IMPORTS)), ids=IMPORTS)
def test_the_auto_class_knows_the_models_whatever_is_imported_first(classes_by_import, number):
    assert classes_by_import[number].strip() == "Qwen2_5_VLForSequenceClassification"


def test_no_family_is_loaded_until_its_class_is_asked_for():
    program = (
        "import sys, trl_dt2it, trl_dt2it.models.modeling, transformers\n"
        "loaded = lambda: sorted(name for name in sys.modules if name.startswith('transformers.models.qwen2_vl.'))\n"
        "before = loaded()\n"
        "cls = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[transformers.Qwen2VLConfig]\n"
        "assert 'transformers.models.qwen2_vl.modeling_qwen2_vl' in loaded()\n"
        "assert trl_dt2it.models.modeling.Qwen2VLForSequenceClassification is cls\n"
        "print(before, [finder for finder in sys.meta_path if type(finder).__module__.startswith('trl_dt2it')])\n"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip().endswith("[] []")  # no import finder is left behind


def test_the_auto_mapping_lists_the_families_and_what_it_had():
    class Derived(Qwen3VLConfig):
        pass

    mapping = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    assert Derived not in mapping and CLIPConfig not in mapping
    for config_class, cls in mapping.items():  # also of families that share a module with ours: `gemma3_text`
        is_ours = config_class.model_type in families.FAMILIES
        assert cls.__module__.startswith("trl_dt2it." if is_ours else "transformers."), cls


def test_import_is_cheap():
    """The import adds less than a fifth to `import trl`; medians of 5 fresh processes."""
    program = (
        "import time; a = time.perf_counter(); import trl; b = time.perf_counter(); import trl_dt2it;"
        "print((time.perf_counter() - b) / (b - a))"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(5)]
    assert sorted(float(run.stdout) for run in runs)[2] < 0.2


def test_the_head_keeps_fp32_weights_and_gives_fp32_rewards(tmp_path):
    """Saved beside a bf16 body, and loaded again in any dtype, the head has the same weights bit by bit."""
    torch.manual_seed(0)
    model = load_reward_model(family_dir("qwen3_vl"), dtype="bfloat16")
    weight = model.score.weight.detach().clone()
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())
    model.save_pretrained(tmp_path)
    for dtype in ("auto", "bfloat16", "float16", "float32"):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
        assert again.dtype == (torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))
        assert torch.equal(again.score.weight, weight)
        assert torch.equal(again.bfloat16().score.weight, weight) and again.dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert again(input_ids=torch.tensor([[1, 2, 3]])).logits.dtype == torch.float32


def test_rounding_makes_no_ties():
    """10,000 margins of rewards around 25: in bf16, 3 % of them would be ties."""
    torch.manual_seed(0)
    head = RewardHead(16, 1, bias=True)
    hidden = torch.randn(10_000, 16).bfloat16()
    with torch.no_grad():
        head.bias.fill_(25.0)
        head.weight.copy_(torch.randn(1, 16) / 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rewards = head(hidden)[:, 0]
    exact = hidden.double() @ head.weight[0].detach().double() + 25.0
    torch.testing.assert_close(rewards.double(), exact, rtol=0, atol=1e-5)
    differ = (hidden != hidden.roll(1, 0)).any(1)
    assert differ.all() and (rewards != rewards.roll(1)).all()
    assert (rewards.bfloat16() == rewards.bfloat16().roll(1)).float().mean() > 0.02


def test_text_models_have_an_fp32_head_too(tmp_path):
    from transformers import AutoTokenizer, Qwen3ForSequenceClassification

    from ..trainers import text_model

    tokenizer = AutoTokenizer.from_pretrained(family_dir("qwen3_vl"))
    text_model(tokenizer).save_pretrained(tmp_path)
    model = load_reward_model(tmp_path, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and model.score.weight.dtype == torch.float32
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.dtype == torch.float32
    # Nobody else's model of that class has changed.
    other = Qwen3ForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert other.score.weight.dtype == torch.bfloat16 and type(other.score) is torch.nn.Linear
