"""Publishing on a hub on this machine: what arrives there, and what is refused before anything does."""

import hub_server
import pytest
from huggingface_hub import ModelCard, constants

from publishing.hub import check_hub, push
from utils.errors import UserError

CARD = "---\nlicense: mit\n---\n\n# a model\n"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """One where somebody is logged in."""
    with hub_server.running() as (hub, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its own protocol, in Rust, which this hub lacks
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    return folder


@pytest.mark.parametrize("private", [True, False])
def test_what_is_published_is_the_folder(hub, folder, private):
    repo = check_hub("mine", private)
    assert repo == f"{hub_server.OWNER}/mine"
    assert not hub.repositories  # nothing was created by asking
    url = push(folder, repo, private)
    assert url.endswith(repo)
    assert hub.repositories[repo]["private"] == private
    assert hub.repositories[repo]["files"] == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_again_in_other_shards_leaves_no_weights_of_before(hub, folder):
    repo = f"{hub_server.OWNER}/mine"
    shards = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    before = dict.fromkeys([*shards, "notes.txt"], b"")
    hub.repositories[repo] = {"private": False, "files": before}
    push(folder, check_hub(repo, private=False), private=False)
    assert set(hub.repositories[repo]["files"]) == {path.name for path in folder.iterdir()} | {"notes.txt"}


def test_a_card_that_the_hub_does_not_take(hub, folder):
    (folder / "README.md").write_text("---\nlicense: [1]\n---\n")
    with pytest.raises(
        UserError, match=r'exported is written; uploading it to .* failed: .*"license" must be a string'
    ):
        push(folder, "someone/mine", private=False)


@pytest.mark.parametrize("name", ["", "a b", "a/b/c", "-x", "x--y", "x.git", "ä", "a/" + "b" * 97, "../x"])
def test_no_name_of_a_repository(hub, name):
    with pytest.raises(UserError, match="not a name that a repository can have: give OWNER/NAME"):
        check_hub(name, private=False)
    assert not hub.requests


def test_nobody_is_logged_in(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"^--push_to_hub: nobody is logged in: run `hf auth login`, or set HF_TOKEN$"):
        check_hub("someone/mine", private=False)
    assert not hub.requests


def test_a_token_that_the_hub_refuses(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    with pytest.raises(UserError, match="the hub refuses the token: log in again") as caught:
        check_hub("someone/mine", private=False)
    assert "xxxx" not in str(caught.value)


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 cannot be reached"):
        check_hub("someone/mine", private=False)


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        check_hub("someone/mine", private=False)


def test_what_is_public_does_not_become_private_by_asking(hub):
    hub.repositories["someone/mine"] = {"private": False, "files": {}}
    with pytest.raises(UserError, match="is there already and public"):
        check_hub("someone/mine", private=True)
    hub.repositories["someone/mine"]["private"] = True
    assert check_hub("someone/mine", private=True) == "someone/mine"


@pytest.mark.parametrize("place", ["/api/repos/create", "/commit/", "/preupload/"])
def test_an_upload_that_is_refused_says_how_to_try_again(hub, folder, place):
    hub.refuses = place
    with pytest.raises(UserError, match=rf"{folder} is written; uploading it .*failed: .*`hf upload a/b {folder}`"):
        push(folder, "a/b", private=False)


def test_the_hubs_own_check_of_a_card(hub):
    ModelCard(CARD).validate()
    with pytest.raises(ValueError, match="language"):
        ModelCard("---\nlanguage: [english]\n---\n").validate()
