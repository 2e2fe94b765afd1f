"""Generate the demo pair's training text from a small grammar of English, in five domains.

The base model is trained on ``old``: simple stories about children, animals and a village. The
other four domains (``kitchen``, ``sea``, ``sky``, ``market``) are only for the experts. A document
is one story of three to eight sentences. It follows a frame, which is a sequence of beats; a beat
is a choice of sentences. The syntax of sentences:

* ``{word}`` is the word that is bound to this name, or a random word from the list of this name;
* ``{who:child}`` is a random word from the list ``child``, bound to ``who`` for the story;
* ``{who.he}``, ``{fish.kind}`` are other forms of a bound word, ``{plum+}`` is its plural;
* ``(one|another|)`` is a random choice, and can be nested;
* a line with ``-`` begins a beat; with ``|``, it adds a choice to the beat; a beat that begins with
  ``?`` is left out of some stories; an indented line continues the line before; ``---`` ends a
  frame.

Training and held-out text have no sentence in common: a checksum of a sentence decides where it
belongs, and a story has only sentences of one of the two. There are also conversations for
training (``demo_talk``); none is held out.
"""

import random
import re
import zlib
from collections.abc import Iterator
from itertools import islice

import demo_grammar
import demo_talk

DOMAINS = tuple(demo_grammar.FRAMES)
NEW_DOMAINS = DOMAINS[1:]

HELDOUT_SHARE = 8  # one of 8 sentences is held out

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


LEXICON = {name: _split(text) for name, text in (demo_grammar.WORDS | demo_talk.WORDS).items()}


class _NoSentence(Exception):
    """For a beat, no training (or held-out) sentence was found."""


def _parse(frames: str) -> list[list[tuple[bool, list[str]]]]:
    """Parse frames into lists of beats; a beat is (may be left out, choices)."""
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
TALK = {domain: _parse(text) for domain, text in demo_talk.TALK.items()}
SYSTEM = _parse(demo_talk.SYSTEM)


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
    """Whether ``sentence`` is held out."""
    return zlib.crc32(sentence.encode()) % HELDOUT_SHARE == 0


def _realise(template: str, bound: dict[str, str], rng: random.Random) -> str:
    """Generate a sentence from ``template``; its random words are added to ``bound``."""
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


def _sentence(
    templates: list[str], bound: dict[str, str], rng: random.Random, heldout: bool
) -> str:
    """Generate a training or held-out sentence for one beat; ``bound`` is updated."""
    for _ in range(_TRIES):
        trial = dict(bound)
        sentence = _realise(rng.choice(templates), trial, rng)
        if is_heldout(sentence) == heldout:
            bound.update(trial)
            return sentence
    raise _NoSentence


def sentences(domain: str, rng: random.Random, heldout: bool = False) -> list[str]:
    """One story of ``domain`` as a list of training sentences, or of held-out sentences."""
    while True:
        bound: dict[str, str] = {}
        frame = rng.choice(FRAMES[domain])
        try:
            return [
                _sentence(templates, bound, rng, heldout)
                for optional, templates in frame
                if not (optional and rng.random() > _OPTIONAL)
            ]
        except _NoSentence:
            continue


def documents(domain: str, seed: int, heldout: bool = False) -> Iterator[list[str]]:
    """Infinitely many stories of ``domain``; the same stories for the same seed."""
    rng = random.Random(f"{domain} {seed} {heldout}")
    while True:
        yield sentences(domain, rng, heldout)


def conversations(domain: str, seed: int) -> Iterator[list[tuple[str, str]]]:
    """Infinitely many conversations of roles and texts, with one to three questions of ``domain``.

    Some begin with a system prompt. A question of a new domain can follow one of the old domain.
    """
    rng = random.Random(f"talk {domain} {seed}")
    while True:
        turns: list[tuple[str, str]] = []
        if rng.random() < 0.2:
            turns.append(("system", _turns(SYSTEM, rng)[0]))
        for n in reversed(range(rng.randint(1, 3))):
            mixed = "old" if n and rng.random() < 0.4 else domain
            turns += zip(("user", "assistant"), _turns(TALK[mixed], rng), strict=True)
        yield turns


def _turns(frames: list[list[tuple[bool, list[str]]]], rng: random.Random) -> list[str]:
    bound: dict[str, str] = {}
    return [_realise(rng.choice(beat), bound, rng) for _, beat in rng.choice(frames)]


def word_lists(seed: int) -> Iterator[str]:
    """Infinitely many lists of words from all domains, each written twice; they are not sentences.

    They teach a model to spell every word and to copy, but nothing about which words belong
    together: the words of a list are random and independent.
    """
    stories = (story for d in DOMAINS for story in islice(documents(d, seed), 1500))
    words = sorted(
        {word for story in stories for word in re.findall(r"[A-Za-z]+", " ".join(story))}
    )
    rng = random.Random(f"words {seed}")
    while True:
        line = " ".join(rng.sample(words, rng.randint(8, 24)))
        yield f"{line}. {line}."
