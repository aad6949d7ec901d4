"""The wording of the questions that `TemplateGenerator` asks.

{s} {o} {p} stand for the subject, its object form and its possessive. They become a pronoun or "that river" in the user's
words, and the full name in the rewrite. {is} and {does} are verbs that agree with the subject.
"""

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
