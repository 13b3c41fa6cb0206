"""Missing, extra, misshapen and unreadable tensors: each is named, equal ones are told once."""

from collections import namedtuple
from pathlib import Path

from framework.checkpoint.index import Index, TensorInfo
from framework.checkpoint.ledger import settle

Spec = namedtuple("Spec", "name shape dtypes", defaults=[(4, 8), ("F32",)])
FILE = Path("model.safetensors")


def index(names, container="safetensors", **dtypes):
    held = {name: TensorInfo(name, FILE, 0, 128, dtypes.get(name.replace(".", "_"), "F32"), (4, 8)) for name in names}
    return Index(Path("m"), container, held)


def expected(names):
    return {name.rpartition(".")[0]: [Spec(name)] for name in names}


def layer(count, part):
    return [f"model.layers.{i}.{part}.weight" for i in range(count)]


def never(name):
    return None


def test_an_account_that_closes_has_no_problems():
    names = layer(3, "mlp.up_proj")
    ledger = settle(
        index([*names, "rotary.inv_freq"]),
        expected(names),
        lambda name: "computed" if "inv" in name else None,
    )
    assert ledger.problems == () and ledger.missing == () and ledger.unexpected == ()
    assert ledger.consumed == {name: name.removesuffix(".weight") for name in names}
    assert ledger.ignored == (("rotary.inv_freq", "computed"),)


def test_a_removed_a_renamed_and_an_extra_tensor_are_all_named_with_their_nearest_names():
    names = [*layer(4, "mlp.up_proj"), *layer(4, "mlp.down_proj")]
    held = [
        name
        for name in names
        if name not in ("model.layers.2.mlp.up_proj.weight", "model.layers.3.mlp.down_proj.weight")
    ]
    ledger = settle(index([*held, "model.layers.3.mlp.down_prj.weight", "model.extra"]), expected(names), never)
    assert set(ledger.missing) == {"model.layers.2.mlp.up_proj.weight", "model.layers.3.mlp.down_proj.weight"}
    assert set(ledger.unexpected) == {"model.layers.3.mlp.down_prj.weight", "model.extra"}
    told = {
        (p.code, name)
        for p in ledger.problems
        for name in (*ledger.missing, *ledger.unexpected)
        if p.what.endswith(name)
    }
    assert told == {("tensor-missing", name) for name in ledger.missing} | {
        ("tensor-unexpected", name) for name in ledger.unexpected
    }
    renamed = next(p for p in ledger.problems if "layers.3.mlp.down_proj" in p.what)
    assert "model.layers.3.mlp.down_prj.weight" in renamed.why and "typing error" in renamed.fix
    extra = next(p for p in ledger.problems if "down_prj" in p.what)
    assert "model.layers.3.mlp.down_proj.weight" in extra.why


def test_what_differs_only_in_layer_numbers_is_one_problem_with_a_count_and_an_example():
    ledger = settle(index(["model.x"]), expected(["model.x", *layer(40, "mlp.up_proj")]), never)
    (problem,) = ledger.problems
    assert "40 tensors" in problem.what and "model.layers.*.mlp.up_proj.weight" in problem.what
    assert "model.layers.0.mlp.up_proj.weight" in problem.why
    assert len(ledger.missing) == 40


def test_a_checkpoint_of_another_model_does_not_flood_the_screen():
    ledger = settle(
        index([f"a.{word}{i}.weight" for i in range(40) for word in "pqr"]),
        expected([f"b.{word}{i}.weight" for i in range(40) for word in "stu"]),
        never,
    )
    assert len(ledger.problems) < 30
    assert "others of" in " ".join(p.what for p in ledger.problems)


def test_a_wrong_shape_says_both_shapes():
    ledger = settle(index(["a.weight"]), {"a": [Spec("a.weight", (8, 8))]}, never)
    assert ledger.problems[0].code == "tensor-shape"
    assert "[4, 8]" in ledger.problems[0].why and "[8, 8]" in ledger.problems[0].why


def test_an_integer_weight_where_floats_are_needed_is_refused():
    ledger = settle(index(["a.weight"], a_weight="I8"), expected(["a.weight"]), never)
    assert ledger.problems[0].code == "tensor-dtype" and "I8" in ledger.problems[0].what


def test_ggml_types_that_nobody_can_dequantize_are_told_with_their_number():
    held = index(["a.weight", "b.weight", "c.weight"], "gguf", a_weight="Q1_0", b_weight="Q1_0", c_weight="type 99")
    ledger = settle(held, expected(["a.weight", "b.weight", "c.weight"]), never)
    assert [p.code for p in ledger.problems] == ["gguf-type", "gguf-type"]
    assert "2 tensors of type 41 (Q1_0)" in ledger.problems[0].what and "type 99" in ledger.problems[1].what
    assert "F32" in ledger.problems[0].why
