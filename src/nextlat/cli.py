"""The ``nextlat`` command. Heavy imports live inside the commands, so that help is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from nextlat.data.cli import data_app
from nextlat.errors import NextLatError

app = typer.Typer(
    name="nextlat",
    help="Next-Latent Prediction: train transformers that predict their own next state, and measure what they learned.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app)

ConfigArgument = Annotated[
    Optional[str],  # noqa: UP045 - typer reads it at run time
    typer.Argument(help="A packaged configuration such as path_star/mini, or a path to a YAML file."),
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(help="key=value pairs, for example objective=gpt seed=3 training.steps=500 objective.horizon=4"),
]
RunsDir = Annotated[Path, typer.Option(help="Folder that holds the run directories.")]
DraftTokens = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Draft only so many of the most frequent tokens of the training data. Same law."),
]
DraftInt8 = Annotated[bool, typer.Option("--draft-int8", help="Draft with large weights in 8 bits. Same law.")]
Device = Annotated[Optional[str], typer.Option(help="cpu or cuda; default as configured.")]  # noqa: UP045


@app.command()
def train(
    config: ConfigArgument = None,
    overrides: Overrides = None,
    runs_dir: RunsDir = Path("runs"),
    resume: Annotated[Optional[Path], typer.Option(help="Go on with this run directory.")] = None,  # noqa: UP045
    stop_after: Annotated[
        Optional[int], typer.Option(min=1, help="Save and leave after N steps in total, as a signal would make it.")  # noqa: UP045
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print configuration, sizes and cost; train nothing.")
    ] = False,
) -> None:
    """Train one model. SIGINT and SIGTERM save before leaving; --resume RUN goes on bit by bit."""
    from nextlat.commands import train_command

    raise SystemExit(train_command(config, overrides or [], runs_dir, resume, stop_after, dry_run))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    names: Annotated[Optional[list[str]], typer.Argument(help="Measurements; default the task's own.")] = None,  # noqa: UP045
    dynamics: Annotated[
        str, typer.Option(help="own, or posthoc: the network that fit-dynamics fitted to the frozen model.")
    ] = "own",
    split: Annotated[Optional[str], typer.Option(help="Another split than configured, e.g. train.")] = None,  # noqa: UP045
    checkpoint: Annotated[str, typer.Option(help="newest or best.")] = "newest",
    device: Device = None,
    tasks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="For harness: lm-eval tasks with commas between them, nextlat_paper, YAML files, folders."),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="For harness: examples a task, for a trial.")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(min=1, help="For harness: rows a forward pass.")] = 16,
    domains: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="For speculative, with commas: held_out, prose, code, documentation, arithmetic, mixed, or from the "
            "hub wikipedia, books, hub_code, mathematics, or files of text. Default: all that need no connection."
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="For speculative: prompts of a domain.")] = 8,
    prompt_tokens: Annotated[Optional[int], typer.Option(min=1, help="For speculative; default half a row.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[Optional[int], typer.Option(min=1, help="For speculative; default half a row.")] = None,  # noqa: UP045
    temperature: Annotated[float, typer.Option(min=0, help="For speculative: 0 is greedy.")] = 0.0,
    draft_tokens: DraftTokens = None,
    draft_int8: DraftInt8 = False,
) -> None:
    """Measure a trained run on held-out data; writes RUN/evaluations/NAME.json.

    harness runs lm-eval tasks; speculative measures drafts by kind of text against cached decoding.
    """
    names = names or []
    others = [name for name in names if name not in ("harness", "speculative")]
    for option, given, name in (
        ("--tasks", tasks is not None, "harness"),
        ("--limit", limit is not None, "harness"),
        ("--domains", domains is not None, "speculative"),
        ("--draft-tokens", draft_tokens is not None, "speculative"),
        ("--draft-int8", draft_int8, "speculative"),
    ):
        if given and name not in names:
            raise NextLatError(f"{option} belongs to {name}: nextlat evaluate RUN {name} {option} ...")
    for option, given in (("--split", split is not None), ("--dynamics", dynamics != "own")):
        if given and names and not others:
            raise NextLatError(f"{option} says nothing to {' and '.join(names)}; leave it out")
    if others or not names:
        from nextlat.commands import evaluate_command

        evaluate_command(run, others, dynamics, split, checkpoint, device)
    if "speculative" in names:
        from nextlat.decoding.command import CheapDrafts, Survey, speculative_command

        cheap = CheapDrafts(draft_tokens, draft_int8)
        survey = Survey(domains, prompts, prompt_tokens, max_new_tokens, temperature, cheap)
        speculative_command(run, survey, checkpoint, device)
    if "harness" in names:
        from nextlat.hf.command import harness_command

        harness_command(run, tasks, limit, batch_size, checkpoint, device)


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    prompt: Annotated[Optional[str], typer.Option(help="Text to continue, if the task has a tokenizer.")] = None,  # noqa: UP045
    tokens: Annotated[Optional[str], typer.Option(help="Token ids to continue, such as 1,2,3.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[Optional[int], typer.Option(min=1, help="Default 32, or as many as fit.")] = None,  # noqa: UP045
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[Optional[int], typer.Option(help="Draw from the k most likely tokens.")] = None,  # noqa: UP045
    top_p: Annotated[Optional[float], typer.Option(help="Draw from the fewest tokens of joint probability p.")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(min=0, help="Of the draws, above temperature 0.")] = 0,
    speculative: Annotated[
        str,
        typer.Option(help="Draft and verify: a number of tokens, tree, or auto, which times this machine. Same law."),
    ] = "off",
    draft_tokens: DraftTokens = None,
    draft_int8: DraftInt8 = False,
    checkpoint: Annotated[str, typer.Option(help="newest or best.")] = "newest",
    device: Device = None,
) -> None:
    """Continue a prompt with a trained run; prints what is new."""
    from nextlat.decoding.command import CheapDrafts, Request, generate_command

    cheap = CheapDrafts(draft_tokens, draft_int8)
    request = Request(prompt, tokens, max_new_tokens, temperature, top_k, top_p, seed, speculative, cheap)
    generate_command(run, request, checkpoint, device)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory of gpt, mtp or nextlat.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    checkpoint: Annotated[str, typer.Option(help="newest or best.")] = "newest",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Write a run as a stock Llama folder, checked through transformers, with tokenizer and model card."""
    from nextlat.hf.command import export_command

    export_command(run, folder, checkpoint, dtype)


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that export wrote.")],
    runs_dir: RunsDir = Path("runs"),
    name: Annotated[Optional[str], typer.Option(help="Name of the new run; default as exported.")] = None,  # noqa: UP045
) -> None:
    """Bring an exported folder back as a run directory that can be measured."""
    from nextlat.hf.command import import_command

    import_command(folder, runs_dir, name)


@app.command("fit-dynamics")
def fit_dynamics(
    run: Annotated[Path, typer.Argument(help="A run directory of any objective.")],
    steps: Annotated[Optional[int], typer.Option(min=1, help="Default: 40 % of the training steps.")] = None,  # noqa: UP045
    hidden_dim: Annotated[Optional[int], typer.Option(min=1, help="Default: as configured for nextlat.")] = None,  # noqa: UP045
    horizon: Annotated[Optional[int], typer.Option(min=1, help="Default: as configured for nextlat.")] = None,  # noqa: UP045
    kl_weight: Annotated[float, typer.Option(min=0, help="Add the KL term; the control uses SmoothL1 alone.")] = 0.0,
    device: Device = None,
) -> None:
    """Fit a latent dynamics network to a frozen model: the control for everything that rolls one."""
    from nextlat.commands import fit_dynamics_command

    fit_dynamics_command(run, steps, hidden_dim, horizon, kl_weight, device)


@app.command("fit-acceptance")
def fit_acceptance(
    run: Annotated[Path, typer.Argument(help="A run directory of nextlat, mtp or jtp.")],
    temperature: Annotated[float, typer.Option(min=0, help="Of the text that is drafted; 0 is greedy.")] = 0.0,
    prompts: Annotated[int, typer.Option(min=3, help="Texts to continue; a fifth of them is only measured on.")] = 4096,
    domains: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Kinds of text beside the training data that drafts will be of: prose, code, documentation, "
            "arithmetic, or files and folders of text; of every four documents one is kept for measuring."
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Of the drafts, at most what the drafter makes.")] = 16,
    steps: Annotated[
        Optional[int], typer.Option(min=1, help="Of the fit; by default they grow with the number of drafts.")  # noqa: UP045
    ] = None,
    device: Device = None,
) -> None:
    """Fit a small network that foresees which drafted tokens are kept; writes RUN/posthoc/acceptance.safetensors."""
    from nextlat.commands import fit_acceptance_command

    fit_acceptance_command(run, temperature, prompts, domains, length, steps, device)


@app.command()
def sweep(
    config: Annotated[str, typer.Argument(help="A packaged configuration or a YAML file; its sweep: section is used.")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(help="Grids: objective=gpt,nextlat seed=0..9 objective.horizon=1,2")  # noqa: UP045
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    results: Annotated[
        Optional[Path], typer.Option(help="CSV that finished runs are appended to; default results/<config>.csv.")  # noqa: UP045
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 1,
    devices: Annotated[str, typer.Option(help="CUDA devices to deal out to the processes, e.g. 0,1,2,3.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run.")] = False,
) -> None:
    """Train a grid of runs; finished ones are skipped and interrupted ones resumed."""
    from nextlat.commands import sweep_command

    raise SystemExit(sweep_command(config, overrides or [], runs_dir, results, jobs, devices, dry_run))


@app.command()
def report(
    sources: Annotated[list[Path], typer.Argument(help="Run directories, or a results CSV of a sweep.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("report"),
) -> None:
    """Write tables, figures and one self-contained report.html."""
    from nextlat.commands import report_command

    report_command(sources, out)


@app.command()
def demo(
    runs_dir: RunsDir = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seven solves the task on both processors that were tried.")] = 7,
) -> None:
    """Train gpt and nextlat side by side on path_star/mini and show which one can plan."""
    from nextlat.commands import demo_command

    raise SystemExit(demo_command(runs_dir, seed))


@app.command()
def configs(
    name: Annotated[Optional[str], typer.Argument(help="Print this configuration whole.")] = None,  # noqa: UP045
    commands: Annotated[
        bool, typer.Option("--commands", help="Print one ready command for each objective and configuration.")
    ] = False,
) -> None:
    """List the configurations that ship with the library."""
    from nextlat.commands import configs_command

    configs_command(name, commands)


@app.command()
def conformance(
    function: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="MODULE:FUNCTION, from this directory or an installed package; default nextlat's own."),
    ] = None,
    kind: Annotated[str, typer.Option(help="Contract: losses, dynamics or multi-token.")] = "losses",
    only: Annotated[Optional[list[str]], typer.Option(help="Run this claim; may be repeated.")] = None,  # noqa: UP045
    list_claims: Annotated[bool, typer.Option("--list", help="Print the claims, one sentence each; run none.")] = False,
) -> None:
    """Hold your own implementation of the NextLat loss to the method, claim by claim; exit code 0 if all hold."""
    from nextlat.commands import conformance_command

    raise SystemExit(conformance_command(function, kind, only or [], list_claims))


@app.command()
def bench(
    suites: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="loss, attention, train, decode; default all. decode RUN... measures runs."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repetitions: minutes.")] = False,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Also write the figures to this file.")] = None,  # noqa: UP045
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; with 1, processor time is compared.")] = 1,
    tiny: Annotated[bool, typer.Option("--tiny", hidden=True)] = False,
) -> None:
    """Measure speed and memory as ratios of interleaved arms, beside their targets."""
    from nextlat.commands import bench_command

    bench_command(suites or [], "tiny" if tiny else "quick" if quick else "full", json_file, threads)


def main() -> None:
    """Run the command; errors a user can act on are printed without a traceback."""
    try:
        app()
    except NextLatError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
