"""The text that the demo pair is trained on: a small grammar of English, in five domains.

``old`` is what the base model reads: plain stories of children, animals and a village. The
other four (``kitchen``, ``sea``, ``sky``, ``market``) are for the experts alone. A document is
one story of three to eight sentences. It follows a frame; a frame is a row of beats, a beat a
choice of sentences. How sentences are written:

* ``{word}`` prints what is bound to that name, or else draws from the word list of that name;
* ``{who:child}`` draws from the list ``child`` and binds the word to ``who`` for the story;
* ``{who.he}``, ``{fish.kind}`` print a further form of a bound word, ``{plum+}`` its plural;
* ``(one|another|)`` chooses, also in nested form;
* a line with ``-`` begins a beat, with ``|`` adds a choice to it; a beat that begins with ``?`` is
  left out of some stories; an indented line continues the one before; ``---`` ends a frame.

Training and held-out text share no sentence: a checksum puts each sentence on one of the two
sides, and a story is made of sentences of its own side only.
"""

import random
import re
import zlib
from collections.abc import Iterator
from itertools import islice

import demo_grammar

DOMAINS = tuple(demo_grammar.FRAMES)
NEW_DOMAINS = DOMAINS[1:]

HELDOUT_SHARE = 8  # one sentence in so many belongs to the held-out side

_TRIES = 60
_OPTIONAL = 0.55
_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")
_SLOT = re.compile(r"\{(\w+)(?::(\w+))?(?:\.(\w+))?(\+?)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou]|honest)")
_FORMS = {"he": 1, "him": 2, "his": 3, "kind": 1, "each": 1, "sum": 2}
_FORMS |= {"moon": 1, "figure": 1, "more": 1, "most": 2}
_IRREGULAR = {"mouse": "mice", "goose": "geese", "sheep": "sheep", "loaf": "loaves"}


def _split(text: str) -> list[str]:
    return [" ".join(entry.split()) for entry in text.split(",")]


LEXICON = {name: _split(text) for name, text in demo_grammar.WORDS.items()}


class _Unsayable(Exception):
    """No sentence of the wanted side was found for a beat."""


def _parse(frames: str) -> list[list[tuple[bool, list[str]]]]:
    """Frames of beats; a beat is whether it may be left out, and its choices."""
    parsed = []
    for frame in re.sub(r"\n +", " ", frames.strip()).split("\n---\n"):
        beats: list[tuple[bool, list[str]]] = []
        for line in frame.split("\n"):
            mark, template = line.split(" ", 1)
            if mark == "|":
                beats[-1][1].append(template)
            else:
                beats.append((mark == "?", [template]))
        parsed.append(beats)
    return parsed


FRAMES = {domain: _parse(text) for domain, text in demo_grammar.FRAMES.items()}


def plural(noun: str) -> str:
    """The plural of ``noun``."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh")) or noun in ("potato", "tomato"):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def is_heldout(sentence: str) -> bool:
    """Whether ``sentence`` belongs to the held-out side."""
    return zlib.crc32(sentence.encode()) % HELDOUT_SHARE == 0


def _realise(template: str, bound: dict[str, str], rng: random.Random) -> str:
    """One sentence from ``template``; words that it draws are added to ``bound``."""
    while found := _CHOICE.search(template):
        pick = rng.choice(found[1].split("|"))
        template = template[: found.start()] + pick + template[found.end() :]

    def fill(slot: re.Match[str]) -> str:
        name, source, form, many = slot.groups()
        if name not in bound:
            words = LEXICON[source or name]
            used = set(bound.values())
            word = rng.choice([word for word in words if word not in used] or words)
            bound[name if source else f"{name} {len(bound)}"] = word
        else:
            word = bound[name]
        word = word.split("/")[_FORMS[form] if form else 0]
        return plural(word) if many else word

    text = _ARTICLE.sub(r"\1n ", " ".join(_SLOT.sub(fill, template).split()))
    first = 1 if text.startswith('"') else 0
    return text[:first] + text[first].upper() + text[first + 1 :]


def _say(templates: list[str], bound: dict[str, str], rng: random.Random, heldout: bool) -> str:
    """A sentence of the wanted side for one beat; ``bound`` is updated."""
    for _ in range(_TRIES):
        trial = dict(bound)
        sentence = _realise(rng.choice(templates), trial, rng)
        if is_heldout(sentence) == heldout:
            bound.update(trial)
            return sentence
    raise _Unsayable


def sentences(domain: str, rng: random.Random, heldout: bool = False) -> list[str]:
    """One story of ``domain`` as a list of sentences, all of the wanted side."""
    while True:
        bound: dict[str, str] = {}
        frame = rng.choice(FRAMES[domain])
        try:
            return [
                _say(templates, bound, rng, heldout)
                for optional, templates in frame
                if not (optional and rng.random() > _OPTIONAL)
            ]
        except _Unsayable:
            continue


def documents(domain: str, seed: int, heldout: bool = False) -> Iterator[list[str]]:
    """Endless stories of ``domain``; the same ones for the same seed."""
    rng = random.Random(f"{domain} {seed} {heldout}")
    while True:
        yield sentences(domain, rng, heldout)


def word_lists(seed: int) -> Iterator[str]:
    """Endless lists of words of all domains, each list written twice; no sentence is among them.

    They give a model every word's spelling, and make it copy, but tell nothing of how words go
    together: neighbours are drawn evenly and independently.
    """
    stories = (story for d in DOMAINS for story in islice(documents(d, seed), 1500))
    words = sorted(
        {word for story in stories for word in re.findall(r"[A-Za-z]+", " ".join(story))}
    )
    rng = random.Random(f"words {seed}")
    while True:
        line = " ".join(rng.sample(words, rng.randint(8, 24)))
        yield f"{line}. {line}."
