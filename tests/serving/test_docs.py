"""What docs/serving.md names is there."""

import json
import re

import yaml

from framework.serving.metrics import Metrics
from tests.serving.running import ROOT

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def test_the_dashboard_asks_for_figures_that_exist():
    metrics = Metrics()
    metrics.ready(0, 8, ready=True)
    there = set(re.findall(r"^(?:# TYPE )?(\w+)", metrics.text().decode(), re.MULTILINE))
    (dashboard,) = map(json.loads, blocks("json"))
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    figures = set(re.findall(r"\w+_(?:total|seconds_bucket|running|waiting|ratio|ready)\b", asked))
    assert len(figures) >= 5
    assert figures <= there
    (scrape,) = map(yaml.safe_load, blocks("yaml"))
    assert scrape["scrape_configs"][0]["static_configs"]
    (example,) = blocks("python")
    compile(example, "docs/serving.md", "exec")
