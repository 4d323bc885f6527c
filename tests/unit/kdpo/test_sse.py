"""Event streams as the HTML standard reads them, however they are cut into chunks."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpo import sse
from kdpo.sse import EventParser, ServerEvent

TEXTS = st.text(st.characters(blacklist_characters="\r\n\0", blacklist_categories=["Cs"]))


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[ServerEvent]]:
    """A stream, and the events in it."""
    text, events, last = draw(st.sampled_from(["", "\ufeff"])), [], None
    for _ in range(draw(st.integers(0, 4))):
        end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
        kind = draw(st.text("abc.", min_size=1, max_size=4))
        lines = draw(st.lists(TEXTS, min_size=1, max_size=3))
        number = draw(st.none() | st.integers(1, 99).map(str))
        parts = [f": {draw(TEXTS)}", f"event: {kind}", *(f"data: {line}" for line in lines)]
        if number is not None:
            parts.append(f"id: {number}")
            last = number
        text += "".join(f"{part}{end}" for part in [*parts, ""])
        events.append(ServerEvent(kind, "\n".join(lines), last))
    # A lone CR at the very end could be half of a CRLF; the ping that follows settles it.
    return (text + ": ping\n\n").encode(), events


@given(streams(), st.data())
def test_chunks_do_not_matter(stream: tuple[bytes, list[ServerEvent]], data: st.DataObject) -> None:
    content, expected = stream
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=6)))
    parser, found = EventParser(), []
    for start, end in pairwise([0, *cuts, len(content)]):
        found += parser.feed(content[start:end])
    assert found == expected


def test_a_stream_as_the_server_sends_it() -> None:
    parser = EventParser()
    text = 'retry: 3000\n\nid: 4\nevent: job.phase\ndata: {"seq":4}\n\n: ping\n\nevent: x\n\n'
    found = list(parser.feed(text.encode()))
    assert [(e.type, json.loads(e.data), e.id) for e in found] == [("job.phase", {"seq": 4}, "4")]
    assert (parser.retry_ms, parser.last_id) == (3000, "4")


def test_an_id_with_a_nul_is_ignored() -> None:
    assert next(EventParser(last_id="3").feed(b"id: 4\0\ndata: x\n\n")).id == "3"


def test_endless_line_is_no_event_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    parser = EventParser()
    assert list(parser.feed(b"x" * 1000)) == []
    with pytest.raises(ValueError, match="longer than 1000"):
        list(parser.feed(b"x"))
