"""A benchmark's file: read back as it was written, published as a schema, refused in a sentence where it is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bench.documents import candidate, document, labelled
from tests.bench.test_report import rich
from tests.engines import ROOT
from vitedge.bench.document import SCHEMA, load_document, save_document
from vitedge.bench.schema import schema
from vitedge.errors import VitEdgeError

DOC = document(rich("vit/fp32"), candidate("vit/int8", 3.0, labelled(91.0, 0.2)), candidate("vit/bad", 1.0, failed="no"))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    save_document(DOC, path := tmp_path / "bench.json")
    return path


def test_a_document_is_read_back_as_it_was_written(stored: Path) -> None:
    assert load_document(stored) == DOC


def test_the_published_schema_is_that_of_the_dataclasses() -> None:
    """Mended by: python -m vitedge.bench.schema > docs/bench.schema.json."""
    assert json.loads((ROOT / "docs" / "bench.schema.json").read_text("utf-8")) == schema()


def test_documents_keep_to_the_schema_and_others_do_not(stored: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema())
    checks = jsonschema.Draft202012Validator(schema())
    content = json.loads(stored.read_text("utf-8"))
    assert list(checks.iter_errors(content)) == []
    for change in (
        lambda c: c.update(schema=SCHEMA + 1),
        lambda c: c.pop("candidates"),
        lambda c: c["candidates"][0]["timings"][0]["centiles_ms"].pop(),
        lambda c: c["candidates"][0].update(image=[28]),
        lambda c: c["candidates"][0].update(unheard_of=1),
    ):
        change(wrong := json.loads(stored.read_text("utf-8")))
        assert list(checks.iter_errors(wrong))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(schema=SCHEMA + 1), rf"has schema {SCHEMA + 1}, and this vitedge reads schemas up to {SCHEMA}"),
        (lambda c: c.pop("schema"), "is not a benchmark of vitedge"),
        (lambda c: c.pop("reference"), "is damaged: .*reference"),
        (lambda c: c.update(reference="other"), "is damaged: .*the reference is 'other'"),
        (lambda c: c.update(candidates=[]), "is damaged: its candidates are none"),
        (lambda c: c["candidates"].append(c["candidates"][0]), "is damaged: its candidates are vit/fp32, "),
        (lambda c: c["candidates"][0].update(timings=3), "is damaged: .*timings must be a list"),
        (lambda c: c["candidates"][0]["timings"][0]["centiles_ms"].pop(), "a timing of vit/fp32 has 100 centiles of 101"),
        (lambda c: c["candidates"][0]["timings"][0].update(images_per_s=float("nan")), "values that no clock gives"),
        (lambda c: c["candidates"][0]["timings"][0]["centiles_ms"].__setitem__(0, 0.0), "values that no clock gives"),
        (lambda c: c["candidates"][1]["timings"][0].update(speedup=-1.0), "a timing of vit/int8 .* values that no clock gives"),
        (lambda c: c["candidates"][1]["judged"].update(right="seven"), "of vit/int8 are right is not written in hexadecimal"),
    ],
)
def test_what_is_no_benchmark_is_a_sentence(stored: Path, change: Callable[[Any], object], said: str) -> None:
    change(content := json.loads(stored.read_text("utf-8")))
    stored.write_text(json.dumps(content))
    with pytest.raises(VitEdgeError, match=said) as error:
        load_document(stored)
    assert error.value.hint


def test_a_newer_document_says_to_upgrade(stored: Path) -> None:
    save_document(replace(DOC, schema=SCHEMA + 7), stored)
    with pytest.raises(VitEdgeError) as error:
        load_document(stored)
    assert error.value.hint == "pip install -U vitedge"
