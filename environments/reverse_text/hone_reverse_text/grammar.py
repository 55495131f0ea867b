"""A small grammar of English sentences: patterns with slots, and the words that fit into each slot."""

import random
import re

# What fits into a slot, separated by commas.
FILLERS = {
    "person": """
        the teacher, the farmer, the doctor, a young girl, an old man, my sister, my brother, our neighbor, the
        captain, the baker, a tired driver, the painter, the queen, a brave sailor, the new student, my uncle, the
        librarian, a pilot, the gardener, her best friend, his grandmother, the mayor, a quiet boy, the nurse, the
        carpenter, a lost tourist, the singer, the clever thief, the fisherman, the shepherd
    """,
    "animal": """
        the fox, a small dog, the black cat, an owl, the white horse, a hungry bear, the sparrow, a lazy turtle, the
        goat, a wild rabbit, the old donkey, a green parrot, the wolf, a tiny mouse, the swan, a clever crow, the
        squirrel, an otter, the brown cow, a lonely whale
    """,
    "thing": """
        a letter, the wooden box, an apple, the blue umbrella, a silver coin, the broken clock, a loaf of bread, the
        map, a bunch of flowers, the heavy suitcase, a cup of tea, the red bicycle, an old book, the golden key, a
        paper boat, the lantern, a basket of cherries, the violin, a warm blanket, the camera, a bowl of soup, the
        empty bottle, a pair of gloves, the tall ladder, a jar of honey
    """,
    "place": """
        the river, the old bridge, the market, the garden, a dark forest, the harbor, the railway station, the
        village, the kitchen, a steep hill, the library, the castle, the frozen lake, the school, an empty street,
        the barn, the lighthouse, the city gate, a green meadow, the beach
    """,
    "gave": """
        found, carried, painted, dropped, bought, hid, borrowed, lost, cleaned, noticed, opened, repaired, sold,
        brought, forgot, wanted, remembered, moved
    """,
    "went": """
        walked, ran, slept, waited, danced, sang, rested, hid, stood, wandered, laughed, worked, stopped, played,
        sat
    """,
    "near": """
        near, behind, beside, in front of, not far from, close to, next to
    """,
    "when": """
        in the morning, after lunch, before sunrise, at midnight, on a rainy day, last winter, every evening,
        yesterday, in early spring, during the storm, at noon, on the first day of school
    """,
    "how": """
        slowly, quietly, gladly, without a word, in a hurry, with great care, all alone, once again, for a long time
    """,
    "why": """
        because it was cold, because nobody else was there, although it was late, while the bells were ringing, as
        soon as the sun came out, until the rain stopped, since the shop was closed, while everyone watched
    """,
    "quality": """
        very old, full of surprises, too heavy to lift, easy to find, ready for the winter, hard to believe, as cold
        as ice, quite famous, covered with dust, almost finished, made of glass, worth a fortune
    """,
}
SLOTS = {slot: tuple(" ".join(text.split()) for text in fillers.split(",")) for slot, fillers in FILLERS.items()}

PATTERNS = (
    "{person} {gave} {thing}.",
    "{person} {gave} {thing} {near} {place}.",
    "{person} {went} {near} {place}.",
    "{person} {went} {how} {near} {place}.",
    "{animal} {went} {near} {place} {when}.",
    "{animal} {went} {how}.",
    "{when}, {person} {gave} {thing}.",
    "{when}, {animal} {went} {near} {place}.",
    "{thing} was {quality}.",
    "{thing} {near} {place} was {quality}.",
    "{person} {gave} {thing} {why}.",
    "{person} and {person} {went} {how}.",
    "{animal} {went} {why}.",
    "did {person} see {animal} {near} {place}?",
    "who {gave} {thing} {when}?",
    "why was {thing} {quality}?",
)


def sentence(draw: random.Random) -> str:
    """One sentence, drawn from all that the grammar has (several million)."""
    text = re.sub(r"\{(\w+)\}", lambda slot: draw.choice(SLOTS[slot[1]]), draw.choice(PATTERNS))
    return text[0].upper() + text[1:]
