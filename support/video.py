"""What is an example of each video task?

A clip with its subtitles, in the files of the VALUE benchmark (arXiv 2106.04632), one JSON record
a line. Two tasks choose an answer, two describe the clip:

    tvqa, how2qa   {vid_name, qid, q, a0, ... a4 (how2qa: a3), ts, answer_idx}  answer "a<k>"
    tvc, yc2c      {vid_name, ts, descs [{desc, desc_id}], clip_id}             answer: a desc
    subtitles      {vid_name, sub [{text, start, end}]}                         times in seconds

`ts` is the time span of the video that is asked about or described. Only the subtitles are cut to
it; the frames are those of the whole video `vid_name`, so the span also stands in the text:

    subtitles | question (from, to) a0: ... . a1: ... . | task name

data.py joins these three parts, and makes room for the last two by cutting the first.

    python -m pytest tests/test_video.py
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

from support.records import records, take

Span = tuple[float, float]  # from, to, in seconds
Subtitles = list[tuple[float, float, str]]  # from, to, text
SPAN = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*-\s*(\d+\.?\d*|\.\d+)\s*")
NO_SPAN = ("", "NaN-NaN")  # TVQA knows no time for a few of its questions
CHOICES = {"tvqa": 5, "how2qa": 4}  # answers to choose from
OPEN = ("test", "submit")  # splits whose answers may be unpublished


# -------------------------------------------------------------------------- time spans, subtitles


def take_span(record: dict, where: str) -> Span | None:
    """`ts`, "1.5-20" or [1.5, 20], in seconds; None where there is none."""
    if record.get("ts") is None or record["ts"] in NO_SPAN:
        return None
    ts = take(record, ("ts",), (str, list), where)
    found = SPAN.fullmatch(ts) if isinstance(ts, str) else None
    span = tuple(map(float, found.groups())) if found else ts if isinstance(ts, list) else ()
    if len(span) != 2 or not all(map(is_time, span)) or span[0] > span[1]:
        raise ValueError(f"{where}: 'ts' should be \"start-end\" in seconds, such as \"1.5-20\", "
                         f"not {ts!r:.60}.")
    return tuple(map(float, span))


def is_time(value) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def clip_id(vid: str, span: Span | None) -> str:
    """A name for a span of a video: "friends_s01e03_seg02_clip_19:1.5-20"."""
    return vid if span is None else f"{vid}:{span[0]:.10g}-{span[1]:.10g}"


def read_subtitles(path: Path, wanted: set[str]) -> dict[str, Subtitles]:
    """The subtitles of the wanted videos, in the order of time; one that has none is not there."""
    found = {}
    for where, _, record in records(path, lines=True):
        vid, spoken = take(record, ("vid_name",), str, where), []
        for i, said in enumerate(take(record, ("sub",), list, where)):
            at = f"{where} ({vid}), 'sub' {i}"
            text = take(said, ("text",), str, at)
            start, end = (take(said, (name,), (int, float), at) for name in ("start", "end"))
            if not (math.isfinite(start) and math.isfinite(end)):
                raise ValueError(f"{at}: 'start' and 'end' should be seconds, not {start}, {end}.")
            spoken.append((min(start, end), max(start, end), " ".join(text.split())))
        if vid in wanted:
            found[vid] = sorted(found.get(vid, []) + spoken, key=lambda said: said[0])
    return found


def words_within(spoken: Subtitles, span: Span | None) -> str:
    """What is said while the span lasts, if only in part; all of it if there is no span."""
    start, end = span or (-math.inf, math.inf)
    return " ".join(text for a, b, text in spoken if text and a < end and b > start)


# ---------------------------------------------------------------------------------------- readers
# They give the fields of data.Example, by name. Every complaint names file, record and field.


def read(task: str, split: str, paths: list[Path]) -> Iterator[dict]:
    """The examples of a split; paths: its annotations, then the subtitles."""
    *annotations, subtitles = paths
    read_clips = read_choices if task in CHOICES else read_captions
    found = list(read_clips(task, split, annotations))
    spoken = read_subtitles(subtitles, {vid for vid, *_ in found})
    for vid, span, fields in found:
        context = words_within(spoken.get(vid, []), span)
        yield {"task": task, "images": (vid,), "context": context} | fields


def read_choices(task: str, split: str, paths: list[Path]) -> Iterator[tuple]:
    """(video, span, fields) of each question; its answer is the name of the right choice."""
    names = [f"a{k}" for k in range(CHOICES[task])]
    for path in paths:
        for where, _, record in records(path, lines=True):
            vid, span = take(record, ("vid_name",), str, where), take_span(record, where)
            parts = [take(record, ("q",), str, where).strip()]
            parts += [f"({span[0]:.10g}, {span[1]:.10g})"] if span else []
            parts += [f"{name}: {take(record, (name,), str, where).strip()} ." for name in names]
            yield vid, span, {
                "id": take(record, ("qid",), (int, str), where),
                "text": " ".join(parts),
                "targets": take_answer(record, names, split, where),
            }


def take_answer(record: dict, names: list[str], split: str, where: str) -> dict[str, float]:
    """`answer_idx` 2 -> {"a2": 1.0}."""
    if split == "submit" or split in OPEN and record.get("answer_idx") is None:
        return {}
    index = take(record, ("answer_idx",), int, where)
    if isinstance(index, bool) or not 0 <= index < len(names):
        raise ValueError(f"{where}: 'answer_idx' should be in 0..{len(names) - 1}, as there are "
                         f"{len(names)} answers, not {index!r}.")
    return {names[index]: 1.0}


def read_captions(task: str, split: str, paths: list[Path]) -> Iterator[tuple]:
    """(video, span, fields): for training an example a caption; else an example a clip with all
    its captions, from whatever records they come."""
    clips = {}
    for path in paths:
        for where, _, record in records(path, lines=True):
            vid, span = take(record, ("vid_name",), str, where), take_span(record, where)
            name = clip_id(vid, span)
            if "clip_id" in record:
                name = take(record, ("clip_id",), (int, str), where)
            captions = clips.setdefault((name, vid, span), [])
            if split != "submit" and not (split in OPEN and not record.get("descs")):
                captions += take_captions(record, where)
    for (name, vid, span), captions in clips.items():
        text = f"({span[0]:.10g}, {span[1]:.10g})" if span and task == "tvc" else ""
        if split == "train":
            for i, desc in enumerate(captions):
                learn = {"targets": {desc: 1.0}, "references": [desc]}
                yield vid, span, {"id": f"{name}#{i}", "text": text} | learn
        else:
            known = {"targets": dict.fromkeys(captions, 1.0), "references": captions or None}
            yield vid, span, {"id": name, "text": text} | known


def take_captions(record: dict, where: str) -> list[str]:
    descs, where = take(record, ("descs",), list, where), f"{where}, 'descs'"
    captions = [take(d, ("desc",), str, where).strip() for d in descs]
    if not captions or not all(captions):
        raise ValueError(f"{where} should hold one caption or more, and none without words.")
    return captions
