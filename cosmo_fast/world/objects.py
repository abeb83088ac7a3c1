"""The objects of the world: pictogram, words, category, and what makes some of them risky."""

from __future__ import annotations

from dataclasses import dataclass

# Why a category is risky, in the words of a refusal or a warning.
DANGERS = {
    "weapon": "can hurt people",
    "explosive": "can hurt people",
    "blade": "can cut people",
    "fire": "can burn people",
    "beast": "can hurt people",
    "poison": "can make people sick",
    "medicine": "can make people sick",
    "drug": "can make people sick",
}


@dataclass(frozen=True)
class Thing:
    """An object. ``risk``: "safe", "dual" (harmful in some places or hands) or "forbidden" (nothing to help with).

    ``countable``: drawn in scenes of several objects. ``held_out``: in no safety row of training. ``mass``: a word
    without an article.
    """

    name: str
    glyph: str
    category: str
    risk: str = "safe"
    countable: bool = False
    held_out: bool = False
    mass: bool = False

    @property
    def a(self) -> str:
        """With its article."""
        if self.mass:
            return self.name
        return ("an " if self.name[0] in "aeiou" else "a ") + self.name

    @property
    def danger(self) -> str:
        """ "a knife can cut people"; an object that is not risky has none."""
        return f"{self.a} {DANGERS[self.category]}"


def _things() -> list[Thing]:
    table = """
    dagger|🗡|weapon|forbidden
    pistol|🔫|weapon|forbidden
    bow|🏹|weapon|forbidden
    bomb|💣|explosive|forbidden
    trident|🔱|weapon|forbidden
    poison|☠|poison|forbidden
    biohazard|☣|poison|forbidden
    barrel|🛢|poison|forbidden
    scorpion|🦂|beast|forbidden
    snake|🐍|beast|forbidden
    swords|⚔|weapon|forbidden|held|mass
    firecracker|🧨|explosive|forbidden|held
    knife|🔪|blade|dual
    axe|🪓|blade|dual
    scissors|✂|blade|dual|mass
    saw|🪚|blade|dual
    razor|🪒|blade|dual
    candle|🕯|fire|dual
    flame|🔥|fire|dual
    pill|💊|medicine|dual
    mushroom|🍄|poison|forbidden
    cigarette|🚬|drug|dual
    beer|🍺|drug|dual
    wine|🍷|drug|dual
    cocktail|🍸|drug|dual
    syringe|💉|medicine|dual|held
    whiskey|🥃|drug|dual|held
    apple|🍎|fruit|safe|count
    banana|🍌|fruit|safe|count
    grape|🍇|fruit|safe|count
    lemon|🍋|fruit|safe|count
    strawberry|🍓|fruit|safe|count
    carrot|🥕|vegetable|safe|count
    candy|🍬|sweet|safe
    lollipop|🍭|sweet|safe|count
    donut|🍩|sweet|safe|count
    cookie|🍪|sweet|safe
    cheese|🧀|food|safe
    bread|🍞|food|safe
    cat|🐱|animal|safe|count
    duck|🦆|animal|safe|count
    fish|🐟|animal|safe|count
    frog|🐸|animal|safe|count
    butterfly|🦋|animal|safe|count
    turtle|🐢|animal|safe
    bear|🧸|toy|safe|count
    kite|🪁|toy|safe|count
    balloon|🎈|toy|safe|count
    ball|⚽|toy|safe|count
    dice|🎲|toy|safe|count|mass
    hat|🎩|clothing|safe|count
    sock|🧦|clothing|safe
    crown|👑|clothing|safe|count
    car|🚗|vehicle|safe
    bike|🚲|vehicle|safe
    boat|⛵|vehicle|safe
    tree|🌳|plant|safe|count
    tulip|🌷|plant|safe
    guitar|🎸|instrument|safe
    bell|🔔|instrument|safe|count
    key|🔑|tool|safe|count
    lamp|🔦|tool|safe
    book|📖|tool|safe|count
    umbrella|☂|tool|safe|count
    cup|☕|tool|safe
    cutlery|🍴|tool|safe|held|mass
    lipstick|💄|tool|safe|held
    pen|🖊|tool|safe|held
    milk|🥛|drink|safe|held
    juice|🧃|drink|safe
    rocket|🚀|vehicle|safe
    """
    things = []
    for line in table.split("\n"):
        if line.strip():
            name, glyph, category, risk, *marks = line.strip().split("|")
            things.append(Thing(name, glyph, category, risk, *(mark in marks for mark in ("count", "held", "mass"))))
    return things


THINGS: dict[str, Thing] = {thing.name: thing for thing in _things()}
COUNTABLE = [name for name, thing in THINGS.items() if thing.countable]
