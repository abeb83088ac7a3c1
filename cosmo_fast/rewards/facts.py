"""Which facts a text states, and where two texts contradict each other: whole words, no model [ours].

VTPerception-R1 (arXiv 2509.24776) does not publish its matcher. Here a text is cut into clauses (at punctuation, tags,
"and", "but", "while"), a clause into words: lower case, singular, numbers as digits, without articles, some
prepositions and forms of "be". What follows a "no", "not", "without", "nothing" in its clause is not said.
"""

import re

_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_STOP = frozenset("a an the is are was were be am of at in on to this that these those there it its i you with".split())
_NEGATION = frozenset("no not without nothing neither nor isn't aren't".split())
_CLAUSES = re.compile(r"[,;!?\n()]|\.(?!\d)|\b(?:and|but|while)\b|<[^>]*>")
# Two different values of one class, said of the same thing, contradict each other.
_CLASSES = {
    "colour": "red orange yellow green blue purple pink brown black white grey gray",
    "place": "left right top bottom centre center middle corner",
    "size": "small large big tiny huge",
}
_CLASS = {word: name for name, words in _CLASSES.items() for word in words.split()}
Claims = dict[tuple[str, str], set[frozenset[str]]]  # (thing, class of attribute or "number") -> the values said


def clauses(text: str) -> list[set[str]]:
    """The normalised words of each clause of text, up to a negation."""
    result = []
    for part in _CLAUSES.split(text.casefold().replace("’", "'")):
        words = re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+(?:['-][^\W\d_]+)*", part)
        end = next((i for i, word in enumerate(words) if word in _NEGATION), len(words))
        result.append({_plain(word) for word in words[:end] if word not in _STOP})
    return [words for words in result if words]


def _plain(word: str) -> str:
    if word in _NUMBERS:
        return str(_NUMBERS.index(word))
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def stated_facts(text: str, facts: list[str]) -> list[bool]:
    """Whether text states each fact: for every clause of the fact, all of its words stand in one clause of text."""
    said = clauses(text)
    return [bool(parts := clauses(fact)) and all(any(s >= part for s in said) for part in parts) for fact in facts]


def things(facts: list[str]) -> set[str]:
    """The words of facts that are neither a number nor an attribute: what claims are about."""
    return {w for fact in facts for words in clauses(fact) for w in words if w not in _CLASS and not w[0].isdigit()}


def claims(text: str, about: set[str]) -> Claims:
    """What text says of the things in `about`, in clauses that name one of them, so that it is clear which is meant.

    "The apple at the top left" gives {("apple", "place"): {{"top", "left"}}}.
    """
    result: Claims = {}
    for words in clauses(text):
        named = about & words
        kinds = {word: "number" if word[0].isdigit() else _CLASS.get(word) for word in words}
        for kind in {kind for kind in kinds.values() if kind} if len(named) == 1 else ():
            value = frozenset(word for word in words if kinds[word] == kind)
            result.setdefault((*named, kind), set()).add(value)
    return result


def items(text: str, about: set[str]) -> set:
    """The things in `about` and the attributes that text names, and its claims of a thing's number."""
    numbers = {(claim, value) for claim, values in claims(text, about).items() for value in values if "number" in claim}
    return numbers.union(*(words & (about | _CLASS.keys()) for words in clauses(text)))


def conflicts(said: Claims, known: Claims) -> int:
    """How many values are said of a thing of which that class is known, and fit no known value of it.

    One value fits another where it says the same or less ("left" fits "top left").
    """
    pairs = [(value, known[claim]) for claim, values in said.items() if claim in known for value in values]
    return sum(not any(value <= other or other <= value for other in others) for value, others in pairs)
