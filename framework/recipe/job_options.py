"""The options of each job, typed, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from framework.recipe.schema import Auto, Messages, OutputFormat


@dataclass(frozen=True, slots=True)
class Generate:
    """Prompts to streamed text and results.jsonl."""

    prompts: tuple[str | Messages, ...] = field(default=(), metadata={"examples": [["The capital of France is"]]})
    """Texts, or lists of chat messages ({role, content})."""
    prompt_file: str | None = field(default=None, metadata={"path": True})
    """A file of prompts: .txt, one a line, or .jsonl with `prompt` or `messages`."""
    max_new_tokens: int = field(default=64, metadata={"minimum": 1})
    """Tokens to generate for a prompt, at most."""
    temperature: float = field(default=0.0, metadata={"minimum": 0})
    """0 is greedy."""
    top_k: int = field(default=0, metadata={"minimum": 0})
    """Sample from the k likeliest tokens; 0: all."""
    top_p: float = field(default=1.0, metadata={"above": 0, "maximum": 1})
    """Sample from the likeliest tokens that together have this probability."""
    min_p: float = field(default=0.0, metadata={"minimum": 0, "maximum": 1})
    """Drop tokens less likely than this share of the likeliest."""
    repetition_penalty: float = field(default=1.0, metadata={"above": 0})
    """Above 1: tokens that were seen become less likely."""
    stop: tuple[str | int, ...] = ()
    """Texts or token ids that end an answer."""
    logprobs: int = field(default=0, metadata={"minimum": 0})
    """Log probabilities of this many tokens a position in results.jsonl."""
    chat: bool | Auto = "auto"
    """Render prompts by the chat template; auto: where the model has one."""


@dataclass(frozen=True, slots=True)
class Check:
    """The recipe against headers and tables; no torch, no Ray."""

    format: OutputFormat = "text"
    """What is written to standard output."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Scheme per layer, shard per rank, bytes per device, roofline; no torch, no Ray."""

    format: OutputFormat = "text"
    """What is written to standard output."""
    html: str | None = field(default=None, metadata={"path": True})
    """Draw the plan into this file."""
    against: str | None = field(default=None, metadata={"path": True})
    """Another plan.json: show the difference."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """What a diffusion pipeline draws, and how. null: the pipeline's default."""

    prompts: tuple[str, ...] = field(default=(), metadata={"examples": [["a cat on a roof"]]})
    """What to draw."""
    prompt_file: str | None = field(default=None, metadata={"path": True})
    """A .txt file of prompts, one a line."""
    labels: tuple[int, ...] = field(default=(), metadata={"minimum": 0})
    """Classes to draw, for class-conditional models."""
    image: str | None = field(default=None, metadata={"path": True})
    """The picture that a video begins with, for image-to-video models."""
    negative_prompt: str | None = None
    """What not to draw."""
    steps: int | None = field(default=None, metadata={"minimum": 1})
    """Denoising steps."""
    guidance: float | None = field(default=None, metadata={"minimum": 0})
    """Guidance scale."""
    guidance_2: float | None = field(default=None, metadata={"minimum": 0})
    """Guidance scale of the second expert; null: the first one's."""
    true_guidance: float | None = field(default=None, metadata={"minimum": 0})
    """Flux: guidance by a second prediction, for a negative prompt."""
    height: int | None = field(default=None, metadata={"minimum": 1})
    """Pixels."""
    width: int | None = field(default=None, metadata={"minimum": 1})
    """Pixels."""
    frames: int | None = field(default=None, metadata={"minimum": 1})
    """Frames of a video."""
    scheduler: Literal["auto", "unipc", "flow_match_euler", "ddim"] = "auto"
    """The sampler; auto: the one that the pipeline ships."""
    flow_shift: float | None = field(default=None, metadata={"above": 0})
    """How far the steps of a flow sampler lean to the noisy end."""
    cache_threshold: float | None = field(default=None, metadata={"above": 0})
    """A step whose first block moves less than this share from the last one's reuses what the other blocks added then
    (diffusers' first block cache); null: every step is computed."""


@dataclass(frozen=True, slots=True)
class Verify(Drawing):
    """Logits, or latents and pictures, against a reference file or another recipe."""

    reference: str | None = field(default=None, metadata={"path": True})
    """A .npz or .safetensors file: token ids and logits, or final latents and pictures with their settings."""
    logits_key: str | None = None
    """Which logits of the file, where it holds several."""
    against: str | None = field(default=None, metadata={"recipe": True})
    """Another recipe, by name or path."""
    metric: Literal["max_abs", "rel_l2"] = "max_abs"
    """The distance that is held against the tolerance."""
    tolerance: float | None = field(default=None, metadata={"minimum": 0})
    """Largest distance; null: 1e-3 (float32) or 5e-2 (else) of the reference's largest absolute logit or latent."""
    frames_tolerance: float = field(default=1 / 255, metadata={"minimum": 0})
    """Largest distance of a value of a picture, of 0 to 1."""
    min_top1: float = field(default=0.0, metadata={"minimum": 0, "maximum": 1})
    """Smallest share of positions with the same likeliest token."""
    per_module: bool = False
    """Name the first module whose output leaves the tolerance."""
    format: OutputFormat = "text"
    """What is written to standard output."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Time to first token, prefill and decode speed, load time, bytes per rank."""

    prompt_tokens: int = field(default=512, metadata={"minimum": 1})
    """Tokens of a prompt."""
    new_tokens: int = field(default=64, metadata={"minimum": 1})
    """Tokens to generate."""
    batch_sizes: tuple[int, ...] = field(default=(1, 4, 8), metadata={"minimum": 1})
    """Sequences at once."""
    format: OutputFormat = "text"
    """What is written to standard output."""


@dataclass(frozen=True, slots=True)
class Render(Drawing):
    """Prompts or labels to pictures or video, and results.jsonl."""

    fps: int = field(default=16, metadata={"minimum": 1})
    """Frames a second of a video."""
    num_outputs: int = field(default=1, metadata={"minimum": 1})
    """Outputs of a prompt or label; each has the next seed."""


@dataclass(frozen=True, slots=True)
class Quantize:
    """A float checkpoint to one in ModelSlim's layout, by the recipe's schemes; round to nearest."""

    output: str | None = field(default=None, metadata={"path": True})
    """The folder to write, which must not exist."""


@dataclass(frozen=True, slots=True)
class Repack:
    """What msModelSlim wrote of an original Wan model, into the diffusers layout."""

    model_type: Literal["auto", "Wan2.1", "Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B", "Wan2.2-TI2V-5B"] = "auto"
    """Which model it is; auto: as many transformers as the float pipeline has."""
    original: str | None = field(default=None, metadata={"path": True})
    """The float pipeline in the diffusers layout."""
    quantized: str | None = field(default=None, metadata={"path": True})
    """The folder that msModelSlim wrote."""
    output: str | None = field(default=None, metadata={"path": True})
    """The folder to write, which must not exist."""


@dataclass(frozen=True, slots=True)
class Doctor:
    """Versions, devices, what does not fit together and the fix."""

    format: OutputFormat = "text"
    """What is written to standard output."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """The whole support table."""

    format: OutputFormat = "text"
    """What is written to standard output."""


@dataclass(frozen=True, slots=True)
class Schema:
    """JSON Schema of a recipe."""


@dataclass(frozen=True, slots=True)
class Serve:
    """An OpenAI-compatible HTTP server."""

    host: str = "127.0.0.1"
    """The address to listen at; any but a loopback one needs `api_key_file`."""
    port: int = field(default=8000, metadata={"minimum": 0, "maximum": 65535})
    """The port; 0: a free one, which the ready line tells."""
    model_id: str | None = None
    """The model's name in the API; null: the last part of the recipe's name."""
    api_key_file: str | None = field(default=None, metadata={"path": True})
    """A file of API keys, one a line; a request has to bring one of them."""
    replicas: int = field(default=1, metadata={"minimum": 1})
    """Deployments of the model behind the one address, each on ranks of its own."""
    max_queue: int = field(default=64, metadata={"minimum": 0})
    """Answers of a replica that may wait besides those that run; more are refused with 429."""
    max_body_mib: int = field(default=4, metadata={"minimum": 1})
    """Size of a request's body, at most."""
    drain_s: float = field(default=30.0, metadata={"minimum": 0})
    """Seconds that running answers get to end after Ctrl-C."""
    steps: int | None = field(default=None, metadata={"minimum": 1})
    """Denoising steps of a picture whose request says none; null: the pipeline's default."""
    guidance: float | None = field(default=None, metadata={"minimum": 0})
    """Guidance scale of a picture whose request says none; null: the pipeline's default."""
    max_pixels: int = field(default=1 << 20, metadata={"minimum": 1})
    """Height times width of a picture, at most."""


JOBS: dict[str, type] = {
    "generate": Generate,
    "render": Render,
    "serve": Serve,
    "check": Check,
    "plan": Plan,
    "verify": Verify,
    "bench": Bench,
    "quantize": Quantize,
    "repack": Repack,
    "matrix": Matrix,
    "doctor": Doctor,
    "schema": Schema,
}
WITHOUT_RECIPE = ("matrix", "doctor", "schema", "repack")
DEFAULT_JOB = {"llm": "generate", "diffusion": "render"}
# a job that makes one kind of thing; all others take both
KIND_OF_JOB = {"generate": "llm", "bench": "llm", "quantize": "llm", "render": "diffusion"}
