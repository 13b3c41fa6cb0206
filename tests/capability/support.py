"""The published support table and our rows, typed by hand; nothing here is read from conf/capability."""

from functools import cache

from framework.capability.table import read_table
from framework.recipe.compose import conf_dir

TIERS = ("a2", "a3", "a5")
POLICIES = ((), ("tbd",), ("wip",), ("wip", "tbd"))
STATUS = {"S": "supported", "U": "unsupported", "T": "tbd", "W": "wip", "-": None}

# id, format, scheme, layer type, a2, a3, a5, diffusion, mode
PUBLISHED = """
modelslim.w4a4_dynamic.linear           modelslim           w4a4_dynamic  linear  S S T S  offline
modelslim.w8a8_static.linear            modelslim           w8a8_static   linear  S S T S  offline
modelslim.w8a8_dynamic.linear           modelslim           w8a8_dynamic  linear  S S T S  offline
modelslim.mxfp8.linear                  modelslim           mxfp8         linear  U U S S  offline
modelslim.mxfp4.linear                  modelslim           mxfp4         linear  U U S S  offline
modelslim.w4a4_dynamic.moe              modelslim           w4a4_dynamic  moe     S S T U  offline
modelslim.w4a8_dynamic.moe              modelslim           w4a8_dynamic  moe     S S T U  offline
modelslim.w8a8_dynamic.moe              modelslim           w8a8_dynamic  moe     S S T U  offline
modelslim.mxfp8.moe                     modelslim           mxfp8         moe     U U W U  offline
awq.w4a16.linear                        awq                 w4a16         linear  S S T -  offline
awq.w8a16.linear                        awq                 w8a16         linear  S S T -  offline
awq.w4a16.moe                           awq                 w4a16         moe     S S T -  offline
gptq.w4a16.linear                       gptq                w4a16         linear  S S T -  offline
gptq.w8a16.linear                       gptq                w8a16         linear  S S T -  offline
gptq.w4a16.moe                          gptq                w4a16         moe     S S T -  offline
gptq.w8a16.moe                          gptq                w8a16         moe     S S T -  offline
auto_round.w4a16.linear                 auto_round          w4a16         linear  S S T -  offline
auto_round.w8a16.linear                 auto_round          w8a16         linear  S S T -  offline
auto_round.w4a16.moe                    auto_round          w4a16         moe     S S T -  offline
auto_round.w8a16.moe                    auto_round          w8a16         moe     S S T -  offline
compressed_tensors.w8a8_dynamic.linear  compressed_tensors  w8a8_dynamic  linear  S S T -  offline
compressed_tensors.w4a8_dynamic.moe     compressed_tensors  w4a8_dynamic  moe     S S T -  offline
compressed_tensors.w4a16.moe            compressed_tensors  w4a16         moe     S S T -  offline
compressed_tensors.w8a8_dynamic.moe     compressed_tensors  w8a8_dynamic  moe     S S T -  offline
gguf.all.linear                         gguf                float         linear  S S T -  offline
gguf.all.moe                            gguf                float         moe     S S T -  offline
diffusion.mxfp8.online                  none                mxfp8         linear  U U S S  online
diffusion.mxfp8.offline                 modelslim           mxfp8         linear  U U S S  offline
diffusion.w8a8_static.offline           modelslim           w8a8_static   linear  S S T S  offline
diffusion.w8a8_dynamic.offline          modelslim           w8a8_dynamic  linear  S S T S  offline
diffusion.w4a4_dynamic.offline          modelslim           w4a4_dynamic  linear  S S T S  offline
"""
OURS = """
none.float.linear                       none                float            linear  S S S S  offline
none.float.moe                          none                float            moe     S S S U  offline
gguf.w4a16.linear                       gguf                w4a16            linear  T T T -  offline
gguf.w8a16.linear                       gguf                w8a16            linear  T T T -  offline
modelslim.w8a16.linear                  modelslim           w8a16            linear  T T T U  offline
modelslim.w4a16.linear                  modelslim           w4a16            linear  T T T U  offline
modelslim.w4a16.moe                     modelslim           w4a16            moe     T T T U  offline
modelslim.w8a16.moe                     modelslim           w8a16            moe     T T T U  offline
modelslim.w4a8_dynamic.linear           modelslim           w4a8_dynamic     linear  T T T U  offline
modelslim.w8a8_mix.linear               modelslim           w8a8_mix         linear  T T T U  offline
modelslim.w4a8_mxfp.linear              modelslim           w4a8_mxfp        linear  U U T U  offline
modelslim.w4a8_mxfp.moe                 modelslim           w4a8_mxfp        moe     U U T U  offline
modelslim.mxfp4.moe                     modelslim           mxfp4            moe     U U T U  offline
modelslim.mxfp4_dualscale.linear        modelslim           mxfp4_dualscale  linear  U U T -  offline
compressed_tensors.w4a16.linear         compressed_tensors  w4a16            linear  T T T -  offline
compressed_tensors.w8a16.linear         compressed_tensors  w8a16            linear  T T T -  offline
compressed_tensors.w8a8_static.linear   compressed_tensors  w8a8_static      linear  T T T -  offline
compressed_tensors.w4a8_dynamic.linear  compressed_tensors  w4a8_dynamic     linear  T T T -  offline
compressed_tensors.w8a16.moe            compressed_tensors  w8a16            moe     T T T -  offline
awq.w8a16.moe                           awq                 w8a16            moe     T T T -  offline
online.w8a8_dynamic.linear              none                w8a8_dynamic     linear  T T T T  online
online.w8a8_dynamic.moe                 none                w8a8_dynamic     moe     T T T U  online
online.w4a16.linear                     none                w4a16            linear  T T T T  online
online.w4a16.moe                        none                w4a16            moe     T T T U  online
online.w8a16.linear                     none                w8a16            linear  T T T T  online
online.w8a16.moe                        none                w8a16            moe     T T T U  online
online.mxfp8.linear                     none                mxfp8            linear  U U T T  online
online.mxfp8.moe                        none                mxfp8            moe     U U T U  online
online.mxfp4.linear                     none                mxfp4            linear  U U T T  online
"""
# what SGLang 0.5.23 has otherwise: rows that differ or are new, and those that stand there under other ids
UPSTREAM = """
modelslim.mxfp8.moe                 modelslim           mxfp8            moe     U U S U  offline
modelslim.mxfp4_w4a8.linear         modelslim           w4a8_mxfp        linear  U U S U  offline
modelslim.mxfp4_w4a4.linear         modelslim           mxfp4            linear  U U W U  offline
modelslim.mxfp4_w4a4.moe            modelslim           mxfp4            moe     U U S U  offline
modelslim.mxfp4_w4a8.moe            modelslim           w4a8_mxfp        moe     U U T U  offline
online.mxfp8.linear                 none                mxfp8            linear  U U S S  online
online.mxfp8.moe                    none                mxfp8            moe     U U S -  online
online.mxfp4_w4a8.linear            none                w4a8_mxfp        linear  U U S -  online
online.mxfp4_w4a4.linear            none                mxfp4_dualscale  linear  U U S -  online
diffusion.mxfp4.online              none                mxfp4_dualscale  linear  U U T T  online
compressed_tensors.mxfp4_w4a8.moe   compressed_tensors  w4a8_mxfp        moe     U U T -  offline
"""
UPSTREAM_WITHOUT = ("modelslim.w4a8_mxfp.linear", "modelslim.w4a8_mxfp.moe", "modelslim.mxfp4.moe")
# modelslim.mxfp4.linear judges diffusion models only there, modelslim.mxfp4_w4a4.linear the language models
DIFFUSION_ONLY = {"default": (), "upstream-0.5.23": ("modelslim.mxfp4.linear",)}
MX = ("mxfp8", "mxfp4", "mxfp4_dualscale", "w4a8_mxfp")


def typed(text):
    """Rows of the literals above: id -> (format, scheme, layer type, {tier or diffusion: status}, mode)."""
    rows = {}
    for line in text.strip().splitlines():
        row, format_name, scheme, layer, *letters, mode = line.split()
        statuses = dict(zip((*TIERS, "diffusion"), (STATUS[letter] for letter in letters), strict=True))
        rows[row] = (format_name, scheme, layer, statuses, mode)
    return rows


DEFAULT = typed(PUBLISHED) | typed(OURS)
TABLES = {
    "default": DEFAULT,
    "upstream-0.5.23": {k: v for k, v in DEFAULT.items() if k not in UPSTREAM_WITHOUT} | typed(UPSTREAM),
}


@cache
def table(name="default"):
    """The table as the jobs read it."""
    return read_table(conf_dir() / "capability", name)


def for_llm(name):
    """The typed rows that judge language models."""
    return {
        row: given
        for row, given in TABLES[name].items()
        if not row.startswith("diffusion.") and row not in DIFFUSION_ONLY[name]
    }
