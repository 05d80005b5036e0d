"""The command of a job: what tells ``galore pretrain`` from ``galore finetune``, to a user and to a comparison."""

import dataclasses
import json as json_format
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from galore_torch.training.run import processes
from galore_torch.training.run.checkpoints import step_of
from galore_torch.training.run.command import Json, loading, option, reported_errors
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.names import require_token, trackers
from galore_torch.training.run.records import Record
from galore_torch.training.run.signals import NOTHING_WRITTEN, Screen, exit_status, stoppable
from galore_torch.training.settings.config import PresetTable, sections_of
from galore_torch.training.settings.fields import given_settings, with_settings
from galore_torch.training.settings.methods import METHODS, help_text
from galore_torch.units import duration, readable

if TYPE_CHECKING:
    from galore_torch.training.run.job import Job, RunResult

_OF_ALL = """
Ctrl-C finishes the step, saves a checkpoint and says how to go on.
It runs on a GPU if there is one; CUDA_VISIBLE_DEVICES chooses which, and is empty for the CPU.
"""


@dataclass(frozen=True)
class Amount:
    """How much a run sees: equal for all runs of a comparison.

    >>> str(Amount(409_600, "tokens")), str(Amount(1, "epochs"))
    ('409,600 tokens', '1 epoch')
    """

    count: float
    unit: str

    def __str__(self) -> str:
        count = f"{self.count:,.0f}" if self.count == int(self.count) else f"{self.count:g}"
        return f"{count} {self.unit[:-1] if self.count == 1 else self.unit}"


@dataclass(frozen=True, kw_only=True)
class JobCommand:
    """A command of ``galore`` that trains."""

    name: str
    help: str  # what it does and leaves behind
    examples: str
    presets: PresetTable[Any]  # by which every configuration is made
    preset_help: str
    help_preset: str  # the preset whose values ``--help`` shows
    offered: Sequence[str] = tuple(METHODS)  # methods to choose from
    methods: tuple[str, ...]  # what is compared by default
    job: str  # the class of what the runs are of, as `pkgutil.resolve_name` reads it: it is imported late
    prepare: Callable[[Any, Console], None] | None = None  # reads and caches the data for all runs, if that takes long
    advise: Callable[[str, Any, Mapping[str, Any]], None] = lambda *_: None  # of a preset, a configuration and flags
    unit: str  # what its records count: tokens or examples
    held_out: str  # what it is evaluated on, in a word
    libraries: tuple[str, ...]  # whose versions a report names, beside torch's and Transformers'
    amount: Callable[[Any], Amount]  # how much a run with a configuration sees
    scores: Callable[[Record], Mapping[str, Any]]  # a final record's scores by name, the main one first

    def load(self) -> "type[Job]":
        """Import what the runs are of, and with it Transformers."""
        found: type[Job] = resolve_name(self.job)
        return found

    @property
    def epilog(self) -> str:
        """The end of ``--help``."""
        return f"[bold]Examples[/]\n\n{self.examples}\n{help_text(self.offered)}"

    def command(self) -> Callable[..., None]:
        """The command itself, with a flag for each setting."""
        presets = option(f"Recipe to start from: {', '.join(self.presets.presets)}. {self.preset_help}")
        methods = option(
            f"What is trained, and how: {', '.join(self.offered)}. Overrides preset and --config; flags override it. "
            r"[dim]\[default: galore][/]"
        )
        resumes = option(
            "Resume the run in --out, with its own settings; with more --steps or --epochs also one that has ended.",
            "--resume",
        )
        prepares = option("Only read, tokenize and cache the text, for runs to come.", "--prepare")

        def command(
            *,
            preset: Annotated[str | None, presets] = None,
            method: Annotated[str | None, methods] = None,
            config: Annotated[Path | None, option("TOML file of settings, such as a run folder's config.toml.")] = None,
            out: Annotated[Path | None, option("Run folder to make, by default in runs/.")] = None,
            resume: Annotated[bool, resumes] = False,
            prepare: Annotated[bool, prepares] = False,
            json: Json = False,
            **given: Any,
        ) -> None:
            own = {"preset": preset, "method": method, "config": config}
            self._run({**own, **given_settings(given)}, out=out, resume=resume, prepare=prepare, json=json)

        command.__doc__ = self.help + _OF_ALL
        return self.with_settings(command, () if self.prepare else ("prepare",))

    def _configured(
        self, *, preset: str | None, method: str | None, config: Path | None, **given: Any
    ) -> tuple[Any, Path]:
        """The settings, and the run folder where none is named."""
        settings = self.presets.configure(preset, config, method=method, **given)
        start = preset or (self.presets.default(given) if config is None else config.stem)
        self.advise(start, settings, given)
        return settings, Path("runs", f"{getattr(settings.data, 'task', start)}-{method or settings.title}")

    def _run(self, options: dict[str, Any], *, out: Path | None, resume: bool, prepare: bool, json: bool) -> None:
        """All from the options to the result on the screen and the exit status; libraries are imported late."""
        console, name = Screen(stderr=json, quiet=not processes.is_first()), f"galore {self.name}"
        changes: dict[str, Any] = {}
        folder: RunFolder | None = None
        with stoppable(lambda: _stopped(folder, name, resumed=resume)):
            with reported_errors(name):
                _require_not_both(resume, prepare)
                if resume:
                    if out is None:
                        raise ValueError("resume needs to know which run; give its folder as --out runs/NAME.")
                    folder, settings = processes.run_folder(out), None
                    changes = folder.require_unfinished(options)
                else:
                    settings, default = self._configured(**options)
                    settings.require_there()
                    require_token(settings.schedule.push_to_hub)
                    trackers(settings.schedule.report_to)
                    if prepare and self.prepare is not None:
                        self.prepare(settings, console)
                        return
                    folder = processes.run_folder(out or default)
                    resume = processes.goes_on(folder)
                    if resume and folder.final is not None:  # the process that was lost had nothing left to do
                        console.out(_left(folder, name), highlight=False)
                        _print(folder.result(), json=json)
                        return
                    if not resume:
                        folder.require_new()
                with loading(console):
                    from galore_torch.training.run.run import new_run, resumed_run

                    job = self.load()
                run = (
                    resumed_run(job, folder, console=console, changes=changes)
                    if resume
                    else new_run(job, settings, folder, console=console)
                )
            with reported_errors(name, lambda: _left(run.folder, name)):
                result: RunResult = run.train()
            _print(dataclasses.asdict(result), json=json)
            for line in [] if json else _shown(result, name):
                console.out(line, highlight=False)
            if not result.finished:
                raise typer.Exit(exit_status())

    def with_settings(self, command: Callable[..., None], hidden: Sequence[str] = ()) -> Callable[..., None]:
        """A command with a flag for each setting of the job, but for options of its own that are hidden."""
        sections = sections_of(self.presets.config)
        return with_settings(command, sections, self.presets.presets, self.help_preset, hidden)


def _print(result: Mapping[str, Any], *, json: bool) -> None:
    if json and processes.is_first():
        print(json_format.dumps(result))


def _require_not_both(resume: bool, prepare: bool) -> None:
    if resume and prepare:
        raise ValueError("prepare = True is for runs to come, and resume goes on with one; leave out either.")


def _shown(result: "RunResult", name: str) -> list[str]:
    """What a run came to, and what to do with it."""
    if not result.finished:
        return [
            f"Stopped after step {result.step:,}. It is saved in {result.checkpoint}; resume with:",
            f"  {name} --resume --out {shlex.quote(result.out)}",
        ]
    folder = RunFolder(Path(result.out))
    planned = result.planned_memory_bytes
    said = "" if planned is None else f" (planned {readable(planned)}; both with the process itself)"
    names = ("model", "metrics", "plot", "predictions", "events")
    files = {name: getattr(folder, name) for name in names}
    return [
        f"{result.headline}  optimizer state {readable(result.state_bytes)}  "
        f"peak memory {readable(result.peak_memory_bytes)}{said}  {duration(result.seconds)} of training",
        "  ".join(f"{what} {path}" for what, path in files.items() if path.exists()),
        *result.remarks,
    ]


def _left(folder: RunFolder, name: str) -> str:
    """What a run has left, and how to go on where it has not ended."""
    if folder.final is not None:
        return f"{folder.root} holds the finished run."
    saved, how = folder.checkpoints.newest(), f":\n  {name} --resume --out {shlex.quote(str(folder.root))}"
    if saved is not None:
        return f"{folder.root} is saved as of step {step_of(saved):,}; resume with{how}"
    return f"{folder.root} has no checkpoint yet; start it over with{how}"


def _stopped(folder: RunFolder | None, name: str, *, resumed: bool) -> str:
    """Leave a saved state or an untouched folder of the run that a stopped command was at work on, and say which."""
    if folder is None or not (resumed or folder.was_begun_here):
        return NOTHING_WRITTEN
    folder.abandon()
    if folder.config.exists():
        return f"Stopped. {_left(folder, name)}"
    there = "as it was" if folder.root.exists() else "not there"
    return f"Stopped before there was anything to save: {folder.root} is {there}."
