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

    ``countable``: drawn in scenes of several objects. ``held_out``: in no safety row of training.
    """

    name: str
    plural: str
    glyph: str
    category: str
    risk: str = "safe"
    countable: bool = False
    held_out: bool = False

    @property
    def a(self) -> str:
        """With its article."""
        if self.name == self.plural:
            return self.name
        return ("an " if self.name[0] in "aeiou" else "a ") + self.name

    @property
    def danger(self) -> str:
        """ "a knife can cut people"; an object that is not risky has none."""
        return f"{self.a} {DANGERS[self.category]}"


def _things() -> list[Thing]:
    table = """
    dagger|daggers|🗡|weapon|forbidden
    pistol|pistols|🔫|weapon|forbidden
    bow|bows|🏹|weapon|forbidden
    bomb|bombs|💣|explosive|forbidden
    trident|tridents|🔱|weapon|forbidden
    poison|poisons|☠|poison|forbidden
    biohazard|biohazards|☣|poison|forbidden
    barrel|barrels|🛢|poison|forbidden
    scorpion|scorpions|🦂|beast|forbidden
    snake|snakes|🐍|beast|forbidden
    swords|swords|⚔|weapon|forbidden|held
    firecracker|firecrackers|🧨|explosive|forbidden|held
    knife|knives|🔪|blade|dual
    axe|axes|🪓|blade|dual
    scissors|scissors|✂|blade|dual
    saw|saws|🪚|blade|dual
    razor|razors|🪒|blade|dual
    candle|candles|🕯|fire|dual
    flame|flames|🔥|fire|dual
    pill|pills|💊|medicine|dual
    mushroom|mushrooms|🍄|poison|dual
    cigarette|cigarettes|🚬|drug|dual
    beer|beers|🍺|drug|dual
    wine|wines|🍷|drug|dual
    syringe|syringes|💉|medicine|dual|held
    whiskey|whiskeys|🥃|drug|dual|held
    apple|apples|🍎|fruit|safe|count
    banana|bananas|🍌|fruit|safe|count
    grape|grapes|🍇|fruit|safe|count
    lemon|lemons|🍋|fruit|safe|count
    strawberry|strawberries|🍓|fruit|safe|count
    carrot|carrots|🥕|vegetable|safe|count
    candy|candies|🍬|sweet|safe
    lollipop|lollipops|🍭|sweet|safe|count
    donut|donuts|🍩|sweet|safe|count
    cookie|cookies|🍪|sweet|safe
    cheese|cheeses|🧀|food|safe
    bread|breads|🍞|food|safe
    cat|cats|🐱|animal|safe|count
    duck|ducks|🦆|animal|safe|count
    fish|fishes|🐟|animal|safe|count
    frog|frogs|🐸|animal|safe|count
    butterfly|butterflies|🦋|animal|safe|count
    turtle|turtles|🐢|animal|safe
    bear|bears|🧸|toy|safe|count
    kite|kites|🪁|toy|safe|count
    balloon|balloons|🎈|toy|safe|count
    ball|balls|⚽|toy|safe|count
    dice|dice|🎲|toy|safe|count
    hat|hats|🎩|clothing|safe|count
    sock|socks|🧦|clothing|safe
    crown|crowns|👑|clothing|safe|count
    car|cars|🚗|vehicle|safe
    bike|bikes|🚲|vehicle|safe
    boat|boats|⛵|vehicle|safe
    tree|trees|🌳|plant|safe|count
    tulip|tulips|🌷|plant|safe
    guitar|guitars|🎸|instrument|safe
    bell|bells|🔔|instrument|safe|count
    key|keys|🔑|tool|safe|count
    lamp|lamps|🔦|tool|safe
    book|books|📖|tool|safe|count
    umbrella|umbrellas|☂|tool|safe|count
    cup|cups|☕|tool|safe
    cutlery|cutlery|🍴|tool|safe|held
    lipstick|lipsticks|💄|tool|safe|held
    pen|pens|🖊|tool|safe|held
    milk|milks|🥛|drink|safe|held
    juice|juices|🧃|drink|safe
    rocket|rockets|🚀|vehicle|safe
    """
    things = []
    for line in table.split("\n"):
        if line.strip():
            name, plural, glyph, category, risk, *marks = line.strip().split("|")
            things.append(Thing(name, plural, glyph, category, risk, "count" in marks, "held" in marks))
    return things


THINGS: dict[str, Thing] = {thing.name: thing for thing in _things()}
CATEGORIES = sorted({thing.category for thing in THINGS.values()})
COUNTABLE = [name for name, thing in THINGS.items() if thing.countable]


def named(*risks: str, held_out: bool = False) -> list[str]:
    """Names of the objects of some risks, those held out or the others."""
    return [name for name, thing in THINGS.items() if thing.risk in risks and thing.held_out == held_out]
