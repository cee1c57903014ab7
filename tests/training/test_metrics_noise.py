"""NEFTune's noise: of the same scale in every batch and layout, and TRL's where a batch is one pair."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoProcessor
from trl import RewardConfig, RewardTrainer

from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer

from ..families import family_dir
from ..rows import make_dataset, text_rows
from ..trainers import common, losses, text_model, trainer_for


ALPHA = 5.0


def noise_of_pairs(trainer) -> dict[int, float]:
    """Largest noise of each pair of the first batch, as a share of the bound of its longer conversation."""
    embedding = trainer.model.get_input_embeddings()
    seen = []
    compute_loss = trainer.compute_loss

    def spied(model, inputs, *args, **kwargs):
        def look(module, args, output):
            seen.append((inputs, (output - module.forward(args[0])).detach().abs()))

        handle = embedding.register_forward_hook(look)
        try:
            return compute_loss(model, inputs, *args, **kwargs)
        finally:
            handle.remove()

    trainer.compute_loss = spied
    trainer.train()
    inputs, noise = seen[0]
    if (layout := inputs.get("pair_layout")) is not None:
        parts = noise[0].split(layout.sum(dim=1).tolist())
        lengths = [prefix + max(answers) for prefix, *answers in layout.tolist()]
    else:
        mask = inputs["attention_mask"].bool()
        pairs = len(inputs["pairs"]["weight"])
        parts = [torch.cat([noise[i][mask[i]], noise[pairs + i][mask[pairs + i]]]) for i in range(pairs)]
        lengths = torch.maximum(*mask.sum(dim=1)[: 2 * pairs].view(2, pairs)).tolist()
    dim = noise.shape[-1]
    return {n: part.max().item() / (ALPHA / (n * dim) ** 0.5) for n, part in zip(lengths, parts, strict=True)}


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
@pytest.mark.parametrize("share_prefix", ["auto", "false"])
def test_the_noise_of_a_pair_depends_on_itself_alone(family, share_prefix, tmp_path):
    """Some thousand draws from +-bound reach to within one percent of it, and never beyond."""
    data = make_dataset(4, num_images=(1, 0, 2, 0))
    common = {"neftune_noise_alpha": ALPHA, "share_prefix": share_prefix, "learning_rate": 0.0, "max_steps": 1}
    together, alone = (
        trainer_for(family, tmp_path, rows, {**common, "per_device_train_batch_size": len(rows)})
        for rows in (data, data.select([0]))
    )
    assert together.data_collator.share_prefix is (share_prefix == "auto" and family == "qwen3_vl")
    shares = noise_of_pairs(together)
    assert len(shares) == 4  # of four lengths
    assert all(0.99 < share <= 1.0001 for share in shares.values()), shares
    ((length, share),) = noise_of_pairs(alone).items()
    assert length in shares and 0.99 < share <= 1.0001


@pytest.mark.parametrize("lora", [False, True])
def test_with_one_pair_a_batch_it_is_that_of_trl(lora, tmp_path):
    tokenizer = AutoProcessor.from_pretrained(family_dir("qwen3_vl")).tokenizer
    data = Dataset.from_list(text_rows(4))
    peft_config = LoraConfig(r=2, task_type="SEQ_CLS", modules_to_save=["score"]) if lora else None
    runs = []
    for trainer_class, config_class in (
        (RewardTrainer, RewardConfig),
        (MultimodalRewardTrainer, MultimodalRewardConfig),
    ):
        args = {**common(), "per_device_train_batch_size": 1, "neftune_noise_alpha": ALPHA}
        trainer = trainer_class(
            text_model(tokenizer),
            args=config_class(str(tmp_path), **args),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.train()
        runs.append((losses(trainer), trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-4)
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-4)
    assert runs[1][1] == runs[1][2]  # none after training, nor in evaluation
