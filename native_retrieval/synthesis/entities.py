"""Reads a document's lead: what it is about, and which questions its sentences answer."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

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
