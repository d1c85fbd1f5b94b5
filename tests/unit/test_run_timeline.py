"""The timeline counts overlapping work once, keeps all of it when it merges, and stays away where none was recorded."""

import json
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reachrl.errors import StorageError
from reachrl.report import timeline
from reachrl.report.report import render_report, write_report
from reachrl.report.timeline import Box

GRID = 200  # moments of the brute force; spans begin and end on them

moments = st.tuples(st.integers(-40, GRID), st.integers(0, 60))
intervals_strategy = st.lists(moments.map(lambda m: (m[0], m[0] + m[1])), max_size=25)
spans_strategy = st.lists(
    st.tuples(st.sampled_from(["b", "loop", "a"]), st.sampled_from(["decode", "simulate"]), moments), max_size=30
).map(lambda rows: [span(who, what, start, start + long) for who, what, (start, long) in rows])


def span(who: str, what: str, start: float, end: float) -> dict:
    return {"who": who, "what": what, "start": start, "end": end}


def covered(intervals: list, low: int = 0, high: int = GRID) -> np.ndarray:
    """Which cells of the grid lie inside some interval."""
    cells = np.arange(low, high) + 0.5
    return np.any([(start < cells) & (cells < end) for start, end in intervals], axis=0) & np.ones(len(cells), bool)


def actor_spans(steps: int = 20, groups: int = 2, actors: int = 2, step: float = 0.1) -> list[dict]:
    spans = [span("loop", "rollout", 0.0, steps * step)]
    for actor in range(actors):
        for group in range(groups):
            for i in range(steps):
                start = (i + group / groups) * step - step * actor
                spans.append(span(f"actor {actor}", "decode", start, start + 0.3 * step))
                spans.append(span(f"actor {actor}", "simulate", start + 0.3 * step, start + 0.8 * step))
    end = steps * step
    return [*spans, span("learner", "update", end, end + 1.5), span("loop", "update", end, end + 1.5)]


def write(run: Path, content: object) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "timeline.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return run


def boxes(svg: str) -> list[ET.Element]:
    return list(ET.fromstring(svg).iter("rect"))


@given(intervals_strategy)
@example([(0, 5), (5, 9)])
def test_the_union_covers_what_brute_force_covers(intervals: list) -> None:
    joined = timeline.union(intervals, (0, GRID))
    assert np.array_equal(covered(joined), covered(intervals))
    assert timeline.length(joined) == covered(intervals).sum()
    assert all(a[1] < b[0] for a, b in pairwise(joined)) and all(start < end for start, end in joined)


@given(spans_strategy)
def test_busy_waiting_and_who_was_busy_meanwhile_against_brute_force(spans: list[dict]) -> None:
    end = max([0, *([s["end"] for s in spans if s["who"] == "loop"] or [s["end"] for s in spans])])
    cells = {}
    for s in spans:
        cells[s["who"]] = cells.get(s["who"], False) | covered([(s["start"], s["end"])], 0, end)
    lanes = timeline.busy_shares(spans)
    assert [lane["who"] for lane in lanes] == list(cells)
    for lane in lanes:
        mine = cells[lane["who"]]
        assert lane["busy"] == mine.sum() and lane["waiting"] == end - mine.sum()
        assert lane["share"] == pytest.approx(mine.sum() / end if end else 0)
        for other, share in lane["meanwhile"]:
            assert share == pytest.approx((cells[other] & ~mine).sum() / (~mine).sum())
        for what, seconds in lane["parts"]:
            kind = [(s["start"], s["end"]) for s in spans if (s["who"], s["what"]) == (lane["who"], what)]
            assert seconds == covered(kind, 0, end).sum()


def test_the_learner_waits_for_the_slow_actor() -> None:
    spans = [
        span("loop", "rollout", 0, 6), span("actor 0", "simulate", -1, 2), span("actor 1", "simulate", 0, 6),
        span("actor 1", "decode", 1, 5), span("loop", "update", 6, 8), span("learner", "update", 6, 8),
    ]  # fmt: skip
    loop, quick, slow, learner = timeline.busy_shares(spans)
    assert loop["share"] == 1 and loop["meanwhile"] == [] and loop["parts"] == [("rollout", 6), ("update", 2)]
    assert learner["waiting"] == 6 and learner["meanwhile"] == [("actor 1", 1.0), ("actor 0", pytest.approx(1 / 3))]
    assert quick["busy"] == 2  # not what it did ahead
    assert slow["busy"] == 6 and slow["parts"] == [("simulate", 6), ("decode", 4)]


@given(intervals_strategy, st.sampled_from([0.5, 2, 7, 30, 500]))
def test_merging_keeps_the_covered_time_and_bounds_the_boxes(intervals: list, short: float) -> None:
    for track in timeline._tracks(intervals):
        assert all(a.end <= b.start for a, b in pairwise(track))
        merged = timeline.merge_short(track, short)
        assert sum(b.covered for b in merged) == sum(b.covered for b in track)
        assert sum(b.count for b in merged) == len(track)
        assert (merged[0].start, merged[-1].end) == (track[0].start, track[-1].end)
        for a, b in pairwise(merged):
            assert a.end <= b.start and b.end - a.start >= short
        for box in merged:
            inside = [b for b in track if box.start <= b.start and b.end <= box.end]
            assert box.covered <= box.end - box.start and sum(b.covered for b in inside) >= box.covered


def test_what_is_long_enough_to_be_seen_is_left_alone() -> None:
    far = Box(6, 6.125, 0.125, 1)
    track = [Box(0, 2, 2, 1), Box(2, 4, 2, 1), Box(4, 4.125, 0.125, 1), Box(4.25, 4.375, 0.125, 1), far]
    assert timeline.merge_short(track, 1.0) == [Box(0, 2, 2, 1), Box(2, 4.375, 2.25, 3), far]


def test_a_merged_box_stays_short_enough_to_show_where_the_work_was() -> None:
    track = [Box(i / 4, i / 4 + 0.125, 0.125, 1) for i in range(400)]
    merged = timeline.merge_short(track, 1.0)
    assert max(box.end - box.start for box in merged) <= 8 and len(merged) < 20


@given(spans_strategy)
def test_the_layout_loses_nothing_and_no_row_overlaps(spans: list[dict]) -> None:
    lanes = timeline.lanes_of(spans, 0.25)
    assert list(lanes) == list(dict.fromkeys(s["who"] for s in spans))
    for who, rows in lanes.items():
        for row in rows:
            assert all(a.end <= b.start for (_, a), (_, b) in pairwise(row))
        for what in ("decode", "simulate"):
            drawn = [(box.start, box.end) for row in rows for kind, box in row if kind == what]
            kind = [(s["start"], s["end"]) for s in spans if (s["who"], s["what"]) == (who, what)]
            assert np.array_equal(covered(drawn), covered(kind))


def test_work_in_turn_needs_one_row_and_kinds_that_need_several_share_none() -> None:
    turns = [span("a", "decode" if i % 2 else "simulate", i, i + 1) for i in range(10)]
    assert len(timeline.lanes_of(turns, 0.01)["a"]) == 1
    (row, *more) = timeline.lanes_of([*turns, span("a", "decode", 1.5, 2)], 0.01)["a"]
    assert len(more) == 2 and all(len({kind for kind, _ in r}) == 1 for r in (row, *more))


def test_lanes_are_in_order_and_inside_the_picture_and_overlaps_are_both_seen() -> None:
    svg = timeline.timeline_chart(actor_spans())
    [root] = ET.fromstring(svg)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    rows = [t for t in root.iter("text") if t.get("class") == "row"]
    assert [t.text for t in rows] == ["loop", "actor 0", "actor 1", "learner"]
    assert [float(t.attrib["y"]) for t in rows] == sorted(float(t.attrib["y"]) for t in rows)
    places = []
    for rect in boxes(svg):
        x, y, wide, high = (float(rect.attrib[k]) for k in ("x", "y", "width", "height"))
        assert x >= timeline.LEFT - 0.1 and x + wide <= width - timeline.RIGHT + 0.7 and y >= 0 and y + high <= height
        assert wide > 0.5 and high >= timeline.TRACK - 1
        places.append((y, x, wide, high))
    for (y, x, wide, high), (other_y, other_x, other_wide, other_high) in combinations(places, 2):
        apart = y + high <= other_y + 0.2 or other_y + other_high <= y + 0.2  # to the rounding of the file
        assert apart or x + wide <= other_x + 0.2 or other_x + other_wide <= x + 0.2
    # A lane without overlap is one row, two groups that simulate at a time are at least two.
    assert len({y for y, *_ in places}) >= 2 + 2 * 2
    hues = {(r.findtext("title") or "").split(",")[0].split(": ")[1]: r.attrib["class"] for r in boxes(svg)}
    assert len(set(hues.values())) == len(hues) == 4


def test_a_box_lies_where_its_seconds_are() -> None:
    svg = timeline.timeline_chart([span("a", "x", -1, 1), span("b", "y", 1, 3)])
    one, two = ({k: float(r.attrib[k]) for k in ("x", "width")} for r in boxes(svg))
    half = (timeline.WIDTH - timeline.LEFT - timeline.RIGHT) / 2
    assert one == pytest.approx({"x": timeline.LEFT, "width": half}, abs=0.1)
    assert two == pytest.approx({"x": timeline.LEFT + half, "width": half}, abs=0.1)


def test_a_big_run_makes_a_small_page_and_pale_boxes_say_how_full_they_are() -> None:
    spans = actor_spans(steps=250, groups=4, actors=40, step=0.02)
    assert len(spans) > 80_000
    svg = timeline.timeline_chart(spans)
    assert 400 < len(boxes(svg)) <= timeline.MAX_BOXES and len(svg) < 1_000_000
    spans = [span("a", "x", i / 1000, i / 1000 + 0.0004) for i in range(10_000)]
    rects = boxes(timeline.timeline_chart(spans))
    assert len(rects) < 200
    assert all(0.35 < float(r.attrib["fill-opacity"]) < 0.45 for r in rects[:-1])


@pytest.mark.parametrize("spans", [[], [span("a", "x", 0, 0)], [span("a", "x", -2, -1)]])
def test_no_seconds_at_all_still_draw(spans: list[dict]) -> None:
    assert len(boxes(timeline.timeline_chart(spans))) == len(spans)
    assert all(lane["share"] == 0 and lane["busy"] == 0 for lane in timeline.busy_shares(spans))


def test_more_kinds_than_colours_share_the_last() -> None:
    few = [span("a", f"k{i}", i, i + 1) for i in range(6)]
    assert len(set(timeline.colours(few).values())) == 6
    many = [span("a", f"k{i}", 10 * i, 10 * i + 9 - i) for i in range(9)]
    hues = timeline.colours(many)
    assert list(hues.values()) == [*timeline.COLOURS[:5], *["c-before"] * 4]


def test_the_slowest_actor_against_the_mean() -> None:
    entries = [
        {"actor": i, "host": "h", "rows": rows, "seconds_per_step": pace, "busy": 0.9}
        for i, (rows, pace) in enumerate([(2, 0.05), (3, 0.04), (4, 0.02)])
    ]
    balance = timeline.balance_of(entries)
    assert balance and balance["slowest"]["name"] == "actor 1" and balance["ratio"] == pytest.approx(0.12 / 0.1)
    assert [row["load"] for row in balance["rows"]] == pytest.approx([0.1, 0.12, 0.08])
    wide = [float(rect.attrib["width"]) for rect in boxes(balance["chart"])]
    assert wide[1] / wide[0] == pytest.approx(1.2, abs=0.01)
    entries[1]["seconds_per_step"] = None
    balance = timeline.balance_of(entries)
    assert balance and balance["slowest"]["name"] == "actor 0" and balance["rows"][1]["load"] is None
    idle = timeline.balance_of([{"actor": 0, "rows": 1, "seconds_per_step": None}])
    assert idle and idle["slowest"] is None and timeline.balance_of([]) is None


def test_the_page_tells_who_waits_and_escapes_names(tmp_path: Path) -> None:
    spans = [*actor_spans(), span("<i>&\"who'", "<u>what", 0, 1)]
    balance = [
        {"actor": 0, "host": "<b>", "rows": 3, "seconds_per_step": 0.03, "busy": 0.93},
        {"actor": 1, "host": "two", "rows": 3, "seconds_per_step": 0.01, "busy": None},
    ]
    html = write_report(write(tmp_path, {"iteration": 12, "spans": spans, "balance": balance})).read_text()
    assert 'id="timeline"' in html and 'href="#timeline"' in html
    for words in ("Iteration 12 took 3.5 s", "1.50 times the mean: actor 0 on &lt;b&gt;", "<td>0.0900</td>", "93.0 %"):
        assert words in html, words
    assert "<b>." not in html and "<td><b>" not in html and "<i>&" not in html and "<u>" not in html
    section = html[html.index('<section id="timeline"') :]
    drawings = section[: section.index("</section>")].split("<svg")[1:]
    assert len(drawings) == 2
    for drawing in drawings:
        assert ET.fromstring("<svg" + drawing[: drawing.index("</svg>")] + "</svg>").get("aria-label")


def test_one_process_has_no_balance_and_a_run_without_a_timeline_no_section(tmp_path: Path) -> None:
    assert timeline.timeline_section(tmp_path) is None and timeline.read_timeline(tmp_path / "timeline.json") is None
    html = render_report(tmp_path)
    assert "timeline" not in html and "waits for whom" not in html
    assert timeline.timeline_section(write(tmp_path / "a", {"iteration": 0, "spans": [], "balance": []})) is None
    html = render_report(write(tmp_path / "b", {"iteration": 0, "spans": actor_spans(), "balance": []}))
    assert "Iteration 0 took" in html and "Balance" not in html
    alone = {"spans": [], "balance": [{"actor": 0, "rows": 1, "seconds_per_step": 0.5}]}
    assert "Balance" in render_report(write(tmp_path / "c", alone))


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", "3", "null", "{}", '{"spans": 3}', '{"spans": [{"who": "a"}]}', '{"spans": {"a": 1}}',
        {"spans": [span("a", "x", float("nan"), 1)]}, {"spans": [span("a", "x", 0, "1")]},  # type: ignore[arg-type]
        {"spans": [span(3, "x", 0, 1)]}, {"spans": [], "balance": [{"actor": 0}]},  # type: ignore[arg-type]
        {"spans": [], "balance": [{"actor": 0, "rows": "3", "seconds_per_step": 0.1}]},
        {"spans": [], "balance": [{"rows": 3, "seconds_per_step": 0.1}]}, {"spans": [], "balance": 4},
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, content: object) -> None:
    with pytest.raises(StorageError, match=r"timeline\.json"):
        write_report(write(tmp_path, content))


def test_a_clock_that_was_set_back_costs_a_span_its_length_and_not_the_report(tmp_path: Path) -> None:
    record = timeline.read_timeline(write(tmp_path, {"spans": [span("a", "x", 2, 1)]}) / "timeline.json")
    assert record and record["spans"] == [span("a", "x", 2, 2)]
