"""One training stage of a recipe: samples and a start in, checkpoints and a report out.

``python -m medvlm.training.run`` is the process that a launcher starts, once for each GPU.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medvlm.config import load_recipe
from medvlm.errors import MedVLMError, OutOfMemory, TrainingError
from medvlm.recipe_schema import Recipe
from medvlm.store import Report, Workspace, fingerprint, write_report
from medvlm.training.arguments import training_arguments
from medvlm.training.curve import write_curve
from medvlm.training.engine import choose_engine, prepared_environment, quiet_libraries
from medvlm.training.job import Job, checkpoint_metadata, fit_start, make_job, start_of
from medvlm.training.quantised import check_quantisation

if TYPE_CHECKING:
    from medvlm.models.checkpoint import Checkpoint
    from medvlm.training.expert_load import ExpertLoad

__all__ = ["run_stage"]

_REWARDS = ("preference_accuracy", "reward_margin", "reward_chosen", "reward_rejected")


@dataclass(frozen=True, slots=True)
class _Trained:
    """What one job gave."""

    counts: dict[str, int]
    curve: list[dict[str, float]]
    loss: float
    experts: dict[str, Any] | None = None
    """Of a model with experts, see ``ExpertLoad.summary``."""
    reused: bool = False
    pace: Sequence[dict[str, float]] = ()
    """See ``Pace``; empty where nothing was trained."""


def run_stage(workspace: Workspace, recipe: Recipe, stage_number: int, *, fresh: bool = False) -> Report:
    """Train one stage of a recipe, or what of it is not done yet.

    Args:
        workspace: Gives samples and start, gets checkpoints and ``report.json``.
        recipe: Which model and how.
        stage_number: 1, 2 or 3.
        fresh: Begin anew: neither resume a killed run nor keep a finished checkpoint.

    Returns:
        Counts (samples, steps, truncated, parameters), final loss, and the loss curve of each target.

    Raises:
        InputError: The dataset is empty, or a sample is malformed (it is named).
        WorkspaceError: A step before has not run, or the disk is full or read-only.
        CheckpointError: The stage before has no checkpoint, or one of another model.
        TrainingError: The dataset broke its contract, the run was stopped, the loss is not finite, memory is short.
    """
    with prepared_environment():
        return _run_stage(workspace.ensure(), recipe, stage_number, fresh=fresh)


def _run_stage(workspace: Workspace, recipe: Recipe, stage_number: int, *, fresh: bool) -> Report:
    from medvlm.training.data import check_contract
    from medvlm.training.pace import pace_metrics

    started = time.monotonic()
    stage = recipe.stages[stage_number - 1]
    check_contract(workspace, stage, recipe.name)
    check_quantisation(recipe, stage)
    engine = choose_engine(recipe, stage)
    jobs = [make_job(workspace, recipe, stage_number, target, engine) for target in recipe.targets(stage_number)]
    if engine.rank == 0:
        click.echo(f"{recipe.name}, stage {stage_number} ({stage.name}): {engine}", err=True)
    results = {job.target: _run_job(job, fresh=fresh) for job in jobs}
    report = Report(
        step=f"train {recipe.name} stage {stage_number}",
        counts=_sum_counts([result.counts for result in results.values()]),
        metrics={
            **{
                f"{name}_{target}" if target != "all" else name: value
                for target, result in results.items()
                for name, value in _final(result.curve).items()
            },
            **_expert_metrics(results),
            **pace_metrics([result.pace for result in results.values()]),
        },
        details={
            "recipe": recipe.name,
            "stage": stage.name,
            "engine": str(engine),
            "curves": {target: result.curve for target, result in results.items()},
            "pace": {target: result.pace for target, result in results.items() if result.pace},
            "counts": {target: result.counts for target, result in results.items()},
            "reused": [target for target, result in results.items() if result.reused],
            **next((result.experts for result in results.values() if result.experts), {}),
        },
        seed=recipe.seed,
        fingerprint=fingerprint(*[job.fingerprint for job in jobs]),
    )
    packages = ("torch", "transformers", "deepspeed", "tokenizers", "safetensors")
    if engine.rank:
        return report
    folder = workspace.stage(recipe.name, stage_number)
    write_curve(folder, report.details["curves"])
    return write_report(folder, report, started=started, packages=packages)


def _run_job(job: Job, *, fresh: bool) -> _Trained:
    if not fresh and (job.folder / "metadata.json").is_file():
        metadata = checkpoint_metadata(job.folder)
        if metadata["fingerprint"] == job.fingerprint:
            if job.engine.rank == 0:
                click.echo(f"{job.folder}: finished before, from the same recipe, data and start; kept", err=True)
            loss, experts = metadata["metrics"]["loss"], metadata.get("experts")
            return _Trained(metadata["counts"], metadata["curve"], loss, experts, reused=True)
    try:
        return _train(job, fresh=fresh)
    except RuntimeError as error:
        # torch raises OutOfMemoryError on a GPU, and a bare RuntimeError of its allocator on the CPU.
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        name = f"stages.{job.stage.name}"
        raise OutOfMemory(
            f"the memory is not enough for {job.engine.micro_batch} sequences of up to {job.stage.max_length} tokens",
            where=f"recipe {job.recipe.name}, field {name}.micro_batch (it is {job.stage.micro_batch})",
            hint=f"run again with --set {name}.micro_batch={max(1, job.engine.micro_batch // 2)} (the global batch "
            "stays the same), then gradient_checkpointing=on, a higher zero_stage, or offload_optimizer=true",
        ) from error


def _train(job: Job, *, fresh: bool) -> _Trained:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from medvlm.models.checkpoint import git_commit, save_checkpoint
    from medvlm.training.collate import ConversationEncoder
    from medvlm.training.data import PixelStore, StagePlan, TrainingSet, stage_samples
    from medvlm.training.images import image_store
    from medvlm.training.kernels import prepare_kernels
    from medvlm.training.lora import attach, detach, take_adapter
    from medvlm.training.marks import attach_marks, detach_marks, take_marks
    from medvlm.training.params import freeze, parameter_counts
    from medvlm.training.quantised import pack, packed_for_adapters, unpack, with_packed_weights
    from medvlm.training.spread import spread

    stage = job.stage
    samples, left_out = stage_samples(job.workspace, job.recipe, stage, job.data)
    start = start_of(job, samples)
    pack(start.model, stage, job.engine)
    with packed_for_adapters(start.model, stage):
        attach(start.model, job.recipe, stage)
    attach_marks(start.model, start.tokenizer, job.recipe, stage)
    freeze(start.model, stage)
    prepare_kernels(start.model, stage, job.engine)
    plan = StagePlan(samples, stage, job.recipe.seed)
    encoder = ConversationEncoder(job.recipe, start.tokenizer, stage.template, stage.max_length)
    # Flash-attention knows no trees: there, questions of one image stand apart.
    trees = job.engine.attention != "flash_attention_2"
    pixels = PixelStore(start.processor)
    images = image_store(job.workspace, stage, job.engine, start, samples, plan, pixels)
    training_set = TrainingSet(samples, plan, encoder, images, shared_prefix=trees)
    fit_start(job, start, samples, images)
    counts = {
        "samples": len(samples),
        "quarantined": left_out["quarantined"],
        "other_language": left_out["other_language"],
        "leaked": left_out["leaked"],
        "steps": plan.steps,
        "truncated": sum(any(e.cut for e in training_set.sequences([sample])) for sample in samples),
        **parameter_counts(start.model),
    }
    spread_out = spread(start.model, job.recipe, stage, job.engine)
    load = None
    if start.model.config.moe is not None:
        from medvlm.training.expert_load import ExpertLoad

        load = ExpertLoad(start.model, {sample.sample_id: sample.modality for sample in samples})
    try:
        trainer, curve = _fit(job, start, training_set, plan, fresh=fresh, load=load)
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if spread_out:
            from medvlm.models.expert_parallel import gather_experts

            state = gather_experts(start.model, state)
    finally:
        # Else transformers would shard every model that this process builds or loads from now on (ZeRO-3).
        unset_hf_deepspeed_config()
    final = _final(curve)
    experts = None if load is None else load.summary()
    if job.engine.rank == 0:
        metadata = {
            "fingerprint": job.fingerprint,
            "recipe": job.recipe.name,
            "stage": stage.name,
            "target": job.target,
            "seed": job.recipe.seed,
            "git_commit": git_commit(),
            "metrics": final,
            "counts": counts,
            "curve": curve,
            **({"experts": experts} if experts else {}),
        }
        weights, adapter = take_adapter(with_packed_weights(start.model, take_marks(start.model, state)), stage)
        detach(start.model)
        unpack(start.model)
        detach_marks(start.model)
        save_checkpoint(job.folder, dataclasses.replace(start, metadata=metadata), state=weights, adapter=adapter)
        job.scratch.remove()
    return _Trained(counts, curve, final["loss"], experts, pace=trainer.pace.points)


def _final(curve: Sequence[dict[str, float]]) -> dict[str, float]:
    """Loss, and what else the objective measures, over the last twentieth of the curve."""
    tail = curve[-max(1, len(curve) // 20) :]
    names = [name for name in ("loss", *_REWARDS) if name in tail[-1]]
    return {name: round(sum(point[name] for point in tail) / len(tail), 6) for name in names}


def _fit(
    job: Job, start: Checkpoint, training_set: Any, plan: Any, *, fresh: bool, load: ExpertLoad | None = None
) -> tuple[Any, list[dict[str, float]]]:
    """Run the Trainer to the end of the plan; its state gives the loss curve, resumed parts included."""
    import functools

    import torch.distributed as dist

    quiet_libraries()
    from medvlm.training.collate import collate
    from medvlm.training.pace import Pace
    from medvlm.training.preference import reference_log_probabilities
    from medvlm.training.tracking import tracked
    from medvlm.training.trainer import ProgressCallback, ScratchCallback, StageTrainer, StopCallback

    scratch = job.scratch
    arguments = training_arguments(job, plan.steps)
    if job.engine.rank == 0:
        message = scratch.open(fresh=fresh)
        if message:
            click.echo(message, err=True)
    if dist.is_initialized():
        dist.barrier()
    latest = scratch.latest()
    pace = Pace(job.stage.global_batch)
    for resumed in (pace, load):
        if latest and resumed is not None:
            resumed.resume(latest[1])
    if latest and job.engine.rank == 0:
        click.echo(f"going on from step {latest[0]} of {plan.steps}", err=True)
    progress = ProgressCallback(job.recipe.name, job.number, job.target, job.stage.global_batch)
    checkpoints = job.recipe.checkpoints
    pad_id: Any = start.tokenizer.pad_token_id
    dpo = job.stage.objective == "dpo"
    batched = functools.partial(
        collate,
        pad_id=pad_id,
        packing=job.engine.packing,
    )
    if dpo:
        training_set.references = reference_log_probabilities(
            scratch.folder / "references.json",
            start.model,
            training_set.samples,
            lambda pairs: batched([training_set.row([pair]) for pair in pairs]),
            job.engine,
        )
    first_step = latest[0] if latest else 0
    with StopCallback() as stop, tracked(job.logs, first_step=first_step, rank=job.engine.rank) as trackers:
        trainer = StageTrainer(
            job.recipe,
            job.stage,
            scratch,
            model=start.model,
            args=arguments,
            train_dataset=training_set,
            data_collator=batched,
            # What belongs into a checkpoint is written before the checkpoint is marked as complete.
            callbacks=[
                progress,
                stop,
                pace,
                *([load] if load else []),
                ScratchCallback(scratch, checkpoints.keep, checkpoints.every_s),
                *trackers,
            ],
            pace=pace,
            expert_load=load,
        )
        try:
            trainer.train(resume_from_checkpoint=str(latest[1]) if latest else None)
        finally:
            progress.close()
    if stop.received is not None and trainer.state.global_step < plan.steps:
        if stop.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise TrainingError(
            f"stopped by a signal ({signal.Signals(stop.received).name}) after step {trainer.state.global_step} "
            f"of {plan.steps}; it is saved",
            where=str(scratch.folder),
            hint="run the same command again to go on from there",
        )
    curve = [
        {"step": entry["step"], "loss": entry["loss"], "lr": entry["learning_rate"]}
        | {name: entry[name] for name in ("expert_balance", *_REWARDS) if name in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return trainer, curve


def _expert_metrics(results: dict[str, _Trained]) -> dict[str, float]:
    found = [result.experts["expert_balance"] for result in results.values() if result.experts]
    return {"expert_balance": sum(found) / len(found)} if found else {}


def _sum_counts(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    """Sums over targets; parameters are those of one model."""
    total = dict(counts[0])
    for more in counts[1:]:
        for key in ("samples", "quarantined", "other_language", "leaked", "steps", "truncated"):
            total[key] += more[key]
    return total


@click.command()
@click.option("--workspace", required=True)
@click.option("--recipe", required=True)
@click.option("--stage", required=True, type=int)
@click.option("--set", "overrides", multiple=True)
@click.option("--fresh", is_flag=True)
@click.option("--local_rank", type=int, hidden=True)
def main(
    workspace: str, recipe: str, stage: int, overrides: tuple[str, ...], fresh: bool, local_rank: int | None
) -> None:
    """One process of a training job; ``medvlm train`` starts it."""
    # A launcher of this or another kind says the rank in the environment; the option is only accepted.
    del local_rank
    _forget_current_folder()
    try:
        run_stage(Workspace(Path(workspace)), load_recipe(recipe, overrides), stage, fresh=fresh)
    except MedVLMError as error:
        click.echo(f"error: {error}", err=True)
        # Not sys.exit: other processes may wait in a collective, and an orderly end would wait for them.
        os._exit(1)
    _leave()


def _forget_current_folder() -> None:
    """Look for libraries where they are installed alone: a workspace's own ``datasets`` is none of them."""
    if not sys.flags.safe_path and sys.path[0] == str(Path.cwd()):  # where `python -m` puts it
        del sys.path[0]


def _leave() -> None:
    """End once every process of the job has written what it owes.

    Past the interpreter's own end: a thread of a library that still runs there aborts the process
    ("terminate called without an active exception"), and the launcher calls a finished job a failed one.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    # The last words to Pipes, the last points of a tracker.
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
