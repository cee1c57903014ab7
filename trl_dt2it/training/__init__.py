"""Training: the trainer, its configuration, losses, batches and model card."""
