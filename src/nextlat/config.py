"""Typed configuration: YAML files, overrides and grids, checked before anything starts."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, model_validator

from nextlat.errors import NextLatError, nearest, unknown
from nextlat.options import Options


class ModelConfig(Options):
    """``model:`` the trunk."""

    n_layers: int = Field(ge=1)
    n_heads: int = Field(ge=1)
    width: int = Field(ge=1)
    tie_embeddings: bool = False


class TrainingConfig(Options):
    """``training:`` the loop."""

    steps: int = Field(ge=1, description="optimiser updates, exactly")
    batch_size: int = Field(ge=1, description="global rows of a step")
    accumulation: int = Field(1, ge=1, description="micro-batches a step")
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int = Field(
        0,
        ge=0,
        description="wsd: linear decay at the end; cosine: steps of the fall, where 0 is all behind the warm-up",
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)
    clip: float | None = Field(None, gt=0, description="global gradient norm; null is off")
    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_scale: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    evaluate_every: int | None = Field(None, ge=1)
    save: Literal["last", "best", "every"] = "last"
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; default evaluate_every")
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_activations: bool = Field(False, description="recompute blocks in the backward pass to save memory")
    compile: bool = Field(False, description="torch.compile the blocks, after a check of their gradients")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False
    threads: int | None = Field(None, ge=1, description="CPU threads; null leaves it to torch")
    track: list[Literal["wandb", "tensorboard"]] = Field([])

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation = {self.accumulation} does not divide batch_size = {self.batch_size}; "
                "every micro-batch needs the same number of rows"
            )
        if self.schedule == "wsd" and not 1 <= self.decay_steps <= self.steps - self.warmup_steps:
            raise ValueError(
                f"schedule wsd warms up for {self.warmup_steps} and decays for {self.decay_steps} of {self.steps} "
                "steps; set training.decay_steps to at least 1 and, with warmup_steps, to at most training.steps"
            )
        if self.schedule == "constant" and self.decay_steps:
            raise ValueError(
                f"decay_steps = {self.decay_steps} is not used by schedule constant; "
                "set training.decay_steps=0 or training.schedule=wsd"
            )
        return self


class ProbeOptions(Options):
    """``evaluation.probes:`` linear probes of frozen states."""

    offsets: int = Field(20, ge=1, description="predict the tokens 1 to so many places ahead")
    steps: int = Field(20_000, ge=1, description="updates")
    batch_size: int = Field(256, ge=1, description="rows of an update, at most those of a training step")
    learning_rate: float = Field(3e-4, gt=0, allow_inf_nan=False, description="falls linearly to 0")
    pairs: list[Literal["document", "row"]] = Field(
        ["document", "row"], min_length=1, description="state and token in one document, or anywhere in a row"
    )


class EvaluationConfig(Options):
    """``evaluation:`` what is measured, and on how much."""

    split: str = "test"
    examples: int | None = Field(500, ge=1, description="held-out examples while training; null is all")
    batch_size: int = Field(500, ge=1)
    health: bool = Field(True, description="log state and gradient health at every evaluation while training")
    after: list[str] = Field(["accuracy"], description="evaluations on all examples after the last step")
    probes: ProbeOptions = ProbeOptions.model_validate({})


class Config(Options):
    """A whole configuration, resolved."""

    task: str
    objective: str = "nextlat"
    seed: int = Field(0, ge=0, lt=2**32)
    name: str | None = Field(None, pattern=r"^[\w.=+-]+$", max_length=200)
    model: ModelConfig
    objectives: dict[str, SerializeAsAny[Options]]
    data: SerializeAsAny[Options]
    training: TrainingConfig
    evaluation: EvaluationConfig
    sweep: list[dict[str, Any]] = Field([])

    @property
    def selected(self) -> Options:
        """Options of the selected objective."""
        return self.objectives[self.objective]

    def plain(self) -> dict[str, Any]:
        """As YAML-ready values."""
        return self.model_dump(mode="json")

    def hash(self) -> str:
        """Twelve hex digits over everything that makes the result.

        Left out are the name, the sweep, where the run computes and is tracked, and the hyper-parameters of
        objectives that were not selected. Values that equal their defaults are left out too, so that an option
        added to the library later does not make every recorded run another one.
        """
        plain = self.model_dump(mode="json", exclude_defaults=True)
        selected = self.selected.model_dump(mode="json", exclude_defaults=True)
        plain |= {"objective": self.objective, "objectives": selected, "seed": self.seed}
        for key in ("device", "track"):
            plain["training"].pop(key, None)
        for key in ("name", "sweep"):
            plain.pop(key, None)
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-3`` as a number and refuses a key that appears twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float):
                raise NextLatError(f"key {key!r} in line {key_node.start_mark.line + 1} is not a name")
            if key in seen:
                raise NextLatError(f"key {key!r} appears twice, line {key_node.start_mark.line + 1}; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$|^[-+]?(\d+\.\d*|\.\d+)$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML; errors name the place."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise NextLatError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def packaged() -> dict[str, Traversable]:
    """The configurations that ship with the library, by name."""
    found: dict[str, Traversable] = {}
    for folder in sorted(resources.files("nextlat.configs").iterdir(), key=lambda entry: entry.name):
        if folder.is_dir():
            for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
                if file.name.endswith(".yaml"):
                    found[f"{folder.name}/{file.name.removesuffix('.yaml')}"] = file
    return found


def header(text: str) -> str:
    """The comment a configuration starts with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def read_config(source: str) -> tuple[dict[str, Any], str]:
    """A configuration by packaged name (``path_star/mini``) or by path to a YAML file.

    Returns:
        the mapping, not yet checked, and a label for run names.
    """
    if source.endswith((".yaml", ".yml")):
        path = Path(source)
        if not path.is_file():
            raise NextLatError(
                f"there is no configuration file {source}; give a path to a YAML file or a packaged name"
            )
        try:
            text, label = path.read_text(encoding="utf-8"), path.stem
        except UnicodeDecodeError as error:
            raise NextLatError(f"{source} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    else:
        known = packaged()
        if source not in known:
            raise unknown("configuration", source, known)
        text, label = known[source].read_text(encoding="utf-8"), source.replace("/", "-")
    data = read_yaml(text, source)
    if not isinstance(data, dict):
        raise NextLatError(f"{source} holds a {type(data).__name__}, not a mapping of keys to values")
    return data, label


def split_override(text: str) -> tuple[str, str]:
    """``key=value`` in two."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise NextLatError(f"{text!r} is not an override; write key=value, for example training.steps=500")
    return key, value


def read_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """``key=value`` texts as a mapping; values are YAML."""
    return {key: read_yaml(value, key) for key, value in map(split_override, texts)}


def apply_overrides(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the data with dotted keys set; ``objective.KEY`` is a key of the selected objective."""
    result: dict[str, Any] = copy.deepcopy(dict(data))
    if "objective" in overrides:
        result["objective"] = overrides["objective"]
    for key, value in overrides.items():
        if key.startswith("objective."):
            key = f"objectives.{result.get('objective', 'nextlat')}.{key.removeprefix('objective.')}"
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise NextLatError(f"{key}: {parent} is a single value and has no key {last!r}")
        if isinstance(value, dict) and isinstance(place.get(last), dict):
            place[last] = {**place[last], **value}
        else:
            place[last] = value
    return result


T = TypeVar("T", bound=Options)


def validate(model: type[T], data: Any, place: str = "") -> T:
    """Check a section; every fault is named with its place, its value and the nearest valid key."""
    if data is None:
        data = {}
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise NextLatError("\n".join(_explain(model, fault, place) for fault in error.errors())) from None


def _explain(model: type[Options], fault: Any, place: str) -> str:
    where = ".".join(str(part) for part in (*((place,) if place else ()), *fault["loc"])) or "configuration"
    if fault["type"] == "extra_forbidden":
        known = _keys(model, fault["loc"][:-1])
        near = nearest(str(fault["loc"][-1]), known)
        hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{where}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{where}: missing; it has no default"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where} is {fault['input']!r}: {message[0].lower()}{message[1:]}"


def _keys(model: Any, path: Sequence[Any]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        if field is None:
            return []
        model = field.annotation
    return list(model.model_fields) if hasattr(model, "model_fields") else []


def resolve(data: Mapping[str, Any]) -> Config:
    """Check everything that needs no model; see :func:`nextlat.training.build.build` for the rest."""
    from nextlat.objectives import find_objective
    from nextlat.tasks import find_task

    rest = dict(data)
    for key in rest:
        if key not in Config.model_fields:
            near = nearest(str(key), Config.model_fields)
            hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(Config.model_fields)}"
            raise NextLatError(f"{key}: unknown key; {hint}")
    task, selected = rest.get("task"), rest.get("objective", "nextlat")
    if not isinstance(task, str) or not isinstance(selected, str):
        raise NextLatError(f"task and objective must be names, not {task!r} and {selected!r}")
    sections = rest.get("objectives") or {}
    if not isinstance(sections, dict):
        raise NextLatError(f"objectives is {sections!r}: it must map each objective's name to its options")
    sections = {**sections, selected: sections.get(selected)}
    find_objective(selected)
    rest["objectives"] = {
        str(name): validate(find_objective(str(name)).Options, section, f"objectives.{name}")
        for name, section in sections.items()
    }
    rest["data"] = validate(find_task(task).Options, rest.get("data"), "data")
    rest["evaluation"] = validate(EvaluationConfig, rest.get("evaluation"), "evaluation")
    for key, model in (("model", ModelConfig), ("training", TrainingConfig)):
        rest[key] = validate(model, rest.get(key), key)
    return validate(Config, rest)


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Read, override, check and name a configuration.

    Args:
        source: packaged name or path to a YAML file.
        overrides: ``key=value`` texts.
    """
    data, label = read_config(source)
    return _named(data, label, read_overrides(overrides))


def _named(data: Mapping[str, Any], label: str, overrides: Mapping[str, Any]) -> Config:
    config = resolve(apply_overrides(data, overrides))
    if config.name is None:
        config = config.model_copy(update={"name": run_name(label, config, overrides)})
    return config


_NOT_IN_NAMES = {"objective", "seed", "name", "training.device", "training.track", "sweep"}
_SHORT_IN_NAMES = ("model.", "data.", "training.", "objective.")
_LONGEST_NAME = 120


def run_name(label: str, config: Config, overrides: Mapping[str, Any]) -> str:
    """``path_star-mini-nextlat-s0``, followed by what was overridden: ``-horizon4-steps500``."""
    changed = [
        (key.rsplit(".", 1)[-1] if key.startswith(_SHORT_IN_NAMES) else key) + str(overrides[key])
        for key in sorted(overrides.keys() - _NOT_IN_NAMES)
    ]
    parts = [label, config.objective, f"s{config.seed}", *changed]
    name = "-".join(re.sub(r"[^\w.+-]", "_", part) for part in parts)
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}-{config.hash()}"


def read_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """``key=a,b`` and ``key=0..9`` texts as a grid of value lists."""
    grid: dict[str, list[Any]] = {}
    for key, value in map(split_override, texts):
        span = _range(key, value)
        if span is not None:
            grid[key] = span
        elif "," in value and not value.startswith(("[", "{")):
            grid[key] = [read_yaml(part, key) for part in value.split(",")]
        else:
            grid[key] = [read_yaml(value, key)]
    return grid


def _range(key: str, value: Any) -> list[Any] | None:
    """The numbers of ``0..9``; ``None`` for anything else."""
    span = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", value) if isinstance(value, str) else None
    if span is None:
        return None
    first, last = int(span[1]), int(span[2])
    if last < first:
        raise NextLatError(f"{key}={value} is an empty range; write the smaller number first")
    return list(range(first, last + 1))


def flatten(grid: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Nested grid keys as dotted ones; a single value is a list of one, ``0..9`` a list of ten."""
    for key, value in grid.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, list) else _range(key, value) or [value]


def expand(source: str, overrides: Sequence[str] = ()) -> list[Config]:
    """Every run of a sweep: the YAML's grids, each crossed with the grid on the command line.

    ``objective.KEY`` is left out for objectives that have no such key, and runs that become equal that way
    are made once.
    """
    data, label = read_config(source)
    grids = data.get("sweep") or [{}]
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise NextLatError(f"sweep: in {source} must be a list of grids, each a mapping of keys to lists of values")
    line = read_grid(overrides)
    configs: dict[str, Config] = {}
    for grid in grids:
        axes = {**dict(flatten(grid)), **line}
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            objective = point.get("objective", data.get("objective", "nextlat"))
            point = {key: value for key, value in point.items() if _applies(key, objective)}
            config = _named({**data, "sweep": []}, label, point)
            configs.setdefault(config.hash(), config)
    names = [str(config.name) for config in configs.values()]
    clash = next((name for name in names if names.count(name) > 1), None)
    if clash:
        raise NextLatError(f"two runs of the sweep would be named {clash!r}; leave name= out, or sweep over it")
    return list(configs.values())


def _applies(key: str, objective: str) -> bool:
    if not key.startswith("objective."):
        return True
    from nextlat.objectives import OBJECTIVES, find_objective

    option = key.split(".")[1]
    if not any(option in other.Options.model_fields for other in OBJECTIVES.values()):
        raise unknown(
            "key of an objective", key, (f"objective.{k}" for o in OBJECTIVES.values() for k in o.Options.model_fields)
        )
    return option in find_objective(objective).Options.model_fields
