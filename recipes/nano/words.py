"""The words that problems are told with."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    Ann Ben Cora Dan Ella Finn Gina Hugo Ida Jack Kim Leo Mia Noah Olga Paul Rosa Sam Tina Uma Vera Will Zoe Amir
    Bela Chen Dora Emil Fay Gus Hana Ivan Jana Karl Lena Max Nina Omar Pia Ruth
    """
)
OBJECTS = _words(
    """
    key book ball cup hat map pen coin lamp box apple ring watch letter toy knife plate spoon bag rope candle stone
    flute drum doll shoe scarf clock brush torch
    """
)
PLACES = _words(
    """
    kitchen garden garage cellar attic bedroom office bathroom hall park school library barn shop station museum
    tower forest market harbor
    """
)
THINGS = _words(
    """
    apples books coins stamps marbles pencils cards shells buttons cookies eggs flowers stickers balloons nuts pears
    plums candles tickets stones
    """
)
ANIMALS = _words(
    """
    cat dog bird fish frog horse cow duck goat mouse owl pig sheep bee ant fox bear wolf
    """
)
WORDS = _words(
    """
    about above actor after again agree alarm album alert alone anger apple april arena armor arrow aside autumn
    award baker banana basket beach beard before begin behind being below bench berry better bird black blame blank
    bloom board boat bottle bottom branch bread break brick bridge bright broom brother brown brush bucket build
    butter cabin cable camel camera candle candy canoe carpet carrot castle cattle chain chair chalk cheese cherry
    chess child chorus circle circus clean clear clever cliff clock cloth cloud clown coast coffee color comet
    copper coral corner cotton county cousin cover cradle crane cream creek cricket crowd crown curtain dance danger
    daisy deer desert dinner doctor dolphin donkey door dozen dragon dream dress drink driver eagle early earth
    easel echo eight elbow elder empty engine enough evening event fabric family farmer father feather fence fever
    field finger fire flag flame flight floor flower flute forest fork fossil fountain fresh friend frost fruit
    future galaxy gallop garden garlic gentle ghost giant ginger giraffe glass globe glove grain grape grass gravel
    green guitar hammer harbor harvest hazel heart heavy hedge helmet hidden hill hollow honey horse hotel house
    human humble hunter insect island ivory jacket jelly jewel journey jungle kettle kitchen kitten ladder lake lamp
    laugh lemon letter level light lion little lizard lobster lunch magic maple marble market meadow melon metal
    middle milk minute mirror monkey morning mother motor mountain mouse museum music napkin narrow nature needle
    nephew night noise north novel number nurse ocean office olive onion open orange orchard otter oven oyster
    paddle paint palace panda paper parade parent parrot pebble pencil pepper piano picnic pillow pilot pirate
    planet plant plate pocket poem pond poppy potato powder prince puddle pumpkin puppet puzzle queen quiet rabbit
    radio railway rain ranch raven ribbon river robin rocket roof rope rose rubber saddle sailor salad salmon salt
    sand sandal school scissors season secret seed shadow shark sheep shell shelter shirt silver singer sister
    sketch slope small smoke snow soap soccer sock soldier south spider spoon spring square squirrel stable stage
    stone storm story straw stream street strawberry string sugar summer sunset swan sweet table tailor teacher
    temple tent theater thread thunder tiger timber tomato tongue tower train travel treasure tree trumpet tulip
    tunnel turkey turtle uncle under valley velvet village violin visit voice wagon walnut water whale wheel whistle
    white window winter wizard wolf wonder wood wool yellow young zebra
    """
)
