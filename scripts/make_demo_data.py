"""Write what `recipes/demo.yaml` trains on: data, tokenizer, model config; a megabyte, and always the same bytes.

    python scripts/make_demo_data.py [OUT_DIR]        # default: recipes/demo_data

The five files have the formats of the five sources of the real run, quirks included: the demo takes the same path
through the code. The content is made up here, from small tables, so that a model of a million weights, trained from
nothing for a minute, can answer what it never saw: each fact is asked in several wordings and no prompt stands twice
in a file, so that every held-out prompt is a new combination of known parts.

    oasst_trees.jsonl         capitals, opposites, translations, in English and German; "And Spain?" needs turn one
    sharegpt.json             the user's name and taste, or a list of words, to be recalled in later turns
    dolly.jsonl               colour, kind and home of 20 things; some rows come with a passage
    grade_school_math.jsonl   word problems in one or two steps; the answer ends in "#### N"
    code_alpaca.json          Python one-liners, with and without an input
    model/                    config of a tiny GPT-NeoX, and a byte-level BPE tokenizer trained on the texts above
"""

import argparse
import itertools
import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out_dir", nargs="?", type=Path, default=Path("recipes/demo_data"))
out_dir = parser.parse_args().out_dir
(out_dir / "model").mkdir(parents=True, exist_ok=True)
rng = random.Random(20230412)
texts = []  # every text written, in order: what the tokenizer is trained on


def write(name, rows, *keys):
    """JSON lines, or a JSON list, with one row a line either way: easy to read, and to diff. `keys` hold the texts."""
    texts.extend(row[key] for row in rows for key in keys)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    whole = "\n".join(lines) if name.endswith(".jsonl") else "[\n" + ",\n".join(lines) + "\n]"
    (out_dir / name).write_text(whole + "\n", encoding="utf-8", newline="\n")
    print(f"{name:24} {len(rows):4} rows {(out_dir / name).stat().st_size / 1000:6.0f} KB")


def table(text):
    """The rows of a table written as "a b, c d": lists of words."""
    return [row.split() for row in text.split(",")]


# Open-Assistant message trees -------------------------------------------------------------------------------------
CITIES = table("""France Frankreich Paris Paris, Spain Spanien Madrid Madrid, Italy Italien Rome Rom, Poland Polen
    Warsaw Warschau, Austria Österreich Vienna Wien, Greece Griechenland Athens Athen, Portugal Portugal Lisbon
    Lissabon, Norway Norwegen Oslo Oslo, Denmark Dänemark Copenhagen Kopenhagen, Russia Russland Moscow Moskau, Egypt
    Ägypten Cairo Kairo, Belgium Belgien Brussels Brüssel, Sweden Schweden Stockholm Stockholm""")
OPPOSITES = table("""big groß small klein, hot heiß cold kalt, old alt young jung, fast schnell slow langsam, light hell
    dark dunkel, long lang short kurz, loud laut quiet leise, full voll empty leer, good gut bad schlecht, rich reich
    poor arm, wet nass dry trocken, happy froh sad traurig""")
PHRASES = {  # what is asked for; an answer is such a phrase, the word, "is" or "ist", and the other word
    "en": {"capital": "the capital of", "opposite": "the opposite of", "other": "the German word for"},
    "de": {"capital": "die Hauptstadt von", "opposite": "das Gegenteil von", "other": "das englische Wort für"},
}
QUESTIONS = {
    "en": ["What is {}?", "Tell me {}.", "Do you know {}?", "I would like to know {}."],
    "de": ["Was ist {}?", "Nenne mir {}.", "Weißt du {}?", "Ich wüsste gern {}."],
}
FOLLOW_UPS = {"en": ["And {}?", "What about {}?"], "de": ["Und {}?", "Was ist mit {}?"]}
THANKS = {"en": ("Thank you!", "You are welcome!"), "de": ("Danke!", "Gern geschehen!")}
SECOND_BEST = {"en": " I am glad to help.", "de": " Ich helfe gern."}  # what the reply of rank 1 adds to that of rank 0

facts = {(lang, topic): {} for lang in PHRASES for topic in PHRASES[lang]}  # -> {word asked for: answer}
facts["en", "capital"] = {country: city for country, _, city, _ in CITIES}
facts["de", "capital"] = {land: stadt for _, land, _, stadt in CITIES}
for word1, wort1, word2, wort2 in OPPOSITES:
    facts["en", "opposite"] |= {word1: word2, word2: word1}
    facts["de", "opposite"] |= {wort1: wort2, wort2: wort1}
    facts["en", "other"] |= {word1: wort1, word2: wort2}
    facts["de", "other"] |= {wort1: word1, wort2: word2}


def message(parent, role, lang, text, rank=None, **changes):
    """A message under `parent` (a message, or the name of a new tree); `changes` make it one that the rules drop."""
    root = isinstance(parent, str)
    node = {"message_id": parent if root else f"{parent['message_id']}.{len(parent['replies'])}"}
    node |= {"parent_id": None if root else parent["message_id"], "text": text, "role": role, "lang": lang}
    node |= {"review_result": True, "deleted": False, "rank": rank, "synthetic": False, "replies": [], **changes}
    if not root:
        parent["replies"].append(node)
    texts.append(text)
    return node


def answer(lang, topic, word):
    phrase, verb = PHRASES[lang][topic], {"en": "is", "de": "ist"}[lang]
    return f"{phrase[0].upper()}{phrase[1:]} {word} {verb} {facts[lang, topic][word]}."


def ask_on(reply, lang, topic, asked, depth):
    """Under `reply`: a follow-up question that only the first one explains, its answer, and perhaps another turn."""
    word = rng.choice([word for word in facts[lang, topic] if word not in asked])
    question = message(reply, "prompter", lang, rng.choice(FOLLOW_UPS[lang]).format(word))
    reply = message(question, "assistant", lang, answer(lang, topic, word), rank=0)
    if depth > 1 and rng.random() < 0.5:
        ask_on(reply, lang, topic, [*asked, word], depth - 1)
    elif rng.random() < 0.3:
        message(message(reply, "prompter", lang, THANKS[lang][0]), "assistant", lang, THANKS[lang][1], rank=0)


asked = [(lang, topic, word, text) for lang, topic in facts for word in facts[lang, topic] for text in QUESTIONS[lang]]
trees = []
for lang, topic, word, text in rng.sample(asked, 240):
    prompt = message(f"{lang}-{len(trees):03}", "prompter", lang, text.format(f"{PHRASES[lang][topic]} {word}"))
    best = message(prompt, "assistant", lang, answer(lang, topic, word), rank=0)
    for _ in range(rng.choice([1, 2, 2])):
        ask_on(best, lang, topic, [word], depth=2)
    if rng.random() < 0.2:
        message(prompt, "assistant", lang, answer(lang, topic, word) + SECOND_BEST[lang], rank=1)
    trees.append({"message_tree_id": prompt["message_id"], "tree_state": "ready_for_export", "prompt": prompt})

# What the rules for this source leave out: two replies, two prompts that nobody answered, four whole trees.
message(trees[3]["prompt"], "assistant", "en", "This reply was deleted.", rank=2, deleted=True)
message(trees[5]["prompt"], "assistant", "en", "This reply was written by a model.", rank=2, synthetic=True)
message(trees[7]["prompt"]["replies"][0], "prompter", "en", "A question without a reply.")
message(trees[7]["prompt"]["replies"][0], "prompter", "en", "Another question without a reply.")
dropped = {"growing": ("growing", "en", True), "aborted": ("aborted_low_grade", "en", True)}
dropped |= {"rejected": ("ready_for_export", "en", False), "unlisted-language": ("ready_for_export", "eo", True)}
for name, (state, lang, reviewed) in dropped.items():
    prompt = message(name, "prompter", lang, "Is this tree trained on?", review_result=reviewed)
    message(prompt, "assistant", lang, "No, it is not.", rank=0)
    trees.append({"message_tree_id": name, "tree_state": state, "prompt": prompt})
write("oasst_trees.jsonl", trees)

# ShareGPT conversations ------------------------------------------------------------------------------------------
[NAMES] = table("Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Lena Max Nora Oscar Paula Tom")
[TASTES] = table("tea coffee jazz chess football swimming painting cheese history rain music tennis")
[NOUNS] = table("cat dog sun moon tree house book river stone bread clock door")
GREETINGS = ["Hello, I am {} and I like {}.", "My name is {} and I enjoy {}.", "My name is {}. I love {}."]
LISTS = ["Remember these words: {}.", "Please keep in mind: {}.", "Here are three words: {}."]

conversations = []
for greeting, name, taste in rng.sample(list(itertools.product(GREETINGS, NAMES, TASTES)), 220):
    about_name = [rng.choice(["What is my name?", "Do you remember my name?"]), f"Your name is {name}."]
    about_taste = [rng.choice(["What do I like?", "Do you remember what I like?"]), f"You like {taste}."]
    turns = [greeting.format(name, taste), f"Hello {name}! It is nice that you like {taste}."]
    conversations.append(turns + rng.choice([about_name + about_taste, about_taste + about_name]))
for request, words in rng.sample(list(itertools.product(LISTS, itertools.permutations(NOUNS, 3))), 220):
    listed = f"{words[0]}, {words[1]} and {words[2]}"
    again = ["Please say the words again.", f"The words are {listed}."]
    first = ["Which word came first?", f"The first word was {words[0]}."]
    last = ["Which word came last?", f"The last word was {words[2]}."]
    turns = [request.format(", ".join(words)), f"I will remember {listed}."]
    conversations.append(sum(rng.sample([again, first, last], 2), turns))
rows = []
for number, turns in enumerate(rng.sample(conversations, len(conversations))):
    messages = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    messages[1]["value"] += "[1]" * (number % 20 == 1)  # a mark like that of a web search, which is removed
    extra = [{"from": "human", "value": "Good morning!"}] * (number % 20 == 2)  # joined with the message after it
    rows.append({"id": f"demo_{number:03}", "conversations": extra + messages})
empty_reply = [{"from": "human", "value": "This one is dropped."}, {"from": "gpt", "value": ""}]
rows.insert(9, {"id": "demo_empty_reply", "conversations": empty_reply})
rows.insert(19, {"id": "demo_starts_with_gpt", "conversations": [{"from": "gpt", "value": "So is this one."}]})
texts += [message["value"] for row in rows for message in row["conversations"]]
write("sharegpt.json", rows)

# Dolly -----------------------------------------------------------------------------------------------------------
THINGS = table("""banana fruit yellow tree, lemon fruit yellow tree, cherry fruit red tree, plum fruit purple tree,
    peach fruit orange tree, tomato vegetable red garden, carrot vegetable orange garden, pumpkin vegetable orange
    field, potato vegetable brown field, radish vegetable red garden, frog animal green pond, swan animal white pond,
    crow animal black forest, fox animal red forest, bear animal brown forest, cow animal brown field, sheep animal
    white field, goldfish animal orange pond, rose flower red garden, tulip flower yellow garden""")
WORDINGS = {  # the category in the file -> four ways to ask for the same
    "open_qa": ["What colour is a {}?", "Tell me the colour of a {}.", "Which colour has a {}?", "Colour of a {}?"],
    "classification": ["What kind of thing is a {}?", "Classify a {}.", "Tell me what a {} is.", "What is a {}?"],
    "general_qa": ["Where is a {} found?", "Where do I find a {}?", "Tell me the home of a {}.", "Home of a {}?"],
}
rows = []
for name, kind, colour, home in THINGS:
    kind = f"an {kind}" if kind == "animal" else f"a {kind}"
    home = f"on a {home}" if home == "tree" else f"in a {home}"
    context = f"The {name} is {kind}. [1] It is {colour} and it is found {home}.[citation needed]"
    answers = {"open_qa": f"is {colour}.", "classification": f"is {kind}.", "general_qa": f"is found {home}."}
    for category, predicate in answers.items():
        for wording in WORDINGS[category]:
            row = {"instruction": wording.format(name), "context": "", "response": f"A {name} {predicate}"}
            with_passage = {"context": context, "category": "closed_qa"} if rng.random() < 0.15 else {}
            rows.append({**row, "category": category, **with_passage})
rng.shuffle(rows)
rows.append({**rows[0], "instruction": "This row is dropped.", "response": "As an AI language model, I cannot say."})
write("dolly.jsonl", rows, "instruction", "context", "response")

# Grade school math -----------------------------------------------------------------------------------------------
[OBJECTS] = table("apples books coins pens cards shells stamps balls nuts eggs cakes marbles")

problems = {}  # question -> response; all numbers are small: there are 36 sums to learn, and as many differences
while len(problems) < 740:
    name, objects, kind = rng.choice(NAMES), rng.choice(OBJECTS), rng.choice(["plus", "minus", "both"] * 3 + ["times"])
    a, b, c = rng.randint(3, 8), rng.randint(2, 7), rng.randint(2, 3)
    if kind == "plus":
        story, steps = f"has {a} {objects} and gets {b} more.", [f"{a} + {b} = {a + b}"]
    elif kind == "minus":
        story, steps = f"has {a + b} {objects} and gives away {b}.", [f"{a + b} - {b} = {a}"]
    elif kind == "times":
        story, steps = f"has {a} boxes with {c} {objects} each.", [f"{a} * {c} = {a * c}"]
    else:
        story = f"has {a} {objects}, gets {b} more and gives away {c}."
        steps = [f"{a} + {b} = {a + b}", f"{a + b} - {c} = {a + b - c}"]
    result = steps[-1].split()[-1]
    response = "\n".join([*steps, f"{name} has {result} {objects}.", f"#### {result}"])
    problems[f"{name} {story} How many {objects} does {name} have now?"] = response
rows = [{"INSTRUCTION": text, "RESPONSE": response, "SOURCE": "demo"} for text, response in problems.items()]
rows.append({"INSTRUCTION": "This row is dropped: its answer is blank.", "RESPONSE": " ", "SOURCE": "demo"})
write("grade_school_math.jsonl", rows, "INSTRUCTION", "RESPONSE")

# Code Alpaca -----------------------------------------------------------------------------------------------------
[VARIABLES] = table("nums words items rows names prices scores points lines values")
TASKS = """sort {}: sorted({}), reverse {}: {}[::-1], count the elements of {}: len({}), find the largest of {}:
    max({}), find the smallest of {}: min({}), add up {}: sum({}), take the first of {}: {}[0], take the last of {}:
    {}[-1], remove duplicates from {}: set({}), print {}: print({}), number the elements of {}: enumerate({}), copy {}:
    {}[:], double every element of {}: [2 * x for x in {}], turn {} into a tuple: tuple({})"""
REQUESTS = ["Write Python code to {}.", "How do I {} in Python?", "In one line of Python, {}."]
rows = []
for task, code in (line.split(": ") for line in " ".join(TASKS.split()).split(", ")):
    asked = [(request, name, "") for request, name in itertools.product(REQUESTS, VARIABLES)]
    asked += [(rng.choice(REQUESTS), "this list", str(rng.sample(range(2, 10), 3))) for _ in range(12)]
    for request, name, numbers in asked:
        instruction = request.format(task.format(name))
        rows.append({"instruction": instruction, "input": numbers, "output": code.format(numbers or name)})
rows = rng.sample(list({(row["instruction"], row["input"]): row for row in rows}.values()), 500)
rows.append({"instruction": "Write a poem.", "input": "", "output": "I'm sorry, I cannot. (This row is dropped.)"})
write("code_alpaca.json", rows, "instruction", "input", "output")

# Tokenizer, and the config of a StableLM a million weights small -------------------------------------------------
# Ids 0 and 1 as in StableLM's own tokenizer, then the five that the chat format adds; the 256 bytes encode any text.
[SPECIAL] = table("<|endoftext|> <|padding|> <|prompter|> <|assistant|> <|system|> <|prefix_begin|> <|prefix_end|>")
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=SPECIAL, **options))
tokenizer.save(str(out_dir / "model" / "tokenizer.json"))
tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
tokenizer_config |= dict.fromkeys(["bos_token", "eos_token", "unk_token"], SPECIAL[0]) | {"pad_token": SPECIAL[1]}

config = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": tokenizer.get_vocab_size()}
config |= {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
config |= {"hidden_act": "gelu", "use_parallel_residual": True, "tie_word_embeddings": False}
config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
# With the usual 0.02 the run learns less: 14 of 30 held-out oasst_export replies right, with this 24.
config["initializer_range"] = 0.06
config |= {"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
for name, content in {"tokenizer_config.json": tokenizer_config, "config.json": config}.items():
    (out_dir / "model" / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")
