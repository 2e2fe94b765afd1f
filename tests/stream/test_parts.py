"""A file of tensors that is written in any order, and the journal of an unfinished run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from outlier_mlx.errors import OutlierError
from outlier_mlx.writing.journal import Journal
from outlier_mlx.writing.writer import PlacedWriter, ShardedWriter, TensorSpec


def test_bytes_in_any_order_over_several_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    specs = [TensorSpec(f"t{n}", "U8", (int(rng.integers(1, 900)),)) for n in range(12)]
    data = {spec.name: rng.bytes(spec.nbytes) for spec in specs}
    for folder in ("once", "pieces"):
        (tmp_path / folder).mkdir()
    with ShardedWriter(tmp_path / "once", specs, 2000) as whole:
        for name, value in data.items():
            whole.write(name, value)
        expected = whole.finish()
    cuts = [(name, start) for name, value in data.items() for start in range(0, len(value), 100)]
    rng.shuffle(cuts)
    for part in (cuts[:40], cuts[40:]):
        with PlacedWriter(tmp_path / "pieces", specs, 2000) as writer:
            for name, start in part:
                writer.write(str(name), int(start), data[str(name)][int(start) :][:100])
            writer.sync()
            found = writer.finish()
    assert found == expected and len(expected) > 3
    for path in (tmp_path / "once").iterdir():
        assert (tmp_path / "pieces" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("place", [-1, 1, 5])
def test_bytes_outside_their_tensor(tmp_path: Path, place: int) -> None:
    specs = [TensorSpec(name, "U8", (4,)) for name in "ab"]
    with PlacedWriter(tmp_path, specs) as w, pytest.raises(OutlierError, match="not within"):
        w.write("a", place, b"xxxx")


def test_a_journal_that_was_cut_off(tmp_path: Path) -> None:
    identity = {"what": "a test"}
    journal = Journal(tmp_path, identity)
    journal.add("first", {"a": "1"})
    whole = (tmp_path / "journal.jsonl").read_bytes()
    journal.add("second", {})
    text = (tmp_path / "journal.jsonl").read_bytes()
    for end in range(len(whole), len(text)):
        (tmp_path / "journal.jsonl").write_bytes(text[:end])
        again = Journal(tmp_path, identity)
        assert again.done == {"first": {"a": "1"}}
        again.add("third", {})
        assert Journal(tmp_path, identity).done == {"first": {"a": "1"}, "third": {}}
