"""Runs the cases that have no record yet, and appends each answer as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from ruler_backends import Backend
from ruler_prompt import PromptFormat, Request
from ruler_record import Record, RecordFile
from ruler_sample import Sample
from tqdm import tqdm


class Case(NamedTuple):
    task: str
    length: int
    index: int


@dataclass(frozen=True)
class Labels:
    """What a run's records say of it: digest of the settings, and names for tables."""

    settings: str
    method: str
    protocol: str


def run(
    cases: Sequence[Case],
    make_sample: Callable[[Case], Sample],
    form: PromptFormat,
    open_backend: Callable[[], Backend],
    records: RecordFile,
    labels: Labels,
    batch: int = 1,
) -> int:
    """Answers every case that `records` lacks, `batch` at once; returns how many that were.

    The backend is opened only if there are any.
    """
    missing = [case for case in cases if (*case, labels.settings) not in records.records]
    if not missing:
        return 0
    backend = open_backend()
    try:
        with tqdm(
            total=len(cases), initial=len(cases) - len(missing), desc=labels.method, unit="answer"
        ) as progress:
            remaining = iter(missing)
            while chunk := list(islice(remaining, batch)):
                for record in _answer(chunk, make_sample, form, backend, labels):
                    records.append(record)
                    progress.update()
    finally:
        backend.close()
    return len(missing)


def _request(form: PromptFormat, sample: Sample) -> Request:
    return form.request(sample.context, sample.question, sample.max_tokens)


def _answer(
    chunk: Sequence[Case],
    make_sample: Callable[[Case], Sample],
    form: PromptFormat,
    backend: Backend,
    labels: Labels,
) -> list[Record]:
    samples = [make_sample(case) for case in chunk]
    requests = [_request(form, sample) for sample in samples]
    started = time.monotonic()
    answers = backend.answer(requests)
    seconds = (time.monotonic() - started) / len(chunk)
    records = []
    for sample, request, answer in zip(samples, requests, answers, strict=True):
        first, rest = form.split_answer(answer.token_ids)
        records.append(
            Record(
                task=sample.task,
                length=sample.length,
                index=sample.index,
                settings=labels.settings,
                method=labels.method,
                protocol=labels.protocol,
                prompt_tokens=len(request.token_ids),
                first=first,
                rest=rest,
                references=list(sample.references),
                match=sample.match,
                rows_fraction=answer.rows_fraction,
                seconds=seconds,
            )
        )
    return records
