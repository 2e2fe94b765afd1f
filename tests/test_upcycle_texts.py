"""The texts that experts are trained on: files, formats, windows, and what is held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx.cli.showcase import FOLDER
from outlier_mlx.engine.loading import load_tokenizer
from outlier_mlx.errors import CheckpointWarning, OutlierError
from outlier_mlx.train.texts import Corpora, Corpus, cut, hold_out, read_corpora, without_held_out
from tests.builders import write_tokenizer

HELD = FOLDER / "heldout"
START = 0  # the embedded tokenizer puts this token before each text


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(FOLDER / "base", {"eos_token_id": 0})


@pytest.fixture
def keep(tmp_path: Path) -> Path:
    path = tmp_path / "keep.txt"
    path.write_text((HELD / "old.txt").read_text())
    return path


def read(tokenizer: Any, keep: Path, *domains: tuple[str, Path], **how: Any) -> Corpora:
    return read_corpora(domains, keep, tokenizer, **{"window": 32} | how)


def lines(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def all_windows(corpus: Corpus) -> np.ndarray:
    return np.concatenate([corpus.train, corpus.held_out])


def refusal(*given: Any, **how: Any) -> str:
    with pytest.raises(OutlierError) as caught:
        read(*given, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- windows ------------------------------------------------------------------------------------


def test_every_token_but_the_first_is_predicted_once() -> None:
    windows = cut([np.arange(7, dtype=np.int32), np.arange(7, 15, dtype=np.int32)], 4)
    assert windows.dtype == np.int32
    assert windows.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]]
    assert cut([np.arange(4, dtype=np.int32)], 4).shape == (0, 5)


def test_whole_documents_are_held_out_where_they_are_small() -> None:
    documents = [np.full(10, n, np.int32) for n in range(20)]
    train, held = hold_out(documents, 40, 60, seed=3)
    assert len(held) == 4
    assert len(train) == 16
    assert {int(d[0]) for d in held}.isdisjoint(int(d[0]) for d in train)
    other = hold_out(documents, 40, 60, seed=4)[1]
    assert {int(d[0]) for d in other} != {int(d[0]) for d in held}
    again = hold_out(documents, 40, 60, seed=3)[1]
    assert [d.tolist() for d in again] == [d.tolist() for d in held]


def test_of_a_long_document_the_middle_is_held_out() -> None:
    train, held = hold_out([np.arange(1000), np.arange(1000, 1010)], 100, 104, seed=0)
    held_tokens, train_tokens = np.concatenate(held), np.concatenate(train)
    assert 100 <= len(held_tokens) <= 104
    assert sorted([*held_tokens, *train_tokens]) == list(range(1010))
    assert {0, 999} <= set(train_tokens.tolist())


def test_never_is_so_much_held_out_that_nothing_is_left() -> None:
    for seed in range(8):
        train, held = hold_out([np.arange(97), np.arange(33)], 65, 65, seed)
        assert (sum(map(len, train)), sum(map(len, held))) == (65, 65)


def test_a_text_is_one_document_and_a_tenth_is_held_out(tokenizer: Any, keep: Path) -> None:
    corpora = read(tokenizer, keep, ("kitchen", HELD / "kitchen.txt"))
    (kitchen,) = corpora.domains
    assert (kitchen.name, kitchen.files, kitchen.documents) == ("kitchen", ("kitchen.txt",), 1)
    assert corpora.keep.name == "keep"
    assert [corpus.name for corpus in corpora] == ["kitchen", "keep"]
    for corpus in corpora:
        assert corpus.train.dtype == corpus.held_out.dtype == np.int32
        assert corpus.train.shape[1] == corpus.held_out.shape[1] == 33
        share = len(corpus.held_out) / len(all_windows(corpus))
        assert 0.08 < share < 0.13
        assert corpus.tokens == 32 * len(corpus.train)
    text = tokenizer.encode((HELD / "kitchen.txt").read_text())
    assert kitchen.train[0].tolist() == text[:33]
    assert text[0] == START
    # Both sides are parts of the text, and share no place in it.
    inside = " ".join(map(str, text))
    first, last = kitchen.held_out[0].tolist(), kitchen.held_out[-1].tolist()
    begin = inside.index(" ".join(map(str, first)))
    end = inside.index(" ".join(map(str, last))) + len(" ".join(map(str, last)))
    for row in kitchen.train.tolist():
        at = inside.find(" ".join(map(str, row)))
        # One window joins what stood before the held-out part to what stands after it.
        assert at == -1 or at + len(" ".join(map(str, row))) <= begin or at >= end


def test_not_more_is_held_out_than_judging_needs(tokenizer: Any, keep: Path) -> None:
    kitchen = ("kitchen", HELD / "kitchen.txt")
    corpora = read(tokenizer, keep, kitchen, held_out=0.3, most_held_out=5)
    assert [len(corpus.held_out) for corpus in corpora] == [5, 5]


@pytest.mark.parametrize(("windows", "halves"), [(1, (1, 1)), (2, (1, 1)), (5, (3, 2))])
def test_half_of_what_is_held_out_decides(windows: int, halves: tuple[int, int]) -> None:
    held = np.arange(windows)[:, None]
    corpus = Corpus("sea", held[:0], held)
    assert (len(corpus.deciding), len(corpus.reported)) == halves
    if windows > 1:
        assert np.concatenate([corpus.deciding, corpus.reported]).tolist() == held.tolist()


def test_the_seed_chooses_what_is_held_out(tokenizer: Any, keep: Path, tmp_path: Path) -> None:
    stories = (HELD / "sea.txt").read_text().split(". ")
    file = lines(tmp_path / "sea.jsonl", *({"text": story} for story in dict.fromkeys(stories)))
    one, same, other = (
        read(tokenizer, keep, ("sea", file), seed=seed).domains[0].held_out.tolist()
        for seed in (0, 0, 1)
    )
    assert one == same != other


# -- formats ------------------------------------------------------------------------------------


def test_jsonl_in_all_of_mlx_lms_formats(tokenizer: Any, keep: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "What is salt?"}, {"role": "assistant", "content": "Sea."}]
    pair = {"prompt": "Where is the boat?", "completion": "In the harbour."}
    text = "The cat sat on the mat and looked at the boats."
    file = lines(tmp_path / "a.jsonl", {"text": text}, {"messages": talk, "id": 7}, pair)
    file.write_text("\n" + file.read_text() + "\n\n")
    (corpus,) = read(tokenizer, keep, ("a", file), window=4).domains
    assert corpus.documents == 3
    as_chat = [
        {"role": "user", "content": pair["prompt"]},
        {"role": "assistant", "content": pair["completion"]},
    ]
    documents = [
        tokenizer.encode(text),
        tokenizer.apply_chat_template(talk),
        tokenizer.apply_chat_template(as_chat),
    ]
    known = {tuple(d[at : at + 2]) for d in documents for at in range(len(d) - 1)}
    joints = {(d[-1], e[0]) for d in documents for e in documents}
    rows = all_windows(corpus).tolist()
    pairs = {tuple(row[at : at + 2]) for row in rows for at in range(4)}
    assert len(pairs & known) > 30
    cuts = pairs - known - joints
    assert len(cuts) <= 2  # where a part was taken out of a document


def test_without_a_start_token_texts_are_followed_by_the_end_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 288, chat_template=False)
    plain = load_tokenizer(tmp_path, {"eos_token_id": 2})
    values = [{"text": f"{n} cats and a dog"} for n in range(40)]
    file = lines(tmp_path / "a.jsonl", *values, {"prompt": "one ", "completion": "two"})
    other = lines(tmp_path / "b.jsonl", *({"text": f"{n} dogs and a cat"} for n in range(40)))
    (corpus,) = read(plain, other, ("a", file), window=32).domains
    end = plain.eos_token_id
    assert end is not None
    ends = int((corpus.train[:, 1:] == end).sum() + (corpus.held_out[:, 1:] == end).sum())
    assert 33 <= ends <= 41
    talk = lines(tmp_path / "talk.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    line = refusal(plain, other, ("a", talk), window=8)
    assert "talk.jsonl: line 1: " in line
    assert "chat template" in line


def test_a_folder_is_all_texts_in_it(tokenizer: Any, keep: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sea"
    (folder / "deep").mkdir(parents=True)
    story = (HELD / "sea.txt").read_text()
    (folder / "a.txt").write_text(story[:3000])
    (folder / "deep" / "b.MD").write_text(story[3000:6000])
    lines(folder / "c.jsonl", {"text": story[6000:]})
    (folder / "chart.pdf").write_bytes(b"%PDF\xff")
    (folder / ".hidden.txt").write_text("nothing")
    with pytest.warns(CheckpointWarning, match=r"left out.*chart\.pdf") as told:
        (corpus,) = read(tokenizer, keep, ("sea", folder)).domains
    assert len(told) == 1
    assert corpus.files == ("sea/a.txt", "sea/c.jsonl", "sea/deep/b.MD")
    assert corpus.documents == 3


def test_a_long_text_is_tokenized_in_pieces(
    tokenizer: Any, keep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outlier_mlx.train import documents

    whole = read(tokenizer, keep, ("sky", HELD / "sky.txt"))
    monkeypatch.setattr(documents, "_PIECE", 700)
    pieces = read(tokenizer, keep, ("sky", HELD / "sky.txt"))
    ours, theirs = pieces.domains[0], whole.domains[0]
    assert ours.train[0].tolist() == theirs.train[0].tolist()
    assert (all_windows(ours) == START).sum() == (all_windows(theirs) == START).sum()
    text = tokenizer.decode(np.concatenate([row[1:] for row in ours.train[:40]]).tolist())
    assert text[:500] in (HELD / "sky.txt").read_text()


def test_the_mark_of_utf_8_is_no_text(tokenizer: Any, keep: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text((HELD / "sky.txt").read_text(), encoding="utf-8-sig")
    marked = read(tokenizer, keep, ("sky", path)).domains[0]
    plain = read(tokenizer, keep, ("sky", HELD / "sky.txt")).domains[0]
    assert (marked.train == plain.train).all()


# -- copies -------------------------------------------------------------------------------------


def test_copies_are_left_out_and_told(tokenizer: Any, keep: Path, tmp_path: Path) -> None:
    story = (HELD / "market.txt").read_text()
    stories = [{"text": text} for text in story.split(". ")]
    once = lines(tmp_path / "once.jsonl", *stories)
    with pytest.warns(CheckpointWarning, match=r"5 of 87 texts are copies"):
        single = read(tokenizer, keep, ("market", once)).domains[0]
    twice = lines(tmp_path / "twice.jsonl", *stories, *stories[:7])
    with pytest.warns(CheckpointWarning, match=r"12 of 94 texts are copies"):
        corpus = read(tokenizer, keep, ("market", twice)).domains[0]
    assert (single.copies, corpus.copies) == (5, 12)
    assert (corpus.train == single.train).all()


def test_equal_windows_are_kept_once(tokenizer: Any, keep: Path, tmp_path: Path) -> None:
    story = (HELD / "market.txt").read_text()
    file = tmp_path / "a.txt"
    file.write_text(story + " la" * 400)
    with pytest.warns(CheckpointWarning, match="windows are copies"):
        (corpus,) = read(tokenizer, keep, ("a", file)).domains
    rows = [tuple(row) for row in all_windows(corpus).tolist()]
    assert len(set(rows)) == len(rows)
    assert corpus.copies > 5


def test_what_is_held_out_anywhere_is_trained_on_nowhere() -> None:
    rows = np.arange(60, dtype=np.int32).reshape(12, 5)
    sea = Corpus("sea", rows[:5], rows[5:7], copies=1)
    keep = Corpus("keep", rows[[6, 7, 8, 7, 0]], rows[[9, 4, 5]])
    with pytest.warns(CheckpointWarning, match="sea: 1 windows|keep: 3 windows") as told:
        one, other = without_held_out([sea, keep], 4)
    assert len(told) == 2
    assert (one.train.tolist(), one.copies) == (rows[:4].tolist(), 2)
    assert one.held_out.tolist() == rows[5:7].tolist()
    assert other.train.tolist() == rows[[7, 8, 0]].tolist()
    assert other.held_out.tolist() == rows[[9, 4]].tolist()


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('["a"]', "line 2: a JSON object was expected"),
        ('{"text": 7}', 'line 2: "text": a text was expected'),
        ('{"prompt": "a", "completion": null}', 'line 2: "completion": a text was expected'),
        ('{"prompt": "a"}', 'line 2: expected "text", "messages", or "prompt" and "completion"'),
        ("{}", "found none"),
        ('{"messages": []}', 'line 2: "messages": a list of messages'),
        ('{"messages": ["a"]}', 'line 2: "messages": a message is an object'),
        ('{"text": "a"', "line 2: not valid JSON"),
        ('{"text": "a", "text": "b"}', "appears twice"),
    ],
)
def test_lines_that_are_refused(
    line: str, words: str, tokenizer: Any, keep: Path, tmp_path: Path
) -> None:
    file = tmp_path / "law.jsonl"
    file.write_text('{"text": "a sound line"}\n' + line + "\n")
    told = refusal(tokenizer, keep, ("law", file))
    assert told.startswith(f"{file}: ")
    assert words in told


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no text in it"),
        (b" \n\n ", "no text in it"),
        (b"three words here", "too few for a window of 32"),
        (b"\x89PNG\r\n\x1a\n", "not UTF-8 text"),
        (b"text \0 and more", "NUL"),
    ],
)
def test_texts_that_are_refused(
    content: bytes, words: str, tokenizer: Any, keep: Path, tmp_path: Path
) -> None:
    file = tmp_path / "law.txt"
    file.write_bytes(content)
    told = refusal(tokenizer, keep, ("law", file))
    assert words in told
    assert "law" in told


def test_a_text_that_only_repeats_itself(keep: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 288)
    (tmp_path / "a.txt").write_text("a" * 500)
    with pytest.warns(CheckpointWarning, match="windows are copies"):
        told = refusal(load_tokenizer(tmp_path, {}), keep, ("a", tmp_path / "a.txt"))
    assert "more text that differs" in told


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b", "é", "-a", "x" * 41, "keep", "Keep"])
def test_names_that_are_refused(name: str, tokenizer: Any, keep: Path) -> None:
    assert "the domain" in refusal(tokenizer, keep, (name, HELD / "sky.txt"))


def test_nothing_is_given_twice(tokenizer: Any, keep: Path, tmp_path: Path) -> None:
    sea, sky = HELD / "sea.txt", HELD / "sky.txt"
    assert "'sea' is given twice" in refusal(tokenizer, keep, ("sea", sea), ("sea", sky))
    link = tmp_path / "link.txt"
    link.symlink_to(sea)
    assert "for sea and for sky" in refusal(tokenizer, keep, ("sea", sea), ("sky", link))
    assert "for sea and for keep" in refusal(tokenizer, sea, ("sea", sea))
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").hardlink_to(folder / "a.txt")
    assert "twice for both" in refusal(tokenizer, keep, ("both", folder))
    assert "no domain is given" in refusal(tokenizer, keep)


def test_paths_that_are_refused(tokenizer: Any, keep: Path, tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tokenizer, keep, ("a", tmp_path / "none"))
    assert "no such file or folder" in refusal(tokenizer, tmp_path / "none", ("a", keep))
    (tmp_path / "empty").mkdir()
    assert "no file in it ends in" in refusal(tokenizer, keep, ("a", tmp_path / "empty"))


def test_a_file_that_is_too_large_is_not_read(tokenizer: Any, keep: Path, tmp_path: Path) -> None:
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(2_000_000_000)
    assert "at most 1.00 GB" in refusal(tokenizer, keep, ("a", tmp_path / "large.txt"))


def test_tokens_that_the_base_does_not_have(tokenizer: Any, keep: Path) -> None:
    told = refusal(tokenizer, keep, ("sky", HELD / "sky.txt"), vocab=500)
    assert "the base's embedding has 500 rows" in told
