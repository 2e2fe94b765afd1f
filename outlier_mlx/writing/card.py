"""Model cards (`README.md`): a model's sources, size, changes and licences."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outlier_mlx.errors import listed, one_line
from outlier_mlx.models.summary import SummaryRow
from outlier_mlx.storage.hub import Source
from outlier_mlx.storage.paths import entries
from outlier_mlx.writing.assets import is_legal, is_only_legal
from outlier_mlx.writing.licences import Licence, combine, stated_licence


@dataclass(frozen=True)
class Origin:
    """A model that another one is made from.

    Attributes:
        role: "overlay", "base" or the like.
        name: the repository, or a folder's name.
        revision: the commit on the hub; None for a folder.
        licence: the licence in its model card.
    """

    role: str
    name: str
    revision: str | None
    licence: Licence | None


def origin_of(role: str, source: Source) -> Origin:
    """A source with the licence in its model card; a single file has no card."""
    licence = stated_licence(source.folder) if source.folder.is_dir() else None
    return Origin(role, source.name, source.revision, licence)


@dataclass(frozen=True)
class Card:
    """The content of a model card.

    Attributes:
        name: the model in commands: a repository or a folder.
        introduction: Markdown that describes the model.
        commands: lines for a shell.
        origins: the models that it is made from.
        rows: parameters and bytes by kind of part.
        changes: a line for each change.
        tags: tags on the hub.
        relation: the hub's name of its relation to the origins in `based_on`.
        based_on: the origins that the hub shows as its base models.
        manifest: the file that lists checksums.
        after_commands: Markdown.
        after_sizes: Markdown.
        sections: further sections in Markdown, each with its heading.
        contained: a line about an origin that is contained in another one.
        given: identifier of the licence of origins whose cards state none.
        metadata: further fields of `huggingface_hub.ModelCardData`.
        library: the library that loads the model, as the hub calls it.
        language: the language of `commands`, if it is not a shell's.
    """

    name: str
    introduction: str
    commands: Sequence[str]
    origins: Sequence[Origin]
    rows: Sequence[SummaryRow]
    changes: Sequence[str]
    tags: Sequence[str]
    relation: str
    based_on: Sequence[Origin]
    manifest: str = "checksums.json"
    after_commands: str = ""
    after_sizes: str = ""
    sections: Sequence[str] = ()
    contained: str = ""
    given: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    library: str = "mlx"
    language: str = ""

    def text(self, folder: Path) -> str:
        """The card of the model in `folder`, as Markdown with metadata at its head."""
        commands = "\n".join([f"```{self.language}", *self.commands, "```"])
        blocks = [
            f"---\n{self._metadata(folder)}\n---",
            f"# {plain(self.name.rsplit('/', 1)[-1])}",
            self.introduction,
            commands,
            self.after_commands,
            self._sizes(),
            self.after_sizes,
            *self.sections,
            self._modifications(),
            self._licences(folder),
        ]
        return "\n\n".join(block for block in blocks if block) + "\n"

    def _metadata(self, folder: Path) -> str:
        """The YAML at the head, as the hub reads it."""
        from huggingface_hub import ModelCardData

        licence = combine([origin.licence for origin in self.origins], self.given)
        stated = licence.as_json() if licence else {}
        if licence and not _leads_somewhere(folder, licence.link):
            stated.pop("license_link", None)
        bases = list(dict.fromkeys(o.name for o in self.based_on if o.revision))
        data = ModelCardData(
            **stated,
            library_name=self.library,
            pipeline_tag="text-generation",
            base_model=bases[0] if len(bases) == 1 else bases or None,
            base_model_relation=self.relation if bases else None,
            tags=list(self.tags),
            **self.metadata,
        )
        return data.to_yaml()

    def _sizes(self) -> str:
        rows = [
            f"| {row.kind} | {row.params:,} | {row.nbytes:,} | {row.bits_per_weight:.2f} |"
            for row in self.rows
        ]
        head = ["| part | parameters | bytes | bits per weight |", "|---|---:|---:|---:|"]
        return "\n".join(["## Size", "", *head, *rows])

    def _modifications(self) -> str:
        lines = ["## Modifications", "", "Made from", ""]
        for origin in self.origins:
            revision = f", revision {code(origin.revision)}" if origin.revision else ""
            lines.append(f"- {origin.role} {code(origin.name)}{revision}")
        if self.contained:
            lines.append(f"- {self.contained}")
        lines += ["", "The files here are not the originals. What was changed:", ""]
        lines += [f"- {change}" for change in self.changes]
        listing = f"`{self.manifest}` lists size and SHA-256 of every file that changes results."
        return "\n".join([*lines, "", listing])

    def _licences(self, folder: Path) -> str:
        lines = ["## Licence", "", "What the model cards of the sources state:", ""]
        for origin in self.origins:
            lines.append(f"- {origin.role} {code(origin.name)}: {_stated(origin.licence)}")
        silent = [origin.role for origin in self.origins if origin.licence is None]
        if silent and self.given:
            publisher = f"the publisher of this model names {code(self.given)}"
            lines += ["", f"For those that state none, {publisher}."]
        elif silent:
            lines += ["", f"No licence is known for the {listed(silent)}; none is assumed."]
        names = [path.name for path in entries(folder) if is_legal(path.name)]
        if names:
            lines += ["", f"Files that came with them: {', '.join(map(code, names))}."]
        return "\n".join(lines)


def with_own_code(name: str, file: str) -> tuple[list[str], str]:
    """Commands that run a model whose folder has the code `file`, and a note about them.

    Args:
        name: the model in commands.
        file: the code's name.
    """
    name, prompt = in_shell(name), '--prompt "Once upon a time"'
    commands = [
        f"outlier-mlx generate --model {name} {prompt}",
        f"mlx_lm.generate --model {name} --trust-remote-code {prompt}",
    ]
    return commands, f"The second command runs `{file}` from here; the first never does."


def in_shell(name: str) -> str:
    """A name as one word of a shell's command."""
    return shlex.quote(one_line(name))


def plain(value: object) -> str:
    """Foreign text for Markdown, without characters of markup."""
    return "".join(c for c in one_line(str(value))[:600] if c not in "`|<>[]*\\")


def code(value: object) -> str:
    """Foreign text as code in Markdown."""
    return f"`{''.join(c for c in one_line(str(value))[:300] if c not in '`|')}`"


def _stated(licence: Licence | None) -> str:
    if licence is None:
        return "none stated"
    text = ", ".join(code(value) for value in licence.ids)
    if licence.name:
        text += f" ({code(licence.name)})"
    return text + (f", {code(licence.link)}" if licence.link else "")


def _leads_somewhere(folder: Path, link: str | None) -> bool:
    """Whether a licence's link is an address, or a licence file in the folder."""
    if link is None or link.startswith(("https://", "http://")):
        return True
    return is_only_legal(folder, link)
