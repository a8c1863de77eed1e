"""transformers' Trainer with our objective, rates, checkpoints and signals."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

import click
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from medvlm.errors import NonFiniteLoss
from medvlm.progress import progress_interval_s, report_progress
from medvlm.recipe_schema import Recipe, Stage
from medvlm.training.expert_load import ExpertLoad
from medvlm.training.objectives import objective_of
from medvlm.training.pace import Pace
from medvlm.training.params import parameter_groups
from medvlm.training.resume import Scratch
from medvlm.training.spread import expert_groups

__all__ = ["ProgressCallback", "ScratchCallback", "StageTrainer", "StopCallback"]


class StageTrainer(Trainer):
    """One stage of a recipe.

    Args:
        recipe: Gives the parts' sizes, which scale the rates.
        stage: Gives objective and rates.
        scratch: Named in errors.
        pace: Gets a point at each log, and the time spent waiting for data.
        expert_load: Counts where tokens go, in a model with experts.
        options: Passed to ``Trainer``.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        scratch: Scratch,
        *,
        pace: Pace,
        expert_load: ExpertLoad | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.remove_callback(PrinterCallback)
        self._recipe = recipe
        self._stage = stage
        self._scratch = scratch
        self._objective = objective_of(stage)
        self._measures: dict[str, list[float]] = {}
        self._expert_load = expert_load
        self.pace = pace

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a rate for each part of the model."""
        opt_model: Any = self.model if model is None else model
        groups = expert_groups(parameter_groups(opt_model, self._recipe, self._stage))
        # One pass over weights and moments instead of a dozen: 7 times as fast on a CPU, with 135 M parameters.
        self.optimizer = torch.optim.AdamW(groups, lr=self._stage.learning_rate, fused=True)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of a step; how long they kept the trainer waiting goes into the pace."""
        if not self.pace.begun:
            self.pace.begin(self.state.global_step)
        with self.pace.waiting():
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss, over the answer tokens of the whole optimiser step.

        Raises:
            NonFiniteLoss: It is NaN or infinite, with the samples of the batch.
        """
        sample_ids = inputs.pop("sample_ids")
        spans = inputs.pop("spans", None)
        result = self._objective(model, inputs, num_items_in_batch)
        loss, measures = result if isinstance(result, tuple) else (result, {})
        for name, value in measures.items():
            self._measures.setdefault(name, []).append(value)
        if self._expert_load is not None and spans is not None:
            self._expert_load.add(spans, sample_ids)
        if not torch.isfinite(loss):
            last = self._scratch.latest()
            ids = ", ".join(sample_id for ids in sample_ids for sample_id in ids)
            raise NonFiniteLoss(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}; samples of the batch: {ids}",
                where=f"stage {self._stage.name}; last good checkpoint: {last[1] if last else 'none'}",
                hint=f"look at these samples, or lower stages.{self._stage.name}.learning_rate "
                f"(it is {self._stage.learning_rate:g}) or set precision: fp32",
            )
        # Gradients are averaged over processes, and the objective divided by the tokens of all of them.
        return loss * self.accelerator.num_processes if num_items_in_batch is not None else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the balance of the experts where there are some, and the means of what the objective measured."""
        # Kept apart from what is logged, which lies beside the weights: no two runs have the same pace.
        self.pace.add(self.state.global_step)
        if self._expert_load is not None and "loss" in logs:
            logs = {**logs, **self._expert_load.recent()}
        if "loss" in logs and self._measures:
            own = torch.tensor([sum(values) / len(values) for values in self._measures.values()])
            means: Any = self.accelerator.reduce(own.to(self.accelerator.device), "mean")
            logs = {**logs, **dict(zip(self._measures, means.tolist(), strict=True))}
            self._measures = {}
        super().log(logs, start_time)


class ScratchCallback(TrainerCallback):
    """Marks checkpoints complete, keeps the newest, and asks for one when much time has passed."""

    def __init__(self, scratch: Scratch, keep: int, every_s: float) -> None:
        self._scratch = scratch
        self._keep = keep
        self._every_s = every_s
        self._saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint when it is time."""
        if _agreed(time.monotonic() - self._saved_at > self._every_s):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint once every process has written its part."""
        self._saved_at = time.monotonic()
        if dist.is_initialized():
            dist.barrier()
        if state.is_world_process_zero:
            self._scratch.mark_complete(state.global_step, self._keep)
        if dist.is_initialized():
            dist.barrier()


class StopCallback(TrainerCallback):
    """On SIGTERM or Ctrl-C: saves after the running step, then stops. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopCallback:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:
                # Not the main thread: whoever runs us there owns the signals.
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, all processes together."""
        if _agreed(self.received is not None):
            self.received = self.received or signal.SIGTERM
            control.should_save = True
            control.should_training_stop = True


def _agreed(flag: bool) -> bool:
    """Whether any process raised its flag: all must save, or none."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


class ProgressCallback(TrainerCallback):
    """Events for whoever listens, and a bar (terminal) or a line now and then (log) for people."""

    def __init__(self, recipe: str, stage: int, target: str, batch: int) -> None:
        self._labels = {"recipe": recipe, "stage": stage, "target": target}
        self._batch = batch
        self._started = self._reported = self._printed = time.monotonic()
        self._first_step = 0
        self._bar: Any = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and the bar."""
        self._started = self._reported = self._printed = time.monotonic()
        self._first_step = state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=state.max_steps, completed=state.global_step)

    @property
    def _title(self) -> str:
        target = "" if self._labels["target"] == "all" else f" {self._labels['target']}"
        return f"{self._labels['recipe']} stage {self._labels['stage']}{target}"

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Tell the newest loss."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        now, last = time.monotonic(), state.global_step >= state.max_steps
        done = state.global_step - self._first_step
        per_step_s = (now - self._started) / max(1, done)
        event = {
            **self._labels,
            "step": state.global_step,
            "steps": state.max_steps,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "samples_per_s": round(self._batch / max(per_step_s, 1e-9), 2),
            "eta_s": round(per_step_s * (state.max_steps - state.global_step), 1),
        }
        if last or done <= 1 or now - self._reported >= progress_interval_s():
            self._reported = now
            report_progress(event)
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, description=f"{self._title} {logs['loss']:.3f}")
        elif last or done <= 1 or now - self._printed >= 5:
            self._printed = now
            click.echo(
                f"{self._title}: step {event['step']}/{event['steps']}, loss {event['loss']:.4f}, "
                f"{event['samples_per_s']:.0f} sequences/s, {event['eta_s']:.0f} s left",
                err=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
