"""The page of sampling reports, also in a real browser: nothing a model wrote can run; search, filters, keys, votes."""

import html.parser
import json

import pytest
from conftest import ROOT, run_script
from hypothesis import given
from hypothesis import strategies as st

from evaluation.report_files import SamplingReport
from evaluation.report_page import make_page, page_data

GREEDY, NUCLEUS = {"max_new_tokens": 9, "do_sample": False}, {"max_new_tokens": 9, "do_sample": True, "top_p": 0.9}


def make_report(model: str, prompts: dict[str, dict[str, list[str]]], **more) -> SamplingReport:
    """From {prompt: {name of settings: outputs}}."""
    entries = []
    for prompt, outputs in prompts.items():
        results = [
            {"sampling_config": name, "sampling_params": GREEDY if name == "greedy" else NUCLEUS, "outputs": texts}
            for name, texts in outputs.items()
        ]
        entries.append({"prompt": prompt, "results": results})
    return SamplingReport(model_name=model, date="2024-05-06T07:08:09", args={"seed": 1}, prompts=entries, **more)


# ---- The data of the page ----


def test_prompts_of_several_reports_are_side_by_side():
    one = make_report("model", {"a": {"greedy": ["a1"]}, "b ": {"greedy": ["b1"], "nucleus": ["b2", "b3"]}})
    two = make_report("model", {" b": {"k50": ["b4"]}, "c": {"greedy": ["c1"]}})
    data = page_data([one, two])
    assert [model["name"] for model in data["models"]] == ["model", "model (2)"]
    assert data["configs"] == ["greedy", "nucleus", "k50"]
    assert data["prompts"] == [
        {"text": "a", "results": [[0, 0, ["a1"]]]},
        {"text": "b", "results": [[0, 0, ["b1"]], [0, 1, ["b2", "b3"]], [1, 2, ["b4"]]]},
        {"text": "c", "results": [[1, 0, ["c1"]]]},
    ]
    assert data["params"][0]["nucleus"] == "max_new_tokens 9, do_sample true, top_p 0.9"
    assert data["id"] != page_data([two, one])["id"]


def test_a_prompt_that_a_report_repeats():
    repeated = make_report("one", {"a": {"greedy": ["first"]}})
    repeated.prompts.extend(make_report("one", {"a": {"greedy": ["second"]}}).prompts)
    data = page_data([repeated, make_report("two", {"a": {"greedy": ["other"]}})])
    assert [prompt["results"] for prompt in data["prompts"]] == [
        [[0, 0, ["first"]], [1, 0, ["other"]]],
        [[0, 0, ["second"]]],
    ]


class Scripts(html.parser.HTMLParser):
    """The script elements of a page, as a browser splits it: (attributes, content)."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[dict, str]] = []
        self.tags: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "script":
            self.found.append((dict(attributes), ""))

    def handle_data(self, text):
        if self.tags and self.tags[-1] == "script":
            self.found[-1] = (self.found[-1][0], self.found[-1][1] + text)

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")


TAGS = Scripts(make_page([make_report("m", {"p": {"greedy": ["o"]}})])).tags
HOSTILE = st.text() | st.sampled_from(
    ["</script>", "<!--<script>", "\u2028", "@data@", "@script@", "&lt;", "]]>", "\\"]
)


@given(st.lists(HOSTILE, min_size=4, max_size=4))
def test_any_text_leaves_the_page_as_it_is(texts):
    model, prompt, name, output = texts
    report = make_report(model, {prompt: {name: [output, output * 2]}})
    scripts = Scripts(make_page([report]))
    assert scripts.tags == TAGS
    (attributes, data), (_, script) = scripts.found
    assert attributes == {"type": "application/json", "id": "data"}
    assert json.loads(data) == page_data([report])
    assert script == (ROOT / "scripts" / "evaluation" / "report_page.js").read_text(encoding="utf-8")
    assert not set("<>&\u2028\u2029") & set(data)


def test_the_page_alone(tmp_path):
    files = []
    for model in ("one", "two"):
        files.append(tmp_path / f"{model}.json")
        # Half of a surrogate pair is not UTF-8, but JSON may write it.
        report = make_report(model, {"p": {"greedy": [f"half a pair: \ud83d of {model}"]}})
        files[-1].write_text(json.dumps(report.model_dump()))
    page = tmp_path / "page.html"
    run_script("--html", page, *files, script="scripts/sampling_report.py", output_dir=None)
    data = json.loads(Scripts(page.read_text(encoding="utf-8")).found[0][1])
    assert data == page_data([SamplingReport(**json.loads(file.read_text())) for file in files])
    assert sorted(tmp_path.iterdir()) == sorted([*files, page])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["page.html"], "give reports after it, or a CHECKPOINT before it"),
        (["page.html", "none.json"], "none.json: cannot read this file: No such file"),
        (["page.html", "."], ".: cannot read this file: Is a directory"),
        (["page.html", "recipes/demo_data/code_alpaca.json"], "not a sampling report: should be a valid dictionary"),
        (["page.html", "recipes/demo_data/model/config.json"], "not a sampling report: model_name is missing"),
        (["page.html", "recipes/demo.yaml"], "recipes/demo.yaml line 1, column 1: JSON does not parse"),
        (["no/such/page.html", "GOOD"], "there is no folder no/such"),
        (["GOOD", "GOOD"], "the page's file comes first"),
    ],
)
def test_what_is_no_report(tmp_path, arguments, message):
    good = tmp_path / "good.json"
    good.write_text(json.dumps(make_report("m", {"p": {"greedy": ["o"]}}).model_dump()))
    arguments = [str(good) if argument == "GOOD" else argument for argument in arguments]
    run = run_script("--html", *arguments, script="scripts/sampling_report.py", output_dir=None, check=False)
    assert run.returncode == 2
    (error,) = run.errors
    assert message in error
    assert "Traceback" not in run.stderr
    assert not (ROOT / "page.html").exists()


# ---- In a browser ----

ATTACK = "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'></script><svg onload='window.ran = 3'>"
MODELS = ["org/alpha", "org/beta"]
LONG = "w" * 300  # a word without a place to break
PROMPTS = [f"Prompt {ATTACK}", *(f"Question {number}: {word}?" for number, word in enumerate("aäbcdefgh", 2)), LONG]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    reports = []
    for model in MODELS:
        letter = model[4]
        prompts = {
            prompt: {
                "greedy": [f"  {letter}{number} greedy STRASSE{'</s>' if letter == 'a' else '<|endoftext|>'}"],
                "nucleus": [f"{letter}{number} one {ATTACK}", f"{letter}{number} two"],
            }
            for number, prompt in enumerate(PROMPTS, 1)
        }
        reports.append(make_report(model, prompts))
    # Of a model whose name and settings are an attack, to one prompt only, with a word as wide as three phones.
    reports.append(make_report(ATTACK, {PROMPTS[0]: {ATTACK: [LONG, ""]}}))
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(make_page(reports), encoding="utf-8")
    return path


@pytest.fixture
def page(browser, page_file):
    """A fresh one, which has to load nothing, report nothing and run nothing foreign."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    said, requests = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    load(page, page_file.as_uri())
    yield page
    assert page.evaluate("window.ran") is None
    assert said == []
    assert set(requests) <= {page_file.as_uri()} | {url for url in requests if url.startswith("blob:")}
    context.close()


def load(page, address=None):
    """Open an address, or the page once more, until it is drawn: before that the browser drops keys."""
    page.goto(address) if address else page.reload()
    page.evaluate("() => new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))")


def cards(page):
    """(heading, replies) of each card."""
    return [
        (card.locator("h3").inner_text(), card.locator(".text").all_inner_texts())
        for card in page.locator(".card").all()
    ]


def place(page):
    return page.locator("#place").inner_text()


def search(page, text):
    page.fill("#search", text)
    page.press("#search", "Enter")  # else it waits for a pause in the typing


def test_every_text_stays_text(page):
    assert page.locator("article .asked").inner_text() == PROMPTS[0]
    shown = page.locator("article").inner_text()
    assert f"a1 one {ATTACK}" in shown
    assert ATTACK in page.locator("#models").inner_text()
    assert ATTACK in page.locator("#configs").inner_text()
    assert LONG in shown
    assert page.locator("img, svg, iframe, object").count() == 0
    assert page.locator("script").count() == 2


def test_the_policy_of_the_page(browser, page_file):
    """Even if a text became HTML, it could not run, load or send anything."""
    page = browser.new_page()
    load(page, page_file.as_uri())
    refused = []
    page.on("console", lambda message: refused.append(message.text))
    page.evaluate("document.body.insertAdjacentHTML('beforeend', `<i id=x onclick='window.ran = 4'>x</i>`)")
    page.evaluate("document.getElementById('x').click()")
    page.evaluate("document.head.append(Object.assign(document.createElement('script'), {text: 'window.ran = 5'}))")
    page.evaluate("document.body.append(Object.assign(document.createElement('img'), {src: 'x.png'}))")
    page.evaluate("fetch('https://example.com').catch(() => 0)")
    page.wait_for_timeout(100)
    assert page.evaluate("window.ran") is None
    assert sum("Content Security Policy" in line for line in refused) >= 4
    page.close()


def test_side_by_side(page):
    page.keyboard.press("j")
    assert page.locator("article h2").all_inner_texts() == [
        "greedy max_new_tokens 9, do_sample false",
        "nucleus max_new_tokens 9, do_sample true, top_p 0.9",
    ]
    (one, *_), (two, *_) = cards(page)[:2]
    assert [one, two] == MODELS
    assert cards(page)[2] == (MODELS[0], [f"a2 one {ATTACK}", "a2 two"])
    assert cards(page)[1][1] == ["b2 greedy STRASSE <|endoftext|>"]
    left, right = (page.locator(".card").nth(n).bounding_box() for n in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] < right["x"]


def test_keyboard(page):
    total = len(PROMPTS)
    assert place(page) == f"1 / {total}"
    page.keyboard.press("k")  # there is none before the first
    for key in ("j", "ArrowDown", "j"):
        page.keyboard.press(key)
    assert place(page) == f"4 / {total}"
    assert page.locator("#list [aria-current]").inner_text() == PROMPTS[3]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("k")
    assert page.locator("article .asked").inner_text() == PROMPTS[1]
    page.keyboard.press("/")
    page.keyboard.type("jk/b1")  # goes into the search
    assert page.input_value("#search") == "jk/b1"
    page.get_by_text("Nothing is left to show").wait_for()  # after a pause in the typing
    assert place(page) == "0 / 0"
    page.keyboard.press("Escape")  # empties it and leaves it
    page.keyboard.press("j")
    assert place(page).endswith(f"/ {total}")
    assert page.locator("#list button").count() == total


def test_search_marks_what_it_finds(page):
    search(page, "Ä?")
    assert page.locator("#count").inner_text() == f"1 of {len(PROMPTS)} prompts"
    assert page.locator("article mark").all_inner_texts() == ["ä?"]
    search(page, "b5 TWO")
    assert page.locator("article .asked").inner_text() == PROMPTS[4]
    assert page.locator("article mark").all_inner_texts() == ["b5 two"]
    search(page, "<script>window.ran = 1</script>")
    assert set(page.locator("article mark").all_inner_texts()) == {"<script>window.ran = 1</script>"}
    for special in ("(", "[a-z]", "\\", "^.*$", "{2}"):
        search(page, special)
        assert page.locator("#count").inner_text().startswith("0 of")
    search(page, " ")
    assert page.locator("#list button").count() == len(PROMPTS)


def test_filters(page):
    models, configs = page.locator("#models button"), page.locator("#configs button")
    page.keyboard.press("j")
    configs.nth(0).click()
    assert [replies[0][:6] for _, replies in cards(page)] == ["a2 one", "b2 one"]
    models.nth(0).click()
    assert [heading for heading, _ in cards(page)] == [MODELS[1]]
    search(page, "greedy")  # hidden replies are not searched
    assert page.locator("#count").inner_text().startswith("0 of")
    search(page, "")
    models.nth(1).click()  # only the third is left, which answered the first prompt
    assert page.locator("#count").inner_text() == f"1 of {len(PROMPTS)} prompts"
    assert place(page) == "1 / 1"
    for chip in (configs.nth(0), models.nth(0), models.nth(1)):
        chip.click()
    assert page.locator("#list button").count() == len(PROMPTS)


def blind_order(page):
    """Letters of the models, by prompt: which model each card of greedy replies is of."""
    orders = []
    for _ in PROMPTS:
        orders.append([replies[0][0] for heading, replies in cards(page) if replies and "greedy" in replies[0]])
        page.keyboard.press("j")
    for _ in PROMPTS:
        page.keyboard.press("k")
    return orders


def test_blind_mode_hides_and_shuffles(page):
    page.keyboard.press("b")
    seen = page.locator("body").inner_text() + page.title()
    for telling in (*MODELS, "</s>", "<|endoftext|>", "max_new_tokens", "2024"):
        assert telling not in seen
    page.keyboard.press("j")
    assert [heading for heading, _ in cards(page)] == ["A", "B", "A", "B"]
    # The samples of both settings stand in one order.
    assert [replies[0][0] for _, replies in cards(page)][:2] == [replies[0][0] for _, replies in cards(page)][2:]
    page.keyboard.press("k")
    orders = blind_order(page)
    assert {tuple(order) for order in orders} == {("a", "b"), ("b", "a")}
    load(page)
    assert blind_order(page) == orders
    page.fill("#seed", "7")
    page.locator("#seed").blur()
    assert blind_order(page) != orders
    page.fill("#seed", "1")
    page.locator("#seed").blur()
    assert blind_order(page) == orders
    page.keyboard.press("b")
    assert {heading for heading, _ in cards(page)} >= set(MODELS)


def test_votes_are_tallied_and_saved(page):
    expected = []
    page.keyboard.press("1")  # no vote while the names are shown
    page.keyboard.press("b")
    page.keyboard.press("j")
    for number in range(2, 7):
        headings = [replies[0][0] for _, replies in cards(page)]
        if number == 6:
            page.keyboard.press("0")
            expected.append(None)
        elif number % 2:
            page.locator("#votes button", has_text="B").click()
            expected.append(MODELS["ab".index(headings[1])])
        else:
            page.keyboard.press("1")
            expected.append(MODELS["ab".index(headings[0])])
        assert page.locator("#votes [aria-pressed=true]").count() == 1
        assert page.locator(".card.better").count() == (0 if number == 6 else 2)
        page.keyboard.press("9")  # there is no ninth
        page.keyboard.press("j")
    page.keyboard.press("2")
    page.keyboard.press("u")  # taken back
    assert page.locator("#votes [aria-pressed=true]").count() == 0
    assert page.locator("#tally").is_hidden()  # it would tell which letter is which
    load(page)
    assert page.locator("#list [data-voted]").count() == 5
    page.keyboard.press("b")
    better = [expected.count(model) for model in MODELS]
    rows = [row.split("\t") for row in page.locator("#tally-rows tr").all_inner_texts()]
    for row, model, count in zip(rows, MODELS, better, strict=False):
        assert row == [model, str(count), "1", "5", f"{100 * count / 5:.0f} %"]
    assert rows[2] == [ATTACK, "0", "0", "0", ""]
    with page.expect_download() as download:
        page.click("#export")
    saved = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert [vote["better"] for vote in saved["votes"]] == expected
    assert [vote["prompt"] for vote in saved["votes"]] == PROMPTS[1:6]
    assert saved["votes"][0]["model_names"] == MODELS
    assert saved["votes"][0]["sampling_configs"] == ["greedy", "nucleus"]
    assert saved["tally"][0] == {"model_name": MODELS[0], "better": better[0], "ties": 1, "votes": 5}
    assert saved["seed"] == 1
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#forget")
    assert page.locator("#tally").is_hidden()


@pytest.mark.parametrize("width", [320, 375])
def test_a_phone(page, width):
    page.set_viewport_size({"width": width, "height": 700})
    for keys in ([], ["b", "1"], ["b"]):  # the first prompt has a name, an output and a prompt that are hard to break
        for key in keys:
            page.keyboard.press(key)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [card.bounding_box() for card in page.locator(".card").all()]
        assert len({box["x"] for box in boxes}) == 1  # one below the other
        assert all(box["width"] <= width for box in boxes)
    page.click("#next")
    assert place(page) == f"2 / {len(PROMPTS)}"
    assert page.locator("#next").bounding_box()["y"] < 700  # on the screen, whatever is above


def test_light_and_dark(page):
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(
            page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
        )
    assert colours[0] != colours[1]
    assert [sum(map(int, colour[4:-1].split(","))) > 384 for pair in colours for colour in pair] == [
        False,
        True,
        True,
        False,
    ]


def test_a_large_page_stays_quick(browser, tmp_path):
    prompts = {f"question {n}": {f"c{c}": [f"{n} {c} " + "some words " * 100] for c in range(5)} for n in range(1000)}
    path = tmp_path / "large.html"
    path.write_text(make_page([make_report(f"m{n}", prompts) for n in range(3)]), encoding="utf-8")
    page = browser.new_page()
    load(page, path.as_uri())
    timed = (
        "() => { const start = performance.now(); NAME; document.body.offsetHeight; return performance.now() - start }"
    )
    assert page.evaluate(timed.replace("NAME", "go(1)")) < 1000  # 15 ms on a busy machine
    assert page.evaluate(timed.replace("NAME", "at('search').value = '777 4 some'; draw()")) < 3000  # 130 ms
    assert page.locator("#list button").count() == 1
    assert page.locator("*").count() < 300
    page.close()
