"""The training stages: batches, objectives and the DeepSpeed job."""
