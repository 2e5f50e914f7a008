"""The views of DRAKE-lite: what each data set's images are called."""

from __future__ import annotations

from collections.abc import Mapping

from fedml_plugin_fedmosaic.data.lite.pools import Facts
from fedml_plugin_fedmosaic.data.lite.views import STYLES, Labels, View

_FACES = {
    "face-smiling": "happy",
    "face-affection": "loving",
    "face-neutral-skeptical": "doubtful",
    "face-sleepy": "sleepy",
    "face-unwell": "sick",
    "face-concerned": "worried",
    "face-negative": "angry",
    "face-tongue": "playful",
}
_KINDS = {
    "Activities": "leisure",
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Objects": "tools",
    "People & Body": "people",
    "Smileys & Emotion": "feelings",
    "Travel & Places": "travel",
}
_CONCEPTS = {
    "animal-mammal": "mammals",
    "animal-bird": "birds",
    "animal-marine": "swimmers",
    "animal-bug": "insects",
    "transport-ground": "vehicles",
    "sky & weather": "weather",
    "clothing": "clothes",
    "food-fruit": "fruit",
    "food-prepared": "dishes",
    "drink": "drinks",
    "time": "clocks",
    "place-building": "buildings",
    "person-role": "professions",
    "heart": "hearts",
    "tool": "instruments",
    "sport": "sports",
    "plant-flower": "flowers",
    "face-concerned": "worries",
}
_DRAWINGS = {
    "animals/mammals": "mammal",
    "animals/birds": "bird",
    "animals/bugs": "insect",
    "food/fruit": "fruit",
    "food/desserts": "dessert",
    "food/beverages": "drink",
    "people/clothing": "garment",
    "recreation/music": "music",
    "recreation/sports": "sport",
    "transportation/vehicles": "vehicle",
    "transportation/roadsigns": "sign",
    "computer/hardware": "computer",
    "buildings/homes": "house",
    "plants/flowers": "flower",
}
_NATURE = {"Animals & Nature", "Objects"}
_NO_NAMES = {"middle_finger", "rosette", "zap", "feet"}
_FLAG_COLOURS = {"red", "blue", "green", "yellow"}


def fact(key: str, words: Mapping[str, str] | None = None) -> Labels:
    """The label is a fact, in other words if a table of them is given; others are left out."""

    def label(facts: Facts) -> str | None:
        value = facts.get(key)
        return value if words is None or value is None else words.get(value)

    return label


def _of_kind(kind: str, key: str) -> Labels:
    return lambda facts: facts.get(key) if facts["kind"].startswith(kind) else None


def _conflict(key: str) -> Labels:
    """Shape or texture of the images where they differ."""

    def label(facts: Facts) -> str | None:
        is_conflict = facts["kind"].startswith("style") and facts["shape"] != facts.get("texture")
        return facts.get(key) if is_conflict else None

    return label


def _concept(facts: Facts) -> str | None:
    """The plain name of what an emoji shows; None for second versions such as dog2."""
    name = facts["short"].replace("_", " ").replace("-", " ")
    plain = facts["short"] not in _NO_NAMES and not any(c.isdigit() for c in name)
    return name if plain and len(name.split()) <= 2 else None


def _dish(facts: Facts) -> str | None:
    return _concept(facts) if facts["category"] == "Food & Drink" else None


def _thing(facts: Facts) -> str | None:
    return _concept(facts) if facts["category"] in _NATURE else None


def _style_and(label_of: Labels) -> Labels:
    def label(facts: Facts) -> str | None:
        inner = label_of(facts)
        return None if inner is None else f"{facts['style']} {inner}"

    return label


def _part(position: int) -> Labels:
    """Colour (0) or form (1) of a drawn shape."""
    return lambda facts: facts["label"].split()[position]


def _flag_colour(facts: Facts) -> str | None:
    return facts["label"] if facts.get("label") in _FLAG_COLOURS else None


# Downloads
PHOTOS = View(name="photos", pools=("cifar10",), label=fact("label"), hidden=0.4)
GARMENTS = View(name="garments", pools=("fashion",), label=fact("label"), hidden=0.4)
LETTERS = View(name="letters", pools=("omniglot",), label=fact("label"), hidden=0.3, min_images=3)
HANDS = View(name="hands", pools=("hands",), label=fact("label"), hidden=0.3)
CUE_SHAPES = View(name="cue shapes", pools=("geirhos",), label=_conflict("shape"), hidden=0.4)
CUE_TEXTURES = View(name="cue textures", pools=("geirhos",), label=_conflict("texture"), hidden=0.4)
SILHOUETTES = View(name="silhouettes", pools=("geirhos",), label=_of_kind("filled", "shape"))
EDGES = View(name="edges", pools=("geirhos",), label=_of_kind("edges", "shape"))
# Registries
DIGITS = View(name="digits", pools=("mnist",), label=fact("label"))
SCANS = View(name="scans", pools=("scans",), label=fact("label"), hidden=0.3)
SHAPES = View(name="shapes", pools=("shapes",), label=fact("label"), hidden=0.4, min_images=3)
SHAPE_FORMS = View(name="shape forms", pools=("shapes",), label=_part(1))
SHAPE_COLOURS = View(name="shape colours", pools=("shapes",), label=_part(0), hidden=0.4)
DRAWINGS = View(name="drawings", pools=("clipart",), label=fact("category", _DRAWINGS), hidden=0.4)
FLAGS = View(name="flags", pools=("flags",), label=_flag_colour)
KINDS = View(
    name="kinds", pools=STYLES, label=fact("category", _KINDS), own_images=False, hidden=0.3
)
CONCEPTS = View(
    name="concepts", pools=STYLES, label=fact("sub", _CONCEPTS), own_images=False, hidden=0.4,
    min_images=4,
)  # fmt: skip
FACES = View(name="faces", pools=STYLES, label=fact("sub", _FACES), own_images=False, hidden=0.25)
DISHES = View(
    name="dishes", pools=STYLES, label=_dish, own_images=False, concepts="names", max_labels=24
)
THINGS = View(
    name="things", pools=STYLES, label=_thing, own_images=False, concepts="names", max_labels=24
)
STYLED_KINDS = View(
    name="styled kinds", pools=STYLES, label=_style_and(fact("category", _KINDS)), own_images=False
)
STYLED_CONCEPTS = View(
    name="styled concepts", pools=STYLES, label=_style_and(_concept), own_images=False,
    concepts="pairs",
)  # fmt: skip
