"""Small changes that make a checkpoint wrong, and what the command line says of it."""

import json
import re
import shutil

from framework.checkpoint.write import header_of
from tests.checkpoints import DESCRIPTION, GOLDEN, golden, stand_in

LAYER = "model.layers.0."
Q, DOWN = f"{LAYER}self_attn.q_proj", f"{LAYER}mlp.down_proj"


def of(seed, *changes):
    """A maker of the checkpoint `seed()` with changes: each takes the checkpoint and alters it."""

    def make(folder):
        checkpoint = seed()
        for change in changes:
            change(checkpoint)
        return checkpoint.write(folder)

    return make


def held(format_name, scheme, *config, **options):
    """A stand-in, as a seed and as a maker of itself."""
    return lambda *folder: _seed(stand_in(format_name, scheme, *config, **options), *folder)


def tools(name):
    """What a quantizer wrote, as a seed."""
    return lambda: golden(name)


def _seed(checkpoint, folder=None):
    return checkpoint if folder is None else checkpoint.write(folder)


def drop(pattern):
    """Without the tensors that match."""

    def change(checkpoint):
        gone = [name for name in checkpoint.tensors if re.fullmatch(pattern, name)]
        assert gone
        for name in gone:
            del checkpoint.tensors[name]

    return change


def put(name, dtype, *shape):
    return lambda checkpoint: checkpoint.tensors.update({name: (dtype, shape)})


def rename(old, new):
    return lambda checkpoint: checkpoint.tensors.update({new: checkpoint.tensors.pop(old)})


def retype(name, dtype):
    return lambda checkpoint: checkpoint.tensors.update({name: (dtype, checkpoint.tensors[name][1])})


def config(**given):
    return lambda checkpoint: checkpoint.config.update(given)


def without(*keys):
    return lambda checkpoint: [checkpoint.config.pop(key) for key in keys]


def quantization(**given):
    """Other settings in what declares the quantization."""
    return lambda checkpoint: checkpoint.declared.update(given)


def described(pattern, label):
    """Another value in the description, for every tensor that matches; None: no entry."""

    def change(checkpoint):
        entries = checkpoint.documents[DESCRIPTION]
        names = [name for name in {**checkpoint.tensors, **entries} if re.fullmatch(pattern, name)]
        assert names
        for name in names:
            entries.pop(name, None)
            if label is not None:
                entries[name] = label

    return change


def document(name, content):
    return lambda checkpoint: checkpoint.documents.update({name: content})


def group(**given):
    """Other settings of compressed-tensors' first group."""
    return lambda checkpoint: next(iter(checkpoint.declared["config_groups"].values())).update(given)


def weights(**given):
    """Other settings of the weights of compressed-tensors' first group."""
    return lambda checkpoint: next(iter(checkpoint.declared["config_groups"].values()))["weights"].update(given)


def damaged(seed, damage, **options):
    """A maker of the checkpoint whose files `damage(folder)` alters once they are written."""

    def make(folder):
        damage(seed().write(folder, **options))
        return folder

    return make


def copied(name, damage=None):
    """A maker of a copy of a golden folder or file."""

    def make(folder):
        shutil.copytree(GOLDEN / name, folder)
        if damage:
            damage(folder)
        return folder

    return make


def indexed(change):
    """Alter the weight map of a checkpoint of several files."""

    def damage(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def replaced(name, old, new):
    """Other bytes in a file, as many."""
    assert len(old) == len(new)

    def damage(folder):
        raw = (folder / name).read_bytes()
        assert old in raw
        (folder / name).write_bytes(raw.replace(old, new, 1))

    return damage


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def twice(folder):
    """A second file that holds a tensor of the first."""
    header, size = header_of([("model.norm.weight", "BF16", (256,))])
    (folder / "more.safetensors").write_bytes(header + bytes(size))


class Said:
    """What one check ended with: its exit status, its problems as they were shown, all of its text."""

    def __init__(self, status, text):
        self.status, self.text = status, text
        blocks = re.split(r"(?m)^(?=error\[)", text)[1:]
        self.problems = [(re.match(r"error\[([a-z0-9-]+)\]", block)[1], block) for block in blocks]

    @property
    def codes(self):
        return sorted(code for code, _ in self.problems)


def expect(said, status, codes, words):
    """Exactly these problems, each with a way out, and the words somewhere in them."""
    assert "Traceback" not in said.text
    problems = "".join(block for _, block in said.problems) or said.text
    assert (said.status, " ".join(said.codes)) == (status, " ".join(sorted(codes.split()))), problems
    for _, block in said.problems:
        assert re.search(r"(?m)^  fix    \S", block), block
    shown = " ".join("".join(block for _, block in said.problems).split())
    for word in words:
        assert word in shown, problems
