"""The command line. Imports torch only inside a verb that needs it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from d2v_core import __version__, plugins
from d2v_core.errors import UserError

HELP = f"""d2v {__version__}: data2vec for any modality

  d2v run modality=NAME [key=value ...]      pre-train; with no data.path on the modality's own built-in data, and
                                             with what follows there, as stage=all does (not: stage=pretrain)
  d2v run modality=[A,B] [A.key=value ...]   pre-train several on one shared transformer (docs/joint.md)
  d2v run stage=finetune from=RUN data.path=LABELLED [...]
                                             train a pre-trained network on a labelled task, and score it
  d2v run stage=probe from=RUN data.path=LABELLED [...]
                                             score its frozen features: linear and nearest-neighbour classifiers
  d2v encode RUN [PATH] [key=value ...]      write a run's features of every sample at PATH, resumably
  d2v config modality=NAME [key=value ...]   print the resolved configuration, a sentence for each option
  d2v plan modality=NAME [key=value ...] [--json]
                                             what a step would cost (parameters, FLOPs, memory) and what fits
  d2v profile modality=NAME [key=value ...] [steps=5] [out=FOLDER]
                                             where the time of a few real steps goes, and a trace for a browser
  d2v data scan modality=NAME data.path=FILES [--json]
                                             what lies there: how much, which kinds, duplicates, what is broken
  d2v data shard modality=NAME data.path=FILES out=FOLDER
                                             write it as tars with an index (WebDataset), to be read as data.path
  d2v modalities                             what is installed, from which distribution; imports none of it
  d2v plugins                                the same with verbs, each loaded to see whether it works
  d2v check NAME                             hold a modality to the contract, promise by promise
  d2v new NAME                               write a modality of your own, as a distribution that works
  d2v --version
"""
OWN_MODULES = {"encode": "d2v_core.features", "check": "d2v_core.testing", "data": "d2v_core.data_verbs",
               "new": "d2v_core.new"}  # fmt: skip
"""Verbs with words of their own: the module with their `main`, imported when the verb is typed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 only where what was asked is done, 2 for an error of the user's to mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(words)
        sys.stdout.flush()  # here, so that a reader who has left is noticed below and not while Python ends
        return status
    except UserError as error:
        return _refusal(error)
    except KeyboardInterrupt:
        print("d2v: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _refusal(error: UserError) -> int:
    """The exit status. Of several processes that train together, one says it."""
    distributed = sys.modules.get("d2v_core.distributed")
    if distributed is None:
        print(f"d2v: {error}", file=sys.stderr)
        return 2
    return distributed.say_error(error)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        commands = plugins.installed(plugins.COMMANDS)
        print(HELP, end="")
        if commands:
            print("\nBrought by plugins (d2v VERB --help says more):")
            for command in commands:
                print(f"  d2v {command.name:<39}from {command.distribution} {command.version}")
        return 0
    verb, rest = words[0], words[1:]
    if verb in ("--version", "version"):
        print(f"d2v {__version__}")
        return 0
    if verb == "modalities":
        return _modalities()
    if verb == "plugins":
        return _plugins()
    if verb in OWN_MODULES:
        return int(importlib.import_module(OWN_MODULES[verb]).main(rest))
    if verb in ("run", "config", "plan", "profile") and {"-h", "--help"} & set(rest):
        print(HELP, end="")
        return 0
    if verb == "config":
        from d2v_core.jointconfig import load_run

        config, kind = load_run(rest)
        kind(config)  # what the modality refuses is refused here too
        print(config.to_yaml(comments=True), end="")
        return 0
    if verb == "plan":
        return _plan(rest)
    if verb == "profile":
        return _profile(rest)
    if verb == "run":
        return _run(rest)
    return _plugin_command(verb, rest)


def _modalities() -> int:
    found = plugins.installed()
    if not found:
        print("No modality is installed.")
    _list(found)
    encoders = plugins.installed(plugins.ENCODERS)
    if encoders:
        print("\nEncoders of any modality (encoder=NAME):")
    _list(encoders)
    return 0


def _list(found: Sequence[plugins.Plugin]) -> None:
    width = max((len(p.name) for p in found), default=0)
    for p in found:
        print(f"{p.name:<{width}}  {p.distribution} {p.version}  {p.origin}  {_contract(p)}")
    for name, claims in _claimed_twice(found).items():
        print(f"{name:<{width}}  cannot be used: {claims} both claim it. Uninstall all but one of them.")


def _contract(plugin: plugins.Plugin) -> str:
    misfit = plugins.contract_misfit(plugin)
    if misfit:
        return f"REFUSED: {misfit}"
    return "contract 1 (not declared)" if plugin.contract is None else f"contract {plugin.contract}, fits"


def _claimed_twice(found: Sequence[plugins.Plugin]) -> dict[str, str]:
    """Names that more than one distribution claims, and which do."""
    names = [p.name for p in found]
    return {name: " and ".join(f"{p.distribution} {p.version}" for p in found if p.name == name)
            for name in dict.fromkeys(names) if names.count(name) > 1}  # fmt: skip


def _plugins() -> int:
    """Who provides what. Every modality and encoder is loaded, every verb found: what is broken says so, and stops
    nothing else."""
    loaders = {"modality": (plugins.GROUP, plugins.load), "encoder": (plugins.ENCODERS, plugins.load_encoder)}
    classes = [(what, load, p) for what, (group, load) in loaders.items() for p in plugins.installed(group)]
    commands = plugins.installed(plugins.COMMANDS)
    if not classes and not commands:
        print("No plugin is installed.")
    for title in sorted({f"{p.distribution} {p.version}" for p in [*(p for _, _, p in classes), *commands]}):
        print(title)
        for what, load, p in classes:
            if f"{p.distribution} {p.version}" == title:
                print(f"  {what:<8} {p.name:<14} {p.origin}  {_contract(p)}")
                print(f"    {_trouble(lambda load=load, p=p: load(p.name)) or 'loads'}")
        for p in commands:
            if f"{p.distribution} {p.version}" == title:
                trouble = _trouble(lambda p=p: _command(p.name))
                print(f"  verb     {p.name:<14} {p.origin}" + (f"\n    {trouble}" if trouble else ""))
    return 0


def _trouble(load: Callable[[], Any]) -> str:
    try:
        load()
    except UserError as error:
        return str(error)
    return ""


def _plugin_command(verb: str, rest: Sequence[str]) -> int:
    """A verb that a plugin brings: `d2v.commands` names a function from arguments to an exit status."""
    own = ("run", "config", "plan", "profile", "modalities", "plugins", *OWN_MODULES)
    known = [*own, *(p.name for p in plugins.installed(plugins.COMMANDS))]
    if verb not in known:
        import difflib

        near = difflib.get_close_matches(verb, known, 1)
        raise UserError(
            f"{verb!r} is not a command. There are: {', '.join(known)}." + (f" Did you mean {near[0]}?" if near else "")
        )
    return int(_command(verb)(list(rest)))


def _command(verb: str) -> Callable[[list[str]], int]:
    """The function behind a plugin's verb. Raises UserError where it cannot be loaded."""
    entry = plugins.find(verb, plugins.COMMANDS)
    module, _, function = entry.value.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:
        name = entry.dist.name if entry.dist else "its distribution"
        raise UserError(
            f"The command {verb!r} from {name} cannot be loaded ({entry.value}): {type(error).__name__}: {error}."
        ) from error


def _plan(argv: Sequence[str]) -> int:
    import json

    from d2v_core.config import load_config

    config, kind = load_config([word for word in argv if word != "--json"])
    from d2v_core.plan import describe, make_plan

    plan = make_plan(kind(config))
    print(json.dumps(plan.to_dict(), indent=1) if "--json" in argv else describe(plan).rstrip())
    return 0


def _profile(argv: Sequence[str]) -> int:
    from d2v_core.config import load_config

    given = [word for word in argv if word.startswith("steps=")]
    try:
        steps = int(given[-1].partition("=")[2]) if given else 5
    except ValueError:
        steps = 0
    if steps < 1:
        raise UserError(f"{given[-1]} must be a whole number of at least 1.")
    config, kind = load_config([word for word in argv if word not in given])
    from d2v_core.profile import profile

    print(profile(kind(config), steps), end="")
    return 0


def _run(argv: Sequence[str]) -> int:
    from d2v_core.config import with_sequel

    words, sequel = with_sequel(argv)
    first = os.environ.get("RANK", "0") == "0"
    status, folder = _run_stage(words)
    return sequel.run(folder) if sequel is not None and status == 0 and first else status


def _run_stage(argv: Sequence[str]) -> tuple[int, Path]:
    """Exit status and run folder."""
    from rich.console import Console

    from d2v_core.jointconfig import JointConfig, load_run

    config, kind = load_run(argv)
    from d2v_core import distributed
    from d2v_core.runfolder import drop_unused, open_run

    joint = isinstance(config, JointConfig)
    one = next(iter(config.members.values())) if isinstance(config, JointConfig) else config
    if joint and (distributed.is_worker() or one.launch.processes > 1):
        raise UserError(
            "A run of several modalities has one process: leave out launch.processes and torchrun, or train each "
            "modality in a run of its own."
        )
    with distributed.together(one) as processes:
        console = Console(quiet=not processes.first)
        modality = kind(config)  # refuses what cannot work before there is a folder
        folder = processes.by_first(lambda: open_run(distributed.restarted(config)))
        if folder.done:
            console.print(
                f"{folder.path} is already complete; nothing to do.", soft_wrap=True, highlight=False, markup=False
            )
            return 0, folder.path
        try:
            if distributed.to_launch(one):
                return distributed.launch(one, argv, folder.path), folder.path
            console.print(
                f"d2v {__version__}: {config.modality}, preset {config.preset}, in {folder.path}",
                soft_wrap=True, highlight=False, markup=False,
            )  # fmt: skip
            make = _stage("joint" if joint else config.stage)
            return processes.first_then_others(lambda: make(modality, folder.path, console)).fit(), folder.path
        except OSError as error:
            raise UserError(
                f"The run in {folder.path} stopped: {error}. If the disk is full, make room; then go on with "
                f"out={folder.path} resume=auto."
            ) from error
        finally:
            # A mistake that the first step did not survive must not stand in the way of the next try.
            if folder.new and processes.first:
                drop_unused(folder.path)


def _stage(name: str) -> Any:
    """What makes the object that does a stage; torch is imported here."""
    module, kind = {
        "pretrain": ("trainer", "Trainer"), "joint": ("joint", "JointTrainer"),
        "finetune": ("finetune", "finetuning"), "probe": ("probing", "Prober"),
    }[name]  # fmt: skip
    return getattr(importlib.import_module(f"d2v_core.{module}"), kind)
