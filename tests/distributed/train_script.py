"""Trains and evaluates on one or two processes and writes what came out; started by `launching.py`."""

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object


def main(output_dir: str, base: str, per_device: int, options: dict) -> None:
    from tests.rows import make_dataset
    from tests.trainers import config
    from trl_dt2it import MultimodalRewardTrainer

    torch.set_num_threads(1)
    stream = options.pop("stream", False)
    resume, makes_margins = options.pop("resume", None), options.pop("makes_margins", False)
    num_images = tuple(options.pop("num_images", (1, 2, 0)))
    columns = {"strength": [float(i % 5) for i in range(8)], "weight": [1.0, 0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 1.0]}
    columns["blind_margin"] = [3.0, -1.0, None, 0.5, 2.0, 8.0, -4.0, 1.5]
    train = make_dataset(8, num_images=num_images, **columns)
    evaluation = make_dataset(5, seed=7, source=["a", "b", "a", "a", "b"])
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions.tolist())
        return {}

    args = config(output_dir, per_device_train_batch_size=per_device, num_train_epochs=2, **options)
    trainer = MultimodalRewardTrainer(
        base,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation.to_iterable_dataset() if stream else evaluation,
        compute_metrics=compute_metrics,
    )
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)
    after = trainer.evaluate()
    config = trainer.model.config
    statistics = gather_object([(config.reward_mean, config.reward_std)])
    if trainer.accelerator.is_main_process:
        trainer.save_model(output_dir)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {"log": log, "before": before, "after": after, "seen": seen, "rows": len(train)}
        result["statistics"] = statistics
        (Path(output_dir) / "result.json").write_text(json.dumps(result))
    if makes_margins:
        from trl_dt2it.debias import model_blind_margins

        margins = gather_object([model_blind_margins(train, base, args, seed=1).tolist()])
        (Path(output_dir) / "margins.json").write_text(json.dumps(margins))
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
