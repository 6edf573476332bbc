"""Which files make up a set of Stanza models, and what to do where they are missing."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from data.errors import DataError


@dataclass
class StanzaModels:
    """The models of a package; nothing is loaded.

    Attributes:
        lang, package, model_dir, lemma, download: as in `data.stanza_parser.StanzaParser`.
        words_given: no tokenizer is needed.
    """

    lang: str
    package: str
    model_dir: str | None
    lemma: bool | None
    words_given: bool
    download: bool = False

    @property
    def folder(self) -> Path:
        """Where they lie."""
        from stanza.resources.common import DEFAULT_MODEL_DIR

        return Path(self.model_dir or DEFAULT_MODEL_DIR).expanduser()

    @cached_property
    def processors(self) -> tuple[str, ...]:
        """The steps of a pipeline that ends with the parser."""
        packages = self._resources.get("packages", {})
        lemma = "lemma" in packages.get(self.package, {}) if self.lemma is None else self.lemma
        return ("tokenize", "pos", *(("lemma",) if lemma else ()), "depparse")

    @cached_property
    def _resources(self) -> dict[str, Any]:
        """What the folder has for the language."""
        stanza = import_stanza()
        from stanza.resources.common import get_language_resources, load_resources_json

        if self.download:
            self._fetch(stanza)
        try:
            found = get_language_resources(load_resources_json(str(self.folder)), self.lang)
        except (OSError, ValueError) as error:
            raise self._missing("no readable resources.json") from error
        if found is None:
            raise self._missing(f"no models for the language {self.lang!r}")
        return found

    def files(self) -> dict[str, Path]:
        """Every file that a pipeline of these models reads.

        Raises:
            DataError: Stanza or a model is missing.
        """
        packages = self._resources.get("packages", {})
        if self.package not in packages:
            raise DataError(
                f"data.parse.package={self.package}: not in {self.folder / 'resources.json'};"
                f" allowed for {self.lang!r}: {', '.join(packages) or 'none'}"
            )
        from stanza.pipeline.core import build_default_config
        from stanza.resources.common import (
            add_dependencies,
            load_resources_json,
            maintain_processor_list,
            process_pipeline_parameters,
        )

        resources = load_resources_json(str(self.folder))
        lang = resources[self.lang].get("alias", self.lang)
        _, folder, package, processors = process_pipeline_parameters(
            lang, str(self.folder), self.package, ",".join(self.processors)
        )
        chosen = maintain_processor_list(
            resources, lang, package, processors, maybe_add_mwt=not self.words_given
        )
        config = build_default_config(
            resources, lang, folder, add_dependencies(resources, lang, chosen)
        )
        files = {
            name.removesuffix("_path"): Path(path)
            for name, path in config.items()
            if name.endswith("_path") and not (self.words_given and name.startswith("tokenize"))
        }
        for name in self.processors[self.words_given :]:
            if f"{name}_model" not in files:
                raise self._missing(f"the package {self.package!r} has no {name}")
        for path in files.values():
            if not path.is_file():
                raise self._missing(f"no file {path}")
        return files

    def _fetch(self, stanza: ModuleType) -> None:
        try:
            stanza.download(
                self.lang, model_dir=str(self.folder), package=self.package, logging_level="ERROR"
            )
        # The library lets through errors of several network libraries.
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise DataError(
                f"data.parse.download=true: cannot fetch the models of {self.lang!r}"
                f" ({type(error).__name__}: {reason}); copy them to data.parse.model_dir"
            ) from error

    def _missing(self, reason: str) -> DataError:
        folder = str(self.folder)
        code = f"import stanza; stanza.download('{self.lang}', model_dir='{folder}')"
        return DataError(
            f"data.parse.model_dir={folder}: {reason}; get them where there is a network with"
            f' data.parse.download=true or python -c "{code}"'
        )


def import_stanza() -> ModuleType:
    """The library, or a DataError that says how to get it."""
    try:
        import stanza
    except ImportError as error:
        raise DataError(
            "data/parse=stanza needs the library `stanza`: pip install stanza"
        ) from error
    return stanza
