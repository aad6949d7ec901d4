"""Makes training conversations from a bare corpus, for users who have no logs.

Without a model (seconds, the same output everywhere), and with one:

    python -m native_retrieval.synthesis --corpus corpus.jsonl --output data/mine --num_conversations 2000
    python -m native_retrieval.synthesis --corpus corpus.jsonl --output data/mine --num_conversations 2000 \
        --llm Qwen/Qwen2.5-1.5B-Instruct

The output has the BEIR layout with chat messages that training and evaluation read. `TemplateGenerator` cuts its
questions out of what each text says (its verbs, years, names), so that their vocabulary is the corpus's own.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# ---- Templates. {s} {o} {p}: the subject, its object form, its possessive; they become a pronoun or "that river" in
# ---- the user's words and the full name in the rewrite. {is}, {does}: verbs that agree with the subject.

# kind -> (rewrite, ways to ask); the first question about a document. A way that starts with "=" is its own rewrite.
OPENERS = {
    "person": (
        "Who {is} {s}, and what {is} {s} known for?",
        (
            "who {is} {s}?|what {is} {s} known for?|can you tell me who {s} {is}?|tell me a bit about {s}|"
            "=why {is} {s} famous?|who {is} {s} exactly, and why should I care?|what do I need to know about {s}?"
        ),
    ),
    "place": (
        "What and where {is} {s}?",
        (
            "=where {is} {s}?|=what {is} {s} like?|tell me something about {s}|what {is} {s} known for?|"
            "I'm reading about {s}, where exactly {is} it?|which part of the world {is} {s} in?"
        ),
    ),
    "work": (
        "What {is} {s} about?",
        (
            "what {is} {s}?|what {is} {s} about?|=who made {s}?|=when did {s} come out?|I keep hearing of {s}, what is it?|"
            "can you give me the gist of {s}?|is {s} worth knowing?"
        ),
    ),
    "organisation": (
        "What {is} {s}, and what {does} {s} do?",
        "what {is} {s}?|what does {s} do?|what kind of outfit {is} {s}?|who or what {is} {s}?|tell me about {s}",
    ),
    "species": (
        "What {is} {s}?",
        (
            "what {is} {s}?|=where {does} {s} live?|what sort of living thing {is} {s}?|=how would I recognise {s}?|"
            "tell me about {s}|anything interesting about {s}?"
        ),
    ),
    "event": (
        "What happened in {s}?",
        (
            "what happened in {s}?|=when was {s}?|what {is} {s} about?|=who was involved in {s}?|=why did {s} happen?|"
            "give me a short summary of {s}"
        ),
    ),
    "concept": (
        "What {is} {s}?",
        (
            "what {is} {s}?|what does one mean by {s}?|how would you define {s}?|can you explain {s}?|"
            "explain {s} like I'm twelve|=what {is} {s} good for?|I never understood {s}, help me out"
        ),
    ),
}
# What a sentence lets one ask -> (rewrite, ways to ask)
ASPECTS = {
    "when": (
        "When was it that {s} {vp}?",
        (
            "do you know when {s} {vp}?|when was it that {s} {vp}?|in what year would it be that {s} {vp}?|"
            "{s} {vp}, but when exactly?|roughly when would that be, that {s} {vp}?|any idea since when {s} {vp}?"
        ),
    ),
    "truth": (
        "Is it true that {s} {vp}?",
        (
            "is it true that {s} {vp}?|so {s} {vp}?|did I get that right, {s} {vp}?|I read that {s} {vp}. true?|"
            "someone told me {s} {vp}, is that so?|would you say that {s} {vp}?|{s} {vp}, or am I mixing things up?"
        ),
    ),
    "yesno": ("{Aux} {s} {rest}?", "{aux} {s} {rest}?|{aux} {s} really {rest}?|I wonder, {aux} {s} {rest}?"),
    "how": (
        "{Ask} {aux} {s} {participle}?",
        "{ask} {aux} {s} {participle}?|{ask} {aux} {s} {participle} then?|can you say {ask} {s} {aux} {participle}?",
    ),
    "key": (
        "What does {key} have to do with {o}?",
        (
            "what about {key}?|and {key}?|how does {key} come into it?|what {does} {s} have to do with {key}?|"
            "{key}, how is that related to {o}?|where does {key} fit in?|isn't {key} part of the story too?|"
            "is there a link between {o} and {key}?|tell me about {o} and {key}"
        ),
    ),
    "own": (
        "What can be said about {p} {key}?",
        (
            "and {p} {key}?|what about {p} {key}?|tell me more about {p} {key}|what do we know about {p} {key}?|"
            "is there anything on {p} {key}?|how about {p} {key}?"
        ),
    ),
    "year": (
        "What happened with {o} in {year}?",
        (
            "what happened in {year}?|and in {year}?|anything special about {year}?|why does {year} matter for {o}?|"
            "what was it with {year}?|how did {year} go for {o}?"
        ),
    ),
    "compare": (
        "Is {s} older than {full}?",
        (
            "{is} {s} older than {other}?|which is older, {o} or {other}?|was that before or after {other}?|"
            "how does {o} compare with {other} in age?"
        ),
    ),
    "which": (
        "What is the name of {a}?",
        (
            "who or what is called {a}?|which one {was} {a}?|what's the name of {a}, I forgot|I'm looking for {a}|"
            "there is {a}. name?|do you know {a}?"
        ),
    ),
}
WHEN_ELLIPSIS = "when was that?|and when?|what year?|when exactly?|which year would that be?|how long ago was that?"
BACK = "back to {other}: {q}|about {other} again, {q}|one more thing on {other}. {q}|and for {other}, {q}"
SWITCH = "different question: {q}|ok, something else. {q}|by the way, {q}|{q}|{q}|changing the subject, {q}|also, {q}"
LINKED = "you mentioned {n}. {q}|{n} rings a bell. {q}|hm, {n}, {q}|let's talk about {n} then. {q}|now {n}: {q}"
LEAD_INS = "ok, |thanks. |interesting! |hm, |oh nice, |got it. |I see. |wow, |right, |great, |sure but |fine. |huh, "
SMALL_TALK = (
    ("thanks, that helps", "You're welcome."),
    ("haha ok", "Anything else you would like to know?"),
    ("I had no idea!", "Many people don't. What else can I look up?"),
    ("let me write that down", "Take your time."),
    ("good to know, thank you", "Happy to help."),
    ("hm, give me a second", "Of course."),
)

# The first kind with a word in the lead's definition wins, so the narrow ones stand first.
KIND_WORDS = {
    "event": "war battle revolution treaty rebellion siege conflict massacre earthquake election revolt uprising",
    "work": "film novel painting album book play opera poem song series sculpture sitcom ballet symphony epic videogame",
    "organisation": "company university organization organisation agency corporation party institution museum club",
    "place": "city country island river mountain lake sea region state capital province town continent desert peninsula "
    "archipelago strait canal volcano bay ocean republic kingdom empire territory range valley gulf bridge",
    "species": "species genus bird mammal plant tree fish reptile insect lizard snake breed shrub herb fruit animal "
    "mammals birds plants fishes insects reptiles trees wasp beetle",
}
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the of in on at to for by from with and or but as is are was were be been being that which who whom whose "
        "its his her their it he she they this these those into over under between among during after before about "
        "than such other more most many some any all each also not no only when where while through if so own",
    )
)
AUXILIARIES = frozenset({"is", "are", "was", "were", "has", "had", "can", "may", "could", "would", "will", "must"})
MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
TIME = re.compile(
    rf",? (?:on|in|since|from|around|between|during|until|by|at)(?: the)?(?: (?:early|mid|late|mid-))?"
    rf"(?: c\.)?(?: \d{{1,2}})?(?: (?:{MONTH}))?(?: \d{{1,2}},)? ?(?:1[0-9]\d\d|20[0-2]\d|\d{{2,4}} (?:BC|AD))s?\b"
    r"(?: (?:to|and|until) (?:the )?(?:\d{3,4}|his death|her death))?"
)
YEAR = re.compile(r"\b(?:1[0-9]\d\d|20[0-2]\d)\b")
# A full stop ends no sentence after an initial or an abbreviation.
SENTENCE_END = re.compile(r"(?<!\b[A-Z]\.)(?<!\bc\.)(?<!\b(?:St|Dr|Mr|Jr|Sr)\.)(?<!\blit\.)(?<=[.!?])\s+(?=[A-Z\"“])")
PROPER = re.compile(r"(?:[A-Z][\w'’-]+)(?: (?:(?:of|the|de|van|von|and) )?[A-Z][\w'’-]+){0,3}")
OWNED = re.compile(r"\b(?i:its|his|her|their) ((?:[a-z-]+ ){0,2}[a-z-]{4,})")
HOW = re.compile(
    r"^(is|was|are|were) ((?:(?:\w+ly|often|best|also|most|sometimes) )?(?:\w+ed|known|made|found|born|built|written|"
    r"seen|grown|drawn)) (as|for|by|from|of|in|near|at) "
)
LOOSE_END = re.compile(r"(?:ed|ing|ic|al|ous|ive|ly)$")  # adjectives and verbs: no end of a noun phrase
# Where the noun of a definition ends: "a 1968 film | directed by", "a river | in".
HEAD_END = re.compile(
    r" (?:of|in|that|which|who|where|known|from|with|by|for|on|and|to|is|was|used|made|native|\w+ed|\w+ing) |[,.;:]| [–(]"
)
PERSON_NOUN = re.compile(
    r"(?:[a-z]{3}ist|ician|orian|logian|writer|painter|composer|singer|player|maker|leader|ruler|engineer|explorer|driver"
    r"|author|actor|actress|emperor|king|queen|poet|philosopher|scholar|officer|general|statesman|monk|saint|bishop|pope)$"
)
NOT_A_NAME = re.compile(rf"(?:{MONTH}|The|In|[A-Z]\w+(?:ish|ese|ench|utch|rman|ican|ian)$)\b")
CONTENT_PAIR = re.compile(
    r"(?:the|of|an?|with|for) ((?!differ|vari|sever)[a-z]{3,}[a-rt-z] [a-z]{5,})(?= (?:of|in|and|that|for|by|to|from)|[,.])"
)


@dataclass(frozen=True)
class Turn:
    """One user turn. `document_id` is None for small talk, which stays in the history and is no query."""

    content: str
    rewrite: str
    answer: str
    document_id: str | None
    aspect: str
    switch: bool = False


class Generator(Protocol):
    def generate(self, documents: Sequence[dict[str, str]], num_conversations: int) -> Iterator[list[Turn]]:
        """Yields conversations of 3 to 6 user turns about `documents`, at most `num_conversations` of them."""


@dataclass
class Entity:
    """What the templates need to know about one document, guessed from its lead."""

    id: str
    full: str  # the unambiguous name, for rewrites: "Vertigo (film)", "the blue whale"
    name: str  # what a user would write: "Vertigo"
    kind: str
    noun: str  # "river", as in "that river"
    pronouns: tuple[str, str, str]  # subject, object, possessive
    verbs: tuple[str, str]  # "is" or "was" and so on, "does" or "did" and so on
    text: str
    questions: list[tuple[str, dict[str, str], str]] = field(default_factory=list)  # aspect, slots, answer sentence


def clip(clause: str, words: int = 13) -> str:
    """The clause up to its first inner boundary that leaves at most `words` words; empty when there is none."""
    for part in (clause, *(re.split(rf"{mark}", clause)[0] for mark in ("; ", ", ", r" (?:which|who|where|while) "))):
        part = part.strip(" ,;.")
        if part.split()[-1:] and part.split()[-1] in FUNCTION_WORDS:
            continue
        if 1 < len(part.split()) <= words and part.count("(") == part.count(")") and part.count('"') % 2 == 0:
            return part
    return ""


def read_entity(document: dict[str, str]) -> Entity | None:
    """Reads a document's lead: kind, names, pronouns and what can be asked. None when the text is of no use."""
    text = re.sub(r"\s+", " ", document["text"]).strip()
    title = document["title"].strip()
    bare = re.sub(r"\s*\([^)]*\)$", "", title)
    if len(text) < 40 or not bare or re.search(r"\brefers? to:|\bmay refer to\W*$", text) or bare.startswith("List of"):
        return None
    # Leads lose their formulas ("integers  with  such that ."): such a sentence is no good for a question.
    sentences = [s for s in SENTENCE_END.split(text) if not re.search(r"\s[.,;]|\u2060|[{}|]", s)]
    if not sentences:
        return None
    definition = re.search(r"\b(is|was|are|were) (?:one of )?(an?|the|any)? ?(.+)", sentences[0])
    verb, article, complement = definition.groups() if definition else ("is", None, "")
    head = HEAD_END.split(
        re.sub(r"^(?:\w+ )?(?:species|type|group|genus|form|kind|class|family) of ", "", complement) + " "
    )
    words = head[0].split()
    noun = words[-1].lower() if 0 < len(words) <= 6 and words[-1].isalpha() and not words[-1].endswith("est") else "one"
    early = set(complement.lower().replace(",", "").split()[:9])
    kind = next((kind for kind, known in KIND_WORDS.items() if early & set(known.split())), "concept")
    he, she = (len(re.findall(rf"\b(?:{p})\b", text, re.IGNORECASE)) for p in ("he|his|him", "she|her|hers"))
    capitals = all(word[0].isupper() for word in re.findall(r"\w{4,}", bare))
    human = he + she > 1 or (PERSON_NOUN.search(noun) and (he + she or " " in bare))
    if capitals and human and kind not in ("work", "event"):
        kind = "person"
    if kind in ("place", "work", "organisation") and re.match(r"An? ", text):
        kind = "concept"  # "A coast is land next to the sea": a sort of place, no place
    past, plural = verb in ("was", "were"), verb in ("are", "were") and kind != "person"
    # "A black hole is ..." tells how the title is written inside a sentence, "Tardigrades are ..." its plural.
    seen = re.match(rf"(?:In [^,]+, )?(?:(an?|the) )?({re.escape(bare)}(?:s|es)?)\b", text, re.IGNORECASE)
    name = seen[2] if seen and (seen[1] or plural) else bare
    if name[1:2].islower() and re.search(rf"[a-z,] {re.escape(bare.lower())}", text):
        name = name[0].lower() + name[1:]
    if seen and seen[1] and not plural:
        name = f"{seen[1].lower()} {name}"
    entity = Entity(
        id=document["_id"],
        full=title if title != bare else name,
        name=name,
        kind=kind,
        noun=noun,
        pronouns=("it", "it", "its"),
        verbs=("was" if past else "is", "did" if past else "does"),
        text=text,
    )
    if plural:
        entity.pronouns = ("they", "them", "their")
        entity.verbs = ("were", "did") if past else ("are", "do")
    elif kind == "person":
        entity.pronouns = ("she", "her", "her") if she > he else ("he", "him", "his")
        if he + she == 0:  # the text does not say, so neither do we
            entity.pronouns = (f"this {noun}", f"this {noun}", f"this {noun}'s")
    described = clip(complement, 18)
    if definition and article and len(described.split()) > 4 and bare.lower() not in described.lower():
        entity.questions.append(("which", {"a": f"{article} {described}", "was": verb}, sentences[0]))
    own = re.escape(bare.split()[-1] if kind == "person" else bare)
    starts = rf"They|{own}(?:s|es)?" if plural else rf"He|She|It|(?:The |An? )?(?:{re.escape(bare)}|{own})"
    subject = re.compile(rf"^(?:{starts}) (?!{'is|was|has' if plural else 'are|were|have'})(?=[a-z])", re.IGNORECASE)
    for number, sentence in enumerate(sentences):
        for aspect, slots in read_sentence(sentence, subject, number):
            if "key" not in slots or slots["key"].lower() not in f"{title} the {noun}".lower():
                entity.questions.append((aspect, slots, sentence))
    return entity


def read_sentence(sentence: str, subject: re.Pattern[str], number: int) -> Iterator[tuple[str, dict[str, str]]]:
    """What one sentence answers: pairs of aspect and template slots. `number` is 0 for the definition."""
    own_words = subject.sub("", sentence)
    predicate = own_words if own_words != sentence else ""
    first, _, rest = predicate.partition(" ")
    # "Fibonacci numbers are": the name goes on, so this is no predicate. "Blue and ..." neither.
    if first in FUNCTION_WORDS - AUXILIARIES or (first not in AUXILIARIES and rest.split(" ")[0] in AUXILIARIES):
        predicate = ""
    time = TIME.search(predicate)
    if time and not re.match(r"(?:is|are) |(?:was|were) (?:an?|the|one) ", predicate):  # when is one a politician?
        vp = clip(predicate[: time.start()])
        if len(vp.split()) > 2 and vp.split()[-1] not in FUNCTION_WORDS:
            yield "when", {"vp": vp}
    vp = clip(predicate)
    if number and len(vp.split()) > 3:
        yield "truth", {"vp": vp}
        if first in AUXILIARIES:
            yield "yesno", {"aux": first, "rest": vp.partition(" ")[2]}
    if found := HOW.match(predicate):
        aux, participle, preposition = found.groups()
        ask = "where" if preposition in ("in", "near", "at") else "what"
        if ask == "what" or re.match(r"(?:the )?[A-Z]", predicate[found.end() :]):  # "born in Paris", not "in 1900"
            end = "" if ask == "where" else f" {preposition}"
            yield "how", {"ask": ask, "aux": aux, "participle": participle + end}
    for owned in OWNED.finditer(sentence):
        words = owned[1].split()
        while words and (words[-1] in FUNCTION_WORDS or LOOSE_END.search(words[-1])):
            words.pop()
        if words and not FUNCTION_WORDS & set(words):
            yield "own", {"key": " ".join(words)}
    for year in dict.fromkeys(YEAR.findall(sentence)):
        yield "year", {"year": year}
    for proper in PROPER.finditer(own_words):
        # A lone capital before a noun is an adjective: "Italian dish".
        follower = re.match(r" ([a-z]+)", own_words[proper.end() :])
        adjective = " " not in proper[0] and follower and follower[1] not in FUNCTION_WORDS | AUXILIARIES
        if proper.start() and len(proper[0]) > 3 and not adjective and not NOT_A_NAME.match(proper[0]):
            yield "key", {"key": re.sub("['’]s$", "", proper[0])}
    # Common words matter as much as names: the longest pair of neighbouring content words.
    pairs = [pair for pair in CONTENT_PAIR.findall(own_words) if not FUNCTION_WORDS & set(pair.split())]
    pairs = [pair for pair in pairs if not re.search(r"[^sui]s$", pair) and not LOOSE_END.search(pair)]
    if pairs:
        yield "key", {"key": f"the {max(pairs, key=len)}"}


class TemplateGenerator:
    """Writes conversations from templates filled with the documents' own words. The same seed and documents give the
    same conversations on every machine."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def generate(self, documents: Sequence[dict[str, str]], num_conversations: int) -> Iterator[list[Turn]]:
        """Yields `num_conversations` conversations. Raises ValueError when fewer than two documents are usable."""
        rng = random.Random(self.seed)
        entities = [entity for document in documents if (entity := read_entity(document)) and entity.questions]
        if len(entities) < 2:
            raise ValueError(f"TemplateGenerator needs 2 usable documents to switch between, got {len(entities)}.")
        by_title = {entity.name.lower(): entity for entity in entities}
        order: list[Entity] = []
        for _ in range(num_conversations):
            if not order:  # every document gets its turn before any gets a second
                order = rng.sample(entities, len(entities))
            yield self._converse(rng, order.pop(), entities, by_title)

    def _converse(
        self, rng: random.Random, first: Entity, entities: list[Entity], by_title: dict[str, Entity]
    ) -> list[Turn]:
        length = rng.randint(3, 6)
        switch_at = rng.randrange(2, length) if rng.random() < 0.65 else length
        chat_at = rng.randrange(2, length) if length > 3 and rng.random() < 0.15 else length
        turns: list[Turn] = []
        entity, previous, unused = first, first, self._shuffled(rng, first)
        for position in range(length):
            if position == chat_at:
                content, answer = rng.choice(SMALL_TALK)
                turns.append(Turn(content, content, answer, None, "small_talk"))
            elif position == 0:
                turns.append(self._open(rng, entity, unused, "{q}"))
            elif position == switch_at or (entity is first and not any(q[0] != "which" for q in unused)):
                switch_at = position  # or earlier than planned: there is nothing left to ask
                previous, (entity, linked) = entity, self._next_topic(rng, entity, entities, by_title)
                unused = self._shuffled(rng, entity)
                frame = rng.choice((LINKED if linked else SWITCH).split("|")).replace("{n}", entity.name)
                turns.append(self._open(rng, entity, unused, frame, pronoun=linked and entity.name in frame))
            elif position > switch_at and previous is not entity and rng.random() < 0.35:
                turns.append(self._look_back(rng, previous, entity))
                if turns[-1].document_id == previous.id:
                    entity, previous, unused = previous, entity, self._shuffled(rng, previous)
            else:
                turns.append(self._follow_up(rng, entity, unused, turns[-1]))
        return turns

    @staticmethod
    def _shuffled(rng: random.Random, entity: Entity) -> list[tuple[str, dict[str, str], str]]:
        # Two of a sort at most: names and years would crowd out the predicates.
        groups: dict[str, list[tuple[str, dict[str, str], str]]] = {}
        for question in entity.questions:
            groups.setdefault(question[0], []).append(question)
        picked = [question for group in groups.values() for question in rng.sample(group, min(2, len(group)))]
        # One sentence's predicate makes one question, not three that differ in form alone.
        asked: dict[tuple[str, str], tuple[str, dict[str, str], str]] = {}
        for question in rng.sample(picked, len(picked)):
            form = "predicate" if question[0] in ("truth", "yesno", "how") else str(question[:2])
            asked.setdefault((question[2], form), question)
        return list(asked.values())

    @staticmethod
    def _next_topic(
        rng: random.Random, entity: Entity, entities: list[Entity], by_title: dict[str, Entity]
    ) -> tuple[Entity, bool]:
        """Another document: one that this one mentions, where there is one, as real conversations drift."""
        names = (match[0].lower() for match in PROPER.finditer(entity.text))
        linked = [by_title[name] for name in dict.fromkeys(names) if name in by_title and by_title[name] is not entity]
        if linked and rng.random() < 0.7:
            return rng.choice(linked), True
        other = entity
        while other is entity:
            other = rng.choice(entities)
        return other, False

    def _open(self, rng: random.Random, entity: Entity, unused: list, frame: str, pronoun: bool = False) -> Turn:
        descriptive = [question for question in unused if question[0] == "which"]
        if descriptive and not pronoun and rng.random() < 0.3:
            aspect, slots, answer = descriptive[0]
        elif (
            unused and rng.random() < 0.4 and (rest := [q for q in unused if q[0] in ("when", "truth", "yesno", "how")])
        ):
            aspect, slots, answer = rest[0]
            unused.remove(rest[0])
        else:
            aspect, slots, answer = "opener", {}, entity.questions[0][2]
        return self._ask(
            rng, entity, aspect, slots, answer, frame, "pronoun" if pronoun else "name", switch=frame != "{q}"
        )

    def _follow_up(self, rng: random.Random, entity: Entity, unused: list, before: Turn) -> Turn:
        candidates = [question for question in unused if question[0] != "which"]
        dated = [q for q in candidates if q[0] == "when" and q[2] == before.answer]
        if dated and rng.random() < 0.5:  # "and when?", about what the last answer said
            unused.remove(dated[0])
            return self._ask(rng, entity, "when", dated[0][1], before.answer, variants=WHEN_ELLIPSIS)
        if not candidates:
            return self._ask(rng, entity, "opener", {}, entity.questions[0][2])
        unused.remove(candidates[0])
        frame = rng.choice(LEAD_INS.split("|")) + "{q}" if rng.random() < 0.25 else "{q}"
        return self._ask(rng, entity, *candidates[0], frame)

    def _look_back(self, rng: random.Random, earlier: Entity, current: Entity) -> Turn:
        """A comparison with the earlier entity (about the current one), or a return to it."""
        other = rng.choice([f"the {earlier.noun}", "the first one", earlier.name, "the previous one"])
        dated = [question for question in current.questions if question[0] == "year"]
        if dated and YEAR.search(earlier.text) and rng.random() < 0.8:
            return self._ask(rng, current, "compare", {"other": other, "full": earlier.full}, dated[0][2])
        askable = [question for question in earlier.questions if question[0] != "which"]
        aspect, slots, answer = rng.choice(askable or [("opener", {}, earlier.questions[0][2])])
        return self._ask(
            rng, earlier, aspect, slots, answer, rng.choice(BACK.split("|")).replace("{other}", other), switch=True
        )

    @staticmethod
    def _ask(
        rng: random.Random,
        entity: Entity,
        aspect: str,
        slots: dict[str, str],
        answer: str,
        frame: str = "{q}",
        mention: str | None = None,
        variants: str | None = None,
        switch: bool = False,
    ) -> Turn:
        """One user turn: the casual wording around a pronoun, "that river" or the name, and its standalone rewrite."""
        rewrite, ways = OPENERS[entity.kind] if aspect == "opener" else ASPECTS[aspect]
        mention = mention or rng.choices(("pronoun", "noun", "name"), (7, 2, 1))[0]
        if mention == "pronoun":
            forms = entity.pronouns
        else:
            # A title with a qualifier, "Vertigo (film)", is typed in full about half the time.
            name = entity.full if rng.random() < 0.5 else entity.name
            if mention == "noun":
                those = ("those", "these") if entity.noun.endswith("s") else ("that", "this")
                name = f"{rng.choice(('the', *those))} {entity.noun}"
            forms = (name, name, f"{name}'s")
        way = rng.choice((variants or ways).split("|"))
        if way.startswith("="):
            way = rewrite = way[1:]
        question = fill(way, forms, entity, slots)
        standalone = fill(rewrite, (entity.full, entity.full, f"{entity.full}'s"), entity, slots)
        content = casual(rng, frame.replace("{q}", question))
        return Turn(content, standalone[0].upper() + standalone[1:], answer, entity.id, aspect, switch)


def fill(template: str, forms: tuple[str, str, str], entity: Entity, slots: dict[str, str]) -> str:
    """The template with the subject's forms (subject, object, possessive), agreeing verbs and slots filled in."""
    capitals = {key.capitalize(): value.capitalize() for key, value in slots.items()}
    s, o, p = forms
    return template.format(
        **{"s": s, "o": o, "p": p, "is": entity.verbs[0], "does": entity.verbs[1], **capitals, **slots}
    )


def casual(rng: random.Random, text: str) -> str:
    """The text in one of the ways people type: tidy, all in lower case, without the question mark, contracted."""
    if rng.random() < 0.5:
        text = re.sub(r"\b(what|who|where|how) is\b", r"\1's", text, count=1)
    if rng.random() < 0.45:
        text = text.lower()
        return text.rstrip("?. ") if rng.random() < 0.5 else text
    return text[0].upper() + text[1:]


LLM_PROMPT = """Text about "{title}":
{text}

A person chats with an assistant about this text. Write {count} questions that this person asks one after the other, \
each answered by the text. Question 1 names {title}. The later ones use pronouns or leave words out, as people do in a \
chat. Put each question on its own line, and behind it, after a "|", the same question rewritten so that it can be \
understood alone, with the name {title} in it. Example of two lines:
When was the Eiffel Tower built? | When was the Eiffel Tower built?
and how tall is it? | How tall is the Eiffel Tower?
Write the {count} lines and nothing else."""


class LLMGenerator:
    """Writes conversations with a causal LM: questions about one document, then about a second one.

    `model` and `tokenizer` are any pair of transformers; the tokenizer's chat template is used where it has one.
    What cannot be parsed is skipped, so that fewer conversations than asked for may come back.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        temperature: float = 0.8,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_new_tokens, self.temperature, self.seed = (
            batch_size,
            max_new_tokens,
            temperature,
            seed,
        )
        if tokenizer.pad_token_id is None:  # GPT-2 and Llama have none, and a batch needs one
            tokenizer.pad_token = tokenizer.eos_token

    def generate(self, documents: Sequence[dict[str, str]], num_conversations: int) -> Iterator[list[Turn]]:
        """Yields up to `num_conversations` conversations, and stops after three times as many attempts."""
        rng = random.Random(self.seed)
        documents = [document for document in documents if read_entity(document)]
        if len(documents) < 2:
            raise ValueError(f"LLMGenerator needs 2 usable documents to switch between, got {len(documents)}.")
        written = attempts = 0
        while written < num_conversations and attempts < 3 * num_conversations:
            plans = [
                [(document, rng.randint(2, 3)) for document in rng.sample(documents, 2)]
                for _ in range(min(self.batch_size, 3 * num_conversations - attempts))
            ]
            attempts += len(plans)
            asked = [part for plan in plans for part in plan]
            prompts = [LLM_PROMPT.format(title=d["title"], text=d["text"][:1500], count=n) for d, n in asked]
            outputs = iter(self.complete(prompts, seed=self.seed + attempts))
            for plan in plans:
                turns = [
                    turn
                    for number, (document, count) in enumerate(plan)
                    for turn in parse_turns(next(outputs), document, count, switch=number > 0)
                ]
                if len(turns) >= 3 and written < num_conversations:
                    written += 1
                    yield turns
        if written < num_conversations:
            logger.warning("The LLM wrote %d usable conversations in %d attempts.", written, attempts)

    def complete(self, prompts: list[str], seed: int) -> list[str]:
        """The model's continuations of `prompts`, without the prompts."""
        import torch

        from modeling_native_retrieval import plain_text, special_tokens_of

        special_tokens = special_tokens_of(self.tokenizer).values()  # documents are strangers' text
        prompts = [plain_text(prompt, special_tokens) for prompt in prompts]
        if self.tokenizer.chat_template:
            prompts = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=False,  # Qwen3 would think until the tokens are used up; others' templates pass it over
                )
                for prompt in prompts
            ]
        texts: list[str] = []
        for start in range(0, len(prompts), self.batch_size):
            batch = self.tokenizer(
                prompts[start : start + self.batch_size],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                # A chat template has written the special tokens already.
                add_special_tokens=not self.tokenizer.chat_template,
                return_token_type_ids=False,
            ).to(self.model.device)
            with torch.random.fork_rng(), torch.inference_mode():
                torch.manual_seed(seed + start)
                output = self.model.generate(
                    **batch,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=True,
                    temperature=self.temperature,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            new_tokens = output[:, batch["input_ids"].shape[1] :]
            texts.extend(self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True))
        return texts


def parse_turns(output: str, document: dict[str, str], count: int, switch: bool) -> list[Turn]:
    """The turns in an LLM's output, at most `count`: lines "question | rewrite" whose rewrite names the document."""
    turns: list[Turn] = []
    name = {word for word in re.findall(r"\w+", document["title"].lower()) if len(word) > 2} or {
        document["title"].lower()
    }
    sentences = SENTENCE_END.split(re.sub(r"\s+", " ", document["text"]).strip())
    for line in output.splitlines():
        question, bar, rewrite = (part.strip(' "*') for part in line.partition("|"))
        question = re.sub(r"^(?:\d+[.):]|[-*•]|Q\d*:)\s*", "", question)
        words = set(re.findall(r"\w+", rewrite.lower()))
        if not bar or not 1 < len(question) <= 200 or not 8 <= len(rewrite) <= 200 or "|" in rewrite:
            continue
        if not rewrite.endswith("?") or not words & name or rewrite in {turn.rewrite for turn in turns}:
            continue
        if not turns and not name & set(re.findall(r"\w+", question.lower())):
            question = rewrite  # nothing has named the document yet
        answer = max(sentences, key=lambda sentence: len(words & set(re.findall(r"\w+", sentence.lower()))))
        turns.append(Turn(question, rewrite, answer, document["_id"], "llm", switch and not turns))
    return turns[:count]


def conversation_rows(turns: Sequence[Turn], conversation: str) -> Iterator[tuple[dict, str]]:
    """The query rows of one conversation and the ids of their documents: one row for each user turn but small talk."""
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(turns, start=1):
        messages = [*messages, {"role": "user", "content": turn.content}]
        if turn.document_id is not None:
            metadata = {"conv": conversation, "turn": number, "switch": turn.switch, "aspect": turn.aspect}
            row = {
                "_id": f"{conversation}-{number}",
                "messages": messages,
                "rewrite": turn.rewrite,
                "metadata": metadata,
            }
            yield row, turn.document_id
        messages = [*messages, {"role": "assistant", "content": turn.answer}]


def check_corpus(corpus: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The corpus as a list. Raises ValueError, with the row's number, on a missing field or a bad or repeated `_id`."""
    documents, seen = list(corpus), set()
    if not documents:
        raise ValueError("The corpus is empty: synthesise needs documents to ask about.")
    for number, document in enumerate(documents, start=1):
        if not isinstance(document, dict):
            raise ValueError(
                f"Corpus row {number} is a {type(document).__name__}: give an object with _id, title and text."
            )
        missing = [key for key in ("_id", "title", "text") if not isinstance(document.get(key), str)]
        if missing:
            raise ValueError(f"Corpus row {number} has no string {missing[0]!r}: it has {sorted(document)}; add it.")
        if not document["_id"] or re.search(r"[\t\r\n]", document["_id"]):
            raise ValueError(f"Corpus row {number}: _id {document['_id']!r} is empty or holds a tab or a line break.")
        if document["_id"] in seen:
            raise ValueError(f"Corpus row {number}: _id {document['_id']!r} occurs twice: drop one of the two.")
        seen.add(document["_id"])
    return documents


def synthesise(
    corpus: Iterable[dict[str, str]],
    output_dir: str | os.PathLike,
    generator: Generator,
    num_conversations: int,
    splits: Sequence[tuple[str, float]] = (("train", 0.9), ("dev", 0.05), ("test", 0.05)),
    seed: int = 0,
    write_corpus: bool = True,
) -> dict[str, int]:
    """Writes a BEIR folder with conversations about `corpus`, and returns the number of queries in each split.

    Documents and conversations are divided by the shares in `splits`: no document is asked about in two splits.
    Documents without usable text (disambiguation pages, stubs) are not asked about, but stay in the written corpus.
    The folder appears whole or not at all. Raises ValueError for an empty or broken corpus, too few usable documents
    or conversations for the splits, shares that do not add up to 1, an `output_dir` in use, and a generator that
    writes nothing usable for a split.
    """
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty: choose another output_dir, or remove it.")
    names, shares = [name for name, _ in splits], [share for _, share in splits]
    if len(set(names)) < len(names) or min(shares, default=0) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"splits need different names and positive shares that add up to 1, got {tuple(splits)}.")
    if num_conversations < len(names):
        raise ValueError(f"num_conversations must be {len(names)} or more (one a split), got {num_conversations}.")
    documents = check_corpus(corpus)
    usable = [document for document in documents if (entity := read_entity(document)) and entity.questions]
    if len(usable) < 2 * len(names):
        raise ValueError(
            f"Too few usable documents for {len(names)} splits: {2 * len(names)} wanted, {len(usable)} of "
            f"{len(documents)} are usable. Usable are English texts with a title that say what it is, as an encyclopaedia does."
        )
    random.Random(seed).shuffle(usable)
    pools = dict(zip(names, divide(usable, shares, minimum=2), strict=True))
    wanted = dict(zip(names, map(len, divide(range(num_conversations), shares, minimum=1)), strict=True))

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    counts = dict.fromkeys(names, 0)
    try:
        (partial / "qrels").mkdir(parents=True)
        with (
            open(partial / "queries.jsonl", "w", encoding="utf-8") as queries,
            tqdm(total=num_conversations, desc="Synthesising", unit="conversation") as progress,
        ):
            for name in names:
                with open(partial / "qrels" / f"{name}.tsv", "w", encoding="utf-8") as qrels:
                    qrels.write("query-id\tcorpus-id\tscore\n")
                    for number, turns in enumerate(generator.generate(pools[name], wanted[name])):
                        for row, document_id in conversation_rows(turns, f"{name}-{number}"):
                            queries.write(json.dumps(row, ensure_ascii=False) + "\n")
                            qrels.write(f"{row['_id']}\t{document_id}\t1\n")
                            counts[name] += 1
                        progress.update()
                if not counts[name]:
                    raise ValueError(f"The generator wrote no usable conversation for the split {name!r}.")
        if write_corpus:
            with open(partial / "corpus.jsonl", "w", encoding="utf-8") as file:
                for document in documents:
                    row = {key: document[key] for key in ("_id", "title", "text")}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if output.exists():  # empty, see above; a rename onto a folder fails on Windows
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return counts


def divide(items: Sequence, shares: Sequence[float], minimum: int) -> list[Sequence]:
    """Cuts `items` into one piece for each share, of at least `minimum` items; the largest share takes the rest."""
    sizes = [max(minimum, round(share * len(items))) for share in shares]
    largest = max(range(len(shares)), key=shares.__getitem__)
    sizes[largest] += len(items) - sum(sizes)
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [items[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def load_corpus(path: str | os.PathLike) -> list[dict[str, str]]:
    """Reads `corpus.jsonl` or `corpus.jsonl.gz`: the file itself, or the folder that holds it; see `data.py`."""
    from .data import read_documents

    path = Path(path)
    candidates = [path / "corpus.jsonl", path / "corpus.jsonl.gz"] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise ValueError(
            f"No corpus at {path}: expected a .jsonl or .jsonl.gz file, or a folder with corpus.jsonl in it."
        )
    return read_documents(file)


@dataclass
class SynthesisArguments:
    """The command line of `python -m native_retrieval.synthesis`."""

    corpus: str = field(metadata={"help": "corpus.jsonl (or .jsonl.gz) with _id, title and text, or its folder."})
    output: str = field(metadata={"help": "Folder to write; it must not exist yet, or be empty."})
    num_conversations: int = field(default=2000, metadata={"help": "Conversations over all splits, 3 to 6 turns each."})
    llm: str | None = field(
        default=None, metadata={"help": "Name or path of a causal LM that writes the questions. Default: templates."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the split and of the questions."})


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line on stderr."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from modeling_native_retrieval import processor_has_bfloat16

    from .cli import Parser

    groups = {"options": [field.name for field in fields(SynthesisArguments)]}
    parser = Parser(SynthesisArguments, groups, prog="python -m native_retrieval.synthesis", description=__doc__)
    try:
        arguments, unused = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if unused:
            raise ValueError(f"{unused[0]!r} belongs to no flag; --help lists all")
        generator: Generator = TemplateGenerator(arguments.seed)
        corpus = load_corpus(arguments.corpus)
        if arguments.llm is not None:
            try:
                device = "cuda" if torch.cuda.is_available() else "cpu"
                dtype = "auto" if device == "cuda" or processor_has_bfloat16() else torch.float32
                model = AutoModelForCausalLM.from_pretrained(arguments.llm, dtype=dtype)
                tokenizer = AutoTokenizer.from_pretrained(arguments.llm)
            except (ValueError, OSError) as error:
                raise ValueError(f"--llm {arguments.llm} cannot be loaded: {error}") from error
            model.to(device)
            generator = LLMGenerator(model, tokenizer, seed=arguments.seed)
        counts = synthesise(corpus, arguments.output, generator, arguments.num_conversations, seed=arguments.seed)
    except (ValueError, OSError) as error:
        print(f"synthesis: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(", ".join(f"{name}: {count} queries" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
