"""Conversations from templates that are filled with the documents' own words."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from .entities import PROPER, YEAR, Entity, read_entity
from .templates import ASPECTS, BACK, LEAD_INS, LINKED, OPENERS, SMALL_TALK, SWITCH, WHEN_ELLIPSIS


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
