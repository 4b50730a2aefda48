"""sampling_report.py: Open-Assistant's format, samples that depend on their seeds alone, interruptions, bad files."""

import importlib.metadata
import json
import runpy
import sys

import pytest
import torch
from checkpoints import save_chat_model
from conftest import ROOT, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.prompts import read_prompts
from evaluation import generation
from evaluation.chat_model import load_chat_model
from evaluation.model import find_model
from evaluation.report_files import SamplingReport, read_configs, read_report
from utils.errors import UserError

SCRIPT = "scripts/sampling_report.py"
EXAMPLE = ROOT.parent / "shared" / "reference" / "sampling_report_example.json"
PROMPTS = [
    "Who goes there?",
    "One line\nand another",
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
    },
    "Grüße, 雨天 <|endoftext|>",
]
CONFIG = {
    "default": {"generate_args": {"max_new_tokens": 8, "do_sample": True, "temperature": 1.0}, "bot_name": "Joi"},
    "configurations": [
        {"name": "greedy", "generate_args": {"do_sample": False, "num_beams": 1}},
        {"name": "nucleus9", "generate_args": {"temperature": 1.5, "top_p": 0.9}},
    ],
}


@pytest.fixture(scope="module")
def chat_model(tiny_model, tmp_path_factory):
    return save_chat_model(tiny_model, tmp_path_factory.mktemp("chat_model"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The options of a small report."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return ["--prompts", str(folder / "prompts.jsonl"), "--config", str(folder / "config.json"), "--num_samples", "3"]


@pytest.fixture
def sample_here(monkeypatch, tmp_path):
    """Call it with the arguments of the script, which then runs within this process; returns its report."""

    def sample(*arguments, output=tmp_path / "here.json") -> dict:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments), "--output", str(output)])
        runpy.run_path(SCRIPT, run_name="__main__")
        return json.loads(output.read_text(encoding="utf-8"))

    return sample


@pytest.fixture(scope="module")
def report(chat_model, files):
    run_script(chat_model, *files, script=SCRIPT, output_dir=None)
    return json.loads((chat_model / "eval" / "sampling_report.json").read_text(encoding="utf-8"))


# ---- The report ----


def test_the_format_is_open_assistants(report, chat_model):
    assert list(report) == ["model_name", "date", "args", "prompts"]
    assert report["model_name"] == str(chat_model)
    for prompt in report["prompts"]:
        assert list(prompt) == ["prompt", "results"]
        for result in prompt["results"]:
            assert list(result) == ["sampling_config", "sampling_params", "outputs"]
    assert [prompt["prompt"] for prompt in report["prompts"]] == [
        *PROMPTS[:2],
        "user: a\n\nassistant: b\n\nuser: c",
        PROMPTS[3],
    ]
    greedy, nucleus = report["prompts"][0]["results"]
    assert (greedy["sampling_config"], nucleus["sampling_config"]) == ("greedy", "nucleus9")
    assert greedy["sampling_params"] == {"max_new_tokens": 8, "do_sample": False, "temperature": 1.0, "num_beams": 1}
    assert nucleus["sampling_params"] == {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    assert (len(greedy["outputs"]), len(nucleus["outputs"])) == (1, 3)
    assert report["args"]["mode"] == "v2_5"
    assert report["args"]["num_samples"] == 3
    assert report["args"]["versions"]["torch"] == importlib.metadata.version("torch")


@pytest.mark.skipif(not EXAMPLE.exists(), reason="no shared folder beside the checkout")
def test_the_format_equals_a_published_report(report):
    published = json.loads(EXAMPLE.read_text(encoding="utf-8"))

    def keys_and_types(value):
        if isinstance(value, dict):
            return {key: keys_and_types(inner) for key, inner in value.items()}
        return [keys_and_types(value[0])] if isinstance(value, list) else type(value)

    ours, theirs = keys_and_types(report), keys_and_types(published)
    assert list(report["args"])[: len(published["args"])] == list(published["args"])
    for kinds in (ours, theirs):
        args = kinds.pop("args")
        kinds["args"] = {key: args[key] for key, value in published["args"].items() if value is not None}
        kinds["prompts"][0]["results"][0]["sampling_params"] = None  # greedy there, nucleus here
    assert ours == theirs


@torch.no_grad()
def test_greedy_outputs_equal_decoding_by_hand(report, chat_model):
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    ended = 0
    for prompt, entry in zip(PROMPTS[:3], report["prompts"], strict=False):
        messages = prompt["messages"] if isinstance(prompt, dict) else [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        start = len(ids)
        while len(ids) < start + 8 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert entry["results"][0]["outputs"] == [tokenizer.decode(ids[start:])]  # with the end token, if it came
        ended += ids[-1] == tokenizer.eos_token_id
    samples = [tuple(entry["results"][1]["outputs"]) for entry in report["prompts"]]
    assert len(set(samples)) == len(PROMPTS)
    assert all(len(set(outputs)) == 3 for outputs in samples)


def test_samples_depend_on_their_seeds_alone(report, chat_model, files, sample_here):
    assert sample_here(chat_model, *files, "--batch_size", 1, "--limit", 2)["prompts"] == report["prompts"][:2]
    other = sample_here(chat_model, *files, "--limit", 2, "--seed", 1)
    for before, after in zip(report["prompts"], other["prompts"], strict=False):
        assert before["results"][0] == after["results"][0]
        assert not set(before["results"][1]["outputs"]) & set(after["results"][1]["outputs"])


def test_two_processes_with_a_page(report, chat_model, files, tmp_path):
    page, earlier = tmp_path / "page.html", tmp_path / "earlier.json"
    earlier.write_text(json.dumps(report))
    run = run_script(
        *(chat_model, *files, "--output", tmp_path / "two", "--html", page, earlier),
        script=SCRIPT,
        output_dir=None,
        launch="ddp2",
    )
    two = json.loads((tmp_path / "two" / "sampling_report.json").read_text(encoding="utf-8"))
    assert two["prompts"] == report["prompts"]
    assert two["args"]["processes"] == 2
    assert run.stdout.count("page: ") == 1
    assert page.read_text(encoding="utf-8").count(f"{chat_model} (2)") == 1
    assert sorted(path.name for path in tmp_path.rglob("*.json*")) == ["earlier.json", "sampling_report.json"]


def test_an_interrupted_report_goes_on(report, chat_model, files, sample_here, monkeypatch, tmp_path):
    real, asked = generation.generate, []

    def interrupted(model, tokenizer, prompts, settings, *more):
        for number, item in enumerate(real(model, tokenizer, prompts, settings, *more)):
            if settings.get("do_sample") and number == 5:
                raise KeyboardInterrupt
            yield item

    def counted(model, tokenizer, prompts, settings, *more):
        asked.append(len(prompts))
        return real(model, tokenizer, prompts, settings, *more)

    monkeypatch.setattr(generation, "generate", interrupted)
    with pytest.raises(SystemExit) as end:
        sample_here(chat_model, *files)
    assert end.value.code == 130
    assert not (tmp_path / "here.json").exists()
    (part,) = tmp_path.glob("*.partial-*")
    assert len(part.read_text().splitlines()) == 4 + 5
    monkeypatch.setattr(generation, "generate", counted)
    assert sample_here(chat_model, *files)["prompts"] == report["prompts"]
    assert asked == [0, 0, 0, 12 - 5]  # twice the settings are checked; all greedy replies were there
    assert not list(tmp_path.glob("*.partial-*"))


# ---- What ships ----


def test_the_shipped_files_are_whole(chat_model, monkeypatch):
    prompts = read_prompts(ROOT / "scripts" / "sampling" / "prompts.jsonl")
    assert 30 <= len(prompts) <= 50
    assert len({json.dumps(prompt) for prompt in prompts}) == len(prompts)
    assert max(map(len, prompts)) == 3
    configs = sorted((ROOT / "scripts" / "sampling").glob("*.json"))
    assert [path.name for path in configs] == ["default.json", "greedy.json", "open_assistant.json"]
    monkeypatch.chdir(ROOT)
    as_settings = runpy.run_path(SCRIPT, run_name="sampling_report")["as_settings"]
    model, tokenizer = load_chat_model(find_model(str(chat_model)), torch.device("cpu"))
    for path in configs:
        for params in read_configs(path).values():
            assert list(generation.generate(model, tokenizer, [], as_settings(params), 1)) == []  # settings are checked


@pytest.mark.skipif(not EXAMPLE.exists(), reason="no shared folder beside the checkout")
def test_the_settings_of_published_reports():
    """But for the top_k of 50 that transformers added where none was named."""
    for result in read_report(EXAMPLE).prompts[0].results:
        ours = read_configs(ROOT / "scripts" / "sampling" / "open_assistant.json")[result.sampling_config]
        assert ours == {"top_k": 50, **result.sampling_params}


# ---- Bad input ----


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "it holds no prompts"),
        ("a.json", "[]", "it holds no prompts"),
        ("a.jsonl", "", "it holds no prompts"),
        ("a.json", '["a",\n "b"', "a.json line 2, column 5: JSON does not parse"),
        ("a.json", '["a", 3]', "record 2: neither a text, "),
        ("a.json", '["a", ""]', "record 2: neither a text, "),
        ("a.jsonl", '"a"\n\n{"messages": []}\n', "line 3: neither a text, "),
        ("a.jsonl", '"a"\nplain text\n', "a.jsonl line 2, column 1: JSON does not parse: Expecting value"),
        ("a.jsonl", '{"text": "a"}\n', "record 1: neither a text, "),
        ("a.jsonl", '{"prompt": 5}\n', "field 'prompt' is a number"),
        ("a.csv", "prompt\na\n", "neither JSON nor by its name text"),
        (
            "a.jsonl",
            '{"messages": [{"role": "parrot", "content": "a"}]}',
            "record 1: conversation with a speaker other than system, user and assistant",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
            "a system message that is not the first",
        ),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "does not start with a user's message"),
        ("a.jsonl", '["a", "b"]\n["c"]\n', "line 1: its last message is not the user's"),
        ("a.jsonl", '[{"user": "a"}, {"user": "b"}]\n"c"\n', "line 1: conversation whose speakers do not take turns"),
        ("a.json", '{"prompt": "a", "image": "b.png"}', "what is not text (image), which no prompt is"),
        ("a.json", '{"Prompt": "a", "prompt": "b"}', "fields 'Prompt' and 'prompt' have one name: rename one"),
        ("a.json", '{"prompt": ["a", "b"]}', "a list of texts, of which one would have to be chosen"),
        ("a.json", '{"turns": ["a", "b"]}', "record 1: neither a text, "),
        ("a.json", '{"metadata": ["a", "b"]}', "record 1: neither a text, "),
        ("a.json", '{"my_prompts": []}', "it holds no prompts"),
        ("a.json", '{"de": [{"prompt": "a"}], "en": [{"prompt": "b"}]}', "prompts under 'de' and under 'en': make"),
        (
            "a.json",
            '{"system": "s", "prompts": ["a"]}',
            "'system', as a prompt has, beside the prompts under 'pr",
        ),
        ("a.json", '{"6b1f": [{"user": "a", "assistant": "b"}, {"user": "c"}]}', "record 1: neither a text, "),
        ("a.jsonl", '{"turns": ["a", "b"]}\n"c"\n', "line 1: neither a text, "),
        ("a.jsonl", '"half a pair \\ud83d"', "half of a surrogate pair"),
        ("a.jsonl", b'"a"\n"\xff"\n', "line 2: not UTF-8"),
        ("a.jsonl", "[" * 100_000, "a.jsonl: JSON does not parse"),
        ("a.jsonl", None, "cannot read this file: No such file"),
    ],
)
def test_bad_prompts(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_good_prompts(tmp_path):
    def read(name, content):
        (tmp_path / name).write_text(content, encoding="utf-8")
        return [messages[0]["content"] for messages in read_prompts(tmp_path / name)]

    assert read("a.txt", "\ufeffone\r\n\n  two \u2028 still\n[three]") == ["one", "two \u2028 still", "[three]"]
    assert read("a.json", ' ["one",\n{"messages": [{"role": "user", "content": "two", "id": 1}]}]') == ["one", "two"]
    assert read("a.jsonl", '"one\\ntwo"\r\n"three"') == ["one\ntwo", "three"]
    assert read("a.TXT", "one\ntwo") == read("none", "one\ntwo") == ["one", "two"]


HI, YO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}


@pytest.mark.parametrize(
    ("value", "roles"),
    [
        ({"prompt": "Hi"}, "u"),
        ({"instruction": "Hi", "output": "Yo"}, "u"),
        ({"Question": "Hi", "system_prompt": "Be brief."}, "su"),
        ({"prompt": [HI, YO, HI]}, "uau"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "u"),
        ({"messages": [HI], "system": "Be brief.", "id": 3}, "su"),
        ({"messages": [{"role": "prompter", "content": [{"type": "text", "text": "Hi"}]}]}, "u"),
        ([HI, YO, HI], "uau"),
        ({"prompt": "Hi", "author": "me"}, "u"),
        ({"query": "Hi", "history": [["Hi", "Yo"]]}, "uau"),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Hi\n\nAssistant:"}, "uau"),
        ({"prompt": json.dumps([HI, YO, HI])}, "uau"),
        ({"prompt": "Hi", "system": [{"type": "text", "text": "Be brief."}], "images": [None]}, "su"),
        ("Hi", "u"),
    ],
    ids=str,
)
def test_forms_of_a_prompt(tmp_path, value, roles):
    """As JSON Lines, as a list, over several lines, and beside others under a key."""
    for name, text, count in [
        ("a.jsonl", f"\ufeff{json.dumps(value)}\r\n{json.dumps(value)}\n", 2),
        ("a.json", json.dumps([value, value]), 2),
        ("a.json", json.dumps(value, indent=1), 1),
        *[("a.json", json.dumps({key: [value, value]}), 2) for key in ("prompts", "my_prompts", "evalQuestions")],
        ("a.json", json.dumps({"version": 1, "Test data": [value, value], "note": "x"}, indent=1), 2),
    ]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        prompts = read_prompts(tmp_path / name)
        assert ["".join(message["role"][0] for message in prompt) for prompt in prompts] == [roles] * count
        assert prompts[0][-1]["content"] == "Hi"


@pytest.mark.parametrize("value", [{"prompt": "Hi"}, {"messages": [HI]}, {"instruction": "Hi", "output": "Yo"}])
def test_prompts_under_any_key(tmp_path, value):
    (tmp_path / "a.json").write_text(json.dumps({"name": "mine", "6b1f": [value, value]}))
    assert read_prompts(tmp_path / "a.json") == [[HI], [HI]]


def test_a_passage_is_part_of_the_question(tmp_path):
    (tmp_path / "a.json").write_text('{"question": "Who?", "context": "It was Ann."}')
    assert read_prompts(tmp_path / "a.json") == [[{"role": "user", "content": "Who?\n\nIt was Ann."}]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"configurations": []}, "configurations List should have at least 1 item"),
        ({"greedy": {}}, "configurations is missing"),
        ({"configurations": [{"generate_args": {}}]}, "configuration 1: no name"),
        ({"configurations": [{"name": "a"}, {"name": "a"}]}, "configuration 2: the name a is given twice"),
        ({"configurations": [{"name": "a", "pre_text": "You are"}]}, "configurations.0.pre_text should be None"),
        ({"configurations": [{"name": "a", "top_p": 0.9}]}, "configurations.0.top_p is not known here"),
        ([1], "should be a valid dictionary"),
        *(
            (
                {"configurations": [{"name": "a", "generate_args": {"max_new_tokens": 4, **args}}]},
                message,
            )
            for args, message in (
                ({"do_sample": "no"}, "configurations.0.generate_args.do_sample should be a valid boolean"),
                ({"max_new_tokens": True}, "max_new_tokens should be a valid integer"),
                ({"temperature": float("nan")}, "temperature should be a finite number"),
                ({"repetition_penalty": 0}, "repetition_penalty should be greater than 0"),
                ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size should be greater than or equal to 0"),
                ({"min_new_tokens": 5}, "configuration 1: its min_new_tokens are over its max_new_tokens"),
            )
        ),
    ],
)
def test_bad_settings_files(tmp_path, content, message):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"config\.json: ") as caught:
        read_configs(tmp_path / "config.json")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["prompts"], [], "prompts List should have at least 1 item"),
        (["prompts", 0, "results", 0, "outputs"], "text", "prompts.0.results.0.outputs should be a valid list"),
        (["prompts", 0, "results", 0, "outputs", 0], 3, "prompts.0.results.0.outputs.0 should be a valid string"),
        (["prompts", 0, "prompt"], None, "prompts.0.prompt should be a valid string"),
        (["model_name"], 1, "model_name should be a valid string"),
    ],
)
def test_a_report_in_another_format(report, tmp_path, place, value, message):
    changed = json.loads(json.dumps(report))
    inside = changed
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"report\.json: not a sampling report: ") as caught:
        read_report(tmp_path / "report.json")
    assert message in str(caught.value)


def test_a_report_is_read_as_it_is(report, chat_model):
    assert read_report(chat_model / "eval" / "sampling_report.json") == SamplingReport(**report)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_new_tokens": 4, "num_beams": 5}, "second: unknown sampling setting num_beams"),
        ({"max_new_tokens": 4, "do_sample": True, "top_p": 7}, "second: sampling settings: "),
        ({}, "second: max_new_tokens = None"),
    ],
)
def test_settings_that_the_model_cannot_have(chat_model, files, sample_here, tmp_path, capsys, args, message):
    """Said before anything is sampled."""
    first = {"name": "first", "generate_args": {"max_new_tokens": 1}}
    config = {"configurations": [first, {"name": "second", "generate_args": args}]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as ended:
        sample_here(chat_model, *files[:2], "--config", tmp_path / "config.json")
    assert ended.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in error


def test_a_base_model_has_no_chat_template(tiny_model, files, sample_here, capsys):
    with pytest.raises(SystemExit):
        sample_here(tiny_model, *files)
    assert "no chat template, so it is no chat model" in capsys.readouterr().err


def test_bad_input_is_said_at_once(tmp_path):
    run = run_script(tmp_path, script=SCRIPT, output_dir=None, check=False)
    assert run.returncode == 2
    assert run.errors == [f"error: {tmp_path}: not a model, no config.json; it holds nothing"]


def test_replies_fit_into_the_models_positions_and_a_temperature_of_0_is_greedy(
    chat_model, files, sample_here, tmp_path, capsys
):
    config = [
        {"name": "long", "generate_args": {"max_new_tokens": 100_000}},
        {"name": "cold", "generate_args": {"max_new_tokens": 3, "do_sample": True, "temperature": 0, "top_k": 5}},
        {"name": "greedy", "generate_args": {"max_new_tokens": 3}},
    ]
    (tmp_path / "config.json").write_text(json.dumps({"configurations": config}))
    report = sample_here(chat_model, *files[:2], "--config", tmp_path / "config.json")
    assert "tokens (long): more have no room" in capsys.readouterr().out
    outputs = [
        {result["sampling_config"]: result["outputs"] for result in prompt["results"]} for prompt in report["prompts"]
    ]
    assert all(of["cold"] == of["greedy"] for of in outputs)
    assert all(len(of["long"]) == 1 for of in outputs)
