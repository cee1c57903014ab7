"""Scores a data set on a cluster of its own: MODEL ROWS.parquet OUTPUT."""

import sys

from datasets import load_dataset

from trl_dt2it.scale import on_ray, score_dataset


if __name__ == "__main__":
    model, rows, output = sys.argv[1:]
    with on_ray(num_cpus=2):
        score_dataset(model, load_dataset("parquet", data_files=rows, split="train"), output, rows_per_shard=2)
