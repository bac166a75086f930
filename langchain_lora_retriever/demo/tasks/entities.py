"""Names and things the prompts are filled with; `base.part` divides every list between training and test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_lora_retriever.demo.tasks.base import Split, part, phrases, words

if TYPE_CHECKING:
    from random import Random

FIRST_NAMES = words(
    "Anna Boris Carla David Elena Felix Grace Hugo Ines Jonas Karin Liam Maya Noah Olga Pablo Quentin Rosa Samir Tara "
    "Ulrich Vera Walter Xenia Yusuf Zoe Amara Bruno Chiara Dmitri Esther Farid Greta Hana Igor Julia Kofi Leila Marco "
    "Nadia Oscar Priya Rafael Selma Tomas Uma Victor Wanda Yara Zeno"
)
LAST_NAMES = words(
    "Adler Bennett Costa Dvorak Engel Fischer Garcia Hansen Ivanov Jensen Keller Lopez Moreau Novak "
    "Okafor Petrov Quinn "
    "Rossi Schmidt Tanaka Ueda Vargas Weber Xu Yilmaz Zhang Andersen Brandt Castillo Dubois Eriksen Ferrari Goldberg "
    "Haddad Ito Joshi Kowalski Lindgren Mbeki Nguyen Olsen Pereira Ramos Silva Toth Usman Vogel Walsh Yamada Ziegler"
)
CITIES = words(
    "Lisbon Oslo Vienna Dublin Prague Athens Madrid Warsaw Helsinki Geneva Boston Denver Chicago Toronto Lima Bogota "
    "Santiago Cairo Nairobi Accra Tunis Dubai Mumbai Delhi Bangkok Hanoi Seoul Osaka Kyoto Taipei Sydney Perth "
    "Auckland Munich Hamburg Lyon Naples Porto Seville Krakow"
)
COMPANIES = phrases(
    "Northwind Traders|Blue Harbor Media|Acorn Systems|Silverline Logistics|Greenfield Foods|Apex "
    "Robotics|Lumen Optics|"
    "Redwood Bank|Orchid Textiles|Polar Freight|Summit Energy|Cobalt Software|Maple Health|Falcon Airways|"
    "Granite Works|Delta Print|Ivory Labs|Juniper Travel|Kestrel Design|Opal Ceramics|Pinewood Furniture|"
    "Quartz Mining|Riverside Books|Sunrise Solar|Terra Gardens|Umbra Lighting|Vista Hotels|Willow Pharma"
)
ITEMS = phrases(
    "notebooks|desk lamps|coffee mugs|water bottles|wool blankets|phone cases|garden chairs|wine glasses|running shoes|"
    "paper towels|oak tables|winter jackets|picture frames|kitchen knives|tea pots|yoga mats|ball pens|rain coats|"
    "bread baskets|candle holders|travel bags|steel pans|bath towels|wall clocks|bicycle lights|flower pots|"
    "leather belts|cotton shirts|printer cartridges|hiking boots|face masks|tool boxes"
)
JOBS = phrases(
    "sales manager|software engineer|head nurse|project lead|accountant|art director|chief buyer|data analyst|"
    "legal advisor|office clerk|plant manager|press officer|research fellow|tax consultant|tour guide|web designer"
)
EVENTS = phrases(
    "Budget Review|Garden Party|Chess Night|Jazz Concert|Team Lunch|Book Club|Product Launch|Yoga Class|Film Evening|"
    "Wine Tasting|Board Meeting|Charity Run|Piano Recital|Job Fair|Cooking Course|Science Slam|Dance Workshop|"
    "Art Auction|Press Conference|Summer Camp|Quiz Night|Safety Training|Poetry Reading|Flea Market"
)


def pick(rng: Random, items: list[str], split: Split) -> str:
    """Draw one of the items of `split`."""
    return rng.choice(part(items, split))


def person(rng: Random, split: Split) -> str:
    """Draw a first and a last name of `split`."""
    return f"{pick(rng, FIRST_NAMES, split)} {pick(rng, LAST_NAMES, split)}"
