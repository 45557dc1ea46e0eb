"""Reports of a run, written and parsed."""

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tests.worldmodel.report.samples import (
    make_illustrations,
    make_metrics,
)
from worldmodel.evaluation.decoded import DecodedFutures
from worldmodel.evaluation.illustrations import Illustrations
from worldmodel.planning.planned_episodes import PlannedEpisode
from worldmodel.report.headline import headline
from worldmodel.report.run_page import write_report

VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags balance; gathers images, resources, headings and the text outside of <style>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.resources: list[str] = []
        self.tags: set[str] = set()
        self.headings: list[str] = []
        self.words: list[str] = []
        self.metrics: dict[str, set[str]] = {}
        self.path: str | None = None
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.path = dict(attrs).get("data-metric")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag in {"h1", "h2", "h3"}:
            self.headings.append(tag)
        self.resources += [v or "" for k, v in attrs if k in {"src", "srcset", "href", "data", "poster", "action"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.path:
            self.metrics.setdefault(self.path, set()).add(data)
            self.path = None
        if "style" not in self.open:
            self.words.append(data)


def report(
    path: Path,
    *,
    title: str = "demo",
    metrics: Any = None,
    history: list[dict[str, Any]] | None = None,
    illustrations: Illustrations | None = None,
    config_yaml: str = "seed: 17\n",
    episodes: Sequence[PlannedEpisode] = (),
    decoded: Sequence[DecodedFutures] = (),
) -> tuple[str, Page]:
    write_report(
        path,
        title=title,
        metrics=make_metrics(2) if metrics is None else metrics,
        config_yaml=config_yaml,
        history=history or [],
        illustrations=illustrations or make_illustrations(queries=0, num_steps=2),
        versions={"torch": "2.13.0"},
        episodes=episodes,
        decoded=decoded,
    )
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def text_of_headline(metrics: Any) -> str:
    return "".join(part.text for part in headline(metrics))
