"""The `recipe://` config source: plain recipe files become what Hydra composes.

Hydra sees a group `recipe` whose options are the shipped recipes and, by absolute path, any file. The choices
that a recipe makes of hardware, cluster and job become `override` entries of a defaults list. What it says to
a choice is a config of its own, `recipe_<group>/<choice>/<recipe>`; conf/config.yaml lists it
with the choice as an interpolation. When the command line takes another choice, that config is not there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from framework.recipe.fields import mirror
from framework.recipe.job_options import JOBS
from framework.recipe.locate import recipes_dir, shipped_recipes
from framework.recipe.schema import GROUPS, SECTIONS
from framework.recipe.yaml_file import read_recipe_file

_OPTIONS = tuple(f"recipe_{group}/" for group in GROUPS)


class RecipeSource(ConfigSource):
    """Serves recipe files; `path` is the folder of the shipped ones."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme in front of the search path entry."""
        return "recipe"

    def available(self) -> bool:
        """Tell whether the folder is there."""
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        """Tell whether this is `recipe` or a folder of recipes."""
        if config_path in ("", "recipe"):
            return True
        return config_path.startswith("recipe/") and (Path(self.path) / config_path[7:]).is_dir()

    def is_config(self, config_path: str) -> bool:
        """Tell whether this is a recipe, or options that a recipe gives to a choice."""
        if config_path.startswith("recipe/"):
            return self._file(config_path[7:]).is_file()
        return bool(self._options(config_path))

    def load_config(self, config_path: str) -> ConfigResult:
        """Read and check the recipe; see the module's docstring for what Hydra gets.

        Raises:
            InputError: the recipe's problems.
        """
        if config_path.startswith("recipe/"):
            file = read_recipe_file(self._file(config_path[7:]))
            choices = [{f"override /{group}": choice} for group, choice in file.choices.items()]
            config: dict[str, Any] = {"defaults": ["_self_", *choices], **file.values}
        elif not (config := self._options(config_path)):
            raise ConfigLoadError(f"no recipe {config_path}")
        return ConfigResult(self.provider, f"recipe://{self.path}", OmegaConf.create(config), {"package": "_global_"})

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List groups and recipes, as Hydra's help and completion want them."""
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else ["recipe"]
        folder = Path(self.path) / config_path.removeprefix("recipe").lstrip("/")
        found: set[str] = set()
        for path in folder.iterdir():
            if path.is_dir() and results_filter != ObjectType.CONFIG:
                found.add(path.name)
            if path.suffix == ".yaml" and results_filter != ObjectType.GROUP:
                found.add(path.stem)
        return sorted(found)

    def _file(self, name: str) -> Path:
        path = Path(self.path) / name  # an absolute name wins
        return path if path.suffix == ".yaml" else path.with_name(path.name + ".yaml")

    def _options(self, config_path: str) -> dict[str, Any]:
        for prefix, group in zip(_OPTIONS, GROUPS, strict=True):
            choice, _, name = config_path.removeprefix(prefix).partition("/")
            if config_path.startswith(prefix) and name and self._file(name).is_file():
                file = read_recipe_file(self._file(name))
                if file.choices.get(group) == choice and file.options.get(group):
                    return {group: file.options[group]}
        return {}


class RecipeSearchPath(SearchPathPlugin):
    """Adds the recipes to every search path; `hydra.searchpath` stays free for the user's own groups."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append `recipe://<folder>`."""
        search_path.append(provider="recipes", path=f"recipe://{recipes_dir()}")


def register() -> None:
    """Make Hydra know the source, the schema and the jobs. Calling it again changes nothing."""
    store = ConfigStore.instance()
    if "schema_root.yaml" in store.repo:
        return
    Plugins.instance().register(RecipeSource)
    Plugins.instance().register(RecipeSearchPath)
    root = {section: OmegaConf.structured(mirror(cls)) for section, cls in SECTIONS.items()}
    store.store(name="schema_root", node=OmegaConf.create(root))
    for job, cls in JOBS.items():
        store.store(group="job", name=job, node=mirror(cls, job))


__all__ = ["RecipeSource", "register", "shipped_recipes"]
