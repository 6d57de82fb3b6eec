"""Writes ``starter.txt``: varied prompts for a first run, made by a small grammar.

python configs/prompts/grammar.py

Scenes (people, animals, landscapes, buildings, vehicles, still lifes, plants, things in
places) are joined with a medium, light, a point of view or colours, by sentence forms.
The file is the same whenever and wherever it is made. No prompt names an artist, a
person or a trade mark.
"""

import argparse
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence

NUM_PROMPTS = 2400
PATH = pathlib.Path(__file__).with_name("starter.txt")

PEOPLE = """
old fisherman; young baker; tall gardener; girl in a yellow raincoat; violinist; potter;
boy with a paper kite; shepherd; retired sailor; blacksmith; dancer in a red dress;
grandmother with silver hair; carpenter; street musician; astronaut; knight in plain
armour; librarian; beekeeper; woman in a green coat; man with a grey beard; nurse;
cyclist; diver; weaver; clockmaker; farmer in a straw hat; ice skater; lighthouse
keeper; child in striped pyjamas; teacher; mountaineer; glass blower
"""
DOINGS = """
reading a letter; carrying a basket of apples; laughing at the rain; tying a shoelace;
playing chess alone; holding a lantern; looking out to sea; drinking tea from a tin cup;
feeding sparrows; mending a torn net; writing in a notebook; peeling an orange; waiting
for a train; walking a small dog; dancing barefoot; listening to an old radio; pushing a
bicycle; blowing out a candle; wrapped in a woollen blanket; pointing at the sky; asleep
in an armchair; holding an umbrella against the wind; painting a door blue; smiling
"""
ANIMALS = """
red fox; grey heron; brown bear; tabby cat; black horse; barn owl; hedgehog; humpback
whale; green tree frog; white goat; snow leopard; elephant; octopus; kingfisher; puppy;
tortoise; raven; otter; giraffe; pair of swans; hummingbird; wolf; hare; sea turtle;
flock of geese; peacock; bumblebee; donkey; chameleon; penguin; tiger; herd of deer
"""
BEHAVIOUR = """
resting; looking straight at the viewer; turning its head; half hidden in mist; seen in
profile; with its eyes closed; covered in drops of water; standing quite still; on the
move; searching for food; with its young; casting a long shadow; beside its reflection;
behind tall grass; in a shaft of light; dusted with snow; waking up; alone; at play
"""
PLACES = """
in a pine forest; on a windy beach; in a narrow street of an old town; beside a mountain
lake; in a field of barley; on a wooden bridge; in an empty railway station; at a
crowded market; in a walled garden; on a flat roof above the city; in a quiet library;
at the edge of a desert; in a greenhouse; on a frozen river; in a birch wood; under a
stone arch; in a kitchen with blue tiles; in a harbour full of small boats; on a hill
covered in heather; in a deep canyon; in a workshop full of tools; on a terrace with
lemon trees; in a flooded meadow; in front of a brick wall; inside a cave; on an island
of black sand; in a village square; among giant mushrooms; in a hall of mirrors; on the
surface of the moon
"""
LANDSCAPES = """
a valley filled with fog; rolling hills and a winding road; a waterfall in a green
gorge; sand dunes under a wide sky; cliffs above a stormy sea; a glacier between dark
peaks; a river delta from high above; terraced rice fields; a volcano with a thin plume
of smoke; a savanna with a single tree; a lake as still as glass; a bamboo grove; salt
flats after rain; a field of sunflowers; an orchard in blossom; a coral reef with
striped fish; a lagoon ringed by palms; tundra in autumn colours; a forest after a fire,
with new shoots; a chain of small islands; a marsh with reeds and open water; a pebble
beach at low tide; a mountain pass with patches of snow; an avenue of old lime trees; a
vineyard on a slope; a planet with two suns; floating islands joined by rope bridges; a
meadow full of poppies
"""
BUILDINGS = """
lighthouse; windmill; wooden cabin; stone church; glass tower; old factory of red brick;
castle ruin; houseboat; covered market; tree house; observatory; temple with a curved
roof; row of painted houses; concrete apartment block; spiral staircase; railway
viaduct; barn; cafe with a striped awning; bookshop; palace courtyard; water mill;
theatre; igloo; pier; house shaped like a teapot; city gate; greenhouse of iron and
glass; fishing hut on stilts
"""
STATES = """
overgrown with ivy; with one lit window; under scaffolding; after heavy snowfall;
reflected in a puddle; with its door wide open; at the end of a gravel path; half sunk
in sand; with smoke rising from the chimney; on a rocky headland; between two tall
trees; in the rain; empty on a holiday; decorated with paper lanterns; at the water's
edge; seen through a gate
"""
VEHICLES = """
steam locomotive; red bicycle; sailing ship; yellow tram; hot-air balloon; wooden rowing
boat; small propeller plane; tractor; old delivery van; airship; ice-breaker; horse
cart; submarine; cable car; motorcycle with a sidecar; rocket; double-decker bus; canoe;
caravan; fishing trawler; flying carpet; fire engine
"""
WAYS = """
crossing a stone viaduct; leaving the harbour; parked beside a hedge; half covered in
snow; passing a row of poplars; under repair; loaded with flowers; on an empty road;
rounding a bend; high above the clouds; waiting at a crossing; in heavy rain; drawn up
on the shore; against a blank sky; with its lamps lit; full of passengers; racing the
tide; long abandoned
"""
VESSELS = """
bowl; wicker basket; glass jar; copper pan; blue plate; paper bag; wooden crate; silver
tray; clay pot; tin bucket; teacup; shallow dish
"""
CONTENTS = """
ripe pears; red cherries; lemons; brown eggs; sea shells; wild strawberries; walnuts;
dried lavender; mussels; green olives; marbles; old keys; radishes; fresh bread rolls;
autumn leaves; buttons; plums; garlic and onions; coloured pencils; tomatoes; pebbles;
figs
"""
SURFACES = """
on a linen cloth; on a marble table; on a window sill; on a wooden floor; beside an open
book; next to a burning candle; on a tiled counter; on a velvet chair; in a patch of
sunlight; before a dark curtain; on fresh snow; on a stack of newspapers
"""
PLANTS = """
bunch of white tulips; sunflower; bonsai tree; thistle; branch of apple blossom; cactus
in flower; fern; water lily; pumpkin on the vine; old oak; dandelion gone to seed; bed
of roses; mossy stump; wreath of holly; ear of wheat; single maple leaf; orchid; patch
of clover; twisted olive tree; field mushroom
"""
CONDITIONS = """
after rain; covered in frost; swaying in the wind; in a cracked vase; with a snail on
it; with bees around it; lit from behind; growing out of a wall; in early spring; at the
end of summer; under a glass dome; beside a rusty watering can; with long roots showing;
on a grave
"""
COLOURS = "red; green; blue; yellow; orange; purple; white; black; pink; grey; golden"
THINGS = """
cup; book; ball; chair; umbrella; suitcase; candle; clock; hat; teapot; cube; lamp;
boot; vase; pillow; bottle; kite; drum; ladder; toy car; telephone; wooden spoon
"""
RELATIONS = """
to the left of; to the right of; on top of; underneath; behind; in front of; next to;
leaning against; inside a box with; hanging above; balanced on; facing
"""
OPENINGS = "we see; imagine; picture; show me; in this scene we find; the viewer sees"
NUMBERS = "two; three; four; five; six; a dozen; a row of; a pile of"

MEDIA = """
a photograph; an oil painting; a watercolour; a charcoal drawing; a pencil sketch; a
linocut print; a woodblock print; a pastel drawing; a black and white photograph; a
paper collage; a digital illustration; a page from a picture book; a stained-glass
window; a mosaic; a low-polygon 3D render; a pixel-art picture; an ink drawing with grey
washes; a gouache painting; a long-exposure photograph; an embroidered picture; a clay
model; a chalk drawing on slate; a faded postcard; a flat poster with few shapes; a
fresco; a photograph on grainy film; a comic-book panel; a botanical plate; a miniature
made of paper; a smooth 3D render
"""
LIGHT = """
in the soft light of early morning; at sunset; under a full moon; in the glare of noon;
by candlelight; under a stormy sky; in thick fog; at dusk, with the first lamps lit; in
bright winter sun; by the light of a fire; under the northern lights; in dappled shade;
on an overcast day; in neon light; just after rain; with light falling from a high
window; at midnight under many stars; in warm evening light; in cold blue light; lit
from one side
"""
VIEWS = """
seen from above; close up; from a low angle; in a wide view; centred, with much empty
space around; with a blurred background; framed by leaves; from far away; with the
horizon very low; from behind; through a rain-streaked window; in a tall, narrow format;
reflected in water; with everything in sharp focus; symmetrical; at the very edge of the
picture
"""
PALETTES = """
in muted earth colours; in pastel colours; with strong contrast; in black and gold; in
shades of blue; in bright primary colours; in soft greys with one touch of red; in faded
browns; in deep greens; with pale, washed-out colours; in warm oranges and pinks; in
violet and silver; with rich texture; with thin, precise lines; with loose, broad
strokes
"""
MOODS = """
calm; cheerful; mysterious; lonely; dreamlike; solemn; playful; cosy; dramatic; tender;
melancholy; festive; eerie; hopeful
"""

Pick = Callable[[str], str]


@functools.cache
def options(text: str) -> list[str]:
    """The phrases of a list; a line may break within one."""
    return [" ".join(phrase.split()) for phrase in text.split(";")]


def chooser(number: int) -> Pick:
    """Picks one phrase of a list for a prompt; a function of its number alone."""
    used = 0

    def pick(text: str) -> str:
        nonlocal used
        used += 1
        digest = hashlib.sha256(f"{number}/{used}".encode()).digest()
        phrases = options(text)
        return phrases[int.from_bytes(digest[:8], "big") % len(phrases)]

    return pick


def with_article(noun: str) -> str:
    """The noun phrase with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def thing(pick: Pick) -> str:
    """A thing and its colour."""
    return with_article(f"{pick(COLOURS)} {pick(THINGS)}")


def person(pick: Pick) -> str:
    """Somebody doing something, mostly somewhere."""
    return f"{with_article(pick(PEOPLE))} {pick(DOINGS)} {pick(PLACES)}"


def animal(pick: Pick) -> str:
    """An animal, how it is seen, and where."""
    return f"{with_article(pick(ANIMALS))} {pick(BEHAVIOUR)} {pick(PLACES)}"


def landscape(pick: Pick) -> str:
    """A landscape."""
    return pick(LANDSCAPES)


def building(pick: Pick) -> str:
    """A building and what is special about it."""
    return f"{with_article(pick(BUILDINGS))} {pick(STATES)}"


def vehicle(pick: Pick) -> str:
    """A vehicle on its way, or not."""
    return f"{with_article(pick(VEHICLES))} {pick(WAYS)}"


def still_life(pick: Pick) -> str:
    """A vessel with something in it."""
    return f"{with_article(pick(VESSELS))} of {pick(CONTENTS)} {pick(SURFACES)}"


def plant(pick: Pick) -> str:
    """A plant and its condition."""
    return f"{with_article(pick(PLANTS))} {pick(CONDITIONS)}"


def arrangement(pick: Pick) -> str:
    """Two things and how they are to each other."""
    return f"{thing(pick)} {pick(RELATIONS)} {thing(pick)}"


def several(pick: Pick) -> str:
    """A number of things of one colour, with another."""
    things = f"{pick(COLOURS)} {pick(THINGS)}s"
    return f"{pick(NUMBERS)} {things} and {thing(pick)} {pick(SURFACES)}"


def strange(pick: Pick) -> str:
    """A thing of an odd size or stuff, somewhere."""
    size = pick("giant; tiny; transparent; floating; knitted; paper; glass; stone")
    noun = pick("; ".join([THINGS, VEHICLES]))
    return f"{with_article(f'{size} {noun}')} {pick(PLACES)}"


SCENES: Sequence[Callable[[Pick], str]] = (
    person,
    animal,
    landscape,
    building,
    vehicle,
    still_life,
    plant,
    arrangement,
    several,
    strange,
)

# How a scene becomes a prompt: bare, with a medium, with light, as a sentence, long.
FORMS: Sequence[Callable[[str, Pick], str]] = (
    lambda scene, pick: scene,
    lambda scene, pick: f"{pick(MEDIA)} of {scene}",
    lambda scene, pick: f"{scene}, {pick(LIGHT)}",
    lambda scene, pick: f"{pick(MEDIA)} of {scene}, {pick(LIGHT)}",
    lambda scene, pick: f"{scene}, {pick(VIEWS)}, {pick(LIGHT)}",
    lambda scene, pick: f"{pick(MEDIA)} of {scene}, {pick(PALETTES)}",
    lambda scene, pick: f"{with_article(pick(MOODS))} picture of {scene}",
    lambda scene, pick: f"{pick(MEDIA)} that shows {scene}. The mood is {pick(MOODS)}.",
    lambda scene, pick: f"{pick(MEDIA)} of {scene}, {pick(VIEWS)}, {pick(PALETTES)}",
    lambda scene, pick: (
        f"{pick(MEDIA)} of {scene}, {pick(LIGHT)}, {pick(VIEWS)}, {pick(PALETTES)}"
    ),
    lambda scene, pick: f"{pick(OPENINGS)} {scene}, {pick(LIGHT)}, {pick(PALETTES)}.",
)


def prompts() -> Iterator[str]:
    """The distinct prompts of the grammar, by their numbers, without end."""
    seen: set[str] = set()
    number = 0
    while True:
        pick = chooser(number)
        scene = SCENES[number % len(SCENES)](pick)
        form = FORMS[number // len(SCENES) % len(FORMS)]
        prompt = form(scene, pick)
        prompt = prompt[0].upper() + prompt[1:]
        if prompt not in seen:
            seen.add(prompt)
            yield prompt
        number += 1


def main(output: pathlib.Path, num: int) -> None:
    """Writes the first prompts, one a line."""
    with output.open("w", encoding="utf-8") as file:
        file.writelines(f"{prompt}\n" for prompt in itertools.islice(prompts(), num))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=PATH)
    parser.add_argument("--num", type=int, default=NUM_PROMPTS)
    main(**vars(parser.parse_args()))
