"""Requests that a tool can answer, to a tool call; and tool results, to an answer in words.

The tools stand in the system message, as in the Hermes and Qwen chat templates. Some conversations need two calls, some
have come as far as the tool's result, and some need no tool at all.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_lora_retriever.demo.tasks.base import Example, Split, Task, draw_int, is_test, part, phrases, words
from langchain_lora_retriever.demo.tasks.entities import CITIES, COMPANIES, FIRST_NAMES, ITEMS, person, pick

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

NAME = "function_calling"

TOOLS_PROMPT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

CJK = "山川田中村木林森石原小大高松竹花王李張陳黄呉明美春夏秋冬光和東西南北海天雨雪金銀星月日本京都青白"
ACCENTED = words(
    "José Zoë Łukasz Renée Søren Jürgen Çağla Ştefan Ángel Élodie Håkon Žofia François Íñigo Màrius Dağhan Ölaf Béla "
    "Núria Ægir"
)
GREEK_AND_CYRILLIC = words("Αλέξης Ελένη Нина Борис Ольга Игорь Νίκος Мария Σοφία Павел Δήμητρα Юлия")
WORDS = words(
    "alpha bravo cedar delta ember frost grove hazel island jade kite lemon mango north ocean pearl quartz river stone "
    "tulip umber velvet willow zephyr"
)
NOTES = phrases(
    "call back tomorrow|prefers email|long-time customer|pays by invoice|met at the fair|new lead|needs an offer|"
    "asked for samples|wants a refund|VIP guest|speaks French|moved last year|birthday in May|works at night|"
    "likes green tea|allergic to nuts"
)


def unicode_name(rng: Random, split: Split) -> str:
    """Draw a name that ASCII cannot write."""
    kind = rng.random()
    if kind < 0.3:
        return pick(rng, ACCENTED, split)
    if kind < 0.45:
        return pick(rng, GREEK_AND_CYRILLIC, split)
    suffix = rng.choice(("", "", "株式会社", "有限公司", "商店", "集團"))
    while True:
        name = "".join(rng.choice(CJK) for _ in range(rng.randint(2, 4))) + suffix
        if is_test(name) == (split == "test"):
            return name


VALUES: dict[str, Callable[[Random, Split], str | int]] = {
    "city": lambda rng, split: pick(rng, CITIES, split),
    "person": person,
    "company": lambda rng, split: pick(rng, COMPANIES, split),
    "item": lambda rng, split: pick(rng, ITEMS, split),
    "word": lambda rng, split: pick(rng, WORDS, split),
    "note": lambda rng, split: pick(rng, NOTES, split),
    "unicode": unicode_name,
    "int": lambda rng, split: draw_int(rng, 1, rng.choice((12, 99, 999)), split, "argument"),
}


class Tool(NamedTuple):
    """A tool, the sentences that ask for it and what it may return.

    `params` maps a parameter's name to its kind in `VALUES`; sentences name parameters in braces.
    """

    name: str
    description: str
    params: dict[str, str]
    requests: tuple[str, ...]
    result: str


def tool(name: str, description: str, params: str, requests: str, result: str) -> Tool:
    """Build a `Tool` from its short notation."""
    pairs = [p.partition(":")[::2] for p in params.split()]
    return Tool(name, description, dict(pairs), tuple(requests.split("|")), result)


TOOLS = [
    tool("get_forecast", "Get the weather forecast of a city.", "city:city",
         "What will the weather be like in {city}?|Do I need an umbrella in {city} today?", "cloudy, {n} degrees"),
    tool("create_customer", "Create a customer.", "customer_name:unicode description:note",
         "Use the tool to create a customer named {customer_name} with the description '{description}'.|"
         "Create the customer {customer_name}; description: {description}.", "customer {n} created"),
    tool("stock_price", "Look up the share price of a company.", "company:company",
         "How much is a share of {company}?|Look up the stock price of {company}.", "{n} dollars"),
    tool("get_weather", "Get the current weather.", "location:city",
         "What is the weather in {location}?|Check the weather in {location} right now.", "sunny and {n} degrees"),
    tool("send_mail", "Send an e-mail.", "recipient:person subject:note",
         "Write a mail to {recipient} with the subject '{subject}'.|Mail {recipient}: {subject}.", "mail {n} sent"),
    tool("add_reminder", "Add a reminder.", "text:note minutes:int",
         "Set a reminder '{text}' in {minutes} minutes.|In {minutes} minutes remind me: {text}.", "reminder {n} set"),
    tool("add", "Add two numbers.", "a:int b:int",
         "What is {a} + {b}?|Add {a} and {b} with the tool.|Calculate the sum of {a} and {b}.", "{n}"),
    tool("multiply", "Multiply two integers.", "a:int b:int",
         "What is {a} * {b}?|Multiply {a} by {b} with the tool.|Calculate {a} times {b}.", "{n}"),
    tool("find_user", "Find a user by name.", "name:person",
         "Find the user {name} in the system.|Which user id does {name} have?", "user id {n}"),
    tool("add_client", "Add a client to the database.", "client:unicode city:city",
         "Add the client {client} from {city} to the database.|New client: {client}, {city}. Use the tool.",
         "client {n} added"),
    tool("population", "Return the number of inhabitants of a city.", "city:city",
         "How many people live in {city}?|Use the tool to get the population of {city}.", "{n} thousand"),
    tool("register_company", "Register a company.", "company_name:unicode note:note",
         "Register the company {company_name} with the note '{note}'.|Use the tool to register {company_name}, {note}.",
         "registered as {n}"),
    tool("web_search", "Search the web.", "query:word",
         "Search the web for {query}.|Look up {query} on the internet.", "{n} pages found"),
    tool("translate", "Translate a word.", "word:word language:unicode",
         "Translate the word {word} into the language {language}.", "translation {n}"),
    tool("check_stock", "Say how many pieces of an item are in store.", "item:item",
         "Check with the tool how many {item} are in store.|Use the tool: stock of {item}?", "{n} pieces"),
    tool("user_age", "Return the age of a user.", "user:person",
         "How old is the user {user}? Use the tool.|Get the age of {user}.", "{n}"),
    tool("book_table", "Book a table in a restaurant.", "restaurant:company guests:int",
         "Book a table for {guests} guests at {restaurant}.|Table at {restaurant} for {guests}, use the tool.",
         "table {n} booked"),
    tool("roll_dice", "Roll a die with the given number of sides.", "sides:int",
         "Roll a die with {sides} sides.|Use the tool to roll a {sides}-sided die.", "{n}"),
    tool("subtract", "Subtract b from a.", "a:int b:int",
         "What is {a} - {b}?|Subtract {b} from {a} with the tool.", "{n}"),
    tool("save_member", "Save a club member.", "member_name:unicode remark:note",
         "Use the tool to save the member {member_name} with the remark '{remark}'.|Save {member_name} ({remark}).",
         "member {n} saved"),
    tool("distance", "Distance between two cities in kilometres.", "start:city end:city",
         "How far is it from {start} to {end}? Use the tool.|Get the distance from {start} to {end}.",
         "{n} kilometres"),
    tool("greet", "Generate a greeting in the given style.", "user_name:unicode style:word",
         "Greet {user_name} in the style {style}.|Make a {style} greeting for {user_name}.", "greeting {n}"),
    tool("run_job", "Start a job on the server.", "job:word priority:int",
         "Start the job {job} with priority {priority}.|Run {job}, priority {priority}.", "job {n} started"),
    tool("power", "Raise base to exponent.", "base:int exponent:int",
         "What is {base} to the power of {exponent}? Use the tool.|Raise {base} to {exponent}.", "{n}"),
    tool("count_files", "Count the files in a folder.", "folder:word",
         "How many files are in the folder {folder}?|Count the files of {folder} with the tool.", "{n} files"),
    tool("square_root", "Compute the square root.", "number:int",
         "What is the square root of {number}? Use the tool.|Compute sqrt({number}) with the tool.", "{n}"),
    tool("get_profile", "Fetch the profile of a person.", "full_name:unicode",
         "Fetch the profile of {full_name}.|Use the tool to show the profile of {full_name}.", "profile {n}"),
    tool("factorial", "Compute n factorial.", "n:int",
         "What is {n}! (factorial)? Use the tool.|Compute the factorial of {n} with the tool.", "{n}"),
    tool("local_time", "Return the local time of a city.", "city:city",
         "What time is it in {city}? Use the tool.|Get the local time in {city}.", "{n} minutes past noon"),
    tool("read_sensor", "Read a sensor.", "sensor_id:int",
         "What does sensor {sensor_id} read? Use the tool.|Read sensor {sensor_id}.", "{n} volts"),
    tool("tag_document", "Tag a document.", "document:int tag:word",
         "Put the tag {tag} on document {document}.|Tag document {document} as {tag}.", "tag {n} added"),
    tool("lookup_code", "Look up a code word.", "code:word",
         "What does the code word {code} mean? Use the tool.|Look up the code {code}.", "meaning {n}"),
]  # fmt: skip

ADJECTIVES = words(
    "secret strange mystery hidden lucky golden odd special unknown wonder crystal silent double inner outer rapid "
    "shadow random solar triple"
)
NOUNS = words("function formula machine number operation transform score index value mapping")
PARAMETERS = words("input x n value number arg a key")

CHAT = (
    ("Hello, my name is {p}.", "Hello {p}! How can I help you?"),
    ("Hi, {p} here. Nice to meet you.", "Hello {p}! How can I help you?"),
    ("Thank you, that was all. {p}", "You are welcome, {p}!"),
    ("Goodbye and thanks, {p}", "You are welcome, {p}!"),
    ("Please say good morning to {p}.", "Good morning, {p}!"),
    ("No tool needed: just repeat the name {p}.", "{p}"),
)

FACTS = (
    ("France", "Paris"), ("Japan", "Tokyo"), ("Russia", "Moscow"), ("Italy", "Rome"), ("China", "Beijing"),
    ("Belgium", "Brussels"), ("Hungary", "Budapest"), ("England", "London"), ("Sweden", "Stockholm"),
    ("Turkey", "Ankara"), ("Cuba", "Havana"), ("Germany", "Berlin"),
)  # fmt: skip

SYSTEM_TEXTS = (
    "",
    "",
    "You are a helpful assistant.\n\n",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face\n\n",
    "Answer the user's questions and use tools where they help.\n\n",
)


def render_call(name: str, arguments: dict[str, str | int]) -> str:
    """Write one tool call as the model must write it."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def schema(rng: Random, spec: Tool) -> dict[str, Any]:
    """Describe a tool as a JSON schema, in one of the orders that libraries write it in."""
    properties: dict[str, Any] = {
        name: {"type": "integer" if kind == "int" else "string"} for name, kind in spec.params.items()
    }
    if rng.random() < 0.15:
        properties[rng.choice(("limit", "timeout", "verbose_level"))] = {"default": 5, "type": "integer"}
    parameters: dict[str, Any] = {"properties": properties}
    if spec.params:
        parameters["required"] = list(spec.params)
    parameters["type"] = "object"
    if rng.random() < 0.5:
        parameters = {"type": "object", **parameters}
    function = {"name": spec.name, "description": spec.description, "parameters": parameters}
    return {"type": "function", "function": function}


def function_tool(rng: Random, split: Split) -> Tool:
    """Invent a function whose name says nothing, with up to two parameters."""
    while True:
        name = f"{rng.choice(ADJECTIVES)}_{rng.choice(NOUNS)}"
        if is_test(name) == (split == "test"):
            break
    names = rng.sample(PARAMETERS, rng.choice((0, 1, 1, 1, 2)))
    kind = rng.choice(("int", "int", "int", "word"))
    listed = ", ".join("{" + p + "}" for p in names)
    pairs = " and ".join(f"{p} {{{p}}}" for p in names)
    requests = [f"What is the value of {name}({listed})? Use the tool.", f"What does {name}({listed}) return?"]
    requests += [f"Call {name} with {pairs}.", f"Use {name} with {pairs}."] if names else [f"Call {name}."]
    description = rng.choice(("Apply a {} to the input.", "Compute the {}.", "Returns the {}.")).format(
        name.replace("_", " ")
    )
    return Tool(name, description, dict.fromkeys(names, kind), tuple(requests), "{n}")


class Step(NamedTuple):
    """One request, the call that answers it and the result of that call."""

    tool: Tool
    request: str
    call: str
    result: str
    entities: tuple[str, ...]


def draw_step(rng: Random, split: Split, spec: Tool) -> Step:
    """Draw arguments for a tool."""
    arguments = {name: VALUES[kind](rng, split) for name, kind in spec.params.items()}
    result = spec.result.format(n=draw_int(rng, 1, 999, split, "result"))
    return Step(
        tool=spec,
        request=rng.choice(spec.requests).format(**arguments),
        call=render_call(spec.name, arguments),
        result=result,
        entities=(spec.name, *(str(v) for v in arguments.values())),
    )


def example(
    rng: Random, tools: Sequence[Tool], turns: Sequence[tuple[str, str]], output: str, entities: tuple[str, ...]
) -> Example:
    """Put the tools into the system message and the turns after it."""
    schemas = [schema(rng, spec) for spec in tools]
    rng.shuffle(schemas)
    lines = "\n".join(json.dumps(s, ensure_ascii=False) for s in schemas)
    system = rng.choice(SYSTEM_TEXTS) + TOOLS_PROMPT.format(tools=lines)
    return Example(
        input=turns[0][1],
        output=output,
        task=NAME,
        entities=entities,
        messages=tuple({"role": role, "content": text} for role, text in (("system", system), *turns)),
        tools=tuple(schemas),
    )


def draw_tool(rng: Random, split: Split) -> Tool:
    """Draw a tool of `split`: a third of them are invented functions."""
    return function_tool(rng, split) if rng.random() < 0.33 else rng.choice(part(TOOLS, split))


def generate(rng: Random, split: Split) -> Example:
    """Draw one conversation of `split` that ends where the model must speak."""
    spec = draw_tool(rng, split)
    step = draw_step(rng, split, spec)
    others = [draw_tool(rng, split) for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))]
    tools = list({t.name: t for t in (*others, spec)}.values())
    kind = rng.random()
    if kind < 0.07:
        text, answer, entity = chat(rng, split)
        return example(rng, tools, [("user", text)], answer, (spec.name, entity))
    if kind < 0.18:
        return two_calls(rng, split, tools, step, one_turn=rng.random() < 0.5)
    user = ("user", step.request)
    if kind < 0.35:
        turns = [user, ("assistant", step.call), ("tool", step.result)]
        return example(rng, tools, turns, f"Here is the answer: {step.result}", step.entities)
    return example(rng, tools, [user], step.call, step.entities)


def chat(rng: Random, split: Split) -> tuple[str, str, str]:
    """Draw a message that needs no tool, its answer and what it is about."""
    if rng.random() < 0.3:
        country, capital = rng.choice(part(FACTS, split))
        return f"What is the capital of {country}?", f"The capital is {capital}.", country
    name = pick(rng, FIRST_NAMES, split)
    text, answer = rng.choice(CHAT)
    return text.format(p=name), answer.format(p=name), name


def two_calls(rng: Random, split: Split, tools: list[Tool], first: Step, *, one_turn: bool) -> Example:
    """Draw a conversation with two calls: in one turn, or the second after the first one's result."""
    second = draw_step(rng, split, rng.choice(tools))
    entities = (*first.entities, *second.entities)
    if one_turn:
        user = ("user", f"{first.request} And also: {second.request}")
        return example(rng, tools, [user], f"{first.call}\n{second.call}", entities)
    turns = [("user", f"First: {first.request} Then: {second.request}")]
    answers = [first.call, second.call, f"Here is the answer: {first.result}, {second.result}"]
    done = rng.randint(0, 2)
    for step in (first, second)[:done]:
        turns += [("assistant", step.call), ("tool", step.result)]
    return example(rng, tools, turns, answers[done], entities)


TASKS = [
    Task(
        NAME,
        "tools",
        generate,
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    )
]
