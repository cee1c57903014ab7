"""Loss and gradients of the model under torch's `fully_shard`, against the model whole; started by the tests.

The sharded model reads one row per pair where it can, and the whole one two rows, as everybody makes them.

accelerate leaves FSDP out on a CPU, so the model is sharded here by hand, over two gloo ranks."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import logsigmoid


def main(base: str) -> None:
    from transformers import AutoProcessor

    from tests.pairs import plain_two_rows
    from tests.rows import make_rows
    from trl_dt2it import MultimodalPreferenceCollator, load_reward_model
    from trl_dt2it.models.shared_prefix import decide_share_prefix

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # The second rank's rows have no image: without a dummy image it would skip the vision tower, and both would hang.
    rows = make_rows(2, seed=rank, num_images=(1,) if rank == 0 else (0,))
    processor = AutoProcessor.from_pretrained(base)

    def loss_of(model, share_prefix):
        batch = MultimodalPreferenceCollator(processor, add_dummy_image=True, share_prefix=share_prefix)(rows)
        pairs = batch.pop("pairs")
        logits = model(**(batch if share_prefix else plain_two_rows(batch))).logits[:, 0]
        chosen, rejected = logits[: 2 * len(pairs["weight"])].chunk(2)
        return -logsigmoid(chosen - rejected).mean() + 0.0 * logits.sum()

    torch.manual_seed(0)
    whole = load_reward_model(base, dtype="float32").train()
    share_prefix = decide_share_prefix("auto", whole)
    loss = loss_of(whole, share_prefix=False)
    loss.backward()
    for parameter in whole.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2

    torch.manual_seed(0)
    model = load_reward_model(base, dtype="float32").train()
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or []):
            fully_shard(module)
    fully_shard(model)
    sharded_loss = loss_of(model, share_prefix)
    sharded_loss.backward()
    torch.testing.assert_close(sharded_loss, loss, rtol=1e-5, atol=1e-6)
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if parameter.grad is not None else torch.zeros_like(expected[name])
        torch.testing.assert_close(grad, expected[name].grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    dist.destroy_process_group()
    print(f"rank {rank} agrees{' in one row' if share_prefix else ''}")


if __name__ == "__main__":
    main(sys.argv[1])
