"""The `muster` command: parse, call, print. No logic, and nothing heavy is imported before a verb needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli import cluster
from launcher.cli.common import (
    Force,
    Inline,
    JobFile,
    Json,
    NoPreflight,
    On,
    Overrides,
    RunName,
    TrustRemoteCode,
    console,
    show,
    verb,
)  # fmt: skip
from launcher.cli.common import app as app
from training.errors import InputError


@verb
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="Seed of the sample data and the model.")] = 17,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
) -> None:
    """Make a working folder: sample data, a tiny model, a job file for every recipe."""
    from launcher import scaffold

    for line in scaffold.write(folder, seed=seed, force=force):
        print(line)


@verb
def check(job: JobFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Validate the job file and every row of its data. Starts nothing."""
    from launcher.driver import check as checks

    show(checks.check(job, overrides or []), checks.lines, as_json)


@verb
def plan(
    job: JobFile,
    overrides: Overrides = None,
    on: Annotated[
        str | None, typer.Option("--on", metavar="CLUSTER", help="Cluster file, or name of a cluster that is up.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="Kind of GPU, such as H100. Default: this machine.")] = None,
    gpus: Annotated[str | None, typer.Option(metavar="8,16,64", help="Numbers of GPUs to compare.")] = None,
    per_machine: Annotated[int | None, typer.Option(min=1, help="GPUs of one machine, with --gpu. Default: 8.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of one machine, an hour.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of the data, where it is not here.")] = None,
    tokens: Annotated[float | None, typer.Option(min=1, help="Tokens of a sample, on average.")] = None,
    response_tokens: Annotated[
        float | None, typer.Option(min=1, help="Tokens of a response of PPO, on average.")
    ] = None,
    parameters: Annotated[
        float | None, typer.Option(metavar="7e9", help="Size of the model, where nothing else is known of it.")
    ] = None,
    as_json: Json = False,
) -> int:
    """What a job needs of memory, time and money. Reads config.json at most; starts nothing. Exit status 1 if it cannot fit."""
    from launcher.cli import plan_request
    from launcher.plan import text

    asked = plan_request.asked(gpus, rows, tokens, response_tokens, parameters)
    report = plan_request.plan(job, overrides or [], asked, on=on, gpu=gpu, per_machine=per_machine, price=price)
    show(report, text.lines, as_json)
    return int(not report["fits"])


@verb
def run(
    job: JobFile,
    overrides: Overrides = None,
    inline: Inline = False,
    only: Annotated[str | None, typer.Option(metavar="PHASE", help="Run this phase alone.")] = None,
    on: On = None,
    force: Force = False,
    no_preflight: NoPreflight = False,
) -> int:
    """Run a job here (or on the Ray cluster at RAY_ADDRESS), or submit it and follow. An interrupted run of the same job goes on."""
    if on is not None:
        if inline or only is not None:
            raise InputError.of("command line", "--on goes with neither --inline nor --only")
        return cluster.run_on(job, overrides or [], on, cluster.words_for(no_preflight), force=force)
    from launcher.driver import check, driver

    checked = check.load(job, overrides or [], inline=inline, force=force)
    return driver.run_job(checked, inline=inline, console=console(), only=only, preflight=not no_preflight)


@verb
def resume(
    run: RunName,
    overrides: Overrides = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="Step of the checkpoint to go back to. Default: the newest whole one.")
    ] = None,
    phase: Annotated[
        str | None, typer.Option(help="Phase of --step. Default: the last one that has a checkpoint.")
    ] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on though the job or its data are not what they were.")
    ] = False,
    inline: Inline = False,
    on: On = None,
    force: Force = False,
    no_preflight: NoPreflight = False,
) -> int:
    """Go on with a run from its last checkpoint, or from an earlier one. With --on: with a job of a cluster, by its id."""
    if phase is not None and step is None:
        raise InputError.of("--phase", "goes with --step, the checkpoint of the phase to go back to")
    if on is not None:
        if inline:
            raise InputError.of("command line", "--on does not go with --inline")
        going_back = ["--step", str(step)] if step is not None else []
        going_back += ["--phase", phase] if phase is not None else []
        going_back += cluster.words_for(no_preflight)
        cluster.resume_on(
            run, overrides or [], on, [*going_back, *(["--accept-changes"] if accept_changes else [])], force=force
        )
        return 0
    from launcher.driver import check, driver, open_run
    from launcher.runfolder import run_folder

    found = run_folder.find(run)
    job = found.job_here(overrides or [])
    check.machine(job, inline=inline, force=force)
    rewind = open_run.rewinding(found, step, phase) if step is not None else {}
    go_on = open_run.GoOn(rewind=rewind, accept_changes=accept_changes)
    return driver.run_job(job, inline=inline, console=console(), go_on=go_on, preflight=not no_preflight)


@verb
def save(run: RunName, on: On = None, as_json: Json = False) -> None:
    """Have a run save a checkpoint now and go on, and wait until it has. With --on: a job of a cluster, by its id."""
    if on is not None:
        return cluster.save_on(run, on, as_json)
    from launcher.runfolder import run_folder, save_request

    show(save_request.request(run_folder.find(run)), save_request.lines, as_json)


@verb
def chaos(
    run: RunName,
    kill: Annotated[str, typer.Option(help="rank, node or driver.")] = "rank",
    every: Annotated[
        float,
        typer.Option(
            min=1, help="Seconds between two kills, or more: first the run passes the step of its last failure."
        ),
    ] = 60.0,
    times: Annotated[int | None, typer.Option(min=1, help="How many. Default: until the run ends.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice.")] = 0,
) -> None:
    """A drill: kill a random worker, machine or the driver of a running job, again and again."""
    from launcher.driver import chaos as drills
    from launcher.runfolder import run_folder

    if kill not in ("rank", "node", "driver"):
        raise InputError.of("--kill", f"{kill} is none of rank, node, driver")
    killed = drills.drill(run_folder.find(run), kill, every_s=every, times=times, seed=seed, say=print)  # type: ignore[arg-type]
    print(f"{killed} killed")


Storage = Annotated[str, typer.Option(help="Folder of the runs, or address in a bucket.")]


@verb
def list_(storage: Storage = "runs", on: On = None, as_json: Json = False) -> None:
    """The runs in a storage folder, or the jobs of a cluster."""
    if on is not None:
        return cluster.list_on(on, as_json)
    from launcher.report import status as tables

    show(tables.listing(storage), tables.listing_lines, as_json)


@verb
def status(run: RunName, on: On = None, as_json: Json = False) -> None:
    """Where a run stands, or a job of a cluster."""
    if on is not None:
        return cluster.status_on(run, on, as_json)
    from launcher.report import status as tables
    from launcher.runfolder import run_folder

    show(tables.status(run_folder.find(run)), tables.status_lines, as_json)


@verb
def compare(
    first: Annotated[str, typer.Argument(metavar="RUN", help="Run, or RUN/PHASE.", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="RUN", help="Another.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Two runs side by side: evaluations with a paired test, settings that differ, time and cost."""
    from launcher.report import compare as comparing

    show(comparing.compare(first, second), comparing.lines, as_json)


@verb
def checkpoints(
    run: RunName,
    as_json: Json = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte, not file sizes alone.")] = False,
) -> int:
    """The checkpoints of a run. Exit status 1 if one is damaged."""
    from launcher.report import status as tables
    from launcher.runfolder import run_folder

    found = tables.checkpoints(run_folder.find(run), deep=verify)
    show(found, tables.checkpoint_lines, as_json)
    return int(not all(entry["whole"] for entry in found))


@verb
def export(
    run: RunName,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder to write. Default: model-STEP in the phase's folder.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint. Default: the newest whole one.")] = None,
    phase: Annotated[str | None, typer.Option(help="Phase. Default: the last one that has a checkpoint.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="LoRA: the whole model with the adapter added, not the adapter.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a plain Hugging Face folder, or, trained with LoRA, as a PEFT adapter."""
    from launcher.inference import export as exports
    from launcher.runfolder import run_folder

    done = exports.export(
        run_folder.find(run), phase=phase, step=step, out=out, merge=merge, trust_remote_code=trust_remote_code
    )
    show(done, exports.lines, as_json)


@verb
def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Run, RUN/PHASE, model folder, adapter or checkpoint.", show_default=False
        ),
    ],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option(help="JSONL file with a `prompt` or `messages` in each row.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of the file to take.", min=1)] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSONL file to write responses to as they come. Goes on where it stopped.")
    ] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Checkpoint of a run. Default: its model.")] = None,
    phase: Annotated[str | None, typer.Option(help="Phase of the run. Default: the last that has one.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a response.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Draw from the likeliest tokens that together have it.")
    ] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain", help="A prompt is a user's turn, or stands as it is. Default: as the model has learnt."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Responses that one worker writes at a time.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the prompts out.")] = 1,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Try a model: a chat in the terminal, lines from a pipe, prompts, or a file of them."""
    from launcher.inference import generate as generation

    plan = generation.Plan(
        model=model, phase=phase, step=step, prompts=prompt or [], file=file, limit=limit, out=out, chat=chat,
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, samples=samples, seed=seed, batch=batch,
        workers=workers, trust_remote_code=trust_remote_code, as_json=as_json,
    )  # fmt: skip
    show(generation.generate(plan), generation.lines, as_json)


@verb
def eval_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Run, or model folder.", show_default=False)],
    data: Annotated[Path, typer.Option(help="File of rows with a question and its answer.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Rows to take.")] = None,
    question: Annotated[str | None, typer.Option(help="Column of the question.")] = None,
    answer: Annotated[str | None, typer.Option(help="Column of the answer.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a response.")] = 512,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each question; more than 1 gives pass@k.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Draw from the likeliest tokens that together have this probability.")
    ] = 1.0,
    template: Annotated[str, typer.Option(help="auto (as the model has learnt), plain or chat.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Responses that one worker writes at a time.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the questions out.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="Another model: the win rate over it.")] = None,
    reward: Annotated[str | None, typer.Option(metavar="MODEL", help="The reward model that judges --against.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSONL file to write every response to.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Ask a model questions and compare its answers with the right ones, or two models before a reward model."""
    from launcher.inference import evaluate
    from training.config import Questions

    if (against is None) != (reward is None):
        raise InputError.of("command line", "--against and --reward go together")
    if samples > 1 and temperature == 0:
        raise InputError.of("--temperature", "several samples at temperature 0 are the same; choose one, such as 0.7")
    columns = {name: column for name, column in (("question", question), ("answer", answer)) if column}
    settings = Questions(
        data=str(data), columns=columns, limit=limit, max_new_tokens=max_new_tokens, samples=samples,
        temperature=temperature, top_p=top_p, batch=batch,
    )  # fmt: skip
    how: dict[str, Any] = {
        "template": template,
        "workers": workers,
        "seed": seed,
        "out": out,
        "trust_remote_code": trust_remote_code,
    }
    if against is not None and reward is not None:
        report = evaluate.compare(model, against, reward, data, settings, **how)
    else:
        report = evaluate.evaluate(model, data, settings, **how)
    show(report, evaluate.lines, as_json)


@verb
def report(
    names: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs, or RUN/PHASE for one phase alone.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file to write. Default: report.html.")] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML page: what runs were, their curves over each other, what happened when, samples. Opens from disk."""
    from launcher.report import html, report

    if as_json and out is not None:
        raise InputError.of("--json", "is printed, and no page is written; leave out --json or --out")
    found = report.report(names)
    if as_json:
        show(found, lambda _: (), as_json=True)
    else:
        print(html.write(found, out or Path("report.html")))


@verb
def critique(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="JSONL file to write.", show_default=False)],
    data: Annotated[Path, typer.Option(help="File of rows with a question.")],
    teacher: Annotated[str, typer.Option(metavar="URL|MODEL", help="OpenAI-compatible endpoint (.../v1), or a model.")],
    teacher_model: Annotated[str | None, typer.Option(help="Name of the model at the endpoint.")] = None,
    key_env: Annotated[str | None, typer.Option(metavar="NAME", help="Environment variable with the key.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="Column of the data with answers; may be repeated.")] = None,
    known: Annotated[str | None, typer.Option(help="Column of the right answer, beside --column.")] = None,
    sample: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Model that is asked for answers; may be repeated.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers of each model to a question.")] = 4,
    temperature: Annotated[float, typer.Option(min=0, help="Of these answers.")] = 1.0,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time.")] = 8,
    per_minute: Annotated[float | None, typer.Option(min=0.1, help="Requests a minute at most.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens that the teacher may take in all.")] = None,
    max_cost: Annotated[float | None, typer.Option(min=0, help="What it may cost, with the two prices.")] = None,
    price_in: Annotated[float, typer.Option(min=0, help="Of a million tokens that it reads.")] = 0.0,
    price_out: Annotated[float, typer.Option(min=0, help="Of a million tokens that it writes.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, and of a critique.")] = 3200,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request.")] = 300.0,
    patience: Annotated[float, typer.Option(min=0, help="Seconds for all tries of one request.")] = 600.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows to take.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that run models.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Build data for critique fine-tuning: answers, critiques of a teacher, verdicts checked. Goes on where it stopped."""
    from launcher.inference import critique as critiques
    from launcher.inference.model_lookup import warn
    from launcher.inference.teacher import Budget, Endpoint

    if max_cost is not None and not (price_in or price_out):
        raise InputError.of("--max-cost", "needs --price-in and --price-out, of a million tokens")
    who: Endpoint | str = teacher
    if "://" in teacher and not teacher.startswith(("http://", "https://", "s3://", "gs://")):
        raise InputError.of("--teacher", f"{teacher} is neither http(s)://... nor a model")
    if teacher.startswith(("http://", "https://")):
        if teacher_model is None:
            raise InputError.of("--teacher-model", "say which model at the endpoint is the teacher")
        who = Endpoint(
            url=teacher, model=teacher_model, key_env=key_env, max_new_tokens=max_new_tokens, timeout_s=timeout,
            patience_s=patience,
        )  # fmt: skip
    plan = critiques.Plan(
        out=out, data=data, columns=column or [], known=known, models=sample or [], samples=samples, temperature=temperature,
        limit=limit, teacher=who, budget=Budget(tokens=max_tokens, cost=max_cost, price_in=price_in, price_out=price_out),
        parallel=parallel, per_minute=per_minute, max_new_tokens=max_new_tokens, workers=workers, seed=seed,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    show(critiques.build(plan, warn), critiques.lines, as_json)


def main() -> None:
    """Entry point of installations that were made before there was launcher/__main__.py."""
    from launcher import __main__

    __main__.main()


if __name__ == "__main__":
    main()
