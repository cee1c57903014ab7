"""The blind twin: a reward model that is trained beside the main one, on the same pairs without their images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.nn.parallel import DistributedDataParallel

from ..data.controls import row_without_media
from ..models import rendering
from ..models.modeling import load_processing_class, load_reward_model
from ..models.shared_prefix import decide_share_prefix
from ..processes import whole_weights
from .collator import lay_out
from .config import MultimodalRewardConfig
from .losses import pair_rewards, pairwise_loss
from .sharding import vision_parameters


WEIGHTS_FILE, OPTIMIZER_FILE = "blind_model.safetensors", "blind_optimizer.safetensors"  # in a checkpoint


@dataclass
class WithBlindBatch:
    """Data collator that adds to `pairs` what the twin reads, the tensors `blind`: the rows without their images."""

    collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
    processing_class: rendering.ProcessingClass  # of the twin
    share_prefix: bool
    pad_to_multiple_of: int | None

    def __post_init__(self) -> None:
        self.image_token_ids = rendering.image_token_ids(self.processing_class)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)  # first, because it checks the rows
        plain = [row_without_media(dict(example)) for example in examples]
        rendered = [rendering.render_pair(row, [], self.processing_class, []) for row in plain]
        sides, _ = rendering.encode_completions(rendered, self.processing_class)
        rows = [list(pair) for pair in zip(*sides, strict=True)]
        ids = self.image_token_ids if self.share_prefix else None
        batch["pairs"]["blind"] = lay_out(rows, self.processing_class, ids, self.pad_to_multiple_of)
        return batch


class BlindTwin:
    """
    The blind model of arXiv 2503.03122 and its optimizer.

    Each process holds it whole and in fp32, whatever shards the main model; DDP averages its gradients. It learns the
    labels by the loss `bt`, with the learning rate, weight decay and clipping of the main model.
    """

    def __init__(self, args: MultimodalRewardConfig, accelerator: Accelerator) -> None:
        self.args, self.accelerator, name = args, accelerator, cast(str, args.blind_model)
        with whole_weights():
            model = load_reward_model(name, dtype=torch.float32, trust_remote_code=args.trust_remote_code)
        self.processing_class = load_processing_class(name, trust_remote_code=args.trust_remote_code)
        model.config.pad_token_id = rendering.get_tokenizer(self.processing_class).pad_token_id
        self.share_prefix = decide_share_prefix(args.share_prefix, model)
        for parameter in vision_parameters(model):
            parameter.requires_grad_(False)
        if args.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})  # transformers 5.3 has a new name, and warns of the old one
        self.model = self.module = model.to(accelerator.device).train()
        if accelerator.num_processes > 1:
            # Parts that no text reaches, such as a projector, have no gradient.
            self.module = cast(Any, DistributedDataParallel(model, find_unused_parameters=True))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        decay = {True: args.weight_decay, False: 0.0}  # biases and norms have no decay, as in `Trainer`
        groups = [{"params": [p for p in trained if (p.dim() > 1) is is_matrix]} for is_matrix in decay]
        for group, value in zip(groups, decay.values(), strict=True):
            group["weight_decay"] = cast(Any, value)
        betas = args.adam_beta1, args.adam_beta2
        self.optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon)

    def collator(self, collator: Any) -> WithBlindBatch:
        """Add to the batches of a collator what [`BlindTwin.learn`] reads."""
        multiple = cast("int | None", self.args.pad_to_multiple_of)
        return WithBlindBatch(collator, self.processing_class, self.share_prefix, multiple)

    def learn(self, pairs: Mapping[str, Any], factor: torch.Tensor, learning_rate: float) -> torch.Tensor:
        """Return the blind margins `(B,)` fp32 of a batch, NaN without an image, and learn from it: the weighted sum
        of losses, times `factor`."""
        is_last = self.accelerator.sync_gradients  # of an optimization step
        sums_later = nullcontext() if is_last or self.module is self.model else self.module.no_sync()
        with sums_later, self.accelerator.autocast():
            rewards = pair_rewards(self.module, pairs["blind"], len(pairs["weight"]))
            labels = {name: pairs[name] for name in ("label_confidence",) if name in pairs}
            losses = pairwise_loss(rewards[0], rewards[1], labels, self.args)
            ((pairs["weight"].float() * losses).sum() * factor).backward()
        if is_last:
            if self.args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.optimizer.zero_grad()
        margins = (rewards[0] - rewards[1]).detach()
        return torch.where(pairs["has_media"], margins, torch.nan)

    def save(self, checkpoint: Path) -> None:
        """Write weights and optimizer into the folder of a checkpoint."""
        checkpoint.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(checkpoint / WEIGHTS_FILE))
        state = self.optimizer.state_dict()["state"]
        tensors = {f"{index}.{name}": tensor for index, values in state.items() for name, tensor in values.items()}
        save_file(tensors, checkpoint / OPTIMIZER_FILE)

    def resume(self, checkpoint: str | None) -> None:
        """Go on from a checkpoint, if there is one; a `ValueError` if it has no twin."""
        if checkpoint is None:
            return
        if not (Path(checkpoint) / OPTIMIZER_FILE).is_file():
            raise ValueError(
                f"{checkpoint} was written without a `blind_model`; resume without it, or start the training anew."
            )
        load_model(self.model, str(Path(checkpoint) / WEIGHTS_FILE))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(Path(checkpoint) / OPTIMIZER_FILE).items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
