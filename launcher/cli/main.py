"""The `muster` command: parse, call, print. No logic, and nothing heavy is imported before a verb needs it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

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
    show_metrics,
    verb,
)  # fmt: skip
from launcher.cli.common import app as app
from launcher.process.exit_status import ExitStatus
from training.errors import InputError


@verb("muster init work", "muster init work --seed 5")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to create.")],
    seed: Annotated[int, typer.Option(help="Random seed of the sample data and the model.")] = 17,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
) -> None:
    """Create a folder with sample data, a tiny model and job files."""
    from launcher import scaffold

    for line in scaffold.write(folder, seed=seed, force=force):
        print(line)


@verb("muster check sft.yaml", "muster check sft.yaml phases.sft.data.train=other.jsonl")
def check(job: JobFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Validate a job file and every row of its data.

    Nothing is started.
    """
    from launcher.driver import check as checks

    show(checks.check(job, overrides or []), checks.lines, as_json)


@verb(
    "muster plan sft.yaml",
    "muster plan sft.yaml --gpu H100 --gpus 8,16,64",
    "muster plan sft.yaml --on lab",
)
def plan(
    job: JobFile,
    overrides: Overrides = None,
    on: Annotated[
        str | None, typer.Option("--on", metavar="CLUSTER", help="A cluster file, or the name of a cluster that is up.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="The kind of GPU, such as H100. Default: this machine.")] = None,
    gpus: Annotated[str | None, typer.Option(metavar="8,16,64", help="Numbers of GPUs to compare.")] = None,
    per_machine: Annotated[int | None, typer.Option(min=1, help="GPUs per machine, with --gpu. Default: 8.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of one machine per hour.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Number of rows, if the data is not on this machine.")] = None,
    tokens: Annotated[float | None, typer.Option(min=1, help="Average number of tokens per sample.")] = None,
    response_tokens: Annotated[
        float | None, typer.Option(min=1, help="Average number of tokens per PPO response.")
    ] = None,
    parameters: Annotated[
        float | None,
        typer.Option(metavar="7e9", help="Number of parameters, if the model is not on this machine."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Estimate the memory, time and cost of a job.

    Nothing is started, and of the model only config.json is read. Exit status 1 means that the job does not fit into
    memory.
    """
    from launcher.cli import plan_request
    from launcher.plan import text

    asked = plan_request.asked(gpus, rows, tokens, response_tokens, parameters)
    report = plan_request.plan(job, overrides or [], asked, on=on, gpu=gpu, per_machine=per_machine, price=price)
    show(report, text.lines, as_json)
    return ExitStatus.DONE if report["fits"] else ExitStatus.FAILED


@verb(
    "muster run sft.yaml",
    "muster run sft.yaml phases.sft.learning_rate=1e-5 resources.workers=4",
    "muster run sft.yaml --on lab",
)
def run(
    job: JobFile,
    overrides: Overrides = None,
    inline: Inline = False,
    only: Annotated[
        str | None, typer.Option(metavar="PHASE", help="Run only this phase; `muster resume` runs the others.")
    ] = None,
    on: On = None,
    force: Force = False,
    no_preflight: NoPreflight = False,
) -> int:
    """Run a job, or resume its interrupted run.

    The job runs on this machine, or on the Ray cluster at RAY_ADDRESS. With --on it is submitted to that cluster and
    its output is followed.
    """
    if on is not None:
        if inline or only is not None:
            raise InputError.of("command line", "--on goes with neither --inline nor --only")
        return cluster.run_on(job, overrides or [], on, cluster.words_for(no_preflight), force=force)
    from launcher.driver import check, driver

    checked = check.load(job, overrides or [], inline=inline, force=force)
    return driver.run_job(checked, inline=inline, console=console(), only=only, preflight=not no_preflight)


@verb(
    "muster resume word-problems",
    "muster resume word-problems --step 400",
    "muster resume s3://my-bucket/runs/word-problems max_hours=12",
)
def resume(
    run: RunName,
    overrides: Overrides = None,
    step: Annotated[
        int | None,
        typer.Option(min=1, help="Go back to the checkpoint of this step. Default: the newest complete checkpoint."),
    ] = None,
    phase: Annotated[
        str | None, typer.Option(help="The phase of --step. Default: the last one that has a checkpoint.")
    ] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Resume although the job or its data have changed.")
    ] = False,
    inline: Inline = False,
    on: On = None,
    force: Force = False,
    no_preflight: NoPreflight = False,
) -> int:
    """Resume a run from its newest or an earlier checkpoint.

    Finished phases are not repeated; all others are run. With --on, RUN is the id of a job on that cluster.
    """
    if phase is not None and step is None:
        raise InputError.of("--phase", "goes with --step, the checkpoint of the phase to go back to")
    if on is not None:
        if inline:
            raise InputError.of("command line", "--on does not go with --inline")
        words = cluster.words_for(no_preflight, step, phase, accept_changes)
        cluster.resume_on(run, overrides or [], on, words, force=force)
        return ExitStatus.DONE
    from launcher.driver import check, driver, open_run
    from launcher.runfolder import run_folder

    found = run_folder.find(run)
    job = found.job_here(overrides or [])
    check.machine(job, inline=inline, force=force)
    rewind = open_run.rewinding(found, step, phase) if step is not None else {}
    resume_options = open_run.ResumeOptions(rewind=rewind, accept_changes=accept_changes)
    return driver.run_job(
        job, inline=inline, console=console(), resume_options=resume_options, preflight=not no_preflight
    )


@verb("muster save word-problems", "muster save word-problems-1 --on lab")
def save(run: RunName, on: On = None, as_json: Json = False) -> None:
    """Save a checkpoint of a run now, and continue the run.

    The command waits until the checkpoint is complete. With --on, RUN is the id of a job on that cluster.
    """
    if on is not None:
        return cluster.save_on(run, on, as_json)
    from launcher.runfolder import run_folder, save_request

    show(save_request.request(run_folder.find(run)), save_request.lines, as_json)


@verb("muster chaos word-problems --kill rank --every 60")
def chaos(
    run: RunName,
    kill: Annotated[
        Literal["rank", "node", "driver"],
        typer.Option(help="What to kill: rank (a worker), node (a machine) or driver (the run's own process)."),
    ] = "rank",
    every: Annotated[
        float,
        typer.Option(
            min=1, help="Seconds between two kills. The run always first passes the step at which it last failed."
        ),
    ] = 60.0,
    times: Annotated[
        int | None, typer.Option(min=1, help="How many times to kill. Default: until the run ends.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the choice of victims.")] = 0,
) -> None:
    """Inject faults: kill random workers, machines or the driver."""
    from launcher.driver import chaos as drills
    from launcher.runfolder import run_folder

    killed = drills.drill(run_folder.find(run), kill, every_s=every, times=times, seed=seed, say=print)
    print(f"{killed} killed")


Storage = Annotated[str, typer.Option(help="The folder of the runs, or its address in a bucket.")]


@verb("muster list", "muster list --storage s3://my-bucket/runs", "muster list --on lab")
def list_(storage: Storage = "runs", on: On = None, as_json: Json = False) -> None:
    """List the runs in a folder, or the jobs of a cluster."""
    if on is not None:
        return cluster.list_on(on, as_json)
    from launcher.report import status as tables

    show(tables.listing(storage), tables.listing_lines, as_json)


@verb("muster status word-problems", "muster status word-problems --json", "muster status word-problems-1 --on lab")
def status(run: RunName, on: On = None, as_json: Json = False) -> None:
    """Show the progress and the problems of a run.

    With --on, RUN is the id of a job on that cluster.
    """
    if on is not None:
        return cluster.status_on(run, on, as_json)
    from launcher.report import status as tables
    from launcher.runfolder import run_folder

    show_metrics(tables.status(run_folder.find(run)), tables.status_lines, as_json)


@verb("muster compare word-sft word-cft", "muster compare runs/word-sft/sft runs/word-cft/cft")
def compare(
    first: Annotated[str, typer.Argument(metavar="RUN", help="A run, or RUN/PHASE.", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="RUN", help="Another run, or RUN/PHASE.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Compare two runs, with a statistical test of their results.

    Shows evaluations with a paired test, settings that differ, time and cost.
    """
    from launcher.report import compare as comparing

    show_metrics(comparing.compare(first, second), comparing.lines, as_json)


@verb("muster checkpoints word-problems", "muster checkpoints word-problems --verify")
def checkpoints(
    run: RunName,
    as_json: Json = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the checksum of every file, not only its size.")
    ] = False,
) -> int:
    """List the checkpoints of a run and check their files.

    Exit status 1 means that a checkpoint is damaged.
    """
    from launcher.report import status as tables
    from launcher.runfolder import run_folder

    found = tables.checkpoints(run_folder.find(run), deep=verify)
    show_metrics(found, tables.checkpoint_lines, as_json)
    return ExitStatus.DONE if all(entry["whole"] for entry in found) else ExitStatus.FAILED


@verb(
    "muster export word-problems",
    "muster export word-problems --step 200 --out exported",
    "muster export word-problems --merge",
)
def export(
    run: RunName,
    out: Annotated[
        str | None, typer.Option("--out", help="The folder to write. Default: model-STEP in the phase's folder.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="The step of the checkpoint. Default: the newest complete one.")
    ] = None,
    phase: Annotated[str | None, typer.Option(help="The phase. Default: the last one that has a checkpoint.")] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="With LoRA: write the whole model, with the adapter merged into its weights."),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a Hugging Face model folder.

    A model trained with LoRA becomes a PEFT adapter, or with --merge a whole model.
    """
    from launcher.inference import export as exports
    from launcher.runfolder import run_folder

    done = exports.export(
        run_folder.find(run), phase=phase, step=step, out=out, merge=merge, trust_remote_code=trust_remote_code
    )
    show(done, exports.lines, as_json)


@verb(
    "muster generate runs/word-problems",
    'muster generate runs/word-problems --step 200 -p "Tom has 3 pens."',
    "muster generate MODEL --file prompts.jsonl --out responses.jsonl --workers 8",
)
def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A run, RUN/PHASE, a model folder, an adapter or a checkpoint.", show_default=False
        ),
    ],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt. May be repeated.")] = None,
    file: Annotated[Path | None, typer.Option(help="A JSONL file with `prompt` or `messages` in each row.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first rows of the file.", min=1)] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A JSONL file to append each response to. A second call continues where the first stopped."),
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="Use this checkpoint of a run. Default: the run's final model.")
    ] = None,
    phase: Annotated[
        str | None, typer.Option(help="The phase of the run. Default: the last one that has a model or a checkpoint.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of one response.")] = 256,
    temperature: Annotated[float, typer.Option(help="Sampling temperature. 0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="Sample from the most likely tokens that together have this probability."),
    ] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Responses per prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the sampling.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain",
            help="Format a prompt as a user's turn of a conversation, or use it unchanged. "
            "Default: as the model was trained.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Responses that a worker generates at the same time.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes that share the prompts.")] = 1,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Generate text: a chat, single prompts, or a file of prompts.

    Without prompts it is a chat in a terminal; from a pipe every line is a prompt.
    """
    from launcher.inference import generate as generation

    plan = generation.Plan(
        model=model, phase=phase, step=step, prompts=prompt or [], file=file, limit=limit, out=out, chat=chat,
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, samples=samples, seed=seed, batch=batch,
        workers=workers, trust_remote_code=trust_remote_code, as_json=as_json,
    )  # fmt: skip
    show(generation.generate(plan), generation.lines, as_json)


@verb(
    "muster eval runs/word-problems --data data/eval.jsonl",
    "muster eval MODEL --data test.jsonl --samples 4 --temperature 0.7",
    "muster eval MODEL --data test.jsonl --against OTHER --reward runs/word-rewards",
)
def eval_(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A run, RUN/PHASE, a model folder or an adapter.", show_default=False),
    ],
    data: Annotated[Path, typer.Option(help="A file with a question and its answer in each row.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first rows of the file.")] = None,
    question: Annotated[str | None, typer.Option(help="The column of the question.")] = None,
    answer: Annotated[str | None, typer.Option(help="The column of the answer.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of one response.")] = 512,
    samples: Annotated[int, typer.Option(min=1, help="Responses per question. More than 1 also measures pass@k.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature. 0 is greedy.")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="Sample from the most likely tokens that together have this probability."),
    ] = 1.0,
    template: Annotated[
        Literal["auto", "plain", "chat"],
        typer.Option(help="How to format questions. auto: as the model was trained."),
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Responses that a worker generates at the same time.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes that share the questions.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the sampling.")] = 0,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another model: measure the win rate of MODEL over it.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The reward model that decides which response wins.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A JSONL file to write every response to.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure a model's accuracy, or its win rate over another one.

    Accuracy is measured on questions with known answers. The win rate over another model (--against) is decided by a
    reward model (--reward).
    """
    from launcher.inference import evaluate

    evaluate.refuse_odd_options(against, reward, samples, temperature)
    settings = evaluate.settings(
        data, question=question, answer=answer, limit=limit, max_new_tokens=max_new_tokens, samples=samples,
        temperature=temperature, top_p=top_p, batch=batch,
    )  # fmt: skip
    measure = partial(evaluate.evaluate, model)
    if against is not None and reward is not None:
        measure = partial(evaluate.compare, model, against, reward)
    report = measure(
        data, settings, template=template, workers=workers, seed=seed, out=out, trust_remote_code=trust_remote_code
    )
    show_metrics(report, evaluate.lines, as_json)


@verb("muster report word-problems", "muster report word-sft runs/word-cft/cft --out report.html")
def report(
    names: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Runs, or RUN/PHASE for a single phase.", show_default=False),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="The HTML file to write. Default: report.html.")] = None,
    as_json: Json = False,
) -> None:
    """Write an HTML page about one or more runs.

    It shows results, curves laid over each other, a timeline and samples. It is one file that needs no server and no
    network.
    """
    from launcher.report import html, report

    if as_json and out is not None:
        raise InputError.of("--json", "is printed, and no page is written; leave out --json or --out")
    found = report.report(names)
    if as_json:
        show(found, lambda _: (), as_json=True)
    else:
        print(html.write(found, out or Path("report.html")))


@verb(
    "muster critique cft.jsonl --data questions.jsonl --sample MODEL \\\n"
    "    --teacher https://example.org/v1 --teacher-model NAME --key-env KEY",
    "muster critique cft.jsonl --data solved.jsonl --column answer --teacher MODEL",
)
def critique(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The JSONL file to write.", show_default=False)],
    data: Annotated[Path, typer.Option(help="A file with a question in each row.")],
    teacher: Annotated[
        str, typer.Option(metavar="URL|MODEL", help="An OpenAI-compatible endpoint (.../v1), or a model.")
    ],
    teacher_model: Annotated[str | None, typer.Option(help="The name of the model at the endpoint.")] = None,
    key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable that holds the API key.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="A column of the data that holds answers. May be repeated.")
    ] = None,
    known: Annotated[str | None, typer.Option(help="The column of the correct answer, for use with --column.")] = None,
    sample: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="A model to sample answers from. May be repeated.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers per question and model.")] = 4,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature of these answers.")] = 1.0,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Concurrent requests to the endpoint.")] = 8,
    per_minute: Annotated[float | None, typer.Option(min=0.1, help="The most requests per minute.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens for all requests together.")] = None,
    max_cost: Annotated[
        float | None, typer.Option(min=0, help="The highest cost; needs --price-in and --price-out.")
    ] = None,
    price_in: Annotated[float, typer.Option(min=0, help="Price of a million input tokens.")] = 0.0,
    price_out: Annotated[float, typer.Option(min=0, help="Price of a million output tokens.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer or a critique.")] = 3200,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until one request is given up.")] = 300.0,
    patience: Annotated[float, typer.Option(min=0, help="Seconds for all tries of one request.")] = 600.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first rows of the data.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes that run models.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the sampling.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Build data for critique fine-tuning with a teacher model.

    Answers come from models (--sample) or from the data (--column); the teacher criticizes each, and its verdicts are
    checked against known answers. A second call continues where the first stopped and repeats no request.
    """
    from launcher.inference import critique as critiques
    from launcher.inference.model_lookup import warn

    budget = critiques.budget_from(max_tokens, max_cost, price_in, price_out)
    who = critiques.teacher_from(
        teacher, teacher_model, key_env, max_new_tokens, timeout_s=timeout, patience_s=patience
    )
    plan = critiques.Plan(
        out=out, data=data, columns=column or [], known=known, models=sample or [], samples=samples,
        temperature=temperature, limit=limit, teacher=who, budget=budget, parallel=parallel, per_minute=per_minute,
        max_new_tokens=max_new_tokens, workers=workers, seed=seed, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    show(critiques.build(plan, warn), critiques.lines, as_json)


def main() -> None:
    """Entry point of installations that were made before there was launcher/__main__.py."""
    from launcher import __main__

    __main__.main()


if __name__ == "__main__":
    main()
