"""job=schema: the JSON Schema of a recipe, for editors."""

from __future__ import annotations

import json
import sys

from framework.recipe.json_schema import recipe_schema
from framework.recipe.schema import Recipe


def run(recipe: Recipe) -> int:
    """Write the schema to standard output. Needs no recipe."""
    del recipe
    sys.stdout.write(json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n")
    return 0
