"""What stands in for the foreign objects in a bd3lms checkpoint.

Such a file holds a pickled omegaconf configuration and a pickled transformers tokenizer. A pickle
names classes and says with which arguments and state to build them. Here every name that such a
file may mention leads to a class of ours that writes down arguments and state and does nothing
else, so neither library's code runs, whatever the file says about their objects.
"""

from typing import Any

from runtime.safe_load import StandIn


class Record:
    """An object as the pickle describes it.

    Attributes:
        name: the dotted name of its class.
        args: what the class was called with.
        state: what the object was filled with; None where it was not.
    """

    __slots__ = ("args", "state")
    name = ""
    args: tuple
    state: Any

    def __new__(cls, *args: Any) -> "Record":
        """Write the arguments down."""
        record = object.__new__(cls)
        record.args, record.state = args, None
        return record

    def __init__(self, *args: Any) -> None:
        pass  # __new__ has the arguments: a pickle may leave this call out

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, key: str) -> Any:
        """Part of the state; KeyError where there is none."""
        if not isinstance(self.state, dict):
            raise KeyError(key)
        return self.state[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Part of the state, or `default`."""
        return self.state.get(key, default) if isinstance(self.state, dict) else default


def _plain_dict(*_: Any) -> dict:
    """In the place of a defaultdict: without its factory, which would be called later."""
    return {}


DICT_CONFIG = "omegaconf.dictconfig.DictConfig"
LIST_CONFIG = "omegaconf.listconfig.ListConfig"
_NODES = (
    "AnyNode", "BooleanNode", "BytesNode", "EnumNode", "FloatNode", "IntegerNode",
    "InterpolationResultNode", "PathNode", "StringNode",
)  # fmt: skip
NODES = frozenset({*(f"omegaconf.nodes.{name}" for name in _NODES), "omegaconf.base.UnionNode"})
PATHS = frozenset(
    f"{module}.{kind}{flavour}"
    for module in ("pathlib", "pathlib._local")
    for kind in ("", "Pure")
    for flavour in ("Path", "PosixPath", "WindowsPath")
)
BACKEND = "tokenizers.Tokenizer"
ADDED_TOKEN = frozenset(
    {"tokenizers.AddedToken", "transformers.tokenization_utils_base.AddedToken"}
)
_TRANSFORMERS = (
    "PreTrainedTokenizerFast",
    "models.bert.tokenization_bert.BasicTokenizer",
    "models.bert.tokenization_bert.BertTokenizer",
    "models.bert.tokenization_bert.WordpieceTokenizer",
    "models.bert.tokenization_bert_fast.BertTokenizerFast",
    "models.gpt2.tokenization_gpt2.GPT2Tokenizer",
    "models.gpt2.tokenization_gpt2_fast.GPT2TokenizerFast",
    "tokenization_python.ExtensionsTrie",
    "tokenization_python.Trie",
    "tokenization_utils.ExtensionsTrie",
    "tokenization_utils.Trie",
    "tokenization_utils_fast.PreTrainedTokenizerFast",
    "tokenization_utils_tokenizers.PreTrainedTokenizerFast",
    "tokenization_utils_tokenizers.TokenizersBackend",
)
_OTHERS = (
    # How a configuration says which types its values may have.
    "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "typing.Any",
    "builtins.bool", "builtins.bytes", "builtins.dict", "builtins.float", "builtins.frozenset",
    "builtins.int", "builtins.list", "builtins.object", "builtins.str", "builtins.tuple",
    # The empty model that a tokenizers.Tokenizer is built with before it gets its state.
    "tokenizers.models.Model", "tokenizers.models.BPE", "tokenizers.models.Unigram",
    "tokenizers.models.WordLevel", "tokenizers.models.WordPiece",
)  # fmt: skip
NAMES = frozenset(
    {
        DICT_CONFIG, LIST_CONFIG, BACKEND, *NODES, *PATHS, *ADDED_TOKEN, *_OTHERS,
        *(f"transformers.{name}" for name in _TRANSFORMERS),
    }
)  # fmt: skip


def _stand_in(name: str) -> StandIn:
    """A class of records with the name of the foreign class, also in messages."""
    module, _, kind = name.rpartition(".")
    return type(kind, (Record,), {"__slots__": (), "__module__": module, "name": name}), name


STAND_INS: tuple[StandIn, ...] = (
    *map(_stand_in, sorted(NAMES)),
    (_plain_dict, "collections.defaultdict"),
)
MENTIONED = NAMES | {"collections.defaultdict"}


def is_record(value: Any, *names: str) -> bool:
    """Whether `value` stands for an object of one of these classes."""
    return isinstance(value, Record) and value.name in names


def text_of(value: Any) -> str | None:
    """The text of a token, given as a string or as an AddedToken."""
    if is_record(value, *ADDED_TOKEN):
        value = value.get("content", value.args[0] if value.args else None)
    return value if isinstance(value, str) else None
