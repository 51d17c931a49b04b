"""The service's own metrics, taken from what Ray's agents export in Prometheus's text format.

Ray exports all metrics of a node, its own included, with labels that name its processes and a prefix. Promises the
metrics of `observability.metrics` only, under their own names and labels, those of all nodes together. Knows no Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import Metric as Family
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.samples import Sample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "ray_serve_app_"
_RAYS = "ray_"
_OF_SERVE = ("application", "deployment", "replica")
"""Serve's labels that are kept. Each replica has a name of its own, so Ray's labels tell nothing more."""


class Exposition(Collector):
    """A scrape of some nodes."""

    def __init__(self, texts: Iterable[str], application: str, label_names: Mapping[str, Iterable[str]]) -> None:
        """`texts`: what each node exports. `application`: its name; others may run on the same nodes. `label_names`: of
        each metric, beside those of Serve; others are dropped."""
        self._application = application
        self._labels = {name: {*_OF_SERVE, *names} for name, names in label_names.items()}
        self._families: dict[str, Family] = {}
        for text in texts:
            for family in text_string_to_metric_families("".join(_lines(text))):
                self._add(family)

    def _add(self, family: Family) -> None:
        name = family.name.removeprefix(_RAYS)
        labels = self._labels.get(name)
        if labels is None:
            return
        samples = [
            Sample(sample.name.removeprefix(_RAYS), _kept(sample.labels, labels), sample.value)
            for sample in family.samples
            if sample.labels.get("application") == self._application
        ]
        if samples:
            ours = self._families.setdefault(name, Family(name, family.documentation, family.type))
            ours.samples.extend(samples)

    def collect(self) -> Iterator[Family]:
        """The families, in the order of their names."""
        for name in sorted(self._families):
            yield self._families[name]

    def text(self) -> bytes:
        """In Prometheus's text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)


def _kept(labels: Mapping[str, str], names: set[str]) -> dict[str, str]:
    return {name: value for name, value in labels.items() if name in names or name == "le"}


def _lines(text: str) -> Iterator[str]:
    """The lines of our metrics: a node exports a thousand others, and parsing is slow."""
    for line in text.splitlines(keepends=True):
        if line.startswith(_PREFIX) or (line.startswith("#") and f" {_PREFIX}" in line):
            yield line
