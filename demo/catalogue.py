"""Makes the demo's own data: a made-up catalogue, search queries, their relevance labels and the reasoning behind each.

    python -m demo.catalogue --out DIR      writes DIR/pairs.jsonl (canonical input, with label and split)
                                            and DIR/chains.jsonl (kind, label and chain of the same pairs)

Why made up: the labels follow from rules by code, so they are right by construction, free to ship, and hard in the ways
that the paper names (TaoSR1, arXiv 2508.12365, section 1: negation, affordable alternatives, questions, knowledge).
Every fact of a product exists twice: as data, from which `judge` derives the label, and in the product's text, so that
a careful reader of query and text comes to the same label. There is no random number generator: every choice is ranked
by a SHA-256 of what is chosen for (`_rank`), so the bytes are the same on every machine and Python.

A product has a type (electric kettle) that lies on a shelf (Kitchen > Hot drinks, its category). On a shelf, two types
may be close substitutes of each other (electric kettle, stovetop kettle), and a type may be an accessory of another.
The rules, by kind of query; a close substitute instead of the asked type counts as one miss.

all kinds but the last two
    1 the product lies on another shelf; 2 it lies on the same shelf, but is another type or only an accessory
plain, "electric kettle"
    4 the asked type; 3 its close substitute
attribute, "blue cotton bath towel 70x140 cm"
    4 no miss; 3 one miss; 2 two misses or more, or a wrong `fits` (the phone it is made for). Not stated is a miss.
negation, "white electric kettle, anything but plastic"
    2 the excluded thing is present, however good the rest; otherwise as attribute
alternative, "cheaper alternative to Fostrum E430 electric kettle (40 EUR)"
    4 same type at 70 % of the named price or less; 3 a close substitute at 70 % or less, or the same type at 80 % or
    more, but cheaper; 2 not cheaper, the named product itself among them. What lies between is never shown.
    The query tells the named price: a label that hangs on a fact in neither text can be neither learnt nor checked.
question, "what can I use to keep coffee hot on a hike?", and knowledge, "gift for a newborn"
    A table written by hand maps each need to types, and facts where they decide: 4 made for the need; 3 helps in part
    or in a makeshift way; 2 of the same theme, but does not meet the need; 1 a department that the need does not touch.

All four labels occur in every kind. A single query may lack one: a need that nothing meets in part has no 3.
What people would quarrel about is never shown: `_LOOKALIKES` lists types of other shelves that look like the asked one.
A chain says what was asked, what the product is, what follows from it, and "So <LabelName>."; it holds facts only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import combinations, product
from pathlib import Path

from schemas.labels import LABELS, NAMES

KINDS = ("plain", "attribute", "negation", "alternative", "question", "knowledge")
SPLITS = ("train", "dev", "test")
CLEARLY_CHEAPER, A_LITTLE_CHEAPER = 0.7, 0.8
PAIRS_PER_QUERY = 10


@dataclass(frozen=True)
class Type:
    """A type of product: what it is for, one sentence about it, and the values that its attributes may take."""

    slug: str
    name: str
    price: int
    use: str
    note: str
    attributes: dict[str, str]
    substitute: str = ""
    accessory_of: str = ""

    @property
    def shelf(self) -> str:
        """Category, `Department > Shelf`."""
        return _SHELF_OF[self.slug]

    @property
    def department(self) -> str:
        """First part of the category."""
        return self.shelf.split(" > ")[0]


def _t(
    slug: str, name: str, price: int, use: str, note: str, *, twin: str = "", part_of: str = "", **attributes: str
) -> Type:
    facts = {attribute.replace("_", " "): values for attribute, values in attributes.items()}
    return Type(slug, name, price, use, note, facts, twin, part_of)


# fmt: off
# Values that two substitutes share are spelled alike, so that one query can be met by both. No type mixes materials
# that people would call by one name (bamboo and wood, vinyl and plastic), so that "not wood" is never in doubt.
_SHELVES: dict[str, tuple[Type, ...]] = {
    "Kitchen > Hot drinks": (
        _t("kettle", "electric kettle", 40, "boiling water for tea", "It switches itself off when the water boils.",
           twin="stovetop-kettle", colour="black/white/red", material="plastic/steel/glass", capacity="1 l/1.7 l"),
        _t("stovetop-kettle", "stovetop kettle", 36, "boiling water for tea on the stove",
           "A whistle tells when the water boils.",
           twin="kettle", colour="black/white/red", material="steel/enamel", capacity="1.7 l/2.5 l",
           induction="yes/no"),
        _t("coffee-maker", "filter coffee maker", 60, "brewing several cups of coffee with electricity",
           "A hot plate keeps the jug warm.",
           twin="french-press", colour="black/white/red", material="plastic/steel", capacity="0.6 l/1.2 l"),
        _t("french-press", "French press", 30, "brewing coffee by hand, without paper filters",
           "Pour, wait four minutes, press down.",
           twin="coffee-maker", colour="black/white/red", material="plastic/steel/glass", capacity="0.6 l/1.2 l"),
        _t("coffee-filters", "paper coffee filters", 8, "filtering ground coffee in a coffee maker",
           "One filter is used for each jug.",
           part_of="coffee-maker", colour="white/brown", size="small/large"),
    ),
    "Kitchen > Baking": (
        _t("hand-mixer", "hand mixer", 44, "whipping cream, eggs and light batter",
           "Two beaters click in and out with one hand.",
           twin="stand-mixer", colour="black/white/red", material="plastic/steel", power="300 W/450 W"),
        _t("stand-mixer", "stand mixer", 200, "kneading heavy dough and whipping cream",
           "It works alone while the hands are free.",
           twin="hand-mixer", colour="black/white/red", material="plastic/steel", power="450 W/900 W"),
        _t("loaf-tin", "loaf tin", 16, "baking bread and cakes in the oven", "The loaf slides out of it with ease.",
           material="steel/silicone", size="25 cm/30 cm"),
        _t("proving-basket", "bread proving basket", 22, "letting sourdough bread rise in shape",
           "It leaves a ring pattern on the crust.",
           material="rattan/wood pulp", shape="round/oval"),
        _t("kitchen-scales", "digital kitchen scales", 24, "weighing flour and other ingredients",
           "A button sets the display back to zero.",
           colour="black/white", material="plastic/steel", capacity="5 kg/10 kg"),
    ),
    "Kitchen > Pans": (
        _t("frying-pan", "frying pan", 45, "frying eggs, pancakes and meat", "The handle stays cool for a long time.",
           twin="griddle-pan", material="cast iron/aluminium/steel", size="24 cm/28 cm", induction="yes/no"),
        _t("griddle-pan", "griddle pan", 48, "searing steaks and vegetables", "The ridges leave dark stripes.",
           twin="frying-pan", material="cast iron/aluminium/steel", size="24 cm/28 cm", induction="yes/no"),
        _t("saucepan", "saucepan", 38, "cooking soup, pasta and sauces", "The rim pours without dripping.",
           material="steel/aluminium", capacity="1.5 l/3 l", induction="yes/no"),
        _t("pan-lid", "pan lid", 14, "covering a pan while it cooks", "The knob can be screwed off.",
           part_of="frying-pan griddle-pan saucepan", material="glass/steel", size="24 cm/28 cm"),
    ),
    "Garden > Watering": (
        _t("hose", "garden hose", 36, "watering beds and lawns from the tap", "It does not kink at corners.",
           twin="watering-can", colour="green/black/grey", material="rubber/woven fabric", length="15 m/25 m"),
        _t("watering-can", "watering can", 22, "watering pots and beds by hand, without a tap nearby",
           "The long spout reaches under the leaves.",
           twin="hose", colour="green/black/grey", material="plastic/steel", capacity="5 l/10 l"),
        _t("sprinkler", "lawn sprinkler", 20, "watering a whole lawn evenly from a hose",
           "The range can be set in steps.",
           material="plastic/steel", colour="green/black"),
        _t("hose-nozzle", "hose spray nozzle", 12, "spraying water at the end of a garden hose",
           "The spray turns from mist to jet.",
           part_of="hose", material="plastic/brass", colour="green/black"),
    ),
    "Garden > Planting": (
        _t("plant-pot", "plant pot", 18, "growing a single plant on a balcony", "A hole in the base lets water out.",
           twin="planter-box", colour="white/grey/green", material="ceramic/plastic/wood", size="20 cm/30 cm"),
        _t("planter-box", "planter box", 40, "growing several herbs or vegetables on a balcony",
           "It hangs on a rail or stands on the floor.",
           twin="plant-pot", colour="white/grey/green", material="wood/plastic/steel", size="60 cm/80 cm"),
        _t("trowel", "hand trowel", 12, "digging small holes for plants", "Marks on the blade show the depth.",
           material="steel/aluminium", colour="green/black"),
        _t("potting-soil", "potting soil", 10, "filling pots and planters", "It feeds plants for six weeks.",
           pack="20 l/40 l", peat="none/with peat"),
    ),
    "Garden > Grilling": (
        _t("charcoal-grill", "charcoal grill", 90, "grilling over glowing charcoal", "Ash falls into a tray below.",
           twin="gas-grill", colour="black/red/grey", material="steel/cast iron", size="47 cm/57 cm"),
        _t("gas-grill", "gas grill", 240, "grilling with gas, hot in minutes", "A side shelf holds plates.",
           twin="charcoal-grill", colour="black/red/grey", material="steel/cast iron", size="57 cm/80 cm"),
        _t("grill-cover", "grill cover", 26, "keeping rain and snow off a grill", "A cord pulls it tight.",
           part_of="charcoal-grill gas-grill", colour="black/grey", size="57 cm/80 cm"),
        _t("grill-tongs", "grill tongs", 14, "turning food on a hot grill",
           "A ring keeps the arms closed in the drawer.",
           part_of="charcoal-grill gas-grill", material="steel/wood"),
    ),
    "Clothing > Outdoor shoes": (
        _t("hiking-boots", "hiking boots", 110, "walking on rough mountain paths", "The high shaft holds the ankle.",
           twin="trail-shoes", colour="black/grey/brown", material="leather/polyester", waterproof="yes/no"),
        _t("trail-shoes", "trail running shoes", 100, "running on forest and mountain paths", "The sole grips on mud.",
           twin="hiking-boots", colour="black/grey/blue", material="polyester/nylon", waterproof="yes/no"),
        _t("sandals", "walking sandals", 60, "walking in warm and dry weather", "Three straps can be set to the foot.",
           colour="black/brown", material="leather/nylon"),
        _t("insoles", "shoe insoles", 16, "softening shoes inside", "Cut along the line to fit.",
           part_of="hiking-boots trail-shoes sandals", material="leather/foam"),
    ),
    "Clothing > Rainwear": (
        _t("rain-jacket", "rain jacket", 80, "staying dry in the rain on foot or by bike",
           "The hood turns with the head.",
           twin="rain-poncho", colour="yellow/blue/black", material="polyester/nylon", weight="300 g/500 g"),
        _t("rain-poncho", "rain poncho", 30, "covering clothes and a rucksack in the rain",
           "It packs into its own pocket.",
           twin="rain-jacket", colour="yellow/blue/black", material="polyester/nylon", weight="200 g/300 g"),
        _t("umbrella", "folding umbrella", 22, "keeping the rain off in town", "It opens at the press of a button.",
           colour="blue/black", length="24 cm/30 cm"),
    ),
    "Electronics > Charging": (
        _t("wall-charger", "USB wall charger", 26, "charging a phone from a wall socket",
           "It slows down when the battery is full.",
           twin="power-bank", colour="black/white/blue", power="20 W/45 W", port="USB-C/USB-A"),
        _t("power-bank", "power bank", 40, "charging a phone away from any socket", "Four lights show what is left.",
           twin="wall-charger", colour="black/white/blue", capacity="10000 mAh/20000 mAh", port="USB-C/USB-A"),
        _t("charging-cable", "charging cable", 12, "connecting a phone to a charger or power bank",
           "The plugs fit through most phone covers.",
           part_of="wall-charger power-bank", colour="black/white", length="1 m/2 m", port="USB-C/USB-A"),
    ),
    "Electronics > Audio": (
        _t("over-ear", "over-ear headphones", 120, "listening to music with both ears covered",
           "The cups fold flat for travel.",
           twin="earphones", colour="black/white/blue", connection="Bluetooth/wired", noise_cancelling="yes/no"),
        _t("earphones", "in-ear earphones", 60, "listening to music on the move",
           "Three sizes of ear tips are in the box.",
           twin="over-ear", colour="black/white/blue", connection="Bluetooth/wired", noise_cancelling="yes/no"),
        _t("speaker", "portable speaker", 70, "playing music aloud for a group",
           "It runs for twelve hours on one charge.",
           colour="black/blue", waterproof="yes/no"),
        _t("headphone-stand", "headphone stand", 20, "putting headphones away on a desk", "The foot does not slip.",
           part_of="over-ear", material="wood/aluminium"),
    ),
    "Electronics > Phone protection": (
        _t("phone-case", "phone case", 20, "protecting a phone from falls", "Raised edges guard the corners.",
           twin="phone-pouch", colour="black/red/blue", material="silicone/leather", fits="Novar 5/Novar 6/Tessio 2"),
        _t("phone-pouch", "phone pouch", 22, "carrying a phone in a soft pocket", "A ribbon lifts the phone out.",
           twin="phone-case", colour="black/red/blue", material="felt/leather", fits="Novar 5/Novar 6/Tessio 2"),
        _t("screen-protector", "screen protector", 12, "keeping scratches off a phone screen",
           "A frame helps to place it straight.",
           material="glass/plastic film", fits="Novar 5/Novar 6/Tessio 2"),
    ),
    "Baby > Sleep": (
        _t("baby-sleeping-bag", "baby sleeping bag", 40, "keeping a baby warm at night without loose covers",
           "The zip opens from below.",
           twin="baby-blanket", colour="white/grey/yellow", material="cotton/wool/polyester", size="70 cm/90 cm",
           age="from birth"),
        _t("baby-blanket", "baby blanket", 26, "covering a baby in a cot or stroller", "The hem is sewn twice.",
           twin="baby-sleeping-bag", colour="white/grey/yellow", material="cotton/wool/polyester", size="75x100 cm",
           age="from birth"),
        _t("baby-monitor", "baby monitor", 70, "hearing a sleeping baby from another room",
           "It beeps when the range is left.",
           colour="white/grey", supply="battery/mains"),
        _t("night-light", "child's night light", 18, "giving a soft glow in a child's room",
           "It dims after half an hour.",
           colour="white/yellow", supply="battery/mains"),
    ),
    "Baby > Feeding": (
        _t("baby-bottle", "baby bottle", 12, "giving milk to a baby", "A scale shows the millilitres.",
           twin="training-cup", colour="white/blue/yellow", material="glass/plastic/silicone", capacity="150 ml/250 ml",
           age="from birth"),
        _t("training-cup", "toddler training cup", 14, "learning to drink without a bottle",
           "Two handles suit small hands.",
           twin="baby-bottle", colour="white/blue/yellow", material="plastic/silicone/steel", capacity="150 ml/250 ml",
           age="from 9 months"),
        _t("bib", "baby bib", 10, "keeping a child's clothes clean at meals with solid food",
           "A pocket catches crumbs.",
           colour="white/yellow", material="cotton/silicone"),
        _t("bottle-brush", "bottle brush", 8, "cleaning baby bottles", "A ring hangs it up to dry.",
           part_of="baby-bottle", material="nylon/silicone"),
    ),
    "Baby > On the way": (
        _t("stroller", "baby stroller", 260, "pushing a child on walks through town", "It folds with one hand.",
           twin="baby-carrier", colour="black/grey/blue", material="polyester/cotton", weight="6 kg/9 kg"),
        _t("baby-carrier", "baby carrier", 90, "carrying a baby on the chest, also on hikes",
           "Wide straps spread the weight.",
           twin="stroller", colour="black/grey/blue", material="polyester/cotton/linen", age="from birth"),
        _t("stroller-cover", "stroller rain cover", 24, "keeping rain off a child in a stroller",
           "A window lets the child look out.",
           part_of="stroller", colour="grey/black"),
        _t("diaper-bag", "diaper bag", 50, "carrying diapers and baby things on trips",
           "A changing mat is folded inside.",
           colour="grey/black", material="polyester/cotton"),
    ),
    "Pets > Dog walks": (
        _t("dog-collar", "dog collar", 18, "holding a dog at the neck", "A ring holds the name tag.",
           twin="dog-harness", colour="red/black/blue", material="leather/nylon", size="35 cm/45 cm"),
        _t("dog-harness", "dog harness", 32, "holding a dog at the chest, with no pull on the neck",
           "Two buckles close at the sides.",
           twin="dog-collar", colour="red/black/blue", material="leather/nylon", size="45 cm/60 cm"),
        _t("dog-lead", "dog lead", 20, "leading a dog on a walk", "The loop sits well in the hand.",
           colour="red/black", material="leather/nylon", length="1.2 m/2 m"),
        _t("waste-bags", "dog waste bags", 8, "picking up after a dog", "They tear off from a roll.",
           colour="black/green", pack="60 bags/120 bags"),
    ),
    "Pets > Dog food": (
        _t("dry-dog-food", "dry dog food", 38, "feeding a dog with crunchy food", "The bag closes again with a zip.",
           twin="wet-dog-food", recipe="chicken/lamb/salmon", life_stage="puppy/adult", pack="3 kg/12 kg"),
        _t("wet-dog-food", "wet dog food", 28, "feeding a dog with soft food from the tin",
           "Keep opened tins in the fridge.",
           twin="dry-dog-food", recipe="chicken/lamb/salmon", life_stage="puppy/adult", pack="3 kg/5 kg"),
        _t("dog-treats", "dog treats", 9, "rewarding a dog in training", "The pieces are as small as a pea.",
           recipe="chicken/lamb", pack="200 g/400 g"),
        _t("dog-bowl", "dog bowl", 14, "serving food or water to a dog", "A rubber ring keeps it in its place.",
           part_of="dry-dog-food wet-dog-food", material="steel/ceramic", capacity="0.7 l/1.5 l"),
    ),
    "Sports > Bottles": (
        _t("vacuum-flask", "vacuum flask", 32, "keeping drinks hot or cold all day, also on hikes",
           "The lid serves as a cup.",
           twin="travel-mug", colour="green/black/blue", material="steel/plastic", capacity="0.5 l/1 l"),
        _t("travel-mug", "insulated travel mug", 24, "keeping coffee hot on the way to work",
           "It opens with one hand and fits a car.",
           twin="vacuum-flask", colour="green/black/blue", material="steel/plastic", capacity="0.35 l/0.5 l"),
        _t("drinking-bottle", "drinking bottle", 16, "carrying cold water to sport", "It is not insulated.",
           colour="green/blue", material="plastic/glass", capacity="0.5 l/1 l"),
    ),
    "Sports > Camping": (
        _t("tent", "camping tent", 180, "sleeping outdoors under a closed roof", "It stands in ten minutes.",
           twin="tarp", colour="green/orange/grey", material="polyester/cotton",
           sleeps="2 persons/3 persons/4 persons"),
        _t("tarp", "camping tarp", 60, "putting up an open roof against sun and rain", "Loops at the edge take ropes.",
           twin="tent", colour="green/orange/grey", material="polyester/cotton", size="3x3 m/3x4 m"),
        _t("sleeping-bag", "camping sleeping bag", 90, "sleeping warm in a tent", "The hood closes with a cord.",
           twin="camping-quilt", colour="green/orange/grey", filling="down/polyester", comfort="0 °C/10 °C"),
        _t("camping-quilt", "camping quilt", 100, "sleeping in a tent with little weight to carry",
           "Straps hold it to the mat.",
           twin="sleeping-bag", colour="green/orange/grey", filling="down/polyester", comfort="0 °C/10 °C"),
        _t("sleeping-mat", "camping sleeping mat", 45, "lying soft on the ground in a tent",
           "It rolls up as small as a bottle.",
           colour="green/grey", size="185 cm/200 cm"),
        _t("headlamp", "headlamp", 30, "lighting the path at night with both hands free", "The beam tilts up and down.",
           colour="black/orange", supply="battery/USB"),
        _t("tent-pegs", "tent pegs", 10, "fixing a tent or tarp to the ground", "A hook at the top holds the rope.",
           part_of="tent tarp", material="steel/aluminium"),
    ),
    "Sports > Fitness": (
        _t("dumbbells", "pair of dumbbells", 40, "training arms and shoulders with weights at home",
           "The flat sides stop them from rolling.",
           twin="resistance-bands", colour="black/grey/blue", material="cast iron/rubber", weight="2x2 kg/2x5 kg"),
        _t("resistance-bands", "set of resistance bands", 20, "training at home or on a trip",
           "They weigh next to nothing in a bag.",
           twin="dumbbells", colour="black/grey/blue", material="fabric/rubber", pack="3 bands/5 bands"),
        _t("yoga-mat", "yoga mat", 30, "doing yoga and floor exercises", "It does not slip on smooth floors.",
           colour="grey/blue", material="rubber/cork"),
        _t("foam-roller", "foam roller", 22, "loosening sore muscles after sport", "The surface has fine ribs.",
           colour="black/blue", length="30 cm/45 cm"),
    ),
    "Office > Writing": (
        _t("fountain-pen", "fountain pen", 36, "writing by hand with ink and a nib",
           "A clip holds it in a shirt pocket.",
           twin="rollerball", colour="black/blue/red", material="steel/wood/plastic", tip="fine/medium"),
        _t("rollerball", "rollerball pen", 24, "writing by hand with a smooth ball tip", "The ink is dry at once.",
           twin="fountain-pen", colour="black/blue/red", material="steel/wood/plastic", tip="fine/medium"),
        _t("notebook", "paper notebook", 14, "writing down notes and diaries", "A ribbon marks the page.",
           colour="black/red", size="A5/A4", ruling="lined/blank"),
        _t("ink-cartridges", "ink cartridges", 6, "refilling a fountain pen", "They click in without a stain.",
           part_of="fountain-pen", colour="black/blue", pack="6 pieces/12 pieces"),
    ),
    "Office > Desk": (
        _t("office-chair", "office chair", 180, "sitting at a desk all day with a supported back",
           "The seat moves up and down on a gas spring.",
           twin="kneeling-chair", colour="black/grey/blue", material="leather/polyester", armrests="yes/no"),
        _t("kneeling-chair", "kneeling chair", 120, "sitting upright at a desk without a backrest",
           "The knees rest on a second pad.",
           twin="office-chair", colour="black/grey/blue", material="leather/polyester"),
        _t("desk-lamp", "desk lamp", 38, "lighting a desk for work in the evening", "The arm bends at two joints.",
           colour="black/grey", material="steel/wood", supply="mains/USB"),
        _t("seat-cushion", "seat cushion", 26, "softening a hard chair", "Ribbons tie it to the chair.",
           part_of="office-chair kneeling-chair", colour="grey/blue", material="cotton/polyester"),
    ),
    "Home textiles > Bath": (
        _t("bath-towel", "bath towel", 18, "drying off after a shower", "The loops soak up water fast.",
           twin="hammam-towel", colour="blue/white/grey", material="cotton/linen", size="70x140 cm/100x150 cm"),
        _t("hammam-towel", "hammam towel", 24, "drying off at the beach with little to carry",
           "It dries within an hour.",
           twin="bath-towel", colour="blue/white/grey", material="cotton/linen", size="90x180 cm/100x150 cm"),
        _t("bath-mat", "bath mat", 20, "stepping out of the shower onto a dry floor",
           "The back does not slip on tiles.",
           colour="blue/white", size="50x80 cm/60x100 cm"),
        _t("bathrobe", "bathrobe", 48, "wrapping up warm after a bath", "Two deep pockets hold soap and glasses.",
           colour="white/grey", material="cotton/linen"),
    ),
    "Home textiles > Bedding": (
        _t("duvet", "duvet", 70, "sleeping warm in bed", "Sewn squares keep the filling in its place.",
           twin="bedspread", filling="down/wool/polyester", size="135x200 cm/200x200 cm", season="summer/winter"),
        _t("bedspread", "quilted bedspread", 60, "covering a bed by day or as a light cover",
           "The quilting runs in waves.",
           twin="duvet", filling="down/wool/polyester", size="200x200 cm/220x240 cm", colour="white/grey/blue"),
        _t("pillow", "bed pillow", 30, "resting the head in bed", "The zip lets filling out or in.",
           filling="down/wool/polyester", size="40x80 cm/80x80 cm"),
        _t("duvet-cover", "duvet cover", 40, "covering a duvet with washable cloth", "Buttons close it at the foot.",
           part_of="duvet", colour="white/blue", material="cotton/linen", size="135x200 cm/200x200 cm"),
    ),
    "Personal care > Hair": (
        _t("shampoo", "liquid shampoo", 10, "washing hair", "A walnut-sized drop is enough.",
           twin="shampoo-bar", perfume="none/lavender/citrus", hair_type="dry/oily", pack="250 ml/500 ml"),
        _t("shampoo-bar", "solid shampoo bar", 9, "washing hair without a bottle, also on trips",
           "Rub it between wet hands.",
           twin="shampoo", perfume="none/lavender/citrus", hair_type="dry/oily", pack="60 g/90 g"),
        _t("conditioner", "liquid hair conditioner", 11, "softening washed hair",
           "Leave it in for two minutes, then rinse.",
           perfume="none/lavender", pack="250 ml/500 ml"),
        _t("hairbrush", "hairbrush", 14, "brushing hair smooth", "The bristles have round tips.",
           material="wood/plastic", colour="black/brown"),
    ),
    "Personal care > Skin": (
        _t("hand-cream", "hand cream", 8, "caring for dry hands", "It leaves no grease on paper.",
           twin="body-lotion", perfume="none/lavender/citrus", pack="50 ml/100 ml", texture="light/rich"),
        _t("body-lotion", "body lotion", 12, "caring for dry skin on the whole body", "It sinks in within a minute.",
           twin="hand-cream", perfume="none/lavender/citrus", pack="100 ml/250 ml", texture="light/rich"),
        _t("sun-cream", "sun cream", 16, "protecting skin from the sun", "Put it on again after a swim.",
           perfume="none/lavender", factor="30/50", pack="100 ml/200 ml"),
        _t("lip-balm", "lip balm", 6, "caring for dry lips", "The stick turns up from below.",
           perfume="none/citrus", pack="5 g/10 g"),
    ),
}
# fmt: on
_SHELF_OF = {kind.slug: shelf for shelf, kinds in _SHELVES.items() for kind in kinds}
TYPES = {kind.slug: kind for kinds in _SHELVES.values() for kind in kinds}

# Types of different shelves that look alike: whether one is irrelevant to a query for another is open to quarrel.
_LOOKALIKES = tuple(
    frozenset(line.split())
    for line in (
        "baby-sleeping-bag baby-blanket sleeping-bag camping-quilt duvet bedspread",
        "pillow seat-cushion sleeping-mat duvet bedspread",
        "yoga-mat sleeping-mat bath-mat foam-roller insoles",
        "kettle stovetop-kettle coffee-maker french-press vacuum-flask travel-mug drinking-bottle",
        "vacuum-flask travel-mug drinking-bottle baby-bottle training-cup",
        "kettle stovetop-kettle saucepan watering-can",
        "headlamp desk-lamp night-light",
        "rain-jacket rain-poncho umbrella stroller-cover grill-cover tarp tent",
        "frying-pan griddle-pan saucepan charcoal-grill gas-grill pan-lid grill-cover",
        "charcoal-grill gas-grill hand-mixer loaf-tin",
        "plant-pot planter-box potting-soil trowel watering-can hose sprinkler hose-nozzle",
        "baby-carrier stroller baby-sleeping-bag baby-blanket baby-monitor night-light",
        "diaper-bag baby-bottle training-cup bib",
        "phone-case phone-pouch screen-protector wall-charger power-bank charging-cable",
        "dry-dog-food wet-dog-food dog-treats waste-bags dog-bowl dog-lead",
        "bath-towel hammam-towel baby-blanket bathrobe duvet-cover",
        "shampoo shampoo-bar conditioner body-lotion hand-cream",
        "hiking-boots trail-shoes sandals rain-jacket rain-poncho",
        "hand-mixer stand-mixer coffee-maker kettle",
    )
)


@dataclass(frozen=True)
class Need:
    """A need and the types that meet it (4), help in part (3), or share only its theme (2); the first match counts.

    A clause is a type, or `type:attribute=value` where the need hangs on a fact. `far` names departments that are not
    listed, but from which something might serve too: nothing of theirs is shown as irrelevant.
    """

    text: str
    meets: str
    helps: str
    theme: str
    far: tuple[str, ...] = ()

    def clauses(self) -> Iterator[tuple[int, str, str, str]]:
        """Yield (label, type, attribute or "", value or "")."""
        for label, column in ((4, self.meets), (3, self.helps), (2, self.theme)):
            for clause in filter(None, column.split(", ")):
                slug, _, fact = clause.partition(":")
                attribute, _, value = fact.partition("=")
                yield label, slug, attribute, value


# fmt: off
# A question is one of five openings and the need.
_QUESTIONS = (
    Need("keep coffee hot on a hike", "vacuum-flask", "travel-mug",
         "drinking-bottle, coffee-maker, french-press, kettle"),
    Need("boil water for tea without a stove", "kettle", "",
         "stovetop-kettle, coffee-maker, french-press, coffee-filters"),
    Need("make coffee without electricity", "french-press", "stovetop-kettle", "coffee-maker, kettle"),
    Need("cook on an induction stove", "frying-pan:induction=yes, griddle-pan:induction=yes, saucepan:induction=yes",
         "stovetop-kettle:induction=yes", "frying-pan, griddle-pan, saucepan, pan-lid, stovetop-kettle"),
    Need("whip cream fast", "hand-mixer, stand-mixer", "", "kitchen-scales, loaf-tin, proving-basket"),
    Need("knead heavy bread dough", "stand-mixer", "hand-mixer", "kitchen-scales, loaf-tin, proving-basket"),
    Need("weigh flour for a cake", "kitchen-scales", "", "hand-mixer, stand-mixer, loaf-tin"),
    Need("cook soup for two", "saucepan", "", "frying-pan, griddle-pan, pan-lid"),
    Need("water a long bed without carrying water", "hose", "sprinkler", "watering-can, hose-nozzle"),
    Need("water balcony flowers without a tap", "watering-can", "", "hose, sprinkler, hose-nozzle"),
    Need("grow tomatoes on my balcony", "planter-box, plant-pot", "potting-soil, trowel, watering-can",
         "sprinkler, hose, hose-nozzle"),
    Need("grill sausages without gas", "charcoal-grill", "griddle-pan", "gas-grill, grill-cover, grill-tongs"),
    Need("keep a grill dry in winter", "grill-cover", "tarp", "charcoal-grill, gas-grill, grill-tongs"),
    Need("keep my feet dry on a wet hike", "hiking-boots:waterproof=yes", "trail-shoes:waterproof=yes",
         "hiking-boots, trail-shoes, insoles, sandals"),
    Need("stay dry in the rain on a bike", "rain-jacket", "rain-poncho", "umbrella"),
    Need("charge my phone on a train without a socket", "power-bank", "", "wall-charger, charging-cable"),
    Need("charge my phone from a hotel socket", "wall-charger", "charging-cable", "power-bank"),
    Need("hear music on a plane without engine noise", "over-ear:noise cancelling=yes, earphones:noise cancelling=yes",
         "over-ear, earphones", "speaker, headphone-stand"),
    Need("play music for friends in the garden", "speaker", "", "over-ear, earphones, headphone-stand"),
    Need("protect my phone from falls", "phone-case", "phone-pouch", "screen-protector"),
    Need("keep scratches off my phone screen", "screen-protector", "phone-pouch", "phone-case"),
    Need("keep my baby warm at night without loose covers", "baby-sleeping-bag", "",
         "baby-blanket, baby-monitor, night-light", ("Clothing", "Home textiles")),
    Need("hear my baby cry from the kitchen", "baby-monitor", "", "night-light, baby-sleeping-bag, baby-blanket",
         ("Electronics",)),
    Need("give milk to a newborn", "baby-bottle", "", "training-cup, bib, bottle-brush"),
    Need("teach a toddler to drink without a bottle", "training-cup", "", "baby-bottle, bib, bottle-brush"),
    Need("take a baby along on a mountain hike", "baby-carrier", "", "stroller, stroller-cover, diaper-bag",
         ("Clothing",)),
    Need("take a tired child through town without carrying it", "stroller", "",
         "baby-carrier, stroller-cover, diaper-bag"),
    Need("keep my child dry in the stroller", "stroller-cover", "umbrella", "stroller, baby-carrier, diaper-bag"),
    Need("walk a dog with a sore neck", "dog-harness", "dog-lead", "dog-collar, waste-bags"),
    Need("feed a dog that cannot eat chicken",
         "dry-dog-food:recipe=lamb, dry-dog-food:recipe=salmon, wet-dog-food:recipe=lamb, wet-dog-food:recipe=salmon",
         "dog-treats:recipe=lamb", "dry-dog-food, wet-dog-food, dog-treats, dog-bowl"),
    Need("reward my dog in training", "dog-treats", "dry-dog-food", "wet-dog-food, dog-bowl"),
    Need("feed an old dog that cannot chew", "wet-dog-food:life stage=adult", "wet-dog-food",
         "dry-dog-food, dog-treats, dog-bowl"),
    Need("sleep outdoors with three friends", "tent:sleeps=4 persons", "tarp, tent:sleeps=3 persons",
         "tent, tent-pegs, headlamp"),
    Need("sleep warm in a tent at 0 °C", "sleeping-bag:comfort=0 °C, camping-quilt:comfort=0 °C", "sleeping-mat",
         "sleeping-bag, camping-quilt, tent-pegs", ("Home textiles",)),
    Need("see the path at night with both hands free", "headlamp", "", "tent, tarp, tent-pegs, sleeping-mat"),
    Need("get shade at a picnic", "tarp", "tent, umbrella", "tent-pegs, sleeping-bag, headlamp"),
    Need("train my arms at home", "dumbbells, resistance-bands", "", "yoga-mat, foam-roller"),
    Need("train on a trip with only a small bag", "resistance-bands", "", "dumbbells, yoga-mat, foam-roller"),
    Need("loosen sore muscles after a run", "foam-roller", "resistance-bands", "dumbbells, yoga-mat"),
    Need("refill my fountain pen", "ink-cartridges", "", "fountain-pen, rollerball, notebook"),
    Need("write thank-you cards by hand", "fountain-pen, rollerball", "", "ink-cartridges, notebook"),
    Need("sit at a desk all day", "office-chair", "kneeling-chair, seat-cushion", "desk-lamp"),
    Need("make a hard chair softer", "seat-cushion", "pillow", "office-chair, kneeling-chair, desk-lamp"),
    Need("light my desk in the evening", "desk-lamp", "headlamp", "office-chair, kneeling-chair, seat-cushion",
         ("Baby",)),
    Need("dry off after a swim with little to carry", "hammam-towel", "bath-towel", "bath-mat, bathrobe"),
    Need("sleep warm in a cold bedroom", "duvet:season=winter", "duvet, bedspread", "pillow, duvet-cover",
         ("Baby", "Sports")),
    Need("make my bed for a feather allergy",
         "duvet:filling=wool, duvet:filling=polyester, pillow:filling=wool, pillow:filling=polyester",
         "bedspread:filling=wool, bedspread:filling=polyester", "duvet, pillow, bedspread"),
    Need("wash my hair with a perfume allergy", "shampoo:perfume=none, shampoo-bar:perfume=none",
         "conditioner:perfume=none", "shampoo, shampoo-bar, conditioner, hairbrush"),
    Need("wash my hair on a flight trip without liquids", "shampoo-bar", "", "shampoo, conditioner, hairbrush"),
    Need("protect my skin on the beach", "sun-cream", "", "body-lotion, hand-cream, lip-balm", ("Clothing", "Sports")),
    Need("soothe dry hands in winter", "hand-cream", "body-lotion", "sun-cream, lip-balm", ("Clothing",)),
    Need("step out of the shower onto a dry floor", "bath-mat", "bath-towel, hammam-towel", "bathrobe"),
    Need("clean baby bottles", "bottle-brush", "", "baby-bottle, training-cup, bib"),
    Need("brew coffee for the whole family at once", "coffee-maker:capacity=1.2 l, french-press:capacity=1.2 l",
         "coffee-maker, french-press", "kettle, stovetop-kettle, coffee-filters", ("Sports",)),
)

_KNOWLEDGE = (
    Need("gift for a newborn", "baby-sleeping-bag, baby-blanket", "baby-bottle, baby-monitor, night-light",
         "training-cup, bib, bottle-brush", ("Home textiles", "Personal care")),
    Need("what you need for sourdough", "proving-basket, kitchen-scales", "loaf-tin, stand-mixer", "hand-mixer"),
    Need("gear for a first night of camping", "tent, sleeping-bag, sleeping-mat", "tarp, headlamp",
         "tent-pegs, yoga-mat", ("Home textiles", "Clothing", "Kitchen")),
    Need("things for a new puppy", "dog-collar, dry-dog-food:life stage=puppy, wet-dog-food:life stage=puppy, dog-bowl",
         "dog-harness, dog-treats, waste-bags", "dry-dog-food, wet-dog-food"),
    Need("clothes for a rainy festival", "rain-jacket, rain-poncho", "hiking-boots:waterproof=yes, umbrella",
         "hiking-boots, trail-shoes:waterproof=no, sandals, insoles", ("Sports",)),
    Need("gift for a tea drinker", "kettle, stovetop-kettle", "vacuum-flask, travel-mug",
         "coffee-maker, french-press, coffee-filters"),
    Need("gift for a coffee lover", "coffee-maker, french-press", "travel-mug, vacuum-flask, coffee-filters",
         "stovetop-kettle, kettle, drinking-bottle"),
    Need("balcony herb garden", "planter-box, plant-pot, potting-soil", "trowel, watering-can",
         "sprinkler, hose-nozzle, hose"),
    Need("summer barbecue with friends", "charcoal-grill, gas-grill, grill-tongs", "grill-cover, griddle-pan",
         "frying-pan, saucepan, pan-lid", ("Electronics", "Sports")),
    Need("home gym for a small flat", "resistance-bands, dumbbells", "yoga-mat, foam-roller", "", ("Electronics",)),
    Need("trail race equipment", "trail-shoes", "drinking-bottle, foam-roller", "hiking-boots, sandals, dumbbells",
         ("Electronics", "Personal care")),
    Need("after a sauna", "bathrobe, bath-towel, hammam-towel", "bath-mat", "", ("Personal care", "Sports")),
    Need("vegan outdoor shoes",
         "hiking-boots:material=polyester, trail-shoes:material=polyester, trail-shoes:material=nylon, "
         "sandals:material=nylon", "", "hiking-boots, sandals, insoles:material=leather"),
    Need("vegan office chair", "office-chair:material=polyester", "kneeling-chair:material=polyester",
         "office-chair, kneeling-chair, desk-lamp"),
    Need("vegan bedding", "duvet:filling=polyester, pillow:filling=polyester", "bedspread:filling=polyester",
         "duvet, pillow, bedspread", ("Baby", "Sports")),
    Need("coffee without single-use waste", "french-press", "coffee-maker", "coffee-filters, kettle, stovetop-kettle",
         ("Sports",)),
    Need("coffee to go without paper cups", "travel-mug", "vacuum-flask",
         "drinking-bottle, coffee-maker, coffee-filters, french-press"),
    Need("daily walks with a dog", "dog-lead, dog-harness, dog-collar", "waste-bags, dog-treats",
         "dog-bowl, dry-dog-food, wet-dog-food", ("Clothing",)),
    Need("setting up a home office", "office-chair, desk-lamp", "kneeling-chair, seat-cushion, notebook",
         "ink-cartridges", ("Electronics",)),
    Need("gift for a lover of fine handwriting", "fountain-pen", "rollerball, notebook, ink-cartridges", ""),
    Need("keeping a diary", "notebook", "fountain-pen, rollerball", "ink-cartridges"),
    Need("first walks with a newborn", "stroller, baby-carrier", "stroller-cover, diaper-bag, baby-blanket",
         "baby-monitor, night-light", ("Clothing",)),
    Need("baby starts solid food", "bib", "training-cup", "baby-bottle, bottle-brush"),
    Need("comfort on a long flight", "over-ear:noise cancelling=yes, earphones:noise cancelling=yes",
         "over-ear, earphones, power-bank", "speaker, headphone-stand, wall-charger",
         ("Home textiles", "Personal care")),
    Need("accessories for a new Novar 5 phone",
         "phone-case:fits=Novar 5, phone-pouch:fits=Novar 5, screen-protector:fits=Novar 5",
         "wall-charger, power-bank, charging-cable", "phone-case, phone-pouch, screen-protector"),
    Need("accessories for a new Tessio 2 phone",
         "phone-case:fits=Tessio 2, phone-pouch:fits=Tessio 2, screen-protector:fits=Tessio 2",
         "wall-charger, power-bank, charging-cable", "phone-case, phone-pouch, screen-protector"),
    Need("prepared for a power cut", "headlamp:supply=battery, power-bank", "headlamp, stovetop-kettle",
         "wall-charger, kettle, coffee-maker", ("Garden", "Baby", "Home textiles", "Office")),
    Need("pancake breakfast", "frying-pan", "hand-mixer, kitchen-scales, griddle-pan",
         "loaf-tin, saucepan, proving-basket"),
    Need("steak night", "griddle-pan, frying-pan:material=cast iron, charcoal-grill, gas-grill", "frying-pan",
         "saucepan, pan-lid, grill-cover"),
    Need("pasta evening", "saucepan", "frying-pan, pan-lid", "griddle-pan"),
    Need("baking a birthday cake", "hand-mixer, stand-mixer, kitchen-scales, loaf-tin", "", "proving-basket"),
    Need("bed for hot summer nights", "duvet:season=summer", "bedspread", "duvet, duvet-cover, pillow",
         ("Baby", "Sports")),
    Need("furnishing a guest bed", "duvet, pillow", "duvet-cover, bedspread", "", ("Sports", "Baby")),
    Need("towels and more for a guest bathroom", "bath-towel, bath-mat", "hammam-towel, bathrobe", "",
         ("Personal care",)),
    Need("beach holiday", "sun-cream, hammam-towel", "bath-towel, lip-balm", "bathrobe, bath-mat, hand-cream",
         ("Clothing", "Sports", "Electronics", "Baby")),
    Need("skin care for a perfume allergy",
         "hand-cream:perfume=none, body-lotion:perfume=none, sun-cream:perfume=none, lip-balm:perfume=none",
         "shampoo-bar:perfume=none", "hand-cream, body-lotion, sun-cream, lip-balm"),
    Need("routine for oily hair", "shampoo:hair type=oily, shampoo-bar:hair type=oily", "hairbrush",
         "shampoo, shampoo-bar, conditioner"),
    Need("routine for dry hair", "shampoo:hair type=dry, shampoo-bar:hair type=dry, conditioner", "hairbrush",
         "shampoo, shampoo-bar"),
    Need("trekking with very little weight", "tarp, camping-quilt", "sleeping-bag, tent, sleeping-mat", "",
         ("Clothing", "Electronics")),
    Need("starting yoga", "yoga-mat", "resistance-bands, foam-roller", "dumbbells"),
    Need("rainy city trip", "umbrella, rain-jacket", "rain-poncho", "sandals"),
    Need("lawn in a dry summer", "sprinkler, hose", "watering-can, hose-nozzle", ""),
    Need("night feeds with a baby", "baby-bottle, night-light", "baby-monitor", "training-cup, bib"),
    Need("music while jogging", "earphones:connection=Bluetooth", "earphones, over-ear:connection=Bluetooth",
         "over-ear, speaker, headphone-stand"),
    Need("quiet work in a loud open-plan office", "over-ear:noise cancelling=yes, earphones:noise cancelling=yes",
         "over-ear", "earphones, speaker, headphone-stand", ("Office",)),
    Need("hiking in summer heat", "sandals, drinking-bottle", "trail-shoes:waterproof=no, sun-cream",
         "insoles, rain-jacket", ("Home textiles",)),
    Need("winter hike with hot tea", "vacuum-flask, hiking-boots:waterproof=yes", "travel-mug",
         "sandals, drinking-bottle, hiking-boots", ("Kitchen",)),
    Need("repotting house plants", "plant-pot, potting-soil, trowel", "watering-can", "hose, sprinkler, hose-nozzle"),
    Need("breakfast eggs on an induction stove", "frying-pan:induction=yes", "griddle-pan:induction=yes",
         "frying-pan, griddle-pan, saucepan, pan-lid"),
    Need("dog training class", "dog-treats, dog-lead", "dog-harness, dog-collar, waste-bags",
         "dog-bowl, wet-dog-food, dry-dog-food"),
    Need("gift for someone with dry skin", "hand-cream, body-lotion", "lip-balm", "sun-cream", ("Home textiles",)),
)
# fmt: on

_OPENINGS = (
    "what can I use to {}?",
    "how can I {}?",
    "what do I need to {}?",
    "which product helps to {}?",
    "looking for something to {}",
)

_BRANDS = {
    "Kitchen": ("Fostrum", "Kelvarro", "Ospelin"),
    "Garden": ("Murvane", "Drellick", "Yarrowin"),
    "Clothing": ("Plinketh", "Hestrum", "Corvast"),
    "Electronics": ("Lumbrin", "Zephlin", "Jaskell"),
    "Baby": ("Wendrow", "Tibbrel", "Ivendel"),
    "Pets": ("Bodwyck", "Pavrel", "Harnock"),
    "Sports": ("Skelmor", "Veltrim", "Undrav"),
    "Office": ("Quorrin", "Rathmel", "Gravell"),
    "Home textiles": ("Sollinet", "Mirrowen", "Tarvelle"),
    "Personal care": ("Ellisane", "Brovanne", "Nimwick"),
}

# How a fact is said: in a description, there when it is "no" or "none", and in a query, before or after the type's
# name; nothing where nobody asks for it.
_SAID = {
    "colour": ("{}", "", "{}", "before"),
    "material": ("made of {}", "", "{}", "before"),
    "waterproof": ("waterproof", "not waterproof", "waterproof", "before"),
    "connection": ("with {} connection", "", "{}", "before"),
    "noise cancelling": ("with noise cancelling", "without noise cancelling", "noise cancelling", "before"),
    "induction": ("suitable for induction stoves", "not suitable for induction stoves", "for induction", "after"),
    "armrests": ("with armrests", "without armrests", "with armrests", "after"),
    "perfume": ("scented with {}", "free of perfume", "with {} perfume", "after"),
    "peat": ("mixed {}", "free of peat", "", ""),
    "size": ("{} in size", "", "{}", "after"),
    "capacity": ("with a capacity of {}", "", "{}", "after"),
    "length": ("{} long", "", "{}", "after"),
    "power": ("with {} of power", "", "{}", "after"),
    "supply": ("powered by {}", "", "", ""),
    "shape": ("{}", "", "", ""),
    "pack": ("in a pack of {}", "", "{}", "after"),
    "weight": ("{} in weight", "", "{}", "after"),
    "port": ("with a {} port", "", "{}", "before"),
    "fits": ("for the {}", "", "for {}", "after"),
    "age": ("suitable {}", "", "", ""),
    "recipe": ("made with {}", "", "with {}", "after"),
    "life stage": ("for the life stage {}", "", "{}", "before"),
    "sleeps": ("with room for {}", "", "for {}", "after"),
    "filling": ("filled with {}", "", "{}", "before"),
    "comfort": ("comfortable down to {}", "", "for {}", "after"),
    "tip": ("with a {} tip", "", "{} tip", "after"),
    "ruling": ("{}", "", "", ""),
    "season": ("for {} nights", "", "{}", "before"),
    "hair type": ("for {} hair", "", "for {} hair", "after"),
    "texture": ("{} on the skin", "", "{}", "before"),
    "factor": ("with sun factor {}", "", "", ""),
}
# Values that explain themselves in a chain; others are shown with their attribute's name ("waterproof no").
_PLAIN_VALUES = ("colour", "material", "size", "capacity", "length", "power", "pack", "weight", "shape")

_EXTRAS = {
    "Kitchen": (
        "Wipe clean after use.",
        "Spare parts can be ordered for ten years, and the small workshop that makes it also repairs it.",
        "A booklet with twelve recipes for two and for four is in the box.",
    ),
    "Garden": (
        "Easy to clean with water.",
        "Made to stand many summers; in winter it is best put away in a shed or a cellar.",
        "Our gardeners used it for a whole year before it came into the shop.",
    ),
    "Clothing": (
        "Air well after use.",
        "Returns are free for thirty days, as long as the label is still on and it was not worn outdoors.",
        "Sewn in a family workshop with forty years of experience.",
    ),
    "Electronics": (
        "Two years of guarantee.",
        "A short manual with clear drawings is in the box, and our service answers by phone on weekdays.",
        "Tested in our own laboratory over several weeks.",
    ),
    "Baby": (
        "Keep the instructions.",
        "An independent laboratory has tested it, and parents helped to design it from the first sketch.",
        "It comes in a small carton with a card for good wishes.",
    ),
    "Pets": (
        "Made in small batches.",
        "Tried out with large and small dogs before it came into the shop, and vets were asked for advice.",
        "Part of the proceeds goes to an animal shelter.",
    ),
    "Sports": (
        "Two years of guarantee.",
        "Our team used it for one season in all weathers, and the maker offers repairs at a fair price.",
        "Designed by people who spend their weekends outdoors.",
    ),
    "Office": (
        "Delivered ready to use.",
        "A young designer drew it, and it was tried out for half a year in three real offices.",
        "Companies that order more than ten get a discount.",
    ),
    "Home textiles": (
        "Washable at 40 degrees.",
        "It comes from a small mill where the same family has worked for three generations.",
        "Soft from the first day, and still so after many washes.",
    ),
    "Personal care": (
        "Not tested on animals.",
        "Made in small batches, so that it is never older than three months when it comes to the shop.",
        "Dermatologists have tested it on volunteers.",
    ),
}


@dataclass(frozen=True)
class Product:
    """A product: its facts as data, and the text that shows every one of them. The price is in whole euros."""

    product_id: str
    type: Type
    brand: str
    model: str
    price: int
    facts: dict[str, str]
    title: str
    description: str


@dataclass(frozen=True)
class Query:
    """A query with what it asks for, as data. `without` is the excluded word, its attribute and its values."""

    text: str
    kind: str
    type: Type | None = None
    asked: tuple[tuple[str, str], ...] = ()
    without: tuple[str, str, tuple[str, ...]] | None = None
    named: Product | None = None
    need: Need | None = None


@dataclass(frozen=True)
class Verdict:
    """A label, the sort of reason that led to it (for a varied choice of pairs) and the chain that says it."""

    label: int
    reason: str
    chain: str


def _rank(*key: object) -> str:
    """Pseudo-random but fixed: a hash of what is ranked, so that no choice hangs on the order of choosing."""
    return sha256("|".join(map(str, key)).encode()).hexdigest()


def _pick(options: Sequence[str], *key: object) -> str:
    return options[int(_rank(*key), 16) % len(options)]


def _say(attribute: str, value: str) -> str:
    positive, negative, _, _ = _SAID[attribute]
    return negative if value in ("no", "none") else positive.format(value)


def _show(attribute: str, value: str) -> str:
    return value if attribute in _PLAIN_VALUES else f"{attribute} {value}"


def _draw_facts(kind: Type, count: int) -> list[dict[str, str]]:
    """Facts of `count` products: values in equal shares; of five or more, the last two repeat the first two.

    Repeats (another brand and price, the same facts) let more than one product meet a query for several attributes.
    """
    options = [values.split("/") for values in kind.attributes.values()]
    left = sorted(product(*options), key=lambda values: _rank(kind.slug, *values))
    used: Counter[tuple[int, str]] = Counter()
    drawn: list[tuple[str, ...]] = []
    while len(drawn) < (count if count < 5 else count - 2):
        values = min(left, key=lambda values: sum(used[place] for place in enumerate(values)))
        left.remove(values)
        drawn.append(values)
        used.update(enumerate(values))
    return [dict(zip(kind.attributes, values, strict=True)) for values in (drawn + drawn[:2])[:count]]


def _write_title(kind: Type, brand: str, model: str, facts: dict[str, str]) -> str:
    words = [
        attribute if value == "yes" else value
        for attribute, value in facts.items()
        if value not in ("no", "none") and (value == "yes" or attribute in _PLAIN_VALUES)
    ]
    key = ("title", kind.slug, brand, model)
    first, two = " ".join(words[:1]), " ".join(words[:2])
    forms = (
        f"{brand} {model} {kind.name}, {', '.join(words[:2])}",
        f"{brand} {kind.name} {model} {two}",
        f"{kind.name[0].upper()}{kind.name[1:]} {brand} {model}, {first}",
        f"{brand} {model} {kind.name}",
    )
    return _pick(forms, *key).strip(" ,")


def _write_description(kind: Type, brand: str, model: str, facts: dict[str, str]) -> str:
    """Two to four sentences: what the product is for, all its facts, and in most cases a note and an extra."""
    key = (kind.slug, brand, model)
    opening = _pick(("Made for {}.", "Ideal for {}.", "A good choice for {}.", "Designed for {}."), "opening", *key)
    said = sorted(
        (_say(*fact) for fact in facts.items()), key=lambda text: (text.startswith("with"), _rank(text, *key))
    )
    listed = " and ".join(filter(None, (", ".join(said[:-1]), said[-1])))
    lead = _pick(("This version is", "This model is", "The one on offer is", f"This one by {brand} is"), "lead", *key)
    purpose, details = opening.format(kind.use), f"{lead} {listed}."
    extra = _pick(_EXTRAS[kind.department], "extra", *key)
    forms = (
        (purpose, details),
        (details, purpose, kind.note),
        (purpose, kind.note, details),
        (purpose, details, kind.note, extra),
        (purpose, kind.note, details, extra),
        (details, purpose, extra),
    )
    return " ".join(forms[int(_rank("form", *key), 16) % len(forms)])


@cache
def products() -> tuple[Product, ...]:
    """The catalogue: of two substitutes, 6 products of the first and 5 of the second; of other types 2 or 3."""
    made = []
    for kind in TYPES.values():
        later_twin = kind.substitute and list(TYPES).index(kind.substitute) < list(TYPES).index(kind.slug)
        most_values = max(len(values.split("/")) for values in kind.attributes.values())
        count = (5 if later_twin else 6) if kind.substitute else max(2, most_values)
        # One at the type's price (the one that "alternative" queries name), then far below, far above, a little below.
        steps = ((1.0,), (0.42, 0.5), (1.4, 1.7), (0.46, 0.55), (0.86, 0.9), (1.3, 1.9))
        for number, facts in enumerate(_draw_facts(kind, count), start=1):
            product_id = f"{kind.slug}-{number:04}"
            brand = _pick(_BRANDS[kind.department], "brand", product_id)
            model = f"{kind.name[0].upper()}{100 + int(_rank('model', product_id), 16) % 900}"
            step = steps[number - 1][int(_rank("price", product_id), 16) % len(steps[number - 1])]
            title = _write_title(kind, brand, model, facts)
            description = _write_description(kind, brand, model, facts)
            made.append(Product(product_id, kind, brand, model, round(kind.price * step), facts, title, description))
    return tuple(made)


_NEED_FINDINGS = {4: "Made for this need.", 3: "It helps only in part.", 2: "Same theme, need not met."}


def judge(query: Query, item: Product) -> Verdict | None:
    """Label of a pair by the rules in this module's docstring; None where people would quarrel, so it is not shown."""
    if query.need:
        return _judge_need(query.need, item)
    if query.type:
        return _judge_type(query, query.type, item)
    raise ValueError(f"query {query.text!r} asks for nothing; it must have a type or a need")


def _judge_need(need: Need, item: Product) -> Verdict | None:
    clauses = list(need.clauses())
    mine = [(label, attribute, value) for label, slug, attribute, value in clauses if slug == item.type.slug]
    decisive = list(dict.fromkeys(attribute for _, attribute, _ in mine if attribute))
    seen = f"Need: {need.text}. Product: {item.type.name}"
    for label, attribute, value in mine:
        if not attribute or item.facts[attribute] == value:
            facts = ", ".join(_show(name, item.facts[name]) for name in decisive)
            seen += f", {facts}" if facts else f", for {item.type.use}"
            return Verdict(label, item.type.slug, f"{seen}. {_NEED_FINDINGS[label]} So {NAMES[label]}.")
    near = {TYPES[slug].department for _, slug, _, _ in clauses} | set(need.far)
    useful = [slug for label, slug, _, _ in clauses if label > 2]
    if item.type.department in near or any(_look_alike(slug, item.type.slug) for slug in useful):
        return None
    return Verdict(1, item.type.department, f"{seen}, {item.type.department}. Another department. So {NAMES[1]}.")


def _look_alike(one: str, other: str) -> bool:
    return any(one in group and other in group for group in _LOOKALIKES)


def _judge_type(query: Query, asked: Type, item: Product) -> Verdict | None:
    own = item.type
    wishes = [asked.name, *(_show(*wish) for wish in query.asked)]
    if query.without:
        word, attribute, _ = query.without
        wishes.append(f"not {word}" if attribute in ("colour", "material") else f"no {word}")
    wishes += [f"clearly cheaper than {query.named.price} EUR"] if query.named else []

    def verdict(label: int, reason: str, facts: Sequence[str], found: str) -> Verdict:
        chain = f"Asked: {', '.join(wishes)}. Product: {', '.join((own.name, *facts))}. {found} So {NAMES[label]}."
        return Verdict(label, reason, chain)

    if own.shelf != asked.shelf:
        if _look_alike(asked.slug, own.slug):
            return None
        where = "same department" if own.department == asked.department else "other department"
        return verdict(1, where, [own.shelf], "Another shelf.")
    if own.slug not in (asked.slug, asked.substitute):
        if asked.slug in own.accessory_of.split():
            return verdict(2, "accessory", [], "Only an accessory for it.")
        return verdict(2, "other type", [], "Same shelf, but another type.")

    misses = [] if own is asked else ["type"]
    misses += [attribute for attribute, value in query.asked if item.facts.get(attribute) != value]
    facts = [_show(name, item.facts[name]) if name in item.facts else f"{name} not stated" for name, _ in query.asked]
    if "fits" in misses:
        return verdict(2, "decisive", facts, "It does not fit.")
    if query.without:
        word, attribute, values = query.without
        if attribute not in item.facts:
            return None
        facts.append(_show(attribute, item.facts[attribute]))
        if item.facts[attribute] in values:
            return verdict(2, "decisive", facts, f"The excluded {word} is present.")
    if query.named:
        facts.append(f"{item.price} EUR")
        if item is query.named:
            return verdict(2, "decisive", facts, "It is the named product itself.")
        if item.price >= query.named.price:
            return verdict(2, "decisive", facts, "It is not cheaper.")
        if item.price > CLEARLY_CHEAPER * query.named.price:
            if misses or item.price < A_LITTLE_CHEAPER * query.named.price:
                return None
            misses.append("price")
    found = f"Missed: {', '.join(misses)}." if misses else "All is met."
    if len(misses) == 1:
        found = {"type": "A close substitute.", "price": "Only a little cheaper."}.get(misses[0], found)
    return verdict(max(2, 4 - len(misses)), str(misses), facts, found)


def _phrase(kind: Type, asked: Sequence[tuple[str, str]], name_first: bool = False) -> str:
    """Type and asked facts as a shopper types them: "blue bath towel 70x140 cm", or with the name first."""
    before = [_SAID[name][2].format(value) for name, value in asked if _SAID[name][3] == "before"]
    after = [_SAID[name][2].format(value) for name, value in asked if _SAID[name][3] == "after"]
    return " ".join([kind.name, *before, *after] if name_first else [*before, kind.name, *after])


def _wishes(kind: Type, size: int) -> list[tuple[tuple[str, str], ...]]:
    """Every `size` facts that some product of the type has together and that a shopper may ask for."""
    wishes = {}
    for item in products():
        if item.type is kind:
            askable = [(n, v) for n, v in item.facts.items() if _SAID[n][2] and v not in ("no", "none")]
            wishes.update(dict.fromkeys(combinations(askable, size)))
    return list(wishes)


def _exclusions(kind: Type) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield what a shopper may exclude: word, attribute, values that contain it."""
    for attribute, joined in kind.attributes.items():
        values = joined.split("/")
        if attribute in ("colour", "material", "recipe", "filling"):
            yield from ((value, attribute, (value,)) for value in values)
        elif attribute == "perfume":
            yield "perfume", attribute, tuple(value for value in values if value != "none")
        elif attribute == "connection":
            yield "Bluetooth", attribute, ("Bluetooth",)
        elif attribute == "armrests":
            yield "armrests", attribute, ("yes",)


def _most_telling(kind: Type, candidates: Iterable[Query]) -> Query:
    """The query to which the type and its substitute give the most even supply of labels 4, 3 and 2 (counted to 2)."""

    def worth(query: Query) -> tuple[int, int, str]:
        verdicts = [judge(query, item) for item in products() if item.type.slug in (kind.slug, kind.substitute)]
        supply = Counter(verdict.label for verdict in verdicts if verdict)
        least_two = [min(supply[label], 2) for label in (4, 3, 2)]
        return min(least_two), sum(least_two), _rank(query.text)

    return max(candidates, key=worth)


def _attribute_query(kind: Type) -> Query:
    size = 3 if int(_rank("three facts", kind.slug), 16) % 4 == 0 and len(kind.attributes) > 2 else 2
    name_first = int(_rank("name first", kind.slug), 16) % 3 == 0
    return _most_telling(kind, (Query(_phrase(kind, w, name_first), "attribute", kind, w) for w in _wishes(kind, size)))


def _negation_query(kind: Type) -> Query:
    """Half of them exclude something and ask for a fact besides."""
    wishes = _wishes(kind, int(_rank("and a fact", kind.slug), 16) % 2)
    candidates = []
    for without in _exclusions(kind):
        word, attribute, _ = without
        forms: tuple[str, ...] = ("{} without {}", "{}, no {}", "{} with no {}")
        if attribute in ("colour", "material"):
            forms = ("{} not {}", "{}, no {}", "{} but not {}", "{}, anything but {}", "non-{1} {0}")
        form = _pick(forms, "negation", kind.slug)
        for wish in wishes:
            if attribute not in dict(wish):
                candidates.append(Query(form.format(_phrase(kind, wish), word), "negation", kind, wish, without))
    return _most_telling(kind, candidates)


def _alternative_query(kind: Type) -> Query:
    named = next(item for item in products() if item.type is kind)
    name = f"{named.brand} {named.model} {kind.name}"
    forms = (
        f"cheaper alternative to {name} ({named.price} EUR)",
        f"cheap alternative to the {name}, which costs {named.price} EUR",
        f"something like {name} but well below {named.price} EUR",
        f"affordable {kind.name} instead of {named.brand} {named.model} at {named.price} EUR",
    )
    return Query(_pick(forms, "alternative", kind.slug), "alternative", kind, named=named)


@cache
def queries() -> tuple[Query, ...]:
    """Every query: four for each type that has a substitute, and one for each need."""
    made = []
    for kind in TYPES.values():
        if kind.substitute:
            made.append(Query(kind.name, "plain", kind))
            made += [_attribute_query(kind), _negation_query(kind), _alternative_query(kind)]
    made += [Query(_pick(_OPENINGS, n.text).format(n.text), "question", need=n) for n in _QUESTIONS]
    made += [Query(n.text, "knowledge", need=n) for n in _KNOWLEDGE]
    return tuple(made)


def query_kinds() -> dict[str, str]:
    """Kind of every query, by its text."""
    return {query.text: query.kind for query in queries()}


@cache
def _splits() -> dict[str, str]:
    """Split of every query: of each kind, 15 % (at least 8) are test, as many dev, the rest train."""
    splits: dict[str, str] = {}
    for kind in KINDS:
        texts = sorted((q.text for q in queries() if q.kind == kind), key=lambda text: _rank("split", text))
        share = max(8, round(0.15 * len(texts)))
        splits |= {text: "test" if i < share else "dev" if i < 2 * share else "train" for i, text in enumerate(texts)}
    return splits


@cache
def _pairs() -> tuple[tuple[Query, Product, Verdict], ...]:
    """The judged pairs: 10 a query, drawn from the labels and their reasons in turn, rarely shown products first."""
    shown: Counter[str] = Counter()
    pairs = []
    for query in queries():
        by_label: dict[int, list[tuple[Product, Verdict]]] = {label: [] for label in LABELS}
        for item in sorted(products(), key=lambda p: (shown[p.product_id], _rank(query.text, p.product_id))):
            if verdict := judge(query, item):
                by_label[verdict.label].append((item, verdict))
        for judged in by_label.values():
            turn: Counter[str] = Counter()
            turns = []
            for _, verdict in judged:
                # A decisive breach (negated, dearer) is what its kind is about: twice in each turn.
                turns.append(turn[verdict.reason] // (2 if verdict.reason == "decisive" else 1))
                turn[verdict.reason] += 1
            judged[:] = [pair for _, pair in sorted(zip(turns, judged, strict=True), key=lambda entry: entry[0])]
        in_turn = [by_label[label][k] for k in range(len(products())) for label in LABELS if k < len(by_label[label])]
        for item, verdict in in_turn[:PAIRS_PER_QUERY]:
            shown[item.product_id] += 1
            pairs.append((query, item, verdict))
    return tuple(pairs)


def rows() -> list[dict[str, object]]:
    """The pairs in canonical input form, with `label` (int, 4..1) and `split`."""
    return [
        {
            "query": query.text,
            "product_id": item.product_id,
            "title": item.title,
            "brand": item.brand,
            "description": item.description,
            "attributes": {**item.facts, "price": f"{item.price} EUR"},
            "category": item.type.shelf,
            "locale": "en",
            "label": verdict.label,
            "split": _splits()[query.text],
        }
        for query, item, verdict in _pairs()
    ]


def chains() -> list[dict[str, object]]:
    """Kind, label and chain of the same pairs, in the same order."""
    return [
        {
            "query": query.text,
            "product_id": item.product_id,
            "locale": "en",
            "kind": query.kind,
            "label": verdict.label,
            "chain": verdict.chain,
        }
        for query, item, verdict in _pairs()
    ]


def counts() -> str:
    """A small table: products, queries and pairs by split, and by kind and label."""
    kinds = query_kinds()
    pairs = rows()
    cells = Counter((kinds[str(row["query"])], row["label"]) for row in pairs)
    lines = [f"{len(products())} products, {len(kinds)} queries, {len(pairs)} pairs"]
    for split in SPLITS:
        mine = [str(row["query"]) for row in pairs if row["split"] == split]
        lines.append(f"{split:<12}{len(mine):>6} pairs{len(set(mine)):>6} queries")
    lines.append(f"{'kind':<12}{'queries':>8}" + "".join(f"{NAMES[label]:>12}" for label in LABELS))
    for kind in KINDS:
        asked = sum(1 for own in kinds.values() if own == kind)
        lines.append(f"{kind:<12}{asked:>8}" + "".join(f"{cells[kind, label]:>12}" for label in LABELS))
    return "\n".join(lines)


def _to_jsonl(records: Iterable[dict[str, object]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main(argv: list[str]) -> int:
    """Write pairs.jsonl and chains.jsonl into the folder `--out` and print what they hold."""
    parser = argparse.ArgumentParser(prog="python -m demo.catalogue", description="Make the demo's pairs and chains.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into; made if it is missing")
    out: Path = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    (out / "pairs.jsonl").write_bytes(_to_jsonl(rows()).encode())
    (out / "chains.jsonl").write_bytes(_to_jsonl(chains()).encode())
    print(counts())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
