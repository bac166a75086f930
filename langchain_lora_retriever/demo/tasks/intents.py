"""What a user wants, as one of the labels that the prompt offers, each task for one domain."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from langchain_lora_retriever.demo.tasks.base import Example, Split, Task, draw_int
from langchain_lora_retriever.demo.tasks.entities import CITIES, COMPANIES, FIRST_NAMES, ITEMS, pick

if TYPE_CHECKING:
    from random import Random

INTENTS: dict[str, dict[str, str]] = {
    "banking": {
        "check_balance": "How much money is left in the account of {p}?|Tell me the balance of {p}'s savings account.|"
        "Do I still have {n} euros in my account?",
        "transfer_money": "Send {n} euros from my account to {p}.|Wire {n} dollars to {o}.|"
        "I want to move {n} euros to {p}'s account.",
        "block_card": "My card was stolen in {c}, please block it.|Freeze the debit card of {p}.|"
        "I lost my credit card near {c}; it must be locked.",
        "pay_bill": "I need to pay the invoice of {o}, {n} euros.|Settle my bill with {o}.|"
        "Please pay the {n} euro electricity bill.",
        "change_pin": "I forgot my PIN while shopping in {c} and want a new one.|How do I change the PIN of {p}'s "
        "card?|"
        "Set a new PIN for the card that ends in {n}.",
        "request_loan": "Can I borrow {n} thousand euros for a flat in {c}?|{p} and I want a loan of {n} thousand.|"
        "What interest would a credit for {o} have?",
        "report_fraud": "There is a charge of {n} euros by {o} that I never made.|Somebody in {c} used my account!|"
        "I don't recognise the debit from {o}.",
    },
    "travel": {
        "book_flight": "I need a plane ticket to {c} for {p}.|Get me a flight to {c}.|Fly {n} people from my town to "
        "{c}.",
        "book_hotel": "Find a room in {c} for {n} nights.|{p} needs a hotel in {c}.|Reserve a suite in {c} please.",
        "rent_car": "I want to hire a car in {c} for {n} days.|{p} would like to rent a van in {c}.|"
        "Which rental car can I pick up at {c} airport?",
        "cancel_trip": "Call off my journey to {c}.|{p} can't travel to {c}, please cancel.|"
        "I won't go to {c}; annul booking {n}.",
        "check_visa": "Does {p} need a visa to enter {c}?|Which papers must I show at the border to {c}?|"
        "Visa rules for a stay of {n} days in {c}?",
        "ask_baggage": "How heavy may my suitcase be on the plane to {c}?|Can {p} take {n} bags to {c}?|"
        "Is a second piece of luggage free on the way to {c}?",
        "flight_status": "Is the plane from {c} late?|When does flight {n} from {c} land?|"
        "Has the departure to {c} been delayed?",
    },
    "home": {
        "light_on": "It's dark in {p}'s room, I can't see.|Turn on the lamp next to the {i}.|Light up lamp {n} in "
        "the hall.",
        "light_off": "Switch off the lights in {p}'s room.|No more light over the {i}, please.|Make lamp {n} go dark.",
        "set_heating": "Set the heating in {p}'s bedroom to {n} degrees.|It's too cold in the room with the {i}.|"
        "Make the living room {n} degrees warm.",
        "lock_door": "Lock the front door behind {p}.|Close the door of the shed with the {i} and bolt it.|"
        "Is the garage secured? Lock door {n}.",
        "play_music": "Play a song for {p} in the kitchen.|Put on radio channel {n}.|Some jazz in {p}'s room, please.",
        "start_vacuum": "Let the robot clean the floor around the {i}.|Hoover {p}'s room.|"
        "The carpet under the {i} is dusty, vacuum it.",
        "set_timer": "Wake {p} in {n} minutes.|Remind me of the {i} in {n} minutes.|"
        "Ring the kitchen bell in {n} minutes.",
    },
    "shop": {
        "track_parcel": "Where is the package with the {i}?|When will my {i} be delivered to {c}?|Has parcel {n} left "
        "{c}?",
        "return_item": "I want to send the {i} back.|The {i} don't fit, how do I return them?|{p} returns {n} {i}.",
        "ask_refund": "When do I get my {n} euros back for the {i}?|{p} still waits for the refund of {n} euros.|"
        "Please pay me back for the {i}.",
        "report_damage": "The {i} arrived broken.|{n} of the {i} have cracks.|The box for {p} came with scratched {i}.",
        "use_coupon": "My voucher of {n} percent does not work on {i}.|Where do I enter the discount code for {i}?|"
        "{p} has a coupon for {n} euros.",
        "change_address": "Please deliver to {c} instead.|{p} moved to {c}; update where you ship.|"
        "The {i} should go to my new home in {c}.",
        "ask_stock": "Are the {i} available again?|Do you still sell {i}?|Can I get {n} {i} right now, are they in "
        "store?",
    },
}

OTHER_LABELS = {
    "check_balance": "balance_inquiry show_balance",
    "transfer_money": "send_money make_transfer",
    "block_card": "freeze_card card_lost",
    "pay_bill": "settle_invoice bill_payment",
    "change_pin": "new_pin reset_pin",
    "request_loan": "ask_credit loan_inquiry",
    "report_fraud": "unknown_charge dispute_payment",
    "book_flight": "flight_booking buy_plane_ticket",
    "book_hotel": "hotel_booking reserve_room",
    "rent_car": "car_rental hire_car",
    "cancel_trip": "trip_cancellation annul_booking",
    "check_visa": "visa_rules entry_requirements",
    "ask_baggage": "luggage_rules baggage_allowance",
    "flight_status": "flight_delay arrival_time",
    "light_on": "lamp_on brighten_room",
    "light_off": "lamp_off darken_room",
    "set_heating": "adjust_temperature warm_room",
    "lock_door": "secure_door close_door",
    "play_music": "start_music music",
    "start_vacuum": "clean_floor vacuum",
    "set_timer": "alarm reminder",
    "track_parcel": "parcel_status where_is_order",
    "return_item": "send_back returns",
    "ask_refund": "refund money_back",
    "report_damage": "broken_item damaged_goods",
    "use_coupon": "discount voucher",
    "change_address": "new_address update_delivery",
    "ask_stock": "availability in_store",
}

PROMPTS = (
    "{text}\nWhich {domain} intent is this: {labels}?",
    "Classify the {domain} request as one of these intents: {labels}.\nRequest: {text}",
    "Intents: {labels}\n{Domain} message: {text}\nIntent:",
    'A user of {domain} says: "{text}" Choose the intent from {labels}.',
)

DOMAINS = {"banking": "banking", "travel": "travel", "home": "smart home", "shop": "online shopping"}


def generate(rng: Random, split: Split, *, domain: str) -> Example:
    """Draw a request of one domain and offer its label among three to five."""
    labels = sorted(INTENTS[domain])
    intent = rng.choice(labels)
    separator = rng.choice("_ -")
    offered = [
        rng.choice([x, *OTHER_LABELS[x].split()]).replace("_", separator)
        for x in (intent, *rng.sample([x for x in labels if x != intent], rng.randint(2, 4)))
    ]
    label = offered[0]
    rng.shuffle(offered)
    fill = {
        "p": pick(rng, FIRST_NAMES, split),
        "o": pick(rng, COMPANIES, split),
        "c": pick(rng, CITIES, split),
        "i": pick(rng, ITEMS, split),
        "n": str(draw_int(rng, 2, 60, split, "n")),
    }
    template = rng.choice(INTENTS[domain][intent].split("|"))
    name = DOMAINS[domain]
    prompt = rng.choice(PROMPTS).format(
        text=template.format(**fill), domain=name, Domain=name.capitalize(), labels=", ".join(offered)
    )
    used = tuple(value for key, value in fill.items() if "{" + key + "}" in template)
    return Example(input=prompt, output=label, task=f"intent_{domain}", entities=used)


LORA: dict[str, dict[str, object]] = {
    "banking": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "travel": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "home": {"r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "o_proj"]},
    "shop": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
}

TASKS = [Task(f"intent_{d}", "intents", partial(generate, domain=d), LORA[d]) for d in INTENTS]
