"""The configuration of a joint run: several modalities on one transformer (`joint.py`).

    d2v run modality=[a,b] joint.shares=[2,1] model.num_layers=6 a.data.path=... b.optim.lr=1e-3

Options of the core that stand alone are given to every modality; `NAME.` in front gives any option to one. Each
modality's configuration is then that of a run of its own, and what they must have in common is compared.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d2v_core import plugins
from d2v_core.config import (
    CORE_SECTIONS,
    KEYS,
    RESUME,
    STAGES,
    ModelConfig,
    RunConfig,
    TrainConfig,
    as_yaml,
    docs_of,
    documentation,
    from_dict,
    load_config,
    names_several,
    opt,
    parse_arguments,
    typed,
)
from d2v_core.errors import UserError

if TYPE_CHECKING:
    from d2v_core.contract import Modality

OF_THE_RUN = ("out", "seed", "resume")
"""Keys that a joint run has once."""
OF_EACH = ("preset", "method", "official_quirks")
"""Keys that may stand alone, for all modalities."""
OWN_TRAIN = ("max_steps", "num_masks")
"""Options of section `train` that each modality has for itself; the others are the loop's."""
PRESET = "joint"
"""The preset of a joint run where a modality has one of this name."""


@dataclass
class JointOptions:
    """How the modalities share the transformer."""

    shares: list[float] = opt(
        [],
        "How many of the updates each modality has, in the order of `modality`: [2,1,1] is half and two quarters. "
        "0 = it is scored, and never learns. Empty = as their own train.max_steps are to one another.",
    )
    weights: list[float] = opt(
        [], "What each modality's gradient counts in the transformer, in the order of `modality`; empty = all alike."
    )
    balance: Literal["gradient_norm", "none"] = opt(
        "gradient_norm",
        "gradient_norm = scale them so that, on average, they are as long as one another there, times `weights`; "
        "none = as long as the losses make them, times `weights`.",
    )
    teacher: Literal["own", "shared"] = opt(
        "own",
        "own = every modality's teacher averages the transformer for itself, at its own updates; shared = one average "
        "for all, moved at every update by the decay of the modality that made it.",
    )
    lr_scale: float = opt(1.0, "Learning rate of the transformer over that of the modality whose update it is.")


@dataclass
class _Top:
    """Options that the run has once."""

    joint: JointOptions = field(default_factory=JointOptions)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class JointConfig:
    """A resolved configuration of several modalities.

    members: the configuration of each one's own run, in the order of the command; of all of them `model` is the same,
    and `train` but for OWN_TRAIN. train: the loop's; its max_steps counts the updates of all.
    """

    members: Mapping[str, RunConfig]
    kinds: Mapping[str, type[Modality[Any]]]
    joint: JointOptions
    train: TrainConfig
    out: str | None
    seed: int
    resume: str

    @property
    def modality(self) -> str:
        """Of all, for names of folders and messages."""
        return "+".join(self.members)

    @property
    def stage(self) -> str:
        """A joint run pre-trains."""
        return "pretrain"

    @property
    def preset(self) -> str:
        """Those of all, each once."""
        return "+".join(dict.fromkeys(member.preset for member in self.members.values()))

    @property
    def model(self) -> ModelConfig:
        """The transformer, the same for all."""
        return next(iter(self.members.values())).model

    @cached_property
    def updates(self) -> dict[str, int]:
        """How many updates each modality has; they sum to train.max_steps."""
        shares = self.joint.shares or [member.train.max_steps for member in self.members.values()]
        return dict(zip(self.members, apportion(self.train.max_steps, shares), strict=True))

    def own(self, name: str) -> RunConfig:
        """The configuration of a modality with the updates that it has here, which its schedules run over."""
        member = self.members[name]
        return replace(member, train=replace(member.train, max_steps=max(self.updates[name], 1)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values with the keys that the user types; what all have in common stands once."""
        out: dict[str, Any] = {
            "modality": list(self.members), "stage": self.stage, "out": self.out, "seed": self.seed,
            "resume": self.resume, "joint": dataclasses.asdict(self.joint), "model": dataclasses.asdict(self.model),
            "train": {k: v for k, v in dataclasses.asdict(self.train).items() if k != "num_masks"},
        }  # fmt: skip
        for name, member in self.members.items():
            values = member.to_dict()
            values["train"] = {key: values["train"][key] for key in OWN_TRAIN}
            common = ("modality", "stage", "from", "labels", "model", *OF_THE_RUN)
            out[name] = {key: value for key, value in values.items() if key not in common}
        return out

    def to_yaml(self, comments: bool = False) -> str:
        """With comments, each field's sentence stands above it."""
        return as_yaml(self.to_dict(), self._docs() if comments else None)

    def _docs(self) -> dict[str, str]:
        docs = {key: doc for key, (_, doc) in KEYS.items()}
        docs["modality"] = "The modalities that share the transformer."
        docs |= docs_of("joint", JointOptions) | docs_of("model", ModelConfig) | docs_of("train", TrainConfig)
        docs["train.max_steps"] = "Optimizer updates of all modalities together."
        for name, member in self.members.items():
            docs[name] = f"What {name} has for itself, as in a run of its own."
            docs |= {f"{name}.{key}": doc for key, doc in documentation(member).items()}
            docs[f"{name}.train.max_steps"] = "Its updates where joint.shares and train.max_steps say nothing else."
        return docs


class Joint:
    """The modalities of a joint run. Raises UserError where one of them refuses its configuration."""

    def __init__(self, config: JointConfig) -> None:
        self.config = config
        self.members: dict[str, Modality[Any]] = {}
        for name, kind in config.kinds.items():
            with whose(name):
                self.members[name] = kind(config.own(name))


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total` and lie within one of their shares of it."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(one + 1e-9) for one in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: total - sum(counts)]:
        counts[i] += 1
    return counts


def load_run(argv: Sequence[str]) -> tuple[Any, Callable[[Any], Any]]:
    """The configuration of `d2v run`, of one modality or several, and what makes a Modality or a Joint of it."""
    if names_several(parse_arguments(argv).get("modality", "")):
        return load_joint(argv), Joint
    return load_config(argv)


def load_joint(argv: Sequence[str], modality_of: Any = None) -> JointConfig:
    """From `key=value` words, among them modality=[A,B]. modality_of: function from a name to its class.

    Raises UserError naming the option, what was given and what is possible.
    """
    values = parse_arguments(argv)
    names = _names(values.pop("modality"))
    kinds = {name: (modality_of or plugins.load)(name) for name in names}
    if values.pop("stage", "pretrain") != "pretrain":
        raise UserError(
            "Several modalities are pre-trained together; other stages work on one of them: give modality=NAME and "
            "from=RUN, the folder of the joint run."
        )
    for key in ("from", "labels"):
        if key in values:
            raise UserError(f"{key}={values[key]} has no meaning for a joint run, which starts from nothing.")
    common: dict[str, str] = {}
    own: dict[str, dict[str, str]] = {name: {} for name in names}
    top: dict[str, str] = {}
    once: dict[str, str] = {}
    for key, value in values.items():
        section, _, rest = key.partition(".")
        if section in own and rest:
            _check_own(section, rest, value)
            own[section][rest] = value
        elif key == "train.max_steps" or (section == "joint" and rest):
            once[key] = value
        elif key in OF_THE_RUN:
            top[key] = value
        elif key in OF_EACH or (section in STAGES["pretrain"] and rest):
            common[key] = value
        else:
            raise UserError(_misplaced(key, value, kinds))
    members: dict[str, RunConfig] = {}
    for name, kind in kinds.items():
        words = {"modality": name, "preset": _preset(kind), **top, **common, **own[name]}
        with whose(name):
            members[name] = load_config([f"{k}={v}" for k, v in words.items()], kinds.get)[0]
    first = members[names[0]]
    options = typed(_Top, once)
    total = sum(member.train.max_steps for member in members.values())
    if "train.max_steps" in once:
        total = options.train.max_steps
    config = JointConfig(
        {n: replace(m, train=_own_train(first.train, m.train)) for n, m in members.items()}, kinds, options.joint,
        replace(first.train, max_steps=total), first.out, first.seed, first.resume,
    )  # fmt: skip
    return _checked(config)


def from_stored(stored: Mapping[str, Any], source: str) -> JointConfig:
    """A configuration that was written with `to_yaml`. `source` names it in errors."""
    names = [str(name) for name in stored["modality"]]
    kinds = {name: plugins.load(name) for name in names}
    run = {key: stored[key] for key in OF_THE_RUN}
    train = typed(TrainConfig, {}, stored["train"])
    members: dict[str, RunConfig] = {}
    for name, kind in kinds.items():
        own = dict(stored[name])
        own |= {"modality": name, "stage": "pretrain", "model": stored["model"], **run}
        own["train"] = {**stored["train"], **own["train"]}
        members[name] = from_dict(own, kind, source)
    options = typed(_Top, {}, {"joint": stored["joint"]}).joint
    return _checked(JointConfig(members, kinds, options, train, run["out"], run["seed"], run["resume"]))


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.strip("[]").split(",") if name.strip()]
    if len(names) < 2:
        raise UserError(f"modality={text} names {len(names) or 'no'} modality. A joint run has at least two; one alone "
                        "is written modality=NAME.")  # fmt: skip
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"modality={text} names {name} twice. Each modality shares the transformer once.")
        if name in CORE_SECTIONS or name in KEYS or name == "joint":
            raise UserError(
                f"The modality {name} cannot be in a joint run, whose options {name}... are the core's own."
            )
    return names


def _preset(kind: type[Modality[Any]]) -> str:
    return PRESET if (Path(kind.recipes()) / f"{PRESET}.yaml").is_file() else str(KEYS["preset"][0])


def _own_train(loop: TrainConfig, member: TrainConfig) -> TrainConfig:
    return replace(loop, **{key: getattr(member, key) for key in OWN_TRAIN})


def _check_own(name: str, rest: str, value: str) -> None:
    section, _, leaf = rest.partition(".")
    if section == "train" and leaf not in OWN_TRAIN:
        raise UserError(f"{name}.{rest}={value}: the loop is everybody's. Write {rest}={value}; of section train a "
                        f"modality has {' and '.join(OWN_TRAIN)} for itself.")  # fmt: skip
    if rest in OF_THE_RUN or rest in ("modality", "stage", "from", "labels"):
        raise UserError(f"{name}.{rest}={value}: a joint run has {rest} once, without {name}. in front.")


def _misplaced(key: str, value: str, kinds: Mapping[str, type[Modality[Any]]]) -> str:
    """Why an option means nothing where it stands."""
    section, _, rest = key.partition(".")
    homes = [
        name for name, kind in kinds.items()
        if any(section in kind.method_sections(e, method) for e in kind.encoders for method in kind.methods)
    ]  # fmt: skip
    if homes or key == "encoder":
        one = " or ".join(f"{name}.{key}={value}" for name in homes or kinds)
        return f"{key}={value} belongs to one modality. Write {one}."
    if section in plugins.names() and rest:
        return f"{key}={value}: {section} is not in modality=[{','.join(kinds)}]."
    known = [*kinds, "joint", *STAGES["pretrain"], *OF_EACH, *OF_THE_RUN]
    near = difflib.get_close_matches(section, known, 1)
    return (
        f"{key}={value} is no option of a joint run. There are {', '.join(known)}, each a section or an option; "
        f"`d2v config modality=[{','.join(kinds)}]` lists them with their meaning."
        + (f" Did you mean {near[0]}{'.' + rest if rest else ''}?" if near else "")
    )


@contextmanager
def whose(name: str) -> Generator[None]:
    """Inside, an error says of which modality it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"Of {name} (its options begin with {name}.): {error}") from None


def _checked(config: JointConfig) -> JointConfig:
    """What the modalities must have in common, and what only several of them can have wrong. Raises UserError."""
    names, joint, problems = list(config.members), config.joint, list[str]()
    for option, least in (("shares", "0 or more, not all 0"), ("weights", "above 0")):
        given = getattr(joint, option)
        wrong = any(not 0 <= one < float("inf") for one in given) or (
            min(given, default=1) <= 0 if option == "weights" else bool(given) and not sum(given) > 0
        )
        if given and len(given) != len(names):
            problems.append(f"joint.{option}={given} has {len(given)} numbers for {len(names)} modalities "
                            f"({', '.join(names)}): one for each, in this order")  # fmt: skip
        elif wrong:
            problems.append(f"joint.{option}={given} must be numbers {least}")
    if not 0 < joint.lr_scale < float("inf"):
        problems.append(f"joint.lr_scale={joint.lr_scale} must be above 0")
    if config.train.max_steps < 1:
        problems.append(f"train.max_steps={config.train.max_steps} must be at least 1")
    if not problems:
        shares = dict(zip(names, joint.shares or [1.0] * len(names), strict=True))
        for name, count in config.updates.items():
            if not count and shares[name] > 0:
                problems.append(
                    f"train.max_steps={config.train.max_steps} leaves no update for {name}, whose share is "
                    f"{shares[name]:g} of {sum(shares.values()):g}: give more, or leave it out"
                )
    if config.resume not in RESUME:
        problems.append(f"resume={config.resume} must be one of: {', '.join(RESUME)}")
    if problems:
        raise UserError("This configuration cannot work:\n  " + "\n  ".join(problems))
    different = [
        f"model.{f.name}: " + ", ".join(f"{name} {getattr(m.model, f.name)}" for name, m in config.members.items())
        for f in dataclasses.fields(ModelConfig)
        if len({getattr(m.model, f.name) for m in config.members.values()}) > 1
    ]
    if different:
        raise UserError(
            "These modalities cannot share one transformer, because theirs differ in\n  "
            + "\n  ".join(different)
            + "\n"
            "An option that stands alone is given to all of them (model.num_layers=4); presets that were made to share "
            "one are called joint."
        )
    return config
