"""The parse of a checkpoint's data is looked for here, not where the checkpoint was made."""

from omegaconf import OmegaConf

from runtime.overrides import checkpoint_config
from tests.support import compose_config


def stored(*overrides):
    cfg = compose_config("data=text", "data/parse=stanza", "paths.cache_dir=/there/c", *overrides)
    plain = OmegaConf.to_container(cfg, resolve=True)
    plain["data"]["parse"]["model_dir"] = plain["data"]["parse"]["parser"]["model_dir"] = "/there/m"
    return plain


def merged(content, *overrides):
    keys = [override.lstrip("+").split("=")[0] for override in overrides]
    cfg = compose_config("paths.cache_dir=/here", *overrides)
    return checkpoint_config(cfg, content, keys).data.parse


def test_the_folder_moves_with_the_cache():
    parse = merged(stored())
    assert (parse.folder, parse.model_dir) == ("/here/parses", "/there/m")
    assert parse.parser.model_dir == "/there/m"


def test_a_folder_of_its_own_stays():
    assert merged(stored("data.parse.folder=/there/other")).folder == "/there/other"
    # A name that only begins with that of the cache is not below it.
    assert merged(stored("data.parse.folder=/there/c2/p")).folder == "/there/c2/p"


def test_what_is_named_here_is_taken():
    parse = merged(stored(), "+data.parse.folder=/f", "+data.parse.model_dir=/m")
    assert (parse.folder, parse.model_dir, parse.parser.model_dir) == ("/f", "/m", "/m")
    assert parse.parser.lang == "en" and parse.name == "stanza"


def test_without_a_parse_there_is_nothing_to_move():
    cfg = compose_config("data=text", "paths.cache_dir=/there/c")
    assert merged(OmegaConf.to_container(cfg, resolve=True)) is None


def test_another_choice_leaves_nothing_of_the_old_one():
    content = stored()
    content["data"]["parse"]["parser"]["of_the_old"] = 1
    parse = merged(content, "data/parse=stanza", "data.parse.lang=de")
    assert (parse.parser.lang, parse.folder, parse.model_dir) == ("de", "/here/parses", None)
    assert "of_the_old" not in parse.parser
