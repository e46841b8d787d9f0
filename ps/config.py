"""The part of a job that the parameter server acts on, and how text becomes configuration.

A job is a nested mapping: a YAML file, dotted overrides (`optimizer.lr=1e-3`), defaults. Every
section is frozen and refuses unknown keys; every error is one line that names the key, the value,
what is allowed and the nearest right name. The whole job, with the workers' sections, is
`workers.config.JobConfig`; the coordinator hands it to the other roles as JSON.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ps.errors import ConfigError
from ps.types import MAX_SLOTS, WireDtype
from ps.wording import in_a_jobs_words

Probability = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


def _auto_is_none(value: Any) -> Any:
    return None if value == "auto" else value


_STEPS = re.compile(r"(\d{1,15}):(\d{1,15})")


def _some_steps(value: Any) -> Any:
    if value is None or value == "":
        return ""
    found = _STEPS.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError("write it as first:end, such as 10:15 for the steps 10 to 14")
    first, end = map(int, found.groups())
    if first >= end:
        raise ValueError(
            f"these are no steps: the end is not one of them, so write {first}:{first + 1} for step {first}"
        )
    return value


#: Steps as first:end, without the end; empty: none.
SomeSteps = Annotated[str, BeforeValidator(_some_steps)]
#: A number that is computed at the first start when it is `auto` (or left out).
AutoInt = Annotated[int | None, BeforeValidator(_auto_is_none)]


class Section(BaseModel):
    """A part of a job: frozen, strict about names, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ClusterConfig(Section):
    shards: int = Field(2, ge=1, le=1024)
    """Shard processes."""
    standbys: int = Field(0, ge=0, le=1)
    """Processes per shard that hold the same state and take over when it dies: no step is lost. They double the memory
    of the shards, and a step waits until they have what it reduced."""
    workers: int = Field(2, ge=1, le=4096)
    """Worker processes at the start; more may join and any may leave."""
    threads_per_shard: AutoInt = Field(None, ge=1, le=256)
    """Kernel threads in each shard. auto: the cores of its host, shared among the run's shards there. Results do not
    depend on it."""


class BatchConfig(Section):
    micro_batch_size: int = Field(2, ge=1)
    """Samples in one forward/backward."""
    micro_batches_per_step: int = Field(4, ge=1, le=MAX_SLOTS)
    """G: micro-batches in one optimizer step, over all workers."""
    contributions_per_step: AutoInt = Field(None, ge=1, le=MAX_SLOTS)
    """C: units of work in a step. auto: the number of workers at the first start, at most G."""


class TrainingConfig(Section):
    steps: int = Field(400, ge=1)
    """Optimizer steps of the whole run; the schedule ends here."""
    stop_at: int | None = Field(None, ge=1)
    """Checkpoint and stop after this many steps; `windlass resume` goes on."""
    target_loss: float | None = Field(None, gt=0)
    """Stop when the held-out loss, in nats per token, is at most this."""
    step_timeout_s: Positive = 600.0
    """A contribution that is not complete so long after it was dealt is given to somebody else."""
    eager: bool = True
    """Where nothing global is to be decided (wire BF16 or FP32, no clipping) update chunks as they are reduced."""

    @property
    def end(self) -> int:
        """The version at which this start of the run ends."""
        return min(self.steps, self.stop_at or self.steps)


class EvaluationConfig(Section):
    every_steps: int = Field(200, ge=0)
    """Evaluate the held-out part every so many steps, and at the end; 0: only at the end."""
    max_sequences: int = Field(256, ge=1)
    """At most so many held-out sequences, spread evenly over the held-out part."""


class LossScaleConfig(Section):
    """DeepSpeed's dynamic loss scaler; used with FP16 on the wire."""

    static: NonNegative = 0.0
    """A fixed loss scale; 0: dynamic."""
    initial_power: int = Field(16, ge=0, le=32)
    """The dynamic scale starts at 2 to the power of this."""
    window: int = Field(1000, ge=1)
    """Steps without overflow before the scale doubles."""
    hysteresis: int = Field(2, ge=1)
    """So many overflows halve the scale."""
    consecutive_hysteresis: bool = False
    """Refill the hysteresis at every step without overflow."""
    minimum: Positive = 1.0
    """The scale never falls below this."""


class PrecisionConfig(Section):
    compute: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Forward and backward. auto: on CUDA the wire's dtype, FP32 elsewhere."""
    wire: WireDtype = WireDtype.FP16
    """Gradients up and weights down."""
    accumulate: Literal["fp32", "fp16"] = "fp32"
    """In what gradients add up over the slots of a contribution; fp16 needs compute=fp16."""
    loss_scale: LossScaleConfig = LossScaleConfig()


class OptimizerConfig(Section):
    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """adamw: decoupled decay. adam and sgd: L2 in the gradient."""
    lr: NonNegative = 1.5e-3
    """Peak learning rate."""
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment."""
    eps: Positive = 1e-8
    """Adam's, added to the root of the second moment."""
    weight_decay: NonNegative = 0.1
    """For matrices; norms, biases and embeddings have none unless `decay_all`."""
    decay_all: bool = False
    """Apply the weight decay to every parameter."""
    momentum: Probability = 0.9
    """SGD only."""
    dampening: NonNegative = 0.0
    """SGD only; skips the first applied step."""
    nesterov: bool = False
    """SGD only; needs a momentum and no dampening."""
    clip_norm: NonNegative = 1.0
    """Clip the global gradient norm to this; 0: never."""

    @property
    def moment_names(self) -> tuple[str, ...]:
        """The arrays of optimizer state, one FP32 number per parameter each."""
        if self.name == "sgd":
            return ("momentum_buffer",) if self.momentum else ()
        return ("exp_avg", "exp_avg_sq")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == "sgd" and self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs momentum > 0 and dampening = 0")
        return self


class ScheduleConfig(Section):
    name: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = Field(20, ge=0)
    """Committed steps over which the learning rate rises linearly from 0."""
    min_ratio: float = Field(0.1, ge=0, le=1)
    """linear, cosine: the last learning rate, as a part of the peak."""


class CheckpointConfig(Section):
    every_steps: int = Field(0, ge=0)
    """Write one every so many steps; one is always written at the start and at the end."""
    keep: int = Field(3, ge=1)
    """Complete checkpoints that are kept."""
    dir: Path | None = None
    """One storage for all shards and the coordinator. Default: RUN/checkpoints."""
    timeout_s: Positive = 600.0
    """Writing or loading one may take so long."""


class JournalConfig(Section):
    """What shards write down with durability=journal, each on its own host."""

    dir: Path | None = None
    """A folder of this host, with one for each shard in it. Default: RUN/journals."""
    max_bytes: AutoInt = Field(None, ge=1)
    """A shard's journal that is longer than this asks for a checkpoint. auto: 32 steps, at least 256 MiB."""


class MembershipConfig(Section):
    lease_s: float = Field(10.0, ge=0.5)
    """A silent member counts as dead after this."""
    reconnect_grace_s: NonNegative = 0.3
    """A worker whose stream broke may be back within this before its work is dealt again."""
    start_timeout_s: Positive = 120.0
    """Everybody who is needed for the first step must have come within this."""
    min_workers: int = Field(1, ge=1, le=4096)
    """With fewer live workers no more work is dealt: the run waits."""
    max_workers: int | None = Field(None, ge=1, le=4096)
    """At most so many are dealt work, those of the lowest ranks; more are spares that take over. null: no bound."""
    balance: Literal["even", "speed"] = "even"
    """Contributions are dealt evenly, or by the speed that each worker has shown."""
    duplicate_late: bool = True
    """Give a contribution that is late to another worker as well; the first result stands."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_workers is not None and self.max_workers < self.min_workers:
            raise ValueError(f"max_workers={self.max_workers} is less than min_workers={self.min_workers}")
        return self


class TelemetryConfig(Section):
    metrics: bool = True
    """Serve Prometheus metrics on a port of its own."""
    metrics_host: str = "127.0.0.1"
    """The address that the metrics port binds."""


class TraceConfig(Section):
    """A timeline of some steps, of all roles in one file: RUN/trace.json."""

    steps: SomeSteps = ""
    """first:end, such as 10:15 for the steps 10 to 14. Empty: no timeline."""

    @property
    def range(self) -> range:
        """The steps that are traced."""
        return range(*map(int, self.steps.split(":"))) if self.steps else range(0)


class SecurityConfig(Section):
    certificates: Path | None = None
    """A folder from `windlass certs init`: every connection is TLS, and each role shows its certificate."""
    insecure: bool = False
    """Serve other hosts without certificates: only for a network that you trust."""


class RunConfig(Section):
    """What the coordinator and the shards need to know of a job."""

    run_dir: Path = Path("runs/default")
    """Everything that the run writes."""
    seed: int = Field(1, ge=0, lt=2**63)
    """Initial values, order of samples and dropout follow from it."""
    determinism: Literal["alarm", "strict"] = "alarm"
    """When a contribution is computed twice with different bits: count and warn, or refuse."""
    durability: Literal["checkpoint", "journal"] = "checkpoint"
    """What a shard that died comes back from: the newest checkpoint, to which the whole run goes back with it; or that
    and its own journal of reduced gradients, without losing a step."""
    cluster: ClusterConfig = ClusterConfig()
    batch: BatchConfig = BatchConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    journal: JournalConfig = JournalConfig()
    membership: MembershipConfig = MembershipConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    trace: TraceConfig = TraceConfig()
    security: SecurityConfig = SecurityConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        contributions = self.batch.contributions_per_step
        if contributions is not None and contributions > self.batch.micro_batches_per_step:
            raise ValueError(
                f"batch.contributions_per_step={contributions} is more than "
                f"batch.micro_batches_per_step={self.batch.micro_batches_per_step}"
            )
        if self.trace.steps and self.trace.range.start >= self.training.steps:
            raise ValueError(
                f"trace.steps={self.trace.steps}: the run has the steps 0 to {self.training.steps - 1} "
                f"(training.steps={self.training.steps})"
            )
        if self.precision.accumulate == "fp16" and self.precision.compute not in ("auto", "fp16"):
            raise ValueError("precision.accumulate=fp16 needs precision.compute=fp16")
        if self.durability != "journal" and (self.journal.dir is not None or self.journal.max_bytes is not None):
            given = f"dir={self.journal.dir}" if self.journal.dir is not None else f"max_bytes={self.journal.max_bytes}"
            raise ValueError(
                f"journal.{given} does nothing with durability={self.durability}: set durability=journal, or leave it "
                "out (journal.dir=null, journal.max_bytes=auto)"
            )
        scaled = self.precision.wire is WireDtype.FP16 or self.precision.loss_scale.static > 0
        if self.precision.compute == "fp16" and not scaled:
            raise ValueError(
                f"precision.compute=fp16 needs a loss scale, which precision.wire={self.precision.wire} does not "
                "carry: set precision.wire=fp16, or a precision.loss_scale.static"
            )
        return self

    @property
    def doubts(self) -> list[str]:
        """What the run may wait for in vain, if nobody does what it is meant for."""
        found = []
        if self.membership.min_workers > self.cluster.workers:
            found.append(
                f"membership.min_workers={self.membership.min_workers} is more than cluster.workers="
                f"{self.cluster.workers}: nothing is computed until others join (windlass worker --coordinator "
                "HOST:PORT)"
            )
        if self.contributions < self.cluster.workers:
            found.append(
                f"cluster.workers={self.cluster.workers} is more than the contributions of a step: only "
                f"{self.contributions} of them compute at a time, the others are spares. A run keeps "
                f"batch.contributions_per_step={self.contributions} from its beginning; give more for more workers"
            )
        return found

    @property
    def is_eager(self) -> bool:
        """Whether steps need no decision before their updates: no norm to clip by, and FP16 nowhere to overflow."""
        half = self.precision.wire is WireDtype.FP16 or self.precision.compute == "fp16"
        return self.training.eager and not half and not self.optimizer.clip_norm

    @property
    def run_name(self) -> str:
        """What metrics call the run: the name of its folder, which is what people know it by."""
        return self.run_dir.name or "run"

    @property
    def traced_steps(self) -> range:
        """The steps of this start of the run that are traced."""
        return range(self.trace.range.start, min(self.trace.range.stop, self.training.end))

    @property
    def checkpoint_dir(self) -> Path:
        return self.checkpoint.dir or self.run_dir / "checkpoints"

    def journal_dir(self, shard: int) -> Path:
        """Where a shard writes its journal."""
        return (self.journal.dir or self.run_dir / "journals") / f"shard-{shard:05d}"

    @property
    def contributions(self) -> int:
        """C: as asked for, or one per worker, at most one per micro-batch."""
        batch = self.batch
        return batch.contributions_per_step or min(self.cluster.workers, batch.micro_batches_per_step)


Config = TypeVar("Config", bound=Section)


def parse_override(text: str) -> tuple[str, Any]:
    """Split `a.b=value`; the value is read as YAML, so lists and numbers look as in a job file."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text!r} is not of the form key=value, such as optimizer.lr=1e-3")
    try:
        return key.strip(), _load_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={value}: not a YAML value: {_yaml_mistake(error)}") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string and 10:15 as a number to the base of 60; people mean a number and a text.

    Of equal keys it forgets the first; they meant both.
    """

    # Not while it is constructed: by then `<<` has laid other mappings' keys under this one's.
    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _DuplicateKey(f"{key.value} is there twice, in lines {lines[key.value]} and {line}; make it one")
            lines[key.value] = line
        return node


class _DuplicateKey(yaml.YAMLError):
    """A mapping has the same key twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
for _digit in "-+0123456789":
    # First: the first that matches decides.
    _to_base_60 = ("tag:yaml.org,2002:str", re.compile(r"[-+]?\d[\d_]*(:\d+)+(\.\d*)?$"))
    _Loader.yaml_implicit_resolvers[_digit].insert(0, _to_base_60)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _yaml_mistake(error: yaml.YAMLError) -> str:
    """What is wrong with a text, and where, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None:
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + error.problem + (f" ({error.context})" if error.context else "")


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Lay nested `overrides` over `base`."""
    merged = dict(base)
    for key, value in overrides.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def load_mapping(path: Path) -> dict[str, Any]:
    """Read a job file (YAML or JSON)."""
    try:
        loaded = _load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no job file {path}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the job file {path} cannot be read: {_yaml_mistake(error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the job file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"the job file {path} holds a {type(loaded).__name__}, not a mapping of sections")
    return loaded


def nest(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Turn dotted keys into a nested mapping; later ones win."""
    nested: dict[str, Any] = {}
    for key, value in pairs:
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = merge(nested, value)
    return nested


def validate(model: type[Config], mapping: Mapping[str, Any]) -> Config:
    """Build a configuration.

    Raises:
        ConfigError: one line for the first mistake, with the key, the value, what is allowed
            and, for an unknown key, the nearest right name.
    """
    try:
        return model.model_validate(mapping)
    except ValidationError as error:
        raise ConfigError(_explain(model, error)) from None


def from_json(model: type[Config], text: str) -> Config:
    """Read a resolved job, keeping to the sections that `model` has."""
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the resolved job is not JSON: {error}") from None
    known = {key: value for key, value in mapping.items() if key in model.model_fields}
    return validate(model, known)


def _explain(model: type[Section], error: ValidationError) -> str:
    details = error.errors(include_url=False)
    # An unknown key is the most useful thing to hear first: it may explain the rest.
    first = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    location = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        return _unknown_key(model, location)
    key, reason = in_a_jobs_words(model, first)
    value = first["input"]
    if not key:
        return reason
    if isinstance(value, Mapping):
        return reason if reason.startswith(f"{key}.") else f"{key}: {reason}"
    return f"{key}={'null' if value is None else value}: {reason}"


def _unknown_key(model: type[Section], location: Sequence[str]) -> str:
    names = field_names(model)
    key = ".".join(location)
    section = ".".join(location[:-1])
    siblings = [name for name in names if name.rpartition(".")[0] == section]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    near = near or [name for name in names if name.rpartition(".")[2] == location[-1]][:1]
    hint = f"; did you mean {near[0]}?" if near else ""
    # A name that is only somewhat alike is a guess: then the sections help.
    if not section and near and (near[0].endswith(f".{key}") or difflib.get_close_matches(key, near, cutoff=0.7)):
        return f"{key} is not a key{hint}"
    allowed = ", ".join(siblings) if siblings else "no keys"
    where = f"{section} has" if section else "a job has"
    return f"{key} is not a key{hint} ({where}: {allowed})"


def field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted names of a configuration, sections included."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names.extend(field_names(kind, f"{prefix}{name}."))
    return names
