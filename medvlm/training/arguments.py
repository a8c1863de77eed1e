"""What the Trainer is told: a stage's settings and its engine's choices, in transformers' words."""

from __future__ import annotations

import math
from typing import Any

from medvlm.training.engine import deepspeed_config
from medvlm.training.job import Job

__all__ = ["training_arguments"]

_CURVE_POINTS = 500


def training_arguments(job: Job, steps: int) -> Any:
    """transformers' arguments for a job.

    Args:
        job: Its stage gives rates, schedule and limits, its engine the split of the batch and the precision.
        steps: Of the whole run.
    """
    from transformers import TrainingArguments

    stage, engine = job.stage, job.engine
    return TrainingArguments(
        output_dir=str(job.scratch.folder),
        max_steps=steps,
        per_device_train_batch_size=engine.micro_batch,
        gradient_accumulation_steps=engine.accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule if stage.schedule != "constant" else "constant_with_warmup",
        warmup_steps=math.ceil(stage.warmup_ratio * steps),
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        bf16=engine.precision == "bf16",
        fp16=engine.precision == "fp16",
        tf32=True if engine.device == "cuda" else None,
        activation_checkpointing=engine.gradient_checkpointing,
        use_cpu=engine.device == "cpu",
        deepspeed=deepspeed_config(stage, engine),
        # The plan has shuffled already; so a resumed run skips to its place without reading what it skips.
        train_sampling_strategy="sequential",
        dataloader_num_workers=4 if engine.device == "cuda" else 0,
        dataloader_pin_memory=engine.device == "cuda",
        remove_unused_columns=False,
        logging_steps=max(1, steps // _CURVE_POINTS),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        run_name=f"{job.recipe.name} stage {job.number}" + (f" {job.target}" if job.target != "all" else ""),
        save_strategy="steps",
        save_steps=max(1, math.ceil(steps * job.recipe.checkpoints.every)),
        report_to=[],
        disable_tqdm=True,
        log_level="warning",
        seed=job.recipe.seed,
    )
