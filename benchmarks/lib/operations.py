"""How many multiplications and additions a batch needs: linear layers and attention, vision included, forward pass.

The backward pass needs twice as many of each, so that ratios are the same with it.
"""

from torch import nn


def count(model, batch: dict) -> float:
    """
    Operations of a batch: two for every weight of a linear layer and token, and four for every query, key that it
    sees, and channel of a head.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A Qwen3-VL reward model.
        batch (`dict`):
            Tensors of a collator, in one row per pair or in two.

    Returns:
        `float`
    """
    text, vision = model.config.text_config, model.config.vision_config
    decoder, visual = model.model.language_model, model.model.visual
    if "pair_layout" in batch:
        layout = batch["pair_layout"].tolist()
        num_tokens = sum(map(sum, layout))
        visible = 0.0
        for prefix, *branches in layout:
            visible += prefix * (prefix + 1) / 2
            visible += sum(length * prefix + length * (length + 1) / 2 for length in branches)
    else:
        # Of two rows only the tokens that are real count as needed; padding is waste.
        lengths = batch["attention_mask"].sum(1).tolist()
        num_tokens = sum(lengths)
        visible = sum(length * (length + 1) / 2 for length in lengths)
    text_operations = 2 * _weights(decoder) * num_tokens
    text_operations += 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * visible

    patches = batch["image_grid_thw"].prod(1)
    num_patches = int(patches.sum())
    merged = num_patches / vision.spatial_merge_size**2
    blocks = visual.blocks
    mergers = _weights(visual.merger) + sum(_weights(merger) for merger in visual.deepstack_merger_list)
    vision_operations = 2 * (_weights(blocks) + visual.patch_embed.proj.weight.numel()) * num_patches
    vision_operations += 2 * mergers * merged
    vision_operations += 4 * vision.depth * vision.hidden_size * float((patches**2).sum())
    return text_operations + vision_operations


def _weights(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
